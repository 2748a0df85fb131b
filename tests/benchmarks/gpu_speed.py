"""The stages of gpu.py that measure speed: hf_clm with its defaults, and the Trainer, on the same rows.

Every arm trains from the same weights on the same rows in the same order, in bfloat16 autocast with fused
AdamW: WARM_UP steps, then 3 windows of equal length, with a synchronisation at the edges of a window only.
Two further steps count where the program waits for the GPU, and the next one is profiled.

FLOP are those that the task needs, the same for every arm (hf_clm/model/flops.py): none for padding, and half
of a square for causal attention. A token of GPT-2 124M at 1024 needs 0.80 GFLOP, Qwen2.5-0.5B 3.23.
"""

import gc
import json
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import EOS, FIRST, IGNORE, PAD, build_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_clm.data.prepared.sets import load_early
from hf_clm.model.build import build_model, build_model_config, build_tokenizer_aside
from hf_clm.model.flops import count_flops
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.arguments import training_arguments
from hf_clm.training.prepare import prepare
from hf_clm.training.python import Additions
from hf_clm.training.run import run

MEDIAN_TOKENS, SPREAD, TARGET_SHARE = 300, 0.8, 0.65  # of the documents of SFT, with log-normal lengths
WINDOWS, AFTERWARDS = 3, 5  # steps after the windows: 2 count waits, 1 is profiled, and the last one logs
KERNELS = ("flash", "fmha", "varlen")
WAITS = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Case:
    """A model and its rows. ``rows``: in an optimizer step; ``stock_rows``: in a micro-batch of the Trainer,
    whose logits take gigabytes."""

    stage: str
    config: dict[str, Any]
    max_length: int
    rows: int
    stock_rows: int


GPT2 = {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh", "vocab_size": 50_304}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
QWEN |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN |= {"max_position_embeddings": 2048, "tie_word_embeddings": True}
TINY = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CASES = {
    "gpt2-124m": Case("pretrain", GPT2, 1024, 64, 32),
    "qwen2.5-0.5b-sft": Case("sft", QWEN, 2048, 16, 4),
    "tiny-gpt2": Case(
        "pretrain", GPT2 | {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 4}, 64, 4, 2
    ),
    "tiny-sft": Case("sft", QWEN | TINY | {"num_attention_heads": 4}, 64, 4, 2),
}
MINIATURES = {"gpt2-124m": "tiny-gpt2", "qwen2.5-0.5b-sft": "tiny-sft", "tiny-sft": "tiny-sft"}


@dataclass(frozen=True)
class Plan:
    """The steps of an arm. ``values``: further fields of train and of TrainingArguments, for all arms."""

    warm_up: int
    window: int
    backend: str
    values: dict[str, Any]

    def to_values(self, *, compiles: bool) -> dict[str, Any]:
        """Returns the fields of train and of TrainingArguments that all arms share."""
        values = {"learning_rate": 3e-4, "lr_scheduler_type": "constant", "warmup_steps": 0}
        values |= {"max_steps": self.edges[-1] + AFTERWARDS, "logging_first_step": True}
        values |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "torch_compile": compiles}
        return values | self.values | ({"torch_compile_backend": self.backend} if compiles else {})

    @property
    def edges(self) -> list[int]:
        return [self.warm_up + number * self.window for number in range(WINDOWS + 1)]


