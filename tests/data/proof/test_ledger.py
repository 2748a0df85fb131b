"""The ledger: every record with its fate, totals that balance, packed rows that contain each row once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import byte_tokenizer, document, prompted, prove_records, split_of, write_jsonl
from pyarrow import parquet

from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import PretrainDataset
from hf_clm.data.label.labels import Fate
from hf_clm.data.proof.balance import check_entry, check_packing
from hf_clm.data.proof.leakage import Leakage, are_among, check_leakage, digest, loose_digest
from hf_clm.data.proof.ledger import LedgerSplit, Totals, write_ledger
from hf_clm.data.split import Split
from hf_clm.errors import DataError, ExitCode
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import Chat, Document, Segment, Tokens

# "say\n" is context (4 tokens); 2, 4, 8 or 20 letters and the end token are targets: 7, 9, 13, 25 tokens.
EXAMPLES = [prompted("say\n", "x" * n) for n in (2, 4, 8, 20)]
LONG = prompted("please say it again\n", "yes")  # 20 + 3 + 1


def build(folder: Path, examples: list[Any], *, stage: str = "sft", **data: Any) -> Split:
    section = {"train": ["x"], "max_length": 16, "packing": "none", "max_dropped": 0.9, **data}
    sections = {"model": {"name_or_path": "m"}, "train": {"output_dir": "run"}}
    return split_of(folder, examples, Recipe.model_validate({"stage": stage, "data": section, **sections}))


def entered(split: Split, folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of ledger.parquet, with line numbers in place of the full places."""
    packed = split.dataset if isinstance(split.dataset, PackedDataset) else None
    write_ledger(folder / "ledger.parquet", {"train": LedgerSplit(split.ledger, packed)})
    lines = parquet.read_table(folder / "ledger.parquet").to_pylist()
    return [{**line, "source": int(line["source"].rpartition(":")[2])} for line in lines]


def fates(split: Split, folder: Path) -> list[tuple[str, str, list[int]]]:
    return [(line["fate"], line["reason"], line["rows"]) for line in entered(split, folder)]


# --- entries


def test_each_record_has_its_place_fate_and_sizes(tmp_path):
    split = build(tmp_path, [*EXAMPLES, LONG], max_length=13)

    names = (
        "row",
        "source",
        "fate",
        "reason",
        "tokens",
        "target_tokens",
        "kept_tokens",
        "kept_targets",
        "rows",
    )
    assert [tuple(line[name] for name in names) for line in entered(split, tmp_path)] == [
        (0, 1, "used", "", 7, 3, 7, 3, [0]),
        (1, 2, "used", "", 9, 5, 9, 5, [1]),
        (2, 3, "used", "", 13, 9, 13, 9, [2]),
        (3, 4, "dropped", "no whole target fits in max_length", 25, 21, 0, 0, []),
        (4, 5, "cut", "", 24, 4, 13, 4, [3]),
    ]


@pytest.mark.parametrize(
    ("example", "data", "fate"),
    [
        (EXAMPLES[0], {}, ("used", "", [1])),
        (LONG, {"overflow": "keep_target"}, ("cut", "", [1])),
        (EXAMPLES[3], {"overflow": "truncate"}, ("cut", "", [1])),
        (EXAMPLES[3], {"overflow": "split"}, ("split", "", [1, 2, 3])),
        (EXAMPLES[3], {"overflow": "drop"}, ("dropped", "longer than max_length", [])),
        (EXAMPLES[3], {"overflow": "keep_target"}, ("dropped", "no whole target fits in max_length", [])),
        (LONG, {"overflow": "truncate"}, ("dropped", "no target token is left", [])),
    ],
)
def test_every_fate_is_recorded_with_its_reason(example, data, fate, tmp_path):
    split = build(tmp_path, [EXAMPLES[0], example], max_length=10, **data)

    assert fates(split, tmp_path)[1] == fate


def test_windows_of_a_document_are_counted_as_often_as_they_are_read(tmp_path):
    window = {"size": 6, "step": 3}
    split = build(
        tmp_path, [document("abcdefghi")], stage="pretrain", window=window
    )  # 10 tokens with the end

    (line,) = entered(split, tmp_path)
    assert (line["fate"], line["reason"], line["rows"]) == ("split", "windows", [0, 1, 2])
    assert [line[n] for n in ("tokens", "target_tokens", "kept_tokens", "kept_targets")] == [10, 9, 16, 13]


def test_a_record_is_listed_with_its_packed_rows(tmp_path):
    """Rows of 16 tokens: 13 alone, 9 and 7 together."""
    split = build(tmp_path, EXAMPLES[:3], packing="best_fit")

    assert fates(split, tmp_path) == [("used", "", [1]), ("used", "", [1]), ("used", "", [0])]


