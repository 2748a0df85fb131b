"""Loss at target positions only, computed in chunks together with its gradients, without (T, V) logits.

stock   hidden (T, H) -> logits (T, V) -> float32 copy -> log-softmax -> gradients, all at once
here    hidden (N, H) of the N targets -> logits of a chunk -> its loss and gradients -> the next chunk

The head stays in the model and keeps its weight. While a TargetLoss is ``measuring``, the head returns its
input, the hidden states, and ``model.loss_function`` (a public setter in transformers) applies the weight.
Both happen inside the model's forward, where DDP and FSDP2 expect weights to be used. Otherwise the model
works as usual.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from hf_clm.machine import widest_float
from hf_clm.model.load import without_adapters
from hf_clm.schema import IGNORE_INDEX

LOGIT_CHUNK_TOKENS = {"cpu": 1024}  # rows of logits in one matrix product
LOGIT_CHUNK_BYTES = {
    "cpu": 2**28,
    "cuda": 2**30,
}  # limit of a chunk's logits: fewer rows for large vocabularies
ADDED_ROWS = {"cpu": 2**14}  # rows of the weight's gradient added at once: a CPU makes a float32 copy of them
BLOCK_TOKENS = {"cpu": 32}  # rows in one softmax, which fit into a core's cache; elsewhere, a complete chunk
BLOCK_LOGITS = 2**18  # minimum for a softmax: small vocabularies take more rows
FLOAT16_GRADIENT = 2.0**10  # the largest gradient of a float16 logit; a probability of 1e-10 is not 0


@dataclass(frozen=True)
class LossOptions:
    """Terms of the loss besides the likelihood.

    label_smoothing: e, for targets that are (1 - e) one-hot and e uniform.
    z_loss: weight of the squared logsumexp, which keeps logits from drifting (PaLM, arXiv:2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class TokenFigures:
    """Figures of N positions: ``nll`` (N,) float32, in nats; ``correct``, ``is_target`` (N,) bool."""

    nll: torch.Tensor
    correct: torch.Tensor
    is_target: torch.Tensor


class TargetLoss:
    """The loss of one model. After a forward pass, ``figures`` has the figures of each target.

    Figures are never weighted; the loss is, if ``measuring`` is given weights.
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
        """Makes the model's forward compute this loss; its ``logits`` are then hidden states.

        label_weights: float32 weight of each label, in the shape of the batch's ``shift_labels`` or, if it
            has none, of its ``labels``. None weights all labels equally. They are not passed through the
            model, whose forward may not accept them.
        """
        self.is_measuring, self.figures, self._label_weights = True, None, label_weights
        try:
            yield
        finally:
            self.is_measuring, self._deferred, self._label_weights = False, None, None

    def defer(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the head's input as its output, and records it."""
        if not torch.compiler.is_compiling():
            self._deferred = hidden
        return hidden

    def __call__(self, logits: torch.Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the loss, called by the model as its loss_function; ``shift_labels`` (1, N) come from the
        collator.

        Returns the sum over the targets divided by ``num_items_in_batch`` (the number of targets in the
        optimizer step, or the sum of their weights); by default, by those of the batch.
        """
        if not self.is_measuring:
            return self.stock(logits, labels, *args, **kwargs)
        if not torch.compiler.is_compiling():
            assert logits is self._deferred, "the model transforms its logits: see why_not"
        measure: Any = self._measure  # its decorator hides the parameters from the type checker
        return measure(logits, labels, kwargs)

    @torch.compiler.disable  # shapes change with every batch
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
    """A head that leaves its matrix product to the loss while the loss is measuring."""

    target_loss: TargetLoss

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.target_loss.defer(input) if self.target_loss.is_measuring else super().forward(input)


def use_target_loss(model: PreTrainedModel, options: LossOptions | None = None) -> TargetLoss:
    """Replaces the model's loss by a TargetLoss, and its head by a DeferringHead with the same weight.

    ``why_not`` must return an empty string for the model.
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
    """Returns why a model needs its own loss; empty if TargetLoss equals it. Runs the model on two tokens."""
    model = without_adapters(model)
    head: Any = model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, DeferringHead):
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain matrix product"
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return "DeepSpeed ZeRO-3 gathers a weight only inside its own layer"
    logits_seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: logits_seen.append(output))
    stock, was_training = model.loss_function, model.training

    def compare(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits_seen.append(logits)
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
    is_plain = len(logits_seen) == 2 and logits_seen[0] is logits_seen[1]
    return "" if is_plain else "it transforms the output of its head"


def logit_loss(
    outputs: Any,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_weights: torch.Tensor,
    label_smoothing: float,
    balance: float,
) -> torch.Tensor:
    """Returns the weighted loss, a scalar, for a model that needs its own loss (see ``why_not``).

    Args:
        outputs: the model's outputs for a batch without labels: logits (B, T, V) and, for some mixtures of
            experts, the load-balancing loss.
        labels, label_weights: (B, T) int64 and float32, unshifted.
        balance: the coefficient of the load-balancing loss.
    """
    at = labels[:, 1:] != IGNORE_INDEX
    targets, weights = labels[:, 1:][at], label_weights[:, 1:][at]
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1][at].float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    items = sum_weights(targets, weights) if num_items_in_batch is None else num_items_in_batch
    loss = (losses * weights).sum() / items
    balance_loss = outputs.get("aux_loss")
    return loss if balance_loss is None else loss + balance * balance_loss


