"""Models that cannot be trained are refused in one line, before libraries are loaded or data are read."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import SIZES, byte_tokenizer, tiny_model, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from hf_clm.errors import ModelError, RecipeError
from hf_clm.model.load import build_config, check_causal, check_shape
from hf_clm.recipe.shapes import causal_kinds, folder_faults, scratch_faults
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", **SIZES["llama"]}
GPT2 = {"model_type": "gpt2", **SIZES["gpt2"]}


def faults_of(settings: dict[str, Any]) -> list[str]:
    return [f"{fault.what}; got {fault.got}" for fault in scratch_faults(settings)]


def test_the_parsed_model_types_are_those_of_the_library():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_kinds() == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    "kind", ["t5", "clip", "vit", "wav2vec2", "distilbert", "nope", "", 5, [1], {"a": 1}]
)
def test_a_type_without_a_causal_language_model_is_refused(kind):
    (fault,) = faults_of({"model_type": kind})

    assert "transformers has no causal language model of this type" in fault


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *((kind, "an encoder-decoder is not a causal") for kind in ("bart", "whisper", "marian", "pegasus")),
        *((kind, "this encoder attends") for kind in ("bert", "roberta", "electra", "big_bird")),
        *((kind, "not a text-only model") for kind in ("gemma3", "got_ocr2")),
    ],
)
def test_an_architecture_that_is_not_causal_is_refused(kind, what):
    (fault,) = faults_of({"model_type": kind})

    assert fault.startswith(f"model.config.model_type: {what}")


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "mixtral", "mamba", "gpt_neox"]
)
def test_a_causal_architecture_is_accepted(kind):
    assert faults_of({"model_type": kind}) == []


def test_an_encoder_with_is_decoder_is_accepted():
    assert faults_of({"model_type": "bert", "is_decoder": True}) == []


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({**GPT2, "n_layer": 0}, "model.config.n_layer: expected 1 to 2,000 layers; got 0"),
        ({**LLAMA, "num_hidden_layers": -2}, "model.config.num_hidden_layers: expected 1 to 2,000 layers"),
        (
            {**LLAMA, "num_hidden_layers": 10**12},
            "model.config.num_hidden_layers: expected 1 to 2,000 layers; got 1,000,000,000,000",
        ),
    ],
)
def test_an_impossible_number_of_layers_is_refused(settings, fault):
    assert faults_of(settings)[0].startswith(fault)


def test_a_folder_of_another_architecture_is_refused_by_its_configuration(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=260, **sizes)).save_pretrained(tmp_path / "bert")
    tiny_model().save_pretrained(tmp_path / "qwen2")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "config.json").write_text(json.dumps({"model_type": "clip"}))

    (bert,), (named,) = folder_faults(str(tmp_path / "bert")), folder_faults(str(tmp_path / "named"))
    assert (bert.what, bert.got) == ("model.name_or_path: not a causal language model", "BertModel")
    assert named.got == "'clip'"
    assert list(folder_faults(str(tmp_path / "qwen2"))) == []
    assert list(folder_faults(str(tmp_path))) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**LLAMA, "hidden_size": 33},
            "The hidden size (33) is not a multiple of the number of attention heads",
        ),
        ({**LLAMA, "intermediate_size": "wide"}, ""),
        ({**LLAMA, "hidden_size": 0}, ""),
        ({**LLAMA, "vocab_size": -1}, ""),
        ({**GPT2, "n_embd": 33}, "`embed_dim` must be divisible by num_heads"),
        ({**LLAMA, "num_key_value_heads": 3}, ""),
        ({**LLAMA, "vocab_size": 10**15}, "the model does not fit into memory"),
        ({**LLAMA, "hidden_act": "nope"}, ""),
        ({**GPT2, "activation_function": "nope"}, ""),
        ({**LLAMA, "rope_scaling": {"rope_type": "nope"}}, ""),
        ({**GPT2, "n_positions": 2**62}, ""),
        ({**LLAMA, "head_dim": -8}, ""),
    ],
)
def test_a_shape_that_the_library_rejects_is_a_one_line_error(settings, message):
    with pytest.raises(ModelError) as caught:
        check_shape(build_config(settings), bytes_per_weight=4)

    assert "\n" not in str(caught.value) and message in str(caught.value)


def test_a_model_larger_than_the_memory_is_refused_without_allocating():
    settings = {**LLAMA, "hidden_size": 8192, "intermediate_size": 2**16, "num_hidden_layers": 1000}

    with pytest.raises(
        ModelError, match=r"the model does not fit into memory; got [\d,]+ parameters, which need"
    ):
        check_shape(build_config(settings), bytes_per_weight=8)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(
        ModelError, match=r"^model.config.vocab_size: the tokenizer has 260 tokens; got 100; fix"
    ):
        build_config({**LLAMA, "vocab_size": 100}, byte_tokenizer())
    assert build_config({**LLAMA, "vocab_size": 300}, byte_tokenizer()).vocab_size == 300


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_causal_model_passes_the_check(kind):
    check_causal(tiny_model(kind))


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_model_that_attends_to_later_tokens_is_never_trained(kind):
    """The loss of an encoder falls to 0, as each position attends to its target."""
    sizes = {
        "bert": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=260, **sizes[kind]))

    with pytest.raises(ModelError, match="is not causal: its logits depend on later tokens"):
        check_causal(model)


def test_a_shape_is_refused_before_the_data_are_read(tmp_path):
    settings = {**LLAMA, "hidden_act": "nope"}
    model = {"name_or_path": None, "init": "scratch", "config": settings}
    recipe = helpers.build_recipe(tmp_path, [], model=model, tokenizer={"train": {"vocab_size": 300}})
    (tmp_path / "rows.jsonl").unlink()

    with pytest.raises(ModelError, match=r"^model.config: the model cannot be built: "):
        train(recipe)


def test_z_loss_is_refused_for_a_model_that_computes_its_own_loss(tmp_path):
    kind = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = {"name_or_path": None, "init": "scratch", "config": {"model_type": "granite", **kind}}
    rows = [{"prompt": "a", "completion": "b"}] * 4
    options = {"model": model, "tokenizer": {"train": {"vocab_size": 300}}, "loss": {"z_loss": 1e-4}}

    with pytest.raises(RecipeError, match=r"^loss.z_loss: has no effect: the model computes its own loss \("):
        train(helpers.build_recipe(tmp_path, rows, **options))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("model.config={model_type: t5}", 2, "no causal language model of this type"),
        ("model.config={model_type: gpt2, n_layer: 999999999}", 2, "expected 1 to 2,000 layers"),
        ("learnin_rate=1", 2, "did you mean 'learning_rate'?"),
        ("max_steps=four", 2, "expected a whole number"),
    ],
)
def test_the_command_answers_an_impossible_recipe_within_five_seconds(change, code, message, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    text = f"stage: pretrain\nmodel: {{init: scratch}}\ntokenizer: {{train: {{}}}}\ndata: {{train: {rows}}}\n"
    (tmp_path / "r.yaml").write_text(text + f"train: {{output_dir: {tmp_path}/run}}\n")
    program = (
        "import sys, resource, hf_clm.cli as c\ncode = c.main(sys.argv[1:])\n"
        "print('seconds', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\nsys.exit(code)"
    )

    words = [sys.executable, "-c", program, "train", str(tmp_path / "r.yaml"), f"--{change}"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)

    assert found.returncode == code
    assert message in found.stderr and found.stderr.count("\n") == 1
    seconds = re.search(r"seconds (\S+)", found.stdout)
    assert seconds and float(seconds[1]) < 5
    assert not (tmp_path / "run").exists()
