"""SmolLM2-135M-Instruct, a pretrained chat model: what is promised holds on it too (make test-real)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from openai import OpenAI
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.cli import main
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.recipe.recipe import load_recipe
from hf_clm.schema import Chat
from hf_clm.training.run import train

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "local" / "smollm2-135m-instruct"
SFT = ROOT / "data" / "sft"
QUESTIONS = ["Why is the sky blue?", "How do I boil an egg?"]
NEW_TOKENS = 12
X = -100  # no label


@pytest.fixture(scope="session", autouse=True)
def _model():
    if not (MODEL / "config.json").is_file():
        subprocess.run([sys.executable, ROOT / "data" / "get_smollm2.py"], check=True)


def run_recipe(folder: Path, *words: str) -> dict[str, Any]:
    """The shipped recipe on 80 of its records, about 12 rows, evaluated on 10, with some keys changed."""
    shortened = [
        *("--model.name_or_path", str(MODEL), "--output_dir", str(folder), "--data.cache_dir", "null"),
        *("--data.train", json.dumps([{"path": str(SFT / "lighthouse.jsonl"), "limit": 80}])),
        *("--data.eval", json.dumps([{"path": str(SFT / "lighthouse-held-out.jsonl"), "limit": 10}])),
        *("--samples", "null", "--use_cpu", "--bf16", "false", "--num_train_epochs", "1"),
        *("--eval_strategy", "no", "--doctor.round_trip", "off", "--doctor.self_test", "false"),
    ]
    return train(load_recipe(ROOT / "recipes" / "sft" / "smollm2.yaml", [*shortened, *words]))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """Adapters, with the proofs that a run makes before its first step."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run_recipe(folder, "--doctor.round_trip", "start", "--doctor.self_test", "true", "--max_steps", "8")
    return folder


@pytest.fixture(scope="module")
def merged(adapted) -> Path:
    """The adapters merged into the model."""
    folder = adapted.parent / "merged"
    prompts = adapted.parent / "prompts.txt"
    prompts.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    assert main(["merge", str(adapted), "--output_dir", str(folder), "--prompts", str(prompts)]) == 0
    return folder


