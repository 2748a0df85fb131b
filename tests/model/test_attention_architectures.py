"""Packed attention on common architectures, compared with the stock model on each document alone."""

import pytest
import torch
from helpers import PAD, X
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.model.attention import NAME, register, use_for_generation

WINDOW = 4
# Shorter than the window, equal, longer; a single token; the same document twice.
LENGTHS = [7, 1, WINDOW, 22, WINDOW + 1, 3, 7]
DOCUMENTS = [[10 * length + i for i in range(length)] for length in LENGTHS]
ROWS = [{"input_ids": ids, "labels": [X, *ids[1:]]} for ids in DOCUMENTS]

SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped
    "hidden_size": 32,
    "intermediate_size": 64,
    "pad_token_id": PAD,
}
HEADS_OF_8 = {**SIZES, "head_dim": 8}
SLIDING = {**HEADS_OF_8, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {**HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32, **NO_DROPOUT},
    "llama": {**SIZES, "num_key_value_heads": 4},
    "qwen2": SIZES,
    "qwen3": HEADS_OF_8,
    "mistral": SLIDING,
    "gemma": HEADS_OF_8,
    "gemma3_text": MIXED,
    "phi3": SLIDING,
    "olmo2": SIZES,
    "olmo3": MIXED,
    "gpt_neox": {**SIZES, "hidden_dropout": 0.0},
    "granite": SIZES,
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "cohere2": MIXED,
    "starcoder2": {**SLIDING, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "deepseek_v3": {
        **{**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 2},
    },
    "qwen3_moe": EXPERTS,
    "jetmoe": {**SIZES, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2},  # takes views
}
every_architecture = pytest.mark.parametrize("kind", CONFIGS)


def build(kind: str, attention: str) -> PreTrainedModel:
    """Builds a model with weights so large that the logits depend on all tokens attended to."""
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=260, bos_token_id=256, eos_token_id=256, **CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model


def sum_loss(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    targets = torch.tensor(ids[1:], dtype=torch.int64)
    return torch.nn.functional.cross_entropy(logits[: len(ids) - 1], targets, reduction="sum")


def is_close(result: torch.Tensor, expected: torch.Tensor, *, to: float) -> bool:
    return bool((result - expected).abs().max() <= to * expected.abs().max())


@every_architecture
def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents_alone(kind):
    packed, stock = build(kind, NAME), build(kind, "eager")
    batch = DataCollatorForPackedCausalLM()(ROWS)
    batch.pop("labels")

    together = packed(**batch, use_cache=False).logits[0].split(LENGTHS)
    alone = [stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS]
    for logits in (together, alone):
        torch.stack([sum_loss(*pair) for pair in zip(logits, DOCUMENTS, strict=True)]).sum().backward()

    assert is_close(torch.cat(together), torch.cat(alone), to=1e-5)
    gradients = [
        (a.grad, b.grad)
        for a, b in zip(packed.parameters(), stock.parameters(), strict=True)
        if b.grad is not None
    ]
    assert all(is_close(a, b, to=1e-5) for a, b in gradients if b.abs().max() > 1e-3)
    assert sum(bool(b.abs().max() > 1e-3) for _, b in gradients) > 5


@every_architecture
def test_in_generation_it_equals_the_stock_model(kind):
    """Rows padded on the right, and greedy generation with a KV cache."""
    packed, stock = build(kind, NAME), build(kind, "eager")
    use_for_generation(packed)
    batch = DataCollatorForCausalLM(PAD)(ROWS)
    is_real = batch["attention_mask"].bool()
    prompt = torch.tensor([DOCUMENTS[0]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}

    result, expected = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[is_real]
        for model in (packed, stock)
    )
    texts = [model.generate(prompt, pad_token_id=PAD, **options).tolist() for model in (packed, stock)]

    assert packed.config._attn_implementation == "sdpa"
    assert is_close(result, expected, to=1e-5)
    assert texts[0] == texts[1]
    assert len(texts[0][0]) > len(DOCUMENTS[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "mistral"])
def test_under_autocast_it_is_as_precise_as_the_stock_model(kind):
    """bfloat16 has 8 bits: after two layers a few percent of the largest logit."""
    packed, stock = build(kind, NAME), build(kind, "eager")
    batch = DataCollatorForPackedCausalLM()(ROWS)
    batch.pop("labels")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = packed(**batch, use_cache=False).logits[0].float()
    alone = [stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS]

    assert is_close(result, torch.cat(alone), to=5e-2)


@every_architecture
def test_the_logits_depend_on_earlier_tokens(kind):
    """The tests above would detect a leak: another first token changes later logits, even past the window."""
    model = build(kind, "eager")
    ids = torch.tensor([DOCUMENTS[0], [5, *DOCUMENTS[0][1:]]])

    first, second = model(input_ids=ids, use_cache=False).logits[:, WINDOW]

    assert not is_close(first, second, to=1e-3)
