"""One rule of decoding: every command gives the greedy answer of the model.

The reference implementation reads the complete text again for each token, without cache and padding.
"""

import json
import random
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import EOS, PAD, build_recipe, byte_tokenizer, save_folder, tiny_model, write_jsonl
from starlette.testclient import TestClient
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_clm.cli import main
from hf_clm.errors import ModelError
from hf_clm.generation.chat import Conversation
from hf_clm.generation.decoding import Decoding, update_decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import load_run
from hf_clm.generation.padding import Probe, probe
from hf_clm.generation.sampling import read_model_settings, stop_ids, temporary_config
from hf_clm.generation.serve import build_app
from hf_clm.generation.worker import Worker
from hf_clm.model.load import fit_to_tokenizer
from hf_clm.recipe.sections import Samples
from hf_clm.training.run import build_samples

PROMPTS = ["a", "hello there", "xyz", "the quick brown fox", "to be", "0123456789"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Architectures that are not in helpers.SIZES: recurrent, hybrid, with a window shorter than prompts.
SIZES: dict[str, dict[str, Any]] = {
    "rwkv": {**SMALL, "attention_hidden_size": 32, "context_length": 64},
    "mamba": {**SMALL, "state_size": 8},
    "recurrent_gemma": {
        **{**SMALL, "num_hidden_layers": 3},
        **{**HEADS, "num_key_value_heads": 1},
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "minimax": {
        **{**SMALL, **HEADS, **EXPERTS},
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {**SMALL, **HEADS, "sliding_window": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
}
IN_BATCHES = {"gpt2": True, "qwen2": True, "llama": True, "mistral": True, "bloom": True, "mamba": True} | {
    "rwkv": False,
    "recurrent_gemma": False,
    "minimax": False,
}
POISON: dict[str, dict[str, Any]] = {
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": ["a", "e"]},
    "dict": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 2.0},
    "suppressed": {
        "suppress_tokens": [97, 98, 99, 100],
        "begin_suppress_tokens": [101],
        "bad_words_ids": [[97]],
    },
    "forced": {"forced_bos_token_id": 65, "forced_eos_token_id": 65, "min_new_tokens": 30},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.2},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -2.0},
    "lookup": {"prompt_lookup_num_tokens": 3, "penalty_alpha": 0.6, "guidance_scale": 3.0},
    "cache": {"cache_implementation": "static", "use_cache": False, "max_length": 3},
    "wrong": {"temperature": "hot", "max_new_tokens": -1, "cache_implementation": "none", "num_beams": -2},
    "ids": {"eos_token_id": ["x", -1, 1.5, True, 10**30, None], "pad_token_id": "x", "bos_token_id": {}},
    "objects": {"compile_config": {"x": 2}, "watermarking_config": {"a": 1}, "custom": [1]},
}


def build_model(kind: str) -> PreTrainedModel:
    """Weights far from their initial values, so that reading padding changes answers."""
    if kind in SIZES:
        torch.manual_seed(0)
        ids = {"vocab_size": 260, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ids, **SIZES[kind])).eval()
    else:
        model = tiny_model(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.1
    fit_to_tokenizer(model, byte_tokenizer())
    return model


@torch.no_grad()
def arg_max(model: PreTrainedModel, prompt: str, *, new: int) -> str:
    """Returns the greedy answer, by definition."""
    ids, result = list(prompt.encode()), []
    while len(result) < new:
        token = int(model(input_ids=torch.tensor([ids + result]), use_cache=False).logits[0, -1].argmax())
        if token == EOS:
            break
        result.append(token)
    return byte_tokenizer().decode(result, skip_special_tokens=True)


# --- the commands


def by_generate(folder: str, capsys: Any, *, prompts: list[str] = PROMPTS, **asked: Any) -> list[str]:
    """Answers with ``hf-clm generate``, all prompts at once."""
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    for name, value in asked.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}", str(one)]
    capsys.readouterr()
    assert main(["generate", folder, *words, "--device", "cpu", "--json"]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def by_chat(folder: str, *, prompts: list[str] = PROMPTS, **asked: Any) -> list[str]:
    """Answers with ``hf-clm chat``: a text model continues each line."""
    decoding, result = update_decoding(Decoding(), asked), []
    talk = Conversation(load_run(folder, attention=None, device="cpu"), decoding, system="")
    for number, prompt in enumerate(prompts):
        talk.decoding = decoding.of_prompt(number)
        result.append(talk.answer(prompt, lambda text: None).text)
    return result


def by_serve(
    folder: str, *, prompts: list[str] = PROMPTS, use_model_settings: bool = False, **asked: Any
) -> list[list[str]]:
    """Answers with ``hf-clm serve``: as a list of prompts, as chats, and with /generate."""
    options = Namespace(run=folder, name="m", host="127.0.0.1", max_new_tokens=64, max_body_bytes=10**6)
    options.use_model_settings, options.max_prompt_tokens = use_model_settings, None
    body = {**asked, "max_tokens": asked["max_new_tokens"]}
    del body["max_new_tokens"]
    run = load_run(folder, attention=None, device="cpu")
    with TestClient(app_of(run, options), base_url="http://localhost") as client:

        def one(path: str, body: dict[str, Any], number: int) -> dict[str, Any]:
            seed = {"seed": body["seed"] + number} if "seed" in body else {}
            reply = client.post(path, json={**body, **seed})
            assert reply.status_code == 200, reply.text
            return reply.json()

        together = client.post("/v1/completions", json={**body, "prompt": prompts})
        assert together.status_code == 200, together.text
        asked_chats = [
            one("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}, number)
            for number, prompt in enumerate(prompts)
        ]
        alone = [
            one("/generate", {**body, "prompt": prompt}, number) for number, prompt in enumerate(prompts)
        ]
        return [
            [choice["text"] for choice in together.json()["choices"]],
            [reply["choices"][0]["message"]["content"] for reply in asked_chats],
            [reply["text"] for reply in alone],
        ]


def app_of(run: Any, options: Namespace) -> Any:
    """Returns the server's app, whose worker must be created inside its event loop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "inner" not in made:
            worker = Worker(run, batch_size=8, max_waiting=64)
            made["inner"] = build_app(options, "", worker=worker, run=run)
        await made["inner"](scope, receive, send)

    made: dict[str, Any] = {}
    return app


def by_samples(folder: str, tmp_path: Path, **asked: Any) -> list[str]:
    """Answers with the samples of a run."""
    place = tmp_path / "run"
    place.mkdir()
    run = load_run(folder, attention=None, device="cpu")
    samples = Samples(
        prompts=PROMPTS, max_new_tokens=asked["max_new_tokens"], temperature=asked.get("temperature", 0)
    )
    recipe = build_recipe(place, [{"text": "a"}], stage="pretrain", samples=samples.model_dump())
    facts: Any = SimpleNamespace(recipe=recipe, template=None, format="text", has_turns=False)
    trainer: Any = SimpleNamespace(
        model=run.model,
        processing_class=run.tokenizer,
        args=SimpleNamespace(seed=asked.get("seed", 0), output_dir=str(place)),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        aside=nullcontext,
    )
    return build_samples(facts, trainer).generate()


def by_evaluate(folder: str, tmp_path: Path, capsys: Any, *, new: int) -> list[str]:
    """Answers with ``hf-clm evaluate --generate``."""
    records = [
        {"segments": [{"text": text, "train": False}, {"text": "x", "train": True}]} for text in PROMPTS
    ]
    file = write_jsonl(tmp_path / "e.jsonl", records)
    capsys.readouterr()
    words = ["--generate", "--max_new_tokens", str(new), "--device", "cpu", "--json"]
    assert main(["evaluate", folder, file, *words]) == 0
    return [sample["generated"] for sample in json.loads(capsys.readouterr().out)["samples"]]


# --- the rule


@pytest.mark.parametrize("kind", [*IN_BATCHES])
def test_every_command_gives_the_greedy_answer_of_the_model(kind, tmp_path, capsys):
    model = build_model(kind)
    folder = save_folder(tmp_path / "model", model, byte_tokenizer())
    expected = [arg_max(model, prompt, new=10) for prompt in PROMPTS]

    assert len(set(expected)) > 2
    assert by_generate(folder, capsys, max_new_tokens=10) == expected
    assert by_chat(folder, max_new_tokens=10) == expected
    assert by_serve(folder, max_new_tokens=10) == [expected] * 3
    assert by_samples(folder, tmp_path, max_new_tokens=10) == expected
    if kind not in ("rwkv", "recurrent_gemma", "minimax", "mamba", "bloom"):  # evaluate packs rows
        assert by_evaluate(folder, tmp_path, capsys, new=10) == expected


@pytest.mark.parametrize("poison", ["max_time", "stop_strings", "penalties", "forced", "beams", "wrong"])
def test_generation_config_has_no_effect_on_any_command(poison, tmp_path, capsys):
    model = build_model("gpt2")
    expected = [arg_max(model, prompt, new=10) for prompt in PROMPTS]
    folder = save_folder(tmp_path / "model", model, byte_tokenizer())
    (tmp_path / "model/generation_config.json").write_text(json.dumps(POISON[poison]))

    assert by_generate(folder, capsys, max_new_tokens=10) == expected
    assert by_chat(folder, max_new_tokens=10) == expected
    assert by_serve(folder, max_new_tokens=10) == [expected] * 3
    assert by_samples(folder, tmp_path, max_new_tokens=10) == expected
    assert by_evaluate(folder, tmp_path, capsys, new=10) == expected


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\xff"])
def test_an_unreadable_generation_config_has_no_effect_either(content, tmp_path, capsys):
    model = build_model("gpt2")
    folder = save_folder(tmp_path / "model", model, byte_tokenizer())
    (tmp_path / "model/generation_config.json").write_text(content, encoding="latin-1")

    assert by_generate(folder, capsys, max_new_tokens=6) == [arg_max(model, text, new=6) for text in PROMPTS]


def test_no_value_of_any_setting_stops_a_model_or_changes_its_answers(tmp_path):
    """Puts every setting of transformers into generation_config.json, with all kinds of values."""
    model = build_model("gpt2")
    folder = save_folder(tmp_path / "model", model, byte_tokenizer())
    expected = [arg_max(model, prompt, new=4) for prompt in PROMPTS[:2]]
    junk = [True, 0, -1, 3, 0.5, 1e9, "x", [], [97], [[97]], {}, {"a": 1}]
    names = sorted(set(GenerationConfig().to_dict()) - {"eos_token_id"})

    faults = []
    for number, name in enumerate(names):
        settings = {name: junk[number % len(junk)], names[number - 1]: junk[(number * 5 + 3) % len(junk)]}
        (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
        run = load_run(folder, attention=None, device="cpu")
        answers = generate(run.model, run.tokenizer, prompts=PROMPTS[:2], decoding=Decoding(4))
        faults += [settings] if [answer.text for answer in answers] != expected else []

    assert len(names) > 40
    assert faults == []


@pytest.mark.parametrize("poison", [name for name in POISON if name not in ("wrong", "ids", "objects")])
def test_settings_on_a_model_in_memory_have_no_effect_and_are_kept(poison):
    """A program may set them; the model's stop tokens are still used."""
    model = build_model("qwen2")
    expected = [arg_max(model, prompt, new=10) for prompt in PROMPTS]
    settings = GenerationConfig(**POISON[poison], eos_token_id=EOS)
    model.generation_config = settings

    answers = generate(model, byte_tokenizer(), prompts=PROMPTS, decoding=Decoding(10))

    assert [answer.text for answer in answers] == expected
    assert model.generation_config is settings


def test_legacy_settings_in_the_configuration_of_a_model_have_no_effect():
    model = build_model("gpt2")
    expected = arg_max(model, "a", new=6)
    model.config.repetition_penalty = 3.0  # transformers' generate raises an error for these

    assert generate(model, byte_tokenizer(), prompts=["a"], decoding=Decoding(6))[0].text == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.8, "seed": 3},
        {"top_k": 5, "seed": 4},
        {"temperature": 1.3, "top_p": 0.7, "min_p": 0.01, "seed": 5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"temperature": 0, "top_k": 5, "top_p": 0.5, "seed": 7},
        {"stop": ["\x1b", "e", "\ufffd"]},
    ],
)
def test_every_command_gives_the_same_answer_with_the_same_settings(asked, tmp_path, capsys):
    """Prompt n samples with seed + n, in a batch and alone."""
    model = build_model("qwen2")
    folder = save_folder(tmp_path / "model", model, byte_tokenizer())
    settings = {**asked, "max_new_tokens": 10}

    result = by_generate(folder, capsys, **settings)

    assert by_chat(folder, **settings) == result
    assert by_serve(folder, **settings) == [result] * 3
    if set(asked) == {"temperature", "seed"}:
        assert by_samples(folder, tmp_path, **settings) == result
    greedy = [arg_max(model, prompt, new=10) for prompt in PROMPTS]
    assert (result == greedy) == (asked.get("temperature") == 0)


