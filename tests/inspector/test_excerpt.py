"""The first rows of a set as lines of JSON."""

import json

import numpy as np
import pytest
from helpers import EOS, PAD, X, build_recipe, byte_tokenizer

from hf_clm.data.build import build_split, load_examples
from hf_clm.inspector.documents import Reader
from hf_clm.inspector.excerpt import to_entries, write_excerpt
from hf_clm.inspector.rows import Document, Row, Vocabulary
from hf_clm.parts import build_collator
from hf_clm.tokenizer import use_chat_template

VOCABULARY = Vocabulary(byte_tokenizer())


def test_a_document_is_its_counts_and_its_turns_in_runs_of_one_style(tmp_path):
    records = [{"instruct": f"ask {n}", "input": "", "label": "ok"} for n in range(3)]
    recipe = build_recipe(tmp_path, records)
    examples = load_examples(recipe.data.train, recipe.data)
    tokenizer = byte_tokenizer()
    reader = Reader(build_split(examples, recipe, tokenizer=tokenizer, stage="sft"), tokenizer, recipe=recipe)

    write_excerpt(tmp_path / "x.jsonl", reader, collate=build_collator(recipe, tokenizer))

    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == {
        "row": 1,
        "place": f"{tmp_path}/rows.jsonl:2",
        "tokens": 9,
        "targets": 3,
        "shown": 9,
        "flags": {},
        "turns": [
            ["prompt", [["read", "ask 1\n"]]],
            ["completion", [["trained", "ok"], ["trained control", "<|endoftext|>"]]],
        ],
    }


def test_a_long_row_is_shown_to_its_800th_token():
    ids = np.array([65] * 799 + [66] * 9 + [EOS])
    row = Row(0, ids, ids, (Document(0, 799), Document(799, 808), Document(808, 809)))

    entries = list(to_entries([row], VOCABULARY))

    assert [(entry["tokens"], entry["shown"]) for entry in entries] == [(799, 799), (9, 1)]
    assert entries[1]["turns"] == [["", [["trained", "B"]]]]


def test_what_steers_text_is_spelled_and_padding_is_left_out():
    ids = np.array([*"\u202e\x1b".encode(), PAD])
    row = Row(0, ids, np.array([X, X, X, 27, X]), (Document(0, 4),))

    (entry,) = to_entries([row], VOCABULARY)

    assert entry["turns"] == [["", [["read", "\\u202e"], ["trained", "\\x1b"]]]]


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, hello"}]}
SETTINGS = [
    ("sft", {"instruct": "ask", "input": "", "label": "an answer"}, {"packing": "best_fit"}),
    ("sft", {"instruct": "ask", "input": "", "label": "an answer"}, {"tokens_per_batch": 64}),
    ("sft", {"instruct": "ask" * 9, "input": "", "label": "ok"}, {"max_length": 16}),
    ("sft", {"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}]}, {}),
    ("sft", {"input_ids": [65, 66, 67], "labels": [X, 66, 67]}, {}),
    ("sft", CHAT, {"packing": "best_fit"}),
    ("pretrain", CHAT, {"packing": "stream"}),
    ("pretrain", {"text": "long text " * 9}, {"packing": "stream", "max_length": 16}),
    ("pretrain", {"text": "long text " * 9}, {"window": {"size": 16, "step": 8}, "max_length": 16}),
    ("pretrain", {"input_ids": [65, 66, 67], "labels": [65, 66, 67]}, {"packing": "stream"}),
]


@pytest.mark.parametrize(("stage", "record", "data"), SETTINGS)
def test_every_kind_of_set_has_first_rows(tmp_path, stage, record, data):
    """A run writes them before its first step: what fails here would stop it."""
    recipe = build_recipe(tmp_path, [record] * 5, stage=stage, data=data)
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    split = build_split(
        load_examples(recipe.data.train, recipe.data), recipe, tokenizer=tokenizer, stage=stage
    )
    reader = Reader(split, tokenizer, recipe=recipe)

    write_excerpt(tmp_path / "x.jsonl", reader, collate=build_collator(recipe, tokenizer))

    entries = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {entry["row"] for entry in entries} <= {0, 1}
    assert entries[0]["turns"]
    assert sum(entry["targets"] for entry in entries) > 0
