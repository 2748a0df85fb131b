"""The fields of transformers.TrainingArguments and their checks, from its source: an import takes seconds."""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_clm.errors import EnvironmentFault, did_you_mean

# Where ours differ from those of transformers.TrainingArguments.
TRAIN_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",  # ends at zero like linear, and stays high for longer
    "warmup_steps": 0.03,  # a share of the run: Adam's first steps are the roughest
    "logging_steps": 10,  # 500 hides a short run
    "logging_first_step": True,  # the loss before learning
    "logging_nan_inf_filter": False,  # the filter shows a NaN loss as 0.0
    "include_num_input_tokens_seen": "no",  # we count real and target tokens without a device sync
    "average_tokens_across_devices": True,  # the same loss for one process and for many
    "ddp_find_unused_parameters": False,  # a causal language model uses all of them
    "remove_unused_columns": False,  # would drop what the packed attention needs
    "save_total_limit": 2,  # checkpoints are three times as large as the model
    "disable_tqdm": True,  # our own progress bar
    "report_to": "none",  # the default only since transformers 5
}


@dataclass(frozen=True)
class TrainerField:
    """``types`` are names such as ("float", "None"); ``default`` is ... where the source computes it."""

    name: str
    types: tuple[str, ...]
    choices: tuple[str, ...]
    default: Any
    help: str


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe, at a dotted key; whoever read the recipe knows the line of that key."""

    key: str
    what: str
    got: str = ""
    fix: str = ""


@lru_cache(maxsize=1)
def load_trainer_fields() -> dict[str, TrainerField]:
    """Raises EnvironmentFault when transformers is not installed."""
    spec = find_spec("transformers")  # finds the folder and runs nothing of it
    if spec is None or spec.origin is None:
        raise EnvironmentFault("transformers is not installed", fix="make setup")
    return read_trainer_fields(Path(spec.origin).parent)


def read_trainer_fields(package: Path) -> dict[str, TrainerField]:
    """Reads the body of TrainingArguments, and the enums its annotations name, in a transformers folder."""
    paths = [package / "trainer_utils.py", package / "training_args.py"]
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    enums = {name: _enum_values(node) for name, node in classes.items() if _is_enum(node)}
    body = classes["TrainingArguments"].body
    fields = [_to_field(node, enums) for node in body if isinstance(node, ast.AnnAssign)]
    return {field.name: field for field in fields}


def check_train_values(train: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with each key of the train section on its own: its name, type, choice or range."""
    fields = load_trainer_fields()
    faults = [_key_fault(key, value, fields=fields) for key, value in train.items()]
    return [fault for fault in faults if fault]


def to_trainer_types(train: Mapping[str, Any]) -> dict[str, Any]:
    """Makes 1 a float where a field is one, but not in ``*_steps``: 1 is a step there, 0.5 half the run."""
    fields = load_trainer_fields()

    def to_type(key: str, value: Any) -> Any:
        is_float = "float" in fields[key].types and not key.endswith("_steps")
        return float(value) if is_float and isinstance(value, int) else value

    return {key: to_type(key, value) for key, value in train.items()}


def drop_quotes_hint(value: Any, types: Iterable[str]) -> str:
    """The fix for text such as "2e-5" or "true " where a number or a boolean is expected; else empty."""
    if not isinstance(value, str):
        return ""
    is_number = {"int", "float"} & set(types) and re.fullmatch(NUMBER, value.strip())
    is_boolean = "bool" in types and value.strip().lower() in ("true", "false")
    return "drop the quotes" if is_number or is_boolean else ""


def type_name(value: Any) -> str:
    """``"int"``, ``"str"``, ``"None"``, ... as in ``TrainerField.types``."""
    return "None" if value is None else type(value).__name__


def shorten(value: Any) -> str:
    """As in YAML where Python would say None, True or False; at most 60 characters."""
    is_word = value is None or isinstance(value, bool)
    text = str(value).lower().replace("none", "null") if is_word else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_enum(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("Enum") for base in node.bases)


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    values = [line.value for line in node.body if isinstance(line, ast.Assign)]
    return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


