"""A program for tests without a GPU: ``hf-clm`` with accelerate's FSDP2 on CPU processes.

Accelerate shards models on GPUs only, and uses DDP on a CPU, although torch's fully_shard works there too.
This program makes its state treat the processes like processes with GPUs. Offloading does not work, as it
needs pinned memory.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from hf_clm.cli import main
from hf_clm.training import arguments

build_state = AcceleratorState.__init__


def build_spread_state(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    """Sets up FSDP like accelerate for processes with GPUs."""
    is_new = not AcceleratorState._shared_state
    build_state(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if is_new and fsdp_plugin is not None:
        assert self.distributed_type == DistributedType.MULTI_CPU
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)


if __name__ == "__main__":
    AcceleratorState.__init__ = build_spread_state
    arguments.check_spreading = lambda *args, **options: None  # it refuses FSDP on a CPU
    sys.exit(main())
