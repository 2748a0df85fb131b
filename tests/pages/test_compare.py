"""Runs side by side: their figures, what tells them apart, and their curves in one page."""

import re

import pytest
from report_runs import EVIL, RECIPE, to_metrics, write_run

from hf_clm.errors import ExitCode, RecipeError
from hf_clm.pages.compare import compare, to_charts, to_names
from hf_clm.run_folder import load_folder

FASTER = RECIPE.replace("0.002", "0.02").replace("output_dir: run", "output_dir: other, seed: 7")


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """``base`` with 40 steps, and ``fast`` with 20, another recipe, other data and another torch."""
    proof = {"train": {"certificate": {"valid": True, "rows": 48, "content_hash": "ffff0000ffff0000"}}}
    evaluated = {"eval_loss": [6.5, 1.5]}
    facts = {"steps_done": 20, "evaluated": evaluated, "proof": proof, "mfu": None, "tokens_seen": 2000}
    facts |= {"versions": {"python": "3.11.7", "torch": "2.11.0"}}
    metrics = [{key: value for key, value in one.items() if key != "mfu"} for one in to_metrics(20)]
    base, fast = tmp_path / "base", tmp_path / "fast"
    return [str(write_run(base)), str(write_run(fast, facts=facts, metrics=metrics, recipe=FASTER))]


def test_figures_and_differences_are_printed_side_by_side(runs, tmp_path):
    found = compare(runs, path=str(tmp_path / "c.html"))

    assert found.to_lines() == [
        "                                 base              fast",
        "Status                           done              done",
        "Evaluation loss      6.5000 -> 0.2500  6.5000 -> 1.5000",
        "Evaluation accuracy       0% -> 97.5%       0% -> 97.5%",
        "Loss                           0.0961            0.7902",  # 6.5 x 0.9^40, 6.5 x 0.9^20
        "Token accuracy                  98.5%             87.8%",
        "Steps                        40 of 40          20 of 40",
        "Time                               5s                2s",
        "Tokens                          4,000             2,000",
        "Target tokens                   1,600               800",
        "Tokens per second                 800               800",
        "MFU                              9.5%                 -",
        "Peak memory                   1.08 GB           1.08 GB",
        "Padding                            0%                0%",
        "Evaluated on            training data     training data",
        "Packed rows                94.5% full        94.5% full",
        "",
        "differs in           base          fast",
        "train.learning_rate  0.002         0.02",
        "train.seed           -             7",
        "content of data      0fb1e8d1d674  ffff0000ffff",
        "version of torch     2.13.0        2.11.0",
    ]


def test_the_folder_alone_is_no_difference(tmp_path):
    other = RECIPE.replace("output_dir: run", "output_dir: elsewhere")
    folders = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", recipe=other))]

    found = compare(folders, path=str(tmp_path / "c.html"))

    assert found.differences == []
    assert found.to_lines()[-1] == "the recipes, data and versions are the same"


def test_losses_are_overlaid_by_step_by_tokens_and_by_time(runs):
    charts = to_charts([load_folder(folder) for folder in runs], ["base", "fast"])

    assert [(chart.metric.title, chart.axis) for chart in charts] == [
        *(("Loss", "step"), ("Loss", "tokens"), ("Loss", "seconds")),
        *(("Evaluation loss", "step"), ("Evaluation loss", "tokens"), ("Evaluation loss", "seconds")),
        *(("Tokens per second", "step"), ("Learning rate", "step")),
    ]
    keys = [[(number, one.name) for number, one in chart.keys] for chart in charts]
    assert keys == [[(0, "base"), (1, "fast")]] * 8
    assert charts[1].series[0].points[-1][0] == 4000
    assert charts[2].series[0].points[-1][0] == 5.0


def test_an_evaluation_stands_at_the_tokens_of_the_training_before_it(runs):
    by_tokens = to_charts([load_folder(folder) for folder in runs], ["base", "fast"])[4]

    assert [one.points for one in by_tokens.series] == [[(0, 6.5), (4000, 0.25)], [(0, 6.5), (2000, 0.25)]]


