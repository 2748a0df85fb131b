"""Loading models from folders written by save_pretrained, and initializing models from scratch."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, IM_END, PAD, X, byte_tokenizer, save_folder, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.errors import ExitCode, ModelError
from hf_clm.model.load import (
    build_config,
    check_packing,
    grow_embeddings,
    init_model,
    keep_gradients,
    load_config,
    load_model,
    max_positions,
    packing_fault,
    set_attention_dropout,
)
from hf_clm.text.tokenizer import load_tokenizer, use_chat_template

NEW_PAD = "[PAD]"
NEW_PAD_ID = 260  # the first id after those of the byte tokenizer


def set_config(folder: str, **values) -> None:
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: str, **options) -> str:
    with pytest.raises(ModelError) as error:
        load_model(folder, byte_tokenizer(), **options)
    assert error.value.exit_code == ExitCode.MODEL
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("pad", "rows", "expected"),
    [
        ("<|pad|>", 260, (260, PAD)),  # has a pad token: nothing to do
        (None, 260, (261, NEW_PAD_ID)),  # no pad token and no unused row: grows by one
        (None, 272, (272, NEW_PAD_ID)),  # no pad token, but unused rows, as in Qwen2.5: does not grow
        ("<|endoftext|>", 260, (261, NEW_PAD_ID)),  # the pad token is the end token, as is usual for GPT-2
    ],
)
def test_a_model_gets_a_separate_pad_token_and_can_be_reloaded(tmp_path, kind, tied, pad, rows, expected):
    rows_after, pad_id = expected
    source = tiny_model(kind, vocab_size=rows, tie_word_embeddings=tied)
    folder = save_folder(tmp_path / "source", source, byte_tokenizer(pad=pad))
    old = source.get_input_embeddings().weight

    tokenizer = load_tokenizer(folder, pad_token=NEW_PAD)
    model = load_model(folder, tokenizer)
    saved = save_folder(tmp_path / "saved", model, tokenizer)
    reopened = AutoModelForCausalLM.from_pretrained(saved)
    table, head = reopened.get_input_embeddings().weight, reopened.get_output_embeddings().weight

    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pad_id, EOS)
    assert table.shape == head.shape == (rows_after, 32)
    assert torch.equal(table[:rows], old)
    assert (table.data_ptr() == head.data_ptr()) is tied
    assert (reopened.config.vocab_size, reopened.config.pad_token_id) == (rows_after, pad_id)
    assert reopened.generation_config.pad_token_id == pad_id
    assert reopened.generation_config.eos_token_id == [EOS]
    assert AutoTokenizer.from_pretrained(saved).pad_token_id == pad_id
    assert reopened.generate(torch.tensor([[65, 66]]), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_new_rows_are_the_mean_of_the_old_ones_in_embeddings_and_head(kind):
    model = tiny_model(kind, tie_word_embeddings=False)
    table = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()

    grow_embeddings(model, 262)

    new_table, new_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert new_table.shape == new_head.shape == (262, 32)
    assert torch.equal(new_table[:260], table)
    assert torch.equal(new_head[:260], head)
    assert torch.allclose(new_table[260:], table.mean(dim=0).expand(2, -1), atol=1e-7)
    assert torch.allclose(new_head[260:], head.mean(dim=0).expand(2, -1), atol=1e-7)


def test_embeddings_never_shrink():
    model = tiny_model(vocab_size=300)

    grow_embeddings(model, 260)

    assert model.get_input_embeddings().weight.shape[0] == 300


def test_the_stop_tokens_are_those_of_tokenizer_template_and_generation_config(tmp_path):
    source = tiny_model()
    source.generation_config.eos_token_id = [258, EOS]
    folder = save_folder(tmp_path / "source", source, byte_tokenizer())
    tokenizer = load_tokenizer(folder)
    use_chat_template(tokenizer, "chatml")

    settings = load_model(folder, tokenizer).generation_config

    assert settings.eos_token_id == [EOS, IM_END, 258]
    assert (settings.pad_token_id, settings.bos_token_id) == (PAD, None)


def test_a_pad_token_never_stops_generation(tmp_path):
    source = tiny_model()
    source.generation_config.eos_token_id = [EOS, PAD]  # as in the chat models of Qwen2.5
    folder = save_folder(tmp_path / "source", source, byte_tokenizer())

    assert load_model(folder, load_tokenizer(folder)).generation_config.eos_token_id == [EOS]


def test_a_model_with_sampling_settings_but_no_sampling_can_be_saved(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    Path(folder, "generation_config.json").write_text(
        '{"eos_token_id": 256, "temperature": 0.7, "top_p": 0.8}'
    )
    model = load_model(folder, load_tokenizer(folder))

    model.save_pretrained(tmp_path / "saved")

    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_weights_saved_in_bfloat16_are_loaded_as_float32(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model().to(torch.bfloat16), byte_tokenizer())

    assert {p.dtype for p in load_model(folder, byte_tokenizer()).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(folder, byte_tokenizer(), dtype="bfloat16").parameters()} == {
        torch.bfloat16
    }


def test_missing_weights_are_an_error(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    set_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)

    assert "12 weights of the configuration are missing in the files, such as model.layers.2" in refusal(
        folder
    )


def test_weights_of_another_shape_are_an_error(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    set_config(folder, intermediate_size=48)

    assert refusal(folder).startswith(("model.name_or_path", "model "))


def test_a_tied_head_is_not_missing(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(tie_word_embeddings=True), byte_tokenizer())

    assert load_model(folder, byte_tokenizer()).get_output_embeddings().weight.shape == (260, 32)


def test_an_encoder_is_rejected(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    folder = save_folder(tmp_path / "bert", BertModel(BertConfig(vocab_size=260, **sizes)), byte_tokenizer())

    assert refusal(folder) == f"model.name_or_path {folder}: not a causal language model; got BertModel"


def test_an_encoder_decoder_is_rejected(tmp_path):
    config = T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save_folder(tmp_path / "t5", T5ForConditionalGeneration(config), byte_tokenizer())

    assert refusal(folder).endswith("not a causal language model; got T5ForConditionalGeneration")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt3"}, "model.config.model_type: unknown model type; got 'gpt3'; fix: "),
        ({"model_type": "qwen22"}, "did you mean 'qwen2'?"),
        ({}, "model.config.model_type: unknown model type; got None"),
        (
            {"model_type": "gpt2", "n_layers": 2},
            "model.config.n_layers: unknown setting of GPT2Config; did you mean 'n_layer'?",
        ),
        (
            {"model_type": "qwen2", "hidden_sizes": 2},
            "model.config.hidden_sizes: unknown setting of Qwen2Config; did you mean 'hidden_size'?",
        ),
    ],
)
def test_an_unknown_setting_is_an_error_with_the_nearest_name(settings, message):
    with pytest.raises(ModelError) as error:
        build_config(settings, byte_tokenizer())

    assert message in str(error.value)


def test_incompatible_sizes_are_a_one_line_error():
    settings = {"model_type": "gpt2", "n_embd": 30, "n_head": 4, "n_layer": 1}
    with pytest.raises(ModelError) as error:
        init_model(build_config(settings, byte_tokenizer()), byte_tokenizer())

    assert str(error.value).startswith("model.config gpt2: cannot be loaded: ")
    assert "\n" not in str(error.value)


def test_a_new_model_has_the_vocabulary_and_ids_of_the_tokenizer():
    settings = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}

    model = init_model(build_config(settings, byte_tokenizer()), byte_tokenizer())

    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (260, EOS, PAD)
    assert max_positions(config) == 64
    assert model.dtype == torch.float32
    assert settings == {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}


def test_the_same_seed_gives_the_same_new_model():
    config = build_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}, byte_tokenizer())
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(init_model(config, byte_tokenizer()).get_input_embeddings().weight)

    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def bin_folder(folder: Path, content: object) -> str:
    save_folder(folder, tiny_model(), byte_tokenizer())
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return str(folder)


def test_pickled_weights_are_rejected_unless_allowed(tmp_path):
    folder = bin_folder(tmp_path / "bin", tiny_model().state_dict())

    assert "safetensors" in refusal(folder)
    assert (
        load_model(folder, byte_tokenizer(), allow_bin=True).num_parameters() == tiny_model().num_parameters()
    )


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_a_pickle_that_runs_code_is_rejected_even_if_pickled_weights_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = bin_folder(tmp_path / "bin", Exploit())

    with pytest.raises(ModelError):
        load_model(folder, byte_tokenizer(), allow_bin=True)

    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a safetensors file", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_corrupt_weights_file_is_a_one_line_error(tmp_path, content):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    Path(folder, "model.safetensors").write_bytes(content)

    assert refusal(folder).startswith(f"model {folder}: cannot be loaded: ")


def test_a_truncated_weights_file_is_a_one_line_error(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    path = Path(folder, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])

    assert refusal(folder).startswith(f"model {folder}: cannot be loaded: ")


def test_a_folder_without_a_configuration_is_a_one_line_error(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    Path(folder, "config.json").unlink()

    assert refusal(folder).startswith(f"model {folder}: cannot be loaded: ")


@pytest.mark.parametrize("name", ["./nope", "/nope/at/all", "runs/sft/nope"])
def test_a_missing_folder_is_reported(name):
    assert refusal(name) == (
        f"model.name_or_path: no such folder; got {name!r}; fix: a Hub id has the form 'organisation/name'"
    )


def test_remote_code_is_rejected_without_asking(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(), byte_tokenizer())
    set_config(
        folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilLM"}
    )
    Path(folder, "evil.py").write_text("raise SystemExit('it ran')")

    assert refusal(folder).startswith(f"model {folder}: contains custom code; fix: review the code, then set")


def test_load_config_reads_a_folder_without_loading_its_weights(tmp_path):
    folder = save_folder(tmp_path / "source", tiny_model(max_position_embeddings=77), byte_tokenizer())
    Path(folder, "model.safetensors").unlink()

    assert max_positions(load_config(folder)) == 77


SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
}
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LFM2 = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FALLEN_BACK = {
    "codegen": (OLD, "attention eager: CodeGen has a custom attention"),
    "stablelm": (SMALL, "attention sdpa: StableLm has a custom attention"),
    "gemma2": (SMALL, "attention eager: packed attention does not support this model's 'softcap'"),
    "granite_swa": (SMALL, "attention eager: packed attention does not support this model's 's_aux'"),
    "llama4_text": (
        SMALL | EXPERTS | {"intermediate_size_mlp": 64},
        "attention sdpa: Llama4 has other kinds of layers: chunked_attention",
    ),
    "phimoe": (
        SMALL | EXPERTS | {"sliding_window": 4},
        "attention sdpa: Phimoe applies its window of 4 tokens only in the mask",
    ),
    "nemotron": (  # claims support, but does not pass on cu_seq_lens
        SMALL,
        "attention sdpa: with packed attention, NemotronForCausalLM does not isolate the documents of a "
        "packed row",
    ),
}
REFUSED = {
    "bloom": (
        {"n_layer": 2, "n_head": 4, "hidden_size": 32},
        "BloomForCausalLM does not isolate the documents",
    ),
    "gpt_oss": (
        SMALL | EXPERTS,
        "with eager attention, GptOssForCausalLM does not isolate the documents",
    ),
    "roberta": (
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "is_decoder": True},
        "RobertaForCausalLM does not isolate the documents",
    ),
    "mamba": (MAMBA, "masks do not isolate documents in layers of type linear_attention"),
    "lfm2": (SMALL | LFM2, "masks do not isolate documents in layers of type conv"),
}


def new_model(kind: str, settings: dict[str, Any], **options) -> PreTrainedModel:
    torch.manual_seed(0)
    return init_model(
        build_config({"model_type": kind, **settings}, byte_tokenizer()), byte_tokenizer(), **options
    )


@torch.no_grad()
def leak(model: PreTrainedModel) -> float:
    """Returns how much a packed row differs from its documents alone, relative to the largest logit."""
    documents = [list(range(10, 22)), [99], list(range(40, 43))]
    rows = [{"input_ids": ids, "labels": [X, *ids[1:]]} for ids in documents]
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.2)
    together = model(**DataCollatorForPackedCausalLM()(rows), use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in documents])
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("kind", FALLEN_BACK)
def test_a_model_without_support_for_packed_attention_falls_back_with_a_warning(kind, caplog):
    settings, message = FALLEN_BACK[kind]

    model = new_model(kind, settings)

    assert caplog.messages == [message]
    assert message.startswith(f"attention {model.config._attn_implementation}: ")
    assert leak(model) < 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_separate_documents_is_rejected(kind):
    settings, message = REFUSED[kind]

    with pytest.raises(ModelError) as error:
        new_model(kind, settings)

    assert message in str(error.value)
    assert str(error.value).startswith("model.attention: ")
    assert "fix: set model.attention to " in str(error.value)
    assert str(error.value).endswith(", and data.packing to none")


def test_an_explicit_attention_is_used_without_a_check(caplog):
    settings, _ = REFUSED["bloom"]

    model = new_model("bloom", settings, attention="eager")

    assert model.config._attn_implementation == "eager"
    assert caplog.messages == []
    with pytest.raises(ModelError, match="BloomForCausalLM does not isolate the documents"):
        check_packing(model)
    assert leak(model) > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_common_models_use_packed_attention_without_a_warning(kind, tmp_path, caplog):
    model = load_model(save_folder(tmp_path, tiny_model(kind), byte_tokenizer()), byte_tokenizer())

    assert model.config._attn_implementation == "packed"
    assert caplog.messages == []
    assert leak(model) < 1e-5


def test_a_saved_model_falls_back_like_a_new_one(tmp_path, caplog):
    settings, message = FALLEN_BACK["stablelm"]
    folder = save_folder(tmp_path, new_model("stablelm", settings, attention="sdpa"), byte_tokenizer())

    model = load_model(folder, byte_tokenizer())

    assert caplog.messages == [message]
    assert leak(model) < 1e-5


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Apart(LlamaForCausalLM):
    config_class = OwnConfig

class Mixing(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)

class Narrow(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
"""


