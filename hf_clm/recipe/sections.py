"""The sections of a recipe. Each key has its type, default, help and rule; ``train`` is in trainer_fields."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from hf_clm.errors import did_you_mean
from hf_clm.recipe.text import model_of
from hf_clm.schema import Format, OnBadRecord, Overflow, TokenizerKind
from hf_clm.template import Template

FUNCTION = ("module:function", r"[^ ]+:[^ ]+")
TRAIN, EVAL = "train", "eval"  # names of sets; a named evaluation set is eval_NAME


@dataclass(frozen=True)
class Rule:
    """The rules of a key that its type does not express. Metadata of the field; most keys have none.

    resume   whether the value may differ when a run is resumed: refused, unless resume_override names the
             key; free; unseen, which is not compared, as it names a place, or data that are compared by their
             content. None: as the enclosing section, refused at the top level
    decides  whether the key affects the prepared set
    stream   whether data.streaming allows another value than the default
    instead  what to do if it does not; empty: remove the key
    needs    values that other keys must have if this one is not the default; () stands for any value except
             false, null and 0
    unused   why another value than the default would have no effect, and is refused
    """

    resume: Literal["refused", "free", "unseen"] | None = None
    decides: bool = True
    stream: bool = True
    instead: str = ""
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    unused: str = ""


FREE, UNSEEN, ASIDE, NOT_STREAMED = Rule("free"), Rule("unseen"), Rule(decides=False), Rule(stream=False)
OF_NEW_MODELS = Rule(needs={"model.init": ("scratch",)})
OF_TRAINED_MODELS = Rule(needs={"model.init": ("pretrained",)})
OF_WHOLE_ROWS = Rule(needs={"data.packing": ("none", "best_fit")})
OF_MUON = Rule(needs={"optimizer.name": ("muon",)})
OF_ANSWERS = Rule(needs={"evaluation.generate": ()})
# Facts of a run that are compared on a resume, like the keys of its recipe.
FACTS = {
    **dict.fromkeys(("template", "global_batch", "architecture", "base_weights"), "refused"),
    "processes": "free",
}
# Keys of version 0.4: the default, which is still accepted, and how to replace other values.
REMOVED: dict[str, tuple[JsonValue, str]] = {
    "skip_bad_lines": (False, "use on_bad_record: drop"),
    "nul": ("warn", "remove it, and remove U+0000 from the data"),
    "stopping_strategy": (None, "remove it, and set size to the rows or tokens of an epoch"),
}


class Section(BaseModel):
    """A section of a recipe: frozen, and strict about the types and names of keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_removed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key not in REMOVED or REMOVED[key][0] != item}

    @classmethod
    def deciding(cls) -> set[str]:
        """Returns the keys that affect the prepared set."""
        return {name for name in cls.model_fields if cls.rule(name).decides}

    @classmethod
    def rule(cls, key: str) -> Rule:
        """Returns the rule of a dotted key. Without a ``resume`` rule, it has that of its section."""
        name, _, rest = key.partition(".")
        if name not in cls.model_fields:
            return cls.rule(rest) if rest else Rule()  # the number of a source
        info = cls.model_fields[name]
        rule = next((item for item in info.metadata if isinstance(item, Rule)), Rule())
        inner = [model for item in (info.annotation, *get_args(info.annotation)) if (model := model_of(item))]
        below = inner[0].rule(rest) if rest and inner and issubclass(inner[0], Section) else rule
        return replace(below, resume=below.resume or rule.resume)

    def changed(self, prefix: str = "") -> Iterator[tuple[str, Rule]]:
        """Yields (dotted key, its rule) for each value that is not the default, including nested sections."""
        for name in self.model_dump(exclude_defaults=True):
            yield f"{prefix}{name}", self.rule(name)
            value = getattr(self, name)
            for at, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Section):
                    yield from item.changed(f"{prefix}{name}.{f'{at}.' * isinstance(value, list)}")


