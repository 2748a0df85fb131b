"""A tokenizer trained on a few lines of text."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_clm.errors import DataError
from hf_clm.text.tokenizer import load_tokenizer
from hf_clm.text.train_tokenizer import train_bpe, train_characters, train_tokenizer, train_unigram

TEXT = ["the cat sat on the mat\n\n", "the hat is on the cat, 雪が降る\n"]


@lru_cache
def trained(kind):
    return train_tokenizer(TEXT, kind=kind, vocab_size=300)


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
def test_any_text_decodes_unchanged(text):
    tokenizer = train_bpe(TEXT)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_token_is_added_to_a_text():
    assert train_bpe(TEXT, vocab_size=258)("abc")["input_ids"] == [66, 67, 68]  # a is the 65th printable byte


def test_the_same_text_gives_the_same_tokenizer():
    first, second = train_bpe(TEXT), train_bpe(iter(TEXT))

    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_it_saves_an_ordinary_folder_with_a_separate_pad_token(tmp_path):
    train_bpe(TEXT, pad_token="[PAD]").save_pretrained(tmp_path)

    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.pad_token_id) == (
            "<|endoftext|>",
            "[PAD]",
            1,
        )
        assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


NASTY = [
    "  two  spaces\n\n\ttab \r\n",
    "e\u0301 is not é, ﬁ is not fi",
    "👩‍👩‍👧 🏳️‍🌈",
    "▁ <0x41> <0xC3><0xA9> ##x Ġ Ċ",
    "\x00\x7f\x85\u2028\ufeff",
    "don't , . n't",
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None)
@given(text=st.text())
def test_byte_fallback_decodes_any_text_unchanged(kind, text):
    tokenizer = trained(kind)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(f"the{text}cat")["input_ids"]) == f"the{text}cat"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters"])
@pytest.mark.parametrize("text", NASTY)
def test_every_kind_decodes_whitespace_marks_and_byte_names_unchanged(kind, text):
    tokenizer = train_tokenizer([*NASTY, *TEXT], kind=kind, vocab_size=300)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def names_a_control_token(text):
    return any(token in text for token in ("<|endoftext|>", "<|pad|>", "<|unk|>"))


@settings(deadline=None)
@example(texts=["<|pad", "|>"])
@given(texts=st.lists(st.text(min_size=1).filter(lambda text: not names_a_control_token(text)), min_size=1))
def test_a_token_is_a_character_of_the_texts(texts):
    tokenizer = train_characters(texts)

    for text in texts:
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == list(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 3 + len(set("".join(texts)))


def test_a_control_token_in_a_text_is_one_token_and_decodes_unchanged():
    tokenizer = train_characters(["a<|pad|>b"])

    assert tokenizer.convert_ids_to_tokens(tokenizer("a<|pad|>b")["input_ids"]) == ["a", "<|pad|>", "b"]
    assert tokenizer.decode(tokenizer("a<|pad|>b")["input_ids"]) == "a<|pad|>b"


def test_characters_are_numbered_in_unicode_order_after_the_control_tokens():
    tokenizer = train_characters(["banana\n", "雪"])

    assert tokenizer.get_vocab() == {
        "<|endoftext|>": 0,
        "<|pad|>": 1,
        "<|unk|>": 2,
        "\n": 3,
        "a": 4,
        "b": 5,
        "n": 6,
        "雪": 7,
    }
    assert tokenizer("ban\n雪")["input_ids"] == [5, 4, 6, 3, 7]
    assert tokenizer("bad")["input_ids"] == [5, 4, 2]


def test_unigram_keeps_frequent_words_and_encodes_unknown_characters_by_bytes():
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    tokenizer = train_unigram([text], vocab_size=600)

    assert tokenizer.tokenize("of the License é")[-5:] == [" the", " License", " ", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 257]) == ["<|endoftext|>", "<|pad|>", "<0x00>", "<0xFF>"]
    assert len(tokenizer) == 600


def test_unigram_keeps_its_size_if_the_texts_have_more_characters():
    letters = [chr(code) for code in range(0x4E00, 0x4F00)]

    tokenizer = train_unigram(letters * 2, vocab_size=300)

    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("".join(letters))["input_ids"]) == "".join(letters)


@pytest.mark.parametrize("kind", ["characters", "unigram"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma"])
def test_a_fresh_process_opens_it_with_plain_transformers(tmp_path, kind, model_type):
    tokenizer = train_tokenizer(NASTY, kind=kind, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps(NASTY), encoding="utf-8")
    code = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(open(sys.argv[1] + "/texts.json", encoding="utf-8"))
ids = [tokenizer(text)["input_ids"] for text in texts]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids] == texts, tokenizer.pad_token]))
"""

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )

    ids, is_equal, pad_token = json.loads(done.stdout)
    assert ids == [tokenizer(text)["input_ids"] for text in NASTY]
    assert (is_equal, pad_token) == (True, "<|pad|>")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(kind, texts):
    with pytest.raises(DataError, match=r"^tokenizer.train: no text to train a tokenizer on$"):
        train_tokenizer(texts, kind=kind)
