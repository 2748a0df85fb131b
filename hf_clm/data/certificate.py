"""The label certificate: an independent path proves every row before it is trained on.

The labels are made by ``chat_template.py``, ``segments.py`` and ``labels.py``. Nothing of that is used here:
the texts come from the examples and from the tokenizer's own ``apply_chat_template``, and are compared with
the decoded ids.

    example ---- segments ---- ids, labels ---- decode ----+
       |                                                   = ?
       +---- text to read, text to learn, stop token ------+
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise, zip_longest
from typing import Any
from zlib import crc32

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.arrays import release
from hf_clm.data.datasets import TokenizedRows, rare_collection
from hf_clm.data.expected import LabelOptions, Run, expected_runs
from hf_clm.data.spelling import spelled_by_template, spelled_by_user, writes_end
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, Example, TokenizedExample
from hf_clm.tokenizer import bos_token, control_pattern, control_tokens

BATCH_ROWS = 1000  # decoded in one call
SHOWN = 3  # failures in an error
KEPT = 100  # failures in the certificate
ENCODED_WHOLE = 2000  # a set of up to so many rows is also encoded again, whole; a larger one by a share
ENCODED_SHARE = 50  # one in 50
HASHED_ITEMS = 1 << 20  # at once
HALF_LETTER = "\ufffd"  # what is left of a letter whose bytes a cut has parted

Part = tuple[int, int, bool]  # first token, past the last token, and whether they are learned
Finding = tuple[int, str, str, str]  # row, check, expected, got
AnyExample = Example | TokenizedExample


@dataclass(frozen=True)
class Failure:
    """One row that is not what its example says. ``check`` is a key of ``CHECKS``."""

    row: int
    place: str
    check: str
    expected: str
    got: str


CHECKS = {
    "labels": "a label is the id at its place",
    "first": "the first token of a row, which nothing precedes, has no label",
    "targets": "the learned tokens decode to the target text and its stop token",
    "prompt": "the tokens before a target are those of the prompt",
    "stop": "a whole target ends in a token that generation stops at, and a cut one does not",
    "control": "no control token comes from the text",
    "start": "no row begins with two start tokens",
    "rendered": "the template renders every message",
    "padding": "no pad token stands among the tokens",
}


@dataclass
class Certificate:
    """What was proved of a tokenized set; ``content_hash`` as in ``hash_content``."""

    rows: int
    content_hash: str
    seconds: float = 0.0
    encoded_again: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        return not self.failed

    def require(self) -> None:
        """Raises DataError, with the first rows that fail and why, unless every row was proved."""
        if self.is_valid:
            return
        listed = [
            f"{f.place}: {CHECKS[f.check]}: expected {f.expected}, got {f.got}" for f in self.failures[:SHOWN]
        ]
        counts = ", ".join(f"{count:,} {name}" for name, count in self.failed.most_common())
        raise DataError(
            f"the labels are not certified ({counts} of {self.rows:,} rows)",
            where=self.failures[0].place,
            got="; ".join(listed),
            fix="mend these rows or the chat template; `hf-clm inspect` shows them",
        )

    def enter(self, failure: Failure) -> None:
        """Counts a failure; the first ones are kept."""
        self.failed[failure.check] += 1
        if len(self.failures) < KEPT:
            self.failures.append(failure)

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return {"valid": self.is_valid, **asdict(self), "failed": dict(self.failed)}


def certify(
    rows: TokenizedRows,
    examples: Sequence[AnyExample],
    *,
    tokenizer: PreTrainedTokenizerFast,
    options: LabelOptions,
    places: Sequence[str] | None = None,
) -> Certificate:
    """Checks every row against its example. ``places`` names the examples ("poems.jsonl:17")."""
    every = 1 if len(rows) <= ENCODED_WHOLE else ENCODED_SHARE
    settings: dict[str, Any] = {"tokenizer": tokenizer, "options": options}
    certificate, _ = certify_rows(rows, examples, places=places, every=every, **settings)
    certificate.content_hash = hash_content(rows, **settings)
    return certificate


@rare_collection()
def certify_rows(
    rows: TokenizedRows,
    examples: Sequence[AnyExample],
    *,
    tokenizer: PreTrainedTokenizerFast,
    options: LabelOptions,
    places: Sequence[str] | None,
    every: int,
) -> tuple[Certificate, list[int]]:
    """The same without the hash, of all rows or a block; and the numbers of the rows encoded again."""
    started = time.monotonic()
    certificate = Certificate(len(rows), "")
    checker = TextChecker(rows, examples, tokenizer=tokenizer, options=options, every=every)
    for number, *found in chain(check_ids(rows, tokenizer, options=options), checker.check_all()):
        source = int(rows.sources[number])
        place = places[source] if places is not None else f"example {source}"
        certificate.enter(Failure(number, place, *found))
    certificate.encoded_again = len(checker.encoded_again)
    certificate.seconds = time.monotonic() - started
    return certificate, checker.encoded_again


def check_ids(
    rows: TokenizedRows, tokenizer: PreTrainedTokenizerFast, *, options: LabelOptions
) -> Iterator[Finding]:
    """What can be told from ids and labels alone, over the whole set at once."""
    ids, labels, firsts = rows.input_ids, rows.labels, rows.offsets[:-1]
    wrong = {
        "labels": np.flatnonzero((labels >= 0) & (labels != ids)),
        "first": firsts[labels[firsts] >= 0],
        "padding": np.flatnonzero(ids == tokenizer.pad_token_id),
    }
    for check, positions in wrong.items():
        if check == "padding" and options.special_tokens_in_text == "allow":
            continue
        for at in positions:
            number = int(np.searchsorted(rows.offsets, at, side="right")) - 1
            got = f"id {ids[at]}, label {labels[at]} at position {at - rows.offsets[number]}"
            yield number, check, CHECKS[check], got
    if bos_token(tokenizer):
        seconds = np.minimum(firsts + 1, ids.size - 1)
        double = (ids[firsts] == tokenizer.bos_token_id) & (ids[seconds] == tokenizer.bos_token_id)
        yield from ((int(number), "start", "one start token", "two") for number in np.flatnonzero(double))


def hash_content(rows: TokenizedRows, *, tokenizer: PreTrainedTokenizerFast, options: LabelOptions) -> str:
    """sha256 over ids, labels and borders, the tokenizer, its template and the label options."""
    content = hashlib.sha256()
    for array in (rows.input_ids, rows.labels, rows.offsets):
        for first in range(0, len(array), HASHED_ITEMS):
            content.update(np.ascontiguousarray(array[first : first + HASHED_ITEMS]).data)
            release(array)
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), repr(options))
    content.update("\0".join(texts).encode())
    return content.hexdigest()


class TextChecker:
    """Decodes the rows and compares them with the texts of their examples.

    One row in ``every`` is also encoded again; which, its ids tell, so that it depends on no other row. The
    numbers of those that were are in ``encoded_again``.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        examples: Sequence[AnyExample],
        *,
        tokenizer: PreTrainedTokenizerFast,
        options: LabelOptions,
        every: int,
    ):
        self.rows, self.examples, self.tokenizer, self.options = rows, examples, tokenizer, options
        self.backend = tokenizer.backend_tokenizer
        self.pattern, self.control_texts = control_pattern(tokenizer), tuple(control_tokens(tokenizer))
        own = tokenizer.get_added_vocab()
        is_control = np.isin(rows.input_ids, np.array([own[token] for token in control_tokens(tokenizer)]))
        self.controls = np.add.reduceat(is_control, rows.offsets[:-1], dtype=np.int64)
        self.every, self.encoded_again = every, []
        start = self.backend.encode(" a", add_special_tokens=False).ids
        self.strips_space = self.backend.decode(start) != " a"  # as SentencePiece does

    def check_all(self) -> Iterator[Finding]:
        """All rows that come from an example, in batches."""
        for start in range(0, len(self.rows), BATCH_ROWS):
            numbers = range(start, min(start + BATCH_ROWS, len(self.rows)))
            written = [n for n in numbers if not isinstance(self.examples[int(self.rows.sources[n])], dict)]
            expected = [self._expected(number) for number in written]
            parts = [self._parts(number, runs) for number, runs in zip(written, expected, strict=True)]
            ids = [self.rows.input_ids[a:b].tolist() for row in parts for a, b, _ in row]
            texts = iter(self.backend.decode_batch(ids, skip_special_tokens=False))
            for number, runs, row in zip(written, expected, parts, strict=True):
                decoded = [(next(texts), learned) for _, _, learned in row]
                yield from self._check_row(number, runs, parts=row, decoded=decoded)

    def _expected(self, number: int) -> list[Run]:
        example: Any = self.examples[int(self.rows.sources[number])]
        return expected_runs(example, self.tokenizer, options=self.options)

    def _parts(self, number: int, expected: list[Run]) -> list[Part]:
        """The stretches of a row with and without labels; the first token goes with the text it is of."""
        start, stop = int(self.rows.offsets[number]), int(self.rows.offsets[number + 1])
        learned = self.rows.labels[start:stop] >= 0
        fate = self.rows.fates[int(self.rows.sources[number])].kind
        if learned.size > 1 and not self._keeps_targets(fate):  # that cut leaves a token of the prompt
            learned[0] = expected[0][1] if fate == "used" else learned[1]
        borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), learned.size]
        return [(start + a, start + b, bool(learned[a])) for a, b in pairwise(borders)]

    def _check_row(
        self, number: int, expected: list[Run], *, parts: list[Part], decoded: list[Run]
    ) -> Iterator[Finding]:
        yield from self._check_rendered(number, expected)
        fate = self.rows.fates[int(self.rows.sources[number])].kind
        pairs = self._pairs(expected, decoded, fate=fate)
        if any(want != got for want, got in pairs) and self.backend.normalizer:
            normal = [(self.backend.normalizer.normalize_str(text), learned) for text, learned in expected]
            pairs = self._pairs(normal, decoded, fate=fate)
        for want, got in pairs:
            if want != got and not (self.strips_space and self._squeeze(want) == self._squeeze(got)):
                yield number, "targets" if want[1] else "prompt", repr(want[0][-60:]), repr(got[0][-60:])
                return
        if fate == "used" or self._keeps_targets(fate):
            yield from self._check_stops(number, expected, parts=parts)
        if fate == "used":
            yield from self._check_control(number, expected, parts=parts)

    def _keeps_targets(self, fate: str) -> bool:
        return fate == "cut" and self.options.overflow == "keep_target"

    def _pairs(self, expected: list[Run], decoded: list[Run], *, fate: str) -> list[tuple[Run, Run]]:
        """What must be equal: all of a whole row; all targets where the prompt was cut; else some text."""
        nothing = ("", False)
        if fate == "used":
            return list(zip_longest(expected, decoded, fillvalue=nothing))
        first = decoded[0][0].strip(HALF_LETTER)
        if self._keeps_targets(fate):
            is_end = not decoded[0][1] and expected[0][0].endswith(first)
            kept = (first, False) if is_end else expected[0]
            rest = [(first, decoded[0][1]), *decoded[1:]]
            return list(zip_longest([kept, *expected[1:]], rest, fillvalue=nothing))
        # a stop token that was not there, or one in the middle, is no piece of the text
        whole, found = ("".join(text for text, _ in runs).strip(HALF_LETTER) for runs in (expected, decoded))
        return [((found if found in whole else "a part of the text", True), (found, True))]

    def _squeeze(self, run: Run) -> Run:
        """Without the space that SentencePiece puts before a text, or behind its start token."""
        bos = bos_token(self.tokenizer) or ""
        return run[0].removeprefix(bos).lstrip(" "), run[1]

    def _check_rendered(self, number: int, expected: list[Run]) -> Iterator[Finding]:
        """A template may drop a message in silence; the text of each must stand in the conversation."""
        example: Any = self.examples[int(self.rows.sources[number])]
        messages = example.messages if isinstance(example, ChatExample) else []
        whole = "".join(text for text, _ in expected)
        for content, times in Counter(turn["content"].strip() for turn in messages).items():
            if whole.count(content) < times:
                found = f"{whole.count(content)} of {times} in the rendered conversation"
                yield number, "rendered", f"the message {content[:60]!r}", found
                return

    def _check_stops(self, number: int, expected: list[Run], *, parts: list[Part]) -> Iterator[Finding]:
        """A learned stretch whose text ends in a control token ends in one that generation stops at."""
        ends = [b for _, b, learned in parts if learned]
        targets = [text for text, learned in expected if learned]
        for text, end in zip(targets, ends, strict=False):
            last = int(self.rows.input_ids[end - 1])
            closed = text.endswith(self.control_texts)
            if closed and len(targets) == len(ends) and last not in self.options.stop_ids:
                stops = self.tokenizer.convert_ids_to_tokens(list(self.options.stop_ids))
                yield number, "stop", f"one of {stops}", repr(self.tokenizer.convert_ids_to_tokens(last))

    def _check_control(self, number: int, expected: list[Run], *, parts: list[Part]) -> Iterator[Finding]:
        """Counts the control tokens and, for a share of the rows, encodes the texts again."""
        example: Any = self.examples[int(self.rows.sources[number])]
        own, found = self._own_controls(example, expected), int(self.controls[number])
        if found != own:
            yield number, "control", f"{own} control tokens", str(found)
        elif self._is_chosen(number) and self._encodes_alike(example, expected):
            self.encoded_again.append(number)
            again = self.backend.encode_batch([text for text, _ in expected], add_special_tokens=False)
            for (a, b, learned), (text, _), encoding in zip(parts, expected, again, strict=True):
                if encoding.ids != self.rows.input_ids[a:b].tolist():
                    yield (
                        number,
                        "targets" if learned else "prompt",
                        f"the ids of {text[-40:]!r}",
                        "other ids",
                    )

    def _is_chosen(self, number: int) -> bool:
        ids = self.rows.input_ids[self.rows.offsets[number] : self.rows.offsets[number + 1]]
        return self.every == 1 or crc32(ids.data) % self.every == 0

    def _own_controls(self, example: Example, expected: list[Run]) -> int:
        """The control tokens that are not the user's: of the template, or the start token and the stop."""
        if self.options.special_tokens_in_text == "allow":
            return sum(len(self.pattern.findall(text)) for text, _ in expected)
        if isinstance(example, ChatExample):
            found = sum(len(self.pattern.findall(text)) for text, _ in expected)
            return found - len(spelled_by_user(example, self.pattern))
        own = spelled_by_template(example, self.pattern)
        stop = expected[-1][1] and not writes_end(example, str(self.tokenizer.eos_token))
        return (bos_token(self.tokenizer) is not None) + stop + len(own)

    def _encodes_alike(self, example: Example, expected: list[Run]) -> bool:
        """Whether the plain text of each run must give its ids: not where a part of it is kept apart."""
        is_apart = self.strips_space or _has_unlearned(example, expected)
        return not is_apart and not spelled_by_user(example, self.pattern)


def _has_unlearned(example: Example, expected: list[Run]) -> bool:
    """True for a chat with assistant turns that are only read: they are tokenized apart, as in generation."""
    turns = isinstance(example, ChatExample) and sum(turn["role"] == "assistant" for turn in example.messages)
    return bool(turns) and turns != sum(learned for _, learned in expected)
