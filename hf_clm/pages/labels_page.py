"""Rows as one self-contained HTML page that opens from disk: page.html with the data in it."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.pages.rows import FLAGS, Document, Row, Vocabulary

TEMPLATE = Path(__file__).with_name("labels.html")
BINS = 40


@dataclass(frozen=True)
class Charts:
    """What the page draws: the lengths of the examples before anything was cut, and how full the rows are.

    ``fills`` maps a name ("padded", "packed") to the share of places that hold a token.
    """

    lengths: np.ndarray
    max_length: int
    fills: Mapping[str, float]


def write_page(
    path: str | Path,
    rows: Iterable[Row],
    *,
    vocabulary: Vocabulary,
    facts: Mapping[str, Any],
    charts: Charts | None = None,
) -> None:
    """Writes the page. ``facts`` stand at its top: what the set is, or a batch's step and learning rate."""
    content = to_content(list(rows), vocabulary)
    content |= {"facts": [[name, str(value)] for name, value in facts.items()], "charts": _to_charts(charts)}
    # In a script element only "<" could end the data, or begin a comment.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{DATA}}")
    text = (before + data + after).encode("utf-8", errors="backslashreplace")
    Path(path).write_bytes(text)


def to_content(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """The rows as JSON. Tokens are numbers into ``table``, two or four bytes each, in base64.

    A row is [number, tokens, changes, odd, documents]: ``changes`` lists the tokens at which it changes to
    trained and back; ``odd`` holds the labels that differ from their token's id.
    """
    ids = np.concatenate([np.zeros(0, np.int64), *(row.input_ids for row in rows)])
    table, numbers = np.unique(ids, return_inverse=True)
    kind = np.uint16 if len(table) <= 2**16 else np.uint32
    places = _Numbered()
    roles = _Numbered()
    return {
        "ids": table.tolist(),
        "table": [_to_text(vocabulary.to_bytes(i)) for i in table.tolist()],
        "control": [n for n, i in enumerate(table.tolist()) if vocabulary.is_control(i)],
        "bytes": np.dtype(kind).itemsize,
        "tokens": base64.b64encode(numbers.astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode(),
        "flags": list(FLAGS.items()),
        "rows": [_to_row(row, places=places, roles=roles) for row in rows],
        "files": list(places),
        "roles": list(roles),
    }


class _Numbered(dict[str, int]):
    """Numbers strings in the order of their first use."""

    def __missing__(self, key: str) -> int:
        self[key] = len(self)
        return self[key]


def _to_row(row: Row, *, places: _Numbered, roles: _Numbered) -> list[Any]:
    trained = row.trained
    changes = np.flatnonzero(np.diff(trained, prepend=False)).tolist()
    odd = {int(i): int(row.labels[i]) for i in np.flatnonzero(trained & (row.labels != row.input_ids))}
    documents = [_to_document(document, places=places, roles=roles) for document in row.documents]
    return [row.number, len(row.input_ids), changes, odd, documents]


def _to_document(document: Document, *, places: _Numbered, roles: _Numbered) -> list[Any]:
    """[start, stop, file, line, before, after, {flag: details}, [[token, role], ...]]."""
    file, line = re.split(r"(?=:[0-9]+$|: record [0-9]+$|$)", document.place, maxsplit=1)
    flags = {list(FLAGS).index(flag): details for flag, details in document.flags.items()}
    turns = [[start, roles[role]] for start, role in document.roles]
    span = [document.start, document.stop]
    return [*span, places[file], line, document.before, document.after, flags, turns]


def _to_text(spelled: bytes) -> str | list[int]:
    """The token's text, or its bytes where they are no whole characters."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


def _to_charts(charts: Charts | None) -> dict[str, Any] | None:
    if charts is None or not len(charts.lengths):
        return None
    counts, edges = np.histogram(charts.lengths, bins=BINS, range=(0, max(1, int(charts.lengths.max()))))
    over = float((charts.lengths > charts.max_length).mean())
    return {
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "max_length": charts.max_length,
        "over": over,
        "fills": list(charts.fills.items()),
    }
