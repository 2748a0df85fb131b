"""README.md of a run's folder: the model card, made of what run.json and the recipe say."""

import os
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

TAG = "hf_clm"
FENCE = "````"  # longer than any fence that a recipe or a text is likely to hold


def write_card(
    folder: Path,
    run: Mapping[str, Any],
    *,
    license: str | None = None,
    language: Sequence[str] = (),
    samples: Sequence[str] = (),
) -> None:
    """Writes the card; ``run`` is what run.json holds, ``samples`` are training texts to show."""
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    about = {**front_matter(run), **({"license": license} if license else {})}
    about |= {"language": list(language)} if language else {}
    parts = [
        _to_yaml(about),
        f"# {folder.absolute().name}\n\n{describe(run)}",
        f"## Use\n\n{use(run)}",
        f"## Figures\n\n{figures(run)}\n\n![loss](loss.png)",
        f"## Data\n\n{data(run)}",
    ]
    if samples:
        parts.append("## Examples of the data\n\n" + "\n\n".join(_fenced(text) for text in samples))
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    parts += [f"## Recipe\n\n{_fenced(recipe.strip(), 'yaml')}", f"## Versions\n\n{versions}"]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads; the base model where it is one of the Hub, not a folder of somebody's machine."""
    is_adapter = run["trained_parameters"] < run["parameters"]
    tags = [TAG, run["stage"], *(["lora"] if is_adapter else [])]
    about: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    about |= {"pipeline_tag": "text-generation", "tags": tags}
    if base := base_model(run):
        about |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return about


def base_model(run: Mapping[str, Any]) -> str | None:
    """The name on the Hub that the weights came from; None for a folder, and for random weights."""
    name = run["model"]
    is_local = run["from_scratch"] or Path(name).expanduser().exists() or name.startswith(("/", ".", "~"))
    return None if is_local else name


def describe(run: Mapping[str, Any]) -> str:
    """What it is, in a sentence or two."""
    kind = "Pretrained" if run["stage"] == "pretrain" else "Trained" if run["from_scratch"] else "Fine-tuned"
    origin = f"from [{base}](https://huggingface.co/{base})" if (base := base_model(run)) else ""
    origin = origin or ("from random weights" if run["from_scratch"] else "from a local model")
    train = run["train"]
    size = f"{run['parameters']:,} parameters, {run['trained_parameters']:,} of them trained"
    learned = f"{train['target_tokens']:,} learned tokens of {train['tokens']:,}"
    records = f"{train['input_rows']:,} records with {learned}"
    if "stream" in run:  # the others are those that were checked before
        records = f"{run['tokens_seen']:,} tokens of a stream"
    amount = f"{records}, {run['steps_done']:,} steps"
    return f"{kind} {origin}: {size}, on {amount}."


def use(run: Mapping[str, Any]) -> str:
    """How to open it, and how a prompt looks."""
    is_adapter = run["trained_parameters"] < run["parameters"]
    name, imports = "AutoModelForCausalLM", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if is_adapter:
        name = "AutoPeftModelForCausalLM"
        imports = [f"from peft import {name}", "from transformers import AutoTokenizer"]
    code = [
        *imports,
        "",
        'tokenizer = AutoTokenizer.from_pretrained("NAME")',
        f'model = {name}.from_pretrained("NAME")',
    ]
    command = "`hf-clm generate NAME --prompt ...`"
    prompts = f"Prompts have the format `{run['format']}` of hf_clm: {command} renders them."
    if run["format"] in ("messages", "sharegpt"):
        prompts = "Prompts are chats: `tokenizer.apply_chat_template`."
    elif run["format"] == "text":
        prompts = "A prompt is a text, which the model continues."
    return f"{_fenced(chr(10).join(code), 'python')}\n\n{prompts}"


def figures(run: Mapping[str, Any]) -> str:
    """Loss and accuracy before and after, and what it took."""
    on = "held-out data" if run["evaluation"] else "training data"
    rows = [
        (f"loss on {on}, nats a token", f"{run['loss_before']:.4f} -> {run['loss_after']:.4f}"),
        ("token accuracy", f"{run['token_accuracy_before']:.1%} -> {run['token_accuracy_after']:.1%}"),
        ("tokens seen", f"{run['tokens_seen']:,}"),
        ("tokens a second", f"{run['tokens_per_second']:,.0f}"),
        ("hours", f"{run['seconds'] / 3600:.2f}"),
        ("device", f"{run['processes']} x {run['device']}, {run['precision']}"),
    ]
    return _to_table(("", ""), rows)


def data(run: Mapping[str, Any]) -> str:
    """Files by name, what became of their rows, and the certificate of the labels."""
    parts = []
    named = {f"eval_{name}": counts for name, counts in run.get("evaluations", {}).items()}
    evaluated = named or ({"eval": run["evaluation"]} if run["evaluation"] else {})
    for name, counts in ({"train": run["train"]} | evaluated).items():
        files = sorted({os.path.basename(file) for file in counts["files"]})
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        certificate = run["proof"].get(name, {}).get("certificate", {})
        fates = ", ".join(f"{count:,} {fate}" for fate, count in sorted(counts["fates"].items()))
        parts.append((name, shown, fates, f"`{certificate['content_hash']}`" if certificate else "none"))
    lines = _to_table(("", "files", "rows", "sha256 of the certified labels"), parts)
    rows = "the rows of a stream that were read first" if "stream" in run else "every row"
    proved = f"The labels of {rows} were proved on an independent path before the first step."
    return "\n\n".join([lines, *mixing(run), proved])


def mixing(run: Mapping[str, Any]) -> list[str]:
    """What each source gave to an epoch, as a paragraph and a table; nothing where none was weighed."""
    if "mixing" not in run:
        return []
    by = run["mixing"]["by"].replace("_", " ")
    rows = [
        (os.path.basename(one["source"].rstrip("/")), f"{one['drawn']:.1%}", f"{one['passes']:.2f}")
        for one in run["mixing"]["sources"]
    ]
    return ["An epoch was mixed of these sources:", _to_table(("", f"share of the {by}", "passes"), rows)]


def _to_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escape(cell) for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _escape(cell: str) -> str:
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str = "") -> str:
    fence = FENCE
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _to_yaml(about: Mapping[str, Any]) -> str:
    text = StringIO()
    YAML().dump(dict(about), text)
    return f"---\n{text.getvalue()}---"
