"""Ids and labels of pieces as literals: a byte is its own id, X is a position without a label."""

import io
from typing import Any

import pytest
import sentencepiece
from helpers import (
    EOS,
    IM_END,
    IM_START,
    PAD,
    X,
    byte_tokenizer,
    document,
    prompted,
    sentencepiece_tokenizer,
    shown,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import SFTDataset, tokenize_rows
from hf_clm.data.label.labels import (
    Fate,
    count_targets,
    cut_chat,
    fit,
    fit_windows,
    mask_first,
    slice_row,
    to_filler,
    to_row,
    tokens_to_rows,
)
from hf_clm.data.label.render import LabelOptions, TrainOn
from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Chat, Document, Message, Segment, TokenizedExample, Tokens
from hf_clm.text.encode import Piece
from hf_clm.text.sentencepiece_file import load_sentencepiece
from hf_clm.text.tokenizer import use_chat_template

P, Q = ord("p"), ord("q")
TOKENIZER = byte_tokenizer()
use_chat_template(TOKENIZER, "chatml")
HI: Message = {"role": "user", "content": "Hi"}
YO: Message = {"role": "assistant", "content": "Yo"}


def row(ids: list[int], labels: list[int], **weights: list[float]) -> Any:
    return {"input_ids": ids, "labels": labels, **weights}


def tokenized(example: Any, tokenizer: Any = TOKENIZER, **options: Any) -> TokenizedExample:
    found = tokenize_rows([example], tokenizer, LabelOptions(**options))
    assert len(found) == 1
    return found[0]


def asked(tokenizer: Any, messages: list[Message]) -> Any:
    """Uses transformers as the oracle: returns the ids of the generation prompt."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


# --- what is learned


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (prompted("Hi\n", "Yo"), row([*b"Hi\nYo", EOS], [X, X, X, *b"Yo", EOS])),
        (document("Hi!"), row([*b"Hi!", EOS], [X, *b"i!", EOS])),
        (prompted("", "Yo"), row([*b"Yo", EOS], [X, ord("o"), EOS])),
        (Document([Segment("a", 0.0), Segment("b", 1.0), Segment("c", 0.0), Segment("d", 1.0)]),
         row([*b"abcd", EOS], [X, 98, X, 100, EOS])),
        (
            Chat([HI, YO]),
            row(
                [IM_START, *b"user\nHi", IM_END, 10, IM_START, *b"assistant\nYo", IM_END],
                [X] * 21 + [*b"Yo", IM_END],
            ),
        ),
        (prompted("a<|pad|>", "<|im_end|>"),
         row([*b"a<|pad|><|im_end|>", EOS], [X] * 8 + [*b"<|im_end|>", EOS])),
    ],
)  # fmt: skip
def test_a_prompt_is_masked_and_a_target_ends_in_a_labelled_stop_token(example, found):
    assert tokenized(example) == found


@pytest.mark.parametrize("token", [EOS, PAD, IM_END])
def test_an_end_or_pad_id_inside_a_target_keeps_its_label(token):
    text = {EOS: "<|endoftext|>", PAD: "<|pad|>", IM_END: "<|im_end|>"}[token]

    example = tokenized(prompted("p", f"q{text}q"), special_tokens_in_text="allow")

    assert example == row([P, Q, token, Q, EOS], [X, Q, token, Q, EOS])


def test_the_ids_of_a_chat_equal_those_of_transformers():
    """Uses transformers as the oracle, on the rendered text without the last newline."""
    messages: list[Message] = [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "Grüße"},
        {"role": "assistant", "content": "  Yo\n"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "雪"},
    ]

    theirs: Any = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False)

    assert [*tokenized(Chat(messages))["input_ids"], 10] == theirs


def test_prompt_and_target_are_tokenized_separately():
    """In one string, the two newlines would be one token, half prompt and half target."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    assert tokenizer("Q\n\nA")["input_ids"] == [81, 260, 65]

    assert tokenized(prompted("Q\n", "\nA"), tokenizer) == row([81, 10, 10, 65, EOS], [X, X, 10, 65, EOS])
    for text in (document("Q\n\nA"), prompted("Q\n", "\nA")):
        whole = row([81, 260, 65, EOS], [X, 260, 65, EOS])
        assert tokenized(text, tokenizer, stage="pretrain") == whole
    pieces = [Segment("Q", 0.0), Segment("\n", 0.0), Segment("\n", 0.0), Segment("A", 1.0)]
    assert tokenized(Document(pieces), tokenizer) == row([81, 260, 65, EOS], [X, X, 65, EOS])


def test_turns_that_merge_across_their_boundary_become_separate_rows():
    """``A:`` and ``\\nYo`` have other ids inside a longer prompt, since ``:\\n`` is one token."""
    tokenizer = byte_tokenizer(merges=[(":", "Ċ")])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role[0] + ':' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    chat = Chat([HI, {**YO, "content": "\nYo"}, HI, YO])

    rows = tokenize_rows([chat], tokenizer, LabelOptions())

    assert [shown(rows[number], tokenizer) for number in range(len(rows))] == [
        "u:Hia:⟦\nYo<|endoftext|>⟧",
        "u:Hia:\nYo<|endoftext|>u:Hia:⟦Yo<|endoftext|>⟧",
    ]
    prompt = asked(tokenizer, chat.messages[:3])
    assert rows[1]["input_ids"] == [*prompt, *b"Yo", EOS]
    assert 260 in prompt


# --- weights


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (Document([Segment("ab", 0.5), Segment("c", 0.0), Segment("d", 2.0)]),
         row([*b"abcd", EOS], [X, 98, X, 100, EOS], weights=[0.5, 0.5, 0.0, 2.0, 2.0])),
        (Document([Segment("a", 0.0), Segment("b", 0.5)]),
         row([*b"ab", EOS], [X, 98, EOS], weights=[0.0, 0.5, 0.5])),
        (Document([Segment("a", 0.0), Segment("b", 1.0)]), row([*b"ab", EOS], [X, 98, EOS])),
    ],
)  # fmt: skip
def test_labels_have_the_weight_of_their_segment(example, found):
    assert tokenized(example) == found