class Model(Section):
    name_or_path: str | None = None
    """The model to train: its name on the Hub, a local folder, or a GGUF file."""
    revision: str | None = None
    """The branch, tag or commit of a model on the Hub."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """Whether to start from pretrained weights, or from random ones (scratch)."""
    config: Annotated[dict[str, JsonValue], OF_NEW_MODELS] = {}
    """The configuration of a model from scratch, such as {model_type: gpt2, n_layer: 4}."""
    embedding_std: Annotated[float | None, OF_NEW_MODELS] = Field(default=None, gt=0)
    """The standard deviation of the initial embeddings of a model from scratch. PyTorch's default of 1.0
    memorises small texts faster."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the trained weights. With less than float32, small updates are lost in rounding."""
    attention: str = "packed"
    """The attention implementation: packed (for packed rows), or one of transformers, such as sdpa, eager or
    flash_attention_2."""
    attention_dropout: Annotated[float | None, OF_TRAINED_MODELS] = Field(default=None, ge=0, lt=1)
    """The dropout of the attention of a pretrained model. Default: that of its configuration. With 0,
    a GPU can use its fused kernel for packed rows."""
    trust_remote_code: bool = False
    """Run the custom code of the model. Requires a commit as revision, or a local folder."""
    allow_bin: Annotated[bool, OF_TRAINED_MODELS] = False
    """Load pickled weights if the model has no safetensors files."""


def _word_of(choices: tuple[str, ...], other: str, pattern: str) -> AfterValidator:
    """Accepts one of these words, or text that matches the pattern."""

    def check(word: str | None) -> str | None:
        if word is None or word in choices or re.fullmatch(pattern, word):
            return word
        reason = (
            f"expected one of {', '.join(choices)}, or {other}; got {word!r}{did_you_mean(word, choices)}"
        )
        raise PydanticCustomError("word", "{reason}", {"reason": reason})

    return AfterValidator(check)


class TokenizerTraining(Section):
    kind: TokenizerKind = "bpe"
    """bpe is byte-level BPE; unigram is SentencePiece's Unigram with byte fallback; characters makes every
    character a token."""
    vocab_size: Annotated[int, Rule(needs={"tokenizer.train.kind": ("bpe", "unigram")})] = Field(
        default=4096, ge=260
    )
    """The number of tokens, including the 256 bytes and the special tokens. Not for characters."""
    min_frequency: Annotated[int, Rule(needs={"tokenizer.train.kind": ("bpe",)})] = Field(default=2, ge=1)
    """The number of times that a pair must occur to become a token of a BPE."""


class Tokenizer(Section):
    name_or_path: str | None = None
    """A tokenizer on the Hub, or a local folder or file. Default: the model's."""
    train: Annotated[
        TokenizerTraining | None,
        Rule(
            stream=False,
            instead="train it with hf-clm train-tokenizer",
            needs={"model.init": ("scratch",), "tokenizer.name_or_path": (None,)},
        ),
    ] = None
    """Train a tokenizer on data.train instead of loading one."""
    pad_token: str = "<|pad|>"
    """The pad token to add if the tokenizer has none, or uses its end token for padding."""
    eos_token: str | None = None
    """The end token. Default: the tokenizer's, or <|endoftext|> for a tokenizer that is trained."""
    control_tokens: list[str] = []
    """Tokens that templates write. Those that the tokenizer lacks are added."""
    chat_template: Annotated[str | None, _word_of(("chatml", "plain"), "a .jinja file", r".*\.jinja")] = None
    """The chat template: chatml, plain, or a .jinja file. Default: the tokenizer's."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Variables of the chat template, such as {enable_thinking: false}. Saved as its new defaults."""


