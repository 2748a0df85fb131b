"""The answers of runs to the same prompts, from before training to its end: how they grow.

samples.jsonl, answers.jsonl --histories--> {prompt: {step: text}} --grow--> one Stage for each change
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from hf_clm.run_folder import RunFolder

PROMPTS = 10  # on a page
STAGES = 5  # of one prompt, side by side

History = dict[int, str]  # step -> answer


class Stage(NamedTuple):
    """The answers from one sampled step to another, between which they do not change; one for each run."""

    first: int
    last: int
    texts: tuple[str, ...]

    @property
    def title(self) -> str:
        """``before training``, ``step 200``, ``steps 600 to 1,200``."""
        if self.last == 0:
            return "before training"
        return f"step {self.last:,}" if self.first == self.last else f"steps {self.first:,} to {self.last:,}"


class Growth(NamedTuple):
    """A prompt, the target if it is known, and the stages of the answers; ``changes`` counts all stages."""

    prompt: str
    target: str
    stages: list[Stage]
    changes: int


def to_growth(runs: Sequence[RunFolder]) -> list[Growth]:
    """Returns the answers to each prompt that all the runs have, in the order of the first run."""
    known = [_histories(run) for run in runs]
    targets = {prompt: target for run in runs for prompt, target in _targets(run).items()}
    shared = [prompt for prompt in known[0] if all(prompt in own for own in known)]
    return [_grow(prompt, targets.get(prompt, ""), [own[prompt] for own in known]) for prompt in shared]


def _grow(prompt: str, target: str, histories: Sequence[History]) -> Growth:
    """Joins steps at which no answer changes, and thins the stages out to a few, evenly."""
    steps = sorted({step for history in histories for step in history})
    answers = [(step, tuple(_latest(history, step) for history in histories)) for step in steps]
    groups = [(texts, [step for step, _ in group]) for texts, group in groupby(answers, lambda one: one[1])]
    stages = [Stage(steps[0], steps[-1], texts) for texts, steps in groups]
    last, count = len(stages) - 1, min(STAGES, len(stages))
    shown = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    return Growth(prompt, target, [stages[number] for number in shown], len(stages))


def _latest(history: History, step: int) -> str:
    """The answer at a step, or at the last sampled step before it."""
    return next((history[own] for own in sorted(history, reverse=True) if own <= step), "")


def _histories(run: RunFolder) -> dict[str, History]:
    found: dict[str, History] = {}
    for entry in [*run.samples, *run.answers]:
        found.setdefault(entry["prompt"], {})[entry["step"]] = entry["text"]
    return found


def _targets(run: RunFolder) -> dict[str, str]:
    return run.questions | {entry["prompt"]: entry["target"] for entry in run.answers}
