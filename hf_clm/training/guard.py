"""The batch that made a step non-finite, as a page of the inspector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.inspector.page import write_page
from hf_clm.inspector.rows import Vocabulary, to_rows


def write_diverged(
    folder: Path,
    batches: Sequence[dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    facts: dict[str, Any],
) -> Path:
    """Writes ``diverged.html``, every row of the step's micro-batches below ``facts``; returns its path."""
    path = folder / "diverged.html"
    rows = []
    for batch in batches:
        rows += to_rows(batch, first_number=len(rows))
    write_page(path, rows, vocabulary=Vocabulary(tokenizer), facts=facts)
    return path
