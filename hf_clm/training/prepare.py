"""Prepares the data of a run once: read, tokenized, packed, proved, kept for every run on the same content.

content of data, tokenizer and options -> key -> folder    there: opened     not there: prepared and written
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_clm.config import Recipe
from hf_clm.data.batch.draws import add_draws
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.build import Split, mix_splits
from hf_clm.data.cache import Place, build_splits, find_place, load_early, load_named, open_place
from hf_clm.data.division import Shard
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.proof.ledger import write_ledgers
from hf_clm.data.read.records import Examples
from hf_clm.data.store import Stored, require_writable
from hf_clm.data.streaming import HEAD
from hf_clm.errors import RecipeError
from hf_clm.parts import build_model_config, build_tokenizer_aside, settle_render, training_arguments
from hf_clm.training.faults import require_others
from hf_clm.training.proof import Proof, prove_data, prove_mix
from hf_clm.training.storing import merge_shards, shards_folder, store_shard, store_whole

POLL_SECONDS = 0.2
SHOWN_LETTERS = 12  # of a key
STREAMED = f"stream    read while it trains; checked before: the first {HEAD:,} documents of each source"


@dataclass
class Prepared:
    """The data of a run and what was proved of them; ``stored``: the folder they are in, if they are kept."""

    splits: dict[str, Split]
    proof: Proof
    stored: Stored | None = None

    def write_ledger(self, path: Path) -> None:
        """Writes ledger.parquet; where sources are mixed, it says how often each row is drawn."""
        if self.stored:
            self.stored.write_ledger(path)
        else:
            write_ledgers(self.proof.ledgers, path)
        train = self.splits["train"]
        if train.mix and not isinstance(train.dataset, TokenizedDataset):
            add_draws(path, train.dataset, rows=train.rows.rows, times=train.mix.times)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    loaded: Mapping[str, Examples] | None = None,
) -> Prepared:
    """Opens what was prepared of the same content before, or prepares, proves and keeps it.

    The first process of a machine prepares and the others look for its folder: without a barrier, so that a
    long preparation runs into no time limit of the process group, and until another process has ended. Where
    nothing is kept, each prepares.

    Args:
        loaded: the examples, if they were read already; for where nothing is kept.

    Raises DataError for data that cannot be read or are not proved, EnvironmentFault for a cache that cannot
    be written, or another process that has ended.
    """
    started = time.monotonic()
    place = find_place(recipe, tokenizer, seed=arguments.seed)
    if place is None:
        return _prepare_unkept(recipe, tokenizer, arguments=arguments, loaded=loaded)
    stored = open_place(place, recipe, seed=arguments.seed)
    is_from_cache = stored is not None
    if stored is None and arguments.local_process_index == 0:
        require_writable(place.folder.parent)
        store_whole(place, recipe, tokenizer=tokenizer, seed=arguments.seed)
    while stored is None:
        stored = open_place(place, recipe, seed=arguments.seed)
        if stored is None:
            require_others()
            time.sleep(POLL_SECONDS)
    seconds, key = time.monotonic() - started, place.key[:SHOWN_LETTERS]
    said = f"read from cache (key {key})" if is_from_cache else f"in {seconds:.1f} s, kept in {place.folder}"
    proof = Proof(stored.proof["facts"], [f"prepared  {said}", *stored.proof["lines"]])
    proof.facts["prepared"] = {"key": place.key, "from_cache": is_from_cache, "seconds": seconds}
    splits = mix_splits(stored.splits, recipe, seed=arguments.seed)
    proof.lines += prove_mix(splits["train"]) if arguments.process_index == 0 else []
    return Prepared(splits, proof, stored)


def prepare_recipe(recipe: Recipe) -> list[str]:
    """``hf-clm prepare``: what was prepared or found, as lines to print.

    Raises RecipeError where nothing would be kept.
    """
    started = time.monotonic()
    task = _find_task(recipe)
    prepared = prepare(task.recipe, task.tokenizer, arguments=task.arguments, loaded=task.loaded)
    assert prepared.stored is not None
    lines = [line for name, split in prepared.splits.items() for line in _describe(name, split)]
    size = f"{prepared.stored.size_bytes / 1e6:,.1f} MB in {prepared.stored.folder}"
    return [
        *prepared.proof.lines,
        *lines,
        f"{'stored':<10}{size}",
        f"{'time':<10}{time.monotonic() - started:.1f} s",
    ]


def prepare_shard(recipe: Recipe, shard: Shard) -> list[str]:
    """``hf-clm prepare --shard i/n``: what was written, as lines to print.

    Raises what ``prepare_recipe`` does, of what one shard can know.
    """
    started = time.monotonic()
    task = _find_task(recipe)
    if open_place(task.place, task.recipe, seed=task.arguments.seed):
        return [
            f"shard     {shard} is not needed: the whole is prepared (key {task.place.key[:SHOWN_LETTERS]})"
        ]
    require_writable(shards_folder(task.place))
    folder, is_new = store_shard(task.place, task.recipe, tokenizer=task.tokenizer, shard=shard)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return [
        f"shard     {shard} {f'{size:,.1f} MB in' if is_new else 'is there already:'} {folder}",
        f"{'time':<10}{time.monotonic() - started:.1f} s",
    ]


def merge_recipe(recipe: Recipe, *, command: str) -> list[str]:
    """``hf-clm prepare --merge``: joins what the shards wrote, as ``prepare_recipe`` would have written it.

    ``command``: what a shard is made with, for errors. Raises DataError for a missing or damaged shard.
    """
    task = _find_task(recipe)
    lines = []
    if open_place(task.place, task.recipe, seed=task.arguments.seed):
        shutil.rmtree(shards_folder(task.place), ignore_errors=True)  # left by one that was killed
    else:
        known: dict[str, Any] = {"tokenizer": task.tokenizer, "seed": task.arguments.seed}
        count = merge_shards(task.place, task.recipe, command=command, **known)
        lines = [f"merged    {count} shards"]
    return [*lines, *prepare_recipe(recipe)]


@dataclass(frozen=True)
class _Task:
    """What is prepared, and where it is kept."""

    recipe: Recipe
    arguments: TrainingArguments
    loaded: Mapping[str, Examples]
    tokenizer: PreTrainedTokenizerFast
    place: Place


def _find_task(recipe: Recipe) -> _Task:
    """Raises RecipeError where nothing would be kept."""
    if recipe.data.streaming:
        fix = "hf-clm train reads it, and prepares data.eval alone; or set data.streaming to false"
        raise RecipeError("nothing is prepared of a stream", where="data.streaming", fix=fix)
    arguments = training_arguments(recipe)
    loaded = load_early(recipe, arguments.seed)
    tokenizer = build_tokenizer_aside(recipe, loaded, arguments=arguments)
    recipe = settle_render(recipe, tokenizer)
    build_model_config(recipe, tokenizer)  # refuses rows that are longer than the model's positions
    place = find_place(recipe, tokenizer, seed=arguments.seed)
    if place is None:
        fix = "name a folder in data.cache_dir; pin data on the Hub by a commit as their revision"
        raise RecipeError("nothing would be kept", where=recipe.file or "data.cache_dir", fix=fix)
    return _Task(recipe, arguments, loaded, tokenizer, place)


def _prepare_unkept(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    loaded: Mapping[str, Examples] | None,
) -> Prepared:
    started, proof = time.monotonic(), Proof()
    splits = build_splits(recipe, tokenizer, loaded=loaded or load_named(recipe, arguments.seed))
    with arguments.main_process_first(local=False, desc="proving the data"):
        if arguments.process_index == 0:
            proof = prove_data(recipe, splits, tokenizer=tokenizer)
    is_off = recipe.data.cache_dir is None
    why = "data.cache_dir is null" if is_off else "data on the Hub without a commit as their revision"
    said = f"prepared  in {time.monotonic() - started:.1f} s, not kept ({why})"
    proof.lines.insert(0, STREAMED if recipe.data.streaming else said)
    splits = mix_splits(splits, recipe, seed=arguments.seed)
    proof.lines += prove_mix(splits["train"]) if arguments.process_index == 0 else []
    return Prepared(splits, proof)


def _describe(name: str, split: Split) -> list[str]:
    rows = f"{len(split.dataset):,} rows, {split.tokens:,} tokens, {split.target_tokens:,} targets"
    filled = f", {split.dataset.fill:.1%} full" if isinstance(split.dataset, PackedDataset) else ""
    mixed = split.mix.to_lines() if split.mix else []
    return [f"{name:<10}{rows}{filled}", *(f"{'':<10}{line}" for line in mixed)]
