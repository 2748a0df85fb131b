"""What a model takes on many GPUs, by arithmetic: memory of each, time of a step, tokens a second.

P weights, N processes, B processes of a box; bytes of float32 AdamW under bfloat16:

    way            at rest on a GPU   for the weights in use         between GPUs, a step
    ddp            16 P + 4 P         2 P of the products            sum of gradients 4 P
    fsdp2-grad     16 P / N           2 P                            weights 2 P, gradients 4 P
    fsdp2-hybrid   16 P / B           as fsdp2                       as fsdp2 in a box; gradients 4 P / B
    fsdp2          16 P / N           2 of embeddings and 2 layers   weights 2 x 2 P, gradients 4 P
    fsdp2-offload  none (on hosts)    as fsdp2                       as fsdp2; weights, gradients to the host
    zero3          18 P / N           as fsdp2                       weights 2 x 2 P, gradients 2 P

4 P more for ddp: its buckets hold the gradients once more. fsdp2-grad does not give the weights back after
the forward; fsdp2-hybrid (HSDP) spreads inside a box, a copy on each. A ring of n hands on (n - 1) / n of the
bytes, twice where a sum goes to all (Patarasuk and Yuan, 2009). Each GPU of a box has a network card, and
NCCL runs rings over all of them at once. ZeRO: arXiv:1910.02054.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from hf_clm.doctor.cluster import Cluster
from hf_clm.doctor.memory import (
    FLOAT32,
    OPTIMIZER_STATES,
    MicroStep,
    ModelSizes,
    estimate_work,
    to_sizes,
)
from hf_clm.model.flops import FlopCount, count_flops
from hf_clm.model.load import build_without_memory

LOW = 2  # bytes of bfloat16
SPARE = 0.1  # of the memory, for CUDA, NCCL and the holes of the allocator
RECOMPUTED = 4 / 3  # of the FLOP, with activation checkpointing
HOST_UPDATE = 28 / 20e9  # seconds a weight: AdamW on the host reads 16 bytes and writes 12, at 20 GB/s
MOST_ROWS = 1024  # of a micro-batch

# The launcher's file, and what is changed in it. The simplest first: of two that are as fast, it is taken.
WAYS = {
    "ddp": ("ddp.yaml", ""),
    "fsdp2-grad": ("fsdp2.yaml", "fsdp_reshard_after_forward: false"),
    "fsdp2-hybrid": ("fsdp2.yaml", "parallelism_config, see the file"),
    "fsdp2": ("fsdp2.yaml", ""),
    "fsdp2-offload": ("fsdp2_offload.yaml", ""),
    "zero3": ("deepspeed_zero3.yaml", ""),
}
UNCHOSEN = ("zero3",)  # shown to compare


@dataclass(frozen=True)
class PlannedModel:
    """A model as the arithmetic sees it; ``step``: a micro-step of it, whose tokens do not count here."""

    config: PretrainedConfig
    sizes: ModelSizes
    flops: FlopCount
    step: MicroStep

    @property
    def parameters(self) -> int:
        return self.sizes.parameters

    @property
    def embeddings(self) -> int:
        """Weights of embedding and head."""
        return self.sizes.width * self.sizes.vocabulary * (1 if self.sizes.is_tied else 2)

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return (self.parameters - self.embeddings) // self.sizes.layers

    @property
    def state(self) -> float:
        """Bytes of weights, gradients and optimizer, for each weight: 16 with AdamW in float32."""
        return self.step.weight_bytes * (2 + OPTIMIZER_STATES.get(self.step.optimizer, 2.0))


@dataclass(frozen=True)
class Plan:
    """One way to train a model on a cluster.

    Args:
        rest: bytes on each GPU besides those of a micro-step's tokens; ``host``: on its host.
        rows: of the largest micro-batch that fits; 0 where none does.
        first: bytes on each GPU with a micro-batch of one row.
        compute, traffic: seconds of a step with these rows: of the GPU's arithmetic, and between GPUs.
        update: seconds of a step that nothing overlaps: the host's.
    """

    way: str
    checkpointing: bool
    rest: float
    host: float
    first: float
    rows: int
    length: int
    compute: float
    traffic: float
    update: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU; traffic overlaps the arithmetic."""
        seconds = max(self.compute, self.traffic) + self.update
        return self.rows * self.length / seconds if self.rows else 0.0

    @property
    def bound_by(self) -> str:
        if self.traffic <= self.compute and self.update <= self.compute:
            return "compute"
        return "host" if self.update else "network"


def to_planned_model(config: PretrainedConfig, step: MicroStep) -> PlannedModel:
    """Counts a model without its weights. Raises what ``from_config`` raises."""
    model = build_without_memory(config)
    return PlannedModel(config, to_sizes(config, model), count_flops(model), replace(step, device="cuda"))


