"""``hf-clm verify``: checks that a run is what its files say, by replaying parts of it.

hashes      every file of every sealed state                has a file changed since it was saved?
agreement   recipe, data, tokenizer, model, final weights   do the files belong to one run?
replay      random spans: weights, optimizer, log lines     did these data and settings make these weights?

Hashes show damage. A replay also finds what was changed and sealed again, as it trains from the data.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from hf_clm.data.proof.proof import content_hash
from hf_clm.errors import UserError
from hf_clm.hashing import hash_file
from hf_clm.recipe.recipe import Recipe
from hf_clm.run_folder import Entries, to_duration, write_json
from hf_clm.training.callbacks import write_line
from hf_clm.training.card import name_verification
from hf_clm.training.changes import compare, refusal, shared
from hf_clm.training.checkpoints import SEAL, fault_of
from hf_clm.training.replay import START, Replays, Span, find_spans, replaying

VERIFIED = "verify.json"
# Files of the final model that other commands write again, such as the card.
REWRITTEN = ("README.md",)
STATES = ("optimizer", "scheduler", "rng_state", "scaler")  # the names of other files of a state begin so
# Figures of a log event that depend on the time, the machine or the step at which training stops.
TIMED = ("_per_second", "_runtime", "seconds", "mfu", "peak_memory_bytes", "gpu_", "total_flos", "train_")
# On another kind of machine: the difference from the weights of the run, relative to how far they moved in
# the span, and the relative difference of a logged figure.
TOLERANCE = 0.05

Events = dict[tuple[int, str], Mapping[str, Any]]  # by step and kind: loss or eval_loss


@dataclass
class Replayed:
    """A span that was replayed. ``difference``: of the weights, relative to how far they moved."""

    begin: str
    end: str
    steps: int
    seconds: float = 0.0
    difference: float = 0.0

    @property
    def outcome(self) -> str:
        """The difference in words."""
        return f"difference {self.difference:.2g}" if self.difference else "the same weights to the bit"


@dataclass
class Verification:
    """The result of ``hf-clm verify``. It is valid if there are no faults.

    differs_in  how this machine and its packages differ from those that trained
    files       the number of files whose hash was checked
    spans       the number of spans that the run has, and its last step
    states      the sha256 of the seal of each state
    """

    run: str
    verified: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    differs_in: list[str] = field(default_factory=list)
    files: int = 0
    spans: int = 0
    steps: int = 0
    replayed: list[Replayed] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        return not self.faults

    @property
    def sentence(self) -> str:
        """What was done and found, for the terminal and the card."""
        steps = sum(one.steps for one in self.replayed)
        replays = (
            f"{len(self.replayed)} of {self.spans} spans were replayed, {steps:,} of {self.steps:,} steps"
        )
        if not self.is_valid:
            return f"{len(self.faults)} differences; {replays}"
        largest = max((one.difference for one in self.replayed), default=0.0)
        equal = "weights, optimizer and log lines are equal to the bit"
        close = (
            f"on another kind of machine, the weights differ by at most {largest:.2g} of how far they moved"
        )
        return f"the hashes of {self.files:,} files match; {replays}; {close if self.differs_in else equal}"

    def find(self, faults: Iterable[str], say: Callable[[str], None]) -> None:
        """Collects faults, and prints each when it is found."""
        for fault in faults:
            self.faults.append(fault)
            say(f"differs   {fault}")

    def to_json(self) -> dict[str, Any]:
        """Returns the content of verify.json."""
        return {"valid": self.is_valid, "tolerance": TOLERANCE, **asdict(self)}


def verify(folder: str, recipe: Recipe, *, spans: int) -> Verification:
    """Verifies a run, prints what is found, and writes verify.json into its folder. All ranks call it.

    Args:
        recipe: the recipe of the run.
        spans: the number of spans to replay, drawn at random.

    Raises UserError if the run cannot be replayed at all.
    """
    with replaying(folder, recipe, evaluates=True) as replays:
        result = Verification(replays.run.name, states={})
        is_main = replays.arguments.process_index == 0
        say = write_line if is_main else _say_nothing
        result.find(_check_files(replays, result), say)
        if result.is_valid:
            say(f"hashes    {result.files:,} files of {len(result.states)} states are as they were sealed")
            result.find(_check_agreement(replays), say)
        if result.is_valid:
            say("agreement recipe, data, tokenizer and model are those that the states were sealed with")
            _replay_some(replays, result, spans=spans, say=say)
        if is_main:
            write_json(replays.run.path / VERIFIED, result.to_json())
            sentence = f"{result.sentence} ([{VERIFIED}]({VERIFIED}), by `hf-clm verify`)."
            name_verification(replays.run.path, sentence if result.is_valid else "")
        say(f"{'verified' if result.is_valid else 'refuted':<10}{result.sentence}")
        say(f"written   {replays.run.path / VERIFIED}")
        return result


def _check_files(replays: Replays, result: Verification) -> Iterator[str]:
    """Yields the states whose files differ from their seals."""
    for state in replays.states[1:]:
        assert state.folder is not None, "only the start has no folder"
        is_final = state.folder == replays.run.path
        if fault := fault_of(state.folder, ignored=REWRITTEN if is_final else ()):
            yield f"{state.name}: {fault}"
        result.files += len(state.seal["files"])
        result.states[state.name] = hash_file(state.folder / SEAL)
    for path in replays.unsealed:
        yield f"{path.name}: {fault_of(path)}"


def _check_agreement(replays: Replays) -> Iterator[str]:
    """Yields where recipe, data, tokenizer or model differ from what the last state was sealed with."""
    last = replays.last
    if changes := refusal(replays.changes_of(last)):
        yield f"recipe.yaml: differs from the recipe of {last.name}: {changes}"
    try:
        inputs, facts = replays.inputs_of(last), replays.facts_of(last)
    except UserError as error:
        yield str(error)
        return
    yield from _check_final(replays)
    changes = compare(last.seal["facts"], facts["facts"])
    changes += compare(*shared(last.seal["architecture"], facts["architecture"]))
    if text := refusal(changes):
        yield f"{last.name}: the run was trained on something else: {text}"
    for name, split in inputs.prepared.splits.items():
        certified = inputs.prepared.proof.facts[name]["certificate"]["content_hash"]
        if content_hash(split.stored.digest(), inputs.settled, inputs.tokenizer) != certified:
            yield f"{inputs.prepared.stored.folder}: the prepared rows of {name} have changed"


def _check_final(replays: Replays) -> Iterator[str]:
    """Yields the files of the final model whose weights are not those of the checkpoint of the same step."""
    *others, final = replays.states
    for same in (state for state in others if state.step == final.step and state.folder):
        files, sealed = final.seal["files"], same.seal["files"]
        for name in filter(_has_weights, files):
            if files[name]["sha256"] != sealed.get(name, {}).get("sha256"):
                yield f"{name}: {final.name} does not have the weights of {same.name}"


def _replay_some(replays: Replays, result: Verification, *, spans: int, say: Callable[[str], None]) -> None:
    """Replays spans that are drawn at random, so that nobody can know in advance which are looked at."""
    found = find_spans(replays.states)
    drawn = random.SystemRandom().sample(range(len(found)), min(spans, len(found)))
    (drawn,) = broadcast_object_list([drawn])
    chosen = [found[number] for number in sorted(drawn)]
    result.spans, result.steps = len(found), replays.last.step
    result.differs_in = [str(change) for change in replays.differences]
    if result.differs_in:
        share = f"weights may differ by {TOLERANCE:.0%} of how far they moved"
        say(f"machine   not the one that trained, {share}: {'; '.join(result.differs_in)}")
    seconds = sum(_seconds(replays.run.metrics, span) for span in chosen)
    amount = f"{len(chosen)} of {len(found)} spans, {sum(span.steps for span in chosen):,} steps"
    say(f"replays   {amount}, which took {to_duration(seconds)} in the run")
    for span in chosen:
        started = time.monotonic()
        replayed = Replayed(span.begin.name, span.end.name, span.steps)
        faults = list(_replay(replays, span, replayed))
        replayed.seconds = round(time.monotonic() - started, 1)
        result.replayed.append(replayed)
        say(f"replayed  {span}: {span.steps:,} steps in {to_duration(replayed.seconds)}, {replayed.outcome}")
        result.find(faults, say)


def _replay(replays: Replays, span: Span, replayed: Replayed) -> Iterator[str]:
    """Replays a span, and yields what differs at its end from the run. Only rank 0 compares."""
    try:
        trainer, _ = replays.replay(span.begin, span.end.step, end=span.end, saves=True)
    except UserError as error:
        yield f"{span}: {error}"
        return
    if replays.arguments.process_index:
        return
    end, copy = span.end.folder, replays.scratch / f"checkpoint-{span.end.step}"
    assert end is not None, "no span ends at the start"
    tolerance = TOLERANCE if replays.differences else 0.0
    names = list(filter(_has_weights, span.end.seal["files"]))
    begin = span.begin.folder or replays.scratch / START
    replayed.difference, first = compare_weights(names, before=begin, run=end, replay=copy)
    if not replayed.difference <= tolerance:
        far = f"{replayed.difference:.2g} of how far they moved"
        yield f"{span.end.name}: the weights of the replay differ by {far}; first, {first}"
    if not replays.differences:
        states = [name for name in span.end.seal["files"] if name.startswith(STATES)]
        yield from (f"{span.end.name}: {fault}" for fault in compare_states(states, run=end, replay=copy))
    lines = [_events(events, span) for events in (replays.run.metrics, trainer.state.log_history)]
    yield from compare_logs(*lines, tolerance=tolerance)
    shutil.rmtree(copy, ignore_errors=True)


def compare_weights(names: Sequence[str], *, before: Path, run: Path, replay: Path) -> tuple[float, str]:
    """Returns how far two models are apart, relative to how far the run moved from ``before``.

    It is the ratio of two Euclidean norms over all weights, infinite if a file is missing. Also returns the
    name of the first weight that differs, with its largest difference.
    """
    apart, moved, first = 0.0, 0.0, ""
    for name in names:
        if not all((folder / name).is_file() for folder in (before, replay)):
            return math.inf, f"{name}, which is missing"
        start, ours, theirs = (load_file(folder / name) for folder in (before, run, replay))
        for weight, value in ours.items():
            other, origin = (part[weight].double() for part in (theirs, start))
            difference = (value.double() - other).abs()
            if difference.any() and not first:
                first = f"{weight} in {name}, by up to {difference.max():.3g}"
            apart += float(difference.square().sum())
            moved += float((value.double() - origin).square().sum())
    return (math.sqrt(apart / moved) if moved else math.inf if apart else 0.0), first


def compare_states(names: Sequence[str], *, run: Path, replay: Path) -> Iterator[str]:
    """Yields which files of the optimizer, the schedule and the random states differ."""
    for name in names:
        if not (replay / name).is_file():
            yield f"{name} has no counterpart in the replay"
        elif hash_file(run / name) != hash_file(replay / name):
            yield f"{name} differs from the replay"


def compare_logs(run: Events, replay: Events, *, tolerance: float) -> Iterator[str]:
    """Yields the first figure of each log event that differs by more than ``tolerance``, relative to it."""
    for key in {**run, **replay}:
        step, kind = key
        if key not in run or key not in replay:
            where = "metrics.jsonl" if key in run else "the replay"
            yield f"metrics.jsonl: {kind} of step {step:,} is only in {where}"
            continue
        for name, value in run[key].items():
            other = replay[key].get(name)
            is_figure = isinstance(value, float | int) and not any(mark in name for mark in TIMED)
            is_close = other is not None and _are_close(value, other, tolerance)
            if is_figure and not is_close:
                yield f"metrics.jsonl: {name} of step {step:,} is {value}, and {other} in the replay"
                break


def _events(entries: Entries, span: Span) -> Events:
    """Returns the log events of the steps of a span. The evaluation before the first step belongs to it."""
    events: Events = {}
    for entry in entries:
        kind = next((key for key in ("loss", "eval_loss") if key in entry), None)
        is_inside = span.begin.step < entry["step"] <= span.end.step or entry["step"] == span.begin.step == 0
        if kind and is_inside:
            events.setdefault((entry["step"], kind), entry)
    return events


def _has_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _are_close(value: float, other: float, tolerance: float) -> bool:
    return math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance)


def _seconds(metrics: Entries, span: Span) -> float:
    """Returns how long the steps of a span took in the run, as far as its log tells."""
    reached = {entry["step"]: entry["seconds"] for entry in metrics if "seconds" in entry}

    def at(step: int) -> float:
        return max((seconds for known, seconds in reached.items() if known <= step), default=0.0)

    return at(span.end.step) - at(span.begin.step)


def _say_nothing(line: str) -> None:
    """Takes the place of ``write_line`` on all ranks but the first."""
