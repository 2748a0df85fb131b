"""Which control tokens a user's text spells, and which the recipe's template writes: for the certificate."""

import re
from itertools import groupby

from hf_clm.schema import ChatExample, Example, PromptExample, SegmentsExample


def spelled_by_user(example: Example, pattern: re.Pattern[str]) -> list[str]:
    """The control tokens (``pattern`` finds them) that the user wrote himself."""
    return [token for token, is_own in _spelled(example, pattern) if not is_own]


def spelled_by_template(example: Example, pattern: re.Pattern[str]) -> list[str]:
    """The control tokens that stand whole in a piece of the template."""
    return [token for token, is_own in _spelled(example, pattern) if is_own]


def writes_end(example: Example, end: str) -> bool:
    """Whether the template closes the text with the stop token itself."""
    last = example.segments[-1] if isinstance(example, SegmentsExample) and example.segments else None
    return last is not None and last.is_own and last.text.endswith(end)


def _spelled(example: Example, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """(control token, whether it is the template's); one may span the borders of the user's own segments."""
    if not isinstance(example, SegmentsExample):
        return [(token, False) for text in _texts(example) for token in pattern.findall(text)]
    found = []
    for _, group in groupby(example.segments, key=lambda segment: segment.is_target):
        segments = list(group)
        own = [segment.is_own for segment in segments for _ in segment.text]  # of each letter
        matches = pattern.finditer("".join(segment.text for segment in segments))
        found += [(match[0], all(own[match.start() : match.end()])) for match in matches]
    return found


def _texts(example: Example) -> list[str]:
    if isinstance(example, ChatExample):
        return [message["content"] for message in example.messages]
    if isinstance(example, PromptExample):
        return [example.prompt, example.completion]
    assert not isinstance(example, SegmentsExample), type(example)
    return [example.text]
