"""Checks fields of ``train`` together: those that contradict each other, or have no effect."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.machine import spreads_with
from hf_clm.recipe.faults import OUT, Fault, shorten
from hf_clm.recipe.trainer_fields import train_values

FIGURES = ("loss", "token_accuracy", "target_tokens")  # logged for each evaluation set


def metric_names(sets: Sequence[str] = (), others: Sequence[str] = ()) -> list[str]:
    """Returns the metrics that an evaluation logs: ``eval_loss``, and ``eval_train_loss`` for other sets.

    ``sets``: additional sets that are evaluated. ``others``: full names of further metrics.
    """
    prefixes = ["eval", *(f"eval_{name}" for name in sets)]
    return [f"{prefix}_{figure}" for prefix in prefixes for figure in FIGURES] + list(others)


def train_faults(train: Mapping[str, Any], *, has_eval: bool, metrics: Collection[str]) -> list[Fault]:
    """Returns the faults of combinations of fields that their rules do not cover.

    ``metrics``: valid names for ``metric_for_best_model``.
    """
    values = train_values(train)
    return [
        *_run_faults(values),
        *_option_faults(values),
        *_accelerator_faults(values["accelerator_config"]),
        *_evaluation_faults(values, has_eval, metrics),
    ]


def _run_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    if not values["output_dir"]:
        yield Fault("train.output_dir", "is missing", "--output_dir runs/NAME")
    if values["num_train_epochs"] <= 0 and values["max_steps"] <= 0:
        what = ": expected a number above 0 if max_steps is not set"
        yield Fault("train.num_train_epochs", what, got=str(values["num_train_epochs"]))
    if isinstance(values["fsdp"], str) and values["fsdp"]:
        what, fix = ": text is the format of transformers 4", "set fsdp: true and fsdp_config: {version: 2}"
        yield Fault("train.fsdp", what, fix)
    takes_targets = str(values["optim"]).startswith(("galore", "apollo"))
    if takes_targets and not values["optim_target_modules"]:
        what = f"is missing: {values['optim']} needs it"
        yield Fault("train.optim_target_modules", what, "set it to all-linear, or to names of layers")
    if values["optim_target_modules"] and not takes_targets:
        what = "has no effect: only galore and apollo optimizers use it"
        yield Fault("train.optim_target_modules", what, OUT)


def _option_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Yields faults for options of disabled features, and unknown options."""
    if values["fsdp_config"] and spreads_with(values) != "FSDP":
        got = shorten(values["fsdp_config"])
        yield Fault("train.fsdp_config", "has no effect without train.fsdp", "set fsdp: true", got)
    key, options = "train.activation_checkpointing_kwargs", values.get("activation_checkpointing_kwargs")
    for name in options if isinstance(options, dict) else ():
        if name not in CHECKPOINTING:
            yield Fault(key, f"has no option {name!r}{did_you_mean(str(name), CHECKPOINTING)}")


def _accelerator_faults(config: Any) -> Iterator[Fault]:
    """Yields faults for unknown keys of ``accelerator_config``, and those that have no effect."""
    key = "train.accelerator_config"
    if config is not None and not isinstance(config, dict):
        yield Fault(key, ": expected a mapping", got=shorten(config))
        return
    for name, value in (config or {}).items():
        if name == "gradient_accumulation_kwargs":
            if set(value or ()) - {"sync_each_batch"}:
                fix = "set train.gradient_accumulation_steps"
                yield Fault(f"{key}.{name}", "accepts only sync_each_batch", fix, shorten(value))
        elif name not in ACCELERATOR_KEYS:
            yield Fault(key, f"has no key {name!r}{did_you_mean(str(name), ACCELERATOR_KEYS)}")
        elif ACCELERATOR_KEYS[name][1] and value not in (None, ACCELERATOR_KEYS[name][0]):
            yield Fault(f"{key}.{name}", f"has no effect: {ACCELERATOR_KEYS[name][1]}", OUT)


def _evaluation_faults(
    values: Mapping[str, Any], has_eval: bool, metrics: Collection[str]
) -> Iterator[Fault]:
    evaluates, is_saved_by_best = values["eval_strategy"] != "no", values["save_strategy"] == "best"
    if evaluates and not has_eval:
        what = f"is {values['eval_strategy']}, but there is no eval set"
        fix = "set data.eval or data.eval_fraction, or data.eval_train_rows to evaluate on training rows"
        yield Fault("train.eval_strategy", what, fix)
    if is_saved_by_best and not evaluates:
        yield Fault("train.save_strategy", ": best needs train.eval_strategy: steps or epoch", got="no")
    key, name = "train.metric_for_best_model", values["metric_for_best_model"]
    has_default = values["load_best_model_at_end"] or values["lr_scheduler_type"] in METRIC_SCHEDULES
    if name is not None and name not in metrics and f"eval_{name}" not in metrics:
        what = f": expected one of {', '.join(metrics)}"
        yield Fault(key, what, got=f"{name!r}{did_you_mean(name, metrics)}")
    if name is None and not has_default and is_saved_by_best and evaluates:
        yield Fault("train.save_strategy", f": best needs {key}", "set it to eval_loss")
    if name is None and not has_default and values["greater_is_better"] is not None:
        yield Fault("train.greater_is_better", f"has no effect without {key}", OUT)


METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # depend on metric_for_best_model, by default loss
CHECKPOINTING = {
    "every_n_layers",
    "offload",
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
}
# The default of each key of accelerator_config, and why other values have no effect, or empty.
ACCELERATOR_KEYS = {
    "split_batches": (False, "train.per_device_train_batch_size is the batch size of each process"),
    "dispatch_batches": (None, "each process reads its rows itself"),
    "even_batches": (True, "the last batches are always filled up"),
    "use_seedable_sampler": (True, "train.seed and the epoch determine the order of the rows"),
    "use_configured_state": (False, "a run creates its accelerator"),
    "non_blocking": (False, ""),
}
