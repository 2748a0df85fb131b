"""The sections of a recipe: each key with its type, default, help and rule; ``train`` is of transformers."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from hf_clm.errors import did_you_mean
from hf_clm.recipe.template import Template
from hf_clm.recipe.text import model_of
from hf_clm.schema import Format, OnBadRecord, Overflow, TokenizerKind

OWN = ("module:function", r"[^ ]+:[^ ]+")
TRAIN, EVAL = "train", "eval"  # names of sets; one that has a name of its own is eval_NAME


@dataclass(frozen=True)
class Rule:
    """What holds for a key beside its type. It is metadata of the field; most keys need none.

    resume   of another value when a run is resumed: refused, unless resume_override names the key; free;
             unseen, as it says where a run lies, or what is compared by its content. None: as the section
             around it; refused at the top
    decides  whether the key decides what is prepared of the same data
    stream   whether data.streaming takes another value than the default
    instead  what to write where it does not; empty: leave the key out
    needs    the values that other keys must have beside another value than the default; () is any that
             is not false, null or 0
    unused   why another value than the default has no effect here; it is refused
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
OF_ANSWERS = Rule(needs={"evaluation.generate": ()})
# Facts of a run that are compared on resume like keys of its recipe.
FACTS = {
    **dict.fromkeys(("template", "global_batch", "architecture", "base_weights"), "refused"),
    "processes": "free",
}
# Keys of version 0.4: the default, which may still be written out, and what to do about another value.
REMOVED: dict[str, tuple[JsonValue, str]] = {
    "skip_bad_lines": (False, "write on_bad_record: drop"),
    "nul": ("warn", "remove it, and remove U+0000 from the data"),
    "stopping_strategy": (None, "remove it, and write size: the rows or tokens of an epoch"),
}


class Section(BaseModel):
    """Frozen, and strict about types and names of keys."""

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
        """The keys that decide what is prepared of the same data."""
        return {name for name in cls.model_fields if cls.rule(name).decides}

    @classmethod
    def rule(cls, key: str) -> Rule:
        """The rule of a dotted key; what it does not say of ``resume``, the section around it does."""
        name, _, rest = key.partition(".")
        if name not in cls.model_fields:
            return cls.rule(rest) if rest else Rule()  # the number of a source
        info = cls.model_fields[name]
        rule = next((item for item in info.metadata if isinstance(item, Rule)), Rule())
        inner = [model for item in (info.annotation, *get_args(info.annotation)) if (model := model_of(item))]
        below = inner[0].rule(rest) if rest and inner and issubclass(inner[0], Section) else rule
        return replace(below, resume=below.resume or rule.resume)

    def changed(self, prefix: str = "") -> Iterator[tuple[str, Rule]]:
        """(dotted key, its rule) of each value that is not the default, in sections inside too."""
        for name in self.model_dump(exclude_defaults=True):
            yield f"{prefix}{name}", self.rule(name)
            value = getattr(self, name)
            for at, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Section):
                    yield from item.changed(f"{prefix}{name}.{f'{at}.' * isinstance(value, list)}")


class Model(Section):
    name_or_path: str | None = None
    """A model on the Hub or a folder."""
    revision: str | None = None
    """A branch, tag or commit on the Hub."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """Start from trained weights or from random ones."""
    config: Annotated[dict[str, JsonValue], OF_NEW_MODELS] = {}
    """For scratch: {model_type: gpt2, n_layer: 4, ...}."""
    embedding_std: Annotated[float | None, OF_NEW_MODELS] = Field(default=None, gt=0)
    """For scratch: of the first embeddings; 1.0 is PyTorch's own, and learns small texts by heart faster."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the trained weights; small updates are lost below float32."""
    attention: str = "packed"
    """packed, sdpa, eager, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Run code that comes with the model; needs a commit as revision, or a folder."""
    allow_bin: Annotated[bool, OF_TRAINED_MODELS] = False
    """Load pickled weights where there are no safetensors."""


def _word_of(known: tuple[str, ...], other: str, pattern: str) -> AfterValidator:
    """Takes one of these words, or text that matches the pattern."""

    def check(word: str | None) -> str | None:
        if word is None or word in known or re.fullmatch(pattern, word):
            return word
        reason = f"expected one of {', '.join(known)}, or {other}; got {word!r}{did_you_mean(word, known)}"
        raise PydanticCustomError("word", "{reason}", {"reason": reason})

    return AfterValidator(check)


