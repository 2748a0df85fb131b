"""What the proof knows of a tokenizer, and a row put together again from its pieces.

Nothing here is shared with the code that makes labels.
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

HALF_LETTER = "\ufffd"  # what is left of a letter whose bytes a cut has parted

Run = tuple[str, float]  # a text, and the weight of its loss; 0: it is only read
Stretch = tuple[int, int, float]  # first token, past the last token, and the weight of their loss
Failed = tuple[str, str, str]  # check, expected, got


CHECKS = {
    "labels": "a label is the id at its place",
    "first": "the first token of a row, which nothing precedes, has no label",
    "targets": "the learned tokens decode to the target text and its stop token",
    "prompt": "the tokens before a target are those of the prompt that generation is given",
    "stop": "a whole target ends in a token that generation stops at, and a cut one does not",
    "control": "no control token comes from the text",
    "start": "no row begins with two start tokens",
    "weights": "the weight of each label is that of its turn or segment",
    "tokens": "the ids, labels and weights of a tokenized record are those that it gives",
    "padding": "no pad token stands among the tokens",
}


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


class Texts:
    """A tokenizer and the options of a set: which text is a token, and what decoding gives back.

    ``stop_ids`` are those of the generation config.
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
        self.marks_start = inside[len(line) :] != alone  # as SentencePiece does, with a space
        flags = [token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()]
        self.swallows = self.marks_start or any(flags)
        self.allows = options.special_tokens_in_text == "allow"
        self.learns_all = options.stage == "pretrain" or options.train_on.turns == "everything"

    def spelled(self, example: Chat | Document) -> list[str]:
        """The control tokens that the text of a record spells and that must not be tokens."""
        if self.allows or not self.pattern.search(whole_text(example)):
            return []
        if isinstance(example, Document):
            tokens = tokens_of(example, self.pattern)
            return [token for token, weight, own in tokens if not (own or self.may_write(token, weight))]
        found = []
        for message in example.messages:
            weight = float(message["role"] == "assistant")
            texts = "\n".join(Chat([message]).texts)
            found += [t for t in self.pattern.findall(texts) if t in self.special or not weight]
        return found

    def count_controls(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of control tokens among ids."""
        return int(self._is_control[np.minimum(ids, len(self._is_control) - 1)].sum())

    def may_write(self, token: str, weight: float) -> bool:
        """Whether a control token in learned text is one that the model itself writes."""
        return token not in self.special and (weight > 0 or self.learns_all)

    def normalized(self, text: str) -> str:
        """The text as decoding gives it back."""
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text).replace("\u2581", " ") if normalizer else text

    def loosened(self, text: str) -> str:
        """Without white space, where decoding does not give all of it back."""
        return squeezed(text) if self.swallows else text

    def no_stop(self, token: int) -> Failed:
        """The failure of a target that ends in ``token``, at which generation does not stop."""
        stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        return "stop", f"one of {stops}", repr(self.tokenizer.convert_ids_to_tokens(token))


def tokens_of(document: Document, pattern: re.Pattern[str]) -> list[tuple[str, float, bool]]:
    """(control token, weight, whether the recipe wrote it); one may span the borders of segments."""
    found = []
    for weight, group in groupby(document.segments, key=lambda segment: segment.weight):
        segments = list(group)
        own = [segment.is_own for segment in segments for _ in segment.text]  # of each letter
        matches = pattern.finditer("".join(segment.text for segment in segments))
        found += [(match[0], weight, all(own[match.start() : match.end()])) for match in matches]
    return found


def squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())
