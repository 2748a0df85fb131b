"""Loads or initialises a causal language model that fits its tokenizer."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import deepspeed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from hf_clm.errors import ModelError, did_you_mean
from hf_clm.hub import load_options, loading
from hf_clm.model import attention as packed
from hf_clm.recipe.shapes import is_causal_class, total_memory
from hf_clm.schema import Json
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.tokenizer import max_token_id, unique_ids

NEW_TOKENS = 256  # of an answer, unless the caller says otherwise

SPECIAL_TOKENS = ("bos", "eos", "pad")
SMALL = 20_000_000  # weights of a model that is built in passing
BUILD_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, MemoryError, ImportError, StrictDataclassError),
)

LOGGER = logging.getLogger(__name__)
WHERE = "model.name_or_path"
GENERATION_FILE = "generation_config.json"
PACKED_LAYERS = {"full_attention", "sliding_attention"}
MASKED_LAYERS = PACKED_LAYERS | {
    "chunked_attention"
}  # in others, such as a convolution, text flows past a mask


def load_config(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of a causal language model. Raises ModelError if it is another kind of model."""
    options = load_options(name_or_path, revision=revision, where=WHERE)
    with loading(name_or_path, where="model"):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    architectures = config.architectures or []
    causal = any(map(is_causal_class, architectures))
    if config.is_encoder_decoder or (architectures and not causal):
        got = ", ".join(architectures) or config.model_type
        raise ModelError("not a causal language model", where=f"{WHERE} {name_or_path}", got=got)
    return config


