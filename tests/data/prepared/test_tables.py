"""Arrow tables: datasets can open them, and mapped rows equal the written rows."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest

from hf_clm.data.label.labels import Fate
from hf_clm.data.prepared.block import LEDGER_SCHEMA, ROW_SCHEMA, WEIGHTED_ROW_SCHEMA
from hf_clm.data.prepared.tables import StoredLedger, StoredRows, TableWriter, read_batches, write_dict

BYTES_PER_ROW = 16
LINE = {"reason": "", "source": 0, "cut_tokens": 0, "kept_tokens": 3, "kept_targets": 2, "proved_rows": 1}


def rows_of(numbers: Any, *, is_weighted: bool = False) -> pyarrow.RecordBatch:
    """Returns a row of N tokens for each number N, with the weight N / 2."""
    content: dict[str, Any] = {
        "input_ids": [list(range(n)) for n in numbers],
        "labels": [[-100] * (n - 1) + [n] for n in numbers],
        "place": [f"a.jsonl:{n}" for n in numbers],
    }
    if is_weighted:
        content["weights"] = [[n / 2] * n for n in numbers]
    schema = WEIGHTED_ROW_SCHEMA if is_weighted else ROW_SCHEMA
    return pyarrow.RecordBatch.from_pydict(content, schema=schema)


def line_of(place: str, fate: str, **changes: Any) -> dict[str, Any]:
    counts = {"tokens": 3, "target_tokens": 2, "rows": 1, "spelled": None}
    return {"place": place, "fate": fate, **LINE, **counts, **changes}


def write_rows(folder: Path, *batches: pyarrow.RecordBatch) -> StoredRows:
    write(folder / "train", ROW_SCHEMA, *batches)
    count = sum(batch.num_rows for batch in batches)
    lines = [line_of(f"a.jsonl:{n}", "used") for n in range(count)]
    return StoredRows(folder / "train", write_ledger(folder / "ledger", lines))


def write(folder: Path, schema: pyarrow.Schema, *batches: pyarrow.RecordBatch) -> None:
    with TableWriter(folder, schema) as writer:
        for batch in batches:
            writer.write(batch)
    assert writer.rows == sum(batch.num_rows for batch in batches)


def write_ledger(folder: Path, lines: list[dict[str, Any]], names: Any = None) -> StoredLedger:
    parts = [lines[:2], lines[2:]]
    write(
        folder,
        LEDGER_SCHEMA,
        *(pyarrow.RecordBatch.from_pylist(part, schema=LEDGER_SCHEMA) for part in parts),
    )
    return StoredLedger(folder, names or {})


def test_datasets_opens_the_tables_of_a_folder(tmp_path):
    write(tmp_path / "train", ROW_SCHEMA, rows_of([1, 2]), rows_of([3]))
    write(tmp_path / "eval", ROW_SCHEMA, rows_of([4]))
    write_dict(tmp_path, ["train", "eval"])

    found = datasets.load_from_disk(str(tmp_path))

    assert isinstance(found, datasets.DatasetDict)
    assert {name: split.num_rows for name, split in found.items()} == {"train": 3, "eval": 1}
    assert found["train"].column_names == found["eval"].column_names == ["input_ids", "labels", "place"]
    assert found["train"][1:] == {
        "input_ids": [[0, 1], [0, 1, 2]],
        "labels": [[-100, 2], [-100, -100, 3]],
        "place": ["a.jsonl:2", "a.jsonl:3"],
    }
    assert found["eval"].features["labels"].feature.dtype == "int32"


@pytest.mark.parametrize("before", [0, 1, 30])
def test_late_weights_add_a_column_with_nulls_before(tmp_path, before):
    batches = [rows_of([1, 2])] * before + [rows_of([3, 1], is_weighted=True), rows_of([2])]
    rows = write_rows(tmp_path, *batches)

    found = datasets.load_from_disk(str(tmp_path / "train"))

    assert found.column_names == ["input_ids", "labels", "place", "weights"]
    assert found["weights"][-3:] == [[1.5] * 3, [0.5], None]
    assert all(weights is None for weights in found["weights"][:-3])
    assert rows[-3]["weights"] == [1.5] * 3
    assert [list(rows[n].get("weights", [])) for n in (-2, -1)] == [[0.5], [1.0, 1.0]]
    assert [path.name for path in (tmp_path / "train").glob("*.old")] == []


def test_equal_rows_have_equal_fingerprints(tmp_path):
    for name, numbers in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        write(tmp_path / name, ROW_SCHEMA, rows_of(numbers))

    prints = [datasets.load_from_disk(str(tmp_path / name))._fingerprint for name in "abc"]

    assert prints[0] == prints[1] != prints[2]


def test_batches_are_preserved_and_an_empty_table_can_be_opened(tmp_path):
    write(tmp_path / "a", ROW_SCHEMA, rows_of([1, 2]), rows_of([]), rows_of([3]))
    write(tmp_path / "b", ROW_SCHEMA)

    assert [batch.num_rows for batch in read_batches(tmp_path / "a" / "data-00000-of-00001.arrow")] == [
        2,
        0,
        1,
    ]
    assert len(datasets.load_from_disk(str(tmp_path / "b"))) == 0


def test_an_error_in_writing_leaves_no_table_that_datasets_opens(tmp_path):
    with pytest.raises(ValueError), TableWriter(tmp_path / "a", ROW_SCHEMA) as writer:
        writer.write(rows_of([1]))
        raise ValueError

    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path / "a"))


# --- rows


@pytest.mark.parametrize("is_weighted", [False, True])
def test_rows_are_indexed_like_a_list(tmp_path, is_weighted):
    rows = write_rows(tmp_path, rows_of([3, 1]), rows_of([2, 4, 3], is_weighted=is_weighted))

    assert len(rows) == 5
    assert rows.lengths.tolist() == [3, 1, 2, 4, 3]
    assert rows[3]["input_ids"] == rows[-2]["input_ids"] == [0, 1, 2, 3]
    assert rows[0]["labels"] == [-100, -100, 3]
    with pytest.raises(IndexError):
        rows[5]
    ids, labels, weights = rows.views(np.array([3, 0]), np.array([1, 0]), np.array([4, 2]))
    assert [part.tolist() for part in (*ids, *labels)] == [[1, 2, 3], [0, 1], [-100, -100, 4], [-100, -100]]
    expected = [[2.0] * 3, [1.0, 1.0]] if is_weighted else None
    assert (weights and [part.tolist() for part in weights]) == expected


def test_the_rows_are_read_only_views_of_the_file(tmp_path):
    rows = write_rows(tmp_path, rows_of([3]))

    (ids,), (labels,), _ = rows.views(np.array([0]), np.array([0]), np.array([3]))

    assert ids.dtype == labels.dtype == np.int32
    assert np.shares_memory(ids, rows.tokens)
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1


def test_the_blocks_are_as_written_and_can_be_read_again(tmp_path):
    rows = write_rows(tmp_path, rows_of([3, 1]), rows_of([2], is_weighted=True))

    for _ in range(2):  # what was read is given back to the system
        blocks = [(b.input_ids.tolist(), b.labels.tolist(), b.offsets.tolist()) for b in rows.blocks()]
        assert blocks == [([0, 1, 2, 0], [-100, -100, 3, 1], [0, 3, 4]), ([0, 1], [-100, 2], [0, 2])]
    assert [block.weights is None for block in rows.blocks()] == [True, False]


def test_an_empty_block_is_skipped(tmp_path):
    rows = write_rows(tmp_path, rows_of([]), rows_of([2]), rows_of([]), rows_of([3, 1]), rows_of([]))

    assert rows.lengths.tolist() == [2, 3, 1]
    assert [rows[n]["labels"][-1] for n in range(3)] == [2, 3, 1]
    assert [len(block) for block in rows.blocks()] == [1, 2]


def test_a_row_refers_to_its_record(tmp_path):
    write(tmp_path / "train", ROW_SCHEMA, rows_of([1, 2, 3]))
    counts = [0, 2, 0, 1]
    ledger = write_ledger(tmp_path / "ledger", [line_of(f"a:{n}", "used", rows=n) for n in counts])

    rows = StoredRows(tmp_path / "train", ledger)

    assert rows.sources.tolist() == [1, 1, 3]
    assert len(rows.fates) == 4


def test_opening_a_million_rows_takes_under_a_second_and_16_bytes_a_row(tmp_path):
    count = 1 << 20
    part = pyarrow.RecordBatch.from_pydict(
        {"input_ids": [[1, 2]] * 4096, "labels": [[1, 2]] * 4096, "place": ["a"] * 4096}, schema=ROW_SCHEMA
    )
    write(tmp_path / "train", ROW_SCHEMA, *[part] * (count // 4096))
    ledger = write_ledger(tmp_path / "ledger", [line_of("a", "used")])
    tracemalloc.start()
    started = time.perf_counter()

    rows = StoredRows(tmp_path / "train", ledger)

    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert seconds < 1
    assert peak / count < BYTES_PER_ROW


# --- ledger


LINES = [
    line_of("old.jsonl:1", "used", spelled=["<|pad|>", "<|pad|>"]),
    line_of("old.jsonl:2", "cut", cut_tokens=2, tokens=5, reason="left"),
    line_of(
        "old.jsonl:3", "unreadable", reason="old.jsonl:3: not valid JSON", tokens=0, target_tokens=0, rows=0
    ),
    line_of("old.jsonl:4", "dropped", reason="no target token", rows=0),
    line_of("old.jsonl:5", "duplicate", reason="of old.jsonl:1", rows=0),
    line_of("old.jsonl:6", "dropped", reason="no target token", spelled=["<|im_end|>"], rows=0),
]


def test_a_ledger_has_the_place_and_fate_of_each_record(tmp_path):
    ledger = write_ledger(tmp_path / "a", LINES)

    assert len(ledger) == 6
    assert list(ledger.places) == [f"old.jsonl:{n}" for n in range(1, 7)]
    assert (ledger.places[-1], ledger.places[1:3]) == ("old.jsonl:6", ["old.jsonl:2", "old.jsonl:3"])
    assert ledger.fates[1] == Fate("cut", "left", 2, 5, 2)
    assert (ledger.fates[1].tokens, ledger.fates[1].target_tokens) == (5, 2)
    assert ledger.where("dropped").tolist() == [3, 5]
    assert ledger.numbers("rows").tolist() == [1, 1, 0, 0, 0, 0]


def test_a_ledger_sums_up_fates_reasons_and_spelled_tokens(tmp_path):
    ledger = write_ledger(tmp_path / "a", LINES)

    assert ledger.totals == {
        ("used", ""): 1,
        ("cut", "left"): 1,
        ("unreadable", ""): 1,
        ("dropped", "no target token"): 2,
        ("duplicate", ""): 1,
    }
    assert ledger.spelled == {"<|pad|>": 2, "<|im_end|>": 1}


def test_a_renamed_file_is_reported_under_its_new_name(tmp_path):
    ledger = write_ledger(tmp_path / "a", LINES, {"old.jsonl": "new.jsonl", "old": "no"})

    assert list(ledger.places)[:2] == ["new.jsonl:1", "new.jsonl:2"]
    assert ledger.reasons("unreadable") == ["new.jsonl:3: not valid JSON"]
    assert ledger.reasons("duplicate") == ["of new.jsonl:1"]
    assert ledger.rename("a text that is no place of old.jsonl") == "a text that is no place of old.jsonl"


def test_places_in_many_files_are_renamed_without_trying_every_name(tmp_path):
    names = {f"d/{number}:a.txt": f"e/{number}:a.txt" for number in range(20_000)}
    ledger = write_ledger(tmp_path / "a", [line_of(f"{name}:1", "used") for name in names], names)
    started = time.process_time()

    places = list(ledger.places)

    assert places[-1] == "e/19999:a.txt:1"
    assert time.process_time() - started < 5  # a minute, where each name was tried for each place
