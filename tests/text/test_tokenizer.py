"""Opening tokenizer folders written by save_pretrained."""

import json
import re
from pathlib import Path

import pytest
from helpers import EOS, IM_END, IM_START, PAD, byte_tokenizer, sentencepiece_tokenizer
from transformers import AddedToken, AutoTokenizer, ByT5Tokenizer

from hf_clm.errors import ModelError
from hf_clm.text.tokenizer import (
    add_control_tokens,
    add_pad_token,
    alternatives,
    bos_token,
    control_pattern,
    control_tokens,
    fix_date,
    load_chat_template,
    load_tokenizer,
    max_token_id,
    prints_date,
    set_template_defaults,
    special_tokens,
    unique_ids,
    use_chat_template,
)

END = "<|endoftext|>"
NEXT_ID = 260  # the first free one


def saved(folder: Path, **options) -> str:
    byte_tokenizer(**options).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("own", "named", "token", "number"),
    [
        (None, "<|pad|>", "<|pad|>", PAD),  # in the vocabulary, but not yet the pad token
        (None, "[PAD]", "[PAD]", NEXT_ID),
        (END, "[PAD]", "[PAD]", NEXT_ID),
        ("<|pad|>", "[PAD]", "<|pad|>", PAD),
        ("!", "[PAD]", "!", 33),
    ],
)
def test_a_pad_token_is_added_only_if_there_is_none(tmp_path, own, named, token, number):
    tokenizer = load_tokenizer(saved(tmp_path, pad=own), pad_token=named)

    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (token, number)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, EOS)


def test_the_default_pad_token_takes_the_first_free_id(tmp_path):
    folder = sentencepiece_tokenizer()
    folder.pad_token = None
    folder.save_pretrained(tmp_path)

    tokenizer = load_tokenizer(str(tmp_path), pad_token="<pad>")

    assert (len(folder), tokenizer.pad_token_id, len(tokenizer)) == (355, 355, 356)


@pytest.mark.parametrize("own", [None, END])
def test_a_pad_token_that_is_the_end_token_is_refused(tmp_path, own):
    with pytest.raises(
        ModelError, match=r"^tokenizer.pad_token: equals the end token; got '<\|endoftext\|>'"
    ):
        load_tokenizer(saved(tmp_path, pad=own), pad_token=END)


def test_add_pad_token_changes_nothing_where_there_is_a_separate_one():
    tokenizer = byte_tokenizer(pad="<|pad|>")

    add_pad_token(tokenizer, "[PAD]")

    assert (tokenizer.pad_token_id, len(tokenizer)) == (PAD, 260)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no end token; fix: set tokenizer\.eos_token"):
        load_tokenizer(saved(tmp_path, eos=None))


def test_an_end_token_can_be_given(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "none", eos=None), eos_token=END)
    replaced = load_tokenizer(saved(tmp_path / "other"), eos_token="<|im_end|>")
    added = load_tokenizer(saved(tmp_path / "new"), eos_token="<eos>")

    assert [tokenizer.eos_token_id, replaced.eos_token_id, added.eos_token_id] == [EOS, IM_END, NEXT_ID]


def test_an_end_token_equal_to_the_pad_token_adds_a_new_pad_token(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path), eos_token="<|pad|>", pad_token="[PAD]")

    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (PAD, NEXT_ID)


def test_a_saved_tokenizer_keeps_its_ids_and_pad_token(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "old", pad=END), pad_token="[PAD]", chat_template="chatml")
    tokenizer.save_pretrained(tmp_path / "new")

    for reopened in (AutoTokenizer.from_pretrained(tmp_path / "new"), load_tokenizer(str(tmp_path / "new"))):
        assert reopened("Hi[PAD]<|endoftext|>")["input_ids"] == [72, 105, NEXT_ID, EOS]
        assert (reopened.pad_token_id, reopened.eos_token_id, len(reopened)) == (NEXT_ID, EOS, 261)
        assert reopened.chat_template == tokenizer.chat_template


def test_a_tokenizer_pads_on_the_right(tmp_path):
    folder = saved(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"

    assert load_tokenizer(folder).padding_side == "right"


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "mine")

    assert load_tokenizer("~/mine").eos_token_id == EOS


def test_a_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"not a fast tokenizer \(tokenizer.json\); got ByT5Tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_a_one_line_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_tokenizer(str(tmp_path))

    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_distinguished_from_a_hub_name():
    with pytest.raises(ModelError, match=r"^tokenizer.name_or_path: no such folder; got './nowhere/at/all'"):
        load_tokenizer("./nowhere/at/all")


def test_a_tokenizer_keeps_its_own_chat_template_unless_another_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "other.jinja"
    file.write_text("other: ä", encoding="utf-8")
    folder = str(tmp_path / "tokenizer")

    assert load_tokenizer(folder).chat_template == "mine"
    assert load_tokenizer(folder, chat_template=str(file)).chat_template == "other: ä"
    assert "<|im_start|>" in str(load_tokenizer(folder, chat_template="chatml").chat_template)


def test_chatml_adds_missing_tokens():
    tokenizer = sentencepiece_tokenizer()

    use_chat_template(tokenizer, "chatml")

    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [355, 356]
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [356]


def test_chatml_adds_no_existing_tokens():
    tokenizer = byte_tokenizer()

    use_chat_template(tokenizer, "chatml")

    assert len(tokenizer) == 260


