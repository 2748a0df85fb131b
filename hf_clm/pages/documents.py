"""What the example of a document adds to its tokens: its place, its roles, what was cut, what is wrong.

The tokens and labels that are shown come from the batch, never from here. A run writes its first documents
as JSON lines for its report.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, RowPiece
from hf_clm.data.label.datasets import label_options
from hf_clm.data.label.labels import encode_plans, tokens_to_rows
from hf_clm.data.label.render import Renderer, RowPlan
from hf_clm.data.prepared.store import HEAD
from hf_clm.data.split import Split
from hf_clm.pages.rows import FLAGS, Document, Row, Vocabulary, escape, to_atoms, to_rows
from hf_clm.recipe.recipe import Recipe
from hf_clm.run_folder import write_text
from hf_clm.schema import IGNORE_INDEX, AnyExample, Chat, TokenizedExample, Tokens
from hf_clm.schema import Document as DocumentExample
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.encode import MARK_END, MARK_START, Piece
from hf_clm.text.tokenizer import control_pattern

CACHED_EXAMPLES = 64  # rows of a stream contain many pieces of one example
EXCERPT_DOCUMENTS, EXCERPT_TOKENS = 5, 400  # that a run writes for its report, and tokens of each
LONGEST = 50_000  # tokens; a complete book would have to be tokenized again

Collator = Callable[[list[Any]], Mapping[str, Any]]
Turn = tuple[int, str]  # first token (or character), role


def inspect_rows(split: Split, reader: "Reader", *, collate: Collator, batch_size: int) -> Iterator[Row]:
    """Yields every row that training takes from ``split``, in order, from batches made by its collator."""
    dataset = split.dataset
    for first in range(0, len(dataset), batch_size):
        numbers = range(first, min(first + batch_size, len(dataset)))
        batch = collate([dataset[i] for i in numbers])
        pieces = [pieces_of(split, i) for i in numbers]
        lengths = [sum(stop - start for _, start, stop in row) for row in pieces]
        for row, its in zip(to_rows(batch, lengths, first_number=first), pieces, strict=True):
            yield reader.annotate(row, its)


def write_excerpt(path: Path, reader: "Reader", *, collate: Collator) -> None:
    """Writes a line for each of the first documents of the reader's split, whether it is packed or not."""
    rows = islice(_first_rows(reader, collate=collate), EXCERPT_DOCUMENTS)
    entries = to_entries(rows, reader.vocabulary)
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def to_entries(rows: Iterable[Row], vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """Yields the place, counts, flags and turns of each document: [[role, [[style, text], ...]], ...]."""
    for row, document in ((one, document) for one in rows for document in one.documents):
        stop = min(document.stop, document.start + EXCERPT_TOKENS)
        turns = []
        for start, end, role in document.turns(stop):
            atoms = to_atoms(row, (start, end), vocabulary=vocabulary)
            runs = groupby(atoms, key=lambda atom: atom[1])
            turns.append([role, [[style, escape("".join(text for text, _ in run))] for style, run in runs]])
        yield {
            "place": document.place,
            "tokens": document.stop - document.start,
            "targets": int(row.trained[document.start : document.stop].sum()),
            "shown": stop - document.start,
            "flags": dict(document.flags),
            "turns": turns,
        }


@dataclass(frozen=True)
class _Whole:
    """A row before it was cut: its tokens, its turns by token, and the flags found in its text."""

    place: str
    is_chat: bool
    ids: np.ndarray
    is_target: np.ndarray
    turns: list[Turn]
    flags: dict[str, str]


class Reader:
    """Reads the examples of a split. Remembers the documents it has seen, to find duplicates."""

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerFast, *, recipe: Recipe):
        self.split, self.tokenizer, self.recipe = split, tokenizer, recipe
        self.vocabulary = Vocabulary(tokenizer)
        self.stop_ids = stop_token_ids(tokenizer)
        self.renderer = Renderer(tokenizer, label_options(recipe))
        self._places: dict[bytes, str] = {}
        self._whole = lru_cache(maxsize=CACHED_EXAMPLES)(self._load_whole)

    def annotate(self, row: Row, pieces: Sequence[RowPiece]) -> Row:
        """Returns the row with the facts of its documents; ``pieces`` are what was packed into it."""
        documents = zip(row.documents, pieces, strict=True)
        return replace(row, documents=tuple(self._examine(row, *document) for document in documents))

    def _examine(self, row: Row, document: Document, piece: RowPiece) -> Document:
        number, start, _ = piece
        source = int(self.split.rows.rows.sources[number])
        fate = self.split.rows.rows.fates[source]
        whole = self._whole(source, number - self._first_row(source))
        before = self._offset(number, whole=whole) + start
        after = max(0, len(whole.ids) - before - (document.stop - document.start))
        found = replace(document, place=whole.place, before=before, after=after)
        flags = dict(self._token_flags(row, found, whole=whole)) | whole.flags
        if fate.kind == "cut":
            lost = whole.is_target[len(whole.ids) - after :].sum()
            if lost:
                flags["cut answer"] = f"{lost:,} of {whole.is_target.sum():,} target tokens are gone"
            if before or "left out" in fate.reason:
                flags["cut prompt"] = fate.reason or f"the first {before:,} tokens are gone"
        flags = {name: flags[name] for name in FLAGS if name in flags}
        return replace(found, flags=flags, roles=tuple(_roles(found, whole.turns)))

    def _token_flags(self, row: Row, document: Document, *, whole: _Whole) -> Iterator[tuple[str, str]]:
        """Yields the flags that follow from the tokens in the batch alone."""
        tokens = slice(document.start, document.stop)
        ids, trained = row.input_ids[tokens], row.trained[tokens]
        if not trained.any():
            yield "nothing trained", ""
        ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
        if (
            document.after and whole.is_target[-document.after :].any()
        ):  # the last target continues in another row
            ends = ends[ends < len(ids) - 1] if whole.is_chat else ends[:0]
        ends = ends if whole.is_chat else ends[-1:]
        if unstopped := [end for end in ends if ids[end] not in self.stop_ids]:
            yield "lost stop token", f"the target that ends at token {unstopped[0]} of the document"
        earlier = self._places.setdefault(ids.tobytes(), document.place)
        if earlier is not document.place:
            yield "duplicate", f"of {earlier}"

    def _load_whole(self, source: int, sibling: int) -> _Whole:
        """Returns the row of an example before it was cut; the ``sibling``-th if each turn has a row."""
        examples, rows = self.split.examples, self.split.rows.rows
        example, fate = examples.examples[source], rows.fates[source]
        is_chat, pieces = isinstance(example, Chat), self._plan(example, sibling)
        # A chat that was cut by turns lacks only earlier turns, or turns that do not fit at all.
        is_whole = fate.kind == "used" or (is_chat and fate.kind == "cut" and "left out" in fate.reason)
        row = rows[self._first_row(source) + sibling] if is_whole else self._encode(example, pieces)
        ids, is_target = np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORE_INDEX
        turns, flags = [], {}
        if not isinstance(example, Tokens):
            spelled = [self.vocabulary.to_bytes(token_id) for token_id in ids.tolist()]
            turns = find_turns(example, pieces, self.tokenizer, spelled=spelled)
            if controls := self.renderer.control_texts(example):
                flags["control text"] = ", ".join(map(repr, dict.fromkeys(controls)))
        return _Whole(examples.places[source], is_chat, ids, is_target, turns, flags)

    def _plan(self, example: AnyExample, sibling: int) -> list[Piece]:
        """Returns the pieces of a row; those of a long chat are the pieces of all its turns."""
        if isinstance(example, Tokens):
            return []
        plan = self.renderer.plan(example)
        rows = plan.rows if sibling < len(plan.rows) else plan.apart or plan.rows[-1:]
        return rows[min(sibling, len(rows) - 1)]

    def _encode(self, example: AnyExample, pieces: list[Piece]) -> TokenizedExample:
        """Tokenizes a row as in the split, without cutting or splitting it."""
        if isinstance(example, Tokens):
            return tokens_to_rows(example, self.tokenizer)[0]
        return encode_plans([RowPlan([pieces])], self.renderer.encoder)[0][0]

    def _first_row(self, source: int) -> int:
        return int(np.searchsorted(self.split.rows.rows.sources, source))

    def _offset(self, number: int, *, whole: _Whole) -> int:
        """Returns the token of the complete example at which a tokenized row begins."""
        data, rows = self.recipe.data, self.split.rows.rows
        source, ids = int(rows.sources[number]), np.asarray(rows[number]["input_ids"])
        kind = rows.fates[source].kind
        if kind == "cut" and len(whole.ids) > len(ids) and not np.array_equal(whole.ids[: len(ids)], ids):
            return len(whole.ids) - len(ids)
        if kind != "split":
            return 0
        stride = data.window.step if data.window else data.max_length - 1
        sibling = number - self._first_row(source)
        starts = range(sibling * stride, len(whole.ids), stride)  # pieces without a target were left out
        return next((i for i in starts if np.array_equal(whole.ids[i : i + len(ids)], ids)), 0)


