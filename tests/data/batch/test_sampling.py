"""The order of the rows, and how they divide among processes."""

import pytest
from helpers import EOS, X, byte_tokenizer, document

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.batch.sampling import EpochSampler, EvenRows
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.schema import TokenizedExample

TOKENIZER = byte_tokenizer()


def row(ids: list[int], labels: list[int]) -> TokenizedExample:
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (3, 3), (4, 4), (8, 8)])
def test_even_rows_pads_with_unlabelled_rows(multiple, length):
    dataset = SFTDataset([document("a"), document("b"), document("c")], TOKENIZER)

    rows = list(EvenRows(dataset, multiple))

    assert len(EvenRows(dataset, multiple)) == len(rows) == length
    assert rows[:3] == [row([letter, EOS], [X, EOS]) for letter in b"abc"]
    assert rows[3:] == [row([ord("a")], [X])] * (length - 3)
    assert DataCollatorForCausalLM(0)(rows)["labels"].ne(X).sum().item() == 3


def test_a_batch_of_fillers_has_one_token_documents_and_one_position():
    """The batch of the last processes if the packed rows do not divide evenly."""
    packed = PackedDataset(SFTDataset([document("ab"), document("c")], TOKENIZER), max_length=8)
    rows = list(EvenRows(packed, 3))

    batch = DataCollatorForPackedCausalLM(with_targets=True)(rows[1:])

    assert len(packed) == 1
    assert batch["input_ids"].tolist() == [[ord("a"), ord("a")]]
    assert batch["labels"].tolist() == [[X, X]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 2]
    assert (batch["logits_to_keep"].tolist(), batch["shift_labels"].tolist()) == ([0], [[X]])


def test_an_epoch_has_every_row_once_with_fillers_at_the_end():
    sampler = EpochSampler(5, total=8, seed=7)
    orders = []
    for sampler.epoch in (0, 1, 0):
        orders.append(list(sampler))

    assert len(sampler) == 8
    assert [sorted(order[:5]) for order in orders] == [[0, 1, 2, 3, 4]] * 3
    assert [order[5:] for order in orders] == [[5, 6, 7]] * 3
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochSampler(5, total=5, seed=7)) == orders[0][:5]
