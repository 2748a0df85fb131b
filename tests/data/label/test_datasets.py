"""Datasets of a few rows, compared with literals; a byte is its own id."""

import gc
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
from helpers import EOS, IM_END, X, byte_tokenizer, document, prompted, sentencepiece_tokenizer, shown

from hf_clm.data.label.datasets import (
    PretrainDataset,
    SFTDataset,
    TokenizedRows,
    rare_collection,
    tokenize_rows,
)
from hf_clm.data.label.labels import Fate, count_targets, encode_plans
from hf_clm.data.label.render import LabelOptions, Renderer, TrainOn
from hf_clm.errors import DataError, RecipeError
from hf_clm.schema import Chat, Document, Segment, Tokens
from hf_clm.text.tokenizer import use_chat_template

PLAIN = byte_tokenizer()
TOKENIZER = byte_tokenizer()
use_chat_template(TOKENIZER, "chatml")
CHAT = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
LONG_CHAT = Chat([*CHAT.messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Bye"}])
SEGMENTS = Document([Segment("a", 0.0), Segment("b", 1.0)])
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def row(ids: list[int], labels: list[int], **weights: list[float]) -> Any:
    return {"input_ids": ids, "labels": labels, **weights}


def all_shown(dataset: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    return [shown(example, tokenizer) for example in dataset]


def test_sft_labels_targets_and_pretraining_labels_everything():
    examples = [prompted("p", "q"), document("hi"), SEGMENTS, CHAT, Tokens([7, 8, 9], [7, X, 9], [3])]

    learned, read = SFTDataset(examples, TOKENIZER), PretrainDataset(examples, TOKENIZER)

    assert all_shown(learned)[:4] == [
        "p⟦q<|endoftext|>⟧",
        "h⟦i<|endoftext|>⟧",
        "a⟦b<|endoftext|>⟧",
        f"{ASKED}⟦Yo<|im_end|>⟧",
    ]
    assert all_shown(read)[:4] == [
        "p⟦q<|endoftext|>⟧",
        "h⟦i<|endoftext|>⟧",
        "a⟦b<|endoftext|>⟧",
        f"<|im_start|>⟦{ASKED.removeprefix('<|im_start|>')}Yo<|im_end|>⟧",
    ]
    assert learned[4] == read[4] == row([7, 8, 9], [X, X, 9]), "the user's own -100 are kept in both"


def test_train_on_is_a_name_or_an_object():
    by_name = {
        name: SFTDataset([LONG_CHAT], TOKENIZER, train_on=name)[0]["labels"]
        for name in ("all_turns", "last_turn", "everything")
    }

    assert [token for token in by_name["all_turns"] if token != X] == [*b"Yo", IM_END, *b"Bye", IM_END]
    assert [token for token in by_name["last_turn"] if token != X] == [*b"Bye", IM_END]
    assert by_name["everything"].count(X) == 1
    assert SFTDataset([LONG_CHAT], TOKENIZER, train_on=TrainOn("last"))[0]["labels"] == by_name["last_turn"]


def test_instruct_input_and_label_are_joined_without_a_separator():
    record = {"instruct": "Go:", "input": "a\nb", "label": "c"}
    ids = [71, 111, 58, 97, 10, 98, 99, EOS]

    assert SFTDataset([record], PLAIN)[0] == row(ids, [X, X, X, X, X, X, 99, EOS])
    assert PretrainDataset([record], PLAIN)[0] == row(ids, [X, 111, 58, 97, 10, 98, 99, EOS])


# --- plain records

RECORDS: list[Any] = [
    {"messages": CHAT.messages},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {"prompt": "Hi", "completion": "Yo"},
    {"instruct": "Hi", "input": "", "label": "Yo"},
    {"instruction": "Hi", "output": "Yo"},
]


def test_plain_records_become_turns_if_there_is_a_chat_template():
    """An instruct model is trained in its own format."""
    assert all_shown(SFTDataset(RECORDS, TOKENIZER)) == [f"{ASKED}⟦Yo<|im_end|>⟧"] * 5
    assert all_shown(SFTDataset(RECORDS[2:4], PLAIN), PLAIN) == ["Hi⟦Yo<|endoftext|>⟧"] * 2


def test_a_datasets_table_gives_the_rows_of_its_records():
    """Tables fill in missing keys of nested columns with null."""
    records: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yo", "train": True},
            ]
        },
        {"messages": [*CHAT.messages, *LONG_CHAT.messages[2:3], {**LONG_CHAT.messages[3], "weight": 0.5}]},
    ]
    table = datasets.Dataset.from_list(records)
    assert table[0]["messages"][0]["train"] is None

    found = SFTDataset(table, TOKENIZER)

    assert all_shown(found) == [
        f"{ASKED}⟦Yo<|im_end|>⟧",
        f"{ASKED}⟦Yo<|im_end|>⟧\n{ASKED.replace('Hi', '?')}⟦Bye<|im_end|>⟧",
    ]
    assert found[1]["weights"][-4:] == [0.5] * 4
    assert list(SFTDataset(records, TOKENIZER)) == list(found)


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_a_mask_in_only_some_rows_is_refused(column):
    """Otherwise the prompts of the other rows would be targets."""
    with pytest.raises(DataError) as error:
        SFTDataset([{"input_ids": [1, 1], column: [1, 1]}, {"input_ids": [1, 1]}], TOKENIZER)

    assert error.value.row == 1