class TokenizerTraining(Section):
    kind: TokenizerKind = "bpe"
    """Byte-level BPE; SentencePiece's Unigram, with bytes for what is rare; every character a token."""
    vocab_size: Annotated[int, Rule(needs={"tokenizer.train.kind": ("bpe", "unigram")})] = Field(
        default=4096, ge=260
    )
    """Number of tokens, the 256 bytes and the special ones included; not for characters."""
    min_frequency: Annotated[int, Rule(needs={"tokenizer.train.kind": ("bpe",)})] = Field(default=2, ge=1)
    """How often a pair must occur to become a token of a bpe."""


class Tokenizer(Section):
    name_or_path: str | None = None
    """Default: the model's."""
    train: Annotated[
        TokenizerTraining | None,
        Rule(
            stream=False,
            instead="train it with hf-clm train-tokenizer",
            needs={"model.init": ("scratch",), "tokenizer.name_or_path": (None,)},
        ),
    ] = None
    """Train one on data.train instead of loading one."""
    pad_token: str = "<|pad|>"
    """Added when the tokenizer has none of its own, or when it equals EOS."""
    eos_token: str | None = None
    """Default: the tokenizer's; <|endoftext|> of one that is trained."""
    control_tokens: list[str] = []
    """Added where the tokenizer has not got them; a template writes them."""
    chat_template: Annotated[str | None, _word_of(("chatml", "plain"), "a .jinja file", r".*\.jinja")] = None
    """chatml, plain, or a .jinja file; default: the tokenizer's."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Variables of the chat template, such as {enable_thinking: false}; saved with it as its defaults."""


class Source(Section):
    path: Annotated[str, Rule("unseen", decides=False)]
    """A file, a glob, a folder, or a dataset on the Hub."""
    format: Annotated[str | None, _word_of(get_args(Format), *OWN), UNSEEN] = None
    """A format, or module:function for a function of your own; default: told from the keys of the records."""
    fields: Annotated[dict[str, str], UNSEEN] = {}
    """The format's key -> the column in the file."""
    template: Annotated[Template | None, UNSEEN] = None
    """In place of a format: {prompt: "{column} ...", completion: ..., labels: {0: no}}, or {text: ...}."""
    overflow: Annotated[Overflow | None, OF_WHOLE_ROWS] = None
    """For an example over max_length; default: data.overflow."""
    limit: Annotated[int | None, Rule("unseen", stream=False)] = Field(default=None, ge=1)
    """Read at most this many records."""
    weight: Annotated[float | None, ASIDE] = Field(default=None, gt=0)
    """Its share of an epoch, beside the weights of the other sources; see data.mixing."""
    epochs: Annotated[
        float | None, Rule(decides=False, stream=False, instead="give each source a weight")
    ] = Field(default=None, gt=0)
    """How often one epoch of the run reads it: 2, 0.5, ...; in place of weights; default beside others: 1."""
    quoting: Literal["auto", "csv", "none"] = "auto"
    """Whether quotes enclose the cells of a table (csv) or are letters (none); auto: letters in .tsv only."""
    split: Annotated[str, UNSEEN] = "train"
    """Of a dataset on the Hub, or of a folder whose files or sub-folders are named train, test, ..."""
    name: Annotated[str | None, UNSEEN] = None
    """The configuration of a dataset on the Hub."""
    revision: Annotated[str | None, UNSEEN] = None
    """A branch, tag or commit on the Hub."""
    set: str | None = Field(default=None, pattern="^[A-Za-z0-9_-]+$")
    """Of data.eval: the evaluation set that it belongs to; {news: a.jsonl, chat: b.jsonl} is short for it."""


class Mixing(Section):
    by: Literal["rows", "tokens", "target_tokens"] = "rows"
    """What shares and sizes count: records, their tokens, or those of them that are learned."""
    temperature: Annotated[float, NOT_STREAMED] = Field(default=1.0, ge=0.1)
    """Without weights, a source of n has a share in proportion to n ** (1 / temperature)."""
    replacement: Annotated[bool, NOT_STREAMED] = False
    """Draw each row independently; else all rows of a source come before one of them is repeated."""
    size: Annotated[int | None, NOT_STREAMED] = Field(default=None, ge=1)
    """Of an epoch, in what by counts; default: all sources together."""


class Window(Section):
    size: int = Field(ge=2)
    """Tokens in a window."""
    step: int = Field(ge=1)
    """Tokens from the start of a window to the start of the next."""


def to_sources(value: Any) -> Any:
    """A path alone, or a list in which some are, as a list of sources."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def to_section(value: Any) -> Any:
    """``true`` is a section with all of its defaults, ``false`` is none."""
    return {} if value is True else None if value is False else value


def to_list(value: Any) -> Any:
    """A text is the list of its parts between commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def to_evaluated(value: Any) -> Any:
    """As ``to_sources``; a mapping from names to sources is a set of each name."""
    if not isinstance(value, dict) or "path" in value or value.keys() <= Source.model_fields.keys():
        return to_sources(value)
    sources = [(str(name), source) for name, items in value.items() for source in to_sources(items)]
    return [{**source, "set": name} if isinstance(source, dict) else source for name, source in sources]