def plan(model: PlannedModel, cluster: Cluster) -> list[Plan]:
    """Every way, each with activation checkpointing only where it is faster so, or does not fit else."""
    plans = []
    for name in WAYS:
        if name == "fsdp2-hybrid" and cluster.boxes == 1:
            continue
        both = {model.step.checkpointing, True}
        made = [to_plan(name, model, cluster=cluster, checkpointing=value) for value in sorted(both)]
        plans.append(max(made, key=lambda found: (found.tokens_per_second, -found.first)))
    return plans


def choose(plans: list[Plan]) -> Plan | None:
    """The fastest that fits, within 1 % the simplest; None where nothing fits."""
    fitting = [found for found in plans if found.rows and found.way not in UNCHOSEN]
    fastest = max((found.tokens_per_second for found in fitting), default=0.0)
    return next((found for found in fitting if found.tokens_per_second >= 0.99 * fastest), None)


def to_plan(way: str, model: PlannedModel, *, cluster: Cluster, checkpointing: bool) -> Plan:
    """One way, with the most rows that fit."""
    step = replace(model.step, longest=cluster.row, checkpointing=checkpointing)
    step = replace(step, chunked_loss=step.chunked_loss and way != "zero3")
    rest = rest_bytes(way, model, cluster=cluster)

    def needed(rows: int) -> float:
        tokens = replace(step, tokens=rows * cluster.row)
        return rest + estimate_work(model.config, model.sizes, step=tokens)

    rows = _most_rows(lambda rows: needed(rows) <= (1 - SPARE) * cluster.memory)
    tokens = rows * cluster.row
    pairs = tokens * (cluster.row + 1) / 2
    flop = model.flops.of(tokens=tokens, targets=tokens, pairs=pairs) * (RECOMPUTED if checkpointing else 1)
    return Plan(
        way=way,
        checkpointing=checkpointing,
        rest=rest,
        host=model.state * model.parameters / cluster.gpus if way == "fsdp2-offload" else 0.0,
        first=needed(1),
        rows=rows,
        length=cluster.row,
        compute=flop / (cluster.flops * cluster.mfu),
        traffic=traffic_seconds(way, model, cluster=cluster),
        update=HOST_UPDATE * model.parameters / cluster.gpus if way == "fsdp2-offload" else 0.0,
    )


def rest_bytes(way: str, model: PlannedModel, *, cluster: Cluster) -> float:
    """What lies on each GPU whatever the micro-batch is, as drawn above."""
    whole, state = model.parameters, model.state
    in_use = (
        LOW * (model.embeddings + 2 * model.layer) + (LOW + FLOAT32) * model.layer
    )  # and a layer's gradient
    products = whole - (0 if model.sizes.is_tied else model.embeddings // 2)
    cast = LOW * products if model.step.autocast else 0
    return {
        "ddp": state * whole + cast + (model.step.weight_bytes * whole if cluster.gpus > 1 else 0),
        "fsdp2-grad": state * whole / cluster.gpus + LOW * whole + (LOW + FLOAT32) * model.layer,
        "fsdp2": state * whole / cluster.gpus + in_use,
        "fsdp2-hybrid": state * whole / cluster.node + in_use,
        "fsdp2-offload": float(in_use),
        "zero3": (state + LOW) * whole / cluster.gpus + in_use,
    }[way]


def traffic_seconds(way: str, model: PlannedModel, *, cluster: Cluster) -> float:
    """What goes between GPUs in a step, as drawn above; over the slowest part of the rings."""
    low, high = LOW * model.parameters, model.step.weight_bytes * model.parameters
    if way == "fsdp2-hybrid":
        between = 2 * ring_seconds(high / cluster.node, cluster.boxes, rate=cluster.network)
        return ring_seconds(2 * low + high, cluster.node, rate=cluster.bandwidth) + between
    rate = cluster.bandwidth
    if cluster.boxes > 1:
        rate = min(rate, cluster.node * cluster.network)
    sent = {"ddp": 2 * high, "fsdp2-grad": low + high, "zero3": 3 * low}.get(way, 2 * low + high)
    between = ring_seconds(sent, cluster.gpus, rate=rate)
    if way == "fsdp2-offload":  # weights in float32 up for forward and backward, gradients down
        return max(between, 3 * high / cluster.gpus / cluster.host)
    return between


def ring_seconds(sent: float, processes: int, *, rate: float) -> float:
    """Of a gathering or a scattering of so many bytes in a ring."""
    return sent * (processes - 1) / processes / rate


def _most_rows(fits: Callable[[int], bool]) -> int:
    """The largest number of rows up to MOST_ROWS that fits; more rows never need less."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
