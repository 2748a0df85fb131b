"""What no single key of a recipe shows: keys that exclude each other, or have no effect together."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.recipe.shapes import folder_faults, scratch_faults
from hf_clm.recipe.trainer_fields import Fault, load_trainer_fields

FACTS = (
    "template",
    "global_batch",
    "architecture",
    "base_weights",
)  # of a run, that are no keys of its recipe
SHIPPED_TEMPLATES = ("chatml", "plain")
ANSWER_METRICS = ("exact_match", "chrf", "bleu")


def model_faults(recipe: Any) -> Iterator[Fault]:
    """What is wrong between the model and the tokenizer of a ``config.Recipe``."""
    model, tokenizer = recipe.model, recipe.tokenizer
    if not model.name_or_path and not (model.init == "scratch" and "model_type" in model.config):
        yield Fault("model.name_or_path", "model needs name_or_path, or init: scratch with config.model_type")
    elif model.init == "scratch" and not (tokenizer.name_or_path or tokenizer.train or model.name_or_path):
        yield Fault("model.init", "a model from scratch needs tokenizer.name_or_path or tokenizer.train")
    if tokenizer.train and (tokenizer.name_or_path or model.init == "pretrained"):
        other = "tokenizer.name_or_path" if tokenizer.name_or_path else "a pretrained model"
        yield Fault("tokenizer.train", f"tokenizer.train and {other} exclude each other")
    yield from _unused_model_keys(model, tokenizer)
    if model.init == "scratch":
        yield from scratch_faults(model.config)
    elif _is_folder(model.name_or_path) and not model.trust_remote_code:
        yield from folder_faults(model.name_or_path)
    yield from _unused_sizes(tokenizer.train)
    if tokenizer.train and tokenizer.eos_token == tokenizer.pad_token:
        yield Fault("tokenizer.eos_token", "tokenizer.eos_token and tokenizer.pad_token are the same")
    if recipe.lora and model.init == "scratch":
        what = "lora freezes the model, which has to be a trained one"
        yield Fault("lora", what, fix="set model.init to pretrained, or leave lora out")
    pinned = re.fullmatch("[0-9a-f]{40}", model.revision or "") or _is_folder(model.name_or_path)
    if model.trust_remote_code and not pinned:
        what = "model.trust_remote_code runs the code of others"
        yield Fault("model.trust_remote_code", what, fix="pin model.revision to a commit (40 hex digits)")
    template = tokenizer.chat_template
    if template and template not in SHIPPED_TEMPLATES and not template.endswith(".jinja"):
        got = f"{template!r}{did_you_mean(template, SHIPPED_TEMPLATES)}"
        what = "tokenizer.chat_template: expected one of chatml, plain, or a .jinja file"
        yield Fault("tokenizer.chat_template", what, got=got)


def _unused_model_keys(model: Any, tokenizer: Any) -> Iterator[Fault]:
    """Keys of a ``config.Model`` that change nothing where another decides what they would."""
    is_from_scratch = model.init == "scratch"
    for name in ("config", "embedding_std"):
        if not is_from_scratch and getattr(model, name) not in (None, {}):
            what = f"model.{name} has no effect on a pretrained model"
            yield Fault(f"model.{name}", what, fix="leave it out, or set model.init to scratch")
    has_tokenizer = tokenizer.name_or_path or tokenizer.train
    if is_from_scratch and model.name_or_path and "model_type" in model.config and has_tokenizer:
        what = "model.name_or_path has no effect: model.config and tokenizer say what is built"
        fix = "set model.init to pretrained and tokenizer.train to null to train that model, or leave it out"
        yield Fault("model.name_or_path", what, got=repr(model.name_or_path), fix=fix)
    if is_from_scratch and model.allow_bin:
        what = "model.allow_bin has no effect on a model from scratch, which loads no weights"
        yield Fault("model.allow_bin", what, fix="leave it out")
    if model.revision and (model.name_or_path is None or _is_folder(model.name_or_path)):
        what = "model.revision has no effect without a model on the Hub"
        yield Fault("model.revision", what, got=model.revision, fix="leave it out")


def _is_folder(path: str | None) -> bool:
    return os.path.isdir(os.path.expanduser(path or ""))  # unlike pathlib's, it takes a name of any length


def data_faults(recipe: Any) -> Iterator[Fault]:
    """What is wrong between the data, the stage and the Trainer's fields of a ``config.Recipe``."""
    data = recipe.data
    yield from source_faults(recipe)
    yield from evaluation_faults(recipe)
    yield from mixing_faults(data)
    yield from streaming_faults(recipe)
    yield from _window_faults(recipe)
    yield from _row_faults(recipe)
    yield from _only_for_sft(recipe)
    if data.eval and data.eval_fraction:
        yield Fault("data.eval_fraction", "data.eval and data.eval_fraction exclude each other")
    if recipe.stage == "sft" and data.packing == "stream":
        what = "data.packing: stream cuts rows, so a target would lose its prompt"
        yield Fault("data.packing", what, fix="best_fit or none for stage sft")
    if data.overflow and recipe.resolved_packing == "stream":
        what = "data.overflow has no effect where a stream cuts documents at the end of a row"
        yield Fault("data.overflow", what, fix="leave it out, or set data.packing to none or best_fit")
    if data.shuffle_buffer != type(data).model_fields["shuffle_buffer"].default and not data.streaming:
        what = "data.shuffle_buffer has no effect without data.streaming: all rows are shuffled"
        yield Fault("data.shuffle_buffer", what, fix="leave it out")


