"""What is read of a run's folder, however far the run came."""

import json

import pytest

from hf_clm.errors import ExitCode, RecipeError
from hf_clm.run_folder import final_figures, load_folder, points, read_lines


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

    record = load_folder(folder)

    assert (record.name, record.status, record.unreadable) == ("r", "done", 0)
    assert record.metrics == [{"step": 1, "loss": 2.0}]
    assert record.samples[0]["text"] == "b\u2028c"
    assert record.recipe == {"data.train.0": "a.txt"}
    assert record.label_rows == []


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', '{"step": 2, "loss": 1.0', '{"step": 2}x', "2", "\0\0\0"]
)
def test_a_torn_line_is_left_out_and_counted(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)

    assert read_lines(path) == ([{"step": 1}], 1)


def test_half_a_character_at_the_end_is_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1}\n{"text": "床'.encode()[:-1])

    assert read_lines(path) == ([{"step": 1}], 1)


def test_files_that_are_missing_are_empty(tmp_path):
    (tmp_path / "run.json").write_text("{}")

    record = load_folder(tmp_path)

    assert (record.status, record.metrics, record.recipe) == ("unknown", [], {})


def test_a_recipe_that_is_no_yaml_is_left_out(tmp_path):
    assert load_folder(write_run(tmp_path / "r", recipe_yaml="a: [")).recipe == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "{folder}: holds no run.json: not a run's folder; fix: name the output folder of a run"),
        ("{", "{folder}/run.json: not a JSON object; fix: name the output folder of a run"),
        ("[1]", "{folder}/run.json: not a JSON object; fix: name the output folder of a run"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "run.json").write_text(content)

    with pytest.raises(RecipeError) as error:
        load_folder(tmp_path)

    assert str(error.value).startswith(said.format(folder=tmp_path))
    assert error.value.exit_code == ExitCode.RECIPE


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match=r"^nowhere: no such folder; fix: "):
        load_folder("nowhere")


def test_only_finite_numbers_are_points_and_they_stand_in_order():
    entries = [
        {"step": 3, "loss": 1},
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": float("nan")},
        {"step": 4, "loss": float("inf")},
        {"step": 5, "loss": "high"},
        {"step": 6, "loss": True},
        {"loss": 1.0},
        {"step": 7},
    ]

    assert points(entries, "loss") == [(1, 2.5), (3, 1)]


def test_the_figures_are_those_of_run_json_and_else_of_the_last_log_events(tmp_path):
    metrics = [
        {"step": 0, "eval_loss": 7.0, "seconds": 0.5},
        {"step": 5, "loss": 5.0, "tokens_seen": 50, "mfu": 0.1, "seconds": 8.0},
        {"step": 9, "eval_loss": 4.0, "seconds": 9.0},
    ]
    running = load_folder(write_run(tmp_path / "a", facts={"status": "running"}, metrics=metrics))
    facts = {"loss_before": 6.5, "loss_after": 3.5, "mfu": 0.2, "seconds": 2.0}
    done = load_folder(write_run(tmp_path / "b", facts=facts, metrics=metrics))

    assert final_figures(running) == {
        "loss_before": 7.0,
        "loss_after": 4.0,
        "training_loss": 5.0,
        "steps_done": 9,
        "tokens_seen": 50,
        "seconds": 9.0,
        "mfu": 0.1,
    }
    found = final_figures(done)
    assert (found["loss_before"], found["loss_after"], found["mfu"]) == (6.5, 3.5, 0.2)
    assert found["seconds"] == 9.0  # run.json does not count what was before a resume


def test_the_evaluation_before_training_is_not_one_after_it(tmp_path):
    metrics = [{"step": 0, "eval_loss": 7.0}, {"step": 5, "loss": 5.0}]

    found = final_figures(load_folder(write_run(tmp_path / "a", metrics=metrics)))

    assert found == {"loss_before": 7.0, "training_loss": 5.0, "steps_done": 5}


def test_a_part_of_run_json_that_is_no_mapping_is_empty(tmp_path):
    record = load_folder(write_run(tmp_path / "r", facts={"proof": {"train": "off"}, "a": {"b": {"c": 1}}}))

    assert record.part("a", "b") == {"c": 1}
    assert record.part("proof", "train", "certificate") == {}
    assert record.part("nothing") == {}
