"""The input of the checks: the run before its first step, and the machine."""

import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_clm.data.batch.mixing import AnyDataset
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.split import Split
from hf_clm.doctor.memory import (
    ADAM_STATES,
    OPTIMIZER_STATES,
    MemoryEstimate,
    MicroStep,
    ModelSizes,
    Sharding,
    estimate_memory,
    free_memory,
    read_sizes,
)
from hf_clm.machine import has_bf16, spreads_with, usable_cores
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.attention import capability_of
from hf_clm.model.build import weights_dtype
from hf_clm.model.load import build_without_memory
from hf_clm.model.weights import freeze_weights, list_weights
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.recipe.sections import TRAIN
from hf_clm.text.tokenizer import max_token_id
from hf_clm.training.arguments import count_steps, rows_per_step

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # required by the estimate
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)  # such models keep their own loss


@dataclass(frozen=True)
class Machine:
    """The machine to train on.

    Args:
        free_disk, free_memory: bytes, on the disk of the output folder and on the device.
        cores: the number of physical cores.
        threads: OMP_NUM_THREADS, if set.
        processes: the run's processes on this machine.
        has_bf16: whether the device computes in bfloat16 at full speed.
        device, capability: the kind of device, and the compute capability of an NVIDIA GPU.
    """

    free_disk: int
    free_memory: int
    cores: int
    threads: int | None = None
    processes: int = 1
    gpus: int = 0
    has_bf16: bool = True
    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Facts:
    """The facts about a run before its first step.

    ``config.vocab_size`` is that of the files; the model gets more rows if the tokenizer has more ids.
    ``measured``: bytes of a micro-step on top of weights and optimizer, if measured.
    """

    recipe: Recipe
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerFast
    config: PretrainedConfig
    train: Split
    machine: Machine
    evaluation: Split | None = None
    estimate: MemoryEstimate | None = None
    measured: int | None = None

    @property
    def rows_per_step(self) -> int:
        return rows_per_step(self.arguments)

    @property
    def steps(self) -> int:
        """The number of optimizer steps; 0 if the Trainer would not take any."""
        return count_steps(self.arguments, len(self.train.dataset))

    @property
    def embedding_rows(self) -> int:
        return max(self.config.vocab_size, max_token_id(self.tokenizer) + 1)


def build_facts(
    recipe: Recipe,
    arguments: TrainingArguments,
    *,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainedConfig,
    splits: Mapping[str, Split],
) -> Facts:
    """Inspects the machine and estimates the memory, unless the model is unknown or not a transformer.

    ``splits``: the training set and the evaluation sets, the one with the longest row of which is estimated.
    """
    machine = read_machine(arguments)
    eval_splits = [split for name, split in splits.items() if name != TRAIN]
    longest = max(eval_splits, key=lambda split: split.lengths.max(initial=0), default=None)
    facts = Facts(recipe, arguments, tokenizer, config, splits[TRAIN], machine, longest)
    return replace(facts, estimate=estimate(facts, to_micro_step(facts)))


def estimate(facts: Facts, step: MicroStep) -> MemoryEstimate | None:
    """Estimates the memory of a micro-step, or returns None for an unknown model."""
    sizes = model_sizes(facts)
    return sizes and estimate_memory(sizes, step, read_sharding(facts.recipe, facts.arguments))


def model_sizes(facts: Facts) -> ModelSizes | None:
    """Returns the sizes of the run's model; None if it is not known, or not a transformer."""
    config = deepcopy(facts.config)
    is_transformer = all(hasattr(config.get_text_config(), name) for name in SIZES)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not is_transformer:
        return None
    config.vocab_size = facts.embedding_rows
    return read_sizes(config)


def to_micro_step(facts: Facts) -> MicroStep:
    """Returns a micro-step with the run's largest micro-batch."""
    arguments, recipe, train = facts.arguments, facts.recipe, facts.train
    evaluation = facts.evaluation or train
    return replace(
        empty_step(recipe, arguments, facts.config),
        tokens=_batch_tokens(train.dataset, arguments.train_batch_size, recipe=recipe),
        longest=min(int(train.rows.rows.lengths.max()), recipe.data.max_length),
        eval_tokens=_batch_tokens(evaluation.dataset, arguments.eval_batch_size, recipe=recipe),
    )


def empty_step(recipe: Recipe, arguments: TrainingArguments, config: PretrainedConfig) -> MicroStep:
    """Returns a micro-step of the run without tokens."""
    trained, states = _optimized_share(recipe, arguments, config)
    return MicroStep(
        tokens=0,
        longest=0,
        chunked_loss=all(getattr(config, name, None) in (None, 1) for name in LOGIT_SETTINGS),
        dtype=weights_dtype(recipe, arguments),
        trained=trained,
        autocast="bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None,
        optimizer_states=states,
        attention=recipe.model.attention,
        accumulates=arguments.gradient_accumulation_steps > 1,
        checkpointing=bool(getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing)),
        device=arguments.device.type,
    )


def _optimized_share(
    recipe: Recipe, arguments: TrainingArguments, config: PretrainedConfig
) -> tuple[float, float]:
    """Returns the fraction of the weights that are trained, and their optimizer states per weight."""
    name, section = str(getattr(arguments.optim, "value", arguments.optim)), recipe.optimizer
    if recipe.lora or section is None:
        return 0.0 if recipe.lora else 1.0, OPTIMIZER_STATES.get(name, ADAM_STATES)  # adapters are small
    model = build_without_memory(config)
    freeze_weights(model, section.freeze)
    trained = model.num_parameters(only_trainable=True)
    states = sum(
        weight.parameter.numel()
        * (OPTIMIZER_STATES["muon"] if section.name == "muon" and weight.is_matrix else ADAM_STATES)
        for weight in list_weights(model)
        if weight.parameter.requires_grad
    )
    return trained / model.num_parameters(), states / trained


def read_sharding(recipe: Recipe, arguments: TrainingArguments) -> Sharding:
    """Determines how the launcher shards the model from its environment variables."""
    spread = spreads_with(training_values(recipe))
    way = {"FSDP": "fsdp2", "DeepSpeed": "zero3"}.get(spread, "ddp")
    offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
    return Sharding("fsdp2-offload" if way == "fsdp2" and offloads else way, arguments.world_size)


def longest_rows(dataset: AnyDataset, count: int) -> list[int]:
    """Returns the indices of the rows with the most tokens."""
    return np.argsort(-row_tokens(dataset), kind="stable")[:count].tolist()


def row_tokens(dataset: AnyDataset) -> np.ndarray:
    """Returns the number of tokens of each of N rows, (N,) int64, without building them."""
    return dataset.pieces.row_tokens if isinstance(dataset, PackedDataset) else dataset.lengths


def read_machine(arguments: TrainingArguments) -> Machine:
    """Inspects the machine from this process."""
    folder = Path(str(arguments.output_dir)).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Machine(
        free_disk=shutil.disk_usage(existing).free,
        free_memory=free_memory(arguments.device),
        cores=usable_cores(),
        threads=int(threads) if threads.isdigit() else None,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        gpus=torch.cuda.device_count(),
        has_bf16=has_bf16(arguments.device),
        device=arguments.device.type,
        capability=capability_of(arguments.device),
    )


def _batch_tokens(dataset: AnyDataset, rows: int, *, recipe: Recipe) -> int:
    longest = np.sort(row_tokens(dataset))[-rows:]
    is_padded = recipe.resolved_packing == "none" and recipe.model.attention != PACKED
    return int(longest.max() * len(longest) if is_padded else longest.sum())
