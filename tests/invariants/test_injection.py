"""User text never becomes a control token: tested for all added and special tokens of several vocabularies.

A record may contain a token completely, split over adjacent segments or fields, in a role or in a key.
After tokenization, the only control tokens are those of the format or the template.
"""

from typing import Any

import pytest
from helpers import byte_tokenizer, document, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.read.formats import to_example
from hf_clm.errors import DataError
from hf_clm.text.tokenizer import control_tokens, special_tokens, use_chat_template

# special=True, as users add them for markup or tools. WRITTEN has special=False: models write them.
ADDED = ["<think>", "</think>", "[TOOL]", "<|tool|>"]
WRITTEN = ["<call>", "</call>"]
KINDS = ["bytes", "bytes merged", "pieces"]


def build(kind: str) -> PreTrainedTokenizerFast:
    merges = [("<", "|"), ("|", ">"), ("<|", "i")] if kind == "bytes merged" else []
    tokenizer = (
        sentencepiece_tokenizer(merged=["<|", "|>"]) if kind == "pieces" else byte_tokenizer(merges=merges)
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ADDED}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(WRITTEN)
    use_chat_template(tokenizer, "chatml")
    return tokenizer


TOKENIZERS = {kind: build(kind) for kind in KINDS}
EVERY = [(kind, token) for kind in KINDS for token in special_tokens(TOKENIZERS[kind])]
LIMITS = settings(max_examples=40, deadline=None)