def tally(labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the sum of the weights of a batch's labels and their number, (2,).

    labels, weights: (B, T), unshifted.
    """
    is_target = labels[:, 1:] != IGNORE_INDEX
    kind = widest_float(labels.device)
    count = is_target.sum(dtype=kind)
    return torch.stack([count if weights is None else (weights[:, 1:].to(kind) * is_target).sum(), count])


def sum_weights(targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the divisor of a mean over targets (N,): their number, or the sum of their weights; at least 1
    if it would be 0."""
    is_target = targets != IGNORE_INDEX
    if weights is None:
        return is_target.sum().clamp(min=1)
    total = (is_target * weights).sum()
    return torch.where(total > 0, total, 1.0)


def chunk_rows(rows: int, vocabulary: int, *, device: str, itemsize: int) -> int:
    """Returns how many of ``rows`` go into one chunk of logits; ``itemsize``: bytes of a logit."""
    by_size = LOGIT_CHUNK_BYTES.get(device, LOGIT_CHUNK_BYTES["cpu"]) // (vocabulary * itemsize)
    return max(1, min(rows, LOGIT_CHUNK_TOKENS.get(device, rows), by_size))


def measure_targets(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    options: LossOptions,
    target_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the summed loss () float32, the nll of each target (N,) float32, and whether each target was
    predicted (N,) bool. Only the sum has a gradient.

    hidden (N, H); weight (V, H); bias (V,) or None; targets (N,) int64, -100 for none; target_weights (N,)
    float32, the weight of each target in the sum, or None. Matrix products use the autocast dtype if
    autocast is on; softmax and sums are float32.
    """
    if torch.is_grad_enabled():
        return _TargetLossFunction.apply(hidden, weight, bias, targets, target_weights, options)
    chunks = _measure_chunks(
        hidden,
        (weight, bias),
        targets=targets,
        target_weights=target_weights,
        options=options,
        needs=(False, False, False),
    )
    return chunks.total, chunks.nll, chunks.correct


class _TargetLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight, bias, targets, target_weights, options = inputs
        needs = tuple(ctx.needs_input_grad[:3])
        chunks = _measure_chunks(
            hidden,
            (weight, bias),
            targets=targets,
            target_weights=target_weights,
            options=options,
            needs=needs,
        )
        ctx.gradients = chunks.gradients
        ctx.dtypes = [part if part is None else part.dtype for part in inputs[:3]]
        ctx.mark_non_differentiable(chunks.nll, chunks.correct)
        return chunks.total, chunks.nll, chunks.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> tuple[torch.Tensor | None, ...]:
        both = zip(ctx.gradients, ctx.dtypes, strict=True)
        scaled = [part if part is None else part.mul_(outputs[0]).to(dtype) for part, dtype in both]
        ctx.gradients = None  # as large as the head: freed before the backward of the other layers
        return (*scaled, None, None, None)


@dataclass
class _ChunkSums:
    """Results over all chunks. ``gradients``: of ``total`` by hidden, weight and bias; None if not needed."""

    total: torch.Tensor
    nll: torch.Tensor
    correct: torch.Tensor
    gradients: list[torch.Tensor | None]


def _measure_chunks(
    hidden: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor | None],
    *,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> _ChunkSums:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    is_target, at = targets != IGNORE_INDEX, targets.clamp(min=0)
    scale = is_target if target_weights is None else is_target * target_weights  # of each loss in the sum
    is_half = dtype == torch.float16 and len(at) > 0
    unit = scale.float().abs().amax().clamp(min=1e-30) / FLOAT16_GRADIENT if is_half else None
    loss, nll = (hidden.new_empty(len(at), dtype=torch.float32) for _ in range(2))
    best = torch.empty_like(at)
    with torch.autocast(kind, enabled=False):
        weight, bias = head[0].to(dtype), None if head[1] is None else head[1].to(dtype)
        rows = hidden.to(dtype)
        by_hidden = torch.empty_like(rows, dtype=torch.float32 if is_half else dtype) if needs[0] else None
        by_weight, by_bias = (
            torch.zeros_like(part, dtype=torch.float32) if part is not None and need else None
            for part, need in zip(head, needs[1:], strict=True)
        )
        for chunk in _chunks(len(rows), weight):
            logits = torch.nn.functional.linear(rows[chunk], weight, bias)
            for block in _blocks(chunk, kind, vocabulary=weight.shape[0]):
                part = logits[block.start - chunk.start : block.stop - chunk.start]
                factor = None if unit is None else scale[block] / unit
                loss[block], nll[block], best[block] = _to_gradient(
                    part, at[block], options=options, factor=factor
                )
            gradients = (None if by_hidden is None else by_hidden[chunk], by_weight, by_bias)
            if unit is None:
                _add_gradients(gradients, logits, rows[chunk], weight, scale=scale[chunk])
            else:
                _add_float16_gradients(gradients, logits, rows[chunk], weight, unit=unit)
            del logits, part  # free them before the next chunk
    return _ChunkSums(
        (loss * scale).sum(), nll * is_target, (best == at) & is_target, [by_hidden, by_weight, by_bias]
    )


def _add_gradients(
    gradients: Sequence[torch.Tensor | None],
    logits: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor,
) -> None:
    """Adds those of a chunk, by its hidden states (n, H), the weight and the bias.

    logits (n, V): their gradients, each row before its factor in ``scale`` (n,).
    """
    by_hidden, by_weight, by_bias = gradients
    if by_hidden is not None:
        torch.mm(logits, weight, out=by_hidden)
        by_hidden *= scale[:, None]
    if by_weight is not None:  # scale the hidden states, H wide, instead of the V logits
        _add_product(logits.T, (rows * scale[:, None]).to(rows.dtype), total=by_weight)
    if by_bias is not None:
        by_bias += logits.T.float() @ scale.float()


def _add_float16_gradients(
    gradients: Sequence[torch.Tensor | None],
    logits: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    unit: torch.Tensor,
) -> None:
    """Same as ``_add_gradients``, for gradients of logits that are multiples of ``unit``.

    A GradScaler scales the loss later, so float16 sums would overflow for any scale. These are float32.
    """
    by_hidden, by_weight, by_bias = gradients
    if by_hidden is not None:
        torch.mul(_float32_product(logits, weight), unit, out=by_hidden)
    if by_weight is not None:
        by_weight.addcmul_(_float32_product(logits.T, rows), unit)
    if by_bias is not None:
        by_bias.addcmul_(logits.sum(dim=0, dtype=torch.float32), unit)


def _float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns a matrix product of float16 as float32, in which it is summed anyway."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _to_gradient(
    logits: torch.Tensor, at: torch.Tensor, *, options: LossOptions, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replaces the logits (n, V), in place, by the gradient of the loss, times ``factor`` (n,).

    Returns the loss (n,), the negative log-likelihood (n,), and the token with the largest logit (n,).
    """
    smoothing, column = options.label_smoothing, at[:, None]
    top, best = logits.max(dim=-1)
    softmax = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # the largest probability is at least 1 / V, so its logarithm is finite; the target's may not be
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
    if factor is not None:
        softmax *= factor[:, None]
    logits.copy_(softmax)
    return loss, nll, best


def _add_product(left: torch.Tensor, right: torch.Tensor, *, total: torch.Tensor) -> None:
    """Adds a matrix product to ``total`` (float32)."""
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
