"""What a run proves before its first step: labels, ledger, loss, and that what it saves opens again."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.config import Recipe
from hf_clm.data.batch.draws import check_draws
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.build import Split, label_options
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import Renderer
from hf_clm.data.proof.certificate import Certificate, certify, hash_content
from hf_clm.data.proof.ledger import (
    Leakage,
    Ledger,
    LedgerWriter,
    Totals,
    build_ledger,
    check_balance,
    check_entries,
    check_leakage,
    check_packing,
    ledger_blocks,
    measure_leakage,
)
from hf_clm.data.read.plain_template import as_messages
from hf_clm.doctor.round_trip import FOLDER, Question, RoundTrip, start_round_trip
from hf_clm.doctor.selftest import SelfTest, self_test
from hf_clm.errors import DataError, ModelError
from hf_clm.loss import LossOptions, TargetLoss
from hf_clm.model import is_adapted
from hf_clm.schema import TokenizedExample
from hf_clm.text.chat import stop_token_ids
from hf_clm.training.callbacks import write_line
from hf_clm.training.trainer import CLMTrainer

COMPARED = 50  # rows whose prompt is rendered again as for generation
ASKED, ASKED_TOKENS = 3, 1024  # rows that the saved model is asked with, and their longest prompt


@dataclass
class Proof:
    """What was proved: for run.json, as lines to print, and for ledger.parquet."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    ledgers: dict[str, Ledger] = field(default_factory=dict)

    def enter(self, name: str, certificate: Certificate, *, totals: Totals, compared: int) -> None:
        """What was proved of a split; ``compared``: prompts."""
        self.facts[name] = {"certificate": certificate.to_json(), "ledger": totals.to_json()}
        first, *others = totals.to_lines()
        self.lines += [f"{name:<10}{first}", *(f"{'':<10}{line}" for line in others)]
        seconds = f"{certificate.seconds:.1f} s, sha256 {certificate.content_hash[:12]}"
        self.lines.append(f"{'':<10}the labels of all {certificate.rows:,} rows are certified ({seconds})")
        if compared:
            self.lines.append(f"{'':<10}the first {compared} prompts are what generate is given")

    def enter_leakage(self, leakage: Leakage, *, max_leakage: float) -> None:
        """What was found of training rows among the evaluation rows; raises DataError for too many."""
        if leakage.share:
            self.lines.append(f"note      {leakage.share:.1%} of the evaluation rows are training rows")
        check_leakage(leakage, max_leakage)
        self.facts["leakage"] = {"exact": len(leakage.exact), "normalised": len(leakage.normalised)}


def prove_data(recipe: Recipe, splits: Mapping[str, Split], *, tokenizer: PreTrainedTokenizerFast) -> Proof:
    """Certifies the labels of every row, balances the ledger, compares the sets.

    Args:
        splits: train and, if there is one, eval.

    Raises DataError for labels that are not certified, a ledger that does not balance, and training rows
    among the evaluation rows.
    """
    proof = Proof()
    for name, split in splits.items():
        certificate = certify_split(recipe, split, tokenizer=tokenizer)
        certificate.require()
        packed = split.dataset if isinstance(split.dataset, PackedDataset) else None
        ledger = build_ledger(split.rows.rows, split.examples.places, packed=packed, **_lost(split))
        check_balance(ledger, split.rows.rows, packed=packed)
        proof.ledgers[name] = ledger
        totals = Totals()
        totals.add(ledger)
        compared = check_prompts(recipe, split, tokenizer=tokenizer) if recipe.stage == "sft" else 0
        proof.enter(name, certificate, totals=totals, compared=compared)
    if "eval" in splits:
        train, evaluation = splits["train"].examples, splits["eval"].examples
        proof.enter_leakage(
            measure_leakage(train.examples, evaluation.examples, places=evaluation.places),
            max_leakage=recipe.data.max_leakage,
        )
    return proof


def prove_mix(split: Split) -> list[str]:
    """Checks that the packed rows hold each label as often as its row was drawn; the line to print.

    Raises DataError where they do not.
    """
    rows, mix = split.rows.rows, split.mix
    if mix is None or not isinstance(split.dataset, PackedDataset):
        return []
    check_draws(split.dataset, rows, times=mix.times[rows.sources])
    return [f"{'mixed':<10}the packed rows hold each label as often as its row was drawn"]


def prove_stored(
    recipe: Recipe,
    splits: Mapping[str, Split],
    *,
    tokenizer: PreTrainedTokenizerFast,
    certified: Mapping[str, Mapping[str, Any]],
    leakage: Leakage | None,
    ledger: Path,
) -> Proof:
    """``prove_data`` for sets in files, whose blocks were certified as they were made; reads them in blocks.

    Args:
        certified: by split, how many rows were encoded again, and in how many seconds all were checked.
        leakage: of the evaluation set, if there is one.
        ledger: where to write it.
    """
    proof, writer = Proof(), LedgerWriter(ledger)
    for name, split in splits.items():
        rows, options = split.rows.rows, label_options(recipe)
        started = time.monotonic()
        certificate = Certificate(len(rows), hash_content(rows, tokenizer=tokenizer, options=options))
        certificate.encoded_again = certified[name]["encoded_again"]
        certificate.seconds = certified[name]["seconds"] + time.monotonic() - started
        packed, totals = split.dataset if isinstance(split.dataset, PackedDataset) else None, Totals()
        for block in ledger_blocks(rows, split.examples.places, packed=packed):
            check_entries(block, rows.fates)
            writer.append(name, block)
            totals.add(block)
        lost = Ledger([], **_lost(split))
        writer.append(name, lost)
        totals.add(lost)
        if packed is not None:
            check_packing(rows, packed)
        compared = check_prompts(recipe, split, tokenizer=tokenizer) if recipe.stage == "sft" else 0
        proof.enter(name, certificate, totals=totals, compared=compared)
    writer.close()
    if leakage is not None:
        proof.enter_leakage(leakage, max_leakage=recipe.data.max_leakage)
    return proof


