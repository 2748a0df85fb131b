"""``hf-clm compare``: runs in one page, and their figures and what tells their recipes apart as a table."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_clm.errors import RecipeError
from hf_clm.pages.charts import Axis, Chart, Series, Style, draw
from hf_clm.pages.figures import to_count, to_duration, to_gigabytes, to_loss, to_percent, to_short
from hf_clm.pages.report import LOSS, SHOWN_LETTERS, SINGLE, STEP, Section, Table, render, write_page
from hf_clm.run_folder import Entries, RunRecord, final_figures, is_number, load_record, points

EVALUATION = Style("Evaluation loss", "nats per target token", to_short)
TOKENS = Axis("tokens", to_short, least=1)
HOUR, MINUTE = 3600, 60
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
    """Both losses over steps, tokens and time, then speed and learning rate over steps."""
    unit, seconds = _time_unit(records)
    axes = {"step": STEP, "tokens_seen": TOKENS, "time": Axis(unit, to_short)}
    metrics = [_with_axes(record.metrics, seconds=seconds) for record in records]
    found = []
    for key, over, style in OVERLAID:
        lines = [
            Series(name, points(entries, key, over=over), dots=key == "eval_loss")
            for name, entries in zip(names, metrics, strict=True)
        ]
        found.append(draw(style, lines, axis=axes[over]))
    return [chart for chart in found if chart]


# The charts: what is drawn, over what, and how.
OVERLAID = [
    *(("loss", over, LOSS) for over in ("step", "tokens_seen", "time")),
    *(("eval_loss", over, EVALUATION) for over in ("step", "tokens_seen", "time")),
    *((key, "step", SINGLE[key]) for key in ("tokens_per_second", "learning_rate")),
]


def _time_unit(records: Sequence[RunRecord]) -> tuple[str, int]:
    """In which the longest run has a number that can be read, and its seconds."""
    longest = max(final_figures(record).get("seconds", 0) for record in records)
    units = {"hours": HOUR, "minutes": MINUTE}
    return next((unit for unit in units.items() if longest > 2 * unit[1]), ("seconds", 1))


def _with_axes(metrics: Entries, *, seconds: int) -> Entries:
    """Each log event with its time, and an evaluation with the tokens of the training before it."""
    counted: dict[str, Any] = {"tokens_seen": 0} if points(metrics, "tokens_seen") else {}
    found = []
    for entry in metrics:
        counted |= {key: entry[key] for key in counted if key in entry}
        time = {"time": entry["seconds"] / seconds} if is_number(entry.get("seconds")) else {}
        found.append({**entry, **counted, **time})
    return found


def _figures(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    found = [final_figures(record) for record in records]
    yield ["status", *(record.status for record in records)]
    for key, (name, form) in SHOWN.items():
        if any(key in figures for figures in found):
            yield [name, *(form(figures[key]) if key in figures else ABSENT for figures in found)]


def _differences(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Keys of the recipes that differ, without the folder's name; then data, machine and versions."""
    for to_content in (_recipe, _circumstances):
        contents = [to_content(record) for record in records]
        for key in dict.fromkeys(key for content in contents for key in content):
            values = [content.get(key, ABSENT) for content in contents]
            if len(set(values)) > 1:
                yield [key, *values]


def _recipe(record: RunRecord) -> dict[str, str]:
    given = {key: value for key, value in record.recipe.items() if key != "train.output_dir"}
    return {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in given.items()}


def _circumstances(record: RunRecord) -> dict[str, str]:
    found = {name: record.facts.get(name) for name in ("device", "processes", "precision", "attention")}
    found |= {f"version of {name}": value for name, value in record.part("versions").items()}
    digest = record.part("proof", "train", "certificate").get("content_hash")
    said = {"content of data": str(digest)[:SHOWN_LETTERS]} if digest else {}
    return said | {key: str(value) for key, value in found.items() if value is not None}


def _to_lines(rows: Sequence[Sequence[str]], *, is_numeric: bool) -> list[str]:
    """Columns of one width; all but the first to the right where they are numbers."""
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([f"{cell:{'>' if is_numeric and number else '<'}{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
