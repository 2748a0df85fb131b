"""The round trip: the saved model is loaded with plain transformers, and every difference is reported.

Most tests run the script of the new process in this one, because starting Python and torch takes seconds.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import EOS, IM_END, PAD, byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.doctor import round_trip
from hf_clm.doctor.round_trip import start_round_trip
from hf_clm.errors import ExitCode, ModelError
from hf_clm.model.attention import NAME
from hf_clm.model.load import load_model
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.run import train

PROMPT = [*b"say 3\n"]
RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "x" * n} for n in range(1, 5)]


class InThisProcess:
    """Replaces ``subprocess.Popen``: runs ``python -c SCRIPT`` when the output is requested."""

    def __init__(self, words: list[str], **pipes: Any):
        assert words[:2] == [sys.executable, "-c"]
        self.script, self.given, self.returncode, self.stdin = words[2], "", None, self

    def write(self, text: str) -> None:
        self.given = text

    def close(self) -> None: ...

    def communicate(self) -> tuple[str, str]:
        output, errors = io.StringIO(), ""
        self.returncode = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "stdin", io.StringIO(self.given))
            try:
                exec(self.script, {})
            except Exception:
                self.returncode, errors = 1, traceback.format_exc()
        return output.getvalue(), errors

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(round_trip.subprocess, "Popen", InThisProcess)


def build(folder: Path, *, kind: str = "qwen2", template: str | None = None):
    """Saves a model; returns the folder, the model and the tokenizer."""
    tokenizer = byte_tokenizer()
    if template:
        use_chat_template(tokenizer, template)
    source = save_folder(folder / "source", tiny_model(kind), tokenizer)
    model = load_model(source, tokenizer, dtype="float32", attention=NAME).train()
    saved = folder / "saved"
    save_folder(saved, model, tokenizer)
    return saved, model, tokenizer


def compare(saved: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return start_round_trip(saved, PROMPT).finish(model, tokenizer)


# --- valid cases


@pytest.mark.parametrize("template", [None, "chatml", "plain"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_a_saved_model_equals_the_model(kind, template, tmp_path, at_once):
    saved, model, tokenizer = build(tmp_path, kind=kind, template=template)

    result = compare(saved, model, tokenizer)

    assert result["logit_difference"] < 1e-5
    assert result["compared"] == ["config_pad", "eos", "pad", "sample", "stop", "template", "use_cache"]
    assert (model.training, model.config._attn_implementation) == (True, NAME)  # as before


def test_a_new_process_gives_the_same_result(tmp_path):
    saved, model, tokenizer = build(tmp_path, template="chatml")

    result = compare(saved, model, tokenizer)

    assert result["logit_difference"] < 1e-5
    assert result["seconds"] > 0


# --- differences


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def pad_becomes_eos(saved: Path) -> None:
    edit_json(saved / "tokenizer_config.json", pad_token="<|endoftext|>")


def pad_of_the_config_becomes_eos(saved: Path) -> None:
    edit_json(saved / "config.json", pad_token_id=EOS)


def end_token_becomes_another(saved: Path) -> None:
    edit_json(saved / "tokenizer_config.json", eos_token="<|im_end|>")


def stop_tokens_lost(saved: Path) -> None:
    edit_json(saved / "generation_config.json", eos_token_id=[EOS])


def cache_off(saved: Path) -> None:
    edit_json(saved / "config.json", use_cache=False)


def template_changed(saved: Path) -> None:
    path = saved / "chat_template.jinja"
    path.write_text(path.read_text().replace("message.role + '", "message.role + ':"))


def template_lost(saved: Path) -> None:
    (saved / "chat_template.jinja").unlink()


def token_added(saved: Path) -> None:
    """Adds a token that occurs in the sample text."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_tokens(["world"])
    tokenizer.save_pretrained(saved)


def weight_changed(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 10.0
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})


