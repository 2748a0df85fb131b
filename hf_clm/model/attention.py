"""Attention within each document of a packed row, as a function for ``transformers.AttentionInterface``.

No mask function is registered with it, so the model builds no mask. The documents of a packed row are
separated by ``cu_seq_lens``. Rows without it, padded on the right, need no mask in a causal model.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from hf_clm.errors import ModelError

NAME = "packed"
SHORT_TOKENS = 64  # up to this length, SDPA is slower on a CPU than two matrix products


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
    bounds = kwargs.get("cu_seq_lens_q")
    if query.shape[2] != args[0].shape[2]:
        raise ModelError(
            "packed attention is for training and does not support a KV cache",
            where="generate",
            fix='use hf_clm.generate, or call model.set_attn_implementation("sdpa") first',
        )
    if bounds is None:
        return _sdpa_attention(states, **options).transpose(1, 2).contiguous(), None
    dtype = _compute_dtype(query)
    if query.is_cuda and not options["dropout"] and dtype != torch.float32:
        states = tuple(part.to(dtype) for part in states)  # rotary embeddings give float32 under autocast
        longest = int(kwargs["max_length_q"])
        return _varlen_attention(
            states, bounds, longest=longest, scale=options["scale"], window=options["window"]
        ), None
    attend: Any = _document_attention  # its decorator hides the parameters from the type checker
    return attend(states, bounds, options=options).to(dtype), None


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
    is_short = rows[0].device.type == "cpu" and rows[0].shape[2] <= SHORT_TOKENS
    output = (_matmul_attention if is_short else _sdpa_attention)(rows, **options)
    return output.transpose(1, 2).flatten(0, 1)[None]


def _matmul_attention(
    states: Sequence[torch.Tensor], *, dropout: float, scale: float | None, window: int | None
) -> torch.Tensor:
    """Same as ``_sdpa_attention``, but with explicit scores, which is faster for short documents on a CPU."""
    query, key, value = states
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    tokens, width = query.shape[2:]
    hidden = torch.full((tokens, tokens), float("-inf"), device=query.device)
    mask = hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)
    heads = [part.flatten(0, 1) for part in (query, key.transpose(2, 3), value)]
    alpha = width**-0.5 if scale is None else scale
    weights = torch.baddbmm(mask, heads[0], heads[1], alpha=alpha).softmax(dim=-1)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.bmm(weights, heads[2]).unflatten(0, query.shape[:2])


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
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )


def _varlen_attention(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Computes all documents with one call of PyTorch's fused kernel; a window of (-1, 0) is plain causal."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # the kernel supports grouped heads only since torch 2.12
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sides = (-1 if window is None else window - 1, 0)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    output: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides)
    return output[None]


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Returns the dtype that attention is computed in; the fused kernel does not support float32."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _check_supported(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            what = f"packed attention does not support this model's {name!r}"
            raise ModelError(
                what, where="model.attention", got=NAME, fix="set model.attention to sdpa or eager"
            )
