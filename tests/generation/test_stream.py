"""Streamed answers: complete characters, stop texts, seeds; the same in a batch and alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import EOS, byte_tokenizer, sentencepiece_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.generation.decoding import Decoding, update_decoding
from hf_clm.generation.stream import Answer, TextStream, stream_answers
from hf_clm.model.load import fit_to_tokenizer

GREEDY = Decoding()


def speaking_model(text: str | bytes) -> PreTrainedModel:
    """A GPT-2 built by hand that answers any prompt with the bytes of ``text`` and then stops.

    Its next token depends only on its position: the prompt must be one byte, at position 0.
    """
    spoken = [*(text.encode() if isinstance(text, str) else text), EOS]
    size = len(spoken)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": size, "n_positions": size + 1}
    model = tiny_model("gpt2", tie_word_embeddings=False, **sizes)
    fit_to_tokenizer(model, byte_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight[:size] = torch.eye(size)
        for position, token in enumerate(spoken):
            model.lm_head.weight[token, position] = 1.0
    return model


def random_model(kind: str = "qwen2") -> PreTrainedModel:
    model = tiny_model(kind)
    fit_to_tokenizer(model, byte_tokenizer())
    return model


def streamed(
    model: PreTrainedModel,
    prompts: list[str],
    *,
    sampling: list[Decoding] | None = None,
    max_new_tokens: int = 64,
    stop: tuple[str, ...] = (),
) -> tuple[list[Answer], list[list[str]]]:
    """Returns the answers and the pieces that each was emitted in."""
    pieces: list[list[str]] = [[] for _ in prompts]
    answers = [
        Answer(
            list(prompt.encode()),
            replace(how, stop=stop),
            max_new_tokens=max_new_tokens,
            emit=came.append,
        )
        for prompt, how, came in zip(prompts, sampling or [GREEDY] * len(prompts), pieces, strict=True)
    ]
    stream_answers(model, byte_tokenizer(), answers=answers)
    return answers, pieces


# --- text


def test_each_token_but_the_stop_token_is_a_piece():
    (answer,), pieces = streamed(speaking_model("so it is"), ["?"])

    assert pieces == [["s", "o", " ", "i", "t", " ", "i", "s"]]
    assert (answer.text, len(answer.ids), answer.finish) == ("so it is", 8, "stop")


def test_a_character_is_emitted_once_it_is_complete():
    _, pieces = streamed(speaking_model("a茶🐉é."), ["?"])

    assert pieces == [["a", "茶", "🐉", "é", "."]]


def test_an_incomplete_character_is_emitted_at_the_end():
    (answer,), pieces = streamed(speaking_model(b"ab\xf0\x9f"), ["?"])

    assert pieces == [["a", "b", "\ufffd"]]
    assert answer.finish == "stop"


def test_an_incomplete_character_is_emitted_with_the_next_one():
    _, pieces = streamed(speaking_model(b"a\xffb"), ["?"])

    assert pieces == [["a", "\ufffdb"]]


def test_a_truncated_answer_has_finish_length():
    (answer,), _ = streamed(speaking_model("so it is"), ["?"], max_new_tokens=3)

    assert (answer.text, len(answer.ids), answer.finish) == ("so ", 3, "length")


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(merges=[("Ã", "©"), ("Ġ", "t"), ("è", "Į")]),  # é, a space and t, two bytes of 茶
        sentencepiece_tokenizer(merged=["▁the", "▁t", "he"]),
        sentencepiece_tokenizer(prepend="normalizer"),
    ],
    ids=["bytes", "sentencepiece", "llama2"],
)
@pytest.mark.parametrize(
    "text", ["the  the\n the", "  café 茶 茶🐉 the ", "a\u0301 \u200d👩\u200d🚀 the\ufffd!", " "]
)
def test_the_pieces_together_are_what_the_tokens_decode_to(tokenizer: PreTrainedTokenizerFast, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)

    pieces = [stream.push(token) for token in ids]

    assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)


def test_control_tokens_are_not_text():
    stream = TextStream(byte_tokenizer())

    assert [stream.push(token) for token in (ord("a"), 258, ord(" "), 257, ord("b"))] == [
        "a",
        "",
        " ",
        "",
        "b",
    ]


# --- stop texts


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (("it",), ["s", "o", " "]),
        (("o it",), ["s"]),
        (("is", "it"), ["s", "o", " "]),
        (("itch",), ["s", "o", " ", "it ", "is"]),  # "it" might have become "itch"
        (("so it is not",), ["so it is"]),
        (("s",), []),
    ],
)
def test_no_part_of_a_stop_text_is_emitted(stop, pieces):
    (answer,), came = streamed(speaking_model("so it is"), ["?"], stop=stop)

    assert came == [pieces]
    assert answer.finish == "stop"


def test_a_stop_text_may_end_inside_a_token():
    """The rest of the token that ends the stop text is not emitted."""
    pieces: list[str] = []
    answer = Answer([1], Decoding(stop=("\n",)), max_new_tokens=9, emit=pieces.append)

    for text in ("one", " two\nthree"):
        answer.add(text)

    assert pieces == ["one", " two"]
    assert answer.finish == "stop"


# --- batches


def test_a_cancelled_answer_ends_and_does_not_affect_others():
    pieces: list[str] = []

    def emit(text: str) -> None:
        pieces.append(text)
        answers[0].is_cancelled = len(pieces) == 2

    answers = [Answer([63], GREEDY, max_new_tokens=64, emit=one) for one in (emit, lambda text: None)]
    stream_answers(speaking_model("so it is"), byte_tokenizer(), answers=answers)

    assert pieces == ["s", "o"]
    assert (answers[0].finish, len(answers[0].ids)) == ("", 2)
    assert (answers[1].finish, answers[1].text) == ("stop", "so it is")


# --- sampling


def sampled(model: PreTrainedModel, seed: int, **settings: Any) -> list[int]:
    """Returns the bytes that plain transformers samples after ``a``."""
    torch.manual_seed(seed)
    ids = torch.tensor([[97]])
    with torch.no_grad():
        options = {"do_sample": True, "max_new_tokens": 12, "top_k": 0, **settings}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.6}, {"temperature": 1.0, "top_k": 5}]
)
def test_a_seed_samples_what_transformers_samples_alone_and_in_a_batch(settings):
    model = random_model()
    how = Decoding(seed=7, **settings)

    alone, _ = streamed(model, ["a"], sampling=[how], max_new_tokens=12)
    others = [GREEDY, how, Decoding(temperature=2.0, seed=1)]
    together, _ = streamed(model, ["longer", "a", "b"], sampling=others, max_new_tokens=12)

    expected = byte_tokenizer().decode(sampled(model, 7, **settings), skip_special_tokens=True)
    assert alone[0].text == together[1].text == expected


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-38, 1e-320])
def test_the_lowest_temperatures_are_greedy(temperature):
    greedy, cold = (
        streamed(random_model(), ["a"], sampling=[how], max_new_tokens=8)[0][0].text
        for how in (GREEDY, Decoding(temperature=temperature, top_k=5, top_p=1e-320))
    )

    assert cold == greedy


def test_without_a_seed_answers_differ():
    how = [Decoding(temperature=2.0)] * 4

    answers, _ = streamed(random_model(), ["a"] * 4, sampling=how, max_new_tokens=32)

    assert len({answer.text for answer in answers}) == 4


def test_sampling_does_not_change_the_global_random_state():
    model = random_model()
    before = torch.get_rng_state()

    streamed(model, ["a"], sampling=[Decoding(temperature=1.0, seed=3)], max_new_tokens=4)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("asked", "decoding"),
    [
        ({}, Decoding()),
        ({"temperature": 0.5}, Decoding(temperature=0.5)),
        ({"top_p": 0.9}, Decoding(temperature=1.0, top_p=0.9)),
        ({"top_k": 3}, Decoding(temperature=1.0, top_k=3)),
        ({"min_p": 0.1}, Decoding(temperature=1.0, min_p=0.1)),
        ({"temperature": 0.0, "top_p": 0.9}, Decoding(top_p=0.9)),
        ({"top_k": -1, "top_p": 1.0, "min_p": 0.0}, Decoding(top_k=-1)),
        ({"stop": ["", "x"], "seed": 5, "other": 3}, Decoding(stop=("x",), seed=5)),
    ],
)
def test_decoding_is_greedy_by_default(asked, decoding):
    assert update_decoding(Decoding(), asked) == decoding
