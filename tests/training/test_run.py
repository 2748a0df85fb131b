"""What train(recipe) writes, prints, refuses and repeats."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import EOS, PAD, byte_tokenizer, save_folder, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.errors import DataError, ExitCode, ModelError, RecipeError
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.training import run as run_module
from hf_clm.training.run import train

# Prompt "say N\n": 6 tokens; N letters and the end are learned: 8 x 6 + 36 + 8 = 92 tokens, 44 targets.
RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "x" * n} for n in range(1, 9)]
FILES = {
    *(
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *(
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "ledger.parquet",
        "loss.png",
        "loss.pdf",
        "README.md",
        "label_rows.jsonl",
        "report.html",
        "SEALED.json",
        "checkpoint-4",
        "checkpoint-8",
    ),
}


def build_recipe(folder: Path, **changes: Any) -> Recipe:
    """A run of 8 steps of 2 records."""
    settings = {"num_train_epochs": 2, **changes.pop("train", {})}
    return helpers.build_recipe(folder, RECORDS, train=settings, **changes)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_lines(folder / "metrics.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the result and the printed lines of a run that samples and saves during training."""
    folder = tmp_path_factory.mktemp("run")
    samples = {"prompts": ["say 3"], "every_steps": 4, "max_new_tokens": 5}
    recipe = build_recipe(folder, samples=samples, train={"save_strategy": "steps", "save_steps": 4})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = train(recipe)
    return folder / "run", result, printed.getvalue().splitlines()


def test_the_folder_contains_these_files_and_no_others(run):
    assert {path.name for path in run[0].iterdir()} == FILES


def test_no_pickle_of_the_arguments_is_written_anywhere(run):
    assert list(run[0].rglob("*.bin")) == []


@pytest.mark.parametrize("place", [".", "checkpoint-4", "checkpoint-8"])
def test_folder_and_checkpoints_load_with_plain_transformers_and_use_the_kv_cache(run, place):
    folder = run[0] / place

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.config.use_cache is True
    assert model.generation_config.use_cache is True
    assert model.generation_config.eos_token_id == [EOS]
    assert (model.generation_config.pad_token_id, tokenizer.pad_token_id) == (PAD, PAD)
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.float32
    assert model.generate(torch.tensor([[65]]), max_new_tokens=2).shape[0] == 1


def test_the_last_checkpoint_is_the_final_model(run):
    final = AutoModelForCausalLM.from_pretrained(run[0]).state_dict()
    last = AutoModelForCausalLM.from_pretrained(run[0] / "checkpoint-8").state_dict()
    earlier = AutoModelForCausalLM.from_pretrained(run[0] / "checkpoint-4").state_dict()

    assert all(torch.equal(final[name], last[name]) for name in final)
    assert not all(torch.equal(final[name], earlier[name]) for name in final)


def test_metrics_count_tokens_and_targets(run):
    entries = [entry for entry in read_lines(run[0] / "metrics.jsonl") if "loss" in entry]

    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (entries[3]["tokens_seen"], entries[3]["target_tokens_seen"]) == (92, 44)
    assert (entries[7]["tokens_seen"], entries[7]["target_tokens_seen"]) == (184, 88)
    for entry in entries:
        assert {"learning_rate", "grad_norm", "token_accuracy", "epoch"} < set(entry)
        assert entry["tokens_per_second"] > 0


def test_metrics_contain_the_evaluations_before_the_first_step_and_after_the_last(run):
    entries = read_lines(run[0] / "metrics.jsonl")

    evaluated = [(entry["step"], entry["eval_target_tokens"]) for entry in entries if "eval_loss" in entry]
    assert evaluated == [(0, 44), (8, 44)]


def test_samples_are_taken_before_during_and_after_training(run):
    entries = read_lines(run[0] / "samples.jsonl")

    assert [(entry["step"], entry["prompt"]) for entry in entries] == [
        (0, "say 3"),
        (4, "say 3"),
        (8, "say 3"),
    ]
    assert all(isinstance(entry["text"], str) for entry in entries)


def test_run_json_describes_the_run(run):
    written = json.loads((run[0] / "run.json").read_text(encoding="utf-8"))

    assert written == json.loads(json.dumps(run[1]))
    assert written["status"] == "done"
    assert (written["stage"], written["format"], written["max_length"]) == ("sft", "instruct", 64)
    assert (written["steps"], written["steps_done"], written["rows_per_step"]) == (8, 8, 2)
    assert (written["parameters"], written["processes"], written["device"]) == (35360, 1, "cpu")
    assert (written["precision"], written["tokens_seen"]) == ("float32", 184)
    train_part = written["train"]
    assert (train_part["input_rows"], train_part["rows"], train_part["fates"]) == (8, 8, {"used": 8})
    assert (train_part["tokens"], train_part["target_tokens"]) == (92, 44)
    assert {"hf_clm", "torch", "transformers", "python"} <= set(written["versions"])
    assert written["loss_after"] < written["loss_before"]


