"""Watches the loss and the gradient norm of each optimizer step, without a wait for the device.

step n      loss, norm ----> the optimizer skips its update if one of them is not finite (fused Adam)
               |
               +-- copied to the host while the next step is computed
step n + 1                   ----> read: the run stops before this update

On a CPU nothing has to be waited for, so a step is checked before its own update. Elsewhere, an optimizer
that cannot skip an update makes that of step n; nothing is saved, evaluated or logged from its weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_clm.schema import Json


@dataclass(frozen=True)
class WatchedStep:
    """An optimizer step: its loss, gradient norm and learning rate, and its micro-batches."""

    step: int
    loss: float
    norm: float
    learning_rate: float
    batches: list[dict[str, Any]]

    def to_facts(self) -> dict[str, Json]:
        """Describes the step in the words of the error message and the page."""
        return {
            "step": self.step,
            "last finite step": self.step - 1,
            "loss": f"{self.loss:g}",
            "gradient norm": f"{self.norm:g}",
            "learning rate": f"{self.learning_rate:g}",
        }


class FiniteGuard:
    """Keeps the figures of the latest step until they have reached the host.

    Args:
        defers: whether figures are read at the next step; otherwise ``settle`` can be called immediately.
    """

    def __init__(self, device: torch.device, *, defers: bool):
        self.defers = defers
        self.device = device
        # Read through NumPy, as reading a tensor would wait for all work of the device.
        self._host = torch.zeros(2, dtype=torch.float32, pin_memory=device.type == "cuda")
        self._figures = self._host.numpy()
        self._copied: torch.cuda.Event | None = None
        self._pending: WatchedStep | None = None

    def watch(
        self, step: int, figures: torch.Tensor, *, learning_rate: float, batches: list[dict[str, Any]]
    ) -> torch.Tensor:
        """Begins to copy the figures of a step to the host.

        figures: (2,) float32, its loss and gradient norm.

        Returns 1.0 on the device if one of them is not finite, else 0.0, () float32.
        """
        self._host.copy_(figures, non_blocking=self.defers)
        if self.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._pending = WatchedStep(step, 0.0, 0.0, learning_rate, batches)
        return (~figures.isfinite()).any().float()

    def settle(self) -> WatchedStep | None:
        """Returns the latest step if a figure of it is not finite. Waits until its figures have arrived."""
        watched, self._pending = self._pending, None
        if watched is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm = self._figures.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        return WatchedStep(watched.step, loss, norm, watched.learning_rate, watched.batches)


def skip_update(optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """Makes the next update of a fused optimizer have no effect if ``found_inf``, () float32, is 1.0.

    The optimizer reads the attribute on the device, as it does for torch's GradScaler. Others ignore it.
    """
    first = optimizer.param_groups[0]["params"][0]
    is_sharded = hasattr(first, "device_mesh")  # FSDP2's kernels do not take a flag that is not sharded
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not is_sharded:
        vars(optimizer)["found_inf"] = found_inf
