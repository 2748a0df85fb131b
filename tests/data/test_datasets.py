"""Datasets over a few rows: what is kept of each, in literals; a byte is its own id."""

import gc

import pytest
from helpers import EOS, IM_END, X, byte_tokenizer, sentencepiece_tokenizer

from hf_clm.data.datasets import PretrainDataset, SFTDataset, rare_collection
from hf_clm.data.labels import Fate, count_targets, encode_texts, tokenize_segments
from hf_clm.data.segments import control_texts, to_document, to_segments
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, PromptExample, Segment, SegmentsExample, TextExample, TokenizedExample
from hf_clm.tokenizer import use_chat_template
from hf_clm.train_tokenizer import train_bpe

TOKENIZER = byte_tokenizer()
use_chat_template(TOKENIZER, "chatml")
CHAT = ChatExample([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])


def row(ids: list[int], labels: list[int]) -> TokenizedExample:
    return {"input_ids": ids, "labels": labels}


def test_sft_learns_the_targets_of_any_kind_of_example():
    segments = SegmentsExample([Segment("a", is_target=False), Segment("b", is_target=True)])

    dataset = SFTDataset([PromptExample("p", "q"), TextExample("hi"), segments, CHAT], TOKENIZER)

    assert [dataset[0], dataset[1], dataset[2]] == [
        row([*b"pq", EOS], [X, ord("q"), EOS]),
        row([*b"hi", EOS], [X, ord("i"), EOS]),
        row([*b"ab", EOS], [X, ord("b"), EOS]),
    ]
    assert [label for label in dataset[3]["labels"] if label != X] == [*b"Yo", IM_END]
    assert len(dataset) == 4


def test_pretraining_learns_the_whole_text_of_any_kind_of_example():
    segments = SegmentsExample([Segment("a", is_target=False), Segment("b", is_target=True)])
    learned = TOKENIZER.encode("im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>")

    dataset = PretrainDataset([PromptExample("p", "q"), TextExample("hi"), segments, CHAT], TOKENIZER)

    assert [dataset[0], dataset[1], dataset[2]] == [
        row([*b"pq", EOS], [X, ord("q"), EOS]),
        row([*b"hi", EOS], [X, ord("i"), EOS]),
        row([*b"ab", EOS], [X, ord("b"), EOS]),
    ]
    assert dataset[3]["labels"][1:] == dataset[3]["input_ids"][1:]
    assert dataset[3]["input_ids"][-22:] == learned[-22:]


def test_prompt_and_completion_of_a_pretrained_document_are_one_text():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])

    assert PretrainDataset([PromptExample("Q\n", "\nA")], tokenizer)[0] == row(
        [81, 260, 65, EOS], [X, 260, 65, EOS]
    )
    assert SFTDataset([PromptExample("Q\n", "\nA")], tokenizer)[0] == row(
        [81, 10, 10, 65, EOS], [X, X, 10, 65, EOS]
    )


def test_tokenized_examples_pass_through_with_their_first_label_masked():
    tokenized = row([7, 8, 9], [7, X, 9])

    assert SFTDataset([tokenized, TextExample("hi")], TOKENIZER)[0] == row([7, 8, 9], [X, X, 9])
    assert SFTDataset([tokenized, TextExample("hi")], TOKENIZER)[1] == row([*b"hi", EOS], [X, ord("i"), EOS])
    assert PretrainDataset([tokenized], TOKENIZER)[0] == row([7, 8, 9], [X, 8, 9])
    assert tokenized == row([7, 8, 9], [7, X, 9])


def test_every_row_has_a_fate_and_the_kept_ones_name_their_source():
    examples = [
        PromptExample("p", "q"),  # 3 tokens
        PromptExample("pppp", "q"),  # 6
        PromptExample("p", "qqqq"),  # 6, of which 5 are the target
        row([1, 2], [X, X]),
        TextExample("hi"),
    ]

    dataset = SFTDataset(examples, TOKENIZER, max_length=4)

    assert dataset.rows.fates == [
        Fate("used"),
        Fate("cut", cut_tokens=2),
        Fate("dropped", "no whole target fits in max_length"),
        Fate("dropped", "no target token"),
        Fate("used"),
    ]
    assert dataset.rows.sources.tolist() == [0, 1, 4]
    assert dataset.rows.lengths.tolist() == [3, 4, 3]
    assert [dataset[i]["input_ids"] for i in range(3)] == [[*b"pq", EOS], [*b"ppq", EOS], [*b"hi", EOS]]


