"""The memory of a micro-step on a device, estimated from the configuration or measured.

The peak is the largest of five moments of a micro-step, on top of weights and optimizer:

    loss   | activations | logits x 3 (log-softmax, its gradient, the gradient of the logits)
    head   | activations | logits x 1 | gradient of the output embedding
    both   | activations | logits of a chunk | gradients of the embedding and the targets (model/loss.py)
    layer  | activations | temporary memory of one layer's backward
    end    | gradients   | input embedding, once more if it is tied (its two gradients are summed)

Several GPUs share the model in one of these ways (P = weights, N = GPUs; bytes for float32 AdamW with
bfloat16 autocast):

    way            weights, gradients, optimizer   copies on each GPU
    ddp            16 P                            2 P cast by autocast; 4 P of gradient buckets if N > 1
    fsdp2-grad     16 P / N                        2 P gathered, and the gradient of a layer
    fsdp2          16 P / N                        2 x embeddings and two layers, and the gradient of a layer
    fsdp2-offload  0 (16 P / N on the host)        as fsdp2
    zero3          16 P / N                        as fsdp2, and 2 P / N of bfloat16 weights

fsdp2-grad does not reshard the weights after the forward. ZeRO: arXiv:1910.02054.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_clm.model.load import build_without_memory
from hf_clm.model.loss import BLOCK_TOKENS, TargetLoss, chunk_rows

FLOAT32 = 4  # bytes
# Bytes of optimizer state per byte of trained weights; 2 (Adam's two averages) for all others.
ADAM_STATES = 2.0
OPTIMIZER_STATES = {
    "muon": 1.0,
    "sgd": 0.0,
    "adafactor": 0.02,
    "adamw_bnb_8bit": 0.5,
    "adamw_8bit": 0.5,
    "lion_32bit": 1.0,
}
# On a CPU, freed blocks leave holes in the heap (measured, as fractions of the activations). GPT-2's GELU
# frees four blocks per layer, if they are small enough for the heap; the loss fills some of them. MKL keeps
# buffers.
HEAP_HOLES, GELU_HOLES, LARGEST_HEAP_BLOCK = 0.15, 0.45, 32 * 2**20
LIBRARY_BUFFERS = 16_000_000
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward pass.

    Args:
        tokens: tokens of the micro-batch, including padding.
        longest: tokens of the longest document (or row, if rows are padded).
        chunked_loss: whether the loss is that of hf_clm/model/loss.py; otherwise it is the model's own, with
            the logits of all tokens.
        eval_tokens: tokens of an evaluation batch.
        dtype: dtype of the weights.
        autocast: dtype of matrix products; None without autocast.
        accumulates: whether gradients exist from the start, as in later micro-steps of an optimizer step.
        checkpointing: whether only the input of each layer is kept for the backward.
        trained: the fraction of the weights with gradients and optimizer states. The activations, and the
            gradient of the embedding, are estimated as if all were trained, unless it is 0.
        optimizer_states: bytes of optimizer state per byte of trained weights.
        device: cpu or cuda.
    """

    tokens: int
    longest: int
    chunked_loss: bool = False
    eval_tokens: int = 0
    dtype: str = "float32"
    autocast: str | None = None
    optimizer_states: float = ADAM_STATES
    attention: str = "packed"
    accumulates: bool = False
    checkpointing: bool = False
    trained: float = 1.0
    device: str = "cpu"

    @property
    def weight_bytes(self) -> int:
        return FLOAT32 if self.dtype == "float32" else 2

    @property
    def product_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes


@dataclass(frozen=True)
class Sharding:
    """How ``gpus`` share the model: one ``way`` of the table above."""

    way: str = "ddp"
    gpus: int = 1

    @property
    def share(self) -> float:
        """The fraction of weights, gradients and optimizer on each GPU."""
        return {"ddp": 1.0, "fsdp2-offload": 0.0}.get(self.way, 1 / self.gpus)


