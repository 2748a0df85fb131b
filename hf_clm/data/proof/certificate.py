"""The label certificate: an independent path proves every row before it is trained on.

The labels are made by ``text/`` and ``data/label/``. Nothing of that is used here: texts come from the
examples and from transformers' own ``apply_chat_template``, ids from the tokenizer's own call.

    example ---- pieces ---- ids, labels ---- decode ----+
       |                                                 = ?
       +---- apply_chat_template, tokenizer(text) -------+

Every row is decoded and compared with the texts of its example. Rows are sorted by shape (source, roles,
tools, reasoning, cut or whole): the first ones of each shape in a block and a share of all are also compared
id for id with the prompts that generation is given.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise, product, zip_longest
from typing import Any, NamedTuple, cast
from zlib import crc32

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from hf_clm.data.arrays import release
from hf_clm.data.label.datasets import TokenizedRows, rare_collection
from hf_clm.data.label.labels import Fate
from hf_clm.data.label.render import APART, LabelOptions
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample, Chat, Document, Tokens, short_call_id, whole_text
from hf_clm.tokenizer import bos_token, control_pattern, control_tokens, special_tokens

SHOWN = 3  # failures in an error
KEPT = 100  # failures in the certificate
PROVED_WHOLE = 2000  # every row is proved of a set of up to this many
PROVED_OF_SHAPE = 20  # rows of each shape in a block that are proved
PROVED_SHARE = 50  # and one row in this many
HASHED_ITEMS = 1 << 20  # at once
HALF_LETTER = "\ufffd"  # what is left of a letter whose bytes a cut has parted

Run = tuple[str, float]  # a text, and the weight of its loss; 0: it is only read
Stretch = tuple[int, int, float]  # first token, past the last token, and the weight of their loss
Failed = tuple[str, str, str]  # check, expected, got
Finding = tuple[int, str, str, str]  # row, check, expected, got


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
    "prompt": "the tokens before a target are those of the prompt that generation is given",
    "stop": "a whole target ends in a token that generation stops at, and a cut one does not",
    "control": "no control token comes from the text",
    "start": "no row begins with two start tokens",
    "weights": "the weight of each label is that of its turn or segment",
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
            fix="correct these rows or the chat template; `hf-clm inspect` shows them",
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
    stop_ids: Sequence[int],
    places: Sequence[str] | None = None,
) -> Certificate:
    """Checks every row against its example. ``places`` names the examples ("poems.jsonl:17")."""
    checker = Checker(tokenizer, options, stop_ids)
    proves_all = len(rows) <= PROVED_WHOLE
    certificate, _ = certify_rows(rows, examples, checker=checker, places=places, proves_all=proves_all)
    certificate.content_hash = hash_content(rows, tokenizer=tokenizer, options=options)
    return certificate


@rare_collection()
def certify_rows(
    rows: TokenizedRows,
    examples: Sequence[AnyExample],
    *,
    checker: "Checker",
    places: Sequence[str] | None,
    origins: Sequence[int] | None = None,
    proves_all: bool = False,
) -> tuple[Certificate, list[int]]:
    """The same without the hash, of all rows or a block; and the numbers of the rows that were proved."""
    started = time.monotonic()
    certificate, proved = Certificate(len(rows), ""), []
    for number, *found in checker.check(rows, examples, origins, proves_all=proves_all, proved=proved):
        source = int(rows.sources[number])
        place = places[source] if places is not None else f"example {source}"
        certificate.enter(Failure(number, place, *found))
    certificate.encoded_again = len(proved)
    certificate.seconds = time.monotonic() - started
    return certificate, proved


def hash_content(rows: TokenizedRows, *, tokenizer: PreTrainedTokenizerFast, options: LabelOptions) -> str:
    """sha256 over ids, labels, borders and weights, the tokenizer, its template and the label options."""
    content = hashlib.sha256()
    for array in (
        rows.input_ids,
        rows.labels,
        rows.offsets,
        *([] if rows.weights is None else [rows.weights]),
    ):
        for first in range(0, len(array), HASHED_ITEMS):
            content.update(np.ascontiguousarray(array[first : first + HASHED_ITEMS]).data)
            release(array)
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), repr(options))
    content.update("\0".join(texts).encode())
    return content.hexdigest()


@dataclass(frozen=True)
class Assembled:
    """A row, or the pieces of a split text put together again, without a document's start token.

    at: the row's number among those of its example.
    starts_late, ends_early: whether tokens of the example are missing before or after it.
    """

    number: int
    at: int
    ids: list[int]
    controls: int  # control tokens among the ids
    stretches: list[Stretch]
    starts_late: bool = False
    ends_early: bool = False

    @property
    def targets(self) -> list[int]:
        """The stretches that are learned, by number."""
        return [number for number, stretch in enumerate(self.stretches) if stretch[2]]


class Spelling(NamedTuple):
    """What OpenAI's format leaves open, and templates expect one way or the other."""

    in_content: bool
    parts: bool
    arguments_as_text: bool
    empty_content: bool
    short_ids: bool