def own_folder(folder: Path, name: str) -> str:
    save_folder(folder, tiny_model("llama"), byte_tokenizer())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": f"own.{name}"}
    set_config(str(folder), model_type="own", auto_map=auto_map, architectures=[f"{name}ForCausalLM"])
    (folder / "own.py").write_text(OWN_CODE)
    return str(folder)


def test_a_model_with_custom_code_uses_an_attention_of_transformers(tmp_path, caplog):
    folder = own_folder(tmp_path / "apart", "Apart")

    model = load_model(folder, byte_tokenizer(), trust_remote_code=True)

    assert "attention sdpa: OwnConfig has custom code" in caplog.messages
    assert leak(model) < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mixing", "with sdpa attention, Mixing does not isolate the documents of a packed row"),
        ("Narrow", "Narrow does not support packed rows"),
    ],
)
def test_a_model_that_ignores_positions_is_rejected(tmp_path, name, message):
    folder = own_folder(tmp_path / name, name)

    assert refusal(folder, trust_remote_code=True) == (
        f"model.attention: {message}; fix: set model.attention to sdpa, and data.packing to none"
    )


def test_checking_packed_rows_does_not_change_the_model():
    model = tiny_model("llama").train()

    assert packing_fault(model) == ""

    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_a_model_without_weights_is_not_checked():
    with torch.device("meta"):
        model = tiny_model("llama")

    assert packing_fault(model) == ""


