"""How answers are decoded: each setting with its help, its bounds and what applies it, in one place.

options of a command, a request, generation_config.json --> ask --> Decoding --> sampling.choose_token

A setting that transformers has a logits processor for needs a field here and nothing more: the options of
``generate`` and ``chat``, the requests of ``serve`` and ``--use_model_settings`` are read from the fields.
Decoding is greedy, the arg max of the model, unless something else is asked for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError

COLDEST = 1e-6  # below this temperature the logits have no room in float32


class Penalty(NamedTuple):
    """The processor of transformers that applies a setting; the values ``off`` ask for nothing."""

    processor: str
    off: tuple[float, ...]


class Warper(Penalty):
    """A processor that only matters where tokens are drawn."""


def _texts(value: object) -> object:
    """One text is a list of one; an empty text and null are none."""
    texts = [value] if isinstance(value, str) else value or ()
    return [text for text in texts if text != ""] if isinstance(texts, list | tuple) else texts


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False))
class Decoding:
    """How the tokens of an answer are chosen, and where it ends. Raises ValidationError for a wrong value."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Length of an answer in tokens; default: 256, or as many as fit."""
    temperature: Annotated[float, Field(ge=0), Warper("TemperatureLogitsWarper", off=(1,))] = 0.0
    """0 is greedy whatever else is set, and the default unless a setting below narrows the choice: then 1."""
    top_k: Annotated[int, Field(ge=-1), Warper("TopKLogitsWarper", off=(0, -1))] = 0
    """Sample among the k likeliest tokens; 0 and -1: all."""
    top_p: Annotated[float, Field(ge=0, le=1), Warper("TopPLogitsWarper", off=(1,))] = 1.0
    """Sample among the likeliest tokens of this total probability; 0: the likeliest alone."""
    min_p: Annotated[float, Field(ge=0, le=1), Warper("MinPLogitsWarper", off=(0,))] = 0.0
    """Sample among the tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: Annotated[
        float, Field(ge=0.01, le=100), Penalty("RepetitionPenaltyLogitsProcessor", off=(1,))
    ] = 1.0
    """Divides positive logits of tokens in prompt and answer, and multiplies negative ones; 1: off."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0), Penalty("NoRepeatNGramLogitsProcessor", off=(0,))] = 0
    """Never repeat a sequence of this many tokens; 0: off."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beam search with this many beams (1: off)."""
    stop: Annotated[
        tuple[Annotated[str, Field(max_length=200)], ...], BeforeValidator(_texts), Field(max_length=16)
    ] = ()
    """A text that ends the answer and is not part of it; may be repeated."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of sampling; prompt number n adds n."""

    @property
    def is_greedy(self) -> bool:
        """Whether only one token can be chosen at each step."""
        return self.temperature < COLDEST or self.top_k == 1 or self.top_p == 0

    def of_prompt(self, number: int) -> "Decoding":
        """For one of several prompts, counted from 0: it draws by ``seed`` + number."""
        if self.seed is None or self.is_greedy:
            return self
        return dataclasses.replace(self, seed=self.seed + number)


_ADAPTER = TypeAdapter(Decoding)
SETTINGS: dict[str, FieldInfo] = vars(Decoding)["__pydantic_fields__"]
# What a processor of transformers applies, in the order of transformers.
STEPS = {
    name: step for name, field in SETTINGS.items() for step in field.metadata if isinstance(step, Penalty)
}


def ask(base: Decoding, asked: Mapping[str, object]) -> Decoding:
    """``base`` with the settings in ``asked`` in place of its own; None and other keys are left out.

    Where settings that narrow the choice come without a temperature, it is 1. Raises RecipeError for a wrong
    value.
    """
    given = {name: asked[name] for name in SETTINGS if asked.get(name) not in (None, [])}
    try:
        decoding = _ADAPTER.validate_python({**dataclasses.asdict(base), **given})
    except ValidationError as error:
        raise to_fault(error) from error
    narrowing = [name for name, step in STEPS.items() if isinstance(step, Warper) and name in given]
    narrows = any(getattr(decoding, name) not in STEPS[name].off for name in narrowing)
    if narrows and "temperature" not in given and base.temperature == 0:
        return dataclasses.replace(decoding, temperature=1.0)
    return decoding


def to_fault(error: ValidationError) -> RecipeError:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    what, got = first["msg"].replace("Input should be", "expected"), repr(first["input"])
    what = {"missing": "is missing", "tuple_type": "expected text, or a list of texts"}.get(
        first["type"], what
    )
    is_shown = len(got) < 40 and first["type"] not in ("missing", "json_invalid")
    return RecipeError(what, where=".".join(map(str, first["loc"])), got=got if is_shown else "")
