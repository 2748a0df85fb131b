"""Decoding with transformers: what chooses a token, where answers end, and the settings a model comes with.

Of ``generation_config.json`` only the stop tokens count, unless the user asks for its sampling settings
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
from hf_clm.generation.decoding import STEPS, Decoding, Penalty, Warper, ask
from hf_clm.model.adapters import is_adapter, read_base
from hf_clm.model.load import GENERATION_FILE, read_generation_file, to_token_ids, without_adapters

# Settings of generation_config.json that change answers and are not followed -> values that ask for nothing.
NOTHING = (None, 0, [], {})
UNFOLLOWED = {
    **dict.fromkeys(("num_beams", "typical_p", "guidance_scale", "length_penalty"), (None, 1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_h", "epsilon_cutoff", "eta_cutoff"), NOTHING),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "suppress_tokens", "begin_suppress_tokens"), NOTHING),
    **dict.fromkeys(("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"), NOTHING),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "watermarking_config"), NOTHING),
}


def choose_token(
    decoding: Decoding, ids: torch.Tensor, scores: torch.Tensor, *, draws: torch.Generator
) -> torch.Tensor:
    """(1, V) scores of which the chosen token has the highest, V the vocabulary.

    Args:
        ids: (1, T) int64, prompt and answer without padding.
        scores: (1, V), the logits of the model.
        draws: the random state of this answer.
    """
    for processor in _processors(decoding):
        scores = processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
    if decoding.is_greedy:
        return scores
    drawn = torch.multinomial(scores.softmax(-1), 1, generator=draws)
    return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


def random_state(seed: int | None, device: torch.device) -> torch.Generator:
    """A new random state; the global one is left alone."""
    state = torch.Generator(device=device)
    if seed is None:
        state.seed()
    else:
        state.manual_seed(seed)
    return state


def stop_ids(model: PreTrainedModel) -> set[int]:
    """The ids at which the model's answers end, without what is no id."""
    settings = without_adapters(model).generation_config
    return set(to_token_ids(settings.eos_token_id)) if settings is not None else set()


def to_config(decoding: Decoding, *, new_tokens: int, stops: set[int], pad: int) -> GenerationConfig:
    """Settings of transformers, complete in themselves: greedy, or those of a beam search."""
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
        for name in _steps(decoding):
            setattr(config, name, getattr(decoding, name))
    return config


@contextmanager
def under(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Gives the model these settings for the time of a generation.

    transformers fills what a config leaves open, and most of it means "off" by being open, from
    ``model.generation_config``: a max_time, stop_strings or suppress_tokens there would have a say.
    """
    inner = without_adapters(model)
    own = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = own


def base_decoding(name_or_path: str, *, use_model_settings: bool) -> Decoding:
    """What holds where a user or a client asks for nothing."""
    return read_model_settings(name_or_path) if use_model_settings else Decoding()


def read_model_settings(name_or_path: str) -> Decoding:
    """The sampling settings of a model's ``generation_config.json``, for adapters those of their base.

    Sampling there (``do_sample``) has temperature 1 where none is named, and no top_k unless it is named.
    Raises ModelError where there is no such file, and for settings that are wrong or not followed.
    """
    fix = "leave out --use_model_settings, and name the settings to use"
    name, revision = read_base(name_or_path) if is_adapter(name_or_path) else (name_or_path, None)
    where = f"{GENERATION_FILE} of {name}"
    settings = read_generation_file(name, revision=revision)
    if settings is None:
        raise ModelError("there is none that can be read", where=where, fix=fix)
    for key, neutral in UNFOLLOWED.items():
        if key not in STEPS and settings.get(key) not in neutral:
            raise ModelError("a setting that hf-clm does not follow", where=where, got=key, fix=fix)
    try:
        named = {**settings, "stop": settings.get("stop_strings")}
        decoding = ask(Decoding(temperature=1.0), {name: named.get(name) for name in (*STEPS, "stop")})
    except RecipeError as error:
        raise ModelError(error.what, where=f"{where}: {error.where}", got=error.got, fix=fix) from error
    return decoding if settings.get("do_sample") is True else replace(decoding, temperature=0.0)


def _steps(decoding: Decoding) -> Iterator[str]:
    """The settings to apply: penalties first, and where tokens are drawn then the warpers."""
    for kind in (Penalty,) if decoding.is_greedy else (Penalty, Warper):
        for name, step in STEPS.items():
            if type(step) is kind and getattr(decoding, name) not in step.off:
                yield name


def _processors(decoding: Decoding) -> Iterator[LogitsProcessor]:
    for name in _steps(decoding):
        yield getattr(transformers, STEPS[name].processor)(getattr(decoding, name))
