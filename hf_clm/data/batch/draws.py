"""What packed rows and ledger hold of a mix: each row as often as it was drawn."""

from pathlib import Path

import numpy as np

from hf_clm.data.arrays import release, row_blocks
from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, stable_order
from hf_clm.data.label.datasets import TokenizedRows
from hf_clm.data.proof.ledger import Seats, check_pieces, targets_before
from hf_clm.errors import DataError


def check_draws(packed: PackedDataset, rows: TokenizedRows, *, times: np.ndarray) -> None:
    """Raises DataError unless the packed rows hold each label as often as ``times`` says of its row."""
    pieces, order = packed.pieces, stable_order(packed.pieces.examples)
    kept, wanted = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for first, last in row_blocks(rows.offsets):
        own = order[slice(*np.searchsorted(pieces.examples, [first, last], sorter=order))]
        examples, begin = pieces.examples[own], rows.offsets[first]
        before = targets_before(rows.labels[begin : rows.offsets[last]])
        begins = rows.offsets[examples] - begin  # the first token of a piece has no label in its row
        labels = before[begins + pieces.stops[own]] - before[begins + pieces.starts[own] + 1]
        kept[first:last] = np.bincount(examples - first, weights=labels, minlength=last - first)
        wanted[first:last] = np.diff(before[rows.offsets[first : last + 1] - begin]) * times[first:last]
        release(rows.labels)
    if not np.array_equal(kept, wanted):
        what = f"packing keeps {kept.sum():,} labels of {wanted.sum():,}"
        raise DataError(what, where="data.packing", fix="report this as a bug of hf_clm")
    check_pieces(packed, rows)


def count_drawn_labels(rows: TokenizedRows, times: np.ndarray) -> np.ndarray:
    """(V,) int64, how often each id is learned where each row is read so many ``times``."""
    counts = np.zeros(0, dtype=np.int64)
    for first, last in row_blocks(rows.offsets):
        labels = rows.labels[rows.offsets[first] : rows.offsets[last]]
        weights = np.repeat(times[first:last], np.diff(rows.offsets[first : last + 1]))
        is_learned = labels >= 0
        found = np.bincount(labels[is_learned], weights=weights[is_learned], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found.astype(np.int64)
        release(rows.labels)
    return counts


def add_draws(
    path: Path, dataset: PackedDataset | DrawnDataset, *, rows: TokenizedRows, times: np.ndarray
) -> None:
    """Writes a ledger again: the ``rows`` of each training example as drawn, and how many ``times`` it was.

    The training rows come first. An evaluation row is read once, if it is not dropped.
    """
    import pyarrow
    from pyarrow import parquet

    seats, done = Seats(len(rows), dataset), 0
    first_rows = np.searchsorted(rows.sources, np.arange(len(times) + 1, dtype=rows.sources.dtype))
    kind, partial = pyarrow.list_(pyarrow.int64()), path.with_name(f".{path.name}.partial")
    with parquet.ParquetFile(path) as old:
        at = old.schema_arrow.get_field_index("rows")
        schema = old.schema_arrow.set(at, pyarrow.field("rows", kind))
        schema = schema.append(pyarrow.field("times", pyarrow.int64()))
        with parquet.ParquetWriter(partial, schema) as new:
            for group in map(old.read_row_group, range(old.num_row_groups)):
                count = min(group.num_rows, len(times) - done)
                held = seats.of_sources(first_rows[done : done + count + 1]) if count > 0 else []
                others = group.column("rows").slice(len(held)).to_pylist()
                drawn = [*times[done : done + len(held)].tolist(), *(int(bool(rows)) for rows in others)]
                group = group.set_column(at, "rows", pyarrow.array([*held, *others], kind))
                new.write_table(group.append_column("times", pyarrow.array(drawn)).cast(schema))
                done += group.num_rows
    partial.replace(path)
