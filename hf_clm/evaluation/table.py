"""The figures of an evaluation as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of the figures of one file, those that stand in its line.
OF_SOURCE = ("examples", "loss", "bits_per_byte", "token_accuracy", "accuracy", "f1", "exact_match")


def to_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each figure, then what is a table: the confusion of choices, the figures by file."""
    figures = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
    lines = [f"{key:<16} {to_text(value)}" for key, value in figures.items()]
    if confusion := found.get("confusion"):
        rows = [[f"is {right}", *map(to_text, chosen.values())] for right, chosen in confusion.items()]
        lines += ["", *to_table(["", *(f"chose {choice}" for choice in confusion)], rows)]
    if sources := found.get("sources"):
        names = [name for name in OF_SOURCE if name in found]
        rows = [[file, *(to_text(own.get(name, "")) for name in names)] for file, own in sources.items()]
        lines += ["", *to_table(["file", *names], rows)]
    return lines


def to_text(value: float | str) -> str:
    """A count with separators, a share with four places, a word as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def to_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns of one width each: the first to the left, the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[number]) for row in table) for number in range(len(head))]
    cells = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in table
    )
    return ["  ".join(row).rstrip() for row in cells]
