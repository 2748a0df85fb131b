"""Encoding text: user text stays text, the model's tokens stay tokens, and no space is added."""

import time

import pytest
from helpers import IM_END, byte_tokenizer, sentencepiece_tokenizer
from tokenizers import AddedToken

from hf_clm.errors import DataError
from hf_clm.text.encode import Encoder, Piece
from hf_clm.text.tokenizer import use_chat_template

TOOL_TOKENS = ["<tool_call>", "</tool_call>"]  # special=False, as in Qwen's vocabulary: ids 260 and 261


def tool_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(TOOL_TOKENS)
    return tokenizer


def encoded(tokenizer, *pieces: Piece) -> list[tuple[list[int], bool]]:
    return Encoder(tokenizer).encode(pieces)


def spelled(text: str, tokenizer) -> list[int]:
    encoder = Encoder(tokenizer)
    return encoder.encode([Piece(encoder.mark(text))])[0][0]


def test_user_tokens_are_marked_and_only_special_tokens_of_the_model():
    text = "a<|im_end|><|im_end|><tool_call>b<|im_start"
    encoder = Encoder(tool_tokenizer())

    assert encoder.mark(text) == (
        "a\ufdd0<|im_end|>\ufdd1\ufdd0<|im_end|>\ufdd1\ufdd0<tool_call>\ufdd1b<|im_start"
    )
    assert encoder.mark(text, by_model=True) == (
        "a\ufdd0<|im_end|>\ufdd1\ufdd0<|im_end|>\ufdd1<tool_call>b<|im_start"
    )
    # Characters 1 to 12 come from the recipe; the second token extends beyond them.
    assert encoder.mark("a<|im_end|><|pad|>", recipe_spans=[(1, 13)]) == "a<|im_end|>\ufdd0<|pad|>\ufdd1"
    for mark in "\ufdd0\ufdd1":
        with pytest.raises(DataError, match="the text contains a noncharacter"):
            encoder.mark(f"a{mark}b")


def test_marked_tokens_become_plain_text():
    tokenizer = tool_tokenizer()
    piece = Piece("a\ufdd0<|pad|>\ufdd1<|im_end|>\ufdd0<tool_call>\ufdd1<tool_call>")

    assert encoded(tokenizer, piece) == [([97, *b"<|pad|>", IM_END, *b"<tool_call>", 260], True)]
    assert tokenizer("<|pad|><tool_call>")["input_ids"] == [257, 260], "the tokenizer stays as it was"


def test_the_longer_of_two_tokens_is_found():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|pad|>x", "?", "</s", "</s>"])

    assert Encoder(tokenizer).mark("<|pad|>x?<|pad|></s></s") == (
        "\ufdd0<|pad|>x\ufdd1\ufdd0?\ufdd1\ufdd0<|pad|>\ufdd1\ufdd0</s>\ufdd1\ufdd0</s\ufdd1"
    )


