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

from hf_clm.chat_template import stop_token_ids
from hf_clm.config import Recipe
from hf_clm.data.build import Split
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.data.mixing import DrawnDataset
from hf_clm.data.packing import PackedDataset, Piece
from hf_clm.data.segments import control_texts, to_document
from hf_clm.errors import ModelError
from hf_clm.inspector.roles import Spelling, Turn, spell_example
from hf_clm.inspector.rows import FLAGS, Document, Row, Vocabulary, to_rows
from hf_clm.schema import IGNORE_INDEX, ChatExample, Example, TokenizedExample

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
    """An example in full: its tokens, its turns by token, and the flags that its text shows."""

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
        self.stop_ids = _stop_ids(tokenizer)
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
        whole = self._whole(source)
        before = self._offset(number, whole=whole) + start
        after = max(0, len(whole.ids) - before - (document.stop - document.start))
        found = replace(document, place=whole.place, before=before, after=after)
        flags = dict(self._token_flags(row, found, whole=whole))
        if self.split.rows.rows.fates[source].kind == "cut":
            flags |= dict(_cut_flags(found, whole))
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

    def _load_whole(self, source: int) -> _Whole:
        examples, rows = self.split.examples, self.split.rows.rows
        if rows.fates[source].kind == "used":
            tokens = rows[self._first_row(source)]
        else:
            tokens = self._tokenize(examples.examples[source])
        ids, is_target = np.asarray(tokens["input_ids"]), np.asarray(tokens["labels"]) != IGNORE_INDEX
        place, example = examples.places[source], examples.examples[source]
        if isinstance(example, dict):
            return _Whole(place, False, ids, is_target, [], {})
        learns_all = self.recipe.stage == "pretrain"
        example = to_document(example) if learns_all else example
        spelling, turns = spell_example(
            example,
            self.tokenizer,
            train_on="everything" if learns_all else self.recipe.data.train_on,
            spelled=[self.vocabulary.to_bytes(token_id) for token_id in ids.tolist()],
        )
        flags = {}
        if controls := control_texts(example, self.tokenizer):
            flags["control text"] = ", ".join(map(repr, dict.fromkeys(controls)))
        if merged := merged_borders(spelling, self.tokenizer):
            flags["merged border"] = ", ".join(map(repr, merged))
        return _Whole(place, isinstance(example, ChatExample), ids, is_target, turns, flags)

    def _first_row(self, source: int) -> int:
        return int(np.searchsorted(self.split.rows.rows.sources, source))

    def _tokenize(self, example: Example | TokenizedExample) -> TokenizedExample:
        """The example tokenized as in the split, with nothing cut off or split."""
        data = self.recipe.data
        options: dict[str, Any] = {"special_tokens_in_text": data.special_tokens_in_text}
        if self.recipe.stage == "pretrain":
            return PretrainDataset([example], self.tokenizer, **options)[0]
        return SFTDataset([example], self.tokenizer, train_on=data.train_on, **options)[0]

    def _offset(self, number: int, *, whole: _Whole) -> int:
        """The token of the whole example at which a tokenized row begins."""
        data, rows = self.recipe.data, self.split.rows.rows
        source, ids = int(rows.sources[number]), np.asarray(rows[number]["input_ids"])
        kind = rows.fates[source].kind
        if kind == "cut" and self.recipe.resolved_overflow == "keep_target":
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


def _stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where generation stops; the end token alone where the chat template cannot be read."""
    try:
        return stop_token_ids(tokenizer)
    except ModelError:
        assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer refuses one without"
        return [tokenizer.eos_token_id]


def _cut_flags(document: Document, whole: _Whole) -> Iterator[tuple[str, str]]:
    lost = whole.is_target[len(whole.ids) - document.after :].sum()
    if lost:
        yield "cut answer", f"{lost:,} of {whole.is_target.sum():,} target tokens are gone"
    if document.before:
        yield "cut prompt", f"the first {document.before:,} tokens are gone"


def _roles(document: Document, turns: list[Turn]) -> Iterator[Turn]:
    """The turns by token of the row; who spoke at the document's first token speaks from there on."""
    length = document.stop - document.start
    inside = [(start - document.before, role) for start, role in turns]
    for (start, role), (stop, _) in pairwise([*inside, (length, "")]):
        if max(start, 0) < min(stop, length):
            yield document.start + max(0, start), role
