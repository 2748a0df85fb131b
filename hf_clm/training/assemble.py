"""Assembles the data, the model and the Trainer of a run, for training (run.py) and for replays.

recipe -> tokenizer, data, checks -> Inputs        once
Inputs -> model, Trainer, facts                    again for every training from these inputs
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)

from hf_clm.data.batch.collators import static_shape
from hf_clm.data.batch.left_out import LeavingOutCollator
from hf_clm.data.label.datasets import label_options
from hf_clm.data.prepared.sets import load_early
from hf_clm.data.prepared.stream import PositionCollator, StreamedRows
from hf_clm.data.read.plain_template import give_plain_template, settle_render
from hf_clm.data.split import Split, build_collator, leave_out
from hf_clm.doctor.checks import check_before_training
from hf_clm.doctor.facts import build_facts
from hf_clm.doctor.micro_batch import settle_batch
from hf_clm.errors import DataError, RecipeError
from hf_clm.machine import settle_cpu
from hf_clm.model.build import build_model, build_model_config, build_tokenizer
from hf_clm.model.load import takes_targets
from hf_clm.model.loss import LossOptions
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import EVAL, TRAIN
from hf_clm.training.answering import Answering, find_questions, load_answer_metrics
from hf_clm.training.arguments import build_stream
from hf_clm.training.callbacks import PatienceCallback, tolerate_trackers
from hf_clm.training.faults import keep_timeout
from hf_clm.training.prepare import Prepared, prepare
from hf_clm.training.python import Additions
from hf_clm.training.summary import RunFacts, guessing_loss, seal_facts
from hf_clm.training.trainer import CLMTrainer

NO_ADDITIONS = Additions()
EVALUATED_ROWS = 64  # of the training data, if there is no evaluation set


@dataclass(frozen=True)
class Inputs:
    """What a model is trained on and with.

    recipe     with the micro-batch and the compilation that were chosen
    settled    the recipe as its data were prepared: ``data.render`` is chat or plain
    template   the chat template with which they were prepared. The tokenizer may have been given one since.
    """

    recipe: Recipe
    settled: Recipe
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerFast
    config: PretrainedConfig
    prepared: Prepared
    template: str | dict[str, str] | None


def settle_machine(arguments: TrainingArguments) -> None:
    """Sets up this process for training on a CPU: its threads, its memory and the timeout of its group."""
    if arguments.device.type == "cpu":
        settle_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        keep_timeout(arguments)


def prepare_inputs(
    recipe: Recipe,
    arguments: TrainingArguments,
    *,
    kept: Mapping[str, Any],
    most_rows: int | None = None,
    date: str = "",
) -> Inputs:
    """Loads or trains the tokenizer, prepares the data, and chooses the micro-batch. Needs no model.

    Args:
        kept: the section ``train`` of the checkpoint that is resumed, with the choices of the first start.
        most_rows: the largest micro-batch that may fit, if a larger one did not.
        date: the date that the chat template prints, if an earlier start of the run has set one.

    Adds lines about the choices, and warnings, to the proof. Raises UserError for all that is found wrong.
    """
    load_answer_metrics(recipe.evaluation)
    tokenizer = build_tokenizer(recipe, load_early(recipe, arguments.seed), arguments=arguments)
    config = build_model_config(recipe, tokenizer)
    settled = settle_render(recipe, tokenizer)
    prepared = prepare(settled, tokenizer, arguments=arguments, date=date)
    splits, proof = prepared.splits, prepared.proof
    template = tokenizer.chat_template
    proof.lines += give_plain_template(tokenizer, settled, formats=splits[TRAIN].examples.formats)
    checked = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
    checked, choices = settle_batch(checked, kept=kept, most_rows=most_rows)
    proof.lines += choices
    proof.lines += [f"warning   {line}" for line in check_before_training(checked)]
    return Inputs(checked.recipe, settled, checked.arguments, tokenizer, config, prepared, template)


def assemble(
    inputs: Inputs, *, checkpoint: Path | None, additions: Additions = NO_ADDITIONS
) -> tuple[CLMTrainer, RunFacts]:
    """Builds the model and its Trainer. ``checkpoint``: where a stream is continued, if training resumes."""
    recipe, arguments, tokenizer = inputs.recipe, inputs.arguments, inputs.tokenizer
    splits, proof = inputs.prepared.splits, inputs.prepared.proof
    stream = build_stream(inputs.settled, tokenizer, arguments=arguments, checkpoint=checkpoint)
    model = build_model(recipe, tokenizer, config=inputs.config, arguments=arguments)
    entropy = guessing_loss(splits[TRAIN])
    facts = RunFacts(recipe, arguments, model, splits, entropy, render=inputs.settled.data.render)
    trainer = build_trainer(
        model,
        arguments,
        recipe=recipe,
        tokenizer=tokenizer,
        splits=splits,
        stream=stream,
        sealed={**seal_facts(facts, tokenizer, proof=proof.facts), "additions": additions.names},
        additions=additions,
    )
    return trainer, facts


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    splits: Mapping[str, Split],
    stream: StreamedRows | None = None,
    sealed: Mapping[str, Any] | None = None,
    additions: Additions = NO_ADDITIONS,
) -> CLMTrainer:
    """Builds the Trainer. Without an evaluation set, it evaluates on some of the training rows."""
    train_split, watched = splits[TRAIN], recipe.data.eval_train_rows
    evaluated = {name: split.dataset for name, split in splits.items() if name != TRAIN}
    named = {name.removeprefix(f"{EVAL}_"): dataset for name, dataset in evaluated.items()}
    datasets = [split.dataset for split in splits.values()]
    rows = max(arguments.train_batch_size, arguments.eval_batch_size)
    share = train_split.target_tokens / max(1, train_split.tokens)
    static = static_shape(datasets, rows=rows, target_share=share) if arguments.torch_compile else None
    collate = build_collator(recipe, tokenizer, with_targets=takes_targets(model), static=static)
    if len(train_split.left_out):
        collate = LeavingOutCollator(collate)
    trainer_class = additions.trainer_class or CLMTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        data_collator=PositionCollator(collate) if stream else collate,
        train_dataset=stream or leave_out(train_split),
        eval_dataset=evaluated.get(EVAL, named or first_rows(train_split, watched or EVALUATED_ROWS)),
        processing_class=tokenizer,
        loss_options=LossOptions(**recipe.loss.model_dump()),
        optimizer_section=recipe.optimizer,
        watched_rows=first_rows(train_split, watched) if watched and evaluated else None,
        answering=build_answering(recipe, arguments, tokenizer=tokenizer, splits=splits),
        answers_every=recipe.evaluation.every,
        seal_facts=sealed,
        callbacks=list(additions.callbacks),
        compute_metrics=additions.metrics(),
        optimizers=additions.optimizers(model),
    )
    trainer.remove_callback(PrinterCallback)
    tolerate_trackers(trainer)
    if recipe.early_stopping:
        patience, threshold = recipe.early_stopping.patience, recipe.early_stopping.threshold
        trainer.add_callback(PatienceCallback(patience, threshold))
    for key, value in recipe.loss.model_dump(exclude_defaults=True).items():
        if trainer.own_loss:
            what = f"has no effect: the model computes its own loss ({trainer.own_loss})"
            raise RecipeError(what, where=f"loss.{key}", got=f"{value:g}", fix="remove it")
    return trainer


def build_answering(
    recipe: Recipe,
    arguments: TrainingArguments,
    *,
    tokenizer: PreTrainedTokenizerFast,
    splits: Mapping[str, Split],
) -> Answering | None:
    """Builds the measurement of answers at evaluations; returns None if the recipe does not enable it.

    Raises DataError for an evaluation set without prompts.
    """
    section = recipe.evaluation
    if not section.generate:
        return None
    sets = {name: find_questions(split, section.generate) for name, split in splits.items() if name != TRAIN}
    for name, questions in sets.items():
        if not questions:
            files = ", ".join(splits[name].examples.report.files[:2])
            what = "no example has a prompt to answer"
            raise DataError(what, where=files, fix="set evaluation.generate to 0")
    return Answering(
        sets,
        load_answer_metrics(section),
        tokenizer=tokenizer,
        rendering=label_options(recipe),
        max_new_tokens=section.max_new_tokens,
        arguments=arguments,
    )


def first_rows(split: Split, count: int) -> torch.utils.data.Subset:
    """Returns the first training rows, or all if there are fewer."""
    return torch.utils.data.Subset(split.dataset, range(min(count, len(split.dataset))))
