"""Batches in literals."""

import pytest
import torch
from helpers import PAD, X

from hf_clm.data.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM

SHORT = {"input_ids": [1, 2], "labels": [X, 2]}
LONG = {"input_ids": [3, 4, 5], "labels": [X, X, 5]}
PACKED = {"input_ids": [1, 2, 3, 4, 5], "labels": [X, 2, X, 4, 5], "position_ids": [0, 1, 0, 1, 2]}


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
def test_the_width_is_a_multiple_where_one_is_asked_for(multiple, width):
    batch = DataCollatorForCausalLM(PAD, pad_to_multiple_of=multiple)([SHORT, LONG])

    assert {tuple(value.shape) for value in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum().item() == 5
    assert batch["labels"][batch["attention_mask"] == 0].tolist() == [X] * (2 * width - 5)


def test_packed_rows_are_laid_one_behind_the_other():
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


def test_an_example_that_is_not_packed_is_one_document():
    batch = DataCollatorForPackedCausalLM()([LONG])

    assert batch["position_ids"].tolist() == [[0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3]
    assert batch["max_length_q"] == 3


def test_the_padding_collator_refuses_packed_rows():
    """It writes no positions, so the documents of a row would read each other."""
    with pytest.raises(ValueError, match="packed rows need DataCollatorForPackedCausalLM"):
        DataCollatorForCausalLM(PAD)([PACKED])
