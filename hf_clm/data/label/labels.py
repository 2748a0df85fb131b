"""Pieces to input_ids and labels. The only place where a prompt becomes -100.

pieces     | Say hi.\n        | Hi!        <eos> |
input_ids  |  9  4  1         |  7   2     0     |
labels     | -100 -100 -100   |  7   2     0     |     unshifted: the loss compares logits t with labels t+1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.render import APART, LabelOptions, Plan, Renderer
from hf_clm.errors import DataError
from hf_clm.schema import IGNORE_INDEX, Chat, Example, Message, TokenizedExample, Tokens
from hf_clm.text.encode import Encoder, Piece
from hf_clm.text.tokenizer import max_token_id

Rows = list[TokenizedExample]
AnyRow = TypeVar("AnyRow", bound=Any)


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of an example. ``kind``: used, cut, split, or dropped; ``reason`` says more.

    ``tokens`` and ``target_tokens`` are those of its rows before they were fitted.
    """

    kind: str
    reason: str = ""
    cut_tokens: int = 0
    tokens: int = field(default=0, compare=False)
    target_tokens: int = field(default=0, compare=False)


def encode_plans(plans: Sequence[Plan], encoder: Encoder) -> list[Rows]:
    """The rows of each plan, encoded in one call; a chat whose turns do not continue is parted into turns."""
    pieces = [piece for plan in plans for row in plan.rows for piece in row]
    encoded = iter(encoder.encode(pieces))
    found = []
    for plan in plans:
        rows, continues = [], True
        for row in plan.rows:
            own = [next(encoded) for _ in row]
            continues &= all(joins or not piece.must_join for piece, (_, joins) in zip(row, own, strict=True))
            rows.append(to_row(row, [ids for ids, _ in own]))
        if not continues and plan.apart is not None:
            plan.rows, plan.notes, plan.apart = plan.apart, [*plan.notes, APART], None
            rows = encode_plans([plan], encoder)[0]
        found.append(rows)
    return found


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, options: LabelOptions
) -> list[list[int]]:
    """The ids that ``generate`` is given for each example: those before its (last) target in training.

    Raises DataError where the template refuses a chat, or the policy for control tokens a text.
    """
    renderer = Renderer(tokenizer, options)
    return [
        [id for ids, _ in renderer.encoder.encode(renderer.prompt(example)) for id in ids]
        for example in examples
    ]


def to_row(pieces: Sequence[Piece], ids: Sequence[list[int]]) -> TokenizedExample:
    """One row: labels where a piece has a weight, but for the first token, which nothing precedes."""
    input_ids: list[int] = []
    labels: list[int] = []
    for piece, own in zip(pieces, ids, strict=True):
        input_ids += own
        labels += own if piece.weight else [IGNORE_INDEX] * len(own)
    row: TokenizedExample = {"input_ids": input_ids, "labels": labels}
    if any(piece.weight not in (0.0, 1.0) for piece in pieces):
        row["weights"] = [
            piece.weight for piece, own in zip(pieces, ids, strict=True) for _ in range(len(own))
        ]
    return mask_first(row)


