"""Packed attention: its limits, switching, compilation, and runs that fall back to another one."""

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
    _block_mask,
    _equal_length_attention,
    _masked_attention,
    _sdpa_attention,
    packed_attention,
    register,
    use_for_generation,
    use_for_training,
    why_not_varlen,
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
    """Returns the logits of each document alone, with eager attention."""
    model.set_attn_implementation("eager")
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 4, 3, 5, 5, 4], [2]])
def test_adjacent_documents_of_equal_length_are_computed_in_one_call(kind, lengths, monkeypatch):
    model = packed_model(kind)
    documents = [torch.arange(3, 3 + length)[None] * 7 % 250 for length in lengths]
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in documents], dim=1)
    calls = []

    def counted(states, *, documents, **options):
        calls.append(documents)
        return _equal_length_attention(states, documents=documents, **options)

    monkeypatch.setattr("hf_clm.model.attention._equal_length_attention", counted)

    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(
        input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False, **bounds
    ).logits

    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    runs = {3: [3], 6: [2, 1, 2, 1], 1: [1]}[len(lengths)]
    assert calls == runs * model.config.num_hidden_layers


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 100]])
def test_under_autocast_a_cpu_computes_attention_in_float32(lengths):
    torch.manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = packed_attention(torch.nn.Module(), *states, cu_seq_lens_q=bounds)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed_attention(torch.nn.Module(), *states, cu_seq_lens_q=bounds)[0]

    assert torch.equal(output, expected.bfloat16())  # rounded once, at the end


# Lengths of documents, and the shape of the queries and the number of keys in the call of SDPA that computes
# them on a GPU without the fused kernel. Blocks are multiples of 64 tokens; widths, of 8.
MASKED = {
    "rows": ([60, 100, 90, 70, 100], (5, 4, 100, 8), 100),
    "one block": ([100, 3, 1, 7, 60, 10], (1, 4, 192, 8), 192),
    "blocks": ([100, *[3] * 50, 100, 64, 1], (4, 4, 128, 8), 256),
}


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("width", [8, 5])
def test_one_masked_call_equals_the_documents_alone(case, heads, window, width, monkeypatch):
    lengths, queries, keys = MASKED[case]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    states = [torch.randn(1, n, sum(lengths), width, requires_grad=True) for n in (4, heads, heads)]
    options = {"dropout": 0.0, "scale": 0.3, "window": window}
    parts = zip(*(part.split(lengths, dim=2) for part in states), strict=True)
    alone = torch.cat([_sdpa_attention(part, **options) for part in parts], dim=2).transpose(1, 2)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **kwargs):
        calls.append((query.shape, key.shape[2]))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr("hf_clm.model.attention.scaled_dot_product_attention", counted)

    output = _masked_attention(states, bounds, longest=100, **options)

    assert calls == [(queries, keys)]
    torch.testing.assert_close(output, alone, atol=1e-5, rtol=1e-5)
    factor = torch.randn_like(alone)
    gradients = [torch.autograd.grad((part * factor).sum(), states) for part in (output, alone)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_many_empty_documents_of_a_static_shape_change_nothing():
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 90, 8) for _ in range(3)]
    options = {"longest": 30, "dropout": 0.0, "scale": None, "window": None}
    bounds = torch.tensor([0, 30, 40, 60, 90], dtype=torch.int32)

    rows = _masked_attention(states, bounds, **options)
    block = _masked_attention(states, torch.cat([bounds, bounds.new_full((20,), 90)]), **options)

    torch.testing.assert_close(rows, block, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_masked_calls_has_the_logits_of_its_documents_alone(kind, monkeypatch):
    """As on a GPU without the fused kernel, and on MPS."""
    model = packed_model(kind)
    batch = DataCollatorForPackedCausalLM()(ROWS)
    batch.pop("labels")

    def attend(states, bounds, *, options):
        return _masked_attention(states, bounds, longest=batch["max_length_q"], **options)

    monkeypatch.setattr("hf_clm.model.attention._document_attention", attend)

    together = model(**batch, use_cache=False).logits[0]

    assert torch.allclose(together, torch.cat(alone(model)), atol=1e-5, rtol=0)


def test_dropout_of_a_masked_call_keeps_the_mean():
    torch.manual_seed(0)
    states = [torch.zeros(1, 200, 300, 4), torch.zeros(1, 200, 300, 4), torch.ones(1, 200, 300, 4)]
    bounds = torch.tensor([0, 100, 101, 300], dtype=torch.int32)

    output = _masked_attention(states, bounds, longest=199, dropout=0.5, scale=None, window=None)

    assert output[0, 100].unique().tolist() == [0.0, 2.0]  # one weight, dropped or doubled
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)


