"""A GPU that does not exist: the tensors on it have a shape, dtype and device, but no values."""

import traceback
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

LIBRARIES = ("/hf_clm/", "/transformers/", "/accelerate/", "/peft/", "/torch/optim/", "/torch/nn/")


class FakeGpu(TorchDispatchMode):
    """Computes on a CPU as usual, and on ``cuda`` with fake tensors, while it is entered.

    A value that is read is 1. Operands on different devices raise an error, as on a GPU.

    Attributes:
        reads: each place where a value of the GPU is read, for which the program waits for the GPU.
        waits: each place where it waits for a tensor to be copied to the GPU.
        operators: the name of each operator that runs on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.forget()

    def forget(self) -> None:
        """Clears the lists."""
        self.reads: list[str] = []
        self.waits: list[str] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        is_moved = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not is_moved and not any(isinstance(part, FakeTensor) for part in tensors):
            return func(*args, **kwargs)
        self.operators.append(func.name())
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(_caller())
            return 1.0 if args[0].is_floating_point() else 1
        with self.mode:
            result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._record_copy(func, args, kwargs)
        return result

    def _record_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Records a copy between host and GPU, unless it is non-blocking and the host side is pinned."""
        if func is torch.ops.aten.copy_.default:  # (to, source, non_blocking)
            to, source = args[0].device, args[1]
            host, is_free = args[to.type == "cuda"], (*args, False)[2] or kwargs.get("non_blocking")
        else:
            to, source = torch.device(kwargs.get("device") or args[0].device), args[0]
            host, is_free = source, kwargs.get("non_blocking")
        kinds = (source.device.type, to.type)
        if kinds == ("cuda", "cuda") or (is_free and host.device.type == "cpu" and host.is_pinned()):
            return
        if to.type == "cpu":
            self.reads.append(_caller())
        elif source.dim():  # the value of a scalar is an argument of a kernel
            self.waits.append(_caller())


def to_fake_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model that is on the GPU, and stays there. A FakeGpu must be entered."""
    moved: dict[int, torch.Tensor] = {}
    for part in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(part, device="cuda", requires_grad=False)
        is_weight = isinstance(part, torch.nn.Parameter)
        moved[id(part)] = torch.nn.Parameter(empty, part.requires_grad) if is_weight else empty
    fake: Any = deepcopy(model, moved)
    fake.to = lambda *args, **kwargs: fake  # torch cannot move fake weights
    return fake


def _caller() -> str:
    """Returns the innermost line of a library above torch's dispatch."""
    frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in LIBRARIES)]
    if not frames:
        return "the test"
    name = frames[-1].filename
    return f"{name[max(map(name.rfind, LIBRARIES)) + 1 :]}:{frames[-1].lineno} {frames[-1].name}"
