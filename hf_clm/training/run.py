"""One run, from a recipe to a folder that ``from_pretrained`` opens. Read this first."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)

from hf_clm.config import Recipe, recipe_to_yaml
from hf_clm.data.build import Split
from hf_clm.data.cache import load_early
from hf_clm.data.segments import whole_text
from hf_clm.data.streaming import PositionCollator, StreamedRows
from hf_clm.doctor.checks import check_before_training
from hf_clm.doctor.facts import build_facts
from hf_clm.errors import RecipeError
from hf_clm.evaluation.metrics import unigram_entropy
from hf_clm.generation.generate import generate, to_prompt_example
from hf_clm.hardware import peak_memory, settle_cpu
from hf_clm.inspector.documents import Reader
from hf_clm.inspector.excerpt import write_excerpt
from hf_clm.model import takes_targets
from hf_clm.parts import (
    build_collator,
    build_model,
    build_model_config,
    build_stream,
    build_tokenizer,
    resolve,
    static_shape,
    training_arguments,
)
from hf_clm.report.page import write_report
from hf_clm.training.callbacks import (
    EpochMeansCallback,
    LastEvaluationCallback,
    MetricsCallback,
    ProgressCallback,
    ReportCallback,
    SamplesCallback,
    write_line,
)
from hf_clm.training.card import write_card
from hf_clm.training.output import prepare_output_dir, recording_failure, resume_from, write_json
from hf_clm.training.plots import write_loss_plots
from hf_clm.training.prepare import Prepared, prepare
from hf_clm.training.proof import prove_model, prove_saved
from hf_clm.training.publish import check_can_push
from hf_clm.training.streamed import stream_totals
from hf_clm.training.summary import RunFacts, end_lines, start_lines
from hf_clm.training.trainer import CLMTrainer

EVALUATED_ROWS = 64  # of the training data, where there is no eval set: they show a loss before and after


def train(recipe: Recipe, *, is_terminal: bool = False) -> dict[str, Any]:
    """Trains, saves, returns what run.json holds. Raises UserError before the first step."""
    arguments = training_arguments(recipe)
    is_main = arguments.process_index == 0
    check_can_push(arguments)
    if arguments.device.type == "cpu":
        settle_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    output_dir = prepare_output_dir(arguments, overwrite=recipe.overwrite)
    loaded = load_early(recipe, arguments.seed)
    tokenizer = build_tokenizer(recipe, loaded, arguments=arguments)
    config = build_model_config(recipe, tokenizer)
    prepared = prepare(recipe, tokenizer, arguments=arguments, loaded=loaded)
    splits, proof = prepared.splits, prepared.proof
    known = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
    proof.lines += [f"warning   {line}" for line in check_before_training(known)]
    stream = build_stream(recipe, tokenizer, arguments=arguments, checkpoint=resume_from(arguments))
    model = build_model(recipe, tokenizer, config=config, arguments=arguments)

    trainer = build_trainer(
        model, arguments, recipe=recipe, tokenizer=tokenizer, splits=splits, stream=stream
    )
    facts = RunFacts(recipe, arguments, model, splits, unigram_entropy(splits["train"].rows.rows.labels))
    with arguments.main_process_first(local=False, desc="proving the model"):
        if is_main:
            trainer.add_callback(ProgressCallback(is_terminal=is_terminal))
            memory = partial(peak_memory, arguments.device)
            trainer.add_callback(MetricsCallback(output_dir / "metrics.jsonl", measure_memory=memory))
            write_line("\n".join([*start_lines(facts), *proof.lines]))
            proof.facts |= prove_model(trainer, recipe, split=splits["train"], tokenizer=tokenizer)
            write_start(facts, prepared, tokenizer=tokenizer)
    trainer.add_callback(LastEvaluationCallback())
    trainer.add_callback(EpochMeansCallback(output_dir / "metrics.jsonl"))
    if recipe.samples:
        trainer.add_callback(build_samples(facts, trainer, tokenizer=tokenizer))
    report = ReportCallback(partial(write_report, output_dir, is_live=True), is_main=is_main)
    trainer.add_callback(report)
    started = time.monotonic()
    with closing(report), recording_failure(output_dir / "run.json", is_main=is_main):
        trainer.train(resume_from_checkpoint=resume_from(arguments))
        result = finish(trainer, facts, proof=proof.facts, seconds=time.monotonic() - started)
    if arguments.push_to_hub:  # the run is done, whatever the Hub says
        trainer.push_run(with_data=recipe.card.data_samples > 0)
    return result


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    splits: Mapping[str, Split],
    stream: StreamedRows | None = None,
) -> CLMTrainer:
    """The Trainer over the packed rows; without an eval set it evaluates on some of the training rows."""
    train_split, eval_split = splits["train"], splits.get("eval")
    watched = recipe.data.eval_train_rows
    datasets = [split.dataset for split in splits.values()]
    static = static_shape(datasets, arguments) if arguments.torch_compile else None
    collate = build_collator(recipe, tokenizer, with_targets=takes_targets(model), static=static)
    trainer = CLMTrainer(
        model=model,
        args=arguments,
        data_collator=PositionCollator(collate) if stream else collate,
        train_dataset=stream or train_split.dataset,
        eval_dataset=eval_split.dataset if eval_split else first_rows(train_split, EVALUATED_ROWS),
        processing_class=tokenizer,
        z_loss=recipe.loss.z_loss,
        watched_rows=first_rows(train_split, watched) if watched else None,
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.early_stopping:
        patience, threshold = recipe.early_stopping.patience, recipe.early_stopping.threshold
        trainer.add_callback(EarlyStoppingCallback(patience, threshold))
    return trainer


def first_rows(split: Split, count: int) -> torch.utils.data.Subset:
    """The first rows of what is trained on, or all where there are fewer."""
    return torch.utils.data.Subset(split.dataset, range(min(count, len(split.dataset))))


def write_start(facts: RunFacts, prepared: Prepared, *, tokenizer: PreTrainedTokenizerFast) -> None:
    """What the output folder holds before the first step: ledger, first rows, recipe, run.json."""
    recipe, folder = facts.recipe, Path(str(facts.arguments.output_dir))
    prepared.write_ledger(folder / "ledger.parquet")
    reader = Reader(facts.train, tokenizer, recipe=recipe)
    write_excerpt(folder / "label_rows.jsonl", reader, collate=build_collator(recipe, tokenizer))
    text = recipe_to_yaml(resolve(recipe, facts.arguments))
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    start = {"status": "running", **facts.to_json(), "proof": prepared.proof.facts}
    write_json(folder / "run.json", start)


def build_samples(
    facts: RunFacts, trainer: CLMTrainer, *, tokenizer: PreTrainedTokenizerFast
) -> SamplesCallback:
    """Generates the recipe's sample prompts, rendered as the training data are."""
    recipe, section = facts.recipe, facts.recipe.samples
    assert section is not None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        what = "rank 0 cannot generate from a sharded model alone"
        raise RecipeError(
            what, where="samples", fix="set samples to null, and use hf-clm generate afterwards"
        )
    shape: dict[str, Any] = {"template": facts.template}
    prompts = [to_prompt_example(prompt, facts.format, **shape) for prompt in section.prompts]
    options: dict[str, Any] = {"max_new_tokens": section.max_new_tokens, "do_sample": section.temperature > 0}
    options["special_tokens_in_text"] = recipe.data.special_tokens_in_text
    if section.temperature > 0:
        options["temperature"] = section.temperature

    def answers() -> list[str]:
        with trainer.untimed():
            model = trainer.accelerator.unwrap_model(trainer.model)
            found = generate(model, tokenizer, prompts=prompts, **options)
            return [answer.text for answer in found]

    path = Path(str(trainer.args.output_dir)) / "samples.jsonl"
    every: dict[str, Any] = {"every_steps": section.every_steps, "every_epoch": section.every_epoch}
    return SamplesCallback(section.prompts, answers, path=path, **every)


