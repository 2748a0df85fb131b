"""Decoding with transformers: token selection, stop tokens, and the settings that a model comes with.

Only the stop tokens of ``generation_config.json`` are used, unless the user asks for its sampling settings
(``read_model_settings``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from hf_clm.errors import ModelError, RecipeError
from hf_clm.generation.decoding import PENALTIES, Decoding, Penalty, Warper, update_decoding
from hf_clm.gguf import settings_folder
from hf_clm.model.adapters import is_adapter, read_base
from hf_clm.model.load import GENERATION_FILE, read_generation_file, to_token_ids, without_adapters

# Unsupported settings of generation_config.json that change answers -> values without an effect.
EMPTY_VALUES = (None, 0, [], {})
UNSUPPORTED_SETTINGS = {
    **dict.fromkeys(("num_beams", "typical_p", "guidance_scale", "length_penalty"), (None, 1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_h", "epsilon_cutoff", "eta_cutoff"), EMPTY_VALUES),
    **dict.fromkeys(
        ("penalty_alpha", "dola_layers", "suppress_tokens", "begin_suppress_tokens"), EMPTY_VALUES
    ),
    **dict.fromkeys(("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"), EMPTY_VALUES),
    **dict.fromkeys(
        ("sequence_bias", "exponential_decay_length_penalty", "watermarking_config"), EMPTY_VALUES
    ),
}


def choose_token(
    decoding: Decoding, ids: torch.Tensor, scores: torch.Tensor, *, draws: torch.Generator
) -> torch.Tensor:
    """Returns scores (1, V) whose arg max is the next token, with V the vocabulary size.

    Args:
        ids: (1, T) int64, prompt and answer without padding.
        scores: (1, V), the model's logits.
        draws: the random state of this answer.
    """
    for processor in _processors(decoding):
        scores = processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
    if decoding.is_greedy:
        return scores
    token = torch.multinomial(scores.softmax(-1), 1, generator=draws)
    return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


def random_state(seed: int | None, device: torch.device) -> torch.Generator:
    """Creates a random state, separate from torch's global one; None seeds it at random."""
    state = torch.Generator(device=device)
    if seed is None:
        state.seed()
    else:
        state.manual_seed(seed)
    return state


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Returns the ids of the model's stop tokens; ignores invalid ones."""
    settings = without_adapters(model).generation_config
    return set(to_token_ids(settings.eos_token_id)) if settings is not None else set()


def to_config(decoding: Decoding, *, new_tokens: int, stops: set[int], pad: int) -> GenerationConfig:
    """Returns complete settings for transformers, greedy or for a beam search."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    if decoding.num_beams > 1:
        config.num_beams = decoding.num_beams
        config.do_sample, config.top_k = not decoding.is_greedy, 0
        for name in _active_settings(decoding):
            setattr(config, name, getattr(decoding, name))
    return config


@contextmanager
def temporary_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces ``model.generation_config`` during a generation.

    transformers takes settings that are None in ``config`` from ``model.generation_config``, although None
    usually means "off": a max_time, stop_strings or suppress_tokens there would take effect.
    """
    inner = without_adapters(model)
    original = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = original


def base_decoding(name_or_path: str, *, use_model_settings: bool) -> Decoding:
    """Returns the settings that apply unless the user or the client overrides them."""
    return read_model_settings(name_or_path) if use_model_settings else Decoding()


def read_model_settings(name_or_path: str) -> Decoding:
    """Returns the sampling settings of a model's ``generation_config.json``; of the base model for adapters.

    With ``do_sample``, the temperature defaults to 1, and top_k to all tokens. Raises ModelError if there is
    no such file, and for settings that are invalid or not supported.
    """
    fix = "remove --use_model_settings, and set the options yourself"
    name, revision = read_base(name_or_path) if is_adapter(name_or_path) else (name_or_path, None)
    where = f"{GENERATION_FILE} of {name}"
    settings = read_generation_file(settings_folder(name, where="run or model"), revision=revision)
    if settings is None:
        raise ModelError("the file is missing or not valid JSON", where=where, fix=fix)
    for key, neutral in UNSUPPORTED_SETTINGS.items():
        if key not in PENALTIES and settings.get(key) not in neutral:
            raise ModelError("hf-clm does not support this setting", where=where, got=key, fix=fix)
    try:
        values = {**settings, "stop": settings.get("stop_strings")}
        changes = {name: values.get(name) for name in (*PENALTIES, "stop")}
        decoding = update_decoding(Decoding(temperature=1.0), changes)
    except RecipeError as error:
        raise ModelError(error.what, where=f"{where}: {error.where}", got=error.got, fix=fix) from error
    return decoding if settings.get("do_sample") is True else replace(decoding, temperature=0.0)


def _active_settings(decoding: Decoding) -> Iterator[str]:
    """Yields the settings to apply: penalties first, then (if sampling) warpers."""
    for kind in (Penalty,) if decoding.is_greedy else (Penalty, Warper):
        for name, penalty in PENALTIES.items():
            if type(penalty) is kind and getattr(decoding, name) not in penalty.off:
                yield name


def _processors(decoding: Decoding) -> Iterator[LogitsProcessor]:
    for name in _active_settings(decoding):
        yield getattr(transformers, PENALTIES[name].processor)(getattr(decoding, name))