def _row_faults(recipe: Any) -> Iterator[Fault]:
    """Fields of ``train`` that do not go together with how rows are laid out."""
    is_packed, train = recipe.resolved_packing != "none", recipe.train
    if train.get("use_liger_kernel"):
        what = "train.use_liger_kernel gives no logits, of which the token accuracy is counted"
        yield Fault("train.use_liger_kernel", what, fix="leave it out")
    if train.get("neftune_noise_alpha") and (is_packed or recipe.model.attention == "packed"):
        what = "train.neftune_noise_alpha is scaled by the length of a row, and packed rows hold many texts"
        fix = "set data.packing to none and model.attention to sdpa, or leave it out"
        yield Fault("train.neftune_noise_alpha", what, fix=fix)
    if train.get("train_sampling_strategy") == "group_by_length" and is_packed:
        what = "train.train_sampling_strategy: group_by_length has no effect on packed rows: all are as long"
        yield Fault("train.train_sampling_strategy", what, fix="leave it out, or set data.packing to none")


def _window_faults(recipe: Any) -> Iterator[Fault]:
    data, window = recipe.data, recipe.data.window
    if window is None:
        return
    if recipe.stage == "sft":
        yield Fault("data.window", "data.window is for stage pretrain: it would cut targets")
    if recipe.resolved_packing != "none":
        yield Fault("data.window", "data.window needs data.packing: none", got=recipe.resolved_packing)
    if not window.step <= window.size <= data.max_length:
        what = "data.window: expected step <= size <= data.max_length"
        yield Fault("data.window", what, got=f"{window.step}, {window.size}, {data.max_length}")


def _only_for_sft(recipe: Any) -> Iterator[Fault]:
    if recipe.stage == "sft":
        return
    if recipe.data.train_on not in ("all_turns", "everything"):
        yield Fault("data.train_on", "data.train_on is for stage sft: pretraining learns everything")
    if recipe.data.render == "chat":
        yield Fault("data.render", "data.render: chat is for stage sft: pretraining reads plain text")


def evaluation_faults(recipe: Any) -> Iterator[Fault]:
    """What is wrong with the evaluation sets of a ``config.Recipe``, and with the answers to them."""
    yield from _set_faults(recipe.data)
    yield from _answer_faults(recipe)


