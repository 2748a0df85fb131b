"""The types that flow from a file to a batch; draws on nothing but the standard library.

record (dict) -> Example -> list[Segment] -> TokenizedExample -> PackedRow -> batch
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

from typing_extensions import NotRequired  # typing has it from Python 3.11

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index

Format = Literal[
    "text", "prompt_completion", "instruct", "alpaca", "messages", "sharegpt", "segments", "tokenized"
]
TokenizerKind = Literal["bpe", "unigram", "characters"]
Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a chat. ``train: False`` on an assistant turn makes it read-only."""

    role: Role
    content: str
    train: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is either learned (a target) or only read.

    ``is_plain`` marks text of the user that spells a control token: it is encoded as ordinary text.
    ``is_own`` marks text of the recipe's template: a control token in it is that token.
    """

    text: str
    is_target: bool
    is_plain: bool = False
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class TextExample:
    """A document, learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt that is read and a completion that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; assistant turns are learned."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class SegmentsExample:
    """Text whose learned parts the user marked himself."""

    segments: list[Segment]


class TokenizedExample(TypedDict):
    """Token ids and, at the same positions (unshifted), their labels; -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


Example = TextExample | PromptExample | ChatExample | SegmentsExample
