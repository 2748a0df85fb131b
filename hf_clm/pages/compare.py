"""``hf-clm compare``: runs in one page, and their figures and what tells their recipes apart as a table."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_clm.errors import RecipeError
from hf_clm.pages.charts import Chart, Series
from hf_clm.pages.report import Table, render
from hf_clm.run_folder import METRICS, Entries, RunFolder, load_folder, points, write_text

UNITS = {"hours": 3600, "minutes": 60}  # in which time is drawn, where it is more than two of them
# What is drawn: a metric, and over what.
OVERLAID = [
    *((key, over) for key in ("loss", "eval_loss") for over in ("step", "tokens", "time")),
    *(("tokens_per_second", "step"), ("learning_rate", "step")),
]
ABSENT = "-"


@dataclass(frozen=True)
class RunTable:
    """Runs by name, with the rows of two tables: [what, its value in each run]."""

    names: list[str]
    figures: list[list[str]]
    differences: list[list[str]]

    def to_lines(self) -> list[str]:
        """Both tables as they are printed."""
        lines = list(_to_lines([["", *self.names], *self.figures], align=">"))
        if not self.differences:
            return [*lines, "", "the recipes, data and versions are the same"]
        return [*lines, "", *_to_lines([["differs in", *self.names], *self.differences], align="<")]


def compare(folders: Sequence[str], *, path: str) -> RunTable:
    """Writes the page that overlays the runs; returns what is printed.

    Raises RecipeError for fewer than two runs, and for a folder that is not a run's.
    """
    if len(folders) < 2:
        fix = "hf-clm compare RUN RUN [RUN ...]"
        raise RecipeError("needs at least two runs", where="hf-clm compare", fix=fix)
    runs = [load_folder(folder) for folder in folders]
    names = to_names(runs)
    found = RunTable(names, list(_figures(runs)), list(_differences(runs)))
    tables = {
        "Figures": Table(["", *names], found.figures, is_numeric=True),
        "Differences": Table(["key", *names], found.differences),
    }
    content = {"title": " and ".join(names), "charts": to_charts(runs, names), "tables": tables}
    write_text(Path(path), render("compare.html", content))
    return found


def to_names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' own names; where two are the same, the paths as they were given."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def to_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """Both losses over steps, tokens and time, then speed and learning rate over steps."""
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
    """Each log event with its time in this unit; an evaluation has the tokens of the training before it."""
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
    """Keys of the recipes that differ, without the folder's name; then data, machine and versions."""
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
    found |= {f"version of {name}": number for name, number in record.versions.items()}
    return {key: value for key, value in found.items() if value}


def _to_lines(rows: Sequence[Sequence[str]], *, align: str) -> Iterator[str]:
    """Columns of one width; all but the first are aligned as ``format`` does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:{align}{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
