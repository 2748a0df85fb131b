"""The folder of a run: its typed record (run.json), logs, recipe and checkpoints, and the table of METRICS.

All access to these files is in this module, so that each key has one name and one type.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_clm.errors import RecipeError, UserError
from hf_clm.template import Template

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
Entries = list[dict[str, Any]]  # lines of a log
Point = tuple[float, float]


class Recorded(BaseModel):
    """A part of run.json. Missing keys have their default; keys of other versions are preserved."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Counts(Recorded):
    """The size of a set of rows, and the fates of its records."""

    files: list[str] = []
    input_rows: int = 0
    fates: dict[str, int] = {}
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    packing_fill: float | None = None


class LabelProof(Recorded):
    """The certificate of a set's labels. ``content_hash`` is the sha256 of all rows."""

    valid: bool = False
    rows: int = 0
    content_hash: str = ""


class SetProof(Recorded):
    """The proof of one set of rows. ``ledger``: counts by fate, such as rows, tokens, kept_tokens."""

    certificate: LabelProof | None = None
    ledger: dict[str, dict[str, int]] = {}


class LossProof(Recorded):
    """The self-test of the loss. Each comparison has a name, value, reference and tolerance."""

    documents: int = 0
    comparisons: list[dict[str, float | str]] = []


class SavedProof(Recorded):
    """The comparison with the saved model, loaded in a fresh process."""

    logit_difference: float = math.nan


class PreparedSet(Recorded):
    """``date``: the date in the chat template, if it prints one. ``content``: a digest of the data files."""

    date: str = ""
    content: str = ""


class Proof(Recorded):
    """What was verified before the first step. A test that was not run has its reason as text."""

    __pydantic_extra__: dict[str, SetProof] = Field(init=False)  # by set: train, eval, eval_NAME

    prepared: PreparedSet = PreparedSet()
    self_test: LossProof | str = ""
    round_trip: SavedProof | str = ""
    leakage: dict[str, int] = {}

    @property
    def sets(self) -> dict[str, SetProof]:
        """The proofs by the name of the set."""
        return self.__pydantic_extra__ or {}


class Mixing(Recorded):
    """The mixture of sources in an epoch: the rows, tokens, passes and shares of each."""

    by: str = ""
    sources: list[dict[str, float | str]] = []


class StreamTotals(Recorded):
    """What was read of a stream: the least and most complete passes of a shard, and documents by fate."""

    shards: int = 1
    passes: tuple[int, int] = (0, 0)
    documents: int = 0
    fates: dict[str, int] = {}


class Quantized(Recorded):
    """The 4 bits of a frozen model: the dtypes of its other weights and of the computation."""

    weights: str = "float32"
    compute: str = "float32"


class RunRecord(Recorded):
    """run.json. The results are missing while a run trains, and if it was stopped."""

    status: str = "unknown"
    error: list[str] | str = ""
    stopped_by: str = ""
    stopped_at_step: int | None = None
    started: str = ""
    recipe: str | None = None
    origins: dict[str, str] = {}
    stage: Literal["sft", "pretrain"] | None = None
    max_length: int | None = None
    special_tokens_in_text: Literal["encode_as_text", "allow", "error"] | None = None
    reasoning: str | None = None
    format: str | None = None
    render: str = "auto"
    has_turns: bool | None = None
    template: Template | None = None
    model: str = ""
    from_scratch: bool = False
    parameters: int = 0
    trained_parameters: int = 0
    has_adapters: bool | None = None  # None in a file of version 0.4
    train: Counts = Counts()
    evaluation: Counts | None = None
    evaluations: dict[str, Counts] = {}
    unigram_entropy: float | None = None
    steps: int = 0
    rows_per_step: int = 0
    processes: int = 1
    device: str = ""
    precision: str = ""
    quantized: Quantized | None = None
    attention: str | None = None
    max_grad_norm: float | None = None
    versions: dict[str, str | None] = {}
    mixing: Mixing | None = None
    steps_done: int = 0
    seconds: float | None = None
    tokens_seen: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    token_accuracy_before: float | None = None
    token_accuracy_after: float | None = None
    evaluated: dict[str, tuple[float, float]] = {}
    proof: Proof = Proof()
    stream: StreamTotals | None = None

    @property
    def evaluated_on(self) -> str:
        """The kind of data that the evaluation loss is measured on."""
        return "held-out data" if self.evaluation else "training data"

    @property
    def is_adapter(self) -> bool:
        """Whether only adapters were trained, with a frozen model."""
        return self.trained_parameters < self.parameters if self.has_adapters is None else self.has_adapters

    @property
    def sets(self) -> dict[str, Counts]:
        """The counts of each set by its name in ``proof``: train, and eval or eval_NAME."""
        named = {f"eval_{name}": counts for name, counts in self.evaluations.items()}
        return {"train": self.train} | (named or ({"eval": self.evaluation} if self.evaluation else {}))

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file, without keys that were not set."""
        return self.model_dump(mode="json", exclude_unset=True)

    def updated(self, **changes: object) -> "RunRecord":
        """Returns the record with new values of these keys."""
        return RunRecord.model_validate({**self.to_json(), **changes})


def read_record(folder: Path) -> RunRecord | None:
    """Returns the record in the folder of a run, or None if there is no run.json.

    Raises RecipeError if run.json is not the record of a run.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    fix = "name the output folder of a run; its metrics.jsonl may still be read"
    try:
        return RunRecord.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{key}: {first['msg'].replace('Input should be', 'expected')}" if key else "not a JSON object"
        raise RecipeError(what, where=str(path), fix=fix) from None
    except ValueError:
        raise RecipeError("not a JSON object", where=str(path), fix=fix) from None


