"""The packed attention: documents in one row are alone in it, and nothing but speed depends on it."""

import pytest
import torch
from helpers import EOS, PAD, byte_tokenizer, save_folder, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_clm.attention import NAME, packed_attention, register, use_for_generation, use_for_training
from hf_clm.data.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.errors import ModelError
from hf_clm.generation.generate import generate
from hf_clm.model import load_model

DOCUMENTS = [list(range(10, 17)), list(range(40, 43)), [99], list(range(60, 82))]
ROWS = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in DOCUMENTS]
KINDS = ["gpt2", "qwen2", "llama"]


def packed_model(kind: str, **settings) -> PreTrainedModel:
    register()
    model = tiny_model(kind, **settings)
    model.set_attn_implementation(NAME)
    return model


def alone(model: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of each document, by the eager attention."""
    model.set_attn_implementation("eager")
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_the_logits_of_its_documents_alone(kind):
    model = packed_model(kind)
    batch = DataCollatorForPackedCausalLM()(ROWS)
    batch.pop("labels")

    packed = model(**batch, use_cache=False).logits[0]

    assert torch.allclose(packed, torch.cat(alone(model)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_the_gradients_of_its_documents_alone(kind):
    model = packed_model(kind)
    batch = DataCollatorForPackedCausalLM()(ROWS)
    labels = batch.pop("labels")[0]
    cross_entropy = torch.nn.functional.cross_entropy

    cross_entropy(model(**batch, use_cache=False).logits[0, :-1], labels[1:], reduction="sum").backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for logits, ids in zip(alone(model), DOCUMENTS, strict=True):
        cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="sum").backward()

    assert all(
        torch.allclose(a, p.grad, atol=2e-5, rtol=1e-4)
        for a, p in zip(packed, model.parameters(), strict=True)
    )
    assert sum(float(gradient.abs().sum()) for gradient in packed) > 1


def test_without_the_bounds_a_packed_row_would_leak():
    """The tests above see a leak: plain causal attention over the same row differs."""
    model = packed_model("qwen2")
    batch = DataCollatorForPackedCausalLM()(ROWS)

    leaking = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[
        0
    ]

    assert not torch.allclose(leaking, torch.cat(alone(model)), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_padded_on_the_right_gives_the_logits_of_its_document_alone(kind):
    model = packed_model(kind)
    batch = DataCollatorForCausalLM(PAD)(ROWS)
    batch.pop("labels")

    padded = model(**batch, use_cache=False).logits

    for row, logits in zip(padded, alone(model), strict=True):
        assert torch.allclose(row[: len(logits)], logits, atol=1e-5, rtol=0)


def mistral(window: int | None) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 260, "sliding_window": window}
    return MistralForCausalLM(MistralConfig(**sizes)).eval()


def test_a_sliding_window_is_that_of_the_eager_attention_in_each_document():
    register()
    model = mistral(window=4)
    model.set_attn_implementation(NAME)
    batch = DataCollatorForPackedCausalLM()(ROWS)
    batch.pop("labels")

    packed = model(**batch, use_cache=False).logits[0]

    assert torch.allclose(packed, torch.cat(alone(model)), atol=1e-5, rtol=0)
    assert not torch.allclose(packed, torch.cat(alone(mistral(window=None))), atol=1e-3)


def test_dropout_drops_in_training_only():
    model = packed_model("gpt2", attn_pdrop=0.5)
    batch = DataCollatorForPackedCausalLM()(ROWS)

    in_evaluation = [model(**batch, use_cache=False).loss.item() for _ in range(2)]
    model.train()
    torch.manual_seed(0)
    in_training = [model(**batch, use_cache=False).loss.item() for _ in range(2)]

    assert in_evaluation[0] == in_evaluation[1]
    assert in_training[0] != in_training[1]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_it_does_not_compute_it_refuses(name):
    states = torch.zeros(1, 2, 3, 4)

    with pytest.raises(ModelError) as error:
        packed_attention(torch.nn.Module(), states, states, states, None, **{name: 30.0})

    assert str(error.value) == (
        f"model.attention: the packed attention does not compute this model's {name!r}; got packed; "
        "fix: set model.attention to sdpa or eager"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_generates_what_the_same_weights_generate_with_sdpa(tmp_path, kind):
    folder = save_folder(tmp_path, tiny_model(kind), byte_tokenizer())
    packed = load_model(folder, byte_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    prompts = ["A", "A longer prompt than the first", "mid size"]
    options = {"max_new_tokens": 12, "do_sample": False}

    answers = generate(packed, byte_tokenizer(), prompts=prompts, **options)  # one batch, padded on the left

    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=PAD, **options)[0]
        kept = [i for i in expected[ids.shape[1] :].tolist() if i < EOS]
        assert answer.text == bytes(kept).decode(errors="replace")


def test_generate_leaves_the_model_as_it_was():
    model = packed_model("qwen2").train()

    generate(model, byte_tokenizer(), prompts=["A"], max_new_tokens=2)

    assert model.training
    assert model.config._attn_implementation == NAME


def test_switching_to_generation_and_back_touches_only_the_packed_attention():
    packed, eager = packed_model("gpt2"), tiny_model("gpt2")
    eager.set_attn_implementation("eager")

    for model in (packed, eager):
        use_for_generation(model)
    in_generation = [model.config._attn_implementation for model in (packed, eager)]
    use_for_training(packed, NAME)

    assert in_generation == ["sdpa", "eager"]
    assert packed.config._attn_implementation == "packed"


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_generation_that_goes_round_us_is_refused_rather_than_wrong(kind, tmp_path):
    """A step with a KV cache has one query and many keys; a causal mask would show it the first key only."""
    model = load_model(save_folder(tmp_path / kind, tiny_model(kind), byte_tokenizer()), byte_tokenizer())

    with pytest.raises(ModelError, match="it has no mask for a KV cache"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
