"""What is pushed to the Hub, which is replaced by a list of its uploads."""

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import build_recipe
from huggingface_hub.utils import filter_repo_objects

from hf_clm.errors import EnvironmentFault, ExitCode
from hf_clm.training.run import train

ROWS = [{"instruct": f"say {n}\n", "input": "", "label": str(n)} for n in range(4)]
ALWAYS = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "run.json", "metrics.jsonl"),
    *("loss.png", "loss.pdf", "chat_template.jinja", "SEALED.json"),
}


class FakeHub:
    """Records the files of each upload after applying its patterns."""

    uploads: list[tuple[str | None, set[str], str]]
    fails = False

    def __init__(self, token: str | None = None):
        pass

    def whoami(self) -> dict:
        return {"name": "ann"}

    def create_repo(self, name: str, **options):
        return type("Url", (), {"repo_id": f"ann/{name}"})()

    def upload_folder(
        self, *, folder_path, ignore_patterns, path_in_repo=None, run_as_future=False, **options
    ):
        if self.fails:
            raise RuntimeError("502 Bad Gateway\nand more")
        assert options["repo_id"] == "ann/run"
        folder = Path(folder_path)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        kept = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        facts = json.loads((folder / "run.json").read_text("utf-8")) if "run.json" in kept else {}
        FakeHub.uploads.append((path_in_repo, kept, facts.get("status", "")))
        done: Future = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch):
    FakeHub.uploads, FakeHub.fails = [], False
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("transformers.trainer.hf_api", FakeHub)
    return FakeHub


def push(folder: Path, *, card: dict | None = None, **settings) -> dict:
    settings = {"push_to_hub": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return train(build_recipe(folder, ROWS, card=card or {}, train=settings))


def test_at_the_end_the_run_is_pushed_once_without_training_texts(hub, tmp_path):
    push(tmp_path, hub_strategy="end")

    assert hub.uploads == [(None, ALWAYS, "done")]
    assert "say 1" not in "".join(
        (tmp_path / "run" / name).read_text("utf-8") for name in ("README.md", "run.json", "metrics.jsonl")
    )


def test_with_examples_in_the_card_the_report_is_pushed_too(hub, tmp_path):
    push(tmp_path, hub_strategy="end", card={"data_samples": 1})

    assert hub.uploads == [(None, ALWAYS | {"report.html", "label_rows.jsonl"}, "done")]
    assert "say 0" in (tmp_path / "run" / "README.md").read_text("utf-8")


def test_every_save_pushes_the_model_of_its_checkpoint_and_never_the_arguments(hub, tmp_path):
    push(tmp_path, hub_strategy="every_save")

    model = {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hub.uploads[:-1] == [(None, model, "")] * 2
    assert hub.uploads[-1] == (None, ALWAYS, "done")


def test_the_last_checkpoint_can_be_pushed_completely(hub, tmp_path):
    push(tmp_path, hub_strategy="checkpoint")

    places = [place for place, _, _ in hub.uploads]
    assert places == [None, "last-checkpoint", None, "last-checkpoint", None]
    whole = hub.uploads[1][1]
    assert {"optimizer.pt", "trainer_state.json", "model.safetensors"} <= whole
    assert "training_args.bin" not in whole


def test_a_failed_push_loses_nothing_and_names_the_command_to_repeat_it(hub, tmp_path):
    hub.fails = True

    with pytest.raises(EnvironmentFault) as error:
        push(tmp_path, hub_strategy="end")

    run = tmp_path / "run"
    assert str(error.value).startswith(
        "ann/run: the push failed: 502 Bad Gateway; fix: the run is complete in "
    )
    assert error.value.exit_code == ExitCode.ENVIRONMENT
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "done"
    assert (run / "model.safetensors").is_file()


def test_a_missing_login_is_found_before_anything_is_read(hub, tmp_path, monkeypatch):
    def refuse(self):
        raise OSError("Token is required")

    monkeypatch.setattr(FakeHub, "whoami", refuse)

    with pytest.raises(
        EnvironmentFault, match=r"^train.push_to_hub: the Hub refused: Token is required; fix: run"
    ):
        push(tmp_path)

    assert not (tmp_path / "run").exists()
