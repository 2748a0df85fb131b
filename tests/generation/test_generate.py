"""generate: prompts and stop tokens as in training, and batches that do not change answers."""

import json

import pytest
import torch
from helpers import EOS, IM_END, IM_START, PAD, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.read.formats import to_prompt
from hf_clm.errors import DataError, RecipeError
from hf_clm.generation.decoding import Decoding, update_decoding
from hf_clm.generation.generate import Generated, generate
from hf_clm.generation.prompts import first_prompts, fit_new_tokens, to_prompt_example
from hf_clm.model.load import fit_to_tokenizer
from hf_clm.schema import Chat, Document, Segment
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.text.train_tokenizer import train_characters

OPTIONS = {"decoding": Decoding(8)}
PLAIN = {"max_new_tokens": 8, "do_sample": False}  # of transformers


def build_model(kind: str = "qwen2", **settings) -> PreTrainedModel:
    model = tiny_model(kind, **settings)
    fit_to_tokenizer(model, byte_tokenizer())
    return model


def counting_model(last: int = ord("e"), stop: int = EOS, **settings) -> PreTrainedModel:
    """A GPT-2 built by hand that answers each byte with the next one, and ``last`` with ``stop``."""
    model = build_model("gpt2", n_layer=1, n_embd=260, n_head=1, tie_word_embeddings=False, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight.copy_(torch.eye(260))
        for token in range(259):
            model.lm_head.weight[stop if token == last else token + 1, token] = 1.0
    return model


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def seen(model: PreTrainedModel, monkeypatch) -> list[list[list[int]]]:
    """Records the input ids of each batch that the model generates from."""
    batches, original = [], model.generate

    def recorded(**kwargs):
        batches.append(kwargs["input_ids"].tolist())
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", recorded)
    return batches


def test_the_answer_ends_before_the_stop_token():
    assert generate(counting_model(), byte_tokenizer(), prompts=["a"], **OPTIONS) == [
        Generated("bcde", 4, True)
    ]


def test_a_truncated_answer_is_not_reported_as_stopped():
    answers = generate(counting_model(), byte_tokenizer(), prompts=["a"], decoding=Decoding(2))

    assert answers == [Generated("bc", 2, False)]


def test_answers_come_in_the_order_of_the_prompts_whatever_their_length():
    prompts = ["d", "xxxxxc", "a", "b", "12345678a"]

    answers = generate(counting_model(), byte_tokenizer(), prompts=prompts, batch_size=2, **OPTIONS)

    assert [answer.text for answer in answers] == ["e", "de", "bcde", "cde", "bcde"]
    assert [answer.tokens for answer in answers] == [1, 2, 4, 3, 4]


def test_no_prompt_gives_no_answer():
    assert generate(counting_model(), byte_tokenizer(), prompts=[], **OPTIONS) == []


def test_a_prompt_is_padded_on_the_left_and_never_ends_in_a_stop_token(monkeypatch):
    model = counting_model()
    batches = seen(model, monkeypatch)

    generate(model, byte_tokenizer(), prompts=["abc", "a"], **OPTIONS)

    assert batches[-1] == [
        [PAD, PAD, 97],
        [97, 98, 99],
    ]  # earlier batches are those of the probe


def test_a_chat_opens_the_turn_of_the_assistant_and_stops_at_its_end(monkeypatch):
    model, tokenizer = counting_model(last=ord("\n"), stop=IM_END), chat_tokenizer()
    fit_to_tokenizer(model, tokenizer)
    batches = seen(model, monkeypatch)

    answers = generate(model, tokenizer, prompts=[Chat([{"role": "user", "content": "hi"}])], **OPTIONS)

    assert tokenizer.decode(batches[0][0]).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert answers == [Generated("", 0, True)]


def test_control_tokens_in_a_prompt_are_plain_text(monkeypatch):
    model = counting_model()
    batches = seen(model, monkeypatch)

    generate(model, byte_tokenizer(), prompts=["<|pad|>"], **OPTIONS)

    assert batches == [[list(b"<|pad|>")]]


def test_an_empty_prompt_is_the_start_token(monkeypatch):
    """The tokenizer has a start token, but does not add it to texts."""
    model, tokenizer = counting_model(), byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    batches = seen(model, monkeypatch)

    generate(model, tokenizer, prompts=[""], **OPTIONS)

    assert batches[-1] == [[IM_START]]  # earlier batches are those of the probe


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0}, {"min_p": 1}])
def test_sampling_from_one_token_is_greedy(option):
    model = build_model()

    one = Decoding(8, temperature=1.0, **option)
    sampled = generate(model, byte_tokenizer(), prompts=["a"], decoding=one)

    assert sampled == generate(model, byte_tokenizer(), prompts=["a"], **OPTIONS)