def test_tokenized_columns_of_a_table_are_read():
    table = datasets.Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
            {"input_ids": [8, 9], "completion_mask": [0, 1]},
        ]
    )

    assert list(SFTDataset(table, TOKENIZER)) == [row([5, 6, 7], [X, 6, 7]), row([8, 9], [X, 9])]


def test_a_format_can_be_named_or_be_a_function():
    record = {"question": "p", "answer": "q", "text": "other"}

    def read(record: Any) -> Document:
        return prompted(record["question"], record["answer"])

    assert all_shown(SFTDataset([record], TOKENIZER, format=read)) == ["p⟦q<|endoftext|>⟧"]
    assert all_shown(SFTDataset([record], TOKENIZER, format="text")) == ["o⟦ther<|endoftext|>⟧"]
    with pytest.raises(RecipeError, match="unknown format 'txt'; did you mean 'text'"):
        SFTDataset([record], TOKENIZER, format="txt")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"quest": "a"}, "record 1: the keys match no format; got keys 'quest'"),
        ({"messages": [{"role": "assistant", "content": "a", "trian": 0}]},
         "record 1: message 1: unknown key"),
        ({"text": "a", "weight": -1}, "record 1: key 'weight': expected a number of at least 0; got -1"),
        ({"input_ids": [1], "labels": None}, "record 1: key 'labels' is null"),
    ],
)  # fmt: skip
def test_an_unreadable_record_is_reported_by_number(record, message):
    with pytest.raises(DataError) as error:
        SFTDataset([{"text": "fine"}, record], TOKENIZER)

    assert str(error.value).startswith(message)
    assert error.value.row == 1


# --- fates


def test_every_example_has_a_fate_and_rows_refer_to_their_example():
    examples = [
        prompted("p", "q"),  # 3 tokens
        prompted("pppp", "q"),  # 6
        prompted("p", "qqqq"),  # 6, of which 5 are the target
        Tokens([1, 2], [X, X], [2]),
        document("hi"),
    ]

    found = SFTDataset(examples, TOKENIZER, max_length=4)

    assert found.rows.fates == [
        Fate("used"),
        Fate("cut", cut_tokens=2),
        Fate("dropped", "no whole target fits in max_length"),
        Fate("dropped", "no target token"),
        Fate("used"),
    ]
    assert [(fate.tokens, fate.target_tokens) for fate in found.rows.fates] == [
        (3, 2), (6, 2), (6, 5), (2, 0), (3, 2),
    ]  # fmt: skip
    assert found.rows.sources.tolist() == [0, 1, 4]
    assert found.rows.lengths.tolist() == [3, 4, 3]
    assert [found[i]["input_ids"] for i in range(3)] == [[*b"pq", EOS], [*b"ppq", EOS], [*b"hi", EOS]]


def test_changes_to_an_example_are_noted_in_its_fate():
    by_hand = prompted("pppp", "q<|endoftext|>")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }};{% endfor %}"

    cut = SFTDataset([by_hand, document("hi")], TOKENIZER, max_length=4)
    apart = SFTDataset([LONG_CHAT, CHAT], tokenizer)

    assert cut.rows.fates == [Fate("cut", "an end token written by hand", cut_tokens=2), Fate("used")]
    assert apart.rows.fates == [Fate("used", "a row for each turn"), Fate("used")]
    assert apart.rows.sources.tolist() == [0, 0, 1]


def test_pretraining_splits_a_long_document_and_counts_it_once():
    found = PretrainDataset([document("abcde"), document("x")], TOKENIZER, max_length=4)

    assert all_shown(found) == ["a⟦bcd⟧", "d⟦e<|endoftext|>⟧", "x⟦<|endoftext|>⟧"]
    assert found.rows.fates == [Fate("split"), Fate("used")]
    assert found.rows.sources.tolist() == [0, 0, 1]
    assert SFTDataset([document("x" * 5000)], TOKENIZER).rows.lengths.tolist() == [5001]


