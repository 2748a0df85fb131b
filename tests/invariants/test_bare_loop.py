"""A run of CLMTrainer equals, step by step, a plain training loop in PyTorch."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import X, tiny_model
from transformers import PreTrainedModel, TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.model.attention import NAME, register
from hf_clm.training.trainer import CLMTrainer

STEPS, WARMUP, ACCUMULATION, RATE, DECAY, CLIP = 10, 2, 2, 3e-3, 0.1, 0.5
ROWS = [
    {
        "input_ids": [1, 2] + [(5 * n + 3 * i) % 256 for i in range(n + 1)],
        "labels": [X, X] + [(5 * n + 3 * i) % 256 for i in range(n + 1)],
    }
    for n in range(24)
]


def linear(step: int) -> float:
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def cosine(step: int) -> float:
    return (
        step / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
    )


def documents(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns input ids and labels of each document of a packed batch."""
    bounds = batch["cu_seq_lens_q"].tolist()
    return [(batch["input_ids"][:, a:b], batch["labels"][:, a:b]) for a, b in pairwise(bounds)]


def bare_loop(
    model: PreTrainedModel, batches: list[dict], factor: Callable[[int], float]
) -> list[dict[str, float]]:
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    logs = []
    for step in range(STEPS):
        pairs = [
            pair
            for batch in batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
            for pair in documents(batch)
        ]
        targets = sum(int((labels[:, 1:] != X).sum()) for _, labels in pairs)
        total = 0.0
        for input_ids, labels in pairs:
            logits = model(input_ids=input_ids, use_cache=False).logits
            nll = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / targets
            nll.backward()
            total += nll.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step)
        optimizer.step()
        optimizer.zero_grad()
        logs.append({"loss": total, "grad_norm": norm, "learning_rate": RATE * factor(step)})
    return logs


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("name", "factor"), [("linear", linear), ("cosine", cosine)])
def test_the_trainer_equals_a_plain_loop(tmp_path, kind, name, factor):
    register()
    model, same = tiny_model(kind), tiny_model(kind)
    model.set_attn_implementation(NAME)
    same.set_attn_implementation("eager")
    batches, collate = [], DataCollatorForPackedCausalLM()

    def recorded(rows: list[dict]) -> dict:
        batches.append(collate(rows))
        return dict(batches[-1])

    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=STEPS,
        warmup_steps=WARMUP,
        lr_scheduler_type=name,
        learning_rate=RATE,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = CLMTrainer(model, arguments, data_collator=recorded, train_dataset=ROWS)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]

    expected = bare_loop(same, batches, factor)

    assert len(logs) == 10
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [log[key] for log in logs] == pytest.approx([log[key] for log in expected], rel=1e-5), key
    for (parameter, weight), other in zip(model.named_parameters(), same.parameters(), strict=True):
        # Adam normalizes gradients: the rounding error of one near zero becomes a full step
        assert torch.allclose(weight, other, atol=5e-5), parameter
    assert logs[-1]["loss"] < logs[0]["loss"]
