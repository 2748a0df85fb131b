"""``hf-clm compare``: the figures, curves and answers of several runs, and what differs in their recipes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_clm.errors import RecipeError
from hf_clm.pages.answers import PROMPTS, to_growth
from hf_clm.pages.charts import Chart, Series
from hf_clm.pages.report import Table, render
from hf_clm.run_folder import METRICS, Entries, RunFolder, load_folder, points, write_text

UNITS = {"hours": 3600, "minutes": 60}  # of the time axis, if there are more than two of them
# The charts: a metric, and its horizontal axis.
OVERLAID = [
    *((key, over) for key in ("loss", "eval_loss") for over in ("step", "tokens", "time")),
    *(("tokens_per_second", "step"), ("learning_rate", "step")),
]
ABSENT = "-"


@dataclass(frozen=True)
class RunTable:
    """The names of the runs, and the rows of two tables: [what, its value in each run]."""

    names: list[str]
    figures: list[list[str]]
    differences: list[list[str]]

    def to_lines(self) -> list[str]:
        """Returns both tables as they are printed."""
        lines = list(_to_lines([["", *self.names], *self.figures], align=">"))
        if not self.differences:
            return [*lines, "", "the recipes, data and versions are the same"]
        return [*lines, "", *_to_lines([["differs in", *self.names], *self.differences], align="<")]


def compare(folders: Sequence[str], *, path: str) -> RunTable:
    """Writes the page that shows the runs side by side, and returns the tables to print.

    Raises RecipeError for fewer than two runs, and for a folder that is not that of a run.
    """
    if len(folders) < 2:
        fix = "hf-clm compare RUN RUN [RUN ...]"
        raise RecipeError("needs at least two runs", where="hf-clm compare", fix=fix)
    runs = [load_folder(folder) for folder in folders]
    names = to_names(runs)
    found = RunTable(names, list(_figures(runs)), list(_differences(runs)))
    growth = to_growth(runs)
    content = {
        "title": " and ".join(names),
        "names": names,
        "figures": Table(["", *names], found.figures, is_numeric=True),
        "charts": to_charts(runs, names),
        "growth": growth[:PROMPTS],
        "prompts": len(growth),
        "differences": Table(["key", *names], found.differences),
    }
    write_text(Path(path), render("compare.html", content))
    return found


def to_names(runs: Sequence[RunFolder]) -> list[str]:
    """Returns the names of the folders; if two are the same, the paths as they were given.

    A run that is given twice is numbered: ``poems (1)``, ``poems (2)``.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len({run.path.resolve() for run in runs}):
        names = [str(run.path) for run in runs]
    given = [names[: number + 1].count(name) for number, name in enumerate(names)]
    return [f"{name} ({n})" if names.count(name) > 1 else name for name, n in zip(names, given, strict=True)]


def to_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """Returns both losses over steps, tokens and time, then speed and learning rate over steps."""
    longest = max((seconds for run in runs for _, seconds in points(run.metrics, "seconds")), default=0)
    unit = next((name for name, size in UNITS.items() if longest > 2 * size), "seconds")
    metrics = [_with_axes(run.metrics, unit=unit) for run in runs]
    found = []
    for key, over in OVERLAID:
        lines = [
            Series(name, points(entries, key, over=over), dots=key == "eval_loss")
            for name, entries in zip(names, metrics, strict=True)
        ]
        found.append(Chart(METRICS[key], lines, axis=unit if over == "time" else over))
    return [chart for chart in found if list(chart.keys)]


def _with_axes(metrics: Entries, *, unit: str) -> Entries:
    """Adds the time in this unit to each log event, and to evaluations the tokens seen before them."""
    found, tokens = [], 0 if points(metrics, "tokens_seen") else None
    for entry in metrics:
        tokens = entry.get("tokens_seen", tokens)
        time = entry["seconds"] / UNITS.get(unit, 1) if "seconds" in entry else None
        found.append({**entry, "tokens": tokens, "time": time})
    return found


def _figures(runs: Sequence[RunFolder]) -> Iterator[list[str]]:
    yield ["Status", *(run.record.status for run in runs)]
    yield from _rows([run.figures() for run in runs])


def _differences(runs: Sequence[RunFolder]) -> Iterator[list[str]]:
    """Yields the keys that differ in the recipes, output_dir aside; then data, machine and versions."""
    for to_content in (_recipe, _circumstances):
        rows = _rows([to_content(run) for run in runs])
        yield from (row for row in rows if len(set(row[1:])) > 1)


def _rows(contents: Sequence[dict[str, str]]) -> Iterator[list[str]]:
    for key in dict.fromkeys(key for content in contents for key in content):
        yield [key, *(content.get(key, ABSENT) for content in contents)]


def _recipe(run: RunFolder) -> dict[str, str]:
    given = {key: value for key, value in run.recipe.items() if key != "train.output_dir"}
    return {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in given.items()}


def _circumstances(run: RunFolder) -> dict[str, str]:
    record, train = run.record, run.record.proof.sets.get("train")
    found = {
        "content of data": train.certificate.content_hash[:12] if train and train.certificate else "",
        "device": record.device,
        "processes": str(record.processes),
        "precision": record.precision,
        "attention": record.attention,
    }
    found |= {f"version of {name}": number or "not installed" for name, number in record.versions.items()}
    return {key: value for key, value in found.items() if value}


def _to_lines(rows: Sequence[Sequence[str]], *, align: str) -> Iterator[str]:
    """Pads the columns; ``align`` (``<`` or ``>``) is that of all columns except the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:{align}{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
