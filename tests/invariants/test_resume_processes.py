"""Interrupted runs of two processes resume exactly, also on one process with the same rows; and back."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import finish
from launched import BATCH, EVAL_BATCH, RECIPE, TWO_ROWS, prepare, read_metrics, train_on_two
from safetensors.torch import load_file
from watched import fork_two, steps, wait_for

from hf_clm.cli import main


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process with the global batch of two."""
    folder = prepare(tmp_path_factory.mktemp("processes") / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0
    return folder


def cut_off(source: Path, folder: Path) -> Path:
    """Restores the run to its state between its two saves."""
    shutil.copytree(source, folder)
    run = folder / "run"
    for name in ("run.json", "model.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-8")
    return folder


def check_same_losses(folder: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        result, wanted = ([e[key] for e in read_metrics(place) if key in e] for place in (folder, expected))
        assert result == pytest.approx(wanted, rel=1e-5), key
    for key in ("step", "tokens_seen", "learning_rate"):
        result, wanted = ([e.get(key) for e in read_metrics(place)] for place in (folder, expected))
        assert result == wanted, key


def test_two_processes_resume_with_the_rows_of_one(tmp_path, alone):
    folder = cut_off(alone, tmp_path / "two")

    done = train_on_two(folder)

    assert re.search(r"processes +1 +2 +applied", done.out), done.out
    check_same_losses(folder, alone)


def test_one_process_resumes_with_the_rows_of_two(tmp_path, alone, monkeypatch):
    two = prepare(tmp_path / "two")
    train_on_two(two)
    folder = cut_off(two, tmp_path / "one")
    monkeypatch.chdir(folder)

    assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    check_same_losses(folder, alone)


def test_another_global_batch_is_rejected(tmp_path, alone, monkeypatch, capsys):
    folder = cut_off(alone, tmp_path / "one")
    monkeypatch.chdir(folder)

    assert main(["train", "recipe.yaml", *BATCH, "2", *EVAL_BATCH, "4"]) == 2

    assert (
        "run/checkpoint-4: the recipe differs from that of the run: global_batch (4, now 2)"
        in capsys.readouterr().err
    )


def test_two_killed_processes_resume_exactly(tmp_path):
    """With dropout, accumulation and a worker each; both are killed at once."""
    recipe = RECIPE.replace(
        "save_steps: 4", "save_steps: 2\n  gradient_accumulation_steps: 2\n  dataloader_num_workers: 1"
    )
    recipe = recipe.replace("num_train_epochs: 2", "num_train_epochs: 4").replace(
        "eval_steps: 4", "eval_steps: 2"
    )
    whole, cut = (prepare(tmp_path / name, recipe, kind="gpt2", resid_pdrop=0.1) for name in ("whole", "cut"))
    train_on_two(whole)

    ranks = fork_two(cut, *TWO_ROWS)
    wait_for(lambda: 5 in steps(cut))
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.code for rank in finish(ranks)] == [-9, -9]
    assert not (cut / "run" / "model.safetensors").exists()
    done = train_on_two(cut)

    assert re.search(r"resumes   from run/checkpoint-[246]", done.out), done.out
    same = [load_file(place / "run" / "model.safetensors") for place in (whole, cut)]
    assert all(torch.equal(weight, same[1][name]) for name, weight in same[0].items())
    left_out = ("seconds", "per_second", "mfu", "peak_memory_bytes", "runtime")
    result, wanted = (
        [{k: v for k, v in e.items() if not k.endswith(left_out)} for e in read_metrics(place)]
        for place in (cut, whole)
    )
    assert result == wanted