@pytest.mark.parametrize("draw", range(4))
def test_every_command_gives_the_same_answer_with_random_settings(draw, tmp_path, capsys):
    """Prompts, settings, the architecture and its generation_config.json are all random."""
    chance = random.Random(draw)
    kind, poison = chance.choice([*IN_BATCHES]), chance.choice([*POISON])
    letters = "abc xyz.,\t茶🐉é<|im_end|>0123"
    prompts = ["".join(chance.choices(letters, k=chance.randint(1, 12))) for _ in range(chance.randint(2, 5))]
    asked: dict[str, Any] = {
        "temperature": chance.choice([0, 0.5, 1.0, 1.9]),
        "top_k": chance.choice([-1, 0, 1, 7, 500]),
        "top_p": chance.choice([0, 0.3, 0.95, 1]),
        "min_p": chance.choice([0, 0.05]),
        "repetition_penalty": chance.choice([0.8, 1, 1.4]),
        "no_repeat_ngram_size": chance.choice([0, 2]),
        "stop": chance.sample(["a", "\x19", "\ufffd\ufffd", "33"], k=chance.randint(0, 3)),
    }
    settings = {name: asked[name] for name in asked if chance.random() < 0.6}
    settings |= {"max_new_tokens": 8, "seed": chance.randint(0, 2**31)}
    folder = save_folder(tmp_path / "model", build_model(kind), byte_tokenizer())
    (tmp_path / "model/generation_config.json").write_text(json.dumps(POISON[poison]))

    result = by_generate(folder, capsys, prompts=prompts, **settings)

    assert by_chat(folder, prompts=prompts, **settings) == result
    assert by_serve(folder, prompts=prompts, **settings) == [result] * 3


