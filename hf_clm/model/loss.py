"""The loss at the target positions only, in chunks, with its gradients computed on the way: no (T, V) logits.

stock   hidden (T, H) -> logits (T, V) -> a float32 copy -> log-softmax -> gradients, all of them at once
here    hidden (N, H) of the N targets -> logits of a chunk -> its loss and its gradients -> the next chunk

The head keeps its place in the model and its weight. While a TargetLoss is ``measuring``, the head hands on
the hidden states, and ``model.loss_function`` (transformers lets us set it) applies the weight to them. Both
happen inside the model's forward, where DDP and FSDP2 expect a weight to be used. At any other time the model
is stock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from hf_clm.model.load import without_adapters
from hf_clm.schema import IGNORE_INDEX

CHUNK_TOKENS = {"cpu": 1024}  # rows of logits in one matrix product
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}  # of a chunk's logits: fewer rows where the vocabulary is large
ADDED_ROWS = {"cpu": 2**14}  # rows of the weight's gradient that are added at once: a CPU adds a float32 copy
BLOCK_TOKENS = {"cpu": 32}  # rows in one softmax: as much as a core's cache holds; elsewhere a whole chunk
BLOCK_LOGITS = 2**18  # of a softmax at least: a vocabulary of characters takes more rows


@dataclass(frozen=True)
class LossOptions:
    """Terms beside the likelihood.

    label_smoothing: e, for targets that are (1 - e) one-hot and e uniform.
    z_loss: weight of the squared logsumexp, which keeps logits from drifting (PaLM, arXiv:2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class TokenFigures:
    """What one pass found of N places: ``nll`` (N,) float32, nats; ``correct``, ``is_target`` (N,) bool."""

    nll: torch.Tensor
    correct: torch.Tensor
    is_target: torch.Tensor


class TargetLoss:
    """The loss of one model. After a forward, ``figures`` holds what was found of each target.

    Figures are not weighted; the loss is, where ``measuring`` was given weights.
    """

    def __init__(self, model: PreTrainedModel, options: LossOptions):
        self.stock: Any = model.loss_function
        self.head: Any = model.get_output_embeddings()
        self.options = options
        self.is_measuring = False
        self.figures: TokenFigures | None = None
        self._deferred: torch.Tensor | None = None
        self._label_weights: torch.Tensor | None = None

    @contextmanager
    def measuring(self, label_weights: torch.Tensor | None = None) -> Iterator[None]:
        """Inside, the model's forward computes this loss, and its ``logits`` are hidden states.

        label_weights: float32, how much the loss of each label counts, in the shape of the batch's
            ``shift_labels`` or, where it has none, of its ``labels``. None counts each once. They do not go
            through the model, so its forward need not take them.
        """
        self.is_measuring, self.figures, self._label_weights = True, None, label_weights
        try:
            yield
        finally:
            self.is_measuring, self._deferred, self._label_weights = False, None, None

    def defer(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head returns while measuring."""
        if not torch.compiler.is_compiling():
            self._deferred = hidden
        return hidden

    def __call__(self, logits: torch.Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As a model calls its loss_function; ``shift_labels`` (1, N) come from the collator.

        Returns the sum over the targets, divided by ``num_items_in_batch`` (targets of the whole step, or the
        sum of their weights) or, where that is not given, by those of the batch.
        """
        if not self.is_measuring:
            return self.stock(logits, labels, *args, **kwargs)
        if not torch.compiler.is_compiling():
            assert logits is self._deferred, "the model does more with its logits: see why_not"
        measure: Any = self._measure  # the decorator hides its parameters
        return measure(logits, labels, kwargs)

    @torch.compiler.disable  # its shapes change with every batch
    def _measure(self, *inputs: Any) -> torch.Tensor:
        hidden, labels, options = inputs
        shifted, items = options.get("shift_labels"), options.get("num_items_in_batch")
        weights = self._label_weights
        if shifted is not None:
            rows, targets = hidden.flatten(0, -2), shifted.flatten()
            weights = None if weights is None else weights.flatten()
        else:
            at = labels[:, 1:] != IGNORE_INDEX
            rows, targets = hidden[:, :-1][at], labels[:, 1:][at]
            weights = None if weights is None else weights[:, 1:][at]
        total, nll, correct = measure_targets(
            rows,
            self.head.weight,
            bias=self.head.bias,
            targets=targets,
            options=self.options,
            target_weights=weights,
        )
        self.figures = TokenFigures(nll, correct, targets != IGNORE_INDEX)
        return total / (sum_weights(targets, weights) if items is None else items)


class DeferringHead(torch.nn.Linear):
    """A head that leaves its matrix product to the loss while that is measuring."""

    target_loss: TargetLoss

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.target_loss.defer(input) if self.target_loss.is_measuring else super().forward(input)


def use_target_loss(model: PreTrainedModel, options: LossOptions | None = None) -> TargetLoss:
    """Changes the model: its loss becomes a TargetLoss, its head a DeferringHead with the same weight.

    ``why_not`` must have found no reason against it.
    """
    model = without_adapters(model)
    loss = model._loss_function if isinstance(getattr(model, "_loss_function", None), TargetLoss) else None
    loss = loss or TargetLoss(model, LossOptions())
    loss.options = options or LossOptions()
    loss.head.__class__ = DeferringHead
    loss.head.target_loss = loss
    model.loss_function = loss
    return loss


def why_not(model: PreTrainedModel) -> str:
    """Why a model needs its own loss; empty where TargetLoss equals it. Runs the model on two tokens."""
    model = without_adapters(model)
    head: Any = model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, DeferringHead):
        return f"its head is a {type(head).__module__}.{type(head).__name__}, no plain matrix product"
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return "DeepSpeed ZeRO-3 gathers a weight inside its own layer only"
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, given, found: seen.append(found))
    stock, was_training = model.loss_function, model.training

    def compare(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits)
        return logits.new_zeros(())

    tokens = torch.zeros((1, 2), dtype=torch.int64, device=head.weight.device)
    try:
        model.loss_function = compare
        model.eval()
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens, use_cache=False)
    finally:
        hook.remove()
        model.loss_function = stock
        model.train(was_training)
    is_plain = len(seen) == 2 and seen[0] is seen[1]
    return "" if is_plain else "it does more with its logits than a matrix product"


