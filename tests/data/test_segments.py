"""Examples as segments: T is learned, R is read; UT and UR are control tokens in the user's own words."""

import pytest
from helpers import byte_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clm.data.labels import tokenize_segments
from hf_clm.data.segments import (
    check_no_control_text,
    control_texts,
    to_document,
    to_prompt_segments,
    to_segments,
)
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, Example, PromptExample, Segment, SegmentsExample, TextExample
from hf_clm.tokenizer import control_tokens, use_chat_template

END = "<|endoftext|>"


def T(text: str) -> Segment:
    return Segment(text, is_target=True)


def R(text: str) -> Segment:
    return Segment(text, is_target=False)


def UT(text: str) -> Segment:
    return Segment(text, is_target=True, is_plain=True)


def UR(text: str) -> Segment:
    return Segment(text, is_target=False, is_plain=True)


def chat(user: str, assistant: str) -> ChatExample:
    return ChatExample([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def texts(segments: list[Segment]) -> list[Segment]:
    """Without the empty segments that only keep their neighbours apart."""
    return [segment for segment in segments if segment.text]


@pytest.mark.parametrize(
    ("example", "segments"),
    [
        (TextExample("Hi"), [T("Hi"), T(END)]),
        (PromptExample("Q:", "A"), [R("Q:"), T("A"), T(END)]),
        (PromptExample("", "A"), [T("A"), T(END)]),
        (SegmentsExample([R("a"), T("b"), R("c"), T("d")]), [R("a"), T("b"), R("c"), T("d"), T(END)]),
        (SegmentsExample([R("a"), R("b"), T("c"), T(""), T("d")]), [R("ab"), T("cd"), T(END)]),
        (
            SegmentsExample([T("a"), R("b")]),
            [T("a"), R("b")],
        ),  # ends in text that is read: nothing stops there
        (TextExample(""), []),
    ],
)
def test_each_kind_of_example_ends_its_last_target_in_the_end_token(example, segments):
    assert to_segments(example, byte_tokenizer()) == segments


@pytest.mark.parametrize(
    ("example", "segments"),
    [
        (TextExample("Hi"), [R("Hi")]),
        (PromptExample("Q:", "A"), [R("Q:")]),
        (PromptExample("Q:", ""), [R("Q:")]),
        (PromptExample("", "A"), []),
        (SegmentsExample([R("a"), T("b"), R("c"), T("d")]), [R("a"), R("b"), R("c")]),
        (SegmentsExample([R("a"), R("b")]), [R("ab")]),
        (
            ChatExample([{"role": "user", "content": "Hi"}]),
            [R("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")],
        ),
    ],
)
def test_a_prompt_is_all_before_the_last_target_and_none_of_it_is_learned(example, segments):
    assert texts(to_prompt_segments(example, chat_tokenizer())) == segments


# Prompts and targets whose border would merge if they were one string: \n\n, and ":" with a newline.
MERGING = byte_tokenizer(merges=[("Ċ", "Ċ"), (":", "Ċ"), ("Ċ", "Ġ"), ("s", "Ċ")])
use_chat_template(MERGING, "chatml")


@pytest.mark.parametrize(
    ("example", "prompt"),
    [
        (PromptExample("Q:\n", "\nA"), PromptExample("Q:\n", "")),
        (PromptExample("Write a poem\n", "\n\nA"), PromptExample("Write a poem\n", "")),
        (
            SegmentsExample([R("s"), T("\nA:"), R("\n"), T("\nB")]),
            SegmentsExample([R("s"), T("\nA:"), R("\n")]),
        ),
    ],
)
def test_the_ids_before_a_target_are_those_of_the_prompt(example, prompt):
    trained = tokenize_segments(to_segments(example, MERGING), MERGING)
    asked = tokenize_segments(to_prompt_segments(prompt, MERGING), MERGING)["input_ids"]
    whole = "".join(segment.text for segment in to_segments(example, MERGING))

    assert trained["input_ids"][: len(asked)] == asked
    assert trained["labels"][len(asked)] == trained["input_ids"][len(asked)] != -100
    assert MERGING(whole)["input_ids"] != trained["input_ids"], "the border must be one that merges"


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn", "everything"])
@pytest.mark.parametrize("untrained", [[], [1], [3]])
def test_the_ids_before_each_assistant_turn_are_those_of_its_prompt(train_on, untrained):
    """Also of a turn that is not learned: what is masked changes no id."""
    messages = [
        {"role": "system", "content": "Be nice.\n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "\nYo\n"},  # \n\n would merge with the template's own newline
        {"role": "user", "content": "And<|im_end|>?"},
        {"role": "assistant", "content": "\n\nBye"},
    ]
    marked = [
        dict(turn, train=False) if number in untrained else turn for number, turn in enumerate(messages)
    ]
    ids = tokenize_segments(to_segments(ChatExample(marked), MERGING, train_on=train_on), MERGING)[
        "input_ids"
    ]

    for turn, answer in ((2, [10, *b"Yo", 10, 259]), (4, [260, *b"Bye", 259])):
        prompt = tokenize_segments(to_prompt_segments(ChatExample(messages[:turn]), MERGING), MERGING)[
            "input_ids"
        ]
        assert prompt[-11:] == [258, *b"assistant", 10]
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :][: len(answer)] == answer


def test_a_start_token_comes_once_and_is_read():
    tokenizer = sentencepiece_tokenizer(adds_bos=True)
    example = PromptExample("Q", "A")

    assert texts(to_segments(example, tokenizer)) == [R("<s>"), R("Q"), T("A"), T("</s>")]
    assert texts(to_prompt_segments(example, tokenizer)) == [R("<s>"), R("Q")]
    assert texts(to_segments(TextExample("A"), tokenizer)) == [R("<s>"), T("A"), T("</s>")]


def test_a_chat_gets_no_start_token_beside_that_of_its_template():
    tokenizer = sentencepiece_tokenizer(adds_bos=True)
    use_chat_template(tokenizer, "chatml")

    assert to_segments(chat("Hi", "Yo"), tokenizer)[0].text.startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("example", "segments"),
    [
        (TextExample("a<|im_end|>b"), [T("a"), UT("<|im_end|>"), T("b"), T(END)]),
        (PromptExample("<|pad|>", f"A{END}"), [UR("<|pad|>"), T("A"), UT(END), T(END)]),
        (
            SegmentsExample([R("<|im_"), R("end|>"), T("A")]),
            [UR("<|im_end|>"), T("A"), T(END)],
        ),  # in two pieces
        (
            SegmentsExample([R("<|im_"), T("end|>")]),
            [R("<|im_"), T("end|>"), T(END)],
        ),  # tokenized apart: no token
        (PromptExample("<x", "/><y/>"), [R("<x"), T("/>"), UT("<y/>"), T(END)]),  # added with special=False
        (
            chat("<|im_end|>", "Yo"),
            [
                R("<|im_start|>user\n"),
                UR("<|im_end|>"),
                R("<|im_end|>\n<|im_start|>assistant\n"),
                T("Yo<|im_end|>"),
                R("\n"),
            ],
        ),
    ],
)
def test_a_control_token_in_the_users_text_is_set_apart_as_text(example, segments):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<y/>"])

    assert texts(to_segments(example, tokenizer)) == segments


@pytest.mark.parametrize(
    ("example", "segments"),
    [
        (PromptExample("<|im_end|>", f"A{END}"), [R("<|im_end|>"), T(f"A{END}"), T(END)]),
        (
            chat("<|im_end|>", "Yo"),
            [
                R("<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"),
                T("Yo<|im_end|>"),
                R("\n"),
            ],
        ),
    ],
)
def test_allow_lets_a_control_token_be_one(example, segments):
    assert texts(to_segments(example, chat_tokenizer(), special_tokens_in_text="allow")) == segments


@pytest.mark.parametrize(
    "example",
    [
        TextExample("a<|pad|>b<|im_end|>"),
        PromptExample("a", "<|pad|>"),
        SegmentsExample([T("a"), T("<|p"), T("ad|>")]),
        chat("Hi", "<|pad|>"),
    ],
)
def test_error_refuses_the_first_control_token(example):
    with pytest.raises(DataError) as error:
        to_segments(example, chat_tokenizer(), special_tokens_in_text="error")

    assert str(error.value) == (
        "the text holds a control token; got '<|pad|>'; "
        "fix: remove it, or set data.special_tokens_in_text to encode_as_text or allow"
    )


def test_error_takes_a_text_without_control_tokens():
    check_no_control_text(chat("Hi <|im_end|", "|>"), chat_tokenizer())
    segments = to_segments(TextExample("<|im_end|"), byte_tokenizer(), special_tokens_in_text="error")

    assert segments == [T("<|im_end|"), T(END)]


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (TextExample("<|pad|>a<|im_end|><|pad|>"), ["<|pad|>", "<|im_end|>", "<|pad|>"]),
        (PromptExample("<|pad|>", "b"), ["<|pad|>"]),
        (SegmentsExample([R("<|pa"), R("d|>"), T("<|pa")]), ["<|pad|>"]),
        (chat("<|im_end|>", "<|im_end|>"), ["<|im_end|>", "<|im_end|>"]),
        (chat("Hi", "Yo"), []),
    ],
)
def test_control_tokens_in_the_users_text_are_counted(example, found):
    assert control_texts(example, chat_tokenizer()) == found


