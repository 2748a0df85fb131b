"""One block: its rows and the ledger of its records."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EOS, X, byte_tokenizer, write_jsonl
from prepared_sets import recipe_of

from hf_clm.data.prepared import block as module
from hf_clm.data.prepared.block import LEDGER_SCHEMA, ROW_SCHEMA, WEIGHTED_ROW_SCHEMA, Block, BlockMaker
from hf_clm.data.prepared.chunks import read_blocks
from hf_clm.data.proof.leakage import digest, loose_digest
from hf_clm.data.read.readers import ReadReport
from hf_clm.errors import DataError
from hf_clm.schema import Document, Segment
from hf_clm.text.train_tokenizer import train_characters

# "a\n" is context; N letters and the end token are targets: 4, 5, 6 tokens.
RECORDS = [{"instruct": "a\n", "input": "", "label": "x" * n} for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(
    records: list[Any], *, tokenizer: Any = None, digests: Any = (), stage: str = "sft", **data: Any
) -> Block:
    """Returns the block of the records; a str is written to the file unchanged."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path("a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    recipe = recipe_of(["a.jsonl"], stage=stage, **{"packing": "none", **data})
    (raw,) = read_blocks(recipe.data, "train", report=ReadReport())
    return BlockMaker(recipe, tokenizer or byte_tokenizer(), digests=digests).make(raw)


def columns(block: Block, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(block.ledger.column(name).to_pylist() for name in names), strict=True))


def test_a_row_has_ids_labels_and_its_place():
    block = make(RECORDS[:2])

    assert block.rows.schema == ROW_SCHEMA
    assert block.rows.to_pylist() == [
        {"input_ids": [97, 10, 120, 256], "labels": [X, X, 120, 256], "place": "a.jsonl:1"},
        {"input_ids": [97, 10, 120, 120, 256], "labels": [X, X, 120, 120, 256], "place": "a.jsonl:2"},
    ]
    assert (block.certificate.rows, block.certificate.failures) == (2, [])


def test_pretraining_learns_the_whole_text():
    block = make(RECORDS[:1], stage="pretrain")

    assert block.rows.column("labels").to_pylist() == [[X, 10, 120, 256]]


def test_weights_are_a_column_if_a_record_has_one():
    block = make([RECORDS[0], {**RECORDS[0], "weight": 0.5}])

    assert block.rows.schema == WEIGHTED_ROW_SCHEMA
    assert block.rows.column("weights").to_pylist() == [[1.0] * 4, [0.5] * 4]


def test_each_record_has_one_line_in_the_ledger_whatever_its_fate():
    block = make(
        [
            RECORDS[0],
            "{",
            {"instruct": "a\n" * 5, "input": "", "label": "xx"},
            {"instruct": "a\n", "label": 5},
        ],
        max_length=8,
    )

    assert block.ledger.schema == LEDGER_SCHEMA
    assert columns(block, "place", "fate", "tokens", "target_tokens", "cut_tokens") == [
        ("a.jsonl:1", "used", 4, 2, 0),
        ("a.jsonl:2", "unreadable", 0, 0, 0),
        ("a.jsonl:3", "cut", 13, 3, 5),
        ("a.jsonl:4", "unreadable", 0, 0, 0),
    ]
    assert columns(block, "kept_tokens", "kept_targets", "rows", "source") == [
        *((4, 2, 1, 0), (0, 0, 0, 0), (8, 3, 1, 0), (0, 0, 0, 0))
    ]
    reasons = block.ledger.column("reason").to_pylist()
    assert reasons[1::2] == [str(error).removeprefix(f"{error.where}: ") for error in block.faults]
    assert [error.where for error in block.faults] == ["a.jsonl:2", "a.jsonl:4"]
    assert (block.report.records, block.counted) == (2, {"a.jsonl": 2})


def test_a_record_of_several_rows_is_one_line():
    block = make([{"text": "x" * 9}], stage="pretrain", max_length=4)

    assert columns(block, "fate", "kept_tokens", "rows") == [("split", 12, 3)]
    assert block.rows.column("place").to_pylist() == ["a.jsonl:1"] * 3


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        (
            {**RECORDS[0], "label": "<|endoftext|>"},
            {"special_tokens_in_text": "error"},
            "a.jsonl:2: the text contains a control token",
        ),
        (
            {**RECORDS[0], "label": "x" * 9},
            {"max_length": 6, "overflow": "error"},
            "a.jsonl:2: longer than max_length=6; got 12 tokens",
        ),
    ],
)
def test_errors_in_labelling_have_a_place(record, data, message):
    block = make([RECORDS[0], record, RECORDS[1]], **data)

    assert [str(error)[: len(message)] for error in block.faults] == [message]
    assert columns(block, "fate") == [("used",), ("unreadable",), ("used",)]
    assert block.rows.column("place").to_pylist() == ["a.jsonl:1", "a.jsonl:3"]


def test_a_character_without_a_token_is_reported_with_its_record():
    block = make([{"text": "abba"}, {"text": "bad 雪"}], tokenizer=train_characters(["abba", "bd "]))

    assert list(map(str, block.faults)) == [
        "a.jsonl:2: the tokenizer has no token for it; got '雪' (U+96EA); "
        "fix: remove it, or train the tokenizer on text that contains it"
    ]


