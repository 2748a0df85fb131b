"""A run, from a recipe to a folder that ``from_pretrained`` loads. Read this first."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_clm.data.label.datasets import label_options
from hf_clm.data.prepared.cache import data_content
from hf_clm.data.split import build_collator
from hf_clm.doctor.micro_batch import ROWS
from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.machine import peak_memory
from hf_clm.model.build import check_model
from hf_clm.pages.charts import write_loss_plots
from hf_clm.pages.documents import Reader, write_excerpt
from hf_clm.pages.report import write_report
from hf_clm.recipe.recipe import Recipe, recipe_to_yaml
from hf_clm.run_folder import RunRecord, load_folder, read_record, write_record, write_text
from hf_clm.schema import whole_text
from hf_clm.training.arguments import check_launch, resolve, training_arguments
from hf_clm.training.assemble import NO_ADDITIONS, assemble, prepare_inputs, settle_machine
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
from hf_clm.training.checkpoints import seal
from hf_clm.training.faults import among_others, own_errors, writing
from hf_clm.training.fitting import fitting, free_memory, is_to_be_tried, to_smaller, try_largest
from hf_clm.training.lock import locked
from hf_clm.training.optimizer import zero_rate_warning
from hf_clm.training.output import FINAL, publish, recording_failure
from hf_clm.training.prepare import Prepared
from hf_clm.training.proof import find_questions, prove_model, prove_saved
from hf_clm.training.publish import check_can_push
from hf_clm.training.python import Additions, Run
from hf_clm.training.signals import first_parent, stoppable
from hf_clm.training.start import Start, has_ended, prepare_start
from hf_clm.training.summary import RunFacts, add_outcome, end_lines, start_lines
from hf_clm.training.trainer import CLMTrainer

CONTINUE = (
    "use --overwrite to start again, or a larger --max_steps with --resume_override max_steps to train longer"
)


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
        settle_machine(arguments)
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

    # As many errors as possible are raised before the model is loaded.
    date = recorded_date(start.folder)
    inputs = prepare_inputs(recipe, arguments, kept=start.kept, most_rows=most_rows, date=date)
    recipe, arguments, proof = inputs.recipe, inputs.arguments, inputs.prepared.proof
    trainer, facts = assemble(inputs, checkpoint=start.checkpoint, additions=additions)
    trainer.overridden = start.override_keys
    if warning := zero_rate_warning(arguments, facts.steps):
        proof.lines.append(f"warning   {warning}")

    # Proof, before the first step.
    with arguments.main_process_first(local=False, desc="proving the model"):
        if arguments.process_index == 0:
            trainer.add_callback(ProgressCallback(is_terminal=is_terminal))
            with trainer.aside():
                prove_and_record(trainer, facts, start=start, prepared=inputs.prepared)
    if is_to_be_tried(recipe, arguments):
        try_largest(trainer, facts.train.dataset)

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
        seal(folder, {"step": trainer.model_step, **trainer.seal_facts})
        publish(output_dir)
        write_line("\n".join(end_lines(facts, record, samples=run.samples)))
    return record
