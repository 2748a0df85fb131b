"""What makes labels, rows and batches, broken in plausible ways: no run takes a step with one of them.

Each break is put inside a module, under everything that checks it. What refuses it: the doctor (no end is
learned at all), the certificate (the labels of a row), the ledger (what is in which row) or the self-test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import EOS, PAD, X, byte_tokenizer, save_folder, tiny_model

from hf_clm.data import collators, datasets, labels, packing, segments
from hf_clm.data.packing import PackedDataset, Piece, Pieces
from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Segment
from hf_clm.training.run import train

RECORDS = [
    {"instruct": f"Say {n}.", "input": "", "label": f" Number {n}, <|im_end|>!" + "n" * n}
    for n in range(1, 9)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"It is {n}."},
        ]
        * 2
    }
    for n in range(1, 7)
]
PRETRAIN = {"stage": "pretrain", "data": {"packing": "stream", "max_length": 24}}
PACKED = {"data": {"packing": "best_fit"}}
CUT = {"data": {"overflow": "truncate", "max_length": 34}}  # 4 of the 8 rows


# --- labels.py


def edit_labels(patch: pytest.MonkeyPatch, change: Callable[[list[int], list[int]], list[int]]) -> None:
    """Ids and labels of a row -> its labels, where the tokenizer's runs have just become one row."""
    mask = labels.mask_first
    patch.setattr(
        labels, "mask_first", lambda row: {**row, "labels": change(row["input_ids"], mask(row)["labels"])}
    )


def mask_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    """The labels stand one place to the right; the end falls off."""
    edit_labels(patch, lambda ids, labels: [X, *labels[:-1]])


def mask_one_too_long(patch: pytest.MonkeyPatch) -> None:
    """The first token of each answer is taken for prompt: an off-by-one in a length."""

    def shorter(ids: list[int], labels: list[int]) -> list[int]:
        return [X if before == X else label for before, label in zip([X, *labels], labels, strict=False)]

    edit_labels(patch, shorter)


def end_masked(patch: pytest.MonkeyPatch) -> None:
    """Masked by id, as where the pad token is the end token."""
    edit_labels(patch, lambda ids, labels: [X if token == EOS else token for token in labels])


def prompt_trained(patch: pytest.MonkeyPatch) -> None:
    runs = labels._runs
    patch.setattr(labels, "_runs", lambda parts: [Segment(r.text, True, r.is_plain) for r in runs(parts)])


def prompt_and_target_tokenized_as_one(patch: pytest.MonkeyPatch) -> None:
    """And the prompt masked by its own length, as TRL did: the newline and the space merge into one token."""
    tokenize = labels.tokenize_batch

    def joined(batch, tokenizer):
        whole = tokenize([[Segment(s.text, True, s.is_plain) for s in row] for row in batch], tokenizer)
        prompts = tokenize([[s for s in row if not s.is_target] for row in batch], tokenizer)
        lengths = [len(prompt["input_ids"]) for prompt in prompts]
        return [
            {**row, "labels": [X] * n + row["input_ids"][n:]} for row, n in zip(whole, lengths, strict=True)
        ]

    patch.setattr(datasets, "tokenize_batch", joined)


def first_token_labelled(patch: pytest.MonkeyPatch) -> None:
    for module in (labels, datasets):
        patch.setattr(module, "mask_first", lambda row: row)


def false_end_after_a_cut(patch: pytest.MonkeyPatch) -> None:
    """As LLaMA-Factory does: the answer is cut, and yet taught to stop there."""
    cut = labels.slice_example

    def ended(example, *, start, stop):
        row = cut(example, start=start, stop=stop)
        return {key: [*values[:-1], EOS] for key, values in row.items()}

    patch.setattr(labels, "slice_example", ended)


# --- segments.py and chat_template.py


def end_forgotten(patch: pytest.MonkeyPatch) -> None:
    def without(text, is_target, **kind):
        return Segment("" if text == "<|endoftext|>" else text, is_target, **kind)

    patch.setattr(segments, "Segment", without)


