"""Prepared sets are written whole, opened as they were, and not opened when they are not."""

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer, document, prompted, write_jsonl
from pyarrow import parquet

from hf_clm.config import Recipe
from hf_clm.data import store
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.cache import build_splits, load_named
from hf_clm.data.label.labels import Fate
from hf_clm.data.proof.ledger import build_ledger, write_ledgers
from hf_clm.data.store import HEAD, LazyList, open_store, require_writable, write_store
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.schema import Chat, Document, Segment, Tokens, example_from_json

KINDS = [
    {"text": "hello"},
    {"prompt": "p <|pad|>", "completion": "q"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "train": True}]},
    {"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
RECORDS = [{"prompt": "say", "completion": "x" * n} for n in range(1, 7)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build_recipe(files: list[str], **data: Any) -> Recipe:
    stage = "pretrain" if data.get("packing") == "stream" else "sft"
    sections = {"stage": stage, "model": {"name_or_path": "m"}, "train": {"output_dir": "run"}}
    return Recipe.model_validate({**sections, "data": {"train": files, "max_length": 16, **data}})


def make(recipe: Recipe) -> dict[str, Any]:
    return build_splits(recipe, byte_tokenizer(), loaded=load_named(recipe, 0))


def save(recipe: Recipe, *, files: list[str], folder: str = "cache/key", proof: Any = None) -> dict[str, Any]:
    """What was made and written."""
    splits = make(recipe)

    def write_ledger(path: Path) -> None:
        ledgers = {}
        for name, split in splits.items():
            packed = split.dataset if isinstance(split.dataset, PackedDataset) else None
            examples = split.examples
            lost = {"unreadable": examples.report.bad_lines, "duplicates": examples.duplicates}
            ledgers[name] = build_ledger(split.rows.rows, examples.places, packed=packed, **lost)
        write_ledgers(ledgers, path)

    write_store(Path(folder), splits, files=files, proof=proof, write_ledger=write_ledger)
    return splits


def open_(recipe: Recipe, *, files: list[str], folder: str = "cache/key", load: Any = None) -> Any:
    return open_store(
        Path(folder), recipe, files=files, load_examples=load or (lambda: load_named(recipe, 0))
    )


def rows_of(dataset: Any) -> list[dict[str, list[int]]]:
    return [{key: list(map(int, values)) for key, values in dataset[i].items()} for i in range(len(dataset))]


@pytest.mark.parametrize("packing", ["none", "best_fit", "stream"])
def test_what_is_opened_is_what_was_made(packing):
    write_jsonl(Path("a.jsonl"), [*RECORDS, {"prompt": "p" * 20, "completion": "cut"}, RECORDS[0]])
    recipe = build_recipe(["a.jsonl"], packing=packing, eval_fraction=0.25, duplicates="drop")
    made = save(recipe, files=["a.jsonl"])

    found = open_(recipe, files=["a.jsonl"]).splits

    assert list(found) == ["train", "eval"]
    for name, split in made.items():
        assert rows_of(found[name].dataset) == rows_of(split.dataset)
        assert rows_of(found[name].rows) == rows_of(split.rows)
        assert list(found[name].rows.rows.fates) == split.rows.rows.fates
        assert found[name].rows.rows.sources.tolist() == split.rows.rows.sources.tolist()
        assert list(found[name].examples.places) == split.examples.places
        assert list(found[name].examples.examples) == split.examples.examples
        assert (found[name].tokens, found[name].fates) == (split.tokens, split.fates)


def test_the_arrays_are_maps_of_files_that_cannot_be_changed():
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])

    rows = open_(recipe, files=["a.jsonl"]).splits["train"].rows.rows

    assert rows.input_ids.dtype == rows.labels.dtype == "int32"
    with pytest.raises(ValueError, match="read-only"):
        rows.labels[0] = 1


