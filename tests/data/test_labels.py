"""Segments as ids and labels, in literals: a byte is its own id, X is a position without a label."""

import pytest
from helpers import EOS, IM_END, IM_START, PAD, X, byte_tokenizer, sentencepiece_tokenizer

from hf_clm.data.labels import (
    Fate,
    adds_leading_space,
    count_targets,
    encode_plain,
    fit,
    mask_first,
    slice_example,
    to_filler,
    tokenize_batch,
    tokenize_segments,
)
from hf_clm.data.segments import to_segments
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, PromptExample, Segment, SegmentsExample, TextExample, TokenizedExample
from hf_clm.tokenizer import use_chat_template
from hf_clm.train_tokenizer import train_bpe

P, Q = ord("p"), ord("q")
TOKENIZER = byte_tokenizer()
use_chat_template(TOKENIZER, "chatml")


def T(text: str, *, plain: bool = False) -> Segment:
    return Segment(text, is_target=True, is_plain=plain)


def R(text: str, *, plain: bool = False) -> Segment:
    return Segment(text, is_target=False, is_plain=plain)


def tokenized(example, tokenizer=TOKENIZER, **options) -> TokenizedExample:
    return tokenize_segments(to_segments(example, tokenizer, **options), tokenizer)


def row(ids: list[int], labels: list[int]) -> TokenizedExample:
    return {"input_ids": ids, "labels": labels}


def test_a_prompt_is_masked_and_a_target_ends_in_a_labelled_stop_token():
    assert tokenized(PromptExample("Hi\n", "Yo")) == row(
        [72, 105, 10, 89, 111, EOS],
        [X, X, X, 89, 111, EOS],
    )


def test_a_document_is_learned_but_for_its_first_token():
    assert tokenized(TextExample("Hi!")) == row([72, 105, 33, EOS], [X, 105, 33, EOS])


def test_a_target_without_a_prompt_has_its_first_token_masked():
    assert tokenized(PromptExample("", "Yo")) == row([89, 111, EOS], [X, 111, EOS])


def test_marked_segments_are_learned_and_the_others_are_not():
    example = SegmentsExample([R("a"), T("b"), R("c"), T("d")])

    assert tokenized(example) == row([*b"abcd", EOS], [X, 98, X, 100, EOS])


def test_a_chat_learns_the_assistants_words_and_the_end_of_its_turn():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    prompt = [IM_START, *b"user\nHi", IM_END, 10, IM_START, *b"assistant\n"]

    assert tokenized(ChatExample(messages)) == row(
        [*prompt, 89, 111, IM_END, 10],
        [X] * 21 + [89, 111, IM_END, X],
    )


def test_the_ids_of_a_chat_are_those_that_transformers_gives_it():
    """The library is the oracle: it tokenizes the rendered text at once."""
    messages = [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "Grüße"},
        {"role": "assistant", "content": "  Yo\n"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "雪"},
    ]

    ours = tokenized(ChatExample(messages))["input_ids"]

    assert ours == TOKENIZER.apply_chat_template(messages, tokenize=True)["input_ids"]


@pytest.mark.parametrize("token", [EOS, PAD, IM_END])
def test_an_end_or_pad_id_inside_a_target_keeps_its_label(token):
    text = {EOS: "<|endoftext|>", PAD: "<|pad|>", IM_END: "<|im_end|>"}[token]

    example = tokenized(PromptExample("p", f"q{text}q"), special_tokens_in_text="allow")

    assert example == row([P, Q, token, Q, EOS], [X, Q, token, Q, EOS])


def test_a_control_token_spelled_in_a_text_has_the_ids_of_its_letters():
    assert tokenized(PromptExample("<|pad|>", "<|im_end|>")) == row(
        [*b"<|pad|>", *b"<|im_end|>", EOS],
        [X] * 7 + [*b"<|im_end|>", EOS],
    )


def test_a_control_token_that_is_not_special_is_text_as_well():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x>"])

    assert tokenizer("<x>")["input_ids"] == [260]
    assert tokenized(TextExample("a<x>"), tokenizer)["input_ids"] == [*b"a<x>", EOS]


