"""``hf-clm`` with a count of what its processes hand each other: a program for tests.

Writes ``collectives-RANK.json`` into the working directory: [name, shape, dtype] of each call from Python.
What DDP sums for the gradients goes past Python, and is not in it.
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
    """The collective, which also notes its call."""
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
