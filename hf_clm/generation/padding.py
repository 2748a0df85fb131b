"""Several prompts in one batch, padded on the left; and whether a model answers each as it does alone.

<pad> <pad> <pad>  T   e   a        mask 0 0 0 1 1 1
 A    n    o    t  h   e   r             1 1 1 1 1 1
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.generation.decoding import under
from hf_clm.model import max_positions

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


@torch.no_grad()
def batches_as_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the model answers two prompts of different lengths in one batch as it answers each alone.

    Recurrent models read the padding (rwkv) or lose a part of their state with it (minimax); some fail.
    A few steps of generation tell it. Nothing is kept: training changes what a model makes of padding.
    """
    text, pad = model.config.get_text_config(), pad_id(tokenizer)
    limit = max_positions(model.config)
    longest = LONG if limit is None else min(LONG, limit - STEPS)
    if longest < 2:
        return False
    usable = [token for token in range(min(text.vocab_size, 1000)) if token != pad] or [pad]
    prompts = [
        [usable[n * 7 % len(usable)] for n in range(size)] for size in (min(SHORT, longest - 1), longest)
    ]
    try:
        alone = [_logits(model, [prompt], pad=pad) for prompt in prompts]
        together = _logits(model, prompts, pad=pad)
    except (RuntimeError, ValueError, IndexError):  # in a batch; alone it would say so with the user's prompt
        return False
    expected = torch.cat(alone)
    difference = float((together - expected).abs().max() / expected.abs().max())
    return difference <= TOLERANCES.get(model.dtype, COARSE)


def _logits(model: PreTrainedModel, prompts: Sequence[list[int]], *, pad: int) -> torch.Tensor:
    """(B, STEPS, V): the logits of each step of greedy answers, V the vocabulary."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
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
    return torch.stack(output.logits, dim=1).float()
