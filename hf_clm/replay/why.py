"""``hf-clm why``: which training rows taught an answer.

rank     similarity of the gradients of the answer and of every row, at the checkpoints of the run   estimated
prove    the run, replayed without one record: the change of the answer's log-probability            measured
"""

import random
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from hf_clm.data.label.datasets import TokenizedDataset, tokenize_rows
from hf_clm.data.split import Split
from hf_clm.errors import RecipeError
from hf_clm.evaluation.likelihood import measure_rows, target_places
from hf_clm.evaluation.similarity import choose_matrices, similarities
from hf_clm.generation.generate import GREEDY, generate
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.attention import use_for_training
from hf_clm.pages.rows import Atom, Row, Vocabulary, to_atoms
from hf_clm.pages.traces import TracedAnswer, TracedRow, Traces, to_lines, write_traces
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import TRAIN
from hf_clm.replay.replays import Replays, State, first_use, replaying
from hf_clm.run_folder import to_duration
from hf_clm.schema import Chat, Document, Example, Segment, TokenizedExample
from hf_clm.text.chat import stop_token_ids
from hf_clm.training.fitting import free_memory
from hf_clm.training.trainer import CLMTrainer

MIN_CHECKPOINTS = 2  # to rank at: one alone says what the row does at the end, not what it has done
TOKENS_PER_BATCH = 1024  # of rows whose gradients are computed at once
PAGE = "why.html"  # in the folder of the run
SHOWN_RANKED = 10  # rows on the page, of which the first are proved


@dataclass(frozen=True)
class Question:
    """A prompt with an answer, tokenized as in training: only the answer has labels."""

    prompt: str
    row: TokenizedExample
    logprobs: np.ndarray  # (n,) of each token of the answer, by the saved model


@dataclass
class Effects:
    """What leaving out each of some records does, measured by replays. Q = questions.

    of        by record, (Q,): how many nats less the answer is likely without it
    baseline  (Q,) log-probability of each answer after a replay of the run itself
    shift     the largest difference of that from the saved model; None if it was replayed up to another step
    steps     of all replays, which took ``seconds``
    """

    of: dict[int, np.ndarray]
    baseline: np.ndarray
    shift: float | None = None
    steps: int = 0
    seconds: float = 0.0

    def to_facts(self, chosen: int, others: int) -> dict[str, str]:
        """Returns what was done, for the page. ``chosen``, ``others``: the number of each kind of record."""
        replays = f"{1 + chosen + others} replays, {self.steps:,} steps in {to_duration(self.seconds)}"
        facts = {"proved": f"records: {chosen}, and {others} at random for comparison; {replays}"}
        if self.shift is not None:
            same = "the answers are exactly as likely as by the saved model"
            far = f"the answers differ by up to {self.shift:.2g} nats from the saved model"
            facts["baseline"] = f"the run itself, replayed: {far if self.shift else same}"
        return facts


def why(options: Namespace, recipe: Recipe) -> list[str]:
    """Runs ``hf-clm why --prompt``, and returns lines to print."""
    page = options.html or Path(options.run) / PAGE
    traces = trace(options, recipe, page=page)
    width = shutil.get_terminal_size((100, 24)).columns
    return ["", *to_lines(traces, width=width), "", f"wrote {page}"]


def trace(options: Namespace, recipe: Recipe, *, page: Path) -> Traces:
    """Ranks the training records for each answer, proves the first ones, and writes the page.

    Raises RecipeError for a run with too few checkpoints.
    """
    with replaying(options.run, recipe) as replays:
        states = ranking_states(replays)
        end = replays.state_at(options.until, where="--until") if options.until else replays.last
        loaded = load_run(str(replays.last.folder), attention=PACKED)
        (questions,) = broadcast_object_list([to_questions(loaded, options.prompt, options.answer)])
        vocabulary = Vocabulary(loaded.tokenizer)
        del loaded  # the replays need its memory
        split = replays.inputs_of(end).prepared.splits[TRAIN]
        replays.say(f"ranking   {len(split.rows):,} rows at {len(states)} checkpoints")
        started = time.monotonic()
        scores, matrices = rank(replays, states, questions, dataset=split.rows)
        seconds = to_duration(time.monotonic() - started)
        facts = {"ranked": f"{len(split.rows):,} rows at {len(states)} checkpoints, {matrices}, in {seconds}"}
        by_record = to_records(scores, split.stored.sources, count=len(split.ledger))
        drawn = choose_records(by_record, count=options.prove, left_out=split.left_out)
        ((chosen, others),) = broadcast_object_list([drawn])  # floats may differ between processes
        effects = prove(replays, questions, [*chosen, *others], end=end) if options.prove else None
        if effects:
            facts |= effects.to_facts(len(chosen), len(others))
        if options.until:
            facts["until"] = f"step {end.step:,}: the effects are those on the model after this step"
        tracing = Tracing(split, scores, by_record, others, effects, vocabulary)
        answers = [tracing.to_answer(number, question) for number, question in enumerate(questions)]
        traces = Traces(replays.run.name, facts, answers)
        if replays.arguments.process_index == 0:
            write_traces(page, traces)
        return traces