@pytest.mark.parametrize(
    ("window", "rows", "fate"),
    [
        ((4, 2), [[*b"abcd"], [*b"cdef"], [*b"ef", EOS]], "split"),
        ((4, 3), [[*b"abcd"], [*b"def", EOS]], "split"),
        ((4, 4), [[*b"abcd"], [*b"ef", EOS]], "split"),
        ((7, 3), [[*b"abcdef", EOS]], "used"),
        ((9, 1), [[*b"abcdef", EOS]], "used"),
    ],
)  # fmt: skip
def test_a_window_slides_over_a_document(window, rows, fate):
    found = PretrainDataset([document("abcdef")], TOKENIZER, window=window)

    assert [example["input_ids"] for example in found] == rows
    assert [example["labels"] for example in found] == [[X, *ids[1:]] for ids in rows]
    assert found.rows.fates == [Fate("split", "windows") if fate == "split" else Fate(fate)]


def test_a_window_drops_an_empty_document():
    found = PretrainDataset([document(""), Tokens([5], [5], [1])], TOKENIZER, window=(4, 2))

    assert len(found) == 0
    assert found.rows.fates == [Fate("dropped", "no target token")] * 2


def test_weights_are_absent_if_all_are_1():
    weighted = Document([Segment("a", 0.0), Segment("b", 0.5)])

    found = SFTDataset([document("hi"), weighted, Tokens([5, 6], [X, 6], [2], 3.0)], TOKENIZER)

    assert found[0] == row([*b"hi", EOS], [X, 105, EOS], weights=[1, 1, 1])
    assert found[1] == row([*b"ab", EOS], [X, 98, EOS], weights=[0, 0.5, 0.5])
    assert found[2] == row([5, 6], [X, 6], weights=[3, 3])
    assert "weights" not in SFTDataset([document("hi")], TOKENIZER)[0]
    zero = SFTDataset([Document([Segment("a", 0.0)]), Tokens([5, 6], [5, 6], [2], 0.0)], TOKENIZER)
    assert zero.rows.fates == [Fate("dropped", "no target token")] * 2


@pytest.mark.parametrize("kind", [SFTDataset, PretrainDataset])
def test_a_dataset_is_indexed_like_a_list(kind):
    found = kind([document("a"), document("b")], TOKENIZER)

    assert found[-1] == found[1] == row([ord("b"), EOS], [X, EOS])
    assert [example["input_ids"][0] for example in found] == [ord("a"), ord("b")]
    for index in (2, -3):
        with pytest.raises(IndexError):
            found[index]
    assert list(kind(iter([]), TOKENIZER)) == []


