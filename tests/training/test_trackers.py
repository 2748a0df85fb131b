"""What a tracker receives. The event file is read with TensorBoard's reader."""

import json
import sqlite3
from contextlib import closing

import pytest
from helpers import build_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from hf_clm.training.run import train

ROWS = [{"instruct": f"say {n}\n", "input": "", "label": str(n)} for n in range(4)]


def test_tensorboard_receives_the_figures_of_each_log_event(tmp_path):
    recipe = build_recipe(tmp_path, ROWS, train={"report_to": "tensorboard", "max_steps": 3})

    result = train(recipe)

    found: dict[str, dict[int, float]] = {}
    for folder in {file.parent for file in (tmp_path / "run").rglob("events.out.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    assert {"train/loss", "train/token_accuracy", "train/tokens_per_second", "train/mfu"} <= set(found)
    assert sorted(found["train/loss"]) == [1, 2, 3]
    assert found["eval/loss"][3] == pytest.approx(result["loss_after"], rel=1e-6)  # float32 there
    assert found["train/tokens_seen"][3] == result["tokens_seen"]


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_save", "on_train_end"])
def test_a_tracker_that_fails_is_reported_once_and_the_run_finishes(tmp_path, monkeypatch, capsys, event):
    def fail(*args, **kwargs):
        raise ConnectionError("wandb: no route to host\nmore")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    settings = {"report_to": "tensorboard", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}

    result = train(build_recipe(tmp_path, ROWS, train=settings))

    lines = [line for line in capsys.readouterr().out.splitlines() if "TensorBoardCallback" in line]
    assert lines == [
        "warning   TensorBoardCallback failed and is disabled for the rest of the run: "
        "wandb: no route to host"
    ]
    assert (result["status"], result["steps_done"]) == ("done", 3)


@pytest.mark.peer
def test_wandb_logs_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    train(build_recipe(tmp_path, ROWS, train={"report_to": "wandb", "max_steps": 2}))
    wandb.finish()  # which the end of a process does

    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(name in log.read_bytes() for name in (b"train/loss", b"train/token_accuracy", b"eval/loss"))


@pytest.mark.peer
def test_mlflow_logs_to_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    train(build_recipe(tmp_path, ROWS, train={"report_to": "mlflow", "max_steps": 2}))

    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert [line.split()[2] for line in losses.read_text().splitlines()] == ["1", "2"]


@pytest.mark.peer
def test_trackio_logs_to_its_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")

    train(build_recipe(tmp_path, ROWS, train={"report_to": "trackio", "max_steps": 2}))

    (database,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    assert sum("train/loss" in entry for entry in logged) == 2
