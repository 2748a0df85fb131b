"""What a Python caller can add to a run that no recipe holds, and what the caller gets back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from hf_clm.data.read.formats import to_prompt
from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import GREEDY, generate
from hf_clm.generation.load import LoadedRun, load_run, to_loaded_run
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.model.attention import use_for_generation
from hf_clm.recipe.recipe import Recipe
from hf_clm.run_folder import RunRecord
from hf_clm.schema import Example
from hf_clm.training.trainer import CLMTrainer

BuildOptimizer = Callable[[PreTrainedModel], tuple[Optimizer, LRScheduler | None]]


@dataclass(frozen=True)
class Additions:
    """Objects that are passed to the Trainer.

    callbacks         see every event, after those of hf_clm
    compute_metrics   as of transformers.Trainer; its figures are logged with those of an evaluation
    trainer_class     a subclass of CLMTrainer; None: CLMTrainer itself
    build_optimizer   makes the optimizer, and a schedule or None, from the model that was loaded
    """

    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    trainer_class: type[CLMTrainer] | None = None
    build_optimizer: BuildOptimizer | None = None

    def __post_init__(self):
        given = self.trainer_class
        if given is not None and not (isinstance(given, type) and issubclass(given, CLMTrainer)):
            name = getattr(given, "__name__", repr(given))
            fix = "derive it from hf_clm.CLMTrainer, which is a transformers.Trainer"
            raise RecipeError("not a subclass of CLMTrainer", where="trainer_class", got=name, fix=fix)

    @property
    def names(self) -> list[str]:
        """The additions that change what is trained or logged, which no recipe can repeat."""
        deciding = ("compute_metrics", "trainer_class", "build_optimizer")
        return [name for name in deciding if getattr(self, name) is not None]

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError for an optimizer beside that of the recipe's section ``optimizer``."""
        own = CLMTrainer.create_optimizer
        given = {
            "optimizers": self.build_optimizer is not None,
            "trainer_class": (self.trainer_class or CLMTrainer).create_optimizer is not own,
        }
        for where in (name for name, builds in given.items() if builds and recipe.optimizer):
            what = "builds an optimizer, and so does the section optimizer of the recipe"
            raise RecipeError(what, where=where, fix="remove one of them")

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Returns ``compute_metrics``, which then raises RecipeError for a result other than numbers."""
        compute = self.compute_metrics
        if compute is None:
            return None

        def checked(prediction: EvalPrediction) -> dict[str, float]:
            figures = compute(prediction)
            values = list(figures.values()) if isinstance(figures, dict) else [figures]
            if wrong := [value for value in values if not isinstance(value, Real)]:
                what, got = "expected a dictionary of numbers", repr(wrong[0])[:60]
                raise RecipeError(what, where="compute_metrics", got=got)
            return {key: float(value) for key, value in figures.items()}

        return checked

    def optimizers(self, model: PreTrainedModel) -> tuple[Optimizer | None, LRScheduler | None]:
        """Returns the argument ``optimizers`` of the Trainer. Raises RecipeError for another object."""
        if self.build_optimizer is None:
            return None, None
        optimizer, schedule = self.build_optimizer(model)
        if not isinstance(optimizer, Optimizer):
            fix = "return (a torch.optim.Optimizer, a schedule or None)"
            got = type(optimizer).__name__
            raise RecipeError("the function returned no optimizer", where="optimizers", got=got, fix=fix)
        return optimizer, schedule


@dataclass(frozen=True)
class Run:
    """A run that has ended: its model can be asked at once.

    ``trainer`` is None for a run that was done before, and was left as it is.
    """

    folder: Path
    record: RunRecord
    trainer: CLMTrainer | None = None

    @cached_property
    def _loaded(self) -> LoadedRun:
        if self.trainer is None:
            return load_run(str(self.folder))
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        tokenizer = self.trainer.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        return to_loaded_run(model, tokenizer, self.record)

    @property
    def model(self) -> PreTrainedModel:
        """The trained model, ready to generate: in evaluation mode, with a KV cache."""
        model = self._loaded.model.eval()
        use_for_generation(model)
        model.config.use_cache = True
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that was saved with the model."""
        return self._loaded.tokenizer

    @property
    def metrics(self) -> dict[str, float]:
        """Every figure of the last evaluation, such as ``eval_loss`` and ``eval_token_accuracy``."""
        return {key: after for key, (_, after) in self.record.evaluated.items()}

    def answer(self, prompt: str | Sequence[Mapping[str, object]], decoding: Decoding = GREEDY) -> str:
        """Returns the model's answer to an instruction, or to a list of messages.

        The prompt is rendered as in training. Raises DataError for messages that no template takes.
        """
        loaded = self._loaded
        with torch.inference_mode():
            (answer,) = generate(
                self.model,
                loaded.tokenizer,
                prompts=[self._to_example(prompt)],
                decoding=decoding,
                rendering=loaded.rendering,
            )
        return answer.text

    def _to_example(self, prompt: str | Sequence[Mapping[str, object]]) -> Example:
        loaded = self._loaded
        if not isinstance(prompt, str):
            return to_prompt({"messages": [dict(message) for message in prompt]}, format="messages")
        return to_prompt_example(prompt, loaded.format, template=loaded.template, has_turns=loaded.has_turns)
