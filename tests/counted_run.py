"""A program for tests: ``hf-clm`` with a count of its collective operations.

Writes ``collectives-RANK.json`` to the working directory: [name, shape, dtype] of each call from Python.
DDP's reductions of gradients are not called from Python, and not included.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_clm.cli import main

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "reduce",
)


def counted(name: str, calls: list[Any]) -> Any:
    """Wraps a collective operation to record its calls."""
    collective = getattr(torch.distributed, name)

    def call(*args: Any, **options: Any) -> Any:
        tensors = [part for part in (*args, *options.values()) if isinstance(part, torch.Tensor)]
        calls.append([name, list(tensors[-1].shape), str(tensors[-1].dtype)] if tensors else [name, [], ""])
        return collective(*args, **options)

    return call


if __name__ == "__main__":
    found: list[Any] = []
    for name in COLLECTIVES:
        setattr(torch.distributed, name, counted(name, found))
    code = main()
    Path(f"collectives-{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit(code)