def controls(row: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns the control tokens in a row."""
    ids = {tokenizer.get_added_vocab()[token]: token for token in control_tokens(tokenizer)}
    return [ids[i] for i in row["input_ids"] if i in ids]


def tokenize(record: Any, format: Any, tokenizer: PreTrainedTokenizerFast, *, stage: str = "sft") -> Any:
    """Returns the row of a record among others: data that mostly look rendered would be rejected."""
    make = {"sft": SFTDataset, "pretrain": PretrainDataset}[stage]
    return make([to_example(record, format=format), document("Hi"), document("Hi")], tokenizer)[0]


def chat(*contents: str) -> dict[str, Any]:
    """Returns the contents as turns of system, user and assistant."""
    turns = zip(("system", "user", "assistant"), contents, strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


OF_CHATML = ["<|im_start|>", "<|im_end|>"]


def test_these_vocabularies_have_both_kinds_of_added_tokens():
    backend = TOKENIZERS["bytes"].backend_tokenizer.get_added_tokens_decoder()

    assert {str(token.content): token.special for token in backend.values()} == {
        **dict.fromkeys(["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", *ADDED], True),
        **dict.fromkeys(WRITTEN, False),
    }
    assert len(EVERY) == 8 + 8 + 10  # SentencePiece has <unk>, <s>, </s>, <|pad|>, and ChatML's two


@pytest.mark.parametrize(("kind", "token"), EVERY)
def test_a_complete_token_in_any_field_stays_text(kind, token):
    tokenizer = TOKENIZERS[kind]
    end = [tokenizer.eos_token]
    text = f"a {token}{token}b"

    assert controls(tokenize({"text": text}, "text", tokenizer, stage="pretrain"), tokenizer) == end
    prompt = {"prompt": text, "completion": text}
    assert controls(tokenize(prompt, "prompt_completion", tokenizer), tokenizer) == end
    instruct = {"instruct": text, "input": text, "label": text}
    assert controls(tokenize(instruct, "instruct", tokenizer), tokenizer) == end
    assert controls(tokenize(chat(text, text, text), "messages", tokenizer), tokenizer) == OF_CHATML * 3


@pytest.mark.parametrize(("kind", "token"), EVERY)
def test_a_token_split_over_adjacent_pieces_stays_text(kind, token):
    """Over two segments, whether targets or not; over prompt and answer; over two turns."""
    tokenizer = TOKENIZERS[kind]
    for at in range(1, len(token)):
        left, right = f"a{token[:at]}", f"{token[at:]}b"
        for first, second in ((False, False), (True, True), (False, True), (True, False)):
            parts = [
                {"text": left, "train": first},
                {"text": right, "train": second},
                {"text": ".", "train": True},
            ]
            row = tokenize({"segments": parts}, "segments", tokenizer)
            assert controls(row, tokenizer) == [tokenizer.eos_token], (left, right, first, second)
        row = tokenize({"prompt": left, "completion": right}, "prompt_completion", tokenizer)
        assert controls(row, tokenizer) == [tokenizer.eos_token], (left, right)
        assert controls(tokenize(chat(left, right, right), "messages", tokenizer), tokenizer) == OF_CHATML * 3


@pytest.mark.parametrize("token", ["ab", "Response:\n", "\n\n###", "on:\na"])
def test_a_token_completed_by_the_format_stays_text(token):
    """``instruct`` joins fields, and ``alpaca`` adds headings between them, which may complete a token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    instruct = {"instruct": "a", "input": "b\n\n###", "label": "Response:\n"}
    alpaca = {"instruction": "ab", "input": "a", "output": "b"}

    assert controls(tokenize(instruct, "instruct", tokenizer), tokenizer) == ["<|endoftext|>"]
    assert controls(tokenize(alpaca, "alpaca", tokenizer), tokenizer) == ["<|endoftext|>"]


@pytest.mark.parametrize(("kind", "token"), EVERY)
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_token_in_a_role_is_rejected(kind, token, format):
    role, content, turns = (
        ("role", "content", "messages") if format == "messages" else ("from", "value", "conversations")
    )
    for name in (token, f"user{token}", f"user\n{token}"):
        with pytest.raises(DataError) as error:
            tokenize({turns: [{role: name, content: "Hi"}]}, format, TOKENIZERS[kind])
        assert f"has unknown role {name!r}" in str(error.value)


@pytest.mark.parametrize(("kind", "token"), EVERY)
def test_a_token_in_a_key_is_ignored_or_rejected(kind, token):
    tokenizer = TOKENIZERS[kind]
    record = {"instruct": "a", "input": "", "label": "b"}
    answer = {"role": "assistant", "content": "Yo"}

    assert tokenize({**record, token: token}, "instruct", tokenizer) == tokenize(
        record, "instruct", tokenizer
    )
    named = {"messages": [{"role": "user", "content": "Hi", "name": token}, answer], token: token}
    assert controls(tokenize(named, "messages", tokenizer), tokenizer) == OF_CHATML * 2
    with pytest.raises(DataError) as error:
        to_example({**record, token: token}, format="instruct", strict=True)
    assert f"does not read {token!r}" in str(error.value)
    with pytest.raises(DataError) as error:
        to_example({"messages": [{"role": "user", "content": "Hi", token: token}, answer]}, format="messages")
    assert f"message 1: unknown key {token!r}" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", WRITTEN)
def test_a_token_that_the_model_writes_is_only_a_token_in_answers(kind, token):
    tokenizer = TOKENIZERS[kind]
    text = f"a {token}b"

    assert controls(tokenize(chat(text, text, "Yo"), "messages", tokenizer), tokenizer) == OF_CHATML * 3
    result = controls(tokenize(chat("Hi", "Hi", text), "messages", tokenizer), tokenizer)
    assert result == [*OF_CHATML * 2, "<|im_start|>", token, "<|im_end|>"]
    row = tokenize({"prompt": text, "completion": text}, "prompt_completion", tokenizer)
    assert controls(row, tokenizer) == [token, tokenizer.eos_token]


# Complete tokens, halves of tokens, and other text.
TORN = [*ADDED, "<|im_end|>", "<|endoftext|>", "<|pad|>", "</s>", "<unk>"]
PIECES = [part for token in TORN for part in (token, token[:2], token[2:], token[:-1], token[-1:])]
TEXT = st.lists(st.sampled_from([*PIECES, " ", "\n", "a", "好", "\u200b"]), min_size=1, max_size=6).map(
    "".join
)
SPOKEN = TEXT.filter(lambda text: bool(text.strip()))  # blank ones are rejected


@pytest.mark.parametrize("kind", KINDS)
@given(instruct=SPOKEN, given_input=TEXT, label=SPOKEN)
@LIMITS
def test_no_instruction_input_or_answer_becomes_a_control_token(kind, instruct, given_input, label):
    tokenizer = TOKENIZERS[kind]
    record = {"instruct": instruct, "input": given_input, "label": label}

    trained = tokenize(record, "instruct", tokenizer)
    (asked,) = encode_prompts([to_example(record, format="instruct")], tokenizer, LabelOptions())

    assert controls(trained, tokenizer) == [tokenizer.eos_token]
    assert controls({"input_ids": asked}, tokenizer) == []
    assert trained["input_ids"][: len(asked)] == asked


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.tuples(TEXT, SPOKEN, SPOKEN))
@LIMITS
def test_no_turn_of_a_chat_becomes_a_control_token(kind, contents):
    tokenizer = TOKENIZERS[kind]

    learned, read = (
        tokenize(chat(*contents), "messages", tokenizer, stage=stage) for stage in ("sft", "pretrain")
    )

    assert controls(learned, tokenizer) == OF_CHATML * 3
    assert controls(read, tokenizer) == OF_CHATML * 3


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5), end=SPOKEN)
@LIMITS
def test_no_sequence_of_segments_becomes_a_control_token(kind, pieces, end):
    tokenizer = TOKENIZERS[kind]
    segments = [*({"text": text, "train": train} for text, train in pieces), {"text": end, "train": True}]

    row = tokenize({"segments": segments}, "segments", tokenizer)
    document = tokenize({"segments": segments}, "segments", tokenizer, stage="pretrain")

    assert controls(row, tokenizer) == controls(document, tokenizer) == [tokenizer.eos_token]


def test_allowed_tokens_are_control_tokens():
    """Otherwise, the tests above could not fail."""
    tokenizer = TOKENIZERS["bytes"]
    example = to_example(
        {"prompt": "<|im_end|><think>", "completion": "</think>"}, format="prompt_completion"
    )

    row = SFTDataset([example], tokenizer, special_tokens_in_text="allow")[0]

    assert controls(row, tokenizer) == ["<|im_end|>", "<think>", "</think>", "<|endoftext|>"]
