"""The load-balancing loss: computed per document as in transformers, weighted by its targets."""

import sys
from typing import Any

import pytest
import torch
from helpers import X, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_clm.data.batch.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPackedCausalLM,
    StaticShape,
)
from hf_clm.doctor.selftest import self_test
from hf_clm.errors import ModelError
from hf_clm.model.attention import NAME, register
from hf_clm.model.router_loss import RouterLoss, balance_documents, number_documents, weigh_documents

ROWS = [
    {
        "input_ids": [*range(1, n + 3)],
        "labels": [X, X, *range(3, n + 3)],
        "weights": [1.0, 1.0] + [0.5 * n] * n,
    }
    for n in (1, 7, 3, 12)
]
BATCHES = {
    "padded": DataCollatorForCausalLM(257),
    "packed": DataCollatorForPackedCausalLM(),
    "static": DataCollatorForPackedCausalLM(static=StaticShape(40, documents=6, max_length=16)),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {
    "vocab_size": 260,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
}
# The names of the number of experts and of the coefficient differ.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.7},
    "qwen2_moe": {"num_experts": 4, "router_aux_loss_coef": 0.7, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": 0.7, "kv_channels": 8},
}


def mixture(kind: str = "mixtral", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "pad_token_id": 257, **MIXTURES[kind], **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def stock_balance(gates: list[torch.Tensor], *, top_k: int = 2) -> float:
    """Returns the load-balancing loss of these tokens as transformers computes it."""
    module = sys.modules[type(mixture()).__module__]
    return float(module.load_balancing_loss_func(tuple(gates), gates[0].shape[1], top_k))


@pytest.mark.parametrize("how", BATCHES)
def test_each_document_has_the_loss_that_transformers_computes_for_it(how):
    batch = BATCHES[how](ROWS)
    documents = number_documents(batch)
    gates = tuple(torch.randn(documents.numel(), 5, generator=torch.manual_seed(n)) for n in range(3))
    count = len(weigh_documents(batch, documents))

    result = balance_documents(gates, documents, count=count, top_k=2)

    for number, row in enumerate(ROWS):
        own = [gate[documents == number] for gate in gates]
        assert len(own[0]) == len(row["input_ids"])
        assert float(result[number]) == pytest.approx(stock_balance(own), rel=1e-5)


@pytest.mark.parametrize("how", BATCHES)
def test_a_document_is_weighted_by_its_weighted_targets(how):
    batch = BATCHES[how](ROWS)

    result = weigh_documents(batch, number_documents(batch)).tolist()

    assert result[:4] == [0.5, 24.5, 4.5, 72.0]  # n targets of weight n / 2
    assert sum(result[4:]) == 0


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_model_adds_the_weighted_mean_over_documents(kind):
    """Reference: each document alone in the stock model, weighted by its share of all 23 targets."""
    model = mixture(kind)
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).aux_loss.item() for row in ROWS]
    expected = sum(balance * n / 23 for balance, n in zip(alone, (1, 7, 3, 12), strict=True))
    batch = BATCHES["padded"]([{**row, "weights": None} for row in ROWS])
    router = RouterLoss(model)

    with router.weighing(batch, 23):
        both = model(**batch, num_items_in_batch=torch.tensor(23))
    model.config.output_router_logits = False
    tokens = model(**batch, num_items_in_batch=torch.tensor(23)).loss

    assert both.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert both.loss.item() == pytest.approx(tokens.item() + 0.7 * expected, rel=1e-5)


def test_the_module_of_the_model_is_restored():
    model = mixture()
    module = sys.modules[type(model).__module__]
    before = module.load_balancing_loss_func

    with pytest.raises(RuntimeError), RouterLoss(model).weighing(BATCHES["padded"](ROWS), 4):
        assert module.load_balancing_loss_func is not before
        raise RuntimeError

    assert module.load_balancing_loss_func is before


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_self_test_includes_the_load_balancing_loss(kind):
    register()
    model = mixture(kind)
    model.set_attn_implementation(NAME)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS]

    self_test(model, rows, pad_token_id=257).require()


def test_a_model_with_an_unknown_load_balancing_loss_is_rejected(monkeypatch):
    model = mixture()
    monkeypatch.delattr(sys.modules[type(model).__module__], "load_balancing_loss_func")

    with pytest.raises(ModelError, match="cannot be weighted"):
        RouterLoss(model)


def test_other_models_have_no_load_balancing_loss():
    router = RouterLoss(tiny_model("qwen2"))

    assert (router.is_used, router.coefficient) == (False, 0.0)
