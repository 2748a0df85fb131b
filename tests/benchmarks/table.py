"""Computes medians, ratios, gates and Markdown tables from the measurements of the children."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

WALL, CPU, PEAK = "tokens_per_second", "tokens_per_cpu_second", "peak_bytes"
# How much the loss of an arm may differ from that of each row alone, and after an epoch from other arms.
STILL_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
EPOCH_TOLERANCE = 0.05

Figures = dict[str, float]


def to_figures(result: dict[str, Any]) -> Figures:
    """The result of a process: wall time is that of its first window, CPU time that of its last."""
    both, one = result["windows"][0], result["windows"][-1]
    return {
        WALL: both[WALL],
        CPU: one[CPU],
        "target_tokens_per_second": both["target_tokens_per_second"],
        "step_seconds": both["step_seconds"],
        "tokens_per_step": both["tokens_per_step"],
        PEAK: result[PEAK],
        "peak_above_imports_bytes": result["peak_above_imports_bytes"],
    }


def medians(rounds: Iterable[Figures]) -> Figures:
    """Returns the median of each figure."""
    found = list(rounds)
    return {name: median(figures[name] for figures in found) for name in found[0]}


def with_precision(key: str, result: dict[str, Any]) -> str:
    """Replaces ``arm@default`` by its actual precision, ``arm@fp32`` or ``arm@bf16``."""
    arm, precision = key.split("@")
    return f"{arm}@{'bf16' if result['bf16'] else 'fp32'}" if precision == "default" else key


def compare(figures: dict[str, Figures], families: dict[str, str]) -> dict[str, Any]:
    """Compares hf_clm with the fastest peer. Keys: ``arm@precision``; families: ``stock``, ``trl``, ``ours``.

    At equal precision, and as it comes: against TRL as it comes and against any peer at any precision.
    """
    stock, trl = ({key for key in families if families[key] == name} for name in ("stock", "trl"))
    wanted = []
    for precision in ("fp32", "bf16"):
        here = {key for key in stock | trl if key.endswith(f"@{precision}")}
        isolating = {key for key in here if not key.startswith("concat@")}
        wanted += [
            (f"{precision}, best stock", f"ours@{precision}", here & stock),
            (f"{precision}, best TRL", f"ours@{precision}", here & trl),
            (f"{precision}, best peer that keeps documents apart", f"ours@{precision}", isolating),
            (f"{precision}, best peer, allocator as it is", f"ours-glibc@{precision}", here),
        ]
    default, fp32 = "ours-default@default", {key for key in stock if key.endswith("@fp32")}
    wanted += [
        ("as it comes, TRL as it comes", default, {"trl-default@default"} & trl),
        ("as it comes, best TRL", default, trl),
        ("as it comes, best Trainer in fp32", default, fp32),
    ]
    return {
        name: _ratios(figures, mine, sorted(peers))
        for name, mine, peers in wanted
        if mine in figures and peers
    }


def _ratios(figures: dict[str, Figures], mine: str, peers: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (WALL, CPU):
        best = max(peers, key=lambda key: figures[key][name])
        found[name] = figures[mine][name] / figures[best][name]
        found[f"{name}, against"] = best
    best = found[f"{CPU}, against"]
    found[PEAK] = figures[mine][PEAK] / figures[best][PEAK]
    found["peak_bytes, least"] = figures[mine][PEAK] / min(figures[key][PEAK] for key in peers)
    return found


def judge(losses: dict[str, dict[str, Any]], notes: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Adds to each ``arm@precision`` the difference of its losses to ``alone`` and others, and a verdict.

    verdict: "agrees", "differs", "by design: ..." or "failed: ...".
    """
    alone = losses["alone"]
    ended = [loss["held_out_loss"] for key, loss in losses.items() if "held_out_loss" in loss]
    judged: dict[str, dict[str, Any]] = {}
    for key, loss in losses.items():
        if key == "alone" or "failed" in loss:
            judged[key] = loss | {"verdict": f"failed: {loss['failed']}" if "failed" in loss else "reference"}
            continue
        still = loss["still_loss"] / alone["still_loss"] - 1
        epoch = loss["held_out_loss"] / median(ended) - 1
        same_tokens = all(loss[name] == alone[name] for name in ("tokens", "target_tokens"))
        is_same = same_tokens and abs(still) <= STILL_TOLERANCE["bf16" if loss["bf16"] else "fp32"]
        agrees = is_same and abs(epoch) <= EPOCH_TOLERANCE
        note = notes.get(key.split("@")[0], "")
        verdict = f"by design: {note}" if note else "agrees" if agrees else "differs"
        judged[key] = loss | {"still_difference": still, "epoch_difference": epoch, "verdict": verdict}
    return judged


