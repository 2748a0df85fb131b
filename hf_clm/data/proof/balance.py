"""Checks that records lose only what their fate states, and that packing loses nothing."""

import numpy as np

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.labels import Fate
from hf_clm.errors import DataError

COMPARED_ROWS = 500  # packed rows compared with their pieces, token by token
BUG = "report this as a bug of hf_clm"


def check_entry(fate: Fate, kept_tokens: int, kept_targets: int, *, where: str) -> None:
    """Raises DataError if a record lost tokens or labels that its fate does not account for."""
    expected = fate.tokens - fate.cut_tokens
    match fate.kind:
        case "used":
            is_balanced = (kept_tokens, kept_targets) == (expected, fate.target_tokens)
        case "cut":
            is_balanced = kept_tokens == expected and 0 < kept_targets <= fate.target_tokens
        case "split":
            is_balanced = fate.reason == "windows" or kept_targets == fate.target_tokens
        case _:
            is_balanced = kept_tokens == 0
    if not is_balanced:
        what = f"the ledger does not balance: {fate.kind}, {kept_tokens} of {fate.tokens} tokens kept"
        got = f"{kept_targets} of {fate.target_tokens} labels"
        raise DataError(what, where=where, got=got, fix=BUG)


def check_packing(packed: PackedDataset, *, times: np.ndarray | None = None) -> None:
    """Raises DataError unless the packed rows contain each tokenized row ``times`` times.

    It is enough to check the pieces: the number of pieces that begin a row must be ``times``, and every other
    piece must begin at the last token of an earlier one, which it repeats without a label.

    Args:
        times: (N,), by tokenized row; None for once each.
    """
    pieces, lengths = packed.pieces, packed.dataset.rows.lengths
    is_begin, is_end = pieces.starts == 0, pieces.stops == lengths[pieces.examples]
    begun = np.bincount(pieces.examples[is_begin], minlength=len(lengths))
    expected = np.ones(len(lengths), dtype=np.int64) if times is None else times
    stride = int(lengths.max(initial=0)) + 1
    continued = np.sort(pieces.examples[~is_begin] * stride + pieces.starts[~is_begin] + 1)
    interrupted = np.sort(pieces.examples[~is_end] * stride + pieces.stops[~is_end])
    if not (np.array_equal(begun, expected) and np.array_equal(continued, interrupted)):
        what = f"packing has {begun.sum():,} of {expected.sum():,} rows, or repeats or loses parts of some"
        raise DataError(what, where="data.packing", fix=BUG)
    check_pieces(packed)


def check_pieces(packed: PackedDataset) -> None:
    """Raises DataError if a packed row differs from its pieces, token by token, or has wrong positions."""
    rows = packed.dataset.rows
    for number in np.unique(np.linspace(0, len(packed) - 1, COMPARED_ROWS, dtype=np.int64)).tolist():
        row, pieces = packed[number], packed.pieces[number]
        sources = [rows[example] for example, _, _ in pieces]
        ids, labels = (
            np.array(
                [item for one, (_, a, b) in zip(sources, pieces, strict=True) for item in one[name][a:b]]
            )
            for name in ("input_ids", "labels")
        )
        places = np.concatenate([np.arange(last - first) for _, first, last in pieces])
        actual = np.asarray(row["labels"])
        is_same = (
            np.array_equal(row["input_ids"], ids)
            and np.array_equal(row["position_ids"], places)
            and np.array_equal(np.maximum(actual, -1), np.where(places > 0, np.maximum(labels, -1), -1))
        )
        if not is_same:
            what = f"packed row {number:,} differs from its {len(pieces)} documents"
            raise DataError(what, where="data.packing", fix=BUG)
