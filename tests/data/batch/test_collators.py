"""Batches compared with literals."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import PAD, X, tiny_model
from transformers import PreTrainedModel

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.model.attention import NAME, register

SHORT = {"input_ids": [1, 2], "labels": [X, 2]}
LONG = {"input_ids": [3, 4, 5], "labels": [X, X, 5]}
PACKED = {"input_ids": [1, 2, 3, 4, 5], "labels": [X, 2, X, 4, 5], "position_ids": [0, 1, 0, 1, 2]}


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def test_short_rows_are_padded_on_the_right():
    batch = DataCollatorForCausalLM(pad_token_id=PAD)([SHORT, LONG])

    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, PAD], [3, 4, 5]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[X, 2, X], [X, X, 5]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_padding_is_masked_by_length_not_by_id():
    """A pad id in the text keeps its label and is attended to."""
    short = {"input_ids": [1, PAD], "labels": [X, PAD]}

    batch = DataCollatorForCausalLM(pad_token_id=PAD)([short, LONG])

    assert batch["labels"].tolist() == [[X, PAD, X], [X, X, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_the_width_is_rounded_up_to_the_requested_multiple(multiple, width):
    batch = DataCollatorForCausalLM(PAD, pad_to_multiple_of=multiple)([SHORT, LONG])

    assert {tuple(value.shape) for value in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum().item() == 5
    assert batch["labels"][batch["attention_mask"] == 0].tolist() == [X] * (2 * width - 5)


def test_packed_rows_are_concatenated():
    batch = DataCollatorForPackedCausalLM()([PACKED, SHORT])

    assert {key: value.tolist() for key, value in batch.items() if torch.is_tensor(value)} == {
        "input_ids": [[1, 2, 3, 4, 5, 1, 2]],
        "labels": [[X, 2, X, 4, 5, X, 2]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 2, 5, 7],
        "cu_seq_lens_k": [0, 2, 5, 7],
    }
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert type(batch["max_length_q"]) is int
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert {batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}


def test_an_unpacked_example_is_one_document():
    batch = DataCollatorForPackedCausalLM()([LONG])

    assert batch["position_ids"].tolist() == [[0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3]
    assert batch["max_length_q"] == 3


def test_the_first_label_of_each_document_is_masked():
    """It would otherwise be predicted from the previous document."""
    batch = DataCollatorForPackedCausalLM()(
        [{**PACKED, "labels": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7], "labels": [6, 7]}]
    )

    assert batch["labels"].tolist() == [[X, 2, X, 4, 5, X, 7]]


def test_rows_of_arrays_give_the_same_batch_as_lists_and_are_not_modified():
    """Read-only, as from a memory map."""
    rows = [{key: np.array(values, dtype=np.int32) for key, values in row.items()} for row in (PACKED, SHORT)]
    for values in (values for row in rows for values in row.values()):
        values.flags.writeable = False

    batch = DataCollatorForPackedCausalLM(with_targets=True)(rows)

    assert plain(batch) == plain(DataCollatorForPackedCausalLM(with_targets=True)([PACKED, SHORT]))


def test_rows_without_weights_have_weight_1_and_padding_has_weight_0():
    weighted = {**LONG, "weights": [0.5, 2.0, 0.1]}
    shape = StaticShape(tokens=7, documents=2, max_length=4)

    padded = DataCollatorForCausalLM(PAD)([SHORT, weighted])["loss_weights"]
    packed = DataCollatorForPackedCausalLM(with_targets=True)([SHORT, weighted])["loss_weights"]
    static = DataCollatorForPackedCausalLM(static=shape)([SHORT, weighted])["loss_weights"]

    tenth = torch.tensor(0.1).item()  # as a float32
    assert padded.tolist() == [[1, 1, 0], [0.5, 2, tenth]]
    assert packed.tolist() == [[1, 1, 0.5, 2, tenth]]
    assert static.tolist() == [[1, 1, 0.5, 2, tenth, 0, 0]]
    assert padded.dtype == packed.dtype == static.dtype == torch.float32


def test_rows_of_arrays_with_weights_give_the_same_batch_as_lists():
    row = {**PACKED, "weights": [1.0, 0.25, 1.0, 3.0, 1.0]}
    arrays = {"input_ids": np.int32, "labels": np.int32, "position_ids": np.int64, "weights": np.float32}

    batch = DataCollatorForPackedCausalLM()([{key: np.array(row[key], kind) for key, kind in arrays.items()}])

    assert batch["loss_weights"].tolist() == [[1, 0.25, 1, 3, 1]]
    assert plain(batch) == plain(DataCollatorForPackedCausalLM()([row]))


@pytest.mark.parametrize("collate", [DataCollatorForCausalLM(PAD), DataCollatorForPackedCausalLM()])
def test_a_batch_without_weights_has_no_loss_weights(collate):
    assert "loss_weights" not in collate([SHORT, LONG])


def test_weights_must_be_as_long_as_the_tokens():
    for collate in (DataCollatorForCausalLM(PAD), DataCollatorForPackedCausalLM()):
        with pytest.raises(ValueError, match="shape"):
            collate([SHORT, {**LONG, "weights": [1.0, 1.0]}])


def test_one_token_documents_are_kept():
    row = {"input_ids": [7, 8, 9, 9], "labels": [X, X, X, 9], "position_ids": [0, 0, 0, 1]}

    batch = DataCollatorForPackedCausalLM(with_targets=True)([row, {"input_ids": [5], "labels": [X]}])

    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 2, 4, 5]
    assert (batch["logits_to_keep"].tolist(), batch["shift_labels"].tolist()) == ([2], [[9]])


# --- targets


def test_targets_are_the_positions_before_labels():
    batch = DataCollatorForPackedCausalLM(with_targets=True)([PACKED, SHORT])

    assert batch["labels"].tolist() == [[X, 2, X, 4, 5, X, 2]]
    assert batch["logits_to_keep"].tolist() == [0, 2, 3, 5]
    assert batch["shift_labels"].tolist() == [[2, 4, 5, 2]]
    assert {batch[key].dtype for key in ("logits_to_keep", "shift_labels")} == {torch.int64}


def test_a_batch_without_labels_keeps_one_position():
    """A batch of fillers: without any position, a model could not compute a loss."""
    batch = DataCollatorForPackedCausalLM(with_targets=True)([{"input_ids": [4], "labels": [X]}] * 2)
    loss = tiny_model()(**batch, use_cache=False, num_items_in_batch=1).loss

    assert (batch["logits_to_keep"].tolist(), batch["shift_labels"].tolist()) == ([0], [[X]])
    assert loss.item() == 0.0


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "padding_tokens"}
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_labels_targets_and_a_static_shape_give_equal_loss_and_gradients(kind, attention):
    register()
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    ids = [(7 * i) % 250 for i in range(12)]
    rows = [PACKED, {"input_ids": ids, "labels": [X] * 6 + ids[6:]}]
    shape = StaticShape(tokens=40, documents=5, max_length=12, targets=(8, 16, 24, 40))

    loss, gradients = loss_and_gradients(model, DataCollatorForPackedCausalLM()(rows))
    for collator in (
        DataCollatorForPackedCausalLM(with_targets=True),
        DataCollatorForPackedCausalLM(static=shape, pad_token_id=PAD),
        DataCollatorForPackedCausalLM(with_targets=True, static=shape, pad_token_id=PAD),
    ):
        other, others = loss_and_gradients(model, collator(rows))
        assert other == pytest.approx(loss, rel=1e-6)
        for one, two in zip(gradients, others, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


# --- static shapes


def test_a_static_batch_is_padded_with_documents_of_at_most_max_length():
    shape = StaticShape(tokens=12, documents=4, max_length=3, targets=(4, 8, 12))

    batch = DataCollatorForPackedCausalLM(with_targets=True, static=shape, pad_token_id=PAD)([PACKED, SHORT])

    assert plain(batch) == {
        "input_ids": [[1, 2, 3, 4, 5, 1, 2, PAD, PAD, PAD, PAD, PAD]],
        "labels": [[X, 2, X, 4, 5, X, 2, X, X, X, X, X]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 2, 5, 7, 10, 12, 12, 12, 12],  # 4 documents, 12 / 3 of padding, and the end
        "cu_seq_lens_k": [0, 2, 5, 7, 10, 12, 12, 12, 12],
        "max_length_q": 3,
        "max_length_k": 3,
        "logits_to_keep": [0, 2, 3, 5],
        "shift_labels": [[2, 4, 5, 2]],
        "padding_tokens": 5,
    }


@pytest.mark.parametrize(
    ("rows", "bounds", "padding"),
    [
        ([SHORT], [0, 2, 6, 7, 7, 7], 5),
        ([SHORT, SHORT, LONG], [0, 2, 4, 7, 7, 7], 0),  # full: no padding
        ([LONG, LONG], [0, 3, 6, 7, 7, 7], 1),
    ],
)
def test_all_batches_of_a_static_shape_have_the_same_shapes(rows, bounds, padding):
    shape = StaticShape(tokens=7, documents=3, max_length=4, targets=(4, 8))

    batch = DataCollatorForPackedCausalLM(with_targets=True, static=shape)(rows)

    assert batch["cu_seq_lens_q"].tolist() == bounds
    assert batch["padding_tokens"] == padding
    assert {key: tuple(value.shape) for key, value in batch.items() if torch.is_tensor(value)} == {
        **dict.fromkeys(("input_ids", "labels", "position_ids"), (1, 7)),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), (6,)),
        "logits_to_keep": (4,),
        "shift_labels": (1, 4),
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SHORT, SHORT, SHORT], "3 documents in a batch of 2 at most"),
        ([LONG, LONG, SHORT], "8 tokens in a batch of 6 at most"),
    ],
)
def test_a_batch_that_does_not_fit_a_static_shape_is_refused(rows, message):
    collator = DataCollatorForPackedCausalLM(static=StaticShape(tokens=6, documents=2, max_length=6))

    with pytest.raises(ValueError, match=message):
        collator(rows)


def test_the_padding_collator_refuses_packed_rows():
    """It sets no positions, so the documents of a row would attend to each other."""
    with pytest.raises(ValueError, match="packed rows need DataCollatorForPackedCausalLM"):
        DataCollatorForCausalLM(PAD)([PACKED])
