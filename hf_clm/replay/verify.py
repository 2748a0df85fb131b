"""``hf-clm verify``: checks that a run is what its files say, by replaying parts of it.

hashes      every file of every sealed state                has a file changed since it was saved?
agreement   recipe, data, tokenizer, model, log, weights    do the files belong to one run?
replay      random spans: weights, optimizer, log lines     did these data and settings make these weights?

Hashes show damage. A replay also finds what was changed and sealed again, as it trains from the data.
"""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
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
from hf_clm.replay.replays import START, Replays, Span, find_spans, replaying
from hf_clm.run_folder import Entries, to_duration, write_json
from hf_clm.training.callbacks import epoch_means
from hf_clm.training.card import write_verification
from hf_clm.training.changes import compare, refusal, shared
from hf_clm.training.checkpoints import SEAL, VERIFIED, fault_of

STATES = ("optimizer", "scheduler", "rng_state", "scaler")  # the names of other files of a state begin so
# Figures of a log event that depend on the time or the machine: endings, or complete names.
TIMED = ("_per_second", "_runtime", "seconds", "mfu", "peak_memory_bytes", "_preparation_time")
GPU = "gpu_"  # their names begin so
# On another machine, or with other versions: the difference from the weights of the run, relative to how far
# they moved in the span, and the relative difference of a logged loss. Rounding grows from step to step: with
# other CPU instructions, the weights of the poems recipe were 0.7 % apart after 20 steps, 1.8 % after 50, and
# 30 % after 300. Leaving out one of 48 records moved them by 4 % and 11 % in 20 steps.
TOLERANCE, LOSS_TOLERANCE = 0.03, 0.05
DECIDED_STEPS = 50  # in a longer span, the weights on another machine decide nothing

Events = dict[tuple[int, str], Mapping[str, Any]]  # by step and kind: loss or eval_loss


@dataclass
class Replayed:
    """A span that was replayed.

    difference  of the weights, relative to how far they moved; None if they cannot be compared
    is_decided  False for a span that is too long to compare weights on another machine
    """

    begin: str
    end: str
    steps: int
    seconds: float = 0.0
    difference: float | None = None
    is_decided: bool = True

    @property
    def outcome(self) -> str:
        """The difference in words."""
        if self.difference is None:
            return "no weights to compare"
        if self.is_decided:
            return f"difference {self.difference:.2g}" if self.difference else "the same weights to the bit"
        return f"difference {self.difference:.2g}, too many steps to tell rounding from a change"


