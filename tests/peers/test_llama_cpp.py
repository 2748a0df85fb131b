"""Exported GGUF files against llama.cpp itself: its tokenizer, its chat completions, and planted faults.

The converter is that of the source package of llama-cpp-python, or of LLAMA_CPP.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import write_jsonl
from tokenizers import processors
from transformers import AutoTokenizer

from hf_clm.cli import main
from hf_clm.export import export as exporting
from hf_clm.generation.llama_cpp import LlamaCppModel
from hf_clm.generation.load import load_run
from hf_clm.model.load import load_config
from hf_clm.text.train_tokenizer import train_tokenizer
from hf_clm.training.run import train

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.peer

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "data" / "local"
SMOLLM2 = LOCAL / "smollm2-135m-instruct"
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ANSWERS = {
    "What is 2 + 2?": "It is 4, as in 2024.",
    "Who lives in\n\n  the tower?": "A keeper; he's old.",
    "Say 10.000 in words": "ten thousand\n\nor 10k",
    "灯塔在哪里？": "在海边 🌊",
    "Why?": "Because it's so.",
    "What's the\tcolour of 3 foxes": "Red, red, red!",
}
END = "[END]"  # a stop token that llama.cpp does not know by its text
CUSTOM = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[END]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _converter():
    """Names the converter, and fetches it first if it is missing."""
    packages = sorted(LOCAL.glob("llama_cpp_python-*.tar.gz"))
    if "LLAMA_CPP" not in os.environ and not packages:
        words = [
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            str(LOCAL),
            "llama-cpp-python",
        ]
        subprocess.run([sys.executable, "-m", *words], check=True)
        packages = sorted(LOCAL.glob("llama_cpp_python-*.tar.gz"))
    with pytest.MonkeyPatch.context() as patch:
        if "LLAMA_CPP" not in os.environ:
            patch.setenv("LLAMA_CPP", str(packages[-1]))
        yield


@pytest.fixture(scope="session")
def smollm2_tokenizer(tmp_path_factory) -> Path:
    """The tokenizer of SmolLM2-135M-Instruct, without the model."""
    if not (SMOLLM2 / "config.json").is_file():
        subprocess.run([sys.executable, ROOT / "data" / "get_smollm2.py"], check=True)
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMOLLM2 / name, folder)
    return folder


def train_run(folder: Path, tokenizer: dict[str, Any], *, kind: str = "llama", **changes: Any) -> Path:
    """A tiny model that has learned ANSWERS by heart, in the format ``messages`` unless changed."""
    records = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS.items()
    ]
    recipe = helpers.build_recipe(
        folder,
        changes.pop("records", records),
        **{
            "model": {
                "name_or_path": None,
                "init": "scratch",
                "config": {"model_type": kind, "max_position_embeddings": 256, **SIZE},
            },
            "tokenizer": tokenizer,
            "train": {"max_steps": 150, "learning_rate": 5e-3},
            **changes,
        },
    )
    train(recipe)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2_tokenizer) -> Path:
    return train_run(tmp_path_factory.mktemp("run"), {"name_or_path": str(smollm2_tokenizer)})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "gguf"
    assert main(words_for(run, folder)) == 0
    return folder


def words_for(run: Path, output: Path, *more: str) -> list[str]:
    return ["export", str(run), "--to", "gguf", "--output_dir", str(output), *more]


def ask_llama_cpp(folder: Path, question: str) -> str:
    """llama-cpp-python's own path: its template engine, tokenizer, sampler and stop tokens."""
    (file,) = folder.glob("*.gguf")
    model = llama_cpp.Llama(str(file), n_ctx=256, verbose=False)
    messages = [{"role": "user", "content": question}]
    return model.create_chat_completion(messages, temperature=0.0, max_tokens=40)["choices"][0]["message"][
        "content"
    ]