def find_turns(
    example: AnyExample,
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerFast,
    *,
    spelled: Sequence[bytes],
) -> list[Turn]:
    """Returns the turns of a row: first token and role. A document has a prompt and a completion.

    Args:
        spelled: the bytes of each token of the row. If they do not add up to its text, because the tokenizer
            changes case for example, no turns are returned.
    """
    # Without the marks around control tokens in the text of a user.
    texts = [(piece.text.replace(MARK_START, "").replace(MARK_END, ""), piece.weight > 0) for piece in pieces]
    text, starts = "".join(text for text, _ in texts), []
    if isinstance(example, Chat):
        starts = list(_turn_starts(example, text, tokenizer=tokenizer))
    elif isinstance(example, DocumentExample):
        kinds = [is_target for text, is_target in texts if text]
        if kinds == sorted(kinds) and len(set(kinds)) == 2:
            prompt = sum(len(text) for text, is_target in texts if not is_target)
            starts = [(0, "prompt"), (prompt, "completion")]
    whole = b"".join(spelled)
    if text.encode() != whole:
        text = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does
    if text.encode() != whole:
        return []
    ends = np.cumsum([0, *map(len, spelled)])
    return [(int(np.searchsorted(ends, len(text[:start].encode()))), role) for start, role in starts]


