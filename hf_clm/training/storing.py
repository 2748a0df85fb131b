"""How a kept set is made: parts in bounded memory, one here or one on each of several machines, then joined.

<cache_dir>/<shards key>.shards/2-of-8/     part.json and the arrays of a shard; gone once they are joined
<cache_dir>/<key>/                          the set
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.config import Recipe
from hf_clm.data.build import check_dropped, label_options, tokenize_examples
from hf_clm.data.cache import Place, load_named
from hf_clm.data.division import ALONE, Shard, open_readings
from hf_clm.data.joining import Selection, compare_digests, count_proof, select, write_split
from hf_clm.data.label.datasets import TokenizedRows
from hf_clm.data.label.render import Renderer
from hf_clm.data.proof.certificate import PROVED_WHOLE, Certificate, certify_rows
from hf_clm.data.proof.checker import Checker
from hf_clm.data.read.records import Examples
from hf_clm.data.shards import PART, PartSet, Work, open_part, reach, write_part
from hf_clm.data.store import HEAD, LEDGER, keep_folder, open_splits, read_index
from hf_clm.errors import DataError, UserError
from hf_clm.hashing import hash_file
from hf_clm.schema import AnyExample
from hf_clm.text.chat import stop_token_ids
from hf_clm.training.proof import prove_stored

PART_NAME = re.compile(r"[1-9]\d*-of-([1-9]\d*)")


def store_whole(place: Place, recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Prepares, proves and keeps the data of a recipe.

    Raises DataError for data that cannot be read or are not proved, EnvironmentFault for a cache that cannot
    be written.
    """

    def fill(folder: Path) -> dict[str, Any]:
        part = folder / "part"
        part.mkdir()
        sets = write_shard(part, place, recipe=recipe, tokenizer=tokenizer)
        opened = [open_part(part, sets)]
        content = join_parts(folder, opened, place=place, recipe=recipe, tokenizer=tokenizer, seed=seed)
        shutil.rmtree(part)
        return content

    keep_folder(place.folder, fill)


def store_shard(
    place: Place, recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast, shard: Shard
) -> tuple[Path, bool]:
    """The folder of a shard's part, and whether it was made now; one that is whole is not made again.

    Raises what ``store_whole`` does of what the shard can know by itself.
    """
    folder = shards_folder(place) / f"{shard.number}-of-{shard.count}"
    if read_index(folder, index=PART) is not None:
        return folder, False

    def fill(partial: Path) -> dict[str, Any]:
        sets = write_shard(partial, place, recipe=recipe, tokenizer=tokenizer, shard=shard)
        hashes = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
        return {"key": place.shards_key, "shard": str(shard), "sets": sets, "sha256": hashes}

    keep_folder(folder, fill, index=PART)
    return folder, True


def merge_shards(
    place: Place, recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast, seed: int, command: str
) -> int:
    """Joins the parts of all shards to the set, and removes them; returns how many there were.

    Another process that does the same may be faster: then its set is taken.

    Args:
        command: what a shard is made with, without ``--shard``: for errors.

    Raises DataError for a part that is missing, damaged or of another set.
    """
    folder = shards_folder(place)
    found = find_parts(folder, command=command)
    parts = [open_part(path, check_part(path, place, command=command)["sets"]) for path in found]

    def fill(partial: Path) -> dict[str, Any]:
        reach("merge.start")
        return join_parts(partial, parts, place=place, recipe=recipe, tokenizer=tokenizer, seed=seed)

    try:
        keep_folder(place.folder, fill)
    except UserError:  # of parts that the faster one has removed
        if read_index(place.folder) is None:
            raise
    reach("merge.kept")
    shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def shards_folder(place: Place) -> Path:
    """Where the parts of a set wait to be joined."""
    return place.folder.with_name(f"{place.shards_key}.shards")


def find_parts(folder: Path, *, command: str) -> list[Path]:
    """The parts in a folder in order. Raises DataError unless each of 1 to n is there, of one n."""
    found = [PART_NAME.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())]
    names = [match[0] for match in found if match]
    counts = sorted({int(match[1]) for match in found if match})
    if not counts:
        fix = f"`{command} --shard i/n` on each of n machines, with the same data.cache_dir"
        raise DataError("no shard of this recipe's data is there", where=str(folder), fix=fix)
    if len(counts) > 1:
        got = " and ".join(f"{sum(name.endswith(f'-of-{n}') for name in names)} of {n}" for n in counts)
        raise DataError(
            "shards of more than one division", where=str(folder), got=got, fix="remove the others"
        )
    wanted = [folder / f"{number}-of-{counts[0]}" for number in range(1, counts[0] + 1)]
    missing = [path.name.replace("-of-", "/") for path in wanted if not path.is_dir()]
    if missing:
        what = f"shard {', '.join(missing)} is missing"
        raise DataError(
            what, where=str(folder), fix=f"`{command} --shard {missing[0]}`, or copy its folder here"
        )
    return wanted


