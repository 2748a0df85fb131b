import dataclasses
import importlib.util
import subprocess
import sys
from enum import Enum

import pytest

from hf_clm.recipe.trainer_fields import (
    TrainerField,
    check_train_values,
    drop_quotes_hint,
    load_trainer_fields,
    read_trainer_fields,
    to_trainer_types,
)

TRAINER_UTILS = """
class SaveStrategy(ExplicitEnum):
    NO = "no"
    BEST = "best"
"""
TRAINING_ARGUMENTS = '''
class OptimizerNames(ExplicitEnum):
    """Optimizers."""
    SGD = "sgd"
    LION = "lion_32bit"

@dataclass
class TrainingArguments:
    """Prose."""
    _VALID = ["a"]
    default_optim = "adamw"
    output_dir: Optional[str] = field(default=None, metadata={"help": "Where."})
    max_steps: int = field(default=-1, metadata={"help": "In " "two parts."})
    tf32: Union[bool, None] = field(default=None)
    optim: Union[OptimizerNames, str] = field(default=default_optim)
    save_strategy: SaveStrategy | str = field(default="steps")
    report_to: None | str | list[str] = field(default=None)
    fsdp: str | None = field(default=None, metadata={"nargs": "?", "const": True})
    ddp_backend: "str | None" = field(default=None, metadata={"choices": ["nccl", "gloo"]})
    space: str | None | Literal[False] = field(default=None)
    label_names: Optional[List[str]] = field(default_factory=list)
    config: dict[str, Any] | str | None = field(default=None)

    def __post_init__(self):
        pass
'''


def test_annotations_of_every_form_are_read_from_the_source(tmp_path):
    (tmp_path / "trainer_utils.py").write_text(TRAINER_UTILS)
    (tmp_path / "training_args.py").write_text(TRAINING_ARGUMENTS)

    fields = read_trainer_fields(tmp_path)

    assert list(fields.values()) == [
        TrainerField("output_dir", ("str", "None"), (), None, "Where."),
        TrainerField("max_steps", ("int",), (), -1, "In two parts."),
        TrainerField("tf32", ("bool", "None"), (), None, ""),
        TrainerField("optim", ("str",), ("sgd", "lion_32bit"), ..., ""),
        TrainerField("save_strategy", ("str",), ("no", "best"), "steps", ""),
        TrainerField(
            "report_to",
            ("None", "str", "list"),
            (
                *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive"),
                *("flyte", "kubeflow", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
            ),
            None,
            "",
        ),
        TrainerField("fsdp", ("str", "None", "bool"), (), None, ""),
        TrainerField("ddp_backend", ("str", "None"), ("nccl", "gloo"), None, ""),
        TrainerField("space", ("str", "None", "bool"), (), None, ""),
        TrainerField("label_names", ("list", "None"), (), [], ""),
        TrainerField("config", ("dict", "str", "None"), (), None, ""),
    ]


def test_the_installed_fields_are_those_of_the_imported_class():
    from transformers import TrainingArguments

    real = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    ours = load_trainer_fields()

    assert len(real) > 100
    assert set(ours) == set(real)
    for name, default in real.items():
        if default is not dataclasses.MISSING and ours[name].default is not ...:
            assert ours[name].default == (default.value if isinstance(default, Enum) else default)


@pytest.mark.parametrize(
    ("name", "types", "choice", "default"),
    [
        ("learning_rate", ("float",), None, 5e-5),
        ("max_steps", ("int",), None, -1),
        ("optim", ("str",), "adamw_torch_fused", ...),
        ("lr_scheduler_type", ("str",), "cosine", "linear"),
        ("eval_strategy", ("str",), "epoch", "no"),
        ("save_strategy", ("str",), "best", "steps"),
        ("hub_strategy", ("str",), "all_checkpoints", "every_save"),
        ("fsdp", ("str", "None", "bool"), None, None),
    ],
)
def test_an_installed_field_has_its_type_choices_and_default(name, types, choice, default):
    field = load_trainer_fields()[name]

    assert (field.types, field.default) == (types, default)
    assert choice is None or choice in field.choices


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    program = f"import sys, hf_clm.recipe.recipe; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("evaluation_strategy", "write eval_strategy"),
        ("warmup_ratio", "write warmup_steps: a number below 1 is a share of the run"),
        ("group_by_length", "write train_sampling_strategy: group_by_length"),
        ("logging_dir", "set the environment variable TENSORBOARD_LOGGING_DIR"),
        ("save_safetensors", "remove it: safetensors is the only format"),
        ("overwrite_output_dir", "write overwrite: true at the recipe's top level"),
        ("include_tokens_per_second", "remove it: tokens per second are always measured"),
        ("no_cuda", "write use_cpu: true"),
        ("tokenizer", "write it in the section tokenizer"),
        ("torch_dtype", "write model.dtype"),
        ("per_gpu_train_batch_size", "write per_device_train_batch_size"),
    ],
)
def test_a_name_of_transformers_4_is_told_its_new_spelling(key, fix):
    (fault,) = check_train_values({key: 1})

    assert (fault.key, fault.what, fault.fix) == (
        f"train.{key}",
        f"train.{key} is a name of transformers 4",
        fix,
    )


