"""``hf-clm merge`` writes a plain model that answers like base and adapters, or nothing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM

from hf_clm.cli import main
from hf_clm.generation.load import load_run
from hf_clm.training.run import train

peft = pytest.importorskip("peft")

RECORDS = [{"prompt": f"say {letter}\n", "completion": letter * 3} for letter in "abcdefgh"]


def build_run(folder: Path, positions: int = 512, **lora: Any) -> Path:
    """A run with adapters that change the answers of a float32 base model."""
    model = tiny_model(max_position_embeddings=positions)
    base = save_folder(folder / "base", model, byte_tokenizer())
    settings = {"max_steps": 10, "learning_rate": 3e-2}
    recipe = helpers.build_recipe(
        folder, RECORDS, model={"name_or_path": base}, lora={"r": 4, **lora}, train=settings
    )
    train(recipe)
    return folder / "run"


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_the_merged_model_equals_base_and_adapters_in_plain_peft(tmp_path, capsys, lora):
    run, output = build_run(tmp_path, **lora), tmp_path / "deep" / "merged"
    ids = torch.tensor([[*b"say c\n"]])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(base, run).eval()(input_ids=ids).logits
    capsys.readouterr()

    assert main(["merge", str(run), "--output_dir", str(output)]) == 0

    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - untrained).abs().max()) > 0.1
    proof = json.loads((output / "merge.json").read_text())
    assert (proof["prompts"], proof["greedy_agreement"], proof["dtype"]) == (8, 1.0, "float32")
    assert proof["largest_logit_difference"] < 1e-5
    assert proof["compared_on"] == str(tmp_path / "rows.jsonl")
    assert "8 prompts" in printed and "8 greedy answers are the same" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == ["merged"]
    assert oct(output.stat().st_mode)[-3:] == "755"


def test_the_merged_model_knows_the_format_of_the_run(tmp_path, capsys):
    run, output = build_run(tmp_path), tmp_path / "merged"
    main(["merge", str(run), "--output_dir", str(output)])
    capsys.readouterr()

    assert main(["generate", str(run), "--prompt", "say c\n", "--max_new_tokens", "3"]) == 0
    adapted = capsys.readouterr().out
    assert main(["generate", str(output), "--prompt", "say c\n", "--max_new_tokens", "3"]) == 0

    assert capsys.readouterr().out == adapted


def test_a_model_over_the_tolerance_is_not_written(tmp_path, capsys):
    run, output = build_run(tmp_path), tmp_path / "merged"
    words = ["merge", str(run), "--output_dir", str(output), "--dtype", "bfloat16", "--tolerance", "1e-7"]

    assert main(words) == 4

    error = capsys.readouterr().err
    assert f"{run}: the merged model is not equivalent; got a logit that differs by" in error
    assert (
        "of the largest, more than 1e-07; fix: choose a --dtype with more bits, or a larger --tolerance"
        in error
    )
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_prompts_of_a_file_replace_missing_data(tmp_path, capsys):
    run, output = build_run(tmp_path), tmp_path / "merged"
    (tmp_path / "rows.jsonl").unlink()
    words = ["merge", str(run), "--output_dir", str(output)]

    assert main(words) == 3
    assert "rows.jsonl" in capsys.readouterr().err
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "say a\n"}, {"prompt": "say b\n"}])
    assert main([*words, "--prompts", prompts]) == 0

    assert json.loads((output / "merge.json").read_text())["prompts"] == 2


def test_a_long_prompt_and_an_unusual_generation_config_have_no_effect(tmp_path, capsys):
    """The base's config sets beams, suppresses tokens and allows no time; a prompt exceeds the positions."""
    run, output = build_run(tmp_path, positions=64), tmp_path / "merged"
    poison = {"max_time": 0.0, "num_beams": 3, "num_return_sequences": 2, "suppress_tokens": [97, 99]}
    for folder in (tmp_path / "base", run):
        (folder / "generation_config.json").write_text(json.dumps(poison))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("say c\n", "x" * 200)])
    capsys.readouterr()

    assert main(["merge", str(run), "--output_dir", str(output), "--prompts", prompts]) == 0
    proof = json.loads((output / "merge.json").read_text())
    assert (proof["prompts"], proof["greedy_agreement"]) == (2, 1.0)


def test_a_folder_without_adapters_and_an_output_that_exists_are_refused(tmp_path, capsys):
    save_folder(tmp_path / "plain", tiny_model(), byte_tokenizer())
    (tmp_path / "merged").mkdir()

    assert main(["merge", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'plain'}: contains no adapters; fix: name the folder of a run with lora\n"
    )
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    assert main(["merge", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "merged")]) == 2
    assert "merged: already exists; fix: choose another --output_dir" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize(("computes_in", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_adapters_of_a_base_in_4_bits_are_merged_into_the_weights_they_were_trained_with(
    tmp_path, capsys, computes_in, most
):
    """The published base, which they were not trained with, differs by more than rounding does."""
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {"max_steps": 10, "learning_rate": 3e-2, "bf16": computes_in == "bfloat16"}
    base = save_folder(tmp_path / "base", tiny_model(max_position_embeddings=512), byte_tokenizer())
    lora = {"r": 4, "quantize": "4bit"}
    train(helpers.build_recipe(tmp_path, RECORDS, model={"name_or_path": base}, lora=lora, train=settings))
    run, output = tmp_path / "run", tmp_path / "merged"

    assert main(["merge", str(run), "--output_dir", str(output)]) == 0

    proof = json.loads((output / "merge.json").read_text())
    assert proof["compared_with"] == f"the base in 4 bits as in training, computing in {computes_in}"
    assert proof["largest_logit_difference"] < most
    record = json.loads((run / "run.json").read_text())
    assert record["quantized"] == {"weights": computes_in, "compute": computes_in}
    trained, merged, published = (
        last_logits(load_run(str(folder), device="cpu", dtype=dtype).model)
        for folder, dtype in ((run, None), (output, None), (run, "float32"))
    )
    assert relative(merged, trained) < most
    if computes_in == "float32":
        assert relative(published, trained) > 1e-3
        capsys.readouterr()
        assert main(["evaluate", str(run), str(tmp_path / "rows.jsonl"), "--no_generate", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(record["loss_after"], rel=1e-5)


def test_a_run_in_4_bits_needs_bitsandbytes_or_a_dtype(tmp_path, capsys):
    run = build_run(tmp_path)
    record = json.loads((run / "run.json").read_text()) | {"quantized": {"weights": "float32"}}
    (run / "run.json").write_text(json.dumps(record))
    words = ["generate", str(run), "--prompt", "say c\n", "--device", "cpu", "--max_new_tokens", "2"]
    capsys.readouterr()

    if importlib.util.find_spec("bitsandbytes") is None:
        assert main(words) == 6
        assert capsys.readouterr().err == (
            f"error: {run}: needs the package bitsandbytes; fix: pip install 'hf_clm[qlora]', "
            "or set --dtype to load the base without quantizing it\n"
        )
    assert main([*words, "--dtype", "float32"]) == 0


def last_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*b"say c\n"]])).logits[0, -1].float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
