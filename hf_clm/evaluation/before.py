"""The model that ``hf-clm evaluate --before`` compares a run with: another, or the one it started from."""

from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.errors import RecipeError
from hf_clm.generation.llama_cpp import LlamaCppModel
from hf_clm.generation.load import LoadedRun, load_run, run_recipe
from hf_clm.gguf import settings_folder
from hf_clm.model.adapters import is_adapter, read_base
from hf_clm.model.load import fit_to_tokenizer

BASE = "base"


@dataclass(frozen=True)
class Before:
    """A model that reads the rows of a run. ``is_adapted``: it is the run's model, without its adapters."""

    name: str
    model: Any
    is_adapted: bool = False

    def active(self) -> AbstractContextManager[Any]:
        """Returns a context in which ``model`` is the model before."""
        return self.model.disable_adapter() if self.is_adapted else nullcontext()


def load_before(name: str, run: LoadedRun, options: Namespace) -> Before:
    """Loads a run, a checkpoint or a model; ``base`` is the model that the run of ``options`` started from.

    Raises RecipeError if that run started from random weights, or if the tokenizers differ.
    """
    if name == BASE and is_adapter(options.run):
        return Before(read_base(options.run)[0], run.model, is_adapted=True)
    folder = settings_folder(options.run, where="run or model")
    name, revision = find_base(folder) if name == BASE else (name, None)
    other = load_run(name, device=options.device, dtype=options.dtype, revision=revision)
    check_same_tokens(name, other.tokenizer, run.tokenizer)
    if not isinstance(other.model, LlamaCppModel):  # which computes a file as it is
        fit_to_tokenizer(other.model, run.tokenizer)
    return Before(name, other.model)


def find_base(folder: str) -> tuple[str, str | None]:
    """Returns the model that a run started from, and its revision. Raises RecipeError if there is none."""
    recipe = run_recipe(folder)
    if recipe is None or recipe.model.name_or_path is None:
        what = "started from random weights" if recipe else "is not the folder of a run"
        fix = "name another model, such as a shorter run"
        raise RecipeError(f"{folder} {what}", where="--before", got=repr(BASE), fix=fix)
    return recipe.model.name_or_path, recipe.model.revision


def check_same_tokens(name: str, other: PreTrainedTokenizerFast, own: PreTrainedTokenizerFast) -> None:
    """Raises RecipeError unless the tokens of one are all tokens of the other, with the same ids."""
    few, many = sorted((other.get_vocab(), own.get_vocab()), key=len)
    if differing := sorted(token for token, id in few.items() if many.get(token) != id):
        what = f"{len(differing):,} of {len(few):,} tokens have a different id in the run"
        fix = "name a model with the same tokenizer"
        raise RecipeError(what, where=f"--before {name}", got=repr(differing[0]), fix=fix)
