"""Attention inside each document of a packed row, as one function of ``transformers.AttentionInterface``.

No mask function is registered beside it, so the model builds no mask: a packed row is told apart by
``cu_seq_lens`` alone, and rows without it (padded on the right) need none, because a causal model never looks
to the right.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from hf_clm.errors import ModelError

NAME = "packed"
SHORT = 64  # tokens: up to here SDPA on a CPU is slower than two matrix products


def register() -> None:
    """Makes ``attn_implementation="packed"`` known to transformers. Called by ``load_model``."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each document on its own.

    B = batch size (1 for packed rows), T = tokens, H = query heads, K = key heads (H is a multiple),
    E = head width.

    Args (as transformers calls it): query (B, H, T, E); key, value (B, K, T, E); attention_mask, ignored;
        keywords scaling, dropout, sliding_window (tokens), cu_seq_lens_q (documents + 1,) int32.

    Returns (B, T, H, E) and None for the weights. Raises ModelError for what it does not compute:
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
            "the packed attention is for training: it has no mask for a KV cache",
            where="generate",
            fix='use hf_clm.generate, or call model.set_attn_implementation("sdpa") first',
        )
    if bounds is None:
        return _causal(states, **options).transpose(1, 2).contiguous(), None
    dtype = _compute_dtype(query)
    if query.is_cuda and not options["dropout"] and dtype != torch.float32:
        states = tuple(part.to(dtype) for part in states)  # rotary embeddings give float32 under autocast
        longest = int(kwargs["max_length_q"])
        return _varlen(
            states, bounds, longest=longest, scale=options["scale"], window=options["window"]
        ), None
    apart: Any = _document_by_document  # the decorator hides its parameters
    return apart(states, bounds, options=options).to(dtype), None


def use_for_generation(model: PreTrainedModel) -> None:
    """Switches a packed model to ``sdpa``: its KV cache and left padding need a mask."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def use_for_training(model: PreTrainedModel, attention: str) -> None:
    """Switches the model (back) to ``attention``."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


@torch.compiler.disable  # else a graph is compiled for the lengths of every batch
def _document_by_document(
    states: Sequence[torch.Tensor], bounds: torch.Tensor, *, options: dict[str, Any]
) -> torch.Tensor:
    """(1, T, H, E), one call of SDPA for neighbours of one length; float32 on a CPU: it is faster."""
    device = states[0].device
    if device.type == "cpu":
        states = [part.float() for part in states]
    lengths = [stop - start for start, stop in pairwise(bounds.tolist()) if stop > start]
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    # split, not slices: the gradient of each slice would be as long as the whole row
    parts = zip(*(part.split([n * length for length, n in runs], dim=2) for part in states), strict=True)
    autocasts = torch.is_autocast_enabled(device.type) and device.type != "cpu"
    with torch.autocast(device.type, enabled=autocasts):
        found = [
            _equally_long(part, documents=n, **options) for part, (_, n) in zip(parts, runs, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _equally_long(states: Sequence[torch.Tensor], *, documents: int, **options: Any) -> torch.Tensor:
    """(1, T, H, E) for as many documents, one behind the other, as a batch of rows in one call."""
    rows = [part.unflatten(2, (documents, -1))[0].transpose(0, 1) for part in states]
    is_short = rows[0].device.type == "cpu" and rows[0].shape[2] <= SHORT
    found = (_by_products if is_short else _causal)(rows, **options)
    return found.transpose(1, 2).flatten(0, 1)[None]


def _by_products(
    states: Sequence[torch.Tensor], *, dropout: float, scale: float | None, window: int | None
) -> torch.Tensor:
    """As ``_causal``, with the scores of all pairs: on a CPU faster, where documents are short."""
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


def _causal(
    states: Sequence[torch.Tensor], *, dropout: float, scale: float | None, window: int | None
) -> torch.Tensor:
    """(B, H, T, E) for rows that hold one document each. ``states``: query, key, value."""
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


def _varlen(
    states: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    *,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """The fused kernel of torch for many documents in one call; a window of (-1, 0) is plain causal."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # grouped heads are an argument of the kernel from torch 2.12 on only
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sides = (-1 if window is None else window - 1, 0)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    output: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides)
    return output[None]


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """What attention computes in; the fused kernel takes no float32."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _check_supported(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            what = f"the packed attention does not compute this model's {name!r}"
            raise ModelError(
                what, where="model.attention", got=NAME, fix="set model.attention to sdpa or eager"
            )
