"""The recipe: one YAML file and the words of the command line become one frozen, checked ``Recipe``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError
from hf_clm.recipe_faults import data_faults, model_faults, token_budget_faults
from hf_clm.recipe_text import (
    COMMAND_LINE,
    accepted_types,
    build_yaml,
    leaves,
    list_keys,
    load_yaml,
    override,
    place_of,
    secret_faults,
    suggest_key,
    to_fault,
    to_options,
    to_type_text,
    to_value,
)
from hf_clm.schema import Format, TokenizerKind
from hf_clm.template import Template
from hf_clm.trainer_fields import (
    TRAIN_DEFAULTS,
    V4_NAMES,
    Fault,
    check_train_combination,
    check_train_values,
    load_trainer_fields,
    shorten,
    to_trainer_types,
)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(_Section):
    name_or_path: str | None = None
    """A model on the Hub or a folder."""
    revision: str | None = None
    """A branch, tag or commit on the Hub."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """Start from trained weights or from random ones."""
    config: dict[str, Any] = {}
    """For scratch: {model_type: gpt2, n_layer: 4, ...}."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the trained weights; small updates are lost below float32."""
    attention: str = "packed"
    """packed, sdpa, eager, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Run code that comes with the model; needs a commit as revision, or a folder."""
    allow_bin: bool = False
    """Load pickled weights where there are no safetensors."""


class TokenizerTraining(_Section):
    kind: TokenizerKind = "bpe"
    """Byte-level BPE; SentencePiece's Unigram, with bytes for what is rare; every character a token."""
    vocab_size: int = Field(default=4096, ge=260)
    """Number of tokens, the 256 bytes and the special ones included; not for characters."""
    min_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to become a token of a bpe."""


class Tokenizer(_Section):
    name_or_path: str | None = None
    """Default: the model's."""
    train: TokenizerTraining | None = None
    """Train one on data.train instead of loading one."""
    pad_token: str = "<|pad|>"
    """Added when the tokenizer has none of its own, or when it equals EOS."""
    eos_token: str | None = None
    """Default: the tokenizer's."""
    control_tokens: list[str] = []
    """Added where the tokenizer has not got them; a template writes them."""
    chat_template: str | None = None
    """chatml, plain, or a .jinja file; default: the tokenizer's."""


class Source(_Section):
    path: str
    """A file, a glob, a folder, or a dataset on the Hub."""
    format: Format | None = None
    """Default: told from the keys of the first record."""
    fields: dict[str, str] = {}
    """The format's key -> the column in the file."""
    template: Template | None = None
    """In place of a format: {prompt: "{column} ...", completion: ..., labels: {0: no}}, or {text: ...}."""
    split: str = "train"
    """Of a dataset on the Hub."""
    name: str | None = None
    """The configuration of a dataset on the Hub."""
    revision: str | None = None
    """A branch, tag or commit on the Hub."""


class Window(_Section):
    size: int = Field(ge=2)
    """Tokens in a window."""
    step: int = Field(ge=1)
    """Tokens from the start of a window to the start of the next."""


def _to_sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_to_sources)]


class Data(_Section):
    train: Sources = Field(min_length=1)
    """A path, a list of paths, or a list of sources."""
    eval: Sources = []
    """Its own sources; or see eval_fraction."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """The share of the training examples held out, chosen by train.seed."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens in a row."""
    overflow: Literal["keep_target", "truncate", "drop", "error", "split"] | None = None
    """For an example over max_length; default: keep_target for sft, split for pretrain."""
    packing: Literal["none", "best_fit", "stream"] | None = None
    """Default: best_fit for sft, stream (rows are cut, no token is lost) for pretrain."""
    tokens_per_batch: int | None = Field(default=None, ge=2)
    """The size of a micro-batch in tokens, filled with whole examples; with packing none."""
    window: Window | None = None
    """Overlapping pieces of long documents; with packing none."""
    train_on: Literal["all_turns", "last_turn", "everything"] = "all_turns"
    """Which parts of a conversation are learned."""
    special_tokens_in_text: Literal["encode_as_text", "error", "allow"] = "encode_as_text"
    """For text in a record that spells a control token."""
    max_dropped: float = Field(default=0.01, ge=0, le=1)
    """The largest share of examples that may be dropped."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether rows that are exactly equal to an earlier one are learned again."""
    max_leakage: float = Field(default=0.01, ge=0, le=1)
    """The largest share of evaluation rows that may be training rows."""
    skip_bad_lines: bool = False
    """Count and list unreadable lines instead of stopping."""
    max_line_bytes: int = Field(default=8_388_608, ge=1)
    """The longest line that is read."""
    strict: bool = False
    """Unknown keys of a record are errors."""
    nul: Literal["warn", "error"] = "warn"
    """For a NUL character in a text."""
    allow_empty_prompt: bool = False
    """Learn completions that follow nothing."""
    cache_dir: str | None = "~/.cache/hf_clm"
    """Where prepared data are kept; null: nowhere. HF_CLM_CACHE in the environment moves the default."""


