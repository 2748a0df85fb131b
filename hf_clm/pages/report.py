"""report.html: a run as one page without scripts, whose style its own policy names by hash."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_clm.pages.charts import Axis, Chart, Rule, Series, Style, draw
from hf_clm.pages.figures import (
    evaluated_name,
    is_evaluated,
    to_count,
    to_duration,
    to_evaluated,
    to_gigabytes,
    to_loss,
    to_percent,
    to_short,
)
from hf_clm.run_folder import Entries, RunRecord, final_figures, is_number, load_record, points

FOLDER = Path(__file__).parent
REFRESH_SECONDS = 10
SHOWN_STEPS = 5  # of the samples, side by side
SHOWN_LETTERS = 12  # of a hash
LABELLED = {"place", "tokens", "targets", "shown", "flags", "turns"}  # what a label row must have

STEP = Axis("step", to_count, least=1)
LOSS = Style("Loss", "nats per target token", to_short)
ACCURACY = Style("Token accuracy", "share of target tokens", to_percent, from_zero=True)
GRADIENT = Style("Gradient norm", "before clipping", to_short, from_zero=True)
# Charts of one series: its key in a log event.
SINGLE = {
    "learning_rate": Style("Learning rate", "", to_short, from_zero=True),
    "tokens_per_second": Style("Throughput", "real tokens a second", to_short, from_zero=True),
    "mfu": Style("MFU", "share of the machine's peak", to_percent, from_zero=True),
    "peak_memory_bytes": Style("Memory", "the most held so far", to_gigabytes, from_zero=True),
    "padding_share": Style("Padding", "share of the places in a batch", to_percent, from_zero=True),
}


class Table(NamedTuple):
    """Rows of text below a head; all columns behind the first are numbers where ``numeric``."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = False
    title: str = ""


class Section(NamedTuple):
    """A part of a page: named facts and tables; ``folded`` ones open at a click."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


class Tile(NamedTuple):
    """A figure at the top of the page."""

    name: str
    value: str
    note: str = ""


def write_report(folder: str | Path, *, is_live: bool = False) -> RunRecord:
    """Writes ``report.html`` into a run's folder, so that a reader sees the old page or the new one.

    Args:
        is_live: the run writes it, and will again: the page loads itself anew while the run goes on.

    Raises RecipeError for a folder that is no run, OSError where the page cannot be written.
    """
    record = load_record(folder)
    refresh_seconds = REFRESH_SECONDS if is_live and record.status == "running" else None
    write_page(record.folder / "report.html", build_report(record, refresh_seconds=refresh_seconds))
    return record


def write_page(path: Path, page: str) -> None:
    """Writes the page beside its place and renames it; leaves nothing half written behind."""
    partial_page = path.with_name(f".{path.name}.partial")
    try:
        partial_page.write_bytes(page.encode("utf-8", errors="backslashreplace"))
        partial_page.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial_page.unlink(missing_ok=True)
        raise


def build_report(record: RunRecord, *, refresh_seconds: int | None = None) -> str:
    """The page of a run. What the record does not hold is left out."""
    sections = (
        _evaluated_table(record),
        _proof(record),
        _ledger(record),
        _self_test(record),
        _recipe(record),
        _versions(record),
    )
    return render(
        "report.html",
        title=record.name,
        refresh_seconds=refresh_seconds,
        status=record.status,
        error=_error(record),
        about=list(_about(record)),
        tiles=list(_tiles(record)),
        charts=to_charts(record),
        samples=_samples(record.samples),
        label_rows=[row for row in record.label_rows if row.keys() >= LABELLED],
        sections=[section for section in sections if section.facts or section.tables],
    )


def render(template: str, **content: Any) -> str:
    """Fills a template of this folder; every text is escaped."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment().get_template(template).render(style=style, digest=digest, **content)


