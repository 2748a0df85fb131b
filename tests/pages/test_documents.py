"""What the rows of a split tell of their documents, and the first of them as lines of JSON."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, X, build_recipe, byte_tokenizer, read_split, write_jsonl
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPackedCausalLM,
)
from hf_clm.data.prepared.store import HEAD
from hf_clm.data.split import build_collator
from hf_clm.pages.documents import Reader, inspect_rows, to_entries, write_excerpt
from hf_clm.pages.rows import Document, Row, Vocabulary
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.arguments import training_arguments
from hf_clm.training.prepare import prepare


def chatml() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def load_rows(
    tmp_path, records: list[Any], *, tokenizer=None, stage="sft", collate=None, **data
) -> list[Row]:
    """Every row of the records; without packing they are padded in batches of two."""
    path = write_jsonl(tmp_path / "d.jsonl", records)
    recipe = to_recipe(path, stage, data)
    tokenizer = tokenizer or byte_tokenizer()
    split = read_split(recipe, tokenizer, proves=False)
    is_padded = recipe.resolved_packing == "none"
    collate = collate or (DataCollatorForCausalLM(PAD) if is_padded else DataCollatorForPackedCausalLM())
    reader = Reader(split, tokenizer, recipe=recipe)
    return list(inspect_rows(split, reader, collate=collate, batch_size=2))


def to_recipe(path: str, stage: str, data: dict[str, Any]) -> Recipe:
    section = {"train": path, "packing": "none", "max_dropped": 1.0, "allow_empty_prompt": True, **data}
    model = {"name_or_path": None, "init": "scratch", "config": {"model_type": "gpt2"}}
    sections = {
        "model": model,
        "tokenizer": {"name_or_path": "x"},
        "data": section,
        "train": {"output_dir": "x"},
    }
    return Recipe.model_validate({"stage": stage, **sections})


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def flags(row: Row) -> list[dict[str, str]]:
    return [dict(document.flags) for document in row.documents]


def test_a_row_has_the_place_and_the_turns_of_its_record(tmp_path):
    first, second, third = load_rows(tmp_path, [pair("茶", "B"), pair("p", "q"), pair("", "r")])

    assert [row.documents[0].place.removeprefix(f"{tmp_path}/") for row in (first, second, third)] == [
        "d.jsonl:1",
        "d.jsonl:2",
        "d.jsonl:3",
    ]
    assert first.documents[0].roles == ((0, "prompt"), (3, "completion"))
    assert second.input_ids.tolist() == [112, 113, EOS, PAD, PAD]
    assert (second.documents[0].stop, second.documents[0].flags) == (3, {})
    assert third.documents[0].roles == ()


def test_documents_of_a_packed_row_keep_their_places_and_turns(tmp_path):
    records = [pair("p", "q"), pair("abc", "d")]

    (row,) = load_rows(tmp_path, records, packing="best_fit", max_length=16)

    documents = [(d.start, d.stop, d.place[-2:], d.roles) for d in row.documents]
    assert documents == [
        (0, 5, ":2", ((0, "prompt"), (3, "completion"))),
        (5, 8, ":1", ((5, "prompt"), (6, "completion"))),
    ]


def test_turns_of_a_chat_begin_at_their_headers(tmp_path):
    """<|im_start|>user\\nHi<|im_end|>\\n is 1 + 5 + 2 + 1 + 1 tokens."""
    record = chat(("user", "Hi"), ("assistant", "Yo"), ("user", "<|im_end|>user"), ("assistant", "a"))

    (row,) = load_rows(tmp_path, [record], tokenizer=chatml())

    assert row.documents[0].roles == ((0, "user"), (10, "assistant"), (25, "user"), (47, "assistant"))
    assert row.input_ids[25:27].tolist() == [258, ord("u")]


def test_what_the_template_puts_in_by_itself_is_no_ones_turn(tmp_path):
    """<|im_start|>S<|im_end|> is 3 tokens, <|im_start|>u Hi <|im_end|> is 5."""
    tokenizer = chatml()
    tokenizer.chat_template = (
        "<|im_start|>S<|im_end|>{% for m in messages %}<|im_start|>{{ m.role[0] }}"
        "{{ m.content | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
    )

    (row,) = load_rows(tmp_path, [chat(("user", " Hi\n"), ("assistant", "Yo"))], tokenizer=tokenizer)

    assert row.documents[0].roles == ((0, "template"), (3, "user"), (8, "assistant"))


def test_a_cut_prompt_and_a_cut_answer_are_flagged_with_what_is_gone(tmp_path):
    (kept,) = load_rows(tmp_path, [pair("abcdef", "xy")], max_length=5)
    (truncated,) = load_rows(tmp_path, [pair("abc", "uvwxy")], max_length=5, overflow="truncate")

    assert flags(kept) == [{"cut prompt": "the first 4 tokens are gone"}]
    assert (kept.documents[0].before, kept.documents[0].after) == (4, 0)
    assert kept.documents[0].roles == ((0, "prompt"), (2, "completion"))
    assert flags(truncated) == [{"cut answer": "4 of 6 target tokens are gone"}]
    assert (truncated.documents[0].before, truncated.documents[0].after) == (0, 4)


def test_pieces_of_a_split_document_say_what_lies_elsewhere_and_are_no_fault(tmp_path):
    split = load_rows(tmp_path, [{"text": "aaaaaaaa"}], stage="pretrain", max_length=4)
    stream = load_rows(tmp_path, [{"text": "abcdefgh"}], stage="pretrain", max_length=4, packing="stream")

    for rows in (split, stream):
        assert [(d.before, d.after) for row in rows for d in row.documents] == [(0, 5), (3, 2), (6, 0)]
    assert [flags(row) for row in stream] == [[{}], [{}], [{}]]


def test_windows_say_what_lies_elsewhere(tmp_path):
    window = {"size": 4, "step": 2}

    rows = load_rows(tmp_path, [{"text": "aaaaa"}], stage="pretrain", max_length=8, window=window)

    assert [(d.before, d.after) for row in rows for d in row.documents] == [(0, 2), (2, 0)]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"input_ids": [65, 66, EOS], "labels": [X, 66, EOS]}, []),
        ({"input_ids": [65, 66, 67], "labels": [X, 66, 67]}, ["lost stop token"]),
        ({"input_ids": [65, 66, EOS], "labels": [X, 66, X]}, ["lost stop token"]),
        ({"input_ids": [65, 66, 67, EOS], "labels": [X, 66, X, EOS]}, []),
    ],
)
def test_the_last_target_must_end_in_a_stop_token(tmp_path, record, found):
    (row,) = load_rows(tmp_path, [record])

    assert list(flags(row)[0]) == found


def test_flags_are_read_from_the_batch_and_not_from_the_record(tmp_path):
    """A collator that masks every end token, or everything, is seen."""

    def masks(is_masked):
        def collate(rows):
            batch = DataCollatorForPackedCausalLM()(rows)
            return {**batch, "labels": torch.where(is_masked(batch["labels"]), X, batch["labels"])}

        return collate

    records = [chat(("user", "Hi"), ("assistant", "Yo"), ("user", "so"), ("assistant", "No"))]
    options = {"tokenizer": chatml()}
    (no_end,) = load_rows(tmp_path, records, collate=masks(lambda labels: labels == 259), **options)
    (nothing,) = load_rows(tmp_path, records, collate=masks(lambda labels: labels >= 0), **options)
    (sound,) = load_rows(tmp_path, records, **options)

    assert flags(no_end) == [{"lost stop token": "the target that ends at token 22 of the document"}]
    assert flags(nothing) == [{"nothing trained": ""}]
    assert flags(sound) == [{}]


def test_a_repeated_document_names_the_earlier_one(tmp_path):
    rows = load_rows(tmp_path, [pair("p", "q"), pair("p", "r"), pair("p", "q")])

    assert [flags(row)[0] for row in rows] == [{}, {}, {"duplicate": f"of {tmp_path}/d.jsonl:1"}]


def test_a_control_token_spelled_in_text_is_flagged(tmp_path):
    rows = load_rows(tmp_path, [pair("a<|pad|>b<|pad|>", "<|im_end|>"), pair("<|pad>", "q")])

    assert [flags(row)[0] for row in rows] == [{"control text": "'<|pad|>', '<|im_end|>'"}, {}]


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
    monkeypatch.setattr("hf_clm.pages.documents.LONGEST", 10)
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