ONE_DEVICE = Sharding()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory, each part at its maximum.

    ``weights``, ``gradients`` and ``optimizer`` are those of the complete model; each device has the fraction
    ``share``. ``copies`` are cast or gathered weights, and gradient buckets. ``micro_step`` is the peak on
    top of weights and optimizer, which is less than the sum of gradients, copies, activations and logits.
    ``evaluation`` is the same for an evaluation batch. ``is_rough``: the model's family has never been
    measured, or the model is sharded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    micro_step: int
    evaluation: int = 0
    copies: int = 0
    share: float = 1.0
    is_rough: bool = False

    @property
    def at_rest(self) -> int:
        """Weights and optimizer on each device."""
        return round(self.share * (self.weights + self.optimizer))

    @property
    def total(self) -> int:
        return self.at_rest + max(self.micro_step, self.evaluation)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that the estimate needs; ``parameters`` counts a tied embedding once."""

    family: str  # config.model_type
    layers: int
    width: int
    heads: int
    queries: int  # total width of the query heads
    keys: int  # total width of the key heads
    inner: int  # width inside the MLP
    vocabulary: int
    is_tied: bool
    parameters: int
    dropouts: int  # per layer, without that of the attention
    drops_attention: bool

    @property
    def embedding(self) -> int:
        """The number of weights of the input embedding."""
        return self.width * self.vocabulary

    @property
    def products(self) -> int:
        """The number of weights used in matrix products: all except an untied input embedding."""
        return self.parameters - (0 if self.is_tied else self.embedding)

    @property
    def layer(self) -> int:
        """The number of weights of a layer."""
        return (self.parameters - self.embedding * (1 if self.is_tied else 2)) // self.layers


def read_sizes(config: PretrainedConfig) -> ModelSizes:
    """Reads the sizes from a configuration, whose ``vocab_size`` must be the final number of embedding rows.

    Builds the model on the meta device, without memory, to count its weights. Raises ModelError if
    transformers cannot build the model.
    """
    parameters, family = build_without_memory(config).num_parameters(), config.model_type
    config = config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    drops = [getattr(config, name, 0.0) for name in ("resid_pdrop", "attn_pdrop", "attention_dropout")]
    return ModelSizes(
        family=family,
        layers=config.num_hidden_layers,
        width=width,
        heads=heads,
        queries=heads * head_width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        inner=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width,
        vocabulary=config.vocab_size,
        is_tied=bool(config.tie_word_embeddings),
        parameters=parameters,
        dropouts=2 if drops[0] else 0,
        drops_attention=bool(drops[1] or drops[2]),
    )


def estimate_memory(sizes: ModelSizes, step: MicroStep, sharding: Sharding = ONE_DEVICE) -> MemoryEstimate:
    """Estimates the memory of training on each device."""
    weights = sizes.parameters * step.weight_bytes
    gradients = round(step.trained * weights)
    copies = _copies(sizes, step, sharding)
    activations = _activation_bytes(sizes, step)
    logits = _logits_bytes(sizes, step, tokens=step.tokens)
    local_gradients = round(sharding.share * gradients)
    peak = _peak(sizes, step, base=activations + copies, logits=logits, gradients=local_gradients)
    if step.device == "cpu":
        peak += LIBRARY_BUFFERS + _heap_holes(sizes, step, logits=logits)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=round(gradients * step.optimizer_states),
        activations=activations,
        logits=logits,
        micro_step=peak,
        evaluation=_evaluation_bytes(sizes, step),
        copies=copies,
        share=sharding.share,
        is_rough=sizes.family not in LAYER_BYTES or sharding.way != "ddp",
    )


def measure_memory(
    model: PreTrainedModel, batch: dict[str, Any], *, autocast: str | None = None
) -> int | None:
    """Runs forward and backward; returns their peak memory in bytes, on top of the loaded model.

    Measures the growth of the resident memory on a CPU (None except on Linux), or of the allocated memory on
    a GPU. Changes neither the weights nor the random state, and leaves no gradients. Uses the model's loss,
    which may be a TargetLoss (``use_target_loss``). On a CPU, the heap grows by another quarter in later
    micro-steps (measured), because freed blocks leave holes.

    Args:
        batch: a batch from a collator, on any device; use the longest one of the run.
        autocast: as in MicroStep.
    """
    device = model.device
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    short = {key: batch[key][:1, :WARM_UP_TOKENS] for key in ("input_ids", "labels")}
    loss_function, was_training = model.loss_function, model.training
    is_target_loss = isinstance(loss_function, TargetLoss)
    measuring = loss_function.measuring if is_target_loss else contextlib.nullcontext
    dtype = getattr(torch, autocast) if autocast else None

    def run(inputs: dict[str, Any]) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=autocast is not None), measuring():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()

    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            run(short)  # loads kernels, and weights still on disk
            model.zero_grad(set_to_none=True)
            before = _reset_peak(device)
            run(batch)
            return _peak_bytes(device) - before
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def free_memory(device: torch.device) -> int:
    """Returns the free memory of a device in bytes; on a CPU, also within the container's limit.

    Returns a very large number if it is unknown.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_status_bytes("/proc/meminfo", "MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return min((count for count in free if count is not None), default=sys.maxsize)


def _copies(sizes: ModelSizes, step: MicroStep, sharding: Sharding) -> int:
    """Returns the bytes of cast or gathered weights and of gradient buckets on each device."""
    low = step.product_bytes
    if sharding.way == "ddp":
        cast = low * sizes.products if step.autocast else 0
        buckets = round(step.trained * step.weight_bytes * sizes.parameters) if sharding.gpus > 1 else 0
        return cast + buckets
    gradient = (low + FLOAT32) * sizes.layer if step.trained else 0
    if sharding.way == "fsdp2-grad":
        return low * sizes.parameters + gradient
    gathered = low * (sizes.parameters - (sizes.layers - 2) * sizes.layer)
    zero3_weights = low * sizes.parameters // sharding.gpus if sharding.way == "zero3" else 0
    return gathered + gradient + zero3_weights


def _activation_bytes(sizes: ModelSizes, step: MicroStep) -> int:
    """Returns the bytes of activations kept for the backward."""
    layer = _layer_bytes(sizes, step) * step.tokens
    layers = layer * sizes.layers
    if step.checkpointing:  # one layer at a time is recomputed
        layers = sizes.layers * sizes.width * step.weight_bytes * step.tokens + layer
    stem = sizes.width * (2 * step.weight_bytes + step.product_bytes) * step.tokens  # embedding, last norm
    return layers + stem


def _heap_holes(sizes: ModelSizes, step: MicroStep, *, logits: int) -> int:
    """Returns the bytes of holes in the heap, a fraction of everything that the layers compute."""
    computed = _layer_bytes(sizes, step) * step.tokens * sizes.layers
    is_in_heap = step.tokens * sizes.inner * step.product_bytes < LARGEST_HEAP_BLOCK
    holes = HEAP_HOLES * computed
    if sizes.family == "gpt2" and is_in_heap:
        holes = max(holes, GELU_HOLES * computed - (0 if step.checkpointing else logits))
    return round(holes)


def _peak(sizes: ModelSizes, step: MicroStep, *, base: int, logits: int, gradients: int) -> int:
    """Returns the largest of the moments shown above; ``base``: bytes of activations and copies."""
    low = step.product_bytes
    held = base + (gradients if step.accumulates else 0)
    embedding = 0 if not step.trained else sizes.embedding * step.weight_bytes
    cast = embedding // 2 if low < step.weight_bytes else 0
    copies = (2 if sizes.is_tied else 0) + (1 if step.accumulates else 0)
    if step.chunked_loss:
        deferred = 2 * step.tokens * sizes.width * low  # the targets' hidden states, and their gradient
        moments = [held + logits + deferred + embedding + 2 * cast]
    else:
        moments = [held + logits, held + logits // 3 * low // FLOAT32 + embedding + cast]
    return max(
        *moments,
        held + (embedding if sizes.is_tied else 0) + 3 * sizes.inner * low * step.tokens,
        gradients + embedding * copies,
    )


def _logits_bytes(sizes: ModelSizes, step: MicroStep, *, tokens: int) -> int:
    """Returns the peak bytes of the logits, including temporary memory of the loss."""
    if not step.chunked_loss:
        return 3 * tokens * sizes.vocabulary * FLOAT32
    low = step.product_bytes
    rows = chunk_rows(tokens, sizes.vocabulary, device=step.device, itemsize=low)
    block = min(rows, BLOCK_TOKENS.get(step.device, rows))
    return sizes.vocabulary * (rows * low + block * FLOAT32)


def _evaluation_bytes(sizes: ModelSizes, step: MicroStep) -> int:
    """Returns the bytes of the loss of an evaluation batch; a model's own loss needs all logits at once."""
    if step.eval_tokens and step.chunked_loss:
        return _logits_bytes(sizes, step, tokens=step.eval_tokens)
    return step.eval_tokens * sizes.vocabulary * (FLOAT32 + (step.product_bytes if step.autocast else 0))


def _layer_bytes(sizes: ModelSizes, step: MicroStep) -> int:
    """Returns the bytes per token that one layer keeps for its backward."""
    low = step.product_bytes
    linear = LAYER_BYTES.get(sizes.family, _llama_layer)(sizes, low=low, weight=step.weight_bytes)
    linear += sizes.dropouts * sizes.width * (low if step.device == "cpu" else 1)
    scores = sizes.heads * step.longest
    if step.device == "cpu" and step.attention == "packed":  # computes in float32
        linear += 2 * (sizes.queries + sizes.keys) * (FLOAT32 - low)
    if step.attention == "eager":
        return linear + scores * (low + FLOAT32)
    if step.device == "cpu" and sizes.drops_attention:  # the plain kernel: scores, mask, product
        return linear + sizes.queries * low + 3 * scores * low
    return linear + sizes.heads * FLOAT32


def _gpt2_layer(sizes: ModelSizes, *, low: int, weight: int) -> int:
    """Counts 2 residual sums, 2 norms, query, key, value, attention and its copy, 5 tensors of the MLP."""
    return sizes.width * (2 * weight + (2 + 3 + 2) * low) + 5 * sizes.inner * low


def _llama_layer(sizes: ModelSizes, *, low: int, weight: int) -> int:
    """Counts 2 norms and their inputs, query, key, value, attention and its copy, 4 tensors of the MLP."""
    if weight == 2:
        norms = 2 * sizes.width * (FLOAT32 + 2 + 2)  # computed in float32
    elif low == 2:
        norms = 2 * sizes.width * 2 * FLOAT32 + 5 * sizes.width * low  # a cast for each matrix product
    else:
        norms = 2 * sizes.width * 3 * FLOAT32
    return norms + low * (3 * sizes.queries + 2 * sizes.keys + 4 * sizes.inner)


def _reset_peak(device: torch.device) -> int:
    """Resets the peak; returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):  # glibc only: returns free memory to the system
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5): VmHWM counts from here
    return _status_bytes("/proc/self/status", "VmRSS") or 0


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("/proc/self/status", "VmHWM") or 0


def _status_bytes(path: str, name: str) -> int | None:
    """Returns the bytes in a line such as ``VmHWM:   1234 kB``; None if there is no such file or line."""
    with contextlib.suppress(OSError):
        lines = Path(path).read_text().splitlines()
        fields = [line.split() for line in lines if line.startswith(f"{name}:")]
        return int(fields[0][1]) * 1024 if fields else None
    return None


LAYER_BYTES: dict[str, Callable[..., int]] = {
    "gpt2": _gpt2_layer,
    "llama": _llama_layer,
    "mistral": _llama_layer,
    "qwen2": _llama_layer,
}
