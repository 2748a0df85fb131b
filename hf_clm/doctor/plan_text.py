"""``hf-clm doctor --plan``: the plan of a recipe's model, or of a family of models, as a table."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hf_clm.data.prepared.sets import load_early
from hf_clm.doctor.cluster import WHERE, Cluster
from hf_clm.doctor.memory import MicroStep
from hf_clm.doctor.plan import SPARE, WAYS, Plan, PlannedModel, choose, plan, to_planned_model
from hf_clm.errors import RecipeError
from hf_clm.model.build import build_model_config, build_tokenizer_aside
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.training.arguments import training_arguments

GB = 1e9
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
HEADINGS = (
    *("way", "GB at rest", "with a row", "micro-batch"),
    *("tokens/s a GPU", "in all", "bound by", "launch with"),
)
STEP = MicroStep(tokens=0, longest=0, chunked_loss=True, autocast="bfloat16")


def plan_family(cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """The chosen way for each size of a family: lines to print, and values for JSON."""
    rows, found = [], {}
    for name in FAMILY:
        plans = plan(to_planned_model(family_config(name), STEP), cluster)
        chosen = choose(plans)
        least = min(plans, key=lambda one: one.first)
        rows.append((name, *_cells(chosen or least, cluster)))
        found[name] = to_json(chosen) if chosen else None
    return [*_table(("model", *HEADINGS), rows), *_assumptions(cluster)], found


def plan_recipe(recipe: Recipe, cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """Every way to train the recipe's model, and which to take.

    Raises RecipeError for one with ``lora``, and for a cluster that says how long a row is.
    """
    cluster = recipe_cluster(recipe, cluster)
    model = recipe_model(recipe)
    plans = plan(model, cluster)
    chosen = choose(plans)
    name = recipe.model.name_or_path or recipe.model.config.get("model_type")
    lines = [f"model     {name}, {model.parameters:,} parameters", ""]
    lines += _table(HEADINGS, [_cells(one, cluster) for one in plans])
    if chosen is None:
        lines.append("take      nothing fits: more GPUs, or a smaller data.max_length")
    else:
        file, change = WAYS[chosen.way]
        lines.append(f"take      recipes/accelerate/{file}{f' with {change}' if change else ''}")
        lines.append(f"          {_settings(chosen, cluster)}")
    return [*lines, *_assumptions(cluster)], {
        "parameters": model.parameters,
        "plans": [to_json(one) for one in plans],
        "take": chosen.way if chosen else None,
    }


def family_config(name: str) -> PretrainedConfig:
    """The configuration of a size of the family."""
    return AutoConfig.for_model("qwen2", **dict(zip(KEYS, FAMILY[name], strict=True)))


def recipe_model(recipe: Recipe) -> PlannedModel:
    """The recipe's model, with its optimizer and precision; bfloat16 unless it says otherwise."""
    if recipe.lora:
        what = "a plan is one of training all weights"
        raise RecipeError(what, where="lora", fix="--lora null; the updates of LoRA take little")
    values = training_values(recipe)
    arguments = training_arguments(recipe)
    loaded = load_early(recipe, arguments.seed) if recipe.tokenizer.train else {}
    tokenizer = build_tokenizer_aside(recipe, loaded, arguments=arguments)
    config = build_model_config(recipe, tokenizer)
    step = MicroStep(
        tokens=0,
        longest=0,
        chunked_loss=STEP.chunked_loss,
        dtype=recipe.model.dtype,
        autocast=None if values.get("bf16") is False and not values.get("fp16") else "bfloat16",
        optimizer=str(values.get("optim", STEP.optimizer)),
        attention=recipe.model.attention,
        checkpointing=bool(values.get("activation_checkpointing")),
    )
    return to_planned_model(config, step)


def recipe_cluster(recipe: Recipe, cluster: Cluster) -> Cluster:
    """The cluster, with rows as long as the recipe's. Raises RecipeError where it has a length of its own."""
    if cluster.length is not None:
        fix = f"--data.max_length {cluster.length}"
        raise RecipeError("length is the recipe's", where=WHERE, got=f"length={cluster.length}", fix=fix)
    return replace(cluster, length=recipe.data.max_length)


def to_json(found: Plan) -> dict[str, Any]:
    """A plan as values for JSON."""
    return {**asdict(found), "tokens_per_second": found.tokens_per_second, "bound_by": found.bound_by}


def _cells(found: Plan, cluster: Cluster) -> tuple[str, ...]:
    if not found.rows:
        return (found.way, _gigabytes(found.rest), _gigabytes(found.first), "does not fit")
    return (
        found.way,
        _gigabytes(found.rest),
        _gigabytes(found.first),
        f"{found.rows} x {found.length}{' c' if found.checkpointing else ''}",
        f"{found.tokens_per_second:,.0f}",
        f"{found.tokens_per_second * cluster.gpus:,.0f}",
        found.bound_by,
        WAYS[found.way][0],
    )


def _settings(chosen: Plan, cluster: Cluster) -> str:
    tokens = chosen.rows * chosen.length * cluster.gpus
    memory = "; activation_checkpointing" if chosen.checkpointing else ""
    speed = f"{chosen.tokens_per_second * cluster.gpus:,.0f} tokens/s on {cluster.counted}"
    host = f", {_gigabytes(chosen.host)} GB a GPU on the host" if chosen.host else ""
    return (
        f"per_device_train_batch_size up to {chosen.rows} ({tokens:,} tokens a step){memory}: {speed}{host}"
    )


def _assumptions(cluster: Cluster) -> list[str]:
    boxes = f"{cluster.boxes} boxes of {cluster.node}" if cluster.boxes > 1 else "one box"
    between = f" and {cluster.network / GB:g} GB/s a GPU between boxes" if cluster.boxes > 1 else ""
    peak = f"{cluster.mfu:.0%} of {cluster.flops / 1e12:,.0f} TFLOP/s"
    traffic = f"{cluster.bandwidth / GB:g} GB/s between the GPUs of a box{between}, overlapped"
    assumed = "; ".join([peak, traffic] if cluster.gpus > 1 else [peak])
    return [
        "",
        f"{cluster.counted} of {_gigabytes(cluster.memory)} GB in {boxes}; c: activation checkpointing.",
        f"Arithmetic, not measured; assumed: {assumed}; {SPARE:.0%} of the memory left free.",
    ]


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.1f}" if count < 100 * GB else f"{count / GB:,.0f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    filled = [headings, *((*row, *[""] * (len(headings) - len(row))) for row in rows)]
    widths = [max(len(row[number]) for row in filled) for number in range(len(headings))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in filled
    ]
