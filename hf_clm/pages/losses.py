"""``hf-clm evaluate --html``: the loss of each token as a page that opens from disk, without a script.

A token says what the model expected in its place: by its title to who points at it, and at the foot of the
page to who taps it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.evaluation.evaluate import Evaluation, to_figures, to_tables
from hf_clm.evaluation.likelihood import Guesses, guess_row, target_places
from hf_clm.pages.report import Table, render
from hf_clm.pages.rows import Vocabulary, escape
from hf_clm.run_folder import write_text
from hf_clm.schema import TokenizedExample

ALTERNATIVES = 4  # beside the target
HEATS = 10  # colours in style.css, each for this many nats:
NATS = 0.5


def write_losses(path: Path, evaluation: Evaluation, *, title: str, rows: int) -> None:
    """Writes the page: all figures, and up to ``rows`` answers and rows, the worst first."""
    found, losses = evaluation.to_json(), evaluation.likelihood.row_losses
    samples = evaluation.answers.samples if evaluation.answers else []
    content = {
        "title": "Losses",
        "about": escape(title),
        "figures": to_figures(found),
        "tables": {name: Table(*table, is_numeric=True) for name, table in to_tables(found).items()},
        "samples": sorted(samples, key=lambda sample: sample.is_exact)[:rows],
        "answers": len(samples),
        "escape": escape,
        "rows": list(_to_rows(evaluation, count=rows)),
        "count": len(losses),
        "legend": [
            (heat, heat * NATS, "" if heat < HEATS - 1 else " or more") for heat in range(0, HEATS, 3)
        ],
    }
    write_text(path, render("losses.html", content))


def _to_rows(evaluation: Evaluation, *, count: int) -> Iterator[dict[str, Any]]:
    """The rows with the largest mean loss: place, mean, number of targets, tokens."""
    vocabulary = Vocabulary(evaluation.run.tokenizer)
    losses = np.nan_to_num(evaluation.likelihood.row_losses, nan=np.inf)
    for number in np.argsort(-losses, kind="stable")[:count].tolist():
        row = evaluation.dataset[number]
        place = evaluation.read.places[int(evaluation.dataset.rows.sources[number])]
        guesses = guess_row(evaluation.run.model, row, alternatives=ALTERNATIVES + 1)
        tokens = list(_to_tokens(row, guesses, vocabulary=vocabulary))
        counts = {"mean": guesses.nll.mean(), "targets": len(guesses.nll)}
        yield {"place": escape(place), **counts, "tokens": tokens}


def _to_tokens(
    row: TokenizedExample, guesses: Guesses, *, vocabulary: Vocabulary
) -> Iterator[tuple[str, int | None, str]]:
    """(text, heat, what was expected) of each target, or character of several; no heat for other text."""
    ids = row["input_ids"]
    order = {token: n for n, token in enumerate(target_places(np.array(row["labels"])).tolist())}
    for start, stop, text in vocabulary.to_groups(ids):
        own = [token for token in range(start, stop) if token in order]
        heat = max((_heat(float(guesses.nll[order[token]])) for token in own), default=None)
        tips = [_tip(ids[token], order[token], guesses=guesses, vocabulary=vocabulary) for token in own]
        yield escape(text).replace("\n", "↵\n"), heat, "\n".join(tips)


def _heat(nll: float) -> int:
    return int(nll / NATS) if nll < HEATS * NATS else HEATS - 1  # NaN is the hottest too


def _tip(token: int, number: int, *, guesses: Guesses, vocabulary: Vocabulary) -> str:
    """What the model expected in the place of a target; ``number`` is that of the target in its row."""
    nll = float(guesses.nll[number])
    found = zip(guesses.likeliest[number].tolist(), guesses.shares[number].tolist(), strict=True)
    others = [f"{_spell(other, vocabulary)} {share:.1%}" for other, share in found if other != token]
    said = f"loss {nll:.3f}, probability {math.exp(-nll):.1%}, rank {int(guesses.rank[number]):,}"
    return f"{_spell(token, vocabulary)}: {said}\nothers: {', '.join(others[:ALTERNATIVES])}"


def _spell(token: int, vocabulary: Vocabulary) -> str:
    text = next(vocabulary.to_groups([token]))[2]
    return "'" + escape(text).replace("\n", "↵") + "'"
