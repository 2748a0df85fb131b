"""Every key of a recipe and of TrainingArguments changes something, or is refused: none is passed over.

A run of two steps with a key at one value is compared with a run with the key at another. A key that is added
to transformers or to the recipe fails here until somebody has looked at it.
"""

import copy
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_clm.errors import UserError
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.recipe.sections import Source
from hf_clm.recipe.text import list_keys
from hf_clm.recipe.trainer_fields import train_fields
from hf_clm.training import run as run_module
from hf_clm.training.run import train
from hf_clm.training.trainer import CLMTrainer


class Shown(NamedTuple):
    """A key at ``value`` with other keys, and the part of a run's outcome that differs."""

    value: Any
    part: str
    beside: Mapping[str, Any] = MappingProxyType({})
    first: dict[str, Any] | None = None  # changes of a run that was in the folder before


JUDGED = {
    **{"data.eval": "{folder}/eval.jsonl", "train.eval_strategy": "steps", "train.eval_steps": 1},
    **{"train.save_strategy": "steps", "train.save_steps": 1, "train.max_steps": 4},
}
BEST = {**JUDGED, "train.load_best_model_at_end": True, "train.learning_rate": 0.3}
ANSWERED = {
    **JUDGED,
    "evaluation": {"generate": 2, "metrics": ["helpers:count_letters"], "max_new_tokens": 4},
}
SCRATCH = {
    "model": {"init": "scratch", "config": {"model_type": "gpt2", **helpers.SIZES["gpt2"]}},
    "tokenizer.name_or_path": "{folder}/model",
}
TRAINED = {"model": SCRATCH["model"], "tokenizer.train": {"vocab_size": 270}}
SAVED = {"train.save_strategy": "steps", "train.save_steps": 1, "train.max_steps": 4}
WORKERS = {"train.dataloader_num_workers": 1}
OWN_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {%- if message.reasoning_content -%}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content + '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- ('please ' if polite else '') + message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TEXT = {"stage": "pretrain", "data.train": "{folder}/texts.jsonl"}
TWO = {"data.train": ["{folder}/rows.jsonl", "{folder}/other.jsonl"], "train.max_steps": -1}
WEIGHED = {
    **TWO,
    "data.train": [
        {"path": "{folder}/rows.jsonl", "weight": 1},
        {"path": "{folder}/other.jsonl", "weight": 2},
    ],
}
CHATS = {"data.train": "{folder}/chats.jsonl", "tokenizer.chat_template": "chatml", "data.max_length": 128}
LORA = {"lora": {"r": 2}, "train.learning_rate": 0.1}
SAMPLED = {"samples": {"prompts": ["say 2"], "max_new_tokens": 2}}
STREAM = {"data.streaming": True, "train.max_steps": 2}
SGD = {"train.optim": "sgd"}
MUON = {"optimizer": {"name": "muon"}}