def test_penalties_do_not_see_the_padding():
    """A penalty on the pad token, or an n-gram of padding, would change answers in a batch."""
    model = build_model("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight[PAD] *= 6  # makes it likely
    how = Decoding(12, repetition_penalty=2.0, no_repeat_ngram_size=2)

    together = generate(model, byte_tokenizer(), prompts=PROMPTS, decoding=how)

    assert together == [generate(model, byte_tokenizer(), prompts=[one], decoding=how)[0] for one in PROMPTS]


def test_a_short_prompt_has_as_much_room_in_a_batch_as_alone():
    """With 32 positions, each answer continues up to its last one."""
    model = tiny_model("gpt2", n_positions=32, eos_token_id=None)
    model.generation_config.eos_token_id = None

    together = generate(model, byte_tokenizer(), prompts=PROMPTS)

    assert [answer.tokens for answer in together] == [32 - len(prompt) for prompt in PROMPTS]
    assert together == [generate(model, byte_tokenizer(), prompts=[one])[0] for one in PROMPTS]


# --- batches


@pytest.mark.parametrize(("kind", "expected"), IN_BATCHES.items())
def test_the_probe_detects_whether_a_batch_changes_answers(kind, expected):
    assert probe(build_model(kind), byte_tokenizer()).takes_batches is expected


def test_the_probe_notices_that_training_changed_the_effect_of_padding():
    """Padding has no effect on recurrent_gemma while its biases are zero, as they are initially."""
    torch.manual_seed(0)
    ids = {"vocab_size": 260, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model("recurrent_gemma", **ids, **SIZES["recurrent_gemma"])
    model = AutoModelForCausalLM.from_config(config).eval()
    fit_to_tokenizer(model, byte_tokenizer())

    before = probe(model, byte_tokenizer()).takes_batches
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight += 0.3

    assert (before, probe(model, byte_tokenizer()).takes_batches) == (True, False)


@pytest.mark.parametrize("kind", [*IN_BATCHES])
def test_neither_an_earlier_text_nor_a_batch_of_equal_lengths_changes_answers(kind):
    """recurrent_gemma appends a prompt of one token to the previous text; rwkv mixes rows."""
    model, prompts = build_model(kind), ["abcde", "z", "fghij", "z", "y", ""]
    expected = [arg_max(model, prompt, new=6) for prompt in prompts[:5]]

    one_by_one = [
        generate(model, byte_tokenizer(), prompts=[one], decoding=Decoding(6))[0] for one in prompts
    ]
    together = generate(model, byte_tokenizer(), prompts=prompts, decoding=Decoding(6))
    of_one_length = generate(model, byte_tokenizer(), prompts=["abcde", "fghij"], decoding=Decoding(6))

    assert [answer.text for answer in one_by_one[:5]] == expected
    assert together == one_by_one
    assert [answer.text for answer in of_one_length] == [expected[0], expected[2]]


def test_the_probe_does_not_change_the_random_state_or_the_settings():
    model = build_model("gpt2")
    before, settings = torch.get_rng_state(), model.generation_config

    probe(model, byte_tokenizer())

    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config is settings


def test_a_model_with_few_positions_answers_one_prompt_at_a_time():
    assert probe(tiny_model("gpt2", n_positions=5), byte_tokenizer()) == Probe(False, True)
    assert probe(tiny_model("gpt2", n_positions=8), byte_tokenizer()) == Probe(True, True)


@pytest.mark.parametrize("kind", [*IN_BATCHES])
def test_beam_search_gives_the_same_answers_as_without_a_cache(kind):
    """A state that is not reordered along with the beams, as in minimax, would change answers."""
    model = build_model(kind)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.encode())])
        plain = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "use_cache": False}
        mask = {"attention_mask": torch.ones_like(ids), "pad_token_id": PAD, "eos_token_id": EOS}
        row = model.generate(ids, **plain, **mask)[0, ids.shape[1] :].tolist()
        row = row[: row.index(EOS)] if EOS in row else row
        expected.append(byte_tokenizer().decode(row, skip_special_tokens=True))

    answers = generate(model, byte_tokenizer(), prompts=PROMPTS, decoding=Decoding(6, num_beams=3))

    assert [answer.text for answer in answers] == expected


