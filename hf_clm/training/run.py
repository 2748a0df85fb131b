"""A run, from a recipe to a folder that ``from_pretrained`` loads. Read this first."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)

from hf_clm.data.batch.collators import static_shape
from hf_clm.data.label.datasets import label_options
from hf_clm.data.prepared.cache import data_content
from hf_clm.data.prepared.sets import load_early
from hf_clm.data.prepared.stream import PositionCollator, StreamedRows
from hf_clm.data.read.plain_template import give_plain_template, settle_render
from hf_clm.data.split import Split, build_collator
from hf_clm.doctor.checks import check_before_training
from hf_clm.doctor.facts import build_facts
from hf_clm.doctor.micro_batch import ROWS, settle_batch
from hf_clm.errors import DataError, RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.machine import peak_memory, settle_cpu
from hf_clm.model.build import build_model, build_model_config, build_tokenizer, check_model
from hf_clm.model.load import takes_targets
from hf_clm.model.loss import LossOptions
from hf_clm.pages.charts import write_loss_plots
from hf_clm.pages.documents import Reader, write_excerpt
from hf_clm.pages.report import write_report
from hf_clm.recipe.recipe import Recipe, recipe_to_yaml
from hf_clm.recipe.sections import EVAL, TRAIN
from hf_clm.run_folder import RunRecord, load_folder, read_record, write_record, write_text
from hf_clm.schema import whole_text
from hf_clm.training.answering import Answering, load_answer_metrics
from hf_clm.training.answering import find_questions as find_eval_questions
from hf_clm.training.arguments import build_stream, check_launch, resolve, training_arguments
from hf_clm.training.callbacks import (
    EpochMeansCallback,
    LastEvaluationCallback,
    MetricsCallback,
    PatienceCallback,
    ProgressCallback,
    ReportCallback,
    SamplesCallback,
    tolerate_trackers,
    write_line,
)
from hf_clm.training.card import write_card
from hf_clm.training.checkpoints import seal
from hf_clm.training.faults import among_others, keep_timeout, own_errors, writing
from hf_clm.training.fitting import fitting, free_memory, is_to_be_tried, to_smaller, try_largest
from hf_clm.training.lock import locked
from hf_clm.training.optimizer import zero_rate_warning
from hf_clm.training.output import FINAL, publish, recording_failure
from hf_clm.training.prepare import Prepared, prepare
from hf_clm.training.proof import find_questions, prove_model, prove_saved
from hf_clm.training.publish import check_can_push
from hf_clm.training.python import Additions, Run
from hf_clm.training.signals import first_parent, stoppable
from hf_clm.training.start import Start, has_ended, prepare_start
from hf_clm.training.summary import RunFacts, add_outcome, end_lines, guessing_loss, seal_facts, start_lines
from hf_clm.training.trainer import CLMTrainer

CONTINUE = (
    "use --overwrite to start again, or a larger --max_steps with --resume_override max_steps to train longer"
)
NO_ADDITIONS = Additions()
EVALUATED_ROWS = 64  # of the training data, if there is no evaluation set


def train(recipe: Recipe, *, is_terminal: bool = False) -> dict[str, Any]:
    """Trains and saves a model, and returns the content of run.json; see ``run``."""
    return run(recipe, is_terminal=is_terminal).record.to_json()


def run(recipe: Recipe, *, is_terminal: bool = False, additions: Additions = NO_ADDITIONS) -> Run:
    """Trains and saves a model, and returns the run. Does nothing if the run is done.

    Restarts with half the micro-batch size if the first steps run out of memory (fitting.py).

    Raises UserError; Preempted, a SystemExit, if a signal such as SIGTERM has stopped the run after saving a
    checkpoint.
    """
    first_parent()
    check_launch(recipe)
    additions.check(recipe)
    arguments = training_arguments(recipe)
    folder = Path(str(arguments.output_dir))
    with among_others(), locked(folder, is_main=arguments.process_index == 0):
        check_can_push(arguments)
        if arguments.device.type == "cpu":
            settle_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            keep_timeout(arguments)
        check_model(recipe, arguments)
        most_rows = None
        while True:
            try:
                return start_or_resume(
                    recipe, arguments, is_terminal=is_terminal, additions=additions, most_rows=most_rows
                )
            except RuntimeError as error:  # including DoesNotFit
                recipe = to_smaller(recipe, arguments, error)
                most_rows = recipe.train[ROWS]
            free_memory()  # outside of the handler, as the error references the model
            arguments = training_arguments(recipe)


def start_or_resume(
    recipe: Recipe,
    arguments: TrainingArguments,
    *,
    is_terminal: bool,
    additions: Additions,
    most_rows: int | None,
) -> Run:
    """Runs from step 0 or the last checkpoint: prepares data and model, verifies them, trains and saves.

    most_rows: the largest micro-batch that may fit, if a larger one did not.
    """
    start = prepare_start(recipe, arguments)
    if start.result is not None:
        require_same_data(RunRecord.model_validate(start.result), recipe)
        if arguments.process_index == 0:
            write_line(f"{start.folder}: this run is already done; {CONTINUE}")
        return Run(start.folder, RunRecord.model_validate(start.result))

    # Data. As many errors as possible are raised before the model is loaded.
    load_answer_metrics(recipe.evaluation)
    tokenizer = build_tokenizer(recipe, load_early(recipe, arguments.seed), arguments=arguments)
    config = build_model_config(recipe, tokenizer)
    settled = settle_render(recipe, tokenizer)
    prepared = prepare(settled, tokenizer, arguments=arguments, date=recorded_date(start.folder))
    splits, proof = prepared.splits, prepared.proof
    proof.lines += give_plain_template(tokenizer, settled, formats=splits[TRAIN].examples.formats)
    checked = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
    checked, choices = settle_batch(checked, kept=start.kept, most_rows=most_rows)
    recipe, arguments = checked.recipe, checked.arguments
    proof.lines += choices
    proof.lines += [f"warning   {line}" for line in check_before_training(checked)]
    stream = build_stream(settled, tokenizer, arguments=arguments, checkpoint=start.checkpoint)

    # Model and Trainer.
    model = build_model(recipe, tokenizer, config=config, arguments=arguments)
    entropy = guessing_loss(splits[TRAIN])
    facts = RunFacts(recipe, arguments, model, splits, entropy, render=settled.data.render)
    sealed = seal_facts(facts, tokenizer, proof=proof.facts)
    trainer = build_trainer(
        model,
        arguments,
        recipe=recipe,
        tokenizer=tokenizer,
        splits=splits,
        stream=stream,
        sealed=sealed,
        additions=additions,
    )
    trainer.overridden = start.override_keys
    if warning := zero_rate_warning(arguments, facts.steps):
        proof.lines.append(f"warning   {warning}")

    # Proof, before the first step.
    with arguments.main_process_first(local=False, desc="proving the model"):
        if arguments.process_index == 0:
            trainer.add_callback(ProgressCallback(is_terminal=is_terminal))
            with trainer.aside():
                prove_and_record(trainer, facts, start=start, prepared=prepared)
    if is_to_be_tried(recipe, arguments):
        try_largest(trainer, splits[TRAIN].dataset)

    # Training.
    record = train_to_the_end(trainer, facts, start=start, proof=proof.facts)
    if arguments.push_to_hub:  # the run is done, even if this fails
        trainer.push_run(with_data=recipe.card.data_samples > 0)
    return Run(start.folder, record, trainer)


def train_to_the_end(
    trainer: CLMTrainer, facts: RunFacts, *, start: Start, proof: dict[str, Any]
) -> RunRecord:
    """Trains from the given start, and finishes. Raises DoesNotFit, see ``fitting``."""
    recipe, arguments = facts.recipe, facts.arguments
    metrics = MetricsCallback(
        start.folder / "metrics.jsonl", measure_memory=partial(peak_memory, arguments.device)
    )
    report = ReportCallback(
        partial(write_report, start.folder, is_live=True), is_main=arguments.process_index == 0
    )
    add_callbacks(trainer, facts, metrics=metrics, report=report)
    if trainer.answering:
        trainer.answering.forget_after(start.step)
    if start.checkpoint:
        arguments.eval_on_start = False  # it was evaluated at step 0
    patience = recipe.early_stopping.patience if recipe.early_stopping else None
    with guarding(trainer, start.folder, report=report, is_overwriting=recipe.overwrite is True):
        if start.checkpoint and has_ended(start.checkpoint, facts.steps, patience=patience):
            trainer.restore(start.checkpoint)
        else:
            with fitting(trainer, first_step=start.step):
                trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        return finish(trainer, facts, proof=proof, metrics=metrics)


def add_callbacks(
    trainer: CLMTrainer, facts: RunFacts, *, metrics: MetricsCallback, report: ReportCallback
) -> None:
    """Adds the callbacks that write files, in the order in which they receive events."""
    if facts.recipe.samples:
        trainer.add_callback(build_samples(facts, trainer))
    trainer.add_callback(metrics)
    trainer.add_callback(LastEvaluationCallback())
    if not facts.recipe.data.streaming:  # which has no epochs
        trainer.add_callback(EpochMeansCallback(metrics.path))
    trainer.add_callback(report)


@contextmanager
def guarding(
    trainer: CLMTrainer, folder: Path, *, report: ReportCallback, is_overwriting: bool
) -> Iterator[None]:
    """Handles signals and errors of a run inside the block, so that its files stay valid."""
    with ExitStack() as stack:
        # Exits last: after a signal, the process ends when everything below has been written.
        stack.enter_context(stoppable(trainer, words="without --overwrite" if is_overwriting else ""))
        stack.enter_context(closing(trainer))  # ends the workers that load data
        stack.enter_context(closing(report))  # writes how the run ended, from run.json
        is_main = trainer.is_world_process_zero()
        stack.enter_context(recording_failure(folder / "run.json", is_main=is_main))
        stack.enter_context(among_others())
        stack.enter_context(own_errors())  # each process trains on different rows
        stack.enter_context(writing(folder))
        yield


def recorded_date(folder: Path) -> str:
    """Returns the date that the chat template of this run prints, if an earlier start has set one."""
    record = read_record(folder)
    return record.proof.prepared.date if record else ""


def require_same_data(record: RunRecord, recipe: Recipe) -> None:
    """Raises RecipeError if a finished run was trained on files with other contents than they have now."""
    before, now = record.proof.prepared.content, data_content(recipe.data)
    if before and now and before != now:
        what = "this run is already done, and its data have changed since"
        fix = "use another --output_dir, or --overwrite to train again"
        raise RecipeError(what, where=str(recipe.train["output_dir"]), fix=fix)


def prove_and_record(trainer: CLMTrainer, facts: RunFacts, *, start: Start, prepared: Prepared) -> None:
    """Verifies the model, and writes and prints the facts before the first step. Rank 0 only."""
    recipe, folder, proof = facts.recipe, start.folder, prepared.proof
    tokenizer: Any = trainer.processing_class
    differences = start.require_same(trainer.seal_facts)
    loss = [f"loss      computed by the model: {trainer.own_loss}"] if trainer.own_loss else []
    write_line("\n".join([*start_lines(facts), *loss, *differences, *proof.lines]))
    questions = find_questions(facts.train, tokenizer, recipe, format=facts.format)
    proof.facts |= prove_model(trainer, recipe, split=facts.train, tokenizer=tokenizer, questions=questions)
    # Must be the first visible file (is_in_use): without it, the folder cannot be recognised as this run's.
    write_text(folder / "recipe.yaml", recipe_to_yaml(resolve(recipe, facts.arguments)))
    prepared.write_ledger(folder / "ledger.parquet")
    reader = Reader(facts.train, tokenizer, recipe=recipe)
    write_excerpt(folder / "label_rows.jsonl", reader, collate=build_collator(recipe, tokenizer))
    write_record(folder, facts.to_record("running", proof=proof.facts))


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
    evaluated: dict[str, Any] = {name: split.dataset for name, split in splits.items() if name != TRAIN}
    named = {name.removeprefix(f"{EVAL}_"): dataset for name, dataset in evaluated.items()}
    datasets = [split.dataset for split in splits.values()]
    rows = max(arguments.train_batch_size, arguments.eval_batch_size)
    share = train_split.target_tokens / max(1, train_split.tokens)
    static = static_shape(datasets, rows=rows, target_share=share) if arguments.torch_compile else None
    collate = build_collator(recipe, tokenizer, with_targets=takes_targets(model), static=static)
    trainer_class = additions.trainer_class or CLMTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        data_collator=PositionCollator(collate) if stream else collate,
        train_dataset=stream or train_split.dataset,
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
    sets = {
        name: find_eval_questions(split, section.generate) for name, split in splits.items() if name != TRAIN
    }
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


def build_samples(facts: RunFacts, trainer: CLMTrainer) -> SamplesCallback:
    """Builds the callback that answers the recipe's sample prompts, rendered like the training data."""
    recipe, section = facts.recipe, facts.recipe.samples
    assert section is not None
    tokenizer: Any = trainer.processing_class
    prompts = [
        to_prompt_example(prompt, facts.format, template=facts.template, has_turns=facts.has_turns)
        for prompt in section.prompts
    ]
    seed = trainer.args.seed
    decoding = Decoding(section.max_new_tokens, temperature=section.temperature, seed=seed)
    rendering = label_options(recipe)

    def answers() -> list[str]:
        with trainer.aside():
            model = trainer.accelerator.unwrap_model(trainer.model)
            samples = generate(model, tokenizer, prompts=prompts, decoding=decoding, rendering=rendering)
            return [sample.text for sample in samples]

    path = Path(str(trainer.args.output_dir)) / "samples.jsonl"
    return SamplesCallback(
        section.prompts,
        answers,
        path=path,
        every_steps=section.every_steps,
        every_epoch=section.every_epoch,
    )