def test_a_document_across_two_rows_is_listed_in_both(tmp_path):
    split = build(tmp_path, [document("a" * 9), document("b" * 9)], stage="pretrain", packing="stream")

    assert fates(split, tmp_path) == [("used", "", [0]), ("used", "", [0, 1])]


def test_the_table_is_short_and_names_the_reasons(tmp_path):
    split = build(tmp_path, [*EXAMPLES, LONG, LONG], max_length=13, duplicates="drop")

    totals = Totals(split.ledger)
    assert totals.to_lines() == [
        "fate                  rows        tokens       targets   tokens kept  targets kept",
        "used                     3            29            17            29            17",
        "cut                      1            24             4            13             4",
        "duplicate                1            24             4             0             0",
        "dropped                  1            25            21             0             0",
        "  dropped: 1 x no whole target fits in max_length",
    ]
    assert totals.to_json()["cut"] == {
        "rows": 1, "tokens": 24, "target_tokens": 4, "kept_tokens": 13, "kept_targets": 4,
    }  # fmt: skip


def test_an_unreadable_record_is_in_the_file_with_its_reason(tmp_path):
    split = build(tmp_path, [*EXAMPLES[:2], EXAMPLES[0]], duplicates="drop")
    path = tmp_path / "examples.jsonl"

    last = entered(split, tmp_path)[2]
    assert (last["source"], last["fate"], last["reason"], last["rows"]) == (
        3,
        "duplicate",
        f"of {path}:1",
        [],
    )


# --- what does not balance


@pytest.mark.parametrize(
    ("fate", "kept", "message"),
    [
        (Fate("used", tokens=7, target_tokens=3), (6, 3), "used, 6 of 7 tokens kept"),
        (Fate("used", tokens=7, target_tokens=3), (7, 2), "used, 7 of 7 tokens kept; got 2 of 3 labels"),
        (Fate("dropped", "x", tokens=25, target_tokens=21), (1, 0), "dropped, 1 of 25 tokens kept"),
        (Fate("unreadable"), (1, 0), "unreadable, 1 of 0 tokens kept"),
        (Fate("cut", "", 11, 24, 4), (12, 4), "cut, 12 of 24 tokens kept"),
        (Fate("cut", "", 11, 24, 4), (13, 0), "cut, 13 of 24 tokens kept; got 0 of 4 labels"),
        (Fate("cut", "", 11, 24, 4), (13, 5), "cut, 13 of 24 tokens kept; got 5 of 4 labels"),
        (Fate("split", "", 0, 25, 21), (27, 20), "split, 27 of 25 tokens kept; got 20 of 21 labels"),
    ],
)
def test_a_record_that_lost_more_than_its_fate_says_is_refused(fate, kept, message):
    with pytest.raises(DataError) as error:
        check_entry(fate, *kept, where="a.jsonl:1")

    assert error.value.exit_code == ExitCode.DATA
    assert str(error.value).startswith(f"a.jsonl:1: the ledger does not balance: {message}")


def packed_stream() -> PackedDataset:
    """Two documents of 10 tokens in rows of 16: (0, 0-10) and (1, 0-6), then (1, 5-10)."""
    dataset = PretrainDataset([document("a" * 9), document("b" * 9)], byte_tokenizer())
    return PackedDataset(dataset, max_length=16, packing="stream")


def with_pieces(packed: PackedDataset, pieces: list[list[tuple[int, int, int]]]) -> PackedDataset:
    columns = [np.array(column) for column in zip(*(piece for row in pieces for piece in row), strict=True)]
    packed.pieces = Pieces(*columns, np.cumsum([0, *map(len, pieces)]))
    return packed


@pytest.mark.parametrize(
    ("pieces", "times"),
    [
        ([[(0, 0, 10), (1, 0, 6)], [(1, 5, 10)]], [1, 1]),
        ([[(0, 0, 10)], [(1, 0, 3)], [(1, 2, 10), (0, 0, 4)], [(0, 3, 10)]], [2, 1]),
        ([[(0, 0, 10)]], [1, 0]),
        ([[(1, 0, 4)], [(1, 3, 10)], [(1, 0, 8)], [(1, 7, 10)]], [0, 2]),
    ],
)
def test_packing_with_the_right_number_of_draws_is_accepted(pieces, times):
    check_packing(with_pieces(packed_stream(), pieces), times=np.array(times))


