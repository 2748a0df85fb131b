"""The one rule of decoding, for generate, chat, serve, the samples of a run, evaluate and merge.

options of a command, a request --ask--> Decoding --> choose_token (one answer), to_config (transformers)

Decoding is greedy, the arg max of the model, unless something else is asked for. ``generation_config.json``
has a say only in where an answer ends; its sampling settings count where the user asks for them
(``read_model_settings``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_clm.errors import ModelError, RecipeError
from hf_clm.model.adapters import is_adapter, read_base
from hf_clm.model.load import GENERATION_FILE, read_generation_file, to_token_ids, without_adapters

COLDEST = 1e-6  # below this temperature the logits have no room in float32
# The numbers of a Decoding: type, least, most.
LIMITS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, math.inf),
    "top_k": (int, -1, math.inf),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, math.inf),
    "no_repeat_ngram_size": (int, 0, math.inf),
    "num_beams": (int, 1, math.inf),
}
# Settings of generation_config.json that change answers and are not followed, unless they ask for nothing.
UNFOLLOWED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "dola_layers": (),
    "length_penalty": (1,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen, and where it ends.

    Raises RecipeError for a number out of its range.
    """

    max_new_tokens: int | None = None
    """At most this many; None is 256, or what the model has positions for."""
    temperature: float = 0.0
    """0 is greedy, whatever the other settings are."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 and -1 leave out none."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability; 0 is the likeliest alone."""
    min_p: float = 0.0
    """Sample among the tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of the tokens in prompt and answer, and multiplies their negative ones."""
    no_repeat_ngram_size: int = 0
    """Repeat no sequence of this many tokens; 0 is off."""
    num_beams: int = 1
    """Beam search, of ``generate`` alone."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, before themselves. They are looked for in the answer, not in the prompt."""
    seed: int | None = None
    """Of sampling; without one every answer is another."""

    def __post_init__(self) -> None:
        for name, (kind, least, most) in LIMITS.items():
            value = getattr(self, name)
            is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                upper = " or more" if most == math.inf else f" to {most}"
                what = f"expected {'a whole number, ' if kind is int else ''}{least}{upper}"
                raise RecipeError(what, where=name, got=repr(value))
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RecipeError("expected -2**63 to 2**63 - 1", where="seed", got=repr(self.seed))
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise RecipeError("expected 0 or more", where="max_new_tokens", got=repr(self.max_new_tokens))

    @property
    def is_greedy(self) -> bool:
        """Whether only one token can be chosen at each step."""
        return self.temperature < COLDEST or self.top_k == 1 or self.top_p == 0

    def of_prompt(self, number: int) -> "Decoding":
        """For one of several prompts, counted from 0: it draws by ``seed`` + number."""
        return self if self.seed is None or self.is_greedy else replace(self, seed=self.seed + number)


def ask(base: Decoding, asked: object) -> Decoding:
    """``base`` with what the attributes of ``asked`` (of a command's options, or of a request) say instead.

    Attributes that are missing or None are left out. Where only top_k, top_p or min_p ask for sampling, the
    temperature is 1.
    """
    names = [field.name for field in fields(Decoding) if field.name != "stop"]
    given = {name: value for name in names if (value := getattr(asked, name, None)) is not None}
    if stop := tuple(text for text in getattr(asked, "stop", ()) if text):
        given["stop"] = stop
    decoding = replace(base, **given)
    narrows = given.get("top_k", 0) > 0 or given.get("top_p", 1) < 1 or given.get("min_p", 0) > 0
    if narrows and "temperature" not in given and base.temperature == 0:
        return replace(decoding, temperature=1.0)
    return decoding


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
        if settings.get(key) is not None and settings[key] not in neutral:
            raise ModelError("a setting that hf-clm does not follow", where=where, got=key, fix=fix)

    def number(key: str, default: float) -> float:
        value = default if settings.get(key) is None else settings[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        raise ModelError(f"{key}: expected a number", where=where, got=repr(value), fix=fix)

    stop = settings.get("stop_strings") or []
    try:
        return Decoding(
            temperature=number("temperature", 1.0) if settings.get("do_sample") is True else 0.0,
            top_k=int(number("top_k", 0)),
            top_p=number("top_p", 1.0),
            min_p=number("min_p", 0.0),
            repetition_penalty=number("repetition_penalty", 1.0),
            no_repeat_ngram_size=int(number("no_repeat_ngram_size", 0)),
            stop=tuple(map(str, stop if isinstance(stop, list) else [stop])),
        )
    except RecipeError as error:
        raise ModelError(error.what, where=f"{where}: {error.where}", got=error.got, fix=fix) from error


def stop_ids(model: PreTrainedModel) -> set[int]:
    """The ids at which the model's answers end, without what is no id."""
    settings = without_adapters(model).generation_config
    return set(to_token_ids(settings.eos_token_id)) if settings is not None else set()


def to_config(decoding: Decoding, *, new_tokens: int, stops: set[int], pad: int) -> GenerationConfig:
    """Settings of transformers, complete in themselves; ``choose_token`` chooses, but for beams."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    if decoding.num_beams == 1:
        return config
    config.num_beams = decoding.num_beams
    config.repetition_penalty = decoding.repetition_penalty
    config.no_repeat_ngram_size = decoding.no_repeat_ngram_size
    if not decoding.is_greedy:
        config.do_sample, config.temperature = True, float(decoding.temperature)
        config.top_k, config.top_p = max(decoding.top_k, 0), float(decoding.top_p)
        config.min_p = float(decoding.min_p) or None
    return config


@contextmanager
def under(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Gives the model these settings for the time of a generation.

    transformers fills what a config leaves open, and most of it means "off" by being open, from
    ``model.generation_config``: a max_time, stop_strings or suppress_tokens there would have a say.
    """
    inner = without_adapters(model)
    kept = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = kept


def choose_token(decoding: Decoding, ids: Any, scores: Any, *, draws: torch.Generator) -> torch.Tensor:
    """(1, V) scores of which the chosen token has the highest, V the vocabulary.

    Args:
        ids: (1, T) int64, prompt and answer without padding.
        scores: (1, V), the logits of the model.
        draws: the random state of this answer.
    """
    processors = _penalties(decoding) + ([] if decoding.is_greedy else _warpers(decoding))
    for processor in processors:
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


def _penalties(decoding: Decoding) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    return found


def _warpers(decoding: Decoding) -> list[LogitsProcessor]:
    """In the order of transformers."""
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(float(decoding.temperature))]
    if decoding.top_k > 0:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(TopPLogitsWarper(float(decoding.top_p)))
    if decoding.min_p > 0:
        found.append(MinPLogitsWarper(float(decoding.min_p)))
    return found
