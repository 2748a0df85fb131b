"""hf_clm: pretraining and supervised fine-tuning of causal language models on the Hugging Face Trainer.

The public names are loaded when they are used, so ``import hf_clm`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_clm.errors import needing_packages

if TYPE_CHECKING:  # for editors and type checkers; PUBLIC_NAMES says the same to Python
    from hf_clm.api import train as train
    from hf_clm.data.batch.collators import DataCollatorForCausalLM as DataCollatorForCausalLM
    from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM as DataCollatorForPackedCausalLM
    from hf_clm.data.batch.packing import PackedDataset as PackedDataset
    from hf_clm.data.label.datasets import PretrainDataset as PretrainDataset
    from hf_clm.data.label.datasets import SFTDataset as SFTDataset
    from hf_clm.data.read.formats import to_example as to_example
    from hf_clm.generation.decoding import Decoding as Decoding
    from hf_clm.generation.generate import generate as generate
    from hf_clm.model.load import load_model as load_model
    from hf_clm.recipe.recipe import Recipe as Recipe
    from hf_clm.recipe.recipe import load_recipe as load_recipe
    from hf_clm.schema import Chat as Chat
    from hf_clm.schema import Document as Document
    from hf_clm.schema import Segment as Segment
    from hf_clm.text.tokenizer import load_tokenizer as load_tokenizer
    from hf_clm.training.python import Run as Run
    from hf_clm.training.trainer import CLMTrainer as CLMTrainer

PUBLIC_NAMES = {
    "train": "hf_clm.api",
    "Run": "hf_clm.training.python",
    "load_recipe": "hf_clm.recipe.recipe",
    "Recipe": "hf_clm.recipe.recipe",
    "load_tokenizer": "hf_clm.text.tokenizer",
    "load_model": "hf_clm.model.load",
    "to_example": "hf_clm.data.read.formats",
    "Chat": "hf_clm.schema",
    "Document": "hf_clm.schema",
    "Segment": "hf_clm.schema",
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
    with needing_packages():
        return getattr(import_module(PUBLIC_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(PUBLIC_NAMES)
