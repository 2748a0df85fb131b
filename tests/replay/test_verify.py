"""hf-clm verify finds what was changed in a run, and nothing in a run that was not changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model, write_jsonl
from safetensors.torch import load_file, save_file

from hf_clm.cli import main
from hf_clm.data.prepared import store
from hf_clm.errors import RecipeError
from hf_clm.recipe.recipe import Recipe, load_recipe, recipe_to_yaml
from hf_clm.replay.replays import State, find_spans
from hf_clm.replay.verify import Verification, compare_logs, compare_weights, verify
from hf_clm.run_folder import read_lines
from hf_clm.training.checkpoints import read_seal, seal
from hf_clm.training.python import Additions
from hf_clm.training.run import run, train
from hf_clm.training.trainer import CLMTrainer

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 14)]
HELD_OUT = [{"instruct": f"tell {n}\n", "input": "", "label": "ab" * n} for n in range(1, 4)]
ALL = 99  # spans: more than any run here has


def dropout_recipe(folder: Path, **changes: Any) -> Recipe:
    """Returns the recipe of 6 steps of a tiny GPT-2 with dropout, saved after every second one."""
    folder.mkdir(exist_ok=True)
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    sections = {"model": {"name_or_path": save_folder(folder / "model", model, byte_tokenizer())}}
    settings = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"save_total_limit": 9} | changes.pop("train", {})
    return build_recipe(folder, RECORDS, **(sections | changes), train=settings)


def check(run: Path, *, spans: int = ALL) -> Verification:
    """Verifies a run with its own recipe."""
    return verify(str(run), load_recipe(run / "recipe.yaml"), spans=spans)


def require_verified(run: Path, *, spans: int) -> None:
    """Requires that all spans of a run were replayed to the bit."""
    result = check(run)
    assert result.faults == []
    assert [one.difference for one in result.replayed] == [0.0] * spans


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with checkpoints at 2, 4 and 6, and its data and model."""
    folder = tmp_path_factory.mktemp("trained") / "all"
    train(dropout_recipe(folder))
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """A copy of the run, its data and its model, with a recipe that names these."""
    folder = tmp_path / "all"
    shutil.copytree(trained, folder)
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained), str(folder)))
    return folder


