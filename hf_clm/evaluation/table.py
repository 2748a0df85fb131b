"""The figures of an evaluation as text: one a line, and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of the figures of one file, those that stand in its line.
OF_FILE = ("examples", "loss", "bits_per_byte", "token_accuracy", "accuracy", "f1", "exact_match", "chrf")

Table = tuple[list[str], list[list[str]]]  # head, rows; the first column holds names


def to_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each figure, then the confusion of choices and the figures by file, where there are any."""
    lines = [f"{name:<16} {value}" for name, value in to_figures(found).items()]
    for table in to_tables(found).values():
        lines += ["", *_aligned(*table)]
    return lines


def to_figures(found: Mapping[str, Any]) -> dict[str, str]:
    """The single figures, as text."""
    return {name: _to_text(value) for name, value in found.items() if not isinstance(value, dict | list)}


def to_tables(found: Mapping[str, Any]) -> dict[str, Table]:
    """The tables by what they are about."""
    tables = {}
    if confusion := found.get("confusion"):
        rows = [[f"is {right}", *map(_to_text, chosen.values())] for right, chosen in confusion.items()]
        tables["choices"] = (["", *(f"chose {choice}" for choice in confusion)], rows)
    if sources := found.get("sources"):
        names = [name for name in OF_FILE if name in found]
        rows = [[file, *(_to_text(own.get(name, "")) for name in names)] for file, own in sources.items()]
        tables["files"] = (["file", *names], rows)
    return tables


def _to_text(value: float | str) -> str:
    """A count with separators, a share with four places, a word as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns of one width each: the first to the left, the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[number]) for row in table) for number in range(len(head))]
    cells = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in table
    )
    return ["  ".join(row).rstrip() for row in cells]