def test_added_template_tokens_do_not_change_other_special_tokens():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})

    use_chat_template(tokenizer, "chatml")

    assert control_tokens(tokenizer)[:3] == ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert tokenizer.extra_special_tokens == ["<tool>", "<|im_start|>", "<|im_end|>"]


def test_an_unknown_chat_template_gets_a_suggestion():
    with pytest.raises(ModelError) as error:
        load_chat_template("chatlm")

    assert str(error.value) == (
        "tokenizer.chat_template: no such chat template; got 'chatlm'; "
        "fix: use one of chatml, plain, or a .jinja file; did you mean 'chatml'?"
    )


def test_control_tokens_are_all_added_tokens_longest_first():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x>"])

    tokens = control_tokens(tokenizer)

    assert tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<x>"]


def test_added_whitespace_is_not_a_control_token():
    """GPT-NeoX and Phi have added tokens for runs of spaces, but indentation is ordinary text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("    "), AddedToken("\n\n")])

    assert control_tokens(tokenizer) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def test_the_longer_of_two_control_tokens_is_found():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|pad|>x", "?"])

    assert control_pattern(tokenizer).findall("a<|pad|>x?<|pad|><|im_start") == ["<|pad|>x", "?", "<|pad|>"]


def test_the_largest_id_may_exceed_the_number_of_tokens():
    tokenizer = byte_tokenizer()
    assert (max_token_id(tokenizer), len(tokenizer)) == (259, 260)

    tokenizer = byte_tokenizer(merges=[("a", "b")])
    assert (max_token_id(tokenizer), IM_START) == (260, 258)


def test_unique_ids_keep_their_order_and_drop_none():
    assert unique_ids([7, None, 3, 7, 0, None, 3]) == [7, 3, 0]


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (sentencepiece_tokenizer(adds_bos=True), "<s>"),
        (sentencepiece_tokenizer(adds_bos=False), None),  # it has one, and does not use it
        (byte_tokenizer(), None),
    ],
)
def test_a_start_token_counts_only_if_the_tokenizer_adds_it(tokenizer, token):
    assert bos_token(tokenizer) == token


def test_control_tokens_are_added_once_and_take_one_id_each():
    tokenizer = byte_tokenizer()

    add_control_tokens(tokenizer, ["<sep>", "<|im_end|>", "<mask>"])
    add_control_tokens(tokenizer, ["<sep>"])

    assert tokenizer("a<sep><mask>")["input_ids"] == [97, 260, 261]
    assert len(tokenizer) == 262
    assert control_pattern(tokenizer).findall("<sep> <sep") == ["<sep>"]


def test_tokens_that_the_model_generates_are_not_special():
    tokenizer = byte_tokenizer(pad="!")
    tokenizer.add_tokens(["<think>", AddedToken("<tool>", special=True)])

    assert special_tokens(tokenizer) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|pad|>",
        "<tool>",
        "!",
    ]
    assert "<think>" in control_tokens(tokenizer)


@pytest.mark.parametrize("words", [["ab", "abc", "b", "b.c"], ["abc"], []])
def test_the_longest_word_at_a_position_is_found(words):
    expected = {4: ["abc", "b.c", "b"], 1: ["abc"], 0: []}[len(words)]

    assert re.findall(alternatives(words), "xabcb.c|b_ac") == expected


def test_template_variables_have_saved_defaults_that_can_be_overridden(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].content }}{{ 'thinks' if enable_thinking else 'speaks' }}{{ names|join }}"
    )
    set_template_defaults(tokenizer, {"enable_thinking": False, "names": ["Ann", None]})
    tokenizer.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)

    hi = [{"role": "user", "content": "Hi "}]
    assert reopened.apply_chat_template(hi, tokenize=False) == "Hi speaksAnnNone"
    assert reopened.apply_chat_template(hi, tokenize=False, enable_thinking=True) == "Hi thinksAnnNone"


def test_a_variable_that_the_template_does_not_use_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match=r"^tokenizer\.chat_template_kwargs: has no chat template"):
        set_template_defaults(tokenizer, {"enable_thinking": False})
    tokenizer.chat_template = "{{ enable_thinking }}"
    with pytest.raises(ModelError) as error:
        set_template_defaults(tokenizer, {"enable_thinkin": False})

    assert str(error.value).startswith(
        "tokenizer.chat_template_kwargs: the chat template does not use 'enable_thinkin'; "
        "did you mean 'enable_thinking'?"
    )
    set_template_defaults(tokenizer, {})
    assert tokenizer.chat_template == "{{ enable_thinking }}"


DATED = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}"
    'Today: {{ day }} ({{ strftime_now("%Y") }})'
    "{% for message in messages %} {{ message.content }}{% endfor %}"
)


def test_a_fixed_date_is_printed_in_every_format_and_saved(tmp_path):
    tokenizer, plain = byte_tokenizer(), byte_tokenizer()
    tokenizer.chat_template = DATED
    assert prints_date(tokenizer) and not prints_date(plain)

    for day in ("2024-07-26", "2025-01-01"):  # the first counts
        fix_date(tokenizer, day)
    fix_date(plain, "2024-07-26")
    tokenizer.save_pretrained(tmp_path)

    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        text = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "Today: 26 Jul 2024 (2024) Hi"
    assert plain.chat_template is None and not prints_date(tokenizer)
