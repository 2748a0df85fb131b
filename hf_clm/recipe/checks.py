"""Checks keys of a recipe together: those that exclude each other, or have no effect."""

import os
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.recipe.faults import OUT, Fault, shorten
from hf_clm.recipe.sections import EVAL, FACTS, TRAIN, Data, Keys, Model, Tokenizer
from hf_clm.recipe.shapes import folder_faults, scratch_faults
from hf_clm.recipe.trainer_checks import metric_names, train_faults
from hf_clm.recipe.trainer_fields import NOT_STREAMED, train_fields, train_rule, train_values


def recipe_faults(recipe: Keys) -> list[Fault]:
    """Returns the faults of combinations of keys."""
    data = recipe.data
    sets = [name.removeprefix(f"{EVAL}_") for name in data.eval_sets if name != EVAL]
    is_held_out = bool(data.eval or data.eval_fraction)
    watched = ["train"] if data.eval_train_rows and is_held_out else []
    metrics = metric_names([*sets, *watched], answer_metrics(recipe))
    return [
        *_model_faults(recipe.model, recipe.tokenizer),
        *(_stream_faults(recipe) if data.streaming else ()),
        *_rule_faults(recipe),
        *_data_faults(recipe),
        *_source_faults(data),
        *_set_faults(data),
        *_answer_faults(recipe),
        *_optimizer_faults(recipe),
        *_share_faults(data),
        *train_faults(recipe.train, has_eval=is_held_out or data.eval_train_rows > 0, metrics=metrics),
        *_override_faults(recipe),
    ]


def answer_metrics(recipe: Keys) -> list[str]:
    """Returns the metrics of answers as the evaluations log them: ``eval_news_chrf`` and so on.

    A function may return several numbers by name. These names are not known in advance, except for the one
    that is used as ``metric_for_best_model``.
    """
    section, best = recipe.evaluation, _best_metric(recipe)
    names = []
    for prefix in (recipe.data.eval_sets or [EVAL]) if section.generate else []:
        for name in section.metrics:
            key = f"{prefix}_{name.rpartition(':')[2]}"
            names.append(best if ":" in name and best.startswith(f"{key}_") else key)
    return names


def _best_metric(recipe: Keys) -> str:
    name = recipe.train.get("metric_for_best_model") or ""
    return name if name.startswith("eval_") else f"eval_{name}"


def _rule_faults(recipe: Keys) -> Iterator[Fault]:
    """Yields violations of the rules of keys, including those of ``train``."""
    values, defaults = train_values(recipe.train), train_values({})
    changed = [*recipe.changed()]
    changed += [
        (f"train.{key}", train_rule(key))
        for key, value in recipe.train.items()
        if value not in (None, {}, [], defaults[key]) and (value, defaults[key]) != (False, "no")
    ]
    for key, rule in changed:
        if recipe.data.streaming and not rule.stream and not key.startswith(f"data.{EVAL}."):
            yield Fault(key, "and data.streaming exclude each other", rule.instead or OUT)
        if rule.unused:
            yield Fault(key, f"has no effect: {rule.unused}", OUT)
        for other, allowed in rule.needs.items():
            section, _, name = other.rpartition(".")
            value = values[name] if section == "train" else reduce(getattr, other.split("."), recipe)
            value = recipe.resolved_packing if other == "data.packing" else value
            if value not in allowed if allowed else not value:
                words = (
                    f": {' or '.join(map(_word, allowed))}"
                    if allowed
                    else " of 1 or more"
                    if value == 0
                    else ""
                )
                yield Fault(key, f"needs {other}{words}", got=_word(value))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else shorten(value)