class Source(Section):
    path: Annotated[str, Rule("unseen", decides=False)]
    """A file, a glob, a folder, or a dataset on the Hub."""
    format: Annotated[str | None, _word_of(get_args(Format), *FUNCTION), UNSEEN] = None
    """The format of the records, or module:function to use a Python function. Default: detected from their
    keys."""
    fields: Annotated[dict[str, str], UNSEEN] = {}
    """Renames columns: maps a key of the format to the column in the file."""
    template: Annotated[Template | None, UNSEEN] = None
    """Replaces a format: {prompt: "{column} ...", completion: ..., labels: {0: no}}, or {text: ...}."""
    overflow: Annotated[Overflow | None, OF_WHOLE_ROWS] = None
    """What to do with an example that is longer than max_length. Default: data.overflow."""
    limit: Annotated[int | None, Rule("unseen", stream=False)] = Field(default=None, ge=1)
    """The maximum number of records to read."""
    weight: Annotated[float | None, ASIDE] = Field(default=None, gt=0)
    """The share of an epoch, relative to the weights of the other sources. See data.mixing."""
    epochs: Annotated[
        float | None, Rule(decides=False, stream=False, instead="give each source a weight")
    ] = Field(default=None, gt=0)
    """How often an epoch of the run reads this source, such as 2 or 0.5, as an alternative to weights.
    Default if another source sets it: 1."""
    quoting: Literal["auto", "csv", "none"] = "auto"
    """Whether quotes in a table enclose cells (csv) or are ordinary characters (none). auto: none for .tsv
    files, csv for others."""
    split: Annotated[str, UNSEEN] = "train"
    """The split of a dataset on the Hub, or of a folder with files or subfolders named train, test, ..."""
    name: Annotated[str | None, UNSEEN] = None
    """The name of a configuration of a dataset on the Hub."""
    revision: Annotated[str | None, UNSEEN] = None
    """The branch, tag or commit of a dataset on the Hub."""
    set: str | None = Field(default=None, pattern="^[A-Za-z0-9_-]+$")
    """The evaluation set of a source in data.eval. Short form: {news: a.jsonl, chat: b.jsonl}."""


class Mixing(Section):
    by: Literal["rows", "tokens", "target_tokens"] = "rows"
    """The unit of shares and sizes: rows, tokens, or target tokens."""
    temperature: Annotated[float, NOT_STREAMED] = Field(default=1.0, ge=0.1)
    """Without weights, the share of a source of size n is proportional to n ** (1 / temperature)."""
    replacement: Annotated[bool, NOT_STREAMED] = False
    """Draw each row independently. Otherwise, all rows of a source are used before one is repeated."""
    size: Annotated[int | None, NOT_STREAMED] = Field(default=None, ge=1)
    """The size of an epoch, in the unit of by. Default: the size of all sources together."""


class Window(Section):
    size: int = Field(ge=2)
    """The number of tokens in a window."""
    step: int = Field(ge=1)
    """The number of tokens from the start of one window to the start of the next."""


def to_sources(value: Any) -> Any:
    """Converts a path, or a list of paths and sources, to a list of sources."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def to_section(value: Any) -> Any:
    """Converts ``true`` to a section with its defaults, ``false`` to None."""
    return {} if value is True else None if value is False else value


def to_named(value: Any) -> Any:
    """Converts text to a section with this name."""
    return {"name": value} if isinstance(value, str) else value


def to_list(value: Any) -> Any:
    """Splits text at commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def to_evaluated(value: Any) -> Any:
    """Converts like ``to_sources``. A mapping from names to sources becomes sources with a set."""
    if not isinstance(value, dict) or "path" in value or value.keys() <= Source.model_fields.keys():
        return to_sources(value)
    sources = [(str(name), source) for name, items in value.items() for source in to_sources(items)]
    return [{**source, "set": name} if isinstance(source, dict) else source for name, source in sources]


Sources = Annotated[list[Source], BeforeValidator(to_sources)]
Evaluated = Annotated[list[Source], BeforeValidator(to_evaluated)]


class Turns(Section):
    turns: Literal["all", "last"] = "all"
    """Which assistant turns to learn."""
    reasoning: bool = True
    """Whether to learn the reasoning of these turns too. false: it is in the context only."""


