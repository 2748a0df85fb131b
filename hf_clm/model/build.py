"""Builds the tokenizer, the model's configuration and the model of a recipe."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_clm.errors import ModelError
from hf_clm.model.adapters import add_adapters, check_layers, find_new_tokens, quantization
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.load import (
    build_config,
    build_without_memory,
    check_attention,
    check_causal,
    check_packing,
    check_shape,
    init_model,
    load_config,
    load_model,
    max_positions,
    set_attention_dropout,
)
from hf_clm.model.weights import assign_groups, freeze_weights
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import AnyExample
from hf_clm.text.tokenizer import (
    add_control_tokens,
    load_tokenizer,
    max_token_id,
    set_template_defaults,
    use_chat_template,
)
from hf_clm.text.train_tokenizer import END_TOKEN, train_tokenizer

TRAINED_TOKENIZER = ".tokenizer"  # in the output folder, until the model is saved


def build_tokenizer(
    recipe: Recipe, loaded: Mapping[str, Sequence[AnyExample]], *, arguments: TrainingArguments
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, or trains it on the training texts: on rank 0, and the other ranks load it.

    ``loaded``: the examples by the name of their split. A tokenizer of characters is trained on all splits,
    which reveals nothing about the evaluation but makes all its characters known.
    """
    section = recipe.tokenizer
    if section.train is None:
        name = section.name_or_path or recipe.model.name_or_path
        assert name is not None, "config.py requires one of them"
        tokenizer = load_tokenizer(
            name,
            pad_token=section.pad_token,
            eos_token=section.eos_token,
            chat_template=section.chat_template,
            revision=recipe.model.revision if section.name_or_path is None else None,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        add_control_tokens(tokenizer, section.control_tokens)
        set_template_defaults(tokenizer, section.chat_template_kwargs)
        return tokenizer
    folder = os.path.join(str(arguments.output_dir), TRAINED_TOKENIZER)  # the folder may already have a model
    with arguments.main_process_first(local=False, desc="training the tokenizer"):
        if arguments.process_index == 0:
            splits = loaded.values() if section.train.kind == "characters" else [loaded["train"]]
            texts = (text for examples in splits for example in examples for text in example.texts if text)
            names = {"pad_token": section.pad_token, "eos_token": section.eos_token or END_TOKEN}
            trained = train_tokenizer(texts, **names, **section.train.model_dump())
            add_control_tokens(trained, section.control_tokens)
            if section.chat_template:
                use_chat_template(trained, section.chat_template)
            set_template_defaults(trained, section.chat_template_kwargs)
            trained.save_pretrained(folder)
            # AutoTokenizer splits text according to the model type: do so now, not only after saving
            kind = recipe.model.config.get("model_type") or _named_config(recipe).model_type
            Path(folder, "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        tokenizer = load_tokenizer(folder, pad_token=section.pad_token)
    if section.train.kind != "bpe" and type(tokenizer) is not PreTrainedTokenizerFast:
        what = f"transformers loads it as {type(tokenizer).__name__}, which splits text differently"
        fix = "use a model_type such as gpt2 or llama, or kind: bpe"
        raise ModelError(what, where="tokenizer.train.kind", got=section.train.kind, fix=fix)
    return tokenizer


def build_tokenizer_aside(
    recipe: Recipe, loaded: Mapping[str, Sequence[AnyExample]], *, arguments: TrainingArguments
) -> PreTrainedTokenizerFast:
    """Builds the tokenizer without writing to the output folder."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = copy(arguments)
        temporary.output_dir = folder
        return build_tokenizer(recipe, loaded, arguments=temporary)


def check_model(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raises ModelError if the model cannot be built or adapted. Called before the data are read.

    The tokenizer is not needed: it only determines the size of the vocabulary.
    """
    model, lora = recipe.model, recipe.lora
    check_attention(model.attention)
    if model.init == "scratch" and model.config:
        on_cpu = arguments.device.type == "cpu"
        size = getattr(torch, model.dtype).itemsize
        # count gradients if they are in the same memory; the size of the optimizer varies
        config = build_config(model.config)
        check_shape(config, bytes_per_weight=size * (2 if on_cpu else 1))
    else:
        config = _named_config(recipe)
    if recipe.optimizer and not lora and not model.trust_remote_code:  # otherwise the names are not known yet
        empty = build_without_memory(config)
        freeze_weights(empty, recipe.optimizer.freeze)
        assign_groups(empty, [group.match for group in recipe.optimizer.groups])
    if lora and not model.trust_remote_code and (lora.target_modules != "all-linear" or lora.modules_to_save):
        empty = build_without_memory(config)
        check_layers(empty, target_modules=lora.target_modules, modules_to_save=lora.modules_to_save)


def build_model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Builds the model's configuration. Raises ModelError if rows are longer than its positions."""
    model = recipe.model
    if model.init == "scratch" and model.config:
        config = build_config(model.config, tokenizer)
    else:
        config = _named_config(recipe)
    limit = max_positions(config)
    if limit is not None and recipe.data.max_length > limit:
        what = f"{recipe.data.max_length} exceeds the model's {limit} positions"
        raise ModelError(what, where="data.max_length", fix=f"set it to {limit} or less")
    return config


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    config: PretrainedConfig,
    arguments: TrainingArguments,
) -> PreTrainedModel:
    """Builds the model, with random weights (from ``train.seed``) or pretrained ones, and with adapters."""
    section = recipe.model
    if section.init == "scratch":
        set_seed(arguments.seed)
        options: dict[str, Any] = {"dtype": section.dtype, "attention": section.attention}
        model = init_model(config, tokenizer, embedding_std=section.embedding_std, **options)
    else:
        assert section.name_or_path is not None, "config.py requires it"
        model = load_model(
            section.name_or_path,
            tokenizer,
            dtype=weights_dtype(recipe, arguments),
            attention=section.attention,
            revision=section.revision,
            quantization=_quantization(recipe, arguments),
            trust_remote_code=section.trust_remote_code,
            allow_bin=section.allow_bin,
            attention_dropout=section.attention_dropout,
        )
    check_causal(model)
    if (
        recipe.resolved_packing != "none" and section.attention != PACKED
    ):  # otherwise load_model has checked it
        check_packing(model)
    if recipe.lora is None:
        if recipe.optimizer:
            freeze_weights(model, recipe.optimizer.freeze)
        return model
    set_seed(arguments.seed)
    return _with_adapters(recipe, model, new_tokens=_new_tokens(recipe, tokenizer, config=config))


def weights_dtype(recipe: Recipe, arguments: TrainingArguments) -> str:
    """Returns the dtype of the weights: by default, frozen weights have the dtype of the computation."""
    is_default = "dtype" not in recipe.model.model_fields_set
    return "bfloat16" if recipe.lora and is_default and arguments.bf16 else recipe.model.dtype


def _new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, config: PretrainedConfig) -> list[int]:
    """Returns the ids that are new to the model; with another tokenizer, those without an embedding row."""
    base = recipe.model.name_or_path
    assert base is not None, "config.py requires it"
    if recipe.tokenizer.name_or_path is None:
        return find_new_tokens(tokenizer, base, revision=recipe.model.revision)
    rows = config.get_text_config().vocab_size
    return [id for id in range(rows, max_token_id(tokenizer) + 1) if id != tokenizer.pad_token_id]


def _with_adapters(recipe: Recipe, model: PreTrainedModel, *, new_tokens: list[int]) -> PreTrainedModel:
    section, base = recipe.lora, recipe.model.name_or_path
    assert section is not None and base is not None, "config.py requires it"
    return add_adapters(
        model,
        base=base,
        revision=recipe.model.revision,
        new_tokens=new_tokens,
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        modules_to_save=section.modules_to_save or None,
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
    )


def _quantization(recipe: Recipe, arguments: TrainingArguments) -> BitsAndBytesConfig | None:
    if recipe.lora is None or recipe.lora.quantize is None:
        return None
    compute = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
    return quantization(compute, where="lora.quantize")


def _named_config(recipe: Recipe) -> PretrainedConfig:
    model = recipe.model
    assert model.name_or_path is not None, "config.py requires it where there is no model_type"
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = load_config(model.name_or_path, **options)
    set_attention_dropout(config, model.attention_dropout)
    return config