@pytest.mark.parametrize("quantize", ["none", "q8_0"])
def test_llama_cpp_answers_as_the_run(run, tmp_path, quantize, capsys):
    assert main(words_for(run, tmp_path / "gguf", "--quantize", quantize)) == 0

    facts = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert [ask_llama_cpp(tmp_path / "gguf", question) for question in ANSWERS] == [*ANSWERS.values()]
    assert (facts["prompts"], facts["same_answers"], facts["through_the_template"]) == (6, 6, 6)
    assert facts["weights"] == {"none": "f16"}.get(quantize, quantize)
    assert facts["exported_loss"] == pytest.approx(facts["loss"], abs=0.01)
    tokenizer = AutoTokenizer.from_pretrained(run)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for question in ANSWERS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert vocabulary.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
    assert "llama.cpp tokenizes 6 prompts as in training" in capsys.readouterr().out


def test_commands_compute_the_file_with_llama_cpp(run, exported, capsys, monkeypatch, tmp_path):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [json.loads(line) for line in (run.parent / "rows.jsonl").open()]
    )
    (file,) = exported.glob("*.gguf")
    capsys.readouterr()

    figures = []
    for model in (run, exported, file):
        assert main(["evaluate", str(model), data, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert main(["generate", str(file), "--prompt", "Why?"]) == 0
    assert capsys.readouterr().out == "Because it's so.\n"

    assert figures[1] == figures[2]
    assert figures[1]["exact_match"] == 1.0 and figures[1]["loss"] != figures[0]["loss"]
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], abs=1e-3)
    assert isinstance(load_run(str(file)).model, LlamaCppModel)
    assert main(["evaluate", str(run), data, "--before", str(file), "--no_generate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["before"]["loss"] == pytest.approx(
        figures[1]["loss"], abs=1e-6
    )
    assert main(["generate", str(file), "--prompt", "Why?", "--dtype", "float16"]) == 2
    assert "--dtype: has no effect on a GGUF file" in capsys.readouterr().err


def test_a_file_that_was_moved_is_dequantized(exported, tmp_path, capsys):
    (file,) = exported.glob("*.gguf")
    shutil.copy(file, tmp_path / "alone.gguf")
    capsys.readouterr()

    assert main(["generate", str(tmp_path / "alone.gguf"), "--prompt", "Why?"]) == 0

    assert capsys.readouterr().out == "Because it's so.\n"
    assert type(load_run(str(tmp_path / "alone.gguf")).model).__name__ == "LlamaForCausalLM"


def test_logits_do_not_depend_on_what_was_read_before(exported):
    """What two rows begin with is kept; documents of a packed row are separate; the context grows."""
    (file,) = exported.glob("*.gguf")
    model = LlamaCppModel(load_config(str(exported)), file)
    one, other = torch.tensor([[*range(100, 140)]]), torch.tensor([[*range(100, 120), *range(300, 330)]])
    first = model(one).logits

    again = [model(other).logits, model(one).logits, model(one, logits_to_keep=1).logits]

    fresh = LlamaCppModel(load_config(str(exported)), file)(other).logits
    assert first.shape == (1, 40, load_config(str(exported)).vocab_size)
    torch.testing.assert_close(again[0], fresh, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again[1], first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again[2], first[:, -1:], rtol=1e-3, atol=1e-3)
    places = torch.cat([torch.arange(40), torch.arange(50)])[None]
    packed = model(
        torch.cat([one, other], dim=1), position_ids=places, logits_to_keep=torch.tensor([3, 39, 60])
    )
    expected = torch.stack([first[0, 3], first[0, 39], fresh[0, 20]])
    torch.testing.assert_close(packed.logits[0], expected, rtol=1e-3, atol=1e-3)
    assert model(torch.ones(1, 1500, dtype=torch.int64)).logits.shape[1] == 1500
    with pytest.raises(ValueError, match="one row at a time"):
        model(torch.cat([one, one]))


def test_adapters_are_merged_and_unmerged_ones_are_refused(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "lora").mkdir()
    records = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]}]
    recipe = helpers.build_recipe(
        tmp_path / "lora",
        records * 4,
        model={"name_or_path": str(run)},
        lora={"r": 8},
        train={"max_steps": 40, "learning_rate": 1e-2},
    )
    train(recipe)

    assert main(words_for(tmp_path / "lora" / "run", tmp_path / "gguf")) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "lora" / "run"), "--prompt", "Why?"]) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    assert answer != ANSWERS["Why?"]
    assert ask_llama_cpp(tmp_path / "gguf", "Why?") == answer
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    data = str(tmp_path / "lora" / "rows.jsonl")
    assert main(["evaluate", str(file), data, "--before", "base", "--no_generate", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["before"]["model"] == str(run) and figures["before"]["loss"] > figures["loss"]
    monkeypatch.setattr(exporting, "merge_weights", lambda model, folder, is_quantized: model.unload())
    assert main(words_for(tmp_path / "lora" / "run", tmp_path / "unmerged")) == 4

    assert "the exported model does not answer as the run does" in capsys.readouterr().err
    assert not (tmp_path / "unmerged").exists()


@pytest.mark.parametrize(
    "change", [("<|im_start|>assistant\n", "<|im_start|>assistant"), ("You are a helpful", "You are a")]
)
def test_another_template_in_the_file_is_refused(run, tmp_path, capsys, monkeypatch, change):
    convert = exporting.convert

    def change_template(folder: Path, *words: Any, **options: Any) -> None:
        place = folder / "chat_template.jinja"
        assert change[0] in place.read_text()
        place.write_text(place.read_text().replace(*change))
        convert(folder, *words, **options)

    monkeypatch.setattr(exporting, "convert", change_template)

    assert main(words_for(run, tmp_path / "gguf")) == 4

    assert "llama.cpp tokenizes a prompt differently from training; got" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def custom(tmp_path_factory) -> Path:
    """A run with a tokenizer of its own, and a template with a stop token of its own."""
    folder = tmp_path_factory.mktemp("custom")
    template = folder / "custom.jinja"
    template.write_text(CUSTOM)
    names = ["[user]", "[assistant]", "[system]", END]
    section = {"train": {"vocab_size": 400}, "control_tokens": names, "chat_template": str(template)}
    return train_run(folder, section, kind="qwen2")


def test_a_stop_token_of_its_own_is_written_into_the_file(custom, tmp_path, capsys, monkeypatch):
    assert main(words_for(custom, tmp_path / "gguf")) == 0

    facts = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert END in facts["stop_tokens"]
    assert [ask_llama_cpp(tmp_path / "gguf", question) for question in ANSWERS] == [*ANSWERS.values()]
    monkeypatch.setattr(exporting, "add_stop_tokens", lambda file, ids: None)
    assert main(words_for(custom, tmp_path / "without")) == 4
    assert f"llama.cpp would not stop at a stop token of the run; got '{END}'" in capsys.readouterr().err
    assert not (tmp_path / "without").exists()


def test_another_pre_tokenizer_is_refused(custom, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_clm.export.convert.pre_tokenizer_of", lambda tokenizer: "gpt-2")

    assert main(words_for(custom, tmp_path / "gguf")) == 4

    assert "llama.cpp tokenizes a prompt differently from training" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["alpaca", "text"])
def test_plain_prompts_and_texts_are_read_alike(tmp_path, format, capsys):
    trained = train_tokenizer([*ANSWERS, *ANSWERS.values()], vocab_size=400)
    trained.save_pretrained(tmp_path / "tokenizer")
    records = {
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in ANSWERS.items()],
        "text": [{"text": f"{q} {a}"} for q, a in ANSWERS.items()],
    }[format]
    run = train_run(
        tmp_path,
        {"name_or_path": str(tmp_path / "tokenizer")},
        kind="gpt2",
        records=records,
        stage="sft" if format == "alpaca" else "pretrain",
        model={
            "name_or_path": None,
            "init": "scratch",
            "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64},
        },
    )

    assert main(words_for(run, tmp_path / "gguf", "--to", "ollama")) == 0

    facts = json.loads((tmp_path / "gguf" / "export.json").read_text())
    is_asked = format == "alpaca"
    assert (facts["equal_prompts"], facts["through_the_template"]) == (
        6,
        6 if is_asked else 0,
    )
    expected = "Below is an instruction" if is_asked else 'TEMPLATE """{{ .Prompt }}"""'
    assert expected in (tmp_path / "gguf" / "Modelfile").read_text()
    if is_asked:
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "Why?", "--max_new_tokens", "40"]) == 0
        assert ask_llama_cpp(tmp_path / "gguf", "Why?") == capsys.readouterr().out.removesuffix("\n")


