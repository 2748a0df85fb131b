"""The parts of a run, each from the recipe: arguments, tokenizer, configuration, model, collator."""

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_clm.adapters import add_adapters, check_layers, find_new_tokens
from hf_clm.attention import NAME as PACKED
from hf_clm.config import Recipe, training_values
from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.prepared.stream import StreamedRows, StreamPlan
from hf_clm.data.prepared.stream_blocks import counted_by, read_stream, shares_of, stream_identity
from hf_clm.data.read.plain_template import is_plain, plain_template
from hf_clm.data.split import AnyDataset
from hf_clm.errors import EnvironmentFault, ModelError, RecipeError
from hf_clm.hardware import has_bf16
from hf_clm.launcher import check_spreading, is_one_of_many, spreads_with
from hf_clm.model import (
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
)
from hf_clm.optimization import check_optimization
from hf_clm.schema import AnyExample
from hf_clm.tokenizer import (
    add_control_tokens,
    bos_token,
    load_tokenizer,
    max_token_id,
    set_template_defaults,
    use_chat_template,
)
from hf_clm.train_tokenizer import END, train_tokenizer

# In the output folder, until the model is saved.
TRAINED_TOKENIZER, PREPARED = ".tokenizer", ".prepared"
STATIC_TARGETS = 256  # the number of targets is rounded up to a multiple of it


def check_launch(recipe: Recipe) -> None:
    """Raises what check_spreading raises, before the processes meet and anything is loaded."""
    values = training_values(recipe)
    check_spreading(
        values,
        on_cpu=_is_on_cpu(values),
        generates=recipe.samples is not None or recipe.evaluation.generate > 0,
    )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of the recipe; bf16 autocast where the device has it and the recipe is silent.

    Raises RecipeError for what TrainingArguments refuses, and as check_optimization.
    """
    values = training_values(recipe)
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    on_cpu = _is_on_cpu(values)
    device = torch.device("cuda" if on_gpu else "cpu")
    if (on_gpu or on_cpu) and has_bf16(device) and not values.get("fp16"):
        values.setdefault("bf16", True)
    if on_cpu and (values.get("bf16") or is_one_of_many()):
        values["use_cpu"] = True  # else TrainingArguments asks for a GPU, and each process would train alone
    if values.pop("auto_find_batch_size", False) and (spread := spreads_with(values)):
        what = (
            f"the largest micro-batch cannot be tried on one process of {spread}"  # else training/fitting.py
        )
        raise RecipeError(what, where="train.auto_find_batch_size", fix="leave it out")
    values.setdefault("eval_on_start", True)  # the loss before, to compare with the loss after
    values.setdefault("dataloader_pin_memory", on_gpu)  # else a warning on every run on a CPU
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(str(error).splitlines()[0], where="train") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel cannot split a packed row: use a launcher
    check_optimization(arguments, recipe.train)
    return arguments


def rows_per_step(arguments: TrainingArguments) -> int:
    """The global batch: rows that all processes take in one optimizer step."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def count_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps that the Trainer makes over so many rows; 0 where it would make none."""
    rounded = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = rounded(rows / arguments.world_size / arguments.train_batch_size)
    if batches == 0 or arguments.max_steps > 0:
        return arguments.max_steps if batches else 0
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * per_epoch)


def build_stream(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    checkpoint: Path | None = None,
) -> StreamedRows | None:
    """The rows of a run that are made while it trains, a shard a worker; None where they are prepared.

    Raises RecipeError for a checkpoint of other data, or that read them in another order.
    """
    if not recipe.data.streaming:
        return None
    shards = arguments.world_size * max(1, arguments.dataloader_num_workers)
    rows = rows_per_step(arguments) * arguments.max_steps
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    stream = StreamedRows(
        partial(read_stream, recipe=recipe, tokenizer=tokenizer),
        StreamPlan(rows, arguments.train_batch_size, shards, shares_of(recipe.data), counted_by(recipe.data)),
        seed=seed if arguments.train_sampling_strategy == "random" else None,
        max_dropped=recipe.data.max_dropped,
        identity=stream_identity(recipe),
    )
    if checkpoint:
        stream.read_state(checkpoint)
    return stream


