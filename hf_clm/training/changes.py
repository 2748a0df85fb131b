"""Compares a checkpoint with the run that resumes from it.

key of the recipe, or fact     if it differs
data, tokenizer, template,  }  refused, unless resume_override
global_batch, architecture, }  names it
any other key               }
logging, saving, evaluation    applied
versions                       applied, with a warning
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from hf_clm.recipe.faults import shorten
from hf_clm.recipe.recipe import Recipe, resume_rule
from hf_clm.recipe.text import leaves

MAX_KEYS = 6  # in the message of an error


@dataclass(frozen=True)
class Change:
    """A key of the recipe or a fact of the run whose value differs from that in the checkpoint."""

    key: str
    before: Any
    now: Any
    fate: Literal["refused", "overridden", "free", "version"]

    def __str__(self) -> str:
        return f"{self.key} ({shorten(self.before)}, now {shorten(self.now)})"


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], *, overridden: Sequence[str] = ()
) -> list[Change]:
    """Compares two mappings of keys or facts. A missing key counts as None.

    ``overridden``: keys, sections or facts that may differ; ``learning_rate`` means ``train.learning_rate``.
    """
    return [
        Change(key, before.get(key), now.get(key), _fate(key, overridden))
        for key in {**before, **now}
        if before.get(key) != now.get(key) and resume_rule(key) != "unseen"
    ]


def compare_versions(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[Change]:
    """Returns the packages whose version differs."""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    return [Change(f"version of {name}", before[name], now[name], "version") for name in changed]


def shared(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reduces both mappings to their common keys, as another version of a library may add keys."""
    return {key: before[key] for key in before if key in now}, {key: now[key] for key in now if key in before}


def to_architecture(overridden: Sequence[str]) -> list[str]:
    """Returns the names of the architecture that may differ if ``model`` or keys of ``model.config`` may."""
    config = [name.removeprefix("model.config") for name in overridden if name.startswith("model.config")]
    return [f"architecture{name}" for name in config] + ["architecture"] * ("model" in overridden)


def recipe_keys(recipe: Recipe | dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a recipe by their dotted key.

    A dumped recipe receives the defaults of keys that later versions of hf_clm have added.
    """
    if isinstance(recipe, dict):
        try:
            recipe = Recipe.model_validate(recipe)
        except ValidationError:  # it has keys that a later version removed
            return dict(leaves(recipe))
    return dict(leaves(recipe.model_dump()))


def refusal(changes: Sequence[Change]) -> str:
    """Returns the refused changes with both values, as one line, or an empty string."""
    refused = [change for change in changes if change.fate == "refused"]
    more = f" and {len(refused) - MAX_KEYS} more" if len(refused) > MAX_KEYS else ""
    return ", ".join(map(str, refused[:MAX_KEYS])) + more


def to_override(changes: Sequence[Change]) -> str:
    """Returns the option that allows the refused changes, and those it allows already."""
    fates = ("refused", "overridden")
    names = dict.fromkeys(_short(change.key) for change in changes if change.fate in fates)
    return f"--resume_override {','.join(names)}"


def to_table(changes: Sequence[Change]) -> Iterator[str]:
    """Yields the changes as the lines of a table with a header."""
    rows = [("", "in the checkpoint", "now", "")]
    for change in changes:
        fate = "warning" if change.fate == "version" else "applied"
        rows.append((change.key, shorten(change.before), shorten(change.now), fate))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if changes else []:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield f"{'':<10}{'  '.join(cells)}".rstrip()


def _fate(key: str, overridden: Sequence[str]) -> Literal["refused", "overridden", "free"]:
    spelled = {*overridden, *(f"train.{name}" for name in overridden)}
    if any(key == name or key.startswith(f"{name}.") for name in spelled):
        return "overridden"
    return "free" if resume_rule(key) == "free" else "refused"


def _short(key: str) -> str:
    """Returns a key as the option spells it: ``data.train`` for its sources, ``lr`` for ``train.lr``."""
    if key.startswith("data.train."):
        return "data.train"
    return key.removeprefix("train.")
