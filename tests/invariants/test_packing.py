"""Packed rows, padded rows and one document at a time: the same total loss and the same gradients."""

import pytest
import torch
from helpers import X, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hf_clm.attention import NAME, register
from hf_clm.data.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.data.packing import PackedDataset

# Documents of 4 to 19 tokens; the last 1 to 8 of each are learned.
DOCUMENTS = [
    {
        "input_ids": [(11 * n + 5 * i) % 256 for i in range(n + 3)],
        "labels": [X] * (n + 2 - n // 2) + [(11 * n + 5 * i) % 256 for i in range(n + 2 - n // 2, n + 3)],
    }
    for n in range(1, 17)
]


def build_model(kind: str) -> PreTrainedModel:
    register()
    model = tiny_model(kind)
    model.set_attn_implementation(NAME)
    return model


def loss_and_gradients(model: PreTrainedModel, batches: list[dict]) -> tuple[float, int, list[torch.Tensor]]:
    """Summed over all target tokens of all batches."""
    model.zero_grad()
    total, targets = 0.0, 0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        total, targets = total + loss.item(), targets + int((labels != X).sum())
    return total, targets, [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(one, other) -> None:
    assert one[1] == other[1]
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(one[2], other[2], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_packed_padded_and_single_rows_are_the_same_training(kind):
    model = build_model(kind)
    dataset = SFTDataset(DOCUMENTS, byte_tokenizer(), max_length=24)
    packed = PackedDataset(dataset, max_length=24)
    rows = [dataset[i] for i in range(16)]

    one_by_one = loss_and_gradients(model, [DataCollatorForPackedCausalLM()([row]) for row in rows])
    padded = loss_and_gradients(
        model, [DataCollatorForCausalLM(257)(rows[i : i + 4]) for i in range(0, 16, 4)]
    )
    two_rows = [[packed[i] for i in range(j, min(j + 2, len(packed)))] for j in range(0, len(packed), 2)]
    in_rows = loss_and_gradients(model, [DataCollatorForPackedCausalLM()(rows) for rows in two_rows])

    assert len(packed) < 16
    assert one_by_one[1] == 80  # 1 + 2 + 2 + 3 + 3 + ... + 8 + 8 + 9
    assert_same(padded, one_by_one)
    assert_same(in_rows, one_by_one)


def test_a_stream_learns_every_token_of_the_documents_once():
    """A cut takes context away, never a label: 184 tokens, of which the 16 first have nothing before them."""
    dataset = PretrainDataset(DOCUMENTS, byte_tokenizer())
    stream = PackedDataset(dataset, max_length=16, packing="stream")
    batch = DataCollatorForPackedCausalLM()([stream[i] for i in range(len(stream))])

    assert int((batch["labels"] != X).sum()) == 184 - 16
    assert {len(stream[i]["input_ids"]) for i in range(len(stream) - 1)} <= {15, 16}


def test_the_order_of_documents_in_a_row_changes_nothing():
    model = build_model("qwen2")
    rows = SFTDataset(DOCUMENTS, byte_tokenizer(), max_length=24)
    forward = DataCollatorForPackedCausalLM()([rows[i] for i in range(16)])
    backward = DataCollatorForPackedCausalLM()([rows[i] for i in reversed(range(16))])

    assert_same(loss_and_gradients(model, [forward]), loss_and_gradients(model, [backward]))
