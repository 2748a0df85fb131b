"""The folder of a run with texts that contain markup in every place that a user controls."""

import json
from pathlib import Path
from typing import Any

EVIL = "</script></style><img src=x onerror=\"document.title='injected'\"><b onclick='1'>&amp;{{ 7*7 }}"

FACTS: dict[str, Any] = {
    "status": "done",
    "started": "2026-01-02T03:04:05+00:00",
    "recipe": "poems.yaml",
    "origins": {"stage": "poems.yaml:1", "data.max_length": "command line", "train.bf16": "hf_clm default"},
    "stage": "sft",
    "format": "instruct",
    "model": EVIL,
    "parameters": 919680,
    "trained_parameters": 919680,
    "train": {
        "files": ["poems.jsonl"],
        "input_rows": 48,
        "rows": 12,
        "tokens": 2911,
        "target_tokens": 1099,
        "packing_fill": 0.945,
    },
    "evaluation": None,
    "unigram_entropy": 5.5,
    "steps": 40,
    "processes": 1,
    "device": "cpu",
    "precision": "float32",
    "attention": "packed",
    "max_grad_norm": 1.0,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "loss_before": 6.5,
    "loss_after": 0.25,
    "token_accuracy_before": 0.0,
    "token_accuracy_after": 0.975,
    "steps_done": 40,
    "tokens_seen": 4000,
    "tokens_per_second": 800.0,
    "mfu": 0.095,
    "evaluated": {"eval_loss": [6.5, 0.25], "eval_token_accuracy": [0.0, 0.975]},
    "proof": {
        "train": {
            "certificate": {"valid": True, "rows": 48, "content_hash": "0fb1e8d1d6746279f7"},
            "ledger": {
                "used": {
                    "rows": 48,
                    "tokens": 2911,
                    "target_tokens": 1099,
                    "kept_tokens": 2911,
                    "kept_targets": 1099,
                },
                "unreadable": {"rows": 1},
            },
        },
        "self_test": {
            "documents": 4,
            "comparisons": [
                {
                    "name": "padded rows give a different loss",
                    "value": 6.5,
                    "reference": 6.5,
                    "tolerance": 0.03,
                }
            ],
        },
        "round_trip": {"logit_difference": 0.0},
    },
}
LABEL_ROW: dict[str, Any] = {
    "place": "poems.jsonl:9",
    "tokens": 9,
    "targets": 3,
    "shown": 9,
    "flags": {"control text": EVIL},
    "turns": [
        ["prompt", [["read", f"ask\n{EVIL}"]]],
        ["completion", [["trained", "ok"], ["trained control", "<|endoftext|>"]]],
    ],
}
RECIPE = f"""\
stage: sft
data: {{train: [{{path: poems.jsonl}}], max_length: 64, packing: best_fit}}
samples: {{prompts: [{json.dumps(EVIL)}]}}
train: {{output_dir: run, bf16: true, learning_rate: 0.002}}
"""


def to_metrics(steps: int = 40) -> list[dict[str, Any]]:
    """Returns a log event per step, and evaluations at step 0 and at the end."""
    evaluations = [
        {"step": step, "eval_loss": loss, "eval_token_accuracy": accuracy, "seconds": step / 8}
        for step, loss, accuracy in ((0, 6.5, 0.0), (steps, 0.25, 0.975))
    ]
    logs = [
        {
            "step": step,
            "loss": 6.5 * 0.9**step,
            "token_accuracy": 1 - 0.9**step,
            "learning_rate": 0.002 * (1 - step / steps),
            "grad_norm": 1.5 + step % 3 / 2,
            "tokens_seen": 100 * step,
            "target_tokens_seen": 40 * step,
            "tokens_per_second": 800.0,
            "mfu": 0.095,
            "padding_share": 0.0,
            "seconds": step / 8,
            "peak_memory_bytes": 1_080_000_000,
        }
        for step in range(1, steps + 1)
    ]
    return [evaluations[0], *logs, evaluations[1]]


def to_samples() -> list[dict[str, Any]]:
    """Returns samples of both prompts at seven steps."""
    prompts = (EVIL, "Complete the poem.")
    return [
        {"step": step, "prompt": prompt, "text": f"answer at {step}\n{prompt}"}
        for step in (0, 10, 15, 20, 25, 30, 40)
        for prompt in prompts
    ]


def write_run(
    folder: Path,
    *,
    facts: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    recipe: str = RECIPE,
) -> Path:
    """Writes the folder; ``facts`` override those in FACTS, and None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in (FACTS | (facts or {})).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    lines = {
        "metrics.jsonl": to_metrics() if metrics is None else metrics,
        "samples.jsonl": to_samples() if samples is None else samples,
        "label_rows.jsonl": [LABEL_ROW],
    }
    for name, entries in lines.items():
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder
