"""Draws every chart of hf_clm with matplotlib: inline SVG for the pages, loss.png and loss.pdf.

The SVG contains no style attributes, which the policy of the pages would block, and no text except the tick
labels. Its colours are variables of style.css, so a chart follows the page into dark mode.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_clm.run_folder import METRICS, Entries, Metric, Point, points, to_loss, to_short

if TYPE_CHECKING:  # matplotlib takes half a second to import, so only drawing imports it
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

COLOURS = ("#0b5cad", "#c2410c", "#16783a", "#8b1d96", "#806400", "#0f766e")  # --s0 to --s5 by day
LINE, QUIET, LEVEL = "#d9d9d4", "#5a5e66", "#96200f"
VARIABLES = {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS)}
VARIABLES |= {LINE: "var(--line)", QUIET: "var(--quiet)", LEVEL: "var(--on-bad)"}
WIDTH, HEIGHT = 340, 190  # pixels of an SVG at its natural size: a card on a phone
MARGINS = (0.15, 0.13, 0.82, 0.81)  # of the plot: left, bottom, width, height
BINS = 40  # of a histogram
LOW = 0.4  # an axis that fits its values still begins at 0 if the lowest is below this share of the highest
FAR = 2.0  # a level this many times above all values is named in the caption, but not drawn
JOINED = 3  # markers or more are joined by a thin line; through two it would only show a diagonal
STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.5,
    "axes.autolimit_mode": "round_numbers",
}


class Series(NamedTuple):
    """A named series of points, drawn as a line, or as markers (``dots``) if measured at a few steps."""

    name: str
    points: Sequence[Point]
    dots: bool = False


class Chart(NamedTuple):
    """A metric drawn over ``axis``, with an optional level (name, value) to compare it with."""

    metric: Metric
    series: Sequence[Series]
    axis: str = "step"
    level: tuple[str, float] | None = None

    @property
    def note(self) -> str:
        """The unit and the horizontal axis."""
        return ", ".join(filter(None, [self.metric.unit, f"by {self.axis}"]))

    @property
    def keys(self) -> Iterator[tuple[int, Series]]:
        """The legend: each series that has points, with its number, which decides its colour."""
        return ((number, one) for number, one in enumerate(self.series) if one.points)

    @property
    def highest(self) -> float:
        """The highest value of all series."""
        return max(y for one in self.series for _, y in one.points)

    def to_svg(self) -> str:
        """Returns the plot without its caption, which the page writes."""
        return _draw(self._plot)

    def _plot(self, axes: "Axes") -> None:
        draw_lines(axes, self.series)
        if self.level and self.level[1] <= FAR * self.highest:
            axes.axhline(self.level[1], color=LEVEL, linestyle=":", linewidth=1.2)
        lowest = min(y for one in self.series for _, y in one.points)
        if lowest >= 0 and (self.metric.chart == "zero" or lowest < LOW * self.highest):
            axes.update_datalim([(0, 0), (0, 1e-9)])
        axes.margins(0, tight=False)
        axes.set_xlim(0, max(1e-9, *(x for one in self.series for x, _ in one.points)))
        to_text = to_short if self.metric.form is to_loss else self.metric.form
        axes.yaxis.set_major_formatter(lambda value, _: to_text(value))
        axes.locator_params(axis="x", integer=self.axis in ("step", "tokens"))


def draw_lines(axes: "Axes", series: Sequence[Series]) -> None:
    """Draws each series in the colour of its number; lines are dashed once the six colours are used up.

    Markers are joined by a thin line if there are several and no other line shows what happened between them.
    """
    has_line = any(not one.dots and len(one.points) > 1 for one in series)
    for number, one in enumerate(series):
        if one.points:
            is_joined = len(one.points) >= JOINED and not has_line if one.dots else len(one.points) > 1
            axes.plot(
                *zip(*one.points, strict=True),
                color=COLOURS[number % len(COLOURS)],
                label=one.name,
                linestyle=("--" if number >= len(COLOURS) else "-") if is_joined else "none",
                linewidth=0.8 if one.dots else 1.4,
                marker="o" if one.dots or not is_joined else "",
                markersize=5,
                clip_on=False,
            )


def to_series(metrics: Entries, key: str, *, over: str = "step", sets: Iterable[str] = ()) -> list[Series]:
    """Returns a figure of the training, and of each evaluation that logs it.

    Args:
        sets: the names of the evaluation sets that have one.
    """
    names = {"evaluation": f"eval_{key}", "evaluation on training rows": f"eval_train_{key}"}
    names |= {name: f"eval_{name}_{key}" for name in sets}
    found = [Series("training", points(metrics, key, over=over))]
    found += [Series(name, points(metrics, logged, over=over), dots=True) for name, logged in names.items()]
    return [one for one in found if one.points]


def histogram(values: np.ndarray, *, limit: int) -> str:
    """Returns the SVG of a histogram; bars over the limit have another colour."""

    def plot(axes: "Axes") -> None:
        counts, edges = np.histogram(values, bins=BINS, range=(0, max(1, values.max())))
        colours = [LEVEL if edge >= limit else COLOURS[0] for edge in edges[:-1]]
        axes.bar(edges[:-1], counts, width=0.9 * edges[1], align="edge", color=colours)
        if limit <= edges[-1]:
            axes.axvline(limit, color=LEVEL, linewidth=1)
        axes.set_xlim(0, edges[-1])
        axes.locator_params(axis="y", integer=True)

    return _draw(plot)


def write_loss_plots(metrics: Entries, folder: Path) -> None:
    """Writes loss.png and loss.pdf: the loss over epochs, with the tokens seen on a second axis.

    Writes nothing if no loss was logged, or without matplotlib, of which the report has warned.
    """
    train = [entry for entry in metrics if "loss" in entry]
    if not train or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw_lines(axes, to_series(metrics, "loss", over="epoch"))
    axes.set(xlabel="epoch", ylabel=f"loss ({METRICS['loss'].unit})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    if (epochs := train[-1]["epoch"]) > 0:
        rate = train[-1]["tokens_seen"] / epochs
        top = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel("tokens seen")
    for name in ("loss.png", "loss.pdf"):
        figure.savefig(folder / name, dpi=130)


def _draw(plot: Callable[["Axes"], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))  # matplotlib writes 72 units an inch
        axes = figure.add_axes(MARGINS)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: to_short(value))
        axes.locator_params(nbins=5)
        plot(axes)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6, labelcolor=QUIET)
        axes.spines[:].set_visible(False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _to_inline(file.getvalue())


def _to_inline(svg: str) -> str:
    """Turns matplotlib's SVG into an element sized and coloured by the page, and without ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg .*?viewBox="([^"]*)".*?>', r'<svg class="plot" viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' style="([^"]*)"', lambda found: _to_attributes(found[1]), svg)
    svg = re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg)


def _to_attributes(style: str) -> str:
    """``fill: none; stroke: #d9d9d4`` -> ``fill="none" stroke="#d9d9d4"``; the page sets the fonts."""
    pairs = (pair.partition(": ") for pair in style.split("; ") if not pair.startswith("font"))
    return "".join(f' {name}="{value}"' for name, _, value in pairs)
