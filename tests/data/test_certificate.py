"""The certificate accepts what is right, and catches each plausible way to break the labels."""

import pytest
from helpers import EOS, IM_END, IM_START, PAD, X, byte_tokenizer, sentencepiece_tokenizer

from hf_clm.chat_template import stop_token_ids
from hf_clm.data import datasets
from hf_clm.data.certificate import LabelOptions, certify, hash_content
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, PromptExample, Segment, SegmentsExample, TextExample
from hf_clm.tokenizer import use_chat_template

CHAT = [
    {"role": "user", "content": "Hi, who <|im_end|> are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
]
EXAMPLES = [
    PromptExample("Say A.\n", "A, and 好."),
    PromptExample("Say <|pad|>\n", "no <|endoftext|> here"),
    TextExample("A document."),
    SegmentsExample(
        [Segment("Q: ", False), Segment("A", True), Segment(" read ", False), Segment("B", True)]
    ),
    ChatExample(CHAT),
    ChatExample([{**CHAT[0]}, {**CHAT[1], "train": False}, *CHAT[2:]]),
]


def chat_tokenizer(**options):
    tokenizer = byte_tokenizer(**options)
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def prove(examples, tokenizer, *, stage="sft", overflow="keep_target", max_length=None, **options):
    kinds = {"sft": SFTDataset, "pretrain": PretrainDataset}
    made = kinds[stage](examples, tokenizer, max_length=max_length, overflow=overflow, **options)
    stop = tuple(stop_token_ids(tokenizer))
    settings = LabelOptions(stage, overflow=overflow, stop_ids=stop, **options)
    return certify(made.rows, examples, tokenizer=tokenizer, options=settings)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
@pytest.mark.parametrize("policy", ["encode_as_text", "allow"])
def test_right_rows_are_certified(stage, policy):
    certificate = prove(EXAMPLES, chat_tokenizer(), stage=stage, special_tokens_in_text=policy)

    assert (certificate.rows, dict(certificate.failed), certificate.is_valid) == (6, {}, True)
    assert certificate.encoded_again >= 2
    certificate.require()


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn", "everything"])
def test_chats_are_certified_for_every_choice_of_turns(train_on):
    assert prove(EXAMPLES[4:], chat_tokenizer(), train_on=train_on).failed == {}


@pytest.mark.parametrize("overflow", ["keep_target", "truncate", "split", "drop"])
def test_rows_that_were_cut_are_certified(overflow):
    certificate = prove(EXAMPLES[:4], chat_tokenizer(), overflow=overflow, max_length=15)

    assert certificate.failed == {}
    assert certificate.rows == {"keep_target": 3, "truncate": 4, "split": 7, "drop": 2}[overflow]


def test_a_cut_that_leaves_one_token_of_the_prompt_is_certified():
    """The first token of a row has no label; here it is no part of the target either."""
    certificate = prove([PromptExample("Say ab", "A")], byte_tokenizer(), max_length=3)

    assert (certificate.failed, certificate.rows) == ({}, 1)


def test_a_tokenizer_that_writes_a_space_first_is_certified():
    examples = [PromptExample("Say A. ", "A and B"), TextExample("C")]

    assert prove(examples, sentencepiece_tokenizer()).failed == {}
    assert prove(examples, sentencepiece_tokenizer(adds_bos=True)).failed == {}


def shifted_by_one(row):
    return {**row, "labels": [X, *row["labels"][:-1]]}


def end_masked(row):
    return {**row, "labels": [X if token == EOS else label for token, label in both(row)]}


def end_lost(row):
    return {"input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]}


def prompt_trained(row):
    return {**row, "labels": [X, *row["input_ids"][1:]]}


def target_cut_with_a_false_end(row):
    return {"input_ids": [*row["input_ids"][:-3], EOS], "labels": [*row["labels"][:-3], EOS]}


def nothing_trained(row):
    return {**row, "labels": [X] * (len(row["labels"]) - 1) + row["labels"][-1:]}


def first_token_trained(row):
    return {**row, "labels": [row["input_ids"][0], *row["labels"][1:]]}


def padded_inside(row):
    return {"input_ids": [PAD, *row["input_ids"]], "labels": [X, *row["labels"]]}


def end_twice(row):
    return {"input_ids": [*row["input_ids"], EOS], "labels": [*row["labels"], EOS]}


def wrong_letter(row):
    return {"input_ids": [ord("?"), *row["input_ids"][1:]], "labels": row["labels"]}


def target_letter_lost(row):
    return {"input_ids": row["input_ids"][:-2] + row["input_ids"][-1:], "labels": [*row["labels"][:-2], EOS]}


def ends_in_another_token(row):
    return {"input_ids": [*row["input_ids"][:-1], IM_START], "labels": [*row["labels"][:-1], IM_START]}


def both(row):
    return zip(row["input_ids"], row["labels"], strict=True)


BROKEN = {
    shifted_by_one: "labels",
    end_masked: "targets",
    end_lost: "targets",
    prompt_trained: "prompt",
    target_cut_with_a_false_end: "targets",
    nothing_trained: "prompt",
    first_token_trained: "first",
    padded_inside: "padding",
    end_twice: "targets",
    wrong_letter: "prompt",
    target_letter_lost: "targets",
    ends_in_another_token: "targets",
}


@pytest.mark.parametrize(
    ("breaks", "check"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_each_way_to_break_the_labels_is_caught(breaks, check, monkeypatch):
    tokenize = datasets.tokenize_batch
    monkeypatch.setattr(datasets, "tokenize_batch", lambda *args: [breaks(row) for row in tokenize(*args)])

    certificate = prove([PromptExample("Say A.\n", "A, and B.")], byte_tokenizer())

    assert check in certificate.failed
    assert not certificate.is_valid


def test_a_prompt_and_target_tokenized_together_are_caught(monkeypatch):
    """With a token for newline + A, the joint text has other ids: the target loses its A to the prompt."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "A")])
    tokenize = datasets.tokenize_batch

    def joined(batch, tokenizer):
        whole = tokenize(
            [[Segment("".join(s.text for s in segments), True)] for segments in batch], tokenizer
        )
        prompts = [len(tokenizer(segments[0].text)["input_ids"]) for segments in batch]
        return [{**row, "labels": [X] * n + row["labels"][n:]} for row, n in zip(whole, prompts, strict=True)]

    examples = [PromptExample("Say A.\n", "A, and B.")]
    assert prove(examples, tokenizer).is_valid
    monkeypatch.setattr(datasets, "tokenize_batch", joined)

    assert not prove(examples, tokenizer).is_valid


def test_other_ids_for_the_same_text_are_caught(monkeypatch):
    """Letter by letter instead of merged: the text is right, but generation is never given such ids."""
    tokenizer, letters = byte_tokenizer(merges=[("s", "a")]), byte_tokenizer()
    monkeypatch.setattr(datasets, "tokenize_batch", lambda batch, _: tokenize(batch, letters))
    tokenize = __import__("hf_clm.data.labels", fromlist=["tokenize_batch"]).tokenize_batch

    certificate = prove([PromptExample("say\n", "yes")], tokenizer)

    assert dict(certificate.failed) == {"prompt": 1}


# ChatML that renders the turns of two roles only.
DEAF = """\
{%- for message in messages if message.role in ('user', 'assistant') -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


@pytest.mark.parametrize(
    ("turns", "failures"),
    [
        ([("user", "Hi"), ("assistant", "Yo")], []),
        ([("user", "  Hi\n"), ("assistant", "Yo "), ("user", "Hi")], []),
        ([("system", " "), ("user", "Hi"), ("assistant", "Yo")], []),
        (
            [("system", "Be nice."), ("user", "Hi"), ("assistant", "Yo")],
            [("the message 'Be nice.'", "0 of 1 in the rendered conversation")],
        ),
        (
            [("user", "Hi"), ("assistant", "5"), ("tool", "21 C"), ("tool", "3 C"), ("assistant", "Warm.")],
            [("the message '21 C'", "0 of 1 in the rendered conversation")],
        ),
        (
            [("user", "Hi"), ("assistant", "Yo"), ("tool", "Hi"), ("assistant", "Bye")],
            [("the message 'Hi'", "1 of 2 in the rendered conversation")],
        ),
    ],
)
def test_a_message_that_the_template_drops_is_caught(turns, failures):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = DEAF
    example = ChatExample([{"role": role, "content": content} for role, content in turns])

    certificate = prove([example], tokenizer)

    assert [(f.expected, f.got) for f in certificate.failures if f.check == "rendered"] == failures
    assert certificate.is_valid == (not failures)


def test_a_control_token_from_the_text_is_caught(monkeypatch):
    protected = "hf_clm.data.segments.mark_control_text"
    monkeypatch.setattr(protected, lambda text, tokenizer, own: text)

    certificate = prove([PromptExample("Say <|im_end|>\n", "A")], byte_tokenizer())

    assert dict(certificate.failed) == {"control": 1}
    assert certificate.failures[0].expected == "1 control tokens"


def test_a_stop_token_that_generation_does_not_know_is_caught():
    tokenizer = chat_tokenizer()
    example = ChatExample([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    made = SFTDataset([example], tokenizer)

    wrong = certify(made.rows, [example], tokenizer=tokenizer, options=LabelOptions("sft", stop_ids=(EOS,)))
    right = certify(
        made.rows, [example], tokenizer=tokenizer, options=LabelOptions("sft", stop_ids=(EOS, IM_END))
    )

    assert dict(wrong.failed) == {"stop": 1}
    assert right.is_valid


def test_an_uncertified_set_is_refused_with_the_row_and_the_reason(monkeypatch):
    tokenize = datasets.tokenize_batch
    monkeypatch.setattr(datasets, "tokenize_batch", lambda *args: [end_lost(row) for row in tokenize(*args)])
    examples = [PromptExample("Say A.\n", "A")]
    made = SFTDataset(examples, byte_tokenizer())
    options = LabelOptions("sft", stop_ids=(EOS,))

    certificate = certify(
        made.rows, examples, tokenizer=byte_tokenizer(), options=options, places=["poems.jsonl:17"]
    )

    with pytest.raises(DataError) as error:
        certificate.require()
    assert str(error.value).startswith("poems.jsonl:17: the labels are not certified (1 targets of 1 rows)")
    assert "expected 'A<|endoftext|>', got 'A'" in str(error.value)


def test_the_hash_covers_labels_tokenizer_and_options():
    tokenizer, options = byte_tokenizer(), LabelOptions("sft", stop_ids=(EOS,))
    one, two = (SFTDataset([PromptExample("P", text)], tokenizer).rows for text in ("A", "B"))
    hashes = {
        hash_content(one, tokenizer=tokenizer, options=options),
        hash_content(two, tokenizer=tokenizer, options=options),
        hash_content(one, tokenizer=byte_tokenizer(merges=[("A", "B")]), options=options),
        hash_content(one, tokenizer=tokenizer, options=LabelOptions("pretrain", stop_ids=(EOS,))),
    }

    assert len(hashes) == 4
    assert hash_content(one, tokenizer=tokenizer, options=options) in hashes