def test_layers_share_a_mask_until_the_bounds_change():
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    shape = {"blocks": 1, "size": 4, "window": None}

    first, second = (_block_mask(bounds, torch.float16, **shape) for _ in range(2))
    bounds[1] = 1  # the next micro-batch in the same memory
    third = _block_mask(bounds, torch.float16, **shape)

    assert first is second
    assert (first == 0).int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert (third == 0).int().tolist() == [[[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]]]


KERNEL = "the fused kernel for packed rows"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "capability": (8, 0), "width": 256}, ""),
        ({"device": "mps"}, "mps has no fused kernel for packed rows"),
        ({"capability": (7, 5)}, f"{KERNEL} needs compute capability 8.0; this GPU has 7.5"),
        ({"dtype": torch.float32}, f"{KERNEL} does not support float32"),
        ({"width": 100}, f"{KERNEL} needs a head width in multiples of 8 up to 256; this model has 100"),
        ({"width": 512}, f"{KERNEL} needs a head width in multiples of 8 up to 256; this model has 512"),
        ({"dropout": 0.1}, f"{KERNEL} has no attention dropout"),
    ],
    ids=str,
)
def test_the_fused_kernel_is_used_where_the_device_and_the_model_allow_it(changes, expected):
    facts = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "width": 64, "dropout": 0.0}
    facts |= changes

    assert why_not_varlen(facts.pop("device"), facts.pop("capability"), **facts) == expected


def test_dropout_of_attention_keeps_the_mean():
    torch.manual_seed(0)
    states = [torch.randn(400, 2, 6, 4), torch.randn(400, 2, 6, 4), torch.ones(400, 2, 6, 4)]

    output = _sdpa_attention(states, dropout=0.5, scale=None, window=None)

    assert output[:, :, 0].unique().tolist() == [0.0, 2.0]  # one weight, dropped or doubled
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)


def test_without_document_bounds_a_packed_row_would_leak():
    """Plain causal attention over the same row gives other logits."""
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