def test_labels_have_the_weight_of_their_turn():
    found = tokenized(Chat([HI, {**YO, "weight": 0.25}, HI, YO]))

    learned = zip(found["weights"], found["labels"], strict=True)
    assert [weight for weight, label in learned if label != X] == [0.25] * 3 + [1.0] * 3


# --- tokenizers


@pytest.mark.parametrize("prepend", ["first", "always", "normalizer"])
@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("Q:", "yes", ["<s>", "▁", "Q", ":", "y", "e", "s", "</s>"]),
        ("Q: ", "yes", ["<s>", "▁", "Q", ":", "▁", "y", "e", "s", "</s>"]),
        ("Q:", " yes", ["<s>", "▁", "Q", ":", "▁", "y", "e", "s", "</s>"]),
        ("Q\n", "\ny", ["<s>", "▁", "Q", "<0x0A>", "<0x0A>", "y", "</s>"]),
        ("", "yes", ["<s>", "▁", "y", "e", "s", "</s>"]),
        ("Q</s>", "</s>y", ["<s>", "▁", "Q", *"</s>", *"</s>", "y", "</s>"]),
    ],
)  # fmt: skip
def test_no_space_is_added_between_prompt_and_target(prepend, prompt, completion, tokens):
    """▁ is a space. The tokenizer adds one to the start of a text, but not after a prompt."""
    tokenizer = sentencepiece_tokenizer(prepend=prepend, adds_bos=True)

    ids = tokenized(prompted(prompt, completion), tokenizer)["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_no_space_is_added_before_merging_newlines():
    tokenizer = sentencepiece_tokenizer(merged=["\n\n", "\n\n\n"])

    ids = tokenized(prompted("Q", "\n\nA"), tokenizer)["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "Q", "\n\n", "A", "</s>"]


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("prepend", ["first", "always", "normalizer"])
@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR, VICUNA], ids=["mistral", "zephyr", "vicuna"])
@pytest.mark.parametrize("merged", [[], ["▁[", "▁yes", "▁<", "\n<", "T]", "▁U"]], ids=["letters", "merged"])
def test_the_ids_before_each_target_equal_the_generation_prompt(prepend, template, merged):
    """Before a second ``[INST]``, ``first`` and ``always`` differ."""
    tokenizer = sentencepiece_tokenizer(prepend=prepend, adds_bos=True, merged=merged)
    tokenizer.chat_template = template
    messages: list[Message] = []
    for number in range(3):
        messages += [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "yes"}]

    found = SFTDataset([Chat(messages)], tokenizer)

    prompts = [
        example["input_ids"][:at]
        for example in found
        for at, (before, label) in enumerate(zip([X, *example["labels"]], example["labels"], strict=False))
        if before == X and label != X
    ]
    assert len(prompts) == 3
    for turn, prompt in zip((1, 3, 5), prompts, strict=True):
        assert prompt == asked(tokenizer, messages[:turn])
    answers = [[label for label in example["labels"] if label != X] for example in found]
    assert "".join(map(tokenizer.decode, answers)).replace(" ", "") == "yes</s>" * 3


