"""The similarity of gradients, compared with a backward pass for each row alone."""

import numpy as np
import pytest
import torch
from helpers import EOS, X, tiny_model

from hf_clm.errors import ModelError
from hf_clm.evaluation.similarity import Matrices, choose_matrices, similarities
from hf_clm.model.attention import NAME, register

# Of different lengths, with one or several targets, a first token with a label, and a weighted row.
ROWS = [
    {"input_ids": [10, 11, 12, 13, EOS], "labels": [X, X, 12, 13, EOS]},
    {"input_ids": [20, 21, EOS], "labels": [20, 21, EOS]},
    {"input_ids": list(range(30, 45)), "labels": [X] * 9 + [39, X, 41, 42, X, 44]},
    {"input_ids": [10, 11, 50, EOS], "labels": [X, X, 50, EOS], "weights": [0.0, 0.0, 0.25, 2.0]},
    {"input_ids": [60, 61, 62, 63, 64, 65], "labels": [X, X, X, X, X, 65]},
]
QUERIES = [
    {"input_ids": [10, 11, 12, 70, EOS], "labels": [X, X, 12, 70, EOS]},
    {"input_ids": [20, 80, 81], "labels": [X, 80, 81]},
]


def packed(model):
    register()
    model.set_attn_implementation(NAME)
    return model


def adapted_model():
    """Returns a tiny model with adapters, of which both matrices have gradients."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        lora_dropout=0.5,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(packed(tiny_model()), settings)


def gradient_alone(model, row, weights) -> np.ndarray:
    """Returns the gradients of some weights, one after the other, of the summed loss of one row."""
    model.eval().requires_grad_(True)
    model.zero_grad()
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids).logits[0]
    factors = row.get("weights", [1.0] * len(labels))
    for place in range(1, len(labels)):
        if labels[place] != X:
            nll = -torch.log_softmax(logits[place - 1], dim=0)[labels[place]]
            (factors[place] * nll).backward(retain_graph=True)
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return torch.cat([part.flatten() for part in parts]).double().numpy()


def cosines_alone(model, names) -> np.ndarray:
    """Returns the cosines of all queries and rows, (2, 5), by the weights of the modules with these names."""
    weights = [model.get_submodule(name).weight for name in names]
    queries = [gradient_alone(model, row, weights) for row in QUERIES]
    rows = [gradient_alone(model, row, weights) for row in ROWS]
    return np.array([[q @ r / np.sqrt((q @ q) * (r @ r)) for r in rows] for q in queries])


def linear_names(model) -> list[str]:
    names = ("proj", "c_attn", "c_fc", "lora_A.default", "lora_B.default")
    return [name for name, _ in model.named_modules() if name.endswith(names)]


@pytest.mark.parametrize("tokens_per_batch", [1, 9, 100])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_the_similarity_is_the_cosine_of_gradients_computed_row_by_row(kind, tokens_per_batch):
    names = linear_names(tiny_model(kind))
    assert len(names) == {"qwen2": 14, "gpt2": 8}[kind]

    found = similarities(packed(tiny_model(kind)), QUERIES, ROWS, tokens_per_batch=tokens_per_batch)

    expected = cosines_alone(tiny_model(kind), names)
    assert expected[0, 0] > 0.5 > abs(expected[0, 4])  # a row that shares the prompt, and one that does not
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("tokens_per_batch", [1, 100])
def test_only_the_matrices_of_adapters_are_compared(tokens_per_batch):
    model = adapted_model()
    matrices = choose_matrices(model, most=1)  # the limit is for models without adapters

    found = similarities(model.train(), QUERIES, ROWS, tokens_per_batch=tokens_per_batch)

    # 4 x 32 and 32 x 4 of q_proj, 4 x 64 and 32 x 4 of down_proj, in 2 layers
    assert matrices.describe() == "8 matrices of the adapters, 1,280 weights"
    names = [name for name in linear_names(model) if "lora" in name]
    assert list(matrices.modules) == names
    np.testing.assert_allclose(found, cosines_alone(model, names), atol=2e-5)


def test_a_frozen_model_in_bfloat16_has_the_gradients_of_its_adapters_in_float32():
    model = adapted_model()
    for name, weight in model.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.bfloat16()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(model, QUERIES, ROWS, tokens_per_batch=100)

    names = [name for name in linear_names(model) if "lora" in name]
    np.testing.assert_allclose(found, cosines_alone(model, names), atol=0.01)


def test_a_row_is_most_similar_to_itself_and_not_at_all_similar_if_it_has_no_weight():
    silent = {**ROWS[0], "weights": [0.0] * 5}
    unlabelled = {"input_ids": [10], "labels": [10]}
    scaled = {**ROWS[0], "weights": [3.0] * 5}

    found = similarities(
        packed(tiny_model()), [ROWS[0]], [silent, ROWS[0], unlabelled, scaled], tokens_per_batch=100
    )

    assert found[0].tolist() == [0.0, pytest.approx(1.0, abs=1e-5), 0.0, pytest.approx(1.0, abs=1e-5)]


def test_the_last_matrices_up_to_the_limit_are_chosen_without_the_head():
    model = packed(tiny_model("gpt2", tie_word_embeddings=False))  # c_proj of the MLP has 128 x 32 weights

    assert list(choose_matrices(model, most=1).modules) == ["transformer.h.1.mlp.c_proj"]
    assert list(choose_matrices(model, most=8191).modules) == ["transformer.h.1.mlp.c_proj"]
    two = choose_matrices(model, most=8192)
    assert list(two.modules) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert two.describe() == "2 matrices of the last block, 8,192 weights"
    every = choose_matrices(model)  # and 32 x 96 + 32 x 32 of attention
    assert every.describe() == "8 matrices of the last 2 blocks, 24,576 weights"

    found = similarities(model, QUERIES, ROWS, tokens_per_batch=100, matrices=two)

    np.testing.assert_allclose(found, cosines_alone(model, list(two.modules)), atol=2e-5)


def test_a_model_without_matrices_is_refused():
    peft = pytest.importorskip("peft")
    settings = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), settings)

    with pytest.raises(ModelError, match="Qwen2ForCausalLM has no LoRA matrices to compare"):
        choose_matrices(model)


class Experts(torch.nn.Module):
    """Layers called as in a mixture of experts: with some tokens, in another order, repeatedly, or never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.twice_proj, self.some_proj, self.idle_proj = (
            torch.nn.Linear(32, 32, bias=False) for _ in range(3)
        )

    def forward(self, hidden):
        tokens = hidden.flatten(0, 1)
        outputs = self.twice_proj(self.twice_proj(tokens).tanh_())
        if len(tokens) < 10:
            places = torch.arange(len(tokens) - 1).flip(0).repeat(4)  # more than tokens, not all of them
            outputs = outputs.index_add(0, places, self.some_proj(tokens[places]))
        return outputs[None]