class Lora(_Section):
    r: int = Field(default=16, ge=1)
    """Rank of the updates."""
    alpha: int = Field(default=32, ge=1)
    """The updates are scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into an update."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which layers are updated: all but the head, or the ends of their names, such as q_proj."""
    modules_to_save: list[str] = []
    """Modules that are trained whole, and saved with the adapter."""
    use_dora: bool = False
    """Train the size of each update apart from its direction."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), for large r."""
    quantize: Literal["4bit"] | None = None
    """Keep the frozen model in 4 bits (QLoRA); on a GPU, with the extra qlora."""


class Samples(_Section):
    prompts: list[str] = Field(min_length=1)
    """Each is continued during training."""
    every_steps: int | None = Field(default=None, ge=1)
    """Default: before and after training only."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The longest answer."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""


class EarlyStopping(_Section):
    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the run stops."""
    threshold: float = Field(default=0.0, ge=0)
    """The smallest change that counts as improvement."""


class Doctor(_Section):
    self_test: bool = True
    """Before the first step, prove on the real model and data that batching changes no loss."""
    round_trip: Literal["start", "end", "off"] = "start"
    """When the saved model is opened in a fresh process and compared."""


class Loss(_Section):
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's sum, which keeps logits from drifting; 1e-4 is usual."""


@dataclass
class _Origins:
    """Where each key was given; two of them are always equal, so recipes compare by what they say."""

    places: dict[str, str] = field(default_factory=dict, compare=False)
    file: str = field(default="", compare=False)


class _Faults(ValueError):
    def __init__(self, faults: list[Fault]):
        self.faults = faults
        super().__init__(faults[0].what)


