"""Data are prepared once, and later runs, commands and processes open the cached set."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
from helpers import byte_tokenizer
from prepared_sets import content_of, differing
from pyarrow import parquet

import hf_clm
from hf_clm.cli import main
from hf_clm.data.prepared import cache, chunks
from hf_clm.doctor.command import diagnose
from hf_clm.errors import DataError, EnvironmentFault, RecipeError
from hf_clm.pages.inspection import View, inspect
from hf_clm.recipe.recipe import Recipe, recipe_to_yaml
from hf_clm.training import prepare as module
from hf_clm.training.prepare import prepare, prepare_recipe
from hf_clm.training.run import train

# "say\n" is read (4 tokens), N letters and the end token are learned: 6, 7, 8 tokens.
RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in (1, 2, 3)]
SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
ROOT = str(Path(hf_clm.__file__).parents[1])


def build_recipe(folder: Path, records: list[Any] = RECORDS, **data: Any) -> Any:
    settings = {"cache_dir": str(folder / "cache"), "packing": "best_fit", **data}
    return helpers.build_recipe(folder, records, data=settings, train={"max_steps": 1}, overwrite=True)


def prepare_as(recipe: Any, *, local_rank: int = 0) -> Any:
    folder = recipe.train["output_dir"]
    arguments: Any = SimpleNamespace(
        seed=42, local_process_index=local_rank, process_index=local_rank, output_dir=folder
    )
    return prepare(recipe, byte_tokenizer(), arguments=arguments)


def refuse_work(monkeypatch) -> None:
    """Makes reading, tokenizing and certifying fail from here on."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("prepared again")

    for place in (module, cache):
        monkeypatch.setattr(place, "write_prepared", refuse)
    monkeypatch.setattr(chunks, "read_file_chunks", refuse)


