"""LoRA: small trained updates beside a frozen model, by ``peft`` (the extra ``lora``)."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hf_clm.errors import EnvironmentFault, ModelError, did_you_mean
from hf_clm.hub import load_options, loading
from hf_clm.model.load import load_model

CONFIG_FILE = "adapter_config.json"
INSTALL = "pip install 'hf_clm[lora]'"


def add_adapters(
    model: PreTrainedModel,
    *,
    base: str,
    revision: str | None = None,
    new_tokens: Sequence[int] = (),
    **options: Any,
) -> Any:
    """Freezes the model and gives it adapters; returns the ``peft.PeftModel`` around it.

    Args:
        base: the name or folder that the adapters will be opened with, and its ``revision``.
        new_tokens: ids whose rows of the embeddings are trained too (``find_new_tokens``).
        options: of ``peft.LoraConfig``: r, lora_alpha, lora_dropout, target_modules, ...

    The adapters are float32, whatever the model is. Raises ModelError where no layer has a name that
    target_modules or modules_to_save give.
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
    with loading(base, where="lora"), _without_notes():
        adapted = peft.get_peft_model(model, settings)
    folder = Path(base).expanduser()
    settings.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else base
    settings.revision = revision
    adapted.enable_input_require_grads()  # else nothing is trained where checkpointing is reentrant
    return adapted


def find_new_tokens(tokenizer: PreTrainedTokenizerFast, base: str, *, revision: str | None) -> list[int]:
    """The ids that the tokenizer of ``base`` has not, without the pad token, which is never learned."""
    with loading(base, where="tokenizer"):
        options = load_options(base, revision=revision, where="model.name_or_path")
        known = set(AutoTokenizer.from_pretrained(base, **options).get_vocab())
    ids = {id for token, id in tokenizer.get_vocab().items() if token not in known}
    return sorted(id for id in ids if id != tokenizer.pad_token_id)


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder holds adapters and no model."""
    return (Path(name_or_path).expanduser() / CONFIG_FILE).is_file()


def load_adapted(folder: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """The base model with the adapters of ``folder``; ``options`` as of ``load_model``.

    Raises ModelError as ``load_model``, and where the base is not found.
    """
    peft = import_peft()
    base, revision = read_base(folder)
    model = load_model(base, tokenizer, revision=revision, **options)
    with loading(folder, where="adapter"), _without_notes():
        return peft.PeftModel.from_pretrained(model, str(Path(folder).expanduser()))


def read_base(folder: str) -> tuple[str, str | None]:
    """The name or folder of the base model, and its revision."""
    facts = json.loads((Path(folder).expanduser() / CONFIG_FILE).read_text(encoding="utf-8"))
    return facts["base_model_name_or_path"], facts.get("revision")


def import_peft() -> Any:
    """The library. Raises EnvironmentFault where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise EnvironmentFault("lora needs the package peft", fix=INSTALL) from error
    return peft


@contextmanager
def _without_notes() -> Iterator[None]:
    """peft calls what transformers will drop in its next version, and notes that the base has been named."""
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
    """Raises ModelError for a name that ends no module's name, and for layers that share their weights.

    peft would pass over the first where another is found. The second it would update one without the other:
    what is merged is not what was trained.
    """
    names = [name for name, _ in model.named_modules() if name]
    known = {name.rsplit(".", 1)[-1] for name in names}
    tied = _tied_names(model, names)
    for key, given in (("target_modules", target_modules), ("modules_to_save", modules_to_save or [])):
        for name in [] if isinstance(given, str) else given:
            where, last = f"lora.{key}", name.rsplit(".", 1)[-1]
            if last not in known:
                fix = f"one of {', '.join(_linear_names(model))}{did_you_mean(last, known)}"
                raise ModelError("the model has no such module", where=where, got=repr(name), fix=fix)
            if any(full == name or full.endswith(f".{name}") for full in tied):
                what = f"{' and '.join(tied)} share their weights: one cannot be trained without the other"
                fix = "leave it out; the tokens that are new to the model are trained anyway"
                raise ModelError(what, where=where, got=repr(name), fix=fix)


def _tied_names(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The embeddings and the head by name where they are tied; else nothing."""
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
    """The rows to train of the embedding and, where it is not tied to that, of the head."""
    if not tokens:
        return None
    layers: list[Any] = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(layer)]: list(tokens) for layer in layers}