def _to_field(node: ast.AnnAssign, enums: dict[str, tuple[str, ...]]) -> TrainerField:
    assert isinstance(node.target, ast.Name)
    name, options = node.target.id, {}
    if isinstance(node.value, ast.Call):  # field(default=..., metadata={...})
        options = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata = options.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    notes = {_literal(key): _literal(value) for key, value in pairs}
    names = _annotation_names(node.annotation)
    types = ["str" if item in enums else item for item in names]
    if notes.get("const") is True:  # text by its annotation, and True when given without a value
        types.append("bool")
    choices = [value for item in names for value in enums.get(item, ())]
    if isinstance(notes.get("choices"), list):
        choices += notes["choices"]
    default = [] if "default_factory" in options else _literal(options.get("default", node.value))
    known = tuple(choices) or CHOICES.get(name, ())
    return TrainerField(name, tuple(dict.fromkeys(types)), known, default, str(notes.get("help", "")))


def _annotation_names(node: ast.expr) -> list[str]:
    """``float | None``, ``Optional[float]`` and ``Union[float, None]`` all give ["float", "None"]."""
    if isinstance(node, ast.BinOp):
        return _annotation_names(node.left) + _annotation_names(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        return _annotation_names(ast.parse(node.value, mode="eval").body)
    if not isinstance(node, ast.Subscript):
        return [ast.unparse(node)]
    outer = ast.unparse(node.value).removeprefix("typing.")
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer in ("Optional", "Union"):
        names = [name for item in inner for name in _annotation_names(item)]
        return names + ["None"] * (outer == "Optional")
    if outer == "Literal":
        return [type_name(_literal(item)) for item in inner]
    return [outer.lower()]  # list[str], Dict[str, Any]


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node else ...
    except ValueError:
        return ...


def _key_fault(key: str, value: Any, *, fields: dict[str, TrainerField]) -> Fault | None:
    path = f"train.{key}"
    renamed = key not in fields or key.replace("gradient_", "activation_") in fields  # an alias of late 5.x
    if key in V4_NAMES and renamed:
        return Fault(path, f"{path} is a name of transformers 4", fix=V4_NAMES[key])
    if key not in fields:
        near = did_you_mean(str(key), fields)
        return Fault(path, f"{path} is not a field of transformers.TrainingArguments{near}")
    field = fields[key]
    fault = _type_fault(path, value, field=field) or _choice_fault(path, value, field=field)
    return fault or _range_fault(path, value)


def _type_fault(path: str, value: Any, *, field: TrainerField) -> Fault | None:
    name = type_name(value)
    if name in field.types or (name == "int" and "float" in field.types):
        return None
    expected = " or ".join(dict.fromkeys(TYPE_WORDS.get(item, item) for item in field.types))
    return Fault(
        path, f"{path}: expected {expected}", got=shorten(value), fix=drop_quotes_hint(value, field.types)
    )


def _choice_fault(path: str, value: Any, *, field: TrainerField) -> Fault | None:
    words = value if isinstance(value, list) else [value]
    for word in words if field.choices else []:
        if isinstance(word, str) and word not in field.choices:
            longer = [choice for choice in field.choices if word and choice.startswith(word)]
            near = f"; did you mean {longer[0]!r}?" if longer else did_you_mean(word, field.choices)
            known = [*field.choices[:16], "..."] if len(field.choices) > 16 else field.choices
            return Fault(path, f"{path}: expected one of {', '.join(known)}", got=f"{word!r}{near}")
    patterns = PACKAGES.get(field.name, {})
    needed = [patterns[pattern] for word in words for pattern in patterns if re.search(pattern, str(word))]
    for package in needed:
        if find_spec(MODULES.get(package, package)) is None:
            return Fault(path, f"{path}: {value!r} needs the package {package}", fix=f"pip install {package}")
    return None


def _range_fault(path: str, value: Any) -> Fault | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return Fault(path, f"{path}: expected a finite number", got=str(value))
    for names, is_allowed, expected in RANGES:
        if path.removeprefix("train.") in names.split() and not is_allowed(value):
            return Fault(path, f"{path}: expected {expected}", got=str(value))
    return None


NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "None": "null",
}


