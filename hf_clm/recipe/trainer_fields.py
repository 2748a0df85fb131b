"""The section ``train``: the fields of transformers.TrainingArguments, parsed from its source code.

Importing transformers takes seconds, and its dataclass checks few types: it accepts ``max_steps="four"``.
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
NO_LOGITS = Rule(unused="evaluation sums losses and correct tokens on the device, without keeping logits")
# Defaults that differ from those of transformers.TrainingArguments.
TRAIN_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",  # ends at zero like linear, but stays high for longer
    "warmup_steps": 0.03,  # share of the run: Adam's first steps are noisy
    "logging_steps": 10,  # with 500, a short run would log nothing
    "logging_first_step": True,  # the loss before training
    "logging_nan_inf_filter": False,  # the filter shows a NaN loss as 0.0
    "include_num_input_tokens_seen": "no",  # real and target tokens are counted without a device sync
    "average_tokens_across_devices": True,  # the same loss for any number of processes
    "ddp_find_unused_parameters": False,  # a causal language model uses all parameters
    "ddp_broadcast_buffers": False,  # the buffers of a causal language model never change
    "remove_unused_columns": False,  # would drop inputs of the packed attention
    "save_total_limit": 2,  # a checkpoint is three times as large as the model
    "disable_tqdm": True,  # hf_clm has its own progress bar
    "report_to": "none",  # the default only since transformers 5
}

# The older spelling of a field, which everyone types, and that of late 5.x. Either is accepted.
SPELLINGS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# The rules of fields: the first matching pattern applies. Other fields may not differ on a resume.
RULES = {
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps": NO_LOGITS,
    "include_for_metrics batch_eval_metrics": NO_LOGITS,
    "remove_unused_columns label_names": Rule(unused="the collator returns exactly the inputs of the model"),
    "length_column_name": Rule(unused="the lengths of rows are known"),
    "logging_nan_inf_filter": Rule(unused="a loss that is not finite ends the run"),
    "include_num_input_*": Rule(unused="tokens_seen and target_tokens_seen are always logged"),
    "do_*": Rule(unused="hf-clm train always trains, and evaluates according to train.eval_strategy"),
    "use_cache": Rule(unused="training has no use for a KV cache"),
    "enable_jit_checkpoint": Rule(unused="SIGTERM always saves a checkpoint"),
    "*liger_kernel*": Rule(unused="it returns no logits, which the token accuracy needs"),
    "local_rank parallelism_config": Rule(unused="the launcher sets up the processes"),
    "ignore_data_skip restore_callback_*": Rule(unused="a resume is always exact"),
    "logging_* save_* eval_* per_device_* gradient_accumulation_steps use_cpu ddp_timeout": FREE,
    "torch_compile": FREE,
    "dataloader_num_workers dataloader_pin_memory metric_for_best_model greater_is_better": FREE,
    "output_dir resume_from_checkpoint run_name disable_tqdm log_level* report_to *hub*": UNSEEN,
    "load_best_model_at_end": Rule("free", needs={"train.eval_strategy": ("steps", "epoch")}),
    "dataloader_p*": Rule("free", needs={"train.dataloader_num_workers": ()}),
    "dataloader_multi* dataloader_in_order": Rule(needs={"train.dataloader_num_workers": ()}),
    "activation_*_kwargs": Rule(needs={"train.activation_checkpointing": (True,)}),
    "fp16": Rule(needs={"train.bf16": (False,)}),
    "fp16_full_eval": Rule(needs={"train.bf16_full_eval": (False,)}),
}
# Values that are not possible with data.streaming, as the end of an epoch and the longest batch are unknown.
NOT_STREAMED: dict[str, tuple[Any, ...]] = {
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
    "dataloader_in_order": (False,),
    **dict.fromkeys(("auto_find_batch_size", "torch_compile"), (True,)),
    **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), ("epoch",)),
}


def train_rule(name: str) -> Rule:
    """Returns the rule of a field of ``train``."""
    return _look_up(RULES, name) or Rule()


@lru_cache(maxsize=1)
def train_section() -> type[BaseModel]:
    """Returns TrainingArguments as a pydantic model. Raises EnvironmentFault without transformers."""
    spec = find_spec("transformers")  # finds the folder without importing it
    if spec is None or spec.origin is None:
        raise EnvironmentFault("transformers is not installed", fix="make setup")
    return read_train_section(Path(spec.origin).parent)


def train_fields() -> dict[str, Any]:
    """Returns the names and defaults of the fields; None for a computed default."""
    return {name: info.default for name, info in train_section().model_fields.items()}


def train_values(train: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all fields with their values, or the default of hf_clm or transformers."""
    return {**train_fields(), **TRAIN_DEFAULTS, **train}


def check_train(train: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Returns the section with integers as floats for float fields, and faults for missing packages.

    In ``*_steps`` fields integers stay, as 1 is a step and 0.5 half of the run. Raises ValidationError.
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
    """Parses TrainingArguments, and the enums in its annotations, in the folder of transformers."""
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
    """Evaluates an annotation. For ``OptimizerNames | str``, returns only the values of the enum."""
    used = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    namespace = {name: names.get(name, Any) for name in used if not hasattr(builtins, name)}
    kind = eval(ast.unparse(annotation), namespace)
    words = [item for item in get_args(kind) if str in map(type, get_args(item))]
    return words[0] if words else kind


def _look_up(table: Mapping[str, T], name: str) -> T | None:
    """Returns the first value with a pattern that matches the name."""
    rows = (value for names, value in table.items() if any(fnmatchcase(name, one) for one in names.split()))
    return next(rows, None)


def _default(node: Any) -> Any:
    """Returns the default of a field, or None if it is computed."""
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
        what = "expected a number above 0, or -1 to use num_train_epochs"
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
# Types that are narrower or wider than the annotations.
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
# Packages of optimizers that are built with the model, by a part of the optimizer's name.
OPTIMIZERS = {"galore_": "galore_torch", "apollo_": "apollo_torch", "lomo": "lomo_optim"}
