"""``hf-clm export`` writes what answers as the run does, or nothing. With llama.cpp: tests/peers."""

import importlib.util
import json
import shutil
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.cli import main
from hf_clm.errors import ModelError, RecipeError
from hf_clm.export import export as exporting
from hf_clm.export.compare import NEW_TOKENS, Comparison, Prompt, Sample, compare, observe, read_sample
from hf_clm.export.convert import CONVERTER, add_stop_tokens, find_converter, pre_tokenizer_of
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import load_run, to_loaded_run
from hf_clm.gguf import exported_file
from hf_clm.run_folder import RunRecord
from hf_clm.text.train_tokenizer import train_tokenizer
from hf_clm.training.run import train

RECORDS = [{"prompt": f"say {letter}\n", "completion": letter * 3} for letter in "abcdefgh"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has learned to answer with three letters."""
    folder = tmp_path_factory.mktemp("plain")
    train(helpers.build_recipe(folder, RECORDS, train={"max_steps": 60, "learning_rate": 1e-2}))
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """The same with adapters."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    settings = {"max_steps": 20, "learning_rate": 3e-2}
    train(helpers.build_recipe(folder, RECORDS, lora={"r": 4}, train=settings))
    return folder / "run"


def words_for(run: Path, output: Path, *more: str) -> list[str]:
    return ["export", str(run), "--to", "safetensors", "--output_dir", str(output), *more]


@pytest.mark.parametrize("name", ["run", "adapted"])
def test_plain_transformers_answers_the_exported_folder_as_the_run(name, request, tmp_path, capsys):
    run, output = request.getfixturevalue(name), tmp_path / "deep" / "exported"

    assert main(words_for(run, output, "--dtype", "float32")) == 0

    printed = capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32
    assert main(["generate", str(run), "--prompt", "say c\n", "--max_new_tokens", "4"]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    ids = tokenizer("say c\n", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
    assert tokenizer.decode(found, skip_special_tokens=True) == expected
    facts = json.loads((output / "export.json").read_text())
    assert (facts["prompts"], facts["same_answers"], facts["weights"]) == (8, 8, "float32")
    assert facts["loss"] == pytest.approx(facts["exported_loss"], abs=1e-5)
    assert "8 are the same" in printed and f"vllm serve {output}" in printed
    assert [path.name for path in output.parent.iterdir()] == ["exported"]
    assert (output / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert oct(output.stat().st_mode)[-3:] == "755"


def test_bfloat16_is_the_default_and_large_models_are_divided_into_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD", "50KB")

    assert main(words_for(run, tmp_path / "exported")) == 0

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == torch.bfloat16
    assert len(list((tmp_path / "exported").glob("model-*-of-*.safetensors"))) > 1
    settings = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [helpers.EOS] and settings["do_sample"] is False


def test_adapters_that_were_left_out_are_found(adapted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting, "merge_weights", lambda model, folder, is_quantized: model.unload())

    assert main(words_for(adapted, tmp_path / "exported")) == 4

    error = capsys.readouterr().err
    assert "the exported model does not answer as the run does; got" in error
    assert "greedy answers within 0.15 nats, and a loss of" in error
    assert list(tmp_path.iterdir()) == []


def test_a_tolerance_bounds_the_rounding(run, tmp_path, capsys):
    assert main(words_for(run, tmp_path / "new" / "exported", "--tolerance", "0")) == 4
    assert list(tmp_path.iterdir()) == []
    assert "fix: choose a --dtype with more bits, or a larger --tolerance" in capsys.readouterr().err
    assert main(words_for(run, tmp_path / "exported", "--tolerance", "0.5")) == 0


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "compare", interrupt)

    assert main(words_for(run, tmp_path / "exported")) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_recipe_is_compared_on_given_files(tmp_path, capsys):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    words = words_for(Path(folder), tmp_path / "exported", "--dtype", "float32")

    assert main(words) == 2
    assert "has no recipe.yaml, so its data are not known; fix: set --data" in capsys.readouterr().err
    assert main([*words, "--data", write_jsonl(tmp_path / "own.jsonl", RECORDS[:3])]) == 0

    facts = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert (facts["prompts"], facts["compared_on"]) == (3, str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quantize", "q8_0"], "--quantize: has no effect with --to safetensors"),
        (["--llama_cpp", "x"], "--llama_cpp: has no effect with --to safetensors"),
        (["--format", "text"], "--format: has no effect without --data"),
        (
            ["--to", "gguf", "--quantize", "q8_0", "--dtype", "float16"],
            "--dtype: has no effect with --quantize",
        ),
        (["--output_dir", "."], "already exists"),
    ],
)
def test_options_without_effect_are_refused(more, message, tmp_path, capsys):
    """argparse takes the last value of an option."""
    assert main(words_for(tmp_path, tmp_path / "exported", *more)) == 2
    assert message in capsys.readouterr().err


def test_what_llama_cpp_needs_is_named(run, tmp_path, capsys, monkeypatch):
    words = words_for(run, tmp_path / "exported", "--to", "gguf")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    if importlib.util.find_spec("llama_cpp") is None:
        assert main(words) == 6
        assert "needs the package llama-cpp-python" in capsys.readouterr().err
    monkeypatch.setattr(exporting, "import_llama_cpp", lambda where: None)

    assert main(words) == 6
    assert (
        "git clone --depth 1 https://github.com/ggml-org/llama.cpp, or pip download"
        in capsys.readouterr().err
    )
    assert main([*words, "--llama_cpp", str(tmp_path)]) == 2
    assert f"--llama_cpp: has no {CONVERTER}" in capsys.readouterr().err


def test_the_converter_is_found_in_a_checkout_and_in_the_source_package(tmp_path, monkeypatch):
    package = tmp_path / "llama_cpp_python-1.0"
    for name in (CONVERTER, "conversion/base.py", "gguf-py/gguf/vocab.py", "models/large.gguf"):
        (package / "vendor/llama.cpp" / name).parent.mkdir(parents=True, exist_ok=True)
        (package / "vendor/llama.cpp" / name).touch()
    with tarfile.open(tmp_path / "llama_cpp_python-1.0.tar.gz", "w:gz") as archive:
        archive.add(package, package.name)
    inside, workspace = package / "vendor" / "llama.cpp", tmp_path / "workspace"

    assert find_converter(str(inside), workspace) == inside
    assert find_converter(str(package), workspace) == inside
    monkeypatch.setenv("LLAMA_CPP", f"{package}.tar.gz")
    unpacked = find_converter(None, workspace)

    assert unpacked == workspace / package.name / "vendor" / "llama.cpp"
    assert sorted(path.name for path in unpacked.iterdir()) == ["conversion", CONVERTER, "gguf-py"]
    whole = package.with_name(f"{package.name}.tar.gz").read_bytes()
    for name, content in (("cut.tar.gz", whole[: len(whole) // 2]), ("text.tar.gz", b"no archive")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be unpacked"):
            find_converter(str(tmp_path / name), tmp_path / name.removesuffix(".tar.gz"))


def test_the_pre_tokenizer_of_a_trained_tokenizer_has_a_name(tmp_path):
    trained = train_tokenizer(["some words"] * 4, vocab_size=300)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"})
    )

    assert pre_tokenizer_of(trained) == "gpt-2"
    assert pre_tokenizer_of(AutoTokenizer.from_pretrained(tmp_path)) == "qwen2"
    assert pre_tokenizer_of(byte_tokenizer()) == ""  # does not split at all


def test_more_stop_tokens_than_a_file_has_places_for_are_refused(tmp_path):
    with pytest.raises(ModelError, match="can name only two additional stop tokens; got 5, 6, 7"):
        add_stop_tokens(tmp_path / "x.gguf", [5, 6, 7])


def test_a_gap_of_zero_means_the_same_answer():
    """The answers of one model, read by another, against those that the other generates by itself."""
    tokenizer, prompts = byte_tokenizer(), [f"{letter} is" for letter in "abcdefghijklmnop"]
    one = tiny_model(seed=1)
    other = tiny_model(seed=1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.001 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    run = to_loaded_run(one, tokenizer, RunRecord(format="text"))
    sample = Sample(
        [Prompt(helpers.document(text), [*text.encode()], text, None) for text in prompts],
        [{"input_ids": [*b"abc"], "labels": [-100, *b"bc"]}],
        "here",
    )

    comparison = compare(other, sample, observe(run, sample))

    decoding = Decoding(NEW_TOKENS)
    pairs = [generate(model, tokenizer, prompts=prompts, decoding=decoding) for model in (one, other)]
    same = [a.ids == b.ids for a, b in zip(*pairs, strict=True)]
    assert [gap == 0 for gap in comparison.gaps] == same
    assert 0 < sum(same) < len(prompts)  # else the test would show nothing
    loss = torch.nn.functional.cross_entropy(
        one(input_ids=torch.tensor([[*b"abc"]])).logits[0, :2], torch.tensor([*b"bc"])
    )
    assert comparison.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert comparison.targets == 2


@pytest.mark.parametrize(
    ("gaps", "loss", "is_valid"),
    [
        ([0.0] * 98 + [9.0] * 2, 1.0, True),
        ([0.0] * 97 + [9.0] * 3, 1.0, False),
        ([0.019] * 100, 1.0, True),
        ([0.0] * 100, 1.0019, True),
        ([0.0] * 100, 1.003, False),
        ([0.0] * 100, 0.997, False),
        ([0.0] * 100, float("nan"), False),
        ([float("nan")] * 100, 1.0, False),
    ],
)
def test_answers_and_loss_are_bounded(gaps, loss, is_valid):
    comparison = Comparison(gaps, 10, 1.0, loss, abs(loss - 1.0))
    if is_valid:
        comparison.check(0.02, fix="")
        return
    with pytest.raises(ModelError, match="does not answer as the run does"):
        comparison.check(0.02, fix="")


def sample_of(folder: Path, records: list[dict[str, Any]], **settings: Any) -> Sample:
    """The sample of a model without a run, on these records."""
    model = save_folder(folder / "model", tiny_model(**settings), byte_tokenizer())
    data = write_jsonl(folder / "rows.jsonl", records)
    return read_sample(Namespace(run=model, data=[data], format=None), load_run(model, attention=None))


def test_prompts_are_spread_over_the_data(tmp_path):
    sample = sample_of(tmp_path, [{"prompt": f"{n:03}\n", "completion": "x"} for n in range(150)])

    texts = [prompt.text for prompt in sample.prompts]
    assert len(texts) == len(sample.rows) == 100
    assert texts[:4] == ["000\n", "001\n", "003\n", "004\n"] and texts[-1] == "149\n"
    assert [prompt.ids for prompt in sample.prompts] == [[*str(text).encode()] for text in texts]
    assert sample.rows[1]["labels"] == [-100] * 4 + [ord("x"), helpers.EOS]


def test_prompts_with_control_tokens_have_no_text_to_compare(tmp_path):
    sample = sample_of(
        tmp_path, [{"prompt": text, "completion": "x"} for text in ("say <|im_end|>\n", "say b\n")]
    )

    assert [prompt.text for prompt in sample.prompts] == [None, "say b\n"]
    assert sample.prompts[0].ids == [*b"say <|im_end|>\n"]


def test_prompts_without_room_for_an_answer_are_left_out(tmp_path):
    """With 40 positions an answer has 20 tokens."""
    records = [{"prompt": "x" * size, "completion": "y"} for size in (5, 20, 21, 36)]

    sample = sample_of(tmp_path, records, kind="gpt2", n_positions=40)

    assert [len(prompt.ids) for prompt in sample.prompts] == [5, 20]
    assert (sample.new_tokens, sample.too_long) == (20, 2)
    observe(to_loaded_run(tiny_model("gpt2", n_positions=40), byte_tokenizer(), RunRecord()), sample)


def test_data_without_prompts_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="its data contain no prompts; fix: set --data to files"):
        sample_of(tmp_path, [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    with pytest.raises(RecipeError, match="no prompt leaves room for an answer"):
        sample_of(tmp_path, [{"prompt": "x" * 60, "completion": "y"}], max_position_embeddings=64)


def test_a_checkpoint_is_exported_with_the_data_of_its_run(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(helpers.build_recipe(tmp_path, RECORDS, train=settings))

    assert main(words_for(tmp_path / "run" / "checkpoint-1", tmp_path / "exported")) == 0

    facts = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert (facts["prompts"], facts["compared_on"]) == (8, str(tmp_path / "rows.jsonl"))


def test_a_file_in_an_exported_folder_stands_for_itself(run, tmp_path, capsys, monkeypatch):
    """The folder names the file that was exported; a file that was quantized further lies beside it."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for name in ("own-f16.gguf", "own-Q4_K_M.gguf", "elsewhere/own-f16.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "export.json").write_text('{"file": "own-f16.gguf"}')
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "run.json"):
        shutil.copy(run / name, tmp_path)

    (tmp_path / "elsewhere" / "export.json").write_text("[]")  # of another program

    found = [
        exported_file(str(tmp_path / name))
        for name in ("", "own-Q4_K_M.gguf", "missing.gguf", "elsewhere/own-f16.gguf", "elsewhere")
    ]

    assert found == [tmp_path / "own-f16.gguf", tmp_path / "own-Q4_K_M.gguf", None, None, None]
    words = [["--prompt", "a", "--dtype", "float16"], ["--prompt", "a"]]
    codes = [main(["generate", str(tmp_path / "own-Q4_K_M.gguf"), *more]) for more in words]
    assert codes == [2, 6]
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: --dtype: has no effect on a GGUF file; got float16; fix: remove it"
    assert f"{tmp_path}/own-Q4_K_M.gguf: needs the package llama-cpp-python" in second
    assert main(words_for(tmp_path, tmp_path / "again")) == 2
    assert "is an exported model; fix: name the run that was exported" in capsys.readouterr().err