Sources = Annotated[list[Source], BeforeValidator(to_sources)]
Evaluated = Annotated[list[Source], BeforeValidator(to_evaluated)]


class Turns(Section):
    turns: Literal["all", "last"] = "all"
    """Which assistant turns are learned."""
    reasoning: bool = True
    """Whether the reasoning of a learned turn is learned; false: it is only read."""


class Data(Section):
    train: Annotated[Sources, ASIDE] = Field(min_length=1)
    """A path, a list of paths, or a list of sources."""
    eval: Annotated[Evaluated, Rule("free", decides=False)] = []
    """Its own sources, or a mapping from the names of several sets to theirs; or see eval_fraction."""
    eval_fraction: Annotated[float, Rule(stream=False, instead="name the files of data.eval")] = Field(
        default=0.0, ge=0, lt=1
    )
    """The share of the training examples held out, chosen by train.seed; of a single text its end."""
    mixing: Annotated[Mixing | None, ASIDE] = None
    """How the sources of train share an epoch; null: by their weights or epochs, or every row once."""
    eval_train_rows: Annotated[int, Rule("free", decides=False)] = Field(default=0, ge=0)
    """Number of training rows to evaluate as well, without dropout: eval_train_loss in the logs. Without an
    eval set they are evaluated in its place, as eval_loss."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens in a row."""
    overflow: Annotated[Overflow | None, OF_WHOLE_ROWS] = None
    """For an example over max_length; default: keep_target for sft, split for pretrain."""
    render: Literal["auto", "chat", "plain"] = "auto"
    """How instruct, alpaca and prompt_completion are written: as turns of the chat template, or as text.
    auto: as turns for sft where the tokenizer has a template."""
    packing: Literal["none", "best_fit", "stream"] | None = None
    """Default: best_fit for sft, stream (rows are cut, no token is lost) for pretrain."""
    tokens_per_batch: Annotated[
        int | None, Rule(needs={"data.packing": ("none",), "model.attention": ("packed",)})
    ] = Field(default=None, ge=2)
    """The size of a micro-batch in tokens, filled with whole examples; with packing none."""
    window: Annotated[Window | None, Rule(needs={"stage": ("pretrain",), "data.packing": ("none",)})] = None
    """Overlapping pieces of long documents; with packing none."""
    train_on: Annotated[
        Literal["all_turns", "last_turn", "everything"] | Turns, Rule(needs={"stage": ("sft",)})
    ] = "all_turns"
    """Which parts of an example are learned; {turns: all | last, reasoning: false} reads reasoning only."""
    reasoning: Literal["refuse", "in_content", "drop"] = "refuse"
    """For reasoning that the chat template has no place for: an error, written into the content between
    <think> and </think>, or left out and counted."""
    special_tokens_in_text: Literal["encode_as_text", "error", "allow"] = "encode_as_text"
    """For text in a record that spells a control token."""
    max_dropped: Annotated[float, FREE] = Field(default=0.01, ge=0, le=1)
    """The largest share of examples that may be dropped."""
    duplicates: Annotated[Literal["keep", "drop"], NOT_STREAMED] = "keep"
    """Whether rows that are exactly equal to an earlier one are learned again."""
    max_leakage: Annotated[float, FREE] = Field(default=0.01, ge=0, le=1)
    """The largest share of evaluation rows that may be training rows."""
    on_bad_record: Annotated[OnBadRecord, FREE] = "error"
    """For a record that cannot be used: stop with a list of them all, or drop it and count it, within
    max_dropped. A stream always drops it once training has begun."""
    max_line_bytes: Annotated[int, FREE] = Field(default=8_388_608, ge=1)
    """The longest line that is read."""
    strict: Annotated[bool, FREE] = False
    """Unknown keys of a record are errors."""
    allow_empty_prompt: bool = False
    """Learn completions that follow nothing."""
    cache_dir: Annotated[str | None, Rule("unseen", decides=False)] = "~/.cache/hf_clm"
    """Where prepared data are kept; null: nowhere. HF_CLM_CACHE in the environment moves the default."""
    streaming: Annotated[bool, ASIDE] = False
    """Read and tokenize while training, what is too large to prepare; needs train.max_steps."""
    shuffle_buffer: Annotated[int, Rule(decides=False, needs={"data.streaming": (True,)})] = Field(
        default=1000, ge=1
    )
    """Documents of a stream that are packed together and whose rows are shuffled, in whole chunks of a file;
    fewer where they reach 1 MiB of text."""

    @property
    def eval_sets(self) -> list[str]:
        """The names of the sets in eval, in order: ``eval``, or ``eval_news`` and such."""
        names = [f"{EVAL}_{source.set}" if source.set else EVAL for source in self.eval]
        return list(dict.fromkeys(names))

    def sources(self, name: str) -> list[Source]:
        """The sources of a set: train, or one of eval."""
        own = None if name == EVAL else name.removeprefix(f"{EVAL}_")
        return self.train if name == TRAIN else [source for source in self.eval if source.set == own]


