"""``hf-clm doctor --plan``: estimates what fits on many GPUs, and selects a launcher file."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hf_clm.doctor.facts import empty_step
from hf_clm.doctor.memory import MemoryEstimate, MicroStep, ModelSizes, Sharding, estimate_memory, read_sizes
from hf_clm.errors import RecipeError
from hf_clm.model.build import build_model_config
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments

OPTION = "--plan"
CLUSTER = re.compile(r"gpus=(\d+),memory=(\d+(?:\.\d+)?)(gi?b)(?:,length=(\d+))?", re.IGNORECASE)
GB = 1e9
MEMORY_UNITS = {"gb": GB, "gib": 2.0**30}
ROW = 4096  # tokens in a row without a recipe
SPARE = 0.1  # fraction of the memory left for CUDA, NCCL and allocator fragmentation
MAX_ROWS = 1024  # in a micro-batch

# The launcher file in recipes/accelerate, and what to change in it. The fastest comes first, because it
# communicates the least. zero3 never fits where fsdp2 does not, and is listed for comparison.
WAYS = {
    "ddp": ("ddp.yaml", ""),
    "fsdp2-grad": ("fsdp2.yaml", "fsdp_reshard_after_forward: false"),
    "fsdp2": ("fsdp2.yaml", ""),
    "fsdp2-offload": ("fsdp2_offload.yaml", ""),
    "zero3": ("deepspeed_zero3.yaml", ""),
}
# Qwen2.5: the values of KEYS.
FAMILY = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}
KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings"),
)
HEADINGS = ("way", "GB at rest", "with a row", "micro-batch", "launch with")
# Gradients are assumed to exist throughout, which is simple and slightly pessimistic.
GPU_STEP = MicroStep(
    tokens=0, longest=0, chunked_loss=True, autocast="bfloat16", accumulates=True, device="cuda"
)


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs, the bytes of memory of each, and the tokens in a row."""

    gpus: int
    memory: float
    length: int = ROW


@dataclass(frozen=True)
class TrainingPlan:
    """One way to train a model on a cluster.

    Args:
        rest: bytes on each GPU without the tokens of a micro-step.
        host: bytes on the host for each GPU.
        first: bytes on each GPU with a micro-batch of one row.
        rows: rows in the largest micro-batch that fits; 0 if none does.
    """

    way: str
    checkpointing: bool
    rest: float
    host: float
    first: float
    rows: int


def parse_cluster(text: str, *, length: int | None = None) -> Cluster:
    """Parses a text such as ``gpus=64,memory=80GB,length=8192``. Raises RecipeError if it is invalid.

    Args:
        length: tokens in a row of a recipe; the text must then not set it.
    """
    match = CLUSTER.fullmatch(text.replace(" ", ""))
    gpus, size, unit, row = match.groups() if match else ("0", "0", "GB", None)
    cluster = Cluster(int(gpus), float(size) * MEMORY_UNITS[unit.lower()], length or int(row or ROW))
    if not (cluster.gpus and cluster.memory and cluster.length):
        what = "expected the number of GPUs and the memory of each"
        fix = "use gpus=64,memory=80GB, and without a recipe optionally length=4096"
        raise RecipeError(what, where=OPTION, got=repr(text), fix=fix)
    if length and row:
        fix = f"set --data.max_length {row}"
        raise RecipeError("the recipe sets the length", where=OPTION, got=f"length={row}", fix=fix)
    return cluster


