"""report.html: a run as one page without scripts, whose style its own policy names by hash."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_clm.pages.charts import Chart, to_series
from hf_clm.run_folder import METRICS, Entries, RunFolder, load_folder, metric_of, to_short, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
REFRESH_SECONDS = 10
SHOWN_STEPS = 5  # of the samples, side by side
NOT_GIVEN = ("default", "hf_clm default", "chosen by the run")  # origins of a value


class Table(NamedTuple):
    """Rows of text below a head; all columns but the first are numbers where ``is_numeric``."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = False
    title: str = ""


def write_report(folder: str | Path, *, is_live: bool = False) -> RunFolder:
    """Writes ``report.html`` into a run's folder, so that a reader sees the old page or the new one.

    Args:
        is_live: the run writes it, and will again: the page reloads itself until the run ends.

    Raises RecipeError for a folder that is not a run's, OSError where the page cannot be written.
    """
    run = load_folder(folder)
    refresh_seconds = REFRESH_SECONDS if is_live and run.record.status == "running" else None
    write_text(run.path / "report.html", build_report(run, refresh_seconds=refresh_seconds))
    return run


def build_report(run: RunFolder, *, refresh_seconds: int | None = None) -> str:
    """The page of a run. What the folder does not hold is left out."""
    return render(
        "report.html",
        {
            "title": run.name,
            "refresh_seconds": refresh_seconds,
            "run": run,
            "record": run.record,
            "error": " ".join([run.record.error] if isinstance(run.record.error, str) else run.record.error),
            "charts": to_charts(run),
            "samples": to_samples(run.samples),
            "evaluations": to_evaluations(run),
            "recipe": to_recipe(run),
        },
    )


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fills a template of this folder; every text is escaped."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment().get_template(template).render({"style": style, "digest": digest, **content})


def to_charts(run: RunFolder) -> list[Chart]:
    """The metrics that are drawn and were logged, over the steps. Padding is drawn where there is some."""
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


def to_samples(samples: Entries) -> dict[str, Any] | None:
    """The steps that are shown, and for each prompt the text at each of them."""
    texts = {(one["prompt"], one["step"]): one["text"] for one in samples}
    steps = sorted({step for _, step in texts})
    if not steps:
        return None
    last, count = len(steps) - 1, min(SHOWN_STEPS, len(steps))
    shown = sorted({steps[round(i * last / max(1, count - 1))] for i in range(count)})
    prompts = dict.fromkeys(prompt for prompt, _ in texts)
    rows = [(prompt, [(step, texts.get((prompt, step), "")) for step in shown]) for prompt in prompts]
    return {"rows": rows, "note": f"{len(shown)} of {len(steps)} steps" if len(steps) > len(shown) else ""}


def to_evaluations(run: RunFolder) -> Table | None:
    """Every figure of the evaluations, before and after; None where the tiles hold all of them."""
    rows = []
    for key, values in run.evaluated().items():
        if len(values) == 2 and (metric := metric_of(key)):
            before, after = values
            change = ("+" if after >= before else "") + metric.form(after - before)
            rows.append([metric.short, metric.form(before), metric.form(after), change])
    return Table(["evaluation", "before", "after", "change"], rows, True) if len(rows) > 2 else None


def to_recipe(run: RunFolder) -> list[Table]:
    """The values that were given, each with its place, then the others; without places for an older run.

    Of ``train``, recipe.yaml holds what was given, our defaults, and what follows from the machine.
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
