"""Compares every row with its example, and some rows id for id."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, cast
from zlib import crc32

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import TokenizedRows
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.proof.chats import ChatChecker
from hf_clm.data.proof.documents import DocumentChecker
from hf_clm.data.proof.texts import LABEL_CHECKS, Assembled, Texts
from hf_clm.schema import AnyExample, Chat, Document, Tokens
from hf_clm.text.tokenizer import bos_token

PROVED_PER_SHAPE = 20  # rows of each shape in a block that are proved
PROVED_EVERY = 50  # one in this many of the other rows is proved as well

Finding = tuple[int, str, str, str]  # row, check, expected, got


class Checker:
    """Checks rows against their examples. ``stop_ids`` are the ids at which generation stops."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: LabelOptions, stop_ids: Sequence[int]):
        self.texts = Texts(tokenizer, options, stop_ids)
        self.documents, self.chats = DocumentChecker(self.texts), ChatChecker(self.texts)
        self.starts = bos_token(tokenizer) is not None
        self._counts: dict[object, int] = {}  # number of control tokens by shape

    def check(
        self,
        rows: TokenizedRows,
        examples: Sequence[AnyExample],
        origins: Sequence[int] | None,
        *,
        whole: int,
        proved: list[int],
    ) -> Iterator[Finding]:
        """Yields all findings.

        Args:
            whole: number of rows at the beginning that are all proved (compared id for id); of the other
                rows, some are proved.
            proved: receives the numbers of the proved rows.
        """
        yield from self._check_ids(rows)
        yield from self._check_tokenized(rows, examples)
        assembled = list(self._assemble(rows, examples))
        seen: Counter[object] = Counter()
        for row, texts in zip(assembled, self._decode(assembled), strict=True):
            source = int(rows.sources[row.number])
            example, fate = cast(Any, examples[source]), rows.fates[source]
            origin = None if origins is None else int(origins[source])
            shape = (origin, fate.kind, row.at, _shape(example))
            seen[shape] += 1
            is_usual = isinstance(example, Document) or self._is_usual(shape, row)
            is_sampled = crc32(np.array(row.ids, np.int32).data) % PROVED_EVERY == 0
            is_plain = not self.texts.spelled(example)
            proves = (
                row.number < whole
                or is_sampled
                or not (is_usual and is_plain)
                or seen[shape] <= PROVED_PER_SHAPE
            )
            if isinstance(example, Document):
                findings = self.documents.check(example, row, texts, proves=proves, is_plain=is_plain)
            else:
                findings = self.chats.check(example, row, texts, fate, proves=proves)
            if proves:
                proved.append(row.number)
            yield from ((row.number, *finding) for finding in findings)

    def _check_ids(self, rows: TokenizedRows) -> Iterator[Finding]:
        """Checks what ids and labels alone show, for all rows at once."""
        ids, labels, firsts = rows.input_ids, rows.labels, rows.offsets[:-1]
        wrong = {
            "labels": np.flatnonzero((labels >= 0) & (labels != ids)),
            "first": firsts[labels[firsts] >= 0],
            "padding": np.flatnonzero(ids == self.texts.tokenizer.pad_token_id),
        }
        for check, positions in wrong.items():
            if check == "padding" and self.texts.allows:
                continue
            for at in positions:
                number = int(np.searchsorted(rows.offsets, at, side="right")) - 1
                got = f"id {ids[at]}, label {labels[at]} at position {at - rows.offsets[number]}"
                yield number, check, LABEL_CHECKS[check], got
        if self.starts:
            bos, seconds = self.texts.tokenizer.bos_token_id, np.minimum(firsts + 1, ids.size - 1)
            double = (ids[firsts] == bos) & (ids[seconds] == bos)
            yield from ((int(number), "start", "one start token", "two") for number in np.flatnonzero(double))

    def _check_tokenized(self, rows: TokenizedRows, examples: Sequence[AnyExample]) -> Iterator[Finding]:
        """Checks tokenized records. Cut rows are only checked by ``_check_ids``."""
        for source, group in groupby(range(len(rows)), key=lambda number: int(rows.sources[number])):
            tokens = examples[source]
            if (
                not isinstance(tokens, Tokens)
                or rows.fates[source].kind != "used"
                or self.texts.options.window
            ):
                continue
            is_learned = np.array(tokens.labels) >= 0
            is_learned &= np.array(tokens.mask or [1] * len(is_learned)) == 1
            starts = np.cumsum([0, *tokens.lengths])
            is_learned[starts[:-1]] = False  # nothing precedes the first token of a document
            for number, (start, stop) in zip(group, pairwise(starts.tolist()), strict=False):
                row = rows[number]
                weights = row.get("weights") or [1.0] * (stop - start)
                label_weights = {
                    weight for weight, label in zip(weights, row["labels"], strict=True) if label >= 0
                }
                actual = (row["input_ids"], [label >= 0 for label in row["labels"]])
                if actual != (tokens.input_ids[start:stop], is_learned[start:stop].tolist()):
                    yield number, "tokens", "the ids and labels of the record", "other ones"
                elif any(np.float32(weight) != np.float32(tokens.weight) for weight in label_weights):
                    yield number, "weights", f"{tokens.weight:g}", f"{sorted(label_weights)}"

    def _assemble(self, rows: TokenizedRows, examples: Sequence[AnyExample]) -> Iterator[Assembled]:
        """Yields each row of a text; the pieces of a split document are joined to one."""
        for source, group in groupby(range(len(rows)), key=lambda number: int(rows.sources[number])):
            example, kind, numbers = examples[source], rows.fates[source].kind, list(group)
            if isinstance(example, Tokens):
                continue
            spans = [slice(*rows.offsets[number : number + 2].tolist()) for number in numbers]
            is_text = self.texts.learns_all or (isinstance(example, Document) and example.is_text)
            if kind == "split" and is_text:  # no piece is missing, except for windows of one token
                size, step = self.texts.options.window or (0, -1)
                parts = [spans[0], *(slice(span.start + size - step, span.stop) for span in spans[1:])]
                early = int(rows.input_ids[spans[-1].stop - 1]) not in self.texts.stop_ids
                missing = (False, early)
                yield self._to_assembled(rows, numbers[0], 0, spans=parts, example=example, missing=missing)
                continue
            cuts_left = kind == "cut" and self.texts.options.overflow == "keep_target"
            late = kind == "split" or (cuts_left and isinstance(example, Document))
            early = kind == "split" or (kind == "cut" and not cuts_left)
            for at, (number, span) in enumerate(zip(numbers, spans, strict=True)):
                yield self._to_assembled(
                    rows, number, at, spans=[span], example=example, missing=(late, early)
                )

    def _to_assembled(
        self,
        rows: TokenizedRows,
        number: int,
        at: int,
        *,
        spans: list[slice],
        example: AnyExample,
        missing: tuple[bool, bool],
    ) -> Assembled:
        ids = np.concatenate([rows.input_ids[span] for span in spans])
        weights = np.concatenate([rows.labels[span] >= 0 for span in spans]).astype(np.float32)
        if rows.weights is not None:
            weights *= np.concatenate([rows.weights[span] for span in spans])
        size, step = self.texts.options.window or (0, -1)
        if size == step:  # windows do not overlap, so the first token of each has no label
            starts = np.cumsum([span.stop - span.start for span in spans[:-1]], dtype=np.int64)
            weights[starts] = weights[starts + 1]
        if isinstance(example, Document) and self.starts and ids[0] == self.texts.tokenizer.bos_token_id:
            ids, weights = ids[1:], weights[1:]
        elif len(ids) > 1 and self._begins_learned(example, late=missing[0]):
            weights[0] = weights[1]  # the first token never has a label
        borders = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(ids)]
        stretches = [(a, b, float(weights[a])) for a, b in pairwise(borders)]
        return Assembled(number, at, ids.tolist(), self.texts.count_controls(ids), stretches, *missing)

    def _begins_learned(self, example: AnyExample, *, late: bool) -> bool:
        """Whether the first token of a row belongs to a target; not known for pieces, which return False."""
        if isinstance(example, Chat):
            return self.texts.learns_all
        if late or not isinstance(example, Document):
            return False
        first = next((segment for segment in example.segments if segment.text), None)
        if first is None or not (first.is_target or self.texts.learns_all):
            return False
        return self.documents.expected(example)[0][1] > 0

    def _decode(self, rows: Sequence[Assembled]) -> list[list[str]]:
        """Decodes each span of the rows; if decoding drops a leading space, from the growth of the text."""
        if self.texts.marks_start:
            ends = [row.ids[:b] for row in rows for _, b, _ in row.stretches]
            texts = iter(self.texts.backend.decode_batch(ends, skip_special_tokens=False))
            prefixes = [["", *(next(texts) for _ in row.stretches)] for row in rows]
            return [[after[len(before) :] for before, after in pairwise(row)] for row in prefixes]
        ids = [row.ids[a:b] for row in rows for a, b, _ in row.stretches]
        texts = iter(self.texts.backend.decode_batch(ids, skip_special_tokens=False))
        return [[next(texts) for _ in row.stretches] for row in rows]

    def _is_usual(self, shape: object, row: Assembled) -> bool:
        """Whether a row has as many control tokens as the first row of its shape."""
        return self._counts.setdefault(shape, row.controls) == row.controls


def _shape(example: Chat | Document) -> tuple[object, ...]:
    """Returns the shape of an example; rows of one shape are rendered by the same lines of a template."""
    if isinstance(example, Document):
        return tuple(segment.is_target for segment in example.segments)
    turns = (
        (turn["role"], "reasoning" in turn, len(turn.get("tool_calls", ())), "weight" in turn)
        for turn in example.messages
    )
    return (len(example.tools), bool(example.template_kwargs), *turns)
