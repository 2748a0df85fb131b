"""Compares hf_clm with its peers on this CPU: speed, memory, loss and start-up time.

    python tests/benchmarks/peers.py [--quick] [--case sft-8k ...] [--rounds 3] [--out FILE.json]

Every arm runs in a process of its own, once a round, the rounds interleaved. A run is measured on two threads
and then on one, a few steps after its start; tokens are real ones, not padding. Then every arm's loss is
compared with that of each row alone. Prints Markdown, writes JSON; ends with 1 where an arm failed or a loss
differs. The machine should do nothing else: threads that wait for a busy core make any arm ten times slower.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import table
from arms import ONE_ROUND, arms_of
from cases import CASES, Case
from measure import Task, measure_alone, measure_loss, measure_speed, run_child
from startup import QUICK_RECORDS, RECORDS, measure_startup

PACKAGES = ("hf_clm", "torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")
IMPORTED = ["torch", "datasets", "transformers.trainer", "trl.trainer.sft_trainer", "hf_clm.training.trainer"]
LIMIT_SECONDS = 600  # of one process
QUICK_CASES, QUICK_WINDOW = ("sft-8k", "pretrain-gpt2"), 0.1  # seconds

Results = dict[str, list[dict[str, Any]]]  # arm@precision -> the results of each round


def main() -> int:
    """Runs the benchmark that the command line selects."""
    options = parse(__doc__ or "", CASES, out="cpu.json", rounds=3)
    cases = [CASES[name] for name in options.case or (QUICK_CASES if options.quick else CASES)]
    report = compare_cases(cases, options)
    if not options.case:
        with tempfile.TemporaryDirectory() as folder:
            records = QUICK_RECORDS if options.quick else RECORDS
            report["startup"] = measure_startup(Path(folder), records=records, limit=LIMIT_SECONDS)
        print("\n".join(table.startup_table(report["startup"])), flush=True)
    return write_report(report, options)


def parse(about: str, names: Iterable[str], *, out: str, rounds: int) -> argparse.Namespace:
    """Parses the command line. ``names``: of the cases; ``out``: file in results; ``rounds``: the default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny case and one round, as a test")
    parser.add_argument("--case", nargs="+", choices=list(names), help="only these cases, without start-up")
    parser.add_argument("--arm", nargs="+", help="only these arms and hf_clm's, such as: group trl-bfd-1x3")
    parser.add_argument("--rounds", type=int, help=f"number of rounds: {rounds} by default, 1 with --quick")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / out)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else rounds)
    if options.quick and options.out == parser.get_default("out"):
        options.out = Path(tempfile.gettempdir()) / f"quick-{out}"
    return options


def compare_cases(cases: Iterable[Case], options: argparse.Namespace) -> dict[str, Any]:
    """Measures the cases, and prints the tables of each."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)  # saves five seconds at the start of each process
    report: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions(), "cases": {}}
    report["quick"] = options.quick
    for case in cases:
        report["cases"][case.name] = compare_arms(case, context, options=options)
        print("\n".join(to_markdown(report["cases"][case.name])), flush=True)
    return report


def write_report(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Writes the report. Returns 1 where an arm failed or a loss differs, else 0."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(not part["ok"] for part in report["cases"].values()))


def compare_arms(case: Case, context: Any, *, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the speeds, ratios and losses of one case."""
    arms = {
        name: arm
        for name, arm in arms_of(case).items()
        if not options.arm or name in options.arm or arm.family == "ours"
    }
    tasks = {
        f"{name}@{precision}": Task(case, arm, precision)
        for name, arm in arms.items()
        for precision in arm.precisions
    }
    found = measure_speeds(tasks, context, options=options)
    failed = {key: result["failed"] for key in found for result in found[key] if "failed" in result}
    figures = {
        key: table.medians(table.to_figures(result) for result in results)
        for key, results in found.items()
        if key not in failed
    }
    losses = measure_losses((case.tiny() if options.quick else case).narrow(), tasks, context)
    judged = table.judge(losses, {name: arm.note for name, arm in arms.items()})
    return {
        "title": case.tiny().title if options.quick else case.title,
        "threads": case.threads,
        "arms": {name: arm.title for name, arm in arms.items()},
        "batches": {name: arm.batch for name, arm in arms.items()},
        "rounds": found,
        "medians": {table.with_precision(key, found[key][0]): figures[key] for key in figures},
        "ratios": table.compare(figures, {key: tasks[key].arm.family for key in figures}),
        "losses": judged,
        "failed": failed,
        "ok": not failed and all(table.is_sound(loss) for loss in judged.values()),
    }


def measure_speeds(tasks: dict[str, Task], context: Any, *, options: argparse.Namespace) -> Results:
    """Returns the results of every round."""
    found: Results = {key: [] for key in tasks}
    for number in range(options.rounds):
        for key, task in tasks.items():
            if number and key.split("@")[0] in ONE_ROUND:
                continue
            if options.quick:
                task = replace(task, case=task.case.tiny(), seconds=QUICK_WINDOW)
            found[key].append(in_child(measure_speed, replace(task, seed=number), context))
            say(f"{task.case.name} round {number + 1} {key}: {found[key][-1]}")
    return found


def measure_losses(case: Case, tasks: dict[str, Task], context: Any) -> dict[str, dict[str, Any]]:
    """Returns the loss of every arm and, as ``alone``, the expected one. Runs two processes at a time."""
    first = replace(next(iter(tasks.values())), case=case)
    jobs: dict[str, tuple[Callable[[Task], Any], Task]] = {"alone": (measure_alone, first)}
    jobs |= {key: (measure_loss, replace(task, case=case)) for key, task in tasks.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: in_child(*job, context), jobs.values()), strict=True))


def in_child(measure: Callable[[Task], Any], task: Task, context: Any) -> dict[str, Any]:
    """Returns the result of the child, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        child = context.Process(target=run_child, args=(measure, task, str(log)))
        child.start()
        child.join(LIMIT_SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return {"failed": f"took more than {LIMIT_SECONDS} s"}
        lines = log.read_text(encoding="utf-8").strip().splitlines() if log.is_file() else []
        last = lines[-1] if lines else "no output"
        return json.loads(last) if child.exitcode == 0 else {"failed": f"exit {child.exitcode}: {last}"}


def to_markdown(found: dict[str, Any]) -> Iterator[str]:
    """Returns the tables of one case."""
    yield from table.speed_table(found["title"], found["medians"], found["arms"], threads=found["threads"])
    yield from table.ratio_table(found["ratios"], threads=found["threads"])
    yield from table.gate_table(found["losses"])
    yield from (f"{key} failed: {reason}" for key, reason in found["failed"].items())


def describe_machine() -> dict[str, Any]:
    """Returns the CPU, and the number of its threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    known = ("avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": facts.get("model name", platform.processor()).strip(),
        "instructions": [name for name in known if name in facts.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.system(),
    }


def describe_versions() -> dict[str, str]:
    """Returns the versions of all packages that are measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text[:160]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