def build_config(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None
) -> PretrainedConfig:
    """The configuration of a new model: ``settings`` as in its config class, ids from the tokenizer.

    Raises ModelError for an unknown ``model_type``, a setting that its config class does not have, and one
    that contradicts another, or the tokenizer.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        fix = f"name one that has a causal language model{near}"
        raise ModelError("unknown model type", where="model.config.model_type", got=repr(model_type), fix=fix)
    default = AutoConfig.for_model(model_type)
    names = {*default.to_dict(), *default.attribute_map}
    for name in settings:
        if name not in names:
            what = f"{type(default).__name__} has no such setting{did_you_mean(name, names)}"
            raise ModelError(what, where=f"model.config.{name}")
    if tokenizer is not None:
        tokens = max_token_id(tokenizer) + 1
        if settings.setdefault("vocab_size", tokens) < tokens:
            what, where = f"the tokenizer has {tokens:,} tokens", "model.config.vocab_size"
            raise ModelError(what, where=where, got=f"{settings['vocab_size']:,}", fix="leave it out")
        settings |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
    with building("model.config"):
        return AutoConfig.for_model(model_type, **settings)


@contextmanager
def building(where: str) -> Iterator[None]:
    """What a library raises for sizes that do not fit together becomes a ModelError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BUILD_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__  # before it the name of a validator
        raise ModelError(f"no model can be built: {reason}", where=where) from error


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Inside, models are built whole, also in a run whose model ZeRO-3 spreads while it is built."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def build_without_memory(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, whose weights have shapes and no values. Raises ModelError."""
    with building("model.config"), in_one_piece(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_shape(config: PretrainedConfig, *, bytes_per_weight: int) -> None:
    """Raises ModelError for a new model that cannot be built, is too large, or is not causal.

    A small one is run on 8 tokens too; of a large one only the shapes are known.
    """
    weights = sum(part.numel() for part in build_without_memory(config).parameters())
    needed, available = weights * bytes_per_weight, total_memory()
    if available and needed > available:
        got = f"{weights:,} parameters need {needed / 2**30:,.0f} GiB of {available / 2**30:,.0f}"
        raise ModelError("the model does not fit into memory", where="model.config", got=got)
    if weights <= SMALL:
        with building("model.config"), in_one_piece(), torch.random.fork_rng(devices=[]):
            check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raises ModelError where a position sees the tokens after it: the loss would be that of a copy.

    Runs the model on 8 tokens, the last of which is of two kinds. Finds nothing where there are no weights,
    or none that give numbers.
    """
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in model.parameters()):
        return
    tokens = torch.arange(8).repeat(2, 1) % model.config.get_text_config().vocab_size
    tokens[1, -1] = 0
    was_training = model.training
    model.eval()
    try:
        first, second = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    if not (first.isfinite().all() and second.isfinite().all()):
        return  # the test of the loss says that
    difference = float((first - second).abs().max() / first.abs().max().clamp(min=1e-9))
    if difference > (1e-5 if model.dtype == torch.float32 else 5e-2):
        what = f"{type(model).__name__} is not causal: a position sees the tokens after it"
        raise ModelError(what, where="model", fix="another architecture, or model.config.is_decoder: true")


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest text the model has positions for, tokens; None where it states no limit."""
    return getattr(config, "max_position_embeddings", None)


def check_attention(name: str) -> None:
    """Raises ModelError for an attention that transformers does not have, nor fetches as a kernel."""
    known = [packed.NAME, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in known and not re.search("[/|]", name):
        near = did_you_mean(name, known)
        what = f"expected one of {', '.join(sorted({*known} - {'paged|eager', 'paged|sdpa'}))}"
        raise ModelError(what, where="model.attention", got=f"{name!r}{near}")


def why_not_packed(config: PretrainedConfig) -> str:
    """Why a model of this configuration cannot take the packed attention; empty where nothing is known."""
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is None:
        return f"{type(config).__name__} comes with code of its own"
    name = known.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if not (known._supports_attention_backend and known._can_set_attn_implementation()):
        return f"{name} has an attention of its own"
    if others := _kinds_of_layers(config) - PACKED_LAYERS:
        return f"{name} has layers of another kind, {', '.join(sorted(others))}"
    window = getattr(config.get_text_config(), "sliding_window", None)
    source = inspect.getsource(sys.modules[known.__module__])
    if window and not re.search(r"sliding_window=(self|getattr)\b", source):
        return f"{name} tells its window of {window} tokens to the mask only"
    return ""


def settle_attention(model: PreTrainedModel, reason: str = "") -> None:
    """Changes the model: ``sdpa``, or else ``eager``, where its packed attention would mix documents.

    Logs what it has in place of the packed attention; ``reason``: why it was not loaded with that. Raises
    ModelError as ``check_packing``.
    """
    if not reason:
        try:
            reason, other = packing_fault(model), "sdpa" if model._supports_sdpa else "eager"
        except ModelError as error:  # caps or sinks: sdpa leaves them out, without a word
            reason, other = error.what, "eager"
        if reason:
            model.set_attn_implementation(other)
    if reason:
        LOGGER.warning("attention %s: %s", model.config._attn_implementation, reason)
        check_packing(model)


def check_packing(model: PreTrainedModel) -> None:
    """Raises ModelError where the documents of a packed row would not be as each alone."""
    if fault := packing_fault(model):
        fix = f"set model.attention to {model.config._attn_implementation}, and data.packing to none"
        raise ModelError(fault, where="model.attention", fix=fix)


@torch.no_grad()
def packing_fault(model: PreTrainedModel) -> str:
    """What is wrong with packed rows under the model's attention; empty if each document is as if alone.

    Runs the model on 8 tokens, together and apart. Finds nothing where the weights are not there yet. Raises
    ModelError as the packed attention does.
    """
    takes = inspect.signature(model.forward).parameters
    if "cu_seq_lens_q" not in takes and all(part.kind != part.VAR_KEYWORD for part in takes.values()):
        return f"{type(model).__name__} does not take packed rows"
    if others := _kinds_of_layers(model.config) - MASKED_LAYERS:
        return f"no mask keeps documents apart in layers of {', '.join(sorted(others))}"
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in model.parameters()):
        return ""
    was_training = model.training
    model.eval()
    try:
        with building("model"), torch.device(model.device):
            together, alone = _together_and_alone(model)
    finally:
        model.train(was_training)
    difference = float((together - alone).abs().max() / alone.abs().max())
    if not difference > (1e-4 if alone.dtype == torch.float32 else 5e-2):
        return ""
    name = model.config._attn_implementation
    return f"with {name} attention a packed row of {type(model).__name__} is not as its documents alone"


def _kinds_of_layers(config: PretrainedConfig) -> set[str]:
    return set(getattr(config.get_text_config(), "layer_types", None) or ())


def _together_and_alone(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (1, 8, vocabulary) of two documents in one row, and of each in a row of its own."""
    text = model.config.get_text_config()
    # a pad token at either end of a row makes GPT-2 warn of padding
    tokens = torch.tensor([token for token in range(9) if token != text.pad_token_id][:8]) % text.vocab_size
    documents = tokens[None].split([5, 3], dim=1)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    row = {
        "input_ids": tokens[None],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5},
    }
    alone = [model(input_ids=part, use_cache=False).logits for part in documents]
    return model(**row, use_cache=False).logits, torch.cat(alone, dim=1)


def takes_targets(model: PreTrainedModel) -> bool:
    """Whether a batch may hold ``logits_to_keep``: without it the head computes every position."""
    return "logits_to_keep" in inspect.signature(without_adapters(model).forward).parameters


def without_adapters(model: Any) -> PreTrainedModel:
    """The model itself, whose forward calls its loss_function; peft wraps it."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Whether the model is a ``peft.PeftModel``."""
    return hasattr(model, "get_base_model")


def load_model(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: str = "float32",
    attention: str | None = packed.NAME,
    revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads weights and makes the model agree with the tokenizer (``fit_to_tokenizer``).

    Args:
        dtype: of the weights. Weights that are trained in bfloat16 hardly move at small learning rates.
        attention: any attention of transformers, or ``packed``; a model that cannot take that gets sdpa or
            eager, which is logged, if these keep the documents of a packed row apart too. None is the best
            one that the model has for a row of its own: sdpa, or else eager.
        options: ``trust_remote_code``; ``allow_bin`` accepts pickled weights; ``quantization``, a
            quantization_config of transformers.

    Raises ModelError if weights are missing, of another shape, or not safetensors, or as settle_attention.
    """
    packed.register()
    config = load_config(
        name_or_path, revision=revision, trust_remote_code=options.get("trust_remote_code", False)
    )
    reason = why_not_packed(config) if attention == packed.NAME else ""
    with loading(name_or_path, where="model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=None if reason else attention,  # None: sdpa, or else eager
            use_safetensors=None if options.get("allow_bin") else True,
            trust_remote_code=options.get("trust_remote_code", False),
            quantization_config=options.get("quantization"),
            generation_config=GenerationConfig(),  # else that of a file, whose mistakes would stop us here
            output_loading_info=True,
            **load_options(name_or_path, revision=revision, where=WHERE),
        )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if missing:
        what = f"the files lack {len(missing)} weights that the configuration names, {missing[0]} first"
        raise ModelError(
            what, where=f"{WHERE} {name_or_path}", fix="use the configuration that belongs to the weights"
        )
    model.generation_config.eos_token_id = to_token_ids(
        (read_generation_file(name_or_path, revision=revision) or {}).get("eos_token_id")
    )
    fit_to_tokenizer(model, tokenizer)
    if attention == packed.NAME:
        settle_attention(model, reason)
    return model


def read_generation_file(name_or_path: str, *, revision: str | None = None) -> dict[str, Json] | None:
    """The content of a model's ``generation_config.json``; None where there is none that is a JSON object."""
    options: dict[str, Any] = load_options(name_or_path, revision=revision, where=WHERE)
    folder = Path(name_or_path).expanduser()
    try:
        path = cached_file(str(folder) if folder.is_dir() else name_or_path, GENERATION_FILE, **options)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def to_token_ids(value: object) -> list[int]:
    """The ids of a setting that holds one or several, without what is no id."""
    listed = value if isinstance(value, list | tuple) else [value]
    return [id for id in listed if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31]


def init_model(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: str = "float32",
    attention: str = packed.NAME,
    embedding_std: float | None = None,
) -> PreTrainedModel:
    """A model with random weights. Draws from torch's global random state: seed it first.

    Args:
        embedding_std: of the embeddings of tokens and positions; None is that of the architecture.
    """
    packed.register()
    reason = why_not_packed(config) if attention == packed.NAME else ""
    options = {"dtype": getattr(torch, dtype), "attn_implementation": None if reason else attention}
    with loading(config.model_type, where="model.config"):
        model = AutoModelForCausalLM.from_config(config, **options)
    fit_to_tokenizer(model, tokenizer)
    for module in model.modules():
        if embedding_std is not None and isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=embedding_std)
    if attention == packed.NAME:
        settle_attention(model, reason)
    return model


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Changes the model: a row for every token, the tokenizer's pad and stop tokens, savable settings."""
    grow_embeddings(model, max_token_id(tokenizer) + 1)
    model.loss_type = "ForCausalLM"  # GPT-2 names none, warns of it, and breaks the graph under torch.compile
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    known = model.generation_config.eos_token_id if model.generation_config else None
    stop = unique_ids([*stop_token_ids(tokenizer), *(known if isinstance(known, list) else [known])])
    model.generation_config = plain_generation(model.config)
    model.generation_config.eos_token_id = [i for i in stop if i != tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id


def plain_generation(config: PretrainedConfig) -> GenerationConfig:
    """Settings with which a plain ``generate`` answers as ``hf-clm generate`` does: greedily, as long.

    A short model answers in half of its positions. A ``max_length`` would be more exact, but transformers
    warns of it at each call that gives ``max_new_tokens``.
    """
    limit = max_positions(config)
    longest = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit // 2)
    return GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max(1, longest))


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Gives the model at least ``tokens`` rows; new rows are the mean of the old ones. Never shrinks it."""
    rows = model.get_input_embeddings().get_parameter("weight")
    old = getattr(rows, "ds_shape", rows.shape)[0]  # of ZeRO-3, which keeps an empty weight in its place
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight = layer.get_parameter("weight")
                weight[old:] = weight[:old].mean(dim=0)