class Data(Section):
    train: Annotated[Sources, ASIDE] = Field(min_length=1)
    """The training data: a path, a list of paths, or a list of sources."""
    eval: Annotated[Evaluated, Rule("free", decides=False)] = []
    """The evaluation data, given like train, or as a mapping from the names of several sets to their data.
    See also eval_fraction."""
    eval_fraction: Annotated[float, Rule(stream=False, instead="name the files of data.eval")] = Field(
        default=0.0, ge=0, lt=1
    )
    """The share of the training examples to hold out for evaluation, selected by train.seed. The end of a
    single text is held out."""
    mixing: Annotated[Mixing | None, ASIDE] = None
    """How to mix the sources of train. null: by their weights or epochs, or every row once."""
    eval_train_rows: Annotated[int, Rule("free", decides=False)] = Field(default=0, ge=0)
    """The number of training rows to evaluate as well, without dropout (logged as eval_train_loss). Without
    an eval set, they are the eval set (eval_loss)."""
    max_length: int = Field(default=1024, ge=2)
    """The maximum number of tokens in a row."""
    overflow: Annotated[Overflow | None, OF_WHOLE_ROWS] = None
    """What to do with an example that is longer than max_length. Default: keep_target for sft, split for
    pretrain."""
    render: Literal["auto", "chat", "plain"] = "auto"
    """How to render instruct, alpaca and prompt_completion records: as turns of the chat template (chat), or
    as plain text. auto: chat for sft if the tokenizer has a template."""
    packing: Literal["none", "best_fit", "stream"] | None = None
    """How to pack rows: best_fit combines complete rows; stream cuts the concatenated tokens into full rows.
    Default: best_fit for sft, stream for pretrain."""
    tokens_per_batch: Annotated[int | None, Rule(needs={"model.attention": ("packed",)})] = Field(
        default=None, ge=2
    )
    """The largest micro-batch in tokens. Packed rows: the number of rows in it is chosen so that the global
    batch stays; default on a GPU: what its memory allows. packing: none: filled with complete examples."""
    window: Annotated[Window | None, Rule(needs={"stage": ("pretrain",), "data.packing": ("none",)})] = None
    """Splits long documents into overlapping windows. Requires packing: none."""
    train_on: Annotated[
        Literal["all_turns", "last_turn", "everything"] | Turns, Rule(needs={"stage": ("sft",)})
    ] = "all_turns"
    """Which parts of an example to learn. {turns: all | last, reasoning: false} excludes the reasoning."""
    reasoning: Literal["refuse", "in_content", "drop"] = "refuse"
    """What to do with reasoning that the chat template does not render: raise an error, write it into the
    content between <think> and </think>, or drop and count it."""
    special_tokens_in_text: Literal["encode_as_text", "error", "allow"] = "encode_as_text"
    """What to do with text in a record that spells out a control token."""
    max_dropped: Annotated[float, FREE] = Field(default=0.01, ge=0, le=1)
    """The maximum share of examples that may be dropped."""
    duplicates: Annotated[Literal["keep", "drop"], NOT_STREAMED] = "keep"
    """Whether to keep or drop rows that are identical to an earlier one."""
    max_leakage: Annotated[float, FREE] = Field(default=0.01, ge=0, le=1)
    """The maximum share of evaluation rows that may also be training rows."""
    on_bad_record: Annotated[OnBadRecord, FREE] = "error"
    """What to do with invalid records: stop with a list of them all, or drop and count them, up to
    max_dropped. Streaming always drops them once training has begun."""
    max_line_bytes: Annotated[int, FREE] = Field(default=8_388_608, ge=1)
    """The maximum length of a line in bytes."""
    without: Annotated[list[str], BeforeValidator(to_list), Rule(decides=False, stream=False)] = []
    """Records to leave out of training, as FILE:LINE. Only their labels are masked: the order of the rows and
    the divisor of each step stay, so that the run can be compared with one that has them."""
    strict: Annotated[bool, FREE] = False
    """Treat unknown keys of a record as errors."""
    allow_empty_prompt: bool = False
    """Allow completions with an empty prompt."""
    cache_dir: Annotated[str | None, Rule("unseen", decides=False)] = "~/.cache/hf_clm"
    """The folder for prepared data; null: do not cache them. The environment variable HF_CLM_CACHE changes
    the default."""
    streaming: Annotated[bool, ASIDE] = False
    """Read and tokenize the data during training, for data that are too large to prepare. Requires
    train.max_steps."""
    shuffle_buffer: Annotated[int, Rule(decides=False, needs={"data.streaming": (True,)})] = Field(
        default=1000, ge=1
    )
    """The number of documents of a stream that are packed and shuffled together, in complete chunks of a
    file. Fewer if they reach 1 MiB of text."""

    @property
    def eval_sets(self) -> list[str]:
        """The names of the evaluation sets, in order: ``eval``, or ``eval_news`` and so on."""
        names = [f"{EVAL}_{source.set}" if source.set else EVAL for source in self.eval]
        return list(dict.fromkeys(names))

    def sources(self, name: str) -> list[Source]:
        """Returns the sources of train, or of an evaluation set."""
        label = None if name == EVAL else name.removeprefix(f"{EVAL}_")
        return self.train if name == TRAIN else [source for source in self.eval if source.set == label]


