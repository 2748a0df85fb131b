"""The trainers to compare, each set up as in its documentation, with the same rows and weights.

Precisions: ``fp32``; ``bf16`` (autocast over float32 weights); ``default``, which leaves it to the trainer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import IGNORE, MAX_LENGTH, Case, Rows, build_config, load_model, load_tokenizer

EXAMPLES, PACKED_ROWS = 10, 3  # per optimizer step: about the same number of tokens, 1,550 and 1,520


@dataclass(frozen=True)
class Job:
    """A trainer to build. ``sampled``: for a short run, which should see a representative sample."""

    case: Case
    rows: Rows
    precision: str
    folder: Path
    values: dict[str, Any]
    sampled: bool = False


@dataclass(frozen=True)
class Arm:
    """The settings of a trainer. ``batch``: rows per micro-batch x micro-batches per optimizer step."""

    title: str
    family: str  # stock | trl | ours
    build: Callable[["Arm", Job], Any]
    batch: tuple[int, int]
    note: str = ""  # why its loss differs
    precisions: tuple[str, ...] = ("fp32", "bf16")
    options: tuple[tuple[str, Any], ...] = ()


def build_trainer(arm: Arm, job: Job) -> Any:
    """Returns the arm's Trainer, with weights that depend only on the case."""
    import torch

    torch.manual_seed(0)
    return arm.build(arm, job)


def trainer_values(arm: Arm, job: Job) -> dict[str, Any]:
    """Returns the arguments that every TrainingArguments receives."""
    precision = {} if job.precision == "default" else {"bf16": job.precision == "bf16"}
    return {
        "output_dir": str(job.folder),
        "per_device_train_batch_size": arm.batch[0],
        "gradient_accumulation_steps": arm.batch[1],
        "learning_rate": job.case.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **precision,
        **job.values,
    }


def stock(arm: Arm, job: Job) -> Any:
    """Returns a ``transformers.Trainer`` that pads to the longest row of a micro-batch."""
    return _stock(arm, job, job.rows, **dict(arm.options))


def stock_grouped(arm: Arm, job: Job) -> Any:
    """The same with ``train_sampling_strategy=group_by_length``."""
    return _stock(arm, job, *grouped(arm, job))


def concatenated(arm: Arm, job: Job) -> Any:
    """Works like ``run_clm.py``: concatenates all rows, cuts them into blocks, and drops the rest."""
    flat = {key: [token for row in job.rows for token in row[key]] for key in ("input_ids", "labels")}
    blocks = range(0, len(flat["input_ids"]) - MAX_LENGTH + 1, MAX_LENGTH)
    rows = [{key: flat[key][at : at + MAX_LENGTH] for key in flat} for at in blocks]
    return _stock(arm, job, rows)


def trl(arm: Arm, job: Job) -> Any:
    """Returns a ``trl.SFTTrainer``, without activation checkpointing unless the precision is its default."""
    return _trl(arm, job, job.rows, **dict(arm.options))


def trl_grouped(arm: Arm, job: Job) -> Any:
    """The same with ``train_sampling_strategy=group_by_length``."""
    rows, strategy = grouped(arm, job)
    return _trl(arm, job, rows, train_sampling_strategy=strategy)


