"""The section ``train``: the fields of transformers.TrainingArguments, read from its source.

Importing transformers takes seconds, and its dataclass checks few types: ``max_steps="four"`` passes.
"""

import ast
import builtins
import typing
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from hf_clm.errors import EnvironmentFault
from hf_clm.recipe.faults import Fault
from hf_clm.recipe.sections import FREE, UNSEEN, Rule

T = TypeVar("T")
NO_LOGITS = Rule(unused="an evaluation sums losses and hits on the device, and keeps no logits")
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

# The older spelling of a field, which everyone types, and that of late 5.x. Either is accepted.
SPELLINGS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# The rules of fields, by pattern; the first counts. Any other may not differ when a run is resumed.
RULES = {
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps": NO_LOGITS,
    "include_for_metrics batch_eval_metrics": NO_LOGITS,
    "remove_unused_columns label_names": Rule(unused="the collator makes exactly what the model takes"),
    "length_column_name": Rule(unused="the length of a row is counted"),
    "logging_nan_inf_filter": Rule(unused="a loss that is not finite ends the run"),
    "include_num_input_*": Rule(unused="tokens_seen and target_tokens_seen are always logged"),
    "do_*": Rule(unused="hf-clm train always trains, and evaluates as train.eval_strategy says"),
    "use_cache": Rule(unused="training reads each row once, so there is nothing to keep"),
    "enable_jit_checkpoint": Rule(unused="SIGTERM always saves a checkpoint"),
    "*liger_kernel*": Rule(unused="it gives no logits, which the token accuracy is counted on"),
    "local_rank parallelism_config": Rule(unused="the launcher says how processes work together"),
    "ignore_data_skip restore_callback_*": Rule(unused="a resume is exact"),
    "logging_* save_* eval_* per_device_* gradient_accumulation_steps use_cpu ddp_timeout": FREE,
    "dataloader_num_workers dataloader_pin_memory metric_for_best_model greater_is_better": FREE,
    "output_dir resume_from_checkpoint run_name disable_tqdm log_level* report_to *hub*": UNSEEN,
    "load_best_model_at_end": Rule("free", needs={"train.eval_strategy": ("steps", "epoch")}),
    "dataloader_p*": Rule("free", needs={"train.dataloader_num_workers": ()}),
    "dataloader_multi* dataloader_in_order": Rule(needs={"train.dataloader_num_workers": ()}),
    "activation_*_kwargs": Rule(needs={"train.activation_checkpointing": (True,)}),
    "fp16": Rule(needs={"train.bf16": (False,)}),
    "fp16_full_eval": Rule(needs={"train.bf16_full_eval": (False,)}),
}
# The values that data.streaming excludes: the ends of epochs and the longest batch are not known.
NOT_STREAMED: dict[str, tuple[Any, ...]] = {
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
    "dataloader_in_order": (False,),
    **dict.fromkeys(("auto_find_batch_size", "torch_compile"), (True,)),
    **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), ("epoch",)),
}


def train_rule(name: str) -> Rule:
    """The rule of a field of ``train``."""
    return _look_up(RULES, name) or Rule()


@lru_cache(maxsize=1)
def train_section() -> type[BaseModel]:
    """The fields of TrainingArguments with their types. Raises EnvironmentFault without transformers."""
    spec = find_spec("transformers")  # finds the folder and runs nothing of it
    if spec is None or spec.origin is None:
        raise EnvironmentFault("transformers is not installed", fix="make setup")
    return read_train_section(Path(spec.origin).parent)


def train_fields() -> dict[str, Any]:
    """The names of the fields and their defaults; None where the source computes one."""
    return {name: info.default for name, info in train_section().model_fields.items()}


def train_values(train: Mapping[str, Any]) -> dict[str, Any]:
    """Every field with its value, ours or the library's default where none is given."""
    return {**train_fields(), **TRAIN_DEFAULTS, **train}


