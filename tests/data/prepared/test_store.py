"""Prepared sets are written atomically, and opened only if they are unchanged."""

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import document, prompted, write_jsonl
from prepared_sets import content_of, differing, open_set, recipe_of, write_set
from pyarrow import parquet

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.labels import Fate
from hf_clm.data.prepared import store
from hf_clm.data.prepared.store import HEAD, LazyList, StoredSet, open_store, require_writable
from hf_clm.data.proof.ledger import LedgerSplit, write_ledger
from hf_clm.data.split import Split
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.schema import Chat, Document, Segment, Tokens, example_from_json

KINDS = [
    {"text": "hello"},
    {"prompt": "p <|pad|>", "completion": "q"},
    {"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
RECORDS = [{"prompt": "say", "completion": "x" * n} for n in range(1, 7)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def seen(split: Split) -> dict[str, Any]:
    """Returns the facts about a split."""
    rows = [{key: list(map(int, values)) for key, values in row.items()} for row in split.dataset]
    return {
        "rows": rows,
        "fates": list(split.ledger.fates),
        "places": list(split.ledger.places),
        "origins": split.examples.origins.tolist(),
        "sources": split.stored.sources.tolist(),
        "examples": list(split.examples.examples),
        "counts": (split.tokens, split.target_tokens, split.fates, split.least_id),
        "ids": (split.id_counts.tolist(), split.label_counts.tolist()),
    }


def ledger_of(stored: StoredSet) -> list[dict[str, Any]]:
    """Returns the ledger that a run would write."""
    splits = stored.splits.items()
    packed = {name: s.dataset if isinstance(s.dataset, PackedDataset) else None for name, s in splits}
    write_ledger(Path("ledger.parquet"), {name: LedgerSplit(s.ledger, packed[name]) for name, s in splits})
    return parquet.read_table("ledger.parquet").to_pylist()


@pytest.mark.parametrize("packing", ["none", "best_fit", "stream"])
def test_a_reopened_set_equals_the_one_that_was_made(packing):
    write_jsonl(Path("a.jsonl"), [*RECORDS, {"prompt": "p" * 70, "completion": "cut"}, RECORDS[0]])
    stage = "pretrain" if packing == "stream" else "sft"
    recipe = recipe_of(["a.jsonl"], stage=stage, packing=packing, eval_fraction=0.25, duplicates="drop")
    made = write_set(recipe).splits

    found = open_set(recipe)

    assert found is not None
    assert list(found.splits) == ["train", "eval"]
    assert {name: seen(split) for name, split in found.splits.items()} == {
        name: seen(split) for name, split in made.items()
    }
    assert [len(split.ledger) for split in made.values()] == [6, 2]
    assert isinstance(found.splits["train"].dataset, PackedDataset) == (packing != "none")


def test_reading_counts_and_the_proof_are_restored():
    lines = [json.dumps(record) for record in RECORDS]
    spelling = {**RECORDS[0], "more": 1, "prompt": "<|pad|>"}
    Path("a.jsonl").write_text("\n".join([*lines, "{", "", json.dumps(spelling)]))
    recipe = recipe_of(["a.jsonl"], on_bad_record="drop")
    made = write_set(recipe)

    found = open_set(recipe)

    assert found is not None
    split = found.splits["train"]
    assert found.proof == made.proof
    assert found.proof["facts"]["train"]["certificate"]["rows"] == 7
    assert (split.examples.report.blank_lines, split.examples.report.records) == (1, 7)
    assert [line[:11] for line in split.examples.report.bad_lines] == ["a.jsonl:7: "]
    assert (split.examples.formats, split.examples.unknown_keys) == ({"prompt_completion"}, {"more"})
    assert split.ledger.spelled == split.stored.control_texts == {"<|pad|>": 1}
    assert list(split.ledger.places)[-2:] == ["a.jsonl:7", "a.jsonl:9"]


def test_fates_are_restored_with_their_sizes():
    write_jsonl(Path("a.jsonl"), [RECORDS[0], {"prompt": "p" * 20, "completion": "x"}])

    first, second = write_set(recipe_of(["a.jsonl"], max_length=16)).splits["train"].ledger.fates

    assert (first.kind, first.tokens, first.target_tokens) == ("used", 5, 2)
    assert (second, second.tokens, second.target_tokens) == (Fate("cut", "", 6, 22, 2), 22, 2)


def test_every_kind_of_example_is_stored_without_reading_data_files():
    files = [write_jsonl(Path(f"{number}.jsonl"), [record]) for number, record in enumerate(KINDS)]
    recipe = recipe_of(files)
    write_set(recipe)

    def refuse(name: str) -> Any:
        raise AssertionError("no file is needed")

    found = open_store(Path("cache/key"), recipe, files=files, load_examples=refuse)

    assert found is not None
    assert found.splits["train"].examples.examples[:4] == [
        document("hello"),
        prompted("p <|pad|>", "q"),
        Document([Segment("a", False), Segment("b", True)]),
        Tokens([1, 2, 3], [-100, 2, 3], [3]),
    ]
    assert found.splits["train"].examples.origins.tolist() == [0, 1, 2, 3]
    chat = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "train": True}])
    assert example_from_json(json.loads(json.dumps(asdict(chat)))) == chat