TRAIN = {
    "output_dir": Shown("{folder}/elsewhere", "places"),
    "per_device_train_batch_size": Shown(4, "losses"),
    "num_train_epochs": Shown(2.0, "steps", {"train.max_steps": -1}),
    "max_steps": Shown(3, "steps"),
    "learning_rate": Shown(1e-2, "weights"),
    "lr_scheduler_type": Shown("constant", "rates"),
    "lr_scheduler_kwargs": Shown({"num_cycles": 1.5}, "rates", {"train.max_steps": 4}),
    "warmup_steps": Shown(2, "rates"),
    "optim": Shown("sgd", "weights"),
    "optim_args": Shown("momentum=0.9", "weights", {**SGD, "train.max_steps": 3}),
    "weight_decay": Shown(0.5, "weights"),
    "adam_beta1": Shown(0.1, "weights", {"train.max_steps": 3}),
    "adam_beta2": Shown(0.1, "weights", {"train.max_steps": 3}),
    "adam_epsilon": Shown(1.0, "weights"),
    "optim_target_modules": Shown(["q_proj"], "error"),
    "gradient_accumulation_steps": Shown(2, "losses"),
    "max_grad_norm": Shown(0.001, "weights", {**SGD, "train.learning_rate": 0.1}),
    "label_smoothing_factor": Shown(0.2, "losses"),
    "bf16": Shown(True, "losses"),
    "bf16_full_eval": Shown(True, "final_loss", BEST),
    "fp16_full_eval": Shown(True, "final_loss", BEST),
    "activation_checkpointing": Shown(True, "layers_computed"),
    "activation_checkpointing_kwargs": Shown({"use_reentrant": True}, "error"),
    "use_liger_kernel": Shown(True, "error"),
    "liger_kernel_config": Shown({"rope": True}, "error"),
    "use_cache": Shown(True, "error"),
    "neftune_noise_alpha": Shown(5.0, "losses", {"model.attention": "sdpa"}),
    "auto_find_batch_size": Shown(True, "layers_computed"),
    "logging_nan_inf_filter": Shown(True, "error"),
    "include_num_input_tokens_seen": Shown("all", "error"),
    "eval_strategy": Shown("steps", "evaluations", {**JUDGED, "train.eval_strategy": "no"}),
    "eval_steps": Shown(2, "evaluations", JUDGED),
    "eval_delay": Shown(3, "evaluations", JUDGED),
    "per_device_eval_batch_size": Shown(1, "layers_computed"),
    "prediction_loss_only": Shown(True, "error"),
    "eval_on_start": Shown(False, "evaluations"),
    "eval_do_concat_batches": Shown(False, "error"),
    "eval_use_gather_object": Shown(True, "error"),
    "eval_accumulation_steps": Shown(1, "error"),
    "include_for_metrics": Shown(["inputs"], "error"),
    "batch_eval_metrics": Shown(True, "error"),
    "save_only_model": Shown(True, "files", SAVED),
    "save_strategy": Shown("no", "files", SAVED),
    "save_steps": Shown(2, "files", SAVED),
    "save_total_limit": Shown(3, "files", SAVED),
    "enable_jit_checkpoint": Shown(True, "error"),
    "hub_token": Shown("secret", "error"),
    "load_best_model_at_end": Shown(False, "weights", BEST),
    "metric_for_best_model": Shown("target_tokens", "weights", BEST),
    "greater_is_better": Shown(True, "weights", BEST),
    "ignore_data_skip": Shown(True, "error"),
    "restore_callback_states_from_checkpoint": Shown(True, "error"),
    "full_determinism": Shown(True, "is_deterministic"),
    "seed": Shown(7, "losses"),
    "data_seed": Shown(7, "losses"),
    "accelerator_config": Shown({"dispatch_batches": True}, "error"),
    "parallelism_config": Shown({"tp_size": 2}, "error"),
    "dataloader_drop_last": Shown(
        True, "steps", {"train.max_steps": -1, "train.per_device_train_batch_size": 3}
    ),
    "dataloader_num_workers": Shown(1, "loader"),
    "dataloader_persistent_workers": Shown(True, "loader", WORKERS),
    "dataloader_prefetch_factor": Shown(3, "loader", WORKERS),
    "dataloader_multiprocessing_context": Shown("fork", "loader", WORKERS),
    "dataloader_in_order": Shown(False, "loader", WORKERS),
    "remove_unused_columns": Shown(True, "error"),
    "label_names": Shown(["labels"], "error"),
    "train_sampling_strategy": Shown("sequential", "losses"),
    "length_column_name": Shown("size", "error"),
    "do_train": Shown(True, "error"),
    "do_eval": Shown(True, "error"),
    "do_predict": Shown(True, "error"),
    "resume_from_checkpoint": Shown("must", "error"),
    "local_rank": Shown(0, "error"),
}
ONLY_LOGGED = {
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step"), "which steps are logged"),
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node"), "what transformers logs"),
    **dict.fromkeys(("report_to", "run_name", "project"), "trackers, and the name of the run there"),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "a tracker's places"
    ),
    "disable_tqdm": "the progress bar of transformers",
    "skip_memory_metrics": "figures that transformers adds to its log",
    "debug": "what is printed at an overflow",
}
NOT_ON_THIS_MACHINE = {
    **dict.fromkeys(("fp16", "tf32", "torch_empty_cache_steps", "dataloader_pin_memory"), "needs a GPU"),
    "use_cpu": "chooses between a GPU and the CPU",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "compiles for minutes"),
    **dict.fromkeys(("average_tokens_across_devices", "ddp_timeout"), "needs two processes"),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_static_graph"), "needs two processes"),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_backend", "ddp_bucket_cap_mb"), "needs two processes"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "needs GPUs: a CPU would use DDP"),
    "save_on_each_node": "needs two machines",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push"), "needs the Hub"),
    **dict.fromkeys(("hub_private_repo", "hub_revision"), "needs the Hub"),
    **dict.fromkeys(("model.trust_remote_code", "source.name"), "needs what lies on the Hub"),
    "doctor.round_trip": "starts a process for seconds: tests/doctor/test_round_trip.py",
}
RECIPE = {
    "stage": Shown("pretrain", "losses"),
    "model.name_or_path": Shown("{folder}/larger", "weights"),
    "model.revision": Shown("main", "error"),
    "model.init": Shown("scratch", "weights"),
    "model.config": Shown(
        {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}, "weights", SCRATCH
    ),
    "model.embedding_std": Shown(0.5, "weights", SCRATCH),
    "model.dtype": Shown("bfloat16", "weights"),
    "model.attention": Shown("eager", "attention"),
    "model.attention_dropout": Shown(0.9, "losses"),
    "model.allow_bin": Shown(True, "error", {"model.name_or_path": "{folder}/pickled"}),
    "tokenizer.name_or_path": Shown("{folder}/merged", "losses"),
    "tokenizer.train.kind": Shown("characters", "losses", {**TRAINED, "tokenizer.train": {}}),
    "tokenizer.train.vocab_size": Shown(262, "losses", TRAINED),
    "tokenizer.train.min_frequency": Shown(100, "losses", TRAINED),
    "tokenizer.pad_token": Shown("[PAD]", "tokenizer", {"model.name_or_path": "{folder}/padless"}),
    "tokenizer.eos_token": Shown("<|im_end|>", "tokenizer"),
    "tokenizer.control_tokens": Shown(["<sep>"], "tokenizer"),
    "tokenizer.chat_template": Shown("chatml", "losses"),
    "tokenizer.chat_template_kwargs": Shown(
        {"polite": True}, "losses", {"tokenizer.chat_template": "{folder}/own.jinja"}
    ),
    "data.train": Shown("{folder}/other.jsonl", "losses"),
    "data.eval": Shown("{folder}/eval.jsonl", "evaluations"),
    "data.eval_fraction": Shown(0.25, "evaluations"),
    "data.mixing.by": Shown("tokens", "losses", WEIGHED),
    "data.mixing.temperature": Shown(5.0, "losses", {**TWO, "data.mixing": {"size": 10}}),
    "data.mixing.replacement": Shown(True, "losses", {**WEIGHED, "data.mixing.size": 10}),
    "data.mixing.size": Shown(4, "steps", WEIGHED),
    "data.eval_train_rows": Shown(2, "evaluations"),
    "data.max_length": Shown(12, "losses", {"data.max_dropped": 1.0}),
    "data.overflow": Shown("drop", "losses", {"data.max_length": 12, "data.max_dropped": 1.0}),
    "data.render": Shown("plain", "losses", {"tokenizer.chat_template": "chatml"}),
    "data.packing": Shown("best_fit", "losses"),
    "data.tokens_per_batch": Shown(80, "losses", {"train.per_device_train_batch_size": 1}),
    "data.window.size": Shown(
        12, "losses", {**TEXT, "data.packing": "none", "data.window": {"size": 20, "step": 10}}
    ),
    "data.window.step": Shown(
        20, "losses", {**TEXT, "data.packing": "none", "data.window": {"size": 20, "step": 10}}
    ),
    "data.train_on": Shown("last_turn", "losses", CHATS),
    "data.train_on.turns": Shown("last", "losses", {**CHATS, "data.train_on": {}}),
    "data.train_on.reasoning": Shown(
        False,
        "losses",
        {
            **CHATS,
            "data.train_on": {},
            "data.train": "{folder}/thought.jsonl",
            "tokenizer.chat_template": "{folder}/own.jinja",
        },
    ),
    "data.reasoning": Shown("drop", "error", {**CHATS, "data.train": "{folder}/thought.jsonl"}),
    "data.special_tokens_in_text": Shown("error", "error", {"data.train": "{folder}/spelled.jsonl"}),
    "data.max_dropped": Shown(0.9, "error", {"data.max_length": 12, "data.overflow": "drop"}),
    "data.duplicates": Shown("drop", "losses", {"data.train": "{folder}/twice.jsonl"}),
    "data.without": Shown(["rows.jsonl:1"], "losses", {"train.max_steps": 6}),
    "data.max_leakage": Shown(1.0, "error", {"data.eval": "{folder}/rows.jsonl"}),
    "data.on_bad_record": Shown(
        "drop", "error", {"data.train": "{folder}/bad.jsonl", "data.max_dropped": 0.9}
    ),
    "data.max_line_bytes": Shown(20, "error"),
    "data.strict": Shown(True, "error", {"data.train": "{folder}/further.jsonl"}),
    "data.allow_empty_prompt": Shown(True, "error", {"data.train": "{folder}/promptless.jsonl"}),
    "data.cache_dir": Shown("{folder}/cache", "places"),
    "data.streaming": Shown(True, "lines", TEXT),
    "data.shuffle_buffer": Shown(1, "losses", {**TEXT, **STREAM, "data.train": "{folder}/many.jsonl"}),
    "lora.r": Shown(4, "adapter", LORA),
    "lora.alpha": Shown(1, "adapter", LORA),
    "lora.dropout": Shown(0.5, "adapter", LORA),
    "lora.target_modules": Shown(["q_proj"], "adapter", LORA),
    "lora.modules_to_save": Shown(["norm"], "adapter", LORA),
    "lora.use_dora": Shown(True, "adapter", LORA),
    "lora.use_rslora": Shown(True, "adapter", LORA),
    "lora.quantize": Shown("4bit", "error", LORA),
    "optimizer.name": Shown("muon", "weights"),
    "optimizer.momentum": Shown(0.5, "weights", {**MUON, "train.max_steps": 3}),
    "optimizer.nesterov": Shown(False, "weights", {**MUON, "train.max_steps": 3}),
    "optimizer.ns_steps": Shown(2, "weights", MUON),
    "optimizer.groups": Shown([{"match": "mlp", "learning_rate": 0.1}], "weights", MUON),
    "optimizer.layer_decay": Shown(0.5, "weights"),
    "optimizer.freeze": Shown(["mlp"], "weights"),
    "samples.prompts": Shown(["say 3"], "samples", SAMPLED),
    "samples.every_steps": Shown(1, "samples", SAMPLED),
    "samples.every_epoch": Shown(
        True, "samples", {**SAMPLED, "train.max_steps": -1, "train.num_train_epochs": 2.0}
    ),
    "samples.max_new_tokens": Shown(4, "samples", SAMPLED),
    "samples.temperature": Shown(5.0, "samples", SAMPLED),
    "evaluation.generate": Shown(2, "evaluations", JUDGED),
    "evaluation.every": Shown(3, "evaluations", ANSWERED),
    "evaluation.metrics": Shown(["exact_match"], "evaluations", ANSWERED),
    "evaluation.max_new_tokens": Shown(1, "evaluations", ANSWERED),
    "early_stopping.patience": Shown(
        1, "steps", {**BEST, "early_stopping": {"patience": 3, "threshold": 100.0}}
    ),
    "early_stopping.threshold": Shown(
        100.0, "steps", {**BEST, "early_stopping": {"patience": 2}, "train.learning_rate": 1e-3}
    ),
    "loss.z_loss": Shown(0.1, "losses"),
    "card.license": Shown("mit", "card"),
    "card.language": Shown(["en"], "card"),
    "card.data_samples": Shown(1, "card"),
    "doctor.self_test": Shown(False, "lines"),
    "overwrite": Shown(True, "error", {"train.learning_rate": 1e-2}, first={}),
    "resume_override": Shown(
        ["learning_rate", "max_steps"], "error", {**SAVED, "train.learning_rate": 1e-2}, first=SAVED
    ),
}
SOURCE = {
    "path": Shown("{folder}/other.jsonl", "losses"),
    "format": Shown("text", "error"),
    "fields": Shown({"instruct": "label", "label": "instruct"}, "losses", {"source.format": "instruct"}),
    "template.prompt": Shown(
        "Say: {instruct}", "losses", {"source.template": {"prompt": "{instruct}", "completion": "{label}"}}
    ),
    "template.completion": Shown(
        "{label}!", "losses", {"source.template": {"prompt": "{instruct}", "completion": "{label}"}}
    ),
    "template.text": Shown(
        "{label}", "losses", {"stage": "pretrain", "source.template": {"text": "{instruct}"}}
    ),
    "template.labels": Shown(
        {"x" * n: str(n) for n in range(1, 9)},
        "losses",
        {"source.template": {"prompt": "{instruct}", "completion": "{label}"}},
    ),
    "overflow": Shown("drop", "losses", {"data.max_length": 12, "data.max_dropped": 1.0}),
    "limit": Shown(4, "losses"),
    "weight": Shown(3.0, "losses", {**WEIGHED, "source.path": "{folder}/rows.jsonl"}),
    "epochs": Shown(2.0, "steps", {"train.max_steps": -1}),
    "quoting": Shown("none", "losses", {"source.path": "{folder}/table.csv"}),
    "split": Shown("test", "losses", {"source.path": "{folder}/parts"}),
    "revision": Shown("main", "error"),
    "set": Shown("news", "error"),  # of a source of data.eval
}
TABLE = {
    **{f"train.{key}": shown for key, shown in TRAIN.items()},
    **RECIPE,
    **{f"source.{key}": shown for key, shown in SOURCE.items()},
}