def edit_weight(folder: Path) -> None:
    """Adds 1e-6 to a bias of the model in a folder."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + 1e-6
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_line(path: Path, number: int, **values: Any) -> None:
    """Changes keys of a line of JSON."""
    entries = read_lines(path)[0]
    entries[number] |= values
    write_jsonl(path, entries)


def seal_again(folder: Path, **changes: Any) -> None:
    """Seals a state whose files were changed, with the same files."""
    content = read_seal(folder)
    with TemporaryDirectory(dir=folder.parent) as name:
        for file in filter(Path.is_file, map(folder.joinpath, content.pop("files"))):
            shutil.copy(file, name)
        seal(Path(name), content | changes)
        shutil.move(Path(name) / "SEALED.json", folder / "SEALED.json")


# --- a run that was not changed


def test_an_untouched_run_is_verified_and_its_files_say_so(place):
    card, written = place / "run" / "README.md", place / "run" / "verify.json"

    for _ in range(2):
        require_verified(place / "run", spans=3)

    content = json.loads(written.read_text())
    assert (content["valid"], content["spans"], content["steps"]) == (True, 3, 6)
    assert [one["steps"] for one in content["replayed"]] == [2, 2, 2]
    assert sorted(content["states"]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "the final model"]
    assert card.read_text().count("## Verification\n") == 1
    assert "3 of 3 spans were replayed, 6 of 6 steps" in card.read_text()
    assert "equal to the bit" in card.read_text()


def test_the_user_may_edit_the_card(place):
    card = place / "run" / "README.md"
    card.write_text(card.read_text() + "\nTrained on Tuesday.\n")

    assert check(place / "run", spans=0).is_valid
    assert "Trained on Tuesday.\n" in card.read_text()


def test_without_replays_nothing_is_said_about_them(place):
    result = check(place / "run", spans=0)

    assert result.sentence.endswith(" files match; nothing was replayed")


def test_a_number_of_spans_is_drawn(place):
    result = check(place / "run", spans=2)

    assert [one.steps for one in result.replayed] == [2, 2]


def test_a_run_that_was_moved_with_its_data_is_verified(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "elsewhere")
    recipe = load_recipe(tmp_path / "elsewhere" / "run" / "recipe.yaml")
    text = recipe_to_yaml(recipe).replace(str(trained), str(tmp_path / "elsewhere"))
    (tmp_path / "moved.yaml").write_text(text)

    result = verify(str(tmp_path / "elsewhere" / "run"), load_recipe(tmp_path / "moved.yaml"), spans=1)

    assert result.faults == []


def test_the_exit_code_tells_whether_something_differs(place, capsys):
    run = str(place / "run")

    assert main(["verify", run, "--spans", "1"]) == 0
    assert "verified  the hashes of " in capsys.readouterr().out
    (place / "run" / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    assert main(["verify", run]) == 6
    out = capsys.readouterr().out
    assert "differs   checkpoint-2: optimizer.pt has 0 bytes instead of " in out
    assert "refuted   1 difference; nothing was replayed" in out
    assert not json.loads((place / "run" / "verify.json").read_text())["valid"]
    assert "## Verification" not in (place / "run" / "README.md").read_text()


# --- damage


@pytest.mark.parametrize(
    ("folder", "name"),
    [("checkpoint-4", "checkpoint-4"), (".", "the final model")],
)
def test_a_changed_weight_is_found(place, folder, name):
    edit_weight(place / "run" / folder)

    faults = check(place / "run").faults

    assert faults == [f"{name}: model.safetensors has changed since it was saved (sha256)"]


def test_a_missing_file_is_found(place):
    (place / "run" / "checkpoint-4" / "scheduler.pt").unlink()

    assert check(place / "run").faults == ["checkpoint-4: scheduler.pt is missing"]


def test_a_missing_seal_is_found(place):
    (place / "run" / "SEALED.json").unlink()
    (place / "run" / "checkpoint-4" / "SEALED.json").unlink()

    assert check(place / "run").faults == [
        "checkpoint-4: not sealed: its save was interrupted",
        "the final model: SEALED.json is missing",
    ]


def test_a_changed_line_of_the_log_is_found_without_a_replay(place):
    edit_line(place / "run" / "metrics.jsonl", 3, grad_norm=0.5)

    (fault,) = check(place / "run", spans=0).faults

    assert fault.startswith("metrics.jsonl: grad_norm of step 3 is 0.5, and ")


def test_an_evaluation_after_the_last_save_belongs_to_the_run(place):
    """A run that was stopped in its last step evaluates when it is resumed."""
    folder = place / "run" / "checkpoint-6"

    def forget(state: dict[str, Any]) -> None:
        state["log_history"] = [
            event for event in state["log_history"] if event["step"] < 6 or "loss" in event
        ]

    edit_json(folder / "trainer_state.json", forget)
    seal_again(folder)

    assert check(place / "run").faults == []


def test_a_line_that_was_removed_from_the_log_is_found(place):
    path = place / "run" / "metrics.jsonl"
    write_jsonl(path, [entry for entry in read_lines(path)[0] if entry["step"] != 3])

    assert check(place / "run", spans=0).faults == ["metrics.jsonl: loss of step 3 is only in checkpoint-6"]


# --- other inputs


def test_a_changed_row_of_the_data_is_found(place):
    edit_line(place / "rows.jsonl", 6, label="q")

    (fault,) = check(place / "run").faults

    assert fault.startswith("checkpoint-2: it was trained on something else: data ('13 rows, sha256 ")


def test_a_changed_row_of_the_evaluation_is_found(tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", HELD_OUT)
    train(dropout_recipe(tmp_path, data={"eval": [held_out]}))
    edit_line(tmp_path / "held_out.jsonl", 1, label="q")

    assert check(tmp_path / "run").faults == [f"{held_out}: the rows of eval are not those of the run"]


def test_a_changed_key_of_the_recipe_is_found(place):
    path = place / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))

    (fault,) = check(place / "run").faults

    assert (
        fault
        == "recipe.yaml: differs from the recipe of the final model: train.learning_rate (0.01, now 0.02)"
    )


def test_a_changed_model_is_found(place):
    """The weights of the start are not sealed, but the first span begins with them."""
    edit_weight(place / "model")

    faults = check(place / "run").faults

    assert faults[0].startswith("checkpoint-2: the weights of the replay differ by ")


def test_a_value_changed_inside_a_cached_set_is_found(tmp_path):
    """The probes of both ends of a file do not see it."""
    with patch.object(store, "PROBE_BYTES", 64):
        train(dropout_recipe(tmp_path, data={"cache_dir": str(tmp_path / "cache")}))
        ids = b"".join(bytes([letter, 0, 0, 0]) for letter in b"say 7")  # as int32
        (path,) = [
            path for path in (tmp_path / "cache").rglob("*") if path.is_file() and ids in path.read_bytes()
        ]
        content = bytearray(path.read_bytes())
        at = content.find(ids)
        assert 64 < at < len(content) - 64
        content[at] = ord("r")
        path.write_bytes(content)

        faults = check(tmp_path / "run").faults

    assert len(faults) == 1
    assert faults[0].endswith("the prepared rows of train have changed")


# --- what was sealed again


def test_a_changed_weight_that_was_sealed_again_is_found(place):
    edit_weight(place / "run" / "checkpoint-4")
    seal_again(place / "run" / "checkpoint-4")

    faults = check(place / "run").faults

    assert faults[0].startswith("checkpoint-4: the weights of the replay differ by ")
    assert "transformer.ln_f.bias in model.safetensors, by up to 1e-06" in faults[0]


def test_a_changed_optimizer_that_was_sealed_again_is_found(place):
    path = place / "run" / "checkpoint-4" / "optimizer.pt"
    content = torch.load(path)
    content["state"][0]["exp_avg"].flatten()[0] += 1e-6
    torch.save(content, path)
    seal_again(path.parent)

    faults = check(place / "run").faults

    assert "checkpoint-4: optimizer.pt differs from the replay" in faults


def test_a_changed_recipe_inside_a_seal_is_found(place):
    folder = place / "run" / "checkpoint-4"
    recipe = read_seal(folder)["recipe"]
    seal_again(folder, recipe=recipe | {"train": recipe["train"] | {"learning_rate": 0.02}})

    faults = check(place / "run").faults

    assert faults[0].startswith("checkpoint-4: the weights of the replay differ by ")


def test_a_recipe_inside_a_seal_that_is_not_valid_is_found(place):
    folder = place / "run" / "checkpoint-4"
    seal_again(folder, recipe=read_seal(folder)["recipe"] | {"stage": "rlhf"})

    (fault,) = check(place / "run").faults

    assert f"checkpoint-4: {folder}: the sealed recipe is not valid here: stage: " in fault


def test_a_final_model_that_is_not_the_last_checkpoint_is_found(place):
    edit_weight(place / "run")
    seal_again(place / "run")

    assert check(place / "run", spans=0).faults == [
        "model.safetensors: the final model does not have the weights of checkpoint-6"
    ]


def test_a_log_that_was_changed_and_sealed_again_is_found(place):
    edit_line(place / "run" / "metrics.jsonl", 3, loss=1.0)
    for step in (4, 6):
        folder = place / "run" / f"checkpoint-{step}"
        edit_json(folder / "trainer_state.json", lambda state: state["log_history"][3].update(loss=1.0))
        seal_again(folder)

    (fault,) = check(place / "run").faults

    assert fault.startswith("metrics.jsonl: loss of step 3 is 1.0, and ")
    assert fault.endswith(" in the replay")


# --- kinds of runs


def test_a_run_without_checkpoints_is_replayed_from_the_start(tmp_path):
    train(dropout_recipe(tmp_path, train={"save_strategy": "no"}))

    require_verified(tmp_path / "run", spans=1)


def test_a_final_model_without_checkpoints_that_was_sealed_again_is_found(tmp_path):
    train(dropout_recipe(tmp_path, train={"save_strategy": "no"}))
    edit_weight(tmp_path / "run")
    seal_again(tmp_path / "run")

    (fault,) = check(tmp_path / "run").faults

    assert fault.startswith("the final model: the weights of the replay differ by ")


def test_checkpoints_that_were_deleted_do_not_matter(tmp_path):
    """Their log events remain, and the loss of the next event is the mean since then."""
    train(dropout_recipe(tmp_path, train={"logging_steps": 4, "save_total_limit": 2}))
    assert [entry["step"] for entry in read_lines(tmp_path / "run" / "metrics.jsonl")[0]] == [
        0,
        1,
        2,
        4,
        6,
        6,
        6,
    ]

    require_verified(tmp_path / "run", spans=2)


def test_checkpoints_with_the_model_only_are_replayed_from_the_start(tmp_path):
    train(dropout_recipe(tmp_path, train={"save_only_model": True}))

    result = check(tmp_path / "run")

    assert result.faults == []
    assert [(one.begin, one.steps) for one in result.replayed] == [("the start", n) for n in (2, 4, 6)]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "evaluation": {"data": {"eval_fraction": 0.2}, "train": EVALUATED},
    "epochs": {
        "data": {"eval_train_rows": 3, "eval_fraction": 0.2},
        "train": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 4}
        | {"eval_strategy": "epoch"},
    },
    "epochs in the log": {"train": {"logging_strategy": "epoch", "max_steps": 12, "save_steps": 5}},
    "plateau": {
        "data": {"eval_fraction": 0.2},
        "train": EVALUATED | {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
    },
    "left out": {"data": {"without": ["rows.jsonl:3"]}},
    "best fit": {"data": {"packing": "best_fit"}},
    "stream": {"data": {"packing": "stream", "max_length": 32}, "stage": "pretrain"},
    "budget": {"data": {"tokens_per_batch": 96}, "train": {"per_device_train_batch_size": 1}},
    "accumulation": {"train": {"gradient_accumulation_steps": 3}},
    "answers": {
        "data": {"eval_fraction": 0.2},
        "evaluation": {"generate": 2, "every": 2, "max_new_tokens": 3},
        "train": EVALUATED,
    },
    "stopped early": {
        "train": EVALUATED | {"max_steps": 12, "learning_rate": 1e-12, "load_best_model_at_end": True},
        "early_stopping": {"patience": 2, "threshold": 1.0},
        "data": {"eval_fraction": 0.2},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_replayed_to_the_bit(tmp_path, kind):
    train(dropout_recipe(tmp_path, **KINDS[kind]))

    result = check(tmp_path / "run")

    assert result.faults == []
    assert result.replayed
    assert {one.difference for one in result.replayed} == {0.0}


def test_several_evaluation_sets_are_compared(tmp_path):
    sets = {
        name: [write_jsonl(tmp_path / f"{name}.jsonl", HELD_OUT[:n])] for name, n in (("a", 2), ("gpu", 3))
    }
    train(dropout_recipe(tmp_path, data={"eval": sets}, train=EVALUATED))
    path = tmp_path / "run" / "metrics.jsonl"
    assert check(tmp_path / "run").faults == []
    number = next(
        i for i, entry in enumerate(read_lines(path)[0]) if entry["step"] == 4 and "eval_loss" in entry
    )

    edit_line(path, number, eval_gpu_loss=1.5)

    (fault,) = check(tmp_path / "run").faults
    assert fault.startswith("metrics.jsonl: eval_gpu_loss of step 4 is 1.5, and ")


def test_the_watched_training_rows_are_compared(tmp_path):
    data = {"eval_train_rows": 3, "eval_fraction": 0.2}
    train(dropout_recipe(tmp_path, data=data, train={"save_strategy": "no"}))
    path = tmp_path / "run" / "metrics.jsonl"
    number = [index for index, entry in enumerate(read_lines(path)[0]) if "eval_train_loss" in entry][-1]
    edit_line(path, number, eval_train_loss=1.5)

    (fault,) = check(tmp_path / "run").faults

    assert fault.startswith("metrics.jsonl: eval_train_loss of step 6 is 1.5, and ")


def test_a_changed_mean_of_an_epoch_is_found(tmp_path):
    train(dropout_recipe(tmp_path, train={"max_steps": 7}))
    path = tmp_path / "run" / "metrics.jsonl"
    number = next(i for i, entry in enumerate(read_lines(path)[0]) if "epoch_loss" in entry)
    edit_line(path, number, epoch_loss=1.0)

    assert check(tmp_path / "run", spans=0).faults == [
        "metrics.jsonl: epoch 1 has other means than its log events"
    ]


def test_the_best_model_is_compared_with_its_checkpoint(tmp_path):
    """With this learning rate, it is not the last one."""
    settings = EVALUATED | {"learning_rate": 1.0, "load_best_model_at_end": True}
    train(dropout_recipe(tmp_path, data={"eval_fraction": 0.2}, train=settings))
    run = tmp_path / "run"
    entries = read_lines(run / "metrics.jsonl")[0]
    losses = {entry["step"]: entry["eval_loss"] for entry in reversed(entries) if "eval_loss" in entry}
    best = min((2, 4, 6), key=lambda step: losses[step])
    assert best < 6
    result = check(run)
    assert (result.faults, result.steps) == ([], 6)
    assert [one.end for one in result.replayed] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    for name in ("model.safetensors", "config.json"):
        shutil.copy(run / "checkpoint-6" / name, run / name)
    seal_again(run)

    assert check(run, spans=0).faults == [
        f"model.safetensors: the final model does not have the weights of checkpoint-{best}"
    ]


def test_a_run_that_was_resumed_with_another_learning_rate_is_replayed_with_it(tmp_path):
    train(dropout_recipe(tmp_path, train={"max_steps": 4}))
    more = {"learning_rate": 1e-3, "max_steps": 6}
    train(dropout_recipe(tmp_path, train=more, resume_override=["learning_rate", "max_steps"]))

    require_verified(tmp_path / "run", spans=3)


def test_a_run_that_was_resumed_with_other_settings_may_be_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    train(dropout_recipe(before, train={"max_steps": 2}))
    more = {"learning_rate": 1e-3, "max_steps": 4}
    train(dropout_recipe(before, train=more, resume_override=["learning_rate", "max_steps"]))
    before.rename(after)
    recipe = after / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(before), str(after)))

    require_verified(after / "run", spans=2)


def test_a_resumed_run_is_replayed_across_the_place_where_it_was_resumed(tmp_path):
    train(dropout_recipe(tmp_path, train={"max_steps": 6}))
    run = tmp_path / "run"
    for name in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(run / name)
    for name in ("SEALED.json", "model.safetensors", "run.json"):
        (run / name).unlink()
    torch.manual_seed(987)  # a new process has another random state
    train(dropout_recipe(tmp_path, train={"max_steps": 6}))
    shutil.rmtree(run / "checkpoint-2")  # where it was resumed

    require_verified(run, spans=2)


def test_a_mixture_of_sources_is_replayed(tmp_path):
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", RECORDS), ("b", HELD_OUT))
    ]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    train(dropout_recipe(tmp_path, data={"train": sources}))

    require_verified(tmp_path / "run", spans=3)


def test_adapters_are_replayed(tmp_path):
    pytest.importorskip("peft")
    train(dropout_recipe(tmp_path, lora={"r": 2, "alpha": 4, "dropout": 0.1}))

    require_verified(tmp_path / "run", spans=3)


# --- another kind of machine


def test_another_machine_may_differ_a_little_and_is_named(place):
    """A processor that is named differently here, and rounds differently: a weight differs by 1e-6."""
    for step in (2, 4, 6):
        folder = place / "run" / f"checkpoint-{step}"
        seal_again(folder, machine={"device": "cpu, Other", "threads": 1})
    folder = place / "run" / "checkpoint-4"
    edit_weight(folder)
    seal_again(folder)

    result = check(place / "run")

    assert result.faults == []
    assert result.differs_in[0].startswith("device ('cpu, Other', now 'cpu, ")
    assert 0 < max(one.difference for one in result.replayed) < 1e-3
    assert (
        "on another machine or with other versions, the losses agree within 5%, and the weights of 3 spans "
        in result.sentence
    )


def test_on_another_machine_another_learning_rate_is_found(place):
    for step in (2, 4, 6):
        folder = place / "run" / f"checkpoint-{step}"
        recipe = read_seal(folder)["recipe"]
        recipe["train"]["learning_rate"] = 0.011
        seal_again(folder, machine={"device": "cpu, Other", "threads": 1}, recipe=recipe)
    edit = (
        (place / "run" / "recipe.yaml").read_text().replace("learning_rate: 0.01\n", "learning_rate: 0.011\n")
    )
    (place / "run" / "recipe.yaml").write_text(edit)
    seal_again(place / "run", recipe=read_seal(place / "run" / "checkpoint-6")["recipe"])

    faults = check(place / "run").faults

    assert "the weights of the replay differ by 0." in faults[0]


def test_the_difference_of_weights_is_relative_to_how_far_they_moved(tmp_path):
    """Before (0, 0), the run moved by 5 to (3, 4), and the replay ended 0.5 away."""
    weights = {"before": [0.0, 0.0], "run": [3.0, 4.0], "replay": [3.0, 4.5], "other": [3.0, 4.0, 0.0]}
    for name, values in weights.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    folders = {"before": tmp_path / "before", "run": tmp_path / "run"}

    difference, first = compare_weights(["model.safetensors"], **folders, replay=tmp_path / "replay")
    equal = compare_weights(["model.safetensors"], **folders, replay=tmp_path / "run")
    missing, _ = compare_weights(["other.safetensors"], **folders, replay=tmp_path / "replay")
    resized, _ = compare_weights(["model.safetensors"], **folders, replay=tmp_path / "other")

    assert (difference, first) == (0.1, "w in model.safetensors, by up to 0.5")
    assert equal == (0.0, "")
    assert missing == resized == float("inf")


def test_with_a_tolerance_only_losses_are_compared_and_counts_exactly():
    run = {(5, "loss"): {"step": 5, "loss": 2.0, "token_accuracy": 0.5, "tokens_seen": 90}}

    def differing(tolerance: float, **changes: float) -> int:
        other = {(5, "loss"): run[5, "loss"] | changes}
        return len(list(compare_logs(run, other, tolerance=tolerance, source="the replay")))

    assert [differing(0.0, token_accuracy=0.6), differing(0.05, token_accuracy=0.6)] == [1, 0]
    assert [differing(0.0, loss=2.01), differing(0.05, loss=2.01), differing(0.05, loss=2.3)] == [1, 0, 1]
    assert differing(0.05, tokens_seen=91) == 1


def test_the_spans_of_a_run_begin_at_the_last_state_that_can_be_resumed():
    folder, full = Path("run"), {"is_resumable": True}
    checkpoints = [
        State(step, folder / f"checkpoint-{step}", seal) for step, seal in ((2, full), (4, {}), (6, {}))
    ]

    spans = find_spans([State(0), *checkpoints, State(7, folder)])
    of_best = find_spans([State(0), *checkpoints, State(4, folder)])

    assert list(map(str, spans)) == [
        "the start to checkpoint-2",
        "checkpoint-2 to checkpoint-4",
        "checkpoint-2 to checkpoint-6",
        "checkpoint-2 to the final model",
    ]
    assert of_best == spans[:3]


# --- errors


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "contains no run.json" in capsys.readouterr().err


def test_a_run_that_has_saved_nothing_is_refused(place):
    run = place / "run"
    for path in [*run.glob("checkpoint-*")]:
        shutil.rmtree(path)
    (run / "SEALED.json").unlink()
    edit_json(run / "run.json", lambda record: record.update(status="failed"))

    with pytest.raises(
        RecipeError, match="the run has no sealed state; got status failed; fix: let it finish"
    ):
        check(run)


def test_a_finished_run_without_any_seal_is_refused(place):
    for path in [*(place / "run").rglob("SEALED.json")]:
        path.unlink()

    with pytest.raises(RecipeError, match="the final model has no seal, or a damaged one"):
        check(place / "run")


def test_a_streaming_run_is_refused(place):
    recipe = load_recipe(place / "run" / "recipe.yaml")
    streamed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": True})})

    with pytest.raises(RecipeError, match="a run that streams its data cannot be replayed"):
        verify(str(place / "run"), streamed, spans=1)


def test_a_run_of_two_processes_needs_two(place):
    for path in (place / "run").rglob("SEALED.json"):
        seal_again(path.parent, facts=read_seal(path.parent)["facts"] | {"processes": 2})

    with pytest.raises(
        RecipeError,
        match=r"got 1 instead of 2; fix: .*torchrun --nproc_per_node 2 -m hf_clm$",
    ):
        check(place / "run")


def test_a_run_that_was_resumed_from_another_folder_is_refused(place):
    """Its log begins after the steps of the other run."""
    settings = {"resume_from_checkpoint": str(place / "run" / "checkpoint-4")}
    recipe = load_recipe(place / "run" / "recipe.yaml")
    train(
        Recipe.model_validate(
            recipe.model_dump()
            | {"train": recipe.train | settings | {"output_dir": str(place / "second")}}
            | {"resume_override": ["model.name_or_path"]}
        )
    )

    with pytest.raises(
        RecipeError, match=r"resumed from another folder cannot be replayed; got .*checkpoint-4"
    ):
        check(place / "second")


def test_sharded_checkpoints_are_refused(place):
    folder = place / "run" / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    seal_again(folder)

    with pytest.raises(RecipeError, match="a run with sharded checkpoints cannot be replayed"):
        check(place / "run")


def test_a_span_that_is_too_long_for_another_machine_decides_by_its_losses_only(tmp_path):
    train(dropout_recipe(tmp_path, train={"max_steps": 60, "save_steps": 60}))
    run = tmp_path / "run"
    for folder in (run / "checkpoint-60", run):
        edit_weight(folder)
        seal_again(folder, machine={"device": "cpu, Other", "threads": 1})

    (only,) = check(run).replayed

    assert (only.steps, only.is_decided) == (60, False)
    assert only.outcome.endswith("too many steps to tell rounding from a change")


def test_a_run_with_a_trainer_of_its_own_is_refused(tmp_path):
    class Other(CLMTrainer):
        pass

    run(dropout_recipe(tmp_path), additions=Additions(trainer_class=Other))

    with pytest.raises(
        RecipeError, match=r"objects of its own in Python cannot be replayed; got trainer_class"
    ):
        check(tmp_path / "run")


def test_a_copy_that_is_read_only_is_verified_and_left_alone(trained, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    before = sorted(path.name for path in copy.iterdir())
    access = os.access  # for root, no folder is read-only
    monkeypatch.setattr(os, "access", lambda path, mode: path != copy and access(path, mode))

    assert check(copy).faults == []

    assert f"not written: {copy} is read-only" in capsys.readouterr().out
    assert sorted(path.name for path in copy.iterdir()) == before
