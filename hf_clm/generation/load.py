"""Loads a run, or any causal language model, for generation or evaluation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.errors import ModelError, RecipeError
from hf_clm.gguf import local_model
from hf_clm.hub import load_options
from hf_clm.model.adapters import is_adapter, load_adapted
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.load import load_model, max_positions
from hf_clm.run_folder import RunRecord, find_record
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
    revision: str | None = None,
) -> LoadedRun:
    """Loads a run's folder, any other model folder, or a model from the Hub, in float32. Adapters are loaded
    together with their base model.

    Args:
        revision: a branch, tag or commit of a model on the Hub.

    Without a run.json, the format is ``messages`` if the tokenizer has a chat template, else ``text``.
    Raises ModelError for a run that has not saved its final model yet.
    """
    name_or_path = local_model(name_or_path, where="run or model")
    record = find_record(name_or_path) or RunRecord(status="done")
    if record.status != "done":
        fix = "let it finish training, or use one of its checkpoint-N folders"
        raise ModelError(f"the run is {record.status}: it has no final model", where=name_or_path, fix=fix)
    # The same error wherever a path is missing.
    load_options(name_or_path, revision=revision, where="run or model")
    tokenizer = load_tokenizer(name_or_path, revision=revision)
    if is_adapter(name_or_path):
        model = load_adapted(name_or_path, tokenizer, attention=attention)
    else:
        model = load_model(name_or_path, tokenizer, attention=attention, revision=revision)
    move_to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return to_loaded_run(model, tokenizer, record)


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


def move_to(model: PreTrainedModel, device: str) -> None:
    """Moves the model to a device. Raises RecipeError if there is no such device."""
    try:
        torch.nn.Module.to(model, torch.device(device))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise RecipeError("no such device", where="--device", got=repr(device)) from error