def test_no_repeat_ngram_size_prevents_repetition():
    model = counting_model(last=0)
    with torch.no_grad():  # a, b, a, b, ...
        model.lm_head.weight.zero_()
        model.lm_head.weight[ord("b"), ord("a")] = model.lm_head.weight[ord("a"), ord("b")] = 1.0

    plain = generate(model, byte_tokenizer(), prompts=["a"], **OPTIONS)[0].text
    without = generate(model, byte_tokenizer(), prompts=["a"], decoding=Decoding(8, no_repeat_ngram_size=2))[
        0
    ].text

    assert plain == "babababa"
    assert without.startswith("ba") and not without.startswith("bab")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_beam_search_gives_the_same_answers_in_a_batch_and_alone(kind):
    """The batch is padded and some answers stop early; plain transformers answers each prompt alone."""
    model = build_model(kind, seed=1, tie_word_embeddings=False)
    with torch.no_grad():  # far from uniform, and likely to stop
        head = model.get_output_embeddings().weight
        head *= 40
        head[EOS] *= 2
    prompts = ["a", "the lamp turns", "boats", "12345678901234567890"]
    beams = {"num_beams": 5, "no_repeat_ngram_size": 2, "max_new_tokens": 12, "do_sample": False}

    how = Decoding(12, num_beams=5, no_repeat_ngram_size=2)
    answers = generate(model, byte_tokenizer(), prompts=prompts, decoding=how)

    alone = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.encode()]])
        ends = {"eos_token_id": EOS, "pad_token_id": PAD}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **beams, **ends)
        new = output[0, len(prompt) :].tolist()
        end = new.index(EOS) if EOS in new else len(new)
        letters = [token for token in new[:end] if token < EOS]
        alone.append((byte_tokenizer().decode(letters), EOS in new))
    assert [(answer.text, answer.stopped) for answer in answers] == alone
    assert {answer.stopped for answer in answers} == {True, False}


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_ends_before_a_stop_text(beams):
    how = Decoding(8, stop=("d",), num_beams=beams)
    answers = generate(counting_model(), byte_tokenizer(), prompts=["a", "c"], decoding=how)

    assert [answer.text for answer in answers] == ["bc", ""]
    assert [answer.stopped for answer in answers] == [True, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature: expected greater than or equal to 0; got -1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number; got nan"),
        ({"top_k": 2.5}, "top_k: expected a valid integer, got a number with a fractional part; got 2.5"),
        ({"top_p": 2}, "top_p: expected less than or equal to 1; got 2"),
        ({"seed": 2**63}, "seed: expected less than 9223372036854775808; got 9223372036854775808"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected greater than or equal to 1; got 0"),
        ({"stop": ["x" * 201]}, "stop.0: String should have at most 200 characters"),
    ],
)
def test_a_setting_out_of_range_is_a_one_line_error(setting, message):
    with pytest.raises(RecipeError) as error:
        update_decoding(Decoding(), setting)

    assert str(error.value) == message


def test_a_prompt_with_an_unknown_character_is_rejected():
    tokenizer = train_characters(["abc"])

    with pytest.raises(DataError, match=r"^prompt 2: the tokenizer has no token for it; got 'f' \(U\+0066\)"):
        generate(build_model(), tokenizer, prompts=["ab", "café"])


def test_a_prompt_that_leaves_no_room_is_rejected_with_the_numbers():
    with pytest.raises(RecipeError) as error:
        generate(
            build_model(max_position_embeddings=16),
            byte_tokenizer(),
            prompts=["a", "123456789"],
            decoding=Decoding(8),
        )

    assert str(error.value) == (
        "the model has 16 positions; got a prompt of 9 tokens and max_new_tokens 8; "
        "fix: shorten the prompt, lower max_new_tokens, or use hf-clm generate --slide"
    )


@pytest.mark.parametrize(
    ("positions", "asked", "given"), [(16, 8, 8), (16, 3, 3), (16, None, 8), (300, None, 256), (9, None, 1)]
)
def test_the_length_of_an_answer_is_max_new_tokens_or_the_room_left(positions, asked, given):
    model = tiny_model(max_position_embeddings=positions)

    assert fit_new_tokens(model, 8, max_new_tokens=asked) == given