def read_record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def answers_of(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``hf-clm generate`` answers to the questions."""
    capsys.readouterr()
    words = [word for question in QUESTIONS for word in ("--prompt", question)]
    assert main(["generate", str(run), *words, "--max_new_tokens", str(NEW_TOKENS), "--json"]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_the_labels_are_the_tokens_that_the_template_writes_after_each_question():
    """Ids and labels of all shipped records and of two longer chats are those of ``apply_chat_template``.

    The template writes a newline after the end of a turn, which no row has at its end.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    lines = [line for path in SFT.glob("lighthouse*.jsonl") for line in path.read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in lines]
    asked, answered = (
        {"role": "user", "content": "12 + 3?"},
        {"role": "assistant", "content": "15,\n of course."},
    )
    chats.append([asked, answered, asked, answered])
    chats.append([{"role": "system", "content": "You are a keeper."}, asked, answered])

    rows = SFTDataset([Chat(chat) for chat in chats], tokenizer)

    assert len(rows) == 332
    for chat, row in zip(chats, rows, strict=True):
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert row["input_ids"] == ids[: len(row["input_ids"])]
        assert tokenizer.decode(ids[len(row["input_ids"]) :]) == "\n"
        labels = [X] * len(row["input_ids"])
        for turn in (at for at, message in enumerate(chat) if message["role"] == "assistant"):
            prompt = tokenizer.apply_chat_template(chat[:turn], add_generation_prompt=True, return_dict=False)
            answer = tokenizer.encode(chat[turn]["content"] + "<|im_end|>", add_special_tokens=False)
            labels[len(prompt) : len(prompt) + len(answer)] = answer
        assert row["labels"] == labels


def test_lora_lowers_the_held_out_loss_and_the_model_proves_itself(adapted):
    record = read_record(adapted)

    before, after = record["loss_before"], record["loss_after"]
    assert 4 < before < 5 and after < before - 0.5
    assert record["proof"]["train"]["certificate"]["valid"] is True
    assert record["proof"]["self_test"]["documents"] > 0
    assert record["proof"]["round_trip"]["logit_difference"] < 1e-3


def test_full_fine_tuning_lowers_the_held_out_loss(tmp_path):
    record = run_recipe(tmp_path / "run", "--lora", "null", "--learning_rate", "1e-4", "--max_steps", "6")

    assert record["trained_parameters"] == record["parameters"]
    assert record["loss_after"] < record["loss_before"] - 0.5


def test_the_merged_model_answers_as_the_adapters(adapted, merged, capsys):
    assert answers_of(merged, capsys) == answers_of(adapted, capsys)


def test_a_pipeline_and_the_server_answer_as_generate(merged, capsys):
    expected = answers_of(merged, capsys)
    chats: Any = [[{"role": "user", "content": question}] for question in QUESTIONS]

    pipeline: Any = transformers.pipeline("text-generation", model=str(merged), dtype=torch.float32)
    piped = [pipeline(chat, max_new_tokens=NEW_TOKENS)[0]["generated_text"][-1]["content"] for chat in chats]
    with served(str(merged), "--name", "keeper") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        told = [
            client.chat.completions.create(
                model="keeper", messages=chat, max_tokens=NEW_TOKENS, temperature=0
            )
            for chat in chats
        ]

    assert piped == expected
    assert [answer.choices[0].message.content for answer in told] == expected


def test_a_resumed_run_has_the_weights_of_one_that_never_stopped(tmp_path):
    steps = (
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--lora.dropout",
        "0.1",
        "--data.max_length",
        "128",
    )
    run_recipe(tmp_path / "straight", *steps, "--max_steps", "4")
    run_recipe(tmp_path / "halved", *steps, "--max_steps", "2")

    run_recipe(tmp_path / "halved", *steps, "--max_steps", "4", "--resume_override", "max_steps")

    name = "adapter_model.safetensors"
    assert (tmp_path / "halved" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_qlora_trains_on_a_cpu_and_its_adapters_answer(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"

    record = run_recipe(run, "--lora.quantize", "4bit", "--max_steps", "6", "--data.max_length", "256")

    assert record["proof"]["round_trip"] == "off"
    assert record["loss_after"] < record["loss_before"] - 0.1
    assert record["parameters"] > 100_000_000
    assert all(answer.strip() for answer in answers_of(run, capsys))


def test_the_saved_full_model_opens_with_transformers_alone(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)

    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.generation_config.eos_token_id == [2]


def test_llama_cpp_answers_as_the_run(adapted, tmp_path, capsys):
    """On 80 prompts; needs llama-cpp-python, and LLAMA_CPP for its converter."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name the converter")
    facts = {}
    for quantize in ("none", "q8_0"):
        words = ["export", str(adapted), "--to", "ollama", "--quantize", quantize, "--output_dir"]
        assert main([*words, str(tmp_path / quantize)]) == 0
        facts[quantize] = json.loads((tmp_path / quantize / "export.json").read_text())
    model = llama_cpp.Llama(str(tmp_path / "none" / facts["none"]["file"]), n_ctx=512, verbose=False)

    found = [
        model.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0.0, max_tokens=NEW_TOKENS
        )["choices"][0]["message"]["content"]
        for question in QUESTIONS
    ]

    assert found == answers_of(adapted, capsys)
    exact, rounded = facts["none"], facts["q8_0"]
    assert exact["equal_prompts"] == rounded["equal_prompts"] == exact["prompts"] == 80
    assert exact["same_answers"] >= 72 and exact["answers_within_tolerance"] == 80
    assert abs(rounded["exported_loss"] - rounded["loss"]) < 0.02
    modelfile = (tmp_path / "none" / "Modelfile").read_text()
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in modelfile
