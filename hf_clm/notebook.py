"""What a run shows in Jupyter: one output with a progress bar, the latest figures and the curve of the loss.

Each drawing replaces the one before it. The lines that a terminal would print are kept below, folded away.
Outside of a notebook a run prints its lines, and nothing is drawn.
"""

import base64
import html
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, TextIOBase
from typing import TYPE_CHECKING

from hf_clm.pages.charts import draw_lines, to_series
from hf_clm.run_folder import metric_of, to_duration

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState

SECONDS = 1.0  # between two drawings at least; one takes about 0.1 s
PAGE = """<div style="font: 13px/1.5 system-ui, sans-serif; max-width: 720px">
<progress value="{done}" max="{total}" style="width: 100%"></progress>
<div>{status}</div>{curve}
<details{opened}><summary>{count} lines of the log</summary>
<pre style="white-space: pre-wrap">{log}</pre></details>
</div>"""


class Progress(TextIOBase):
    """A stream for the lines of a run, which passes them on to standard output."""

    def write(self, text: str) -> int:
        """Prints text; lines end with ``\\n``."""
        sys.stdout.write(text)
        sys.stdout.flush()
        return len(text)

    def callbacks(self) -> "Sequence[TrainerCallback]":
        """Returns what follows the training: nothing, as its lines are printed."""
        return []


class NotebookProgress(Progress):
    """Keeps the lines of a run, and draws its progress in the output of a notebook's cell."""

    def __init__(self) -> None:
        from IPython.display import display

        self.lines = ""
        self.state: TrainerState | None = None
        self.started = self.drawn = time.monotonic()
        self.first_step = 0
        output = display(self._to_html(), display_id=True)
        assert output is not None  # it is one for display_id
        self._output = output

    def write(self, text: str) -> int:
        """Adds text to the log."""
        self.lines += text
        self.draw(due=SECONDS)
        return len(text)

    def callbacks(self) -> "Sequence[TrainerCallback]":
        """Returns the callback that draws the training as it goes."""
        from hf_clm.training.callbacks import WatchCallback

        return [WatchCallback(self.watch)]

    def watch(self, state: "TrainerState") -> None:
        """Draws the training at a step, if the last drawing is a while ago."""
        if self.state is None:
            self.started, self.first_step = time.monotonic(), state.global_step
        self.state = state
        self.draw(due=SECONDS)

    def draw(self, *, due: float = 0.0, opened: bool = False) -> None:
        """Replaces the output, unless the last drawing is less than ``due`` seconds old."""
        if time.monotonic() - self.drawn >= due:
            self._output.update(self._to_html(opened=opened))
            self.drawn = time.monotonic()

    def _to_html(self, *, opened: bool = False) -> object:
        from IPython.display import HTML

        state = self.state
        return HTML(
            PAGE.format(
                done=state.global_step if state else 0,
                total=max(1, state.max_steps if state else 1),
                status=html.escape(self._status()),
                curve=self._curve(),
                opened=" open" if opened else "",
                count=self.lines.count("\n"),
                log=html.escape(self.lines),
            )
        )

    def _status(self) -> str:
        """The step, the time left and the latest figures; before the training the last line of the log."""
        state = self.state
        if state is None:
            return (self.lines.strip().splitlines() or ["starting"])[-1]
        done = state.global_step - self.first_step
        seconds = (time.monotonic() - self.started) / max(1, done) * (state.max_steps - state.global_step)
        latest: dict[str, float] = {}
        for entry in state.log_history:
            latest = {key: value for key, value in latest.items() if key not in entry} | entry
        metrics = [(metric_of(key), value) for key, value in latest.items()]
        figures = [
            f"{metric.short} {metric.form(value)}" for metric, value in metrics if metric and metric.short
        ]
        left = f"{to_duration(seconds)} left" if state.global_step < state.max_steps else "done"
        return " · ".join([f"step {state.global_step:,} of {state.max_steps:,}", left, *figures])

    def _curve(self) -> str:
        """The losses so far as an image; nothing before there are two points."""
        series = to_series(self.state.log_history, "loss") if self.state else []
        if not any(len(one.points) > 1 for one in series):
            return ""
        from matplotlib.figure import Figure  # not pyplot: a notebook's own figures stay as they are

        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        draw_lines(axes, series)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(frameon=False)
        image = BytesIO()
        figure.savefig(image, format="png", dpi=110)
        source = base64.b64encode(image.getvalue()).decode("ascii")
        return f'<img alt="loss by step" src="data:image/png;base64,{source}" style="width: 100%">'


@contextmanager
def showing() -> Iterator[Progress]:
    """Inside, the lines of a run go to the stream: to a drawing in Jupyter, else to standard output."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm's own bar in Jupyter, not needed
        from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for each file that is loaded or written
    try:
        if in_notebook():
            with _drawing() as progress:
                yield progress
        else:
            yield Progress()
    finally:
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _drawing() -> Iterator[NotebookProgress]:
    progress, has_failed = NotebookProgress(), True
    try:
        with redirect_stdout(progress), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "IProgress not found"
            )  # a bar of tqdm, which nothing shows here
            yield progress
        has_failed = False
    finally:
        progress.draw(opened=has_failed)  # the log says how far the run came


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
