"""Attention within each document of a packed row, as a function for ``transformers.AttentionInterface``.

No mask function is registered with it, so the model builds no mask. The documents of a packed row are
separated by ``cu_seq_lens``. Rows without it, padded on the right, need no mask in a causal model.

CPU                  one SDPA call for adjacent documents of equal length
GPU                  varlen_attn, one fused kernel for all documents, where ``why_not_varlen`` is empty
other accelerators   one SDPA call for documents as padded rows, or for blocks of the row with a mask

Only the first reads the lengths. The others compute indices and masks on the device, from its
``cu_seq_lens`` and two numbers that are known without it: how many documents, and the length of the longest.
"""

import inspect
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from hf_clm.errors import ModelError

NAME = "packed"
PADDED_SLOTS = 2  # documents become padded rows if these have at most this many slots per token
ALIGNED_KEYS = 64  # fused kernels copy a mask whose rows are not aligned
ALIGNED_WIDTH = 8  # they do not take heads of another width
VARLEN_CAPABILITY, VARLEN_WIDTH = (8, 0), 256
# The kernel takes grouped heads since torch 2.12.
TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def register() -> None:
    """Registers ``attn_implementation="packed"`` with transformers. Called by ``load_model``."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention within each document.

    B = batch size (1 for packed rows), T = tokens, H = query heads, K = key heads (H is a multiple of K),
    E = head width.

    Args (as passed by transformers): query (B, H, T, E); key, value (B, K, T, E); attention_mask, ignored;
        keywords scaling, dropout, sliding_window (tokens), cu_seq_lens_q (documents + 1,) int32.

    Returns (B, T, H, E), and None for the weights. Raises ModelError for unsupported features:
    soft-capping, sinks, a KV cache.
    """
    states = (query, args[0], args[1])
    _check_supported(kwargs)
    options = {
        "dropout": kwargs.get("dropout", 0.0),
        "scale": kwargs.get("scaling"),
        "window": kwargs.get("sliding_window"),
    }
    bounds, device = kwargs.get("cu_seq_lens_q"), query.device
    if query.shape[2] != args[0].shape[2]:
        raise ModelError(
            "packed attention is for training and does not support a KV cache",
            where="generate",
            fix='use hf_clm.generate, or call model.set_attn_implementation("sdpa") first',
        )
    if bounds is None:
        return _sdpa_attention(states, **options).transpose(1, 2).contiguous(), None
    dtype = _compute_dtype(query)
    if device.type == "cpu":
        attend: Any = _document_attention  # its decorator hides the parameters from the type checker
        return attend(states, bounds, options=options).to(dtype), None
    states = [part.to(dtype) for part in states]  # rotary embeddings give float32 under autocast
    reason = why_not_varlen(
        device.type,
        capability_of(device),
        dtype=dtype,
        width=query.shape[3],
        dropout=options["dropout"],
    )
    attend = _masked_attention if reason else _varlen_attention
    return attend(states, bounds, longest=int(kwargs["max_length_q"]), **options), None


def why_not_varlen(
    device: str, capability: tuple[int, int], *, dtype: torch.dtype, width: int, dropout: float
) -> str:
    """Returns why ``varlen_attn`` cannot compute attention on a kind of device; empty if it can.

    width: of a head. capability: the compute capability of an NVIDIA GPU, such as (7, 5).
    """
    if device != "cuda":
        return f"{device} has no fused kernel for packed rows"
    needed, got = (".".join(map(str, version)) for version in (VARLEN_CAPABILITY, capability))
    if capability < VARLEN_CAPABILITY:
        return f"the fused kernel for packed rows needs compute capability {needed}; this GPU has {got}"
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"the fused kernel for packed rows does not support {name}"
    if width % ALIGNED_WIDTH or width > VARLEN_WIDTH:
        allowed = f"multiples of {ALIGNED_WIDTH} up to {VARLEN_WIDTH}"
        return f"the fused kernel for packed rows needs a head width in {allowed}; this model has {width}"
    return "the fused kernel for packed rows has no attention dropout" if dropout else ""


