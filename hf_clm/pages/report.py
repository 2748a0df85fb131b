"""report.html: the story of a run on one page. It runs no script, and its policy names its style by hash."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_clm.pages.answers import PROMPTS, to_growth
from hf_clm.pages.charts import Chart, to_series
from hf_clm.run_folder import METRICS, RunFolder, load_folder, metric_of, to_percent, to_short, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
REFRESH_SECONDS = 10
LEARNING = ("loss", "token_accuracy")  # metrics of the chapter on the loss
NO_COSTS = {
    *(METRICS[name].title for name in LEARNING),
    "Evaluated on",
    "Packed rows",
}  # figures shown elsewhere
NOT_GIVEN = ("default", "hf_clm default", "chosen by the run")  # origins of a value


class Table(NamedTuple):
    """Rows of text below a head; if ``is_numeric``, all columns except the first are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = False
    title: str = ""


def write_report(folder: str | Path, *, is_live: bool = False) -> RunFolder:
    """Writes ``report.html`` into the folder of a run, atomically.

    Args:
        is_live: the run is still training and will write the page again, so the page reloads itself.

    Raises RecipeError if the folder is not that of a run, OSError if the page cannot be written.
    """
    run = load_folder(folder)
    refresh_seconds = REFRESH_SECONDS if is_live and run.record.status == "running" else None
    write_text(run.path / "report.html", build_report(run, refresh_seconds=refresh_seconds))
    return run


def build_report(run: RunFolder, *, refresh_seconds: int | None = None) -> str:
    """Returns the page of a run. Chapters that the folder has no data for are left out."""
    charts, changes, growth = to_charts(run), to_changes(run), to_growth([run])
    elsewhere = NO_COSTS | changes.keys()
    return render(
        "report.html",
        {
            "title": run.name,
            "refresh_seconds": refresh_seconds,
            "run": run,
            "record": run.record,
            "error": " ".join([run.record.error] if isinstance(run.record.error, str) else run.record.error),
            "changes": changes,
            "costs": {name: value for name, value in run.figures().items() if name not in elsewhere},
            "learning": [chart for chart in charts if chart.metric.name in LEARNING],
            "spending": [chart for chart in charts if chart.metric.name not in LEARNING],
            "growth": growth[:PROMPTS],
            "prompts": len(growth),
            "percent": to_percent,
            "recipe": to_recipe(run),
        },
    )


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fills in a template of this folder. All text is escaped."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment().get_template(template).render({"style": style, "digest": digest, **content})


def to_charts(run: RunFolder) -> list[Chart]:
    """Returns a chart over the steps of each metric that was logged; of the padding only if there was any."""
    record, found = run.record, []
    levels: dict[str, tuple[str, float]] = {}
    if record.stage == "pretrain" and record.unigram_entropy is not None:
        levels["loss"] = ("guessing by frequency", record.unigram_entropy)
    if record.max_grad_norm:
        levels["grad_norm"] = (f"clipped at {to_short(record.max_grad_norm)}", record.max_grad_norm)
    for metric in (metric for metric in METRICS.values() if metric.chart):
        series = to_series(run.metrics, metric.name, sets=record.evaluations)
        chart = Chart(metric, series, level=levels.get(metric.name))
        if series and (metric.name != "padding_share" or chart.highest > 0):
            found.append(chart)
    return found


def to_changes(run: RunFolder) -> dict[str, tuple[str, ...]]:
    """Returns the figures of the evaluations by title: (before, after), or one value after one evaluation."""
    found = {}
    for key, values in run.evaluated().items():
        if metric := metric_of(key):
            title = metric.title[:1].upper() + metric.title[1:]
            found[title] = tuple(metric.form(value) for value in values)
    return found


def to_recipe(run: RunFolder) -> list[Table]:
    """Returns the values that were given, each with its origin, then the others.

    Runs of older versions recorded no origins. The ``train`` section of recipe.yaml contains the values that
    were given, our defaults, and values chosen for the machine.
    """
    origins = run.record.origins
    values = {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in run.recipe.items()}
    if not origins:
        return [Table(["key", "value"], list(values.items()))] if values else []
    unsaid = {True: "chosen by the run", False: "default"}
    rows = [(key, value, origins.get(key, unsaid[key.startswith("train.")])) for key, value in values.items()]
    given = [row for row in rows if row[2] not in NOT_GIVEN]
    others = [row for row in rows if row[2] in NOT_GIVEN]
    head = ["key", "value", "origin"]
    tables = [Table(head, given, title="Given"), Table(head, others, title="Not given")]
    return [table for table in tables if table.rows]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(FOLDER)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
