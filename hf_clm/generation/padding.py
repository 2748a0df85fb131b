"""Several prompts in one batch, padded on the left; and whether a model answers each as it does alone.

<pad> <pad> <pad>  T   e   a        mask 0 0 0 1 1 1
 A    n    o    t  h   e   r             1 1 1 1 1 1
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.generation.sampling import under
from hf_clm.model.load import max_positions

STEPS = 4  # new tokens of the probe: some models go wrong only with their cache
SHORT, LONG = 3, 12  # tokens of its prompts
TOLERANCES = {torch.float32: 1e-4}  # as a share of the largest logit
COARSE = 5e-2  # in half precision


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the pad token."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), "load_tokenizer requires one"
    return pad


def to_left_padded(batch: Sequence[list[int]], pad: int, *, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (B, T) int64, T the longest prompt; padding comes first."""
    width = max(map(len, batch))
    rows = [[pad] * (width - len(ids)) + ids for ids in batch]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


class Probe(NamedTuple):
    """What a few steps of generation told of a model."""

    takes_batches: bool
    """It answers each prompt of a batch as it does alone."""
    takes_cache: bool
    """It answers with a cache as without one, whatever it has read before."""


@torch.no_grad()
def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Probe:
    """Compares two prompts of different lengths in one batch with each alone.

    Recurrent models read the padding (rwkv) or lose a part of their state with it (minimax), and some take a
    prompt of one token for the next one of an earlier text (recurrent_gemma). So where batches change answers
    the cache is tried too. Nothing is kept: training changes what a model makes of padding.
    """
    limit, pad = max_positions(model.config), pad_id(tokenizer)
    longest = LONG if limit is None else min(LONG, limit - STEPS)
    if longest < 2:
        return Probe(takes_batches=False, takes_cache=True)
    vocabulary = min(model.config.get_text_config().vocab_size, 1000)
    usable = [token for token in range(vocabulary) if token != pad] or [pad]
    prompts = [
        [usable[n * 7 % len(usable)] for n in range(size)] for size in (min(SHORT, longest - 1), longest)
    ]
    alone = [_logits(model, [prompt], pad=pad) for prompt in prompts]
    try:
        together = _logits(model, prompts, pad=pad)
    except (RuntimeError, ValueError, IndexError):  # it takes no padding
        together = torch.full((1,), torch.nan)
    if _is_near(together, torch.cat(alone)):
        return Probe(takes_batches=True, takes_cache=True)
    after_another = _logits(model, [prompts[1][:1]], pad=pad)
    afresh = _logits(model, [prompts[1][:1]], pad=pad, use_cache=False)
    return Probe(takes_batches=False, takes_cache=_is_near(after_another, afresh))


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = float((found - expected).abs().max() / expected.abs().max())
    return difference <= TOLERANCES.get(expected.dtype, COARSE)


def _logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], *, pad: int, use_cache: bool = True
) -> torch.Tensor:
    """(B, STEPS, V): the logits of each step of greedy answers, V the vocabulary."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=STEPS,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    decoder: Any = model  # typed without the generate that it has
    with under(model, config):
        output = decoder.generate(
            **to_left_padded(prompts, pad, device=model.device), generation_config=config
        )
    return torch.stack(output.logits, dim=1).to(model.dtype)
