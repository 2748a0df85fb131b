"""Reads tokenized records: ids with labels and masks, of one document or several."""

from itertools import pairwise

from hf_clm.data.read.row import RecordView, kind_name
from hf_clm.schema import IGNORE_INDEX, Tokens

MASKS = ("labels", "completion_mask", "assistant_masks", "attention_mask", "position_ids", "seq_lengths")


def read_tokenized(row: RecordView) -> Tokens:
    """Reads token ids and combines all masks: a token has a label only if every mask allows it."""
    ids = _ids("input_ids", row)
    labels = list(ids)
    if row.column("labels") in row.record:
        labels = _of_length(_ids("labels", row, may_be=(IGNORE_INDEX,)), ids, "labels", row)
    mask = [1] * len(ids)
    for key in ("completion_mask", "assistant_masks"):
        if row.column(key) in row.record:
            mask = [old & new for old, new in zip(mask, _mask(key, ids, row), strict=True)]
    lengths = _document_lengths(row, len(ids))
    if row.column("attention_mask") in row.record:
        start, stop = _attended(_mask("attention_mask", ids, row), row)
        if (start, stop) != (0, len(ids)) and len(lengths) > 1:
            raise row.error("a packed row with padding", fix="remove the padding and the attention_mask")
        ids, labels, mask = ids[start:stop], labels[start:stop], mask[start:stop]
        lengths = [len(ids)] if len(lengths) == 1 else lengths
    return Tokens(ids, labels, lengths, row.weight(), [] if all(mask) else mask)


def _ids(key: str, row: RecordView, *, may_be: tuple[int, ...] = ()) -> list[int]:
    """Returns integers from 0 to 2**31 - 1, or from ``may_be``."""
    ids = row.items(key)
    for position, token in enumerate(ids):
        if type(token) is not int:  # a bool is an int by isinstance
            raise row.error(f"{row.name(key)}, position {position}: expected int", got=kind_name(type(token)))
        if not 0 <= token < 2**31 and token not in may_be:
            raise row.error(f"{row.name(key)}, position {position}: not a token id", got=str(token))
    return list(ids)


def _of_length(values: list[int], ids: list[int], key: str, row: RecordView) -> list[int]:
    if len(values) != len(ids):
        raise row.error(f"input_ids and {key} differ in length", got=f"{len(ids)} and {len(values)}")
    return values


def _mask(key: str, ids: list[int], row: RecordView) -> list[int]:
    """Returns a mask of zeros and ones; accepts booleans."""
    values = _of_length(row.items(key), ids, key, row)
    at = next((at for at, value in enumerate(values) if value not in (0, 1)), None)
    if at is not None:
        fix = "use 0 and 1; mark the documents of a packed row with seq_lengths or position_ids"
        raise row.error(f"{row.name(key)}, position {at}: not a mask", got=repr(values[at]), fix=fix)
    return [int(value) for value in values]


def _attended(mask: list[int], row: RecordView) -> tuple[int, int]:
    """Returns the start and end of the tokens between the padding."""
    start = next((at for at, value in enumerate(mask) if value), len(mask))
    stop = start + sum(map(bool, mask))
    if not all(mask[start:stop]):
        fix = "use one row per document, or position_ids"
        raise row.error("attention_mask has a gap between tokens", got=f"at {start}", fix=fix)
    return start, stop


def _document_lengths(row: RecordView, length: int) -> list[int]:
    """Returns the lengths of the documents in a row, from ``seq_lengths`` or restarts of ``position_ids``."""
    if row.column("seq_lengths") in row.record:
        lengths = _ids("seq_lengths", row)
        if sum(lengths) != length or 0 in lengths:
            raise row.error("seq_lengths do not add up to the row", got=f"{sum(lengths)} of {length} tokens")
        return lengths
    if row.column("position_ids") not in row.record:
        return [length]
    positions = _of_length(_ids("position_ids", row), [0] * length, "position_ids", row)
    starts = [at for at, position in enumerate(positions) if position == 0]
    lengths = [stop - start for start, stop in pairwise([*starts, length])]
    if not starts or starts[0] or positions != [at for size in lengths for at in range(size)]:
        raise row.error("position_ids do not count from 0 in each document", fix="correct or remove them")
    return lengths
