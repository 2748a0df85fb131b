"""The first rows of a set as lines of JSON."""

import json

import numpy as np
import pytest
from helpers import PAD, X, build_recipe, byte_tokenizer, read_split

from hf_clm.data.batch.collators import build_collator
from hf_clm.data.prepared.store import HEAD
from hf_clm.pages.documents import Reader
from hf_clm.pages.excerpt import to_entries, write_excerpt
from hf_clm.pages.rows import Document, Row, Vocabulary
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.arguments import training_arguments
from hf_clm.training.prepare import prepare

VOCABULARY = Vocabulary(byte_tokenizer())


def read(folder, records, *, stage="sft", data=None):
    """A reader of the records, and the collator of their recipe."""
    train = {"per_device_train_batch_size": 1}
    recipe = build_recipe(folder, records, stage=stage, data=data or {}, train=train)
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    split = read_split(recipe, tokenizer)
    return Reader(split, tokenizer, recipe=recipe), build_collator(recipe, tokenizer)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "x.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_document_is_its_counts_and_its_turns_in_runs_of_one_style(tmp_path):
    records = [{"instruct": f"ask {n}\n", "input": "", "label": "ok"} for n in range(3)]
    reader, collate = read(tmp_path, records)

    write_excerpt(tmp_path / "x.jsonl", reader, collate=collate)

    entries = read_lines(tmp_path)
    assert len(entries) == 3
    assert entries[1] == {
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


def test_a_long_document_is_shown_to_its_400th_token():
    ids = np.array([65] * 399 + [66] * 9)
    row = Row(0, ids, ids, (Document(0, 408),))

    (entry,) = to_entries([row], VOCABULARY)

    assert (entry["tokens"], entry["targets"], entry["shown"]) == (408, 408, 400)
    assert entry["turns"] == [["", [["trained", "A" * 399 + "B"]]]]


def test_five_documents_are_shown_and_none_that_takes_long_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_clm.pages.excerpt.LONGEST", 10)
    labels = ["ok", "y" * 20, "ok", "ok", "ok", "ok", "ok"]
    reader, collate = read(tmp_path, [{"instruct": "ask\n", "input": "", "label": text} for text in labels])

    write_excerpt(tmp_path / "x.jsonl", reader, collate=collate)

    assert [entry["place"].rpartition(":")[2] for entry in read_lines(tmp_path)] == ["1", "3", "4", "5", "6"]


def test_a_prepared_set_is_not_read_again(tmp_path):
    """Only its first examples are kept with it; packing lays others into its first rows."""
    records = [{"instruct": "ask\n", "input": "", "label": "y" * (n % 40 + 1)} for n in range(HEAD + 50)]
    recipe = build_recipe(tmp_path, records, data={"packing": "best_fit", "cache_dir": str(tmp_path / "c")})
    tokenizer = byte_tokenizer()
    arguments = training_arguments(recipe)
    prepare(recipe, tokenizer, arguments=arguments)
    again = prepare(recipe, tokenizer, arguments=arguments)
    (tmp_path / "rows.jsonl").unlink()
    reader = Reader(again.splits["train"], tokenizer, recipe=recipe)

    write_excerpt(tmp_path / "x.jsonl", reader, collate=build_collator(recipe, tokenizer))

    assert again.proof.facts["prepared"]["from_cache"] is True
    assert [entry["targets"] for entry in read_lines(tmp_path)] == [2, 3, 4, 5, 6]


def test_what_steers_text_is_spelled_and_padding_is_left_out():
    ids = np.array([*"\u202e\x1b".encode(), PAD])
    row = Row(0, ids, np.array([X, X, X, 27, X]), (Document(0, 4),))

    (entry,) = to_entries([row], VOCABULARY)

    assert entry["turns"] == [["", [["read", "\\u202e"], ["trained", "\\x1b"]]]]


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, hello"}]}
SETTINGS = [
    ("sft", {"instruct": "ask\n", "input": "", "label": "an answer"}, {"packing": "best_fit"}),
    ("sft", {"instruct": "ask\n", "input": "", "label": "an answer"}, {"tokens_per_batch": 64}),
    ("sft", {"instruct": "ask\n" * 9, "input": "", "label": "ok"}, {"max_length": 16}),
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
    reader, collate = read(tmp_path, [record] * 5, stage=stage, data=data)

    write_excerpt(tmp_path / "x.jsonl", reader, collate=collate)

    entries = read_lines(tmp_path)
    assert len(entries) == 5
    assert all(entry["turns"] for entry in entries)
    assert sum(entry["targets"] for entry in entries) > 0