def cache_folder(cache_dir: str) -> Path:
    """Returns the folder of ``data.cache_dir``; HF_CLM_CACHE of the environment moves the default one."""
    is_default = cache_dir == Data.model_fields["cache_dir"].default
    moved = os.environ.get("HF_CLM_CACHE") if is_default else None
    return Path(moved or cache_dir).expanduser().absolute()


class Lora(Section):
    r: int = Field(default=16, ge=1)
    """The rank of the updates."""
    alpha: int = Field(default=32, ge=1)
    """The updates are scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout of the input of the adapters."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """The layers with adapters: all except the head, or those with these endings of names, such as q_proj."""
    modules_to_save: list[str] = []
    """Modules to train completely and save with the adapter."""
    use_dora: bool = False
    """Train the magnitude and direction of the weights separately (DoRA)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead, which suits a large r."""
    quantize: Literal["4bit"] | None = None
    """Quantize the frozen model to 4 bits (QLoRA). Requires hf_clm[qlora]."""


def _check_patterns(patterns: str | list[str]) -> str | list[str]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            reason = f"expected a regular expression; got {pattern!r}: {error}"
            raise PydanticCustomError("pattern", "{reason}", {"reason": reason}) from None
    return patterns


class WeightGroup(Section):
    match: Annotated[str, AfterValidator(_check_patterns)]
    """A regular expression that is searched for in the full names of weights, such as lora_B or \\.mlp\\."""
    learning_rate: float | None = Field(default=None, gt=0)
    """The learning rate of these weights at the peak of the schedule. Default: train.learning_rate, with
    layer_decay."""
    weight_decay: float | None = Field(default=None, ge=0)
    """The weight decay of these weights. Default: train.weight_decay, and 0 for biases and norms."""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of hidden layers and AdamW for all other weights. Both use
    train.learning_rate and train.weight_decay, and AdamW train.adam_beta1 and so on."""
    momentum: Annotated[float, OF_MUON] = Field(default=0.95, ge=0, lt=1)
    """The momentum of Muon."""
    nesterov: Annotated[bool, OF_MUON] = True
    """Whether the momentum of Muon is Nesterov's."""
    ns_steps: Annotated[int, OF_MUON] = Field(default=5, ge=1, le=20)
    """The number of Newton-Schulz iterations with which Muon makes an update orthogonal."""
    groups: list[WeightGroup] = []
    """Groups of weights with another learning rate or weight decay. A weight belongs to the first group that
    matches it."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The factor of the learning rate from each layer to the one below it: 1 for head and final norm,
    layer_decay for the last layer, and the least for the embeddings."""
    freeze: Annotated[list[str], BeforeValidator(to_list), AfterValidator(_check_patterns)] = []
    """Regular expressions, like match of a group. Weights that one of them matches are not trained."""


class Samples(Section):
    prompts: list[str] = Field(min_length=1)
    """Prompts to answer during training."""
    every_steps: int | None = Field(default=None, ge=1)
    """The number of steps between samples. Default: only before and after training."""
    every_epoch: bool = False
    """Whether to sample at the end of each epoch."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The maximum number of tokens in an answer."""
    temperature: float = Field(default=0.0, ge=0)
    """The sampling temperature; 0: greedy."""