@pytest.mark.parametrize("suffix", ["", "_kwargs"])
def test_gradient_checkpointing_is_refused_only_where_the_new_name_exists(monkeypatch, suffix):
    old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
    both = {name: TrainerField(name, ("bool", "dict"), (), None, "") for name in (old, new)}

    monkeypatch.setattr("hf_clm.recipe.trainer_fields.load_trainer_fields", lambda: both)
    assert check_train_values({old: True})[0].fix == f"write {new}"
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.load_trainer_fields", lambda: {old: both[old]})
    assert check_train_values({old: True}) == []


@pytest.mark.parametrize(
    ("key", "value", "expected", "got", "fix"),
    [
        ("max_steps", "four", "a whole number", "'four'", ""),
        ("max_steps", True, "a whole number", "true", ""),
        ("max_steps", 1.5, "a whole number", "1.5", ""),
        ("max_steps", "10", "a whole number", "'10'", "drop the quotes"),
        ("learning_rate", "2e-5", "a number", "'2e-5'", "drop the quotes"),
        ("learning_rate", [1e-4], "a number", "[0.0001]", ""),
        ("learning_rate", None, "a number", "null", ""),
        ("learning_rate", False, "a number", "false", ""),
        ("bf16", "true ", "true or false", "'true '", "drop the quotes"),
        ("bf16", 1, "true or false", "1", ""),
        ("output_dir", 5, "text or null", "5", ""),
        ("label_names", "labels", "a list or null", "'labels'", ""),
        ("eval_steps", {"a": 1}, "a number or null", "{'a': 1}", ""),
    ],
)
def test_a_value_of_the_wrong_type_is_a_fault(key, value, expected, got, fix):
    (fault,) = check_train_values({key: value})

    assert (fault.what, fault.got, fault.fix) == (f"train.{key}: expected {expected}", got, fix)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("optim", "adam", "adamw_torch"),
        ("optim", "adamw_torchh", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("eval_strategy", "step", "steps"),
        ("save_strategy", "epochs", "epoch"),
        ("report_to", "wand", "wandb"),
        ("report_to", ["tensorbord"], "tensorboard"),
        ("train_sampling_strategy", "group_by_lenght", "group_by_length"),
    ],
)
def test_an_unknown_choice_gets_the_nearest_one(key, value, near):
    (fault,) = check_train_values({key: value})

    assert fault.what.startswith(f"train.{key}: expected one of ")
    assert fault.got.endswith(f"; did you mean {near!r}?")


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("report_to", "wandb", "wandb"),
        ("report_to", ["trackio"], "trackio"),
        ("optim", "adamw_bnb_8bit", "bitsandbytes"),
        ("optim", "adamw_torch_4bit", "torchao"),
        ("optim", "galore_adamw", "galore_torch"),
    ],
)
def test_a_value_that_needs_a_missing_package_names_it(monkeypatch, key, value, package):
    fields = load_trainer_fields()
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.load_trainer_fields", lambda: fields)
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.find_spec", lambda name: None)

    (fault,) = check_train_values({key: value})

    assert fault.what == f"train.{key}: {value!r} needs the package {package}"
    assert fault.fix == f"pip install {package}"