@pytest.mark.parametrize(("std", "low", "high"), [(None, 0.015, 0.025), (1.0, 0.95, 1.05)])
def test_new_embeddings_have_the_given_standard_deviation(std, low, high):
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}
    config = build_config(sizes | {"tie_word_embeddings": False}, byte_tokenizer())

    model = init_model(config, byte_tokenizer(), embedding_std=std)

    assert low < model.transformer.wte.weight.std() < high
    assert low < model.transformer.wpe.weight.std() < high
    assert 0.015 < model.lm_head.weight.std() < 0.025


def test_layers_in_4_bits_are_not_repacked_where_a_repacked_layer_has_no_gradient():
    model = tiny_model()
    layer: Any = model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True  # as in bitsandbytes.nn.Linear4bit

    keep_gradients(model)

    assert layer.support_avx512bf16_for_cpu is False


def test_attention_dropout_replaces_that_of_the_configuration(tmp_path):
    folder = save_folder(tmp_path, tiny_model("gpt2", attn_pdrop=0.1), byte_tokenizer())

    stock, changed = (load_model(folder, byte_tokenizer(), attention_dropout=p) for p in (None, 0.0))

    assert [model.config.attn_pdrop for model in (stock, changed)] == [0.1, 0.0]
    assert [model.transformer.h[0].attn.attn_dropout.p for model in (stock, changed)] == [0.1, 0.0]


def test_attention_dropout_of_a_model_without_it_is_an_error():
    config = AutoConfig.for_model("mamba", vocab_size=260, hidden_size=16, num_hidden_layers=1)

    with pytest.raises(ModelError) as error:
        set_attention_dropout(config, 0.0)

    assert str(error.value) == (
        "model.attention_dropout: the model has no attention dropout; got MambaConfig; fix: remove it"
    )