def _is_steps(value: float) -> bool:
    return value < 1 or value == int(value)


SHARE = "or a share of the run below 1"
RANGES = (
    ("learning_rate adam_epsilon", lambda x: x > 0, "a number above 0"),
    (
        "save_steps logging_steps eval_steps",
        lambda x: x > 0 and _is_steps(x),
        f"a whole number above 0, {SHARE}",
    ),
    ("warmup_steps", lambda x: x >= 0 and _is_steps(x), f"a whole number, {SHARE}"),
    ("max_steps", lambda x: x == -1 or x > 0, "a number above 0, or -1 to go by num_train_epochs"),
    ("weight_decay max_grad_norm dataloader_num_workers eval_delay", lambda x: x >= 0, "0 or more"),
    ("per_device_train_batch_size per_device_eval_batch_size", lambda x: x >= 1, "1 or more"),
    ("gradient_accumulation_steps eval_accumulation_steps", lambda x: x >= 1, "1 or more"),
    ("save_total_limit dataloader_prefetch_factor torch_empty_cache_steps", lambda x: x >= 1, "1 or more"),
    ("seed data_seed", lambda x: 0 <= x < 2**32, "0 to 4294967295"),
    ("ddp_timeout ddp_bucket_cap_mb", lambda x: x > 0, "a number above 0"),
    ("neftune_noise_alpha", lambda x: x > 0, "a number above 0, or null"),
    ("label_smoothing_factor adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "0 or more and below 1"),
)

# Where the source gives the allowed words only as text.
CHOICES = {
    "report_to": (
        *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte"),
        *("kubeflow", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
    ),
    **dict.fromkeys(
        ("log_level", "log_level_replica"),
        ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    ),
    "torch_compile_mode": (
        "default",
        "lite",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
    "torch_compile_backend": (
        *(
            "inductor",
            "eager",
            "aot_eager",
            "cudagraphs",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "ofi",
            "fx2trt",
        ),
        *(
            "onnxrt",
            "tensorrt",
            "aot_torchxla_trace_once",
            "torchxla_trace_once",
            "tvm",
            "hpu_backend",
            "neuron",
        ),
    ),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
}

# What a value needs installed beyond our own dependencies: a pattern of the value, and the package.
TRACKERS = ("clearml", "codecarbon", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
PACKAGES = {
    "report_to": {f"^{name}$": name for name in TRACKERS},
    "optim": {
        r"bnb|paged|(?<!torch)_8bit|lion_32bit|ademamix": "bitsandbytes",
        "adamw_torch_[48]bit": "torchao",
        "^adamw_torch_xla$": "torch_xla",
        "^adamw_torch_npu_fused$": "torch_npu",
        "^adamw_anyprecision$": "torchdistx",
        "^stable_adamw$": "torch-optimi",
        "^galore_": "galore_torch",
        "^apollo_": "apollo_torch",
        "lomo$": "lomo_optim",
        "^grokadamw$": "grokadamw",
        "^schedule_free_": "schedulefree",
    },
}
MODULES = {"torch-optimi": "optimi"}  # of a package that is imported under another name

V4_NAMES = {
    "evaluation_strategy": "write eval_strategy",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of the run",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "remove it: safetensors is the only format",
    "overwrite_output_dir": "write overwrite: true at the recipe's top level",
    "include_tokens_per_second": "remove it: tokens per second are always measured",
    "no_cuda": "write use_cpu: true",
    "tokenizer": "write it in the section tokenizer",
    "torch_dtype": "write model.dtype",
    "gradient_checkpointing": "write activation_checkpointing",
    "gradient_checkpointing_kwargs": "write activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "adafactor": "write optim: adafactor",
    "half_precision_backend": "remove it",
    "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
    "push_to_hub_token": "set the environment variable HF_TOKEN",
    "max_seq_length": "write data.max_length",
}
