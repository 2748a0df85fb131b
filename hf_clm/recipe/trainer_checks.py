"""What no single field of ``train`` shows: fields that contradict each other, and those without an effect."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.machine import spreads_with
from hf_clm.recipe.trainer_fields import TRAIN_DEFAULTS, Fault, load_trainer_fields, shorten

FIGURES = ("loss", "token_accuracy", "target_tokens")  # what an evaluation measures on each set


def metric_names(sets: Sequence[str] = (), others: Sequence[str] = ()) -> list[str]:
    """The metrics that an evaluation logs: ``eval_loss``, ..., for each further set ``eval_train_loss``, ...

    ``sets``: what is evaluated beside the evaluation set. ``others``: full names of further metrics.
    """
    prefixes = ["eval", *(f"eval_{name}" for name in sets)]
    return [f"{prefix}_{figure}" for prefix in prefixes for figure in FIGURES] + list(others)


def check_train_combination(
    train: Mapping[str, Any],
    *,
    has_eval: bool,
    defaults: Mapping[str, Any],
    metrics: Collection[str] = tuple(metric_names()),
) -> list[Fault]:
    """What is wrong between the keys; ``defaults`` go before those of TrainingArguments.

    ``metrics``: the names that ``metric_for_best_model`` may have.
    """
    values = {key: field.default for key, field in load_trainer_fields().items()} | {**defaults, **train}
    return [
        *_run_faults(values),
        *_checkpointing_faults(values),
        *_worker_faults(values),
        *_accelerator_faults(values["accelerator_config"]),
        *_evaluation_faults(values, has_eval),
        *_metric_faults(values, metrics),
        *_unused_faults(train),
    ]


def _run_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    if not values["output_dir"]:
        yield Fault("train.output_dir", "train.output_dir is missing", fix="--output_dir runs/NAME")
    if values["num_train_epochs"] <= 0 and values["max_steps"] <= 0:
        what = "train.num_train_epochs: expected a number above 0 where max_steps is not given"
        yield Fault("train.num_train_epochs", what, got=str(values["num_train_epochs"]))
    if values["bf16"] and values["fp16"]:
        yield Fault("train.fp16", "train.fp16 and train.bf16 are both true", fix="keep bf16")
    if values["bf16_full_eval"] and values["fp16_full_eval"]:
        what = "train.fp16_full_eval and train.bf16_full_eval are both true"
        yield Fault("train.fp16_full_eval", what, fix="keep bf16_full_eval")
    if values["report_to"] is None:
        yield Fault("train.report_to", "train.report_to: expected a tracker, none or all", got="null")
    if isinstance(values["fsdp"], str) and values["fsdp"]:
        fix = "fsdp: true, with fsdp_config: {version: 2}"
        yield Fault("train.fsdp", "train.fsdp: text is the spelling of transformers 4", fix=fix)
    if values["fsdp_config"] and spreads_with(values) != "FSDP":
        what = "train.fsdp_config has no effect without train.fsdp"
        yield Fault("train.fsdp_config", what, got=shorten(values["fsdp_config"]), fix="set fsdp: true")
    if not values["optim_target_modules"] and str(values["optim"]).startswith(("galore", "apollo")):
        what = f"train.optim_target_modules is missing: {values['optim']} needs it"
        yield Fault("train.optim_target_modules", what, fix="all-linear, or the names of layers")
    if values["optim_target_modules"] and not str(values["optim"]).startswith(("galore", "apollo")):
        what = "train.optim_target_modules has no effect: only galore and apollo optimizers take it"
        yield Fault("train.optim_target_modules", what, fix=OUT)


def _checkpointing_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Options of activation checkpointing that is off, and those that neither the Trainer nor torch has."""
    key, options = "train.activation_checkpointing_kwargs", values.get("activation_checkpointing_kwargs")
    if options and not values.get("activation_checkpointing"):
        yield Fault(key, f"{key} has no effect without train.activation_checkpointing", fix="set that too")
    for name in options if isinstance(options, dict) else ():
        if name not in CHECKPOINTING:
            yield Fault(key, f"{key} has no option {name!r}{did_you_mean(str(name), CHECKPOINTING)}")