@dataclass
class Verification:
    """The result of ``hf-clm verify``. It is valid if there are no faults.

    differs_in  how this machine and its packages differ from those that trained
    files       the number of files whose hash was checked
    spans       the number of spans that the run has; steps: of all of them
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
        amount = f"{steps:,} of {self.steps:,} steps"
        replays = f"{len(self.replayed)} of {self.spans} spans were replayed, {amount}"
        if not self.is_valid:
            count = f"{len(self.faults)} difference{'s' if len(self.faults) > 1 else ''}"
            return f"{count}; {replays}" if self.replayed else f"{count}; nothing was replayed"
        hashes = f"the hashes of {self.files:,} files match"
        if not self.replayed:
            return f"{hashes}; nothing was replayed"
        if not self.differs_in:
            return f"{hashes}; {replays}; weights, optimizer and log lines are equal to the bit"
        decided = [one.difference or 0.0 for one in self.replayed if one.is_decided]
        close = f"the losses agree within {LOSS_TOLERANCE:.0%}"
        if decided:
            close += (
                f", and the weights of {len(decided)} spans within {max(decided):.2g} of how far they moved"
            )
        return f"{hashes}; {replays}; on another machine or with other versions, {close}"

    def add_faults(self, faults: Iterable[str], say: Callable[[str], None]) -> None:
        """Adds the faults that the first process finds, on all processes, and prints them."""
        (found,) = broadcast_object_list([list(faults)])
        self.faults += found
        for fault in found:
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
        result = Verification(replays.run.name)
        is_main, say = replays.arguments.process_index == 0, replays.say
        result.add_faults(_check_files(replays, result), say)
        if result.is_valid:
            say(f"hashes    {result.files:,} files of {len(result.states)} states are as they were sealed")
            result.add_faults(_check_agreement(replays), say)
        if result.is_valid:
            say("agreement recipe, data, tokenizer, model and log match the sealed states")
            _replay_some(replays, result, spans=spans, say=say)
        say(f"{'verified' if result.is_valid else 'refuted':<10}{result.sentence}")
        if is_main:
            say(_write(replays.run.path, result))
        return result


def _write(folder: Path, result: Verification) -> str:
    """Writes verify.json, and a sentence into the model card. Returns a line about it."""
    if not os.access(folder, os.W_OK):
        return f"not written: {folder} is read-only"
    write_json(folder / VERIFIED, result.to_json())
    sentence = f"{result.sentence} ([{VERIFIED}]({VERIFIED}), by `hf-clm verify`)."
    write_verification(folder, sentence if result.is_valid else "")
    return f"written   {folder / VERIFIED}"


def _check_files(replays: Replays, result: Verification) -> Iterator[str]:
    """Yields the states whose files differ from their seals."""
    for state in replays.states[1:]:
        assert state.folder is not None, "only the start has no folder"
        if fault := fault_of(state.folder):
            yield f"{state.name}: {fault}"
        result.files += len(state.seal["files"])
        result.states[state.name] = hash_file(state.folder / SEAL)
    for path in replays.unsealed:
        yield f"{path.name}: {fault_of(path)}"
    if replays.run.record.status == "done" and not replays.last.is_final:
        yield f"the final model: {SEAL} is {'damaged' if (replays.run.path / SEAL).exists() else 'missing'}"


def _check_agreement(replays: Replays) -> Iterator[str]:
    """Yields where recipe, data, tokenizer, model, log or final weights do not match the sealed states."""
    last = replays.last
    if changes := refusal(replays.changes_of(last)):
        yield f"recipe.yaml: differs from the recipe of {last.name}: {changes}"
    yield from _check_log(replays)
    yield from _check_final(replays)
    for state in replays.states[1:]:
        try:
            facts = replays.facts_of(state)
        except UserError as error:
            yield f"{state.name}: {error}"
            return
        changes = compare(state.seal["facts"], facts["facts"])
        changes += compare(*shared(state.seal["architecture"], facts["architecture"]))
        if text := refusal(changes):
            yield f"{state.name}: it was trained on something else: {text}"
            return
    yield from _check_prepared(replays)


def _check_log(replays: Replays) -> Iterator[str]:
    """Yields the lines of metrics.jsonl that are not those in the last checkpoint, or not their means."""
    metrics = replays.run.metrics
    if checkpoint := next((one for one in reversed(replays.states) if one.folder and not one.is_final), None):
        assert checkpoint.folder is not None
        text = (checkpoint.folder / "trainer_state.json").read_text(encoding="utf-8")
        sealed = to_events(json.loads(text)["log_history"], last=checkpoint.step)
        logged = to_events(metrics, last=checkpoint.step)
        # A run may evaluate after it has saved its last step.
        logged = {key: event for key, event in logged.items() if key in sealed or key[0] < checkpoint.step}
        yield from compare_logs(logged, sealed, tolerance=0.0, source=checkpoint.name)
    for number, entry in enumerate(metrics):
        if "epoch_loss" in entry:
            means = epoch_means([event for event in metrics[:number] if "loss" in event])
            if {**means, "step": entry["step"]} != entry:
                yield f"metrics.jsonl: epoch {entry['epoch']:g} has other means than its log events"


def _check_final(replays: Replays) -> Iterator[str]:
    """Yields the files of the final model whose weights are not those of the checkpoint of the same step."""
    *others, final = replays.states
    for same in (state for state in others if state.step == final.step and state.folder):
        files, sealed = final.seal["files"], same.seal["files"]
        for name in final.weights:
            if files[name]["sha256"] != sealed.get(name, {}).get("sha256"):
                yield f"{name}: {final.name} does not have the weights of {same.name}"


def _check_prepared(replays: Replays) -> Iterator[str]:
    """Yields the sets whose prepared rows are not those that were certified, here or in the run."""
    inputs = replays.inputs_of(replays.last)
    proved = replays.run.record.proof.sets
    tokenizer = copy(inputs.tokenizer)
    tokenizer.chat_template = inputs.template
    for name, split in inputs.prepared.splits.items():
        certified = inputs.prepared.proof.facts[name]["certificate"]["content_hash"]
        if content_hash(split.stored.digest(), inputs.settled, tokenizer) != certified:
            yield f"{inputs.prepared.stored.folder}: the prepared rows of {name} have changed"
        before = proved[name].certificate if name in proved else None
        if before and before.content_hash != certified:
            yield f"{', '.join(split.examples.report.files)}: the rows of {name} are not those of the run"


def _replay_some(replays: Replays, result: Verification, *, spans: int, say: Callable[[str], None]) -> None:
    """Replays randomly chosen spans. Nobody can predict which ones will be checked."""
    found = find_spans(replays.states)
    drawn = random.SystemRandom().sample(range(len(found)), min(spans, len(found)))
    (drawn,) = broadcast_object_list([drawn])
    chosen = [found[number] for number in sorted(drawn)]
    result.spans, result.steps = len(found), sum(span.steps for span in found)
    differences = dict.fromkeys(str(one) for span in chosen for one in replays.differences_from(span.end))
    result.differs_in = list(differences)
    if differences:
        share = f"weights may differ by {TOLERANCE:.0%} of how far they moved in {DECIDED_STEPS} steps"
        say(f"machine   not as in the run, so {share}: {'; '.join(differences)}")
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
        result.add_faults(faults, say)


def _replay(replays: Replays, span: Span, replayed: Replayed) -> Iterator[str]:
    """Replays a span, and yields what differs at its end from the run. Only rank 0 compares."""
    try:
        trainer = replays.replay(span.begin, span.end.step, end=span.end, saves=True)
    except UserError as error:
        yield f"{span}: {error}"
        return
    if replays.arguments.process_index:
        return
    end, ours = span.end.folder, replays.scratch / f"checkpoint-{span.end.step}"
    assert end is not None, "no span ends at the start"
    differences = replays.differences_from(span.end)
    replayed.is_decided = not differences or span.steps <= DECIDED_STEPS
    tolerance = TOLERANCE if differences else 0.0
    begin = span.begin.folder or replays.scratch / START
    difference, first = compare_weights(span.end.weights, before=begin, run=end, replay=ours)
    replayed.difference = difference if math.isfinite(difference) else None
    if replayed.is_decided and not difference <= tolerance:
        far = f"{difference:.2g} of how far they moved"
        yield f"{span.end.name}: the weights of the replay differ by {far}; first, {first}"
    if not differences:
        states = [name for name in span.end.seal["files"] if name.startswith(STATES)]
        yield from (f"{span.end.name}: {fault}" for fault in compare_states(states, run=end, replay=ours))
    first, last = span.begin.step, span.end.step
    entries = (replays.run.metrics, trainer.state.log_history)
    logged, replayed_log = (to_events(some, first=first, last=last) for some in entries)
    losses = LOSS_TOLERANCE if differences else 0.0
    yield from compare_logs(logged, replayed_log, tolerance=losses, source="the replay")
    shutil.rmtree(ours, ignore_errors=True)


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
        shapes, *others = ({key: part.shape for key, part in one.items()} for one in (ours, start, theirs))
        if any(shapes != other for other in others):
            return math.inf, f"{name}, whose weights have other names or shapes"
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


def compare_logs(run: Events, other: Events, *, tolerance: float, source: str) -> Iterator[str]:
    """Yields the first figure of each log event that differs from that of the ``source`` of ``other``."""
    for key in {**run, **other}:
        step, kind = key
        if key not in run or key not in other:
            where = "metrics.jsonl" if key in run else source
            yield f"metrics.jsonl: {kind} of step {step:,} is only in {where}"
            continue
        for name in {**other[key], **run[key]}:
            value, theirs = run[key].get(name), other[key].get(name)
            if not _is_timed(name) and not _agree(name, value, theirs, tolerance):
                yield f"metrics.jsonl: {name} of step {step:,} is {value}, and {theirs} in {source}"
                break


def to_events(entries: Entries, *, first: int = 0, last: int) -> Events:
    """Returns the log events after the step ``first``, up to ``last``; those of step 0 if it is 0.

    Of two evaluations at a step, the second is that of the best model, after the training.
    """
    events: Events = {}
    for entry in entries:
        kind = next((key for key in ("loss", "eval_loss") if key in entry), None)
        is_inside = first < entry["step"] <= last or entry["step"] == first == 0
        if kind and is_inside:
            events.setdefault((entry["step"], kind), entry)
    return events


def _is_timed(name: str) -> bool:
    return name.endswith(TIMED) or name.startswith(GPU)


def _agree(name: str, value: object, other: object, tolerance: float) -> bool:
    """Returns whether two values of a log are equal, or close enough with a ``tolerance``.

    Then, only losses are compared, and what does not depend on rounding. A single token can change an
    accuracy, and an answer completely.
    """
    if not tolerance or not isinstance(value, float):
        return value == other or (value != value and other != other)
    if not name.endswith("loss"):
        return True
    return isinstance(other, float) and math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance)


def _seconds(metrics: Entries, span: Span) -> float:
    """Returns how long the steps of a span took in the run, as far as its log tells."""
    reached = {entry["step"]: entry["seconds"] for entry in metrics if "seconds" in entry}

    def at(step: int) -> float:
        return max((seconds for known, seconds in reached.items() if known <= step), default=0.0)

    return at(span.end.step) - at(span.begin.step)
