"""Text to ids, in the place where it stands, and with the user's control tokens spelled out.

    a text           "Say <|im_end|> twice"
    marked           "Say \\ufdd0<|im_end|>\\ufdd1 twice"     what a user wrote never becomes a control token
    encoded          Say | < | | | im | _ | end | | | > | twice

The marks are noncharacters of Unicode, which no valid text contains: they survive a Jinja template.
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
    """A stretch of a row that is encoded on its own.

    weight: how much its loss counts; 0: it is only read.
    context: the text right before it, from a border of tokens on. "" is the start of a text, None means that
        it continues a text and that the border is one of our own.
    must_join: its ids must continue those of its context as if both were encoded together.
    """

    text: str  # may hold marks
    weight: float = 0.0
    context: str | None = ""
    must_join: bool = False


class Encoder:
    """Encodes pieces with one tokenizer. Keep it: it remembers what costs time to find out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        tokenizer("", add_special_tokens=False)  # brings its backend into the state of such a call
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.any_control = control_pattern(tokenizer)
        self.special = re.compile(alternatives(special_tokens(tokenizer)))
        vocabulary = tokenizer.get_added_vocab()
        self._control_ids = {vocabulary[token] for token in control_tokens(tokenizer)}
        self._plain = _without_added_tokens(tokenizer)
        self._contexts: dict[str, list[int]] = {}
        self.adds_space = self._after("a", self._encode, inside=("\n", "b")) != self._encode("a")

    def mark(self, text: str, *, by_model: bool = False, own: Sequence[Span] = ()) -> str:
        """Wraps every control token that ``text`` spells, so that it is encoded as plain text.

        Args:
            by_model: the model writes this text: tokens that its vocabulary does not call special
                (``<think>``, ``<tool_call>``) stay tokens.
            own: stretches that the recipe wrote, not a record: a token inside one of them stays a token.
        """
        if MARK_START in text or MARK_END in text:
            fix = "remove it; no valid text contains one"
            raise DataError("the text holds a noncharacter (U+FDD0 or U+FDD1)", fix=fix)

        def wrap(match: re.Match[str]) -> str:
            is_own = any(start <= match.start() and match.end() <= end for start, end in own)
            return match[0] if is_own else f"{MARK_START}{match[0]}{MARK_END}"

        return (self.special if by_model else self.any_control).sub(wrap, text)

    def may_spell(self, texts: Iterable[str]) -> bool:
        """False where no text holds a control token or a mark: one search for many texts.

        True may be a false alarm, where two neighbours spell one together.
        """
        joined = "\n".join(texts)
        return MARK_START in joined or MARK_END in joined or self.any_control.search(joined) is not None

    def is_ordinary(self, token: str) -> bool:
        """Whether a token is a letter or a word of the vocabulary that was only named a control token."""
        is_word = len(token) == 1 or token.isalnum()
        return is_word and self._plain.encode(token, add_special_tokens=False).ids == [
            self.tokenizer.convert_tokens_to_ids(token)
        ]

    def last_context(self, text: str) -> str:
        """The end of ``text`` from its last control token on: what can change the ids of what follows."""
        text = text[text.rfind(MARK_END) + 1 :]
        start = 0
        for match in self.any_control.finditer(text):
            start = match.start()
        return text[start:]

    def encode(self, pieces: Sequence[Piece]) -> list[tuple[list[int], bool]]:
        """The ids of each piece, and whether they continue those of its context.

        Encodes all pieces in one call, which uses all threads of the tokenizer. Raises DataError for a marked
        token that the vocabulary cannot spell.
        """
        parts = [self._split(piece) for piece in pieces]
        texts = [(context or "") + text for part in parts for text, context, is_plain in part if not is_plain]
        found = iter(self._encode_batch(texts))
        return [self._join(part, found) for part in parts]

    def _split(self, piece: Piece) -> list[tuple[str, str | None, bool]]:
        """(text, context, whether it was marked) of the parts of a piece between its marks."""
        if MARK_START not in piece.text and MARK_END not in piece.text:
            return [(piece.text, self._inside(piece.context), False)]
        parts = MARKED.split(piece.text)  # [text, marked, text, marked, ..., text]
        if any(mark in part for part in parts for mark in (MARK_START, MARK_END)):
            fix = "remove the control token from the text, or set data.special_tokens_in_text to allow"
            raise DataError("the chat template cuts a text at a control token that it holds", fix=fix)
        found = [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
        return [
            (part, self._inside(None if number else piece.context), is_marked)
            for number, (part, is_marked) in enumerate(found)
        ]

    def _inside(self, context: str | None) -> str | None:
        """A newline stands for unknown text before a piece, where the tokenizer treats a start apart."""
        return "\n" if context is None and self.adds_space else context

    def _join(
        self, parts: Sequence[tuple[str, str | None, bool]], found: Iterable[list[int]]
    ) -> tuple[list[int], bool]:
        ids, continues, encoded = [], True, iter(found)
        for text, context, is_plain in parts:
            if is_plain:
                ids += self._spell_out(text, is_inside=bool(context) and self.adds_space)
                continue
            own = next(encoded)
            if context:
                head = self._context_ids(context)
                if own[: len(head)] == head:
                    own = own[len(head) :]
                else:  # the tokenizer merges across the border
                    continues = False
                    own = self._after(text, self._encode) if self.adds_space else self._encode(text)
            ids += own
        return ids, continues

    def _context_ids(self, context: str) -> list[int]:
        if context not in self._contexts:
            if len(self._contexts) > 1000:  # a template without control tokens: contexts are whole prompts
                self._contexts.clear()
            self._contexts[context] = self._encode(context)
        return self._contexts[context]

    def _spell_out(self, text: str, *, is_inside: bool) -> list[int]:
        """The ids of ``text`` read as ordinary text: no control token comes out of it."""

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
                "the tokenizer cannot write a control token as plain text", got=repr(text), fix=fix
            )
        return ids

    def _after(
        self, text: str, encode: Callable[[str], list[int]], *, inside: Sequence[str] = ("\n", "a")
    ) -> list[int]:
        """Encodes ``text`` after a newline, or a letter where that merges with it, and cuts their ids off."""
        for before in inside:
            head, ids = encode(before), encode(before + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Without offsets and masks: those, and a Python copy of each, take longer than the ids."""
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same model, normalizer and pre-tokenizer without the table of added tokens."""
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain
