"""What no single key of a recipe shows: keys that exclude each other, or have no effect together."""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_clm.errors import did_you_mean
from hf_clm.recipe.faults import OUT, Fault
from hf_clm.recipe.sections import EVAL, FACTS, TRAIN, Data, Model, Tokenizer, rule_of, walk
from hf_clm.recipe.shapes import folder_faults, scratch_faults
from hf_clm.recipe.trainer_checks import check_train_combination, metric_names
from hf_clm.recipe.trainer_fields import NOT_STREAMED, TRAIN_DEFAULTS, train_fields

if TYPE_CHECKING:
    from hf_clm.recipe.recipe import Recipe

SHIPPED_TEMPLATES = ("chatml", "plain")
ANSWER_METRICS = ("exact_match", "chrf", "bleu")


def recipe_faults(recipe: "Recipe") -> list[Fault]:
    """What is wrong between the keys of a recipe."""
    data, train = recipe.data, recipe.train
    sets = [name.removeprefix(f"{EVAL}_") for name in data.eval_sets if name != EVAL]
    metrics = metric_names([*sets, *["train"] * bool(data.eval_train_rows)], answer_metrics(recipe))
    has_eval = bool(data.eval or data.eval_fraction)
    parts = [_model_faults(recipe), _unused_model_keys(recipe.model, recipe.tokenizer)]
    parts += [_tokenizer_faults(recipe.tokenizer), _stream_faults(recipe) if data.streaming else []]
    parts += [_sft_faults(recipe), _data_faults(recipe), _layout_faults(recipe), _source_faults(recipe)]
    parts += [_set_faults(data), _answer_faults(recipe), _share_faults(data), _override_faults(recipe)]
    faults = [fault for part in parts for fault in part]
    faults += check_train_combination(train, has_eval=has_eval, defaults=TRAIN_DEFAULTS, metrics=metrics)
    if recipe.early_stopping and not train.get("load_best_model_at_end"):
        what = "needs train.load_best_model_at_end: true and an eval set"
        faults.append(Fault("early_stopping", what))
    return faults


def answer_metrics(recipe: "Recipe") -> list[str]:
    """The metrics of answers as the evaluations of a recipe log them: ``eval_news_chrf``, ...

    A function may return several numbers by name. Their names are not known before it runs, except for the
    one that the recipe chooses as ``metric_for_best_model``.
    """
    section, chosen = recipe.evaluation, _chosen_metric(recipe)
    found = []
    for prefix in (recipe.data.eval_sets or [EVAL]) if section.generate else []:
        for name in section.metrics:
            key = f"{prefix}_{name.rpartition(':')[2]}"
            found.append(chosen if ":" in name and chosen.startswith(f"{key}_") else key)
    return found


def _chosen_metric(recipe: "Recipe") -> str:
    name = recipe.train.get("metric_for_best_model") or ""
    return name if name.startswith("eval_") else f"eval_{name}"


def _model_faults(recipe: "Recipe") -> Iterator[Fault]:
    model, tokenizer = recipe.model, recipe.tokenizer
    is_new, is_folder = model.init == "scratch", _is_folder(model.name_or_path)
    if not model.name_or_path and not (is_new and "model_type" in model.config):
        fix = "name a model, or set model.init to scratch with model.config.model_type"
        yield Fault("model.name_or_path", "is missing", fix)
    elif is_new and not (tokenizer.name_or_path or tokenizer.train or model.name_or_path):
        yield Fault("model.init", ": a new model needs tokenizer.name_or_path or tokenizer.train")
    if tokenizer.train and (tokenizer.name_or_path or not is_new):
        other = "tokenizer.name_or_path" if tokenizer.name_or_path else "a pretrained model"
        yield Fault("tokenizer.train", f"and {other} exclude each other")
    if is_new:
        yield from scratch_faults(model.config)
    elif is_folder and not model.trust_remote_code:
        yield from folder_faults(str(model.name_or_path))
    if recipe.lora and is_new:
        fix = "set model.init to pretrained, or leave lora out"
        yield Fault("lora", "freezes the model, which has to be a trained one", fix)
    if model.trust_remote_code and not (is_folder or re.fullmatch("[0-9a-f]{40}", model.revision or "")):
        fix = "pin model.revision to a commit (40 hex digits)"
        yield Fault("model.trust_remote_code", "runs the code of others", fix)


def _unused_model_keys(model: Model, tokenizer: Tokenizer) -> Iterator[Fault]:
    """Keys that have no effect where another one decides what they would."""
    is_new = model.init == "scratch"
    for name in {"config", "embedding_std"} & set(model.changed) if not is_new else ():
        fix = "leave it out, or set model.init to scratch"
        yield Fault(f"model.{name}", "has no effect on a pretrained model", fix)
    has_tokenizer = tokenizer.name_or_path or tokenizer.train
    if is_new and model.name_or_path and "model_type" in model.config and has_tokenizer:
        what = "has no effect: model.config and tokenizer say what is built"
        fix = "set model.init to pretrained and tokenizer.train to null to train that model, or leave it out"
        yield Fault("model.name_or_path", what, fix, repr(model.name_or_path))
    if is_new and model.allow_bin:
        yield Fault("model.allow_bin", "has no effect on a new model, which loads no weights", OUT)
    if model.revision and (model.name_or_path is None or _is_folder(model.name_or_path)):
        yield Fault("model.revision", "has no effect without a model on the Hub", OUT, model.revision)


def _tokenizer_faults(tokenizer: Tokenizer) -> Iterator[Fault]:
    new, template = tokenizer.train, tokenizer.chat_template
    unused = {"characters": ("vocab_size", "min_frequency"), "unigram": ("min_frequency",)}
    for name in new.changed if new else ():
        if new and name in unused.get(new.kind, ()):
            yield Fault(f"tokenizer.train.{name}", f"has no effect with kind: {new.kind}", OUT)
    if new and tokenizer.eos_token == tokenizer.pad_token:
        yield Fault("tokenizer.eos_token", "and tokenizer.pad_token are the same")
    if template and template not in SHIPPED_TEMPLATES and not template.endswith(".jinja"):
        got = f"{template!r}{did_you_mean(template, SHIPPED_TEMPLATES)}"
        what = f": expected one of {', '.join(SHIPPED_TEMPLATES)}, or a .jinja file"
        yield Fault("tokenizer.chat_template", what, got=got)


def _data_faults(recipe: "Recipe") -> Iterator[Fault]:
    """What is wrong between the data and how their rows are laid out."""
    data, train, packing = recipe.data, recipe.train, recipe.resolved_packing
    if data.eval and data.eval_fraction:
        yield Fault("data.eval_fraction", "and data.eval exclude each other")
    if data.overflow and packing == "stream":
        what = "has no effect where a stream cuts documents at the end of a row"
        yield Fault("data.overflow", what, "leave it out, or set data.packing to none or best_fit")
    if "shuffle_buffer" in data.changed and not data.streaming:
        what = "has no effect without data.streaming: all rows are shuffled"
        yield Fault("data.shuffle_buffer", what, OUT)
    if train.get("use_liger_kernel"):
        what = "gives no logits, which the token accuracy is counted on"
        yield Fault("train.use_liger_kernel", what, OUT)
    if train.get("neftune_noise_alpha") and (packing != "none" or recipe.model.attention == "packed"):
        what = "is scaled by the length of a row, and packed rows hold many texts"
        fix = "set data.packing to none and model.attention to sdpa, or leave it out"
        yield Fault("train.neftune_noise_alpha", what, fix)
    if train.get("train_sampling_strategy") == "group_by_length" and packing != "none":
        what = ": group_by_length has no effect on packed rows, which all have the same length"
        yield Fault("train.train_sampling_strategy", what, "leave it out, or set data.packing to none")


def _layout_faults(recipe: "Recipe") -> Iterator[Fault]:
    """What does not go together with ``data.window`` and ``data.tokens_per_batch``."""
    data, window, budget = recipe.data, recipe.data.window, recipe.data.tokens_per_batch
    for key, is_given in (("data.window", window), ("data.tokens_per_batch", budget)):
        if is_given and recipe.resolved_packing != "none":
            yield Fault(key, "needs data.packing: none", got=recipe.resolved_packing)
    if window and not window.step <= window.size <= data.max_length:
        got = f"{window.step}, {window.size}, {data.max_length}"
        yield Fault("data.window", ": expected step <= size <= data.max_length", got=got)
    if budget is None:
        return
    key, size = "data.tokens_per_batch", recipe.train.get("per_device_train_batch_size", 1)
    if recipe.model.attention != "packed":
        yield Fault(key, "needs model.attention: packed", got=recipe.model.attention)
    if budget < data.max_length:
        what = "is below data.max_length, so an example may not fit"
        yield Fault(key, what, got=f"{budget}, {data.max_length}")
    if size != 1:
        what = f"must be 1 beside {key}, which is the size of a micro-batch"
        yield Fault("train.per_device_train_batch_size", what, OUT, str(size))


def _sft_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Keys that only one of the stages has."""
    data = recipe.data
    if recipe.stage == "sft":
        if data.window:
            yield Fault("data.window", "is for stage pretrain: it would cut targets")
        if data.packing == "stream":
            what = ": stream cuts rows, so a target would lose its prompt"
            yield Fault("data.packing", what, "best_fit or none for stage sft")
        return
    if data.train_on not in ("all_turns", "everything"):
        yield Fault("data.train_on", "is for stage sft: pretraining learns everything")
    if data.render == "chat":
        yield Fault("data.render", ": chat is for stage sft: pretraining reads plain text")
    if recipe.evaluation.generate:
        yield Fault("evaluation.generate", "answers prompts, and pretraining has none", OUT)


def _source_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Keys of a source that have no effect beside others."""
    is_cut = recipe.resolved_packing == "stream" and "where a stream cuts documents at the end of a row"
    for part in (TRAIN, EVAL):
        for number, source in enumerate(getattr(recipe.data, part)):
            is_file, is_folder = os.path.isfile(os.path.expanduser(source.path)), _is_folder(source.path)
            of_template = source.template and "beside a template, which names the columns itself"
            of_hub = (is_file or is_folder) and "on local files: it is of a dataset on the Hub"
            of_train = part == EVAL and "on a source of data.eval, which is evaluated completely"
            unused = {
                **{"format": of_template, "fields": of_template, "name": of_hub, "revision": of_hub},
                **{"weight": of_train, "epochs": of_train, "overflow": is_cut},
                "split": is_file and "on a single file",
                "set": part == TRAIN and "on a source of data.train: it names an evaluation set",
            }
            for name in source.changed:
                if why := unused.get(name):
                    yield Fault(f"data.{part}.{number}.{name}", f"has no effect {why}", OUT)


def _set_faults(data: Data) -> Iterator[Fault]:
    names = [source.set for source in data.eval]
    if None in names and set(names) != {None}:
        what = ": some sources are of a named set, and others are not"
        yield Fault("data.eval", what, "{name: path, other: path}")
    if "train" in names:
        what = ": a set has the name of what data.eval_train_rows measures"
        yield Fault("data.eval", what, "another name", "train")


def _answer_faults(recipe: "Recipe") -> Iterator[Fault]:
    data, section = recipe.data, recipe.evaluation
    if not section.generate:
        for key in section.changed:
            what = "has no effect without evaluation.generate"
            yield Fault(f"evaluation.{key}", what, "say how many examples are answered")
    elif not data.eval and not data.eval_fraction:
        what = "answers examples of evaluation sets, and there is none"
        yield Fault("evaluation.generate", what, "give data.eval or data.eval_fraction")
    for number, name in enumerate(section.metrics):
        if ":" not in name and name not in ANSWER_METRICS:
            what = f": expected {', '.join(ANSWER_METRICS)} or module:function"
            near = did_you_mean(name, ANSWER_METRICS)
            yield Fault(f"evaluation.metrics.{number}", what, got=f"{name!r}{near}")
    if section.every > 1 and _chosen_metric(recipe) in answer_metrics(recipe):
        what = "leaves out evaluations, and train.metric_for_best_model needs all of them"
        yield Fault("evaluation.every", what, "1", str(section.every))


def _share_faults(data: Data) -> Iterator[Fault]:
    """What is wrong between the weights and epochs of the sources, and ``data.mixing``."""
    weighted = [number for number, source in enumerate(data.train) if source.weight is not None]
    repeated = [number for number, source in enumerate(data.train) if source.epochs is not None]
    if weighted and repeated:
        what = "and weight are two ways to say how much of a source is read"
        yield Fault(f"data.train.{repeated[0]}.epochs", what, "give all sources weights, or none")
    elif weighted and len(data.train) == 1:
        yield Fault(
            "data.train.0.weight", "has no effect with a single source", "leave it out, or say epochs"
        )
    elif 0 < len(weighted) < len(data.train):
        missing = next(number for number in range(len(data.train)) if number not in weighted)
        what = f"has no weight, and data.train.{weighted[0]} has one"
        yield Fault(f"data.train.{missing}", what, "give each source one", data.train[missing].path)
    said = "weights" if weighted else "epochs"
    if data.mixing and data.mixing.temperature != 1 and (weighted or repeated):
        what = f"makes shares of sizes, and the sources have {said}"
        yield Fault("data.mixing.temperature", what, f"leave it out, or the {said}")
    if data.mixing and data.mixing.size and repeated:
        what = "has no effect where the sources have epochs, which decide the size"
        yield Fault("data.mixing.size", what, "leave it out, or give weights")


def _stream_faults(recipe: "Recipe") -> Iterator[Fault]:
    """What ``data.streaming`` excludes: the rules of the keys, and what no rule says."""
    data, train = recipe.data, recipe.train
    if train.get("max_steps", -1) <= 0:
        what = "is missing: data.streaming needs it, as the length of a stream is not known"
        yield Fault("train.max_steps", what, got=str(train.get("max_steps", -1)))
    if data.mixing and all(source.weight is None for source in data.train):
        what = "has no effect: without weights the sources of a stream are read one after another"
        yield Fault("data.mixing", what, "give each source a weight, or leave data.mixing out")
    for key, section, name in walk(recipe):
        rule = rule_of(type(section).model_fields[name])
        if rule.stream and name in section.changed and not key.startswith(f"data.{EVAL}."):
            yield Fault(key, f"and data.streaming exclude each other: {rule.stream}")
    for name, (values, why) in NOT_STREAMED.items():
        if train.get(name) in values:
            yield Fault(f"train.{name}", f"and data.streaming exclude each other: {why}")


def _override_faults(recipe: "Recipe") -> Iterator[Fault]:
    """What in ``resume_override`` is neither a key nor a fact that could differ."""
    known = {*type(recipe).model_fields, *FACTS, *train_fields()}
    for name in recipe.resume_override:
        if name.removeprefix("train.").partition(".")[0] not in known:
            yield Fault("resume_override", f": no such key: {name!r}{did_you_mean(name, known)}")


def _is_folder(path: str | None) -> bool:
    return os.path.isdir(os.path.expanduser(path or ""))  # unlike pathlib's, it takes a name of any length