def card_examples(facts: RunFacts) -> list[str]:
    """Returns the training texts to show in the model card."""
    count = facts.recipe.card.data_samples
    if not count:
        return []  # avoids reading the prepared set again
    first = islice(facts.train.examples.examples, count)
    return [text for example in first if (text := whole_text(example))]


def finish(
    trainer: CLMTrainer, facts: RunFacts, *, proof: dict[str, Any], metrics: MetricsCallback
) -> RunRecord:
    """Evaluates, saves the model, run.json, plots and model card, and prints the results."""
    output_dir = Path(str(trainer.args.output_dir))
    history, arguments = trainer.state.log_history, trainer.args
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    is_current = last.get("step") == trainer.state.global_step and not arguments.load_best_model_at_end
    final = last if is_current else trainer.evaluate()
    folder = output_dir / FINAL
    trainer.save_model(str(folder), _internal_call=True)  # pushed after everything is written
    totals = trainer.stream_totals()
    steps, speed = trainer.state.global_step, {"tokens_per_second": trainer.tokens_per_second}
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    is_main = trainer.is_world_process_zero()
    if is_main and facts.recipe.doctor.round_trip == "end" and not is_sharded:
        tokenizer: Any = trainer.processing_class
        questions = find_questions(facts.train, tokenizer, facts.recipe, format=facts.format)
        proof["round_trip"] = prove_saved(
            trainer, folder, split=facts.train, tokenizer=tokenizer, questions=questions
        )
    record = add_outcome(
        facts.to_record("done", proof=proof),
        history,
        final,
        seconds=metrics.seconds,
        steps=steps,
        speed=speed | {"mfu": trainer.mfu},
    )
    record = record.updated(stream=totals) if totals else record
    if is_main:
        run = replace(load_folder(output_dir), record=record)
        write_loss_plots(run.metrics, folder)
        write_card(run, facts.recipe.card, examples=card_examples(facts))
        write_record(folder, record)
        seal(folder, {"step": steps})
        publish(output_dir)
        write_line("\n".join(end_lines(facts, record, samples=run.samples)))
    return record
