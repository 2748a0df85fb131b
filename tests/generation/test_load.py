"""Loading a run, one of its checkpoints, or any other folder."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main
from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.generation.load import answer_dtype, load_run
from hf_clm.run_folder import RunRecord, find_record
from hf_clm.text.tokenizer import use_chat_template

FACTS = {"status": "done", "format": "instruct", "stage": "pretrain", "max_length": 77}


def build_run(folder: Path, facts: dict) -> Path:
    save_folder(folder, tiny_model(), byte_tokenizer())
    save_folder(folder / "checkpoint-5", tiny_model(seed=1), byte_tokenizer())
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_a_run_records_how_it_was_trained(tmp_path):
    run = load_run(str(build_run(tmp_path, FACTS)), device="cpu")

    assert (run.format, run.stage, run.max_length) == ("instruct", "pretrain", 77)
    assert run.model.training is False
    assert run.model.dtype == torch.float32


def test_a_checkpoint_is_loaded_with_the_record_of_its_unfinished_run(tmp_path):
    folder = build_run(tmp_path, FACTS | {"status": "running"})

    run = load_run(str(folder / "checkpoint-5"), device="cpu")

    assert (run.format, run.stage, run.max_length) == ("instruct", "pretrain", 77)
    assert torch.equal(
        run.model.get_input_embeddings().weight, tiny_model(seed=1).get_input_embeddings().weight
    )


def test_a_run_that_is_not_done_has_no_final_model(tmp_path):
    folder = build_run(tmp_path, FACTS | {"status": "running"})

    with pytest.raises(ModelError) as error:
        load_run(str(folder))

    assert str(error.value) == (
        f"{folder}: the run is running: it has no final model; "
        "fix: let it finish training, or use one of its checkpoint-N folders"
    )


def test_another_folder_is_a_text_model_with_as_many_positions_as_it_has(tmp_path):
    folder = save_folder(tmp_path / "a", tiny_model(max_position_embeddings=99), byte_tokenizer())

    run = load_run(folder, device="cpu")

    assert (run.format, run.stage, run.max_length) == ("text", "sft", 99)


def test_a_folder_with_a_chat_template_is_read_as_messages(tmp_path):
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")

    run = load_run(save_folder(tmp_path / "a", tiny_model(), tokenizer), device="cpu")

    assert (run.format, run.max_length) == ("messages", 4096)


def test_only_a_checkpoint_folder_uses_the_record_of_its_parent(tmp_path):
    folder = build_run(tmp_path, FACTS)
    (folder / "other").mkdir()

    assert find_record(str(folder / "other")) is None
    assert find_record(str(folder)) == RunRecord.model_validate(FACTS)
    assert find_record("a/name-on-the-hub") is None


def test_a_missing_folder_is_a_one_line_error():
    with pytest.raises(ModelError, match="no such folder"):
        load_run("./runs/nope")


def test_a_model_that_cannot_be_downloaded_is_an_environment_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(EnvironmentFault) as error:
        load_run("some-organisation/some-model-nobody-has")

    assert "hf download some-organisation/some-model-nobody-has" in str(error.value)


@pytest.mark.parametrize(
    ("device", "is_native", "dtype"),
    [
        ("cpu", True, "float32"),
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float32"),
        ("mps", False, "float32"),
    ],
)
def test_a_model_answers_in_bfloat16_only_on_a_gpu_that_computes_in_it(monkeypatch, device, is_native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_native)

    assert answer_dtype(torch.device(device)) == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_of_choice_is_that_of_all_weights(tmp_path, dtype):
    folder = save_folder(tmp_path, tiny_model(), byte_tokenizer())

    run = load_run(folder, device="cpu", dtype=dtype)

    assert {str(weight.dtype) for weight in run.model.parameters()} == {f"torch.{dtype}"}
    with torch.no_grad():
        assert run.model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory that Linux reports")
def test_a_model_of_float32_files_is_loaded_in_bfloat16_without_a_copy_in_float32(tmp_path):
    """24 million parameters: 48 MB in bfloat16, and 144 MB if a float32 copy came first."""
    model = tiny_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    folder = save_folder(tmp_path, model, byte_tokenizer())
    del model
    load_run(folder, device="cpu", dtype="bfloat16")  # the first time also loads code
    peaks, is_over = [0], threading.Event()
    before = own_megabytes()

    def watch() -> None:
        while not is_over.wait(0.001):
            peaks.append(own_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run = load_run(folder, device="cpu", dtype="bfloat16")
    is_over.set()
    watcher.join()

    assert 23e6 < run.model.num_parameters() < 25e6
    assert max(peaks) - before < 75


def own_megabytes() -> float:
    """Returns the memory of this process in MB, without files that are mapped."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e6


def test_the_dtype_is_an_option_of_every_command_that_answers(tmp_path, capsys):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}])

    for command in ("generate", "chat", "serve", "evaluate", "merge"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--dtype {float32,bfloat16,float16}" in capsys.readouterr().out
    words = ["evaluate", folder, data, "--device", "cpu", "--before", folder, "--json"]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["loss"] == found["before"]["loss"]  # also in bfloat16
    assert main(words) == 0
    assert found["loss"] != json.loads(capsys.readouterr().out)["loss"]
    assert main(["generate", folder, "--prompt", "a", "--dtype", "int8"]) == 2
