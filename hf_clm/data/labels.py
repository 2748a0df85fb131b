"""Segments -> input_ids and labels. The only place where a prompt becomes -100.

segments   | Say hi.\n        | Hi!        | <eos> |
input_ids  |  9  4  1         |  7   2     |  0    |
labels     | -100 -100 -100   |  7   2     |  0    |     unshifted: the loss compares logits t with labels t+1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError
from hf_clm.schema import IGNORE_INDEX, Segment, TokenizedExample
from hf_clm.tokenizer import control_tokens


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of an input row. ``kind``: used, cut, split, or dropped (``reason`` says why).

    ``tokens`` and ``target_tokens`` are those of the row before it was fitted.
    """

    kind: str
    reason: str = ""
    cut_tokens: int = 0
    tokens: int = field(default=0, compare=False)
    target_tokens: int = field(default=0, compare=False)


def tokenize_segments(segments: list[Segment], tokenizer: PreTrainedTokenizerFast) -> TokenizedExample:
    """Tokenizes read-only text and targets apart, and masks the read-only part and the first token.

    Neighbours of one kind are joined first, so the ids before a target are exactly the ids that ``generate``
    is given for that prompt. One string would not do: BPE may merge the prompt's last newline with the
    target's first letter.
    """
    return tokenize_batch([segments], tokenizer)[0]


def tokenize_batch(
    batch: Sequence[list[Segment]], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedExample]:
    """``tokenize_segments`` for many rows in one call of the tokenizer, which then uses all its threads."""
    rows = [_runs(segments) for segments in batch]
    texts = [run.text for runs in rows for run in runs if not run.is_plain]
    encoded = iter(encode_texts(texts, tokenizer))
    adds_space = adds_leading_space(tokenizer)
    examples = []
    for runs in rows:
        input_ids, labels = [], []
        first = 1 if runs and runs[0].text == tokenizer.bos_token else 0
        for i, run in enumerate(runs):
            ids = encode_plain(run.text, tokenizer) if run.is_plain else next(encoded)
            if adds_space and i > first:
                ids = _encode_inside(run, tokenizer)
            input_ids += ids
            labels += ids if run.is_target else [IGNORE_INDEX] * len(ids)
        examples.append(mask_first({"input_ids": input_ids, "labels": labels}))
    return examples


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The ids that ``tokenizer(texts, add_special_tokens=False)`` gives, without what else it makes of them.

    Offsets, masks and a Python copy of each take longer than the ids (measured: 1.6 times as long).
    """
    tokenizer("", add_special_tokens=False)  # brings its backend into the state of such a call
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_plain(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of ``text`` read as ordinary text: no control token comes out of it.

    Raises DataError if the vocabulary cannot spell it without one.
    """
    vocab = tokenizer.get_added_vocab()
    control = {vocab[token] for token in control_tokens(tokenizer)}
    plain = _without_added_tokens(tokenizer)

    def encode(piece: str) -> list[int]:
        return plain.encode(piece, add_special_tokens=False).ids

    ids = encode(text)
    if control.isdisjoint(ids):
        return ids
    ids = encode(text[:1]) + [i for letter in text[1:] for i in _behind_text(letter, encode)]
    if not control.isdisjoint(ids):
        fix = "remove it, or set data.special_tokens_in_text to allow"
        raise DataError("the tokenizer cannot write a control token as plain text", got=repr(text), fix=fix)
    return ids


def adds_leading_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True where the tokenizer begins every string with a space (SentencePiece: ``"a"`` becomes ``"▁a"``)."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return encode("a") != _behind_text("a", encode)


def mask_first(example: TokenizedExample) -> TokenizedExample:
    """The example with its first label masked: nothing precedes it, alone or in a packed row."""
    labels = example["labels"]
    return {"input_ids": example["input_ids"], "labels": [IGNORE_INDEX] * len(labels[:1]) + labels[1:]}


def mask_places(labels: np.ndarray, places: np.ndarray) -> None:
    """Masks the labels at ``places``, in the array that is given."""
    labels[places] = IGNORE_INDEX


