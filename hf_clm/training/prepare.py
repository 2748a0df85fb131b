"""Prepares the data of a run once: read, tokenized, packed, proved, kept for every run on the same content.

content of data, tokenizer and options -> key -> folder    there: opened     not there: prepared and written
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
from hf_clm.data.prepared.cache import Place, find_place, open_place, today
from hf_clm.data.prepared.cluster import RayBlocks
from hf_clm.data.prepared.prepare import MakeBlocks, in_turn, write_prepared
from hf_clm.data.prepared.sets import STREAM_HEAD, to_head
from hf_clm.data.prepared.store import StoredSet, require_writable
from hf_clm.data.proof.ledger import LedgerSplit, write_ledger
from hf_clm.data.proof.proof import ProofReport, prove_mix
from hf_clm.data.split import Split, mix_splits, note_lines
from hf_clm.errors import EnvironmentFault, RecipeError
from hf_clm.model.build import build_model_config
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.tokenizer import fix_date
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments
from hf_clm.training.faults import require_alive
from hf_clm.training.output import PREPARED

POLL_SECONDS = 0.2
SHOWN_LETTERS = 12  # of a key
STREAMED = (
    f"stream    read while it trains; checked before: the first {STREAM_HEAD:,} documents of each source"
)


@dataclass
class Prepared:
    """The data of a run and what was proved of them; ``stored``: the folder they are in."""

    splits: dict[str, Split]
    proof: ProofReport
    stored: StoredSet

    def write_ledger(self, path: Path) -> None:
        """Writes ledger.parquet; where sources are mixed, it says how often each record is drawn."""
        entered = {}
        for name, split in self.splits.items():
            packed = None if isinstance(split.dataset, TokenizedDataset) else split.dataset
            entered[name] = LedgerSplit(split.ledger, packed, split.mix.times if split.mix else None)
        write_ledger(path, entered)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    date: str = "",
    make_blocks: MakeBlocks = in_turn,
) -> Prepared:
    """Opens what was prepared of the same content before, or prepares, proves and keeps it.

    The first process of a machine prepares and the others look for its folder: without a barrier, so that a
    long preparation runs into no time limit of the process group, and until another process has ended.

    A chat template that prints today's date prints one date from then on: that of the set.

    Args:
        date: that date, if an earlier start of the run knows it.

    Raises DataError for data that cannot be read or are not proved, EnvironmentFault for folders that cannot
    be written, or another process that has ended.
    """
    started = time.monotonic()
    aside = Path(str(arguments.output_dir)) / PREPARED
    launch, date = broadcast_object_list([uuid4().hex, date or today(tokenizer)])  # the same on all processes
    pids = gather_object([os.getpid()])
    first = pids[arguments.process_index - arguments.local_process_index]  # which prepares, on this machine
    place = find_place(recipe, tokenizer, seed=arguments.seed, aside=aside, launch=launch)
    stored = open_place(place, recipe)
    notes = [f"note      {note}" for note in place.notes]
    if stored is None:
        place, moved = _writable(place, aside)
        notes += moved
        stored = open_place(place, recipe)
    is_from_cache = stored is not None
    if stored is None and arguments.local_process_index == 0:
        for old in aside.glob("[0-9a-f]*"):  # of an earlier start, which had another key
            shutil.rmtree(old, ignore_errors=True)
        known = {"seed": arguments.seed, "date": date, "make_blocks": make_blocks}
        try:
            write_prepared(place.folder, to_head(recipe), tokenizer, **known)
        except BaseException:  # a run that is refused leaves no folder
            for folder in (aside, aside.parent):
                with suppress(OSError):
                    folder.rmdir()
            raise
    while stored is None:
        stored = open_place(place, recipe)
        if stored is None:
            require_alive(first)
            time.sleep(POLL_SECONDS)
    if stored.date:
        fix_date(tokenizer, stored.date)
    seconds, key = time.monotonic() - started, place.key[:SHOWN_LETTERS]
    said = f"in {seconds:.1f} s, " + (
        f"not kept ({place.why_not})" if place.why_not else f"kept in {place.folder}"
    )
    said = f"read from cache (key {key})" if is_from_cache else said
    first = STREAMED if recipe.data.streaming else f"prepared  {said}"
    proof = ProofReport(stored.proof["facts"], [first, *notes, *stored.proof["lines"]])
    proof.facts["prepared"] = {"key": place.key, "from_cache": is_from_cache, "seconds": seconds}
    if stored.date:
        proof.facts["prepared"]["date"] = stored.date
        proof.lines.append(f"{'dated':<10}{stored.date}: the chat template prints this date from now on")
    splits = mix_splits(stored.splits, recipe, seed=arguments.seed)
    proof.lines += prove_mix(splits["train"]) if arguments.process_index == 0 else []
    return Prepared(splits, proof, stored)


def prepare_recipe(recipe: Recipe, *, ray: str | None = None) -> list[str]:
    """``hf-clm prepare``: what was prepared or found, as lines to print.

    Args:
        ray: the address of the Ray cluster that makes the blocks; None: this process makes them.

    Raises RecipeError where nothing would be kept.
    """
    started = time.monotonic()
    if recipe.data.streaming:
        fix = "hf-clm train reads it, and prepares data.eval alone; or set data.streaming to false"
        raise RecipeError("nothing is prepared of a stream", where="data.streaming", fix=fix)
    arguments = training_arguments(recipe)
    tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    build_model_config(recipe, tokenizer)  # refuses rows that are longer than the model's positions
    place = find_place(recipe, tokenizer, seed=arguments.seed, aside=Path(tempfile.gettempdir()))
    if place.why_not:
        fix = "name a folder in data.cache_dir; pin data on the Hub by a commit as their revision"
        raise RecipeError("nothing would be kept", where=recipe.file or "data.cache_dir", fix=fix)
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
    """The place, or one in the output folder where the cache cannot be written, and the line that says so."""
    try:
        require_writable(place.folder.parent)
    except EnvironmentFault as error:
        if place.folder.parent == aside:
            raise
        require_writable(aside)
        moved = replace(place, folder=aside / place.key)
        return moved, [f"note      {error.where}: {error.got}; the prepared data lie in {aside} instead"]
    return place, []


def _describe(name: str, split: Split) -> list[str]:
    rows = f"{len(split.dataset):,} rows, {split.tokens:,} tokens, {split.target_tokens:,} targets"
    filled = f", {split.dataset.fill:.1%} full" if isinstance(split.dataset, PackedDataset) else ""
    mixed = split.mix.to_lines() if split.mix else []
    return [f"{name:<10}{rows}{filled}", *(f"{'':<10}{line}" for line in mixed)]
