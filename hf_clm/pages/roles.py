"""The text of a row as it was tokenized, and who speaks in it from which token on."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.schema import AnyExample, Chat, Document
from hf_clm.text.encode import MARK_END, MARK_START, Piece
from hf_clm.text.tokenizer import control_pattern

Turn = tuple[int, str]  # first token (or character), role
Content = tuple[int, int, str]  # first character, past the last, role
Spelling = list[tuple[str, bool]]  # text, is target: neighbours differ


def spell_pieces(pieces: Sequence[Piece]) -> Spelling:
    """The text of a row in read-only and target pieces."""
    texts = [(unmarked(piece.text), piece.weight > 0) for piece in pieces]
    runs = groupby((piece for piece in texts if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), is_target) for is_target, run in runs]


def find_turns(
    example: AnyExample,
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerFast,
    *,
    spelled: Sequence[bytes],
) -> list[Turn]:
    """The turns of a row by role, each with its first token; of a document its prompt and completion.

    Args:
        spelled: the bytes of each token of the row. Where they do not add up to its text (the tokenizer
            changes case, say), the turns are not known and left out.
    """
    text = "".join(unmarked(piece.text) for piece in pieces)
    if isinstance(example, Chat):
        starts = _turn_starts(text, list(_find_contents(example, text)), tokenizer=tokenizer)
        return _to_tokens(text, starts, spelled=spelled)
    spelling = spell_pieces(pieces)
    is_pair = isinstance(example, Document) and [is_target for _, is_target in spelling] == [False, True]
    if not is_pair:
        return []
    return _to_tokens(text, [(0, "prompt"), (len(spelling[0][0]), "completion")], spelled=spelled)


def unmarked(text: str) -> str:
    """The text without the marks of control tokens that a user spelled."""
    return text.replace(MARK_START, "").replace(MARK_END, "")


def _find_contents(chat: Chat, text: str) -> Iterator[Content]:
    """What the messages say, in order, as far as the template has kept it."""
    at = 0
    for message in chat.messages:
        calls = [str(call["function"]["name"]) for call in message.get("tool_calls", [])]
        parts = [(message.get("reasoning", ""), "reasoning"), (message.get("content", ""), message["role"])]
        for part, role in [*parts, *((name, "tool call") for name in calls)]:
            start = text.find(part.strip(), at) if part.strip() else -1
            if start >= 0:
                at = start + len(part.strip())
                yield start, at, role


def _turn_starts(text: str, contents: list[Content], *, tokenizer: PreTrainedTokenizerFast) -> Iterator[Turn]:
    """(first character, role). A turn begins where the last one ended, or after what the template put in."""
    control = control_pattern(tokenizer).pattern
    tail = re.compile(rf"\s*({control})?\s*")
    ends = [tail.match(text, stop) for _, stop, _ in contents]
    closing = "|".join({re.escape(end[1]) for end in ends if end and end[1]}) or "(?!)"
    turn_end, before = 0, ""
    for (start, _, role), end in zip(contents, ends, strict=True):
        inserted = re.match(rf".*(?:{closing})\s*", text[turn_end:start], re.DOTALL)
        if inserted and before != "tool call":  # the rest of a call is its own
            yield turn_end, "template"
        yield turn_end + (inserted.end() if inserted else 0), role
        turn_end, before = (end.end() if end else turn_end), role


def _to_tokens(text: str, starts: Iterable[Turn], *, spelled: Sequence[bytes]) -> list[Turn]:
    """(first token, role) from (first character, role); nothing where the tokens do not spell the text."""
    whole = b"".join(spelled)
    if text.encode() != whole:
        text = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does
    if text.encode() != whole:
        return []
    ends = np.cumsum([0, *map(len, spelled)])
    return [(int(np.searchsorted(ends, len(text[:start].encode()))), role) for start, role in starts]
