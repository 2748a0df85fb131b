"""The first documents of a set as JSON lines: what the report of a run shows of its labels."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

from hf_clm.data.prepared.store import HEAD
from hf_clm.pages.documents import Collator, Reader
from hf_clm.pages.rows import Document, Row, Vocabulary, escape, to_atoms, to_rows

DOCUMENTS = 5
TOKENS = 400  # that are shown of each
LONGEST = 50_000  # tokens: a whole book would be tokenized again


def write_excerpt(path: Path, reader: Reader, *, collate: Collator) -> None:
    """Writes a line for each of the first documents of the reader's split, packed or not."""
    rows = islice(_first_rows(reader, collate=collate), DOCUMENTS)
    entries = to_entries(rows, reader.vocabulary)
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def to_entries(rows: Iterable[Row], vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """A document's place, counts, flags, and its turns: [[role, [[style, text], ...]], ...]."""
    for row in rows:
        for document in row.documents:
            stop = min(document.stop, document.start + TOKENS)
            yield {
                "place": document.place,
                "tokens": document.stop - document.start,
                "targets": int(row.trained[document.start : document.stop].sum()),
                "shown": stop - document.start,
                "flags": dict(document.flags),
                "turns": list(_to_turns(row, document, stop=stop, vocabulary=vocabulary)),
            }


def _first_rows(reader: Reader, *, collate: Collator) -> Iterator[Row]:
    """Of the examples that are kept with a prepared set: the others would all be read again."""
    dataset, rows = reader.split.rows, reader.split.rows.rows
    for number, source in enumerate(rows.sources[:HEAD].tolist()):
        if source < HEAD and rows.fates[source].tokens <= LONGEST:
            length = int(rows.lengths[number])
            (row,) = to_rows(collate([dataset[number]]), [length], first_number=number)
            yield reader.annotate(row, [(number, 0, length)])


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
