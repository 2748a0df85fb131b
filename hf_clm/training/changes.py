"""What differs between the run that a checkpoint is of and the run that is to go on from it.

key of the recipe, or fact     differs
data, tokenizer, template,  }  refused with both values, or
global_batch, architecture, }  named in resume_override: applied
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

SHOWN_KEYS = 6  # of those that are refused, in the line of the error


@dataclass(frozen=True)
class Change:
    """A key of the recipe or a fact of the run, with its value in the checkpoint and now."""

    key: str
    before: Any
    now: Any
    fate: Literal["refused", "overridden", "free", "version"]

    def __str__(self) -> str:
        return f"{self.key} ({shorten(self.before)}, now {shorten(self.now)})"


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], *, overridden: Sequence[str] = ()
) -> list[Change]:
    """Compares two sets of keys or facts; a key that one of them lacks counts as None there.

    ``overridden``: keys, sections or facts that may differ; ``learning_rate`` means ``train.learning_rate``.
    """
    return [
        Change(key, before.get(key), now.get(key), _fate(key, overridden))
        for key in {**before, **now}
        if before.get(key) != now.get(key) and resume_rule(key) != "unseen"
    ]


def compare_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """The packages of another version."""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    return [Change(f"version of {name}", before[name], now[name], "version") for name in changed]


def shared(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what the other lacks: a later version of a library has more to say."""
    return {key: before[key] for key in before if key in now}, {key: now[key] for key in now if key in before}


def to_architecture(overridden: Sequence[str]) -> list[str]:
    """What of the architecture may differ where ``model`` or keys of ``model.config`` may."""
    config = [name.removeprefix("model.config") for name in overridden if name.startswith("model.config")]
    return [f"architecture{name}" for name in config] + ["architecture"] * ("model" in overridden)


def recipe_keys(recipe: Recipe | dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe by their dotted key.

    One that was dumped gets what later versions have added, as they have it where nothing is said.
    """
    if isinstance(recipe, dict):
        try:
            recipe = Recipe.model_validate(recipe)
        except ValidationError:  # it has what a later version took away
            return dict(leaves(recipe))
    return dict(leaves(recipe.model_dump()))


def refusal(changes: Sequence[Change]) -> str:
    """What is refused of the changes, with both values, in a line; empty where nothing is."""
    refused = [change for change in changes if change.fate == "refused"]
    more = f" and {len(refused) - SHOWN_KEYS} more" if len(refused) > SHOWN_KEYS else ""
    return ", ".join(map(str, refused[:SHOWN_KEYS])) + more


def to_override(changes: Sequence[Change]) -> str:
    """The option that applies what is refused, and what it applied already."""
    named = ("refused", "overridden")
    names = dict.fromkeys(_short(change.key) for change in changes if change.fate in named)
    return f"--resume_override {','.join(names)}"


def to_table(changes: Sequence[Change]) -> Iterator[str]:
    """The changes as lines of columns, under a head."""
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
    """How the option spells a key: the sources of the data together, the Trainer's fields bare."""
    if key.startswith("data.train."):
        return "data.train"
    return key.removeprefix("train.")