def _model_faults(model: Model, tokenizer: Tokenizer) -> Iterator[Fault]:
    is_new, is_folder = model.init == "scratch", _is_folder(model.name_or_path)
    has_tokenizer = tokenizer.name_or_path or tokenizer.train
    if not model.name_or_path and not (is_new and "model_type" in model.config):
        fix = "name a model, or set model.init to scratch with model.config.model_type"
        yield Fault("model.name_or_path", "is missing", fix)
    elif is_new and not (has_tokenizer or model.name_or_path):
        yield Fault("model.init", ": a new model needs tokenizer.name_or_path or tokenizer.train")
    elif is_new and model.name_or_path and "model_type" in model.config and has_tokenizer:
        what = "has no effect: model.config and tokenizer determine the model"
        fix = "set model.init to pretrained and tokenizer.train to null to train that model, or remove it"
        yield Fault("model.name_or_path", what, fix, repr(model.name_or_path))
    if is_new:
        yield from scratch_faults(model.config)
    elif is_folder and not model.trust_remote_code:
        yield from folder_faults(str(model.name_or_path))
    if model.trust_remote_code and not (is_folder or re.fullmatch("[0-9a-f]{40}", model.revision or "")):
        fix = "set model.revision to a commit (40 hex digits)"
        yield Fault("model.trust_remote_code", "runs code from the Hub", fix)
    if model.revision and (model.name_or_path is None or is_folder):
        yield Fault("model.revision", "has no effect without a model on the Hub", OUT, model.revision)
    if tokenizer.train and tokenizer.eos_token == tokenizer.pad_token:
        yield Fault("tokenizer.eos_token", "and tokenizer.pad_token are the same")


def _data_faults(recipe: Keys) -> Iterator[Fault]:
    """Yields faults between the data and the layout of rows."""
    data, train, window, packing = recipe.data, recipe.train, recipe.data.window, recipe.resolved_packing
    if data.eval and data.eval_fraction:
        yield Fault("data.eval_fraction", "and data.eval exclude each other")
    if recipe.stage == "sft" and data.packing == "stream":
        what = ": stream cuts rows, which would separate targets from their prompts"
        yield Fault("data.packing", what, "set it to best_fit or none")
    if recipe.stage == "pretrain" and data.render == "chat":
        yield Fault("data.render", ": chat is for stage sft: pretraining reads plain text")
    if window and not window.step <= window.size <= data.max_length:
        got = f"{window.step}, {window.size}, {data.max_length}"
        yield Fault("data.window", ": expected step <= size <= data.max_length", got=got)
    if data.tokens_per_batch and data.tokens_per_batch < data.max_length:
        got = f"{data.tokens_per_batch}, {data.max_length}"
        yield Fault("data.tokens_per_batch", "is below data.max_length, so an example may not fit", got=got)
    if (
        data.tokens_per_batch
        and packing == "none"
        and (size := train.get("per_device_train_batch_size", 1)) != 1
    ):
        what = "must be 1 with data.tokens_per_batch, which is the size of a micro-batch"
        yield Fault("train.per_device_train_batch_size", what, OUT, str(size))
    if train.get("neftune_noise_alpha") and (packing != "none" or recipe.model.attention == "packed"):
        what = "depends on the length of a row, but packed rows contain many texts"
        fix = "set data.packing to none and model.attention to sdpa, or remove it"
        yield Fault("train.neftune_noise_alpha", what, fix)
    if train.get("train_sampling_strategy") == "group_by_length" and packing != "none":
        what = ": group_by_length has no effect on packed rows, which all have the same length"
        yield Fault("train.train_sampling_strategy", what, "remove it, or set data.packing to none")


def _source_faults(data: Data) -> Iterator[Fault]:
    """Yields faults for keys of a source that have no effect."""
    for part in (TRAIN, EVAL):
        for number, source in enumerate(getattr(data, part)):
            is_file = os.path.isfile(os.path.expanduser(source.path))
            of_template = source.template and "with a template, which names the columns itself"
            of_hub = (is_file or _is_folder(source.path)) and "on local files, only on datasets of the Hub"
            of_train = part == EVAL and "on a source of data.eval, which is evaluated completely"
            unused = {
                **dict.fromkeys(("format", "fields"), of_template),
                **dict.fromkeys(("name", "revision"), of_hub),
                **dict.fromkeys(("weight", "epochs"), of_train),
                "split": is_file and "on a single file",
                "set": part == TRAIN and "on a source of data.train, as it names an evaluation set",
            }
            for name, _ in source.changed():
                if why := unused.get(name):
                    yield Fault(f"data.{part}.{number}.{name}", f"has no effect {why}", OUT)


def _set_faults(data: Data) -> Iterator[Fault]:
    names = [source.set for source in data.eval]
    if None in names and set(names) != {None}:
        what = ": some sources belong to a named set, and others do not"
        yield Fault("data.eval", what, "give each a name: {name: path, other: path}")
    if "train" in names:
        what = ": the name is reserved for data.eval_train_rows"
        yield Fault("data.eval", what, "choose another name", "train")


