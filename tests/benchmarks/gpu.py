"""Checks and measures hf_clm on one GPU in under 9 minutes, the most valuable first.

    python tests/benchmarks/gpu.py --out gpu.json [--wheels FOLDER] [--stages NAME ...]

Each stage runs in a process of its own with a time limit, and the JSON is written after each. Stages that
measure no time run at once. A bare checkout is enough; packages that the machine lacks travel as wheels:

    pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 -d FOLDER \\
        pydantic ruamel.yaml

Of these, pydantic-core is compiled, for one Python; the others are plain Python, and would run unpacked.
datasets and zstandard are not needed. ``--miniature``: on a CPU, where the times mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 535
LOSS_TOLERANCE = 0.02  # relative: bfloat16 has 8 bits, and AdamW accumulates differences
GOALS = {  # on one H100
    "gpt2-124m": {"tokens_per_second": 500_000, "peak_memory_bytes": 60e9},
    "qwen2.5-0.5b-sft": {"tokens_per_second": 125_000, "peak_memory_bytes": 60e9},
}
# The names of the stages with their limits in seconds, in the order in which they run; a row runs at once.
SCHEDULE: list[dict[str, int]] = [
    {"versions": 60},
    {"varlen": 90, "loss": 90},
    {"train": 120, "fsdp2": 150, "qlora": 120},
    {"tiny-sft ours": 60},
    {"gpt2-124m ours-compile": 150},
    {"gpt2-124m stock": 60},
    {"qwen2.5-0.5b-sft ours-compile": 200},
    {"qwen2.5-0.5b-sft stock": 90},
    {"gpt2-124m ours": 60},
    {"qwen2.5-0.5b-sft ours": 60},
    {"gpt2-124m stock-compile": 120},
    {"qwen2.5-0.5b-sft stock-compile": 150},
    {"sweep": 120},
]
STAGES = [name for group in SCHEDULE for name in group]


def run_stage(name: str, *, is_miniature: bool) -> dict[str, Any]:
    """Runs a stage in this process."""
    sys.path.insert(0, str(ROOT))  # if hf_clm is not installed
    import gpu_checks

    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        if name in ("train", "fsdp2", "qlora"):
            return gpu_checks.train(name, Path(folder), is_miniature=is_miniature)
        checks: dict[str, Callable[..., dict[str, Any]]] = {
            "versions": gpu_checks.versions,
            "varlen": gpu_checks.varlen,
            "loss": gpu_checks.loss,
        }
        if name in checks:
            return checks[name](is_miniature=is_miniature)
        return run_speed(name, Path(folder), is_miniature=is_miniature)


def run_speed(name: str, folder: Path, *, is_miniature: bool) -> dict[str, Any]:
    from gpu_speed import CASES, MINIATURES, Plan, measure_arm, sweep

    on_cpu = {"use_cpu": True, "dataloader_pin_memory": False}
    plan = Plan(3, 2, "aot_eager", on_cpu) if is_miniature else Plan(10, 15, "inductor", {})
    if name == "sweep":
        case = CASES["tiny-sft" if is_miniature else "qwen2.5-0.5b-sft"]
        short = Plan(2, 2, plan.backend, plan.values)
        return sweep(case, short, folder, sizes=(1, 2) if is_miniature else (2, 4, 8, 16))
    case, arm = name.split()
    return measure_arm(CASES[MINIATURES[case] if is_miniature else case], plan, arm, folder)


def call(name: str, *, is_miniature: bool, seconds: float) -> dict[str, Any]:
    """Runs a stage in a child process, and returns its result or its error."""
    if seconds <= 0:
        return {"error": "no time left"}
    command = [sys.executable, __file__, "--child", name, *(["--miniature"] if is_miniature else [])]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return {"error": f"not done after {seconds:.0f} s"}
    took = {"seconds": round(time.monotonic() - began, 1)}
    if process.returncode:
        return {"error": f"exit code {process.returncode}: {errors[-1500:]}"} | took
    return json.loads(output.splitlines()[-1]) | took


def judge(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns for each model the speeds, MFU, the goals, and the gates: what must be true for them to count.

    None where something was not measured, or cannot be on a CPU.
    """
    peaks = {key: stages.get("versions", {}).get(f"{key}_flops_per_second") for key in ("peak", "nominal")}
    models: dict[str, Any] = {}
    for model, goals in GOALS.items():
        named = {name.split()[1]: part for name, part in stages.items() if name.startswith(f"{model} ")}
        ran = {arm: part for arm, part in named.items() if "error" not in part}
        ours = ran.get("ours-compile") or ran.get("ours") or {}
        is_gpu = bool(ours.get("peak_memory_bytes"))
        models[model] = {
            "tokens_per_second": {arm: round(part["tokens_per_second"]) for arm, part in ran.items()},
            "mfu": {key: ours["flops_per_second"] / peak for key, peak in peaks.items() if peak and ours},
            "goals": {
                "tokens_per_second": ours["tokens_per_second"] >= goals["tokens_per_second"],
                "peak_memory": ours["peak_memory_bytes"] < goals["peak_memory_bytes"],
            }
            if is_gpu
            else None,
            "gates": {
                "every_arm_ran": len(ran) == len(named),
                "losses_agree": _agree([part["losses"] for part in ran.values()]),
                "no_recompile": all(part["recompiles"] == 0 for part in ran.values()) if ran else None,
                "no_wait": not ours["waits"] if is_gpu else None,
                "fused_kernel": bool(ours["attention_kernels"]) if is_gpu else None,
            },
        }
    return models


def _agree(arms: list[list[list[float]]]) -> bool | None:
    """Returns whether all arms logged the same losses, as ``[step, loss]``; None for a single arm."""
    first, *others = map(dict, arms) if arms else [{}]
    pairs = [(loss, first[step]) for other in others for step, loss in other.items() if step in first]
    gaps = [abs(a - b) / b for a, b in pairs]
    return max(gaps) <= LOSS_TOLERANCE if gaps else None


def use_wheels(wheels: Path, folder: Path) -> None:
    """Installs wheels into a folder, which is imported by all stages."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(folder),
    ]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True, stdout=sys.stderr)
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the JSON so that a reader never sees a part of it."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, metavar="NAME")
    parser.add_argument("--miniature", action="store_true", help="on a CPU, to show that the stages run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_stage(options.child, is_miniature=options.miniature)))
        return
    began, stages = time.monotonic(), {}
    slack = 5 if options.miniature else 1  # on the CPU of a laptop that is busy
    deadline = began + slack * SECONDS
    result = {"miniature": options.miniature, "stages": stages}
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder, ThreadPoolExecutor() as threads:
        if options.wheels:
            use_wheels(options.wheels, Path(folder))
        for group in SCHEDULE:
            running = {
                name: threads.submit(
                    call,
                    name,
                    is_miniature=options.miniature,
                    seconds=min(slack * limit, deadline - time.monotonic()),
                )
                for name, limit in group.items()
                if name in options.stages
            }
            for name, stage in running.items():
                stages[name] = stage.result()
                print(f"{name}: {stages[name].get('error', 'done')}", file=sys.stderr, flush=True)
                write(options.out, result | {"models": judge(stages), "seconds": time.monotonic() - began})


if __name__ == "__main__":
    main()
