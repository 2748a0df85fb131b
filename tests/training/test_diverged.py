"""A non-finite loss results in a one-line error, exit code 5, a page of the batch, and intact checkpoints."""

import base64
import json
import math
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import EOS, byte_tokenizer, save_folder, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.cli import main
from hf_clm.recipe.recipe import recipe_to_yaml
from hf_clm.training.trainer import CLMTrainer

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": f"answer {n}"} for n in range(1, 5)]


def write_recipe(folder: Path, **changes) -> str:
    (folder / "recipe.yaml").write_text(recipe_to_yaml(helpers.build_recipe(folder, RECORDS, **changes)))
    return str(folder / "recipe.yaml")


def read_page(path: Path) -> tuple[dict[str, str], list[bytes]]:
    """Returns the facts at the top of a page, and the bytes of each row without its control tokens."""
    data = json.loads(path.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])
    ids = np.frombuffer(base64.b64decode(data["tokens"]), dtype="<i4")
    rows = np.split(ids, np.cumsum([row[1] for row in data["rows"]])[:-1])
    return dict(data["facts"]), [bytes(i for i in row.tolist() if i < 256) for row in rows]


@pytest.fixture
def diverged(tmp_path, monkeypatch, capsys) -> tuple[Path, str]:
    """A run with a NaN in the gradient of its third step: its folder, and its stderr."""
    step, calls = CLMTrainer.training_step, []

    def broken(self, model, inputs, num_items_in_batch=None):
        loss = step(self, model, inputs, num_items_in_batch)
        calls.append(loss)
        if len(calls) == 3:
            next(model.parameters()).grad[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(CLMTrainer, "training_step", broken)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    path = write_recipe(tmp_path, train=settings)
    capsys.readouterr()

    code = main(["train", path])

    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(shown)) == (5, 1)
    return tmp_path / "run", shown[0]


def test_the_error_is_one_line_that_names_the_step_and_the_page(diverged):
    folder, line = diverged

    assert line.startswith(
        "error: step 3: the loss or its gradient is not finite; no weight was updated; "
        f"the rows of this step are in {folder / 'diverged.html'}; got loss "
    )
    assert "gradient norm nan, learning rate 0.00075; fix: lower train.learning_rate" in line


def test_the_page_shows_the_rows_of_the_step_and_its_figures(diverged):
    facts, rows = read_page(diverged[0] / "diverged.html")

    assert (facts["step"], facts["last finite step"]) == ("3", "2")
    assert (facts["gradient norm"], facts["learning rate"]) == ("nan", "0.00075")
    assert math.isfinite(float(facts["loss"]))  # it was the gradient
    text = b"".join(rows)
    assert sum(text.count(b"say %d\nanswer %d" % (n, n)) for n in range(1, 5)) == 2  # 2 of the 4 rows


def test_the_last_checkpoint_loads_and_is_finite(diverged):
    folder = diverged[0]
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))

    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert AutoTokenizer.from_pretrained(folder / "checkpoint-2").eos_token_id == EOS


def test_run_json_says_that_the_run_diverged(diverged):
    assert json.loads((diverged[0] / "run.json").read_text())["status"] == "diverged"


def test_nan_weights_are_found_before_the_first_step(tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 7] = torch.nan
    name = save_folder(tmp_path / "nan", model, byte_tokenizer())

    code = main(["train", write_recipe(tmp_path, model={"name_or_path": name})])

    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 4
    assert shown[0].startswith(
        "error: model: the model's loss on this data, or its gradient, is not finite; got "
    )


def test_without_the_self_test_nan_weights_are_found_at_the_first_step(tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 7] = torch.nan
    name = save_folder(tmp_path / "nan", model, byte_tokenizer())
    doctor = {"self_test": False, "round_trip": "off"}

    code = main(["train", write_recipe(tmp_path, model={"name_or_path": name}, doctor=doctor)])

    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 5
    assert shown[0].startswith(
        "error: step 1: the loss or its gradient is not finite; no weight was updated; "
    )
    assert (tmp_path / "run" / "diverged.html").is_file()
