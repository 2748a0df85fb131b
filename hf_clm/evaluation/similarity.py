"""Which rows pull a model's weights in the direction of a query: the cosine of their gradients.

TracIn (arXiv:2002.08484) estimates how much a training row has changed the loss of another text by the dot
product of their gradients. Here both are normalised: otherwise long and badly learned rows, whose gradients
are large, would be the most similar ones to any text.

One backward pass gives the gradients of all rows of a batch. They are the documents of one packed row, so no
token of one contributes to the gradient of another, and the gradient of a weight matrix is a sum over tokens:

    tokens             d d d d d | e e e          documents d and e of a packed row
    a (T, in)          input of a linear layer    recorded by a hook in the forward pass
    b (T, out)         gradient of its output     from torch.autograd.grad, for all layers at once
    b[0:5].T @ a[0:5]  (out, in)                  the gradient of the layer's weight in d alone
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.errors import ModelError
from hf_clm.evaluation.likelihood import predict_targets
from hf_clm.model.load import is_adapted, without_adapters
from hf_clm.schema import IGNORE_INDEX, TokenizedExample

MAX_WEIGHTS = 2**24  # weights to compare: 64 MiB of float32 for each query
LORA = {"lora_A", "lora_B"}  # names of peft

Matrix: TypeAlias = torch.nn.Linear | Conv1D


@dataclass(frozen=True)
class Matrices:
    """The weight matrices whose gradients are compared: linear layers, by name."""

    modules: dict[str, Matrix]

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(module.weight.numel() for module in self.modules.values())

    def describe(self) -> str:
        """Returns what they are, such as ``28 matrices of the last 4 blocks, 1,234,567 weights``."""
        blocks = {match[0] for name in self.modules if (match := re.match(r".*?\.\d+\.", name))}
        count = f"{len(self.modules)} {'matrix' if len(self.modules) == 1 else 'matrices'}"
        if any(map(_is_lora, self.modules)):
            count += " of the adapters"
        elif blocks:
            count += f" of the last {len(blocks)} blocks" if len(blocks) > 1 else " of the last block"
        return f"{count}, {self.parameters:,} weights"


def choose_matrices(model: PreTrainedModel, *, most: int = MAX_WEIGHTS) -> Matrices:
    """Returns all LoRA matrices of a model with adapters, else its last linear layers.

    Args:
        most: maximum number of weights of a model without adapters, unless its last layer alone has more.
            The head is never among them.

    Raises ModelError if the model has no such matrix.
    """
    head = without_adapters(model).get_output_embeddings()
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module.weight.is_floating_point()
    }
    if is_adapted(model):
        modules = {name: module for name, module in modules.items() if _is_lora(name)}
    else:
        ascending = [(name, module) for name, module in modules.items() if module is not head]
        totals = accumulate(module.weight.numel() for _, module in reversed(ascending))
        count = max(1, sum(total <= most for total in totals))
        modules = dict(ascending[-count:])
    if not modules:
        kind = "LoRA matrices" if is_adapted(model) else "linear layers"
        raise ModelError(f"{type(without_adapters(model)).__name__} has no {kind} to compare", where="model")
    return Matrices(modules)


def similarities(
    model: PreTrainedModel,
    queries: Sequence[TokenizedExample],
    dataset: TokenizedDataset | Sequence[TokenizedExample],
    *,
    tokens_per_batch: int,
    matrices: Matrices | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Returns the cosine of the gradients of each of Q queries and each of N rows, (Q, N) float32.

    The gradient is that of the summed loss of the targets, each times its weight, without dropout. The
    similarity to a row without a gradient, such as one whose targets all have the weight 0, is 0. The model
    is left as it was.

    Args:
        tokens_per_batch: maximum length of a packed row, unless a single row is longer. It does not change
            the result.
        matrices: the weights to compare; by default those of ``choose_matrices``.
        progress: called after each batch with its number of rows.

    Raises ModelError if a query uses none of the matrices.
    """
    matrices = matrices or choose_matrices(model)
    result, done = np.zeros((len(queries), len(dataset)), dtype=np.float32), 0
    with _recording(model, matrices) as calls:
        directions = _directions(model, queries, matrices, calls=calls)
        for rows in _batches(dataset, tokens_per_batch):
            for number, gradient in enumerate(_row_gradients(model, rows, calls), start=done):
                if gradient:
                    result[:, number] = _cosines(directions, gradient).cpu().numpy()
            done += len(rows)
            if progress:
                progress(len(rows))
    return result


