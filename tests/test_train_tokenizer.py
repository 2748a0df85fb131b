"""A tokenizer trained on a few lines of text."""

import pytest
from transformers import AutoTokenizer

from hf_clm.errors import DataError
from hf_clm.tokenizer import load_tokenizer
from hf_clm.train_tokenizer import train_bpe

TEXT = ["the cat sat on the mat\n\n", "the hat is on the cat, 雪が降る\n"]


def test_the_control_tokens_come_first_and_then_all_bytes():
    tokenizer = train_bpe(TEXT, vocab_size=300)

    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert [len(tokenizer(bytes([byte]).decode("latin-1"))["input_ids"]) for byte in (33, 65, 126)] == [
        1,
        1,
        1,
    ]


def test_frequent_pairs_are_merged_until_the_vocabulary_is_full():
    tokenizer = train_bpe(TEXT, vocab_size=262)

    assert tokenizer.convert_ids_to_tokens([258, 259, 260, 261]) == ["at", "he", "the", "cat"]
    assert len(tokenizer) == 262
    assert tokenizer("the cat")["input_ids"] == [260, 222, 261]  # 222 is the space


def test_a_pair_that_is_too_rare_is_not_merged():
    assert len(train_bpe(["abab", "abab"], min_frequency=100)) == 258


@pytest.mark.parametrize("text", ["the cat", "  two  spaces\n\n\ttab ", "雪が降る 🦆", "\x00\x7f", "don't  "])
def test_any_text_comes_back_as_it_was(text):
    tokenizer = train_bpe(TEXT)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_adds_no_token_of_its_own_to_a_text():
    assert train_bpe(TEXT, vocab_size=258)("abc")["input_ids"] == [66, 67, 68]  # a is the 65th printable byte


def test_the_same_text_gives_the_same_tokenizer():
    first, second = train_bpe(TEXT), train_bpe(iter(TEXT))

    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_it_is_an_ordinary_folder_with_a_pad_token_of_its_own(tmp_path):
    train_bpe(TEXT, pad_token="[PAD]").save_pretrained(tmp_path)

    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.pad_token_id) == (
            "<|endoftext|>",
            "[PAD]",
            1,
        )
        assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(texts):
    with pytest.raises(DataError, match=r"^tokenizer.train: no text to train a tokenizer on$"):
        train_bpe(texts)
