"""The packed attention: what it refuses, how it is switched and compiled, and runs that fall back from it."""

import pytest
import torch
from helpers import EOS, PAD, build_recipe, byte_tokenizer, save_folder, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.errors import ModelError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.model.attention import (
    NAME,
    _by_products,
    _causal,
    _equally_long,
    packed_attention,
    register,
    use_for_generation,
    use_for_training,
)
from hf_clm.model.load import load_model
from hf_clm.training.run import train

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
@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 4, 3, 5, 5, 4], [2]])
def test_neighbours_of_one_length_are_computed_together_as_each_alone(kind, lengths, monkeypatch):
    model = packed_model(kind)
    documents = [torch.arange(3, 3 + length)[None] * 7 % 250 for length in lengths]
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in documents], dim=1)
    calls = []

    def counted(states, *, documents, **options):
        calls.append(documents)
        return _equally_long(states, documents=documents, **options)

    monkeypatch.setattr("hf_clm.model.attention._equally_long", counted)

    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(
        input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False, **bounds
    ).logits

    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    runs = {3: [3], 6: [2, 1, 2, 1], 1: [1]}[len(lengths)]
    assert calls == runs * model.config.num_hidden_layers


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_short_documents_by_products_are_those_of_sdpa(heads, window, scale):
    torch.manual_seed(0)
    shapes = [(3, 4, 9, 8), (3, heads, 9, 8), (3, heads, 9, 8)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    options = {"dropout": 0.0, "scale": scale, "window": window}

    found, expected = _by_products(states, **options), _causal(states, **options)
    factor = torch.randn_like(expected)

    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad((part * factor).sum(), states) for part in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 100]])
def test_under_autocast_a_cpu_computes_attention_in_float32(lengths):
    torch.manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = packed_attention(torch.nn.Module(), *states, cu_seq_lens_q=bounds)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_attention(torch.nn.Module(), *states, cu_seq_lens_q=bounds)[0]

    assert torch.equal(found, expected.bfloat16())  # rounded once, at the end


def test_dropout_of_products_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    states = [torch.randn(400, 2, 6, 4), torch.randn(400, 2, 6, 4), torch.ones(400, 2, 6, 4)]

    found = _by_products(states, dropout=0.5, scale=None, window=None)

    assert found[:, :, 0].unique().tolist() == [0.0, 2.0]  # one weight, dropped or doubled
    assert found.mean().item() == pytest.approx(1.0, abs=0.05)


def test_without_the_bounds_a_packed_row_would_leak():
    """Plain causal attention over the same row differs."""
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

    answers = generate(
        packed, byte_tokenizer(), prompts=prompts, decoding=Decoding(12)
    )  # one batch, padded on the left

    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=PAD, **options)[0]
        kept = [i for i in expected[ids.shape[1] :].tolist() if i < EOS]
        assert answer.text == bytes(kept).decode(errors="replace")


def test_generate_leaves_the_model_as_it_was():
    model = packed_model("qwen2").train()

    generate(model, byte_tokenizer(), prompts=["A"], decoding=Decoding(2))

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


def frames_compiled(model: PreTrainedModel, batches: list[dict]) -> tuple[list[int], dict[str, int]]:
    """How many graphs were compiled after each batch, and where one broke off."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    after = []
    for batch in batches:
        compiled(**batch, use_cache=False).loss.backward()
        after.append(counter.frame_count)
    return after, dict(counters["graph_break"])


def static_batches(model: PreTrainedModel) -> list[dict]:
    """Five batches of one shape; other documents, as many targets."""
    model.loss_type = "ForCausalLM"  # as load_model sets it
    shape = StaticShape(tokens=64, documents=8, max_length=32, targets_multiple=64)
    collate = DataCollatorForPackedCausalLM(with_targets=True, static=shape, pad_token_id=PAD)
    batches = [collate(ROWS[first:] + ROWS[:first]) for first in (0, 1, 2, 3, 0)]
    batches.append(collate(ROWS[:2]))
    for batch in batches:
        batch.pop("padding_tokens")
    return batches


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_compiled_model_takes_dense_rows_of_one_shape_in_one_graph(kind):
    """What is compiled on CUDA for packed rows too, where one kernel takes all documents."""
    model = packed_model(kind).train()
    bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    dense = [{k: v for k, v in batch.items() if k not in bounds} for batch in static_batches(model)]

    after, breaks = frames_compiled(model, dense)

    assert after == [1, 1, 1, 1, 1, 1]
    assert breaks == {}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_compiled_model_is_not_compiled_again_for_other_documents(kind):
    """On a CPU the attention itself, document by document, is left out of the graphs."""
    model = packed_model(kind).train()

    after, _ = frames_compiled(model, static_batches(model))

    assert after[0] > 1
    assert after[1:] == after[:1] * 5


def test_a_run_goes_on_with_the_attention_that_its_model_fell_back_to(tmp_path, caplog):
    settings = {"model_type": "codegen", "n_layer": 1, "n_head": 4, "n_embd": 32, "rotary_dim": 4}
    tokenizer = {"name_or_path": save_folder(tmp_path / "tokenizer", tiny_model(), byte_tokenizer())}
    changes = {"model": {"init": "scratch", "config": settings, "name_or_path": None}, "tokenizer": tokenizer}

    result = train(build_recipe(tmp_path, [{"text": "abcdef"}] * 4, data={"packing": "best_fit"}, **changes))

    assert result["status"] == "done"
    assert caplog.messages == ["attention eager: CodeGen has an attention of its own"]


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_a_run_whose_model_reads_past_its_documents_does_not_begin(tmp_path, attention):
    """Bloom has no positions, but a bias by distance, and makes its mask without them."""
    settings = {"model_type": "bloom", "n_layer": 1, "n_head": 4, "hidden_size": 32}
    tokenizer = {"name_or_path": save_folder(tmp_path / "tokenizer", tiny_model(), byte_tokenizer())}
    model = {"init": "scratch", "config": settings, "name_or_path": None, "attention": attention}
    records = [{"text": letters * 8} for letters in ("abc", "def", "ghi", "jkl")]
    recipe = build_recipe(tmp_path, records, model=model, data={"packing": "best_fit"}, tokenizer=tokenizer)

    with pytest.raises(
        ModelError, match="with eager attention a packed row of BloomForCausalLM is not as its"
    ):
        train(recipe)
