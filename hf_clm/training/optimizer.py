"""The optimizer and the learning rate of a run, built on one dummy weight before anything is read.

What the libraries refuse in their constructors, and what they pass over in silence, is known so before the
data are. Optimizers that need the model itself (GaLore, APOLLO, LOMO) are left to the Trainer.
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
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ZeroDivisionError)
FROM_THE_RUN = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
SAMPLED_STEPS = 10_000  # of a longer run, evenly spaced


def check_optimization(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raises RecipeError for an optimizer or a schedule that cannot be built, or ignores what is ``given``.

    ``given``: the fields that the recipe names.
    """
    if not _optim(arguments).startswith(NEED_THE_MODEL):
        _check_optimizer(arguments, given)
    _check_schedule_arguments(arguments)
    _build_schedule(arguments, steps=max(arguments.max_steps, 100))
    takes_warmup = "num_warmup_steps" in inspect.signature(_schedule_function(arguments)).parameters
    if not takes_warmup and given.get("warmup_steps") not in (None, 0, TRAIN_DEFAULTS["warmup_steps"]):
        fix = "leave it out, or set lr_scheduler_type to constant_with_warmup"
        what = f"has no effect with lr_scheduler_type {_kind(arguments)}"
        raise RecipeError(what, where="train.warmup_steps", got=str(given["warmup_steps"]), fix=fix)


def zero_rate_warning(arguments: TrainingArguments, steps: int) -> str:
    """A line where most of the steps have a learning rate of 0 and so learn nothing; else empty."""
    sampled = range(0, steps, max(1, steps // SAMPLED_STEPS))
    schedule = _build_schedule(arguments, steps=steps)
    if not sampled or not isinstance(schedule, LambdaLR):  # the others follow the evaluations
        return ""
    idle = sum(schedule.lr_lambdas[0](step) == 0 for step in sampled)
    if 2 * idle <= len(sampled):
        return ""
    share = f"{idle} of {steps}" if len(sampled) == steps else f"{idle / len(sampled):.0%} of the"
    return (
        f"train.learning_rate is 0 in {share} steps, which learn nothing;"
        f" fix: more steps, or another warmup_steps ({arguments.warmup_steps:g}) or lr_scheduler_type"
    )


def _check_optimizer(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    built = _optimizer(arguments)
    defaults = train_fields()
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        is_own = name in given and given[name] != defaults[name]
        if is_own and _optimizer(_changed(arguments, name, given[name] / 2)) == built:
            what = f"has no effect with optim {_optim(arguments)}"
            raise RecipeError(what, where=f"train.{name}", got=str(given[name]), fix="leave it out")
    for pair in (arguments.optim_args or "").split(",") if arguments.optim_args else ():
        name = pair.partition("=")[0].strip()
        if not _reads(arguments, name):
            what = f"{_optim(arguments)} takes no {name!r} from it"
            raise RecipeError(
                what, where="train.optim_args", got=repr(arguments.optim_args), fix="leave it out"
            )


def _optimizer(arguments: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer and what it is given, with which one was built. Raises RecipeError."""
    text = arguments.optim_args or ""
    if text and any(len(pair.split("=")) != 2 for pair in text.split(",")):
        what = "expected name=value, name=value"
        raise RecipeError(what, where="train.optim_args", got=repr(text))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except REFUSALS as error:
        what = f"{_optim(arguments)} cannot be built: {_first_line(error)}"
        where = "train.optim_args" if text else "train.optim"
        raise RecipeError(what, where=where, got=repr(text) if text else "") from error
    return kind, options


def _reads(arguments: TrainingArguments, name: str) -> bool:
    """Whether the optimizer looks at this name of ``optim_args``: some value of it changes what is built."""
    plain = _optimizer(_changed(arguments, "optim_args", None))
    for value in ("0", "1", "true"):
        try:
            if (
                Trainer.get_optimizer_cls_and_kwargs(_changed(arguments, "optim_args", f"{name}={value}"))
                != plain
            ):
                return True
        except REFUSALS:
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
    """Raises RecipeError for a name in ``lr_scheduler_kwargs`` that the schedule lacks, or needs."""
    kind, where = _kind(arguments), "train.lr_scheduler_kwargs"
    options = arguments.lr_scheduler_kwargs or {}
    if isinstance(options, str):
        raise RecipeError("expected a mapping", where=where, got=repr(options))
    function = _schedule_function(arguments)
    parameters = inspect.signature(function).parameters
    if any(part.kind == part.VAR_KEYWORD for part in parameters.values()):  # handed on to a class
        parameters = inspect.signature(type(function(_dummy(arguments)))).parameters
    own = {name: part for name, part in parameters.items() if name not in FROM_THE_RUN}
    takes = f"{kind} takes {', '.join(own) or 'none'}"
    for name in options:
        if name not in own:
            near = did_you_mean(str(name), own)
            raise RecipeError(takes, where=where, got=f"{name!r}{near}", fix="correct it, or leave it out")
    missing = [name for name, part in own.items() if part.default is part.empty and name not in options]
    if missing:
        fix = f"--lr_scheduler_kwargs '{{{missing[0]}: VALUE}}'"
        raise RecipeError(f"{kind} needs {', '.join(missing)}", where=where, fix=fix)


def _build_schedule(arguments: TrainingArguments, *, steps: int) -> Any:
    """The schedule over these steps. Raises RecipeError where it cannot be built, or gives no number."""
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
    except REFUSALS as error:
        what = f"{_kind(arguments)} cannot be built: {_first_line(error)}"
        got = repr(arguments.lr_scheduler_kwargs or {})
        raise RecipeError(what, where="train.lr_scheduler_kwargs", got=got) from error
    return schedule


def _dummy(arguments: TrainingArguments) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
