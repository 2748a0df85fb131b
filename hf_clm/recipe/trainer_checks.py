"""What no single field of ``train`` shows: fields that contradict each other, and those without an effect."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.machine import spreads_with
from hf_clm.recipe.faults import OUT, Fault, shorten
from hf_clm.recipe.trainer_fields import TRAIN_DEFAULTS, train_fields

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
    fields = train_fields()
    values = {**fields, **defaults, **train}
    return [
        *_run_faults(values),
        *_option_faults(values),
        *_accelerator_faults(values["accelerator_config"]),
        *_evaluation_faults(values, has_eval),
        *_metric_faults(values, metrics),
        *(
            Fault(f"train.{name}", why, OUT, shorten(train[name]))
            for name, why in UNUSED.items()
            if _is_changed(train.get(name), TRAIN_DEFAULTS.get(name, fields.get(name)))
        ),
    ]


def _run_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    if not values["output_dir"]:
        yield Fault("train.output_dir", "is missing", "--output_dir runs/NAME")
    if values["num_train_epochs"] <= 0 and values["max_steps"] <= 0:
        what = ": expected a number above 0 where max_steps is not given"
        yield Fault("train.num_train_epochs", what, got=str(values["num_train_epochs"]))
    for half, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if values[half] and values[other]:
            yield Fault(f"train.{half}", f"and train.{other} are both true", f"keep {other}")
    if isinstance(values["fsdp"], str) and values["fsdp"]:
        what, fix = ": text is the spelling of transformers 4", "fsdp: true, with fsdp_config: {version: 2}"
        yield Fault("train.fsdp", what, fix)
    takes_targets = str(values["optim"]).startswith(("galore", "apollo"))
    if takes_targets and not values["optim_target_modules"]:
        what = f"is missing: {values['optim']} needs it"
        yield Fault("train.optim_target_modules", what, "all-linear, or the names of layers")
    if values["optim_target_modules"] and not takes_targets:
        what = "has no effect: only galore and apollo optimizers take it"
        yield Fault("train.optim_target_modules", what, OUT)


def _option_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Options of what is off, and those that neither the Trainer nor torch has."""
    if values["fsdp_config"] and spreads_with(values) != "FSDP":
        got = shorten(values["fsdp_config"])
        yield Fault("train.fsdp_config", "has no effect without train.fsdp", "set fsdp: true", got)
    key, options = "train.activation_checkpointing_kwargs", values.get("activation_checkpointing_kwargs")
    if options and not values.get("activation_checkpointing"):
        yield Fault(key, "has no effect without train.activation_checkpointing", "set that too")
    for name in options if isinstance(options, dict) else ():
        if name not in CHECKPOINTING:
            yield Fault(key, f"has no option {name!r}{did_you_mean(str(name), CHECKPOINTING)}")
    for name, neutral in OF_WORKERS.items():
        if not values["dataloader_num_workers"] and values[name] not in (None, neutral):
            yield Fault(f"train.{name}", "needs train.dataloader_num_workers of 1 or more")


def _accelerator_faults(config: Any) -> Iterator[Fault]:
    """Keys of ``accelerator_config`` that a run decides itself, and those that accelerate does not have."""
    key = "train.accelerator_config"
    if config is not None and not isinstance(config, dict):
        yield Fault(key, ": expected a mapping", got=shorten(config))
        return
    for name, value in (config or {}).items():
        if name == "gradient_accumulation_kwargs":
            if set(value or ()) - {"sync_each_batch"}:
                fix = "set train.gradient_accumulation_steps"
                yield Fault(f"{key}.{name}", "takes sync_each_batch only", fix, shorten(value))
        elif name not in ACCELERATOR_KEYS:
            yield Fault(key, f"has no key {name!r}{did_you_mean(str(name), ACCELERATOR_KEYS)}")
        elif ACCELERATOR_KEYS[name][1] and value not in (None, ACCELERATOR_KEYS[name][0]):
            yield Fault(f"{key}.{name}", f"has no effect: {ACCELERATOR_KEYS[name][1]}", OUT)


def _evaluation_faults(values: Mapping[str, Any], has_eval: bool) -> Iterator[Fault]:
    evaluates, saves, best = values["eval_strategy"], values["save_strategy"], "train.load_best_model_at_end"
    needs = "needs an eval set and eval_strategy steps or epoch"
    save, every = values["save_steps"], values["eval_steps"] or values["logging_steps"]
    is_multiple = (save < 1) == (every < 1) and math.isclose(save / every, round(save / every))
    if evaluates != "no" and not has_eval:
        what = f"is {evaluates}, but there is no eval set"
        yield Fault("train.eval_strategy", what, "give data.eval or data.eval_fraction")
    elif evaluates == "no" and values["load_best_model_at_end"]:
        yield Fault(best, needs, got="eval_strategy 'no'")
    elif evaluates == "no" and saves == "best":
        yield Fault("train.save_strategy", f": best {needs}", got="eval_strategy 'no'")
    elif values["load_best_model_at_end"] and saves not in (evaluates, "best"):
        got = f"save_strategy {saves!r} and eval_strategy {evaluates!r}"
        yield Fault(best, "needs the same strategy for save and eval", got=got)
    elif values["load_best_model_at_end"] and evaluates == saves == "steps" and not is_multiple:
        got = f"save_steps {save} and eval_steps {every}"
        yield Fault(best, "needs save_steps to be a multiple of eval_steps", got=got)


def _metric_faults(values: Mapping[str, Any], metrics: Collection[str]) -> Iterator[Fault]:
    """``metric_for_best_model``, which an evaluation has to log under that name."""
    key, name = "train.metric_for_best_model", values["metric_for_best_model"]
    is_chosen = values["load_best_model_at_end"] or values["lr_scheduler_type"] in JUDGED_SCHEDULES
    if name is not None and name not in metrics and f"eval_{name}" not in metrics:
        what = f": expected one of {', '.join(metrics)}"
        yield Fault(key, what, got=f"{name!r}{did_you_mean(name, metrics)}")
    elif name is None and not is_chosen:
        if values["save_strategy"] == "best" and values["eval_strategy"] != "no":
            yield Fault("train.save_strategy", f": best needs {key}", "eval_loss")
        if values["greater_is_better"] is not None:
            yield Fault("train.greater_is_better", f"has no effect without {key}", OUT)


def _is_changed(value: Any, neutral: Any) -> bool:
    return value not in (None, neutral, []) and not (value is False and neutral == "no")


JUDGED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow metric_for_best_model, which is then loss
CHECKPOINTING = (
    *("every_n_layers", "offload", "use_reentrant"),
    *("preserve_rng_state", "determinism_check", "debug"),
)
OF_WORKERS = {
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
    "dataloader_in_order": True,
}
# The default of a key of accelerator_config, and why another value has no effect; empty: it has one.
ACCELERATOR_KEYS = {
    "split_batches": (False, "train.per_device_train_batch_size is the batch of a process"),
    "dispatch_batches": (None, "each process reads its own rows"),
    "even_batches": (True, "the last rows are filled up, so that every process has as many"),
    "use_seedable_sampler": (True, "the order of the rows follows from train.seed and the epoch"),
    "use_configured_state": (False, "a run makes its own accelerator"),
    "non_blocking": (False, ""),
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
    "parallelism_config": "is not supported: the launcher and train.fsdp say how processes work together",
}
