"""Trackers (TensorBoard, W&B, MLflow, ...) whose failure ends the tracking, not the training."""

from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_clm.training.callbacks import write_line


class TrackerCallback(TrainerCallback):
    """Passes each event on to a tracker until one fails: that is said once, and nothing is passed on then."""

    def __init__(self, tracker: TrainerCallback, *, is_main: bool):
        self.tracker, self.is_main = tracker, is_main
        self.has_failed = False

    def __getattribute__(self, name: str) -> Any:
        """Every event, also one that a later version of transformers adds."""
        return partial(self._pass_on, name) if name.startswith("on_") else super().__getattribute__(name)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if self.has_failed:
            return None
        try:
            return getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # of the tracker's own package, or of the network below it
            self.has_failed = True
            if self.is_main:
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                name = type(self.tracker).__name__
                write_line(f"warning   {name} failed and is left out from now on: {said}")
            return None


def tolerate_trackers(trainer: Trainer) -> None:
    """Puts a TrackerCallback around each tracker of a trainer."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    callbacks = trainer.callback_handler.callbacks
    is_main = trainer.is_world_process_zero()
    callbacks[:] = [
        TrackerCallback(callback, is_main=is_main) if isinstance(callback, kinds) else callback
        for callback in callbacks
    ]