def check_train(train: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The section with 1 as 1.0 where a field takes a float, and the packages that its values need.

    In ``*_steps`` 1 stays as it is: it is a step there, and 0.5 half of the run. Raises ValidationError.
    """
    given = {to_field(key): value for key, value in train.items()}
    if len(given) < len(train):
        twice = next(key for key in train if to_field(key) != key)
        return {}, [Fault(f"train.{twice}", f"is {to_field(twice)}, which is given too", fix="remove one")]
    checked = train_section().model_validate(given)
    values = {key: value if key.endswith("_steps") else getattr(checked, key) for key, value in given.items()}
    trackers, optim = values.get("report_to") or [], str(values.get("optim"))
    needed = [("report_to", name) for name in TRACKERS if name in trackers]
    needed += [("optim", package) for part, package in OPTIMIZERS.items() if part in optim]
    return values, [
        Fault(f"train.{key}", f": {values[key]!r} needs the package {package}", fix=f"pip install {package}")
        for key, package in needed
        if find_spec(package) is None
    ]


def to_field(name: str) -> str:
    """Returns the name of a field by which the installed transformers knows it."""
    newer = SPELLINGS.get(name, name)
    return newer if newer in train_section().model_fields else name


def read_train_section(package: Path) -> type[BaseModel]:
    """Reads the body of TrainingArguments, and the enums its annotations name, in a transformers folder."""
    paths = [package / "trainer_utils.py", package / "training_args.py"]
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    names = {**vars(typing)}
    for name, node in classes.items():
        if any(ast.unparse(base).endswith("Enum") for base in node.bases):
            lines = [line.value for line in node.body if isinstance(line, ast.Assign)]
            names[name] = Literal[tuple(line.value for line in lines if isinstance(line, ast.Constant))]
    fields: dict[str, Any] = {}
    for node in classes["TrainingArguments"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            kind, limits = TYPES.get(name) or _to_type(node.annotation, names), _look_up(LIMITS, name)
            fields[name] = (Annotated[(kind, *limits)] if limits else kind, _default(node.value))
    for older, name in SPELLINGS.items():
        if name in fields:
            fields.pop(older, None)
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return create_model("Train", __config__=config, **fields)


def _to_type(annotation: ast.expr, names: Mapping[str, Any]) -> Any:
    """``OptimizerNames | str`` is the words of the enum alone; a class of another module is any value."""
    used = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    known = {name: names.get(name, Any) for name in used if not hasattr(builtins, name)}
    found = eval(ast.unparse(annotation), known)
    words = [item for item in get_args(found) if str in map(type, get_args(item))]
    return words[0] if words else found


def _look_up(table: Mapping[str, T], name: str) -> T | None:
    """The value of the first row with a pattern that the name matches."""
    rows = (value for names, value in table.items() if any(fnmatchcase(name, one) for one in names.split()))
    return next(rows, None)


def _default(node: Any) -> Any:
    """The default of a field, or None where the source computes it."""
    options = {item.arg: item.value for item in node.keywords} if isinstance(node, ast.Call) else {}
    try:
        return [] if "default_factory" in options else ast.literal_eval(options.get("default", node))
    except ValueError:
        return None


def _steps(value: float | None) -> float | None:
    if value is not None and (value < 0 or (value > 1 and value != int(value))):
        raise PydanticCustomError("steps", "expected a whole number, or a share of the run below 1")
    return value


def _max_steps(value: int) -> int:
    if value < 1 and value != -1:
        what = "expected a number above 0, or -1 to go by num_train_epochs"
        raise PydanticCustomError("max_steps", what)
    return value


LIMITS: dict[str, tuple[Any, ...]] = {
    "learning_rate adam_epsilon neftune_noise_alpha ddp_timeout ddp_bucket_cap_mb": (Field(gt=0),),
    "save_steps logging_steps eval_steps": (Field(gt=0), AfterValidator(_steps)),
    "warmup_steps": (AfterValidator(_steps),),
    "max_steps": (AfterValidator(_max_steps),),
    "weight_decay max_grad_norm dataloader_num_workers eval_delay": (Field(ge=0),),
    "per_*_batch_size gradient_accumulation_steps eval_accumulation_steps save_total_limit": (Field(ge=1),),
    "dataloader_prefetch_factor torch_empty_cache_steps": (Field(ge=1),),
    "seed data_seed": (Field(ge=0, lt=2**32),),
    "label_smoothing_factor adam_beta1 adam_beta2": (Field(ge=0, lt=1),),
}
TRACKERS = ("clearml", "codecarbon", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
TRACKER: Any = Literal[
    ("none", "all", "azure_ml", "dagshub", "dvclive", "flyte", "kubeflow", "neptune", *TRACKERS)
]
LEVEL: Any = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
BACKENDS = "inductor eager aot_eager cudagraphs aot_ts_nvfuser nvprims_nvfuser ofi fx2trt onnxrt tensorrt"
BACKENDS += " aot_torchxla_trace_once torchxla_trace_once tvm hpu_backend neuron"
BACKEND: Any = Literal[tuple(BACKENDS.split())]
MODE = Literal["default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# Where the annotation says less than what is accepted, or more.
TYPES: dict[str, Any] = {
    "report_to": TRACKER | list[TRACKER],
    "log_level": LEVEL,
    "log_level_replica": LEVEL,
    "torch_compile_backend": BACKEND | None,
    "torch_compile_mode": MODE | None,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length", "batch_rebalance"],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
    "fsdp": bool | str | None,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None,
}
# Packages of the optimizers that are built with the model: part of the name -> package.
OPTIMIZERS = {"galore_": "galore_torch", "apollo_": "apollo_torch", "lomo": "lomo_optim"}