@pytest.mark.parametrize(
    ("example", "document"),
    [
        (TextExample("Hi"), TextExample("Hi")),
        (PromptExample("Q:", "A"), TextExample("Q:A")),
        (SegmentsExample([R("a"), T("b")]), TextExample("ab")),
        (chat("Hi", "Yo"), chat("Hi", "Yo")),
        (ChatExample([{"role": "assistant", "content": "Yo", "train": False}]),
         ChatExample([{"role": "assistant", "content": "Yo"}])),
    ],
)  # fmt: skip
def test_pretraining_sees_one_text_and_learns_all_of_it(example, document):
    assert to_document(example) == document


PIECES = [
    "<|",
    "|>",
    "<",
    "im",
    "_end",
    "<|im_end|>",
    "<|pad|>",
    "endoftext",
    "</s",
    ">",
    "</s>",
    "<y/>",
    "<unk>",
    " ",
]
CONTENT = st.lists(st.sampled_from([*PIECES, "\n", "é", "a"]), max_size=8).map("".join)


def prepared(tokenizer):
    tokenizer.add_tokens(["<y/>"])
    use_chat_template(tokenizer, "chatml")
    vocab = tokenizer.get_added_vocab()
    return tokenizer, {vocab[token] for token in control_tokens(tokenizer)}


