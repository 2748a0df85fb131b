"""The one exception for what a user can fix, that of a run asked to stop, and the exit codes."""

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    DONE = 0
    RECIPE = 2  # recipe or command line
    DATA = 3
    MODEL = 4  # model or tokenizer
    DIVERGED = 5  # non-finite loss
    ENVIRONMENT = 6  # disk, memory, network, permissions
    PREEMPTED = 75  # and resumable
    INTERRUPTED = 130


class UserError(Exception):
    """What a user can fix: where, what, what was got, how to fix; shown as one line, without a traceback."""

    exit_code = ExitCode.RECIPE
    is_own: bool | None = None  # whether this process reports it; None: the first one of each machine does

    def __init__(self, what: str, *, where: str = "", got: str = "", fix: str = ""):
        self.what, self.where, self.got, self.fix = what, where, got, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.got:
            text += f"; got {self.got}"
        return f"{text}; fix: {self.fix}" if self.fix else text

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the line, as on the command line, in place of a traceback."""
        return [f"error: {self}"]


class RecipeError(UserError):
    exit_code = ExitCode.RECIPE


class DataError(UserError):
    exit_code = ExitCode.DATA
    row: int | None = None  # the number of the example, where only that is known

    def at(self, where: str) -> "DataError":
        """The same error with its place."""
        return DataError(self.what, where=where, got=self.got, fix=self.fix)


class ModelError(UserError):
    exit_code = ExitCode.MODEL


class DivergedError(UserError):
    exit_code = ExitCode.DIVERGED


class EnvironmentFault(UserError):
    exit_code = ExitCode.ENVIRONMENT


class Preempted(SystemExit):
    """A run that was asked to stop, and did so behind a checkpoint that it goes on from.

    A SystemExit: a script ends with its exit code, and a loop over runs that catches Exception ends too.
    """

    def __init__(self, reason: str, *, step: int, steps: int, checkpoint: str, words: str = ""):
        super().__init__(int(ExitCode.INTERRUPTED if reason == "SIGINT" else ExitCode.PREEMPTED))
        self.reason, self.step, self.steps, self.checkpoint = reason, step, steps, checkpoint
        self.words = words  # how the command must differ to go on: "with --x", "without --x"

    def __str__(self) -> str:
        done = f"stopped by {self.reason} at step {self.step:,} of {self.steps:,}"
        how = f" ({self.words})" if self.words else ""
        return f"{done}; saved in {self.checkpoint}; the same command resumes from there{how}"

    def to_json(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"stopped_by": self.reason, "stopped_at_step": self.step}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