def test_prompt_and_target_are_tokenized_apart():
    """As one string the two newlines are one token, which would be half prompt and half target."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    assert tokenizer("Q\n\nA")["input_ids"] == [81, 260, 65]

    assert tokenized(PromptExample("Q\n", "\nA"), tokenizer) == row(
        [81, 10, 10, 65, EOS], [X, X, 10, 65, EOS]
    )


def test_a_trained_tokenizer_does_not_merge_across_the_border_either():
    tokenizer = train_bpe(["say hi", "say hi hi"], vocab_size=300, min_frequency=1)
    assert tokenizer.tokenize("say hi") == ["say", "Ġhi"]

    example = tokenized(PromptExample("say ", "hi"), tokenizer)

    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["say", "Ġ", "hi", "<|endoftext|>"]
    assert [label == X for label in example["labels"]] == [True, True, False, False]


def test_neighbours_of_one_kind_are_tokenized_as_one_text():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])

    assert tokenize_segments([R("\n"), R("\n"), T("\n"), T(""), T("\n")], tokenizer) == row(
        [260, 260], [X, 260]
    )


def test_an_empty_segment_of_another_kind_keeps_its_neighbours_apart():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])

    assert tokenize_segments([R("\n"), T(""), R("\n"), T("a")], tokenizer) == row([10, 10, 97], [X, X, 97])


def test_no_segment_gives_no_token():
    assert tokenize_segments([], TOKENIZER) == row([], [])
    assert tokenize_batch([], TOKENIZER) == []


def test_rows_of_a_batch_do_not_touch_each_other():
    batch = [[R("p"), T("q")], [], [T("<|pad|>", plain=True)], [R("q"), T("p")]]

    assert tokenize_batch(batch, TOKENIZER) == [
        row([P, Q], [X, Q]),
        row([], []),
        row([*b"<|pad|>"], [X, *b"|pad|>"]),
        row([Q, P], [X, P]),
    ]


@pytest.mark.parametrize("prepend", ["first", "always", "normalizer"])
@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("Q:", "yes", ["<s>", "▁", "Q", ":", "y", "e", "s", "</s>"]),
        ("Q: ", "yes", ["<s>", "▁", "Q", ":", "▁", "y", "e", "s", "</s>"]),
        ("Q:", " yes", ["<s>", "▁", "Q", ":", "▁", "y", "e", "s", "</s>"]),
        ("Q\n", "\ny", ["<s>", "▁", "Q", "<0x0A>", "<0x0A>", "y", "</s>"]),
        ("", "yes", ["<s>", "▁", "y", "e", "s", "</s>"]),
        ("Q</s>", "</s>", ["<s>", "▁", "Q", *"</s>", *"</s>", "</s>"]),
    ],
)
def test_no_space_is_invented_between_prompt_and_target(prepend, prompt, completion, tokens):
    """▁ is a space. A text begins with one, as the tokenizer has it; what follows a prompt does not."""
    tokenizer = sentencepiece_tokenizer(prepend=prepend, adds_bos=True)

    ids = tokenized(PromptExample(prompt, completion), tokenizer)["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_no_space_is_invented_where_the_target_begins_with_newlines_that_merge():
    tokenizer = sentencepiece_tokenizer(merged=["\n\n", "\n\n\n"])

    ids = tokenized(PromptExample("Q", "\n\nA"), tokenizer)["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "Q", "\n\n", "A", "</s>"]


@pytest.mark.parametrize("text", ["Hi there", "x", "a </s"])
def test_a_text_has_the_ids_that_the_tokenizer_gives_it_start_token_included(text):
    """The library is the oracle."""
    tokenizer = sentencepiece_tokenizer(adds_bos=True)

    assert tokenized(TextExample(text), tokenizer)["input_ids"] == [*tokenizer(text)["input_ids"], 2]


@pytest.mark.parametrize(
    ("tokenizer", "adds"),
    [(byte_tokenizer(), False), (sentencepiece_tokenizer(), True), (train_bpe(["a"]), False)],
)
def test_a_tokenizer_that_begins_texts_with_a_space_is_known(tokenizer, adds):
    assert adds_leading_space(tokenizer) is adds


def test_plain_text_is_encoded_without_the_added_tokens_and_the_tokenizer_keeps_them():
    assert encode_plain("a<|pad|>", TOKENIZER) == [97, *b"<|pad|>"]
    assert TOKENIZER("a<|pad|>")["input_ids"] == [97, PAD]


def test_a_control_token_that_the_model_itself_would_spell_is_taken_letter_by_letter():
    """Unigram holds </s> among its pieces and prefers it to the four letters."""
    tokenizer = sentencepiece_tokenizer()

    assert tokenizer.convert_ids_to_tokens(encode_plain("</s>", tokenizer)) == ["▁", "<", "/", "s", ">"]


def test_a_control_token_that_cannot_be_spelled_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["é", "b"])  # b is the letter of a byte

    assert encode_plain("é", tokenizer) == [195, 169]
    with pytest.raises(DataError, match="the tokenizer cannot write a control token as plain text; got 'ab'"):
        encode_plain("ab", tokenizer)


def test_the_first_token_is_masked():
    assert mask_first(row([1, 2], [1, 2])) == row([1, 2], [X, 2])
    assert mask_first(row([1], [1])) == row([1], [X])
    assert mask_first(row([], [])) == row([], [])


def test_a_filler_is_one_token_without_a_label():
    packed = {"input_ids": [1, 2], "labels": [X, 2], "position_ids": [0, 1]}

    assert to_filler(packed) == {"input_ids": [1], "labels": [X], "position_ids": [0]}
    assert packed["labels"] == [X, 2]


def test_a_slice_is_an_example_of_its_own():
    example = row([1, 2, 3, 4], [X, 2, 3, 4])

    assert slice_example(example, start=1, stop=3) == row([2, 3], [X, 3])


def test_targets_are_counted():
    assert count_targets(row([1, 2, 0], [X, X, 0])) == 1


LONG = row([*b"pppp", *b"TT", EOS], [X, X, X, X, *b"TT", EOS])
USED = Fate("used")


@pytest.mark.parametrize(
    ("overflow", "max_length", "pieces", "fate"),
    [
        ("keep_target", 7, [LONG], USED),
        ("keep_target", 8, [LONG], USED),
        ("keep_target", 5, [row([*b"ppTT", EOS], [X, X, *b"TT", EOS])], Fate("cut", cut_tokens=2)),
        ("keep_target", 4, [row([*b"pTT", EOS], [X, *b"TT", EOS])], Fate("cut", cut_tokens=3)),
        ("keep_target", 3, [], Fate("dropped", "no whole target fits in max_length")),
        ("truncate", 6, [row([*b"ppppTT"], [X, X, X, X, *b"TT"])], Fate("cut", cut_tokens=1)),
        ("truncate", 5, [row([*b"ppppT"], [X, X, X, X, 84])], Fate("cut", cut_tokens=2)),
        ("truncate", 4, [], Fate("dropped", "no target token is left")),
        ("drop", 7, [LONG], USED),
        ("drop", 6, [], Fate("dropped", "longer than max_length")),
        ("error", 7, [LONG], USED),
        ("split", 7, [LONG], USED),
        (
            "split",
            5,
            [row([*b"ppppT"], [X, X, X, X, 84]), row([*b"TT", EOS], [X, 84, EOS])],
            Fate("split"),
        ),
        ("split", 4, [row([*b"pTT", EOS], [X, *b"TT", EOS])], Fate("split")),  # the first piece has no target
    ],
)
def test_a_row_over_max_length_follows_the_rule(overflow, max_length, pieces, fate):
    assert fit(LONG, max_length, overflow=overflow) == (pieces, fate)


def test_error_names_both_lengths():
    with pytest.raises(DataError) as error:
        fit(LONG, 6, overflow="error")

    assert str(error.value) == (
        "longer than max_length=6; got 7 tokens; fix: raise data.max_length or set data.overflow"
    )


def test_keep_target_keeps_from_the_first_target_on():
    example = row([1, 2, 3, 4, 5, 6], [X, X, 3, X, 5, 6])

    assert fit(example, 5, overflow="keep_target")[0] == [row([2, 3, 4, 5, 6], [X, 3, X, 5, 6])]
    assert fit(example, 4, overflow="keep_target")[0] == []


@pytest.mark.parametrize("overflow", ["keep_target", "truncate", "drop", "error", "split"])
@pytest.mark.parametrize("example", [row([1, 2, 3], [X, X, X]), row([1], [X]), row([], [])])
def test_a_row_without_a_target_is_dropped_whatever_its_length(overflow, example):
    assert fit(example, 2, overflow=overflow) == ([], Fate("dropped", "no target token"))


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
def test_split_loses_no_label_and_learns_none_twice(max_length):
    example = row(list(range(10)), [X, *range(1, 10)])

    pieces, _ = fit(example, max_length, overflow="split")

    assert [label for piece in pieces for label in piece["labels"] if label != X] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    assert max(len(piece["input_ids"]) for piece in pieces) <= max_length
    assert all(piece["labels"][0] == X for piece in pieces)