# The gradient of each matrix in one row, by name, float32. Those that the row does not use are missing.
_Gradient: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a linear layer in the forward pass: its input, and the edge of the graph at its output."""

    name: str
    input: torch.Tensor
    output: GradientEdge


@contextmanager
def _recording(model: PreTrainedModel, matrices: Matrices) -> Iterator[list[_Call]]:
    """Yields a list that receives each call of the matrices, with gradients for them alone, without dropout
    and autocast."""
    calls: list[_Call] = []
    modes = [(module, module.training) for module in model.modules()]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    hooks = []
    try:
        model.eval()
        model.requires_grad_(False)
        for name, module in matrices.modules.items():
            module.weight.requires_grad_(True)  # else the outputs of the first ones have no gradient
            hooks.append(module.register_forward_hook(_recorder(calls, name)))
        with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)
        for module, is_training in modes:
            module.training = is_training


def _recorder(calls: list[_Call], name: str) -> Callable[..., None]:
    """Returns a forward hook that appends to the calls."""

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:  # the model may compute something without gradients
            # unlike the output, the edge is not affected by an operation in place
            calls.append(_Call(name, inputs[0].detach(), get_gradient_edge(output)))

    return record


def _directions(
    model: PreTrainedModel, queries: Sequence[TokenizedExample], matrices: Matrices, *, calls: list[_Call]
) -> _Gradient:
    """Returns the normalised gradients of Q queries, (Q, weights) float32 for each matrix.

    Raises ModelError if a query uses none of the matrices.
    """
    shapes = {name: (len(queries), module.weight.numel()) for name, module in matrices.modules.items()}
    directions = {name: torch.zeros(shape, device=model.device) for name, shape in shapes.items()}
    for number, query in enumerate(queries):
        (gradient,) = _row_gradients(model, [query], calls)
        if not gradient:
            raise ModelError("the model does not call any of the layers to compare", where="model")
        norm = _norm(gradient)
        for name, part in gradient.items():
            directions[name][number] = torch.where(norm > 0, part.flatten() / norm, 0.0)
    return directions


def _batches(
    dataset: TokenizedDataset | Sequence[TokenizedExample], tokens_per_batch: int
) -> Iterator[list[TokenizedExample]]:
    """Yields successive rows of at most ``tokens_per_batch`` tokens together, and at least one."""
    batch, tokens = [], 0
    for row in (dataset[number] for number in range(len(dataset))):
        tokens += len(row["input_ids"])
        if batch and tokens > tokens_per_batch:
            yield batch
            batch, tokens = [], len(row["input_ids"])
        batch.append(row)
    if batch:
        yield batch


def _row_gradients(
    model: PreTrainedModel, rows: Sequence[TokenizedExample], calls: list[_Call]
) -> Iterator[_Gradient]:
    """Yields the gradient of each row, all from one backward pass if possible.

    Experts receive some of the tokens, in an order of their own. It is then unknown which row a token of
    theirs belongs to, so each row gets a pass of its own.
    """
    calls.clear()
    loss = _summed_loss(model, rows)
    outputs = [call.output for call in calls]
    by_output = torch.autograd.grad(loss, outputs, allow_unused=True) if calls else ()
    used = [(call, grad) for call, grad in zip(calls, by_output, strict=True) if grad is not None]
    bounds = list(accumulate((len(row["input_ids"]) for row in rows), initial=0))
    if len(rows) > 1 and any(call.input.shape[:-1] != (1, bounds[-1]) for call, _ in used):
        for row in rows:
            yield from _row_gradients(model, [row], calls)
        return
    states = [(call.name, call.input.flatten(0, -2), grad.flatten(0, -2)) for call, grad in used]
    spans = [slice(start, stop) for start, stop in pairwise(bounds)] if len(rows) > 1 else [slice(None)]
    for tokens in spans:
        gradient: _Gradient = {}
        for name, a, b in states:
            product = b[tokens].float().T @ a[tokens].float()
            gradient[name] = gradient[name] + product if name in gradient else product
        yield gradient


def _summed_loss(model: PreTrainedModel, rows: Sequence[TokenizedExample]) -> torch.Tensor:
    """Returns the sum, not the mean, so that the gradient of one row does not depend on the others."""
    logits, targets, weights = predict_targets(model, rows)
    nll = cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (nll * weights).sum()


def _cosines(directions: _Gradient, gradient: _Gradient) -> torch.Tensor:
    """Returns the cosine of one gradient and each of Q directions, (Q,) float32; 0 for a gradient of 0."""
    norm = _norm(gradient)
    products = [directions[name] @ part.flatten() for name, part in gradient.items()]
    return torch.where(norm > 0, torch.stack(products).sum(dim=0) / norm, 0.0)


def _norm(gradient: _Gradient) -> torch.Tensor:
    return torch.stack([torch.linalg.vector_norm(part) for part in gradient.values()]).norm()


def _is_lora(name: str) -> bool:
    return not LORA.isdisjoint(name.split("."))