def shown_examples(facts: RunFacts) -> list[str]:
    """The training texts that the recipe wants in the model card."""
    count = facts.recipe.card.data_samples
    if not count:
        return []  # those of a prepared set would be read again
    first = islice(facts.train.examples.examples, count)
    return [whole_text(example) for example in first if not isinstance(example, dict)]


def finish(trainer: CLMTrainer, facts: RunFacts, *, proof: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Evaluates, saves the model, run.json and the plots, and prints what was reached."""
    output_dir = Path(str(trainer.args.output_dir))
    history, arguments = trainer.state.log_history, trainer.args
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    is_known = last.get("step") == trainer.state.global_step and not arguments.load_best_model_at_end
    final = last if is_known else trainer.evaluate()
    trainer.save_model(str(output_dir), _internal_call=True)  # pushed when everything is written
    totals = stream_totals(trainer)
    result = {
        "status": "done",
        **facts.to_json(),
        **facts.outcome(
            history,
            final,
            seconds=seconds,
            steps=trainer.state.global_step,
            speed={"tokens_per_second": trainer.tokens_per_second, "mfu": trainer.mfu},
        ),
        "proof": proof,
        **({"stream": totals} if totals else {}),
    }
    if trainer.is_world_process_zero():
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if facts.recipe.doctor.round_trip == "end" and not is_sharded:
            tokenizer: Any = trainer.processing_class
            proof["round_trip"] = prove_saved(trainer, split=facts.splits["train"], tokenizer=tokenizer)
        lines = (output_dir / "metrics.jsonl").read_text("utf-8").splitlines()
        write_loss_plots([json.loads(line) for line in lines], output_dir)
        section = facts.recipe.card
        about: dict[str, Any] = {"license": section.license, "language": section.language}
        write_card(output_dir, result, samples=shown_examples(facts), **about)
        write_json(output_dir / "run.json", result)
        write_line("\n".join(end_lines(facts, result)))
    return result
