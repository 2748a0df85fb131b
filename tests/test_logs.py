"""HF_CLM_LOG=json: every line of a run, and its error, is one JSON object."""

import json

import pytest
from helpers import build_recipe

from hf_clm.cli import main
from hf_clm.errors import RecipeError
from hf_clm.logs import to_json_lines, writes_json
from hf_clm.recipe.recipe import recipe_to_yaml
from hf_clm.training.run import train

ROWS = [{"instruct": f"say {n}\n", "input": "", "label": str(n)} for n in range(4)]


def test_a_line_has_its_topic_apart_and_the_next_ones_share_it():
    lines = [
        json.loads(line)
        for line in to_json_lines("train     4 rows\n          all certified\ndone", {"loss": 2})
    ]

    assert [(line.get("topic"), line["message"]) for line in lines] == [
        ("train", "4 rows"),
        ("train", "all certified"),
        (None, "done"),
    ]
    assert all(
        line["level"] == "info" and line["loss"] == 2 and line["time"].endswith("+00:00") for line in lines
    )


def test_a_figure_that_is_not_finite_is_null():
    (line,) = to_json_lines("step 1", {"loss": float("nan"), "step": 1})

    assert (json.loads(line)["loss"], json.loads(line)["step"]) == (None, 1)


def test_every_line_of_a_run_is_an_object_and_log_events_have_their_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_CLM_LOG", "json")

    train(build_recipe(tmp_path, ROWS, train={"max_steps": 2}), is_terminal=True)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert set(losses) == {1, 2} and all(loss > 0 for loss in losses.values())
    assert {"data", "train", "done", "written"} <= {line.get("topic") for line in lines}


def test_an_error_is_an_object_with_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_CLM_LOG", "json")
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(build_recipe(tmp_path, ROWS)))
    capsys.readouterr()  # of saving the model

    assert main(["train", str(tmp_path / "r.yaml"), "--learnin_rate", "1"]) == 2

    error = json.loads(capsys.readouterr().err)
    assert (error["level"], error["exit_code"], error["rank"]) == ("error", 2, 0)
    assert error["message"].endswith("did you mean 'learning_rate'?")


def test_another_kind_of_log_is_refused(monkeypatch):
    monkeypatch.setenv("HF_CLM_LOG", "xml")

    with pytest.raises(RecipeError, match=r"^HF_CLM_LOG: expected one of text, json; got 'xml'$"):
        writes_json()
