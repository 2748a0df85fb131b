"""The attention and the loss of each kind of GPU, with fake tensors: a value that is read raises an error."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_clm.model.attention import TAKES_GROUPS, packed_attention
from hf_clm.model.loss import LossOptions, measure_targets

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="see make test-fake-cuda"),
]
VARLEN = "torch_attn::_varlen_attn"
FLASH, EFFICIENT = (f"aten::_scaled_dot_product_{name}_attention" for name in ("flash", "efficient"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = {"capability": (9, 0), "dtype": BF16, "width": 64, "dropout": 0.0}
MASKED: dict[str, dict[str, Any]] = {
    "T4": {"capability": (7, 5), "dtype": FP16},
    "float32": {"dtype": FP32},
    "width 100": {"width": 100},
    "width 512": {"width": 512},
    "dropout": {"dropout": 0.1},
}
SIX, MANY = [10, 100, 100, 200, 290, 300], [*range(5, 105, 5), 200, 300]  # ends; at most 100 tokens long


class Calls(TorchDispatchMode):
    """Records the names of operators and the shapes of their first two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[list[int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [part for part in args[:2] if isinstance(part, torch.Tensor)]
        self.shapes.setdefault(func.name(), []).extend(list(part.shape) for part in tensors)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attend(monkeypatch):
    """Computes packed attention of 300 tokens with 4 query heads and 2 key heads, on a GPU, and backwards."""

    def run(
        ends: list[int], *, capability: tuple[int, int], dtype: torch.dtype, width: int, dropout: float
    ) -> torch.Tensor:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        shapes = [(1, heads, 300, width) for heads in (4, 2, 2)]
        states = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
        bounds = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
        options: Any = {"cu_seq_lens_q": bounds, "max_length_q": 100, "dropout": dropout}
        output = packed_attention(torch.nn.Module(), *states, None, **options)[0]
        output.sum().backward()
        assert [part.grad.shape for part in states] == shapes
        return output

    return run


def test_an_ampere_or_newer_gpu_computes_all_documents_with_one_fused_kernel(attend):
    with FakeTensorMode(), Calls() as calls:
        output = attend(SIX, **H100)

    assert (output.shape, output.dtype) == ((1, 300, 4, 64), BF16)
    key_heads = 2 if TAKES_GROUPS else 4  # since torch 2.12, keys and values are not expanded
    assert calls.shapes[VARLEN] == [[300, 4, 64], [300, key_heads, 64]]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("ends", [SIX, MANY], ids=["rows", "blocks"])
def test_elsewhere_one_call_of_a_fused_kernel_computes_all_documents_without_their_lengths(
    ends, name, attend
):
    settings = {**H100, **MASKED[name]}

    with FakeTensorMode(), Calls() as calls:
        output = attend(ends, **settings)

    assert (output.shape, output.dtype) == ((1, 300, 4, settings["width"]), settings["dtype"])
    shapes = calls.shapes.get(FLASH, []) + calls.shapes.get(EFFICIENT, [])
    width = 104 if name == "width 100" else settings["width"]
    queries, keys = ([6, 4, 100, width],) * 2 if ends is SIX else ([3, 4, 128, width], [3, 4, 256, width])
    assert shapes == [queries, keys]
    assert not {VARLEN, "aten::bmm"} & calls.shapes.keys()


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_both_kinds_are_compiled_to_one_graph_for_any_documents(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    torch._dynamo.reset()
    counter = CompileCounter()

    @partial(torch.compile, fullgraph=True, backend=counter)
    def attend(query: Any, key: Any, value: Any, bounds: Any) -> torch.Tensor:
        options: Any = {"cu_seq_lens_q": bounds, "max_length_q": 100}
        return packed_attention(torch.nn.Module(), query, key, value, None, **options)[0]

    with FakeTensorMode():
        for ends in ([100, 100, 200, 290, 300], [50, 150, 150, 250, 300]):
            states = [torch.randn(1, heads, 300, 64, device="cuda", dtype=FP16) for heads in (4, 2, 2)]
            attend(*states, torch.tensor([0, *ends], dtype=torch.int32, device="cuda"))

    assert counter.frame_count == 1


def test_in_float16_the_gradients_of_the_loss_are_float32_products():
    with FakeTensorMode(), Calls() as calls:
        parts = [
            torch.randn(shape, device="cuda", requires_grad=True) for shape in ((30, 16), (50, 16), (50,))
        ]
        hidden, weight, bias = parts
        targets = torch.zeros(30, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", dtype=FP16):
            total = measure_targets(hidden, weight, bias=bias, targets=targets, options=LossOptions())[0]
        total.backward()

    assert [part.grad.dtype for part in parts] == [FP32] * 3
    assert calls.shapes["aten::mm.dtype"] == [[30, 50], [50, 16], [50, 30], [30, 16]]