class Recipe(_Section):
    """A run: one that was built has passed every check that needs neither data nor model."""

    stage: Literal["pretrain", "sft"]
    """Learn whole texts, or the targets only."""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    lora: Lora | None = None
    """Train small updates of a frozen model; null: train the model."""
    samples: Samples | None = None
    """Text generated during training; null: none."""
    early_stopping: EarlyStopping | None = None
    """null: train to the end."""
    loss: Loss = Loss()
    """Terms beside the likelihood; see also train.label_smoothing_factor."""
    doctor: Doctor = Doctor()
    """Checks on the real model and data."""
    train: dict[str, Any] = {}
    """transformers.TrainingArguments, verbatim."""
    overwrite: bool = False
    """Move an existing output folder aside."""
    _origins: _Origins = PrivateAttr(default_factory=_Origins)

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: dict[str, Any]) -> dict[str, Any]:
        if faults := check_train_values(train):
            raise _Faults(faults)
        return to_trainer_types(train)

    @model_validator(mode="after")
    def _check_together(self) -> "Recipe":
        has_eval = bool(self.data.eval or self.data.eval_fraction)
        faults = [*model_faults(self), *data_faults(self), *token_budget_faults(self)]
        faults += check_train_combination(self.train, has_eval=has_eval, defaults=TRAIN_DEFAULTS)
        if self.early_stopping and not self.train.get("load_best_model_at_end"):
            what = "early_stopping needs train.load_best_model_at_end: true and an eval set"
            faults.append(Fault("early_stopping", what))
        if faults:
            raise _Faults(faults)
        return self

    @property
    def file(self) -> str:
        """Where the recipe was read; empty for one made in Python."""
        return self._origins.file

    @property
    def resolved_overflow(self) -> str:
        return self.data.overflow or ("keep_target" if self.stage == "sft" else "split")

    @property
    def resolved_packing(self) -> str:
        return self.data.packing or ("best_fit" if self.stage == "sft" else "stream")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; ``overrides`` are words: ``["--bf16", "--learning_rate", "1e-4", "--stage=sft"]``.

    Raises RecipeError with the line of the file, or "command line", for the first thing that is wrong.
    """
    tree, places = load_yaml(str(path))
    fields = dict(list_keys(Recipe))
    for name, text in to_options(overrides):
        key = _to_key(name)
        value = to_value(key, text, types=_types_of(key, fields.get(key)))
        if key in ("data.train", "data.eval") and isinstance(tree.get("data"), dict):
            value = _with_known_format(value, tree["data"].get(key.removeprefix("data.")))
        override(tree, places, key=key, value=value)
    if not (faults := secret_faults(tree)):
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            faults = _to_faults(error)
        else:
            recipe._origins.places.update(places)
            recipe._origins.file = str(path)
            return recipe
    first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    what, got = (first.what, first.got + more) if first.got else (first.what + more, "")
    raise RecipeError(what, where=place_of(first.key, places, otherwise=str(path)), got=got, fix=first.fix)


def training_values(recipe: Recipe) -> dict[str, Any]:
    """What ``transformers.TrainingArguments`` is given; of a token budget, the row is the micro-batch."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    return TRAIN_DEFAULTS | (dict.fromkeys(sizes, 1) if recipe.data.tokens_per_batch else {}) | recipe.train


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included; reading it gives an equal one."""
    text = StringIO()
    build_yaml().dump(recipe.model_dump(), text)
    return text.getvalue()


def describe_recipe(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """(dotted key, value, origin): "default", "hf_clm default", "command line" or "recipes/x.yaml:9"."""
    places = recipe._origins.places
    values = recipe.model_dump()
    defaults = training_values(recipe)
    values["train"] |= {key: value for key, value in defaults.items() if key not in recipe.train}

    def origin(key: str) -> str:
        may_be_short = key.startswith("data.") and key.endswith(".path")  # data.train: my.jsonl
        default = "hf_clm default" if key.startswith("train.") else "default"
        return place_of(key, places, otherwise=default) if may_be_short else places.get(key, default)

    return [(key, value, origin(key)) for key, value in leaves(values)]


def recipe_help() -> str:
    """Every key of a recipe with its type, default and meaning."""
    lines = ["Keys of a recipe, in YAML, or as --section.key VALUE on the command line:"]
    lines += [line for key, info in list_keys(Recipe) for line in _help_lines(f"--{key}", info)]
    lines += ["", "Keys of a source in data.train and data.eval:"]
    lines += [line for key, info in list_keys(Source) for line in _help_lines(key, info)]
    lines += ["", "Every field of transformers.TrainingArguments can be given bare: --learning_rate 1e-4"]
    return "\n".join(lines)


def _to_faults(error: ValidationError) -> list[Fault]:
    known = [key for key, _ in list_keys(Recipe)] + [f"train.{name}" for name in load_trainer_fields()]
    faults = []
    for details in error.errors():
        cause = details.get("ctx", {}).get("error")
        faults += cause.faults if isinstance(cause, _Faults) else [to_fault(details, known)]
    return faults


def _to_key(name: str) -> str:
    if "." in name or name in Recipe.model_fields:
        return name
    fields = load_trainer_fields()
    if name in fields or name in V4_NAMES:
        return f"train.{name}"
    near = suggest_key(name, [*fields, *(key for key, _ in list_keys(Recipe))])
    raise RecipeError(f"unknown option --{name}{near}", where=COMMAND_LINE)


def _types_of(key: str, info: FieldInfo | None) -> tuple[str, ...]:
    field = load_trainer_fields().get(key.removeprefix("train.")) if key.startswith("train.") else None
    return field.types if field else accepted_types(info)


def _with_known_format(value: Any, old: Any) -> Any:
    """A path alone gets the format and the columns that all the recipe's sources share."""
    paths = value if isinstance(value, list) else [value]
    sources = [source for source in _to_sources(old or []) if isinstance(source, dict)]
    shared = ("format", "fields", "template")
    known = [{key: source[key] for key in shared if key in source} for source in sources]
    is_shared = bool(known) and all(item == known[0] for item in known)
    if is_shared and all(isinstance(path, str) for path in paths):
        return [{"path": path, **known[0]} for path in paths]
    return value


def _help_lines(key: str, info: FieldInfo) -> list[str]:
    if not info.description:  # a section
        return [""]
    default = "required" if info.is_required() else f"default {shorten(info.default)}"
    return [f"  {key}  {to_type_text(info.annotation)}  ({default})", f"      {info.description}"]