class Evaluation(Section):
    generate: Annotated[int, Rule(needs={"stage": ("sft",)})] = Field(default=0, ge=0)
    """The number of examples of each evaluation set to answer greedily and compare with their targets."""
    every: Annotated[int, OF_ANSWERS] = Field(default=1, ge=1)
    """Answer at every nth evaluation only, and at the first and last."""
    metrics: Annotated[
        list[Annotated[str, _word_of(("exact_match", "chrf", "bleu"), *FUNCTION)]],
        BeforeValidator(to_list),
        OF_ANSWERS,
    ] = ["exact_match"]
    """The metrics of the answers: exact_match, chrf, bleu, or module:function to use a Python function of two
    lists of texts (answers, targets) that returns a number or a dict of numbers."""
    max_new_tokens: Annotated[int, OF_ANSWERS] = Field(default=128, ge=1)
    """The maximum number of tokens in an answer."""


class EarlyStopping(Section):
    patience: int = Field(default=3, ge=1)
    """The number of evaluations without improvement after which the run stops."""
    threshold: float = Field(default=0.0, ge=0)
    """The minimum change that counts as an improvement."""


class Card(Section):
    license: str | None = None
    """The license of the model, as named by the Hub: apache-2.0, mit, ..."""
    language: list[str] = []
    """The languages of the texts: [en], [zh], ..."""
    data_samples: int = Field(default=0, ge=0)
    """The number of training examples to show in the card. If set, the report is pushed to the Hub too."""


class Doctor(Section):
    self_test: bool = True
    """Test on the real model and data, before the first step, that batching does not change the loss."""
    round_trip: Literal["start", "end", "off"] = "start"
    """When to load the saved model in a fresh process and compare it."""


class Loss(Section):
    z_loss: float = Field(default=0.0, ge=0)
    """The weight of the squared log of the softmax's denominator, which keeps logits from drifting. 1e-4 is
    common."""


class Keys(Section):
    """All keys of a recipe, before they are checked together."""

    stage: Literal["pretrain", "sft"]
    """Learn complete texts (pretrain), or the targets of prompts (sft)."""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    lora: Annotated[Lora | None, BeforeValidator(to_section), OF_TRAINED_MODELS] = None
    """Train LoRA adapters of a frozen model: true, or a mapping. null: train all weights of the model."""
    optimizer: Annotated[OptimizerSection | None, BeforeValidator(to_named)] = None
    """Muon, groups of weights with learning rates of their own, frozen weights. null: train.optim updates all
    weights alike."""
    samples: Annotated[Samples | None, FREE] = None
    """Generate text during training. null: none."""
    evaluation: Evaluation = Evaluation()
    """What to evaluate besides the loss and the accuracy of the target tokens."""
    early_stopping: Annotated[
        EarlyStopping | None, Rule("free", needs={"train.load_best_model_at_end": (True,)})
    ] = None
    """Stop when the evaluation no longer improves. null: train to the end."""
    loss: Loss = Loss()
    """Additional terms of the loss. See also train.label_smoothing_factor."""
    card: Annotated[Card, UNSEEN] = Card()
    """The model card, which is README.md in the output folder."""
    doctor: Annotated[Doctor, UNSEEN] = Doctor()
    """Tests with the real model and data."""
    train: dict[str, Any] = Field(default={})
    """The fields of transformers.TrainingArguments."""
    overwrite: Annotated[bool | Literal["done"], UNSEEN] = False
    """Move an existing output folder aside. done: only if its run is finished; otherwise it is resumed."""
    resume_override: Annotated[list[str], BeforeValidator(to_list), UNSEEN] = Field(default=[])
    """What may differ from the resumed run: keys, or data, tokenizer, template, global_batch."""

    @property
    def resolved_overflow(self) -> Overflow:
        return self.data.overflow or ("keep_target" if self.stage == "sft" else "split")

    @property
    def resolved_packing(self) -> str:
        return self.data.packing or ("best_fit" if self.stage == "sft" else "stream")