def control_text_not_protected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(segments, "mark_control_text", lambda text, tokenizer, own: text)


def answer_stripped(patch: pytest.MonkeyPatch) -> None:
    read = segments._text_segments
    patch.setattr(
        segments, "_text_segments", lambda row: [Segment(s.text.strip(" "), s.is_target) for s in read(row)]
    )


def end_of_a_turn_not_learned(patch: pytest.MonkeyPatch) -> None:
    """The generation span ends before the token that closes the turn: the model never stops."""
    render = segments.render_chat

    def short(*args, **options):
        parts = []
        for part in render(*args, **options):
            is_end = part.is_target and part.text.endswith("<|im_end|>")
            text = part.text.removesuffix("<|im_end|>")
            parts += [Segment(text, True), Segment("<|im_end|>", False)] if is_end else [part]
        return parts

    patch.setattr(segments, "render_chat", short)


def only_the_first_turn_learned(patch: pytest.MonkeyPatch) -> None:
    render = segments.render_chat

    def first(*args, **options):
        parts = render(*args, **options)
        stop = next(n for n, part in enumerate(parts) if part.is_target and part.text) + 1
        return parts[:stop] + [Segment(part.text, False) for part in parts[stop:]]

    patch.setattr(segments, "render_chat", first)


# --- packing.py


def edit_pieces(
    patch: pytest.MonkeyPatch, packer: str, change: Callable[[list[list[Piece]]], list[list[Piece]]]
) -> None:
    """The pieces of each row as they were packed -> as they are used."""
    pack = getattr(packing, packer)

    def edited(*args):
        rows = change(list(pack(*args)))
        columns = [np.array(column) for column in zip(*(piece for row in rows for piece in row), strict=True)]
        return Pieces(*columns, np.cumsum([0, *map(len, rows)]))

    patch.setattr(packing, packer, edited)


def packing_drops_a_document(patch: pytest.MonkeyPatch) -> None:
    """A row that is full is closed before its last document is put in."""
    edit_pieces(patch, "best_fit_rows", lambda rows: [row[: max(1, len(row) - 1)] for row in rows])


def packing_repeats_a_document(patch: pytest.MonkeyPatch) -> None:
    edit_pieces(patch, "best_fit_rows", lambda rows: [*rows, rows[0][:1]])


def positions_run_on_in_a_row(patch: pytest.MonkeyPatch) -> None:
    """So the collator sees one document a row."""
    read = PackedDataset.__getitem__

    def broken(self, index):
        row = read(self, index)
        return {**row, "position_ids": np.arange(len(row["input_ids"]))}

    patch.setattr(PackedDataset, "__getitem__", broken)


def stream_loses_the_label_at_a_border(patch: pytest.MonkeyPatch) -> None:
    """The next row begins behind the cut: its first token, which nothing precedes, is never learned."""

    def apart(rows):
        return [[(n, start + (start > 0), stop) for n, start, stop in row] for row in rows]

    edit_pieces(patch, "stream_rows", apart)


# --- collators.py


def padding_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collators, "IGNORE_INDEX", PAD)


def collator_ignores_the_positions_of_a_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collators, "_positions", lambda example: np.arange(len(example["input_ids"])))


