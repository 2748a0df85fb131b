"""Writes the model card, README.md in the folder of a run, from its record and its recipe."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_clm.recipe.sections import Card
from hf_clm.run_folder import METRICS, RunFolder, RunRecord, metric_of, write_text

TAG = "hf_clm"
FENCE = "````"  # longer than fences in most recipes and texts
VERIFICATION = "## Verification\n\n"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
MAX_FILES = 5
SHOWN_ELSEWHERE = ("Evaluated on", "Steps")  # figures that other parts of the card contain


def write_card(run: RunFolder, section: Card, *, examples: Sequence[str] = ()) -> None:
    """Writes the card; ``examples`` are training texts to show."""
    from jinja2 import Environment, StrictUndefined

    from hf_clm.recipe.yaml_text import write_yaml

    record = run.record
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _to_cell, "fenced": _to_fenced, "files": _to_files}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front=write_yaml(front_matter(record, section)),
        run=run,
        record=record,
        base=base_model(record),
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8").strip(),
        examples=examples,
        figures={name: value for name, value in run.figures().items() if name not in SHOWN_ELSEWHERE}
        | named_figures(run),
    )
    write_text(run.path / "README.md", text)


def write_verification(folder: Path, sentence: str) -> None:
    """Writes what a verification found into the card, or removes it if the sentence is empty."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = re.sub(rf"{VERIFICATION}.*?(?=## )", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if sentence:
        before, heading, after = text.rpartition("\n## Recipe\n")  # an example above may have such a line
        text = f"{before}\n{VERIFICATION}{sentence}\n{heading}{after}" if heading else text
    write_text(path, text)


def front_matter(record: RunRecord, section: Card) -> dict[str, Any]:
    """Returns the metadata for the Hub. A base model is included only if it is on the Hub."""
    tags = [TAG, record.stage, *(["lora"] if record.is_adapter else [])]
    about: dict[str, Any] = {"library_name": "peft" if record.is_adapter else "transformers"}
    about |= {"pipeline_tag": "text-generation", "tags": tags}
    if base := base_model(record):
        about |= {"base_model": base, "base_model_relation": "adapter" if record.is_adapter else "finetune"}
    optional = {"license": section.license, "language": section.language}
    return about | {key: value for key, value in optional.items() if value}


def named_figures(run: RunFolder) -> dict[str, str]:
    """The figures of evaluation sets with names of their own, and of answers, before and after."""
    named = ((metric_of(key), values) for key, values in run.evaluated().items() if key not in METRICS)
    return {
        f"Evaluation: {metric.title}": " -> ".join(map(metric.form, values))
        for metric, values in named
        if metric
    }


def base_model(record: RunRecord) -> str | None:
    """Returns the Hub name of the base model, or None for a local folder and for random weights."""
    name = record.model
    is_local = record.from_scratch or Path(name).expanduser().exists() or name.startswith(("/", ".", "~"))
    return None if is_local else name


def _to_cell(text: object) -> str:
    """Escapes text for a cell of a table."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _to_files(paths: Sequence[str]) -> str:
    """Lists the first file names, without their folders."""
    names = sorted({os.path.basename(path.rstrip("/")) for path in paths})
    more = f" and {len(names) - MAX_FILES} more" if len(names) > MAX_FILES else ""
    return ", ".join(names[:MAX_FILES]) + more


def _to_fenced(text: str, language: str = "") -> str:
    fence = FENCE
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
