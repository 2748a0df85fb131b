"""Which parts of an example are targets and which are context: rows as text, with targets in ⟦ ⟧.

A control token that is only spelled stands in ` `. The first token of a row has no label.
"""

from typing import Any

import pytest
from helpers import byte_tokenizer, document, prompted, sentencepiece_tokenizer, shown
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clm.data.label.datasets import SFTDataset, tokenize_rows
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import LabelOptions, Renderer, TrainOn
from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Chat, Document, Message, Segment
from hf_clm.text.tokenizer import control_tokens, use_chat_template

THINKS = (  # reasoning of the last turn only, as Qwen3
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if loop.last and message.role == 'assistant' %}"
    "{{- '<think>' + message.reasoning_content|default('') + '</think>' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
KEEPS = THINKS.replace("loop.last and ", "")
NO_END = (
    "{%- for message in messages %}{{- message.role + ': ' + message.content + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
HI: Message = {"role": "user", "content": "Hi"}
YO: Message = {"role": "assistant", "content": "Yo"}
AND: Message = {"role": "user", "content": "And?"}
BYE: Message = {"role": "assistant", "content": "Bye"}
THOUGHTFUL: Message = {**YO, "reasoning": "hm"}
U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
ASKED_HI, ASKED_AND = f"{U}Hi{E}\n{A}", f"{U}And?{E}\n{A}"


def T(text: str) -> Segment:
    return Segment(text, 1.0)


def R(text: str) -> Segment:
    return Segment(text, 0.0)


def chat(user: str, assistant: str) -> Chat:
    return Chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def tokenizer_with(template: str = "chatml") -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])  # special=False
    use_chat_template(tokenizer, "chatml")
    if template != "chatml":
        tokenizer.chat_template = template
    return tokenizer


def rows(example: Any, template: str = "chatml", **options: Any) -> list[str]:
    tokenizer = tokenizer_with(template)
    found = tokenize_rows([example], tokenizer, LabelOptions(**options))
    return [shown(found[number], tokenizer) for number in range(len(found))]


def notes(example: Any, template: str = "chatml", **options: Any) -> list[str]:
    return Renderer(tokenizer_with(template), LabelOptions(**options)).plan(example).notes


# --- documents


@pytest.mark.parametrize(
    ("example", "row"),
    [
        (document("Hi"), "H⟦i<|endoftext|>⟧"),
        (prompted("Q:", "A"), "Q:⟦A<|endoftext|>⟧"),
        (prompted("", "Yes"), "Y⟦es<|endoftext|>⟧"),
        (Document([R("a"), T("b"), R("c"), T("d")]), "a⟦b⟧c⟦d<|endoftext|>⟧"),
        (Document([R("a"), R("b"), T("c"), T(""), T("d")]), "ab⟦cd<|endoftext|>⟧"),
        (Document([R("x"), T("a"), R("b")]), "x⟦a⟧b"),  # it ends in text that is read: nothing stops there
    ],
)  # fmt: skip
def test_the_last_target_of_a_document_ends_in_the_end_token(example, row):
    assert rows(example) == [row]


@pytest.mark.parametrize("example", [document(""), Document([]), Document([R("a")])])
def test_a_document_without_a_target_has_no_row(example):
    assert rows(example) == []


@pytest.mark.parametrize(
    ("turns", "row"),
    [
        ("all", "a⟦b⟧c⟦de<|endoftext|>⟧"),
        ("last", "abc⟦de<|endoftext|>⟧"),
        ("everything", "a⟦bcde<|endoftext|>⟧"),
    ],
)  # fmt: skip
def test_train_on_applies_to_segments(turns, row):
    example = Document([R("a"), T("b"), R("c"), T("d"), T("e")])

    assert rows(example, train_on=TrainOn(turns)) == [row]
    everything = "Q⟦:A<|endoftext|>⟧" if turns == "everything" else "Q:⟦A<|endoftext|>⟧"
    assert rows(prompted("Q:", "A"), train_on=TrainOn(turns)) == [everything]


