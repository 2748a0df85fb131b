"""The fields of TrainingArguments, parsed from its source code, and the early checks of their values."""

import importlib.util
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from hf_clm.errors import RecipeError
from hf_clm.recipe.recipe import load_recipe
from hf_clm.recipe.trainer_fields import (
    check_train,
    read_train_section,
    train_fields,
    train_section,
)

TRAINER_UTILS = """
class SaveStrategy(ExplicitEnum):
    NO = "no"
    BEST = "best"
"""
TRAINING_ARGUMENTS = '''
@dataclass
class TrainingArguments:
    """Prose."""
    _VALID = ["a"]
    default_optim = "adamw"
    output_dir: Optional[str] = field(default=None, metadata={"help": "Where."})
    max_steps: int = field(default=-1, metadata={"help": "In " "two parts."})
    optim: str = field(default=default_optim)
    save_strategy: Union[SaveStrategy, str] = field(default="steps")
    debug: str | list[DebugOption] = ""
    label_names: Optional[List[str]] = field(default_factory=list)

    def __post_init__(self):
        pass
'''


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fault_of(key, value):
    """Returns the error of a recipe with this line in its section ``train``, without its place."""
    text = "stage: sft\nmodel: {name_or_path: gpt2}\ndata: {train: a}\ntrain:\n  output_dir: x\n"
    Path("r.yaml").write_text(f"{text}  {key}: {value}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml")
    return str(error.value).removeprefix("r.yaml:6: ")


def test_annotations_of_every_form_are_read_from_the_source(tmp_path):
    (tmp_path / "trainer_utils.py").write_text(TRAINER_UTILS)
    (tmp_path / "training_args.py").write_text(TRAINING_ARGUMENTS)

    section = read_train_section(tmp_path)

    assert {name: info.default for name, info in section.model_fields.items()} == {
        "output_dir": None,
        "max_steps": -1,
        "optim": None,
        "save_strategy": "steps",
        "debug": "",
        "label_names": [],
    }
    given = {"output_dir": "x", "save_strategy": "best", "debug": ["any"], "label_names": None}
    assert section.model_validate(given).model_dump(exclude_unset=True) == given


def test_the_installed_fields_are_those_of_the_imported_class():
    import dataclasses

    from transformers import TrainingArguments

    real = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    ours = train_fields()

    assert len(ours) > 100
    assert set(real) - set(ours) == {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # aliases
    for name, default in ours.items():
        if real[name] is not dataclasses.MISSING and default is not None:
            assert default == (real[name].value if isinstance(real[name], Enum) else real[name])


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    program = f"import sys, hf_clm.recipe.recipe; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("evaluation_strategy", "use train.eval_strategy"),
        ("warmup_ratio", "use warmup_steps: a number below 1 is a share of the run"),
        ("logging_dir", "set the environment variable TENSORBOARD_LOGGING_DIR"),
        ("no_cuda", "set use_cpu: true"),
        ("torch_dtype", "use model.dtype"),
    ],
)
def test_a_name_of_transformers_4_is_refused_with_its_new_name(key, fix):
    assert fault_of(key, "1") == f"train.{key} is a name of transformers 4; fix: {fix}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", "four", "a whole number; got 'four'"),
        ("max_steps", "true", "a whole number; got true"),
        ("max_steps", "1.5", "a whole number; got 1.5"),
        ("max_steps", "'10'", "a whole number; got '10'; fix: remove the quotes"),
        ("learning_rate", "'2e-5'", "a number; got '2e-5'; fix: remove the quotes"),
        ("learning_rate", "'-1.5e+3 '", "a number; got '-1.5e+3 '; fix: remove the quotes"),
        ("learning_rate", "five", "a number; got 'five'"),
        ("learning_rate", "[1e-4]", "a number; got [0.0001]"),
        ("learning_rate", "null", "a number; got null"),
        ("bf16", "'true '", "true or false; got 'true '; fix: remove the quotes"),
        ("bf16", "1", "true or false; got 1"),
        ("run_name", "5", "text; got 5"),
        ("label_names", "labels", "a list; got 'labels'"),
        ("eval_steps", "{a: 1}", "a number; got {'a': 1}"),
        ("fsdp", "5", "true or false or text; got 5"),
        ("optim_target_modules", "5", "text or a list; got 5"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_fault(key, value, expected):
    assert fault_of(key, value) == f"train.{key}: expected {expected}"


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("optim", "adam", "adamw_torch"),
        ("optim", "adamw_torchh", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("eval_strategy", "step", "steps"),
        ("save_strategy", "epochs", "epoch"),
        ("report_to", "wand", "wandb"),
        ("train_sampling_strategy", "group_by_lenght", "group_by_length"),
    ],
)
def test_an_unknown_word_suggests_the_nearest_one(key, value, near):
    text = fault_of(key, value)

    assert text.startswith(f"train.{key}: expected one of ")
    assert text.endswith(f"; got {value!r}; did you mean {near!r}?")


