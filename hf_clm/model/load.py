"""Loads or initializes a causal language model that matches its tokenizer."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
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
from hf_clm.gguf import local_model
from hf_clm.hub import load_options, loading
from hf_clm.machine import total_memory
from hf_clm.model import attention as packed
from hf_clm.schema import Json, is_causal_class
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.tokenizer import max_token_id, unique_ids

NEW_TOKENS = 256  # default length of an answer

SPECIAL_TOKENS = ("bos", "eos", "pad")
SMALL = 20_000_000  # weights of a model that is quick to build
BUILD_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, MemoryError, ImportError, StrictDataclassError),
)

LOGGER = logging.getLogger(__name__)
WHERE = "model.name_or_path"
GENERATION_FILE = "generation_config.json"
# Names of the attention dropout in the configurations of transformers.
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
PACKED_LAYERS = {"full_attention", "sliding_attention"}
MASKED_LAYERS = PACKED_LAYERS | {"chunked_attention"}  # other layers, such as convolutions, ignore masks


def load_config(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of a causal language model. Raises ModelError if it is another kind of model."""
    name_or_path = local_model(name_or_path)
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
    """Builds the configuration of a new model from the ``settings`` of its config class and the tokenizer.

    Raises ModelError for an unknown ``model_type`` or setting, and for settings that contradict each other or
    the tokenizer.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        fix = f"use one that has a causal language model{near}"
        raise ModelError("unknown model type", where="model.config.model_type", got=repr(model_type), fix=fix)
    default = AutoConfig.for_model(model_type)
    names = {*default.to_dict(), *default.attribute_map}
    for name in settings:
        if name not in names:
            what = f"unknown setting of {type(default).__name__}{did_you_mean(name, names)}"
            raise ModelError(what, where=f"model.config.{name}")
    if tokenizer is not None:
        tokens = max_token_id(tokenizer) + 1
        if settings.setdefault("vocab_size", tokens) < tokens:
            what, where = f"the tokenizer has {tokens:,} tokens", "model.config.vocab_size"
            raise ModelError(what, where=where, got=f"{settings['vocab_size']:,}", fix="remove it")
        settings |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
    with building("model.config"):
        return AutoConfig.for_model(model_type, **settings)


@contextmanager
def building(where: str) -> Iterator[None]:
    """Converts errors of libraries, such as those for incompatible sizes, to a one-line ModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BUILD_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__  # the lines before it name a validator
        raise ModelError(f"the model cannot be built: {reason}", where=where) from error


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Builds models unsharded, also in a run where ZeRO-3 would shard them as they are built."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def build_without_memory(config: PretrainedConfig) -> PreTrainedModel:
    """Builds a model on the meta device: its weights have shapes but no values. Raises ModelError."""
    with building("model.config"), in_one_piece(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_shape(config: PretrainedConfig, *, bytes_per_weight: int) -> None:
    """Raises ModelError for a new model that cannot be built, is too large, or (if small) is not causal."""
    weights = sum(part.numel() for part in build_without_memory(config).parameters())
    needed, available = weights * bytes_per_weight, total_memory()
    if available and needed > available:
        got = f"{weights:,} parameters, which need {needed / 2**30:,.0f} of {available / 2**30:,.0f} GiB"
        raise ModelError("the model does not fit into memory", where="model.config", got=got)
    if weights <= SMALL:
        with building("model.config"), in_one_piece(), torch.random.fork_rng(devices=[]):
            check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raises ModelError if logits depend on later tokens: the model would learn to copy them.

    Runs the model on two texts of 8 tokens that differ in the last one. Does nothing if the model has no
    weights yet, or if they give no finite logits.
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
        return  # the self-test reports it
    difference = float((first - second).abs().max() / first.abs().max().clamp(min=1e-9))
    if difference > (1e-5 if model.dtype == torch.float32 else 5e-2):
        what = f"{type(model).__name__} is not causal: its logits depend on later tokens"
        fix = "use another architecture, or set model.config.is_decoder: true"
        raise ModelError(what, where="model", fix=fix)


def max_positions(config: PretrainedConfig) -> int | None:
    """Returns the maximum length of a text in tokens; None if the configuration has no limit."""
    return getattr(config, "max_position_embeddings", None)


def attention_dropout(config: PretrainedConfig) -> tuple[str, float]:
    """Returns the name and the value of a configuration's attention dropout; an empty name if it has none."""
    text = config.get_text_config()
    name = next((name for name in ATTENTION_DROPOUTS if hasattr(text, name)), "")
    return name, getattr(text, name) if name else 0.0


def set_attention_dropout(config: PretrainedConfig, value: float | None) -> None:
    """Sets it, unless the value is None. Raises ModelError if the configuration has none."""
    name, _ = attention_dropout(config)
    if value is not None and not name:
        where, got = "model.attention_dropout", type(config).__name__
        raise ModelError("the model has no attention dropout", where=where, got=got, fix="remove it")
    if value is not None:
        setattr(config.get_text_config(), name, value)


def check_attention(name: str) -> None:
    """Raises ModelError for an attention that transformers neither has nor would download as a kernel."""
    names = [packed.NAME, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in names and not re.search("[/|]", name):
        near = did_you_mean(name, names)
        what = f"expected one of {', '.join(sorted({*names} - {'paged|eager', 'paged|sdpa'}))}"
        raise ModelError(what, where="model.attention", got=f"{name!r}{near}")


def why_not_packed(config: PretrainedConfig) -> str:
    """Returns why models with this configuration do not support packed attention; empty if they may."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return f"{type(config).__name__} has custom code"
    name = model_class.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if not (model_class._supports_attention_backend and model_class._can_set_attn_implementation()):
        return f"{name} has a custom attention"
    if others := _kinds_of_layers(config) - PACKED_LAYERS:
        return f"{name} has other kinds of layers: {', '.join(sorted(others))}"
    window = getattr(config.get_text_config(), "sliding_window", None)
    source = inspect.getsource(sys.modules[model_class.__module__])
    if window and not re.search(r"sliding_window=(self|getattr)\b", source):
        return f"{name} applies its window of {window} tokens only in the mask"
    return ""


def settle_attention(model: PreTrainedModel, reason: str = "") -> None:
    """Switches the model to ``sdpa``, or else ``eager``, if packed attention would mix documents.

    Logs a warning if the model does not use packed attention; ``reason``: why it was not loaded with it.
    Raises ModelError like ``check_packing``.
    """
    if not reason:
        try:
            reason, other = packing_fault(model), "sdpa" if model._supports_sdpa else "eager"
        except ModelError as error:  # soft-capping or sinks, which sdpa silently ignores
            reason, other = error.what, "eager"
        if reason:
            model.set_attn_implementation(other)
    if reason:
        LOGGER.warning("attention %s: %s", model.config._attn_implementation, reason)
        check_packing(model)


def check_packing(model: PreTrainedModel) -> None:
    """Raises ModelError if the documents of a packed row would not be isolated from each other."""
    if fault := packing_fault(model):
        fix = f"set model.attention to {model.config._attn_implementation}, and data.packing to none"
        raise ModelError(fault, where="model.attention", fix=fix)


@torch.no_grad()
def packing_fault(model: PreTrainedModel) -> str:
    """Returns why the model's attention does not isolate the documents of packed rows; empty if it does.

    Runs the model on 8 tokens of two documents, packed and separate. Returns an empty string if the model has
    no weights yet. Raises ModelError like ``packed_attention``.
    """
    takes = inspect.signature(model.forward).parameters
    if "cu_seq_lens_q" not in takes and all(part.kind != part.VAR_KEYWORD for part in takes.values()):
        return f"{type(model).__name__} does not support packed rows"
    if others := _kinds_of_layers(model.config) - MASKED_LAYERS:
        return f"masks do not isolate documents in layers of type {', '.join(sorted(others))}"
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
    return f"with {name} attention, {type(model).__name__} does not isolate the documents of a packed row"


def _kinds_of_layers(config: PretrainedConfig) -> set[str]:
    return set(getattr(config.get_text_config(), "layer_types", None) or ())


def _together_and_alone(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (1, 8, vocabulary) of two documents in one row, and in separate rows.

    Separate rows have the model's own positions. Their boundaries let the kernel of packed rows compute them
    too: in bfloat16, another kernel rounds differently.
    """
    text = model.config.get_text_config()
    # GPT-2 warns of padding if a row begins or ends with a pad token
    tokens = torch.tensor([token for token in range(9) if token != text.pad_token_id][:8]) % text.vocab_size
    documents = tokens[None].split([5, 3], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    together = model(
        input_ids=tokens[None], position_ids=positions, **_boundaries([5, 3]), use_cache=False
    ).logits
    alone = [
        model(input_ids=part, **_boundaries([part.shape[1]]), use_cache=False).logits for part in documents
    ]
    return together, torch.cat(alone, dim=1)


def _boundaries(lengths: Sequence[int]) -> dict[str, torch.Tensor | int]:
    """Returns the inputs of packed attention for documents of these lengths."""
    bounds, longest = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def takes_targets(model: PreTrainedModel) -> bool:
    """Returns whether the model accepts ``logits_to_keep``; otherwise its head computes all positions."""
    return "logits_to_keep" in inspect.signature(without_adapters(model).forward).parameters


def without_adapters(model: Any) -> PreTrainedModel:
    """Returns the model inside adapters, whose forward calls its loss_function."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Returns whether the model is a ``peft.PeftModel``."""
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
    """Loads a model and adapts it to the tokenizer (``fit_to_tokenizer``).

    Args:
        dtype: dtype of the weights. Weights trained in bfloat16 hardly change at small learning rates.
        attention: an attention of transformers, or ``packed``. A model without support for it falls back to
            sdpa or eager with a warning, if these isolate the documents of a packed row. None selects sdpa,
            or else eager, for rows of a single document.
        options: ``trust_remote_code``; ``allow_bin`` accepts pickled weights; ``quantization``, a
            quantization_config of transformers; ``attention_dropout`` instead of the configuration's.

    Raises ModelError if weights are missing, of another shape, or not safetensors, and like settle_attention.
    """
    packed.register()
    name_or_path = local_model(name_or_path)
    config = load_config(
        name_or_path, revision=revision, trust_remote_code=options.get("trust_remote_code", False)
    )
    set_attention_dropout(config, options.get("attention_dropout"))
    reason = why_not_packed(config) if attention == packed.NAME else ""
    with loading(name_or_path, where="model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=None if reason else attention,  # None selects sdpa, or else eager
            use_safetensors=None if options.get("allow_bin") else True,
            trust_remote_code=options.get("trust_remote_code", False),
            quantization_config=options.get("quantization"),
            generation_config=GenerationConfig(),  # avoids errors in the file
            output_loading_info=True,
            **load_options(name_or_path, revision=revision, where=WHERE),
        )
    model, report = loaded
    keep_gradients(model)
    missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if missing:
        what = f"{len(missing)} weights of the configuration are missing in the files, such as {missing[0]}"
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


def keep_gradients(model: PreTrainedModel) -> None:
    """Changes a model in 4 bits: its layers keep the form that gradients pass through on a CPU too.

    Where the CPU has AVX512-BF16, bitsandbytes repacks a layer the first time that it is evaluated, and for
    good; the product with the repacked weights has no gradient, so all layers below would learn nothing.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes.nn.Linear4bit
            module.support_avx512bf16_for_cpu = False


def read_generation_file(name_or_path: str, *, revision: str | None = None) -> dict[str, Json] | None:
    """The content of a model's ``generation_config.json``; None where there is none that is a JSON object."""
    name_or_path = local_model(name_or_path)
    options: dict[str, Any] = load_options(name_or_path, revision=revision, where=WHERE)
    folder = Path(name_or_path).expanduser()
    try:
        path = cached_file(str(folder) if folder.is_dir() else name_or_path, GENERATION_FILE, **options)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def to_token_ids(value: object) -> list[int]:
    """Returns the valid token ids of a setting that may have one or several."""
    values = value if isinstance(value, list | tuple) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31]


def init_model(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: str = "float32",
    attention: str = packed.NAME,
    embedding_std: float | None = None,
) -> PreTrainedModel:
    """Initializes a model with random weights, using torch's global random state: seed it first.

    Args:
        embedding_std: standard deviation of token and position embeddings; None for the architecture's.
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
    """Adapts the model in place: a row per token, the tokenizer's pad and stop tokens, valid settings."""
    grow_embeddings(model, max_token_id(tokenizer) + 1)
    model.loss_type = (
        "ForCausalLM"  # GPT-2 has none, which causes a warning and a graph break in torch.compile
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    eos = model.generation_config.eos_token_id if model.generation_config else None
    stop = unique_ids([*stop_token_ids(tokenizer), *(eos if isinstance(eos, list) else [eos])])
    model.generation_config = plain_generation(model.config)
    model.generation_config.eos_token_id = [i for i in stop if i != tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id


def plain_generation(config: PretrainedConfig) -> GenerationConfig:
    """Returns settings with which ``model.generate`` answers like ``hf-clm generate``: greedy, same length.

    For a model with few positions, an answer is half of them. A ``max_length`` would be more exact, but
    transformers warns about it in each call with ``max_new_tokens``.
    """
    limit = max_positions(config)
    longest = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit // 2)
    return GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max(1, longest))


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Grows the embeddings to at least ``tokens`` rows; new rows are the mean of the old ones."""
    rows = model.get_input_embeddings().get_parameter("weight")
    old = getattr(rows, "ds_shape", rows.shape)[0]  # in ZeRO-3, the weight itself is empty
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight = layer.get_parameter("weight")
                weight[old:] = weight[:old].mean(dim=0)
