"""Fields of the section train that contradict each other, or have no effect."""

import pytest
from helpers import build_recipe

from hf_clm.errors import RecipeError
from hf_clm.recipe.trainer_checks import metric_names, train_faults
from hf_clm.training.arguments import training_arguments

METRICS = metric_names()
GOOD = {"output_dir": "runs/x"}
BEST = {**GOOD, "load_best_model_at_end": True}
STEPS = {**BEST, "eval_strategy": "steps", "save_strategy": "steps"}


@pytest.mark.parametrize(
    ("train", "what"),
    [
        ({}, "train.output_dir is missing"),
        ({"output_dir": ""}, "train.output_dir is missing"),
        (
            {**GOOD, "num_train_epochs": -1},
            "train.num_train_epochs: expected a number above 0 if max_steps is not set",
        ),
        ({**GOOD, "fsdp": "full_shard auto_wrap"}, "train.fsdp: text is the format of transformers 4"),
    ],
)
def test_a_combination_that_cannot_work_is_a_fault(train, what):
    (fault,) = train_faults(train, has_eval=True, metrics=METRICS)

    assert fault.what == what


@pytest.mark.parametrize(
    "train",
    [
        {**GOOD, "num_train_epochs": -1, "max_steps": 5},
        {**STEPS, "eval_steps": 10, "save_steps": 30},
        {**STEPS, "eval_steps": 0.1, "save_steps": 0.3},
        {**BEST, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {**BEST, "eval_strategy": "epoch", "save_strategy": "best"},
    ],
)
def test_a_combination_that_works_is_accepted(train):
    assert train_faults(train, has_eval=True, metrics=METRICS) == []


def test_evaluation_without_an_eval_set_is_a_fault():
    (fault,) = train_faults({**GOOD, "eval_strategy": "epoch"}, has_eval=False, metrics=METRICS)

    assert fault.what == "train.eval_strategy is epoch, but there is no eval set"
    assert (
        fault.fix
        == "set data.eval or data.eval_fraction, or data.eval_train_rows to evaluate on training rows"
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"save_strategy": "epoch"},
            "IntervalStrategy.STEPS - Save strategy: SaveStrategy.EPOCH",
        ),
        ({"eval_steps": 20, "save_steps": 30}, "requires the saving steps to be a round multiple of"),
        ({"eval_steps": 0.1, "save_steps": 30}, "requires the saving steps to be a multiple of"),
        ({"logging_steps": 7, "save_steps": 20}, "multiple of the evaluation steps, but found 20, which is"),
    ],
)
def test_values_that_the_library_rejects_are_refused_before_data_are_read(tmp_path, changes, what):
    recipe = build_recipe(tmp_path, [], data={"eval": "e.jsonl"}, train={**STEPS, **changes})

    with pytest.raises(RecipeError) as error:
        training_arguments(recipe)

    assert what in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "what"),
    [
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrantt": False}},
            "train.activation_checkpointing_kwargs has no option 'use_reentrantt'; did you mean",
        ),
        ({"fsdp_config": {"version": 2}}, "train.fsdp_config has no effect without train.fsdp"),
        ({"optim_target_modules": ["q_proj"]}, "train.optim_target_modules has no effect: only galore"),
        ({"save_strategy": "best"}, "train.save_strategy: best needs train.eval_strategy: steps or epoch"),
        ({"greater_is_better": True}, "train.greater_is_better has no effect without train.metric_for_best"),
        ({"accelerator_config": "x.json"}, "train.accelerator_config: expected a mapping"),
        (
            {"accelerator_config": {"split_batch": True}},
            "train.accelerator_config has no key 'split_batch'; did",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "train.accelerator_config.gradient_accumulation_kwargs accepts only sync_each_batch",
        ),
        *(
            ({"accelerator_config": {name: value}}, f"train.accelerator_config.{name} has no effect: ")
            for name, value in (("split_batches", True), ("dispatch_batches", True), ("even_batches", False))
        ),
    ],
)
def test_a_field_without_an_effect_is_a_fault(train, what):
    (fault,) = train_faults({**GOOD, **train}, has_eval=True, metrics=METRICS)

    assert fault.what.startswith(what)


@pytest.mark.parametrize(
    "name", ["loss", "eval_loss", "token_accuracy", "eval_train_loss", "train_target_tokens"]
)
def test_any_logged_metric_can_select_the_best_model(name):
    train = {**STEPS, "metric_for_best_model": name}

    assert train_faults(train, has_eval=True, metrics=metric_names(["train"])) == []


@pytest.mark.parametrize("name", ["accuracy", "f1", "eval_accuracy", "eval_eval_loss", "", "train_loss"])
def test_a_metric_that_is_not_logged_is_refused_with_those_that_are(name):
    train = {**STEPS, "metric_for_best_model": name}

    (fault,) = train_faults(train, has_eval=True, metrics=[*metric_names(), "eval_chrf"])

    assert fault.what == (
        "train.metric_for_best_model: expected one of eval_loss, eval_token_accuracy, eval_target_tokens,"
        " eval_chrf"
    )


def test_defaults_may_be_written_out():
    """Values that equal the defaults of accelerate and transformers are not faults."""
    config = {"split_batches": False, "dispatch_batches": None, "even_batches": True}
    config |= {"use_seedable_sampler": True, "use_configured_state": False, "non_blocking": False}

    train = {**GOOD, "accelerator_config": config, "label_names": []}
    assert train_faults(train, has_eval=True, metrics=METRICS) == []
