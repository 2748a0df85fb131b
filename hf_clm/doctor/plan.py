"""``hf-clm doctor --plan``: what fits on many GPUs by arithmetic, and which launcher file to take."""

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

WHERE = "--plan"
CLUSTER = re.compile(r"gpus=(\d+),memory=(\d+(?:\.\d+)?)(gi?b)(?:,length=(\d+))?", re.IGNORECASE)
GB = 1e9
UNITS = {"gb": GB, "gib": 2.0**30}
ROW = 4096  # tokens, where no recipe says otherwise
SPARE = 0.1  # of the memory, for CUDA, NCCL and the holes of the allocator
MOST_ROWS = 1024  # of a micro-batch

# The launcher's file in recipes/accelerate, and what to change in it: the fastest first, because it sends the
# least. zero3 never fits where fsdp2 does not, and is shown to compare.
WAYS = {
    "ddp": ("ddp.yaml", ""),
    "fsdp2-grad": ("fsdp2.yaml", "fsdp_reshard_after_forward: false"),
    "fsdp2": ("fsdp2.yaml", ""),
    "fsdp2-offload": ("fsdp2_offload.yaml", ""),
    "zero3": ("deepspeed_zero3.yaml", ""),
}
# Qwen2.5: width, layers, query heads, key heads, width in the MLP, vocabulary, whether the head is tied.
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
# Gradients are counted as held throughout: one function for every way, and a little to spare.
STEP = MicroStep(tokens=0, longest=0, chunked_loss=True, autocast="bfloat16", accumulates=True, device="cuda")


@dataclass(frozen=True)
class Cluster:
    """GPUs, with the bytes of each, and the tokens of a row."""

    gpus: int
    memory: float
    length: int = ROW


@dataclass(frozen=True)
class Plan:
    """One way to train a model on a cluster.

    Args:
        rest: bytes on each GPU besides those of a micro-step's tokens; ``host``: on its host.
        first: bytes on each GPU with a micro-batch of one row.
        rows: of the largest micro-batch that fits; 0 where none does.
    """

    way: str
    checkpointing: bool
    rest: float
    host: float
    first: float
    rows: int


def parse_cluster(text: str, *, length: int | None = None) -> Cluster:
    """Reads such as ``gpus=64,memory=80GB,length=8192``. Raises RecipeError for what cannot be read.

    Args:
        length: of a recipe's rows; the text must not name another.
    """
    match = CLUSTER.fullmatch(text.replace(" ", ""))
    gpus, size, unit, given = match.groups() if match else ("0", "0", "GB", None)
    cluster = Cluster(int(gpus), float(size) * UNITS[unit.lower()], length or int(given or ROW))
    if not (cluster.gpus and cluster.memory and cluster.length):
        fix = "gpus=64,memory=80GB, and without a recipe also length=4096"
        raise RecipeError("expected GPUs and the memory of each", where=WHERE, got=repr(text), fix=fix)
    if length and given:
        fix = f"--data.max_length {given}"
        raise RecipeError("length is the recipe's", where=WHERE, got=f"length={given}", fix=fix)
    return cluster