def _answer_faults(recipe: Keys) -> Iterator[Fault]:
    data, section = recipe.data, recipe.evaluation
    if section.generate and not data.eval and not data.eval_fraction:
        what = "needs an evaluation set"
        yield Fault("evaluation.generate", what, "set data.eval or data.eval_fraction")
    if section.every > 1 and _best_metric(recipe) in answer_metrics(recipe):
        what = "skips evaluations, but train.metric_for_best_model needs all of them"
        yield Fault("evaluation.every", what, "set it to 1", str(section.every))


def _optimizer_faults(recipe: Keys) -> Iterator[Fault]:
    """Yields faults of the section ``optimizer`` with LoRA and the optimizers of ``train``."""
    section = recipe.optimizer
    if section is None:
        return
    for name in ("optim", "optim_args", "optim_target_modules"):
        if recipe.train.get(name):
            yield Fault(
                f"train.{name}", "and the section optimizer exclude each other", got=str(recipe.train[name])
            )
    if section.freeze and recipe.lora:
        what = "excludes lora, which freezes all weights of the model and trains all adapters"
        yield Fault("optimizer.freeze", what, "select the adapters with lora.target_modules")
    options = recipe.train.get("activation_checkpointing_kwargs") or {}
    if section.freeze and options.get("use_reentrant"):
        what = ": use_reentrant loses gradients after layers that are frozen (optimizer.freeze)"
        yield Fault("train.activation_checkpointing_kwargs", what, "remove use_reentrant")
    for number, group in enumerate(section.groups):
        if group.learning_rate is None and group.weight_decay is None:
            what = "has no effect without a learning_rate or weight_decay"
            yield Fault(f"optimizer.groups.{number}", what, "set one of them, or remove the group")


def _share_faults(data: Data) -> Iterator[Fault]:
    """Yields faults between the weights and epochs of the sources, and ``data.mixing``."""
    weighted = [number for number, source in enumerate(data.train) if source.weight is not None]
    repeated = [number for number, source in enumerate(data.train) if source.epochs is not None]
    if weighted and repeated:
        what = "and weight exclude each other, as both set the share of a source"
        yield Fault(f"data.train.{repeated[0]}.epochs", what, "use either weights or epochs for all sources")
    elif weighted and len(data.train) == 1:
        yield Fault("data.train.0.weight", "has no effect with a single source", "remove it, or set epochs")
    elif 0 < len(weighted) < len(data.train):
        missing = next(number for number in range(len(data.train)) if number not in weighted)
        what = f"has no weight, but data.train.{weighted[0]} has one"
        yield Fault(f"data.train.{missing}", what, "set a weight for each source", data.train[missing].path)
    amounts = "weights" if weighted else "epochs"
    if data.mixing and data.mixing.temperature != 1 and (weighted or repeated):
        what = f"derives shares from the sizes of sources, but they have {amounts}"
        yield Fault("data.mixing.temperature", what, f"remove it, or the {amounts}")
    if data.mixing and data.mixing.size and repeated:
        what = "has no effect if the sources have epochs, which determine the size"
        yield Fault("data.mixing.size", what, "remove it, or use weights")


def _stream_faults(recipe: Keys) -> Iterator[Fault]:
    """Yields faults with ``data.streaming`` that the rules of keys do not cover."""
    data, train = recipe.data, recipe.train
    if train.get("max_steps", -1) <= 0:
        what = "is missing: data.streaming needs it, as the number of records is not known"
        yield Fault("train.max_steps", what, got=str(train.get("max_steps", -1)))
    if data.mixing and all(source.weight is None for source in data.train):
        what = "has no effect: without weights, the sources of a stream are read one after the other"
        yield Fault("data.mixing", what, "set a weight for each source, or remove data.mixing")
    for name, values in NOT_STREAMED.items():
        if train.get(name) in values:
            what = f": {_word(train[name])} and data.streaming exclude each other"
            yield Fault(f"train.{name}", what, OUT)


def _override_faults(recipe: Keys) -> Iterator[Fault]:
    """Yields faults for entries of ``resume_override`` that are neither a key nor a fact."""
    names = {*type(recipe).model_fields, *FACTS, *train_fields()}
    for name in recipe.resume_override:
        if name.removeprefix("train.").partition(".")[0] not in names:
            yield Fault("resume_override", f": no such key: {name!r}{did_you_mean(name, names)}")


def _is_folder(path: str | None) -> bool:
    return os.path.isdir(os.path.expanduser(path or ""))  # unlike pathlib, it accepts names of any length
