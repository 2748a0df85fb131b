"""Exceptions for errors that the user can fix and for runs asked to stop; exit codes."""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

# The names on the package index of modules whose own name differs.
DISTRIBUTIONS = {"ruamel": "ruamel.yaml", "google": "protobuf"}


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
    """An error that the user can fix. Printed as one line, without a traceback.

    Args:
        what: the problem.
        where: the file, recipe key or option that it concerns.
        got: the offending value.
        fix: how to fix it.
    """

    exit_code = ExitCode.RECIPE
    is_own: bool | None = None  # whether this process reports it; None: the first process of each machine

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
    row: int | None = None  # the example's number, if the file and line are not known yet

    def at(self, where: str) -> "DataError":
        """Returns the same error with its place."""
        return DataError(self.what, where=where, got=self.got, fix=self.fix)


class ModelError(UserError):
    exit_code = ExitCode.MODEL


class DivergedError(UserError):
    exit_code = ExitCode.DIVERGED


class EnvironmentFault(UserError):
    exit_code = ExitCode.ENVIRONMENT


class Preempted(SystemExit):
    """Raised by a run that was asked to stop, after it has saved a checkpoint to resume from.

    It is a SystemExit, so a script exits with its code, and a loop over runs that catches Exception ends too.
    """

    def __init__(self, reason: str, *, step: int, steps: int, checkpoint: str, words: str = ""):
        super().__init__(int(ExitCode.INTERRUPTED if reason == "SIGINT" else ExitCode.PREEMPTED))
        self.reason, self.step, self.steps, self.checkpoint = reason, step, steps, checkpoint
        self.words = words  # how the resuming command must differ: "with --x", "without --x"

    def __str__(self) -> str:
        done = f"stopped by {self.reason} at step {self.step:,} of {self.steps:,}"
        how = f" ({self.words})" if self.words else ""
        return f"{done}; saved in {self.checkpoint}; the same command resumes from there{how}"

    def to_json(self) -> dict[str, Any]:
        """Returns its entry in run.json."""
        return {"stopped_by": self.reason, "stopped_at_step": self.step}


@contextmanager
def needing_packages() -> Iterator[None]:
    """Converts the error for a package that is not installed, as in a bare checkout, to one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module.startswith("_") or module in ("", "hf_clm"):
            raise
        package = DISTRIBUTIONS.get(module, module)
        what = f"needs the package {package}, which is not installed"
        raise EnvironmentFault(what, fix=f"pip install {package}") from error


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest choice, or an empty string if none is close."""
    matches = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def to_limit(share: float) -> str:
    """Formats a share with two digits, rounded up, so that as a limit it still allows that share."""
    digits = max(2, 1 - math.floor(math.log10(share)))
    return f"{math.ceil(share * 10**digits) / 10**digits:g}"
