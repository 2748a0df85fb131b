"""LoRA with ``peft`` (the extra ``lora``): trains small adapters of a frozen model."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hf_clm.errors import EnvironmentFault, ModelError, did_you_mean
from hf_clm.gguf import local_model
from hf_clm.hub import load_options, loading
from hf_clm.model.load import load_model, without_adapters

CONFIG_FILE = "adapter_config.json"
INSTALL = "pip install 'hf_clm[lora]'"
INSTALL_QUANTIZED = "pip install 'hf_clm[qlora]'"


def add_adapters(
    model: PreTrainedModel,
    *,
    base: str,
    revision: str | None = None,
    new_tokens: Sequence[int] = (),
    **options: Any,
) -> Any:
    """Freezes the model and adds adapters; returns the ``peft.PeftModel`` that wraps it.

    Args:
        base: the name or folder of the base model that is saved with the adapters, and its ``revision``.
        new_tokens: ids whose embedding rows are trained too (``find_new_tokens``).
        options: options of ``peft.LoraConfig``: r, lora_alpha, lora_dropout, target_modules, ...

    The adapters are float32, whatever the dtype of the model. Raises ModelError if the model has no module
    with a name in target_modules or modules_to_save.
    """
    peft = import_peft()
    check_layers(
        model, target_modules=options["target_modules"], modules_to_save=options.get("modules_to_save")
    )
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        trainable_token_indices=_by_layer(model, new_tokens),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **options,
    )
    with loading(base, where="lora"), _without_warnings():
        adapted = peft.get_peft_model(model, settings)
    base = local_model(base)
    folder = Path(base).expanduser()
    settings.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else base
    settings.revision = revision
    adapted.enable_input_require_grads()  # required by reentrant checkpointing
    return adapted


def find_new_tokens(tokenizer: PreTrainedTokenizerFast, base: str, *, revision: str | None) -> list[int]:
    """The ids that the tokenizer of ``base`` has not, without the pad token, which is never learned."""
    base = local_model(base)
    with loading(base, where="tokenizer"):
        options = load_options(base, revision=revision, where="model.name_or_path")
        base_tokens = set(AutoTokenizer.from_pretrained(base, **options).get_vocab())
    ids = {id for token, id in tokenizer.get_vocab().items() if token not in base_tokens}
    return sorted(id for id in ids if id != tokenizer.pad_token_id)


def is_adapter(name_or_path: str) -> bool:
    """Returns whether a folder contains adapters instead of a model."""
    return (Path(name_or_path).expanduser() / CONFIG_FILE).is_file()


def quantization(compute: str, *, where: str, otherwise: str = "") -> BitsAndBytesConfig:
    """Returns the 4 bits of QLoRA (arXiv:2305.14314). Raises EnvironmentFault without bitsandbytes.

    Args:
        compute: the dtype of the computation.
        otherwise: what to do instead of installing the package.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "needs the package bitsandbytes", where=where, fix=INSTALL_QUANTIZED + otherwise
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )


def describe_quantized(model: Any) -> dict[str, str]:
    """Returns the dtypes with which the 4-bit base of adapters is loaded again as it was trained."""
    base = without_adapters(model)
    kinds = {"weights": base.dtype, "compute": base.config.quantization_config.bnb_4bit_compute_dtype}
    return {name: str(kind).removeprefix("torch.") for name, kind in kinds.items()}


def load_adapted(folder: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """Loads the base model with the adapters of ``folder``; ``options`` are those of ``load_model``.

    Raises ModelError like ``load_model``, and if the base model is not found.
    """
    base, revision = read_base(folder)
    return attach_adapters(load_model(base, tokenizer, revision=revision, **options), folder)


def attach_adapters(model: PreTrainedModel, folder: str) -> Any:
    """Adds the adapters of ``folder`` to their base model."""
    peft = import_peft()
    with loading(folder, where="adapter"), _without_warnings():
        return peft.PeftModel.from_pretrained(model, str(Path(folder).expanduser()))


def read_base(folder: str) -> tuple[str, str | None]:
    """Returns the name or folder of the base model, and its revision."""
    facts = json.loads((Path(folder).expanduser() / CONFIG_FILE).read_text(encoding="utf-8"))
    return facts["base_model_name_or_path"], facts.get("revision")


def import_peft() -> Any:
    """Imports peft. Raises EnvironmentFault if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise EnvironmentFault("lora requires the package peft", fix=INSTALL) from error
    return peft


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses warnings of peft about deprecated calls of its own, and about the base name that we set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
        yield


def check_layers(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] | None = None,
) -> None:
    """Raises ModelError for a name that matches no module, and for layers with tied weights.

    peft ignores unknown names as long as another one matches. Of tied layers it would update only one, so
    that the merged model differs from the trained one.
    """
    names = [name for name, _ in model.named_modules() if name]
    last_names = {name.rsplit(".", 1)[-1] for name in names}
    tied = _tied_names(model, names)
    for key, modules in (("target_modules", target_modules), ("modules_to_save", modules_to_save or [])):
        for name in [] if isinstance(modules, str) else modules:
            where, last = f"lora.{key}", name.rsplit(".", 1)[-1]
            if last not in last_names:
                fix = f"use one of {', '.join(_linear_names(model))}{did_you_mean(last, last_names)}"
                raise ModelError("the model has no such module", where=where, got=repr(name), fix=fix)
            if any(full == name or full.endswith(f".{name}") for full in tied):
                what = f"{' and '.join(tied)} share their weights, so one cannot be trained without the other"
                fix = "remove it; embeddings of new tokens are trained anyway"
                raise ModelError(what, where=where, got=repr(name), fix=fix)


def _tied_names(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Returns the names of the embeddings and the head if they are tied, else an empty list."""
    if not model.config.get_text_config().tie_word_embeddings:
        return []
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name in names if any(model.get_submodule(name) is layer for layer in layers)]


def _linear_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    layers = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    names = {name.rsplit(".", 1)[-1] for name in layers if model.get_submodule(name) is not head}
    return sorted(names)


def _by_layer(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Returns the rows to train, by the name of the layer: the embedding and, unless it is tied, the head."""
    if not tokens:
        return None
    layers: list[Any] = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(layer)]: list(tokens) for layer in layers}
