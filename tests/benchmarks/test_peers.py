"""The benchmark's arithmetic against values by hand, and a tiny case of it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("table")


def process(wall: float, cpu: float, *, peak: float = 1e9, bf16: bool = False) -> dict:
    window = {
        "tokens_per_second": wall,
        "tokens_per_cpu_second": cpu,
        "target_tokens_per_second": wall / 2,
        "step_seconds": 1.0,
        "tokens_per_step": 10.0,
    }
    return {"windows": [window, window], "peak_bytes": peak, "peak_above_imports_bytes": peak, "bf16": bf16}


def test_a_median_is_taken_of_each_figure_by_itself(table):
    rounds = [process(100, 9), process(300, 7), process(200, 8)]

    found = table.medians(table.to_figures(result) for result in rounds)

    assert (found["tokens_per_second"], found["tokens_per_cpu_second"]) == (200, 8)


def test_the_ratio_is_that_to_the_fastest_peer_at_the_same_precision(table):
    speeds = {
        "group@fp32": (100, 50),
        "concat@fp32": (160, 60),
        "trl@fp32": (90, 40),
        "trl@bf16": (400, 300),
        "ours@fp32": (200, 120),
    }
    figures = {key: table.to_figures(process(*speed)) for key, speed in speeds.items()}
    families = dict.fromkeys(speeds, "stock") | {"trl@fp32": "trl", "trl@bf16": "trl", "ours@fp32": "ours"}

    ratios = table.compare(figures, families)

    both = {name: (r["tokens_per_second"], r["tokens_per_cpu_second"]) for name, r in ratios.items()}
    assert both == {
        "fp32, best stock": (1.25, 2.0),
        "fp32, best TRL": (200 / 90, 3.0),
        "fp32, best peer that keeps documents apart": (2.0, 2.4),
    }


def test_a_loss_of_other_tokens_or_of_another_value_differs_unless_by_design(table):
    right = {"tokens": 30, "target_tokens": 20, "still_loss": 9.0, "held_out_loss": 8.0, "bf16": False}
    losses = {
        "alone": {"tokens": 30, "target_tokens": 20, "still_loss": 9.0},
        "same@fp32": right | {"still_loss": 9.0008},
        "off@fp32": right | {"still_loss": 9.001},
        "coarse@bf16": right | {"still_loss": 9.08, "bf16": True},
        "fewer@fp32": right | {"target_tokens": 19},
        "blocks@fp32": right | {"still_loss": 8.0},
        "slow@fp32": right | {"held_out_loss": 8.9},
        "broken@fp32": {"failed": "no output"},
    }

    judged = table.judge(losses, {"blocks": "documents mix"})

    assert {key: (loss["verdict"], table.is_sound(loss)) for key, loss in judged.items()} == {
        "alone": ("reference", True),
        "same@fp32": ("agrees", True),
        "off@fp32": ("differs", False),
        "coarse@bf16": ("agrees", True),
        "fewer@fp32": ("differs", False),
        "blocks@fp32": ("by design: documents mix", True),
        "slow@fp32": ("differs", False),
        "broken@fp32": ("failed: no output", False),
    }


def test_a_precision_left_to_the_trainer_stands_in_the_column_of_what_it_was(table):
    assert table.with_precision("ours@default", process(1, 1, bf16=True)) == "ours@bf16"
    assert table.with_precision("ours@default", process(1, 1)) == "ours@fp32"

    figures = {"a@bf16": table.to_figures(process(1234, 5, peak=2e9))}
    lines = table.speed_table("Title", figures, {"a": "Arm"}, threads=(2, 1))

    assert lines[-2] == "| Arm |  |  |  | 1,234 | 5 | 2.00 |"


@pytest.mark.peer
def test_a_tiny_case_runs_to_its_end_and_every_loss_is_that_of_the_rows_alone(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "quick.json"
    chosen = ["--quick", "--case", "sft-8k", "--arm", "concat", "trl-bfd-1x3", "--out", str(out)]
    command = [sys.executable, str(HERE / "peers.py"), *chosen]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    case = json.loads(out.read_text(encoding="utf-8"))["cases"]["sft-8k"]
    arms = {"concat", "trl-bfd-1x3", "ours", "ours-glibc"}
    assert set(case["rounds"]) == {f"{arm}@{p}" for arm in arms for p in ("fp32", "bf16")} | {
        "ours-default@default"
    }
    verdicts = {key: loss["verdict"].split(":")[0] for key, loss in case["losses"].items()}
    agrees = dict.fromkeys(case["rounds"], "agrees")
    by_design = dict.fromkeys(("concat@fp32", "concat@bf16"), "by design")
    assert verdicts == {"alone": "reference"} | agrees | by_design
    assert all(
        window["tokens_per_second"] > 0 for key in agrees for window in case["rounds"][key][0]["windows"]
    )
    assert case["ratios"]["fp32, best TRL"]["tokens_per_second, against"] == "trl-bfd-1x3@fp32"
