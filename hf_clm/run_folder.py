"""What a run left in its folder: read as far as it goes, also of an old run, or one that was killed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from hf_clm.errors import RecipeError, UserError
from hf_clm.recipe.text import leaves, load_yaml

TINY, HUGE = 1e-100, 1e100
Entries = list[dict[str, Any]]
Point = tuple[float, float]


@dataclass(frozen=True)
class RunRecord:
    """The files of a run: ``facts`` of run.json, the lines of the others, the dotted keys of recipe.yaml.

    ``unreadable`` counts lines that are no JSON: the last one of a run that was killed as it wrote.
    """

    folder: Path
    facts: dict[str, Any]
    metrics: Entries
    samples: Entries
    label_rows: Entries
    recipe: dict[str, Any]
    unreadable: int

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def status(self) -> str:
        return str(self.facts.get("status", "unknown"))

    def part(self, *keys: str) -> dict[str, Any]:
        """A mapping inside those of run.json; empty where there is none."""
        content = self.facts
        for key in keys:
            found = content.get(key)
            content = found if isinstance(found, dict) else {}
        return content


def load_record(folder: str | Path) -> RunRecord:
    """Reads a run's folder. Raises RecipeError where it holds no run.json that can be read."""
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        what = "holds no run.json: not a run's folder" if folder.is_dir() else "no such folder"
        raise RecipeError(what, where=str(folder), fix="name the output folder of a run")
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        fix = "name the output folder of a run; its metrics.jsonl may still be read"
        raise RecipeError("not a JSON object", where=str(path), fix=fix)
    names = ("metrics.jsonl", "samples.jsonl", "label_rows.jsonl")
    (metrics, *lost), (samples, *lost_too), (rows, *also) = (read_lines(folder / name) for name in names)
    unreadable = sum([*lost, *lost_too, *also])
    return RunRecord(folder, facts, metrics, samples, rows, _read_recipe(folder / "recipe.yaml"), unreadable)


def read_lines(path: Path) -> tuple[Entries, int]:
    """The JSON objects of a file, one a line, and how many lines are none; nothing of a missing file."""
    if not path.is_file():
        return [], 0
    found = [_to_object(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    entries = [entry for entry in found if entry is not None]
    return entries, len(found) - len(entries)


def points(entries: Iterable[dict[str, Any]], key: str, *, over: str = "step") -> list[Point]:
    """(x, y) of the entries that have both as numbers, in the order of x: ``over`` and ``key`` name them."""
    pairs = ((entry.get(over), entry.get(key)) for entry in entries)
    return sorted((float(a), float(b)) for a, b in pairs if is_number(a) and is_number(b))


def is_number(value: Any) -> TypeGuard[float]:
    """True for an int or float that can be drawn: finite, and neither huge nor all but 0; a bool is none."""
    return type(value) in (int, float) and (value == 0 or TINY < abs(value) < HUGE)


def final_figures(record: RunRecord) -> dict[str, float]:
    """What a run reached: of run.json, and while it goes on, or where it was killed, of its log events.

    The seconds are those of the log events, which count on where a run was resumed.
    """
    found = {}
    for key, logged in FIGURES.items():
        seen = _logged(record.metrics, logged, of=key)
        said = record.facts.get(key)
        value = seen if key == "seconds" and seen is not None else said if is_number(said) else seen
        found |= {} if value is None else {key: value}
    return found


def _logged(metrics: Entries, key: str, *, of: str) -> float | None:
    """The last value, or the first of a figure before training; one alone is no figure after it."""
    entries = metrics if of.endswith("_before") else reversed(metrics)
    found = islice((entry[key] for entry in entries if is_number(entry.get(key))), 2)
    first = next(found, None)
    return None if of.endswith("_after") and next(found, None) is None else first


# A figure of run.json -> the key in a log event.
FIGURES = {
    "loss_before": "eval_loss",
    "loss_after": "eval_loss",
    "training_loss": "loss",
    "training_token_accuracy": "token_accuracy",
    "token_accuracy_before": "eval_token_accuracy",
    "token_accuracy_after": "eval_token_accuracy",
    "steps_done": "step",
    "tokens_seen": "tokens_seen",
    "target_tokens_seen": "target_tokens_seen",
    "seconds": "seconds",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "peak_memory_bytes": "peak_memory_bytes",
}


def _to_object(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return _to_leaves(str(path), path.stat().st_mtime_ns)
    except (OSError, UserError):
        return {}


@lru_cache(maxsize=8)
def _to_leaves(path: str, changed: int) -> dict[str, Any]:
    """Kept while the file stays as it is: YAML takes longer than all the rest of a page."""
    return dict(leaves(load_yaml(path)[0]))