def _set_faults(data: Any) -> Iterator[Fault]:
    for number, source in enumerate(data.train):
        if source.set is not None:
            what = "set has no effect on a source of data.train: it names an evaluation set"
            yield Fault(f"data.train.{number}.set", what, fix="leave it out")
    names = [source.set for source in data.eval]
    if None in names and set(names) != {None}:
        what = "some sources of data.eval are of a named set, and others are not"
        yield Fault("data.eval", what, fix="{name: path, other: path}")
    if "train" in names:
        what = "an evaluation set has the name of what data.eval_train_rows measures"
        yield Fault("data.eval", what, got="train", fix="another name")


def _answer_faults(recipe: Any) -> Iterator[Fault]:
    data, section = recipe.data, recipe.evaluation
    default = type(section)()
    changed = [key for key in type(section).model_fields if getattr(section, key) != getattr(default, key)]
    if not section.generate:
        for key in changed:
            what = f"evaluation.{key} has no effect without evaluation.generate"
            yield Fault(f"evaluation.{key}", what, fix="say how many examples are answered")
    elif not data.eval and not data.eval_fraction:
        what = "evaluation.generate answers examples of evaluation sets, and there is none"
        yield Fault("evaluation.generate", what, fix="give data.eval or data.eval_fraction")
    elif recipe.stage == "pretrain":
        what = "evaluation.generate answers prompts, and pretraining has none"
        yield Fault("evaluation.generate", what, fix="leave it out")
    for number, name in enumerate(section.metrics):
        if ":" not in name and name not in ANSWER_METRICS:
            what = f"evaluation.metrics: expected {', '.join(ANSWER_METRICS)} or module:function"
            near = did_you_mean(name, ANSWER_METRICS)
            yield Fault(f"evaluation.metrics.{number}", what, got=f"{name!r}{near}")
    if section.every > 1 and answer_metrics(recipe, chosen_only=True):
        what = "evaluation.every leaves out evaluations, and train.metric_for_best_model needs all of them"
        yield Fault("evaluation.every", what, got=str(section.every), fix="1")


def answer_metrics(recipe: Any, *, chosen_only: bool = False) -> list[str]:
    """The metrics of answers as the evaluations of a ``config.Recipe`` log them: ``eval_news_chrf``, ...

    A function may return several numbers by name. Their names are not known before it runs, except for the
    one that the recipe chooses as ``metric_for_best_model``.

    Args:
        chosen_only: the one that is chosen, if one is.
    """
    section = recipe.evaluation
    if not section.generate:
        return []
    chosen = recipe.train.get("metric_for_best_model") or ""
    chosen = chosen if chosen.startswith("eval_") else f"eval_{chosen}"
    found = []
    for prefix in recipe.data.eval_sets or ["eval"]:
        for name in section.metrics:
            key = f"{prefix}_{name.rpartition(':')[2]}"
            found += [chosen] if ":" in name and chosen.startswith(f"{key}_") else [key]
    return [name for name in found if name == chosen or not chosen_only]


def source_faults(recipe: Any) -> Iterator[Fault]:
    """What is wrong between the keys of a source of a ``config.Recipe``."""
    for name in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, name)):
            key = f"data.{name}.{number}"
            if source.template and (source.format or source.fields):
                other = "format" if source.format else "fields"
                what = f"a template names the columns itself: {other} has no effect beside it"
                yield Fault(f"{key}.{other}", what, fix="leave it out")
            yield from _unused_source_keys(source, key)
            if source.overflow and recipe.resolved_packing == "stream":
                what = "overflow has no effect where a stream cuts documents at the end of a row"
                yield Fault(f"{key}.overflow", what, fix="leave it out, or packing: none or best_fit")


def _unused_source_keys(source: Any, key: str) -> Iterator[Fault]:
    """What only a dataset on the Hub, or a folder, has, beside the path of a ``config.Source``."""
    is_file = os.path.isfile(os.path.expanduser(source.path))
    for name in ("name", "revision"):
        if getattr(source, name) is not None and (is_file or _is_folder(source.path)):
            yield Fault(
                f"{key}.{name}", f"{name} has no effect: it is of a dataset on the Hub", fix="leave it out"
            )
    if source.split != "train" and is_file:
        yield Fault(
            f"{key}.split", "split has no effect on a single file", got=source.split, fix="leave it out"
        )


