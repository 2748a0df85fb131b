"""``hf-clm inspect``: shows the rows that the training of a recipe or a run is given."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from pathlib import Path
from textwrap import wrap

import numpy as np

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.prepared.cache import read_splits
from hf_clm.data.prepared.sets import STREAM_HEAD
from hf_clm.data.read.plain_template import settle_render
from hf_clm.data.split import Split, build_collator
from hf_clm.draft import open_recipe
from hf_clm.errors import RecipeError
from hf_clm.pages.documents import Reader, inspect_rows
from hf_clm.pages.labels import Lengths, write_labels
from hf_clm.pages.rows import Row, escape
from hf_clm.pages.terminal import legend, to_lines
from hf_clm.recipe.sections import EVAL, TRAIN
from hf_clm.text.tokenizer import load_tokenizer
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments

HTML_ROWS = 10_000  # more rows would make the page slow to open
LISTED_DROPS = 5


@dataclass(frozen=True)
class View:
    """What to show of a split, and how. ``worst`` reads all rows and shows those with the worst flags."""

    rows: int = 5
    html: str | None = None
    split: str = "train"
    color: str = "auto"
    worst: bool = False


def inspect(target: str, overrides: list[str], *, view: View, options: Sequence[str] = ()) -> str:
    """Returns the text to print, and writes the page if the view names one.

    Raises RecipeError for a folder that is not that of a run, and for a split that the recipe does not have.
    """
    recipe = open_recipe(target, overrides, options=options)
    arguments = training_arguments(recipe)
    known = [TRAIN, *(recipe.data.eval_sets or ([EVAL] if recipe.data.eval_fraction else []))]
    name = view.split if view.split in known else f"{EVAL}_{view.split}"
    if name not in known:
        fix = f"--split {' or '.join(known)}" if len(known) > 1 else "set data.eval or data.eval_fraction"
        raise RecipeError(f"the recipe has no set {view.split!r}", where=target, fix=fix)
    if recipe.tokenizer.train is not None and Path(target).is_dir():  # the run has trained it
        tokenizer = load_tokenizer(target, pad_token=recipe.tokenizer.pad_token)
        recipe = settle_render(recipe, tokenizer)
    else:
        tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    split = read_splits(recipe, tokenizer, seed=arguments.seed)[name]
    batch_size = arguments.train_batch_size if name == TRAIN else arguments.eval_batch_size
    reader = Reader(split, tokenizer, recipe=recipe)
    found = inspect_rows(split, reader, collate=build_collator(recipe, tokenizer), batch_size=batch_size)
    wanted = max(HTML_ROWS, view.rows) if view.html else view.rows
    rows = nlargest(wanted, found, key=_severity) if view.worst else list(islice(found, wanted))
    lengths = Lengths(split.ledger.numbers("tokens"), recipe.data.max_length)
    facts = to_facts(split, lengths, batch_size=batch_size, shown=len(rows))
    if recipe.data.streaming and name == TRAIN:
        facts = {"stream": f"the first {STREAM_HEAD:,} documents of each source", **facts}
    lines = _text(rows[: view.rows], facts, reader=reader, colors=_wants_colors(view.color))
    if view.html:
        write_labels(
            view.html,
            rows,
            vocabulary=reader.vocabulary,
            facts={"from": target or str(recipe.train["output_dir"]), **facts},
            lengths=lengths,
        )
        lines.append(f"wrote {view.html}: {len(rows):,} of {len(split.dataset):,} rows")
    return "\n".join(lines)


def to_facts(split: Split, lengths: Lengths, *, batch_size: int, shown: int) -> dict[str, str]:
    """Returns the counts of a split by name, as text."""
    ledger, targets = split.ledger, split.target_tokens
    drops = [f"{ledger.places[at]} ({ledger.fates[at].reason})" for at in ledger.where("dropped").tolist()]
    tokens, limit = lengths.tokens, lengths.limit
    padded = padded_fill(split.lengths, limit, batch_size=batch_size)
    packed = f", packed {split.dataset.fill:.1%}" if isinstance(split.dataset, PackedDataset) else ""
    facts = {
        "rows": f"{len(split.dataset):,} ({shown:,} shown), of {len(split.lengths):,} documents",
        "tokens": f"{split.tokens:,}, {targets:,} targets ({targets / split.tokens:.1%})",
        "examples": ", ".join(f"{count:,} {fate}" for fate, count in split.fates.most_common()),
        "length": f"median {np.median(tokens):,.0f}, longest {tokens.max(initial=0):,}; "
        f"{(tokens > limit).mean():.1%} over max_length {limit:,}",
        "fill": f"padded in batches of {batch_size} {padded:.1%}{packed}",
    }
    if split.mix:
        shares = [f"{one.source} {one.drawn:.1%} ({one.asked:.1%} asked)" for one in split.mix.shares]
        facts["mixing"] = ", ".join(shares)
    if drops:
        facts["dropped"] = "; ".join(drops[:LISTED_DROPS]) + ("; ..." if len(drops) > LISTED_DROPS else "")
    if ledger.spelled:
        spelled = ledger.spelled.most_common(LISTED_DROPS)
        facts["control tokens in text"] = ", ".join(f"{text!r} × {count:,}" for text, count in spelled)
    return facts


def padded_fill(lengths: np.ndarray, max_length: int, *, batch_size: int) -> float:
    """Returns the share of real tokens if each row were padded to the longest of its batch."""
    rows = np.array(
        [min(max_length, length - i) for length in lengths.tolist() for i in range(0, length, max_length)]
    )
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return float(rows.sum() / sum(len(batch) * batch.max() for batch in batches))


def _severity(row: Row) -> tuple[int, ...]:
    return row.severity


def _wants_colors(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    is_off = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not is_off


def _text(rows: list[Row], facts: dict[str, str], *, reader: Reader, colors: bool) -> list[str]:
    width = shutil.get_terminal_size((80, 24)).columns
    lines = [line for name, value in facts.items() for line in wrap(escape(f"{name}: {value}"), width)]
    lines += ["", legend(colors=colors)]
    for row in rows:
        lines += ["", *to_lines(row, reader.vocabulary, width=width, colors=colors)]
    return lines
