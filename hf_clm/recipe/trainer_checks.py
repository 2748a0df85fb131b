"""What no single field of ``train`` shows: fields that contradict each other, and those without an effect."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.machine import spreads_with
from hf_clm.recipe.faults import OUT, Fault, shorten
from hf_clm.recipe.trainer_fields import train_values

FIGURES = ("loss", "token_accuracy", "target_tokens")  # what an evaluation measures on each set


def metric_names(sets: Sequence[str] = (), others: Sequence[str] = ()) -> list[str]:
    """The metrics that an evaluation logs: ``eval_loss``, ..., for each further set ``eval_train_loss``, ...

    ``sets``: what is evaluated beside the evaluation set. ``others``: full names of further metrics.
    """
    prefixes = ["eval", *(f"eval_{name}" for name in sets)]
    return [f"{prefix}_{figure}" for prefix in prefixes for figure in FIGURES] + list(others)


def train_faults(train: Mapping[str, Any], *, has_eval: bool, metrics: Collection[str]) -> list[Fault]:
    """What is wrong between the keys, beside their rules.

    ``metrics``: the names that ``metric_for_best_model`` may have.
    """
    values = train_values(train)
    found = (_run_faults(values), _option_faults(values), _accelerator_faults(values["accelerator_config"]))
    return [fault for faults in (*found, _evaluation_faults(values, has_eval, metrics)) for fault in faults]


def _run_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    if not values["output_dir"]:
        yield Fault("train.output_dir", "is missing", "--output_dir runs/NAME")
    if values["num_train_epochs"] <= 0 and values["max_steps"] <= 0:
        what = ": expected a number above 0 where max_steps is not given"
        yield Fault("train.num_train_epochs", what, got=str(values["num_train_epochs"]))
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
    for name in options if isinstance(options, dict) else ():
        if name not in CHECKPOINTING:
            yield Fault(key, f"has no option {name!r}{did_you_mean(str(name), CHECKPOINTING)}")


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


def _evaluation_faults(
    values: Mapping[str, Any], has_eval: bool, metrics: Collection[str]
) -> Iterator[Fault]:
    evaluates, is_saved_by_best = values["eval_strategy"] != "no", values["save_strategy"] == "best"
    if evaluates and not has_eval:
        what = f"is {values['eval_strategy']}, but there is no eval set"
        yield Fault(
            "train.eval_strategy",
            what,
            "give data.eval or data.eval_fraction, or data.eval_train_rows to evaluate on training rows",
        )
    if is_saved_by_best and not evaluates:
        yield Fault("train.save_strategy", ": best needs train.eval_strategy: steps or epoch", got="no")
    key, name = "train.metric_for_best_model", values["metric_for_best_model"]
    is_judged = values["load_best_model_at_end"] or values["lr_scheduler_type"] in JUDGED_SCHEDULES
    if name is not None and name not in metrics and f"eval_{name}" not in metrics:
        what = f": expected one of {', '.join(metrics)}"
        yield Fault(key, what, got=f"{name!r}{did_you_mean(name, metrics)}")
    if name is None and not is_judged and is_saved_by_best and evaluates:
        yield Fault("train.save_strategy", f": best needs {key}", "eval_loss")
    if name is None and not is_judged and values["greater_is_better"] is not None:
        yield Fault("train.greater_is_better", f"has no effect without {key}", OUT)


JUDGED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow metric_for_best_model, which is then loss
CHECKPOINTING = {
    "every_n_layers",
    "offload",
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
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
