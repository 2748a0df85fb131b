"""Packed rows, padded rows and one document at a time: the same total loss and the same gradients."""

import json

import pytest
import torch
from helpers import X, build_recipe, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.model.attention import NAME, register
from hf_clm.training.run import train

# Documents of 4 to 19 tokens; the last 1 to 8 of each are targets.
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
    """Returns loss, number of targets and gradients, summed over all batches."""
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
def test_packed_padded_and_single_rows_give_the_same_training(kind):
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


@pytest.mark.parametrize("tokens", [24, 64, 500])
def test_batches_of_a_token_budget_give_the_same_training_as_rows(tokens):
    """16 documents of 4 to 19 tokens, 184 in total, in 8, 3 or 1 micro-batches."""
    model = build_model("qwen2")
    dataset = SFTDataset(DOCUMENTS, byte_tokenizer(), max_length=24)
    budget = PackedDataset(dataset, max_length=tokens)
    collate = DataCollatorForPackedCausalLM()

    by_rows = loss_and_gradients(model, [collate([dataset[i]]) for i in range(16)])
    by_tokens = loss_and_gradients(model, [collate([row]) for row in budget])

    assert len(budget) == {24: 8, 64: 3, 500: 1}[tokens]
    assert_same(by_tokens, by_rows)


def test_a_run_with_a_token_budget_has_the_same_loss_as_with_rows_and_packed_rows(tmp_path):
    """All data are one step: however they are batched, the loss is a mean over the same targets."""
    records = [{"instruct": f"Say {n}.\n", "input": "", "label": "n" * n} for n in range(1, 12)]
    kinds = {
        "rows": {"packing": "none"},
        "packed": {"packing": "best_fit"},
        "budget": {"packing": "none", "tokens_per_batch": 70},
    }
    result = {}
    for name, data in kinds.items():
        steps = {"num_train_epochs": 1, "gradient_accumulation_steps": 100}
        settings = {"output_dir": str(tmp_path / name), **steps}
        if name == "budget":
            settings["per_device_train_batch_size"] = 1
        train(build_recipe(tmp_path, records, data=data, train=settings, doctor={"self_test": False}))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        (result[name],) = [entry for line in lines if "loss" in (entry := json.loads(line))]

    assert [entry["target_tokens_seen"] for entry in result.values()] == [
        77,
        77,
        77,
    ]  # 66 letters, 11 end tokens
    assert result["budget"]["loss"] == pytest.approx(result["rows"]["loss"], rel=1e-5)
    assert result["packed"]["loss"] == pytest.approx(result["rows"]["loss"], rel=1e-5)
    assert result["budget"]["grad_norm"] == pytest.approx(result["rows"]["grad_norm"], rel=1e-4)


def test_packing_stream_trains_every_token_once():
    """Cuts remove context, never labels: all of 184 tokens but the 16 first ones are targets."""
    dataset = PretrainDataset([{"input_ids": row["input_ids"]} for row in DOCUMENTS], byte_tokenizer())
    stream = PackedDataset(dataset, max_length=16, packing="stream")
    batch = DataCollatorForPackedCausalLM()([stream[i] for i in range(len(stream))])

    assert int((batch["labels"] != X).sum()) == 184 - 16
    assert {len(stream[i]["input_ids"]) for i in range(len(stream) - 1)} <= {15, 16}


def test_the_order_of_documents_in_a_row_does_not_matter():
    model = build_model("qwen2")
    rows = SFTDataset(DOCUMENTS, byte_tokenizer(), max_length=24)
    forward = DataCollatorForPackedCausalLM()([rows[i] for i in range(16)])
    backward = DataCollatorForPackedCausalLM()([rows[i] for i in reversed(range(16))])

    assert_same(loss_and_gradients(model, [forward]), loss_and_gradients(model, [backward]))
