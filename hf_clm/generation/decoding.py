"""Decoding settings, each with its help text, its bounds and the logits processor that applies it.

command line, request or generation_config.json --> update_decoding --> Decoding --> sampling.choose_token

To support another logits processor of transformers, add a field here. The options of ``generate`` and
``chat``, the keys of ``serve`` requests and ``--use_model_settings`` are all derived from the fields.
Decoding is greedy by default.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError

MIN_TEMPERATURE = 1e-6  # below it, scaled logits overflow float32, so decoding is greedy


class Penalty(NamedTuple):
    """A setting's logits processor in transformers, and the values that turn it ``off``."""

    processor: str
    off: tuple[float, ...]


class Warper(Penalty):
    """A processor that only matters when sampling."""


def _texts(value: object) -> object:
    """Wraps a single text in a list, and drops empty texts and null."""
    texts = [value] if isinstance(value, str) else value or ()
    return [text for text in texts if text != ""] if isinstance(texts, list | tuple) else texts


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False))
class Decoding:
    """How tokens are selected and where an answer ends. Raises ValidationError for an invalid value."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens to generate; default: 256, or as many as fit."""
    temperature: Annotated[float, Field(ge=0), Warper("TemperatureLogitsWarper", off=(1,))] = 0.0
    """Sampling temperature; 0 is greedy. Default: 0, or 1 if top_k, top_p or min_p is set."""
    top_k: Annotated[int, Field(ge=-1), Warper("TopKLogitsWarper", off=(0, -1))] = 0
    """Sample from the k most likely tokens; 0 or -1: all tokens."""
    top_p: Annotated[float, Field(ge=0, le=1), Warper("TopPLogitsWarper", off=(1,))] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; 0: greedy."""
    min_p: Annotated[float, Field(ge=0, le=1), Warper("MinPLogitsWarper", off=(0,))] = 0.0
    """Sample from tokens at least this likely, as a fraction of the top token's probability."""
    repetition_penalty: Annotated[
        float, Field(ge=0.01, le=100), Penalty("RepetitionPenaltyLogitsProcessor", off=(1,))
    ] = 1.0
    """Penalty for repeated tokens: positive logits are divided by it, negative ones multiplied; 1: off."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0), Penalty("NoRepeatNGramLogitsProcessor", off=(0,))] = 0
    """Never generate the same n-gram of this many tokens twice; 0: off."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Number of beams for beam search; 1: off."""
    stop: Annotated[
        tuple[Annotated[str, Field(max_length=200)], ...], BeforeValidator(_texts), Field(max_length=16)
    ] = ()
    """End the answer before this text; may be given several times."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Random seed for sampling; prompt n, counted from 0, uses seed + n."""

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is deterministic."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1 or self.top_p == 0

    def of_prompt(self, number: int) -> "Decoding":
        """Returns the settings for one of several prompts, counted from 0: its seed is seed + number."""
        if self.seed is None or self.is_greedy:
            return self
        return dataclasses.replace(self, seed=self.seed + number)


_ADAPTER = TypeAdapter(Decoding)
SETTINGS: dict[str, FieldInfo] = vars(Decoding)["__pydantic_fields__"]
# The settings that a logits processor applies, in the order that transformers applies them.
PENALTIES = {
    name: penalty
    for name, field in SETTINGS.items()
    for penalty in field.metadata
    if isinstance(penalty, Penalty)
}


def update_decoding(base: Decoding, settings: Mapping[str, object]) -> Decoding:
    """Returns ``base`` updated with ``settings``; other keys and values of None are ignored.

    The temperature becomes 1 if ``settings`` turn on another warper (such as top_k) and neither they nor
    ``base`` set a temperature. Raises RecipeError for an invalid value.
    """
    changes = {name: settings[name] for name in SETTINGS if settings.get(name) not in (None, [])}
    try:
        decoding = _ADAPTER.validate_python({**dataclasses.asdict(base), **changes})
    except ValidationError as error:
        raise to_fault(error) from error
    warpers = [name for name, penalty in PENALTIES.items() if isinstance(penalty, Warper) and name in changes]
    is_warped = any(getattr(decoding, name) not in PENALTIES[name].off for name in warpers)
    if is_warped and "temperature" not in changes and base.temperature == 0:
        return dataclasses.replace(decoding, temperature=1.0)
    return decoding


def to_fault(error: ValidationError) -> RecipeError:
    """Converts the first of pydantic's errors to a one-line error."""
    first = error.errors()[0]
    what, got = first["msg"].replace("Input should be", "expected"), repr(first["input"])
    what = {"missing": "is missing", "tuple_type": "expected text, or a list of texts"}.get(
        first["type"], what
    )
    is_shown = len(got) < 40 and first["type"] not in ("missing", "json_invalid")
    return RecipeError(what, where=".".join(map(str, first["loc"])), got=got if is_shown else "")