@pytest.mark.parametrize(("seconds", "unit"), [(100, "seconds"), (130, "minutes"), (7300, "hours")])
def test_time_is_drawn_in_a_unit_that_can_be_read(tmp_path, seconds, unit):
    metrics = [{"step": 1, "loss": 2.0, "seconds": 1.0}, {"step": 2, "loss": 1.0, "seconds": seconds}]
    record = load_folder(write_run(tmp_path / "a", metrics=metrics))

    charts = to_charts([record, record], ["a", "b"])

    assert [chart.axis for chart in charts] == ["step", unit]  # these runs count no tokens: no chart


def test_runs_of_an_older_version_are_compared_as_far_as_they_go(tmp_path):
    metrics = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    old = write_run(tmp_path / "old", facts={"origins": None, "versions": None}, metrics=metrics)

    found = compare([str(old), str(write_run(tmp_path / "new"))], path=str(tmp_path / "c.html"))

    assert ["Peak memory", "-", "1.08 GB"] in found.figures


def test_the_page_holds_what_is_printed_and_runs_nothing(tmp_path):
    names = ["a", EVIL.replace("/", "-")]
    folders = [str(write_run(tmp_path / name)) for name in names]
    path = tmp_path / "c.html"

    compare(folders, path=str(path))

    text = path.read_text(encoding="utf-8")
    assert "<img" not in text and "<script" not in text
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "What the runs reached",
        "What the runs answer",
        "How the loss falls",
    ]
    assert "The recipes, data and versions are the same." in text
    assert "default-src 'none'; style-src 'sha256-" in text


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    records = [load_folder(write_run(tmp_path / name / "run")) for name in ("a", "b")]

    assert to_names(records) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]


def test_a_run_that_is_compared_with_itself_is_numbered(tmp_path):
    run = load_folder(write_run(tmp_path / "run"))

    assert to_names([run, run]) == ["run (1)", "run (2)"]


def test_the_answers_of_the_runs_stand_side_by_side_from_before_to_after(tmp_path):
    first = [{"step": step, "prompt": "Hi", "text": text} for step, text in ((0, "?"), (10, "a"), (20, "b"))]
    second = [{"step": step, "prompt": "Hi", "text": text} for step, text in ((0, "?"), (5, "c"))]
    folders = [write_run(tmp_path / "one", samples=first), write_run(tmp_path / "two", samples=second)]

    compare([str(folder) for folder in folders], path=str(tmp_path / "c.html"))

    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    cards = re.findall(
        r'<b class="c[01]">(.*?)</b> <span class="quiet">(.*?)</span>\s*<div[^>]*>(.*?)</div>', text
    )
    assert cards == [
        *(("one", "before training", "?"), ("two", "before training", "?")),
        *(("one", "step 5", "?"), ("two", "step 5", "c")),
        *(("one", "step 10", "a"), ("two", "step 10", "c")),
        *(("one", "step 20", "b"), ("two", "step 20", "c")),
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_one_run_is_none_to_compare(runs, tmp_path, count):
    with pytest.raises(RecipeError) as error:
        compare(runs[:count], path=str(tmp_path / "c.html"))

    assert str(error.value) == (
        "hf-clm compare: needs at least two runs; fix: hf-clm compare RUN RUN [RUN ...]"
    )
    assert not (tmp_path / "c.html").exists()


def test_a_folder_that_is_no_run_is_named_before_anything_is_written(runs, tmp_path):
    with pytest.raises(RecipeError) as error:
        compare([*runs, str(tmp_path)], path=str(tmp_path / "c.html"))

    assert error.value.exit_code == ExitCode.RECIPE
    assert str(error.value).startswith(
        f"{tmp_path}: contains no run.json, so it is not the folder of a run; fix: "
    )
    assert not (tmp_path / "c.html").exists()
