"""Reading the folder of a run, finished or not."""

import json

import pytest

from hf_clm.errors import ExitCode, RecipeError
from hf_clm.run_folder import (
    METRICS,
    RunRecord,
    append_json,
    drop_after,
    load_folder,
    metric_of,
    points,
    read_lines,
    read_record,
    to_duration,
    to_short,
    write_json,
    write_record,
)


def write_run(folder, *, facts=None, metrics=(), **files):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"status": "done", **(facts or {})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    for name, text in files.items():
        (folder / name.replace("_yaml", ".yaml")).write_text(text)
    return folder


def test_all_files_of_a_run_are_read(tmp_path):
    folder = write_run(
        tmp_path / "r", metrics=[{"step": 1, "loss": 2.0}], recipe_yaml="data: {train: [a.txt]}"
    )
    (folder / "samples.jsonl").write_text('{"step": 0, "prompt": "a", "text": "b\u2028c"}\n', "utf-8")

    run = load_folder(folder)

    assert (run.name, run.record.status, run.unreadable) == ("r", "done", 0)
    assert run.metrics == [{"step": 1, "loss": 2.0}]
    assert run.samples[0]["text"] == "b\u2028c"
    assert run.recipe == {"data.train.0": "a.txt"}
    assert run.label_rows == []


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', '{"step": 2, "loss": 1.0', '{"step": 2}x', "2", "\0\0\0"]
)
def test_an_incomplete_line_is_skipped_and_counted(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)

    assert read_lines(path) == ([{"step": 1}], 1)


def test_an_incomplete_character_at_the_end_is_skipped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1}\n{"text": "床'.encode()[:-1])

    assert read_lines(path) == ([{"step": 1}], 1)


def test_files_that_are_missing_are_empty(tmp_path):
    (tmp_path / "run.json").write_text("{}")

    run = load_folder(tmp_path)

    assert (run.record.status, run.metrics, run.recipe) == ("unknown", [], {})


def test_an_invalid_recipe_is_skipped(tmp_path):
    assert load_folder(write_run(tmp_path / "r", recipe_yaml="a: [")).recipe == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            None,
            "{folder}: contains no run.json, so it is not the folder of a run; "
            "fix: name the output folder of a run",
        ),
        ("{", "{folder}/run.json: not a JSON object; fix: name the output folder of a run"),
        ("[1]", "{folder}/run.json: not a JSON object; fix: name the output folder of a run"),
        (
            '{"train": {"rows": "many"}}',
            "{folder}/run.json: train.rows: expected a valid integer, unable to parse string as an "
            "integer; fix: name the output folder of a run",
        ),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "run.json").write_text(content)

    with pytest.raises(RecipeError) as error:
        load_folder(tmp_path)

    assert str(error.value).startswith(said.format(folder=tmp_path))
    assert error.value.exit_code == ExitCode.RECIPE


def test_a_missing_folder_is_refused():
    with pytest.raises(RecipeError, match=r"^nowhere: no such folder; fix: "):
        load_folder("nowhere")


def test_only_finite_numbers_are_points_and_they_are_sorted():
    entries = [
        {"step": 3, "loss": 1},
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": float("nan")},
        {"step": 4, "loss": float("inf")},
        {"step": 5, "loss": "high"},
        {"loss": 1.0},
        {"step": 7},
    ]

    assert points(entries, "loss") == [(1, 2.5), (3, 1)]


def test_the_figures_come_from_run_json_or_else_the_last_log_events(tmp_path):
    metrics = [
        {"step": 0, "eval_loss": 7.0, "eval_runtime": 1.0, "seconds": 0.5},
        {"step": 5, "loss": 5.0, "tokens_seen": 50, "mfu": 0.1, "seconds": 8.0},
        {"step": 9, "eval_loss": 4.0, "seconds": 9.0},
    ]
    running = {"status": "running", "steps": 18}
    done = {"evaluated": {"eval_loss": [6.5, 3.5]}, "mfu": 0.2, "seconds": 10.0, "steps": 9}

    assert load_folder(write_run(tmp_path / "a", facts=running, metrics=metrics)).figures() == {
        "Evaluation loss": "7.0000 -> 4.0000",
        "Loss": "5.0000",
        "Steps": "9 of 18",
        "Time": "9s, about 9s left",
        "Tokens": "50",
        "MFU": "10%",
        "Evaluated on": "training data",
    }
    found = load_folder(write_run(tmp_path / "b", facts=done, metrics=metrics)).figures()
    assert (found["Evaluation loss"], found["MFU"], found["Time"]) == ("6.5000 -> 3.5000", "20%", "10s")