def mixing_faults(data: Any) -> Iterator[Fault]:
    """What is wrong between ``mixing`` and the weights and epochs of the sources of a ``config.Data``."""
    for key in ("weight", "epochs"):
        for number, source in enumerate(data.eval):
            if getattr(source, key) is not None:
                what = f"{key} has no effect on a source of data.eval, which is evaluated completely"
                yield Fault(f"data.eval.{number}.{key}", what, fix="leave it out")
    weighted = [number for number, source in enumerate(data.train) if source.weight is not None]
    repeated = [number for number, source in enumerate(data.train) if source.epochs is not None]
    if weighted and repeated:
        what = "weight and epochs are two ways to say how much of a source is read"
        yield Fault(f"data.train.{repeated[0]}.epochs", what, fix="give all sources weights, or none")
    elif weighted and len(data.train) == 1:
        what = "weight has no effect with a single source"
        yield Fault("data.train.0.weight", what, fix="leave it out, or say epochs")
    elif 0 < len(weighted) < len(data.train):
        missing = next(number for number in range(len(data.train)) if number not in weighted)
        what = f"data.train.{missing} has no weight, and data.train.{weighted[0]} has one"
        yield Fault(f"data.train.{missing}", what, got=data.train[missing].path, fix="give each source one")
    if data.mixing:
        yield from _unused_mixing(data.mixing, has_weights=bool(weighted), has_epochs=bool(repeated))


def streaming_faults(recipe: Any) -> Iterator[Fault]:
    """What needs all of the data, or their length, beside ``data.streaming`` of a ``config.Recipe``."""
    data, train = recipe.data, recipe.train
    if not data.streaming:
        return
    if train.get("max_steps", -1) <= 0:
        what = "data.streaming needs train.max_steps: the length of a stream is not known"
        yield Fault("train.max_steps", what, got=str(train.get("max_steps", -1)))
    if data.eval_fraction:
        what = "data.eval_fraction needs the whole dataset, which streaming never loads"
        yield Fault("data.eval_fraction", what, fix="name data.eval")
    if data.duplicates == "drop":
        what = "data.duplicates: drop needs the whole dataset, which streaming never loads"
        yield Fault("data.duplicates", what, fix="keep")
    if recipe.tokenizer.train:
        what = "tokenizer.train needs the whole dataset, which streaming never loads"
        yield Fault("tokenizer.train", what, fix="train one on a part first: hf-clm train-tokenizer")
    yield from _streamed_source_faults(data)
    for key, (is_fine, why) in FIELDS_OF_STREAMS.items():
        if key in train and not is_fine(train[key]):
            yield Fault(f"train.{key}", f"train.{key} and data.streaming exclude each other: {why}")


def _streamed_source_faults(data: Any) -> Iterator[Fault]:
    """What a source of a stream cannot have, of a ``config.Data``."""
    for number, source in enumerate(data.train):
        key = f"data.train.{number}"
        if source.limit:
            what = "a shard of a stream does not know how many were read"
            yield Fault(f"{key}.limit", what, fix="leave limit out")
        if source.epochs is not None:
            what = "the length of a stream is not known, and so not what an epoch of it holds"
            yield Fault(f"{key}.epochs", what, fix="give each source a weight")
    if data.mixing and all(source.weight is None for source in data.train):
        what = "without weights the sources of a stream are read one after another"
        yield Fault("data.mixing", what, fix="give each source a weight, or leave data.mixing out")
    for key, why in MIXING_OF_WHOLE_SETS.items():
        if data.mixing and getattr(data.mixing, key) != type(data.mixing).model_fields[key].default:
            what = f"data.mixing.{key} and data.streaming exclude each other: {why}"
            yield Fault(f"data.mixing.{key}", what, fix="leave it out")