def test_counts_of_reading_and_the_proof_come_back(tmp_path):
    lines = [json.dumps(record) for record in RECORDS]
    Path("a.jsonl").write_text(
        "\n".join([*lines, "{", "", json.dumps({**RECORDS[0], "more": 1, "prompt": "<|pad|>"})])
    )
    recipe = build_recipe(["a.jsonl"], on_bad_record="drop", max_dropped=0.5)
    save(recipe, files=["a.jsonl"], proof={"lines": ["certified"]})

    found = open_(recipe, files=["a.jsonl"])

    split = found.splits["train"]
    assert found.proof == {"lines": ["certified"]}
    assert split.examples.report.blank_lines == 1
    assert [line[:11] for line in split.examples.report.bad_lines] == ["a.jsonl:7: "]
    assert (split.examples.formats, split.examples.unknown_keys) == ({"prompt_completion"}, {"more"})
    assert split.rows.rows.control_texts == {"<|pad|>": 1}
    assert split.examples.places[6] == "a.jsonl:9"


def test_every_kind_of_example_is_kept_and_read_from_no_file():
    files = [write_jsonl(Path(f"{n}.jsonl"), [record]) for n, record in enumerate(KINDS)]
    recipe = build_recipe(files[:2] + files[3:])
    save(recipe, files=files[:2] + files[3:])

    def refuse() -> Any:
        raise AssertionError("no file is needed")

    found = open_(recipe, files=files[:2] + files[3:], load=refuse).splits["train"]

    assert found.examples.examples[:9] == [
        document("hello"),
        prompted("p <|pad|>", "q"),
        Document([Segment("a", False), Segment("b", True)]),
        Tokens([1, 2, 3], [-100, 2, 3], [3]),
    ]
    chat = Chat(KINDS[2]["messages"])
    assert example_from_json(json.loads(json.dumps(asdict(chat)))) == chat


def test_examples_behind_the_first_are_read_when_they_are_asked_for():
    write_jsonl(Path("a.jsonl"), [{"text": str(n)} for n in range(HEAD + 50)])
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])
    reads = []

    def load() -> Any:
        reads.append(1)
        return load_named(recipe, 0)

    examples = open_(recipe, files=["a.jsonl"], load=load).splits["train"].examples

    assert (len(examples), examples.examples[HEAD - 1], reads) == (HEAD + 50, document("199"), [])
    assert [examples.examples[n] for n in (HEAD, -1)] == [document("200"), document("249")]
    assert reads == [1]


def test_data_that_changed_since_are_not_taken_for_those_that_were_prepared():
    write_jsonl(Path("a.jsonl"), [{"text": str(n)} for n in range(HEAD + 50)])
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])
    write_jsonl(Path("a.jsonl"), [{"text": "other"}])

    with pytest.raises(DataError, match="the data changed during the run; got 1 rows where there were 250"):
        list(open_(recipe, files=["a.jsonl"]).splits["train"].examples.examples)


def test_the_same_content_under_another_name_is_named_as_it_is_now(tmp_path):
    lines = [json.dumps(RECORDS[0]), "{", json.dumps(RECORDS[0]), json.dumps(RECORDS[1])]
    Path("old.jsonl").write_text("\n".join(lines))
    options = {"on_bad_record": "drop", "max_dropped": 0.5, "duplicates": "drop"}
    save(build_recipe(["old.jsonl"], **options), files=["old.jsonl"])
    Path("new.jsonl").write_text("\n".join(lines))

    found = open_(build_recipe(["new.jsonl"], **options), files=["new.jsonl"])
    found.write_ledger(tmp_path / "ledger.parquet")

    examples = found.splits["train"].examples
    assert list(examples.places) == ["new.jsonl:1", "new.jsonl:4"]
    assert list(examples.duplicates) == ["new.jsonl:3"]
    assert examples.report.files == ["new.jsonl"]
    assert [line[:13] for line in examples.report.bad_lines] == ["new.jsonl:2: "]
    ledger = parquet.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [(row["split"], row["source"], row["fate"]) for row in ledger] == [
        ("train", "new.jsonl:1", "used"),
        ("train", "new.jsonl:4", "used"),
        ("train", "new.jsonl:2", "unreadable"),
        ("train", "new.jsonl:3", "duplicate"),
    ]


