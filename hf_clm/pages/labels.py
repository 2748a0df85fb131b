"""The page with the tokens and labels of rows, of ``hf-clm inspect`` and of a run that diverged."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.pages.charts import histogram
from hf_clm.pages.report import render
from hf_clm.pages.rows import FLAGS, Document, Row, Vocabulary
from hf_clm.run_folder import write_text


@dataclass(frozen=True)
class Lengths:
    """The number of tokens of each example before anything was cut, and the limit."""

    tokens: np.ndarray
    limit: int

    @property
    def title(self) -> str:
        """The share of the examples over the limit."""
        share = (self.tokens > self.limit).mean()
        return f"Tokens in an example: {share:.1%} are over max_length {self.limit:,}"

    def to_svg(self) -> str:
        """Returns the histogram."""
        return histogram(self.tokens, limit=self.limit)


def write_labels(
    path: str | Path,
    rows: Sequence[Row],
    *,
    vocabulary: Vocabulary,
    facts: Mapping[str, Any],
    lengths: Lengths | None = None,
    title: str = "Labels",
) -> None:
    """Writes the page. ``facts`` are shown at its top, such as the counts of the set."""
    content = to_content(rows, vocabulary)
    content |= {"facts": [[name, str(value)] for name, value in facts.items()]}
    # Inside a script element only "<" could end the data or begin a comment.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    write_text(Path(path), render("labels.html", {"title": title, "data": data, "lengths": lengths}))


def to_content(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the rows for JSON: all ids and labels (int32) in base64; a row is [number, tokens, documents].

    ``texts`` contains the text of each id, or its bytes if they are not complete characters.
    """
    ids, labels = (
        np.concatenate([np.zeros(0, np.int32), *parts]).astype("<i4")
        for parts in ([row.input_ids for row in rows], [row.labels for row in rows])
    )
    known = np.unique(ids).tolist()
    return {
        "tokens": base64.b64encode(ids.tobytes()).decode(),
        "labels": base64.b64encode(labels.tobytes()).decode(),
        "texts": {token: _to_text(vocabulary.to_bytes(token)) for token in known},
        "control": [token for token in known if vocabulary.is_control(token)],
        "flags": list(FLAGS.items()),
        "rows": [[row.number, len(row.input_ids), list(map(_to_document, row.documents))] for row in rows],
    }


def _to_document(document: Document) -> dict[str, Any]:
    """Returns its fields, with the file and the line of its place separated."""
    file, line = re.split(r"(?=:[0-9]+$|: record [0-9]+$|$)", document.place, maxsplit=1)
    return {**vars(document), "file": file, "line": line}


def _to_text(spelled: bytes) -> str | list[int]:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)
