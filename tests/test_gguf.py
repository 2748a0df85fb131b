"""A GGUF file as a model: what is read of it, what is restored, and a run on it."""

import json
import sys
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import CONTROL, EOS, PAD, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.cli import main
from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.gguf import local_model
from hf_clm.training.run import train

gguf = pytest.importorskip("gguf")

RECORDS = [{"prompt": f"say {letter}\n", "completion": letter * 3} for letter in "abcdefgh"]
WIDTH, INNER, HEADS, TOKENS = 32, 64, 4, 262


def write_gguf(path: Path, *, architecture: str = "llama", splitting: str = "gpt-2") -> Path:
    """A llama of one layer with random weights; ids of the tokens as in ``byte_tokenizer``."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    vocab = byte_tokenizer(merges=[("1", "2"), ("s", "a")]).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(["1 2", "s a"])
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    shapes = {
        "token_embd": (TOKENS, WIDTH),
        **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")},
        "blk.0.ffn_down": (WIDTH, INNER),
        **dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (WIDTH,)),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build_recipe(folder: Path, **changes: Any) -> Any:
    file = write_gguf(folder / "tiny.gguf")
    changes["train"] = {"max_steps": 4, "seed": 42} | changes.get("train", {})
    return helpers.build_recipe(folder, RECORDS, model={"name_or_path": str(file)}, **changes)


def test_the_weights_and_the_tokens_are_those_of_the_file(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")

    folder = local_model(str(file))

    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(
        weights["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down.weight"]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<|im_start|>say 12") == [258, 261, 121, 32, 260]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (
        CONTROL[0],
        CONTROL[1],
        128,
    )


def test_digits_are_split_as_smollm_splits_them(tmp_path):
    """The file only names its way of splitting; transformers takes that of GPT-2, which merges 1 and 2."""
    folder = local_model(str(write_gguf(tmp_path / "tiny.gguf", splitting="smollm")))

    assert AutoTokenizer.from_pretrained(folder).encode("say 12") == [261, 121, 32, 49, 50]


def test_the_folder_is_made_once_and_again_for_a_file_that_changed(tmp_path, caplog):
    file = write_gguf(tmp_path / "tiny.gguf")

    folder = local_model(str(file))
    (Path(folder) / "mark").touch()

    assert local_model(str(file)) == folder and (Path(folder) / "mark").exists()
    assert [record.message for record in caplog.records] == [
        f"tiny.gguf: dequantized to {folder} (0.00 GB), which is used in its place"
    ]
    write_gguf(file, splitting="smollm")
    assert local_model(str(file)) != folder


def test_a_name_that_is_no_file_of_this_kind_is_left_alone(tmp_path):
    (tmp_path / "folder.gguf").mkdir()

    assert local_model("gpt2") == "gpt2"
    assert local_model(str(tmp_path / "folder.gguf")) == str(tmp_path / "folder.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", r"^model.name_or_path: no such file; got '.*missing\.gguf'$"),
        ("text.gguf", r"^model .*text\.gguf: cannot be loaded: .*not a GGUF file"),
        (
            "mamba.gguf",
            r"^model .*mamba\.gguf: cannot be loaded: .*architecture.*nonsense.*not supported yet",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, message):
    (tmp_path / "text.gguf").write_text("no model at all, but some words that are longer than a header\n")
    write_gguf(tmp_path / "mamba.gguf", architecture="nonsense")

    with pytest.raises(ModelError, match=message) as caught:
        local_model(str(tmp_path / name))

    assert "\n" not in str(caught.value)


def test_without_the_package_its_name_is_given(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(EnvironmentFault, match=r"tiny.gguf: needs the package gguf; fix: pip install gguf$"):
        local_model(str(file))


def test_a_run_on_a_file_is_resumed_exactly_and_saves_a_plain_model(tmp_path):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    train(build_recipe(tmp_path, train={"output_dir": str(straight)}))
    saved = {"output_dir": str(halved), "save_strategy": "steps", "save_steps": 2}
    train(build_recipe(tmp_path, train=saved | {"max_steps": 2}))

    train(build_recipe(tmp_path, train=saved, resume_override=["max_steps"]))

    first, second = (AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (straight, halved))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    certificate = json.loads((straight / "run.json").read_text())["proof"]["train"]["certificate"]
    assert (certificate["valid"], certificate["rows"]) == (True, 8)


def test_adapters_of_a_file_open_with_plain_peft_and_merge(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    train(build_recipe(tmp_path, lora={"r": 4}, train={"learning_rate": 3e-2}))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()

    assert main(["merge", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")]) == 0

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[*b"say c\n"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert "8 greedy answers are the same" in capsys.readouterr().out


def test_a_file_is_evaluated_like_its_folder(tmp_path, capsys):
    file, figures = write_gguf(tmp_path / "tiny.gguf"), []
    data = helpers.write_jsonl(tmp_path / "rows.jsonl", RECORDS)

    for model in (str(file), local_model(str(file))):
        assert main(["evaluate", model, data, "--no_generate", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))

    assert figures[0] == figures[1] and figures[0]["rows"] == 8
