"""The folder of a run with a tiny model that has memorised its records, for tests of generation."""

import json
from pathlib import Path
from typing import Any

from helpers import byte_tokenizer, save_folder, tiny_model
from transformers import TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.read.formats import to_example
from hf_clm.model.attention import NAME, register
from hf_clm.model.load import fit_to_tokenizer
from hf_clm.schema import Format
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.trainer import CLMTrainer


def learn_by_heart(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    format: Format,
    steps: int = 60,
    learning_rate: float = 1e-2,
    **sizes: Any,
) -> str:
    """Trains on all records in each step, and returns the folder."""
    tokenizer = byte_tokenizer()
    if format == "messages":
        use_chat_template(tokenizer, "chatml")
    model = tiny_model(**{"hidden_size": 64, **sizes})
    fit_to_tokenizer(model, tokenizer)
    register()
    model.set_attn_implementation(NAME)
    rows = SFTDataset([to_example(record, format=format, where="here") for record in records], tokenizer)
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=len(records),
        remove_unused_columns=False,
        **quiet,
    )
    CLMTrainer(model, arguments, data_collator=DataCollatorForPackedCausalLM(), train_dataset=rows).train()
    save_folder(folder, model, tokenizer)
    facts = {"status": "done", "format": format, "stage": "sft", "max_length": 64}
    (folder / "run.json").write_text(json.dumps(facts))
    return str(folder)
