"""The first rows of a set as lines of JSON."""

import json

import numpy as np
from helpers import EOS, PAD, X, build_recipe, byte_tokenizer

from hf_clm.data.build import build_split, load_examples
from hf_clm.inspector.documents import Reader
from hf_clm.inspector.excerpt import to_entries, write_excerpt
from hf_clm.inspector.rows import Document, Row, Vocabulary
from hf_clm.parts import build_collator

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
