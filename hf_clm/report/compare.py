"""``hf-clm compare``: runs in one page, and their figures and what tells their recipes apart as a table."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_clm.errors import RecipeError
from hf_clm.report.charts import Axis, Chart, Series, Style, draw
from hf_clm.report.figures import to_count, to_duration, to_gigabytes, to_loss, to_percent, to_short
from hf_clm.report.page import LOSS, SHOWN_LETTERS, SINGLE, STEP, Section, Table, render, write_page
from hf_clm.report.record import RunRecord, final_figures, load_record, points

EVALUATION = Style("Evaluation loss", "nats per target token", to_short)
# What lies below the curves: its key in a log event.
AXES = {
    "step": STEP,
    "tokens_seen": Axis("tokens", to_short),
    "seconds": Axis("time", to_duration),
}
SHOWN = {
    "loss_before": ("loss before", to_loss),
    "loss_after": ("loss after", to_loss),
    "training_loss": ("last training loss", to_loss),
    "token_accuracy_after": ("token accuracy after", to_percent),
    "steps_done": ("steps", to_count),
    "tokens_seen": ("tokens", to_count),
    "target_tokens_seen": ("target tokens", to_count),
    "seconds": ("time", to_duration),
    "tokens_per_second": ("tokens a second", to_count),
    "mfu": ("MFU", to_percent),
    "peak_memory_bytes": ("peak memory", to_gigabytes),
}
ABSENT = "-"


@dataclass(frozen=True)
class Comparison:
    """Runs by name, with the rows of two tables: [what, its value in each run]."""

    names: list[str]
    figures: list[list[str]]
    differences: list[list[str]]

    def to_lines(self) -> list[str]:
        """Both tables as they are printed."""
        lines = _to_lines([["", *self.names], *self.figures], is_numeric=True)
        if not self.differences:
            return [*lines, "", "the recipes, data and versions are the same"]
        return [*lines, "", *_to_lines([["differs in", *self.names], *self.differences], is_numeric=False)]


def compare(folders: Sequence[str], *, path: str) -> Comparison:
    """Writes the page that overlays the runs; returns what is printed.

    Raises RecipeError for fewer than two runs, and for a folder that is none.
    """
    if len(folders) < 2:
        fix = "hf-clm compare RUN RUN [RUN ...]"
        raise RecipeError("needs at least two runs", where="hf-clm compare", fix=fix)
    records = [load_record(folder) for folder in folders]
    names = to_names(records)
    found = Comparison(names, list(_figures(records)), list(_differences(records)))
    head = ["", *names]
    sections = [Section("Figures", tables=[Table(head, found.figures, numeric=True)])]
    if found.differences:
        sections.append(Section("Differences", tables=[Table(["key", *names], found.differences)]))
    page = render(
        "compare.html",
        title=" and ".join(names),
        refresh_seconds=None,
        names=names,
        charts=to_charts(records, names),
        sections=sections,
    )
    write_page(Path(path), page)
    return found


def to_names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' own names; where two are the same, the paths as they were given."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def to_charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Both losses over steps, tokens and time, then accuracy, speed and learning rate over steps."""

    def overlay(style: Style, key: str, over: str = "step") -> Chart | None:
        one = partial(_series, key=key, over=over)
        return draw(style, [one(*pair) for pair in zip(names, records, strict=True)], axis=AXES[over])

    found = [overlay(LOSS, "loss", over) for over in AXES]
    found += [overlay(EVALUATION, "eval_loss", over) for over in AXES]
    found.append(overlay(SINGLE["tokens_per_second"], "tokens_per_second"))
    found.append(overlay(SINGLE["learning_rate"], "learning_rate"))
    return [chart for chart in found if chart]


def _series(name: str, record: RunRecord, *, key: str, over: str) -> Series:
    entries = record.metrics
    if over == "tokens_seen":  # an evaluation happens at the tokens of the training before it
        seen = 0
        entries = []
        for entry in record.metrics:
            seen = entry.get(over, seen)
            entries.append({**entry, over: seen})
    return Series(name, points(entries, key, over=over), dots=key == "eval_loss")


def _figures(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    found = [final_figures(record) for record in records]
    yield ["status", *(record.status for record in records)]
    for key, (name, form) in SHOWN.items():
        if any(key in figures for figures in found):
            yield [name, *(form(figures[key]) if key in figures else ABSENT for figures in found)]


def _differences(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Keys of the recipes that differ, without the folder's name; then data, machine and versions."""
    contents = [_to_content(record) for record in records]
    keys = dict.fromkeys(key for content in contents for key in content)
    for key in keys:
        values = [content.get(key, ABSENT) for content in contents]
        if len(set(values)) > 1:
            yield [key, *values]


def _to_content(record: RunRecord) -> dict[str, str]:
    recipe = {key: value for key, value in record.recipe.items() if key != "train.output_dir"}
    facts, proof = record.facts, record.part("proof", "train", "certificate")
    digest = str(proof["content_hash"])[:SHOWN_LETTERS] if "content_hash" in proof else None
    known: dict[str, Any] = {"content of data": digest}
    known |= {name: facts.get(name) for name in ("device", "processes", "precision", "attention")}
    known |= {f"version of {name}": value for name, value in record.part("versions").items()}
    said = {key: json.dumps(value, ensure_ascii=False) for key, value in recipe.items()}
    return said | {key: str(value) for key, value in known.items() if value is not None}


def _to_lines(rows: Sequence[Sequence[str]], *, is_numeric: bool) -> list[str]:
    """Columns of one width; all but the first to the right where they are numbers."""
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([f"{cell:{'>' if is_numeric and number else '<'}{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