def find_record(name_or_path: str) -> RunRecord | None:
    """Returns the record of a run, or of the run of a checkpoint, whose status is set to done."""
    path = Path(name_or_path).expanduser()
    record = read_record(path)
    if record is None and step_of(path) >= 0 and (record := read_record(path.parent)):
        return record.updated(status="done")
    return record


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes run.json."""
    write_json(folder / "run.json", record.to_json())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with ``write_text``."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: after a crash, it has either its old or its new content.

    Lone surrogates, which data files may contain, are written as ``\\ud800``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        sync(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def find_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoint-N folders of a run, by N, whether complete or not."""
    folders = [path for path in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns 100 for ``checkpoint-100``, -1 for other names."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def append_json(path: Path, entry: Mapping[str, Any]) -> None:
    """Appends one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def drop_after(path: Path, step: int, *, history: Entries | None = None) -> Entries:
    """Drops the lines of steps after the checkpoint from which a run resumes, as they will be repeated.

    Args:
        history: the log events in the checkpoint. Others at the same step were written after it.

    Returns the remaining entries. At step 0 there are none.
    """
    if not path.is_file():
        return []
    saved = [event.keys() - {"step"} for event in history or [] if event["step"] == step]
    saved += [{"epoch_loss"}]  # which is not a log event of the Trainer

    def is_kept(entry: dict[str, Any]) -> bool:
        if entry["step"] != step or not history:
            return entry["step"] <= step
        return any(keys <= entry.keys() for keys in saved)

    entries = [entry for entry in read_lines(path)[0] if step and is_kept(entry)]
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return entries


def read_lines(path: Path) -> tuple[Entries, int]:
    """Returns the JSON objects of a log, and the number of other lines, such as an incomplete last one.

    A missing file has no lines.
    """
    if not path.is_file():
        return [], 0
    parsed = [_to_object(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    entries = [entry for entry in parsed if entry is not None]
    return entries, len(parsed) - len(entries)


@dataclass(frozen=True)
class RunFolder:
    """The files of a run. ``unreadable`` counts lines that are not JSON."""

    path: Path
    record: RunRecord
    metrics: Entries
    samples: Entries
    answers: Entries
    label_rows: Entries
    unreadable: int

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The dotted keys of recipe.yaml and their values; empty if it cannot be read."""
        try:
            file = self.path / "recipe.yaml"
            return _to_leaves(str(file), file.stat().st_mtime_ns)
        except (OSError, UserError):
            return {}

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def questions(self) -> dict[str, str]:
        """The prompts of the first training documents with their targets, as label_rows.jsonl shows them.

        Documents with more than one target are left out, and those whose prompt cannot be told from what the
        chat template writes around it.
        """
        return dict(filter(None, map(_to_question, self.label_rows)))

    def evaluated(self) -> Mapping[str, Sequence[float]]:
        """Returns the first and the last value of each figure of the evaluations, or the only one.

        The record of a finished run overrides the log, as with ``load_best_model_at_end`` the last evaluation
        is not that of the final model.
        """
        seen: dict[str, list[float]] = {}
        for entry in self.metrics:
            for key in filter(is_evaluated, entry):
                seen.setdefault(key, []).append(entry[key])
        return {key: [values[0], *values[1:][-1:]] for key, values in seen.items()} | self.record.evaluated

    def figures(self) -> dict[str, str]:
        """Returns the results of a run by name. If it has not finished, uses the log up to now."""
        figures, evaluated = {}, self.evaluated()
        last = {key: value for entry in self.metrics for key, value in entry.items()}
        for metric in METRICS.values():
            final = getattr(self.record, metric.name, None)
            values = evaluated.get(metric.name) or [last.get(metric.name) if final is None else final]
            texts = [metric.form(value) for value in values if value is not None]
            if metric.is_figure and texts:
                figures[metric.title] = " -> ".join(texts)
        if "Evaluation loss" in figures:
            figures["Evaluated on"] = self.record.evaluated_on
        if "Steps" in figures and self.record.steps:
            figures["Steps"] += f" of {self.record.steps:,}"
        if "Time" in figures and self.record.status == "running" and last["step"]:
            left = last["seconds"] / last["step"] * max(0, self.record.steps - last["step"])
            figures["Time"] += f", about {to_duration(left)} left"
        if fill := self.record.train.packing_fill:
            figures["Packed rows"] = f"{to_percent(fill)} full"
        return figures


def load_folder(path: str | Path) -> RunFolder:
    """Reads the folder of a run. Raises RecipeError if run.json is missing or not valid."""
    path = Path(path)
    if (record := read_record(path)) is None:
        what = "contains no run.json, so it is not the folder of a run" if path.is_dir() else "no such folder"
        raise RecipeError(what, where=str(path), fix="name the output folder of a run")
    names = ("metrics.jsonl", "samples.jsonl", "answers.jsonl", "label_rows.jsonl")
    logs = [read_lines(path / name) for name in names]
    metrics, samples, answers, rows = (entries for entries, _ in logs)
    unreadable = sum(count for _, count in logs)
    return RunFolder(path, record, metrics, samples, answers, rows, unreadable)


def _to_question(document: Mapping[str, Any]) -> tuple[str, str] | None:
    """(prompt, target) of a line of label_rows.jsonl. In a chat the template writes ``user`` above a turn."""
    turns = document["turns"]
    texts = ["".join(text for style, text in atoms if "control" not in style) for _, atoms in turns]
    learned = ["".join(text for style, text in atoms if style in ("trained", "mixed")) for _, atoms in turns]
    numbers = [number for number, target in enumerate(learned) if target]
    if len(numbers) != 1 or numbers[0] < 1 or document["shown"] < document["tokens"]:
        return None
    *before, (role, _) = turns[: numbers[0]]
    text, target = texts[numbers[0] - 1], learned[numbers[0]]
    if any(other not in ("", "template") for other, _ in before):
        return None
    if role == "user" and text.startswith("user\n"):
        return text.removeprefix("user\n").strip(), target
    return (text, target) if role == "prompt" else None


def points(entries: Entries, key: str, *, over: str = "step") -> list[Point]:
    """Returns (x, y) = (entry[over], entry[key]) for entries where both are finite numbers, sorted by x."""
    pairs = ((entry[over], entry[key]) for entry in entries if key in entry and over in entry)
    return sorted((x, y) for x, y in pairs if _is_finite(x) and _is_finite(y))


def to_short(value: float) -> str:
    """``4.62416`` -> ``"4.624"``, ``6843.2`` -> ``"6,843"``, ``2500000`` -> ``"2.5M"``."""
    size = abs(value)
    if not size < 1e12:  # NaN and infinity too
        return f"{value:.4g}"
    if size < 1e6:
        return f"{value:.4g}" if size < 1000 else f"{value:,.0f}"
    unit, name = (1e6, "M") if size < 1e9 else (1e9, "B")
    return f"{value / unit:.4g}{name}"


def to_percent(value: float) -> str:
    """``0.15195`` -> ``"15.2%"``, ``0.0025`` -> ``"0.25%"``."""
    return f"{100 * value:.3g}%"


def to_gigabytes(value: float) -> str:
    """``1234567890`` -> ``"1.23 GB"``."""
    return f"{value / 1e9:.3g} GB"


def to_duration(seconds: float) -> str:
    """``75`` -> ``"1m15s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


to_loss, to_count = "{:.4f}".format, "{:,.0f}".format


class Metric(NamedTuple):
    """A number that is logged under ``name``, and how to show it.

    title:      its name on pages and in the model card
    form:       formats a value
    short:      its name in a progress line; empty: not shown there
    is_figure:  whether its last value (for an evaluation, the first too) is among the results of a run
    chart:      the y axis of its chart over the steps, from "zero" or one that "fits"; empty: no chart
    unit:       the unit on the chart
    """

    name: str
    title: str
    form: Callable[[float], str]
    short: str = ""
    is_figure: bool = True
    chart: Literal["", "zero", "fits"] = ""
    unit: str = ""


_TABLE = (
    Metric("eval_loss", "Evaluation loss", to_loss, "eval loss", unit="nats per target token"),
    Metric("eval_token_accuracy", "Evaluation accuracy", to_percent, "eval accuracy"),
    Metric("loss", "Loss", to_loss, "loss", chart="fits", unit="nats per target token"),
    Metric("token_accuracy", "Token accuracy", to_percent, "accuracy", True, "zero", "of the target tokens"),
    Metric("learning_rate", "Learning rate", to_short, "lr", is_figure=False, chart="zero"),
    Metric("grad_norm", "Gradient norm", to_short, "grad norm", False, "zero", "before clipping"),
    Metric("step", "Steps", to_count),
    Metric("seconds", "Time", to_duration),
    Metric("tokens_seen", "Tokens", to_count),
    Metric("target_tokens_seen", "Target tokens", to_count),
    Metric("tokens_per_second", "Tokens per second", to_count, "tokens/s", chart="zero"),
    Metric("mfu", "MFU", to_percent, chart="zero", unit="share of the machine's peak"),
    Metric("peak_memory_bytes", "Peak memory", to_gigabytes, chart="zero", unit="so far"),
    Metric("padding_share", "Padding", to_percent, chart="zero", unit="share of the positions in a batch"),
    Metric("gpu_memory", "GPU memory", to_percent, "GPU memory", is_figure=False),
    Metric("gpu_utilization", "GPU utilization", to_percent, "busy", is_figure=False),
    # Figures of hf-clm evaluate that are in no log.
    Metric("examples", "Examples", to_count, is_figure=False),
    Metric("dropped", "Dropped examples", to_count, is_figure=False),
    Metric("skipped", "Skipped lines", to_count, is_figure=False),
    Metric("rows", "Rows", to_count, is_figure=False),
    Metric("target_tokens", "Target tokens", to_count, is_figure=False),
    Metric("perplexity", "Perplexity", to_short, is_figure=False),
    Metric("bits_per_byte", "Bits per byte", to_loss, is_figure=False),
    Metric("loss_first", "Loss of first tokens", to_loss, is_figure=False),
    Metric("loss_content", "Loss of tokens in between", to_loss, is_figure=False),
    Metric("loss_stop", "Loss of stop tokens", to_loss, is_figure=False),
    Metric("asked", "Prompts answered", to_count, is_figure=False),
    Metric("exact_match", "Answers equal to the target", to_percent, is_figure=False),
    Metric("stopped", "Answers with a stop token", to_percent, is_figure=False),
    Metric("chrf", "chrF", to_short, is_figure=False),
    Metric("bleu", "BLEU", to_short, is_figure=False),
    Metric("accuracy", "Accuracy of the choices", to_percent, is_figure=False),
    Metric("majority", "Share of the commonest choice", to_percent, is_figure=False),
    Metric("f1", "F1", to_percent, is_figure=False),
)
METRICS = {metric.name: metric for metric in _TABLE}

# Logged with an evaluation, but not figures of the model.
NOT_FIGURES = re.compile(r"eval_(.*_)?(target_tokens|runtime|.*_per_second|model_preparation_time)")


def is_evaluated(key: str) -> bool:
    """Returns whether a key of a log event is a figure of an evaluation, such as ``eval_news_chrf``."""
    return key.startswith("eval_") and not NOT_FIGURES.fullmatch(key)


def metric_of(key: str) -> Metric | None:
    """Returns how to show a key of a log event. Figures of named sets and of answers are named after the key.

    ``eval_news_token_accuracy`` -> ``"news accuracy"``
    """
    if key in METRICS or not is_evaluated(key):
        return METRICS.get(key)
    name = key.removeprefix("eval_").replace("token_accuracy", "accuracy").replace("_", " ")
    form = to_percent if key.endswith(("accuracy", "exact_match")) else to_short
    return Metric(key, name, form, name)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _to_object(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


@lru_cache(maxsize=8)
def _to_leaves(path: str, changed: int) -> dict[str, Any]:
    """Returns the recipe's dotted keys, cached until the file changes, as parsing YAML is slow."""
    from hf_clm.recipe.text import leaves
    from hf_clm.recipe.yaml_text import load_yaml

    return dict(leaves(load_yaml(path)[0]))