def _lost(split: Split) -> dict[str, Any]:
    return {"unreadable": split.examples.report.bad_lines, "duplicates": split.examples.duplicates}


def check_prompts(recipe: Recipe, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> int:
    """Compares, for the first rows, the ids before the last target with those that ``generate`` is given.

    Returns how many were compared. Raises DataError for the first that differs.
    """
    rows, examples = split.rows.rows, split.examples
    compared = 0
    for number, example in enumerate(examples.examples[:COMPARED]):
        question = example.question
        if question is None or rows.fates[number].kind != "used":
            continue
        given = encode_prompts([question[0]], tokenizer, label_options(recipe))[0]
        last = int(np.searchsorted(rows.sources, number, side="right")) - 1
        found = rows[last]["input_ids"][: len(given)]
        if found != given and _ends_in_target(rows[last]):
            what = "the prompt in training is not the one that generate is given"
            got = repr(tokenizer.decode(found)[-60:])
            raise DataError(what, where=examples.places[number], got=got, fix="correct the chat template")
        compared += 1
    return compared


def _ends_in_target(row: TokenizedExample) -> bool:
    """False where the last turn is not learned, and so not in the row."""
    return row["labels"][-1] >= 0


def certify_split(recipe: Recipe, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> Certificate:
    """The certificate of a tokenized set under the recipe's label options."""
    places, examples = split.examples.places, split.examples.examples
    options, stops = label_options(recipe), stop_token_ids(tokenizer)
    rows = split.rows.rows
    return certify(rows, examples, tokenizer=tokenizer, options=options, stop_ids=stops, places=places)


def prove_model(
    trainer: CLMTrainer,
    recipe: Recipe,
    *,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """Tests the loss on the real model and data while a fresh process opens the saved model. Rank 0 only.

    Returns what run.json holds of it; a test that was turned off, or cannot be made, says so.
    Raises ModelError where a test fails.
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
                f"tested    one loss and gradient packed, padded and alone ({result.documents} documents)"
            )
        if trip is not None:
            proof["round_trip"] = finish_round_trip(trainer, trip, tokenizer=tokenizer)
    finally:
        if trip is not None and trip.process.poll() is None:
            trip.process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return proof


def check_stops(trainer: CLMTrainer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ModelError where a stop token that is learned is not one that generation stops at."""
    model: Any = trainer.model
    known = model.generation_config.eos_token_id
    missing = set(stop_token_ids(tokenizer)) - set(known if isinstance(known, list) else [known])
    if missing:
        got = f"{known} without {sorted(missing)}"
        raise ModelError("generation does not stop where training ends a text", where="eos_token_id", got=got)


def measure_self_test(trainer: CLMTrainer, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> SelfTest:
    """The self-test of the loss as this run computes it."""
    arguments = trainer.args
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    pad: Any = tokenizer.pad_token_id
    model, examples = (cast(Any, part) for part in (trainer.model, split.rows))
    measuring = partial(_measuring_likelihood, trainer.target_loss) if trainer.target_loss else None
    return self_test(model, examples, pad_token_id=pad, autocast=autocast, measuring=measuring)


@contextmanager
def _measuring_likelihood(loss: TargetLoss) -> Iterator[None]:
    """The loss of training without the terms beside the likelihood, which the model's own has not."""
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
    """The round trip of the final model (``doctor.round_trip: end``), where it was saved."""
    trip = _open(trainer, folder, split=split, questions=questions)
    return finish_round_trip(trainer, trip, tokenizer=tokenizer)


def finish_round_trip(
    trainer: CLMTrainer, trip: RoundTrip, *, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Compares, and prints that the saved model opens."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    found = trip.finish(model, tokenizer)
    how = "peft" if is_adapted(model) else "from_pretrained"
    write_line(f"opens     with plain {how} in a fresh process, with the same logits, tokens and template")
    if trip.asked:
        write_line(f"answers   pipeline(messages) as it does here: {len(trip.asked)} prompts, id for id")
    return found


def find_questions(
    split: Split, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, format: str
) -> list[Question]:
    """The first rows as messages, to ask the saved model with transformers alone; none for pretraining.

    Left out are chats that need more than messages, and texts that spell a control token: transformers would
    make that token of it.
    """
    options = label_options(recipe)
    if recipe.stage == "pretrain" or not tokenizer.chat_template or options.special_tokens_in_text == "allow":
        return []
    renderer = Renderer(tokenizer, options)
    found: list[Question] = []
    for example in split.examples.examples[:COMPARED]:
        question = example.question
        if question is None or len(found) == ASKED:
            continue
        messages = as_messages(question[0], format, recipe.data.train[0].template)
        if messages and not renderer.encoder.may_spell(question[0].texts):
            ids = encode_prompts([question[0]], tokenizer, options)[0]
            found.append(Question(messages, ids))
    return [question for question in found if len(question.ids) <= ASKED_TOKENS]


def _open(
    trainer: CLMTrainer, folder: Path, *, split: Split, questions: Sequence[Question] = ()
) -> RoundTrip:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    dtype = str(model.dtype).removeprefix("torch.") if is_adapted(model) else "auto"
    prompt = [*map(int, split.dataset[0]["input_ids"])]
    return start_round_trip(folder, prompt, dtype=dtype, asked=questions)