def cache_folder(cache_dir: str) -> Path:
    """Returns the folder of ``data.cache_dir``; HF_CLM_CACHE of the environment moves the default one."""
    is_default = cache_dir == Data.model_fields["cache_dir"].default
    moved = os.environ.get("HF_CLM_CACHE") if is_default else None
    return Path(moved or cache_dir).expanduser().absolute()


class Lora(Section):
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


class Samples(Section):
    prompts: list[str] = Field(min_length=1)
    """Each is continued during training."""
    every_steps: int | None = Field(default=None, ge=1)
    """Default: before and after training only."""
    every_epoch: bool = False
    """At the end of each epoch."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The longest answer."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""


class Evaluation(Section):
    generate: Annotated[int, Rule(needs={"stage": ("sft",)})] = Field(default=0, ge=0)
    """How many examples of each evaluation set are answered, greedily, and compared with their targets."""
    every: Annotated[int, OF_ANSWERS] = Field(default=1, ge=1)
    """Only at every nth evaluation; always at the first and the last."""
    metrics: Annotated[
        list[Annotated[str, _word_of(("exact_match", "chrf", "bleu"), *OWN)]],
        BeforeValidator(to_list),
        OF_ANSWERS,
    ] = ["exact_match"]
    """exact_match, chrf, bleu, or module:function of (answers, targets), two lists of texts, that returns a
    number or several by name."""
    max_new_tokens: Annotated[int, OF_ANSWERS] = Field(default=128, ge=1)
    """The longest answer."""


class EarlyStopping(Section):
    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the run stops."""
    threshold: float = Field(default=0.0, ge=0)
    """The smallest change that counts as improvement."""


class Card(Section):
    license: str | None = None
    """Of the model, as the Hub names it: apache-2.0, mit, ..."""
    language: list[str] = []
    """Of the texts: [en], [zh], ..."""
    data_samples: int = Field(default=0, ge=0)
    """So many training examples are shown in the card; the report is pushed to the Hub too then."""


class Doctor(Section):
    self_test: bool = True
    """Before the first step, prove on the real model and data that batching changes no loss."""
    round_trip: Literal["start", "end", "off"] = "start"
    """When the saved model is opened in a fresh process and compared."""


class Loss(Section):
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's sum, which keeps logits from drifting; 1e-4 is usual."""


class Keys(Section):
    """All keys of a recipe, not yet checked with each other."""

    stage: Literal["pretrain", "sft"]
    """Learn whole texts, or the targets only."""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    lora: Annotated[Lora | None, BeforeValidator(to_section), OF_TRAINED_MODELS] = None
    """Train small updates of a frozen model: true, or a mapping; null: train all weights of the model."""
    samples: Annotated[Samples | None, FREE] = None
    """Text generated during training; null: none."""
    evaluation: Evaluation = Evaluation()
    """What an evaluation does beside the loss and the accuracy of the target tokens."""
    early_stopping: Annotated[
        EarlyStopping | None, Rule("free", needs={"train.load_best_model_at_end": (True,)})
    ] = None
    """null: train to the end."""
    loss: Loss = Loss()
    """Terms beside the likelihood; see also train.label_smoothing_factor."""
    card: Annotated[Card, UNSEEN] = Card()
    """The model card, README.md of the output folder."""
    doctor: Annotated[Doctor, UNSEEN] = Doctor()
    """Checks on the real model and data."""
    train: dict[str, Any] = Field(default={})
    """transformers.TrainingArguments, verbatim."""
    overwrite: Annotated[bool | Literal["done"], UNSEEN] = False
    """Move an existing output folder aside; done: only that of a finished run; others are resumed."""
    resume_override: Annotated[list[str], BeforeValidator(to_list), UNSEEN] = Field(default=[])
    """What may differ from the run that is resumed: keys, data, tokenizer, template, global_batch."""

    @property
    def resolved_overflow(self) -> Overflow:
        return self.data.overflow or ("keep_target" if self.stage == "sft" else "split")

    @property
    def resolved_packing(self) -> str:
        return self.data.packing or ("best_fit" if self.stage == "sft" else "stream")
