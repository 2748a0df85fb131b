"""Compares hf_clm with the stock Trainer and a bare loop on a GPU: python tests/benchmarks/gpu.py > gpu.json

Each arm runs in a process of its own, over the same rows in the same order, with weights from the same seed,
in bfloat16 autocast, with fused AdamW: 10 steps apart, then 3 windows of 15, with a synchronisation at the
edges of a window only. Prints one JSON, of what was reached where time is up. ``--miniature``: on a CPU, to
show that it runs. What counts as FLOP: gpu_cases.py.

  stock, stock-compile   transformers.Trainer; packed documents are isolated by position_ids under sdpa
  bare-compile           our attention and loss in a plain compiled loop, against which a Trainer's cost shows
  ours, ours-compile     CLMTrainer
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cases import IGNORE
from gpu_cases import CASES, Case, PaddedRows, Plan, build_collator, build_model, build_rows, leak

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if hf_clm is not installed

SECONDS, ARM_SECONDS = 570, 150
LOSS_STEPS, LOSS_TOLERANCE = 20, 0.02  # relative: bfloat16 has 8 bits, and AdamW accumulates differences
ISOLATION_TOLERANCE = 0.03  # relative to the largest logit, for two kernels in bfloat16
KERNELS = ("flash", "fmha", "varlen")
ARMS = ("ours-compile", "stock-compile", "ours", "stock", "bare-compile")


class Watch:
    """Measures the time of an arm's windows, and then checks what its micro-batches do."""

    def __init__(self, plan: Plan, device: Any):
        self.plan, self.device = plan, device
        self.step = 0
        self.losses: list[list[Any]] = [[]]
        self.times: list[float] = []
        self.graphs: list[int] = []
        self.syncs: list[str] = []
        self.kernels: dict[str, float] = {}

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        after = self.step - self.plan.edges[-1]
        with (
            self._counting_syncs() if after in (0, 1) else self._profiling() if after == 2 else nullcontext()
        ):
            yield

    def end_step(self) -> None:
        import torch

        self.step += 1
        self.losses.append([])
        if self.step not in self.plan.edges:
            return
        self.graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            if self.step == self.plan.warm_up:
                torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())

    def report(self, case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        seconds = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        windows = [
            rows[first * case.rows : (first + self.plan.window) * case.rows] for first in self.plan.edges[:3]
        ]
        tokens = [sum(len(row["input_ids"]) for row in window) for window in windows]
        speeds = [count / time_taken for count, time_taken in zip(tokens, seconds, strict=True)]
        flops = [case.flops(window) / taken for window, taken in zip(windows, seconds, strict=True)]
        on_gpu = self.device.type == "cuda"
        return {
            "tokens_per_second": sorted(speeds)[1],
            "windows_tokens_per_second": speeds,
            "flops_per_second": sorted(flops)[1],
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "losses": [float(sum(parts)) for parts in self.losses[:LOSS_STEPS] if parts],
            "recompiles": self.graphs[-1] - self.graphs[0],
            "graphs": self.graphs[-1],
            "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]),
            "syncs_per_micro_batch": self.syncs if on_gpu else None,
            "kernels_seconds": dict(sorted(self.kernels.items(), key=lambda item: -item[1])[:12]),
            "attention_kernels": [
                name for name in self.kernels if any(part in name.lower() for part in KERNELS)
            ],
        }

    @contextmanager
    def _counting_syncs(self) -> Iterator[None]:
        import torch

        if self.device.type != "cuda":
            yield
            return
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.syncs += [f"{w.filename}:{w.lineno}" for w in found if "synchronizing" in str(w.message)]

    @contextmanager
    def _profiling(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            yield
        for event in found.key_averages():
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            self.kernels[event.key[:120]] = self.kernels.get(event.key[:120], 0.0) + spent / 1e6


def run_trainer(arm: str, case: Case, *, plan: Plan, rows: list[dict[str, Any]]) -> tuple[Watch, Any]:
    """Returns the trainer ``stock`` or ``ours``, with or without torch_compile."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_clm.training.trainer import CLMTrainer

    is_ours, compiles = arm.startswith("ours"), arm.endswith("compile")
    model = build_model(case, "packed" if is_ours else "sdpa")
    micro = case.rows if is_ours else case.stock_rows
    values: dict[str, Any] = {"per_device_train_batch_size": micro, "torch_compile": compiles}
    if plan.is_miniature:
        values |= {"use_cpu": True, "dataloader_pin_memory": False}
        values |= {"torch_compile_backend": "aot_eager"} if compiles else {}
    else:
        values |= {"dataloader_num_workers": 2}
    if is_ours:  # hf_clm's defaults for the Trainer
        values |= {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            gradient_accumulation_steps=case.rows // micro,
            max_steps=plan.steps,
            **{"bf16": True, "learning_rate": 3e-4, "lr_scheduler_type": "constant"},
            **{
                "optim": "adamw_torch_fused",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            },
            **{
                "train_sampling_strategy": "sequential",
                "remove_unused_columns": False,
                "logging_steps": 10_000,
            },
            **values,
        )
        watch = Watch(plan, arguments.device)
        base: Any = CLMTrainer if is_ours else Trainer

        class WatchedTrainer(base):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                with watch.micro_step():
                    loss = super().training_step(*args, **kwargs)
                watch.losses[-1].append(loss.detach())
                return loss

        class EndStep(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                watch.end_step()

        collate = build_collator(case, rows) if is_ours else PaddedRows(case)
        WatchedTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[EndStep()]
        ).train()
    return watch, model


def run_bare(case: Case, *, plan: Plan, rows: list[dict[str, Any]]) -> tuple[Watch, Any]:
    """Trains with hf_clm's attention and loss without a Trainer."""
    import torch

    from hf_clm.model.loss import use_target_loss

    device = torch.device("cpu" if plan.is_miniature else "cuda")
    model, watch, collate = (
        build_model(case, "packed").to(device),
        Watch(plan, device),
        build_collator(case, rows),
    )
    loss_function = use_target_loss(model.train())
    compiled: Any = torch.compile(model, backend="aot_eager" if plan.is_miniature else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    for step in range(plan.steps):
        batch = collate(rows[step * case.rows : (step + 1) * case.rows])
        batch.pop("padding_tokens")
        items = (batch["shift_labels"] != IGNORE).sum()
        moved = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with watch.micro_step():
            with torch.autocast(device.type, dtype=torch.bfloat16), loss_function.measuring():
                loss = compiled(**moved, use_cache=False, num_items_in_batch=items).loss
            loss.backward()
        watch.losses[-1].append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.end_step()
    return watch, model


def run_arm(name: str, arm: str, plan: Plan) -> dict[str, Any]:
    """Runs in a child process."""
    case = plan.case(name)
    rows = build_rows(case, plan)
    options: dict[str, Any] = {"plan": plan, "rows": rows}
    is_bare = arm == "bare-compile"
    watch, model = run_bare(case, **options) if is_bare else run_trainer(arm, case, **options)
    found = watch.report(case, rows)
    return found if arm.startswith("stock") else found | {"leak": leak(model, rows)}


def measure_roofline(plan: Plan) -> dict[str, Any]:
    """Returns the FLOP/s of a large bfloat16 matrix product, the best of 5, and the device."""
    import torch
    import transformers

    from hf_clm.machine import nominal_peak

    size, device = (512, "cpu") if plan.is_miniature else (8192, "cuda")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, in miniature",
        "flops_per_second": 2 * size**3 / min(times[1:]),
        "nominal_flops_per_second": nominal_peak(torch.device(device)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def to_gates(arms: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """Returns the conditions for the figures of a case to count; None if one could not be checked."""
    ran = {arm: found for arm, found in arms.items() if "error" not in found}
    ours = {arm: found for arm, found in ran.items() if "leak" in found}
    losses = [found["losses"] for found in ran.values()]
    gaps = [abs(a - b) / b for other in losses[1:] for a, b in zip(other, losses[0], strict=True)]
    leaks = [found["leak"] for found in ours.values()]
    syncs = [found["syncs_per_micro_batch"] for found in ours.values()]
    on_gpu = bool(ours) and None not in syncs
    return {
        "every_arm_ran": len(ran) == len(arms),
        "losses_agree": max(gaps) <= LOSS_TOLERANCE if gaps else None,
        "no_recompile": all(found["recompiles"] == 0 for found in ran.values()) if ran else None,
        "no_sync": not any(syncs) if on_gpu else None,
        "fused_kernel": all(found["attention_kernels"] for found in ours.values()) if on_gpu else None,
        "documents_isolated": all(x["beside"] == 0 and x["alone"] <= ISOLATION_TOLERANCE for x in leaks)
        if leaks
        else None,
    }


def call(what: list[str], *, miniature: bool, seconds: float) -> dict[str, Any]:
    """Returns the JSON output of a child process, or why there is none."""
    command = [sys.executable, __file__, "--child", *what, *(["--miniature"] if miniature else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {done.stderr[-600:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints one JSON.")
    parser.add_argument("--miniature", action="store_true", help="run a tiny version on a CPU, as a test")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = Plan(3, 2, True) if options.miniature else Plan(10, 15, False)
    if options.child:
        found = measure_roofline(plan) if options.child == ["roofline"] else run_arm(*options.child, plan)
        print(json.dumps(found))
        return
    began = time.monotonic()
    result: dict[str, Any] = {"miniature": options.miniature, "cases": {}}
    jobs = [["roofline"], *([case, arm] for case in options.cases for arm in options.arms)]
    for what in jobs:
        left = min(ARM_SECONDS, SECONDS - (time.monotonic() - began))
        found = (
            call(what, miniature=options.miniature, seconds=left) if left > 0 else {"error": "no time left"}
        )
        print(*what, found.get("error") or "done", file=sys.stderr, flush=True)
        if what == ["roofline"]:
            result["roofline"] = found
        else:
            result["cases"].setdefault(what[0], {"arms": {}})["arms"][what[1]] = found
    peaks = {name: result["roofline"].get(f"{name}flops_per_second") for name in ("", "nominal_")}
    for case in result["cases"].values():
        case["gates"] = to_gates(case["arms"])
        for found in case["arms"].values():
            for name, peak in peaks.items():
                if peak and "error" not in found:
                    found[f"{name}mfu"] = found["flops_per_second"] / peak
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
