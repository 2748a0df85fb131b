"""Prepares the data of a run once: reads, tokenizes, packs, verifies, and caches it for other runs.

content of data, tokenizer and options -> key -> folder    exists: opened     else: prepared and written
"""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.prepared.cache import Place, data_content, find_place, open_place, today
from hf_clm.data.prepared.cluster import RayBlocks
from hf_clm.data.prepared.prepare import MakeBlocks, in_turn, write_prepared
from hf_clm.data.prepared.sets import STREAM_HEAD, to_head
from hf_clm.data.prepared.store import StoredSet, require_writable
from hf_clm.data.proof.ledger import LedgerSplit, Totals, write_ledger
from hf_clm.data.proof.proof import ProofReport, prove_mix
from hf_clm.data.split import Split, note_lines, settle_splits
from hf_clm.errors import EnvironmentFault, RecipeError
from hf_clm.model.build import build_model_config
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.tokenizer import fix_date
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments
from hf_clm.training.faults import require_alive
from hf_clm.training.output import PREPARED

POLL_SECONDS = 0.2
KEY_LETTERS = 12  # of a cache key in messages
STREAMED = (
    f"stream    read during training; checked in advance: the first {STREAM_HEAD:,} documents of each source"
)


@dataclass
class Prepared:
    """The data of a run with their proof; ``stored``: the folder that contains them."""

    splits: dict[str, Split]
    proof: ProofReport
    stored: StoredSet

    def write_ledger(self, path: Path) -> None:
        """Writes ledger.parquet; with mixed sources, it includes how often each record is drawn."""
        entries = {}
        for name, split in self.splits.items():
            packed = None if isinstance(split.dataset, TokenizedDataset) else split.dataset
            times = split.mix.times if split.mix else None
            entries[name] = LedgerSplit(split.ledger, packed, times, split.left_out)
        write_ledger(path, entries)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    date: str = "",
    make_blocks: MakeBlocks = in_turn,
) -> Prepared:
    """Opens the prepared set of the same content, or prepares, verifies and caches it.

    The first process of each machine prepares the data while the others poll for its folder. There is no
    barrier, so a long preparation cannot exceed the timeout of the process group.

    A chat template that prints today's date keeps printing the date of the prepared set.

    Args:
        date: that date, if an earlier start of the run has stored it.

    Raises DataError for data that cannot be read or fail verification, EnvironmentFault for folders that are
    not writable, or if another process has ended.
    """
    started = time.monotonic()
    aside = Path(str(arguments.output_dir)) / PREPARED
    launch, date = broadcast_object_list([uuid4().hex, date or today(tokenizer)])  # the same on all processes
    pids = gather_object([os.getpid()])
    preparer = pids[arguments.process_index - arguments.local_process_index]  # the first of this machine
    place = find_place(recipe, tokenizer, seed=arguments.seed, aside=aside, launch=launch)
    stored = open_place(place, recipe)
    notes = [f"note      {note}" for note in place.notes]
    if stored is None:
        place, moved = _writable(place, aside)
        notes += moved
        stored = open_place(place, recipe)
    is_from_cache = stored is not None
    if stored is None and arguments.local_process_index == 0:
        for old in aside.glob("[0-9a-f]*"):  # of an earlier start with another key
            shutil.rmtree(old, ignore_errors=True)
        head = to_head(recipe)
        try:
            write_prepared(
                place.folder, head, tokenizer, seed=arguments.seed, date=date, make_blocks=make_blocks
            )
        except BaseException:  # a run that is refused leaves no folder
            for folder in (aside, aside.parent):
                with suppress(OSError):
                    folder.rmdir()
            raise
    while stored is None:
        stored = open_place(place, recipe)
        if stored is None:
            require_alive(preparer)
            time.sleep(POLL_SECONDS)
    if stored.date:
        fix_date(tokenizer, stored.date)
    seconds = time.monotonic() - started
    line = _describe_origin(place, recipe, seconds=None if is_from_cache else seconds)
    proof = ProofReport(stored.proof["facts"], [line, *notes, *stored.proof["lines"]])
    content = data_content(recipe.data)
    origin = {"key": place.key, "content": content, "from_cache": is_from_cache, "seconds": seconds}
    proof.facts["prepared"] = origin
    if stored.date:
        proof.facts["prepared"]["date"] = stored.date
        proof.lines.append(f"{'date':<10}{stored.date} in the chat template, for every run of this set")
    splits = settle_splits(stored.splits, recipe, seed=arguments.seed)
    _enter_left_out(proof, splits["train"])
    proof.lines += prove_mix(splits["train"]) if arguments.process_index == 0 else []
    return Prepared(splits, proof, stored)