def test_a_chat_can_use_the_vocabulary_of_a_sentencepiece_file(tmp_path):
    """Like the files of mistral-common: only the template uses the file's ``<s>`` and ``</s>``."""
    model = io.BytesIO()
    lines = iter(["ask 0 [INST] yes [/INST] no"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=275, byte_fallback=True, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer: Any = load_sentencepiece(str(tmp_path / "tokenizer.model"))
    tokenizer.chat_template = MISTRAL
    messages: list[Message] = [{"role": "user", "content": "ask 0"}, {"role": "assistant", "content": "yes"}]

    found = tokenized(Chat([*messages, *messages]), tokenizer)

    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    for turn in (1, 3):
        prompt = asked(tokenizer, [*messages, *messages][:turn])
        assert prompt[0] == start
        assert found["input_ids"][: len(prompt)] == prompt
        assert found["labels"][len(prompt) - 1] == X != found["labels"][len(prompt)]
    assert [label for label in found["labels"] if label == end] == [end, end]


def test_tokens_that_strip_whitespace_can_be_trained_on():
    """transformers#32136: the newline after Phi-3's tokens is swallowed."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    )

    found = tokenized(Chat([HI, YO, HI, YO]), tokenizer)

    turn = [260, *b"Hi", 262, 261, *b"Yo", 262]
    assert found == row([*turn, *turn], [X] * 5 + [*b"Yo", 262] + [X] * 5 + [*b"Yo", 262])


def test_a_prefix_space_is_not_added_to_targets():
    """ByteLevel with add_prefix_space, as in RoBERTa and some Llama 3 conversions; a space is id 32."""
    plain = byte_tokenizer()
    backend = plain.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    use_chat_template(tokenizer, "chatml")

    assert tokenized(prompted("Q:", "yes"), tokenizer)["input_ids"] == [32, *b"Q:yes", EOS]
    assert tokenized(prompted("Q:", " yes"), tokenizer)["input_ids"] == [32, *b"Q: yes", EOS]
    found = tokenized(Chat([HI, YO, HI, YO]), tokenizer)
    prompt = asked(tokenizer, [HI, YO, HI])
    assert found["input_ids"][: len(prompt)] == prompt
    assert found["labels"][len(prompt) :] == [*b"Yo", IM_END]


@pytest.mark.parametrize(
    ("special", "name"), [({"pad": "!"}, "pad_token '!'"), ({"eos": "\n"}, r"eos_token '\n'")]
)
def test_an_ordinary_character_as_pad_or_end_token_is_refused(special, name):
    """Each occurrence in a text would become padding or an end token."""
    with pytest.raises(ModelError) as error:
        tokenized(document("Hi!\nHo"), byte_tokenizer(**special))

    assert str(error.value).startswith(f"tokenizer: the {name} is ordinary text; fix: set tokenizer.")


def test_a_token_that_cannot_be_plain_text_is_refused_with_its_row():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")

    assert tokenized(document("yes yes"), tokenizer) == row([1, 1, 2], [X, 1, 2])
    with pytest.raises(DataError, match="cannot encode a control token as plain text; got '</s>'") as error:
        SFTDataset([document("yes"), document("yes </s> yes")], tokenizer)
    assert error.value.row == 1


# --- rows that are tokenized already


def test_a_tokenized_packed_row_is_split_into_its_documents():
    tokens = Tokens([5, 6, 7, 8], [5, 6, 7, 8], [1, 3])

    assert tokens_to_rows(tokens, TOKENIZER) == [row([5], [X]), row([6, 7, 8], [X, 7, 8])]


@pytest.mark.parametrize(
    ("ids", "labels", "position"),
    [
        ([5, 260, 7], [5, 260, 7], 1),
        ([5, 6, 7], [X, X, 999], 2),
        ([5, 6, 2**31 - 1], [X, 6, X], 2),
    ],
)  # fmt: skip
def test_an_id_outside_the_vocabulary_is_refused_with_its_position(ids, labels, position):
    got = next(i for i in (*ids, *labels) if i > 259)

    with pytest.raises(DataError) as error:
        tokens_to_rows(Tokens(ids, labels, [3]), TOKENIZER)

    assert str(error.value) == (
        f"an id is not in the vocabulary; got {got} at position {position}, but the largest id is 259; "
        "fix: use the tokenizer with which the data were tokenized"
    )


# --- rows


def test_pieces_make_a_row_whose_first_token_has_no_label():
    assert to_row([Piece("", 1.0), Piece("", 0.0), Piece("", 1.0)], [[1, 2], [3], [4]]) == row(
        [1, 2, 3, 4], [X, 2, X, 4]
    )
    assert to_row([], []) == row([], [])
    assert mask_first(row([1], [1])) == row([1], [X])
    assert mask_first(row([], [])) == row([], [])
    assert slice_row(row([1, 2, 3, 4], [X, 2, 3, 4], weights=[1, 2, 3, 4]), start=1, stop=3) == row(
        [2, 3], [X, 3], weights=[2, 3]
    )
    assert count_targets(row([1, 2, 0], [X, X, 0])) == 1


def test_a_filler_is_one_token_without_a_label():
    packed = {"input_ids": [1, 2], "labels": [X, 2], "position_ids": [0, 1]}

    assert to_filler(packed) == {"input_ids": [1], "labels": [X], "position_ids": [0]}
    assert packed["labels"] == [X, 2]


LONG = row([*b"pppp", *b"TT", EOS], [X, X, X, X, *b"TT", EOS])
USED = Fate("used")


@pytest.mark.parametrize(
    ("overflow", "max_length", "pieces", "fate"),
    [
        ("keep_target", 7, [LONG], USED),
        ("keep_target", None, [LONG], USED),
        ("keep_target", 5, [row([*b"ppTT", EOS], [X, X, *b"TT", EOS])], Fate("cut", cut_tokens=2)),
        ("keep_target", 4, [row([*b"pTT", EOS], [X, *b"TT", EOS])], Fate("cut", cut_tokens=3)),
        ("keep_target", 3, [], Fate("dropped", "no whole target fits in max_length")),
        ("truncate", 6, [row([*b"ppppTT"], [X, X, X, X, *b"TT"])], Fate("cut", cut_tokens=1)),
        ("truncate", 5, [row([*b"ppppT"], [X, X, X, X, 84])], Fate("cut", cut_tokens=2)),
        ("truncate", 4, [], Fate("dropped", "no target token is left")),
        ("drop", 7, [LONG], USED),
        ("drop", 6, [], Fate("dropped", "longer than max_length")),
        ("error", 7, [LONG], USED),
        ("split", 5, [row([*b"ppppT"], [X, X, X, X, 84]), row([*b"TT", EOS], [X, 84, EOS])], Fate("split")),
        ("split", 4, [row([*b"pTT", EOS], [X, *b"TT", EOS])], Fate("split")),  # the first piece has no target
    ],
)  # fmt: skip
def test_a_row_over_max_length_follows_the_rule(overflow, max_length, pieces, fate):
    assert fit([LONG], max_length, overflow=overflow) == (pieces, fate)


def test_a_cut_keeps_the_start_token_and_a_token_before_the_target():
    bos = row([1, *b"pppp", *b"TT", EOS], [X] * 5 + [*b"TT", EOS])

    assert fit([bos], 6, overflow="keep_target", keeps=1)[0] == [
        row([1, *b"ppTT", EOS], [X, X, X, *b"TT", EOS])
    ]
    assert fit([bos], 4, overflow="keep_target", keeps=1)[0] == [row([1, *b"TT", EOS], [X, *b"TT", EOS])]
    assert fit([bos], 3, overflow="keep_target", keeps=1)[0] == []
    weighted = row([1, 2, 3, 4], [X, X, 3, 4], weights=[0.0, 0.0, 0.5, 0.5])
    assert fit([weighted], 3, overflow="keep_target")[0] == [
        row([2, 3, 4], [X, 3, 4], weights=[0.0, 0.5, 0.5])
    ]


def test_keep_target_keeps_from_the_first_target_on():
    example = row([1, 2, 3, 4, 5, 6], [X, X, 3, X, 5, 6])

    assert fit([example], 5, overflow="keep_target")[0] == [row([2, 3, 4, 5, 6], [X, 3, X, 5, 6])]
    assert fit([example], 4, overflow="keep_target")[0] == []


def test_error_names_both_lengths():
    with pytest.raises(DataError) as error:
        fit([LONG], 6, overflow="error")

    assert str(error.value) == (
        "longer than max_length=6; got 7 tokens; fix: raise data.max_length or set data.overflow"
    )


@pytest.mark.parametrize("overflow", ["keep_target", "truncate", "drop", "error", "split"])
@pytest.mark.parametrize("example", [row([1, 2, 3], [X, X, X]), row([1], [X]), row([], [])])
def test_a_row_without_a_target_is_dropped_whatever_its_length(overflow, example):
    assert fit([example], 2, overflow=overflow) == ([], Fate("dropped", "no target token"))
    assert fit_windows([example], size=2, step=1)[0] in ([], [row([1, 2], [X, X]), row([2, 3], [X, X])])


@pytest.mark.parametrize("max_length", range(2, 12))
def test_split_neither_loses_nor_repeats_a_label(max_length):
    example = row(list(range(10)), [X, *range(1, 10)])

    pieces, _ = fit([example], max_length, overflow="split")

    labels = [label for piece in pieces for label in piece["labels"] if label != X]
    assert labels == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert max(len(piece["input_ids"]) for piece in pieces) <= max_length
    assert all(piece["labels"][0] == X for piece in pieces)


# --- chats over max_length


SYSTEM: Message = {"role": "system", "content": "Be kind."}
TURNS = [SYSTEM]
for number in range(1, 6):
    TURNS += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]


def chat_rows(max_length: int, messages: Any = TURNS, tokenizer: Any = TOKENIZER, **options: Any) -> Any:
    found = tokenize_rows([Chat(messages)], tokenizer, LabelOptions(max_length=max_length, **options))
    return [shown(found[number], tokenizer) for number in range(len(found))], found.fates[0]


def turn(number: int, *, last: bool = False) -> str:
    answer = f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n⟦a{number}<|im_end|>⟧"
    return answer if last else answer + "\n"


HEAD = "<|im_start|>system\nBe kind.<|im_end|>\n"


def test_a_chat_over_max_length_keeps_its_system_turn_and_the_last_turns_that_fit():
    length = len(tokenized(Chat(TURNS))["input_ids"])
    three = HEAD + turn(3) + turn(4) + turn(5, last=True)
    one_turn = 10 + 15  # <|im_start|>user\nq1<|im_end|>\n and <|im_start|>assistant\na1<|im_end|>\n

    assert length == 18 + 5 * one_turn - 1
    assert chat_rows(length) == ([HEAD + "".join(map(turn, (1, 2, 3, 4))) + turn(5, last=True)], USED)
    assert chat_rows(length - 2 * one_turn) == (
        [three],
        Fate("cut", "messages 2 to 5 left out", cut_tokens=2 * one_turn),
    )
    assert chat_rows(length - one_turn - 1)[0] == [three], "a turn that fits but for one token is left out"
    assert chat_rows(18 + one_turn - 1)[0] == [HEAD + turn(5, last=True)]
    assert chat_rows(18 + one_turn - 2) == ([], Fate("dropped", "no whole target fits in max_length"))


def test_a_cut_chat_with_tools_begins_at_a_user_turn():
    result: Any = {"role": "tool", "content": "x" * 30}
    messages = [HI, YO, HI, YO, result, YO, HI, YO]

    found, _ = chat_rows(100, messages)

    assert found == [turn(0, last=True).replace("q0", "Hi").replace("a0", "Yo")]


def test_rows_of_single_turns_are_cut_separately():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role[0] + ':' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )

    found, fate = chat_rows(31, TURNS, tokenizer)

    assert found == [
        "s:Be kind.\nu:q1\na:⟦a1<|endoftext|>⟧",
        "s:Be kind.\nu:q1\na:a1\nu:q2\na:⟦a2<|endoftext|>⟧",
        "s:Be kind.\nu:q2\na:a2\nu:q3\na:⟦a3<|endoftext|>⟧",
        "s:Be kind.\nu:q3\na:a3\nu:q4\na:⟦a4<|endoftext|>⟧",
        "s:Be kind.\nu:q4\na:a4\nu:q5\na:⟦a5<|endoftext|>⟧",
    ]
    assert (fate.kind, fate.cut_tokens) == ("cut", 10 + 20 + 30)
    last, _ = chat_rows(31, TURNS, tokenizer, train_on=TrainOn("last"))
    assert last == found[4:]


def test_context_turns_at_the_end_are_cut_before_targets():
    read: Any = [
        {**message, "weight": 0.0} if n in (6, 8) else message for n, message in enumerate(TURNS[:9])
    ]

    assert chat_rows(18 + 25 - 1, read)[0] == [HEAD + turn(2, last=True)]


@pytest.mark.parametrize(
    ("overflow", "rows", "fate"),
    [
        ("drop", 0, Fate("dropped", "longer than max_length")),
        ("truncate", 1, Fate("cut", cut_tokens=92)),
        ("split", 3, Fate("split")),
    ],
)  # fmt: skip
def test_the_other_overflow_rules_treat_chats_like_texts(overflow, rows, fate):
    found, found_fate = chat_rows(50, TURNS, overflow=overflow)

    assert (len(found), found_fate) == (rows, fate)


def test_the_longest_fitting_end_of_a_chat_is_found():
    chat = Chat(TURNS)
    asked: list[int] = []

    def fits(part: Chat) -> bool:
        asked.append(len(part.messages))
        return len(part.messages) <= 5

    assert cut_chat(chat, fits) == (7, Chat([SYSTEM, *TURNS[7:]]))
    assert cut_chat(chat, lambda part: True) == (0, chat)
    assert cut_chat(chat, lambda part: False) is None
    assert cut_chat(Chat([HI, SYSTEM, YO]), lambda part: False) is None
    assert len(asked) <= 4
