"""Converts pieces to input_ids and labels. The only place where the labels of a prompt become -100.

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

from hf_clm.data.label.render import APART, LabelOptions, Renderer, RowPlan
from hf_clm.errors import DataError
from hf_clm.schema import IGNORE_INDEX, Chat, Example, Message, TokenizedExample, Tokens
from hf_clm.text.encode import Encoder, Piece
from hf_clm.text.tokenizer import max_token_id

NO_ROOM = "no whole target fits in max_length"  # why a record is dropped

Rows = list[TokenizedExample]
AnyRow = TypeVar("AnyRow", bound=Any)


@dataclass(frozen=True, slots=True)
class Fate:
    """What happened to an example. ``kind`` is used, cut, split or dropped; ``reason`` has details.

    ``tokens`` and ``target_tokens`` are counted before the rows were fitted to ``max_length``.
    """

    kind: str
    reason: str = ""
    cut_tokens: int = 0
    tokens: int = field(default=0, compare=False)
    target_tokens: int = field(default=0, compare=False)


def encode_plans(plans: Sequence[RowPlan], encoder: Encoder) -> list[Rows]:
    """Encodes the rows of all plans in one call. Chats whose turns cannot be joined get one row per turn."""
    pieces = [piece for plan in plans for row in plan.rows for piece in row]
    encodings = iter(encoder.encode(pieces))
    encoded_plans = []
    for plan in plans:
        rows, continues = [], True
        for row in plan.rows:
            parts = [next(encodings) for _ in row]
            pairs = zip(row, parts, strict=True)
            continues &= all(joins or not piece.must_join for piece, (_, joins) in pairs)
            rows.append(to_row(row, [ids for ids, _ in parts]))
        if not continues and plan.apart is not None:
            plan.rows, plan.notes, plan.apart = plan.apart, [*plan.notes, APART], None
            rows = encode_plans([plan], encoder)[0]
        encoded_plans.append(rows)
    return encoded_plans


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, options: LabelOptions
) -> list[list[int]]:
    """Returns the input ids for ``generate``: in training, the same ids precede the (last) target.

    Raises DataError if the template refuses a chat, or the policy for control tokens refuses a text.
    """
    renderer = Renderer(tokenizer, options)
    return [
        [id for ids, _ in renderer.encoder.encode(renderer.prompt(example)) for id in ids]
        for example in examples
    ]


def to_row(pieces: Sequence[Piece], ids: Sequence[list[int]]) -> TokenizedExample:
    """Returns a row with labels for pieces that have a weight, except for its first token."""
    input_ids: list[int] = []
    labels: list[int] = []
    for piece, part in zip(pieces, ids, strict=True):
        input_ids += part
        labels += part if piece.weight else [IGNORE_INDEX] * len(part)
    row: TokenizedExample = {"input_ids": input_ids, "labels": labels}
    if any(piece.weight not in (0.0, 1.0) for piece in pieces):
        row["weights"] = [
            piece.weight for piece, part in zip(pieces, ids, strict=True) for _ in range(len(part))
        ]
    return mask_first(row)


def tokens_to_rows(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """Returns a row for each document of a tokenized record.

    Raises DataError for an id that is not in the vocabulary, and for a label that does not equal its id.
    """
    limit = max_token_id(tokenizer)
    both = enumerate(zip(tokens.input_ids, tokens.labels, strict=True))
    for at, token in ((at, max(pair)) for at, pair in both if max(pair) > limit):
        got = f"{token} at position {at}, but the largest id is {limit}"
        fix = "use the tokenizer with which the data were tokenized"
        raise DataError("an id is not in the vocabulary", got=got, fix=fix)
    full_row: TokenizedExample = {"input_ids": tokens.input_ids, "labels": tokens.labels}
    for at, (token, label) in enumerate(zip(tokens.input_ids, tokens.labels, strict=True)):
        if label not in (token, IGNORE_INDEX):
            fix = "set each label to its input id or to -100, without shifting"
            raise DataError(f"label {label} at position {at} differs from its id", got=str(token), fix=fix)
    if tokens.mask:
        both = zip(tokens.labels, tokens.mask, strict=True)
        full_row["labels"] = [label if keep else IGNORE_INDEX for label, keep in both]
    bounds = pairwise(accumulate(tokens.lengths, initial=0))
    return [slice_row(full_row, start=start, stop=stop) for start, stop in bounds]


def weigh(rows: Rows, weight: float) -> Rows:
    """Multiplies the weights of all labels by the weight of their record."""
    if weight == 1:
        return rows
    weighted: Rows = []
    for row in rows:
        weights = row.get("weights") or [1.0] * len(row["labels"])
        weighted.append({**row, "weights": [weight * one for one in weights]})
    return weighted


def mask_first(row: TokenizedExample) -> TokenizedExample:
    """Masks the first label of a row, which no token precedes, alone or in a packed row."""
    labels = row["labels"]
    return {**row, "labels": [IGNORE_INDEX] * len(labels[:1]) + labels[1:]}


def mask_places(labels: np.ndarray, places: np.ndarray) -> None:
    """Masks the labels at ``places`` in place."""
    labels[places] = IGNORE_INDEX


def to_filler(row: AnyRow) -> AnyRow:
    """Returns the first token of a plain or packed row, without a label."""
    first: Any = {key: values[:1] for key, values in row.items()}
    first["labels"] = [IGNORE_INDEX]
    return first


def slice_row(row: TokenizedExample, *, start: int, stop: int) -> TokenizedExample:
    """Returns tokens ``start:stop`` as a separate row."""
    part: TokenizedExample = {
        "input_ids": row["input_ids"][start:stop],
        "labels": row["labels"][start:stop],
    }
    if "weights" in row:
        part["weights"] = row["weights"][start:stop]
    return mask_first(part)


def count_targets(row: TokenizedExample) -> int:
    """Returns the number of tokens with a label."""
    return len(row["labels"]) - row["labels"].count(IGNORE_INDEX)


def fit(rows: Rows, max_length: int | None, *, overflow: str, keeps: int = 0) -> tuple[Rows, Fate]:
    """Fits the rows of an example to at most ``max_length`` tokens, or drops them.

        keep_target  ppppppppTTTTs -> pppTTTTs     cuts the prompt from the left and keeps the target
        truncate     ppppppppTTTTs -> ppppppppT    cuts from the right; a cut target has no stop token
        split        TTTTTTTTTTTTs -> TTTTTTTT, TTTTTs    pieces overlap by one token, so no label is lost

    Args:
        overflow: ``keep_target``, ``truncate``, ``drop``, ``error`` (DataError) or ``split``.
        keeps: number of tokens at the start of a prompt that are never cut: 1 for a start token.
    """
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(map(count_targets, rows))
    if targets == 0:
        return [], Fate("dropped", "no target token", tokens=tokens, target_tokens=targets)
    longest = max(len(row["input_ids"]) for row in rows)
    if max_length is None or longest <= max_length:
        return rows, Fate("used", tokens=tokens, target_tokens=targets)
    fitted: Rows = []
    for row in rows:
        pieces = [row]
        if len(row["input_ids"]) > max_length:
            pieces = _OVERFLOWS[overflow](row, max_length, keeps)
        fitted += [piece for piece in pieces if count_targets(piece)]
    if not fitted:
        reason = "longer than max_length" if overflow == "drop" else NO_ROOM
        reason = "no target token is left" if overflow == "truncate" else reason
        return [], Fate("dropped", reason, tokens=tokens, target_tokens=targets)
    if overflow == "split":
        return fitted, Fate("split", tokens=tokens, target_tokens=targets)
    cut = tokens - sum(len(row["input_ids"]) for row in fitted)
    return fitted, Fate("cut", cut_tokens=cut, tokens=tokens, target_tokens=targets)


def fit_windows(rows: Rows, *, size: int, step: int) -> tuple[Rows, Fate]:
    """Splits rows into windows of ``size`` tokens, one every ``step`` tokens; the last may be shorter."""
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
    """Cuts a chat to its system turn and the last turns that fit, starting at a user turn.

    If each turn is a separate row, each row is cut separately.
    """
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(map(count_targets, rows))
    counts: dict[str, int] = {"tokens": tokens, "target_tokens": targets}
    answers = [
        number
        for number, message in enumerate(chat.messages)
        if message["role"] == "assistant" and message.get("weight", 1.0) > 0
    ]
    chat = replace(chat, messages=chat.messages[: answers[-1] + 1])  # later turns are in no row
    parts = [chat] if len(rows) == 1 else _ending_in_each_turn(chat)
    fitted_rows: Rows = []
    left_out = 0
    for part in parts:
        first, fitted = _cut_turns(part, renderer, max_length=max_length)
        left_out, fitted_rows = max(left_out, first), fitted_rows + fitted
    if not fitted_rows:
        return [], Fate("dropped", NO_ROOM, **counts)
    first = next((n for n, m in enumerate(chat.messages, start=1) if m["role"] != "system"), 1)
    reason = f"messages {first} to {left_out} left out" if left_out else "turns that do not fit left out"
    length = sum(len(row["input_ids"]) for row in fitted_rows)
    return fitted_rows, Fate("cut", reason, cut_tokens=tokens - length, **counts)


def cut_chat(chat: Chat, fits: Callable[[Chat], bool]) -> tuple[int, Chat] | None:
    """Cuts a chat to its system turns and the last turns that fit.

    Returns the number of the first of these turns and the chat, or None if not even the last turns fit.
    Searches by bisection: a chat that fits must also fit without its first turns.
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
    rows_of: dict[str, Rows] = {}

    def fits(part: Chat) -> bool:
        plan = renderer.plan(part)
        rows_of["part"] = rows = encode_plans([plan], renderer.encoder)[0]
        return bool(rows) and all(len(row["input_ids"]) <= max_length for row in rows)

    cut = cut_chat(chat, fits)
    if cut is None or not fits(cut[1]):
        return 0, []
    return cut[0], [row for row in rows_of["part"] if count_targets(row)]


def _ending_in_each_turn(chat: Chat) -> list[Chat]:
    """Returns the chat up to each assistant turn, with only that turn as a target."""
    parts = []
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            context: list[Message] = [
                {**m, "weight": 0.0} if m["role"] == "assistant" else m for m in chat.messages[:number]
            ]
            parts.append(Chat([*context, message], chat.tools, chat.template_kwargs))
    return parts


def _keep_target(row: TokenizedExample, max_length: int, keeps: int) -> Rows:
    """Cuts tokens before the first target; keeps a start token and one token to predict the target from."""
    length = len(row["input_ids"])
    first_target = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    keeps = min(keeps, max_length - 1)
    start = length - (max_length - keeps)
    if start >= first_target and not (keeps and start == first_target):
        return []
    tail = slice_row(row, start=start, stop=length)
    head = slice_row(row, start=0, stop=keeps)
    joined: Any = {key: [*head[key], *row[key][start:]] for key in tail}
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