# --- stop texts and tokens


def test_a_stop_text_is_only_searched_in_the_answer():
    """The prompt ends with the beginning of the stop text, and the answer begins with its end."""
    model = build_model("gpt2")
    text = arg_max(model, "so it is", new=8)
    stop = "is" + text[0]

    for beams in (1, 2):
        plain = generate(model, byte_tokenizer(), prompts=["so it is"], decoding=Decoding(8, num_beams=beams))
        how = Decoding(8, num_beams=beams, stop=(stop,))
        assert generate(model, byte_tokenizer(), prompts=["so it is"], decoding=how) == plain


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, {5}),
        ([5, 6], {5, 6}),
        (None, set()),
        (["x", 7, True, -1, 1.5, 2**40], {7}),
    ],
)
def test_invalid_stop_ids_are_ignored(given, expected):
    model = tiny_model("gpt2")
    model.generation_config.eos_token_id = given

    assert stop_ids(model) == expected


def test_settings_are_restored_after_an_error():
    model = tiny_model("gpt2")
    settings = model.generation_config

    with pytest.raises(KeyError), temporary_config(model, GenerationConfig()):
        raise KeyError

    assert model.generation_config is settings


# --- --use_model_settings


def folder_with(tmp_path: Path, settings: Any) -> str:
    folder = save_folder(tmp_path / "model", build_model("gpt2"), byte_tokenizer())
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (  # Qwen2.5-0.5B-Instruct
            {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
            | {
                "eos_token_id": [5, 6],
                "pad_token_id": 3,
                "bos_token_id": 3,
                "transformers_version": "4.37.0",
            },
            Decoding(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1),
        ),
        ({"do_sample": True}, Decoding(temperature=1.0)),  # not transformers' top_k of 50
        ({"temperature": 0.7, "top_k": 20}, Decoding(top_k=20)),  # greedy: do_sample is false by default
        (
            {"repetition_penalty": 1.2, "num_beams": 1, "suppress_tokens": []},
            Decoding(repetition_penalty=1.2),
        ),
        ({"stop_strings": "x", "max_time": 1.0, "max_length": 3}, Decoding(stop=("x",))),
        ({}, Decoding()),
    ],
)
def test_the_settings_of_a_model_are_read(settings, expected, tmp_path):
    assert read_model_settings(folder_with(tmp_path, settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"suppress_tokens": [3]},
            ": hf-clm does not support this setting; got suppress_tokens; fix: remove ",
        ),
        ({"num_beams": 4}, ": hf-clm does not support this setting; got num_beams; fix: "),
        (
            {"temperature": "hot", "do_sample": True},
            ": temperature: expected a valid number, unable to parse string as a number; got 'hot'; fix: ",
        ),
        (
            {"top_p": 2},
            ": top_p: expected less than or equal to 1; got 2; fix: remove --use_model_settings",
        ),
        ([], ": the file is missing or not valid JSON; fix: remove --use_model_settings"),
    ],
)
def test_unsupported_settings_of_a_model_are_rejected(settings, message, tmp_path):
    folder = folder_with(tmp_path, settings)

    with pytest.raises(ModelError) as error:
        read_model_settings(folder)

    assert str(error.value).startswith(f"generation_config.json of {folder}{message}")