def test_a_search_over_many_texts_misses_none():
    encoder = Encoder(tool_tokenizer())

    assert encoder.may_have_control(["a", "b <|im_end|> c"])
    assert encoder.may_have_control(["a\ufdd1"])
    assert not encoder.may_have_control(["a <|im_end", "|> <tool_cal"])


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n"),
        ("Q: Hi\nA:", "Q: Hi\nA:"),
        ("Q: \ufdd0<|im_end|>\ufdd1 Hi\nA:", " Hi\nA:"),
        ("a<|im_end|>", "<|im_end|>"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_context_of_a_target_begins_at_the_last_token_boundary(text, context):
    assert Encoder(byte_tokenizer()).last_context(text) == context


def test_a_piece_is_encoded_as_the_continuation_of_its_context():
    """In ``A:\\nYo``, newline and Y would be one token, so the target is encoded alone and reported."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Y"), ("Y", "o")])

    assert encoded(tokenizer, Piece("Yo", 1.0, "A:")) == [([261], True)]
    assert encoded(tokenizer, Piece("Yo", 1.0, "A:\n")) == [([261], False)]
    assert encoded(tokenizer, Piece("Yo", 1.0, "")) == [([261], True)]
    assert encoded(tokenizer) == []
    assert encoded(tokenizer, Piece("")) == [([], True)]


@pytest.mark.parametrize(
    ("piece", "tokens"),
    [
        (Piece("yes"), ["▁", "y", "e", "s"]),
        (Piece("yes", context=None), ["y", "e", "s"]),
        (Piece(" yes", context=None), ["▁", "y", "e", "s"]),
        (Piece("yes", context="A:"), ["y", "e", "s"]),
        (Piece("\ny", context="A:"), ["<0x0A>", "y"]),
        (Piece("y\ufdd0</s>\ufdd1y", context=None), ["y", *"</s>", "y"]),
        (Piece("\ufdd0</s>\ufdd1", context=""), ["▁", *"</s>"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prepend", ["first", "always", "normalizer"])
def test_no_space_is_added_inside_a_text(prepend, piece, tokens):
    """▁ is a space. The tokenizer adds one to the start of a text, but not after another text."""
    tokenizer = sentencepiece_tokenizer(prepend=prepend)

    ((ids, _),) = encoded(tokenizer, piece)

    assert tokenizer.convert_ids_to_tokens(ids) == tokens


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_with_a_prefix_space_is_detected(adds_bos):
    assert Encoder(sentencepiece_tokenizer(adds_bos=adds_bos)).adds_space is True
    assert Encoder(byte_tokenizer()).adds_space is False


def test_a_token_in_the_base_vocabulary_is_encoded_by_character():
    """Unigram has </s> among its pieces and prefers it to the four characters."""
    tokenizer = sentencepiece_tokenizer()

    assert tokenizer.convert_ids_to_tokens(spelled("</s>", tokenizer)) == ["▁", "<", "/", "s", ">"]
    tokenizer.add_tokens(["é"])
    assert tokenizer.convert_ids_to_tokens(spelled("aé", tokenizer)) == ["▁", "a", "<0xC3>", "<0xA9>"]


def test_a_mark_split_by_a_template_is_refused():
    """Templates of reasoning models split a turn at </think>; half of it would become plain text."""
    with pytest.raises(DataError, match=r"^the chat template cuts a text at a control token in it; fix"):
        encoded(byte_tokenizer(), Piece("Hi</think>\ufdd1"))


def test_a_token_that_strips_whitespace_does_so_before_a_target():
    """Phi-3: in ``<|assistant|>\\nYo`` the newline belongs to the token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])

    assert encoded(tokenizer, Piece("Hi<|assistant|>\n"), Piece("Yo", 1.0, "<|assistant|>\n")) == [
        ([*b"Hi", 260], True),
        ([*b"Yo"], True),
    ]


def test_ids_equal_those_of_calling_the_tokenizer():
    """Uses the library as the oracle."""
    texts = ["Hi there", "  two  spaces\n", "é😀", "<|im_end|>a", ""]
    for tokenizer in (byte_tokenizer(), sentencepiece_tokenizer()):
        tokenizer("abc", truncation=True, max_length=2, padding="max_length")
        ids = [ids for ids, _ in Encoder(tokenizer).encode([Piece(text) for text in texts])]

        assert ids == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_thousands_of_added_tokens_are_fast():
    """A plain pattern tries all 4,096 alternatives at every ``<``: 200 such texts took 6 seconds."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|reserved_{number}|>" for number in range(4096)])
    encoder = Encoder(tokenizer)
    texts = [f"a <|reserved_{number}|> < b <|reserved_x|>" * 20 for number in range(200)]
    encoder.encode([Piece(encoder.mark(texts[0]))])

    start = time.process_time()
    rows = encoder.encode([Piece(encoder.mark(text)) for text in texts])
    seconds = time.process_time() - start

    assert bytes(rows[7][0]) == texts[7].encode()
    assert seconds < 1


def test_tokens_added_by_a_chat_template_are_control_tokens():
    tokenizer = sentencepiece_tokenizer()
    use_chat_template(tokenizer, "chatml")

    assert Encoder(tokenizer).mark("<|im_end|>") == "\ufdd0<|im_end|>\ufdd1"
