"""Rows in a terminal: every line literal, with marks and with colours."""

import numpy as np
import pytest
from helpers import EOS, IM_END, PAD, X, byte_tokenizer

from hf_clm.pages.rows import Document, Row, Vocabulary
from hf_clm.pages.terminal import legend, to_lines

VOCABULARY = Vocabulary(byte_tokenizer())


def to_row(ids: list[int], labels: list[int], *documents: Document) -> Row:
    return Row(0, np.array(ids), np.array(labels), documents or (Document(0, len(ids)),))


def to_trained(text: str, *, read: int = 0) -> Row:
    """A token for each byte; all but the first ``read`` are trained."""
    ids = [*text.encode()]
    return to_row(ids, [X] * read + ids[read:])


def marked(row: Row, width: int = 80) -> list[str]:
    return to_lines(row, VOCABULARY, width=width, colors=False)


def test_a_row_shows_places_flags_turns_cuts_and_padding():
    first = Document(0, 5, place="d.jsonl:17", roles=((0, "prompt"), (3, "completion")))
    flags = {"cut answer": "7 of 8 target tokens are gone", "duplicate": ""}
    second = Document(5, 7, place="d.jsonl:2", before=3, after=9, flags=flags)
    ids = [*b"ab\nc", EOS, *b"xy", PAD, PAD]
    row = to_row(ids, [X, X, X, 99, EOS, X, 121, X, X], first, second)

    assert marked(row) == [
        "row 0: 7 tokens, 2 documents, 3 targets (42.9%)",
        "┌ d.jsonl:17  5 tokens, 2 targets",
        "├ prompt",
        "│ ab↵",
        "├ completion",
        "│ ⟦c⟪<|endoftext|>⟫⟧",
        "┌ d.jsonl:2  2 tokens, 1 targets",
        "├ ! cut answer: 7 of 8 target tokens are gone",
        "├ ! duplicate",
        "├ … 3 tokens before this: in another row",
        "│ x⟦y⟧",
        "├ … 9 tokens after this: cut off",
        "└ padding: 2 × <|pad|>",
    ]


def test_colours_underline_what_is_trained():
    row = to_row([*b"ab", IM_END, 99, EOS], [X, X, X, 99, EOS])

    lines = to_lines(row, VOCABULARY, width=80, colors=True)

    assert lines[2] == (
        "\x1b[36m│ \x1b[0m\x1b[2mab\x1b[0m\x1b[35m<|im_end|>\x1b[0m"
        "\x1b[4;32mc\x1b[0m\x1b[4;35m<|endoftext|>\x1b[0m"
    )


def test_padding_is_struck_out_in_colour():
    row = to_row([97, PAD], [X, X], Document(0, 1))

    last = to_lines(row, VOCABULARY, width=80, colors=True)[-1]

    assert last == "\x1b[36m└ padding: \x1b[0m\x1b[9;90m1 × <|pad|>\x1b[0m"


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (to_trained("茶🐉", read=3), ["│ 茶⟦🐉⟧"]),
        (to_trained("茶a", read=1), ["│ ⦃茶⦄⟦a⟧"]),
        (to_trained("a\nb\n", read=1), ["│ a⟦↵", "│ b↵⟧"]),
        (to_trained("⟦a⟧↵", read=7), ["│ \\u27e6a\\u27e7⟦\\u21b5⟧"]),
        (to_trained("\x1b[2J\r\u202e"), ["│ ⟦\\x1b[2J\\r\\u202e⟧"]),
        (to_trained("<|im_end|>"), ["│ ⟦<|im_end|>⟧"]),
        (to_row([IM_END], [IM_END]), ["│ ⟦⟪<|im_end|>⟫⟧"]),
        (to_row([IM_END, 97], [X, X]), ["│ ⟪<|im_end|>⟫a"]),
    ],
)
def test_marks_cannot_be_spelled_by_content(row, shown):
    assert marked(row)[2:] == shown


def test_no_control_character_reaches_the_terminal_from_places_and_details():
    document = Document(0, 1, place="\x1b[2Jd:1", flags={"duplicate": "of \x07x"})

    lines = marked(to_row([97], [X], document))

    assert lines[1:3] == ["┌ \\x1b[2Jd:1  1 tokens, 0 targets", "├ ! duplicate: of \\x07x"]


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abcdefghijkl", 12, ["│ ⟦abcdefghi", "│ jkl⟧"]),
        ("茶茶茶茶茶茶", 12, ["│ ⟦茶茶茶茶", "│ 茶茶⟧"]),
        ("茶" * 5, 3, ["│ ⟦茶茶茶", "│ 茶茶⟧"]),
        ("e\u0301" * 9 + "👩\u200d🚀", 12, ["│ ⟦" + "e\u0301" * 9, "│ 👩\u200d🚀⟧"]),
        ("a" * 9 + "\nb", 12, ["│ ⟦aaaaaaaaa", "│ ↵", "│ b⟧"]),
    ],
)
def test_lines_are_wrapped_by_columns(text, width, shown):
    """⟦ takes a column of the 10 beside the frame; at least 8 are used, however narrow the terminal."""
    assert marked(to_trained(text), width)[-len(shown) :] == shown


def test_the_legend_names_every_mark():
    text = "⟦trained⟧  read only  ⟪control token⟫  ⦃partly trained character⦄"

    assert legend(colors=False) == text
    assert "\x1b[4;32mtrained\x1b[0m" in legend(colors=True)
