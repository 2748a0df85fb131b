"""A collated batch as rows, and tokens as text."""

import pytest
import torch
from helpers import EOS, IM_END, PAD, X, byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.pages.rows import Document, Row, Vocabulary, escape, to_rows

LONG = {"input_ids": [65, 66, 67, EOS], "labels": [X, X, 67, EOS]}
SHORT = {"input_ids": [68, EOS], "labels": [X, EOS]}
VOCABULARY = Vocabulary(byte_tokenizer())


def test_rows_of_a_padded_batch_end_before_their_padding():
    rows = to_rows(DataCollatorForCausalLM(PAD)([LONG, SHORT]), first_number=8)

    assert [row.number for row in rows] == [8, 9]
    assert [row.input_ids.tolist() for row in rows] == [[65, 66, 67, EOS], [68, EOS, PAD, PAD]]
    assert [row.documents for row in rows] == [(Document(0, 4),), (Document(0, 2),)]
    assert [row.length for row in rows] == [4, 2]


def test_rows_of_a_flattened_batch_are_told_by_their_lengths():
    packed = {"input_ids": [65, 66, 67], "labels": [X, 66, X], "position_ids": [0, 1, 0]}

    rows = to_rows(DataCollatorForPackedCausalLM()([packed, SHORT]), [3, 2])

    assert [row.input_ids.tolist() for row in rows] == [[65, 66, 67], [68, EOS]]
    assert [row.labels.tolist() for row in rows] == [[X, 66, X], [X, EOS]]
    assert rows[0].documents == (Document(0, 2), Document(2, 3))
    assert rows[1].documents == (Document(0, 2),)


def test_a_flattened_batch_of_unknown_rows_is_one_row():
    (row,) = to_rows(DataCollatorForPackedCausalLM()([LONG, SHORT]))

    assert row.documents == (Document(0, 4), Document(4, 6))


def test_a_batch_without_a_mask_has_no_padding():
    (row,) = to_rows({"input_ids": torch.tensor([[65, PAD]]), "labels": torch.tensor([[X, PAD]])})

    assert row.documents == (Document(0, 2),)


def test_what_is_trained_comes_from_the_labels():
    (row,) = to_rows(DataCollatorForPackedCausalLM()([LONG]))

    assert row.trained.tolist() == [False, False, True, True]


def test_the_worst_row_has_the_worst_flag():
    def row(*flags: str) -> Row:
        (bare,) = to_rows(DataCollatorForPackedCausalLM()([SHORT]))
        documents = (Document(0, 2, flags=dict.fromkeys(flags, "")),)
        return Row(0, bare.input_ids, bare.labels, documents)

    fine, duplicate, two, cut = row(), row("duplicate"), row("duplicate", "control text"), row("cut answer")

    assert fine.severity < duplicate.severity < two.severity < cut.severity < row("nothing trained").severity


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        ([*b"ab"], [(0, 1, "a"), (1, 2, "b")]),
        ([*"茶a".encode()], [(0, 3, "茶"), (3, 4, "a")]),
        ([*"🐉🍵".encode()], [(0, 4, "🐉"), (4, 8, "🍵")]),
        ([*"\ufffd".encode()], [(0, 3, "\ufffd")]),
        ([0xE8, 0x8C], [(0, 2, "\\xe8\\x8c")]),
        ([0xB6, 97], [(0, 1, "\\xb6"), (1, 2, "a")]),
        ([0xE8, IM_END, 97], [(0, 1, "\\xe8"), (1, 2, "<|im_end|>"), (2, 3, "a")]),
        ([*b"<|im_end|>"][:3], [(0, 1, "<"), (1, 2, "|"), (2, 3, "i")]),
        ([97, 900], [(0, 1, "a"), (1, 2, "<id 900>")]),
        ([], []),
    ],
)
def test_tokens_stay_together_until_they_are_whole_characters(ids, groups):
    assert list(VOCABULARY.to_groups(ids)) == groups


def test_tokens_of_sentencepiece_are_spelled_with_spaces_and_bytes():
    words = ["▁hi", "<0xE8>", "<0x8C>", "<0xB6>", "é"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))

    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))

    assert list(vocabulary.to_groups([0, 1, 2, 3, 4])) == [(0, 1, " hi"), (1, 4, "茶"), (4, 5, "é")]


def test_only_added_tokens_and_unused_ids_are_control():
    assert [i for i in [60, 255, EOS, PAD, IM_END, 900] if VOCABULARY.is_control(i)] == [
        EOS,
        PAD,
        IM_END,
        900,
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\r\t\x07\x9b", "\\r\\t\\x07\\x9b"),
        ("x\u202ey\u2066z", "x\\u202ey\\u2066z"),
        ("\u200b\ufeff\u2028", "\\u200b\\ufeff\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("茶 👩\u200d🚀\n", "茶 👩\u200d🚀\n"),
        ("⟦x]", "\\u27e6x]"),
    ],
)
def test_what_steers_a_terminal_or_hides_is_spelled(text, shown):
    assert escape(text, also="⟦⟧") == shown
