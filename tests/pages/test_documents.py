"""What the rows of a split tell of their documents."""

from typing import Any

import pytest
import torch
from helpers import EOS, PAD, X, byte_tokenizer, read_split, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.pages.documents import Reader, inspect_rows
from hf_clm.pages.rows import Row
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.tokenizer import use_chat_template


def chatml() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """``b"ab"`` is one token, 4."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 4}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<e>", "<p>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<p>")


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


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("ca", "bc", {"merged border": "'ab'"}),
        ("ab", "ab", {}),
        ("cb", "a", {}),
    ],
)
def test_a_token_that_would_span_the_border_is_flagged(tmp_path, prompt, completion, found):
    (row,) = load_rows(tmp_path, [pair(prompt, completion)], tokenizer=merging_tokenizer())

    assert flags(row)[0] == found