def test_the_unknown_token_written_out_in_a_text_is_not_an_unknown_character():
    tokenizer = train_characters(["ab <|unk>"])

    block = make([{"text": "a <|unk|> b"}], stage="pretrain", tokenizer=tokenizer)

    (row,) = block.rows.to_pylist()
    assert (block.faults, len(row["input_ids"])) == ([], len("a <|unk|> b") + 1)
    assert tokenizer.unk_token_id not in row["input_ids"]


def test_control_tokens_in_a_text_are_listed_with_its_record():
    block = make([RECORDS[0], {**RECORDS[0], "label": "<|pad|><|im_end|><|pad|>"}])

    assert block.ledger.column("spelled").to_pylist() == [None, ["<|pad|>", "<|im_end|>", "<|pad|>"]]


def test_digests_compare_records_exactly_loosely_and_by_prompt():
    loose = {"instruct": "A\n", "input": "", "label": " X "}
    other = {**RECORDS[0], "label": "y"}
    block = make([RECORDS[0], loose, other, "{"], digests=["exact", "loose", "prompt"])

    found = {name: list(map(tuple, values.tolist())) for name, values in block.digests.items()}
    assert len(set(found["exact"][:3])) == 3
    assert found["loose"][0] == found["loose"][1] != found["loose"][2]
    assert found["prompt"][0] == found["prompt"][1] == found["prompt"][2]
    assert [values[3] for values in found.values()] == [(0, 0)] * 3
    assert make([RECORDS[0]]).digests == {}


def test_a_digest_is_of_the_example_and_a_text_has_no_prompt():
    block = make([{"text": "Hi  you"}], digests=["exact", "loose", "prompt"])

    example = Document([Segment("Hi  you", 1.0)])
    assert {name: values.tobytes() for name, values in block.digests.items()} == {
        "exact": digest(example),
        "loose": loose_digest(example),
        "prompt": bytes(16),
    }


def test_two_makers_make_equal_blocks():
    records = [*RECORDS, {"instruct": "<|pad|>", "input": "i", "label": "y", "weight": 0.25}]
    first, second = (make(records, digests=["exact"]) for _ in range(2))

    assert first.rows.equals(second.rows) and first.ledger.equals(second.ledger)
    assert np.array_equal(first.digests["exact"], second.digests["exact"])


def test_a_block_that_loses_a_token_without_saying_so_is_refused(monkeypatch):
    tokenize = module.tokenize_rows

    def lose(*args: Any, **options: Any) -> Any:
        rows = tokenize(*args, **options)
        rows.offsets[-1] -= 1
        rows.input_ids, rows.labels = rows.input_ids[:-1], rows.labels[:-1]
        return rows

    monkeypatch.setattr(module, "tokenize_rows", lose)
    monkeypatch.setattr(module, "certify_rows", lambda *args, **options: (None, []))

    with pytest.raises(DataError, match=r"^a\.jsonl:3: the ledger does not balance"):
        make(RECORDS)


def test_labels_that_are_not_certified_are_in_the_certificate_of_the_block(monkeypatch):
    tokenize = module.tokenize_rows

    def learn_the_prompt(*args: Any, **options: Any) -> Any:
        rows = tokenize(*args, **options)
        rows.labels[0] = rows.input_ids[0]
        return rows

    monkeypatch.setattr(module, "tokenize_rows", learn_the_prompt)
    monkeypatch.setattr(module, "check_entry", lambda *args, **options: None)

    assert {failure.row for failure in make(RECORDS).certificate.failures} == {0}


def test_the_options_of_a_blocks_source_apply():
    write_jsonl(Path("a.jsonl"), [{**RECORDS[0], "label": "x" * 9}])
    sources = [{"path": "a.jsonl", "overflow": "drop"}, {"path": "a.jsonl", "overflow": "truncate"}]
    recipe = recipe_of(sources, max_length=6)

    maker = BlockMaker(recipe, byte_tokenizer())
    found = [maker.make(raw) for raw in read_blocks(recipe.data, "train", report=ReadReport())]

    assert [columns(block, "fate", "source") for block in found] == [[("dropped", 0)], [("cut", 1)]]


def test_a_maker_carries_custom_formats_to_other_machines(tmp_path, monkeypatch):
    """On the other machine, the maker is unpickled and the module cannot be imported."""
    (tmp_path / "brought_format.py").write_text(
        "from hf_clm.schema import Document, Segment\n"
        "def read(record):\n"
        "    return Document([Segment(record['q'], 0.0), Segment(record['a'], 1.0)])\n"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "Hi?\n", "a": "Yes"}])
    recipe = recipe_of([{"path": path, "format": "brought_format:read"}])
    (raw,) = read_blocks(recipe.data, "train", report=ReadReport())
    monkeypatch.syspath_prepend(tmp_path)
    sent = pickle.dumps(BlockMaker(recipe, byte_tokenizer()))
    monkeypatch.delitem(sys.modules, "brought_format", raising=False)
    monkeypatch.undo()

    try:
        block = pickle.loads(sent).make(raw)
    finally:
        sys.modules.pop("brought_format", None)

    assert block.faults == []
    assert block.rows.column("input_ids").to_pylist() == [[*b"Hi?\nYes", EOS]]
