"""The rows of a collated batch, their documents, and the text of each token.

batch --to_rows--> Row(input_ids, labels, documents) --documents.py--> places, roles, flags --> terminal, page
"""

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.schema import IGNORE_INDEX

# What can be wrong with a document, the worst first.
FLAGS = {
    "nothing trained": "no token of the document has a label",
    "lost stop token": "a target does not end in a stop token of generation",
    "cut answer": "target tokens were cut off to fit max_length",
    "cut prompt": "the prompt was cut from the left to fit max_length",
    "control text": "the text spells a control token",
    "duplicate": "the same tokens as an earlier document",
}
FORMATS_OF_TEXT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories that control a terminal or hide text
Atom = tuple[str, str]  # text, style
JOINERS = "\u200c\u200d"  # parts of emoji and Persian words, and harmless


@dataclass(frozen=True)
class Document:
    """Tokens ``start`` to ``stop`` of a row, which attend to nothing before ``start``.

    ``before`` and ``after`` count the tokens of the same example that are not in this row. ``roles`` lists
    the turns by their first token in the row. ``flags`` maps a name in FLAGS to its details. ``loss`` and
    ``note`` are shown if a model has read the document: the mean loss of its targets, and more in words.
    """

    start: int
    stop: int
    place: str = ""
    roles: tuple[tuple[int, str], ...] = ()
    before: int = 0
    after: int = 0
    flags: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    note: str = ""

    def turns(self, end: int | None = None) -> Iterator[tuple[int, int, str]]:
        """Yields (first token, past the last, role) of each turn before ``end``.

        What precedes the first turn has no role.
        """
        end = self.stop if end is None else end
        starts = [(self.start, ""), *(turn for turn in self.roles if turn[0] < end), (end, "")]
        for (start, role), (stop, _) in pairwise(starts):
            if start < stop:
                yield start, stop, role


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a batch. Tokens after its last document are padding.

    T = tokens of the row.

        input_ids, labels  (T,) int64
    """

    number: int
    input_ids: np.ndarray
    labels: np.ndarray
    documents: tuple[Document, ...]

    @property
    def trained(self) -> np.ndarray:
        """(T,) bool, True for a token with a label."""
        return self.labels != IGNORE_INDEX

    @property
    def length(self) -> int:
        """The number of tokens without the padding."""
        return self.documents[-1].stop if self.documents else 0

    @property
    def severity(self) -> tuple[int, ...]:
        """The number of documents with each flag, the worst flag first: the worst row compares as largest."""
        return tuple(sum(flag in document.flags for document in self.documents) for flag in FLAGS)


def to_rows(
    batch: Mapping[str, Any], lengths: Sequence[int] | None = None, *, first_number: int = 0
) -> list[Row]:
    """Returns the rows of a batch that a collator made.

    Args:
        lengths: the number of tokens of each row in a flattened batch; None makes one row of it.
        first_number: the number of the first row.
    """
    ids, labels = np.asarray(batch["input_ids"].cpu()), np.asarray(batch["labels"].cpu())
    if "cu_seq_lens_q" not in batch:
        mask = batch.get("attention_mask")
        real = np.full(len(ids), ids.shape[1]) if mask is None else np.asarray(mask.sum(dim=1).cpu())
        documents = [(Document(0, int(length)),) if length else () for length in real]
        return [Row(first_number + i, ids[i], labels[i], documents[i]) for i in range(len(ids))]
    bounds = batch["cu_seq_lens_q"].tolist()
    ends = np.cumsum([0, *(lengths or [ids.shape[1]])]).tolist()
    rows = []
    for start, stop in pairwise(ends):
        inner = [start, *(bound for bound in bounds if start < bound < stop), stop]
        documents = tuple(Document(first - start, last - start) for first, last in pairwise(inner))
        rows.append(Row(first_number + len(rows), ids[0, start:stop], labels[0, start:stop], documents))
    return rows


class Vocabulary:
    """The bytes of each token id of a tokenizer, and which ids are control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        decoder = tokenizer.backend_tokenizer.decoder
        self._letters = _byte_letters() if decoder and b'"ByteLevel"' in decoder.__getstate__() else {}
        self._tokenizer = tokenizer
        self._added = {number: token for token, number in tokenizer.get_added_vocab().items()}
        self._known: dict[int, bytes] = {}

    def is_control(self, token_id: int) -> bool:
        """Returns True for an added or special token other than white space, and for an id without one."""
        return bool(self._added.get(token_id, "").strip()) or self.to_bytes(token_id) == b""

    def to_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of a token, possibly part of a character; b"" for an unused id."""
        if token_id not in self._known:
            self._known[token_id] = self._spell(token_id)
        return self._known[token_id]

    def to_groups(self, token_ids: Iterable[int]) -> Iterator[tuple[int, int, str]]:
        """Yields (first token, past the last token, text), joining tokens until they are complete characters.

        Bytes that are no character, such as half of one at a cut, are written as ``\\xe4``.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        start, text, position = 0, "", -1
        for position, token_id in enumerate(token_ids):
            if self.is_control(token_id):
                if start < position:
                    yield start, position, text + decoder.decode(b"", True)
                    decoder.reset()
                yield position, position + 1, self.to_bytes(token_id).decode() or f"<id {token_id}>"
                start, text = position + 1, ""
                continue
            text += decoder.decode(self.to_bytes(token_id))
            if not decoder.getstate()[0]:
                yield start, position + 1, text
                start, text = position + 1, ""
        if start <= position:
            yield start, position + 1, text + decoder.decode(b"", True)

    def _spell(self, token_id: int) -> bytes:
        token = self._added.get(token_id) or self._tokenizer.convert_ids_to_tokens(int(token_id))
        if not isinstance(token, str):
            return b""
        if token_id in self._added:
            return token.encode()
        if self._letters and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's byte fallback
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()


def to_atoms(row: Row, tokens: tuple[int, int], *, vocabulary: Vocabulary) -> Iterator[Atom]:
    """Yields the characters of tokens ``first`` to ``last``: trained, read or mixed, maybe a control."""
    first, last = tokens
    trained = row.trained
    ids = row.input_ids[first:last].tolist()
    for start, stop, text in vocabulary.to_groups(ids):
        part = trained[first + start : first + stop]
        style = "trained" if part.all() else "mixed" if part.any() else "read"
        if vocabulary.is_control(ids[start]):
            style += " control"
        yield text, style


def escape(text: str, also: str = "") -> str:
    """Writes control characters, and those in ``also``, as ``\\x1b`` or ``\\u202e``. Newlines stay."""
    return "".join(
        letter.encode("unicode_escape").decode() if _is_escaped(letter, also) else letter for letter in text
    )


def _is_escaped(letter: str, also: str) -> bool:
    steers = unicodedata.category(letter) in FORMATS_OF_TEXT and letter not in "\n" + JOINERS
    return steers or letter in also


def _byte_letters() -> dict[str, int]:
    """Returns the byte of each letter of byte-level BPE (GPT-2's table: printable bytes are themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