def _turn_starts(chat: Chat, text: str, *, tokenizer: PreTrainedTokenizerFast) -> Iterator[Turn]:
    """Yields (first character, role). A turn begins after the last one, or after text of the template."""
    contents = list(_find_contents(chat, text))
    control = control_pattern(tokenizer).pattern
    tail = re.compile(rf"\s*({control})?\s*")
    ends = [tail.match(text, stop) for _, stop, _ in contents]
    closing = "|".join({re.escape(end[1]) for end in ends if end and end[1]}) or "(?!)"
    turn_end, before = 0, ""
    for (start, _, role), end in zip(contents, ends, strict=True):
        inserted = re.match(rf".*(?:{closing})\s*", text[turn_end:start], re.DOTALL)
        if inserted and before != "tool call":  # what follows the name belongs to the call
            yield turn_end, "template"
        yield turn_end + (inserted.end() if inserted else 0), role
        turn_end, before = (end.end() if end else turn_end), role


def _find_contents(chat: Chat, text: str) -> Iterator[tuple[int, int, str]]:
    """Yields [start, stop) and role of the content of each message, as far as the template kept it."""
    at = 0
    for message in chat.messages:
        calls = [str(call["function"]["name"]) for call in message.get("tool_calls", [])]
        parts = [(message.get("reasoning", ""), "reasoning"), (message.get("content", ""), message["role"])]
        for part, role in [*parts, *((name, "tool call") for name in calls)]:
            start = text.find(part.strip(), at) if part.strip() else -1
            if start >= 0:
                at = start + len(part.strip())
                yield start, at, role


def pieces_of(split: Split, number: int) -> list[RowPiece]:
    """Returns the pieces of tokenized rows in a training row, whether it is packed or not."""
    if isinstance(split.dataset, PackedDataset | DrawnDataset):
        return split.dataset.pieces[number]
    return [(number, 0, int(split.rows.lengths[number]))]


def _roles(document: Document, turns: list[Turn]) -> Iterator[Turn]:
    """Yields the turns by token of the row; the turn that a document begins in starts at its first token."""
    length = document.stop - document.start
    inside = [(start - document.before, role) for start, role in turns]
    for (start, role), (stop, _) in pairwise([*inside, (length, "")]):
        if max(start, 0) < min(stop, length):
            yield document.start + max(0, start), role


def _first_rows(reader: Reader, *, collate: Collator) -> Iterator[Row]:
    """Yields rows of the examples stored with a prepared set; all others would have to be read again."""
    dataset, rows = reader.split.rows, reader.split.rows.rows
    for number, source in enumerate(rows.sources[:HEAD].tolist()):
        if source < HEAD and rows.fates[source].tokens <= LONGEST:
            length = int(rows.lengths[number])
            (row,) = to_rows(collate([dataset[number]]), [length], first_number=number)
            yield reader.annotate(row, [(number, 0, length)])