def to_charts(record: RunRecord) -> list[Chart]:
    """What the log events show over the steps; a chart without a point is left out."""
    at_step = partial(points, record.metrics)
    facts, by_step = record.facts, partial(draw, axis=STEP)
    entropy, clip = facts.get("unigram_entropy"), facts.get("max_grad_norm")
    learns_all = facts.get("stage") == "pretrain"
    guess = Rule("guessing by frequency", entropy) if is_number(entropy) and learns_all else None
    level = Rule(f"clipped at {to_short(clip)}", clip) if is_number(clip) and clip > 0 else None

    def both(key: str) -> list[Series]:
        names = {_evaluated(record): f"eval_{key}", "training rows, evaluated": f"eval_train_{key}"}
        names |= {name: f"eval_{name}_{key}" for name in record.part("evaluations")}
        evaluated = [Series(name, at_step(logged), dots=True) for name, logged in names.items()]
        return [Series("training", at_step(key)), *(series for series in evaluated if series.points)]

    found = [by_step(LOSS, both("loss"), rule=guess), by_step(ACCURACY, both("token_accuracy"))]
    found.append(by_step(GRADIENT, [Series("gradient norm", at_step("grad_norm"))], rule=level))
    for key, style in SINGLE.items():
        values = at_step(key)
        if key != "padding_share" or any(share for _, share in values):
            found.append(by_step(style, [Series(style.title.lower(), values)]))
    return [chart for chart in found if chart]


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(FOLDER)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _error(record: RunRecord) -> str:
    said = record.facts.get("error") or ""
    return " ".join(map(str, said)) if isinstance(said, list) else str(said)


def _evaluated(record: RunRecord) -> str:
    return "held-out data" if record.facts.get("evaluation") else "some training rows"


def _about(record: RunRecord) -> Iterator[tuple[str, str]]:
    facts = record.facts
    names = ("recipe", "stage", "model", "format", "started")
    yield from ((name, str(facts[name])) for name in names if facts.get(name))
    if is_number(facts.get("parameters")):
        trained = facts.get("trained_parameters")
        part = f", {trained:,} trained" if is_number(trained) and trained != facts["parameters"] else ""
        yield "parameters", f"{facts['parameters']:,}{part}"
    if facts.get("device"):
        machine = [f"{facts.get('processes', 1)} x {facts['device']}", facts.get("precision")]
        attention = f"{facts['attention']} attention" if facts.get("attention") else ""
        yield "computed on", ", ".join(str(part) for part in [*machine, attention] if part)
    if record.unreadable:
        yield "left out", f"unreadable lines of its logs: {record.unreadable}"


def _tiles(record: RunRecord) -> Iterator[Tile]:
    facts, figures = record.facts, final_figures(record)
    for name, key, form in (("Loss", "loss", to_loss), ("Token accuracy", "token_accuracy", to_percent)):
        if {f"{key}_before", f"{key}_after"} <= set(figures):
            before, after = figures[f"{key}_before"], figures[f"{key}_after"]
            yield Tile(name, f"{form(before)} → {form(after)}", _evaluated(record))
        elif f"training_{key}" in figures:
            yield Tile(name, form(figures[f"training_{key}"]), "training data")
    if "steps_done" in figures:
        planned = facts.get("steps")
        yield Tile("Steps", to_count(figures["steps_done"]), f"of {planned:,}" if is_number(planned) else "")
    if "seconds" in figures:
        yield Tile("Time", to_duration(figures["seconds"]), _time_left(record, figures))
    yield from _work_tiles(record, figures)