def to_questions(run: LoadedRun, prompts: Sequence[str], answers: Sequence[str]) -> list[Question]:
    """Returns each prompt with its answer, tokenized as in training. Without answers, the model gives them.

    Raises RecipeError for another number of answers than prompts.
    """
    if answers and len(answers) != len(prompts):
        got = f"{len(answers)} for {len(prompts)} prompts"
        raise RecipeError("needs one answer for each prompt, or none", where="--answer", got=got)
    examples = [
        to_prompt_example(prompt, run.format, template=run.template, has_turns=run.has_turns)
        for prompt in prompts
    ]
    ends = [run.stage == "sft"] * len(prompts)  # after a text, the answer continues and needs no stop token
    if not answers:
        generated = generate(
            run.model, run.tokenizer, prompts=examples, decoding=GREEDY, rendering=run.rendering
        )
        use_for_training(run.model, PACKED)
        answers, ends = [one.text for one in generated], [one.stopped for one in generated]
    options = replace(run.rendering, stage="sft", max_length=None)
    rows = tokenize_rows(list(map(_with_answer, examples, answers)), run.tokenizer, options)
    if missing := {*range(len(prompts))} - {*rows.sources.tolist()}:
        got = repr(prompts[min(missing)])
        raise RecipeError(
            "the answer to this prompt is empty", where="--prompt", got=got, fix="give another --answer"
        )
    stops = stop_token_ids(run.tokenizer)
    questions = []
    for number, (prompt, is_whole) in enumerate(zip(prompts, ends, strict=True)):
        answer = rows[number] if is_whole else _without_stop(rows[number], stops)
        questions.append(Question(prompt, answer, -measure_rows(run.model, [answer])[0][0]))
    return questions


def rank(
    replays: Replays, states: Sequence[State], questions: Sequence[Question], *, dataset: TokenizedDataset
) -> tuple[np.ndarray, str]:
    """Returns the similarity of each question and each row, (Q, N) float32, and which weights it is of.

    The similarities at the checkpoints are averaged. Each counts as much as the steps of its span, by the sum
    of their learning rates (TracIn, arXiv:2002.08484).
    """
    weights = np.array([_learned_in(replays, number, states) for number in range(len(states))])
    if not weights.any():  # the run has logged no learning rate
        weights = np.ones_like(weights)
    total, compared = np.zeros((len(questions), len(dataset)), np.float32), ""
    for state, weight in zip(states, weights / weights.sum(), strict=True):
        model = load_run(str(state.folder), attention=PACKED).model
        matrices = choose_matrices(model)
        compared = matrices.describe()
        with tqdm(total=len(dataset), desc=state.name, disable=None, leave=False) as bar:
            total += weight * similarities(
                model,
                [question.row for question in questions],
                dataset,
                tokens_per_batch=TOKENS_PER_BATCH,
                matrices=matrices,
                progress=bar.update,
            )
        del model  # before the next one is loaded
        free_memory()
    return total, compared


def to_records(scores: np.ndarray, sources: np.ndarray, *, count: int) -> np.ndarray:
    """Returns the similarity (Q, E) of each of E records: that of its nearest row; -inf without a row."""
    result = np.full((len(scores), count), -np.inf, np.float32)
    for question, row_scores in enumerate(scores):
        np.maximum.at(result[question], sources, row_scores)
    return result