class Checker:
    """Compares rows with their examples. ``stop_ids`` are those of the generation config."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: LabelOptions, stop_ids: Sequence[int]):
        self.tokenizer, self.options, self.stop_ids = tokenizer, options, set(stop_ids)
        self.backend = tokenizer.backend_tokenizer
        self.eos, self.starts = str(tokenizer.eos_token), bos_token(tokenizer) is not None
        self.pattern, self.special = control_pattern(tokenizer), set(special_tokens(tokenizer))
        vocabulary = tokenizer.get_added_vocab()
        self.control_ids = np.array([vocabulary[token] for token in control_tokens(tokenizer)])
        line, alone, inside = self.tokenizer(["\n", "a", "\na"], add_special_tokens=False)["input_ids"]
        self.marks_start = inside[len(line) :] != alone  # as SentencePiece does, with a space
        flags = [token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()]
        self.swallows = self.marks_start or any(flags)
        self.allows = options.special_tokens_in_text == "allow"
        self.learns_all = options.stage == "pretrain" or options.train_on.turns == "everything"
        self._counts: dict[object, int] = {}  # of control tokens, in the rows of a shape

    def check(
        self,
        rows: TokenizedRows,
        examples: Sequence[AnyExample],
        origins: Sequence[int] | None,
        *,
        proves_all: bool,
        proved: list[int],
    ) -> Iterator[Finding]:
        """All findings; the numbers of the rows that were compared id for id are added to ``proved``."""
        yield from self._check_ids(rows)
        self.is_control = np.zeros(int(rows.input_ids.max(initial=0)) + 1, dtype=bool)
        self.is_control[self.control_ids[self.control_ids < len(self.is_control)]] = True
        assembled = list(self._assemble(rows, examples))
        seen: Counter[object] = Counter()
        for row, texts in zip(assembled, self._decode(assembled), strict=True):
            source = int(rows.sources[row.number])
            example, fate = cast(Any, examples[source]), rows.fates[source]
            origin = None if origins is None else int(origins[source])
            shape = (origin, fate.kind, row.at, _shape(example))
            seen[shape] += 1
            is_usual = isinstance(example, Document) or self._usual(shape, row)
            is_chosen = crc32(np.array(row.ids, np.int32).data) % PROVED_SHARE == 0
            is_plain = not self._spelled(example)
            proves = proves_all or is_chosen or not (is_usual and is_plain) or seen[shape] <= PROVED_OF_SHAPE
            if isinstance(example, Document):
                findings = self._check_document(example, row, texts, proves=proves, is_plain=is_plain)
            else:
                findings = self._check_chat(example, row, texts, fate, proves=proves)
            if proves:
                proved.append(row.number)
            yield from ((row.number, *finding) for finding in findings)

    def _check_ids(self, rows: TokenizedRows) -> Iterator[Finding]:
        """What can be told from ids and labels alone, over the whole set at once."""
        ids, labels, firsts = rows.input_ids, rows.labels, rows.offsets[:-1]
        wrong = {
            "labels": np.flatnonzero((labels >= 0) & (labels != ids)),
            "first": firsts[labels[firsts] >= 0],
            "padding": np.flatnonzero(ids == self.tokenizer.pad_token_id),
        }
        for check, positions in wrong.items():
            if check == "padding" and self.allows:
                continue
            for at in positions:
                number = int(np.searchsorted(rows.offsets, at, side="right")) - 1
                got = f"id {ids[at]}, label {labels[at]} at position {at - rows.offsets[number]}"
                yield number, check, CHECKS[check], got
        if self.starts:
            bos, seconds = self.tokenizer.bos_token_id, np.minimum(firsts + 1, ids.size - 1)
            double = (ids[firsts] == bos) & (ids[seconds] == bos)
            yield from ((int(number), "start", "one start token", "two") for number in np.flatnonzero(double))

    def _assemble(self, rows: TokenizedRows, examples: Sequence[AnyExample]) -> Iterator[Assembled]:
        """Each row that comes from a text; of a text that is learned whole all pieces as one."""
        for source, group in groupby(range(len(rows)), key=lambda number: int(rows.sources[number])):
            example, kind, numbers = examples[source], rows.fates[source].kind, list(group)
            if isinstance(example, Tokens):
                continue
            spans = [slice(*rows.offsets[number : number + 2].tolist()) for number in numbers]
            is_text = self.learns_all or (isinstance(example, Document) and example.is_text)
            if kind == "split" and is_text:  # no piece of it was left out, but for a window of one token
                size, step = self.options.window or (0, -1)
                parts = [spans[0], *(slice(span.start + size - step, span.stop) for span in spans[1:])]
                early = int(rows.input_ids[spans[-1].stop - 1]) not in self.stop_ids
                missing = (False, early)
                yield self._to_assembled(rows, numbers[0], 0, spans=parts, example=example, missing=missing)
                continue
            cuts_left = kind == "cut" and self.options.overflow == "keep_target"
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
        if self.options.window and self.options.window[0] == self.options.window[1]:
            # windows side by side share no token: the first of each has no label, whatever text it is of
            starts = np.cumsum([span.stop - span.start for span in spans[:-1]], dtype=np.int64)
            weights[starts] = weights[starts + 1]
        if isinstance(example, Document) and self.starts and ids[0] == self.tokenizer.bos_token_id:
            ids, weights = ids[1:], weights[1:]
        elif len(ids) > 1 and self._begins_learned(example, late=missing[0]):
            weights[0] = weights[1]  # the first token has no label, whatever text it is of
        borders = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(ids)]
        stretches = [(a, b, float(weights[a])) for a, b in pairwise(borders)]
        controls = int(self.is_control[ids].sum())
        return Assembled(number, at, ids.tolist(), controls, stretches, *missing)

    def _begins_learned(self, example: AnyExample, *, late: bool) -> bool:
        """Whether the first token of a row is of a text that is learned. Of a piece that is not known."""
        if isinstance(example, Chat):
            return self.learns_all
        if late or not isinstance(example, Document):
            return False
        first = next((segment for segment in example.segments if segment.text), None)
        return (
            first is not None and (first.is_target or self.learns_all) and self._expected(example)[0][1] > 0
        )

    def _decode(self, rows: Sequence[Assembled]) -> list[list[str]]:
        """The text of each stretch of the rows. Where decoding drops a first space: what each adds."""
        if self.marks_start:
            ends = [row.ids[:b] for row in rows for _, b, _ in row.stretches]
            texts = iter(self.backend.decode_batch(ends, skip_special_tokens=False))
            grown = [["", *(next(texts) for _ in row.stretches)] for row in rows]
            return [[after[len(before) :] for before, after in pairwise(row)] for row in grown]
        ids = [row.ids[a:b] for row in rows for a, b, _ in row.stretches]
        texts = iter(self.backend.decode_batch(ids, skip_special_tokens=False))
        return [[next(texts) for _ in row.stretches] for row in rows]

    def _spelled(self, example: Chat | Document) -> list[str]:
        """The control tokens that the text of a record spells and that must not be tokens."""
        if self.allows or not self.pattern.search(whole_text(example)):
            return []
        if isinstance(example, Document):
            tokens = _tokens_of(example, self.pattern)
            return [token for token, weight, own in tokens if not (own or self._may_write(token, weight))]
        found = []
        for message in example.messages:
            weight = float(message["role"] == "assistant")
            texts = "\n".join(Chat([message]).texts)
            found += [t for t in self.pattern.findall(texts) if t in self.special or not weight]
        return found

    def _usual(self, shape: object, row: Assembled) -> bool:
        """Whether a row holds as many control tokens as the first of its shape."""
        return self._counts.setdefault(shape, row.controls) == row.controls

    def _may_write(self, token: str, weight: float) -> bool:
        """Whether a control token in learned text is one that the model itself writes."""
        return token not in self.special and (weight > 0 or self.learns_all)

    # --- documents

    def _expected(self, document: Document) -> list[Run]:
        """The texts of a document in order; neighbours of one weight are one text."""
        segments = [segment for segment in document.segments if segment.text]
        weights = [segment.weight or float(self.learns_all) for segment in segments]
        if self.options.train_on.turns == "last" and 0 in weights:
            last = len(weights) - weights[::-1].index(0)
            weights = [weight if at >= last else 0.0 for at, weight in enumerate(weights)]
        runs = [(segment.text, weight) for segment, weight in zip(segments, weights, strict=True)]
        if runs and runs[-1][1]:
            runs[-1] = (self._closed(segments[-1].text, is_own=segments[-1].is_own), runs[-1][1])
        kinds = groupby(runs, key=lambda run: run[1])
        return [("".join(text for text, _ in group), weight) for weight, group in kinds]

    def _closed(self, text: str, *, is_own: bool) -> str:
        """A last target with its end token: once, where the text or a template has written it already."""
        written = text.rstrip()
        if is_own:
            return text if text.endswith(self.eos) else text + self.eos
        return written if written.endswith(self.eos) and written != self.eos else text + self.eos

    def _check_document(
        self, document: Document, row: Assembled, texts: list[str], *, proves: bool, is_plain: bool
    ) -> Iterator[Failed]:
        expected = self._expected(document)
        weights = [weight for _, _, weight in row.stretches]
        runs = list(zip(texts, weights, strict=True))
        if not self._is_told(expected, runs, row, proves=proves and is_plain):
            yield _difference(expected, runs)
            return
        own = self._own_controls(document, row, is_closed=expected[-1][1] > 0 and not row.ends_early)
        if own is not None and own != row.controls:
            yield "control", f"{own} control tokens", str(row.controls)
        if not row.ends_early and weights[-1] and row.ids[-1] not in self.stop_ids:
            yield self._no_stop(row.ids[-1])

    def _is_told(self, expected: list[Run], runs: list[Run], row: Assembled, *, proves: bool) -> bool:
        """Whether a row says the expected texts, or a stretch of them where it was cut."""
        readings = [(runs, row.stretches)]
        if row.starts_late and len(runs) > 1 and row.stretches[0][1] == 1:
            joined = (
                0,
                row.stretches[1][1],
                row.stretches[1][2],
            )  # its first token is of a target, unlabelled
            text = self.backend.decode(row.ids[: joined[1]], skip_special_tokens=False)
            readings.append(([(text, joined[2]), *runs[2:]], [joined, *row.stretches[2:]]))
        for told, stretches in readings:
            for first in range(len(expected) - len(told) + 1):
                last = first + len(told)
                if (first and not row.starts_late) or (last < len(expected) and not row.ends_early):
                    continue
                part = expected[first:last]
                if _same_weights(part, told) and self._says_it(part, told, stretches, row, proves=proves):
                    return True
        return False

    def _says_it(
        self,
        part: list[Run],
        told: list[Run],
        stretches: list[Stretch],
        row: Assembled,
        *,
        proves: bool,
    ) -> bool:
        """Whether texts, or else their ids, are the same; only ids prove it."""
        is_same = _fits(part, told, row) or _fits(
            [(self._normalized(text), weight) for text, weight in part], told, row
        )
        if (is_same and not proves) or (row.starts_late and row.ends_early):
            return is_same
        ids = cast(Any, self.tokenizer([text for text, _ in part], add_special_tokens=False)["input_ids"])
        found = [row.ids[a:b] for a, b, _ in stretches]
        if self.marks_start and not row.starts_late:  # only the start of a text is encoded as such
            rest = is_same or _fits(part[1:], told[1:], row)
            return rest and _fits_ids(ids[:1], found[:1], row, is_all=len(found) == 1)
        if self.marks_start:
            return is_same
        return _fits_ids(ids, found, row, is_all=True)

    def _own_controls(self, document: Document, row: Assembled, *, is_closed: bool) -> int | None:
        """The control tokens that a row must hold: its end, those of a template, those the model writes.

        None for a cut row whose text spells some: which of them are left is not told here.
        """
        tokens = _tokens_of(document, self.pattern) if self.pattern.search(whole_text(document)) else []
        if not tokens and not (row.starts_late and row.ends_early):
            return int(is_closed)
        last = document.segments[-1]
        if row.starts_late or row.ends_early:
            return None if tokens or (row.starts_late and row.ends_early) else int(is_closed)
        ours = sum(self.allows or own or self._may_write(token, weight) for token, weight, own in tokens)
        closed = self._closed(last.text, is_own=last.is_own)
        adds_end = is_closed and len(self.pattern.findall(closed)) > len(self.pattern.findall(last.text))
        ends_by_hand = is_closed and not adds_end and not last.is_own and not self.allows
        return ours + adds_end + ends_by_hand

    # --- chats

    def _check_chat(
        self, chat: Chat, row: Assembled, texts: list[str], fate: Fate, *, proves: bool
    ) -> Iterator[Failed]:
        if self.learns_all:
            if not self._is_whole(chat, "".join(texts), row, proves=proves):
                yield "targets", "the conversation as the template writes it", repr(texts[-1][-60:])
            yield from self._check_masked(chat, row, texts)
            return
        chosen = self._chosen(chat, row, texts, fate)
        if len(chosen) != len(row.targets):
            learned = f"{len(self._learned(chat))} learned turns"
            yield "targets", learned, f"{len(row.targets)}, the last {texts[-1][-60:]!r}"
            return
        earlier = [number for number in self._learned(chat) if number < min(chosen, default=0)]
        after = -1 if APART in fate.reason else max(earlier, default=-1)
        for message, at in zip(chosen, row.targets, strict=True):
            start, stop, weight = row.stretches[at]
            is_cut = (row.starts_late and start <= 1) or (row.ends_early and stop == len(row.ids))
            expected = chat.messages[message].get("weight", 1.0)
            if not is_cut and not self._says(chat, message, texts[at]):
                yield "targets", f"message {message + 1}", repr(texts[at][-60:])
            elif not is_cut and row.ids[stop - 1] not in self.stop_ids:
                yield self._no_stop(row.ids[stop - 1])
            elif np.float32(expected) != np.float32(weight):
                yield "weights", f"{expected:g}", f"{weight:g}"
            elif proves and not (row.starts_late and start <= 1):
                yield from self._prove_turn(chat, message, row, at, told=texts[at], after=after)

    def _check_masked(self, chat: Chat, row: Assembled, texts: list[str]) -> Iterator[Failed]:
        """Where all of a chat is learned but for turns of weight 0: that nothing else is masked."""
        masked = [
            number
            for number, message in enumerate(chat.messages)
            if self.options.stage == "sft" and message.get("weight") == 0
        ]
        found = [text for text, stretch in zip(texts, row.stretches, strict=True) if not stretch[2]]
        is_right = len(found) == len(masked) or row.starts_late or row.ends_early
        if not is_right or not all(map(self._says, [chat] * len(masked), masked, found)):
            yield "targets", f"{len(masked)} masked turns", f"{len(found)}"

    def _chosen(self, chat: Chat, row: Assembled, texts: list[str], fate: Fate) -> list[int]:
        """The messages that the targets of a row are of."""
        learned, count = self._learned(chat), len(row.targets)
        if row.starts_late:  # a piece of a split chat: whichever turns say it
            said = [[n for n in learned if self._says(chat, n, texts[at])] for at in row.targets]
            return [numbers[0] if numbers else learned[0] for numbers in said]
        if APART not in fate.reason:
            return learned[:count] if row.ends_early else learned[-count:] if fate.kind == "cut" else learned
        if fate.kind == "used":
            return learned[row.at : row.at + 1]
        at = row.targets[0] if row.targets else 0
        return [n for n in learned if self._says(chat, n, texts[at])][:1]

    def _learned(self, chat: Chat) -> list[int]:
        """The numbers of the messages that are learned."""
        turns = [n for n, message in enumerate(chat.messages) if n and message["role"] == "assistant"]
        turns = turns[-1:] if self.options.train_on.turns == "last" else turns
        return [number for number in turns if chat.messages[number].get("weight", 1.0) > 0]

    def _says(self, chat: Chat, number: int, text: str) -> bool:
        """Whether a decoded target says what its message does: reasoning, content and calls."""
        message = self._without_end(chat.messages[number])
        parts = [message.get("content", "").rpartition("</think>")[2]]
        if self.options.train_on.reasoning and self.options.reasoning != "drop":
            parts.append(message.get("reasoning", ""))
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            values = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            strings = [value for value in values.values() if isinstance(value, str)]
            parts += [call["function"]["name"], *strings]
        told = _squeezed(self._normalized(text)).replace("\\", "")  # a quote that a template has escaped
        forms = [(part, json.dumps(part), json.dumps(part, ensure_ascii=False)) for part in parts]
        return all(any(self._bare(form) in told for form in known) for known in forms)

    def _bare(self, text: str) -> str:
        return _squeezed(self._normalized(text.strip().strip('"'))).replace("\\", "")

    def _prove_turn(
        self, chat: Chat, number: int, row: Assembled, at: int, *, told: str, after: int
    ) -> Iterator[Failed]:
        """Whether transformers itself gives the ids before a target as its prompt, and the target's text.

        Of a chat that was cut, for the turns that are left: it begins at a user's after message ``after``.
        """
        target = row.stretches[at]
        systems = next((n for n, m in enumerate(chat.messages) if m["role"] != "system"), 0)
        users = [n for n in range(systems + 1, number) if chat.messages[n]["role"] == "user" and n > after]
        for first in (systems, *users):
            messages = [*chat.messages[:systems], *chat.messages[first : number + 1]]
            for shown in _alternatives(list(map(self._without_end, messages))):
                prompt = self._apply(chat, shown[:-1], add_generation_prompt=True)
                before = Chat(messages[:-1], chat.tools)
                if prompt is None or not self._is_prompt(before, prompt, row, target[0]):
                    continue
                full = self._apply(chat, shown, add_generation_prompt=False) or ""
                is_cut = row.ends_early and target[1] == len(row.ids)
                if full.startswith(prompt) and not is_cut and not self._is_rest(full[len(prompt) :], told):
                    yield "targets", repr(full[len(prompt) :][-60:]), repr(told[-60:])
                yield from self._check_controls(Chat(messages[-1:]), told, row.ids[target[0] : target[1]])
                return
        yield "prompt", f"what generation is given for message {number + 1}", repr(told[:60])

    def _is_prompt(self, chat: Chat, text: str, row: Assembled, start: int) -> bool:
        before = row.ids[:start]
        if self._spelled(chat):  # its control tokens are spelled out, and transformers would not do that
            decoded = self.backend.decode(before, skip_special_tokens=False)
            told, asked = self._loosened(decoded), self._loosened(self._normalized(text))
            is_same = told == asked or (not self.options.train_on.reasoning and told.startswith(asked))
            return is_same and not any(self._check_controls(chat, decoded, before))
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if row.starts_late:
            return ids[-len(before) :] == before
        # where reasoning is only read, it follows the prompt
        return before == ids or (not self.options.train_on.reasoning and before[: len(ids)] == ids)

    def _check_controls(self, chat: Chat, text: str, ids: list[int]) -> Iterator[Failed]:
        """Of the control tokens in a text, those that a record spelled are no tokens."""
        own = len(self.pattern.findall(text)) - len(self._spelled(chat))
        found = int(self.is_control[ids].sum())
        if found != own:
            yield "control", f"{own} control tokens", str(found)

    def _is_rest(self, rest: str, told: str) -> bool:
        """Whether a target is what the template writes after the prompt, up to the turn's last token."""
        rest, told = self._loosened(self._normalized(rest)), self._loosened(told)
        if not self.options.train_on.reasoning:  # it begins after what is only read
            return told in rest or told.removesuffix(self.eos) in rest
        return rest.startswith(told) or rest.rstrip() == told.removesuffix(self.eos)

    def _loosened(self, text: str) -> str:
        """Without white space, where decoding does not give all of it back."""
        return _squeezed(text) if self.swallows else text

    def _is_whole(self, chat: Chat, text: str, row: Assembled, *, proves: bool) -> bool:
        """Whether a conversation that is learned whole is what the template writes."""
        told = _squeezed(text.strip(HALF_LETTER))
        for shown in _alternatives(list(map(self._without_end, chat.messages))) if proves else ():
            whole = _squeezed(self._normalized(self._apply(chat, shown, add_generation_prompt=False) or ""))
            if told == whole or (row.ends_early and whole.startswith(told)):
                return True
            if row.starts_late and told in whole:
                return True
        return not proves

    def _apply(self, chat: Chat, shown: list[Any], *, add_generation_prompt: bool) -> str | None:
        """transformers' own rendering; None where the template takes no such messages."""
        template: Any = self.tokenizer
        for tools in (chat.tools or None, chat.tools):
            try:
                return template.apply_chat_template(
                    shown,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **chat.template_kwargs,
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
                continue
        return None

    def _without_end(self, message: Any) -> Any:
        """The message without an end token that an answer has written by hand."""
        content = message.get("content", "").rstrip()
        end = next((token for token in (self.eos, *self.special) if content.endswith(token)), None)
        if message["role"] != "assistant" or end is None:
            return message
        return {**message, "content": content.removesuffix(end)}

    def _normalized(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text).replace("\u2581", " ") if normalizer else text

    def _no_stop(self, token: int) -> Failed:
        stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        return "stop", f"one of {stops}", repr(self.tokenizer.convert_ids_to_tokens(token))


def _fits(part: list[Run], told: list[Run], row: Assembled) -> bool:
    """Whether decoded texts are the expected ones; the first and the last may be cut."""
    texts = [text for text, _ in told]
    if row.starts_late or row.ends_early:
        texts = [text.strip(HALF_LETTER) for text in texts]
    for number, ((want, _), got) in enumerate(zip(part, texts, strict=True)):
        late = row.starts_late and number == 0
        early = row.ends_early and number == len(texts) - 1
        found = want == got or (late and want.endswith(got)) or (early and want.startswith(got))
        if not found and not (late and early and got in want):
            return False
    return True


def _fits_ids(expected: list[list[int]], found: list[list[int]], row: Assembled, *, is_all: bool) -> bool:
    for number, (want, got) in enumerate(zip(expected, found, strict=True)):
        late = row.starts_late and number == 0
        early = row.ends_early and is_all and number == len(found) - 1
        same = want == got or (late and want[-len(got) :] == got) or (early and want[: len(got)] == got)
        if not same and not (late and early):
            return False
    return True


def _same_weights(expected: list[Run], told: list[Run]) -> bool:
    return [np.float32(weight) for _, weight in expected] == [np.float32(weight) for _, weight in told]


def _difference(expected: list[Run], told: list[Run]) -> Failed:
    """The check that fails, and the first texts that differ."""
    for want, got in zip_longest(expected, told, fillvalue=("", 0.0)):
        kind = "targets" if want[1] else "prompt"
        if want[0] != got[0]:
            return kind, repr(want[0][-60:]), repr(got[0][-60:])
        if np.float32(want[1]) != np.float32(got[1]):
            return "weights" if want[1] and got[1] else kind, f"weight {want[1]:g}", f"{got[1]:g}"
    return "prompt", "the ids of its text", "other ids"


def _tokens_of(document: Document, pattern: re.Pattern[str]) -> list[tuple[str, float, bool]]:
    """(control token, weight, whether the recipe wrote it); one may span the borders of segments."""
    found = []
    for weight, group in groupby(document.segments, key=lambda segment: segment.weight):
        segments = list(group)
        own = [segment.is_own for segment in segments for _ in segment.text]  # of each letter
        matches = pattern.finditer("".join(segment.text for segment in segments))
        found += [(match[0], weight, all(own[match.start() : match.end()])) for match in matches]
    return found


def _alternatives(messages: Sequence[Any]) -> Iterator[list[dict[str, Any]]]:
    """The messages in the spellings that templates expect, the usual one first."""
    has_calls = any("tool_calls" in message for message in messages)
    has_reasoning = any("reasoning" in message for message in messages)
    both, one = (False, True), (False,)
    of_calls = both if has_calls else one
    for choice in product(both if has_reasoning else one, both, of_calls, of_calls, of_calls):
        yield [_spelled(message, Spelling(*choice)) for message in messages]


def _spelled(message: Any, spelling: Spelling) -> dict[str, Any]:
    """A message as a template may expect it."""
    shown = {key: value for key, value in message.items() if key not in ("weight", "reasoning")}
    reasoning = message.get("reasoning")
    if reasoning and spelling.in_content:
        shown["content"] = f"<think>\n{reasoning}\n</think>\n\n{message.get('content', '')}"
    elif reasoning:
        shown |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning)
    if spelling.empty_content:
        shown.setdefault("content", "")
    if spelling.parts and "content" in shown:
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    if "tool_calls" in shown:
        calls = [_spelled_call(call, as_text=spelling.arguments_as_text) for call in shown["tool_calls"]]
        shown["tool_calls"] = calls
    if spelling.short_ids:
        for part in (shown, *shown.get("tool_calls", [])):
            part.update({key: short_call_id(part[key]) for key in ("id", "tool_call_id") if key in part})
    return shown


def _spelled_call(call: Any, *, as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object, or as JSON text."""
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _shape(example: Chat | Document) -> tuple[object, ...]:
    """What rows are sorted by: those of one shape are rendered by the same lines of a template."""
    if isinstance(example, Document):
        return tuple(segment.is_target for segment in example.segments)
    turns = (
        (turn["role"], "reasoning" in turn, len(turn.get("tool_calls", ())), "weight" in turn)
        for turn in example.messages
    )
    return (len(example.tools), bool(example.template_kwargs), *turns)


def _squeezed(text: str) -> str:
    return "".join(text.split())