def resolve(recipe: Recipe, arguments: TrainingArguments) -> Recipe:
    """The recipe with what its run decided: our defaults of the Trainer, the precision, the packing."""
    values = {**training_values(recipe), "bf16": arguments.bf16}
    data = recipe.data.model_copy(update={"packing": recipe.resolved_packing})
    model = recipe.model.model_copy(update={"dtype": weights_dtype(recipe, arguments)})
    decided = {"model": model, "train": values, "data": data}
    return recipe.model_copy(update={**decided, "overwrite": False, "resume_override": []})


def build_tokenizer(
    recipe: Recipe, loaded: Mapping[str, Sequence[AnyExample]], *, arguments: TrainingArguments
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, or trains it on the training texts: once, on rank 0; the others load that.

    ``loaded``: the examples by the name of their split. Characters are those of all splits: a letter that the
    evaluation alone holds could not be spelled, and gives nothing away.
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
    folder = os.path.join(str(arguments.output_dir), TRAINED_TOKENIZER)  # beside a model that may be there
    with arguments.main_process_first(local=False, desc="training the tokenizer"):
        if arguments.process_index == 0:
            splits = loaded.values() if section.train.kind == "characters" else [loaded["train"]]
            texts = (text for examples in splits for example in examples for text in example.texts if text)
            names = {"pad_token": section.pad_token, "eos_token": section.eos_token or END}
            trained = train_tokenizer(texts, **names, **section.train.model_dump())
            add_control_tokens(trained, section.control_tokens)
            if section.chat_template:
                use_chat_template(trained, section.chat_template)
            set_template_defaults(trained, section.chat_template_kwargs)
            trained.save_pretrained(folder)
            # AutoTokenizer splits the text as this type of model does: from now on, not only once it is saved
            kind = recipe.model.config.get("model_type") or _named_config(recipe).model_type
            Path(folder, "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        tokenizer = load_tokenizer(folder, pad_token=section.pad_token)
    if section.train.kind != "bpe" and type(tokenizer) is not PreTrainedTokenizerFast:
        what = f"transformers opens it as {type(tokenizer).__name__}, which splits text in its own way"
        fix = "choose a model_type such as gpt2 or llama, or kind: bpe"
        raise ModelError(what, where="tokenizer.train.kind", got=section.train.kind, fix=fix)
    return tokenizer


def settle_render(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Recipe:
    """The recipe with ``data.render: auto`` decided. A template that only writes plain prompts is none."""
    return recipe.for_tokenizer(has_template=bool(tokenizer.chat_template) and not is_plain(tokenizer))


def give_plain_template(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, formats: Iterable[str]
) -> list[str]:
    """Gives the tokenizer a chat template that writes the plain prompts of a run; returns lines to print.

    So the model can be asked with transformers alone. Nothing is done for chats and for pretraining.
    """
    found = sorted(formats)
    if recipe.stage != "sft" or recipe.data.render == "chat" or {"messages", "sharegpt"}.intersection(found):
        return []
    templates = [source.template for source in recipe.data.train]
    starts = bos_token(tokenizer) is not None
    is_alike = len(found) == 1 and all(template == templates[0] for template in templates)
    text = plain_template(found[0], templates[0], starts=starts) if is_alike else None
    if text is None:
        why = f"{', '.join(found)} have no single form of a prompt"
        return [f"asked     by hf-clm generate alone: no chat template is saved ({why})"]
    tokenizer.chat_template = text
    return [f"asked     as messages too: a chat template that writes these prompts ({found[0]}) is saved"]


def build_tokenizer_aside(
    recipe: Recipe, loaded: Mapping[str, Sequence[AnyExample]], *, arguments: TrainingArguments
) -> PreTrainedTokenizerFast:
    """The same, but a tokenizer that is trained is written to no output folder."""
    with tempfile.TemporaryDirectory() as folder:
        aside = copy(arguments)
        aside.output_dir = folder
        return build_tokenizer(recipe, loaded, arguments=aside)


def check_model(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raises ModelError for a model that cannot be built or adapted, before the data are read.

    A tokenizer that is not known yet decides no more than the size of the vocabulary.
    """
    model, lora = recipe.model, recipe.lora
    check_attention(model.attention)
    if model.init == "scratch" and model.config:
        on_cpu = arguments.device.type == "cpu"
        size = getattr(torch, model.dtype).itemsize
        # gradients are on the device too; the optimizer's part differs
        check_shape(build_config(model.config), bytes_per_weight=size * (2 if on_cpu else 1))
        return
    config = _named_config(recipe)
    if lora and not model.trust_remote_code and (lora.target_modules != "all-linear" or lora.modules_to_save):
        empty = build_without_memory(config)
        check_layers(empty, target_modules=lora.target_modules, modules_to_save=lora.modules_to_save)


def build_model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The model's configuration. Raises ModelError where a row is longer than its positions."""
    model = recipe.model
    if model.init == "scratch" and model.config:
        config = build_config(model.config, tokenizer)
    else:
        config = _named_config(recipe)
    limit = max_positions(config)
    if limit is not None and recipe.data.max_length > limit:
        what = f"{recipe.data.max_length} is over the model's {limit} positions"
        raise ModelError(what, where="data.max_length", fix=f"set it to {limit} or less")
    return config


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    config: PretrainedConfig,
    arguments: TrainingArguments,
) -> PreTrainedModel:
    """The model: random weights drawn from ``train.seed``, or loaded ones; with adapters for lora."""
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
            quantization=_quantization(recipe),
            trust_remote_code=section.trust_remote_code,
            allow_bin=section.allow_bin,
        )
    check_causal(model)
    if recipe.resolved_packing != "none" and section.attention != PACKED:  # else load_model has looked
        check_packing(model)
    if recipe.lora is None:
        return model
    set_seed(arguments.seed)
    return _with_adapters(recipe, model, new_tokens=_new_tokens(recipe, tokenizer, config=config))


def weights_dtype(recipe: Recipe, arguments: TrainingArguments) -> str:
    """Of the model's weights: those that are frozen need no more bits than they are computed with."""
    is_silent = "dtype" not in recipe.model.model_fields_set
    return "bfloat16" if recipe.lora and is_silent and arguments.bf16 else recipe.model.dtype


def build_collator(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    with_targets: bool = False,
    static: StaticShape | None = None,
) -> Callable[..., dict[str, Any]]:
    """Rows laid one behind the other; padded only where nothing is packed and the attention is another."""
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer gives it one"
    if recipe.resolved_packing == "none" and recipe.model.attention != PACKED:
        return DataCollatorForCausalLM(tokenizer.pad_token_id)
    options: dict[str, Any] = {"with_targets": with_targets, "static": static}
    return DataCollatorForPackedCausalLM(**options, pad_token_id=tokenizer.pad_token_id)


def static_shape(datasets: Sequence[AnyDataset], arguments: TrainingArguments) -> StaticShape:
    """One shape that holds every batch of the datasets, so that torch.compile compiles once."""
    rows = max(arguments.train_batch_size, arguments.eval_batch_size)
    longest, documents = 1, rows
    for dataset in datasets:
        if isinstance(dataset, PackedDataset):
            fullest = np.sort(np.diff(dataset.pieces.offsets))[-rows:]
            longest, documents = max(longest, dataset.max_length), max(documents, int(fullest.sum()))
        else:
            longest = max(longest, int(dataset.lengths.max()))
    # every process may have rows of one token that only fill up
    return StaticShape(rows * longest, documents + rows, longest, targets_multiple=STATIC_TARGETS)


def _new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, config: PretrainedConfig) -> list[int]:
    """The tokens that the trained model has never seen; of a tokenizer not its own, those without a row."""
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


def _quantization(recipe: Recipe) -> Any:
    """The 4 bits of QLoRA (arXiv:2305.14314). Raises EnvironmentFault without a GPU or the package."""
    if recipe.lora is None or recipe.lora.quantize is None:
        return None
    if not torch.cuda.is_available():
        fix = "set it to null: a frozen bfloat16 model is small too"
        raise EnvironmentFault("needs a CUDA device", where="lora.quantize", got="4bit", fix=fix)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "needs the package bitsandbytes", where="lora.quantize", fix="pip install 'hf_clm[qlora]'"
        )
    kind = torch.bfloat16 if has_bf16(torch.device("cuda")) else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
    )


def _is_on_cpu(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_cpu")) or not torch.accelerator.is_available()


def _named_config(recipe: Recipe) -> PretrainedConfig:
    model = recipe.model
    assert model.name_or_path is not None, "config.py requires it where there is no model_type"
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return load_config(model.name_or_path, **options)
