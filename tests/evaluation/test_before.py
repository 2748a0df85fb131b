"""``hf-clm evaluate --before``: the loss before is that of the model which the run began with."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
from helpers import byte_tokenizer, save_folder, tiny_model

from hf_clm.cli import main
from hf_clm.training.run import train

RECORDS = [{"prompt": f"say {letter}\n", "completion": letter * 3} for letter in "abcdefgh"]


def evaluate(folder: Path, *words: str) -> int:
    command = [
        "evaluate",
        str(folder / "run"),
        str(folder / "rows.jsonl"),
        "--no_generate",
        "--device",
        "cpu",
    ]
    return main([*command, *words])


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "adapters"])
@pytest.mark.parametrize("before", ["base", "by name"])
def test_before_and_after_are_the_losses_that_the_run_logged(tmp_path, capsys, lora, before):
    if lora:
        pytest.importorskip("peft")
    base = save_folder(tmp_path / "base", tiny_model(max_position_embeddings=512), byte_tokenizer())
    changes: dict[str, Any] = {"lora": lora} if lora else {}
    settings = {"max_steps": 5, "learning_rate": 3e-2}
    result = train(
        helpers.build_recipe(tmp_path, RECORDS, model={"name_or_path": base}, train=settings, **changes)
    )
    capsys.readouterr()

    assert evaluate(tmp_path, "--before", "base" if before == "base" else base, "--json") == 0

    found = json.loads(capsys.readouterr().out)
    assert found["before"]["loss"] == pytest.approx(result["loss_before"], rel=1e-4)
    assert found["loss"] == pytest.approx(result["loss_after"], rel=1e-4)
    assert found["before"]["loss"] - found["loss"] > 0.05
    assert found["before"]["model"] == base


def test_the_figures_before_and_after_are_printed_as_a_table(tmp_path, capsys):
    base = save_folder(tmp_path / "base", tiny_model(max_position_embeddings=512), byte_tokenizer())
    train(helpers.build_recipe(tmp_path, RECORDS, model={"name_or_path": base}, train={"max_steps": 2}))
    capsys.readouterr()

    assert evaluate(tmp_path, "--before", "base") == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["before", "loss", "perplexity", "bits_per_byte", "token_accuracy"]
    assert rows[0] == ["before", "after"]
    assert float(rows[1][1]) > float(rows[1][2])


def test_a_run_from_random_weights_has_no_base(tmp_path, capsys):
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 64}
    model = {"init": "scratch", "config": config, "name_or_path": None}
    tokenizer = {"train": {"vocab_size": 300}}
    train(helpers.build_recipe(tmp_path, RECORDS, model=model, tokenizer=tokenizer, train={"max_steps": 1}))
    capsys.readouterr()

    assert evaluate(tmp_path, "--before", "base") == 2

    assert capsys.readouterr().err == (
        f"error: --before: {tmp_path}/run started from random weights; got 'base'; "
        "fix: name another model, such as a shorter run\n"
    )