def test_the_ledger_is_kept_with_the_set(tmp_path):
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])

    open_(recipe, files=["a.jsonl"]).write_ledger(tmp_path / "ledger.parquet")

    assert (tmp_path / "ledger.parquet").read_bytes() == Path("cache/key/ledger.parquet").read_bytes()


@pytest.mark.parametrize(
    "name", ["train.labels.npy", "train.pieces.stops.npy", "ledger.parquet", "prepared.json"]
)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_set_is_not_opened_and_is_replaced(name, damage):
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])
    path = Path("cache/key", name)
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(
        content[:-5] if damage == "cut" else content[:-5] + b"?" * 5
    )

    assert open_(recipe, files=["a.jsonl"]) is None
    save(recipe, files=["a.jsonl"])

    assert path.read_bytes() == content
    assert open_(recipe, files=["a.jsonl"]) is not None


def test_what_is_not_there_is_not_opened():
    assert open_(build_recipe(["a.jsonl"]), files=["a.jsonl"]) is None


def test_a_process_that_is_killed_while_writing_leaves_nothing_that_is_opened(monkeypatch):
    """And what it left is removed a day later."""
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = build_recipe(["a.jsonl"])
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(store.shutil, "rmtree", lambda *args, **options: None)
        killed.setattr(store, "_rename", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        save(recipe, files=["a.jsonl"])
    left = list(Path("cache").iterdir())

    assert open_(recipe, files=["a.jsonl"]) is None
    assert [path.name.startswith(".partial-") for path in left] == [True]
    save(recipe, files=["a.jsonl"])
    assert left[0].exists()
    monkeypatch.setattr(store, "STALE_SECONDS", -1)
    save(recipe, files=["a.jsonl"], folder="cache/other")
    assert sorted(path.name for path in Path("cache").iterdir()) == ["key", "other"]


def test_what_is_still_written_to_is_left_however_old_the_folder_is():
    write_jsonl(Path("a.jsonl"), RECORDS)
    folders = [Path("cache") / f".partial-{name}" for name in ("written", "left")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "train.input_ids.npy").touch()
        os.utime(folder, (0, 0))
    os.utime(folders[1] / "train.input_ids.npy", (0, 0))

    save(build_recipe(["a.jsonl"]), files=["a.jsonl"])

    assert [folder.exists() for folder in folders] == [True, False]


def test_two_that_prepare_the_same_at_once_both_end_well():
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = build_recipe(["a.jsonl"])
    barrier, failed = threading.Barrier(4), []

    def run() -> None:
        try:
            barrier.wait()
            save(recipe, files=["a.jsonl"])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    assert [path.name for path in Path("cache").iterdir()] == ["key"]
    assert open_(recipe, files=["a.jsonl"]) is not None


def test_a_cache_that_cannot_be_written_is_an_error_of_the_environment():
    Path("file").touch()

    with pytest.raises(EnvironmentFault) as error:
        require_writable(Path("file/cache"))

    assert str(error.value) == (
        "file/cache: cannot keep prepared data; got Not a directory; "
        "fix: name another data.cache_dir, or null to keep nothing"
    )


def test_a_lazy_list_is_indexed_like_a_list():
    plain = list(range(10))
    lazy = LazyList(10, lambda: plain, head=plain[:4])

    for index in (0, 3, 4, -1, -10, slice(3), slice(2, 6), slice(-8, -6), slice(None, None, -1), slice(5, 5)):
        assert lazy[index] == plain[index]
    for index in (10, -11):
        with pytest.raises(IndexError):
            lazy[index]
    assert (len(lazy), list(lazy), 7 in lazy) == (10, plain, True)


def test_fates_come_back_with_their_sizes():
    write_jsonl(Path("a.jsonl"), [RECORDS[0], {"prompt": "p" * 20, "completion": "x"}])
    recipe = build_recipe(["a.jsonl"])
    save(recipe, files=["a.jsonl"])

    first, second = open_(recipe, files=["a.jsonl"]).splits["train"].rows.rows.fates

    assert (first, first.tokens, first.target_tokens) == (Fate("used"), 5, 2)
    assert (second, second.tokens, second.target_tokens) == (Fate("cut", cut_tokens=6), 22, 2)