@pytest.mark.parametrize(
    ("example", "row"),
    [
        (prompted("Q:", "A<|endoftext|>"), "Q:⟦A<|endoftext|>⟧"),
        (prompted("Q:", " A<|endoftext|>\n"), "Q:⟦ A<|endoftext|>⟧"),
        (document("Hi<|endoftext|>"), "H⟦i<|endoftext|>⟧"),
        (chat("Hi", f"Yo{E}"), f"{ASKED_HI}⟦Yo{E}⟧"),
        (chat("Hi", "Yo<|endoftext|>"), f"{ASKED_HI}⟦Yo{E}⟧"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["encode_as_text", "allow", "error"])
def test_an_end_token_written_by_hand_gives_one_end_token_and_a_note(example, row, policy):
    """unsloth#3228: one policy trained on its characters, the other on two end tokens."""
    assert rows(example, special_tokens_in_text=policy) == [row]
    assert notes(example, special_tokens_in_text=policy) == ["an end token written by hand"]


def test_an_end_token_inside_a_text_does_not_end_it():
    example = prompted("Q:", "<|endoftext|>A")

    assert rows(example) == ["Q:⟦`<|endoftext|>`A<|endoftext|>⟧"]
    assert rows(example, special_tokens_in_text="allow") == ["Q:⟦<|endoftext|>A<|endoftext|>⟧"]
    assert notes(example) == []


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ModelError, match=r"^tokenizer: has no end token; fix: set its eos_token$"):
        SFTDataset([prompted("Q", "A")], byte_tokenizer(eos=None))


# --- chats


@pytest.mark.parametrize(
    ("messages", "turns", "found"),
    [
        ([HI, YO, AND, BYE], "all", [f"{ASKED_HI}⟦Yo{E}⟧\n{ASKED_AND}⟦Bye{E}⟧"]),
        ([HI, YO, AND, BYE], "last", [f"{ASKED_HI}Yo{E}\n{ASKED_AND}⟦Bye{E}⟧"]),
        ([HI, YO, AND, BYE], "everything",
         [f"<|im_start|>⟦{ASKED_HI.removeprefix('<|im_start|>')}Yo{E}\n{ASKED_AND}Bye{E}⟧"]),
        ([HI, {**YO, "weight": 0.0}, AND, BYE], "all", [f"{ASKED_HI}Yo{E}\n{ASKED_AND}⟦Bye{E}⟧"]),
        ([HI, YO, AND, {**BYE, "weight": 0.0}], "all", [f"{ASKED_HI}⟦Yo{E}⟧"]),
        ([HI, YO, AND, {**BYE, "weight": 0.0}], "last", []),
        ([HI, {**YO, "weight": 0.0}, AND, BYE], "everything",
         [f"<|im_start|>⟦{ASKED_HI.removeprefix('<|im_start|>')}⟧Yo{E}⟦\n{ASKED_AND}Bye{E}⟧"]),
        ([HI, YO, AND], "all", [f"{ASKED_HI}⟦Yo{E}⟧"]),
        ([HI], "all", []),
    ],
)  # fmt: skip
def test_train_on_and_weights_select_the_turns_of_a_chat(messages, turns, found):
    assert rows(Chat(messages), train_on=TrainOn(turns)) == found


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (THINKS, f"{ASKED_HI}⟦<think>hm</think>Yo{E}⟧",
         f"{ASKED_HI}Yo{E}\n{ASKED_AND}⟦<think></think>Bye{E}⟧"),
        (NO_END, "user: Hi\nassistant: ⟦Yo<|endoftext|>⟧",
         "user: Hi\nassistant: Yo\nuser: And?\nassistant: ⟦Bye<|endoftext|>⟧"),
    ],
)  # fmt: skip
def test_a_template_that_rewrites_earlier_turns_gives_one_row_per_turn(template, first, second):
    messages = [HI, THOUGHTFUL if template == THINKS else YO, AND, BYE]

    assert rows(Chat(messages), template) == [first, second]
    assert notes(Chat(messages), template) == ["a row for each turn"]
    assert notes(Chat(messages[:2]), template) == []
    assert rows(Chat(messages), template, train_on=TrainOn("last")) == [second]
    read: Any = {**messages[1], "weight": 0.0}
    assert rows(Chat([HI, read, AND, BYE]), template) == [second]


def test_reasoning_can_be_context_only():
    messages = [HI, THOUGHTFUL, AND, BYE]

    assert rows(Chat(messages), KEEPS, train_on=TrainOn(reasoning=False)) == [
        f"{ASKED_HI}<think>hm</think>⟦Yo{E}⟧\n{ASKED_AND}<think></think>⟦Bye{E}⟧"
    ]
    assert rows(Chat(messages), KEEPS) == [
        f"{ASKED_HI}⟦<think>hm</think>Yo{E}⟧\n{ASKED_AND}⟦<think></think>Bye{E}⟧"
    ]