def all_keys() -> set[str]:
    """Returns every key that has a value, without the sections."""
    names = [*(key for key, _ in list_keys(Recipe)), *(f"source.{key}" for key, _ in list_keys(Source))]
    sections = {key for key in names if any(other.startswith(f"{key}.") for other in names)}
    values = {key for key in names if key not in sections} | {"data.train_on"}
    return (values - {"train"}) | {f"train.{name}" for name in train_fields()}


def test_every_key_is_in_exactly_one_table():
    others = {key if "." in key else f"train.{key}" for key in {**ONLY_LOGGED, **NOT_ON_THIS_MACHINE}}

    assert sorted(all_keys() - set(TABLE) - others) == [], "look at these: what do they change?"
    assert sorted((set(TABLE) | others) - all_keys()) == [], "these are gone"
    assert sorted(set(TABLE) & others) == []


@pytest.mark.parametrize("key", sorted(TABLE))
def test_a_key_has_its_effect_or_is_refused(key):
    shown = TABLE[key]
    beside = {"train.max_steps": 2, **shown.beside}

    before = outcome(beside, shown.first)
    after = outcome({**beside, key: shown.value}, shown.first)

    assert before[shown.part] != after[shown.part]
    if shown.part not in ("error", "loader"):
        assert (before["error"], after["error"]) == ("", "")