def _work_tiles(record: RunRecord, figures: Mapping[str, float]) -> Iterator[Tile]:
    """Tokens, speed, memory, padding."""
    if "tokens_seen" in figures:
        targets = figures.get("target_tokens_seen")
        note = f"{to_short(targets)} of them learned" if targets is not None else ""
        yield Tile("Tokens", to_short(figures["tokens_seen"]), note)
    if "tokens_per_second" in figures:
        note = f"{to_percent(figures['mfu'])} MFU" if "mfu" in figures else ""
        yield Tile("Tokens a second", to_count(figures["tokens_per_second"]), note)
    if "peak_memory_bytes" in figures:
        yield Tile("Memory", to_gigabytes(figures["peak_memory_bytes"]), "at its peak")
    padding = points(record.metrics, "padding_share")[-1:]
    note = f"{to_percent(padding[0][1])} padding" if padding else ""
    fill = record.part("train").get("packing_fill")
    if is_number(fill):
        yield Tile("Packed rows", f"{to_percent(fill)} full", note)
    elif note:
        yield Tile("Padding", to_percent(padding[0][1]), "of the places in a batch")


def _time_left(record: RunRecord, figures: Mapping[str, float]) -> str:
    steps, done = record.facts.get("steps"), figures.get("steps_done", 0)
    if record.status != "running" or not is_number(steps) or not done:
        return ""
    return f"about {to_duration(figures['seconds'] / done * max(0, steps - done))} left"


def _samples(samples: Entries) -> dict[str, Any] | None:
    """The steps that are shown, and for each prompt the text at each of them."""
    texts = {(str(one.get("prompt")), one.get("step")): str(one.get("text")) for one in samples}
    steps = sorted({step for _, step in texts if is_number(step)})
    if not steps:
        return None
    last = len(steps) - 1
    count = min(SHOWN_STEPS, len(steps))
    shown = sorted({steps[round(i * last / max(1, count - 1))] for i in range(count)})
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))
    rows = [(prompt, [(step, texts.get((prompt, step))) for step in shown]) for prompt in prompts]
    return {"rows": rows, "note": f"{len(shown)} of {len(steps)} steps" if len(steps) > len(shown) else ""}


def _splits(record: RunRecord) -> dict[str, tuple[str, ...]]:
    """The names of the sets in ``proof`` -> where run.json counts them."""
    named = {f"eval_{name}": ("evaluations", name) for name in record.part("evaluations")}
    return {"train": ("train",), **(named or {"eval": ("evaluation",)})}


def _evaluated_table(record: RunRecord) -> Section:
    """Every figure of the evaluations, before and after: also of sets that tell what was forgotten."""
    keys = [key for entry in record.metrics for key in entry]
    rows = []
    for key in dict.fromkeys(filter(is_evaluated, keys)):
        seen = [entry[key] for entry in record.metrics if is_number(entry.get(key))]
        values = record.part("evaluated").get(key, seen)  # a run that is done says which is its last
        if len(values) > 1:
            before, after = values[0], values[-1]
            sign = "+" if after >= before else ""
            change = sign + to_evaluated(key, after - before)
            shown = [evaluated_name(key), to_evaluated(key, before), to_evaluated(key, after), change]
            rows.append(shown)
    head = ["evaluation", "before", "after", "change"]
    return Section("Before and after", tables=[Table(head, rows, numeric=True)] if len(rows) > 2 else [])


def _proof(record: RunRecord) -> Section:
    facts = []
    for split in _splits(record):
        if certificate := record.part("proof", split, "certificate"):
            said = "are certified" if certificate.get("valid") else "are NOT certified"
            digest = str(certificate.get("content_hash"))[:SHOWN_LETTERS]
            rows = f"all {_to_text(certificate.get('rows'))} rows {said}, sha256 {digest}"
            facts.append((f"labels, {split}", rows))
    if test := record.part("proof", "self_test"):
        said = "one loss and gradient packed, padded and one document at a time"
        facts.append(("loss", f"{said} ({test.get('documents')} documents)"))
    if trip := record.part("proof", "round_trip"):
        said = "opens in a fresh process with the same logits, tokens and template"
        facts.append(("saved model", f"{said}; largest difference of a logit {trip.get('logit_difference')}"))
    proof = record.part("proof")
    for name, key in (("loss", "self_test"), ("saved model", "round_trip")):
        if isinstance(proof.get(key), str):
            facts.append((name, "tested at the end" if proof[key] == "end" else f"not tested: {proof[key]}"))
    if leakage := record.part("proof", "leakage"):
        facts.append(("leakage", ", ".join(f"{count} {kind}" for kind, count in leakage.items())))
    return Section("Certificate", facts)