def logit_loss(
    outputs: Any,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_weights: torch.Tensor,
    label_smoothing: float,
    balance: float,
) -> torch.Tensor:
    """The weighted loss () for a model that needs its own, as a Trainer calls its ``compute_loss_func``.

    outputs: of the model, with logits (B, T, V) and, where it reports one, the loss of its experts' balance,
        which counts ``balance``. The model was given no labels, so it has added nothing itself.
    labels, label_weights: (B, T) int64 and float32, unshifted.
    """
    at = labels[:, 1:] != IGNORE_INDEX
    targets, weights = labels[:, 1:][at], label_weights[:, 1:][at]
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1][at].float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    items = sum_weights(targets, weights) if num_items_in_batch is None else num_items_in_batch
    loss = (losses * weights).sum() / items
    of_experts = outputs.get("aux_loss")
    return loss if of_experts is None else loss + balance * of_experts


def tally(labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """(2,) float64: the sum of the weights of a batch's labels, and their number; both (B, T), unshifted."""
    is_target = labels[:, 1:] != IGNORE_INDEX
    count = is_target.sum().double()
    return torch.stack([count if weights is None else (weights[:, 1:].double() * is_target).sum(), count])


def sum_weights(targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What a mean over targets (N,) divides by, (): their number or the sum of their weights; 1 for none."""
    is_target = targets != IGNORE_INDEX
    if weights is None:
        return is_target.sum().clamp(min=1)
    total = (is_target * weights).sum()
    return torch.where(total > 0, total, 1.0)


def chunk_rows(rows: int, vocabulary: int, *, device: str, itemsize: int) -> int:
    """How many of ``rows`` have logits at one time; ``itemsize``: bytes of a logit."""
    by_size = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (vocabulary * itemsize)
    return max(1, min(rows, CHUNK_TOKENS.get(device, rows), by_size))


def measure_targets(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    options: LossOptions,
    target_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss () float32; of each target its nll (N,) float32, and whether it was guessed (N,) bool.

    hidden (N, H); weight (V, H); bias (V,) or None; targets (N,) int64, -100 where there is none;
    target_weights (N,) float32, by which the sum multiplies the loss of each target, or None. Only the
    sum has a gradient. Computes in the autocast dtype where autocast is on; softmax and sums are float32.
    """
    if torch.is_grad_enabled():
        return _TargetLossFunction.apply(hidden, weight, bias, targets, target_weights, options)
    found = _measure_chunks(
        hidden,
        (weight, bias),
        targets=targets,
        target_weights=target_weights,
        options=options,
        needs=(False, False, False),
    )
    return found.total, found.nll, found.correct


class _TargetLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight, bias, targets, target_weights, options = inputs
        needs = tuple(ctx.needs_input_grad[:3])
        found = _measure_chunks(
            hidden,
            (weight, bias),
            targets=targets,
            target_weights=target_weights,
            options=options,
            needs=needs,
        )
        ctx.gradients, ctx.dtypes = (
            found.gradients,
            [part if part is None else part.dtype for part in inputs[:3]],
        )
        ctx.mark_non_differentiable(found.nll, found.correct)
        return found.total, found.nll, found.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> tuple[torch.Tensor | None, ...]:
        both = zip(ctx.gradients, ctx.dtypes, strict=True)
        scaled = [part if part is None else part.mul_(outputs[0]).to(dtype) for part, dtype in both]
        ctx.gradients = None  # as large as the head: not kept while the rest of the model goes backward
        return (*scaled, None, None, None)


@dataclass
class _Found:
    total: torch.Tensor
    nll: torch.Tensor
    correct: torch.Tensor
    gradients: list[
        torch.Tensor | None
    ]  # of the sum, by hidden, weight and bias; None where it is not needed


def _measure_chunks(
    hidden: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor | None],
    *,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> _Found:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    is_target, at = targets != IGNORE_INDEX, targets.clamp(min=0)
    scale = is_target if target_weights is None else is_target * target_weights  # of each loss in the sum
    loss, nll = (hidden.new_empty(len(at), dtype=torch.float32) for _ in range(2))
    best = torch.empty_like(at)
    with torch.autocast(kind, enabled=False):
        weight, bias = head[0].to(dtype), None if head[1] is None else head[1].to(dtype)
        rows = hidden.to(dtype)
        by_hidden = torch.empty_like(rows) if needs[0] else None
        by_weight, by_bias = (
            torch.zeros_like(part, dtype=torch.float32) if part is not None and need else None
            for part, need in zip(head, needs[1:], strict=True)
        )
        for chunk in _chunks(len(rows), weight):
            logits = torch.nn.functional.linear(rows[chunk], weight, bias)
            for block in _blocks(chunk, kind, vocabulary=weight.shape[0]):
                part = logits[block.start - chunk.start : block.stop - chunk.start]
                loss[block], nll[block], best[block] = _to_gradient(part, at[block], options=options)
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[chunk])
            # the factor of a row is applied where it is H wide, not to its V logits
            if by_weight is not None:
                scaled = (rows[chunk] * scale[chunk, None]).to(dtype)
                _add_product(logits.T, scaled, total=by_weight)
            if by_bias is not None:
                by_bias += logits.T.float() @ scale[chunk].float()
            del logits, part  # before the next chunk's are made
        if by_hidden is not None:
            by_hidden *= scale[:, None]
    return _Found(
        (loss * scale).sum(), nll * is_target, (best == at) & is_target, [by_hidden, by_weight, by_bias]
    )


def _to_gradient(
    logits: torch.Tensor, at: torch.Tensor, *, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns the logits (n, V), in place, into the gradient of the loss.

    Returns loss and negative log-likelihood (n,), and the token with the largest logit (n,).
    """
    smoothing, column = options.label_smoothing, at[:, None]
    top, best = logits.max(dim=-1)
    softmax = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # the largest share is at least 1 / V: its logarithm is safe where that of the target's share is not
    log_sum = top.float() - softmax.gather(1, best[:, None])[:, 0].log()
    nll = log_sum - logits.gather(1, column)[:, 0].float()
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (log_sum - logits.mean(dim=-1, dtype=torch.float32))
        softmax -= smoothing / logits.shape[-1]
    if options.z_loss:
        loss = loss + options.z_loss * log_sum**2
        softmax += 2 * options.z_loss * log_sum[:, None] * torch.softmax(logits, dim=-1, dtype=torch.float32)
    softmax.scatter_add_(1, column, softmax.new_full(column.shape, smoothing - 1))
    logits.copy_(softmax)
    return loss, nll, best


def _add_product(left: torch.Tensor, right: torch.Tensor, *, total: torch.Tensor) -> None:
    """Adds a matrix product to ``total``, a float32 sum."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        product = left @ right
        for rows in _slices(0, len(total), size=ADDED_ROWS.get(total.device.type, len(total))):
            total[rows] += product[rows]


def _chunks(rows: int, weight: torch.Tensor) -> Iterator[slice]:
    size = chunk_rows(rows, weight.shape[0], device=weight.device.type, itemsize=weight.element_size())
    return _slices(0, rows, size=size)


def _blocks(chunk: slice, kind: str, *, vocabulary: int) -> Iterator[slice]:
    size = BLOCK_TOKENS.get(kind, max(1, chunk.stop - chunk.start))
    return _slices(chunk.start, chunk.stop, size=max(size, BLOCK_LOGITS // vocabulary))


def _slices(first: int, last: int, *, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, last)) for start in range(first, last, size))
