"""Checks a model before the first step: its loss, and that the saved model loads and answers the same."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import label_options
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import Renderer
from hf_clm.data.read.plain_template import as_messages
from hf_clm.data.split import Split
from hf_clm.doctor.round_trip import FOLDER, Question, RoundTrip, start_round_trip
from hf_clm.doctor.selftest import SelfTest, self_test
from hf_clm.errors import ModelError
from hf_clm.model.load import is_adapted
from hf_clm.model.loss import LossOptions, TargetLoss
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.chat import stop_token_ids
from hf_clm.training.callbacks import write_line
from hf_clm.training.trainer import CLMTrainer

MAX_QUESTIONS, MAX_PROMPT_TOKENS = 3, 1024  # of the prompts that the saved model answers
SEARCHED_ROWS = 50  # rows that are searched for such prompts


def prove_model(
    trainer: CLMTrainer,
    recipe: Recipe,
    *,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """Tests the loss on the real model and data while a fresh process loads the saved model. Rank 0 only.

    Returns the results for run.json, with the reason for a test that was not run.
    Raises ModelError if a test fails.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return {"self_test": "off: the model is sharded", "round_trip": "off: the model is sharded"}
    check_stops(trainer, tokenizer)
    proof: dict[str, Any] = {"self_test": "off", "round_trip": recipe.doctor.round_trip}
    folder = Path(str(trainer.args.output_dir)) / FOLDER
    trip: RoundTrip | None = None
    try:
        if recipe.model.trust_remote_code and recipe.doctor.round_trip != "off":
            proof["round_trip"] = "off: the model brings its own code"
        elif recipe.lora and recipe.lora.quantize and recipe.doctor.round_trip != "off":
            proof["round_trip"] = "off: the model is in 4 bits"
        elif recipe.doctor.round_trip == "start":
            trainer.save_model(str(folder), _internal_call=True)
            trip = _open(trainer, folder, split=split, questions=questions)
        if recipe.doctor.self_test:
            result = measure_self_test(trainer, split, tokenizer=tokenizer)
            result.require()
            proof["self_test"] = result.to_json()
            write_line(
                f"tested    same loss and gradient packed, padded and alone ({result.documents} documents)"
            )
        if trip is not None:
            proof["round_trip"] = finish_round_trip(trainer, trip, tokenizer=tokenizer)
    finally:
        if trip is not None and trip.process.poll() is None:
            trip.process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return proof


def check_stops(trainer: CLMTrainer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ModelError if the model learns a stop token at which generation does not stop."""
    model: Any = trainer.model
    eos = model.generation_config.eos_token_id
    missing = set(stop_token_ids(tokenizer)) - set(eos if isinstance(eos, list) else [eos])
    if missing:
        got = f"{eos} without {sorted(missing)}"
        what = "generation does not stop at every token that ends a training text"
        raise ModelError(what, where="eos_token_id", got=got)


def measure_self_test(trainer: CLMTrainer, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> SelfTest:
    """Runs the self-test on the loss as this run computes it."""
    arguments = trainer.args
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    pad: Any = tokenizer.pad_token_id
    model, examples = (cast(Any, part) for part in (trainer.model, split.rows))
    measuring = partial(_measuring_likelihood, trainer.target_loss) if trainer.target_loss else None
    return self_test(model, examples, pad_token_id=pad, autocast=autocast, measuring=measuring)


@contextmanager
def _measuring_likelihood(loss: TargetLoss) -> Iterator[None]:
    """Measures the loss without its additional terms, which the model's own loss does not have."""
    options, loss.options = loss.options, LossOptions()
    try:
        with loss.measuring():
            yield
    finally:
        loss.options = options


def prove_saved(
    trainer: CLMTrainer,
    folder: Path,
    *,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """Runs the round trip of the final model, saved in ``folder`` (``doctor.round_trip: end``)."""
    trip = _open(trainer, folder, split=split, questions=questions)
    return finish_round_trip(trainer, trip, tokenizer=tokenizer)


def finish_round_trip(
    trainer: CLMTrainer, trip: RoundTrip, *, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Compares the saved model with the one in memory, and prints the result."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    result = trip.finish(model, tokenizer)
    how = "peft" if is_adapted(model) else "from_pretrained"
    write_line(f"reloaded  with plain {how} in a fresh process: same logits, tokens and template")
    if trip.questions:
        count = len(trip.questions)
        write_line(f"answers   same token ids from pipeline(messages) as from this run ({count} prompts)")
    return result


def find_questions(
    split: Split, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, format: str
) -> list[Question]:
    """Returns prompts of the first rows as messages, for a check with transformers alone; [] for pretraining.

    Skips chats that need more than messages, and texts that spell out a control token, which transformers
    would parse as that token.
    """
    options = label_options(recipe)
    if recipe.stage == "pretrain" or not tokenizer.chat_template or options.special_tokens_in_text == "allow":
        return []
    renderer = Renderer(tokenizer, options)
    questions: list[Question] = []
    for example in split.examples.examples[:SEARCHED_ROWS]:
        question = example.question
        if question is None or len(questions) == MAX_QUESTIONS:
            continue
        messages = as_messages(question[0], format, recipe.data.train[0].template)
        if messages and not renderer.encoder.may_have_control(question[0].texts):
            ids = encode_prompts([question[0]], tokenizer, options)[0]
            questions.append(Question(messages, ids))
    return [question for question in questions if len(question.ids) <= MAX_PROMPT_TOKENS]


def _open(
    trainer: CLMTrainer, folder: Path, *, split: Split, questions: Sequence[Question] = ()
) -> RoundTrip:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    dtype = str(model.dtype).removeprefix("torch.") if is_adapted(model) else "auto"
    prompt = [*map(int, split.dataset[0]["input_ids"])]
    return start_round_trip(folder, prompt, dtype=dtype, questions=questions)
