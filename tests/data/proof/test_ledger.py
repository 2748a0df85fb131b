"""The ledger: every input row with its fate, totals that balance, training rows among the evaluation rows."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import byte_tokenizer, document, prompted, prove_records
from pyarrow import parquet

from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.data.proof.ledger import (
    Ledger,
    LedgerRow,
    build_ledger,
    check_balance,
    check_leakage,
    find_duplicates,
    measure_leakage,
    write_ledgers,
)
from hf_clm.errors import DataError, ExitCode
from hf_clm.schema import Chat, Document, Segment, Tokens
from hf_clm.training.proof import Proof

# "say\n" is read (4 tokens); 2, 4, 8 and 20 letters and the end token are learned: 7, 9, 13 and 25 tokens.
EXAMPLES = [prompted("say\n", "x" * n) for n in (2, 4, 8, 20)]
LONG = prompted("please say it again\n", "yes")  # 20 + 3 + 1
PLACES = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]


def build(examples: list[Any], *, pack: bool = False, stage: str = "sft", **options: Any):
    """Ledger, tokenized rows and packed rows."""
    make = {"sft": SFTDataset, "pretrain": PretrainDataset}[stage]
    dataset = make(examples, byte_tokenizer(), **options)
    packed = PackedDataset(dataset, max_length=16) if pack else None
    return build_ledger(dataset.rows, PLACES[: len(examples)], packed=packed), dataset.rows, packed


def fates(ledger: Ledger) -> list[tuple[str, str, list[int]]]:
    return [(row.fate, row.reason, row.rows) for row in ledger.rows]


# --- what is entered


def test_each_row_has_its_place_its_fate_and_its_sizes_before_and_after():
    ledger, rows, _ = build([*EXAMPLES, LONG], max_length=13)

    assert ledger.rows == [
        LedgerRow(0, "a.jsonl:1", "used", "", 7, 3, 7, 3, rows=[0]),
        LedgerRow(1, "a.jsonl:2", "used", "", 9, 5, 9, 5, rows=[1]),
        LedgerRow(2, "a.jsonl:3", "used", "", 13, 9, 13, 9, rows=[2]),
        LedgerRow(3, "a.jsonl:4", "dropped", "no whole target fits in max_length", 25, 21, 0, 0, rows=[]),
        LedgerRow(4, "a.jsonl:5", "cut", "", 24, 4, 13, 4, rows=[3]),
    ]
    check_balance(ledger, rows, packed=None)


@pytest.mark.parametrize(
    ("example", "options", "fate"),
    [
        (EXAMPLES[0], {}, ("used", "", [0])),
        (LONG, {"overflow": "keep_target"}, ("cut", "", [0])),
        (EXAMPLES[3], {"overflow": "truncate"}, ("cut", "", [0])),
        (EXAMPLES[3], {"overflow": "split"}, ("split", "", [0, 1, 2])),
        (EXAMPLES[3], {"overflow": "drop"}, ("dropped", "longer than max_length", [])),
        (EXAMPLES[3], {"overflow": "keep_target"}, ("dropped", "no whole target fits in max_length", [])),
        (LONG, {"overflow": "truncate"}, ("dropped", "no target token is left", [])),
        (Tokens([1, 2], [-100, -100], [2]), {}, ("dropped", "no target token", [])),
    ],
)
def test_every_fate_is_entered_with_its_reason_and_balances(example, options, fate):
    ledger, rows, _ = build([example], max_length=10, **options)

    assert fates(ledger) == [fate]
    check_balance(ledger, rows, packed=None)


def test_windows_of_a_document_are_counted_as_often_as_they_are_read():
    ledger, rows, _ = build(
        [document("abcdefghi")], stage="pretrain", window=(6, 3)
    )  # 10 tokens with the end

    assert ledger.rows == [LedgerRow(0, "a.jsonl:1", "split", "windows", 10, 9, 16, 13, rows=[0, 1, 2])]
    check_balance(ledger, rows, packed=None)


def test_a_row_is_entered_with_the_packed_rows_that_hold_it():
    """16 places: 13 alone, 9 and 7 together."""
    ledger, rows, packed = build(EXAMPLES[:3], pack=True)

    assert fates(ledger) == [("used", "", [1]), ("used", "", [1]), ("used", "", [0])]
    check_balance(ledger, rows, packed=packed)


def test_a_document_that_goes_on_in_the_next_row_of_a_stream_is_entered_in_both():
    dataset = PretrainDataset([document("a" * 9), document("b" * 9)], byte_tokenizer())
    packed = PackedDataset(dataset, max_length=16, packing="stream")

    ledger = build_ledger(dataset.rows, PLACES[:2], packed=packed)

    assert fates(ledger) == [("used", "", [0]), ("used", "", [0, 1])]
    check_balance(ledger, dataset.rows, packed=packed)


def test_the_table_is_short_and_names_the_reasons():
    ledger, _, _ = build([*EXAMPLES, LONG], max_length=13)
    ledger = replace(ledger, unreadable=["a.jsonl:6: no JSON"], duplicates=["a.jsonl:7", "a.jsonl:8"])

    assert ledger.to_lines() == [
        "fate                  rows        tokens       targets   tokens kept  targets kept",
        "used                     3            29            17            29            17",
        "cut                      1            24             4            13             4",
        "duplicate                2             0             0             0             0",
        "dropped                  1            25            21             0             0",
        "unreadable               1             0             0             0             0",
        "  dropped: 1 x no whole target fits in max_length",
    ]
    assert ledger.totals()["cut"] == {
        "rows": 1, "tokens": 24, "target_tokens": 4, "kept_tokens": 13, "kept_targets": 4,
    }  # fmt: skip


def test_the_file_is_read_back_as_it_was_written(tmp_path):
    train, _, _ = build([*EXAMPLES, LONG], max_length=13)
    evaluation, _, _ = build(EXAMPLES[:1])

    write_ledgers({"train": train, "eval": evaluation}, tmp_path / "ledger.parquet")

    table = parquet.read_table(tmp_path / "ledger.parquet")
    assert table.column_names == [
        *("split", "row", "source", "fate", "reason", "tokens", "target_tokens"),
        *("kept_tokens", "kept_targets", "rows"),
    ]
    assert table.column("split").to_pylist() == ["train"] * 5 + ["eval"]
    assert table.column("fate").to_pylist() == ["used", "used", "used", "dropped", "cut", "used"]
    assert table.to_pylist()[4] == {
        **{"split": "train", "row": 4, "source": "a.jsonl:5", "fate": "cut", "reason": ""},
        **{"tokens": 24, "target_tokens": 4, "kept_tokens": 13, "kept_targets": 4, "rows": [3]},
    }


def test_what_became_no_example_stands_in_the_file_with_its_reason(tmp_path):
    ledger, _, _ = build(EXAMPLES[:1])
    unreadable = ["a.jsonl:6: no JSON; got '5: x'", "b.csv: record 17: key 'text' is null"]
    ledger = replace(ledger, unreadable=unreadable, duplicates=["a.jsonl:7"])

    write_ledgers({"train": ledger}, tmp_path / "ledger.parquet")

    rows = parquet.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [(row["row"], row["source"], row["fate"], row["reason"]) for row in rows] == [
        (0, "a.jsonl:1", "used", ""),
        (-1, "a.jsonl:6", "unreadable", "no JSON; got '5: x'"),
        (-1, "b.csv: record 17", "unreadable", "key 'text' is null"),
        (-1, "a.jsonl:7", "duplicate", ""),
    ]


# --- what does not balance


def refusal(ledger: Ledger, rows, packed=None) -> str:
    with pytest.raises(DataError) as error:
        check_balance(ledger, rows, packed=packed)
    assert error.value.exit_code == ExitCode.DATA
    return str(error.value)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"kept_tokens": 6}, "a.jsonl:1: the ledger does not balance: used, 6 of 7 tokens kept"),
        (0, {"kept_targets": 2}, "used, 7 of 7 tokens kept; got 2 of 3 labels, rows [0]"),
        (0, {"rows": []}, "used, 7 of 7 tokens kept; got 3 of 3 labels, rows []"),
        (
            3,
            {"kept_tokens": 1, "rows": [0]},
            "a.jsonl:4: the ledger does not balance: dropped, 1 of 25 tokens",
        ),
        (3, {"rows": [2]}, "dropped, 0 of 25 tokens kept; got 0 of 21 labels, rows [2]"),
        (4, {"kept_tokens": 12}, "a.jsonl:5: the ledger does not balance: cut, 12 of 24 tokens kept"),
        (4, {"kept_targets": 0}, "cut, 13 of 24 tokens kept; got 0 of 4 labels"),
        (4, {"kept_targets": 5}, "cut, 13 of 24 tokens kept; got 5 of 4 labels"),
    ],
)
def test_a_row_that_lost_more_than_its_fate_says_is_refused(number, change, message):
    ledger, rows, _ = build([*EXAMPLES, LONG], max_length=13)
    ledger.rows[number] = replace(ledger.rows[number], **change)

    assert message in refusal(ledger, rows)


def test_a_split_row_that_lost_a_label_is_refused():
    ledger, rows, _ = build([EXAMPLES[3]], max_length=10, overflow="split")
    ledger.rows[0] = replace(ledger.rows[0], kept_targets=20)

    assert "split, 27 of 25 tokens kept; got 20 of 21 labels" in refusal(ledger, rows)


def packed_stream() -> tuple[Any, PackedDataset]:
    """Two documents of 10 tokens in rows of 16: (0, 0-10) and (1, 0-6), then (1, 5-10)."""
    dataset = PretrainDataset([document("a" * 9), document("b" * 9)], byte_tokenizer())
    return dataset.rows, PackedDataset(dataset, max_length=16, packing="stream")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([[(0, 0, 10)], [(1, 5, 10)]], "data.packing: packing keeps 13 labels of 18"),
        ([[(0, 0, 10), (1, 0, 6)], [(1, 6, 10)]], "packing keeps 17 labels of 18"),  # the one at the border
        ([[(0, 0, 10), (1, 0, 6)], [(1, 5, 10), (0, 8, 10)]], "packing keeps 19 labels of 18"),
        ([[(0, 0, 10)]], "a.jsonl:2: the ledger does not balance: used, 10 of 10 tokens kept"),
    ],
)
def test_packing_that_loses_or_repeats_a_label_is_refused(pieces, message):
    rows, packed = packed_stream()
    columns = [np.array(column) for column in zip(*(piece for row in pieces for piece in row), strict=True)]
    packed.pieces = Pieces(*columns, np.cumsum([0, *map(len, pieces)]))

    assert message in refusal(build_ledger(rows, PLACES[:2], packed=packed), rows, packed)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("input_ids", lambda ids: [*ids[:-1], 7]),
        ("input_ids", lambda ids: ids[:-1]),
        ("labels", lambda labels: [-100, *labels[2:], -100]),
        ("labels", lambda labels: [*labels[:10], 98, *labels[11:]]),  # the first of the second document
        ("labels", lambda labels: labels[:-1]),
        ("position_ids", lambda places: list(range(len(places)))),
    ],
)
def test_a_packed_row_that_is_not_its_pieces_is_refused(key, change, monkeypatch):
    rows, packed = packed_stream()
    read = PackedDataset.__getitem__
    monkeypatch.setattr(
        PackedDataset, "__getitem__", lambda self, i: (row := read(self, i)) | {key: change(row[key])}
    )

    assert refusal(build_ledger(rows, PLACES[:2], packed=packed), rows, packed).startswith(
        "data.packing: packed row 0 is not its 2 documents with positions that begin again"
    )


# --- duplicates and leakage


def test_only_examples_that_are_equal_in_every_respect_are_duplicates():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    examples = [
        document("ab"),
        prompted("a", "b"),
        prompted("", "ab"),
        document("ab"),
        Document([Segment("a", False), Segment("b", True)]),
        Document([Segment("a", True), Segment("b", True)]),
        Chat(chat),
        Chat([chat[0], {**chat[1], "train": False}]),
        Chat([dict(turn) for turn in chat]),
        Tokens([1, 2], [-100, 2], [2]),
        Tokens([1, 2], [1, 2], [2]),
        document("ab "),
    ]

    assert find_duplicates(examples) == [None, None, None, 0, 1, None, None, None, 6, None, None, None]


def test_leakage_is_exact_or_but_for_case_and_white_space():
    train = [prompted("Who?\n", "Me."), prompted("Where?\n", "Here."), document("A  b")]
    evaluation = [
        prompted("Who?\n", "Me."),
        prompted("who?", " ME."),
        prompted("Who?\n", "You."),
        document("a B\n"),
        prompted("", "A b"),
    ]

    leakage = measure_leakage(train, evaluation, places=["e:1", "e:2", "e:3", "e:4", "e:5"])

    assert (leakage.exact, leakage.normalised, leakage.share) == (["e:1"], ["e:2", "e:4"], 0.6)
    check_leakage(leakage, 0.6)
    with pytest.raises(DataError) as error:
        check_leakage(leakage, 0.59)
    assert str(error.value) == (
        "data.eval: 60.0% of the evaluation rows are training rows (1 exactly, 2 but for case and white "
        "space); got e:1, e:2, e:4; "
        "fix: remove them, set data.duplicates=drop, or allow it by data.max_leakage"
    )


# --- by a recipe

RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in (1, 2, 2, 3, 1)]


def lines_of(proof: Proof) -> list[int]:
    """The line in the file of each training row in the ledger."""
    return [int(row.source.rpartition(":")[2]) for row in proof.ledgers["train"].rows]


def test_duplicates_are_kept_by_default_and_left_out_on_request(tmp_path):
    kept = prove_records(tmp_path, RECORDS)
    dropped = prove_records(tmp_path, RECORDS, duplicates="drop")

    assert {fate: total["rows"] for fate, total in kept.facts["train"]["ledger"].items()} == {"used": 5}
    assert {fate: total["rows"] for fate, total in dropped.facts["train"]["ledger"].items()} == {
        "used": 3,
        "duplicate": 2,
    }
    assert (lines_of(kept), lines_of(dropped)) == ([1, 2, 3, 4, 5], [1, 2, 4])


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    records = [*RECORDS[:2], {"instruct": "say\n", "input": "", "label": 7}]

    proof = prove_records(tmp_path, records, on_bad_record="drop", max_dropped=0.5)

    assert {fate: total["rows"] for fate, total in proof.facts["train"]["ledger"].items()} == {
        "used": 2,
        "unreadable": 1,
    }
    assert any(line.split()[:2] == ["unreadable", "1"] for line in proof.lines)


def test_training_rows_among_the_evaluation_rows_are_an_error_over_max_leakage(tmp_path):
    evaluation = [RECORDS[0], *({"instruct": "tell\n", "input": "", "label": "y" * n} for n in (1, 2, 3))]

    with pytest.raises(DataError) as error:
        prove_records(tmp_path, RECORDS, evaluation=evaluation)

    assert str(error.value).startswith(
        "data.eval: 25.0% of the evaluation rows are training rows (1 exactly, 0 but for case and white "
        f"space); got {tmp_path / 'b.jsonl'}:1; fix: "
    )


def test_allowed_leakage_is_said_and_recorded(tmp_path):
    proof = prove_records(tmp_path, RECORDS, evaluation=RECORDS[:2], max_leakage=1.0)

    assert "note      100.0% of the evaluation rows are training rows" in proof.lines
    assert proof.facts["leakage"] == {"exact": 2, "normalised": 0}
    assert [len(ledger.rows) for ledger in proof.ledgers.values()] == [5, 2]
    assert json.loads(json.dumps(proof.facts)) == proof.facts