def test_spans_of_rows_are_views_of_the_arrays():
    rows = SFTDataset([document("ab"), document("cdef"), Document([Segment("g", 0.5)])], TOKENIZER).rows

    assert isinstance(rows, TokenizedRows)
    ids, labels, weights = rows.views(np.array([1, 2]), np.array([1, 0]), np.array([4, 1]))
    assert weights is not None
    assert [part.tolist() for part in ids] == [[*b"def"], [*b"g"]]
    assert [part.tolist() for part in labels] == [[*b"def"], [X]]
    assert [part.tolist() for part in weights] == [[1, 1, 1], [0.5]]
    assert all(part.base is rows.input_ids for part in ids)
    assert (rows.input_ids.dtype, rows.offsets.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize(
    ("example", "options", "what"),
    [
        (document("a" * 9), {"max_length": 4, "overflow": "error"}, "longer than max_length=4"),
        (Tokens([*range(9)], [*range(9)], [9]), {"max_length": 4, "overflow": "error"},
         "longer than max_length"),
        (document("a<|pad|>"), {"special_tokens_in_text": "error"}, "the text contains a control token"),
        (Chat([{"role": "user", "content": "\ufdd0"}, *CHAT.messages[1:]]), {},
         "the text contains a noncharacter"),
        (Chat([CHAT.messages[0], {**CHAT.messages[1], "reasoning": "hm"}]), {}, "has no place for reasoning"),
        (Tokens([260], [260], [1]), {}, "an id is not in the vocabulary"),
    ],
)  # fmt: skip
def test_an_error_of_the_data_carries_the_number_of_its_row(example, options, what):
    with pytest.raises(DataError, match=what) as error:
        SFTDataset([document("a"), document("b"), example], TOKENIZER, **options)

    assert error.value.row == 2


def test_example_numbers_continue_after_the_first_batch():
    with pytest.raises(DataError) as error:
        SFTDataset([*[document("a")] * 1500, document("<|pad|>")], TOKENIZER, special_tokens_in_text="error")

    assert error.value.row == 1500


def test_a_single_text_that_looks_rendered_is_accepted_in_any_batch():
    looks = document("<|im_start|> and <|im_end|> are marks.")

    assert len(SFTDataset([looks, *[document("a")] * 1000], TOKENIZER)) == 1001
    assert len(SFTDataset([*[document("a")] * 1000, looks], TOKENIZER)) == 1001


def test_control_tokens_in_the_text_are_counted_by_token():
    examples = [document("a<|pad|><|im_end|>"), prompted("<|pad|>", "a"), Tokens([256], [256], [1]), CHAT]

    assert SFTDataset(examples, TOKENIZER).rows.control_texts == {"<|pad|>": 2, "<|im_end|>": 1}


NASTY = [
    "plain",
    "<|im_end|>",
    "a<|pad|>b<|endoftext|>",
    "<|im_",
    "end|>",
    "<|im_<|im_end|>end|>",
    "  <|im_start|>\n",
    "\n",
    " ",
    "\u00e9\U0001f600\u200d\U0001f680<|pad|>",
    "\0",
    "x" * 300,
]


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
@pytest.mark.parametrize("policy", ["encode_as_text", "allow"])
@pytest.mark.parametrize("build", [byte_tokenizer, sentencepiece_tokenizer], ids=["bytes", "sentencepiece"])
def test_batched_rows_equal_rows_of_single_examples(stage, policy, build):
    tokenizer = build()
    examples = [prompted(f"{a}.", f"{b}.") for a in NASTY for b in NASTY] + [document(f"{a}.") for a in NASTY]
    pieces = [Segment(text, float(n % 3 == 0)) for n, text in enumerate(NASTY)]
    examples += [Document(pieces), Document(pieces[::-1])]
    options = LabelOptions(stage=stage, special_tokens_in_text=policy)

    found = tokenize_rows(examples, tokenizer, options)

    renderer = Renderer(tokenizer, options)
    alone = [encode_plans([renderer.plan(example)], renderer.encoder)[0][0] for example in examples]
    assert [found[number] for number in range(len(found))] == [one for one in alone if count_targets(one)]
    assert sum(found.control_texts.values()) == sum(len(renderer.control_texts(one)) for one in examples)


def test_garbage_collection_is_restored_after_an_error():
    before = gc.get_threshold()

    with pytest.raises(DataError), rare_collection():
        assert gc.get_threshold()[0] == 50_000
        raise DataError("no")

    assert gc.get_threshold() == before


def test_a_chat_that_ends_in_a_question_gets_a_note():
    asks = Chat([*CHAT.messages, CHAT.messages[0]])

    found = SFTDataset([asks], TOKENIZER)
    assert found.rows.fates == [Fate("used", "nothing is learned after the last answer")]
    assert found[0] == SFTDataset([CHAT], TOKENIZER)[0]
    assert PretrainDataset([asks], TOKENIZER).rows.fates == [Fate("used")]


def test_pretraining_masks_turns_of_weight_0():
    read = Chat([CHAT.messages[0], {**CHAT.messages[1], "weight": 0.0}])

    assert SFTDataset([read], TOKENIZER).rows.fates == [Fate("dropped", "no target token")]
    found = PretrainDataset([read], TOKENIZER)[0]
    assert (found["input_ids"][-3:], found["labels"][-3:]) == ([*b"Yo", IM_END], [X, X, X])
    assert found["labels"][1:-3] == found["input_ids"][1:-3]


@pytest.mark.parametrize(
    "options", [{"stage": "pretrain"}, {"train_on": TrainOn("all")}, {"train_on": TrainOn("everything")}]
)
@pytest.mark.parametrize(
    "example",
    [
        document("abc"),
        prompted("Say.", "A"),
        CHAT,
        Chat([CHAT.messages[0], {**CHAT.messages[1], "weight": 0.5}]),
        Tokens([5, 6], [5, 6], [2]),
    ],
)
def test_the_weight_of_a_record_applies_to_all_its_labels(example, options):
    weighted = [replace(example, weight=weight) for weight in (1.0, 0.5, 0.0)]
    rows = tokenize_rows(weighted, TOKENIZER, LabelOptions(**options))

    assert rows[1]["labels"] == rows[0]["labels"]
    assert rows[1]["weights"] == [weight / 2 for weight in rows[0]["weights"]]
    assert [fate.kind for fate in rows.fates] == ["used", "used", "dropped"]