def test_a_record_survives_reading_and_writing_with_keys_of_other_versions(tmp_path):
    """Nothing is added to or lost from the record of a newer version, or one with missing keys."""
    content = {
        "status": "done",
        "evaluation": None,
        "novel": {"a": [1]},
        "train": {"files": ["a"], "rows": 3, "novel": 1},
        "proof": {
            "prepared": {"key": "k"},
            "eval_news": {"ledger": {"used": {"rows": 3}}},
            "self_test": "off",
        },
    }
    folder = write_run(tmp_path / "r", facts=content)

    record = read_record(folder)
    assert record is not None
    write_record(tmp_path, record)

    assert json.loads((tmp_path / "run.json").read_text()) == content
    assert record.proof.sets["eval_news"].ledger == {"used": {"rows": 3}}
    assert (record.proof.self_test, record.train.tokens, record.mfu) == ("off", 0, None)


def test_updated_values_of_a_record_are_validated():
    record = RunRecord(status="running", steps=7)

    assert record.updated(status="failed").to_json() == {"status": "failed", "steps": 7}
    with pytest.raises(ValueError, match="steps"):
        record.updated(steps="many")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("loss", 1.25, "loss 1.2500"),
        ("eval_loss", 2.0, "eval loss 2.0000"),
        ("token_accuracy", 0.15195, "accuracy 15.2%"),
        ("learning_rate", 0.0002, "lr 0.0002"),
        ("eval_news_loss", 2.0, "news loss 2"),
        ("eval_news_token_accuracy", 0.5, "news accuracy 50%"),
        ("eval_exact_match", 0.25, "exact match 25%"),
        ("eval_chrf", 61.2345, "chrf 61.23"),
        ("eval_runtime", 1.0, None),
        ("eval_news_target_tokens", 9, None),
        ("epoch", 1.0, None),
    ],
)
def test_a_key_of_the_log_has_its_name_and_format(key, value, shown):
    metric = metric_of(key)

    assert (f"{metric.short} {metric.form(value)}" if metric else None) == shown


def test_memory_and_counts_have_their_units():
    shown = [
        METRICS[key].form(value) for key, value in (("peak_memory_bytes", 1_234_567_890), ("step", 29110))
    ]

    assert shown == ["1.23 GB", "29,110"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.98e-5, "1.98e-05"),
        (4.62416, "4.624"),
        (-3.5, "-3.5"),
        (6843.2, "6,843"),
        (2_500_000, "2.5M"),
        (50_000_000_000, "50B"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (1e30, "1e+30"),
    ],
)
def test_a_number_is_short(value, text):
    assert to_short(value) == text


def test_json_is_replaced_atomically(tmp_path):
    path = tmp_path / "run.json"

    write_json(path, {"status": "running"})
    write_json(path, {"status": "done", "text": "诗"})
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})

    assert json.loads(path.read_text(encoding="utf-8")) == {"status": "done", "text": "诗"}
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_text_survives_writing_and_reading(tmp_path):
    append_json(tmp_path / "x.jsonl", {"text": "床前明月光\n"})

    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == '{"text": "床前明月光\\n"}\n'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7384, "2h03m"),
    ],
)
def test_a_duration_is_short(seconds, text):
    assert to_duration(seconds) == text


def test_lines_after_the_checkpoint_and_an_incomplete_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "lo')

    assert drop_after(path, 4) == [{"step": 4, "loss": 2.0}]
    assert path.read_text() == '{"step": 4, "loss": 2.0}\n'


def test_a_line_separator_in_a_sample_does_not_end_its_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    append_json(path, {"step": 1, "text": "a\u2028b\x85c"})

    assert drop_after(path, 1) == [{"step": 1, "text": "a\u2028b\x85c"}]