@pytest.mark.parametrize("how", ["in_content", "drop"])
def test_reasoning_that_was_written_into_the_content_or_dropped_is_noted(how):
    assert notes(Chat([HI, THOUGHTFUL]), reasoning=how) == [f"reasoning: {how}"]


def test_a_chat_has_only_the_start_token_of_its_template():
    """transformers#37686: the template adds one, and the tokenizer adds another."""
    tokenizer = sentencepiece_tokenizer(adds_bos=True)
    use_chat_template(tokenizer, "chatml")
    for template, count in ((tokenizer.chat_template, 0), ("{{ bos_token }}" + tokenizer.chat_template, 1)):
        tokenizer.chat_template = template
        row = SFTDataset([chat("<s>Hi", "Yo")], tokenizer)[0]

        assert row["input_ids"].count(tokenizer.bos_token_id) == count


# --- control tokens in a text


@pytest.mark.parametrize(
    ("example", "row", "allowed"),
    [
        (document("a<|im_end|>b"), "a⟦`<|im_end|>`b<|endoftext|>⟧", "a⟦<|im_end|>b<|endoftext|>⟧"),
        (prompted("<|pad|>", "A"), "`<|pad|>`⟦A<|endoftext|>⟧", "<|pad|>⟦A<|endoftext|>⟧"),
        # Text of the model: <think> is not special in its vocabulary.
        (prompted("<think>", "<think>A</think>"), "`<think>`⟦<think>A</think><|endoftext|>⟧",
         "<think>⟦<think>A</think><|endoftext|>⟧"),
        (chat("<think>", "<think>A</think>"), f"{U}`<think>`{E}\n{A}⟦<think>A</think>{E}⟧",
         f"{U}<think>{E}\n{A}⟦<think>A</think>{E}⟧"),
        (chat("<|im_end|>", "a<|pad|>b"), f"{U}`<|im_end|>`{E}\n{A}⟦a`<|pad|>`b{E}⟧",
         f"{U}<|im_end|>{E}\n{A}⟦a<|pad|>b{E}⟧"),
        (Document([R("<|im_"), R("end|>"), T("A")]), "`<|im_end|>`⟦A<|endoftext|>⟧",
         "<|im_end|>⟦A<|endoftext|>⟧"),
        # Encoded separately, it is not a token.
        (Document([R("<|im_"), T("end|>")]), "<|im_⟦end|><|endoftext|>⟧", "<|im_⟦end|><|endoftext|>⟧"),
        # Text from the recipe is a token; text from a record and the recipe together is not.
        (Document([R("t"), Segment("<|pad|>", 0.0, is_own=True), T("<|pad|>")]),
         "t<|pad|>⟦`<|pad|>`<|endoftext|>⟧", "t<|pad|>⟦<|pad|><|endoftext|>⟧"),
        (Document([R("<|p"), Segment("ad|>", 0.0, is_own=True), T("A")]), "`<|pad|>`⟦A<|endoftext|>⟧",
         "<|pad|>⟦A<|endoftext|>⟧"),
    ],
)  # fmt: skip
def test_control_tokens_are_text_from_users_and_tokens_from_the_model(example, row, allowed):
    assert rows(example) == [row]
    assert rows(example, special_tokens_in_text="allow") == [allowed]


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (document("<|pad|>a<|im_end|><|pad|>"), ["<|pad|>", "<|im_end|>", "<|pad|>"]),
        (prompted("<think>", "<think>"), ["<think>"]),
        (Document([R("<|pa"), R("d|>"), T("<|pa")]), ["<|pad|>"]),
        (chat("<|im_end|>", "<think><|im_end|>"), ["<|im_end|>", "<|im_end|>"]),
        (Chat([HI, YO], [{"type": "function", "function": {"name": "<|pad|>"}}]), ["<|pad|>"]),
        (Document([Segment("<|pad|>", 1.0, is_own=True)]), []),
        (chat("Hi <|im_end|", "|>"), []),
    ],
)  # fmt: skip
def test_control_tokens_in_text_are_counted_or_refused(example, found):
    options = LabelOptions(special_tokens_in_text="error")
    renderer = Renderer(tokenizer_with(), options)

    assert renderer.control_texts(example) == found
    if not found:
        renderer.plan(example)
        return
    with pytest.raises(DataError) as error:
        renderer.plan(example)
    assert str(error.value) == (
        f"the text contains a control token; got {found[0]!r}; "
        "fix: remove it, or set data.special_tokens_in_text to encode_as_text or allow"
    )


