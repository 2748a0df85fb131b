"""A batch is sent as one buffer and arrives as the collator made it."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.batch.transfer import BufferedBatch, BufferingCollator

ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weights": [0.0, 0.5, 1.0]},
    {"input_ids": [4, 5], "labels": [-100, 5]},
]
COLLATORS = {
    "padded": DataCollatorForCausalLM(0),
    "packed": DataCollatorForPackedCausalLM(with_targets=True),
}


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_a_batch_arrives_with_the_tensors_and_numbers_of_the_collator(collate):
    expected = collate(ROWS)

    batch = BufferingCollator(collate)(ROWS).to("cpu")

    assert batch.keys() == expected.keys()
    for name, part in expected.items():
        if isinstance(part, torch.Tensor):
            assert (batch[name].dtype, batch[name].tolist()) == (part.dtype, part.tolist())
        else:
            assert batch[name] == part


def test_all_tensors_are_views_of_one_buffer_and_begin_at_multiples_of_64_bytes():
    batch = BufferingCollator(COLLATORS["packed"])(ROWS).to("cpu")
    tensors = [part for part in batch.values() if isinstance(part, torch.Tensor)]

    assert len(tensors) == 8
    assert len({part.untyped_storage().data_ptr() for part in tensors}) == 1
    assert {part.storage_offset() * part.element_size() % 64 for part in tensors} == {0}
    assert batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]


def test_a_worker_sends_one_tensor():
    sent = BufferingCollator(COLLATORS["packed"])(ROWS)

    assert isinstance(sent, BufferedBatch)
    assert [name for name, part in vars(sent).items() if isinstance(part, torch.Tensor)] == ["buffer"]
    assert pickle.loads(pickle.dumps(sent)).to("cpu")["labels"].tolist() == [[-100, 2, 3, -100, 5]]


def test_the_loader_pins_the_buffer_as_a_whole(monkeypatch):
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: pinned.append(part.shape) or part)
    batch = BufferingCollator(COLLATORS["packed"])(ROWS)

    assert torch.utils.data._utils.pin_memory.pin_memory(batch).rest == batch.rest
    assert pinned == [torch.Size([448])]


def test_a_batch_with_nested_values_is_left_as_it_is():
    nested = {"input_ids": torch.zeros(1), "texts": ["a"]}

    (batch,) = DataLoader([0], collate_fn=BufferingCollator(lambda rows: nested))

    assert batch is nested