MIXING_OF_WHOLE_SETS = {
    "temperature": "the sizes of the sources are not known",
    "size": "a stream has no epochs; train.max_steps ends the run",
    "stopping_strategy": "a stream has no epochs; train.max_steps ends the run",
    "replacement": "a stream is read in its order",
}
FIELDS_OF_STREAMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train_sampling_strategy": (lambda x: x in ("random", "sequential"), "no other order is known"),
    "dataloader_in_order": (lambda x: x, "each worker has its turn"),
    "auto_find_batch_size": (lambda x: not x, "a batch is of one shard"),
    "torch_compile": (lambda x: not x, "the longest batch is not known"),
    "eval_strategy": (lambda x: x != "epoch", "no end of an epoch is known; use steps"),
    "save_strategy": (lambda x: x != "epoch", "no end of an epoch is known; use steps"),
    "logging_strategy": (lambda x: x != "epoch", "no end of an epoch is known; use steps"),
}


def token_budget_faults(recipe: Any) -> Iterator[Fault]:
    """What does not go together with ``data.tokens_per_batch`` of a ``config.Recipe``."""
    key, data = "data.tokens_per_batch", recipe.data
    if data.tokens_per_batch is None:
        return
    if recipe.resolved_packing != "none":
        yield Fault(key, f"{key} needs data.packing: none", got=recipe.resolved_packing)
    if recipe.model.attention != "packed":
        yield Fault(key, f"{key} needs model.attention: packed", got=recipe.model.attention)
    if data.tokens_per_batch < data.max_length:
        got = f"{data.tokens_per_batch}, {data.max_length}"
        yield Fault(key, f"{key} is below data.max_length, so an example may not fit", got=got)
    size = recipe.train.get("per_device_train_batch_size", 1)
    if size != 1:
        what = f"train.per_device_train_batch_size must be 1 beside {key}, which is the size of a micro-batch"
        yield Fault("train.per_device_train_batch_size", what, got=str(size), fix="leave it out")


def _unused_mixing(mixing: Any, *, has_weights: bool, has_epochs: bool) -> Iterator[Fault]:
    """Keys of a ``config.Mixing`` that have no effect beside other keys."""
    said = "weights" if has_weights else "epochs"
    if mixing.temperature != 1 and (has_weights or has_epochs):
        what = f"data.mixing.temperature makes shares of sizes, and the sources have {said}"
        yield Fault("data.mixing.temperature", what, fix=f"leave it out, or the {said}")
    for key in ("size", "stopping_strategy"):
        if has_epochs and getattr(mixing, key) is not None:
            what = f"data.mixing.{key} has no effect where the sources have epochs, which decide the size"
            yield Fault(f"data.mixing.{key}", what, fix="leave it out, or give weights")
    if mixing.size is not None and mixing.stopping_strategy:
        what = "data.mixing.size and data.mixing.stopping_strategy exclude each other"
        yield Fault("data.mixing.stopping_strategy", what)


def _unused_sizes(section: Any) -> Iterator[Fault]:
    """Sizes that the kind of a ``config.TokenizerTraining`` does not have."""
    unused = {"characters": ("vocab_size", "min_frequency"), "unigram": ("min_frequency",)}
    for name in unused.get(section.kind, ()) if section else ():
        if getattr(section, name) != type(section).model_fields[name].default:
            key = f"tokenizer.train.{name}"
            yield Fault(key, f"{key} has no effect with kind: {section.kind}", fix="leave it out")


def override_faults(names: Sequence[str], *, sections: Iterable[str]) -> Iterator[Fault]:
    """What in ``resume_override`` is neither a key nor a fact that could differ."""
    fields = load_trainer_fields()
    known = {*sections, *FACTS, *fields}
    for name in names:
        if name.removeprefix("train.").partition(".")[0] not in known:
            near = did_you_mean(name, known)
            yield Fault("resume_override", f"resume_override: no such key: {name!r}{near}")
