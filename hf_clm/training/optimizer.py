"""Builds the optimizer and the schedule of a run for one dummy weight, before any data is read.

This finds options that the libraries reject in their constructors, or silently ignore. Optimizers that need
the model itself (GaLore, APOLLO, LOMO) are not checked.
"""

import inspect
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_clm.errors import RecipeError, did_you_mean
from hf_clm.recipe.trainer_fields import TRAIN_DEFAULTS, train_fields

NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")
BUILD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ZeroDivisionError)
SET_BY_TRAINER = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
SAMPLED_STEPS = 10_000  # evenly spaced over a longer run


def check_optimization(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raises RecipeError for an optimizer or a schedule that cannot be built, or ignores a given field.

    ``given``: the fields that the recipe sets.
    """
    if not _optim(arguments).startswith(NEED_THE_MODEL):
        _check_optimizer(arguments, given)
    _check_schedule_arguments(arguments)
    _build_schedule(arguments, steps=max(arguments.max_steps, 100))
    takes_warmup = "num_warmup_steps" in inspect.signature(_schedule_function(arguments)).parameters
    if not takes_warmup and given.get("warmup_steps") not in (None, 0, TRAIN_DEFAULTS["warmup_steps"]):
        fix = "remove it, or set lr_scheduler_type to constant_with_warmup"
        what = f"has no effect with lr_scheduler_type {_kind(arguments)}"
        raise RecipeError(what, where="train.warmup_steps", got=str(given["warmup_steps"]), fix=fix)


def zero_rate_warning(arguments: TrainingArguments, steps: int) -> str:
    """Returns a warning if the learning rate is 0 in most of the steps, or an empty string."""
    sampled = range(0, steps, max(1, steps // SAMPLED_STEPS))
    schedule = _build_schedule(arguments, steps=steps)
    if not sampled or not isinstance(schedule, LambdaLR):  # other schedules depend on evaluations
        return ""
    idle = sum(schedule.lr_lambdas[0](step) == 0 for step in sampled)
    if 2 * idle <= len(sampled):
        return ""
    share = f"{idle} of {steps}" if len(sampled) == steps else f"{idle / len(sampled):.0%} of the"
    return (
        f"train.learning_rate is 0 in {share} steps, which train nothing;"
        f" fix: train longer, or change warmup_steps ({arguments.warmup_steps:g}) or lr_scheduler_type"
    )


def _check_optimizer(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    built = _optimizer(arguments)
    defaults = train_fields()
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        is_set = name in given and given[name] != defaults[name]
        if is_set and _optimizer(_changed(arguments, name, given[name] / 2)) == built:
            what = f"has no effect with optim {_optim(arguments)}"
            raise RecipeError(what, where=f"train.{name}", got=str(given[name]), fix="remove it")
    for pair in (arguments.optim_args or "").split(",") if arguments.optim_args else ():
        name = pair.partition("=")[0].strip()
        if not _reads(arguments, name):
            what = f"{_optim(arguments)} ignores {name!r}"
            got = repr(arguments.optim_args)
            raise RecipeError(what, where="train.optim_args", got=got, fix="remove it")


def _optimizer(arguments: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Returns the optimizer's class and options. Raises RecipeError if they do not build one."""
    text = arguments.optim_args or ""
    if text and any(len(pair.split("=")) != 2 for pair in text.split(",")):
        what = "expected name=value, name=value"
        raise RecipeError(what, where="train.optim_args", got=repr(text))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except BUILD_ERRORS as error:
        what = f"{_optim(arguments)} cannot be built: {_first_line(error)}"
        where = "train.optim_args" if text else "train.optim"
        raise RecipeError(what, where=where, got=repr(text) if text else "") from error
    return kind, options


def _reads(arguments: TrainingArguments, name: str) -> bool:
    """Returns whether some value of this name in ``optim_args`` changes the optimizer."""
    plain = _optimizer(_changed(arguments, "optim_args", None))
    for value in ("0", "1", "true"):
        try:
            if (
                Trainer.get_optimizer_cls_and_kwargs(_changed(arguments, "optim_args", f"{name}={value}"))
                != plain
            ):
                return True
        except BUILD_ERRORS:
            return True
    return False


def _optim(arguments: TrainingArguments) -> str:
    return OptimizerNames(arguments.optim).value


def _kind(arguments: TrainingArguments) -> str:
    return SchedulerType(arguments.lr_scheduler_type).value


def _changed(arguments: TrainingArguments, name: str, value: Any) -> TrainingArguments:
    changed = copy(arguments)
    setattr(changed, name, value)
    return changed


def _schedule_function(arguments: TrainingArguments) -> Any:
    return TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(arguments.lr_scheduler_type)]


def _check_schedule_arguments(arguments: TrainingArguments) -> None:
    """Raises RecipeError for unknown and missing arguments of the schedule."""
    kind, where = _kind(arguments), "train.lr_scheduler_kwargs"
    options = arguments.lr_scheduler_kwargs or {}
    if isinstance(options, str):
        raise RecipeError("expected a mapping", where=where, got=repr(options))
    function = _schedule_function(arguments)
    parameters = inspect.signature(function).parameters
    if any(part.kind == part.VAR_KEYWORD for part in parameters.values()):  # a wrapper: see its class
        parameters = inspect.signature(type(function(_dummy(arguments)))).parameters
    accepted = {name: part for name, part in parameters.items() if name not in SET_BY_TRAINER}
    what = f"{kind} takes {', '.join(accepted) or 'no arguments'}"
    for name in options:
        if name not in accepted:
            near = did_you_mean(str(name), accepted)
            raise RecipeError(what, where=where, got=f"{name!r}{near}", fix="correct or remove it")
    missing = [name for name, part in accepted.items() if part.default is part.empty and name not in options]
    if missing:
        fix = f"--lr_scheduler_kwargs '{{{missing[0]}: VALUE}}'"
        raise RecipeError(f"{kind} needs {', '.join(missing)}", where=where, fix=fix)


def _build_schedule(arguments: TrainingArguments, *, steps: int) -> Any:
    """Returns the schedule. Raises RecipeError if it cannot be built, or does not return numbers."""
    options: Any = arguments.lr_scheduler_kwargs
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=_dummy(arguments),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        if isinstance(schedule, LambdaLR):
            for step in {0, 1, steps // 2, max(0, steps - 1)}:
                float(schedule.lr_lambdas[0](step))
    except BUILD_ERRORS as error:
        what = f"{_kind(arguments)} cannot be built: {_first_line(error)}"
        got = repr(arguments.lr_scheduler_kwargs or {})
        raise RecipeError(what, where="train.lr_scheduler_kwargs", got=got) from error
    return schedule


def _dummy(arguments: TrainingArguments) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
