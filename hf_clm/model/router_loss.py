"""The loss of a mixture's routers (its experts' balance), weighted as the loss of the tokens is.

The models of transformers compute it once for a micro-batch, and add it to a loss that is already divided
by the targets of the whole step: of 8 micro-batches it would count 8 times. Here it is a mean over documents,
each of which counts as much as its targets do. So the sum over a step is the same however rows are batched,
packed, padded, accumulated or spread over processes. Balance of single sequences: DeepSeek-V3,
arXiv:2412.19437, section 2.1.2.

The model stays as it is. While a RouterLoss is ``weighing``, the function that computes the balance, in the
module of the model's class, is ours; the model multiplies what it returns by its coefficient and adds that.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_clm.errors import ModelError
from hf_clm.model.load import without_adapters
from hf_clm.schema import IGNORE_INDEX

BALANCE = "load_balancing_loss_func"  # in the module of every mixture of transformers
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of the models


class RouterLoss:
    """The routers' loss of one model; ``is_used``: whether the model adds one to its loss.

    Raises ModelError for a model that adds one in a way which cannot be weighted.
    """

    def __init__(self, model: PreTrainedModel):
        own = without_adapters(model)
        self.module: Any = sys.modules[type(own).__module__]
        self.is_used = bool(getattr(own.config.get_text_config(), "output_router_logits", False))
        known = (getattr(own, name) for name in COEFFICIENTS if hasattr(own, name))
        self.coefficient = float(next(known, 0.0))
        if self.is_used and not hasattr(self.module, BALANCE):
            what = "it adds a loss of its routers that cannot be weighted by the targets of a step"
            raise ModelError(what, where="model", fix="set output_router_logits to false in its config")
        self._stock: Any = getattr(self.module, BALANCE, None)
        self._documents = self._weights = torch.empty(0)

    @contextmanager
    def weighing(self, batch: Mapping[str, Any], items: torch.Tensor | int | None) -> Iterator[None]:
        """Inside, the model adds the balance of the batch's documents, each by its share of a step's targets.

        batch: of one of our collators, with ``labels`` and perhaps ``loss_weights``.
        items: targets of the whole step, or the sum of their weights; None: those of the batch.
        """
        if not self.is_used:
            yield
            return
        self._documents = number_documents(batch)
        self._weights = weigh_documents(batch, self._documents)
        self._weights /= self._weights.sum().clamp(min=1e-9) if items is None else items
        own: Any = torch.compiler.disable(self._balance)  # the number of documents changes with every batch
        setattr(self.module, BALANCE, own)
        try:
            yield
        finally:
            setattr(self.module, BALANCE, self._stock)

    def _balance(self, gate_logits: tuple[torch.Tensor, ...], experts: int, top_k: int, *others: Any) -> Any:
        if any(gate.shape != (len(self._documents), experts) for gate in gate_logits):
            # doge chooses experts by pairs of keys: all tokens at once, by the share of the micro-batch
            return self._stock(gate_logits, experts, top_k, *others) * self._weights.sum()
        balance = balance_documents(gate_logits, self._documents, count=len(self._weights), top_k=top_k)
        return (balance * self._weights).sum()


def number_documents(batch: Mapping[str, Any]) -> torch.Tensor:
    """(B * T,) int64: the number of each token's document; padding has the number after the last one."""
    labels, bounds, mask = batch["labels"], batch.get("cu_seq_lens_q"), batch.get("attention_mask")
    rows, width = labels.shape
    if bounds is not None:
        numbers = torch.arange(len(bounds) - 1, device=labels.device)
        return torch.repeat_interleave(numbers, bounds.diff(), output_size=width)
    numbers = torch.arange(rows, device=labels.device)[:, None].expand(rows, width)
    return (numbers if mask is None else numbers.where(mask.bool(), rows)).flatten()


def weigh_documents(batch: Mapping[str, Any], documents: torch.Tensor) -> torch.Tensor:
    """(D,) float32: the number of targets of each document, or the sum of their weights."""
    labels, bounds, weights = batch["labels"], batch.get("cu_seq_lens_q"), batch.get("loss_weights")
    count = len(labels) if bounds is None else len(bounds) - 1
    is_target = (labels != IGNORE_INDEX).float()
    is_target[:, 0] = 0.0  # nothing stands before it
    counted = is_target if weights is None else is_target * weights
    return counted.new_zeros(count + 1).index_add_(0, documents, counted.flatten())[:count]


def balance_documents(
    gate_logits: tuple[torch.Tensor, ...], documents: torch.Tensor, *, count: int, top_k: int
) -> torch.Tensor:
    """(count,) float32: of each document what transformers' function says of its tokens alone.

    That is E times the sum over the E experts of the share of tokens that an expert is given (top_k in all)
    and its mean probability, over all layers: Switch Transformer, arXiv:2101.03961, equations 4 to 6.

    Args:
        gate_logits: of each layer (N, E).
        documents: (N,) int64, ``count`` for padding.
    """
    experts = gate_logits[0].shape[1]
    given, likely = (gate_logits[0].new_zeros((count + 1, experts), dtype=torch.float32) for _ in range(2))
    for gate in gate_logits:
        shares = torch.softmax(gate.to(given.device), dim=-1)
        chosen = torch.topk(shares, top_k, dim=-1).indices
        ones = torch.zeros_like(shares, dtype=torch.float32).scatter_(1, chosen, 1.0)
        given = given.index_add(0, documents, ones)
        likely = likely.index_add(0, documents, shares.float())
    tokens = torch.bincount(documents, minlength=count + 1)[:count, None] * len(gate_logits)
    tokens = tokens.clamp(min=1)  # of a static shape some documents are empty
    return experts * (given[:count] / tokens * (likely[:count] / tokens)).sum(dim=1)