def choose_records(
    scores: np.ndarray, *, count: int, left_out: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Returns the records to prove: the most similar ones to each question, and as many random others.

    Args:
        scores: (Q, E), the similarity of each question and each record.
        count: the number of records for each question.
        left_out: records that the run does not train on.
    """
    scores = scores.copy()
    scores[:, list(left_out)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = list(dict.fromkeys(order[:, :count].T.ravel().tolist()))
    shown = {*order[:, :SHOWN_RANKED].ravel().tolist(), *chosen}
    rest = [record for record in np.flatnonzero(np.isfinite(scores[0])).tolist() if record not in shown]
    others = random.Random(0).sample(rest, min(count, len(rest)))
    return [record for record in chosen if np.isfinite(scores[0, record])], others


def prove(replays: Replays, questions: Sequence[Question], records: Sequence[int], *, end: State) -> Effects:
    """Replays the run without each of the records, and measures every answer after each replay."""
    inputs = replays.inputs_of(end)
    begins = {record: replays.last_before(min(first_use(inputs, record), end.step)) for record in records}
    first = min(begins.values(), key=lambda state: state.step, default=replays.states[0])
    steps = [end.step - begin.step for begin in (first, *begins.values())]
    expected = to_duration(sum(steps) * replays.seconds_per_step)
    replays.say(f"proving   {len(steps)} replays of the run, {sum(steps):,} steps, about {expected}")
    started = time.monotonic()
    trainer = replays.replay(first, end.step, end=end)
    baseline = _measure(trainer, questions)
    shift = None
    if end == replays.last and end.folder is not None:
        trainer._load_from_checkpoint(str(end.folder))
        shift = float(np.abs(_measure(trainer, questions) - baseline).max())
    effects = Effects({}, baseline, shift)
    for record, begin in begins.items():
        del trainer
        free_memory()
        trainer = replays.replay(begin, end.step, end=end, left_out=[record])
        effects.of[record] = baseline - _measure(trainer, questions)
        place = inputs.prepared.splits[TRAIN].ledger.places[record]
        found = ", ".join(f"{effect:+.2f}" for effect in effects.of[record])
        seconds = (time.monotonic() - started) / (len(effects.of) + 1)  # of each replay so far
        left = to_duration(seconds * (len(records) - len(effects.of)))
        replays.say(f"without   {place}: {found} nats, {left} left")
    effects.steps, effects.seconds = sum(steps), time.monotonic() - started
    return effects


@dataclass(frozen=True)
class Tracing:
    """What is known of the records of a split, for the rows of the page.

    row_scores  (Q, N), the similarity of each question and each row
    scores      (Q, E), the similarity of each question and each record
    others      the random records that were left out
    """

    split: Split
    row_scores: np.ndarray
    scores: np.ndarray
    others: Sequence[int]
    effects: Effects | None
    vocabulary: Vocabulary

    def to_answer(self, number: int, question: Question) -> TracedAnswer:
        """Returns the answer to a question, with its nearest records and all that were proved."""
        order = np.argsort(-self.scores[number], kind="stable").tolist()
        proved = self.effects.of if self.effects else {}
        records = [record for record in order[:SHOWN_RANKED] if np.isfinite(self.scores[number, record])]
        ranks = {record: rank for rank, record in enumerate(order, start=1)}
        records += [record for record in proved if record not in records]
        return TracedAnswer(
            question.prompt,
            self._to_tokens(question),
            [
                TracedRow(
                    self.split.ledger.places[record],
                    self._to_atoms(record, self.row_scores[number]),
                    rank=ranks[record],
                    similarity=float(self.scores[number, record]),
                    effect=float(proved[record][number]) if record in proved else None,
                    is_random=record in self.others,
                )
                for record in records
            ],
        )

    def _to_tokens(self, question: Question) -> list[tuple[str, float]]:
        """Returns the text and the log-probability of each token of an answer."""
        places = target_places(np.array(question.row["labels"]))
        groups = self.vocabulary.to_groups([question.row["input_ids"][place] for place in places])
        return [(text, float(question.logprobs[start:stop].sum())) for start, stop, text in groups]

    def _to_atoms(self, record: int, scores: np.ndarray) -> list[Atom]:
        """Returns the text of the row of a record with the highest score."""
        own = np.flatnonzero(self.split.stored.sources == record)
        row = self.split.rows[int(own[scores[own].argmax()])]
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        return list(to_atoms(Row(0, ids, labels, ()), (0, len(ids)), vocabulary=self.vocabulary))


def ranking_states(replays: Replays) -> list[State]:
    """Returns the states at which rows are ranked. Raises RecipeError if there are too few."""
    states = [state for state in replays.states if state.folder and state.step]
    last = states[-1:]
    states = [state for state in states[:-1] if state.step < last[0].step] + last
    if len(states) < MIN_CHECKPOINTS:
        every = max(1, replays.run.record.steps // 5)
        recipe, folder = (shlex.quote(f"{replays.run.path}{end}") for end in ("/recipe.yaml", "-traced"))
        saved = f"--save_strategy steps --save_steps {every} --save_total_limit 5"
        fix = f"hf-clm train {recipe} --output_dir {folder} {saved}"
        what = f"needs {MIN_CHECKPOINTS} saved states to rank rows at"
        raise RecipeError(what, where=str(replays.run.path), got=str(len(states)), fix=fix)
    return states


def _learned_in(replays: Replays, number: int, states: Sequence[State]) -> float:
    """Returns the sum of the learning rates of the steps that end at a state, from the log of the run."""
    before = states[number - 1].step if number else 0
    rates = [
        entry["learning_rate"]
        for entry in replays.run.metrics
        if before < entry["step"] <= states[number].step and "learning_rate" in entry
    ]
    return (states[number].step - before) * float(np.mean(rates)) if rates else 0.0


def _with_answer(prompt: Example, answer: str) -> Example:
    """Returns the example that trains a model to answer a prompt so."""
    if isinstance(prompt, Chat):
        return replace(prompt, messages=[*prompt.messages, {"role": "assistant", "content": answer}])
    return Document([*(Segment(part.text, 0.0) for part in prompt.segments), Segment(answer, 1.0)])


def _without_stop(row: TokenizedExample, stops: Sequence[int]) -> TokenizedExample:
    """Returns a row without the stop token at its end."""
    if row["input_ids"][-1] not in stops:
        return row
    return {"input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]}


def _measure(trainer: CLMTrainer, questions: Sequence[Question]) -> np.ndarray:
    """Returns the log-probability of each answer, (Q,) float64, in nats."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = [measure_rows(model, [question.row])[0][0] for question in questions]
    return np.array([-float(nll.sum(dtype=np.float64)) for nll in found])
