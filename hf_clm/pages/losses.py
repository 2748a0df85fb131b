"""``hf-clm evaluate --html``: the loss of each token as a page that opens from disk and runs no script.

Each token tells what the model expected in its place: in its title for a reader who points at it, and at the
foot of the page for one who taps it. With ``--before`` each row is shown twice, as two models read it.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_clm.evaluation.evaluate import COMPARED, Evaluation, to_tables
from hf_clm.evaluation.likelihood import Guesses, guess_row, target_places
from hf_clm.pages.report import Table, render
from hf_clm.pages.rows import Vocabulary, escape
from hf_clm.run_folder import METRICS, write_text
from hf_clm.schema import TokenizedExample

ALTERNATIVES = 4  # shown beside the target
HEATS = 10  # colours in style.css, each for this many nats:
NATS = 0.5


class Reading(NamedTuple):
    """How a model reads a row: the mean loss of its targets, and (text, heat, tip) of its tokens."""

    name: str
    mean: float
    tokens: list[tuple[str, int | None, str]]


def write_losses(path: Path, evaluation: Evaluation, *, title: str, rows: int) -> None:
    """Writes the page: all figures, and up to ``rows`` answers and rows, the worst first."""
    found, losses = evaluation.to_json(), evaluation.likelihood.row_losses
    samples = evaluation.answers.samples if evaluation.answers else []
    tables = {name: table for name, table in to_tables(found).items() if name != "before and after"}
    content = {
        "title": "Losses",
        "about": escape(title),
        "before": escape(evaluation.before[0].name) if evaluation.before else "",
        "changes": to_changes(found),
        "figures": {to_title(key): to_text(key, found[key]) for key in to_single(found)},
        "tables": {
            name: Table([to_title(key) for key in head], rows, is_numeric=True)
            for name, (head, rows) in tables.items()
        },
        "samples": sorted(samples, key=lambda sample: sample.is_exact)[:rows],
        "answers": len(samples),
        "escape": escape,
        "rows": list(_to_rows(evaluation, count=rows)),
        "count": len(losses),
        "legend": [(heat, f"{heat * NATS:g}{'+' if heat == HEATS - 1 else ''}") for heat in range(HEATS)],
    }
    write_text(path, render("losses.html", content))


def to_changes(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the figures at the top of the page by title: (before, after), or one value."""
    models = [found["before"], found] if "before" in found else [found]
    return {to_title(key): [to_text(key, one[key]) for one in models] for key in COMPARED}


def to_single(found: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the other single figures."""
    return [key for key, value in found.items() if not isinstance(value, dict | list) and key not in COMPARED]


def to_title(key: str) -> str:
    """``token_accuracy`` -> ``Token accuracy``; a word that is no metric stays as it is."""
    return METRICS[key].title if key in METRICS else key.replace("_", " ")


def to_text(key: str, value: float | str) -> str:
    """Returns a figure as text, in the form of its metric."""
    return METRICS[key].form(value) if key in METRICS and not isinstance(value, str) else str(value)


def _to_rows(evaluation: Evaluation, *, count: int) -> Iterator[dict[str, Any]]:
    """Yields the rows with the largest mean loss: place, number of targets, and a Reading by each model."""
    vocabulary = Vocabulary(evaluation.run.tokenizer)
    losses = np.nan_to_num(evaluation.likelihood.row_losses, nan=np.inf)
    for number in np.argsort(-losses, kind="stable")[:count].tolist():
        row = evaluation.dataset[number]
        place = evaluation.read.places[int(evaluation.dataset.rows.sources[number])]
        guesses = []
        if evaluation.before:
            before = evaluation.before[0]
            with before.active():
                guesses.append(("before", guess_row(before.model, row, alternatives=ALTERNATIVES + 1)))
        after = guess_row(evaluation.run.model, row, alternatives=ALTERNATIVES + 1)
        guesses.append(("after" if guesses else "", after))
        readings = [_to_reading(name, row, own, vocabulary=vocabulary) for name, own in guesses]
        yield {"place": escape(place), "targets": len(after.nll), "readings": readings}


def _to_reading(name: str, row: TokenizedExample, guesses: Guesses, *, vocabulary: Vocabulary) -> Reading:
    return Reading(name, float(guesses.nll.mean()), list(_to_tokens(row, guesses, vocabulary=vocabulary)))


def _to_tokens(
    row: TokenizedExample, guesses: Guesses, *, vocabulary: Vocabulary
) -> Iterator[tuple[str, int | None, str]]:
    """Yields (text, heat, tip) of each target, or character of several; other text has no heat."""
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
    """Returns what the model expected in the place of a target, the ``number``-th of its row."""
    nll = float(guesses.nll[number])
    found = zip(guesses.likeliest[number].tolist(), guesses.shares[number].tolist(), strict=True)
    others = [f"{_spell(other, vocabulary)} {share:.1%}" for other, share in found if other != token]
    said = f"loss {nll:.3f}, probability {math.exp(-nll):.1%}, rank {int(guesses.rank[number]):,}"
    return f"{_spell(token, vocabulary)}: {said}\nothers: {', '.join(others[:ALTERNATIVES])}"


def _spell(token: int, vocabulary: Vocabulary) -> str:
    text = next(vocabulary.to_groups([token]))[2]
    return "'" + escape(text).replace("\n", "↵") + "'"
