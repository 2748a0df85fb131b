"""FLOP of models with published counts; the models are on the meta device, so nothing is allocated."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_clm.model.flops import FlopCount, count_flops

GPT2 = {"model_type": "gpt2"}
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}


def build(settings: dict) -> torch.nn.Module:
    kind = settings["model_type"]
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **rest))


@pytest.mark.parametrize(
    ("settings", "length", "full", "causal"), [(GPT2, 1024, 0.854, 0.798), (QWEN, 2048, 3.49, 3.23)]
)
def test_the_flop_of_a_token_match_published_counts(settings, length, full, causal):
    flops = count_flops(build(settings))

    def per_token(pairs: float) -> float:
        return flops.of(tokens=length, targets=length, pairs=pairs) / length / 1e9

    assert per_token(length**2) == pytest.approx(full, abs=0.01)
    assert per_token(length * (length + 1) / 2) == pytest.approx(causal, abs=0.01)


def test_gpt2_by_hand():
    layers = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)

    assert count_flops(build(GPT2)) == FlopCount(6 * layers, 6 * 768 * 50257, 12 * 12 * 768)


def test_a_frozen_weight_has_no_weight_gradient():
    model = build(GPT2)
    before = count_flops(model)
    model.transformer.requires_grad_(False)

    assert count_flops(model).per_token == before.per_token * 4 // 6
    assert count_flops(model).per_target == before.per_target * 4 // 6  # tied to the embeddings