def test_the_loss_is_plotted(run):
    content = (run[0] / "loss.png").read_bytes()

    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (1040, 585)


def test_the_report_shows_all_of_the_run(run):
    text = (run[0] / "report.html").read_text(encoding="utf-8")

    assert '<span class="status done">done</span>' in text
    assert 'http-equiv="refresh"' not in text
    assert re.findall("<figcaption><b>(.*?)</b>", text) == [
        *("Loss", "Token accuracy", "Learning rate", "Gradient norm"),
        *("Tokens per second", "MFU", "Peak memory"),
    ]
    assert re.findall(r'<span class="quiet">(before training|step \d)</span>', text) == [
        "before training",
        "step 4",
        "step 8",
    ]
    assert text.count('<span class="t trained control">&lt;|endoftext|&gt;</span>') == 5  # the label rows
    assert "the labels of all" not in text and "all 8 rows are certified, sha256 " in text


def test_the_report_is_written_from_the_start_and_shows_how_a_run_ended(tmp_path, monkeypatch):
    pages = []

    def interrupt(self, *args, **options):
        pages.append((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_clm.training.trainer.CLMTrainer.training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(build_recipe(tmp_path))

    last = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text, status, refreshes in ((pages[0], "running", True), (last, "interrupted", False)):
        assert f'<span class="status {status}">{status}</span>' in text
        assert ('http-equiv="refresh"' in text) is refreshes


def test_a_report_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "write_report", fail)

    result = train(build_recipe(tmp_path, train={"max_steps": 2}))

    assert result["status"] == "done"
    assert capsys.readouterr().out.count("the report cannot be written, and training continues") == 1
    assert not (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_start_describes_the_run(run):
    text = "\n".join(run[2][:12])

    for part in (
        "Qwen2ForCausalLM",
        "35,360 parameters",
        "92 tokens",
        "44 targets",
        "1 x cpu",
        "float32",
        str(run[0]),
    ):
        assert part in text


def test_each_log_event_is_one_line(run):
    steps = [
        line.split()[1] for line in run[2] if line.startswith("step ") and " loss " in line and "lr" in line
    ]

    assert steps == ["1/8", "2/8", "3/8", "4/8", "5/8", "6/8", "7/8", "8/8"]


def test_the_end_prints_the_results_and_the_next_command(run):
    text = "\n".join(run[2][-9:])

    for part in ("8 steps", "184 tokens", "tokens/s", "on training data", f"hf-clm generate {run[0]}"):
        assert part in text


def test_the_written_recipe_repeats_the_run(run, tmp_path):
    recipe = load_recipe(run[0] / "recipe.yaml", ["--output_dir", str(tmp_path / "again")])

    train(recipe)

    assert len(losses(run[0])) == 8
    assert losses(tmp_path / "again") == losses(run[0])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_train_epochs": 1, "per_device_train_batch_size": 3}, 3),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 2}, 6),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, 6),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 3, "dataloader_drop_last": True}, 4),
        ({"max_steps": 5}, 5),
    ],
)
def test_the_announced_number_of_steps_is_made(tmp_path, settings, steps):
    result = train(build_recipe(tmp_path, train=settings))

    assert (result["steps"], result["steps_done"]) == (steps, steps)