def prepare_recipe(recipe: Recipe, *, ray: str | None = None) -> list[str]:
    """Runs ``hf-clm prepare``: prepares and caches the data of a recipe, and returns lines to print.

    Args:
        ray: the address of the Ray cluster that prepares the blocks; None: this process prepares them.

    Raises RecipeError if the data would not be cached.
    """
    started = time.monotonic()
    if recipe.data.streaming:
        fix = "start hf-clm train directly, or set data.streaming to false"
        raise RecipeError("streamed data are not prepared in advance", where="data.streaming", fix=fix)
    arguments = training_arguments(recipe)
    tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    build_model_config(recipe, tokenizer)  # raises for rows that are longer than the model's positions
    place = find_place(recipe, tokenizer, seed=arguments.seed, aside=Path(tempfile.gettempdir()))
    if place.why_not:
        what = f"the prepared data would not be cached ({place.why_not})"
        fix = "set data.cache_dir to a folder; for data on the Hub, set revision to a commit"
        raise RecipeError(what, where=recipe.file or "data.cache_dir", fix=fix)
    cluster = RayBlocks(ray) if ray else None
    prepared = prepare(recipe, tokenizer, arguments=arguments, make_blocks=cluster or in_turn)
    lines = [line for name, split in prepared.splits.items() for line in _describe(name, split)]
    size = f"{prepared.stored.size_bytes / 1e6:,.1f} MB in {prepared.stored.folder}"
    return [
        *prepared.proof.lines,
        *note_lines(prepared.splits),
        *lines,
        f"{'stored':<10}{size}",
        *(cluster.to_lines() if cluster else []),
        f"{'time':<10}{time.monotonic() - started:.1f} s",
    ]


def _writable(place: Place, aside: Path) -> tuple[Place, list[str]]:
    """Returns the place or, if the cache is not writable, one in the output folder, and a line about it."""
    try:
        require_writable(place.folder.parent)
    except EnvironmentFault as error:
        if place.folder.parent == aside:
            raise
        require_writable(aside)
        note = f"note      {error.where}: {error.got}; the prepared data are stored in {aside} instead"
        return replace(place, folder=aside / place.key), [note]
    return place, []


def _enter_left_out(proof: ProofReport, split: Split) -> None:
    """Corrects the totals of the ledger for records that are left out, and adds a line with their places."""
    if split.left_out:
        proof.facts["train"]["ledger"] = Totals(split.ledger, split.left_out).to_json()
        places = ", ".join(split.ledger.places[number] for number in split.left_out)
        proof.lines.append(f"left out  {places} (data.without)")


def _describe_origin(place: Place, recipe: Recipe, *, seconds: float | None) -> str:
    """Describes where the data come from. ``seconds``: None if they were read from the cache."""
    if recipe.data.streaming:
        return STREAMED
    if seconds is None:
        return f"prepared  read from cache (key {place.key[:KEY_LETTERS]})"
    cached = f"not cached ({place.why_not})" if place.why_not else f"cached in {place.folder}"
    return f"prepared  in {seconds:.1f} s, {cached}"


def _describe(name: str, split: Split) -> list[str]:
    rows = f"{len(split.dataset):,} rows, {split.tokens:,} tokens, {split.target_tokens:,} targets"
    filled = f", {split.dataset.fill:.1%} full" if isinstance(split.dataset, PackedDataset) else ""
    mixed = split.mix.to_lines() if split.mix else []
    return [f"{name:<10}{rows}{filled}", *(f"{'':<10}{line}" for line in mixed)]
