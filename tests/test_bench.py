"""``hf-clm bench``: the search for the fastest micro-batch, its output and its measurements."""

import json
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable

import pytest
import torch
from helpers import build_recipe, tiny_model

from hf_clm import bench as module
from hf_clm.bench import Bench, Start, Trial, bench, find_fastest, measure, to_flops, to_quiet
from hf_clm.cli import main
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.model.flops import count_flops
from hf_clm.recipe.recipe import recipe_to_yaml
from hf_clm.step_time import StepTime

# "ask\n" and "answer" with the end token: 4 + 7 tokens, of which 7 are learned.
RECORDS = [{"prompt": "ask\n", "completion": "answer"}] * 8
START = Start(
    device="1 x cpu with 2 threads, float32 weights",
    peak=4e11,
    examples=1000,
    rows=90,
    tokens=90_000,
    target_tokens=30_000,
    max_length=1024,
    fill=0.985,
    seconds={"import": 3.0, "tokenizer": 0.5, "prepare": 2.0, "first step": 0.25},
    versions={"torch": "2.13.0"},
)


def trial(rows: int, speed: float, **changes) -> Trial:
    figures = {"tokens_per_second": speed, "target_tokens_per_second": speed / 3, "flops_per_second": 1e11}
    changes = {"limit_bytes": 2**40, **changes}  # of a CPU
    return Trial(rows, max(1, 8 // rows), step_seconds=0.5, peak_bytes=2**30, **(figures | changes))


def attempts(speeds: dict[int, float]) -> Callable[[int], Trial]:
    """A speed of 0 means that a micro-batch does not fit. Sizes without a speed must not be tried."""
    return lambda rows: trial(rows, speeds[rows]) if speeds[rows] else Trial(rows, 1, "too large")


@pytest.mark.parametrize(
    ("speeds", "first", "most", "tried", "stopped"),
    [
        ({4: 10, 8: 20, 16: 20.5}, 4, 99, [4, 8, 16], "micro-batch 16 is not faster than 8"),
        ({4: 10, 8: 10, 2: 12, 1: 11}, 4, 99, [4, 8, 2, 1], "micro-batch 8 is not faster than 4"),
        ({4: 10, 8: 0, 2: 9}, 4, 99, [4, 8, 2], "micro-batch 8: too large"),
        ({4: 10, 8: 20}, 4, 15, [4, 8], "the data have only 15 rows"),
        ({1: 10, 2: 5}, 1, 99, [1, 2], "micro-batch 2 is not faster than 1"),
    ],
)
def test_larger_micro_batches_are_tried_while_faster_and_otherwise_smaller_ones(
    speeds, first, most, tried, stopped
):
    attempt = attempts(speeds)
    trials, why = find_fastest(attempt, attempt(first), most=most)

    assert [one.rows for one in trials] == tried
    assert why == stopped


def test_a_micro_batch_that_might_not_fit_in_memory_is_not_tried():
    """With a peak of 1 GiB and 1.9 GiB free, twice the rows may need 2 GiB."""
    first = trial(1, 10, limit_bytes=int(1.9 * 2**30))
    trials, why = find_fastest(attempts({}), first, most=99)

    assert [one.rows for one in trials] == [1]
    assert why == "micro-batch 2 might not fit in memory"


def test_the_report_names_the_fastest_by_more_than_the_noise():
    parts = {"input": 0.1, "forward": 0.2, "loss": 0.0, "backward": 0.2, "optimizer": 0.0, "Python": 0.0}
    fast = trial(8, 1500, step_time=StepTime(parts, "", ["input: wait less"]))
    trials = [trial(4, 1000), fast, trial(16, 0, failure="out of memory")]
    found = Bench("r.yaml", START, trials, "micro-batch 16: out of memory")

    assert found.to_lines() == [
        "",
        "micro-batch  rows/step  s/step  tokens/s  targets/s  per second    MFU  peak MiB",
        "          4          8   0.500     1,000        333   100 GFLOP  25.0%     1,024",
        "          8          8   0.500     1,500        500   100 GFLOP  25.0%     1,024",
        "         16  out of memory",
        "",
        "fastest   --per_device_train_batch_size 8 --gradient_accumulation_steps 1 (1.50x)",
        "          micro-batch 16: out of memory",
        "",
        "step      0.500 s with a micro-batch of 8:",
        "          input      20.0%  ###############                 read, collate, copy",
        "          forward    40.0%  ##############################",
        "          loss        0.0%",
        "          backward   40.0%  ##############################",
        "          optimizer   0.0%                                  clip and update",
        "          Python      0.0%                                  the rest",
        "change    input: wait less",
        "",
        "kept      nothing: the weights and the prepared data are deleted",
    ]
    assert Bench("r.yaml", START, [trial(4, 1000), trial(2, 1020)], "").fastest.rows == 4


def test_on_a_gpu_the_size_of_packed_rows_is_advised_as_a_budget_too():
    """Without a budget, a run would choose the micro-batch by the free memory."""
    found = Bench("r.yaml", START, [trial(4, 1000, limit_bytes=None), trial(8, 2000, limit_bytes=None)], "")

    assert found.to_lines()[5] == (
        "fastest   --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
        "--data.tokens_per_batch 8192 (2.00x)"
    )


def test_the_start_is_shown_part_by_part():
    assert START.to_lines() == [
        "device    1 x cpu with 2 threads, float32 weights",
        "peak      400 GFLOP/s in a matrix product",
        "data      1,000 examples, 90,000 tokens (30,000 targets) in 90 rows, 98.5% full",
        "prepare   45,000 tokens/s",
        "start     5.8 s: import 3.00, tokenizer 0.50, prepare 2.00, first step 0.25",
    ]
    assert [to_flops(count) for count in (1.5e9, 4.1e11, 9.89e14)] == ["1.5 GFLOP", "410 GFLOP", "989 TFLOP"]


def test_a_process_measures_the_start_in_parts_and_the_speed_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "settle_cpu", lambda processes: None)  # this process keeps its settings
    monkeypatch.setattr(module, "PEAK_SECONDS", 0.05)
    recipe = to_quiet(build_recipe(tmp_path, RECORDS), str(tmp_path), steps=5)

    start, result = measure(recipe, started=time.time() - 2.0)

    assert (start.examples, start.rows, start.tokens, start.target_tokens, start.fill) == (8, 8, 88, 56, None)
    parts = ["import", "tokenizer", "prepare", "load model", "test model", "first step"]
    assert list(start.seconds) == parts
    assert start.seconds["import"] > 2.0 and min(start.seconds.values()) >= 0
    assert start.peak > 1e8
    assert len(list((tmp_path / "prepared").iterdir())) == 1  # kept for the processes that follow
    assert (result.rows, result.accumulation, result.failure) == (2, 1, "")
    assert result.target_tokens_per_second / result.tokens_per_second == pytest.approx(7 / 11)
    assert result.step_seconds * result.tokens_per_second == pytest.approx(22)
    flops = count_flops(tiny_model()).of(tokens=11, targets=7, pairs=66) / 11  # the head at the targets only
    assert result.flops_per_second / result.tokens_per_second == pytest.approx(flops)
    assert result.peak_bytes > 2**20 and result.limit_bytes is not None


def test_the_command_leaves_nothing_but_its_json(tmp_path, monkeypatch, capsys):
    """A token budget is one micro-batch."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data, train = {"tokens_per_batch": 33, "max_length": 32}, {"per_device_train_batch_size": 1}
    recipe = build_recipe(tmp_path, RECORDS, data=data, train=train)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    before = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()

    code = main(["bench", str(tmp_path / "recipe.yaml"), "--steps", "5", "--json", str(tmp_path / "b.json")])

    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert "(56 targets) in 3 rows, 88.9% full" in shown.out
    assert "data.tokens_per_batch determines the micro-batch" in shown.out
    assert {path.name for path in tmp_path.iterdir()} - before == {"b.json"}
    assert list((tmp_path / "temporary").iterdir()) == []
    found = json.loads((tmp_path / "b.json").read_text())
    assert [one["rows"] for one in found["trials"]] == [1]
    assert found["start"]["versions"]["torch"] == torch.__version__
    shares = found["trials"][0]["shares"]
    assert list(shares) == ["input", "forward", "loss", "backward", "optimizer", "Python"]
    assert min(shares.values()) > 0 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (-9, b"", EnvironmentFault),
        (1, b"torch.OutOfMemoryError: CUDA out of memory.", EnvironmentFault),
        (1, b"ZeroDivisionError", RuntimeError),
    ],
)
def test_a_process_that_ends_without_a_result_ran_out_of_memory_or_is_a_bug(
    tmp_path, monkeypatch, code, stderr, error
):
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, code, b"", stderr)
    )

    with pytest.raises(error):
        bench(build_recipe(tmp_path, RECORDS), steps=5, say=print)


def test_a_user_error_passes_through_the_child_process(tmp_path, monkeypatch):
    wrong = DataError("no such file", where="rows.jsonl", fix="name one that is there")

    def run(words, **_):
        with open(words[-1], "wb") as file:
            pickle.dump(wrong, file)
        return subprocess.CompletedProcess(words, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)

    with pytest.raises(
        DataError, match=r"^rows\.jsonl: no such file; fix: name one that is there$"
    ) as caught:
        bench(build_recipe(tmp_path, RECORDS), steps=5, say=print)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--json", "missing/b.json"], {}, "--json: cannot be written; got missing/b.json"),
        (["--steps", "1"], {}, "expected 5 or more, got 1"),
        ([], {"WORLD_SIZE": "2"}, "bench runs in one process"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, words, environment, said
):
    monkeypatch.setattr(subprocess, "run", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(build_recipe(tmp_path, RECORDS)))

    assert main(["bench", str(path), *words]) == 2
    assert said in capsys.readouterr().err
