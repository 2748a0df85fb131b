"""What keeps a run as it is: looking at the model draws no random numbers, and a step that fails is shown."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_clm.pages.inspection import write_labels
from hf_clm.pages.rows import Vocabulary, to_rows


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leaves the random states of Python, NumPy and torch, on the CPU and this device, as it found them.

    What evaluates, samples or tests a model runs inside: else training would go on with other dropout.
    """
    draws: list[tuple[Any, Any]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if device.type != "cpu":
        own = getattr(torch, device.type)  # torch.cuda, torch.mps, torch.xpu
        draws.append((own.get_rng_state, own.set_rng_state))
    states = [get() for get, _ in draws]
    try:
        yield
    finally:
        for (_, put), state in zip(draws, states, strict=True):
            put(state)


def draw_apart(loader: DataLoader, *, seed: int) -> DataLoader:
    """Lets a loader draw the seed of its workers from a generator of its own, not from that of dropout.

    Workers that persist are seeded once, others in every epoch: a run that goes on would draw differently.
    """
    own: Any = getattr(loader, "base_dataloader", loader)  # of accelerate's
    own.generator = torch.Generator().manual_seed(seed)
    return loader


def write_diverged(
    folder: Path,
    batches: Sequence[dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    facts: dict[str, Any],
) -> Path:
    """Writes ``diverged.html``, every row of the step's micro-batches below ``facts``; returns its path."""
    path = folder / "diverged.html"
    rows = []
    for batch in batches:
        rows += to_rows(batch, first_number=len(rows))
    write_labels(path, rows, vocabulary=Vocabulary(tokenizer), facts=facts)
    return path
