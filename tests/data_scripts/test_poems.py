"""The shipped poems have the properties that memorizing them relies on."""

import json
from collections import Counter
from pathlib import Path

import pytest

POEMS = Path(__file__).parents[2] / "data" / "sft" / "poems.jsonl"


@pytest.fixture(scope="module")
def poems() -> list[dict[str, str]]:
    return [json.loads(line) for line in POEMS.read_text(encoding="utf-8").split("\n")[:-1]]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def test_there_are_48_records_with_exactly_the_three_keys(poems):
    assert len(poems) == 48
    assert all(list(poem) == ["instruct", "input", "label"] for poem in poems)


def test_half_of_the_poems_are_chinese_and_none_mixes_the_languages(poems):
    kinds = Counter(tuple(is_chinese(text) for text in poem.values()) for poem in poems)

    assert kinds == {(True, True, True): 24, (False, False, False): 24}


def test_the_file_is_plain_utf8_with_a_final_newline_and_no_escaped_letters():
    content = POEMS.read_bytes()

    assert content.endswith(b"}\n")
    assert b"\\u" not in content and b"\r" not in content


def test_every_instruction_is_unique(poems):
    assert len({poem["instruct"] for poem in poems}) == 48


def test_no_line_of_a_poem_appears_twice(poems):
    lines = Counter(
        line for poem in poems for half in ("input", "label") for line in poem[half].strip().split("\n")
    )

    assert [line for line, count in lines.items() if count > 1] == []
    assert len(lines) == 192  # 48 poems of two and two lines


def test_no_half_contains_or_begins_like_the_other(poems):
    for poem in poems:
        first, second = poem["input"].strip(), poem["label"]
        assert first not in second and second not in first
        assert first[:2] != second[:2]


def test_every_half_is_short(poems):
    for poem in poems:
        shortest, longest = (10, 30) if is_chinese(poem["label"]) else (20, 80)
        assert shortest <= len(poem["input"].strip()) <= longest
        assert shortest <= len(poem["label"]) <= longest


def test_no_text_contains_a_control_token_or_stray_blanks(poems):
    for text in (text for poem in poems for text in poem.values()):
        assert "<|" not in text
        assert [line.strip() for line in text.split("\n")] == text.split("\n")


def test_an_input_contains_its_own_line_breaks(poems):
    """The format joins instruct, input and label directly."""
    assert all(poem["input"] == f"\n{poem['input'].strip()}\n" for poem in poems)