def test_a_second_run_does_not_mix_with_the_first(tmp_path):
    recipe = build_recipe(tmp_path, train={"max_steps": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")

    with pytest.raises(RecipeError) as error:
        train(recipe)

    assert error.value.exit_code == ExitCode.RECIPE
    assert str(error.value).startswith(
        f"{tmp_path / 'run'}: the output folder contains files, but no recipe.yaml of a run"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_overwrite_moves_the_older_run_aside(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")

    train(build_recipe(tmp_path, overwrite=True, train={"max_steps": 1}))

    assert [path.name for path in (tmp_path / "run.old-1").iterdir()] == ["mine.txt"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "mine.txt").exists()


def test_training_stops_early_and_keeps_the_best_model(tmp_path):
    """The held-out labels contradict the training labels, so the evaluation loss rises in training."""
    other = write_jsonl(tmp_path / "other.jsonl", [{**record, "label": "y" * 8} for record in RECORDS])
    settings = {"max_steps": 40, "learning_rate": 0.02, "eval_strategy": "steps", "eval_steps": 4}
    settings |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4}
    eval_source = {"path": other, "format": "instruct"}

    result = train(
        build_recipe(tmp_path, data={"eval": [eval_source]}, early_stopping={"patience": 2}, train=settings)
    )

    entries = read_lines(tmp_path / "run" / "metrics.jsonl")
    seen = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    best = min(seen)
    assert 8 < result["steps_done"] < 40
    assert result["evaluation"]["rows"] == 8
    assert result["loss_after"] == pytest.approx(best, rel=1e-6)
    assert seen[-1] == result["loss_after"]  # of the best model, loaded again
    assert seen[-2] > best


def test_a_run_is_resumed_in_its_own_folder(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    train(build_recipe(tmp_path, train={**settings, "max_steps": 4}))

    result = train(build_recipe(tmp_path, train={**settings, "max_steps": 8}, resume_override=["max_steps"]))

    assert (result["steps_done"], result["tokens_seen"]) == (8, 184)
    entries = [entry["step"] for entry in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in entry]
    assert entries == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resuming_without_a_checkpoint_is_a_one_line_error(tmp_path):
    with pytest.raises(RecipeError) as error:
        train(build_recipe(tmp_path, train={"resume_from_checkpoint": "true"}))

    assert "checkpoint" in str(error.value)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_packing_and_attention_change_neither_the_targets_nor_the_first_loss(tmp_path, packing, attention):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    model = {"name_or_path": folder, "attention": attention}

    result = train(build_recipe(tmp_path, data={"packing": packing}, model=model, train={"max_steps": 1}))

    assert result["train"]["target_tokens"] == 44
    assert result["loss_before"] == pytest.approx(5.41672, abs=1e-4)


def test_a_row_longer_than_the_model_is_refused_before_its_weights_are_loaded(tmp_path):
    folder = save_folder(tmp_path / "own", tiny_model(max_position_embeddings=48), byte_tokenizer())
    Path(folder, "model.safetensors").unlink()  # to load them would be another error

    with pytest.raises(ModelError) as error:
        train(build_recipe(tmp_path, model={"name_or_path": folder}))

    assert str(error.value) == (
        "data.max_length: 64 exceeds the model's 48 positions; fix: set it to 48 or less"
    )


def test_a_model_from_scratch_trains_its_tokenizer(tmp_path):
    model = {
        "name_or_path": None,
        "init": "scratch",
        "config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64},
    }

    train(
        build_recipe(tmp_path, model=model, tokenizer={"train": {"vocab_size": 270}}, train={"max_steps": 1})
    )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.decode(tokenizer("say 3")["input_ids"]) == "say 3"
    assert tokenizer.pad_token == "<|pad|>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == len(tokenizer)


def test_a_character_model_can_encode_characters_that_only_the_evaluation_contains(tmp_path):
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    rows = write_jsonl(tmp_path / "train.jsonl", [{"text": "abba"}, {"text": "bad"}])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "Zoë"}])

    train(
        build_recipe(
            tmp_path,
            stage="pretrain",
            model={"name_or_path": None, "init": "scratch", "config": config},
            tokenizer={"train": {"kind": "characters"}},
            data={"train": [rows], "eval": [held]},
            train={"max_steps": 1},
        )
    )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.convert_ids_to_tokens(range(3, len(tokenizer))) == ["Z", "a", "b", "d", "o", "ë"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 9


def test_a_model_type_that_needs_a_special_tokenizer_is_refused(tmp_path):
    model = {
        "name_or_path": None,
        "init": "scratch",
        "config": {"model_type": "qwen2", **helpers.SIZES["qwen2"]},
    }

    with pytest.raises(ModelError, match=r"^tokenizer.train.kind: transformers loads it as Qwen2Tokenizer"):
        train(build_recipe(tmp_path, model=model, tokenizer={"train": {"kind": "characters"}}))


def test_a_scratch_model_with_a_named_configuration_respects_its_positions(tmp_path):
    folder = save_folder(tmp_path / "shape", tiny_model(max_position_embeddings=48), byte_tokenizer())

    with pytest.raises(ModelError) as error:
        train(build_recipe(tmp_path, model={"name_or_path": folder, "init": "scratch"}))

    assert "64 exceeds the model's 48 positions" in str(error.value)


def test_stage_pretrain_learns_the_complete_text_of_instruction_data(tmp_path):
    result = train(build_recipe(tmp_path, stage="pretrain", data={"packing": "none"}, train={"max_steps": 1}))

    assert (result["train"]["tokens"], result["train"]["target_tokens"]) == (92, 84)  # all but 8 first tokens


def test_too_few_rows_for_one_batch_are_an_error_with_numbers(tmp_path):
    with pytest.raises(DataError) as error:
        train(build_recipe(tmp_path, train={"dataloader_drop_last": True, "per_device_train_batch_size": 9}))

    assert error.value.exit_code == ExitCode.DATA
    assert str(error.value).startswith("data.train: 8 rows do not fill a batch of 9 ")