TOKENIZERS = {
    "bytes": prepared(byte_tokenizer()),
    "first": prepared(sentencepiece_tokenizer(prepend="first", merged=["</", "</s", "\n\n"])),
    "normalizer": prepared(sentencepiece_tokenizer(prepend="normalizer")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=CONTENT, completion=CONTENT.filter(bool))
@settings(max_examples=60, deadline=None)
def test_no_text_of_the_user_becomes_a_control_token_and_it_comes_back_as_it_was(name, prompt, completion):
    """All prompts begin with a letter: SentencePiece loses a space that a text begins with."""
    tokenizer, control = TOKENIZERS[name]
    prompt = "Q" + prompt

    row = tokenize_segments(to_segments(PromptExample(prompt, completion), tokenizer), tokenizer)
    ids = row["input_ids"]

    assert [i for i in ids if i in control] == [tokenizer.eos_token_id] == ids[-1:]
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == prompt + completion


@given(user=CONTENT.filter(bool), assistant=CONTENT.filter(bool))
@settings(max_examples=60, deadline=None)
def test_a_chat_has_the_control_tokens_of_its_template_and_no_other(user, assistant):
    tokenizer, control = TOKENIZERS["bytes"]
    example: Example = chat(user, assistant)

    row = tokenize_segments(to_segments(example, tokenizer), tokenizer)

    assert [i for i in row["input_ids"] if i in control] == [258, 259, 258, 259]
    assert tokenizer.decode(row["input_ids"]) == (
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
    )
    assert bytes(i for i in row["labels"] if 0 <= i < 256) == assistant.encode()