def test_serve_can_start_from_the_settings_of_the_model(tmp_path):
    model = build_model("gpt2")
    folder = folder_with(tmp_path, {"repetition_penalty": 1.9})
    how = Decoding(8, repetition_penalty=1.9)

    penalized = by_serve(folder, use_model_settings=True, max_new_tokens=8)
    plain = by_serve(folder, use_model_settings=True, max_new_tokens=8, repetition_penalty=1)

    answers = generate(model, byte_tokenizer(), prompts=PROMPTS, decoding=how)
    assert penalized == [[answer.text for answer in answers]] * 3
    assert plain == [[arg_max(model, prompt, new=8) for prompt in PROMPTS]] * 3


@pytest.mark.parametrize("words", [[], ["--repetition_penalty", "1"]])
def test_options_override_the_settings_of_the_model(words, tmp_path, capsys):
    model = build_model("gpt2")
    folder = folder_with(tmp_path, {"repetition_penalty": 1.9})
    capsys.readouterr()

    assert (
        main(["generate", folder, "--prompt", "a", "--max_new_tokens", "8", "--use_model_settings", *words])
        == 0
    )
    output = capsys.readouterr().out.removesuffix("\n")

    how = Decoding(8, repetition_penalty=1.0 if words else 1.9)
    assert output == generate(model, byte_tokenizer(), prompts=["a"], decoding=how)[0].text
    assert (output == arg_max(model, "a", new=8)) == bool(words)