def check_part(folder: Path, place: Place, *, command: str) -> dict[str, Any]:
    """What ``part.json`` says. Raises DataError for a part that is damaged, or of another set."""
    shard = folder.name.replace("-of-", "/")
    fix = f"remove its folder, then `{command} --shard {shard}`"
    content = read_index(folder, index=PART)
    if content is None or any(hash_file(folder / name) != sha for name, sha in content["sha256"].items()):
        raise DataError(f"shard {shard} is damaged", where=str(folder), fix=fix)
    if (content["key"], content["shard"]) != (place.shards_key, shard):
        got = f"shard {content['shard']} of key {content['key']}"
        raise DataError(f"not shard {shard} of this recipe's data", where=str(folder), got=got, fix=fix)
    return content


def build_work(recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast) -> Work:
    """What is made of each block of a recipe's data."""
    checker = Checker(tokenizer, label_options(recipe), stop_token_ids(tokenizer))
    renderer = Renderer(tokenizer, label_options(recipe))
    rows_before = 0

    def tokenize(block: Examples) -> TokenizedRows:
        return tokenize_examples(block, recipe, tokenizer=tokenizer).rows

    def certify(rows: TokenizedRows, block: Examples) -> tuple[Certificate, list[int]]:
        nonlocal rows_before
        proves_all = rows_before < PROVED_WHOLE
        rows_before += len(rows)
        known: dict[str, Any] = {"places": block.places, "origins": block.origins.tolist()}
        return certify_rows(rows, block.examples, checker=checker, proves_all=proves_all, **known)

    def spelled(example: AnyExample) -> list[str]:
        return renderer.control_texts(example)

    compares = bool(recipe.data.eval or recipe.data.eval_fraction)
    digests = ("exact", "loose") if compares else ("exact",) if recipe.data.duplicates == "drop" else ()
    return Work(tokenize, certify, spelled, digests)


def write_shard(
    folder: Path,
    place: Place,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    shard: Shard = ALONE,
) -> dict[str, Any]:
    """Writes the part of a shard into an empty folder; returns what is known of its sets."""
    work = build_work(recipe, tokenizer=tokenizer)
    return write_part(folder, open_readings(recipe, shard), work=work)


def join_parts(
    folder: Path,
    parts: Sequence[Mapping[str, PartSet]],
    *,
    place: Place,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> dict[str, Any]:
    """Writes the sets that the parts make, and proves them; returns the content of ``prepared.json``."""
    selections = select(parts, recipe, seed=seed)
    heads = read_heads(recipe, selections)
    index: dict[str, Any] = {"files": list(place.files), "proof": None, "splits": {}}
    for name, selection in selections.items():
        written = write_split(folder, name, selection=selection, recipe=recipe, head=heads[name])
        index["splits"][name] = written
    load = partial(load_named, recipe, seed)
    splits = open_splits(folder, index, recipe=recipe, files=place.files, load_examples=load)
    for split in splits.values():
        check_dropped(split.examples, split.rows.rows.fates, data=recipe.data)
    leakage = None
    if "eval" in selections:
        places = splits["eval"].examples.places
        leakage = compare_digests(selections["train"], selections["eval"], places=places)
    certified = {name: count_proof(selection) for name, selection in selections.items()}
    known: dict[str, Any] = {"certified": certified, "leakage": leakage, "ledger": folder / LEDGER}
    proof = prove_stored(recipe, splits, tokenizer=tokenizer, **known)
    return {**index, "proof": {"facts": proof.facts, "lines": proof.lines}}


def read_heads(recipe: Recipe, selections: Mapping[str, Selection]) -> dict[str, list[AnyExample]]:
    """The first examples of each split, read again."""
    found: dict[str, list[AnyExample]] = {}
    for name, selection in selections.items():
        readings = open_readings(recipe)
        records = readings[name if name in readings else "train"].records
        wanted = set(selection.first_numbers(HEAD))
        first = enumerate(islice(records, max(wanted, default=-1) + 1))
        found[name] = [example for number, (_, example, _) in first if number in wanted]
    return found
