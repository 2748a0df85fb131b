"""Reads a YAML file and the words of the command line into one frozen, validated ``Recipe``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError
from hf_clm.recipe.checks import recipe_faults
from hf_clm.recipe.faults import RecipeFaults, shorten, suggest_key, to_faults
from hf_clm.recipe.other_names import advise
from hf_clm.recipe.sections import FACTS, REMOVED, Keys, Source, WeightGroup, to_sources
from hf_clm.recipe.sections import Data as Data
from hf_clm.recipe.shipped import find_recipe, locate
from hf_clm.recipe.text import (
    COMMAND_LINE,
    accepted_types,
    leaves,
    list_keys,
    override,
    place_of,
    text_faults,
    to_options,
    to_type_text,
)
from hf_clm.recipe.trainer_fields import (
    TRAIN_DEFAULTS,
    check_train,
    to_field,
    train_fields,
    train_rule,
    train_section,
)


@dataclass
class _Origins:
    """Where each key was given. Always compares equal, so that recipes are compared by their values."""

    places: dict[str, str] = field(default_factory=dict, compare=False)
    file: str = field(default="", compare=False)


class Recipe(Keys):
    """The settings of a run. An instance has passed all checks that need neither data nor model."""

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
    def places(self) -> Mapping[str, str]:
        """Where each dotted key was given: ``{"data.max_length": "recipes/x.yaml:9"}``."""
        return self._origins.places

    @property
    def file(self) -> str:
        """The file of the recipe; empty for a recipe that was built in Python."""
        return self._origins.file

    def for_tokenizer(self, *, has_template: bool) -> "Recipe":
        """Returns the recipe with ``data.render: auto`` resolved, depending on the tokenizer's template."""
        if self.data.render != "auto":
            return self
        render = "chat" if has_template and self.stage == "sft" else "plain"
        return self.model_copy(update={"data": self.data.model_copy(update={"render": render})})