def test_a_word_in_a_list_is_named_with_its_place():
    text = fault_of("report_to", "[wandb, tensorbord]")

    assert text.startswith("train.report_to.1: expected one of none, all, ")
    assert text.endswith("; got 'tensorbord'; did you mean 'tensorboard'?")


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("report_to", "wandb", "wandb"),
        ("report_to", ["trackio"], "trackio"),
        ("optim", "galore_adamw", "galore_torch"),
        ("optim", "adalomo", "lomo_optim"),
    ],
)
def test_a_value_that_needs_a_missing_package_names_it(monkeypatch, key, value, package):
    train_section()
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.find_spec", lambda name: None)

    _, (fault,) = check_train({key: value})

    assert fault.what == f"train.{key}: {value!r} needs the package {package}"
    assert fault.fix == f"pip install {package}"


def test_a_value_with_an_installed_package_is_accepted(monkeypatch):
    train_section()
    json = importlib.util.find_spec("json")
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.find_spec", lambda name: json)

    train = {"report_to": ["wandb", "tensorboard"], "optim": "galore_adamw"}
    assert check_train(train) == (train, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("learning_rate", value) for value in ("0", "-1e-3", ".inf", ".nan")),
        ("max_steps", "0"),
        ("max_steps", "-2"),
        ("weight_decay", "-1"),
        ("label_smoothing_factor", "1.0"),
        *((f"{name}_steps", value) for name in ("save", "logging", "eval") for value in ("0", "-1", "1.5")),
        ("warmup_steps", "-1"),
        ("warmup_steps", "2.5"),
        ("gradient_accumulation_steps", "0"),
        ("per_device_train_batch_size", "0"),
        ("per_device_eval_batch_size", "-1"),
        ("max_grad_norm", "-0.1"),
        ("dataloader_num_workers", "-1"),
        ("adam_beta1", "1.0"),
        ("adam_beta2", "-0.1"),
        ("save_total_limit", "0"),
        ("seed", "-1"),
    ],
)
def test_a_value_out_of_range_is_a_fault_that_names_the_key(key, value):
    assert fault_of(key, value).startswith(f"train.{key}: expected ")


def test_values_at_the_edge_of_their_range_are_accepted():
    train = {
        "learning_rate": 1e-9,
        "max_steps": -1,
        "weight_decay": 0.0,
        "label_smoothing_factor": 0.0,
        "save_steps": 0.5,
        "logging_steps": 1,
        "eval_steps": None,
        "warmup_steps": 0.03,
        "max_grad_norm": 0.0,
        "adam_beta1": 0.0,
        "dataloader_num_workers": 0,
        "report_to": ["none"],
        "fsdp": True,
        "include_num_input_tokens_seen": True,
    }

    assert check_train(train) == (train, [])


def test_whole_numbers_become_floats_for_float_fields_but_not_for_steps():
    train, _ = check_train({"learning_rate": 1, "warmup_steps": 100, "max_steps": 3, "eval_steps": None})

    assert {key: type(value).__name__ for key, value in train.items()} == {
        "learning_rate": "float",
        "warmup_steps": "int",
        "max_steps": "int",
        "eval_steps": "NoneType",
    }


def test_words_that_the_source_does_not_list_are_those_of_the_libraries():
    import torch._inductor
    from accelerate.utils import DynamoBackend
    from transformers.training_args import trainer_log_levels

    backends = {item.value.lower() for item in DynamoBackend} - {"no"}

    for key, words in {
        "torch_compile_backend": backends,
        "torch_compile_mode": set(torch._inductor.list_mode_options()),
        "log_level_replica": set(trainer_log_levels),
    }.items():
        listed = fault_of(key, "nonsense").partition("expected one of ")[2].partition("; got")[0]
        assert set(listed.split(", ")) == words