def edit_batch(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The labels of a packed batch -> what the model is given."""
    collate = collators.DataCollatorForPackedCausalLM.__call__

    def edited(self, examples):
        batch = collate(self, examples)
        return {**batch, "labels": change(batch["labels"])}

    patch.setattr(collators.DataCollatorForPackedCausalLM, "__call__", edited)


def collator_shifts_the_labels(patch: pytest.MonkeyPatch) -> None:
    """And the loss shifts them again."""
    edit_batch(patch, lambda labels: labels.roll(-1, dims=1))


def collator_drops_the_last_label(patch: pytest.MonkeyPatch) -> None:
    edit_batch(patch, lambda labels: torch.cat([labels[:, :-1], torch.full_like(labels[:, -1:], X)], dim=1))


def padding_on_the_left(patch: pytest.MonkeyPatch) -> None:
    """With positions and labels left where they were."""
    pad = collators.DataCollatorForCausalLM.__call__

    def left(self, examples):
        batch = pad(self, examples)
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            batch["input_ids"][row] = batch["input_ids"][row].roll(batch["input_ids"].shape[1] - length)
        return batch

    patch.setattr(collators.DataCollatorForCausalLM, "__call__", left)


CERTIFIED, BALANCE, LOSS = (
    "the labels are not certified",
    "the ledger does not balance",
    "the self-test of the loss fails",
)

# What breaks, the run that it breaks, and what the run says.
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
    (end_of_a_turn_not_learned, {"records": CHATS}, CERTIFIED),
    (only_the_first_turn_learned, {"records": CHATS}, CERTIFIED),
    (packing_drops_a_document, PACKED, BALANCE),
    (packing_repeats_a_document, PACKED, "data.packing: packing keeps "),
    (positions_run_on_in_a_row, PACKED, "is not its 2 documents with positions that begin again"),
    (positions_run_on_in_a_row, PRETRAIN, "documents with positions that begin again"),
    (stream_loses_the_label_at_a_border, PRETRAIN, "data.packing: packing keeps "),
    (padding_trained, {}, f"{LOSS}: one document at a time gives another loss"),
    (padding_on_the_left, {}, f"{LOSS}: padded rows give another loss"),
    (collator_ignores_the_positions_of_a_row, PACKED, f"{LOSS}: one document at a time gives another loss"),
    (collator_shifts_the_labels, PACKED, f"{LOSS}: "),
    (collator_drops_the_last_label, PACKED, f"{LOSS}: one document at a time gives another loss"),
]


def run(folder: Path, *, records: list[Any] = RECORDS, **changes: Any) -> dict[str, Any]:
    """One step on a tokenizer that merges a newline with a space."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ġ")])
    name = save_folder(folder / "model", tiny_model("llama", vocab_size=261), tokenizer)
    template = {"tokenizer": {"chat_template": "chatml"}}
    recipe = helpers.build_recipe(
        folder, records, model={"name_or_path": name}, train={"max_steps": 1}, **template, **changes
    )
    return train(recipe)


@pytest.mark.parametrize(
    "changes",
    [{}, {"records": CHATS}, PACKED, CUT, PRETRAIN],
    ids=["plain", "chats", "packed", "cut", "stream"],
)
def test_nothing_is_refused_where_nothing_is_broken(changes, tmp_path):
    assert run(tmp_path, **changes)["steps_done"] == 1


def test_there_are_ten_breaks_or_more_in_each_kind_of_module():
    assert len({breaks for breaks, _, _ in MUTATIONS}) == 21


@pytest.mark.parametrize(
    ("breaks", "changes", "reason"), MUTATIONS, ids=[f"{n}-{m[0].__name__}" for n, m in enumerate(MUTATIONS)]
)
def test_a_break_is_refused_before_the_first_step(breaks, changes, reason, tmp_path, monkeypatch, capsys):
    breaks(monkeypatch)

    with pytest.raises((DataError, ModelError)) as error:
        run(tmp_path, **changes)

    assert reason in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "step 0/1" not in capsys.readouterr().out


@pytest.mark.parametrize("packing_kind", ["none", "best_fit"])
def test_the_refusal_names_the_row_the_expected_text_and_what_was_found(packing_kind, tmp_path, monkeypatch):
    mask_one_too_long(monkeypatch)

    with pytest.raises(DataError) as error:
        run(tmp_path, data={"packing": packing_kind})

    text = str(error.value).replace(f"{tmp_path}/", "")
    assert text.startswith(
        "rows.jsonl:1: the labels are not certified (8 prompt of 8 rows); got rows.jsonl:1: "
    )
    assert "expected 'Say 1.\\n', got 'Say 1.\\n '; rows.jsonl:2: " in text
