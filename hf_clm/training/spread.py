"""What a model that FSDP2 spreads over the processes needs beside the Trainer: precision, and whole files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import StateDictType
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def spreading_plugin(accelerator: Accelerator) -> Any:
    """Accelerate's settings for FSDP; None where the model is not spread by it."""
    return getattr(accelerator.state, "fsdp_plugin", None)


def settle_precision(accelerator: Accelerator) -> None:
    """Changes how FSDP2 computes in 16 bits: gradients of the processes are summed in float32, as by DDP.

    Accelerate would sum them in 16 bits, and round the loss to 3 digits.
    """
    plugin = spreading_plugin(accelerator)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def saving_whole(accelerator: Accelerator, folder: str) -> Iterator[None]:
    """Inside, a model is gathered to be saved, also where checkpoints are written in parts.

    In parts (SHARDED_STATE_DICT) the Trainer would save no model at all. A checkpoint stays in parts.
    """
    plugin = spreading_plugin(accelerator)
    if plugin is None or Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
        yield
        return
    kind = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


def without_copies(model: Any, state_dict: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Drops the second name of weights that are tied: gathered, they are no longer one tensor."""
    if state_dict is None:
        return None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: part for name, part in state_dict.items() if tied.get(name) not in state_dict}