@torch.compiler.assume_constant_result
def capability_of(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of an NVIDIA GPU; (0, 0) for another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def use_for_generation(model: PreTrainedModel) -> None:
    """Switches a model with packed attention to ``sdpa``, which supports a KV cache and left padding."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def use_for_training(model: PreTrainedModel, attention: str) -> None:
    """Switches the model (back) to ``attention``."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


@torch.compiler.disable  # otherwise, a graph is compiled for the lengths of each batch
def _document_attention(
    states: Sequence[torch.Tensor], bounds: torch.Tensor, *, options: dict[str, Any]
) -> torch.Tensor:
    """Computes (1, T, H, E), with one call for adjacent documents of equal length; in float32 on a CPU, which
    is faster."""
    device = states[0].device
    if device.type == "cpu":
        states = [part.float() for part in states]
    lengths = [stop - start for start, stop in pairwise(bounds.tolist()) if stop > start]
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    # split instead of slices: the gradient of each slice would be as long as the complete row
    parts = zip(*(part.split([n * length for length, n in runs], dim=2) for part in states), strict=True)
    autocasts = torch.is_autocast_enabled(device.type) and device.type != "cpu"
    with torch.autocast(device.type, enabled=autocasts):
        outputs = [
            _equal_length_attention(part, documents=n, **options)
            for part, (_, n) in zip(parts, runs, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _equal_length_attention(
    states: Sequence[torch.Tensor], *, documents: int, **options: Any
) -> torch.Tensor:
    """Computes (1, T, H, E) for concatenated documents of equal length, as a batch of rows in one call."""
    rows = [part.unflatten(2, (documents, -1))[0].transpose(0, 1) for part in states]
    return _sdpa_attention(rows, **options).transpose(1, 2).flatten(0, 1)[None]


def _sdpa_attention(
    states: Sequence[torch.Tensor], *, dropout: float, scale: float | None, window: int | None
) -> torch.Tensor:
    """Computes (B, H, T, E) for rows with one document each. ``states``: query, key, value."""
    query, key, value = states
    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        distance = torch.arange(tokens, device=query.device)[:, None] - torch.arange(
            tokens, device=query.device
        )
        mask = (distance >= 0) & (distance < window)
    if query.device.type != "cpu":  # with grouped heads, most GPU kernels are not available
        key, value = _expand(key, query), _expand(value, query)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen_attention(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Computes all documents with one call of PyTorch's fused kernel; a window of (-1, 0) is plain causal."""
    assert not dropout, "see why_not_varlen"
    query, key, value = states
    attend = partial(varlen_attn, enable_gqa=True) if TAKES_GROUPS else varlen_attn
    if not TAKES_GROUPS:
        key, value = _expand(key, query), _expand(value, query)
    sides = (-1 if window is None else window - 1, 0)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    output: Any = attend(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides)
    return output[None]


def _masked_attention(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Computes (1, T, H, E) with one call of SDPA, without reading a value of the device.

    Padded rows need no mask, and a quarter of the scores that blocks need. They are used where the padding
    is little.
    """
    query, key, value = states
    tokens, width = query.shape[2:]
    rows = [pad(part, (0, -width % ALIGNED_WIDTH)) for part in (query, key, value)]
    is_little = (len(bounds) - 1) * longest <= PADDED_SLOTS * tokens
    attend = _padded_attention if is_little else _block_attention
    alpha = width**-0.5 if scale is None else scale
    output = attend(rows, bounds, longest=longest, dropout=dropout, scale=alpha, window=window)
    return output[None, :, :, :width]


def _padded_attention(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    dropout: float,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Computes (T, H, E) with a row for each document, padded on the right to ``longest``."""
    documents, positions = len(bounds) - 1, torch.arange(states[0].shape[2], device=bounds.device)
    document = torch.bucketize(positions, bounds, right=True) - 1
    slots = document * longest + positions - bounds[document]
    rows = []
    for part in states:  # (1, H, T, E) to (D, H, longest, E)
        flat = part[0].transpose(0, 1)
        padded = flat.new_zeros(documents * longest, *flat.shape[1:]).index_copy(0, slots, flat)
        rows.append(padded.unflatten(0, (documents, longest)).transpose(1, 2))
    output = _sdpa_attention(rows, dropout=dropout, scale=scale, window=window)
    return output.transpose(1, 2).flatten(0, 1)[slots]


def _block_attention(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    dropout: float,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Computes (T, H, E) with a batch row for each block of tokens.

    A block is as long as the longest document, so that its queries only see keys of the block and of the
    one before it: the cost is linear in the tokens. Few tokens are a single block.
    """
    query, key, value = states
    tokens = query.shape[2]
    size = -(-longest // ALIGNED_KEYS) * ALIGNED_KEYS
    if tokens <= 2 * size:
        size = -(-tokens // ALIGNED_KEYS) * ALIGNED_KEYS
    blocks = -(-tokens // size)
    q, k, v = (
        pad(part[0], (0, 0, 0, blocks * size - tokens)).unflatten(1, (blocks, size)).transpose(0, 1)
        for part in (query, _expand(key, query), _expand(value, query))
    )  # (blocks, H, size, E)
    if blocks > 1:
        k, v = (torch.cat([pad(part, (0, 0) * 3 + (1, 0))[:-1], part], dim=2) for part in (k, v))
    mask = _block_mask(bounds, query.dtype, blocks=blocks, size=size, window=window)
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return output.transpose(1, 2).flatten(0, 1)[:tokens]


def _block_mask(
    bounds: torch.Tensor, dtype: torch.dtype, *, blocks: int, size: int, window: int | None
) -> torch.Tensor:
    """Returns the mask of a micro-batch. Its layers share one, as each keeps it for the backward pass."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return _build_mask(bounds, dtype, blocks=blocks, size=size, window=window)
    # the version counts the writes to a buffer
    return _keep_mask(bounds, dtype, version=bounds._version, blocks=blocks, size=size, window=window)


@lru_cache(maxsize=2)  # a model may have layers with and without a window
def _keep_mask(
    bounds: torch.Tensor, dtype: torch.dtype, *, version: int, blocks: int, size: int, window: int | None
) -> torch.Tensor:
    return _build_mask(bounds, dtype, blocks=blocks, size=size, window=window)


def _build_mask(
    bounds: torch.Tensor, dtype: torch.dtype, *, blocks: int, size: int, window: int | None
) -> torch.Tensor:
    """Returns (blocks, 1, size, keys): 0 where a query sees a key, else -inf. Every query sees itself."""
    keys = size if blocks == 1 else 2 * size
    starts = torch.arange(blocks, device=bounds.device)[:, None] * size
    at_query = starts + torch.arange(size, device=bounds.device)
    at_key = starts + torch.arange(size - keys, size, device=bounds.device)
    documents = [torch.bucketize(at, bounds, right=True) for at in (at_query, at_key)]
    distance = at_query[:, :, None] - at_key[:, None]
    is_seen = (documents[0][:, :, None] == documents[1][:, None]) & (distance >= 0)
    if window is not None:
        is_seen &= distance < window
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=bounds.device)
    return mask.masked_fill_(~is_seen, float("-inf"))[:, None]


def _expand(part: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeats the heads of keys or values (B, K, T, E) for the query heads that share them: (B, H, T, E)."""
    repeats = query.shape[1] // part.shape[1]
    return part if repeats == 1 else part.repeat_interleave(repeats, dim=1)


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Returns the dtype that attention is computed in."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _check_supported(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            what = f"packed attention does not support this model's {name!r}"
            raise ModelError(
                what, where="model.attention", got=NAME, fix="set model.attention to sdpa or eager"
            )