def is_sound(judged: dict[str, Any]) -> bool:
    """Returns False if a loss is wrong, or not known."""
    return not judged["verdict"].startswith(("differs", "failed"))


def speed_table(
    title: str, figures: dict[str, Figures], titles: dict[str, str], *, threads: Sequence[int]
) -> list[str]:
    """Returns Markdown with a line per arm, and precisions in columns. ``figures``: by ``arm@precision``."""
    lines = [f"**{title}**", ""]
    columns = (*_columns(threads), "peak GB")
    heads = [f"{precision}: {text}" for precision in ("fp32", "bf16") for text in columns]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for arm, text in titles.items():
        cells = [
            _cell(figures.get(f"{arm}@{precision}"), name)
            for precision in ("fp32", "bf16")
            for name in (WALL, CPU, PEAK)
        ]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _columns(threads: Sequence[int]) -> tuple[str, str]:
    return f"tokens/s, threads: {threads[0]}", f"tokens per CPU second, threads: {threads[-1]}"


def _cell(figures: Figures | None, name: str) -> str:
    if figures is None:
        return ""
    return f"{figures[name] / 1e9:.2f}" if name == PEAK else f"{figures[name]:,.0f}"


def ratio_table(ratios: dict[str, Any], *, threads: Sequence[int]) -> list[str]:
    """Returns Markdown with the ratios of hf_clm to the peers."""
    columns = " | ".join((*_columns(threads), "peak memory", "fastest peer"))
    lines = [f"| hf_clm against | {columns} |", "|---|---:|---:|---:|---|"]
    for name, ratio in ratios.items():
        cells = [f"{ratio[WALL]:.2f}x", f"{ratio[CPU]:.2f}x", f"{ratio[PEAK]:.2f}x"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio[f'{CPU}, against']} |")
    return [*lines, ""]


def gate_table(judged: dict[str, dict[str, Any]]) -> list[str]:
    """Returns Markdown with the losses of each arm."""
    lines = ["| loss | weights still | difference | held out after an epoch | |", "|---|---:|---:|---:|---|"]
    for key, loss in judged.items():
        still, held_out = loss.get("still_loss"), loss.get("held_out_loss")
        cells = [
            "" if still is None else f"{still:.5f}",
            f"{loss['still_difference']:+.1e}" if "still_difference" in loss else "",
            "" if held_out is None else f"{held_out:.3f}",
        ]
        lines.append(f"| {key} | " + " | ".join(cells) + f" | {loss['verdict']} |")
    return [*lines, ""]


def startup_table(facts: dict[str, Any]) -> list[str]:
    """Returns Markdown with the seconds to the first step."""
    lines = [
        f"**To the first step on {facts['records']:,} records (median {facts['median_tokens']:.0f} tokens)**",
        "",
        "| | cold, s | warm, s |",
        "|---|---:|---:|",
    ]
    for arm in [key.removesuffix(", cold") for key in facts if key.endswith(", cold")]:
        seconds = (facts[f"{arm}, {state}"] for state in ("cold", "warm"))
        cells = (found if isinstance(found, str) else f"{found:.1f}" for found in seconds)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [*lines, ""]
