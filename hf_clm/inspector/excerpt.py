"""The first rows of a set as JSON lines: what the report of a run shows of its labels."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

from hf_clm.inspector.documents import Collator, Reader, inspect_rows
from hf_clm.inspector.rows import Document, Row, Vocabulary, escape, to_atoms

ROWS = 2
TOKENS = 800  # of a row: a packed row of 32k tokens is not for a page that shows other things


def write_excerpt(path: Path, reader: Reader, *, collate: Collator) -> None:
    """Writes one line a document of the first rows that training takes from the reader's split."""
    rows = islice(inspect_rows(reader.split, reader, collate=collate, batch_size=1), ROWS)
    entries = to_entries(rows, reader.vocabulary)
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def to_entries(rows: Iterable[Row], vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """A document's row, place, counts, flags, and its turns: [[role, [[style, text], ...]], ...]."""
    for row in rows:
        for document in row.documents:
            if document.start >= TOKENS:
                break
            stop = min(document.stop, TOKENS)
            yield {
                "row": row.number,
                "place": document.place,
                "tokens": document.stop - document.start,
                "targets": int(row.trained[document.start : document.stop].sum()),
                "shown": stop - document.start,
                "flags": dict(document.flags),
                "turns": list(_to_turns(row, document, stop=stop, vocabulary=vocabulary)),
            }


def _to_turns(row: Row, document: Document, *, stop: int, vocabulary: Vocabulary) -> Iterator[list[Any]]:
    roles = [turn for turn in document.roles if turn[0] < stop]
    for (start, role), (end, _) in pairwise([(document.start, ""), *roles, (stop, "")]):
        atoms = to_atoms(row, (start, end), vocabulary=vocabulary)
        runs = [
            [style, escape("".join(text for text, _ in run))]
            for style, run in groupby(atoms, key=lambda atom: atom[1])
        ]
        if runs:
            yield [role, runs]
