"""The certificate accepts correct rows, and catches each plausible way to break the labels."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import EOS, IM_END, IM_START, PAD, X, byte_tokenizer, document, prompted, sentencepiece_tokenizer

from hf_clm.data.label.datasets import TRAIN_ON, TokenizedRows, tokenize_rows
from hf_clm.data.label.render import LabelOptions, TrainOn
from hf_clm.data.proof.certificate import certify
from hf_clm.errors import DataError
from hf_clm.schema import Chat, Document, Segment, Tokens
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.tokenizer import use_chat_template

CHAT = [
    {"role": "user", "content": "Hi, who <|im_end|> are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
]
EXAMPLES = [
    prompted("Say A.\n", "A, and 好."),
    prompted("Say <|pad|>\n", "no <|endoftext|> here"),
    document("A document."),
    Document([Segment("Q: ", 0), Segment("A", 1), Segment(" read ", 0), Segment("B", 1)]),
    Chat(CHAT),
    Chat([CHAT[0], {**CHAT[1], "weight": 0.0}, *CHAT[2:]]),
    Chat([CHAT[0], {**CHAT[1], "weight": 0.5}, *CHAT[2:]]),
    Document([Segment("Q: ", 0), Segment("A", 2), Segment("B", 0.5)]),
]
# A variant of ChatML with two tools and reasoning.
AGENT = """\
{%- if tools -%}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning -%}{{ '<think>' + m.reasoning + '</think>' }}{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls -%}{{ '<call>' + call.function | tojson + '</call>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ASKS_A_TOOL = Chat(
    [
        {"role": "user", "content": "Is it warm?"},
        {
            "role": "assistant",
            "reasoning": "I should look.",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
        },
        {"role": "tool", "content": "21 C"},
        {"role": "assistant", "content": "Yes."},
    ],
    tools=[LOOK],
)


def chat_tokenizer(template="chatml", **options):
    tokenizer = byte_tokenizer(**options)
    use_chat_template(tokenizer, "chatml")
    if template != "chatml":
        tokenizer.chat_template = template
    return tokenizer


def prove(examples, tokenizer, *, breaks=lambda row: row, **options):
    """Returns the certificate of the examples; ``breaks`` modifies each row after it was made."""
    settings = LabelOptions(**options)
    rows = broken(tokenize_rows(examples, tokenizer, settings), breaks)
    return certify(rows, examples, tokenizer=tokenizer, options=settings, stop_ids=stop_token_ids(tokenizer))


def broken(rows: TokenizedRows, breaks) -> TokenizedRows:
    found = [breaks(rows[number]) for number in range(len(rows))]
    flat = {key: np.concatenate([np.array(row[key]) for row in found]) for key in found[0]}
    ids, labels = (flat[key].astype(np.int32) for key in ("input_ids", "labels"))
    offsets = np.cumsum([0, *(len(row["input_ids"]) for row in found)])
    weights = flat["weights"].astype(np.float32) if "weights" in flat else None
    return replace(rows, input_ids=ids, labels=labels, offsets=offsets, weights=weights)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
@pytest.mark.parametrize("policy", ["encode_as_text", "allow"])
def test_right_rows_are_certified(stage, policy):
    certificate = prove(EXAMPLES, chat_tokenizer(), stage=stage, special_tokens_in_text=policy)

    assert (certificate.rows, dict(certificate.failed), certificate.is_valid) == (8, {}, True)
    assert certificate.encoded_again == 8
    certificate.require()


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn", "everything"])
def test_chats_are_certified_for_every_choice_of_turns(train_on):
    assert prove(EXAMPLES[4:6], chat_tokenizer(), train_on=TRAIN_ON[train_on]).failed == {}


TOKENIZED = Tokens([5, 6, 7, 8], [5, 6, X, 8], [2, 2], 0.5, [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("breaks", "check"),
    [
        (lambda row: row, None),
        (lambda row: {**row, "weights": [1.0] * len(row["labels"])}, "weights"),
        (lambda row: {**row, "labels": [X] * len(row["labels"])}, "tokens"),
        (lambda row: {**row, "input_ids": [row["input_ids"][0] + 1, *row["input_ids"][1:]]}, "tokens"),
    ],
)
def test_tokenized_records_are_certified(breaks, check):
    failed = prove([TOKENIZED], byte_tokenizer(), breaks=breaks).failed

    assert set(failed) == ({check} if check else set())


@pytest.mark.parametrize("options", [{"stage": "pretrain"}, {"train_on": TRAIN_ON["everything"]}])
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("turns", [[0.5], [0.0], [2.0], [1.0, 0.25], [0.0, 1.0]])
def test_weights_are_certified_if_everything_is_a_target(turns, weight, options):
    messages = [m for w in turns for m in (CHAT[0], {**CHAT[1], "weight": w} if w != 1 else CHAT[1])]

    def forgets(row):
        return {**row, "weights": [1.0] * len(row["labels"])}

    assert prove([Chat(messages, weight=weight)], chat_tokenizer(), **options).failed == {}
    if weight != 1 or not {0.0, 1.0}.issuperset(turns):
        failed = prove([Chat(messages, weight=weight)], chat_tokenizer(), breaks=forgets, **options).failed
        assert set(failed) <= {"weights", "prompt"} and failed


@pytest.mark.parametrize("overflow", ["keep_target", "truncate", "split", "drop"])
def test_cut_rows_are_certified(overflow):
    certificate = prove(EXAMPLES[:4], chat_tokenizer(), overflow=overflow, max_length=15)

    assert certificate.failed == {}
    assert certificate.rows == {"keep_target": 3, "truncate": 4, "split": 7, "drop": 2}[overflow]


@pytest.mark.parametrize("window", [(4, 4), (4, 3), (5, 2)])
def test_windows_over_every_kind_of_text_are_certified(window):
    """Windows without overlap, with one shared token, and with more, for texts, templates and chats."""
    examples = [
        document("Oak trees"),
        Document([Segment("Oak\n", 0, is_own=True), Segment("An oak. It grows.", 1)]),
        Document([Segment("Q: ", 0), Segment("A", 1), Segment(" read ", 0), Segment("B", 1)]),
        Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A model."}]),
    ]
    certificate = prove(examples, chat_tokenizer(), stage="pretrain", window=window)

    assert certificate.failed == {}
    assert certificate.rows > 12


def test_chats_that_lost_their_first_turns_are_certified():
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant")] * 4

    certificate = prove([Chat(turns), Chat(turns)], chat_tokenizer(), max_length=80)

    assert (certificate.failed, certificate.rows) == ({}, 2)


def test_tools_calls_and_reasoning_are_certified():
    tokenizer = chat_tokenizer(AGENT)

    assert prove([ASKS_A_TOOL], tokenizer).failed == {}
    assert prove([ASKS_A_TOOL], tokenizer, train_on=TrainOn("all", reasoning=False)).failed == {}


def test_a_cut_that_leaves_one_token_of_the_prompt_is_certified():
    """The first token of a row has no label; here it does not belong to the target either."""
    certificate = prove([prompted("Say ab", "A")], byte_tokenizer(), max_length=3)

    assert (certificate.failed, certificate.rows) == ({}, 1)


@pytest.mark.parametrize("prepend", ["first", "always", "normalizer"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_with_a_prefix_space_is_certified(prepend, adds_bos):
    examples = [prompted("Say A. ", "A and B"), document("C"), document("  return one")]

    assert prove(examples, sentencepiece_tokenizer(prepend=prepend, adds_bos=adds_bos)).failed == {}


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


def weights_lost(row):
    return {key: values for key, values in row.items() if key != "weights"}


def half_the_target_masked(row):
    first = next(at for at, label in enumerate(row["labels"]) if label >= 0)
    half = (len(row["labels"]) + first) // 2
    return {**row, "labels": [X if first <= at < half else label for at, label in enumerate(row["labels"])]}


def control_token_put_in(row):
    return {
        **row,
        "input_ids": [*row["input_ids"][:1], IM_START, *row["input_ids"][2:]],
        "labels": [X, IM_START, *row["labels"][2:]],
    }


@pytest.mark.parametrize(
    ("breaks", "check"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_each_way_to_break_the_labels_is_caught(breaks, check):
    certificate = prove([prompted("Say A.\n", "A, and B.")], byte_tokenizer(), breaks=breaks)

    assert check in certificate.failed
    assert not certificate.is_valid


@pytest.mark.parametrize(
    ("breaks", "options"),
    [
        (prompt_trained, {"overflow": "truncate", "max_length": 12}),
        (half_the_target_masked, {"overflow": "truncate", "max_length": 12}),
        (prompt_trained, {"overflow": "split", "max_length": 12}),
        (half_the_target_masked, {"overflow": "split", "max_length": 12}),
        (prompt_trained, {"overflow": "keep_target", "max_length": 14}),
        (half_the_target_masked, {"overflow": "keep_target", "max_length": 14}),
        (half_the_target_masked, {"stage": "pretrain", "overflow": "split", "max_length": 12}),
        (control_token_put_in, {"stage": "pretrain", "overflow": "split", "max_length": 12}),
    ],
)
def test_a_broken_cut_or_split_row_is_caught(breaks, options):
    examples = [prompted("Say A.\n", "A, and B.")]

    assert prove(examples, byte_tokenizer(), **options).is_valid
    assert not prove(examples, byte_tokenizer(), breaks=breaks, **options).is_valid


@pytest.mark.parametrize(
    ("example", "breaks", "check"),
    [
        (EXAMPLES[6], weights_lost, "weights"),
        (EXAMPLES[7], weights_lost, "targets"),
        (EXAMPLES[4], half_the_target_masked, "targets"),
        (EXAMPLES[4], prompt_trained, "targets"),
        (EXAMPLES[4], end_lost, "targets"),
    ],
)
def test_broken_weights_and_chats_are_caught(example, breaks, check):
    certificate = prove([example], chat_tokenizer(), breaks=breaks)

    assert not certificate.is_valid
    assert set(certificate.failed) <= {check, "prompt", "stop"}


def without_reasoning(text):
    return text.replace("<think>I should look.</think>", "")


def without_the_call(text):
    return text.replace('<call>{"name": "look", "arguments": {"at": "sky"}}</call>', "")


def without_the_tools(text):
    start, end = text.find("<|im_start|>system"), text.find("<|im_start|>user")
    return text[:start] + text[end:] if start >= 0 else text


@pytest.mark.parametrize("loses", [without_reasoning, without_the_call, without_the_tools])
def test_a_renderer_that_loses_tools_calls_or_reasoning_is_caught(loses, monkeypatch):
    """The renderer is broken after its own checks: only its result is modified."""
    tokenizer = chat_tokenizer(AGENT)
    from hf_clm.text.chat import ChatRenderer

    turns = ChatRenderer.turns

    def broken(self, chat):
        found = turns(self, chat)
        return [turn._replace(prompt=loses(turn.prompt), target=loses(turn.target)) for turn in found]

    monkeypatch.setattr(ChatRenderer, "turns", broken)

    assert not prove([ASKS_A_TOOL], tokenizer).is_valid


def test_a_shape_that_first_appears_late_is_proved(monkeypatch):
    """Prompts used to be compared for the first 50 rows only, and chats of two turns came later."""
    from hf_clm.text.chat import ChatRenderer

    turns = ChatRenderer.turns

    def spaced(self, chat):
        found = turns(self, chat)
        wrong = [turn._replace(prompt=turn.prompt.replace("user", "user ")) for turn in found]
        return wrong if len(found) > 1 else found

    monkeypatch.setattr(ChatRenderer, "turns", spaced)
    one, two = Chat(CHAT[2:]), Chat([*CHAT[2:], *CHAT[2:]])

    certificate = prove([one] * 2100 + [two] * 30, chat_tokenizer())

    assert certificate.failed["prompt"] >= 20
    assert "example 2100" in certificate.failures[0].place


def test_a_prompt_and_target_tokenized_together_are_caught():
    """With a token for newline + A, the joined text has other ids: the prompt takes the target's A."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "A")])

    def joined(row):
        ids = tokenizer("Say A.\nA, and B.<|endoftext|>")["input_ids"]
        return {"input_ids": ids, "labels": [X] * 7 + ids[7:]}

    examples = [prompted("Say A.\n", "A, and B.")]
    assert prove(examples, tokenizer).is_valid
    assert not prove(examples, tokenizer, breaks=joined).is_valid


def test_other_ids_for_the_same_text_are_caught():
    """By character instead of merged: the text is right, but generation never produces such a prompt."""
    tokenizer = byte_tokenizer(merges=[("s", "a")])
    letters = [*b"say\nyes", EOS]

    certificate = prove(
        [prompted("say\n", "yes")],
        tokenizer,
        breaks=lambda row: {"input_ids": letters, "labels": [X] * 4 + letters[4:]},
    )

    assert dict(certificate.failed) == {"prompt": 1}


def test_a_control_token_from_the_text_is_caught(monkeypatch):
    monkeypatch.setattr("hf_clm.text.encode.Encoder.mark", lambda self, text, **kind: text)

    certificate = prove([prompted("Say <|im_end|>\n", "A")], byte_tokenizer())

    assert dict(certificate.failed) == {"control": 1}
    assert certificate.failures[0].expected == "1 control tokens"


def test_a_stop_token_unknown_to_generation_is_caught():
    tokenizer, options = chat_tokenizer(), LabelOptions()
    example = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    rows = tokenize_rows([example], tokenizer, options)

    wrong = certify(rows, [example], tokenizer=tokenizer, options=options, stop_ids=[EOS])
    right = certify(rows, [example], tokenizer=tokenizer, options=options, stop_ids=[EOS, IM_END])

    assert dict(wrong.failed) == {"stop": 1}
    assert right.is_valid


def test_an_uncertified_set_is_refused_with_the_row_and_the_reason():
    examples, tokenizer, options = [prompted("Say A.\n", "A")], byte_tokenizer(), LabelOptions()
    rows = broken(tokenize_rows(examples, tokenizer, options), end_lost)

    certificate = certify(
        rows,
        examples,
        tokenizer=tokenizer,
        options=options,
        stop_ids=[EOS],
        places=["poems.jsonl:17"],
    )

    with pytest.raises(DataError) as error:
        certificate.require()
    assert str(error.value).startswith("poems.jsonl:17: the labels are not certified (1 targets of 1 rows)")
    assert "expected 'A<|endoftext|>', got 'A'" in str(error.value)
