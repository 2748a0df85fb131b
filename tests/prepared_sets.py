"""Prepared sets of small recipes, and their content without times."""

import json
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import datasets
from helpers import byte_tokenizer

from hf_clm.data.prepared.block import Block, BlockMaker
from hf_clm.data.prepared.chunks import RawBlock
from hf_clm.data.prepared.prepare import MakeBlocks, in_turn, write_prepared
from hf_clm.data.prepared.sets import read_examples
from hf_clm.data.prepared.store import StoredSet, open_store, read_index
from hf_clm.recipe.recipe import Recipe

SECONDS = re.compile(r"\(\d+\.\d s, ")


def recipe_of(files: Any, *, stage: str = "sft", **data: Any) -> Recipe:
    """Returns a recipe for files, without a model, without limits on dropped and leaked rows."""
    limits = {"max_length": 64, "max_dropped": 1.0, "max_leakage": 1.0, "cache_dir": "cache"}
    train = {"output_dir": "run", "max_steps": 1}
    sections = {"stage": stage, "model": {"name_or_path": "m"}, "train": train}
    return Recipe.model_validate({**sections, "data": {"train": files, **limits, **data}})


def write_set(
    recipe: Recipe,
    folder: Path = Path("cache/key"),
    *,
    tokenizer: Any = None,
    seed: int = 0,
    make_blocks: MakeBlocks = in_turn,
) -> StoredSet:
    """Prepares the data of the recipe, and opens the set."""
    write_prepared(folder, recipe, tokenizer or byte_tokenizer(), seed=seed, make_blocks=make_blocks)
    found = open_set(recipe, folder)
    assert found is not None
    return found


def open_set(
    recipe: Recipe, folder: Path = Path("cache/key"), *, files: list[str] | None = None
) -> StoredSet | None:
    """Opens the set in a folder if it is intact; ``files``: their current names, if these changed."""
    index = read_index(folder) or {"files": []}
    load = {"load_examples": lambda name: list(read_examples(recipe.data, name))}
    return open_store(folder, recipe, files=files or index["files"], **load)


def content_of(folder: Path) -> dict[str, Any]:
    """Returns every file of a prepared set, with prepared.json without its times."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    index = json.loads(found.pop("prepared.json"))
    del index["digest"]  # of the times, too
    for facts in [*index["splits"].values(), *index["proof"]["facts"].values()]:
        for section in ("certified", "certificate"):
            facts.get(section, {}).pop("seconds", None)
    index["proof"]["lines"] = [SECONDS.sub("(", line) for line in index["proof"]["lines"]]
    return {**found, "prepared.json": index}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names of the files that differ."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def backwards(maker: BlockMaker, blocks: Iterable[RawBlock]) -> Generator[Block, None, None]:
    """Prepares the last block first."""
    raw = list(blocks)
    yield from reversed([maker.make(block) for block in reversed(raw)])


def table_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """Returns the rows of a table, read with datasets."""
    found = datasets.load_from_disk(str(folder))
    assert isinstance(found, datasets.DatasetDict)
    return found[split].to_list()
