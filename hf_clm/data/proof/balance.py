"""Nothing is lost: of a record no token and no label that its fate does not name, in packing none at all."""

import numpy as np

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.labels import Fate
from hf_clm.errors import DataError

COMPARED = 500  # packed rows that are compared with their pieces, token by token
BUG = "report this as a bug of hf_clm"


def check_entry(fate: Fate, kept_tokens: int, kept_targets: int, *, where: str) -> None:
    """Raises DataError unless a record lost no token and no label that its fate does not name."""
    whole = fate.tokens - fate.cut_tokens
    match fate.kind:
        case "used":
            is_balanced = (kept_tokens, kept_targets) == (whole, fate.target_tokens)
        case "cut":
            is_balanced = kept_tokens == whole and 0 < kept_targets <= fate.target_tokens
        case "split":
            is_balanced = fate.reason == "windows" or kept_targets == fate.target_tokens
        case _:
            is_balanced = kept_tokens == 0
    if not is_balanced:
        what = f"the ledger does not balance: {fate.kind}, {kept_tokens} of {fate.tokens} tokens kept"
        got = f"{kept_targets} of {fate.target_tokens} labels"
        raise DataError(what, where=where, got=got, fix=BUG)


def check_packing(packed: PackedDataset, *, times: np.ndarray | None = None) -> None:
    """Raises DataError unless the packed rows hold each token of a row as often as ``times`` says of it.

    The pieces alone show it: those that begin a row are as many as it was drawn, and every other begins at
    the last token of an earlier one, which it reads again without a label.

    Args:
        times: (N,) of the tokenized rows; None: each once.
    """
    pieces, lengths = packed.pieces, packed.dataset.rows.lengths
    is_begin, is_end = pieces.starts == 0, pieces.stops == lengths[pieces.examples]
    begun = np.bincount(pieces.examples[is_begin], minlength=len(lengths))
    wanted = np.ones(len(lengths), dtype=np.int64) if times is None else times
    stride = int(lengths.max(initial=0)) + 1
    goes_on = np.sort(pieces.examples[~is_begin] * stride + pieces.starts[~is_begin] + 1)
    breaks_off = np.sort(pieces.examples[~is_end] * stride + pieces.stops[~is_end])
    if not (np.array_equal(begun, wanted) and np.array_equal(goes_on, breaks_off)):
        what = f"packing holds {begun.sum():,} of {wanted.sum():,} rows, or parts of some twice or never"
        raise DataError(what, where="data.packing", fix=BUG)
    check_pieces(packed)


def check_pieces(packed: PackedDataset) -> None:
    """Raises DataError where a packed row is not its pieces, token by token, each with its own positions."""
    rows = packed.dataset.rows
    for number in np.unique(np.linspace(0, len(packed) - 1, COMPARED, dtype=np.int64)).tolist():
        row, pieces = packed[number], packed.pieces[number]
        whole = [rows[example] for example, _, _ in pieces]
        ids, labels = (
            np.array([item for row, (_, a, b) in zip(whole, pieces, strict=True) for item in row[name][a:b]])
            for name in ("input_ids", "labels")
        )
        places = np.concatenate([np.arange(last - first) for _, first, last in pieces])
        given = np.asarray(row["labels"])
        is_same = (
            np.array_equal(row["input_ids"], ids)
            and np.array_equal(row["position_ids"], places)
            and np.array_equal(np.maximum(given, -1), np.where(places > 0, np.maximum(labels, -1), -1))
        )
        if not is_same:
            what = f"packed row {number:,} is not its {len(pieces)} documents with positions that begin again"
            raise DataError(what, where="data.packing", fix=BUG)
