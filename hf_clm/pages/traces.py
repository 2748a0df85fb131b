"""``hf-clm why``: which training rows taught an answer, as a page that runs no script, and for a terminal.

All rows are ranked, which is an estimate. A few are proved, which is a measurement: the run is trained again
without the row.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

from hf_clm.pages.losses import HEATS, NATS
from hf_clm.pages.report import render
from hf_clm.pages.rows import Atom, escape
from hf_clm.pages.terminal import LEAST, NEWLINE, columns_of, wrap_letters
from hf_clm.run_folder import write_text

RANKED = "all training rows, by the similarity of their gradient to that of the answer at stored checkpoints"
PROVED = (
    "the run was trained again without the row (its labels masked, everything else unchanged), "
    "and the change of the answer was measured"
)
EFFECT = "the log-probability of the whole answer as trained, minus that without the row"
RANDOM = "Random rows, left out for comparison"
HEAD = ("rank", "similarity", "effect", "place", "text")
NUMERIC = 3  # columns of HEAD, aligned to the right


class Span(NamedTuple):
    """A part of the axis of an answer. From zero to its largest effect, up or down, the axis is 100 long."""

    start: float
    length: float


@dataclass(frozen=True)
class TracedRow:
    """A training row and what it has to do with an answer.

    ``atoms`` are its text as the model reads it, ``similarity`` is from -1 to 1, and ``rank`` 1 is the most
    similar of all rows. ``effect`` is in nats: positive if the row taught the answer, None if that was not
    proved. ``is_random`` marks a row that was left out for comparison.
    """

    place: str
    atoms: Sequence[Atom]
    rank: int
    similarity: float
    effect: float | None
    is_random: bool

    @property
    def figure(self) -> str:
        """The effect as text."""
        return "not proved" if self.effect is None else f"{_to_number(self.effect, '+,.2f', 2)} nats"

    @property
    def nearness(self) -> str:
        """The similarity as text."""
        return _to_number(self.similarity, ".3f", 3)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """(style, text) of each run of equal style."""
        return [
            (style, "".join(text for text, _ in run))
            for style, run in groupby(self.atoms, key=lambda atom: atom[1])
        ]


@dataclass(frozen=True)
class TracedAnswer:
    """An answer: text and log-probability of each token, or character of several, and its traced rows."""

    prompt: str
    tokens: Sequence[tuple[str, float]]
    rows: Sequence[TracedRow]

    @property
    def text(self) -> str:
        """The text of all tokens."""
        return "".join(text for text, _ in self.tokens)

    @property
    def log_probability(self) -> str:
        """The log-probability of the whole answer as text, in nats."""
        return _to_number(sum(log_probability for _, log_probability in self.tokens), ",.2f", 2)

    @property
    def ranked(self) -> list[TracedRow]:
        """The rows that were chosen by their similarity, the most similar first."""
        return sorted((row for row in self.rows if not row.is_random), key=lambda row: row.rank)

    @property
    def random(self) -> list[TracedRow]:
        """The rows that were left out for comparison."""
        return [row for row in self.rows if row.is_random]

    @property
    def axis(self) -> Span:
        """The axis that the bars of all rows share: from the lowest effect to the highest, with zero."""
        effects = [0.0, *(row.effect for row in self.rows if row.effect is not None)]
        lowest, highest = self._to_length(min(effects)), self._to_length(max(effects))
        return Span(lowest, (highest - lowest) or 100.0)

    def to_bar(self, effect: float) -> Span:
        """Returns the bar of an effect: it begins at zero, or ends there if the effect is negative."""
        length = self._to_length(effect)
        return Span(min(length, 0.0), abs(length))

    def _to_length(self, effect: float) -> float:
        largest = max((abs(row.effect) for row in self.rows if row.effect is not None), default=0.0)
        return 100 * effect / largest if largest else 0.0


@dataclass(frozen=True)
class Traces:
    """The answers of a run that were traced, and how that was done: ``facts`` by name."""

    run: str
    facts: Mapping[str, str]
    answers: Sequence[TracedAnswer]


def write_traces(path: Path, traces: Traces) -> None:
    """Writes the page."""
    styles = {style for answer in traces.answers for row in answer.rows for _, style in row.atoms}
    content = {
        "title": "Which rows taught the answer",
        "traces": traces,
        "facts": {escape(name): escape(fact) for name, fact in _to_facts(traces).items()},
        "ranked": RANKED,
        "proved": PROVED,
        "effect": EFFECT,
        "random": RANDOM,
        "answers": [(answer, list(_to_tokens(answer))) for answer in traces.answers],
        "scale": [(heat, f"{heat * NATS:g}{'+' if heat == HEATS - 1 else ''}") for heat in range(HEATS)],
        "has_mixed": any(style.startswith("mixed") for style in styles),
        "escape": escape,
    }
    write_text(path, render("traces.html", content))


def to_lines(traces: Traces, *, width: int) -> list[str]:
    """Returns the traces for a terminal: what was ranked and what was proved, then a table for each answer.

    No line has more than ``width`` columns.
    """
    width = max(width, LEAST)
    about = {
        "ranked": f"{RANKED}; an estimate",
        "proved": PROVED,
        "effect": f"{EFFECT}; positive if the row taught the answer",
    }
    lines = _to_paragraphs(about, width=width)
    lines += ["", *_to_paragraphs(_to_facts(traces), width=width)]
    for answer in traces.answers:
        lines += ["", "prompt", *_indented(answer.prompt, width=width)]
        lines += [f"answer, log-probability {answer.log_probability} nats"]
        lines += [*_indented(answer.text, width=width), "", *_to_table(answer, width=width)]
    return [_cut(line, width) for line in lines]


def _to_facts(traces: Traces) -> dict[str, str]:
    return {"run": traces.run, **traces.facts}


def _to_tokens(answer: TracedAnswer) -> Iterator[tuple[str, int, str]]:
    """Yields (text, heat, tip) of each token of an answer, as on the page of losses."""
    for text, log_probability in answer.tokens:
        loss = 0.0 - log_probability  # no -0
        heat = int(loss / NATS) if loss < HEATS * NATS else HEATS - 1  # NaN is the hottest too
        tip = f"'{_joined(text)}': loss {loss:.3f}, probability {math.exp(log_probability):.1%}"
        yield _broken(text), heat, tip


def _to_paragraphs(texts: Mapping[str, str], *, width: int) -> list[str]:
    """Returns each text after its name, wrapped between words and indented below the longest name."""
    indent = max(map(len, texts)) + 2
    lines = []
    for name, text in texts.items():
        words = f"{_joined(name):<{indent}}{_joined(text)}"
        lines += textwrap.wrap(words, max(width, indent + LEAST), subsequent_indent=" " * indent)
    return lines


def _indented(text: str, *, width: int) -> Iterator[str]:
    """Yields the lines of a text below its title."""
    for line in wrap_letters([(_broken(text), "")], room=max(LEAST, width - 2)):
        yield "  " + "".join(letter for letter, _ in line)


def _to_table(answer: TracedAnswer, *, width: int) -> Iterator[str]:
    """Yields the lines of the rows; places and texts share the columns that the numbers leave."""
    ranked, random = ([_to_cells(row) for row in rows] for rows in (answer.ranked, answer.random))
    widths = [max(map(len, cells)) for cells in zip(HEAD, *ranked, *random, strict=True)][:NUMERIC]
    room = max(LEAST, width - sum(widths) - 2 * NUMERIC)
    place_room = min(room // 2, max(_count(cells[NUMERIC]) for cells in (HEAD, *ranked, *random)))

    def to_line(cells: Sequence[str]) -> str:
        *numbers, place, text = cells
        place = _cut(place, place_room, at_end=False)
        padded = [f"{cell:>{size}}" for cell, size in zip(numbers, widths, strict=True)]
        padded.append(place + " " * (place_room - _count(place)))
        return "  ".join([*padded, text])

    yield to_line(HEAD)
    yield from map(to_line, ranked)
    if random:
        yield f"{RANDOM}:"
        yield from map(to_line, random)


def _to_cells(row: TracedRow) -> tuple[str, ...]:
    """Returns the cells of HEAD. Control tokens, which start many rows alike, are left out of the text."""
    text = "".join(text for text, style in row.atoms if not style.endswith("control"))
    return f"{row.rank:,}", row.nearness, row.figure, _joined(row.place), _joined(text)


def _to_number(value: float, form: str, digits: int) -> str:
    return format(round(value, digits) + 0.0, form)  # no -0.00


def _joined(text: str) -> str:
    """Returns a text on one line."""
    return escape(text).replace("\n", NEWLINE)


def _broken(text: str) -> str:
    """Returns a text with a mark at the end of each of its lines."""
    return escape(text).replace("\n", f"{NEWLINE}\n")


def _count(text: Iterable[str]) -> int:
    return sum(map(columns_of, text))


def _cut(text: str, room: int, *, at_end: bool = True) -> str:
    """Returns a text in ``room`` columns; ``…`` stands for what was cut, at its end or at its start."""
    if _count(text) <= room:
        return text
    letters = text if at_end else text[::-1]
    used = accumulate(map(columns_of, letters))
    shown = "".join(letter for letter, columns in zip(letters, used, strict=True) if columns < room)
    return f"{shown}…" if at_end else f"…{shown[::-1]}"