def test_layers_that_see_some_tokens_or_are_called_twice_count_in_full():
    model = packed(tiny_model())
    model.model.layers[1].mlp = Experts()
    names = [name for name in linear_names(model) if "layers.1.mlp" in name]
    together, some, idle = (
        Matrices({name: model.get_submodule(name) for name in part})
        for part in (names, names[1:2], names[2:])
    )

    found = similarities(model, QUERIES, ROWS, tokens_per_batch=100, matrices=together)

    assert len(names) == 3
    np.testing.assert_allclose(found, cosines_alone(model, names), atol=2e-5)

    alone = similarities(model, QUERIES, ROWS, tokens_per_batch=1, matrices=some)
    assert (alone == 0).tolist() == [[False, False, True, False, False]] * 2  # the row of 15 tokens

    with pytest.raises(ModelError, match="does not call any of the layers to compare"):
        similarities(model, QUERIES, ROWS, tokens_per_batch=100, matrices=idle)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = packed(tiny_model()).train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    last = model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def progress(rows: int) -> None:
        seen.append((rows, model.training, last.requires_grad))
        if fails:
            raise KeyboardInterrupt

    try:
        similarities(model, QUERIES, ROWS, tokens_per_batch=8, progress=progress)
    except KeyboardInterrupt:
        assert fails

    assert seen == [(rows, False, True) for rows in ([2] if fails else [2, 1, 1, 1])]
    assert {name: module.training for name, module in model.named_modules()} == modes
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