def weight_not_a_number(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    pad_becomes_eos: f"different pad; got {EOS} instead of {PAD}",
    pad_of_the_config_becomes_eos: f"different config_pad; got {EOS} instead of {PAD}",
    end_token_becomes_another: f"different eos; got {IM_END} instead of {EOS}",
    stop_tokens_lost: f"different stop; got [{EOS}] instead of [{EOS}, {IM_END}]",
    cache_off: "different use_cache; got False instead of True",
    template_changed: "different template; got '<|im_start|>user",
    template_lost: "different template; got None instead of '<|im_start|>user",
    token_added: "different sample; got [72, 101, 108, 108, 111, 44, 32, 260, 46",
    weight_changed: "different logits; got a relative difference of ",
    weight_not_a_number: "different logits; got a relative difference of nan",
}


@pytest.mark.parametrize(
    ("breaks", "message"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_each_difference_is_reported(breaks, message, tmp_path, at_once):
    saved, model, tokenizer = build(tmp_path, template="chatml")
    breaks(saved)

    with pytest.raises(ModelError) as error:
        compare(saved, model, tokenizer)

    assert error.value.exit_code == ExitCode.MODEL
    assert str(error.value).startswith("round trip: the saved model ")
    assert message in str(error.value)


def test_a_folder_that_cannot_be_loaded_is_reported_with_the_reason(tmp_path, at_once):
    saved, model, tokenizer = build(tmp_path)
    (saved / "config.json").unlink()

    with pytest.raises(ModelError) as error:
        compare(saved, model, tokenizer)

    assert str(error.value).startswith(
        "round trip: the saved model cannot be loaded with from_pretrained; got "
    )
    assert str(saved) in str(error.value)


# --- in a run


def proof_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["proof"]


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_run_makes_the_round_trip_at_the_start_or_at_the_end_and_cleans_up(when, tmp_path, at_once, capsys):
    train(helpers.build_recipe(tmp_path, RECORDS, doctor={"round_trip": when}, train={"max_steps": 1}))

    output = capsys.readouterr().out
    assert (output.index("\nreloaded  with plain") < output.index("\nstep 1/1")) == (when == "start")
    assert proof_of(tmp_path / "run")["round_trip"]["logit_difference"] < 1e-5
    assert not (tmp_path / "run" / ".round-trip").exists()


SMALL = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes", "tokens"),
    [("gpt2", {"n_embd": 16, "n_head": 2}, 1), ("llama", SMALL, 1), ("qwen2", SMALL, 4)],
)
def test_a_trained_tokenizer_splits_text_as_it_does_after_saving(kind, sizes, tokens, tmp_path, at_once):
    """AutoTokenizer uses the rules of Qwen2 for a Qwen2 model, where each digit is a token."""
    model = {"name_or_path": None, "init": "scratch", "config": {"model_type": kind, **sizes}}
    records = [{"instruct": f"count {n}\n", "input": "", "label": "1234 1234"} for n in range(8)]
    settings = {"model": model, "tokenizer": {"train": {"vocab_size": 300}}, "train": {"max_steps": 1}}

    train(helpers.build_recipe(tmp_path, records, doctor={"round_trip": "start"}, **settings))

    assert proof_of(tmp_path / "run")["round_trip"]["logit_difference"] < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")("1234")["input_ids"]) == tokens


def test_a_run_with_a_different_saved_model_stops_before_the_first_step(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(round_trip, "SCRIPT", round_trip.SCRIPT.replace("model.config.use_cache", "False"))

    with pytest.raises(ModelError) as error:
        train(helpers.build_recipe(tmp_path, RECORDS, doctor={"round_trip": "start"}))

    assert (
        str(error.value) == "round trip: the saved model has a different use_cache; got False instead of True"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / ".round-trip").exists()


def test_the_process_ends_when_the_run_fails(tmp_path, monkeypatch):
    started = []

    class Slow(subprocess.Popen):
        def __init__(self, words: list[str], **pipes: Any):
            super().__init__([sys.executable, "-c", "input(); input()"], **pipes)
            started.append(self)

    monkeypatch.setattr(round_trip.subprocess, "Popen", Slow)
    monkeypatch.setattr("hf_clm.model.attention.pairwise", lambda starts: [(starts[0], starts[-1])])
    with pytest.raises(ModelError):
        train(helpers.build_recipe(tmp_path, RECORDS, doctor={"round_trip": "start"}))

    assert started[0].wait(timeout=20) != 0
    assert not (tmp_path / "run" / ".round-trip").exists()
