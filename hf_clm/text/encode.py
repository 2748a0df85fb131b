"""Encodes text in its context. Control tokens in user text are encoded as plain text.

    text       "Say <|im_end|> twice"
    marked     "Say \\ufdd0<|im_end|>\\ufdd1 twice"     user text never becomes a control token
    encoded    Say | < | | | im | _ | end | | | > | twice

The marks are Unicode noncharacters, which valid text never contains. They pass through a Jinja template
unchanged.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError
from hf_clm.text.tokenizer import alternatives, control_pattern, control_tokens, special_tokens

MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)
Span = tuple[int, int]  # start and end, characters


class Piece(NamedTuple):
    """A span of a row that is encoded separately.

    weight: factor of its loss; 0 makes it context only.
    context: the text immediately before it, starting at a token boundary. "" is the start of a text; None
        means that the piece continues a text and that the boundary is artificial.
    must_join: the ids must be the same as if the piece were encoded together with its context.
    """

    text: str  # may contain marks
    weight: float = 0.0
    context: str | None = ""
    must_join: bool = False


class Encoder:
    """Encodes pieces with a tokenizer. Reuse it, since it caches the ids of contexts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        tokenizer("", add_special_tokens=False)  # a call sets the backend's padding and truncation
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.any_control = control_pattern(tokenizer)
        self.special = re.compile(alternatives(special_tokens(tokenizer)))
        vocabulary = tokenizer.get_added_vocab()
        self._control_ids = {vocabulary[token] for token in control_tokens(tokenizer)}
        self._plain = _without_added_tokens(tokenizer)
        self._contexts: dict[str, list[int]] = {}
        self.adds_space = self._after("a", self._encode, inside=("\n", "b")) != self._encode("a")

    def mark(self, text: str, *, by_model: bool = False, recipe_spans: Sequence[Span] = ()) -> str:
        """Marks every control token in ``text``, so that it is encoded as plain text.

        Args:
            by_model: the model generates this text, so tokens that its vocabulary does not mark as special
                (``<think>``, ``<tool_call>``) remain tokens.
            recipe_spans: spans that come from the recipe, not from a record; tokens in them remain tokens.
        """
        if MARK_START in text or MARK_END in text:
            fix = "remove it; no valid text contains one"
            raise DataError("the text contains a noncharacter (U+FDD0 or U+FDD1)", fix=fix)

        def wrap(match: re.Match[str]) -> str:
            is_own = any(start <= match.start() and match.end() <= end for start, end in recipe_spans)
            return match[0] if is_own else f"{MARK_START}{match[0]}{MARK_END}"

        return (self.special if by_model else self.any_control).sub(wrap, text)

    def may_have_control(self, texts: Iterable[str]) -> bool:
        """Returns False if no text contains a control token or a mark; searches all texts at once.

        True may be a false alarm, if a token spans two adjacent texts.
        """
        joined = "\n".join(texts)
        return MARK_START in joined or MARK_END in joined or self.any_control.search(joined) is not None

    def is_ordinary(self, token: str) -> bool:
        """Whether a control token is also an ordinary character or word of the vocabulary."""
        is_word = len(token) == 1 or token.isalnum()
        return is_word and self._plain.encode(token, add_special_tokens=False).ids == [
            self.tokenizer.convert_tokens_to_ids(token)
        ]

    def last_context(self, text: str) -> str:
        """Returns ``text`` from its last control token on: all that can affect the next ids."""
        text = text[text.rfind(MARK_END) + 1 :]
        start = 0
        for match in self.any_control.finditer(text):
            start = match.start()
        return text[start:]

    def encode(self, pieces: Sequence[Piece]) -> list[tuple[list[int], bool]]:
        """Returns the ids of each piece, and whether they continue the ids of its context.

        Encodes all pieces in one call, to use all threads of the tokenizer. Raises DataError for a marked
        token that the vocabulary cannot encode as plain text.
        """
        parts = [self._split(piece) for piece in pieces]
        texts = [(context or "") + text for part in parts for text, context, is_plain in part if not is_plain]
        batch = iter(self._encode_batch(texts))
        return [self._join(part, batch) for part in parts]

    def _split(self, piece: Piece) -> list[tuple[str, str | None, bool]]:
        """Splits a piece at its marks; returns (text, context, whether it was marked) of each part."""
        if MARK_START not in piece.text and MARK_END not in piece.text:
            return [(piece.text, self._inside(piece.context), False)]
        parts = MARKED.split(piece.text)  # [text, marked, text, marked, ..., text]
        if any(mark in part for part in parts for mark in (MARK_START, MARK_END)):
            fix = "remove the control token from the text, or set data.special_tokens_in_text to allow"
            raise DataError("the chat template cuts a text at a control token in it", fix=fix)
        spans = [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
        return [
            (part, self._inside(None if number else piece.context), is_marked)
            for number, (part, is_marked) in enumerate(spans)
        ]

    def _inside(self, context: str | None) -> str | None:
        """Replaces unknown context with a newline if the tokenizer encodes a text's start differently."""
        return "\n" if context is None and self.adds_space else context

    def _join(
        self, parts: Sequence[tuple[str, str | None, bool]], batch: Iterable[list[int]]
    ) -> tuple[list[int], bool]:
        ids, continues, encodings = [], True, iter(batch)
        for text, context, is_plain in parts:
            if is_plain:
                ids += self._spell_out(text, is_inside=bool(context) and self.adds_space)
                continue
            part = next(encodings)
            if context:
                head = self._context_ids(context)
                if part[: len(head)] == head:
                    part = part[len(head) :]
                else:  # the tokenizer merges across the boundary
                    continues = False
                    part = self._after(text, self._encode) if self.adds_space else self._encode(text)
            ids += part
        return ids, continues

    def _context_ids(self, context: str) -> list[int]:
        if context not in self._contexts:
            if len(self._contexts) > 1000:  # without control tokens, every context is a complete prompt
                self._contexts.clear()
            self._contexts[context] = self._encode(context)
        return self._contexts[context]

    def _spell_out(self, text: str, *, is_inside: bool) -> list[int]:
        """Returns the ids of ``text`` as plain text, without control tokens."""

        def encode(piece: str) -> list[int]:
            return self._plain.encode(piece, add_special_tokens=False).ids

        ids = self._after(text, encode) if is_inside else encode(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        first = self._after(text[:1], encode) if is_inside else encode(text[:1])
        ids = first + [i for letter in text[1:] for i in self._after(letter, encode)]
        if not self._control_ids.isdisjoint(ids):
            fix = "remove it, or set data.special_tokens_in_text to allow"
            raise DataError(
                "the tokenizer cannot encode a control token as plain text", got=repr(text), fix=fix
            )
        return ids

    def _after(
        self, text: str, encode: Callable[[str], list[int]], *, inside: Sequence[str] = ("\n", "a")
    ) -> list[int]:
        """Encodes ``text`` after a newline (or a letter, if that merges) and removes the prefix's ids."""
        for before in inside:
            head, ids = encode(before), encode(before + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Skips offsets and masks: they, and their copies in Python, take longer than the ids."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Returns a tokenizer with the same model, normalizer and pre-tokenizer, but without added tokens."""
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain
