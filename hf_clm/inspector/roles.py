"""The text of an example as it was tokenized, and who speaks in it from which token on."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.chat_template import mark_control_text, render_chat
from hf_clm.data.segments import to_segments
from hf_clm.schema import ChatExample, Example, PromptExample, Segment
from hf_clm.tokenizer import control_pattern

# Noncharacters of Unicode carry "here a message's content begins, ends" through the template.
CONTENT = re.compile("\ufdd2([0-9]+)\ufdd3|\ufdd4")

Turn = tuple[int, str]  # first token (or character), role
Content = tuple[int, int, str]  # first character, past the last, role
Spelling = list[tuple[str, bool]]  # text, is target: neighbours differ


def spell_example(
    example: Example, tokenizer: PreTrainedTokenizerFast, *, train_on: str, spelled: Sequence[bytes]
) -> tuple[Spelling, list[Turn]]:
    """The text in read-only and target pieces, and the turns: of a chat by role, else prompt and completion.

    Args:
        spelled: the bytes of each token of the example. Where they do not add up to its text (the tokenizer
            changes case, say), the turns are not known and left out.
    """
    if isinstance(example, ChatExample):
        mark = _content_marker(lambda text: mark_control_text(text, tokenizer))
        segments = render_chat(example.messages, tokenizer, train_on=train_on, mark=mark)
        names = [message["role"] for message in example.messages]
        marked = "".join(segment.text for segment in segments)
        text, contents = _find_contents(marked, names)
        starts = _turn_starts(text, contents, tokenizer=tokenizer)
        return _join(segments), _to_tokens(text, starts, spelled=spelled)
    spelling = _join(to_segments(example, tokenizer, special_tokens_in_text="allow"))
    if not isinstance(example, PromptExample) or len(spelling) < 2:
        return spelling, []
    starts = [(0, "prompt"), (len(spelling[0][0]), "completion")]
    return spelling, _to_tokens("".join(text for text, _ in spelling), starts, spelled=spelled)


def _join(segments: Sequence[Segment]) -> Spelling:
    texts = [(CONTENT.sub("", segment.text), segment.is_target) for segment in segments]
    runs = groupby((piece for piece in texts if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), is_target) for is_target, run in runs]


def _content_marker(mark: Callable[[str], str]) -> Callable[[str], str]:
    """Marks each content with its number, inside its outer white space: a template may trim that."""
    numbers = count()

    def marked(text: str) -> str:
        core = text.strip()
        head, tail = text.split(core, 1) if core else (text, "")
        return f"{head}\ufdd2{next(numbers)}\ufdd3{mark(core)}\ufdd4{tail}"

    return marked


def _find_contents(marked: str, names: list[str]) -> tuple[str, list[Content]]:
    """The text without marks, and the contents that the template has kept."""
    text, last, contents = "", 0, []
    for mark in CONTENT.finditer(marked):
        text, last = text + marked[last : mark.start()], mark.end()
        if mark[1] is not None:
            contents.append((len(text), len(text), names[int(mark[1])]))
        elif contents:
            contents[-1] = (contents[-1][0], len(text), contents[-1][2])
    return text + marked[last:], contents


def _turn_starts(text: str, contents: list[Content], *, tokenizer: PreTrainedTokenizerFast) -> Iterator[Turn]:
    """(first character, role). A turn begins where the last one ended, or behind what the template put in."""
    control = control_pattern(tokenizer).pattern
    tail = re.compile(rf"\s*({control})?\s*")
    ends = [tail.match(text, stop) for _, stop, _ in contents]
    closing = "|".join({re.escape(end[1]) for end in ends if end and end[1]}) or "(?!)"
    turn_end = 0
    for (start, _, role), end in zip(contents, ends, strict=True):
        inserted = re.match(rf".*(?:{closing})\s*", text[turn_end:start], re.DOTALL)
        if inserted:
            yield turn_end, "template"
        yield turn_end + (inserted.end() if inserted else 0), role
        turn_end = end.end() if end else turn_end


def _to_tokens(text: str, starts: Iterable[Turn], *, spelled: Sequence[bytes]) -> list[Turn]:
    """(first token, role) from (first character, role); nothing where the tokens do not spell the text."""
    whole = b"".join(spelled)
    if text.encode() != whole:
        text = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does
    if text.encode() != whole:
        return []
    ends = np.cumsum([0, *map(len, spelled)])
    return [(int(np.searchsorted(ends, len(text[:start].encode()))), role) for start, role in starts]
