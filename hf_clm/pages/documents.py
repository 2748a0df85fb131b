"""What a document's example tells of it: its place, who speaks, what was cut, what is wrong.

Nothing here decides what is shown as a token or as trained: that comes from the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, Piece
from hf_clm.data.label.datasets import label_options
from hf_clm.data.label.labels import Fate, encode_plans, tokens_to_rows
from hf_clm.data.label.render import Plan, Renderer
from hf_clm.data.split import Split
from hf_clm.pages.roles import Spelling, Turn, find_turns, spell_pieces
from hf_clm.pages.rows import FLAGS, Document, Row, Vocabulary, to_rows
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import IGNORE_INDEX, AnyExample, Chat, TokenizedExample, Tokens
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.encode import Piece as TextPiece

REACH = 64  # characters on either side of a border that can matter to a token across it
CACHED_EXAMPLES = 64  # a stream's rows hold many pieces of one example

Collator = Callable[[list[Any]], Mapping[str, Any]]


def inspect_rows(split: Split, reader: "Reader", *, collate: Collator, batch_size: int) -> Iterator[Row]:
    """Every row that training takes from ``split``, in order, out of batches made by its collator."""
    dataset = split.dataset
    for first in range(0, len(dataset), batch_size):
        numbers = range(first, min(first + batch_size, len(dataset)))
        batch = collate([dataset[i] for i in numbers])
        pieces = [_pieces(split, i) for i in numbers]
        lengths = [sum(stop - start for _, start, stop in row) for row in pieces]
        for row, its in zip(to_rows(batch, lengths, first_number=first), pieces, strict=True):
            yield reader.annotate(row, its)


def merged_borders(spelling: Spelling, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokens that would span a border between read-only text and a target, were both tokenized as one."""
    merged = []
    for (left, _), (right, _) in pairwise(spelling):
        head = left[-REACH:]
        text = head + right[:REACH]
        end = 0
        for _, stop in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets:
            if end < len(head) < stop:  # from `end`: some tokenizers leave a leading space out of the offsets
                merged.append(text[end:stop])
            end = max(end, stop)
    return merged


@dataclass(frozen=True)
class _Whole:
    """A row before it was cut: its tokens, its turns by token, and the flags that its text shows."""

    place: str
    is_chat: bool
    ids: np.ndarray
    is_target: np.ndarray
    turns: list[Turn]
    flags: dict[str, str]