def to_filler(row: Any) -> Any:
    """The first token of a row (an example or a packed row), without a label."""
    first = {key: values[:1] for key, values in row.items()}
    return {**first, "labels": [IGNORE_INDEX]}


def slice_example(example: TokenizedExample, *, start: int, stop: int) -> TokenizedExample:
    """Tokens ``start`` to ``stop`` as an example of its own."""
    return mask_first(
        {"input_ids": example["input_ids"][start:stop], "labels": example["labels"][start:stop]}
    )


def count_targets(example: TokenizedExample) -> int:
    """The number of tokens that have a label."""
    return len(example["labels"]) - example["labels"].count(IGNORE_INDEX)


def fit(example: TokenizedExample, max_length: int, *, overflow: str) -> tuple[list[TokenizedExample], Fate]:
    """Brings an example to at most ``max_length`` tokens, or drops it.

        keep_target  ppppppppTTTTs -> pppTTTTs     the prompt is cut from the left, the target stays whole
        truncate     ppppppppTTTTs -> ppppppppT    cut from the right; a cut target gets no stop token
        split        TTTTTTTTTTTTs -> TTTTTTTT, TTTTTs    the pieces share one token, so that no label is lost

    Args:
        overflow: ``keep_target``, ``truncate``, ``drop``, ``error`` (DataError) or ``split``.
    """
    length = len(example["input_ids"])
    size: dict[str, Any] = {"tokens": length, "target_tokens": count_targets(example)}
    if size["target_tokens"] == 0:
        return [], Fate("dropped", "no target token", **size)
    if length <= max_length:
        return [example], Fate("used", **size)
    pieces = OVERFLOWS[overflow](example, max_length)
    pieces = [piece for piece in pieces if count_targets(piece)]
    if not pieces:
        reason = "longer than max_length" if overflow == "drop" else "no whole target fits in max_length"
        return [], Fate("dropped", "no target token is left" if overflow == "truncate" else reason, **size)
    if overflow == "split":
        return pieces, Fate("split", **size)
    return pieces, Fate("cut", cut_tokens=length - max_length, **size)


def _keep_target(example: TokenizedExample, max_length: int) -> list[TokenizedExample]:
    """Cuts what lies before the first target, but for one token: the target is predicted from it."""
    length = len(example["input_ids"])
    first_target = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
    start = length - max_length
    return [slice_example(example, start=start, stop=length)] if start < first_target else []


def _refuse(example: TokenizedExample, max_length: int) -> list[TokenizedExample]:
    got = f"{len(example['input_ids'])} tokens"
    raise DataError(
        f"longer than max_length={max_length}", got=got, fix="raise data.max_length or set data.overflow"
    )


def _split(example: TokenizedExample, max_length: int) -> list[TokenizedExample]:
    starts = range(0, len(example["input_ids"]) - 1, max_length - 1)
    return [slice_example(example, start=start, stop=start + max_length) for start in starts]


OVERFLOWS = {
    "keep_target": _keep_target,
    "truncate": lambda example, max_length: [slice_example(example, start=0, stop=max_length)],
    "drop": lambda example, max_length: [],
    "error": _refuse,
    "split": _split,
}


def _runs(segments: list[Segment]) -> list[Segment]:
    """Joins neighbours of one kind; an empty segment of the other kind (a border) keeps two of them apart."""
    groups = groupby(segments, key=lambda segment: (segment.is_target, segment.is_plain))
    runs = [Segment("".join(segment.text for segment in group), *key) for key, group in groups]
    return [run for run in runs if run.text]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same model, normalizer and pre-tokenizer without the table of added tokens."""
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _encode_inside(run: Segment, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a run that follows other text, without the space that a start of a string is given."""

    def encode(text: str) -> list[int]:
        if run.is_plain:
            return encode_plain(text, tokenizer)
        return tokenizer.encode(text, add_special_tokens=False)

    return _behind_text(run.text, encode)


def _behind_text(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Encodes ``text`` behind a newline, or a letter where that merges with it, and cuts these ids off."""
    for before in ("\n", "a"):
        head, ids = encode(before), encode(before + text)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return encode(text)