def _worker_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Fields of the workers of a data loader that has none."""
    if values["dataloader_num_workers"]:
        return
    for name, neutral in OF_WORKERS.items():
        if values[name] not in (None, neutral):
            key = f"train.{name}"
            yield Fault(key, f"{key} needs train.dataloader_num_workers of 1 or more")


def _accelerator_faults(config: Any) -> Iterator[Fault]:
    """Keys of ``accelerator_config`` that this package decides itself, and those that accelerate lacks."""
    key = "train.accelerator_config"
    if not isinstance(config, dict):
        if config is not None:
            yield Fault(key, f"{key}: expected a mapping", got=shorten(config))
        return
    for name, value in config.items():
        if name not in (*ACCELERATOR_KEYS, "non_blocking", "gradient_accumulation_kwargs"):
            near = did_you_mean(str(name), [*ACCELERATOR_KEYS, "non_blocking"])
            yield Fault(f"{key}.{name}", f"{key} has no key {name!r}{near}")
        elif name in ACCELERATOR_KEYS and value not in (None, ACCELERATOR_DEFAULTS.get(name)):
            yield Fault(f"{key}.{name}", f"{key}.{name} has no effect: {ACCELERATOR_KEYS[name]}", fix=OUT)
        elif name == "gradient_accumulation_kwargs" and set(value or ()) - {"sync_each_batch"}:
            what = f"{key}.{name} takes sync_each_batch only"
            fix = "set train.gradient_accumulation_steps"
            yield Fault(f"{key}.{name}", what, got=shorten(value), fix=fix)


def _evaluation_faults(values: Mapping[str, Any], has_eval: bool) -> Iterator[Fault]:
    evaluates, saves = values["eval_strategy"], values["save_strategy"]
    if evaluates != "no" and not has_eval:
        what = f"train.eval_strategy is {evaluates}, but there is no eval set"
        yield Fault("train.eval_strategy", what, fix="give data.eval or data.eval_fraction")
    elif values["load_best_model_at_end"]:
        yield from _best_model_faults(values)
    elif saves == "best" and evaluates == "no":
        what = "train.save_strategy: best needs an eval set and eval_strategy steps or epoch"
        yield Fault("train.save_strategy", what, got="eval_strategy 'no'")


def _best_model_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    key, evaluates, saves = "train.load_best_model_at_end", values["eval_strategy"], values["save_strategy"]
    save, every = values["save_steps"], values["eval_steps"] or values["logging_steps"]
    if evaluates == "no":
        what = f"{key} needs an eval set and eval_strategy steps or epoch"
        yield Fault(key, what, got="eval_strategy 'no'")
    elif saves not in (evaluates, "best"):
        what = f"{key} needs the same strategy for save and eval"
        yield Fault(key, what, got=f"save_strategy {saves!r} and eval_strategy {evaluates!r}")
    elif evaluates == saves == "steps":
        is_multiple = (save < 1) == (every < 1) and math.isclose(save / every, round(save / every))
        if not is_multiple:
            what = f"{key} needs save_steps to be a multiple of eval_steps"
            yield Fault(key, what, got=f"save_steps {save} and eval_steps {every}")


def _metric_faults(values: Mapping[str, Any], metrics: Collection[str]) -> Iterator[Fault]:
    """``metric_for_best_model``, which an evaluation has to log under that name."""
    key, name = "train.metric_for_best_model", values["metric_for_best_model"]
    if name is None:
        judged = values["load_best_model_at_end"] or values["lr_scheduler_type"] in JUDGED_SCHEDULES
        if values["save_strategy"] == "best" and values["eval_strategy"] != "no" and not judged:
            yield Fault("train.save_strategy", f"train.save_strategy: best needs {key}", fix="eval_loss")
        if values["greater_is_better"] is not None and not judged:
            what = f"train.greater_is_better has no effect without {key}"
            yield Fault("train.greater_is_better", what, fix=OUT)
    elif name not in metrics and f"eval_{name}" not in metrics:
        what = f"{key}: expected one of {', '.join(metrics)}"
        yield Fault(key, what, got=f"{name!r}{did_you_mean(name, metrics)}")


def _unused_faults(train: Mapping[str, Any]) -> Iterator[Fault]:
    """Fields whose value changes nothing in a run, or breaks what a run promises."""
    fields = load_trainer_fields()
    for name, why in UNUSED.items():
        neutral = TRAIN_DEFAULTS.get(name, fields[name].default if name in fields else None)
        value = train.get(name)
        if value not in (None, neutral, []) and not (value is False and neutral == "no"):
            key = f"train.{name}"
            yield Fault(key, f"{key} {why}", got=shorten(value), fix=OUT)


OUT = "leave it out"
JUDGED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow metric_for_best_model, which is then loss
CHECKPOINTING = (
    "every_n_layers",
    "offload",
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
)
OF_WORKERS = {
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
    "dataloader_in_order": True,
}
ACCELERATOR_DEFAULTS = {
    "split_batches": False,
    "even_batches": True,
    "use_seedable_sampler": True,
    "use_configured_state": False,
}
ACCELERATOR_KEYS = {
    "split_batches": "train.per_device_train_batch_size is the batch of a process",
    "dispatch_batches": "each process reads its own rows",
    "even_batches": "the last rows are filled up, so that every process has as many",
    "use_seedable_sampler": "the order of the rows follows from train.seed and the epoch",
    "use_configured_state": "a run makes its own accelerator",
}
_NO_LOGITS = "has no effect: an evaluation sums losses and hits on the device, and keeps no logits"
_OWN_BATCHES = "has no effect: the collator makes exactly what the model takes"
_OWN_RUN = "has no effect: hf-clm train always trains, and evaluates as train.eval_strategy says"
UNUSED = {
    "prediction_loss_only": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "remove_unused_columns": _OWN_BATCHES,
    "label_names": _OWN_BATCHES,
    "length_column_name": "has no effect: the length of a row is counted",
    "logging_nan_inf_filter": "has no effect: a loss that is not finite ends the run",
    "include_num_input_tokens_seen": "has no effect: tokens_seen and target_tokens_seen are always logged",
    "do_train": _OWN_RUN,
    "do_eval": _OWN_RUN,
    "do_predict": _OWN_RUN,
    "use_cache": "has no effect: training reads each row once, so that there is nothing to keep",
    "enable_jit_checkpoint": "has no effect: SIGTERM always saves a checkpoint",
    "liger_kernel_config": "has no effect: train.use_liger_kernel is not supported",
    "local_rank": "has no effect: the launcher tells each process its rank",
    "ignore_data_skip": "would train rows again after a resume, which is exact",
    "restore_callback_states_from_checkpoint": "would let a stopped run stop again when it is resumed",
}
