"""Loading a run, one of its checkpoints, or any other folder."""

import json
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model

from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.generation.load import load_run
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