def plan_family(cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """The way to take for each size of a family: lines to print, and values for JSON."""
    rows, found = [], {}
    for name in FAMILY:
        plans = make_plans(read_sizes(family_config(name)), STEP, cluster)
        chosen = choose(plans)
        least = min(plans, key=lambda plan: plan.first)
        rows.append((name, *_cells(chosen or least, cluster)))
        found[name] = asdict(chosen) if chosen else None
    return [*_table(("model", *HEADINGS), rows), *_notes(cluster)], found


def plan_recipe(recipe: Recipe, cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """Every way to train the recipe's model, and which to take. Raises RecipeError for one with ``lora``."""
    sizes, step = read_model(recipe)
    plans = make_plans(sizes, step, cluster)
    chosen = choose(plans)
    name = recipe.model.name_or_path or recipe.model.config.get("model_type")
    lines = [f"model     {name}, {sizes.parameters:,} parameters", ""]
    lines += _table(HEADINGS, [_cells(plan, cluster) for plan in plans])
    lines += _advice(chosen, cluster)
    return [*lines, *_notes(cluster)], {
        "parameters": sizes.parameters,
        "plans": [asdict(plan) for plan in plans],
        "take": chosen.way if chosen else None,
    }


def family_config(name: str) -> PretrainedConfig:
    """The configuration of a size of the family."""
    return AutoConfig.for_model("qwen2", **dict(zip(KEYS, FAMILY[name], strict=True)))


def read_model(recipe: Recipe) -> tuple[ModelSizes, MicroStep]:
    """The recipe's model and a micro-step of it on a GPU: in bfloat16 unless the recipe says otherwise."""
    if recipe.lora:
        what = "a plan is one of training all weights"
        raise RecipeError(what, where="lora", fix="--lora null; the updates of LoRA take little")
    arguments = training_arguments(recipe)
    tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    config = build_model_config(recipe, tokenizer)
    step = replace(empty_step(recipe, arguments, config), accumulates=True, device="cuda")
    if recipe.train.get("bf16") is not False:
        step = replace(step, autocast="bfloat16")
    return read_sizes(config), step


def make_plans(sizes: ModelSizes, step: MicroStep, cluster: Cluster) -> list[Plan]:
    """Every way, with activation checkpointing where the step has it or not even one row fits without."""
    plans = []
    for way in WAYS:
        plan = make_plan(way, sizes, step, cluster)
        plans.append(plan if plan.rows else make_plan(way, sizes, replace(step, checkpointing=True), cluster))
    return plans


def make_plan(way: str, sizes: ModelSizes, step: MicroStep, cluster: Cluster) -> Plan:
    """One way, with the most rows that fit."""
    sharding = Sharding(way, cluster.gpus)
    step = replace(step, longest=cluster.length, chunked_loss=step.chunked_loss and way != "zero3")

    def estimate(rows: int) -> MemoryEstimate:
        return estimate_memory(sizes, replace(step, tokens=rows * cluster.length), sharding)

    fitting, too_many = 0, MOST_ROWS + 1  # more rows never need less
    while too_many - fitting > 1:
        rows = (fitting + too_many) // 2
        fits = estimate(rows).total <= (1 - SPARE) * cluster.memory
        fitting, too_many = (rows, too_many) if fits else (fitting, rows)
    one = estimate(1)
    state = one.weights + one.gradients + one.optimizer
    return Plan(
        way=way,
        checkpointing=step.checkpointing,
        rest=one.share * state + one.copies,
        host=state / cluster.gpus if way == "fsdp2-offload" else 0.0,
        first=one.total,
        rows=fitting,
    )


def choose(plans: Sequence[Plan]) -> Plan | None:
    """The first that fits: without the host where possible, then without activation checkpointing."""
    fitting = [plan for plan in plans if plan.rows]
    return min(fitting, key=lambda plan: (plan.host > 0, plan.checkpointing), default=None)


def _cells(plan: Plan, cluster: Cluster) -> tuple[str, ...]:
    cells = (plan.way, _gigabytes(plan.rest), _gigabytes(plan.first))
    if not plan.rows:
        return (*cells, "does not fit", "")
    micro_batch = f"{plan.rows} x {cluster.length}{' c' if plan.checkpointing else ''}"
    return (*cells, micro_batch, WAYS[plan.way][0])


def _advice(plan: Plan | None, cluster: Cluster) -> list[str]:
    if plan is None:
        return ["take      nothing fits: more GPUs, or a smaller data.max_length"]
    file, change = WAYS[plan.way]
    tokens = plan.rows * cluster.length * cluster.gpus
    rows = f"per_device_train_batch_size up to {plan.rows} ({tokens:,} tokens a step)"
    checkpointing = "; activation_checkpointing: true" if plan.checkpointing else ""
    host = f"; {_gigabytes(plan.host)} GB of host memory for each GPU" if plan.host else ""
    return [
        f"take      recipes/accelerate/{file}{f' with {change}' if change else ''}",
        f"          {rows}{checkpointing}{host}",
    ]


def _notes(cluster: Cluster) -> list[str]:
    gpus = f"{cluster.gpus} GPU{'' if cluster.gpus == 1 else 's'} of {_gigabytes(cluster.memory)} GB"
    return ["", f"{gpus}, {SPARE:.0%} left free; c: activation checkpointing. Arithmetic, not measured."]


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.1f}" if count < 100 * GB else f"{count / GB:,.0f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (headings, *rows)]