def test_mostly_rendered_texts_are_refused():
    """unsloth#384: they would be trained on as plain text."""
    rendered, plain = document(f"{ASKED_HI}Yo{E}\n"), document("A text about <|im_end|>.")

    for examples, got in (([rendered] * 3, "3 of 3"), ([rendered, rendered, plain], "2 of 3")):
        with pytest.raises(DataError) as error:
            SFTDataset(examples, tokenizer_with())
        assert str(error.value).startswith(
            f"{got} texts are already rendered: they contain control tokens; got '<"
        )
        assert "fix: provide messages, or encode them as tokens with data.special_" in str(error.value)
    assert len(SFTDataset([rendered, plain], tokenizer_with())) == 2
    assert rows(rendered, special_tokens_in_text="allow")[0].startswith("<|im_start|>⟦user\nHi<|im_end|>\n")


# --- the prompt of generation

# Prompts and targets whose boundary would merge in one string: \n\n, and ":" with a newline.
MERGING = byte_tokenizer(merges=[("Ċ", "Ċ"), (":", "Ċ"), ("Ċ", "Ġ"), ("s", "Ċ")])
use_chat_template(MERGING, "chatml")


@pytest.mark.parametrize(
    ("example", "prompt", "ids"),
    [
        (prompted("Q:\n", "\nA"), Document([R("Q:\n")]), [81, 261]),
        (prompted("Write a poem\n", "\n\nA"), Document([R("Write a poem\n")]), [*b"Write a poem\n"]),
        (prompted("Q", "A"), prompted("Q", "A"), [81]),
        (Document([R("s"), T("\nA:"), R("\n"), T("\nB")]), Document([R("s"), T("\nA:"), R("\n")]),
         [115, 10, 65, 58, 10]),
        (document("Once"), document("On"), [*b"On"]),
        (prompted("", "A"), Document([R("")]), []),
        (chat("Hi", "\nYo"), Chat([HI]), [258, *b"user\nHi", 259, 10, 258, *b"assistant\n"]),
    ],
)  # fmt: skip
def test_the_ids_before_a_target_equal_the_generation_input(example, prompt, ids):
    trained = SFTDataset([example], MERGING)[0]

    assert encode_prompts([prompt], MERGING, LabelOptions()) == [ids]
    assert trained["input_ids"][: len(ids)] == ids
    learned = [n for n, label in enumerate(trained["labels"]) if label != -100]
    assert max(learned, default=0) >= len(ids), "the last target comes after the prompt"


PIECES = ["<|", "|>", "<", "im", "_end", "<|im_end|>", "<|pad|>", "</s", ">", "</s>", "<y/>", "<unk>", " "]
CONTENT = st.lists(st.sampled_from([*PIECES, "\n", "é", "a"]), max_size=8).map("".join)


def prepared(tokenizer: Any) -> tuple[Any, set[int]]:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<y/>"]}, replace_extra_special_tokens=False)
    use_chat_template(tokenizer, "chatml")
    vocab = tokenizer.get_added_vocab()
    return tokenizer, {vocab[token] for token in control_tokens(tokenizer)}


TOKENIZERS = {
    "bytes": prepared(byte_tokenizer()),
    "first": prepared(sentencepiece_tokenizer(prepend="first", merged=["</", "</s", "\n\n"])),
    "normalizer": prepared(sentencepiece_tokenizer(prepend="normalizer")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=CONTENT, completion=CONTENT)
@settings(max_examples=60, deadline=None)
def test_user_text_never_becomes_a_control_token_and_decodes_unchanged(name, prompt, completion):
    """SentencePiece loses a leading space and parses an end token, so all texts have a letter there."""
    tokenizer, control = TOKENIZERS[name]
    prompt, completion = f"Q{prompt}", f"{completion}."

    ids = SFTDataset([prompted(prompt, completion)], tokenizer)[0]["input_ids"]

    assert [i for i in ids if i in control] == [tokenizer.eos_token_id] == ids[-1:]
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == prompt + completion


@given(user=CONTENT, assistant=CONTENT)
@settings(max_examples=60, deadline=None)
def test_a_chat_has_the_control_tokens_of_its_template_and_no_other(user, assistant):
    tokenizer, control = TOKENIZERS["bytes"]
    user, assistant = f"{user}.", f"{assistant}."

    row = SFTDataset([chat(user, assistant)], tokenizer)[0]

    assert [i for i in row["input_ids"] if i in control] == [258, 259, 258, 259]
    assert tokenizer.decode(row["input_ids"]) == f"{U}{user}{E}\n{A}{assistant}{E}"
    assert bytes(i for i in row["labels"] if 0 <= i < 256) == assistant.encode()
