"""Data are prepared once; every later run, command and process opens what was kept."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
from helpers import byte_tokenizer
from pyarrow import parquet

from hf_clm.cli import main
from hf_clm.config import recipe_to_yaml
from hf_clm.data import build, cache
from hf_clm.doctor.command import diagnose
from hf_clm.errors import DataError, EnvironmentFault, RecipeError
from hf_clm.inspector.command import View, inspect
from hf_clm.parts import training_arguments
from hf_clm.training import prepare as module
from hf_clm.training import storing
from hf_clm.training.prepare import prepare, prepare_recipe
from hf_clm.training.run import train

# "say\n" is read (4 tokens), N letters and the end token are learned: 6, 7, 8 tokens.
RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in (1, 2, 3)]


def build_recipe(folder: Path, **data: Any) -> Any:
    settings = {"cache_dir": str(folder / "cache"), "packing": "best_fit", **data}
    return helpers.build_recipe(folder, RECORDS, data=settings, train={"max_steps": 1}, overwrite=True)


def prepare_as(recipe: Any, *, local_rank: int = 0) -> Any:
    arguments: Any = SimpleNamespace(
        seed=42, local_process_index=local_rank, process_index=local_rank, **unkept_barrier()
    )
    return prepare(recipe, byte_tokenizer(), arguments=arguments)


def unkept_barrier() -> dict[str, Any]:
    def refuse(**options: Any) -> Any:
        raise AssertionError("a kept preparation needs no barrier")

    return {"main_process_first": refuse}


def refuse_work(monkeypatch) -> None:
    """From here on nothing is read, tokenized or certified."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("prepared again")

    for name in ("load_splits", "build_split"):
        monkeypatch.setattr(cache, name, refuse)
    monkeypatch.setattr(module, "prove_data", refuse)
    monkeypatch.setattr(module, "store_whole", refuse)
    monkeypatch.setattr(build, "read_records", refuse)


def without_times(lines: list[str]) -> list[str]:
    return [line.split(" (")[0] for line in lines]


def test_the_second_time_nothing_is_read_tokenized_or_certified(tmp_path, monkeypatch):
    first = prepare_as(build_recipe(tmp_path))
    refuse_work(monkeypatch)

    second = prepare_as(build_recipe(tmp_path))

    key = first.proof.facts["prepared"]["key"]
    assert first.proof.lines[0].endswith(f" s, kept in {tmp_path / 'cache' / key}")
    assert second.proof.lines[0] == f"prepared  read from cache (key {key[:12]})"
    assert second.proof.lines[1:] == first.proof.lines[1:]
    assert without_times(second.proof.lines)[3] == "          the labels of all 3 rows are certified"
    assert [p.proof.facts["prepared"]["from_cache"] for p in (first, second)] == [False, True]
    assert second.proof.facts["train"] == first.proof.facts["train"]


def test_a_run_from_the_cache_writes_what_a_run_that_prepares_writes(tmp_path, monkeypatch):
    def run() -> tuple[Any, ...]:
        train(build_recipe(tmp_path))
        facts = json.loads((tmp_path / "run" / "run.json").read_text())
        ledger = parquet.read_table(tmp_path / "run" / "ledger.parquet").to_pylist()
        return facts["loss_after"], facts["train"], facts["proof"]["train"], ledger

    first = run()
    refuse_work(monkeypatch)

    assert run() == first
    assert [row["kept_tokens"] for row in first[3]] == [6, 7, 8]


def test_a_changed_letter_of_the_data_is_prepared_again(tmp_path):
    first = prepare_as(build_recipe(tmp_path))
    recipe = build_recipe(tmp_path)
    path = Path(recipe.data.train[0].path)
    path.write_text(path.read_text().replace("xxx", "xyx"))

    second = prepare_as(recipe)

    assert second.proof.facts["prepared"]["from_cache"] is False
    assert [split.rows[2]["labels"][-4:] for p in (first, second) for split in p.splits.values()] == [
        [*b"xxx", 256],
        [*b"xyx", 256],
    ]


def test_what_is_not_proved_is_not_kept(tmp_path, monkeypatch):
    def refuse(*args: Any, **options: Any) -> Any:
        raise DataError("not certified")

    monkeypatch.setattr(storing, "prove_stored", refuse)
    with pytest.raises(DataError):
        prepare_as(build_recipe(tmp_path))

    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_cache_the_data_are_prepared_and_proved_and_the_lines_say_so(tmp_path):
    recipe = build_recipe(tmp_path, cache_dir=None)

    prepared = prepare(recipe, byte_tokenizer(), arguments=training_arguments(recipe))

    assert prepared.stored is None
    assert prepared.proof.lines[0].endswith(" s, not kept (data.cache_dir is null)")
    assert prepared.proof.facts["train"]["certificate"]["valid"]


def test_another_process_waits_for_the_folder_without_a_barrier(tmp_path):
    recipe = build_recipe(tmp_path)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(prepare_as(recipe, local_rank=1)))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive()

    mine = prepare_as(recipe)
    waiting.join(timeout=10)

    theirs = found[0].splits["train"].rows.rows
    assert theirs.input_ids.tolist() == mine.splits["train"].rows.rows.input_ids.tolist()


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refuse_work(monkeypatch)

    with pytest.raises(EnvironmentFault, match="cannot keep prepared data"):
        prepare_as(build_recipe(tmp_path, cache_dir=str(tmp_path / "file" / "cache")))


def test_the_command_says_what_it_did_and_train_finds_it(tmp_path, monkeypatch, capsys):
    recipe = build_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))

    assert main(["prepare", str(tmp_path / "recipe.yaml")]) == 0

    lines = capsys.readouterr().out.splitlines()
    folder = next((tmp_path / "cache").iterdir())
    assert lines[0].endswith(f"s, kept in {folder}")
    assert "train     1 rows, 21 tokens, 9 targets, 32.8% full" in lines
    assert [line[:6] for line in lines[-2:]] == ["stored", "time  "]
    assert lines[-2].endswith(f" MB in {folder}")
    assert not (tmp_path / "run").exists()
    refuse_work(monkeypatch)
    assert train(recipe)["status"] == "done"


def test_the_command_refuses_where_nothing_would_be_kept(tmp_path):
    with pytest.raises(RecipeError, match="nothing would be kept"):
        prepare_recipe(build_recipe(tmp_path, cache_dir=None))


def test_doctor_and_inspector_open_what_was_prepared(tmp_path, monkeypatch):
    recipe = build_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    before = inspect(str(tmp_path / "recipe.yaml"), [], view=View())
    prepare_recipe(recipe)
    refuse_work(monkeypatch)

    assert inspect(str(tmp_path / "recipe.yaml"), [], view=View()) == before
    assert diagnose(recipe, measure=False).problems == []


def test_a_tokenizer_that_the_recipe_trains_has_the_same_key_again(tmp_path):
    changes = {"tokenizer": {"train": {"vocab_size": 270}}, "model": {"init": "scratch", "config": SCRATCH}}
    data = {"cache_dir": str(tmp_path / "cache")}
    recipe = helpers.build_recipe(tmp_path, RECORDS, data=data, **changes)

    first, second = prepare_recipe(recipe), prepare_recipe(recipe)

    assert "kept in" in first[0]
    assert "read from cache" in second[0]


SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