def test_a_value_whose_package_is_there_is_accepted(monkeypatch):
    json = importlib.util.find_spec("json")
    fields = load_trainer_fields()
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.load_trainer_fields", lambda: fields)
    monkeypatch.setattr("hf_clm.recipe.trainer_fields.find_spec", lambda name: json)

    assert check_train_values({"report_to": ["wandb", "tensorboard"], "optim": "adamw_8bit"}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("learning_rate", value) for value in (0, -1e-3, float("inf"), float("nan"))),
        ("max_steps", 0),
        ("max_steps", -2),
        ("weight_decay", -1),
        ("label_smoothing_factor", 2),
        ("label_smoothing_factor", 1.0),
        *((f"{name}_steps", value) for name in ("save", "logging", "eval") for value in (0, -1, 1.5)),
        ("warmup_steps", -1),
        ("warmup_steps", 2.5),
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -1),
        ("max_grad_norm", -0.1),
        ("dataloader_num_workers", -1),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("save_total_limit", 0),
    ],
)
def test_a_value_out_of_range_is_a_fault_that_names_the_key(key, value):
    (fault,) = check_train_values({key: value})

    assert fault.what.startswith(f"train.{key}: expected ")
    assert fault.got == str(value)


def test_values_at_the_edge_of_their_range_are_accepted():
    train = {
        "learning_rate": 1e-9,
        "max_steps": -1,
        "weight_decay": 0,
        "label_smoothing_factor": 0.0,
        "save_steps": 0.5,
        "logging_steps": 1,
        "eval_steps": None,
        "warmup_steps": 0.03,
        "max_grad_norm": 0.0,
        "adam_beta1": 0,
        "dataloader_num_workers": 0,
        "report_to": ["none"],
        "fsdp": True,
        "include_num_input_tokens_seen": True,
    }

    assert check_train_values(train) == []


def test_whole_numbers_become_floats_where_the_field_is_one_but_not_in_steps():
    train = to_trainer_types({"learning_rate": 1, "warmup_steps": 100, "max_steps": 3, "eval_steps": None})

    assert {key: type(value).__name__ for key, value in train.items()} == {
        "learning_rate": "float",
        "warmup_steps": "int",
        "max_steps": "int",
        "eval_steps": "NoneType",
    }


@pytest.mark.parametrize(
    ("value", "types", "hint"),
    [
        ("-1.5e+3 ", ["float"], "drop the quotes"),
        ("True", ["bool"], "drop the quotes"),
        ("true", ["int"], ""),
        ("five", ["int"], ""),
        (5, ["bool"], ""),
    ],
)
def test_text_that_spells_a_number_or_a_boolean_gets_a_hint(value, types, hint):
    assert drop_quotes_hint(value, types) == hint


def test_the_words_that_the_source_does_not_give_are_those_of_the_libraries():
    import torch._inductor
    from accelerate.utils import DynamoBackend
    from transformers.training_args import trainer_log_levels

    fields = load_trainer_fields()
    backends = {item.value.lower() for item in DynamoBackend} - {"no"}

    assert set(fields["torch_compile_backend"].choices) == backends
    assert set(fields["torch_compile_mode"].choices) == set(torch._inductor.list_mode_options())
    assert set(fields["log_level_replica"].choices) == set(trainer_log_levels)
