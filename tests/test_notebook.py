"""Runs in Jupyter: one output that is drawn again and again, and the notebook that is shipped."""

from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "recipes" / "notebooks" / "first_run.ipynb"


class Output:
    """What ``display(..., display_id=True)`` returns."""

    def __init__(self):
        self.pages = []

    def update(self, page):
        self.pages.append(page.data)


def state_at(step: int, history: list[dict[str, float]]) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=20, log_history=history, is_world_process_zero=True)


@pytest.fixture
def output(monkeypatch):
    display = pytest.importorskip("IPython.display")
    output = Output()
    monkeypatch.setattr(display, "display", lambda page, display_id: output)
    monkeypatch.setattr("hf_clm.notebook.in_notebook", lambda: True)
    monkeypatch.setattr("hf_clm.notebook.SECONDS", 0.0)
    return output


def test_lines_and_progress_replace_each_other_in_one_output(output, capsys):
    from hf_clm.notebook import showing

    with showing() as progress:
        print("data      12 <rows>")
        progress.watch(state_at(10, [{"step": 1, "loss": 3.0}, {"step": 10, "loss": 2.0, "eval_loss": 2.5}]))

    assert capsys.readouterr().out == ""  # nothing beside the drawing
    assert "<div>data      12 &lt;rows&gt;</div>" in output.pages[0]
    last = output.pages[-1]
    assert '<progress value="10" max="20"' in last
    assert "step 10 of 20 · " in last and " · loss 2.0000 · eval loss 2.5000" in last
    assert '<img alt="loss by step" src="data:image/png;base64,' in last
    assert "<details><summary>1 lines of the log</summary>" in last


def test_the_log_of_a_run_that_fails_is_open(output):
    from hf_clm.notebook import showing

    with pytest.raises(ValueError), showing():
        print("the last line")
        raise ValueError

    assert "<details open>" in output.pages[-1] and "the last line" in output.pages[-1]


def test_an_error_of_the_user_is_one_line_in_a_notebook():
    from hf_clm.errors import DataError

    error = DataError("no records", where="train_dataset", fix="pass some")

    assert error._render_traceback_() == ["error: train_dataset: no records; fix: pass some"]


def test_outside_of_a_notebook_lines_are_printed(capsys):
    from hf_clm.notebook import in_notebook, showing

    with showing() as progress:
        progress.write("a line\n")

    assert not in_notebook() and not progress.callbacks()
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.slow
def test_the_shipped_notebook_runs_and_its_model_answers(tmp_path, monkeypatch):
    """In a kernel of its own, as Jupyter runs it."""
    nbformat, preprocessors = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.preprocessors")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is shipped without outputs"

    run = preprocessors.ExecutePreprocessor(timeout=280, kernel_name="python3")
    run.preprocess(notebook, {"metadata": {"path": str(tmp_path)}})

    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    (drawn,) = [output for output in outputs[1] if output.output_type == "display_data"]
    assert "<progress" in drawn.data["text/html"] and "data:image/png" in drawn.data["text/html"]
    assert [output.output_type for output in outputs[1]] == ["display_data"], "no wall of lines beside it"
    assert outputs[2][0].text.splitlines() == [
        "The colour of snow is white.",
        "The colour of a lemon is yellow.",
        "The colour of the sea is blue.",
    ]
    assert outputs[4][-1].data["text/plain"] == "'The colour of coal is black.'"
