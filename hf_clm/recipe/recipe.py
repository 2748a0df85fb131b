"""The recipe: one YAML file and the words of the command line become one frozen, checked ``Recipe``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError
from hf_clm.recipe.checks import recipe_faults
from hf_clm.recipe.faults import RecipeFaults, shorten, suggest_key, to_faults
from hf_clm.recipe.sections import FACTS, REMOVED, Keys, Source, to_sources
from hf_clm.recipe.sections import Data as Data
from hf_clm.recipe.text import (
    COMMAND_LINE,
    accepted_types,
    build_yaml,
    leaves,
    list_keys,
    load_yaml,
    override,
    place_of,
    text_faults,
    to_options,
    to_type_text,
    to_value,
)
from hf_clm.recipe.trainer_fields import (
    TRAIN_DEFAULTS,
    V4_NAMES,
    check_train,
    train_fields,
    train_rule,
    train_section,
)


@dataclass
class _Origins:
    """Where each key was given; two of them are always equal, so recipes compare by what they say."""

    places: dict[str, str] = field(default_factory=dict, compare=False)
    file: str = field(default="", compare=False)


class Recipe(Keys):
    """A run: one that was built has passed every check that needs neither data nor model."""

    _origins: _Origins = PrivateAttr(default_factory=_Origins)

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: dict[str, Any]) -> dict[str, Any]:
        values, faults = check_train(train)
        if faults:
            raise RecipeFaults(faults)
        return values

    @model_validator(mode="after")
    def _check_together(self) -> "Recipe":
        if faults := recipe_faults(self):
            raise RecipeFaults(faults)
        return self

    @property
    def file(self) -> str:
        """Where the recipe was read; empty for one made in Python."""
        return self._origins.file

    def for_tokenizer(self, *, has_template: bool) -> "Recipe":
        """The recipe with ``data.render: auto`` decided: by whether the tokenizer has a chat template."""
        if self.data.render != "auto":
            return self
        render = "chat" if has_template and self.stage == "sft" else "plain"
        return self.model_copy(update={"data": self.data.model_copy(update={"render": render})})


# Keys of earlier versions and of transformers 4 -> what to do.
GONE = {f"train.{name}": fix for name, fix in V4_NAMES.items()}
GONE |= {
    f"{section}.{name}": fix for name, (_, fix) in REMOVED.items() for section in ("data", "data.mixing")
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; ``overrides`` are words: ``["--bf16", "--learning_rate", "1e-4", "--stage=sft"]``.

    ``options``: names that the command knows besides, for one that was mistyped. Raises RecipeError with the
    line of the file, or "command line", for the first thing that is wrong.
    """
    tree, places = load_yaml(str(path))
    fields = dict([*list_keys(Recipe), *list_keys(train_section(), "train.")])
    for name, text in to_options(overrides):
        key = _to_key(name, options)
        value = to_value(key, text, types=accepted_types(fields.get(key)))
        if key in ("data.train", "data.eval") and isinstance(tree.get("data"), dict):
            value = _with_known_format(value, tree["data"].get(key.removeprefix("data.")))
        override(tree, places, key=key, value=value)
    if not (faults := text_faults(tree)):
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            faults = list(to_faults(error, fields, gone=GONE))
        else:
            recipe._origins.places.update(places)
            recipe._origins.file = str(path)
            return recipe
    first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    what, got = (first.what, first.got + more) if first.got else (first.what + more, "")
    raise RecipeError(what, where=place_of(first.key, places, otherwise=str(path)), got=got, fix=first.fix)


def resume_rule(key: str) -> str:
    """Whether a dotted key, or a fact of a run, may differ when it is resumed: refused, free or unseen."""
    if key in FACTS:
        return FACTS[key]
    rule = train_rule(key.removeprefix("train.")) if key.startswith("train.") else Recipe.rule(key)
    return rule.resume or "refused"


def find_recipe(target: str) -> str:
    """The path of a recipe, which may be named by its run's folder. Raises RecipeError for another folder."""
    if not Path(target).is_dir():
        return target
    path = Path(target, "recipe.yaml")
    if not path.is_file():
        what, fix = "holds no recipe.yaml: not a run's folder", "name a recipe or a run"
        raise RecipeError(what, where=target, fix=fix)
    return str(path)


def training_values(recipe: Recipe) -> dict[str, Any]:
    """What ``transformers.TrainingArguments`` is given; of a token budget, the row is the micro-batch."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    return TRAIN_DEFAULTS | (dict.fromkeys(sizes, 1) if recipe.data.tokens_per_batch else {}) | recipe.train


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included; reading it gives an equal one."""
    text = StringIO()
    build_yaml().dump(recipe.model_dump(), text)
    return text.getvalue()


def describe_recipe(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """(dotted key, value, origin): "default", "hf_clm default", "command line" or "recipes/x.yaml:9"."""
    places = recipe._origins.places
    values = recipe.model_dump()
    defaults = training_values(recipe)
    values["train"] |= {key: value for key, value in defaults.items() if key not in recipe.train}

    def origin(key: str) -> str:
        may_be_short = key.startswith("data.") and key.endswith(".path")  # data.train: my.jsonl
        default = "hf_clm default" if key.startswith("train.") else "default"
        return place_of(key, places, otherwise=default) if may_be_short else places.get(key, default)

    return [(key, value, origin(key)) for key, value in leaves(values)]


def recipe_help() -> str:
    """Every key of a recipe with its type, default and meaning."""
    lines = ["Keys of a recipe, in YAML, or as --section.key VALUE on the command line:"]
    lines += [line for key, info in list_keys(Recipe) for line in _help_lines(f"--{key}", info)]
    lines += ["", "Keys of a source in data.train and data.eval:"]
    lines += [line for key, info in list_keys(Source) for line in _help_lines(key, info)]
    lines += ["", "Every field of transformers.TrainingArguments can be given bare: --learning_rate 1e-4"]
    return "\n".join(lines)


def _to_key(name: str, options: Sequence[str]) -> str:
    if "." in name or name in Recipe.model_fields:
        return name
    fields = train_fields()
    if name in fields or name in V4_NAMES:
        return f"train.{name}"
    near = suggest_key(name, [*options, *fields, *(key for key, _ in list_keys(Recipe))])
    raise RecipeError(f"unknown option --{name}{near}", where=COMMAND_LINE)


def _with_known_format(value: Any, old: Any) -> Any:
    """A path alone gets the format and the columns that all the recipe's sources share."""
    paths = value if isinstance(value, list) else [value]
    sources = [source for source in to_sources(old or []) if isinstance(source, dict)]
    shared = ("format", "fields", "template")
    known = [{key: source[key] for key in shared if key in source} for source in sources]
    is_shared = bool(known) and all(item == known[0] for item in known)
    if is_shared and all(isinstance(path, str) for path in paths):
        return [{"path": path, **known[0]} for path in paths]
    return value


def _help_lines(key: str, info: FieldInfo) -> list[str]:
    if not info.description:  # a section
        return [""]
    default = "required" if info.is_required() else f"default {shorten(info.default)}"
    return [f"  {key}  {to_type_text(info.annotation)}  ({default})", f"      {info.description}"]
