"""Left-padded batches of prompts, and a probe that tests whether padding changes a model's answers.

<pad> <pad> <pad>  T   e   a        mask 0 0 0 1 1 1
 A    n    o    t  h   e   r             1 1 1 1 1 1
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.generation.sampling import temporary_config
from hf_clm.model.load import max_positions

PROBE_STEPS = 4  # new tokens of the probe: some models differ only once they use their cache
SHORT_PROMPT, LONG_PROMPT = 3, 12  # tokens in the probe's prompts
PROBE_TOLERANCES = {torch.float32: 1e-4}  # relative to the largest logit
HALF_TOLERANCE = 5e-2  # for half precision


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the id of the pad token."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), "load_tokenizer requires one"
    return pad


def to_left_padded(batch: Sequence[list[int]], pad: int, *, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns ``input_ids`` and ``attention_mask``, both (B, T) int64 with T the longest prompt, padded on
    the left."""
    width = max(map(len, batch))
    rows = [[pad] * (width - len(ids)) + ids for ids in batch]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


class Probe(NamedTuple):
    """The features that a model was found to support."""

    takes_batches: bool
    """Whether a left-padded prompt is answered as it would be alone."""
    takes_cache: bool
    """Whether answers are the same with a KV cache, also after another text."""


@torch.no_grad()
def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Probe:
    """Generates a few tokens for two prompts of different lengths, in one batch and alone, and compares.

    Recurrent models read padding as text (rwkv) or lose part of their state to it (minimax), and some treat
    a prompt of one token as the continuation of an earlier text (recurrent_gemma). So if batches change
    answers, the cache is tested too. The result is not cached, because training can change it.
    """
    limit, pad = max_positions(model.config), pad_id(tokenizer)
    longest = LONG_PROMPT if limit is None else min(LONG_PROMPT, limit - PROBE_STEPS)
    if longest < 2:
        return Probe(takes_batches=False, takes_cache=True)
    vocabulary = min(model.config.get_text_config().vocab_size, 1000)
    usable = [token for token in range(vocabulary) if token != pad] or [pad]
    prompts = [
        [usable[n * 7 % len(usable)] for n in range(size)]
        for size in (min(SHORT_PROMPT, longest - 1), longest)
    ]
    alone = [_logits(model, [prompt], pad=pad) for prompt in prompts]
    try:
        together = _logits(model, prompts, pad=pad)
    except (RuntimeError, ValueError, IndexError):  # the model does not accept padding
        together = torch.full((1,), torch.nan)
    if _is_near(together, torch.cat(alone)):
        return Probe(takes_batches=True, takes_cache=True)
    with_cache = _logits(model, [prompts[1][:1]], pad=pad)
    without_cache = _logits(model, [prompts[1][:1]], pad=pad, use_cache=False)
    return Probe(takes_batches=False, takes_cache=_is_near(with_cache, without_cache))


def _is_near(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = float((logits - expected).abs().max() / expected.abs().max())
    return difference <= PROBE_TOLERANCES.get(expected.dtype, HALF_TOLERANCE)


def _logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], *, pad: int, use_cache: bool = True
) -> torch.Tensor:
    """Returns the logits of each step of greedy decoding, (B, PROBE_STEPS, V) with V the vocabulary size."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=PROBE_STEPS,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    decoder: Any = model  # transformers does not declare generate on PreTrainedModel
    with temporary_config(model, config):
        output = decoder.generate(
            **to_left_padded(prompts, pad, device=model.device), generation_config=config
        )
    return torch.stack(output.logits, dim=1).to(model.dtype)
