"""Series of numbers as the geometry of a chart: paths, ticks and readings that a template draws as SVG.

Places are shares of the plot: percent for ticks and readings, 0 to 1,000 in paths; y counts from the top.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from hf_clm.run_folder import Point

UNITS = 1000  # of a path, across and down
BINS = 60  # where the pointer reads a value
BUCKETS = 250  # of a line with more points: their mean, and in a band the lowest and highest
LOW = 0.4  # a lowest value under this share of the highest has its axis begin at 0


class Series(NamedTuple):
    """A named line; one with ``dots`` has few points, which are marked."""

    name: str
    points: Sequence[Point]
    dots: bool = False


class Rule(NamedTuple):
    """A level that the values are compared with, such as the norm at which gradients are clipped."""

    name: str
    value: float


class Axis(NamedTuple):
    """What runs from left to right, how its values are written, and the smallest distance of its ticks."""

    name: str
    to_text: Callable[[float], str]
    least: float = 0.0


class Tick(NamedTuple):
    """A place on an axis, in percent, and what stands there."""

    place: float
    text: str


class Line(NamedTuple):
    """A drawn series: its number, for the colour, its name, and the paths of its line, band and dots."""

    number: int
    name: str
    path: str
    band: str
    dots: str


class Reading(NamedTuple):
    """What the pointer reads between two places: the x, and (number, name, value) of each line."""

    left: float
    width: float
    x: str
    values: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Chart:
    """A drawn chart. ``rule`` is None where the level lies far above all values; ``rule_text`` stays."""

    title: str
    note: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    readings: list[Reading]
    rule: float | None = None
    rule_text: str = ""


class Style(NamedTuple):
    """What a chart says: title, unit, how its values are written; whether its axis begins at 0."""

    title: str
    note: str
    to_text: Callable[[float], str]
    from_zero: bool = False


class _Scale(NamedTuple):
    low: float
    high: float

    def place(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def draw(style: Style, series: Sequence[Series], *, axis: Axis, rule: Rule | None = None) -> Chart | None:
    """The chart of the series that have points; None where none has."""
    numbered = [(number, one) for number, one in enumerate(series) if one.points]
    if not numbered:
        return None
    values = [y for _, one in numbered for _, y in one.points]
    is_near = rule is not None and rule.value <= 2 * max(values)
    if rule is not None and is_near:
        values.append(rule.value)
    y_steps = nice_ticks(min(values), max(values), from_zero=style.from_zero)
    y_scale = _Scale(y_steps[0], y_steps[-1])
    across = [x for _, one in numbered for x, _ in one.points]
    x_scale = _Scale(min(0.0, *across), max(across) if max(across) > 0 else 1.0)
    x_steps = [
        x for x in nice_ticks(x_scale.low, x_scale.high, least=axis.least) if x_scale.low <= x <= x_scale.high
    ]
    return Chart(
        style.title,
        ", ".join([*filter(None, [style.note]), f"by {axis.name}"]),
        x_ticks=[Tick(round(100 * x_scale.place(x), 2), axis.to_text(x)) for x in x_steps],
        y_ticks=[Tick(round(100 - 100 * y_scale.place(y), 2), style.to_text(y)) for y in y_steps],
        lines=[_to_line(number, one, x_scale=x_scale, y_scale=y_scale) for number, one in numbered],
        readings=_to_readings(numbered, x_scale, axis=axis, y_text=style.to_text),
        rule=round(100 - 100 * y_scale.place(rule.value), 2) if rule is not None and is_near else None,
        rule_text="" if rule is None else rule.name + ("" if is_near else ", far above"),
    )


def nice_ticks(low: float, high: float, *, from_zero: bool = False, least: float = 0.0) -> list[float]:
    """About five round numbers, the first at or below ``low`` and the last at or above ``high``.

    Their distance is a multiple of ``least``, if that is not 0.
    """
    if from_zero or 0 < low < LOW * high:
        low = min(0.0, low)
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest:
        low, high = (low - largest / 10, high + largest / 10) if largest else (0.0, 1.0)
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    steps = [size * times for times in (1, 2, 2.5, 5, 10, 20, 50, 100) if size * times >= rough * (1 - 1e-9)]
    step = next((step for step in steps if not least or step % least == 0), least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def thin(points: Sequence[Point]) -> list[list[Point]]:
    """The points in at most BUCKETS groups of neighbours; each alone where they are not many more."""
    if len(points) <= 2 * BUCKETS:
        return [[point] for point in points]
    low, high = points[0][0], points[-1][0]
    size = (high - low) / BUCKETS or 1.0
    groups = groupby(points, key=lambda point: min(BUCKETS - 1, int((point[0] - low) / size)))
    return [list(group) for _, group in groups]


def _to_line(number: int, series: Series, *, x_scale: _Scale, y_scale: _Scale) -> Line:
    def to_path(found: list[Point]) -> list[str]:
        return [
            f"{round(UNITS * x_scale.place(x))} {round(UNITS * (1 - y_scale.place(y)))}" for x, y in found
        ]

    groups = thin(series.points)
    across = [fmean(x for x, _ in group) for group in groups]
    levels = [[y for _, y in group] for group in groups]
    places = to_path([*zip(across, map(fmean, levels), strict=True)])
    lows, highs = (to_path([*zip(across, map(end, levels), strict=True)]) for end in (min, max))
    is_dotted = series.dots or len(places) == 1
    return Line(
        number,
        series.name,
        path="M" + "L".join(places),
        band="M" + "L".join(highs + lows[::-1]) + "z" if len(groups) < len(series.points) else "",
        dots="".join(f"M{place}h0" for place in places) if is_dotted else "",  # a round cap makes it a dot
    )


def _to_readings(
    numbered: Sequence[tuple[int, Series]], scale: _Scale, *, axis: Axis, y_text: Callable[[float], str]
) -> list[Reading]:
    """The last value of each series in each of BINS parts of the plot."""
    last: dict[int, dict[int, Point]] = {}
    for number, one in numbered:
        for point in one.points:
            last.setdefault(min(BINS - 1, int(BINS * scale.place(point[0]))), {})[number] = point
    names = {number: one.name for number, one in numbered}
    width = 100 / BINS
    return [
        Reading(
            round(place * width, 3),
            round(width, 3),
            f"{axis.name} {axis.to_text(max(x for x, _ in found.values()))}",
            [(number, names[number], y_text(y)) for number, (_, y) in sorted(found.items())],
        )
        for place, found in sorted(last.items())
    ]