def test_a_sentencepiece_file_of_the_run_is_used(tmp_path):
    """BPE with bytes and a start token, as in Llama 2; transformers does not save the file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n")
    options = {"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    with (tmp_path / "own.model").open("wb") as file:
        sentences = iter([line for line in [*text, *ANSWERS.values()] if line.strip()])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=file, **options)
    records = [{"prompt": q, "completion": f" {a}"} for q, a in ANSWERS.items()]
    run = train_run(tmp_path, {"name_or_path": str(tmp_path / "own.model")}, records=records)

    assert main(words_for(run, tmp_path / "gguf")) == 0

    facts = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert (facts["equal_prompts"], facts["same_answers"]) == (6, 6)


def test_a_start_token_that_chats_do_not_have_is_removed(tmp_path):
    """The tokenizer adds one to a text; the chat template writes none, so chats in transformers have none."""
    trained = train_tokenizer([*ANSWERS, *ANSWERS.values()], vocab_size=400)
    start = ("<|endoftext|>", trained.bos_token_id)
    trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    trained.save_pretrained(tmp_path / "tokenizer")
    section = {"name_or_path": str(tmp_path / "tokenizer"), "chat_template": "chatml"}
    run = train_run(tmp_path, section, kind="qwen3")
    assert AutoTokenizer.from_pretrained(run)("a").input_ids[0] == start[1]

    assert main(words_for(run, tmp_path / "gguf", "--to", "ollama")) == 0

    assert (tmp_path / "gguf" / "Modelfile").exists()
    assert ask_llama_cpp(tmp_path / "gguf", "Why?") == ANSWERS["Why?"]


def test_a_long_prompt_is_left_out_and_a_loss_over_the_tolerance_is_refused(run, tmp_path, capsys):
    records = [json.loads(line) for line in (run.parent / "rows.jsonl").open()]
    records.append({"messages": [{"role": "user", "content": "x " * 240}, records[0]["messages"][1]]})
    words = words_for(run, tmp_path / "gguf", "--data", write_jsonl(tmp_path / "rows.jsonl", records))

    assert main([*words, "--quantize", "q8_0", "--tolerance", "0"]) == 4

    error = capsys.readouterr().err
    assert "greedy answers within 0 nats" in error
    assert "fix: choose --quantize none, or a larger --tolerance" in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert main(words) == 0
    facts = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert (facts["prompts"], facts["prompts_too_long"]) == (6, 1)


def test_an_answer_that_was_interrupted_leaves_no_trace(exported, monkeypatch):
    """The context then holds a part of the new row."""
    (file,) = exported.glob("*.gguf")
    model = LlamaCppModel(load_config(str(exported)), file)
    one, other = torch.tensor([[*range(100, 160)]]), torch.tensor([[*range(100, 110), *range(300, 900)]])
    expected = model(one).logits
    decode, calls = llama_cpp.llama_decode, []

    def interrupt(*words: Any) -> int:
        calls.append(decode(*words))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(other)

    assert calls == [0]
    torch.testing.assert_close(model(one).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_in_one_line(tmp_path, capsys):
    model = helpers.tiny_model("llama", vocab_size=400)
    folder = helpers.save_folder(tmp_path / "model", model, helpers.sentencepiece_tokenizer())
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])

    assert main([*words_for(Path(folder), tmp_path / "gguf"), "--data", data]) == 4

    error = capsys.readouterr().err
    assert "llama.cpp's converter refuses the model; got NotImplementedError: BPE pre-tokenizer" in error
    assert error.count("\n") == 1
