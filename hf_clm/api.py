"""``hf_clm.train``: a run from Python, with data in memory and objects that no recipe holds.

    recipe | None --.
    keywords -------+--> nested keys --> Recipe --> training.run --> Run(model, tokenizer, trainer, metrics)
    records --------'
       '--> a file in the cache, named by its content: from there on the road of every other run

As records in memory become a file, such a run is prepared once, resumes and has a ledger like any other.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import BaseModel

from hf_clm.data.read.faults import check_data
from hf_clm.draft import draft_recipe, to_lines
from hf_clm.errors import DataError, RecipeError, needing_packages
from hf_clm.hashing import hash_file
from hf_clm.logs import to_json_lines, writes_json
from hf_clm.machine import is_first_here
from hf_clm.notebook import showing
from hf_clm.recipe.other_names import advise
from hf_clm.recipe.recipe import SHORT, Recipe, build_recipe, find_key, keep_format, suggest
from hf_clm.recipe.sections import Data, Source, cache_folder
from hf_clm.recipe.shipped import find_recipe
from hf_clm.recipe.text import model_of, override

if TYPE_CHECKING:  # they import torch, which a mistake in the data need not wait for
    import datasets
    from transformers import EvalPrediction, TrainerCallback

    from hf_clm.training.python import BuildOptimizer, Run
    from hf_clm.training.trainer import CLMTrainer

Record = Mapping[str, object]
ORIGIN = "hf_clm.train"  # the place of what is given as a keyword


@needing_packages()
def train(
    recipe: "str | Path | Mapping[str, object] | Recipe | None" = None,
    *,
    model: str | None = None,
    train_dataset: "str | Path | Iterable[str | Path | Record] | datasets.Dataset | None" = None,
    eval_dataset: "str | Path | Iterable[object] | datasets.Dataset | Mapping[str, object] | None" = None,
    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = (),
    compute_metrics: "Callable[[EvalPrediction], dict[str, float]] | None" = None,
    trainer_class: "type[CLMTrainer] | None" = None,
    optimizers: "BuildOptimizer | None" = None,
    **keys: object,
) -> "Run":
    """Trains a model and returns the run, whose model can be asked at once.

        run = hf_clm.train(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=records, learning_rate=1e-5)
        run = hf_clm.train("recipes/sft/poems.yaml", max_steps=100, lora={"r": 8})
        run.answer("Complete the poem about the lighthouse in winter.")

    Args:
        recipe: a file, the name of a shipped recipe, nested keys, or a ``Recipe``. Without one, values that
            suit the model and the data are chosen and printed.
        model: a model on the Hub, a folder or a GGUF file; short for ``model.name_or_path``.
        train_dataset: a path or several, dictionaries, or a ``datasets.Dataset``.
        eval_dataset: the same, or a mapping from the names of several evaluation sets to theirs.
        callbacks: see every event of the Trainer.
        compute_metrics: as of ``transformers.Trainer``: from an ``EvalPrediction`` with logits to figures.
        trainer_class: a subclass of ``CLMTrainer``.
        optimizers: a function from the loaded model to (optimizer, learning-rate schedule or None).
        keys: any key of a recipe. A section is a mapping or one of the recipe's classes, and is merged with
            the recipe's own (``data={"max_length": 512}``); a field of ``TrainingArguments`` is given bare
            (``learning_rate=1e-5``). ``format`` is that of both datasets: a name, or a function from
            a record to a ``Chat`` or a ``Document``.

    Raises UserError before the first step for what a caller can fix; Preempted, a SystemExit, when a signal
    stopped the run after it saved a checkpoint.
    """
    _check_objects(callbacks, optimizers)
    with showing() as progress:
        built = to_recipe(
            recipe, model=model, train_dataset=train_dataset, eval_dataset=eval_dataset, keys=keys
        )
        if is_first_here() and (lines := to_lines(built)):
            lines = to_json_lines("\n".join(lines), {}) if writes_json() else lines
            progress.write("\n".join([*lines, ""]))
        check_data(built)
        from hf_clm.training.python import Additions
        from hf_clm.training.run import run

        observers = [*callbacks, *progress.callbacks()]
        additions = Additions(observers, compute_metrics, trainer_class, optimizers)
        return run(built, additions=additions)


def to_recipe(
    recipe: "str | Path | Mapping[str, object] | Recipe | None",
    *,
    model: str | None = None,
    train_dataset: object = None,
    eval_dataset: object = None,
    keys: Mapping[str, object] | None = None,
) -> Recipe:
    """Returns the recipe for the arguments of ``train``, and writes records in memory to a file.

    Raises RecipeError for keys and values that a recipe does not accept, DataError for records that cannot be
    written.
    """
    tree, places, file = _open(recipe)
    keywords = dict(keys or {})
    format = keywords.pop("format", None)
    given = dict(_to_keys(keywords))
    if model is not None:
        given["model.name_or_path"] = str(model)
    folder = _records_folder({**_section(tree, "data"), **given})
    for key, value in (("train", train_dataset), ("eval", eval_dataset)):
        if value is not None:
            found = _to_sources(value, name=f"{key}_dataset", format=format, folder=folder)
            given[f"data.{key}"] = keep_format(found, _section(tree, "data").get(key))
    if format is not None and train_dataset is None and eval_dataset is None:
        fix = "name it in data: {'train': [{'path': ..., 'format': ...}]}"
        raise RecipeError("has no effect without train_dataset or eval_dataset", where="format", fix=fix)
    if recipe is None:
        return draft_recipe(list(given.items()), origin=ORIGIN)
    for key, value in given.items():
        override(tree, places, key=key, value=value, place=ORIGIN)
    return build_recipe(tree, places, file=file)


def _check_objects(callbacks: object, optimizers: object) -> None:
    """Raises RecipeError for the usual mistakes, before anything is loaded."""
    if not isinstance(callbacks, list | tuple):
        got, fix = type(callbacks).__name__, "callbacks=[callback, ...]"
        raise RecipeError("expected a list", where="callbacks", got=got, fix=fix)
    if optimizers is not None and not callable(optimizers):
        what = "expected a function from the model to (optimizer, schedule or None)"
        fix = "optimizers=lambda model: (torch.optim.AdamW(model.parameters()), None)"
        raise RecipeError(what, where="optimizers", got=type(optimizers).__name__, fix=fix)


def _open(recipe: object) -> tuple[dict[str, object], dict[str, str], str]:
    """(nested keys, the place of each, the file that they come from)."""
    if recipe is None:
        return {}, {}, ""
    if isinstance(recipe, Recipe):
        return recipe.model_dump(exclude_unset=True), dict(recipe.places), recipe.file
    if isinstance(recipe, Mapping):
        return {str(key): _to_plain(value) for key, value in recipe.items()}, {}, ""
    if not isinstance(recipe, str | Path):
        fix = "a path, the name of a shipped recipe, a dictionary, or hf_clm.load_recipe(...)"
        raise RecipeError("not a recipe", where=ORIGIN, got=type(recipe).__name__, fix=fix)
    from hf_clm.recipe.yaml_text import load_yaml

    file = find_recipe(str(recipe))
    return *load_yaml(file), file


def _section(tree: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


def _records_folder(data: Mapping[str, object]) -> Path:
    """Where records in memory are written: the cache, or the temporary folder if it cannot be used."""
    default = data.get("cache_dir", Data.model_fields["cache_dir"].default)
    named = data.get("data.cache_dir", default)
    folder = cache_folder(named) / "records" if isinstance(named, str) else None
    with suppress(OSError):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="hf_clm-"))


def _to_keys(keywords: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) for each keyword; a section is merged with the recipe's, key by key."""
    for name, keyword in keywords.items():
        key = find_key(name)
        if key is None:
            if advice := advise(name):
                raise RecipeError(f"{name} is a name of {advice[0]}", where=ORIGIN, fix=advice[1])
            raise RecipeError(f"no such keyword {name!r}{suggest(name)}", where=ORIGIN)
        value = _to_plain(keyword)
        if isinstance(value, dict) and value and _is_section(key):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield SHORT[key] if key in SHORT and not isinstance(value, dict) else key, value