def test_a_prompt_that_leaves_no_positions_is_rejected():
    with pytest.raises(RecipeError, match="the model has 16 positions; got a prompt of 16 tokens"):
        fit_new_tokens(tiny_model(max_position_embeddings=16), 16, max_new_tokens=None)


@pytest.mark.parametrize(
    ("format", "example"),
    [
        ("text", Document([Segment("hi", 1.0)])),
        ("prompt_completion", Document([Segment("hi", 1.0)])),
        ("instruct", Document([Segment("hiin", 0.0)])),
        ("messages", Chat([{"role": "user", "content": "hi\n\nin"}])),
        ("sharegpt", Chat([{"role": "user", "content": "hi\n\nin"}])),
    ],
)
def test_plain_text_becomes_a_prompt_of_the_run_format(format, example):
    assert to_prompt_example("hi", format, input_text="in") == example


@pytest.mark.parametrize("given", ["", "\nin\n", "in", " \n"])
@pytest.mark.parametrize(
    ("format", "keys"), [("instruct", ("instruct", "input")), ("alpaca", ("instruction", "input"))]
)
def test_an_instruction_with_line_breaks_becomes_the_same_turn_as_its_record(format, keys, given):
    record = dict(zip(keys, ("do\n", given), strict=True))

    prompt = to_prompt_example("do\n", format, input_text=given, has_turns=True)

    assert prompt == to_prompt(record, format=format, render="chat")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_slide_continues_past_the_maximum_length_from_the_last_half(kind):
    """16 positions: a prompt of 3 leaves 13; then the model repeatedly reads 8 tokens and generates 8."""
    positions = {"gpt2": "n_positions", "qwen2": "max_position_embeddings"}[kind]
    model = tiny_model(kind, **{positions: 16}, eos_token_id=None)
    model.generation_config.eos_token_id = PAD  # never the most likely token here
    expected = {}
    for prompt, rooms in (("abc", [13, 8, 8, 1]), ("hello", [11, 8, 8, 3])):
        ids = list(prompt.encode())
        for room in rooms:
            read = torch.tensor([ids if len(ids) < 16 else ids[-8:]])
            plain = {"attention_mask": torch.ones_like(read), "pad_token_id": PAD, "do_sample": False}
            ids += model.generate(read, max_new_tokens=room, **plain)[0, read.shape[1] :].tolist()
        assert PAD not in ids
        expected[prompt] = byte_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)

    options = {"decoding": Decoding(30), "slide": True}
    answers = [generate(model, byte_tokenizer(), prompts=[prompt], **options)[0] for prompt in expected]
    answers_together = generate(model, byte_tokenizer(), prompts=[*expected], **options)

    assert [(answer.text, answer.tokens, answer.stopped) for answer in answers] == [
        (text, 30, False) for text in expected.values()
    ]
    assert answers_together == answers


def test_slide_stops_at_stop_tokens_and_accepts_prompts_over_the_maximum_length():
    model = counting_model(n_positions=4)

    answers = generate(model, byte_tokenizer(), prompts=["a", "xxxxxxxxxc"], slide=True, **OPTIONS)

    assert answers == [Generated("bcde", 4, True), Generated("de", 2, True)]


def test_slide_and_beams_cannot_be_combined():
    with pytest.raises(RecipeError, match="slide and num_beams cannot be combined"):
        generate(build_model(), byte_tokenizer(), prompts=["a"], slide=True, decoding=Decoding(num_beams=2))


LABELS = [
    (["user", [["read control", "<s>"], ["read", "user\nMoon"]]], ["assistant", [["trained", "bright"]]]),
    (
        ["user", [["read", "[INST] Sun"]]],
        ["assistant", [["trained", "hot"]]],
    ),  # nothing tells what is written around
    (
        ["system", [["read", "system\nBe"]]],
        ["user", [["read", "user\nSea"]]],
        ["assistant", [["trained", "wet"]]],
    ),
]


def test_the_first_prompts_of_a_run_are_its_samples_and_then_those_of_its_documents(tmp_path):
    samples = [
        {"step": step, "prompt": prompt, "text": ""} for step in (0, 9) for prompt in ("Star", "x" * 501)
    ]
    rows = [{"turns": turns, "tokens": 9, "shown": 9} for turns in LABELS]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (tmp_path / "label_rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (tmp_path / "run.json").write_text('{"status": "done", "has_turns": true}')
    (tmp_path / "checkpoint-9").mkdir()

    assert first_prompts(str(tmp_path)) == ["Star", "Moon"]
    assert first_prompts(str(tmp_path / "checkpoint-9")) == ["Star", "Moon"]
    assert first_prompts("organisation/model") == []