def tokens_to_rows(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """The documents of a row that the user tokenized.

    Raises DataError for ids that are not in the vocabulary.
    """
    limit = max_token_id(tokenizer)
    both = enumerate(zip(tokens.input_ids, tokens.labels, strict=True))
    for at, token in ((at, max(pair)) for at, pair in both if max(pair) > limit):
        got = f"{token} at position {at}, and the largest id is {limit}"
        raise DataError("an id that is not in the vocabulary", got=got, fix="use the tokenizer of the data")
    whole: TokenizedExample = {"input_ids": tokens.input_ids, "labels": tokens.labels}
    for at, (token, label) in enumerate(zip(tokens.input_ids, tokens.labels, strict=True)):
        if label not in (token, IGNORE_INDEX):
            fix = "labels equal input_ids, or are -100: the loss shifts them"
            raise DataError(f"label {label} at position {at} is not the id there", got=str(token), fix=fix)
    if tokens.mask:
        both = zip(tokens.labels, tokens.mask, strict=True)
        whole["labels"] = [label if keep else IGNORE_INDEX for label, keep in both]
    bounds = pairwise(accumulate(tokens.lengths, initial=0))
    return [slice_row(whole, start=start, stop=stop) for start, stop in bounds]


def weigh(rows: Rows, weight: float) -> Rows:
    """The rows with the weight of their record on every label. The only place where it counts."""
    if weight == 1:
        return rows
    found: Rows = []
    for row in rows:
        own = row.get("weights") or [1.0] * len(row["labels"])
        found.append({**row, "weights": [weight * one for one in own]})
    return found


def mask_first(row: TokenizedExample) -> TokenizedExample:
    """The row with its first label masked: nothing precedes it, alone or in a packed row."""
    labels = row["labels"]
    return {**row, "labels": [IGNORE_INDEX] * len(labels[:1]) + labels[1:]}


def mask_places(labels: np.ndarray, places: np.ndarray) -> None:
    """Masks the labels at ``places``, in the array that is given."""
    labels[places] = IGNORE_INDEX


def to_filler(row: AnyRow) -> AnyRow:
    """The first token of a row, plain or packed, without a label."""
    first: Any = {key: values[:1] for key, values in row.items()}
    first["labels"] = [IGNORE_INDEX]
    return first


def slice_row(row: TokenizedExample, *, start: int, stop: int) -> TokenizedExample:
    """Tokens ``start`` to ``stop`` as a row of its own."""
    part: TokenizedExample = {
        "input_ids": row["input_ids"][start:stop],
        "labels": row["labels"][start:stop],
    }
    if "weights" in row:
        part["weights"] = row["weights"][start:stop]
    return mask_first(part)


def count_targets(row: TokenizedExample) -> int:
    """The number of tokens that have a label."""
    return len(row["labels"]) - row["labels"].count(IGNORE_INDEX)


def fit(rows: Rows, max_length: int | None, *, overflow: str, keeps: int = 0) -> tuple[Rows, Fate]:
    """Brings the rows of an example to at most ``max_length`` tokens, or drops them.

        keep_target  ppppppppTTTTs -> pppTTTTs     the prompt is cut from the left, the target stays whole
        truncate     ppppppppTTTTs -> ppppppppT    cut from the right; a cut target gets no stop token
        split        TTTTTTTTTTTTs -> TTTTTTTT, TTTTTs    the pieces share one token, so that no label is lost

    Args:
        overflow: ``keep_target``, ``truncate``, ``drop``, ``error`` (DataError) or ``split``.
        keeps: tokens at the start of a prompt that a cut leaves: 1 for a start token.
    """
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(map(count_targets, rows))
    if targets == 0:
        return [], Fate("dropped", "no target token", tokens=tokens, target_tokens=targets)
    longest = max(len(row["input_ids"]) for row in rows)
    if max_length is None or longest <= max_length:
        return rows, Fate("used", tokens=tokens, target_tokens=targets)
    kept: Rows = []
    for row in rows:
        pieces = [row]
        if len(row["input_ids"]) > max_length:
            pieces = _OVERFLOWS[overflow](row, max_length, keeps)
        kept += [piece for piece in pieces if count_targets(piece)]
    if not kept:
        reason = "longer than max_length" if overflow == "drop" else "no whole target fits in max_length"
        reason = "no target token is left" if overflow == "truncate" else reason
        return [], Fate("dropped", reason, tokens=tokens, target_tokens=targets)
    if overflow == "split":
        return kept, Fate("split", tokens=tokens, target_tokens=targets)
    cut = tokens - sum(len(row["input_ids"]) for row in kept)
    return kept, Fate("cut", cut_tokens=cut, tokens=tokens, target_tokens=targets)


def fit_windows(rows: Rows, *, size: int, step: int) -> tuple[Rows, Fate]:
    """Cuts rows into windows of ``size`` tokens, one every ``step`` tokens; the last may be shorter."""
    windows: Rows = []
    for row in rows:
        starts = range(0, max(1, len(row["input_ids"]) - (size - step)), step)
        windows += [slice_row(row, start=start, stop=start + size) for start in starts]
    windows = [window for window in windows if len(window["input_ids"]) > 1]
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(map(count_targets, rows))
    if not windows:
        return [], Fate("dropped", "no target token", tokens=tokens, target_tokens=targets)
    if len(windows) == len(rows):
        return windows, Fate("used", tokens=tokens, target_tokens=targets)
    return windows, Fate("split", "windows", tokens=tokens, target_tokens=targets)


def fit_chat(chat: Chat, rows: Rows, renderer: Renderer, *, max_length: int) -> tuple[Rows, Fate]:
    """Cuts a chat as if its record held only its system turn and the last turns that fit.

    It begins at a user's turn. Where each turn is a row, each row is cut on its own.
    """
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(map(count_targets, rows))
    known: dict[str, int] = {"tokens": tokens, "target_tokens": targets}
    learned = [
        number
        for number, message in enumerate(chat.messages)
        if message["role"] == "assistant" and message.get("weight", 1.0) > 0
    ]
    chat = replace(chat, messages=chat.messages[: learned[-1] + 1])  # what follows is in no row
    parts = [chat] if len(rows) == 1 else _ending_in_each_turn(chat)
    kept: Rows = []
    left_out = 0
    for part in parts:
        first, fitted = _cut_turns(part, renderer, max_length=max_length)
        left_out, kept = max(left_out, first), kept + fitted
    if not kept:
        return [], Fate("dropped", "no whole target fits in max_length", **known)
    first = next((n for n, m in enumerate(chat.messages, start=1) if m["role"] != "system"), 1)
    reason = f"messages {first} to {left_out} left out" if left_out else "turns that do not fit left out"
    length = sum(len(row["input_ids"]) for row in kept)
    return kept, Fate("cut", reason, cut_tokens=tokens - length, **known)


def cut_chat(chat: Chat, fits: Callable[[Chat], bool]) -> tuple[int, Chat] | None:
    """The chat with the last turns that fit, after its system turns, and where they begin; None for none.

    ``fits`` is asked of ever shorter chats; what fits stays fitting without its first turns.
    """
    messages = chat.messages
    systems = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
    starts = [systems] + [n for n in range(systems + 1, len(messages)) if messages[n]["role"] == "user"]

    def at(number: int) -> Chat:
        return replace(chat, messages=messages[:systems] + messages[starts[number] :])

    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(at(middle)) else (middle + 1, high)
    return None if low == len(starts) else (starts[low] if low else 0, at(low))


def _cut_turns(chat: Chat, renderer: Renderer, *, max_length: int) -> tuple[int, Rows]:
    found: dict[str, Rows] = {}

    def fits(part: Chat) -> bool:
        plan = renderer.plan(part)
        found["rows"] = rows = encode_plans([plan], renderer.encoder)[0]
        return bool(rows) and all(len(row["input_ids"]) <= max_length for row in rows)

    cut = cut_chat(chat, fits)
    if cut is None or not fits(cut[1]):
        return 0, []
    return cut[0], [row for row in found["rows"] if count_targets(row)]


def _ending_in_each_turn(chat: Chat) -> list[Chat]:
    """The chat up to each assistant turn, of which that turn alone is learned."""
    parts = []
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            read: list[Message] = [
                {**m, "weight": 0.0} if m["role"] == "assistant" else m for m in chat.messages[:number]
            ]
            parts.append(Chat([*read, message], chat.tools, chat.template_kwargs))
    return parts


def _keep_target(row: TokenizedExample, max_length: int, keeps: int) -> Rows:
    """Cuts what lies before the first target, but for a start token and one to predict the target from."""
    length = len(row["input_ids"])
    first_target = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    keeps = min(keeps, max_length - 1)
    start = length - (max_length - keeps)
    if start >= first_target and not (keeps and start == first_target):
        return []
    whole = slice_row(row, start=start, stop=length)
    head = slice_row(row, start=0, stop=keeps)
    joined: Any = {key: [*head[key], *row[key][start:]] for key in whole}
    return [mask_first(joined)]


def _refuse(row: TokenizedExample, max_length: int, keeps: int) -> Rows:
    got = f"{len(row['input_ids'])} tokens"
    fix = "raise data.max_length or set data.overflow"
    raise DataError(f"longer than max_length={max_length}", got=got, fix=fix)


def _split(row: TokenizedExample, max_length: int, keeps: int) -> Rows:
    starts = range(0, len(row["input_ids"]) - 1, max_length - 1)
    return [slice_row(row, start=start, stop=start + max_length) for start in starts]


_OVERFLOWS: dict[str, Callable[[TokenizedExample, int, int], Rows]] = {
    "keep_target": _keep_target,
    "truncate": lambda row, max_length, keeps: [slice_row(row, start=0, stop=max_length)],
    "drop": lambda row, max_length, keeps: [],
    "error": _refuse,
    "split": _split,
}