def test_later_examples_are_read_on_demand():
    write_jsonl(Path("a.jsonl"), [{"text": str(n)} for n in range(HEAD + 50)])
    recipe = recipe_of(["a.jsonl"])
    write_set(recipe)
    reads = []

    def load(name: str) -> Any:
        reads.append(name)
        return [document(str(n)) for n in range(HEAD + 50)]

    found = open_store(Path("cache/key"), recipe, files=["a.jsonl"], load_examples=load)

    assert found is not None
    examples = found.splits["train"].examples
    assert (len(examples), examples.examples[HEAD - 1], reads) == (HEAD + 50, document("199"), [])
    assert [examples.examples[n] for n in (HEAD, -1)] == [document("200"), document("249")]
    assert reads == ["train"]


def test_data_changed_since_preparation_are_detected():
    write_jsonl(Path("a.jsonl"), [{"text": str(n)} for n in range(HEAD + 50)])
    recipe = recipe_of(["a.jsonl"])
    found = write_set(recipe)
    write_jsonl(Path("a.jsonl"), [{"text": "other"}])

    with pytest.raises(DataError, match="the data changed during the run; got 1 records instead of 250"):
        list(found.splits["train"].examples.examples)


def test_renamed_files_are_reported_under_their_current_names():
    lines = [json.dumps(record) for record in (RECORDS[0], RECORDS[0], RECORDS[1])]
    Path("old.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    options: Any = {"on_bad_record": "drop", "duplicates": "drop"}
    write_set(recipe_of(["old.jsonl"], **options))
    Path("old.jsonl").rename("new.jsonl")

    found = open_set(recipe_of(["new.jsonl"], **options), files=["new.jsonl"])

    assert found is not None
    examples = found.splits["train"].examples
    assert list(examples.places) == [f"new.jsonl:{number}" for number in (1, 2, 3, 4)]
    assert examples.report.files == ["new.jsonl"]
    assert [line[:13] for line in examples.report.bad_lines] == ["new.jsonl:2: "]
    assert [(row["split"], row["source"], row["fate"], row["reason"][:14]) for row in ledger_of(found)] == [
        ("train", "new.jsonl:1", "used", ""),
        ("train", "new.jsonl:2", "unreadable", "not valid JSON"),
        ("train", "new.jsonl:3", "duplicate", "of new.jsonl:1"),
        ("train", "new.jsonl:4", "used", ""),
    ]


# --- damage, and concurrent writers


@pytest.mark.parametrize(
    "name",
    [
        "train/data-00000-of-00001.arrow",
        "train/packed_stops.npy",
        "train/label_counts.npy",
        "train/state.json",
        "ledger/train/data-00000-of-00001.arrow",
        "prepared.json",
    ],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_set_is_not_opened_and_is_replaced(name, damage):
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of(["a.jsonl"])
    write_set(recipe)
    path, before = Path("cache/key", name), content_of(Path("cache/key"))
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(
        content[:-5] if damage == "cut" else content[:-5] + b"?" * 5
    )

    assert open_set(recipe, files=["a.jsonl"]) is None
    write_set(recipe)

    assert differing(content_of(Path("cache/key")), before) == []
    assert open_set(recipe) is not None
    assert [folder.name for folder in Path("cache").iterdir() if folder.name == "key"] == ["key"]


@pytest.mark.parametrize("change", ['{"files": []}', "{}", "[]", "null", "no json"])
def test_an_index_that_does_not_match_its_files_is_rejected(change):
    write_jsonl(Path("a.jsonl"), RECORDS)
    write_set(recipe_of(["a.jsonl"]))
    Path("cache/key/prepared.json").write_text(change)

    assert open_set(recipe_of(["a.jsonl"]), files=["a.jsonl"]) is None


def test_a_changed_number_in_the_index_is_detected():
    write_jsonl(Path("a.jsonl"), RECORDS)
    write_set(recipe_of(["a.jsonl"]))
    index = Path("cache/key/prepared.json")
    text = index.read_text()
    index.write_text(text.replace('"records": 6', '"records": 7'))

    assert index.read_text() != text
    assert open_set(recipe_of(["a.jsonl"]), files=["a.jsonl"]) is None


def test_a_missing_set_is_not_opened():
    assert open_set(recipe_of(["a.jsonl"]), files=["a.jsonl"]) is None


def test_an_unproved_set_leaves_no_files():
    write_jsonl(Path("a.jsonl"), RECORDS)

    with pytest.raises(DataError):
        write_set(recipe_of(["a.jsonl"], max_length=2, overflow="drop"))

    assert list(Path("cache").iterdir()) == []


def test_unfinished_folders_are_removed_after_a_day(monkeypatch):
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of(["a.jsonl"])
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(store.shutil, "rmtree", lambda *args, **options: None)
        killed.setattr(store, "_rename", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        write_set(recipe)
    left = list(Path("cache").iterdir())

    assert open_set(recipe, files=["a.jsonl"]) is None
    assert [path.name.startswith(".partial-") for path in left] == [True]
    write_set(recipe)
    assert left[0].exists()
    monkeypatch.setattr(store, "STALE_SECONDS", -1)
    write_set(recipe, Path("cache/other"))
    assert sorted(path.name for path in Path("cache").iterdir()) == ["key", "other"]


def test_folders_still_being_written_are_kept_at_any_age():
    write_jsonl(Path("a.jsonl"), RECORDS)
    folders = [Path("cache") / f".partial-{name}" for name in ("written", "left")]
    for folder in folders:
        (folder / "parts").mkdir(parents=True)
        (folder / "parts" / "data.arrow").touch()
        os.utime(folder / "parts", (0, 0))
        os.utime(folder, (0, 0))
    os.utime(folders[1] / "parts" / "data.arrow", (0, 0))

    write_set(recipe_of(["a.jsonl"]))

    assert [folder.exists() for folder in folders] == [True, False]


def test_concurrent_preparations_of_one_set_all_succeed():
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of(["a.jsonl"])
    barrier, failures = threading.Barrier(4), []

    def run() -> None:
        try:
            barrier.wait()
            write_set(recipe)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert [path.name for path in Path("cache").iterdir()] == ["key"]
    assert open_set(recipe) is not None


def test_a_set_is_readable_by_other_users():
    write_jsonl(Path("a.jsonl"), RECORDS)

    folder = write_set(recipe_of(["a.jsonl"])).folder

    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_size_of_a_set_is_that_of_its_files():
    write_jsonl(Path("a.jsonl"), RECORDS)

    stored = write_set(recipe_of(["a.jsonl"]))

    paths = [path for path in stored.folder.rglob("*") if path.is_file()]
    assert stored.size_bytes == sum(len(path.read_bytes()) for path in paths) > 1000


def test_a_cache_that_cannot_be_written_is_an_error_of_the_environment():
    Path("file").touch()

    with pytest.raises(EnvironmentFault) as error:
        require_writable(Path("file/cache"))

    assert str(error.value) == (
        "file/cache: cannot store prepared data; got Not a directory; "
        "fix: set data.cache_dir to another folder, or to null to disable the cache"
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