def _is_section(key: str) -> bool:
    info = Recipe.model_fields.get(key)
    return key == "train" or (info is not None and model_of(info.annotation) is not None)


def _to_plain(value: object) -> object:
    """The value as YAML would give it: sections as mappings, paths as text, functions by their names."""
    if isinstance(value, BaseModel):
        return _to_plain(value.model_dump(exclude_unset=True))
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return _name_of(value) if callable(value) else value


def _name_of(function: Callable[..., object]) -> str:
    """Names a function as recipes do: ``module:function``. Raises RecipeError where nothing can find it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module and name.isidentifier() and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    what, fix = (
        "cannot find a function by its name",
        "define it with def at the top level of a module or notebook",
    )
    raise RecipeError(what, where=ORIGIN, got=repr(function), fix=fix)


def _to_sources(value: object, *, name: str, format: object, folder: Path) -> object:
    """What ``data.train`` or ``data.eval`` is set to: paths as they are, records in memory as a file."""
    if isinstance(value, Mapping) and "path" not in value:
        if name == "train_dataset" and not any(_is_rows(item) for item in value.values()):
            what, fix = "expected records, got one dictionary", "pass a list of dictionaries: [record, ...]"
            raise DataError(what, where=name, fix=fix)
        if name == "train_dataset":
            fix = f"pass one of them: train_dataset=datasets[{next(iter(value), 'train')!r}]"
            raise DataError("several datasets", where=name, got=type(value).__name__, fix=fix)
        return {
            str(key): _to_sources(item, name=f"{name}-{key}", format=format, folder=folder)
            for key, item in value.items()
        }
    items = value if isinstance(value, list | tuple) else [value]
    if items and all(isinstance(item, str | Path) or _is_source(item) for item in items):
        sources = [_to_plain(item) for item in items]
        if format is None:
            return sources
        paths = [source if isinstance(source, dict) else {"path": source} for source in sources]
        return [{"format": _to_plain(format), **path} for path in paths]
    path = _write_dataset(value, name, folder) or _write_records(value, name, folder)
    return {"path": path, **({} if format is None else {"format": _to_plain(format)})}


def _is_rows(item: object) -> bool:
    """Whether a value of a dictionary is a dataset itself."""
    return hasattr(item, "column_names") or (
        isinstance(item, list) and bool(item) and isinstance(item[0], dict)
    )


def _is_source(item: object) -> bool:
    return isinstance(item, Source) or (
        isinstance(item, Mapping) and "path" in item and item.keys() <= Source.model_fields.keys()
    )


def _write_dataset(value: object, name: str, folder: Path) -> str | None:
    """Writes a ``datasets.Dataset`` as Parquet, which keeps its types; None for anything else."""
    if "datasets" not in sys.modules:  # whoever has a dataset has imported it
        return None
    from datasets import Dataset, IterableDataset

    if isinstance(value, IterableDataset):
        fix = "pass dataset.take(N) as a list, or a path with data={'streaming': True}"
        raise DataError("a stream may have no end", where=name, got=type(value).__name__, fix=fix)
    if not isinstance(value, Dataset):
        return None
    file = folder / f".{name}-{uuid4().hex}"
    value.to_parquet(file)
    return _named_by_content(file, name, ".parquet")


def _write_records(value: object, name: str, folder: Path) -> str:
    if not isinstance(value, Iterable):
        fix = "a path, dictionaries, or a datasets.Dataset"
        raise DataError("no records", where=name, got=type(value).__name__, fix=fix)
    file, count = folder / f".{name}-{uuid4().hex}", 0
    try:
        with file.open("w", encoding="ascii") as stream:
            for count, record in enumerate(value, start=1):
                stream.write(_to_line(record, f"{name}[{count - 1}]"))
        if not count:
            raise DataError("no records", where=name, got="nothing")
        return _named_by_content(file, name, ".jsonl")
    finally:
        file.unlink(missing_ok=True)


def _to_line(record: object, where: str) -> str:
    if not isinstance(record, Mapping):
        fix = "one dictionary a record; of a pandas.DataFrame pass frame.to_dict('records')"
        raise DataError("expected a dictionary", where=where, got=type(record).__name__, fix=fix)
    try:
        return json.dumps(dict(record), allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        what = f"cannot be written as JSON: {error}"
        raise DataError(what, where=where, fix="use plain Python values") from error


def _named_by_content(file: Path, name: str, ending: str) -> str:
    """Moves a file to a name that says what it holds: the same records are one file, in every process."""
    path = file.with_name(f"{name}-{hash_file(file)[:12]}{ending}")
    os.replace(file, path)
    return str(path)