def write_recipe(recipe: Recipe, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    return str(folder / "recipe.yaml")


def kept_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_the_second_time_nothing_is_read_tokenized_or_certified(tmp_path, monkeypatch):
    first = prepare_as(build_recipe(tmp_path))
    refuse_work(monkeypatch)

    second = prepare_as(build_recipe(tmp_path))

    key = first.proof.facts["prepared"]["key"]
    assert first.proof.lines[0].endswith(f" s, cached in {tmp_path / 'cache' / key}")
    assert second.proof.lines[0] == f"prepared  read from cache (key {key[:12]})"
    assert second.proof.lines[1:] == first.proof.lines[1:]
    assert second.proof.lines[3].startswith("          the labels of all 3 rows are certified (")
    assert [found.proof.facts["prepared"]["from_cache"] for found in (first, second)] == [False, True]
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
    path = tmp_path / "rows.jsonl"
    assert [(row["source"], row["fate"], row["kept_tokens"], row["rows"]) for row in first[3]] == [
        (f"{path}:1", "used", 6, [0]),
        (f"{path}:2", "used", 7, [0]),
        (f"{path}:3", "used", 8, [0]),
    ]


def test_data_are_prepared_again_after_a_single_letter_changes(tmp_path):
    first = prepare_as(build_recipe(tmp_path))
    recipe = build_recipe(tmp_path)
    path = Path(recipe.data.train[0].path)
    path.write_text(path.read_text().replace("xxx", "xyx"))

    second = prepare_as(recipe)

    assert second.proof.facts["prepared"]["from_cache"] is False
    assert [found.splits["train"].rows[2]["labels"][-4:] for found in (first, second)] == [
        [*b"xxx", 256],
        [*b"xyx", 256],
    ]


def test_data_that_fail_verification_are_not_cached(tmp_path):
    with pytest.raises(DataError):
        prepare_as(build_recipe(tmp_path, max_length=2, overflow="drop"))

    assert list((tmp_path / "cache").iterdir()) == []


# --- where it lies


def test_without_a_cache_the_set_is_stored_in_the_output_folder_and_reported_as_not_cached(tmp_path):
    prepared = prepare_as(build_recipe(tmp_path, cache_dir=None))

    assert prepared.stored.folder.parent == tmp_path / "run" / ".prepared"
    assert prepared.proof.lines[0].endswith(" s, not cached (data.cache_dir is null)")
    assert prepared.proof.facts["train"]["certificate"]["valid"]


def test_if_the_cache_is_not_writable_the_output_folder_is_used_with_a_note(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    recipe = build_recipe(tmp_path, cache_dir=str(tmp_path / "file" / "cache"))

    first = prepare_as(recipe)

    aside = tmp_path / "run" / ".prepared"
    assert first.stored.folder.parent == aside
    assert [line for line in first.proof.lines if line.startswith("note")] == [
        f"note      {tmp_path}/file/cache: Not a directory; the prepared data are stored in {aside} instead"
    ]
    refuse_work(monkeypatch)
    second = prepare_as(recipe)
    assert second.stored.folder == first.stored.folder


def test_a_set_in_a_read_only_cache_is_opened(tmp_path, monkeypatch):
    recipe = build_recipe(tmp_path)
    prepare_as(recipe)
    refuse_work(monkeypatch)
    monkeypatch.setattr(module, "require_writable", lambda folder: pytest.fail(f"{folder} was written to"))
    monkeypatch.setattr(Path, "mkdir", lambda *args, **options: pytest.fail("a folder was made"))

    assert prepare_as(recipe).proof.facts["prepared"]["from_cache"] is True


def test_if_neither_folder_is_writable_the_run_is_refused_before_preparing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    recipe = build_recipe(tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    output = {**recipe.train, "output_dir": str(tmp_path / "file" / "run")}
    recipe = recipe.model_copy(update={"train": output})
    refuse_work(monkeypatch)

    with pytest.raises(EnvironmentFault, match="cannot store prepared data"):
        prepare_as(recipe)


def test_another_process_waits_for_the_folder_without_a_barrier(tmp_path):
    recipe = build_recipe(tmp_path)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(prepare_as(recipe, local_rank=1)))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive()

    mine = prepare_as(recipe)
    waiting.join(timeout=10)

    theirs = found[0].splits["train"].rows
    assert [theirs[n] for n in range(3)] == [mine.splits["train"].rows[n] for n in range(3)]


# --- the command


def test_the_command_prints_what_it_did_and_train_uses_the_set(tmp_path, monkeypatch, capsys):
    recipe = build_recipe(tmp_path)

    assert main(["prepare", write_recipe(recipe, tmp_path)]) == 0

    lines = capsys.readouterr().out.splitlines()
    (folder,) = kept_in(tmp_path / "cache")
    assert lines[0].endswith(f"s, cached in {folder}")
    assert "train     1 rows, 21 tokens, 9 targets, 32.8% full" in lines
    assert [line[:6] for line in lines[-2:]] == ["stored", "time  "]
    assert lines[-2].endswith(f" MB in {folder}")
    assert not (tmp_path / "run").exists()
    refuse_work(monkeypatch)
    assert train(recipe)["status"] == "done"


def test_the_command_prints_how_sources_are_mixed(tmp_path):
    path = helpers.write_jsonl(tmp_path / "b.jsonl", RECORDS)
    recipe = build_recipe(tmp_path)
    sources = [{"path": source, "weight": 1.0} for source in (recipe.data.train[0].path, path)]

    lines = prepare_recipe(build_recipe(tmp_path, train=sources, mixing={"size": 4}))

    assert "mixed     the packed rows contain each label as often as its row was drawn" in lines
    assert any(line.startswith("train     1 rows, ") for line in lines)
    assert any("b.jsonl" in line for line in lines)


def test_the_command_refuses_to_prepare_without_a_cache(tmp_path):
    with pytest.raises(RecipeError, match="the prepared data would not be cached"):
        prepare_recipe(build_recipe(tmp_path, cache_dir=None))


def test_the_command_refuses_to_prepare_a_stream(tmp_path):
    recipe = build_recipe(tmp_path, streaming=True, packing=None)

    with pytest.raises(RecipeError, match="streamed data are not prepared in advance"):
        prepare_recipe(recipe)


def test_doctor_and_inspector_open_the_prepared_set(tmp_path, monkeypatch):
    recipe = build_recipe(tmp_path)
    path = write_recipe(recipe, tmp_path)
    before = inspect(path, [], view=View())
    prepare_recipe(recipe)
    refuse_work(monkeypatch)

    assert inspect(path, [], view=View()) == before
    assert diagnose(recipe, measure=False).problems == []


def test_a_trained_tokenizer_has_the_same_key_when_trained_again(tmp_path):
    changes = {
        "tokenizer": {"train": {"vocab_size": 270}},
        "model": {"name_or_path": None, "init": "scratch", "config": SCRATCH},
    }
    data = {"cache_dir": str(tmp_path / "cache")}
    recipe = helpers.build_recipe(tmp_path, RECORDS, data=data, **changes)

    first, second = prepare_recipe(recipe), prepare_recipe(recipe)

    assert "cached in" in first[0]
    assert "read from cache" in second[0]


# Dies when it has written two blocks of the training data, as by kill -9.
KILLED = """
import os, signal, sys
from hf_clm.data.prepared import chunks, parts

class Deadly(parts.TableWriter):
    def write(self, batch):
        super().write(batch)
        self.written = getattr(self, "written", 0) + 1
        if self.written == 2 and self.folder.name == "ledger":
            os.kill(os.getpid(), signal.SIGKILL)

parts.TableWriter = Deadly
chunks.BLOCK_BYTES, chunks.CHUNK_BYTES = 300, 100
from hf_clm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_after_a_killed_command_the_next_one_prepares_the_same_set_again(tmp_path, monkeypatch, capsys):
    records = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in range(1, 31)]
    path = write_recipe(build_recipe(tmp_path, records, eval_fraction=0.2), tmp_path)
    words = {
        name: ["prepare", path, "--data.cache_dir", str(tmp_path / name)] for name in ("killed", "alone")
    }
    environment = {**os.environ, "PYTHONPATH": ROOT}

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words["killed"]], env=environment, capture_output=True, check=False
    )

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert kept_in(tmp_path / "killed") == []
    assert len(list((tmp_path / "killed").glob(".partial-*/parts/train/rows/*.arrow"))) == 1
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 300)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    assert [main(words["killed"]), main(words["alone"])] == [0, 0]
    assert capsys.readouterr().out.count(" s, cached in ") == 2
    (found,), (expected,) = (kept_in(tmp_path / name) for name in words)
    assert found.name == expected.name
    assert differing(content_of(found), content_of(expected)) == []


def test_a_set_from_another_folder_with_the_same_data_is_opened_by_its_key(tmp_path, monkeypatch):
    """Like a cache that was filled on another machine."""
    prepare_recipe(build_recipe(tmp_path))
    (folder,) = kept_in(tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "other" / folder.name)
    shutil.rmtree(folder)
    refuse_work(monkeypatch)

    lines = prepare_recipe(build_recipe(tmp_path, cache_dir=str(tmp_path / "other")))

    assert lines[0].startswith("prepared  read from cache")


def test_prepare_reports_which_files_of_a_folder_are_read_even_from_the_cache(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    helpers.write_jsonl(folder / "train.jsonl", [{**record, "id": 1} for record in RECORDS])
    recipe = build_recipe(tmp_path)
    for path in (folder / "train.jsonl", folder):  # the same content, prepared of the file alone
        (folder / "test.jsonl").write_text('{"instruct": "a", "label": "b"}\n')
        (folder / "part-1").write_text("left out")
        source = recipe.data.train[0].model_copy(update={"path": str(path)})
        data = recipe.data.model_copy(update={"train": [source]})
        lines = prepare_as(recipe.model_copy(update={"data": data})).proof.lines

    assert lines[0].startswith("prepared  read from cache")
    assert lines[1:3] == [
        f"note      {folder}: read split train (train.jsonl); not read: test",
        f"note      1 file not read: {folder}/part-1",
    ]


def test_prepare_prints_which_files_are_not_read(tmp_path, monkeypatch):
    records = [{**record, "id": 1} for record in RECORDS]
    recipe = build_recipe(tmp_path, records)
    monkeypatch.setattr(module, "load_tokenizer_and_settle", lambda recipe, _: (byte_tokenizer(), recipe))
    monkeypatch.setattr(module, "build_model_config", lambda *args: None)

    assert "note      unused keys: id" in prepare_recipe(recipe)