@pytest.mark.parametrize(
    "pieces",
    [
        [[(0, 0, 10)], [(1, 5, 10)]],
        [[(0, 0, 10), (1, 0, 6)], [(1, 6, 10)]],  # the label at the border is lost
        [[(0, 0, 10), (1, 0, 6)], [(1, 4, 10)]],  # a label is learned twice
        [[(0, 0, 10), (1, 0, 6)], [(1, 5, 10), (0, 8, 10)]],
        [[(0, 0, 10), (1, 0, 10)], [(1, 0, 10)]],
        [[(0, 0, 10), (1, 0, 6)]],
        [[(0, 0, 10)]],
    ],
)
def test_packing_that_loses_or_repeats_a_label_is_refused(pieces):
    with pytest.raises(DataError, match=r"data\.packing: packing has [0-9] of 2 rows, or repeats or"):
        check_packing(with_pieces(packed_stream(), pieces))


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
def test_a_packed_row_that_differs_from_its_pieces_is_refused(key, change, monkeypatch):
    packed, read = packed_stream(), PackedDataset.__getitem__
    monkeypatch.setattr(
        PackedDataset, "__getitem__", lambda self, i: (row := read(self, i)) | {key: change(row[key])}
    )

    with pytest.raises(DataError) as error:
        check_packing(packed)

    assert str(error.value).startswith("data.packing: packed row 0 differs from its 2 documents")


# --- duplicates and leakage


def test_only_examples_equal_in_every_respect_are_duplicates():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    examples: list[Any] = [
        document("ab"),
        prompted("a", "b"),
        prompted("", "ab"),
        document("ab"),
        Document([Segment("a", False), Segment("b", True)]),
        Document([Segment("a", True), Segment("b", True)]),
        Chat(chat),
        Chat([chat[0], {**chat[1], "weight": 0.5}]),
        Chat([dict(turn) for turn in chat]),
        Tokens([1, 2], [-100, 2], [2]),
        Tokens([1, 2], [1, 2], [2]),
        document("ab "),
    ]

    digests = [digest(example) for example in examples]

    assert [digests.index(one) for one in digests] == [0, 1, 2, 0, 1, 5, 6, 7, 6, 9, 10, 11]


def test_case_and_whitespace_do_not_affect_the_loose_digest():
    one, *others = (
        np.frombuffer(loose_digest(example), "<u8")
        for example in (prompted("Who?\n", "Me."), prompted("who?", " ME."), prompted("Who?\n", "You."))
    )

    assert are_among(np.array(others), one[None]).tolist() == [True, False]
    assert are_among(np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.uint64)).tolist() == [False]


def test_leakage_over_the_limit_is_refused():
    leakage = Leakage(5, ["e:1"], ["e:2", "e:4"])

    check_leakage(leakage, 0.6)
    with pytest.raises(DataError) as error:
        check_leakage(leakage, 0.59)
    assert str(error.value) == (
        "data.eval: 60.0% of the evaluation rows are training rows (1 exactly, 2 up to case and "
        "whitespace); got e:1, e:2, e:4; "
        "fix: remove them, set data.duplicates=drop, or raise data.max_leakage"
    )


# --- with a recipe

RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in (1, 2, 2, 3, 1)]


def test_duplicates_are_kept_by_default_and_dropped_on_request(tmp_path):
    kept = prove_records(tmp_path, RECORDS)
    dropped = prove_records(tmp_path / "again", RECORDS, duplicates="drop")

    assert {fate: total["rows"] for fate, total in kept.facts["train"]["ledger"].items()} == {"used": 5}
    assert {fate: total["rows"] for fate, total in dropped.facts["train"]["ledger"].items()} == {
        "used": 3,
        "duplicate": 2,
    }


def test_a_set_with_a_long_name_has_its_table_beside_the_name(tmp_path):
    other = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "other"}])

    proof = prove_records(tmp_path, RECORDS, eval={"general": other})

    (at,) = (number for number, line in enumerate(proof.lines) if line.startswith("eval_general"))
    assert proof.lines[at].startswith("eval_general fate ")
    assert proof.lines[at + 1].startswith("             used ")


def test_records_that_cannot_be_used_are_counted(tmp_path):
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
        "data.eval: 25.0% of the evaluation rows are training rows (1 exactly, 0 up to case and "
        f"whitespace); got {tmp_path / 'b.jsonl'}:1; fix: "
    )


def test_allowed_leakage_is_reported_and_recorded(tmp_path):
    evaluation = [*RECORDS[:2], {"instruct": "say\n", "input": "", "label": "another"}]
    proof = prove_records(tmp_path, RECORDS, evaluation=evaluation, max_leakage=1.0)

    assert "note      66.7% of the evaluation rows are training rows" in proof.lines
    assert "note      100.0% of the evaluation prompts are training prompts" in proof.lines
    assert proof.facts["leakage"] == {"exact": 2, "normalised": 0, "prompts": 3}
    assert json.loads(json.dumps(proof.facts)) == proof.facts
