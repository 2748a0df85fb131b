"""Optimizers and schedules are built, or refused in one line, before anything is read."""

import re
from typing import Any

import pytest
from helpers import build_recipe
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

from hf_clm.errors import RecipeError
from hf_clm.recipe.sections import Source
from hf_clm.recipe.trainer_fields import check_train
from hf_clm.training.arguments import training_arguments
from hf_clm.training.optimizer import zero_rate_warning
from hf_clm.training.run import train

ROWS = [{"prompt": "say", "completion": "x" * n} for n in range(1, 9)]
HERE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
NEEDED = {  # what a schedule cannot do without
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def recipe_of(folder, **fields: Any):
    """A recipe whose data do not exist, so that reading them fails."""
    judged = {"data": {"eval_fraction": 0.5}, "train": {"eval_strategy": "steps", **fields}}
    recipe = build_recipe(folder, ROWS, **judged)
    missing = recipe.data.model_copy(update={"train": [Source(path=str(folder / "missing.jsonl"))]})
    return recipe.model_copy(update={"data": missing})


def refusal_of(folder, **fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        train(recipe_of(folder, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [item.value for item in OptimizerNames])
def test_every_optimizer_is_built_here_or_refused_for_the_package_it_needs(name, tmp_path):
    _, faults = check_train({"optim": name})  # for those that are built with the model

    if name in HERE:
        assert training_arguments(recipe_of(tmp_path, optim=name)).optim == name
    elif faults:
        assert re.fullmatch(rf"train.optim: '{name}' needs the package \S+", faults[0].what)
    else:
        with pytest.raises(RecipeError, match=rf"^train.optim: {name} cannot be built: .*(install|import)"):
            training_arguments(recipe_of(tmp_path, optim=name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim_args": "foo=1"}, "train.optim_args: adamw_torch_fused ignores 'foo'; got 'foo=1'"),
        ({"optim": "adafactor", "optim_args": "eps=1"}, "train.optim_args: adafactor ignores 'eps'"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,mu=1"}, "train.optim_args: sgd ignores 'mu'"),
        (
            {"optim": "sgd", "optim_args": "momentum"},
            "train.optim_args: expected name=value, name=value; got",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum=x"},
            "train.optim_args: sgd cannot be built: could not conv",
        ),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "train.optim_args: sgd cannot be built: Nesterov"),
        (
            {"optim": "rmsprop", "optim_args": "alpha=-1"},
            "train.optim_args: rmsprop cannot be built: Invalid",
        ),
        ({"optim": "sgd", "adam_beta1": 0.5}, "train.adam_beta1: has no effect with optim sgd; got 0.5"),
        (
            {"optim": "adafactor", "adam_epsilon": 1e-6},
            "train.adam_epsilon: has no effect with optim adafactor",
        ),
    ],
)
def test_options_that_an_optimizer_ignores_or_rejects_are_refused_before_data_are_read(
    fields, message, tmp_path
):
    assert refusal_of(tmp_path, **fields).startswith(message)


@pytest.mark.parametrize(
    ("optim", "args"),
    [
        ("sgd", "momentum=0.9, nesterov=true"),
        ("sgd", "momentum=0"),
        ("adagrad", "lr_decay=0.1,eps=1e-8"),
        ("rmsprop", "alpha=0.9,centered=true"),
    ],
)
def test_options_of_an_optimizer_are_accepted(optim, args, tmp_path):
    assert training_arguments(recipe_of(tmp_path, optim=optim, optim_args=args)).optim_args == args


@pytest.mark.parametrize("kind", [item.value for item in TYPE_TO_SCHEDULER_FUNCTION])
def test_every_schedule_is_built_with_its_arguments_and_refuses_others(kind, tmp_path):
    needed = NEEDED.get(kind, {})

    assert training_arguments(recipe_of(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=needed))
    wrong = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": {**needed, "num_cyles": 1}}
    assert refusal_of(tmp_path, **wrong).startswith(f"train.lr_scheduler_kwargs: {kind} takes ")
    if needed:
        assert refusal_of(tmp_path, lr_scheduler_type=kind).startswith(f"train.lr_scheduler_kwargs: {kind} ")


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("constant", {"num_cycles": 1}, "constant takes no arguments; got 'num_cycles'"),
        ("constant_with_warmup", {"power": 1}, "constant_with_warmup takes no arguments; got 'power'"),
        ("cosine", {"num_cyles": 1}, "cosine takes num_cycles; got 'num_cyles'; did you mean 'num_cycles'?"),
        ("cosine", {"num_cycles": "x"}, "cosine cannot be built: "),
        ("warmup_stable_decay", {}, "warmup_stable_decay needs num_decay_steps; fix: --lr_scheduler_kwargs"),
        ("cosine_with_min_lr", {}, "cosine_with_min_lr cannot be built: One of min_lr or min_lr_rate"),
        ("polynomial", {"lr_end": 5.0}, "polynomial cannot be built: lr_end"),
        (
            "reduce_lr_on_plateau",
            {"factor": 2.0},
            "reduce_lr_on_plateau cannot be built: Factor should be < 1",
        ),
    ],
)
def test_a_schedule_that_cannot_be_built_is_refused_before_data_are_read(kind, kwargs, message, tmp_path):
    found = refusal_of(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs)

    assert found.replace("`", "").startswith(f"train.lr_scheduler_kwargs: {message}")


def test_a_warm_up_that_the_schedule_ignores_is_refused(tmp_path):
    message = "train.warmup_steps: has no effect with lr_scheduler_type constant; got 5; fix: remove it"

    assert refusal_of(tmp_path, lr_scheduler_type="constant", warmup_steps=5).startswith(message)
    assert training_arguments(recipe_of(tmp_path, lr_scheduler_type="constant", warmup_steps=0))
    assert training_arguments(recipe_of(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=5))


@pytest.mark.parametrize(
    ("fields", "steps", "share"),
    [
        ({}, 1, "1 of 1 steps"),
        ({"lr_scheduler_type": "linear"}, 1, "1 of 1 steps"),
        ({}, 2, ""),
        ({"warmup_steps": 0}, 1, ""),
        ({"lr_scheduler_type": "constant"}, 1, ""),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 1, ""),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 0,
                "lr_scheduler_kwargs": {"num_decay_steps": 1, "num_stable_steps": 3},
            },
            100,
            "96 of 100 steps",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 0,
                "lr_scheduler_kwargs": {"num_decay_steps": 1, "num_stable_steps": 3},
            },
            1_000_000,
            "100% of the steps",
        ),
    ],
)
def test_a_run_warns_if_most_steps_have_a_learning_rate_of_zero(fields, steps, share, tmp_path):
    line = zero_rate_warning(training_arguments(recipe_of(tmp_path, **fields)), steps)

    assert (
        line.startswith(f"train.learning_rate is 0 in {share}, which train nothing") if share else line == ""
    )


def test_the_warning_is_among_the_lines_of_the_start(tmp_path, capsys):
    train(build_recipe(tmp_path, ROWS, train={"max_steps": 1}))

    assert (
        "\nwarning   train.learning_rate is 0 in 1 of 1 steps, which train nothing" in capsys.readouterr().out
    )