def test_pretraining_splits_a_long_document_and_counts_it_once():
    dataset = PretrainDataset([TextExample("abcde"), TextExample("x")], TOKENIZER, max_length=4)

    assert [dataset[i] for i in range(3)] == [
        row([*b"abcd"], [X, *b"bcd"]),
        row([*b"de", EOS], [X, ord("e"), EOS]),
        row([ord("x"), EOS], [X, EOS]),
    ]
    assert dataset.rows.fates == [Fate("split"), Fate("used")]
    assert dataset.rows.sources.tolist() == [0, 0, 1]


def test_without_max_length_every_row_stays_whole():
    assert SFTDataset([TextExample("x" * 5000)], TOKENIZER).rows.lengths.tolist() == [5001]


@pytest.mark.parametrize(
    ("window", "rows", "fate"),
    [
        ((4, 2), [[*b"abcd"], [*b"cdef"], [*b"ef", EOS]], "split"),
        ((4, 3), [[*b"abcd"], [*b"def", EOS]], "split"),
        ((4, 4), [[*b"abcd"], [*b"ef", EOS]], "split"),
        ((7, 3), [[*b"abcdef", EOS]], "used"),
        ((9, 1), [[*b"abcdef", EOS]], "used"),
    ],
)
def test_a_window_slides_over_a_document(window, rows, fate):
    dataset = PretrainDataset([TextExample("abcdef")], TOKENIZER, window=window)

    assert [dataset[i]["input_ids"] for i in range(len(dataset))] == rows
    assert [dataset[i]["labels"] for i in range(len(dataset))] == [[X, *ids[1:]] for ids in rows]
    assert dataset.rows.fates == [Fate("split", "windows") if fate == "split" else Fate(fate)]


def test_a_window_drops_an_empty_document():
    dataset = PretrainDataset([TextExample(""), row([5], [5])], TOKENIZER, window=(4, 2))

    assert len(dataset) == 0
    assert dataset.rows.fates == [Fate("dropped", "no target token")] * 2


@pytest.mark.parametrize("kind", [SFTDataset, PretrainDataset])
def test_a_dataset_is_indexed_like_a_list(kind):
    dataset = kind([TextExample("a"), TextExample("b")], TOKENIZER)

    assert dataset[-1] == dataset[1] == row([ord("b"), EOS], [X, EOS])
    assert [example["input_ids"][0] for example in dataset] == [ord("a"), ord("b")]
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]


def test_no_example_gives_an_empty_dataset():
    assert len(SFTDataset([], TOKENIZER)) == 0
    assert list(PretrainDataset(iter([]), TOKENIZER)) == []


def test_a_piece_of_a_row_is_an_example_of_its_own():
    rows = PretrainDataset([TextExample("ab"), TextExample("cdef")], TOKENIZER).rows

    assert rows.piece(1, start=1, stop=4) == row([*b"def"], [X, *b"ef"])
    assert rows.piece(1, start=3, stop=5) == row([ord("f"), EOS], [X, EOS])


@pytest.mark.parametrize(
    ("examples", "options", "what"),
    [
        ([TextExample("a" * 9)], {"max_length": 4, "overflow": "error"}, "longer than max_length=4"),
        ([TextExample("<|pad|>")], {"special_tokens_in_text": "error"}, "the text holds a control token"),
        ([ChatExample([{"role": "user", "content": "\ufdd0"}])], {}, "the text holds a noncharacter"),
        (
            [row(list(range(9)), list(range(9)))],
            {"max_length": 4, "overflow": "error"},
            "longer than max_length=4",
        ),
    ],
)
def test_an_error_of_the_data_carries_the_number_of_its_row(examples, options, what):
    good = [TextExample("a"), TextExample("b")]

    with pytest.raises(DataError, match=what) as error:
        SFTDataset([*good, *examples], TOKENIZER, **options)

    assert error.value.row == 2