def plan_family(cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """Selects a way for each size of a model family; returns lines to print, and values for JSON."""
    rows, plan_by_size = [], {}
    for name in FAMILY:
        plans = make_plans(read_sizes(family_config(name)), GPU_STEP, cluster)
        plan = select_plan(plans)
        smallest = min(plans, key=lambda plan: plan.first)
        rows.append((name, *_cells(plan or smallest, cluster)))
        plan_by_size[name] = asdict(plan) if plan else None
    return [*_table(("model", *HEADINGS), rows), *_notes(cluster)], plan_by_size


def plan_recipe(recipe: Recipe, cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """Lists every way to train the recipe's model, and selects one; returns lines and values for JSON.

    Raises RecipeError for a recipe with ``lora``.
    """
    sizes, step = read_model(recipe)
    plans = make_plans(sizes, step, cluster)
    selected = select_plan(plans)
    name = recipe.model.name_or_path or recipe.model.config.get("model_type")
    lines = [f"model     {name}, {sizes.parameters:,} parameters", ""]
    lines += _table(HEADINGS, [_cells(plan, cluster) for plan in plans])
    lines += _advice(selected, cluster)
    return [*lines, *_notes(cluster)], {
        "parameters": sizes.parameters,
        "plans": [asdict(plan) for plan in plans],
        "take": selected.way if selected else None,
    }


def family_config(name: str) -> PretrainedConfig:
    """Returns the configuration of a size of the family."""
    return AutoConfig.for_model("qwen2", **dict(zip(KEYS, FAMILY[name], strict=True)))


def read_model(recipe: Recipe) -> tuple[ModelSizes, MicroStep]:
    """Returns the sizes of the recipe's model, and its micro-step on a GPU (with bfloat16 by default)."""
    if recipe.lora:
        what = "--plan only supports training of all weights"
        raise RecipeError(what, where="lora", fix="set --lora null; LoRA itself needs little memory")
    arguments = training_arguments(recipe)
    tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    config = build_model_config(recipe, tokenizer)
    step = replace(empty_step(recipe, arguments, config), accumulates=True, device="cuda")
    if recipe.train.get("bf16") is not False:
        step = replace(step, autocast="bfloat16")
    return read_sizes(config), step


def make_plans(sizes: ModelSizes, step: MicroStep, cluster: Cluster) -> list[TrainingPlan]:
    """Makes a plan for every way, with activation checkpointing if the step has it or no row fits without."""
    plans = []
    for way in WAYS:
        plan = make_plan(way, sizes, step, cluster)
        plans.append(plan if plan.rows else make_plan(way, sizes, replace(step, checkpointing=True), cluster))
    return plans


def make_plan(way: str, sizes: ModelSizes, step: MicroStep, cluster: Cluster) -> TrainingPlan:
    """Makes a plan for one way, with as many rows as fit."""
    sharding = Sharding(way, cluster.gpus)
    step = replace(step, longest=cluster.length, chunked_loss=step.chunked_loss and way != "zero3")

    def estimate(rows: int) -> MemoryEstimate:
        return estimate_memory(sizes, replace(step, tokens=rows * cluster.length), sharding)

    fitting, too_many = 0, MAX_ROWS + 1  # bisection: more rows never need less memory
    while too_many - fitting > 1:
        rows = (fitting + too_many) // 2
        fits = estimate(rows).total <= (1 - SPARE) * cluster.memory
        fitting, too_many = (rows, too_many) if fits else (fitting, rows)
    one = estimate(1)
    state = one.weights + one.gradients + one.optimizer
    return TrainingPlan(
        way=way,
        checkpointing=step.checkpointing,
        rest=one.share * state + one.copies,
        host=state / cluster.gpus if way == "fsdp2-offload" else 0.0,
        first=one.total,
        rows=fitting,
    )


def select_plan(plans: Sequence[TrainingPlan]) -> TrainingPlan | None:
    """Returns the first plan that fits, preferably without offloading, and then without checkpointing."""
    fitting = [plan for plan in plans if plan.rows]
    return min(fitting, key=lambda plan: (plan.host > 0, plan.checkpointing), default=None)


def _cells(plan: TrainingPlan, cluster: Cluster) -> tuple[str, ...]:
    cells = (plan.way, _gigabytes(plan.rest), _gigabytes(plan.first))
    if not plan.rows:
        return (*cells, "does not fit", "")
    micro_batch = f"{plan.rows} x {cluster.length}{' c' if plan.checkpointing else ''}"
    return (*cells, micro_batch, WAYS[plan.way][0])


def _advice(plan: TrainingPlan | None, cluster: Cluster) -> list[str]:
    if plan is None:
        return ["take      nothing fits: use more GPUs, or lower data.max_length"]
    file, change = WAYS[plan.way]
    tokens = plan.rows * cluster.length * cluster.gpus
    rows = f"per_device_train_batch_size up to {plan.rows} ({tokens:,} tokens per step)"
    checkpointing = "; activation_checkpointing: true" if plan.checkpointing else ""
    host = f"; {_gigabytes(plan.host)} GB of host memory per GPU" if plan.host else ""
    return [
        f"take      recipes/accelerate/{file}{f' with {change}' if change else ''}",
        f"          {rows}{checkpointing}{host}",
    ]


def _notes(cluster: Cluster) -> list[str]:
    gpus = f"{cluster.gpus} GPU{'' if cluster.gpus == 1 else 's'} of {_gigabytes(cluster.memory)} GB"
    return ["", f"{gpus}, {SPARE:.0%} left free; c: activation checkpointing. Estimated, not measured."]


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.1f}" if count < 100 * GB else f"{count / GB:,.0f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (headings, *rows)]