def _self_test(record: RunRecord) -> Section:
    """What was compared before the first step; each line names what a difference would have meant."""
    found = record.part("proof", "self_test").get("comparisons") or []
    rows = [[str(one.get("name")), *(_to_text(one.get(key)) for key in COMPARED)] for one in found]
    tables = [Table(["what a difference would mean", *COMPARED], rows, numeric=True)] if rows else []
    return Section("Self-test of the loss", tables=tables, folded=True)


COMPARED = ("value", "reference", "tolerance")


def _to_text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if is_number(value) else str(value)


def _ledger(record: RunRecord) -> Section:
    """What was read, and what became of every input row."""
    tables, facts = [], []
    for key, part in _splits(record).items():
        if files := record.part(*part).get("files"):
            facts.append((f"{key} files", ", ".join(map(str, files))))
        if counts := record.part(*part):
            names = [name for name in COUNTED if is_number(counts.get(name))]
            facts.append((key, ", ".join(f"{counts[name]:,} {COUNTED[name]}" for name in names)))
        rows = [
            [fate, *(_to_text(total.get(name, 0)) for name in KEPT)]
            for fate, total in record.part("proof", key, "ledger").items()
            if isinstance(total, dict)
        ]
        if rows:
            heads = [f"{key}: fate", *(name.replace("_", " ") for name in KEPT)]
            tables.append(Table(heads, rows, numeric=True))
    shares = [share for share in record.part("mixing").get("sources") or [] if isinstance(share, dict)]
    if shares:
        rows = [[str(share.get("source")), *(_to_text(share.get(key)) for key in DRAWN)] for share in shares]
        heads = [f"mixed by {record.part('mixing').get('by')}", *(key.replace("_", " ") for key in DRAWN)]
        tables.append(Table(heads, rows, numeric=True))
    return Section("Ledger", facts, tables)


DRAWN = ("asked", "drawn", "rows_there", "rows", "rows_left_out", "passes", "tokens", "target_tokens")
COUNTED = {
    "input_rows": "input rows",
    "rows": "rows",
    "tokens": "tokens",
    "target_tokens": "of them targets",
}
KEPT = ("rows", "tokens", "target_tokens", "kept_tokens", "kept_targets")


def _recipe(record: RunRecord) -> Section:
    """What was given, with its place, then what was not."""
    origins = record.part("origins")
    rows = [
        (key, json.dumps(value, ensure_ascii=False, default=str), str(origins.get(key, _unsaid(key))))
        for key, value in record.recipe.items()
    ]
    if not rows:
        return Section("Recipe")
    if not origins:  # a run of an older version
        return Section("Recipe", tables=[Table(["key", "value"], [row[:2] for row in rows])], folded=True)
    others = ("default", "hf_clm default", "chosen by the run")
    given = [row for row in rows if row[2] not in others]
    rest = [row for row in rows if row[2] in others]
    head = ["key", "value", "origin"]
    tables = [Table(head, given, title="Given"), Table(head, rest, title="Not given")]
    return Section("Recipe", tables=[table for table in tables if table.rows], folded=True)


def _unsaid(key: str) -> str:
    """Of ``train``, recipe.yaml holds what was given, our defaults, and what follows from the machine."""
    return "chosen by the run" if key.startswith("train.") else "default"


def _versions(record: RunRecord) -> Section:
    versions = record.part("versions")
    return Section("Versions", [(name, str(value)) for name, value in versions.items()], folded=True)