class Reader:
    """Knows the examples of a split. Keeps which documents it has seen, to find duplicates."""

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerFast, *, recipe: Recipe):
        self.split, self.tokenizer, self.recipe = split, tokenizer, recipe
        self.vocabulary = Vocabulary(tokenizer)
        self.stop_ids = stop_token_ids(tokenizer)
        options = label_options(recipe)
        self.renderer = Renderer(tokenizer, options)
        self._places: dict[bytes, str] = {}
        self._whole = lru_cache(maxsize=CACHED_EXAMPLES)(self._load_whole)

    def annotate(self, row: Row, pieces: Sequence[Piece]) -> Row:
        """The row with what is known of its documents; ``pieces`` says what was packed into it."""
        starts = np.cumsum([0, *(stop - start for _, start, stop in pieces)])
        numbers = [
            int(np.searchsorted(starts, document.start, side="right")) - 1 for document in row.documents
        ]
        documents = [
            self._examine(row, document, piece=pieces[number])
            for document, number in zip(row.documents, numbers, strict=True)
        ]
        return replace(row, documents=tuple(documents))

    def _examine(self, row: Row, document: Document, *, piece: Piece) -> Document:
        number, start, _ = piece
        source = int(self.split.rows.rows.sources[number])
        fate = self.split.rows.rows.fates[source]
        whole = self._whole(source, number - self._first_row(source))
        before = self._offset(number, whole=whole) + start
        after = max(0, len(whole.ids) - before - (document.stop - document.start))
        found = replace(document, place=whole.place, before=before, after=after)
        flags = dict(self._token_flags(row, found, whole=whole))
        if fate.kind == "cut":
            flags |= dict(_cut_flags(found, whole, reason=fate.reason))
        flags |= whole.flags
        flags = {name: flags[name] for name in FLAGS if name in flags}
        return replace(found, flags=flags, roles=tuple(_roles(found, whole.turns)))

    def _token_flags(self, row: Row, document: Document, *, whole: _Whole) -> Iterator[tuple[str, str]]:
        """The flags that the tokens in the batch show by themselves."""
        tokens = slice(document.start, document.stop)
        ids, trained = row.input_ids[tokens], row.trained[tokens]
        if not trained.any():
            yield "nothing trained", ""
        ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
        if document.after and whole.is_target[-document.after :].any():  # the last target goes on elsewhere
            ends = ends[ends < len(ids) - 1] if whole.is_chat else ends[:0]
        ends = ends if whole.is_chat else ends[-1:]
        if unstopped := [end for end in ends if ids[end] not in self.stop_ids]:
            yield "lost stop token", f"the target that ends at token {unstopped[0]} of the document"
        earlier = self._places.setdefault(ids.tobytes(), document.place)
        if earlier is not document.place:
            yield "duplicate", f"of {earlier}"

    def _load_whole(self, source: int, sibling: int) -> _Whole:
        """The row of an example before it was cut; of a chat with a row for each turn the ``sibling``-th."""
        examples, rows = self.split.examples, self.split.rows.rows
        place, example, fate = examples.places[source], examples.examples[source], rows.fates[source]
        pieces = self._plan(example, sibling)
        is_whole = fate.kind == "used" or _is_cut_by_turns(example, fate)
        row = rows[self._first_row(source) + sibling] if is_whole else self._encode(example, pieces)
        ids, is_target = np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORE_INDEX
        if isinstance(example, Tokens):
            return _Whole(place, False, ids, is_target, [], {})
        spelled = [self.vocabulary.to_bytes(token_id) for token_id in ids.tolist()]
        turns = find_turns(example, pieces, self.tokenizer, spelled=spelled)
        flags = {}
        if controls := self.renderer.control_texts(example):
            flags["control text"] = ", ".join(map(repr, dict.fromkeys(controls)))
        if merged := merged_borders(spell_pieces(pieces), self.tokenizer):
            flags["merged border"] = ", ".join(map(repr, merged))
        return _Whole(place, isinstance(example, Chat), ids, is_target, turns, flags)

    def _plan(self, example: AnyExample, sibling: int) -> list[TextPiece]:
        """The pieces of a row; a long chat's are those of all its turns."""
        if isinstance(example, Tokens):
            return []
        plan = self.renderer.plan(example)
        rows = plan.rows if sibling < len(plan.rows) else plan.apart or plan.rows[-1:]
        return rows[min(sibling, len(rows) - 1)]

    def _encode(self, example: AnyExample, pieces: list[TextPiece]) -> TokenizedExample:
        """A row tokenized as in the split, with nothing cut off or split."""
        if isinstance(example, Tokens):
            return tokens_to_rows(example, self.tokenizer)[0]
        return encode_plans([Plan([pieces])], self.renderer.encoder)[0][0]

    def _first_row(self, source: int) -> int:
        return int(np.searchsorted(self.split.rows.rows.sources, source))

    def _offset(self, number: int, *, whole: _Whole) -> int:
        """The token of the whole example at which a tokenized row begins."""
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


def _pieces(split: Split, number: int) -> list[Piece]:
    if isinstance(split.dataset, PackedDataset | DrawnDataset):
        return split.dataset.pieces[number]
    return [(number, 0, int(split.rows.lengths[number]))]


def _is_cut_by_turns(example: AnyExample, fate: Fate) -> bool:
    """Whether the row is complete but for earlier turns, or turns of which none fits."""
    return isinstance(example, Chat) and fate.kind == "cut" and "left out" in fate.reason


def _cut_flags(document: Document, whole: _Whole, *, reason: str) -> Iterator[tuple[str, str]]:
    lost = whole.is_target[len(whole.ids) - document.after :].sum()
    if lost:
        yield "cut answer", f"{lost:,} of {whole.is_target.sum():,} target tokens are gone"
    if document.before or "left out" in reason:
        yield "cut prompt", reason or f"the first {document.before:,} tokens are gone"


def _roles(document: Document, turns: list[Turn]) -> Iterator[Turn]:
    """The turns by token of the row; who spoke at the document's first token speaks from there on."""
    length = document.stop - document.start
    inside = [(start - document.before, role) for start, role in turns]
    for (start, role), (stop, _) in pairwise([*inside, (length, "")]):
        if max(start, 0) < min(stop, length):
            yield document.start + max(0, start), role
