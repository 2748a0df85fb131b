"""Checks the rows of documents: texts, weights, control tokens and ids."""

from collections.abc import Iterator
from itertools import groupby, zip_longest
from typing import Any, cast

import numpy as np

from hf_clm.data.proof.texts import HALF_LETTER, Assembled, Failed, Run, Stretch, Texts, tokens_of
from hf_clm.schema import Document, whole_text


class DocumentChecker:
    """Compares rows with the texts of their documents."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def check(
        self, document: Document, row: Assembled, texts: list[str], *, proves: bool, is_plain: bool
    ) -> Iterator[Failed]:
        """Yields the failures of a document's row, whose spans decode to ``texts``."""
        expected = self.expected(document)
        weights = [weight for _, _, weight in row.stretches]
        runs = list(zip(texts, weights, strict=True))
        if not self._matches(expected, runs, row, proves=proves and is_plain):
            yield _difference(expected, runs)
            return
        controls = self._expected_controls(
            document, row, is_closed=expected[-1][1] > 0 and not row.ends_early
        )
        if controls is not None and controls != row.controls:
            yield "control", f"{controls} control tokens", str(row.controls)
        if not row.ends_early and weights[-1] and row.ids[-1] not in self.texts.stop_ids:
            yield self.texts.no_stop(row.ids[-1])

    def expected(self, document: Document) -> list[Run]:
        """Returns the texts of a document in order, joined where adjacent weights are equal."""
        segments = [segment for segment in document.segments if segment.text]
        weights = [segment.weight or float(self.texts.learns_all) for segment in segments]
        if self.texts.options.train_on.turns == "last" and 0 in weights:
            last = len(weights) - weights[::-1].index(0)
            weights = [weight if at >= last else 0.0 for at, weight in enumerate(weights)]
        runs = [(segment.text, weight) for segment, weight in zip(segments, weights, strict=True)]
        if runs and runs[-1][1]:
            runs[-1] = (self._closed(segments[-1].text, is_own=segments[-1].is_own), runs[-1][1])
        kinds = groupby(runs, key=lambda run: run[1])
        return [("".join(text for text, _ in group), weight * document.weight) for weight, group in kinds]

    def _closed(self, text: str, *, is_own: bool) -> str:
        """Adds the end token to a last target, unless the text or a template already has it."""
        eos, stripped = self.texts.eos, text.rstrip()
        if is_own:
            return text if text.endswith(eos) else text + eos
        return stripped if stripped.endswith(eos) and stripped != eos else text + eos

    def _matches(self, expected: list[Run], runs: list[Run], row: Assembled, *, proves: bool) -> bool:
        """Whether a row has the expected texts or, if it was cut, a part of them."""
        readings = [(runs, row.stretches)]
        if row.starts_late and len(runs) > 1 and row.stretches[0][1] == 1:
            # its first token belongs to a target, but has no label
            joined = (0, row.stretches[1][1], row.stretches[1][2])
            text = self.texts.backend.decode(row.ids[: joined[1]], skip_special_tokens=False)
            readings.append(([(text, joined[2]), *runs[2:]], [joined, *row.stretches[2:]]))
        for actual, stretches in readings:
            for first in range(len(expected) - len(actual) + 1):
                last = first + len(actual)
                if (first and not row.starts_late) or (last < len(expected) and not row.ends_early):
                    continue
                part = expected[first:last]
                if _same_weights(part, actual) and self._matches_part(
                    part, actual, stretches, row, proves=proves
                ):
                    return True
        return False

    def _matches_part(
        self,
        part: list[Run],
        actual: list[Run],
        stretches: list[Stretch],
        row: Assembled,
        *,
        proves: bool,
    ) -> bool:
        """Whether the texts or their ids are equal; only equal ids prove the row."""
        normalized = [(self.texts.normalized(text), weight) for text, weight in part]
        is_same = _fits(part, actual, row) or _fits(normalized, actual, row)
        if (is_same and not proves) or (row.starts_late and row.ends_early):
            return is_same
        texts = [text for text, _ in part]
        ids = cast(Any, self.texts.tokenizer(texts, add_special_tokens=False)["input_ids"])
        spans = [row.ids[a:b] for a, b, _ in stretches]
        if self.texts.marks_start and not row.starts_late:  # only the first span starts a text
            rest = is_same or _fits(part[1:], actual[1:], row)
            return rest and _fits_ids(ids[:1], spans[:1], row, is_all=len(spans) == 1)
        if self.texts.marks_start:
            return is_same
        return _fits_ids(ids, spans, row, is_all=True)

    def _expected_controls(self, document: Document, row: Assembled, *, is_closed: bool) -> int | None:
        """Returns the number of control tokens in a row: the end, the template's, and the model's tokens.

        Returns None for a cut row with control tokens in its text, since some of them may have been cut.
        """
        texts, pattern = self.texts, self.texts.pattern
        tokens = tokens_of(document, pattern) if pattern.search(whole_text(document)) else []
        if not tokens and not (row.starts_late and row.ends_early):
            return int(is_closed)
        last = document.segments[-1]
        if row.starts_late or row.ends_early:
            return None if tokens or (row.starts_late and row.ends_early) else int(is_closed)
        ours = sum(texts.allows or own or texts.may_write(token, weight) for token, weight, own in tokens)
        closed = self._closed(last.text, is_own=last.is_own)
        adds_end = is_closed and len(pattern.findall(closed)) > len(pattern.findall(last.text))
        ends_by_hand = is_closed and not adds_end and not last.is_own and not texts.allows
        return ours + adds_end + ends_by_hand


def _fits(part: list[Run], actual: list[Run], row: Assembled) -> bool:
    """Whether decoded texts are the expected ones; the first and the last may be cut."""
    texts = [text for text, _ in actual]
    if row.starts_late or row.ends_early:
        texts = [text.strip(HALF_LETTER) for text in texts]
    for number, ((want, _), got) in enumerate(zip(part, texts, strict=True)):
        late = row.starts_late and number == 0
        early = row.ends_early and number == len(texts) - 1
        is_same = want == got or (late and want.endswith(got)) or (early and want.startswith(got))
        if not is_same and not (late and early and got in want):
            return False
    return True


def _fits_ids(expected: list[list[int]], actual: list[list[int]], row: Assembled, *, is_all: bool) -> bool:
    """Whether ids are the expected ones; the first and the last stretch may be cut."""
    for number, (want, got) in enumerate(zip(expected, actual, strict=True)):
        late = row.starts_late and number == 0
        early = row.ends_early and is_all and number == len(actual) - 1
        same = want == got or (late and want[-len(got) :] == got) or (early and want[: len(got)] == got)
        if not same and not (late and early):
            return False
    return True


def _same_weights(expected: list[Run], actual: list[Run]) -> bool:
    return [np.float32(weight) for _, weight in expected] == [np.float32(weight) for _, weight in actual]


def _difference(expected: list[Run], actual: list[Run]) -> Failed:
    """Returns the check that failed and the first texts that differ."""
    for want, got in zip_longest(expected, actual, fillvalue=("", 0.0)):
        kind = "targets" if want[1] else "prompt"
        if want[0] != got[0]:
            return kind, repr(want[0][-60:]), repr(got[0][-60:])
        if np.float32(want[1]) != np.float32(got[1]):
            return "weights" if want[1] and got[1] else kind, f"weight {want[1]:g}", f"{got[1]:g}"
    return "prompt", "the ids of its text", "other ids"
