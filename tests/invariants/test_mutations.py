"""Plausible faults in the code for labels, rows and batches: no run takes a step with any of them.

Each fault is injected into a module, below all checks. It is detected by the doctor (no end token is
learned), the certificate (the labels of a row), the ledger (what is in which row) or the self-test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import EOS, PAD, X, byte_tokenizer, save_folder, tiny_model

from hf_clm.data.batch import collators, packing
from hf_clm.data.batch.packing import PackedDataset, Pieces, RowPiece
from hf_clm.data.label import datasets, labels, render
from hf_clm.data.label.render import Renderer
from hf_clm.errors import DataError, ModelError
from hf_clm.text.chat import ChatRenderer
from hf_clm.text.encode import Encoder
from hf_clm.training.run import train

RECORDS = [
    {"instruct": f"Say {n}.\n", "input": "", "label": f" Number {n}, <|im_end|>!" + "n" * n}
    for n in range(1, 9)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"One is {n}."},
            {"role": "user", "content": f"<|im_end|> {n}?"},
            {"role": "assistant", "content": f"It is {n}, <|im_end|>!"},
        ]
    }
    for n in range(1, 7)
]
WEIGHTED = [{**record, "weight": 0.5} for record in RECORDS]
WEIGHTED_TURNS = [
    {"messages": [*chat["messages"][:3], {**chat["messages"][3], "weight": 0.5}]} for chat in CHATS
]
PRETRAIN = {"stage": "pretrain", "data": {"packing": "stream", "max_length": 24}}
PACKED = {"data": {"packing": "best_fit"}}
CUT = {"data": {"overflow": "truncate", "max_length": 34}}  # 4 of the 8 rows


# --- labels.py


def edit_labels(patch: pytest.MonkeyPatch, change: Callable[[list[int], list[int]], list[int]]) -> None:
    """Changes the labels of a row, given its ids and labels, right after tokenization."""
    mask = labels.mask_first
    patch.setattr(
        labels, "mask_first", lambda row: {**row, "labels": change(row["input_ids"], mask(row)["labels"])}
    )


def mask_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    """The labels are shifted to the right by one; the last one is lost."""
    edit_labels(patch, lambda ids, labels: [X, *labels[:-1]])


def mask_one_too_long(patch: pytest.MonkeyPatch) -> None:
    """The first token of each answer counts as prompt: an off-by-one error in a length."""

    def shorter(ids: list[int], labels: list[int]) -> list[int]:
        return [X if before == X else label for before, label in zip([X, *labels], labels, strict=False)]

    edit_labels(patch, shorter)


def end_masked(patch: pytest.MonkeyPatch) -> None:
    """Masks by id, as if the pad token were the end token."""
    edit_labels(patch, lambda ids, labels: [X if token == EOS else token for token in labels])


def edit_pieces_of_rows(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Changes each piece of a row before it is labelled."""
    to_row = labels.to_row
    patch.setattr(labels, "to_row", lambda pieces, ids: to_row([change(piece) for piece in pieces], ids))


def prompt_trained(patch: pytest.MonkeyPatch) -> None:
    edit_pieces_of_rows(patch, lambda piece: piece._replace(weight=1.0))


def weights_lost(patch: pytest.MonkeyPatch) -> None:
    edit_pieces_of_rows(patch, lambda piece: piece._replace(weight=float(piece.weight > 0)))


def weight_of_the_record_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(datasets, "weigh", lambda rows, weight: rows)


def prompt_and_target_tokenized_as_one(patch: pytest.MonkeyPatch) -> None:
    """Masks the prompt by its separate length, as in TRL: the newline and the space merge into one token."""
    encode_plans = labels.encode_plans

    def joined(plans, encoder):
        rows = encode_plans(plans, encoder)
        for plan, (row,) in zip(plans, rows, strict=True):
            whole = plan.rows[0][0]._replace(text="".join(piece.text for piece in plan.rows[0]))
            ids = encoder.encode([whole])[0][0]
            length = len(row["labels"]) - sum(label >= 0 for label in row["labels"])
            row.update(input_ids=ids, labels=[X] * length + ids[length:])
        return rows

    patch.setattr(datasets, "encode_plans", joined)


def first_token_labelled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(labels, "mask_first", lambda row: row)


def false_end_after_a_cut(patch: pytest.MonkeyPatch) -> None:
    """As in LLaMA-Factory: a truncated answer is followed by a learned end token."""
    cut = labels.slice_row

    def ended(example, *, start, stop):
        row = cut(example, start=start, stop=stop)
        return {key: [*values[:-1], EOS] for key, values in row.items()}

    patch.setattr(labels, "slice_row", ended)