def test_dropout_is_only_active_in_training():
    model = packed_model("gpt2", attn_pdrop=0.5)
    batch = DataCollatorForPackedCausalLM()(ROWS)

    in_evaluation = [model(**batch, use_cache=False).loss.item() for _ in range(2)]
    model.train()
    torch.manual_seed(0)
    in_training = [model(**batch, use_cache=False).loss.item() for _ in range(2)]

    assert in_evaluation[0] == in_evaluation[1]
    assert in_training[0] != in_training[1]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_unsupported_features_are_rejected(name):
    states = torch.zeros(1, 2, 3, 4)

    with pytest.raises(ModelError) as error:
        packed_attention(torch.nn.Module(), states, states, states, None, **{name: 30.0})

    assert str(error.value) == (
        f"model.attention: packed attention does not support this model's {name!r}; got packed; "
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


def test_generate_does_not_change_the_model():
    model = packed_model("qwen2").train()

    generate(model, byte_tokenizer(), prompts=["A"], decoding=Decoding(2))

    assert model.training
    assert model.config._attn_implementation == NAME


def test_switching_to_generation_and_back_only_changes_packed_attention():
    packed, eager = packed_model("gpt2"), tiny_model("gpt2")
    eager.set_attn_implementation("eager")

    for model in (packed, eager):
        use_for_generation(model)
    in_generation = [model.config._attn_implementation for model in (packed, eager)]
    use_for_training(packed, NAME)

    assert in_generation == ["sdpa", "eager"]
    assert packed.config._attn_implementation == "packed"


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_generation_with_packed_attention_is_an_error(kind, tmp_path):
    """With a KV cache, a step has one query and many keys; causal attention would only use the first key."""
    model = load_model(save_folder(tmp_path / kind, tiny_model(kind), byte_tokenizer()), byte_tokenizer())

    with pytest.raises(ModelError, match="does not support a KV cache"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def frames_compiled(model: PreTrainedModel, batches: list[dict]) -> tuple[list[int], dict[str, int]]:
    """Returns the number of graphs compiled after each batch, and the graph breaks."""
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
    """Builds batches of one shape and one number of targets, with different documents."""
    model.loss_type = "ForCausalLM"  # as load_model sets it
    shape = StaticShape(tokens=64, documents=8, max_length=32, targets=(64,))
    collate = DataCollatorForPackedCausalLM(with_targets=True, static=shape, pad_token_id=PAD)
    batches = [collate(ROWS[first:] + ROWS[:first]) for first in (0, 1, 2, 3, 0)]
    batches.append(collate(ROWS[:2]))
    for batch in batches:
        batch.pop("padding_tokens")
    return batches


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_dense_rows_of_one_shape_are_compiled_to_one_graph(kind):
    """The same graph is used for packed rows on CUDA, where one kernel computes all documents."""
    model = packed_model(kind).train()
    bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    dense = [{k: v for k, v in batch.items() if k not in bounds} for batch in static_batches(model)]

    after, breaks = frames_compiled(model, dense)

    assert after == [1, 1, 1, 1, 1, 1]
    assert breaks == {}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_documents_do_not_cause_recompilation(kind):
    """On a CPU, attention is computed document by document, outside of the graphs."""
    model = packed_model(kind).train()

    after, _ = frames_compiled(model, static_batches(model))

    assert after[0] > 1
    assert after[1:] == after[:1] * 5


def test_a_run_works_with_the_fallback_attention(tmp_path, caplog):
    settings = {"model_type": "codegen", "n_layer": 1, "n_head": 4, "n_embd": 32, "rotary_dim": 4}
    tokenizer = {"name_or_path": save_folder(tmp_path / "tokenizer", tiny_model(), byte_tokenizer())}
    changes = {"model": {"init": "scratch", "config": settings, "name_or_path": None}, "tokenizer": tokenizer}

    result = train(build_recipe(tmp_path, [{"text": "abcdef"}] * 4, data={"packing": "best_fit"}, **changes))

    assert result["status"] == "done"
    assert caplog.messages == ["attention eager: CodeGen has a custom attention"]


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_a_run_with_a_model_that_cannot_separate_documents_does_not_start(tmp_path, attention):
    """Bloom has a bias by distance instead of positions, and builds its mask without them."""
    settings = {"model_type": "bloom", "n_layer": 1, "n_head": 4, "hidden_size": 32}
    tokenizer = {"name_or_path": save_folder(tmp_path / "tokenizer", tiny_model(), byte_tokenizer())}
    model = {"init": "scratch", "config": settings, "name_or_path": None, "attention": attention}
    records = [{"text": letters * 8} for letters in ("abc", "def", "ghi", "jkl")]
    recipe = build_recipe(tmp_path, records, model=model, data={"packing": "best_fit"}, tokenizer=tokenizer)

    with pytest.raises(
        ModelError, match="with eager attention, BloomForCausalLM does not isolate the documents"
    ):
        train(recipe)
