"""hf_clm: pretraining and supervised fine-tuning of causal language models on the Hugging Face Trainer.

The public names are loaded when they are used, so ``import hf_clm`` costs nothing.
"""

from importlib import import_module
from typing import Any

PUBLIC_NAMES = {
    "load_recipe": "hf_clm.recipe.recipe",
    "train": "hf_clm.training.run",
    "load_tokenizer": "hf_clm.text.tokenizer",
    "load_model": "hf_clm.model.load",
    "to_example": "hf_clm.data.read.formats",
    "PretrainDataset": "hf_clm.data.label.datasets",
    "SFTDataset": "hf_clm.data.label.datasets",
    "DataCollatorForCausalLM": "hf_clm.data.batch.collators",
    "DataCollatorForPackedCausalLM": "hf_clm.data.batch.collators",
    "PackedDataset": "hf_clm.data.batch.packing",
    "CLMTrainer": "hf_clm.training.trainer",
    "generate": "hf_clm.generation.generate",
    "Decoding": "hf_clm.generation.decoding",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'hf_clm' has no attribute {name!r}")
    return getattr(import_module(PUBLIC_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(PUBLIC_NAMES)