class Watch(TrainerCallback):
    """Measures the steps of a Trainer."""

    def __init__(self, plan: Plan, case: Case):
        self.plan, self.case = plan, case
        self.times: list[float] = []
        self.graphs: list[int] = []
        self.logged: list[tuple[int, float]] = []
        self.watching = ExitStack()
        self.waits: list[Any] = []
        self.kernels: dict[str, float] = {}
        self.result: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.logged.append((state.global_step, float(kwargs["logs"]["loss"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_gpu = args.device.type == "cuda"
        if state.global_step in self.plan.edges:
            if is_gpu:
                torch.cuda.synchronize()
            if state.global_step == self.plan.warm_up and is_gpu:
                torch.cuda.reset_peak_memory_stats()
            self.graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
            self.times.append(time.perf_counter())
        after = state.global_step - self.plan.edges[-1]
        if after == 0 and is_gpu:
            self.waits = self.watching.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if after == 2:
            if is_gpu:
                torch.cuda.set_sync_debug_mode("default")
            self.watching.close()
            profile = self._start_profile(is_gpu)
            self.watching.callback(self._end_profile, profile, time.perf_counter(), is_gpu)
        if after == 3:
            self.watching.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = kwargs["train_dataloader"].dataset
        flops = count_flops(kwargs["model"])
        speeds, rates = [], []
        for index, (start, stop) in enumerate(zip(self.times, self.times[1:], strict=False)):
            first = self.plan.edges[index] * self.case.rows
            window = range(first, first + self.plan.window * self.case.rows)
            used = [rows[number % len(rows)] for number in window]
            tokens = sum(len(row["input_ids"]) for row in used)
            targets = sum(int((np.asarray(row["labels"]) != IGNORE).sum()) for row in used)
            pairs = sum(int((np.asarray(row["position_ids"]) + 1).sum()) for row in used)
            speeds.append(tokens / (stop - start))
            rates.append(flops.of(tokens=tokens, targets=targets, pairs=pairs) / (stop - start))
        is_gpu = args.device.type == "cuda"
        self.result = {
            "tokens_per_second": sorted(speeds)[1],
            "windows_tokens_per_second": speeds,
            "flops_per_second": sorted(rates)[1],
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
            "micro_batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps],
            "compiled": args.torch_compile,
            "losses": self.logged,
            "recompiles": self.graphs[-1] - self.graphs[0],
            "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]),
            "waits": [f"{w.filename}:{w.lineno}" for w in self.waits if WAITS in str(w.message)],
            **self._kernel_figures(),
        }

    def _start_profile(self, is_gpu: bool) -> Any:
        kinds = torch.profiler.ProfilerActivity
        profile = torch.profiler.profile(activities=[kinds.CUDA if is_gpu else kinds.CPU])
        profile.start()
        if is_gpu:
            torch.cuda.synchronize()
        return profile

    def _end_profile(self, profile: Any, began: float, is_gpu: bool) -> None:
        if is_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - began
        profile.stop()
        for event in profile.key_averages():
            spent = event.self_device_time_total if is_gpu else event.self_cpu_time_total
            self.kernels[event.key[:120]] = spent / 1e6

    def _kernel_figures(self) -> dict[str, Any]:
        slowest = sorted(self.kernels.items(), key=lambda kernel: -kernel[1])
        names = [name for name in self.kernels if any(part in name.lower() for part in KERNELS)]
        busy = sum(self.kernels.values()) / self.seconds
        return {"busy_share": busy, "kernels_seconds": dict(slowest[:12]), "attention_kernels": names}


def build_recipe(case: Case, folder: Path, *, tokens: int | None = None, **train: Any) -> Recipe:
    """Returns the recipe of a case, with its rows and tokenizer written to ``folder``.

    tokens: the limit of a micro-batch; by default, hf_clm chooses it.
    """
    build_tokenizer(case.config["vocab_size"]).save_pretrained(folder / "tokenizer")
    draw, wanted = np.random.default_rng(0), 20 * case.rows * case.max_length  # tokens of 20 steps
    lengths = np.full(wanted // case.max_length, case.max_length)
    if case.stage == "sft":
        median = min(MEDIAN_TOKENS, case.max_length // 4)
        drawn = draw.lognormal(np.log(median), SPREAD, 2 * wanted // median)
        lengths = np.clip(drawn, 8, case.max_length).astype(int)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), wanted))]
    with (folder / "rows.jsonl").open("w") as file:
        for length in lengths.tolist():
            ids = [*draw.integers(FIRST, case.config["vocab_size"], length - 1).tolist(), EOS]
            prompt = max(1, round(length * (1 - TARGET_SHARE))) if case.stage == "sft" else 0
            file.write(json.dumps({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}) + "\n")
    values = {"per_device_train_batch_size": case.rows, "eval_on_start": False, **train}
    data = {"train": [{"path": str(folder / "rows.jsonl"), "format": "tokenized"}], "packing": "best_fit"}
    sections = {
        "stage": case.stage,
        "model": {"init": "scratch", "config": case.config},
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "data": {**data, "max_length": case.max_length, "tokens_per_batch": tokens, "cache_dir": None},
        "doctor": {"self_test": False, "round_trip": "off"},
        "train": {"output_dir": str(folder / "run"), **values},
    }
    return Recipe.model_validate(sections)


def run_ours(
    case: Case, plan: Plan, folder: Path, *, compiles: bool, tokens: int | None = None
) -> dict[str, Any]:
    """Trains as ``hf-clm train`` does."""
    watch = Watch(plan, case)
    recipe = build_recipe(case, folder, tokens=tokens, **plan.to_values(compiles=compiles))
    run(recipe, additions=Additions(callbacks=[watch]))
    return watch.result


def run_stock(case: Case, plan: Plan, folder: Path, *, compiles: bool) -> dict[str, Any]:
    """Trains with ``transformers.Trainer`` on the packed rows; sdpa isolates documents by position_ids."""
    values = plan.to_values(compiles=compiles)
    recipe = build_recipe(case, folder, **values)
    model_section = recipe.model.model_copy(update={"attention": "sdpa"})
    recipe = recipe.model_copy(update={"model": model_section})
    settled = training_arguments(recipe)
    tokenizer = build_tokenizer_aside(recipe, load_early(recipe, settled.seed), arguments=settled)
    rows = prepare(recipe, tokenizer, arguments=settled).splits["train"].dataset
    config = build_model_config(recipe, tokenizer)
    model = build_model(recipe, tokenizer, config=config, arguments=settled)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=case.stock_rows,
        gradient_accumulation_steps=case.rows // case.stock_rows,
        bf16=settled.bf16,
        logging_steps=settled.logging_steps,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **values,
    )
    watch, collate = Watch(plan, case), PaddedRows(case)
    Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[watch]).train()
    return watch.result


class PaddedRows:
    """Collates packed rows to (B, T). Positions begin at 0 in each document; padding is a document."""

    def __init__(self, case: Case):
        self.case = case

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        shape = (len(rows), self.case.max_length)
        batch = {"input_ids": np.full(shape, PAD), "labels": np.full(shape, IGNORE)}
        if self.case.stage == "sft":
            batch["position_ids"] = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            used = len(row["input_ids"])
            for key, values in batch.items():
                values[number, :used] = row[key]
            if self.case.stage == "sft":
                batch["position_ids"][number, used:] = np.arange(shape[1] - used)
        # the first token of a document is not a target
        starts = np.asarray(batch.get("position_ids", np.arange(shape[1])[None])) == 0
        batch["labels"][np.broadcast_to(starts, shape)] = IGNORE
        return {key: torch.from_numpy(values) for key, values in batch.items()}


def measure_arm(case: Case, plan: Plan, arm: str, folder: Path) -> dict[str, Any]:
    """Measures ``ours`` or ``stock``, with or without ``-compile``."""
    compiles = arm.endswith("-compile")
    if arm.startswith("stock"):
        return run_stock(case, plan, folder, compiles=compiles)
    return run_ours(case, plan, folder, compiles=compiles)


def sweep(case: Case, plan: Plan, folder: Path, *, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Measures micro-batches of these numbers of rows, without compiling."""
    found = []
    for rows in sizes:
        place = folder / str(rows)
        place.mkdir()
        result = run_ours(case, plan, place, compiles=False, tokens=rows * case.max_length)
        keys = ("micro_batch", "tokens_per_second", "peak_memory_bytes", "busy_share")
        found.append({key: result[key] for key in keys})
        gc.collect()
        torch.cuda.empty_cache()
    return {"micro_batches": found}
