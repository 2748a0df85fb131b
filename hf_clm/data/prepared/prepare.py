"""Prepares a recipe's data in blocks: only one block is in memory, the rest is in files.

    blocks --> parts/train  parts/eval --> find duplicates, hold out records --> train  eval  ledger

The parts contain the blocks in the order of the files, wherever the blocks were made. Decisions that need
the complete set use a few bytes of each record.
"""

import hashlib
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.prepared.block import DIGESTS, LEDGER_SCHEMA, ROW_SCHEMA, Block, BlockMaker
from hf_clm.data.prepared.chunks import RawBlock
from hf_clm.data.prepared.parts import SetPart, check_read, write_part
from hf_clm.data.prepared.selection import Selection, select
from hf_clm.data.prepared.sets import open_sets, read_examples
from hf_clm.data.prepared.store import (
    HEAD,
    LEDGER,
    RECORDS,
    keep_folder,
    open_splits,
    split_json,
    write_pieces,
)
from hf_clm.data.prepared.tables import (
    DUPLICATE,
    OF,
    StoredLedger,
    StoredRows,
    TableWriter,
    enter_rows,
    write_dict,
)
from hf_clm.data.proof.leakage import Leakage, are_among
from hf_clm.data.proof.proof import ProofReport, prove_split
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import Examples
from hf_clm.data.split import check_dropped, pack_rows
from hf_clm.recipe.recipe import Data, Recipe
from hf_clm.recipe.sections import TRAIN
from hf_clm.schema import AnyExample
from hf_clm.text.tokenizer import fix_date

PARTS_FOLDER = "parts"  # temporary subfolder

Blocks = Generator[Block, None, None]  # to be closed if it is not exhausted
MakeBlocks = Callable[[BlockMaker, Iterable[RawBlock]], Blocks]


def in_turn(maker: BlockMaker, blocks: Iterable[RawBlock]) -> Blocks:
    """Makes the blocks in this process, one after the other."""
    yield from map(maker.make, blocks)


def write_prepared(
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    date: str = "",
    make_blocks: MakeBlocks = in_turn,
) -> None:
    """Prepares, proves and stores the data of a recipe in a folder.

    Args:
        seed: seed for holding out records.
        date: printed by chat templates instead of today's date.
        make_blocks: makes the blocks in this process or on a cluster.

    Raises DataError if data cannot be read or proved, and EnvironmentFault if the folder cannot be written.
    """

    def fill(partial: Path) -> dict[str, Any]:
        sets = open_sets(recipe.data)
        dated = copy(tokenizer)
        if date:
            fix_date(dated, date)
        maker = BlockMaker(recipe, dated, digests=needed_digests(recipe.data))
        parts = {}
        for name in sorted(sets):  # eval first: it is short, so its errors are reported early
            with closing(make_blocks(maker, sets[name].blocks)) as blocks:
                parts[name] = write_part(partial / PARTS_FOLDER / name, sets[name], blocks, data=recipe.data)
            check_read(parts[name], recipe.data)
        content = divide(partial, parts, recipe, tokenizer=dated, seed=seed)
        shutil.rmtree(partial / PARTS_FOLDER)
        return {**content, "date": date}

    keep_folder(folder, fill)


def needed_digests(data: Data) -> list[str]:
    """Returns the digests needed to find duplicates and leakage."""
    if data.eval or data.eval_fraction:
        return ["exact", "loose", "prompt"]
    return ["exact"] if data.duplicates == "drop" else []