def test_the_same_recipe_twice_has_the_same_outcome():
    """Otherwise, the tests above would show nothing."""
    beside = {**SAMPLED, "data.eval": "{folder}/eval.jsonl", "train.max_steps": 2}

    assert outcome(beside, None) == make_outcome(beside, None)


def outcome(changes: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the outcome of a run, cached for the same changes."""
    return _outcome_of(json.dumps([changes, first]))


@cache
def _outcome_of(text: str) -> dict[str, Any]:
    return make_outcome(*json.loads(text))


def make_outcome(changes: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """Runs the recipe with these changes in a new folder, after a ``first`` run there if there is one."""
    folder = Path(mkdtemp(dir=shared_files().parent))
    for path in shared_files().iterdir():
        (folder / path.name).symlink_to(path)
    if first is not None:
        with cheap():
            train(recipe_of(first, folder))
    found: dict[str, Any] = {"error": "", "loader": None, "attention": None}
    lines: list[str] = []
    with watching(found, lines), cheap():
        try:
            train(recipe_of(changes, folder))
        except UserError as error:
            found["error"] = str(error).replace(str(folder), "")
    found["is_deterministic"] = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    places = sorted(path for path in folder.iterdir() if not path.is_symlink() and path.name != "recipe.json")
    found["places"] = [path.name for path in places]
    found["lines"] = [line.replace(str(folder), "") for line in lines if not TIMED.match(line)]
    run = next((path for path in places if (path / "run.json").exists()), folder)
    return found | read_run(run)


def read_run(run: Path) -> dict[str, Any]:
    """Returns the files of a run, without what differs between equal runs."""
    file = run / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    trained = [entry for entry in entries if "loss" in entry]
    figures = ("loss", "token_accuracy", "target_tokens", "exact_match", "count_letters")
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "steps": trained[-1]["step"] if trained else 0,
        "final_loss": json.loads(read(run / "run.json") or "{}").get("loss_after"),
        "losses": [entry["loss"] for entry in trained],
        "rates": [entry["learning_rate"] for entry in trained],
        "evaluations": [
            (entry["step"], name, value)
            for entry in entries
            for name, value in entry.items()
            if name.startswith("eval_") and name.endswith(figures)
        ],
        "weights": digest(run / "model.safetensors"),
        "adapter": digest(run / "adapter_model.safetensors"),
        "tokenizer": [digest(run / name) for name in ("tokenizer.json", "chat_template.jinja")]
        + [read(run / "tokenizer_config.json")],
        "card": re.sub(r"(?s)```.*?```|[\d.,]+", "", read(run / "README.md")),
        "samples": re.sub(r'"seconds": [\d.]+', "", read(run / "samples.jsonl")),
    }


TIMED = re.compile(
    r"step |done |prepared |warning   OMP|memory|loss |accuracy |written|next |output |.*\d s[,)]"
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def recipe_of(changes: dict[str, Any], folder: Path) -> Recipe:
    """Returns a recipe of 8 rows and 2 layers with these changes of dotted keys, read from a file."""
    tree = copy.deepcopy(BASE)
    for key, value in changes.items():
        place: Any = tree
        *parents, last = key.replace("source.", "data.train.0.", 1).split(".")
        if parents == ["data", "train_on"] and isinstance(tree["data"].get("train_on"), str):
            tree["data"]["train_on"] = {}
        for parent in parents:
            if isinstance(place, dict) and place.get(parent) is None:
                place[parent] = {}
            if parent == "train" and isinstance(place.get("train"), str):
                place["train"] = [{"path": place["train"]}]
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        place[last] = copy.deepcopy(value)
    path = folder / "recipe.json"
    path.write_text(json.dumps(tree).replace("{folder}", str(folder)))
    return load_recipe(path)


BASE: dict[str, Any] = {
    "stage": "sft",
    "model": {"name_or_path": "{folder}/model"},
    "data": {"train": "{folder}/rows.jsonl", "max_length": 64, "packing": "none", "cache_dir": None},
    "doctor": {"round_trip": "off"},
    "train": {
        **{"output_dir": "{folder}/run", "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2},
        **{"learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0},
    },
}


@cache
def shared_files() -> Path:
    """Returns the folder of the data and models that the runs read."""
    folder = Path(mkdtemp()) / "shared"
    folder.mkdir()
    rows = [{"instruct": f"say {n}\n", "input": "", "label": "x" * n} for n in range(1, 9)]
    other = [{"instruct": f"tell {n}\n", "input": "", "label": "yz" * n} for n in range(1, 15)]
    held_out = [{"instruct": f"held {n}\n", "input": "", "label": "x" * n} for n in range(1, 4)]
    files = {
        "rows": rows,
        "other": other,
        "eval": held_out,
        "texts": [{"text": f"a text of {n} " * n} for n in range(1, 9)],
        "many": [{"text": f"text {n} " * 40} for n in range(120)],
        "twice": [*rows, *rows[:4], rows[0]],
        "bad": [*rows, {"instruct": "no label"}],
        "further": [{**row, "note": 1} for row in rows],
        "spelled": [{**row, "input": "<|im_end|>"} for row in rows],
        "promptless": [{"prompt": "", "completion": "x" * n} for n in range(1, 9)],
        "chats": [{"messages": turns(n)} for n in range(1, 9)],
        "thought": [{"messages": turns(n, reasoning_content="hm" * n)} for n in range(1, 9)],
    }
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    table = "instruct,label\n" + "".join(f'"say {n}","{"x" * n}"\n' for n in range(1, 9))
    (folder / "table.csv").write_text(table)
    (folder / "own.jinja").write_text(OWN_TEMPLATE)
    (folder / "parts").mkdir()
    write_jsonl(folder / "parts" / "train.jsonl", rows)
    write_jsonl(folder / "parts" / "test.jsonl", other)
    save_folder(folder / "model", tiny_model(), byte_tokenizer())
    save_folder(folder / "larger", tiny_model(hidden_size=64), byte_tokenizer())
    save_folder(folder / "padless", tiny_model(), byte_tokenizer(pad=None))
    merged = byte_tokenizer(merges=[("s", "a")])
    save_folder(folder / "merged", tiny_model(vocab_size=261), merged)
    save_folder(folder / "pickled", tiny_model(), byte_tokenizer())
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pickled" / "pytorch_model.bin")
    return folder


def turns(count: int, **of_the_answer: Any) -> list[dict[str, str]]:
    asked = {"role": "user", "content": "say"}
    answers = ({"role": "assistant", "content": "x" * (count + n), **of_the_answer} for n in range(2))
    return [turn for answer in answers for turn in (asked, answer)]


@contextmanager
def cheap() -> Iterator[None]:
    """Skips the slowest parts of a run of two steps, and hides the environment.

    bitsandbytes counts as missing, whether it is installed or not.
    """

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "bitsandbytes" else importlib.util.find_spec(name, *args)

    without = patch("hf_clm.model.adapters.find_spec", find_spec)
    with patch.object(run_module, "write_loss_plots"), patch("gc.collect"), patch.dict(os.environ), without:
        yield


@contextmanager
def watching(found: dict[str, Any], lines: list[str]) -> Iterator[None]:
    """Records the printed lines, the loader and the attention, and counts computed layers."""
    build_loader = CLMTrainer.get_train_dataloader
    found["layers_computed"] = 0

    def get_train_dataloader(trainer: CLMTrainer) -> Any:
        loader: Any = build_loader(trainer)
        names = ("num_workers", "persistent_workers", "prefetch_factor", "in_order")
        context = loader.multiprocessing_context
        found["loader"] = [*(getattr(loader, name) for name in names), context and context.get_start_method()]
        model: Any = trainer.model
        found["attention"] = model.config._attn_implementation
        if loader.num_workers:
            raise UserError("seen")  # before the workers start: it takes seconds to end them
        return loader

    def count(module: torch.nn.Module, inputs: Any) -> None:
        found["layers_computed"] += type(module).__name__ == "Qwen2MLP"

    hook = register_module_forward_pre_hook(count)
    try:
        with (
            patch.object(CLMTrainer, "get_train_dataloader", get_train_dataloader),
            redirect_stdout(io.StringIO()) as printed,
        ):
            yield
    finally:
        hook.remove()
        lines += printed.getvalue().splitlines()