def ours(arm: Arm, job: Job) -> Any:
    """Returns the trainer of hf_clm, from the parts that ``hf_clm.train`` uses."""
    from hf_clm import CLMTrainer, PackedDataset, PretrainDataset, SFTDataset
    from hf_clm.data.split import build_collator
    from hf_clm.machine import keep_memory
    from hf_clm.model.build import build_model
    from hf_clm.model.load import takes_targets
    from hf_clm.recipe.recipe import Recipe
    from hf_clm.training.arguments import training_arguments

    if arm.options != GLIBC:
        keep_memory()
    case, is_sft = job.case, job.case.kind == "sft"
    tokenizer, config = load_tokenizer(case, vocab=case.vocab), build_config(case)
    random_weights = {"init": "scratch", "config": {"model_type": case.model}}
    recipe = Recipe.model_validate(
        {
            "stage": case.kind,
            "model": {"name_or_path": case.folder} if case.folder else random_weights,
            "tokenizer": {} if case.folder else {"name_or_path": "built below"},
            "data": {"train": ["rows.jsonl"], "max_length": MAX_LENGTH},
            "train": trainer_values(arm, job) | {"eval_on_start": False, "learning_rate": case.learning_rate},
            "lora": {} if case.lora else None,
        }
    )
    arguments = training_arguments(recipe)
    arguments.learning_rate = trainer_values(arm, job)["learning_rate"]  # a recipe must not name 0
    rows = (SFTDataset if is_sft else PretrainDataset)(job.rows, tokenizer, max_length=MAX_LENGTH)
    dataset = PackedDataset(rows, max_length=MAX_LENGTH, packing=recipe.resolved_packing)
    model = build_model(recipe, tokenizer, config=config, arguments=arguments)
    return CLMTrainer(
        model=model,
        args=arguments,
        data_collator=build_collator(recipe, tokenizer, with_targets=takes_targets(model)),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def grouped(arm: Arm, job: Job) -> tuple[Rows, str]:
    """Rows and sampling strategy of group_by_length.

    It begins with the longest batches, so a short run would see no others. That one is given, over and over,
    a few of the very batches that transformers would make, from the shortest to the longest.
    """
    if not job.sampled:
        return job.rows, "group_by_length"
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    size, seed = arm.batch[0], job.values["seed"]
    lengths = [len(row["input_ids"]) for row in job.rows]
    order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(seed))
    batches = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
    batches.sort(key=lambda numbers: sum(lengths[number] for number in numbers))
    count = arm.batch[1] * job.case.steps
    chosen = [batches[(2 * part + 1) * len(batches) // (2 * count)] for part in range(count)]
    random.Random(seed).shuffle(chosen)
    return [job.rows[number] for numbers in chosen for number in numbers], "sequential"


def _stock(arm: Arm, job: Job, rows: Rows, strategy: str = "random", **options: Any) -> Any:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = load_tokenizer(job.case)
    values = trainer_values(arm, job) | {"train_sampling_strategy": strategy} | options
    return Trainer(
        model=load_model(job.case, is_bf16=job.precision == "bf16"),
        args=TrainingArguments(**values),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _trl(arm: Arm, job: Job, rows: Rows, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    checkpointing = {} if job.precision == "default" else {"gradient_checkpointing": False}
    lengths = {} if options.get("padding_free") else {"max_length": MAX_LENGTH}
    values = trainer_values(arm, job) | checkpointing | lengths | options
    return SFTTrainer(
        load_model(job.case, is_bf16=job.precision == "bf16"),
        args=SFTConfig(**values),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(job.case),
    )


CONTAMINATES = "documents of a block read each other; the last block is dropped"
DEFAULT = ("default",)
PACKING = (("packing", True),)
FLAT = (("padding_free", True), ("max_length", None))
GLIBC = (("memory", "as glibc keeps it"),)

# Each batch size is the fastest of 1, 2, 4, 5, 10 and 20 rows.
SFT_ARMS = {
    "pad": Arm("Trainer, padded to the longest", "stock", stock, (5, 2)),
    "group": Arm("Trainer, group_by_length", "stock", stock_grouped, (5, 2)),
    "concat": Arm("Trainer, run_clm's blocks", "stock", concatenated, (1, 3), CONTAMINATES),
    "trl-group": Arm("TRL, group_by_length", "trl", trl_grouped, (2, 5)),
    "trl-bfd-1x3": Arm("TRL, packing bfd, 1 row x 3", "trl", trl, (1, PACKED_ROWS), options=PACKING),
    "trl-bfd-3": Arm("TRL, packing bfd, 3 rows", "trl", trl, (PACKED_ROWS, 1), options=PACKING),
    "trl-flat": Arm("TRL, padding-free", "trl", trl, (5, 2), options=FLAT),
    "trl-default": Arm("TRL, as it comes", "trl", trl, (8, 1), precisions=DEFAULT),
    "ours": Arm("hf_clm", "ours", ours, (PACKED_ROWS, 1)),
    "ours-glibc": Arm("hf_clm, allocator as it is", "ours", ours, (PACKED_ROWS, 1), options=GLIBC),
    "ours-default": Arm("hf_clm, as it comes", "ours", ours, (PACKED_ROWS, 1), precisions=DEFAULT),
}
PRETRAIN_ARMS = {
    "rows": Arm("Trainer, full rows", "stock", stock, (1, PACKED_ROWS)),
    "trl": Arm("TRL, full rows", "trl", trl, (1, PACKED_ROWS)),
    "trl-default": Arm("TRL, as it comes", "trl", trl, (PACKED_ROWS, 1), precisions=DEFAULT),
    "ours": Arm("hf_clm", "ours", ours, (1, PACKED_ROWS)),
    "ours-default": Arm("hf_clm, as it comes", "ours", ours, (1, PACKED_ROWS), precisions=DEFAULT),
}
# Two packed rows have as many tokens as ten records.
REAL_ARMS = {
    "group": Arm("Trainer, group_by_length", "stock", stock_grouped, (10, 1)),
    "trl-group": Arm("TRL, group_by_length", "trl", trl_grouped, (10, 1)),
    "trl-bfd-1x2": Arm("TRL, packing bfd, 1 row x 2", "trl", trl, (1, 2), options=PACKING),
    "ours": Arm("hf_clm", "ours", ours, (2, 1)),
}
ONE_ROUND = {"pad", "trl-bfd-3", "trl-flat"}  # never the best of a peer
ONE_CASE = ONE_ROUND | {"ours-glibc", "trl-group"}


def arms_of(case: Case) -> dict[str, Arm]:
    """Returns the arms to measure in a case, by name."""
    if case.folder:
        return REAL_ARMS
    if case.kind == "pretrain":
        return PRETRAIN_ARMS
    return {name: arm for name, arm in SFT_ARMS.items() if case.name == "sft-8k" or name not in ONE_CASE}