REMOVED_KEYS = {
    f"{section}.{name}": fix for name, (_, fix) in REMOVED.items() for section in ("data", "data.mixing")
}
# A section that is given as text stands for one of its keys: --model Qwen/Qwen2.5-0.5B.
SHORT = {
    "model": "model.name_or_path",
    "tokenizer": "tokenizer.name_or_path",
    "data": "data.train",
    "optimizer": "optimizer.name",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; ``overrides`` are words: ``["--bf16", "--learning_rate", "1e-4", "--stage=sft"]``.

    Args:
        path: a file, the folder of a run, or the name of a shipped recipe, such as ``sft/poems``.
        options: other options of the command, to suggest for a misspelt name.

    Raises RecipeError for the first fault, with the line of the file or "command line".
    """
    from hf_clm.recipe.yaml_text import load_yaml

    file = find_recipe(str(path))
    tree, places = load_yaml(file)
    for key, value in read_overrides(overrides, options=options):
        if key in ("data.train", "data.eval") and isinstance(tree.get("data"), dict):
            value = keep_format(value, tree["data"].get(key.removeprefix("data.")))
        override(tree, places, key=key, value=value)
    return build_recipe(tree, places, file=file)


def read_overrides(words: Sequence[str], *, options: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for words of the command line. Raises RecipeError for an unknown key."""
    from hf_clm.recipe.yaml_text import to_value

    fields = recipe_fields()
    for name, text in to_options(words):
        key = _to_key(name, options)
        if key in SHORT and text and not text.lstrip().startswith("{"):
            key = SHORT[key]
        text = "true" if key == "lora" and text is None else text
        yield key, to_value(key, text, types=accepted_types(fields.get(key)))


def build_recipe(tree: dict[str, Any], places: dict[str, str], *, file: str = "") -> Recipe:
    """Validates nested keys and values, and builds a recipe from them.

    Args:
        places: where each dotted key was given, such as ``recipes/x.yaml:9``.
        file: the recipe's file, in whose folder relative paths are looked up too.

    Raises RecipeError for the first fault, with the number of further faults.
    """
    if not (faults := text_faults(tree)):
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            faults = list(to_faults(error, recipe_fields(), removed=REMOVED_KEYS))
        else:
            recipe._origins.places.update(places)
            recipe._origins.file = file
            return _locate_paths(recipe)
    first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    what, got = (first.what, first.got + more) if first.got else (first.what + more, "")
    where = place_of(first.key, places, otherwise=file)
    raise RecipeError(what, where=where, got=got, fix=first.fix)


def recipe_fields() -> dict[str, FieldInfo]:
    """Returns every dotted key of a recipe with its field."""
    return dict([*list_keys(Recipe), *list_keys(train_section(), "train.")])


def resume_rule(key: str) -> str:
    """Returns whether a dotted key, or a fact of a run, may differ on a resume: refused, free or unseen."""
    if key in FACTS:
        return FACTS[key]
    rule = train_rule(key.removeprefix("train.")) if key.startswith("train.") else Recipe.rule(key)
    return rule.resume or "refused"


def training_values(recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments for ``transformers.TrainingArguments``. A row of a token budget is a batch."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    fills_rows = recipe.data.tokens_per_batch and recipe.resolved_packing == "none"
    return TRAIN_DEFAULTS | (dict.fromkeys(sizes, 1) if fills_rows else {}) | recipe.train


def recipe_to_yaml(recipe: Recipe) -> str:
    """Returns the recipe as YAML, including defaults. Reading it results in an equal recipe."""
    from hf_clm.recipe.yaml_text import write_yaml

    return write_yaml(recipe.model_dump())


def describe_recipe(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """Returns (key, value, origin): "default", "hf_clm default", "command line" or "recipes/x.yaml:9"."""
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
    """Returns help for each key of a recipe: its type, default and meaning."""
    lines = ["Keys of a recipe, in YAML, or as --section.key VALUE on the command line:"]
    lines += [line for key, info in list_keys(Recipe) for line in _help_lines(f"--{key}", info)]
    for items, model in (("a source in data.train and data.eval", Source), ("optimizer.groups", WeightGroup)):
        lines += ["", f"Keys of {items}:"]
        lines += [line for key, info in list_keys(model) for line in _help_lines(key, info)]
    lines += ["", "Fields of transformers.TrainingArguments need no prefix: --learning_rate 1e-4"]
    return "\n".join(lines)


def _locate_paths(recipe: Recipe) -> Recipe:
    """Resolves the paths in a recipe's file, from the working directory or else the folder of the file."""
    places = recipe._origins.places

    def find(path: str | None, key: str) -> str | None:
        is_typed = place_of(key, places, otherwise="") == COMMAND_LINE
        return path if path is None or is_typed else locate(path, recipe=recipe.file)

    def find_sources(key: str, sources: list[Source]) -> list[Source]:
        paths = [find(source.path, f"data.{key}.{number}.path") for number, source in enumerate(sources)]
        return [source.model_copy(update={"path": path}) for source, path in zip(sources, paths, strict=True)]

    model, tokenizer, data = recipe.model, recipe.tokenizer, recipe.data
    model = model.model_copy(update={"name_or_path": find(model.name_or_path, "model.name_or_path")})
    names = {
        key: find(getattr(tokenizer, key), f"tokenizer.{key}") for key in ("name_or_path", "chat_template")
    }
    sources = {key: find_sources(key, getattr(data, key)) for key in ("train", "eval")}
    return recipe.model_copy(
        update={
            "model": model,
            "tokenizer": tokenizer.model_copy(update=names),
            "data": data.model_copy(update=sources),
        }
    )


def find_key(name: str) -> str | None:
    """Returns the dotted key of a name: ``learning_rate`` is ``train.learning_rate``; else None.

    A name with a dot is returned as it is, to be checked with its section.
    """
    if "." in name or name in Recipe.model_fields:
        return name
    return f"train.{to_field(name)}" if name in train_fields() or to_field(name) != name else None


def suggest(name: str, options: Sequence[str] = ()) -> str:
    """Returns ``"; did you mean 'x'?"`` for a name without a section, or an empty string."""
    return suggest_key(name, [*options, *train_fields(), *(key for key, _ in list_keys(Recipe))])


def _to_key(name: str, options: Sequence[str]) -> str:
    if key := find_key(name):
        return key
    if advice := advise(name, is_option=True):
        raise RecipeError(f"--{name} is a name of {advice[0]}", where=COMMAND_LINE, fix=advice[1])
    raise RecipeError(f"unknown option --{name}{suggest(name, options)}", where=COMMAND_LINE)


def keep_format(value: Any, old: Any) -> Any:
    """Returns new sources of ``data.train`` or ``data.eval`` in place of the old ones.

    Plain paths receive the columns or the template of the old sources, with their format, if these are all
    the same. A format alone is not kept: the keys of the new records tell theirs.
    """
    paths = value if isinstance(value, list) else [value]
    sources = [source for source in to_sources(old or []) if isinstance(source, dict)]
    shared = ("format", "fields", "template")
    formats = [{key: source[key] for key in shared if key in source} for source in sources]
    is_shared = bool(formats) and all(item == formats[0] for item in formats)
    is_shared = is_shared and not formats[0].keys().isdisjoint(("fields", "template"))
    if is_shared and all(isinstance(path, str) for path in paths):
        return [{"path": path, **formats[0]} for path in paths]
    return value


def _help_lines(key: str, info: FieldInfo) -> list[str]:
    if not info.description:  # a section
        return [""]
    default = "required" if info.is_required() else f"default {shorten(info.default)}"
    lines = info.description.splitlines()
    return [f"  {key}  {to_type_text(info.annotation)}  ({default})", *(f"      {line}" for line in lines)]
