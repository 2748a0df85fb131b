"""Loads a run, or any causal language model, for generation or evaluation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.errors import ModelError, RecipeError
from hf_clm.generation.llama_cpp import LlamaCppModel
from hf_clm.gguf import exported_file, settings_folder
from hf_clm.hub import load_options
from hf_clm.machine import has_bf16
from hf_clm.model.adapters import is_adapter, load_adapted, quantization
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.load import load_config, load_model, max_positions
from hf_clm.run_folder import Quantized, RunRecord, find_record
from hf_clm.template import Template
from hf_clm.text.tokenizer import load_tokenizer

if TYPE_CHECKING:  # a model that is not a run has no recipe
    from hf_clm.recipe.recipe import Recipe


@dataclass(frozen=True)
class LoadedRun:
    """A model that is ready to generate.

    format: the record format of the run, which decides how a plain text becomes a prompt.
    stage: how the run was trained.
    max_length: tokens in a row of the run's training.
    has_turns: whether prompts are rendered with the tokenizer's chat template.
    rendering: how prompts are rendered, as in training.
    template: the recipe's template for records, if it has one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    format: str
    stage: Literal["sft", "pretrain"]
    max_length: int
    has_turns: bool = False
    rendering: LabelOptions = field(default_factory=LabelOptions)
    template: Template | None = None


def load_run(
    name_or_path: str,
    *,
    attention: str | None = PACKED,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> LoadedRun:
    """Loads a run's folder, any other model folder, or a model from the Hub. Adapters are loaded together
    with their base model.

    Args:
        dtype: the dtype of the weights, ``answer_dtype`` by default. Adapters that were trained on a base in
            4 bits answer on that base by default, and with a dtype on the base as it was published.
        revision: a branch, tag or commit of a model on the Hub.

    A GGUF file that ``hf-clm export`` wrote is computed by llama.cpp; any other is dequantized.

    Without a run.json, the format is ``messages`` if the tokenizer has a chat template, else ``text``.
    Raises ModelError for a run that has not saved its final model yet.
    """
    file = exported_file(name_or_path)
    name_or_path = settings_folder(name_or_path, where="run or model")
    record = find_record(name_or_path) or RunRecord(status="done")
    if record.status != "done":
        fix = "let it finish training, or use one of its checkpoint-N folders"
        raise ModelError(f"the run is {record.status}: it has no final model", where=name_or_path, fix=fix)
    # The same error wherever a path is missing.
    load_options(name_or_path, revision=revision, where="run or model")
    tokenizer = load_tokenizer(name_or_path, revision=revision)
    place = find_device(device)
    kind = dtype or answer_dtype(place)
    if file is not None:
        if dtype is not None:
            raise RecipeError("has no effect on a GGUF file", where="--dtype", got=dtype, fix="remove it")
        exported = LlamaCppModel(load_config(name_or_path), file, device=place)
        return to_loaded_run(exported, tokenizer, record)
    if is_adapter(name_or_path) and record.quantized and dtype is None:
        model = load_quantized(name_or_path, tokenizer, quantized=record.quantized, attention=attention)
    elif is_adapter(name_or_path):
        model = load_adapted(name_or_path, tokenizer, attention=attention, dtype=kind)
    else:
        model = load_model(name_or_path, tokenizer, attention=attention, dtype=kind, revision=revision)
    move_to(model, place)
    return to_loaded_run(model, tokenizer, record)


def find_device(name: str | None) -> torch.device:
    """Returns the device to answer on: a GPU if there is one. Raises RecipeError for an unknown name."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise RecipeError("no such device", where="--device", got=repr(name)) from error


def answer_dtype(device: torch.device) -> str:
    """Returns the dtype of a model that only answers: bfloat16 on a GPU that computes in it, else float32.

    It halves the memory. On a CPU, it would change the answers, and without support for it take longer.
    """
    return "bfloat16" if device.type == "cuda" and has_bf16(device) else "float32"


def load_quantized(
    folder: str, tokenizer: PreTrainedTokenizerFast, *, quantized: Quantized, attention: str | None = None
) -> Any:
    """Loads adapters with their base in 4 bits, as they were trained."""
    otherwise = ", or set --dtype to load the base without quantizing it"
    config = quantization(quantized.compute, where=folder, otherwise=otherwise)
    return load_adapted(folder, tokenizer, attention=attention, dtype=quantized.weights, quantization=config)


def to_loaded_run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: RunRecord) -> LoadedRun:
    """Returns a model with what its run's record says about prompts."""
    format = record.format or ("messages" if tokenizer.chat_template else "text")
    has_turns = format in ("messages", "sharegpt") if record.has_turns is None else record.has_turns
    return LoadedRun(
        model.eval(),
        tokenizer,
        format=format,
        stage=record.stage or "sft",
        max_length=record.max_length or min(max_positions(model.config) or 1024, 4096),
        has_turns=has_turns,
        rendering=LabelOptions(
            special_tokens_in_text=record.special_tokens_in_text or "encode_as_text",
            reasoning="in_content" if record.reasoning == "in_content" else "drop",
        ),
        template=record.template,
    )


def run_recipe(folder: str) -> "Recipe | None":
    """Returns the recipe of a run, with prompts rendered as in its training; None for other models."""
    path = Path(folder).expanduser() / "recipe.yaml"
    if not path.is_file():
        return None
    from hf_clm.recipe.recipe import load_recipe

    record = find_record(folder)
    return load_recipe(path).for_tokenizer(has_template=record is not None and record.render == "chat")


def move_to(model: PreTrainedModel, device: torch.device) -> None:
    """Moves the model to a device. Raises RecipeError if there is no such device."""
    try:
        torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise RecipeError("no such device", where="--device", got=repr(str(device))) from error