def test_the_number_of_a_row_counts_on_after_the_first_batch_of_rows():
    examples = [TextExample("a")] * 1500

    with pytest.raises(DataError) as error:
        SFTDataset([*examples, TextExample("<|pad|>")], TOKENIZER, special_tokens_in_text="error")

    assert error.value.row == 1500


def test_control_tokens_in_the_text_are_counted_by_token():
    examples = [TextExample("<|pad|><|im_end|>"), PromptExample("<|pad|>", "a"), row([256], [256])]

    dataset = SFTDataset(examples, TOKENIZER)

    assert dataset.rows.control_texts == {"<|pad|>": 2, "<|im_end|>": 1}


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


@pytest.mark.parametrize("kind", [SFTDataset, PretrainDataset])
@pytest.mark.parametrize("policy", ["encode_as_text", "allow"])
@pytest.mark.parametrize("build", [byte_tokenizer, sentencepiece_tokenizer], ids=["bytes", "sentencepiece"])
def test_rows_of_a_batch_are_tokenized_as_each_alone_without_the_search_of_the_batch(kind, policy, build):
    """The other path: one segment after the other through the tokenizer's own call, every text searched."""
    tokenizer = build()
    examples = [PromptExample(a, b) for a in NASTY for b in NASTY] + [TextExample(text) for text in NASTY]
    pieces = [Segment(text, n % 3 == 0) for n, text in enumerate(NASTY)]
    examples += [SegmentsExample(pieces), SegmentsExample(pieces[::-1])]

    dataset = kind(examples, tokenizer, special_tokens_in_text=policy)

    documents = [to_document(example) for example in examples] if kind is PretrainDataset else examples
    segments = [to_segments(example, tokenizer, special_tokens_in_text=policy) for example in documents]
    alone = [tokenize_segments(parts, tokenizer) for parts in segments]
    assert list(dataset) == [example for example in alone if count_targets(example)]
    assert sum(dataset.rows.control_texts.values()) == sum(
        len(control_texts(example, tokenizer)) for example in documents
    )


def test_garbage_is_collected_as_before_after_an_error():
    before = gc.get_threshold()

    with pytest.raises(DataError), rare_collection():
        assert gc.get_threshold()[0] == 50_000
        raise DataError("no")

    assert gc.get_threshold() == before


def test_ids_are_those_of_the_tokenizers_own_call():
    """The library is the oracle; also after a call that truncates and pads."""
    for tokenizer in (byte_tokenizer(), sentencepiece_tokenizer(), train_bpe(NASTY, vocab_size=300)):
        tokenizer("abc", truncation=True, max_length=2, padding="max_length")

        assert encode_texts(NASTY, tokenizer) == tokenizer(NASTY, add_special_tokens=False)["input_ids"]
    assert encode_texts([], TOKENIZER) == []


def test_sft_can_learn_the_last_turn_or_everything():
    chat = ChatExample(
        [*CHAT.messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Bye"}]
    )

    last = SFTDataset([chat], TOKENIZER, train_on="last_turn")[0]
    everything = SFTDataset([chat], TOKENIZER, train_on="everything")[0]

    assert [label for label in last["labels"] if label != X] == [*b"Bye", IM_END]
    assert everything["labels"] == [X, *everything["input_ids"][1:]]
    assert last["input_ids"] == [*everything["input_ids"], 10]


def test_pretraining_learns_a_turn_that_sft_only_reads():
    messages = [CHAT.messages[0], {**CHAT.messages[1], "train": False}]

    assert SFTDataset([ChatExample(messages)], TOKENIZER).rows.fates == [Fate("dropped", "no target token")]
    assert PretrainDataset([ChatExample(messages)], TOKENIZER)[0]["labels"][-3:] == [*b"Yo", IM_END]
