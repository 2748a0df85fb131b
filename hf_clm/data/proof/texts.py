"""What the proof needs to know about a tokenizer, and rows reassembled from their pieces.

Shares no code with the functions that make labels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.schema import Chat, Document, whole_text
from hf_clm.text.tokenizer import control_pattern, control_tokens, special_tokens

HALF_LETTER = "\ufffd"  # the result of cutting between the bytes of a character

Run = tuple[str, float]  # a text and the weight of its loss; 0 for context
Stretch = tuple[int, int, float]  # first token, end token (exclusive), weight of their loss
Failed = tuple[str, str, str]  # check, expected, got


LABEL_CHECKS = {
    "labels": "each label equals the id at its position",
    "first": "the first token of a row, which nothing precedes, has no label",
    "targets": "the learned tokens decode to the target text and its stop token",
    "prompt": "the tokens before a target are those of the generation prompt",
    "stop": "a complete target ends in a token at which generation stops, and a cut one does not",
    "control": "no control token comes from a record's text",
    "start": "no row begins with two start tokens",
    "weights": "each label has the weight of its turn or segment",
    "tokens": "the ids, labels and weights of a tokenized record are unchanged",
    "padding": "there is no pad token among the tokens",
}


@dataclass(frozen=True)
class Assembled:
    """A row, or the joined pieces of a split text, without a document's start token.

    at: number of the row within its example.
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
        """Numbers of the spans that are targets."""
        return [number for number, stretch in enumerate(self.stretches) if stretch[2]]


class Texts:
    """A tokenizer and the options of a set: which texts are tokens, and how decoding changes a text.

    ``stop_ids`` are the ids at which generation stops.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: LabelOptions, stop_ids: Sequence[int]):
        self.tokenizer, self.options, self.stop_ids = tokenizer, options, set(stop_ids)
        self.backend = tokenizer.backend_tokenizer
        self.eos = str(tokenizer.eos_token)
        self.pattern, self.special = control_pattern(tokenizer), set(special_tokens(tokenizer))
        vocabulary = tokenizer.get_added_vocab()
        control_ids = [vocabulary[token] for token in control_tokens(tokenizer)]
        self._is_control = np.zeros(max(control_ids, default=0) + 2, dtype=bool)
        self._is_control[control_ids] = True
        line, alone, inside = self.tokenizer(["\n", "a", "\na"], add_special_tokens=False)["input_ids"]
        self.marks_start = inside[len(line) :] != alone  # with a space, like SentencePiece
        flags = [token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()]
        self.swallows = self.marks_start or any(flags)
        self.allows = options.special_tokens_in_text == "allow"
        self.learns_all = options.stage == "pretrain" or options.train_on.turns == "everything"

    def spelled(self, example: Chat | Document) -> list[str]:
        """Returns the control tokens in a record's text that must be encoded as plain text."""
        if self.allows or not self.pattern.search(whole_text(example)):
            return []
        if isinstance(example, Document):
            tokens = tokens_of(example, self.pattern)
            return [token for token, weight, own in tokens if not (own or self.may_write(token, weight))]
        spelled = []
        for message in example.messages:
            weight = float(message["role"] == "assistant")
            texts = "\n".join(Chat([message]).texts)
            spelled += [t for t in self.pattern.findall(texts) if t in self.special or not weight]
        return spelled

    def count_controls(self, ids: Sequence[int] | np.ndarray) -> int:
        """Returns the number of control tokens among ids."""
        return int(self._is_control[np.minimum(ids, len(self._is_control) - 1)].sum())

    def may_write(self, token: str, weight: float) -> bool:
        """Whether a control token in a target is one that the model generates."""
        return token not in self.special and (weight > 0 or self.learns_all)

    def normalized(self, text: str) -> str:
        """Returns the text as it is after encoding and decoding."""
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text).replace("\u2581", " ") if normalizer else text

    def loosened(self, text: str) -> str:
        """Removes whitespace if decoding does not restore all of it."""
        return squeezed(text) if self.swallows else text

    def no_stop(self, token: int) -> Failed:
        """Returns the failure of a target that ends in ``token``, at which generation does not stop."""
        stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        return "stop", f"one of {stops}", repr(self.tokenizer.convert_ids_to_tokens(token))


def tokens_of(document: Document, pattern: re.Pattern[str]) -> list[tuple[str, float, bool]]:
    """Returns (control token, weight, whether it comes from the recipe); tokens may span segments."""
    tokens = []
    for weight, group in groupby(document.segments, key=lambda segment: segment.weight):
        segments = list(group)
        is_own = [segment.is_own for segment in segments for _ in segment.text]  # of each character
        matches = pattern.finditer("".join(segment.text for segment in segments))
        tokens += [(match[0], weight, all(is_own[match.start() : match.end()])) for match in matches]
    return tokens


def squeezed(text: str) -> str:
    """Removes all whitespace."""
    return "".join(text.split())