# --- render.py, chat.py and encode.py


def end_forgotten(patch: pytest.MonkeyPatch) -> None:
    segment = render.Segment
    patch.setattr(
        render,
        "Segment",
        lambda text, *kind, **more: segment("" if text == "<|endoftext|>" else text, *kind, **more),
    )


def control_text_not_protected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Encoder, "mark", lambda self, text, **kind: text)


def answer_stripped(patch: pytest.MonkeyPatch) -> None:
    runs = render._runs
    patch.setattr(
        render, "_runs", lambda parts: [(w, text.strip(" "), *kind) for w, text, *kind in runs(parts)]
    )


def edit_turns(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Changes each rendered turn of a chat before it is labelled."""
    turns = ChatRenderer.turns
    patch.setattr(ChatRenderer, "turns", lambda self, chat: [change(turn) for turn in turns(self, chat)])


def end_of_a_turn_not_learned(patch: pytest.MonkeyPatch) -> None:
    """The target excludes the token that ends the turn, so the model never stops."""
    edit_turns(patch, lambda turn: turn._replace(target=turn.target.removesuffix("<|im_end|>"), end=""))


def prompt_of_an_older_template(patch: pytest.MonkeyPatch) -> None:
    """As if training and inference used different copies of the template."""
    edit_turns(
        patch,
        lambda turn: turn._replace(prompt=turn.prompt.replace("<|im_start|>user\n", "<|im_start|>user: ")),
    )


def only_the_first_turn_learned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Renderer, "_weight", lambda self, message, is_last: float(message["content"].startswith("One"))
    )


# --- packing.py


def edit_pieces(
    patch: pytest.MonkeyPatch, packer: str, change: Callable[[list[list[RowPiece]]], list[list[RowPiece]]]
) -> None:
    """Changes the pieces of each row after packing."""
    pack = getattr(packing, packer)

    def edited(*args):
        rows = change(list(pack(*args)))
        columns = [np.array(column) for column in zip(*(piece for row in rows for piece in row), strict=True)]
        return Pieces(*columns, np.cumsum([0, *map(len, rows)]))

    patch.setattr(packing, packer, edited)


def packing_drops_a_document(patch: pytest.MonkeyPatch) -> None:
    """A full row is closed before its last document is added."""
    edit_pieces(patch, "best_fit_rows", lambda rows: [row[: max(1, len(row) - 1)] for row in rows])


def packing_repeats_a_document(patch: pytest.MonkeyPatch) -> None:
    edit_pieces(patch, "best_fit_rows", lambda rows: [*rows, rows[0][:1]])


def positions_run_on_in_a_row(patch: pytest.MonkeyPatch) -> None:
    """The collator then sees one document per row."""
    read = PackedDataset.__getitem__

    def broken(self, index):
        row = read(self, index)
        return {**row, "position_ids": np.arange(len(row["input_ids"]))}

    patch.setattr(PackedDataset, "__getitem__", broken)


def stream_loses_the_label_at_a_border(patch: pytest.MonkeyPatch) -> None:
    """The next row starts after the cut, so its first token is never a target."""

    def apart(rows):
        return [[(n, start + (start > 0), stop) for n, start, stop in row] for row in rows]

    edit_pieces(patch, "stream_rows", apart)


# --- collators.py


def padding_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collators, "IGNORE_INDEX", PAD)


def collator_ignores_the_positions_of_a_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collators, "_positions", lambda example: np.arange(len(example["input_ids"])))


def edit_batch(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the labels of a packed batch."""
    collate = collators.DataCollatorForPackedCausalLM.__call__

    def edited(self, examples):
        batch = collate(self, examples)
        return {**batch, "labels": change(batch["labels"])}

    patch.setattr(collators.DataCollatorForPackedCausalLM, "__call__", edited)


def collator_shifts_the_labels(patch: pytest.MonkeyPatch) -> None:
    """The loss then shifts them again."""
    edit_batch(patch, lambda labels: labels.roll(-1, dims=1))


def collator_drops_the_last_label(patch: pytest.MonkeyPatch) -> None:
    edit_batch(patch, lambda labels: torch.cat([labels[:, :-1], torch.full_like(labels[:, -1:], X)], dim=1))


def padding_on_the_left(patch: pytest.MonkeyPatch) -> None:
    """Positions and labels are not moved."""
    pad = collators.DataCollatorForCausalLM.__call__

    def left(self, examples):
        batch = pad(self, examples)
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            batch["input_ids"][row] = batch["input_ids"][row].roll(batch["input_ids"].shape[1] - length)
        return batch

    patch.setattr(collators.DataCollatorForCausalLM, "__call__", left)


CERTIFIED, LOSS = (
    "the labels are not certified",
    "the self-test of the loss failed",
)

# The fault, the run, and its error.
MUTATIONS = [
    (mask_shifted_by_one, {}, CERTIFIED),
    (mask_one_too_long, {}, CERTIFIED),
    (end_masked, {}, CERTIFIED),
    (prompt_trained, {}, CERTIFIED),
    (prompt_and_target_tokenized_as_one, {}, CERTIFIED),
    (first_token_labelled, PRETRAIN, CERTIFIED),
    (false_end_after_a_cut, CUT, CERTIFIED),
    (end_forgotten, {}, CERTIFIED),
    (control_text_not_protected, {}, CERTIFIED),
    (answer_stripped, {}, CERTIFIED),
    (weight_of_the_record_lost, {"records": WEIGHTED}, CERTIFIED),
    (weights_lost, {"records": WEIGHTED_TURNS}, CERTIFIED),
    (prompt_trained, CUT, CERTIFIED),
    (prompt_of_an_older_template, {"records": CHATS}, CERTIFIED),
    (end_of_a_turn_not_learned, {"records": CHATS}, CERTIFIED),
    (mask_one_too_long, {"records": CHATS}, CERTIFIED),
    (prompt_trained, {"records": CHATS}, CERTIFIED),
    (control_text_not_protected, {"records": CHATS}, CERTIFIED),
    (only_the_first_turn_learned, {"records": CHATS}, CERTIFIED),
    (packing_drops_a_document, PACKED, "data.packing: packing has "),
    (packing_repeats_a_document, PACKED, "data.packing: packing has "),
    (positions_run_on_in_a_row, PACKED, "differs from its 2 documents"),
    (positions_run_on_in_a_row, PRETRAIN, "differs from its "),
    (stream_loses_the_label_at_a_border, PRETRAIN, "data.packing: packing has "),
    (padding_trained, {}, f"{LOSS}: one document at a time gives a different loss"),
    (padding_on_the_left, {}, f"{LOSS}: padded rows give a different loss"),
    (
        collator_ignores_the_positions_of_a_row,
        PACKED,
        f"{LOSS}: one document at a time gives a different loss",
    ),
    (collator_shifts_the_labels, PACKED, f"{LOSS}: "),
    (collator_drops_the_last_label, PACKED, f"{LOSS}: one document at a time gives a different loss"),
]


def run(folder: Path, *, records: list[Any] = RECORDS, **changes: Any) -> dict[str, Any]:
    """Runs one step with a tokenizer that merges a newline with a space."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ġ")])
    name = save_folder(folder / "model", tiny_model("llama", vocab_size=261), tokenizer)
    template = {"tokenizer": {"chat_template": "chatml"}} if "messages" in records[0] else {}
    recipe = helpers.build_recipe(
        folder, records, model={"name_or_path": name}, train={"max_steps": 1}, **template, **changes
    )
    return train(recipe)


@pytest.mark.parametrize(
    "changes",
    [{}, {"records": CHATS}, PACKED, CUT, PRETRAIN],
    ids=["plain", "chats", "packed", "cut", "stream"],
)
def test_a_run_without_a_fault_passes(changes, tmp_path):
    assert run(tmp_path, **changes)["steps_done"] == 1


def test_there_are_at_least_ten_faults_in_each_kind_of_module():
    assert len({breaks for breaks, _, _ in MUTATIONS}) == 24


@pytest.mark.parametrize(
    ("breaks", "changes", "reason"), MUTATIONS, ids=[f"{n}-{m[0].__name__}" for n, m in enumerate(MUTATIONS)]
)
def test_a_fault_is_detected_before_the_first_step(breaks, changes, reason, tmp_path, monkeypatch, capsys):
    breaks(monkeypatch)

    with pytest.raises((DataError, ModelError)) as error:
        run(tmp_path, **changes)

    assert reason in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "step 0/1" not in capsys.readouterr().out


@pytest.mark.parametrize("packing_kind", ["none", "best_fit"])
def test_the_error_has_the_row_the_expected_and_the_actual_text(packing_kind, tmp_path, monkeypatch):
    mask_one_too_long(monkeypatch)

    with pytest.raises(DataError) as error:
        run(tmp_path, data={"packing": packing_kind})

    text = str(error.value).replace(f"{tmp_path}/", "")
    assert text.startswith(
        "rows.jsonl:1: the labels are not certified (8 prompt of 8 rows); got rows.jsonl:1: "
    )
    assert "expected 'Say 1.\\n', got 'Say 1.\\n '; rows.jsonl:2: " in text
