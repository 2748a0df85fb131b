"""Joins parts to the sets that are trained on: arrays one behind the other, and what only the whole decides.

part 1 | part 2 | part 3      duplicates and held-out examples are chosen by number
     \\      |      /
train.input_ids.npy ...       copied in blocks, never all in memory
            |
train.pieces.offsets.npy      packed by the lengths of the rows
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.config import Data, Recipe
from hf_clm.data.arrays import ArrayWriter, item_blocks, map_array, release, row_blocks
from hf_clm.data.batch.packing import best_fit_rows, stream_blocks
from hf_clm.data.build import hold_out, packing_of
from hf_clm.data.proof.ledger import Leakage, are_repeated
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import Examples, no_example
from hf_clm.data.read.sources import no_record
from hf_clm.data.shards import PartSet
from hf_clm.data.store import split_json
from hf_clm.schema import AnyExample

PIECES = ("examples", "starts", "stops", "offsets")
COMPARED_ITEMS = 1 << 20  # digests in memory at once


@dataclass(frozen=True)
class Selection:
    """Which examples of a set are in a split. S = examples of the set.

        mask        (S,) bool, those that are in the split; None: all
        duplicates  (S,) bool, those left out because an earlier one is the same; None: none

    ``is_counted``: whether what was lost in reading is told of this split.
    """

    parts: Sequence[PartSet]
    mask: np.ndarray | None = None
    duplicates: np.ndarray | None = None
    is_counted: bool = True

    def __len__(self) -> int:
        return sum(map(len, self.parts)) if self.mask is None else int(self.mask.sum())

    def by_part(self, chosen: np.ndarray | None) -> Iterator[tuple[PartSet, np.ndarray]]:
        """Each part with its stretch of ``chosen``; None: all of it."""
        start = 0
        for part in self.parts:
            stop = start + len(part)
            yield part, np.ones(len(part), dtype=bool) if chosen is None else chosen[start:stop]
            start = stop

    def first_numbers(self, count: int) -> list[int]:
        """The first examples of the split, by their numbers in the set."""
        return list(range(min(count, len(self)))) if self.mask is None else _where(self.mask, count)


def select(parts: Sequence[Mapping[str, PartSet]], recipe: Recipe, *, seed: int) -> dict[str, Selection]:
    """Which examples are in which split: train and, if there is one, eval.

    Raises DataError where a file, a set or a split has none.
    """
    data = recipe.data
    found = {name: _without_duplicates([part[name] for part in parts], data) for name in parts[0]}
    for name, selection in found.items():
        _check_read(selection, data, name=name)
    if "eval" in found or not data.eval_fraction:
        return {name: found[name] for name in ("train", "eval") if name in found}
    train = found["train"]
    total = sum(map(len, train.parts))
    kept = np.arange(total) if train.mask is None else np.flatnonzero(train.mask)
    is_held_out = hold_out(len(kept), data.eval_fraction, seed=seed)
    masks = np.zeros((2, total), dtype=bool)
    masks[0, kept[~is_held_out]] = True
    masks[1, kept[is_held_out]] = True
    return {
        "train": Selection(train.parts, masks[0], train.duplicates),
        "eval": Selection(train.parts, masks[1], is_counted=False),
    }


def write_split(
    folder: Path, name: str, *, selection: Selection, recipe: Recipe, head: Sequence[AnyExample]
) -> dict[str, Any]:
    """Writes the arrays of a split and packs it; returns what ``prepared.json`` holds of it.

    ``head``: its first examples.
    """
    _write_rows(folder, name, selection=selection)
    least_id = _write_counts(folder, name)
    tables = _write_examples(folder, name, selection=selection)
    _write_pieces(folder, name, recipe=recipe)
    examples = Examples(head, [], _merge_reports(selection))
    examples.formats = {format for part in selection.parts for format in part.content["formats"]}
    examples.unknown_keys = {key for part in selection.parts for key in part.content["unknown_keys"]}
    return split_json(examples, control_texts=_count_controls(selection), least_id=least_id, **tables)


def count_proof(selection: Selection) -> dict[str, Any]:
    """What the certificates of the parts say of a split: rows encoded again, and the time they took."""
    encoded = 0
    for part, chosen in selection.by_part(selection.mask):
        sources, flags = part.map("sources"), part.map("encoded")
        encoded += sum(int(flags[block][chosen[sources[block]]].sum()) for block in item_blocks(len(flags)))
    return {"encoded_again": encoded, "seconds": sum(part.content["seconds"] for part in selection.parts)}


def compare_digests(train: Selection, evaluation: Selection, *, places: Sequence[str]) -> Leakage:
    """``ledger.measure_leakage`` by digests; ``places`` names the evaluation rows."""
    are_shared = {}
    for column in ("exact", "loose"):
        own = np.concatenate(list(_digests(evaluation, column)))
        are_shared[column] = np.zeros(len(own), dtype=bool)
        for others in _digests(train, column):
            are_shared[column] |= _are_among(own, others)
    is_exact, is_loose = are_shared["exact"], are_shared["loose"] & ~are_shared["exact"]
    exact, loose = ([places[number] for number in _where(found)] for found in (is_exact, is_loose))
    return Leakage(len(evaluation), exact, loose)


def _without_duplicates(parts: Sequence[PartSet], data: Data) -> Selection:
    if data.duplicates == "keep":
        return Selection(parts)
    repeated = are_repeated(np.concatenate([part.map("exact") for part in parts]))
    return Selection(parts, ~repeated, repeated)


def _check_read(selection: Selection, data: Data, *, name: str) -> None:
    """Raises DataError for a file, read in spans, or a set that gives nothing."""
    report = _merge_reports(selection)
    counted: Counter[str] = Counter()
    for part in selection.parts:
        counted.update(part.content["counted"])
    for file, records in counted.items():
        if records == 0:
            raise no_record(file, [line for line in report.bad_lines if line.startswith(f"{file}:")])
    if len(selection) == 0:
        raise no_example(data.eval if name == "eval" else data.train, report)


def _merge_reports(selection: Selection) -> ReadReport:
    """What all parts read; of a split that is held out only the files, as the rest is counted once."""
    merged = ReadReport()
    for report in (ReadReport(**part.content["report"]) for part in selection.parts):
        merged.files += report.files
        merged.left_out += report.left_out
        for note in report.notes:
            merged.note(note)
        if selection.is_counted:
            merged.records += report.records
            merged.blank_lines += report.blank_lines
            merged.nul_records += report.nul_records
            merged.bad_lines += report.bad_lines
    return merged


def _write_rows(folder: Path, name: str, *, selection: Selection) -> None:
    """Ids, labels, borders and sources; all of a single part is taken as it is."""
    is_taken = len(selection.parts) == 1 and selection.mask is None
    columns = {"input_ids": "<i4", "labels": "<i4"}
    if any(part.content["has_weights"] for part in selection.parts):
        columns["weights"] = "<f4"
    kinds = {"offsets": "<i8", "sources": "<i8"} | ({} if is_taken else columns)
    writers = _open_writers(folder, name, dtypes=kinds)
    offset, before = 0, 0
    writers["offsets"].append([0])
    for part, chosen in selection.by_part(selection.mask):
        lengths, sources = part.map("lengths"), part.map("sources")
        numbers = np.cumsum(chosen) - 1 + before
        tokens = {} if is_taken else {column: part.map_tokens(column) for column in columns}
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for first, last in row_blocks(ends):
            is_kept = chosen[sources[first:last]]
            kept = lengths[first:last][is_kept]
            writers["offsets"].append(offset + np.cumsum(kept))
            writers["sources"].append(numbers[sources[first:last][is_kept]])
            offset += int(kept.sum())
            are_kept = np.repeat(is_kept, lengths[first:last])
            for column, values in tokens.items():
                writers[column].append(values[ends[first] : ends[last]][are_kept])
                release(values)
        before += int(chosen.sum())
    for writer in writers.values():
        writer.close()
    if is_taken:
        for column in columns:
            _link(selection.parts[0].path(column), folder / f"{name}.{column}.npy")


def _link(path: Path, name: Path) -> None:
    """A second name of a file; a copy where the file system gives no second names."""
    try:
        name.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, name)


def _write_counts(folder: Path, name: str) -> int:
    """How often each id stands there, and is learned; returns the least id."""
    least = 0
    for column, counted in (("input_ids", "id_counts"), ("labels", "label_counts")):
        values, counts = map_array(folder / f"{name}.{column}.npy"), np.zeros(0, dtype=np.int64)
        for block in item_blocks(len(values)):
            found = values[block]
            if column == "input_ids":
                least = min(least, int(found.min(initial=0)))
            new = np.bincount(found[found >= 0], minlength=len(counts))
            new[: len(counts)] += counts
            counts = new
            release(values)
        np.save(folder / f"{name}.{counted}.npy", counts)
    return least


def _write_examples(folder: Path, name: str, *, selection: Selection) -> dict[str, list[Any]]:
    """Fates and places, also those of the duplicates; returns the tables that their numbers are of."""
    kinds, prefixes = (
        _used(selection, selection.mask, column="fates"),
        _used(selection, selection.mask, column="places"),
    )
    if selection.duplicates is not None:
        prefixes |= _used(selection, selection.duplicates, column="places")
    tables = {"kinds": sorted(kinds), "prefixes": sorted(prefixes)}
    columns = [("fates", "fates", selection.mask), ("places", "places", selection.mask)]
    none = np.zeros(sum(map(len, selection.parts)), dtype=bool)
    repeated = none if selection.duplicates is None else selection.duplicates
    for column, name_of, chosen in [*columns, ("places", "duplicates", repeated)]:
        table = tables["kinds" if column == "fates" else "prefixes"]
        width = 4 if column == "fates" else 2
        writer = ArrayWriter(folder / f"{name}.{name_of}.npy", "<i8", columns=width)
        for values in _renumbered(selection, chosen, column=column, table=table):
            writer.append(values)
        writer.close()
    (writer,) = _open_writers(folder, name, dtypes={"origins": "<i4"}).values()
    for part, mask in selection.by_part(selection.mask):
        origins = part.map("origins")
        for block in item_blocks(len(origins)):
            writer.append(origins[block][mask[block]])
    writer.close()
    return tables


def _used(selection: Selection, chosen: np.ndarray | None, *, column: str) -> set[Any]:
    """The kinds of fates, or the prefixes of places, that occur."""
    found = set()
    for part, mask in selection.by_part(chosen):
        values, table = part.map(column)[:, 0], _table(part, column)
        numbers = {
            n for block in item_blocks(len(values)) for n in np.unique(values[block][mask[block]]).tolist()
        }
        found |= {table[number] for number in numbers}
    return found


def _renumbered(
    selection: Selection, chosen: np.ndarray | None, *, column: str, table: list[Any]
) -> Iterator[np.ndarray]:
    """The rows of a column that are chosen, with their first number as one of ``table``."""
    numbers = {item: number for number, item in enumerate(table)}
    for part, mask in selection.by_part(chosen):
        values = part.map(column)
        new = np.array([numbers.get(item, -1) for item in _table(part, column)], dtype=np.int64)
        for block in item_blocks(len(values)):
            rows = values[block][mask[block]]
            yield np.column_stack([new[rows[:, 0]], rows[:, 1:]])


def _table(part: PartSet, column: str) -> list[Any]:
    return [tuple(kind) for kind in part.content["kinds"]] if column == "fates" else part.content["prefixes"]


def _write_pieces(folder: Path, name: str, *, recipe: Recipe) -> None:
    """Packs the rows, if they are packed: a stream in blocks, best fit by all lengths."""
    capacity, kind = packing_of(recipe)
    if capacity is None:
        return
    offsets = map_array(folder / f"{name}.offsets.npy")
    if kind == "stream":
        lengths = (np.diff(offsets[b.start : b.stop + 1]) for b in item_blocks(len(offsets) - 1))
        blocks = stream_blocks(lengths, capacity)
    else:
        blocks = iter([best_fit_rows(np.diff(offsets), capacity)])
    writers = _open_writers(folder, f"{name}.pieces", dtypes=dict.fromkeys(PIECES, "<i8"))
    for pieces in blocks:
        for column, writer in writers.items():
            writer.append(getattr(pieces, column))
    for writer in writers.values():
        writer.close()


def _count_controls(selection: Selection) -> dict[str, int]:
    """How often the split's examples spell each control token."""
    found: Counter[str] = Counter()
    for part, chosen in selection.by_part(selection.mask):
        spelled, texts = part.map("controls"), part.content["control_texts"]
        found.update(texts[number] for number in spelled[chosen[spelled[:, 0]], 1].tolist())
    return dict(found)


def _digests(selection: Selection, column: str) -> Iterator[np.ndarray]:
    for part, chosen in selection.by_part(selection.mask):
        values = part.map(column)
        for first in range(0, len(values), COMPARED_ITEMS):
            block = slice(first, first + COMPARED_ITEMS)
            yield values[block][chosen[block]]


def _are_among(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool, which of N digests are among others: by their first half, and then as a whole."""
    found = np.isin(own[:, 0], others[:, 0])
    if found.any():
        known = set(map(tuple, others.tolist()))
        found[found] = [tuple(digest) in known for digest in own[found].tolist()]
    return found


def _where(mask: np.ndarray, count: int | None = None) -> list[int]:
    return np.flatnonzero(mask)[:count].tolist()


def _open_writers(folder: Path, name: str, *, dtypes: dict[str, str]) -> dict[str, ArrayWriter]:
    return {column: ArrayWriter(folder / f"{name}.{column}.npy", dtype) for column, dtype in dtypes.items()}