def divide(
    folder: Path,
    parts: Mapping[str, SetPart],
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> dict[str, Any]:
    """Writes and proves the splits; returns the content of ``prepared.json``."""
    selections = select({name: part.candidates for name, part in parts.items()}, recipe.data, seed=seed)
    sets = (TRAIN, *recipe.data.eval_sets)  # if a single text was split into parts, its file counts once
    files = [file for name in sets for file in parts[name].report.files]
    index: dict[str, Any] = {"files": files, "splits": {}}
    for name, selection in selections.items():
        part = parts[selection.of]
        write_split(folder, name, selection, part=part)
        rows = StoredRows(folder / name, StoredLedger(folder / LEDGER / name, {}))
        content, least = count_ids(folder / name, rows)
        if isinstance(packed := pack_rows(TokenizedDataset(rows), recipe), PackedDataset):
            write_pieces(folder / name, packed)
        # reading errors are reported only once, for the set that was read
        report = part.report if name == part.name else ReadReport(part.report.files)
        examples = Examples(
            read_head(recipe.data, selection),
            report=report,
            formats=part.formats,
            unknown_keys=part.unknown_keys,
        )
        certified = {"seconds": part.certificate.seconds, "content": content}
        index["splits"][name] = split_json(examples, of=part.name, least_id=least, certified=certified)
    for at in (folder, folder / LEDGER):
        write_dict(at, list(selections))
    splits = open_splits(folder, index, recipe=recipe, files=files, load_examples=lambda _: [])
    proof = ProofReport()
    for name, split in splits.items():
        check_dropped(split, recipe.data)
        certified = index["splits"][name]["certified"]
        prove_split(proof, name, split, recipe, tokenizer=tokenizer, certified=certified)
    for name in [name for name in splits if name != TRAIN]:
        leakage = measure_leakage(parts, selections, name=name, places=splits[name].ledger.places)
        proof.enter_leakage(name, leakage, max_leakage=recipe.data.max_leakage)
    return {**index, "proof": {"facts": proof.facts, "lines": proof.lines}}


def write_split(folder: Path, name: str, selection: Selection, *, part: SetPart) -> None:
    """Writes the rows and the ledger of a split; a complete part is only renamed."""
    if selection.is_whole:
        (folder / LEDGER).mkdir(exist_ok=True)
        (part.folder / "rows").rename(folder / name)
        (part.folder / "ledger").rename(folder / LEDGER / name)
        return
    first, is_new = 0, selection.is_new
    places = StoredLedger(part.folder / "ledger", {}).places
    with (
        TableWriter(folder / name, ROW_SCHEMA) as rows,
        TableWriter(folder / LEDGER / name, LEDGER_SCHEMA) as ledger,
    ):
        for lines, batch in zip(part.batches("ledger"), part.batches("rows"), strict=True):
            records = slice(first, first + lines.num_rows)
            first = records.stop
            is_read = selection.is_chosen[records] & is_new[records]
            rows.write(batch.filter(np.repeat(is_read, lines.column("rows").to_numpy())))
            repeats = np.flatnonzero(~is_new[records]).tolist()
            equals = selection.equals[records]
            lines = _with_duplicates(lines, {at: places[int(equals[at])] for at in repeats})
            ledger.write(lines.filter(pyarrow.array(selection.is_chosen[records])))
    np.save(folder / name / RECORDS, selection.numbers)


def _with_duplicates(lines: pyarrow.RecordBatch, earlier: Mapping[int, str]) -> pyarrow.RecordBatch:
    """Marks records as duplicates; ``earlier`` has the place of the record that each one equals."""
    if not earlier:
        return lines
    columns = lines.to_pydict()
    for number, place in earlier.items():
        columns["fate"][number], columns["reason"][number] = DUPLICATE, OF + place
        for count in ("kept_tokens", "kept_targets", "rows", "proved_rows"):
            columns[count][number] = 0
    return pyarrow.RecordBatch.from_pydict(columns, schema=LEDGER_SCHEMA)


def count_ids(folder: Path, rows: StoredRows) -> tuple[str, int]:
    """Writes how often each id occurs as input and as label; returns the rows' sha256 and the least id."""
    digest, least = hashlib.sha256(), 0
    counts = {"id_counts": np.zeros(0, np.int64), "label_counts": np.zeros(0, np.int64)}
    for block in rows.blocks():
        least = min(least, int(block.input_ids.min(initial=0)))
        for name, values in (("id_counts", block.input_ids), ("label_counts", block.labels)):
            totals = np.bincount(values[values >= 0], minlength=len(counts[name]))
            totals[: len(counts[name])] += counts[name]
            counts[name] = totals
        enter_rows(digest.update, block)
    for name, totals in counts.items():
        np.save(folder / f"{name}.npy", totals)
    return digest.hexdigest(), least


def measure_leakage(
    parts: Mapping[str, SetPart], selections: Mapping[str, Selection], *, name: str, places: Sequence[str]
) -> Leakage:
    """Compares the records and the prompts of an evaluation set with those of the training set.

    Args:
        places: places of the records of the set.
    """

    def digests_of(split: Selection) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        numbers = np.flatnonzero(split.is_chosen & split.is_new)
        return numbers, {kind: parts[split.of].digests[kind][numbers] for kind in DIGESTS}

    (numbers, evaluation), (_, training) = digests_of(selections[name]), digests_of(selections[TRAIN])
    shared = {kind: are_among(evaluation[kind], training[kind]) for kind in DIGESTS}
    lines = np.searchsorted(selections[name].numbers, numbers)  # lines in the ledger of the split
    is_loose = shared["loose"] & ~shared["exact"]
    exact, normalised = (
        [str(places[line]) for line in lines[mask].tolist()] for mask in (shared["exact"], is_loose)
    )
    return Leakage(len(numbers), exact, normalised, int(shared["prompt"].sum()))


def read_head(data: Data, selection: Selection) -> list[AnyExample]:
    """Reads the first examples of a split again."""
    numbers = selection.numbers[:HEAD].tolist()
    first = list(islice(read_examples(data, selection.of), max(numbers, default=-1) + 1))
    return [first[number] for number in numbers]
