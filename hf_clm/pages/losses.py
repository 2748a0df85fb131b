"""``hf-clm evaluate --html``: the loss of each token as a page that opens from disk, without a script.

losses.html with the figures, the tables, and the rows with the largest losses. A token says what the model
expected in its place: by its title to who points at it, and at the foot of the page to who taps it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_html
from pathlib import Path

import numpy as np

from hf_clm.evaluation.answers import Sample
from hf_clm.evaluation.evaluate import Evaluation, to_figures, to_tables
from hf_clm.evaluation.likelihood import Guesses, guess_row, target_places
from hf_clm.pages.rows import Vocabulary, escape
from hf_clm.schema import TokenizedExample

TEMPLATE = Path(__file__).with_name("losses.html")
ALTERNATIVES = 4  # beside the target
HEATS = 10  # colours, each for so many nats
NATS = 0.5


def write_losses(path: Path, evaluation: Evaluation, *, title: str, rows: int) -> None:
    """Writes the page: all figures, and up to ``rows`` answers and rows, the worst first."""
    found = evaluation.to_json()
    parts = [f'<h1>Losses</h1><p class="quiet">{_text(title)}</p>', _figures(to_figures(found))]
    for name, table in to_tables(found).items():
        parts += [f"<h2>{name.capitalize()}</h2>", _table(*table)]
    if evaluation.answers:
        samples = sorted(evaluation.answers.samples, key=lambda sample: sample.is_exact)[:rows]
        title = f"{len(samples):,} of {len(evaluation.answers.samples):,} answers, those that differ first"
        parts += [f"<h2>{title}</h2>", _samples(samples)]
    losses = evaluation.likelihood.row_losses
    worst = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:rows].tolist()
    parts += [f"<h2>{len(worst):,} of {len(losses):,} rows, the largest mean loss first</h2>", _legend()]
    vocabulary = Vocabulary(evaluation.run.tokenizer)
    for number in worst:
        row = evaluation.dataset[number]
        place = evaluation.read.places[int(evaluation.dataset.rows.sources[number])]
        guesses = guess_row(evaluation.run.model, row, alternatives=ALTERNATIVES + 1)
        parts.append(_row(place, row, guesses=guesses, vocabulary=vocabulary))
    heats = "\n".join(f".h{heat} {{ --heat: {heat * 100 // (HEATS - 1)}; }}" for heat in range(HEATS))
    page = TEMPLATE.read_text(encoding="utf-8").replace("HEAT\n", heats + "\n")
    before, after = page.split("CONTENT")
    path.write_bytes((before + "\n".join(parts) + after).encode("utf-8", errors="backslashreplace"))


def _figures(figures: Mapping[str, str]) -> str:
    cells = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures.items())
    return f"<dl>{''.join(cells)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _samples(samples: Iterable[Sample]) -> str:
    rows = []
    for sample in samples:
        marks = "good" if sample.is_exact else "bad"
        end = "" if sample.stopped else " …"  # the model gave no stop token
        cells = {"prompt": sample.prompt, "target": sample.target, "generated": sample.text + end}
        columns = (
            f'<td data-name="{name}" class="{marks if name == "generated" else ""}">{_text(cell)}</td>'
            for name, cell in cells.items()
        )
        rows.append(f"<tr>{''.join(columns)}</tr>")
    head = "<thead><tr><th>prompt</th><th>target</th><th>generated</th></tr></thead>"
    return f'<table class="samples">{head}<tbody>{"".join(rows)}</tbody></table>'


def _legend() -> str:
    colours = "".join(
        f'<span class="t h{heat}">{heat * NATS:g}{"" if heat < HEATS - 1 else " or more"}</span>'
        for heat in range(0, HEATS, 3)
    )
    hint = (
        "nats of loss; what has no colour is only read. Point at a token, or tap it, for what was expected."
    )
    return f'<div class="legend">{colours} <span class="quiet">{hint}</span></div>'


def _row(place: str, row: TokenizedExample, *, guesses: Guesses, vocabulary: Vocabulary) -> str:
    """A row with its place: read-only text as it is, each target, or character of several, in its colour."""
    ids = row["input_ids"]
    order = {token: n for n, token in enumerate(target_places(np.array(row["labels"])).tolist())}
    pieces = []
    for start, stop, text in vocabulary.to_groups(ids):
        shown = _text(text).replace("\n", "↵\n")
        own = [token for token in range(start, stop) if token in order]
        if own:
            heat = _heat(max(float(guesses.nll[order[token]]) for token in own))
            tips = [_tip(ids[token], order[token], guesses=guesses, vocabulary=vocabulary) for token in own]
            tip = _text("\n".join(tips))
            shown = f'<span class="t h{heat}" tabindex="0" title="{tip}">{shown}</span>'
        pieces.append(shown)
    counts = f"mean loss {guesses.nll.mean():.3f} of {len(order):,} targets"
    head = f'<h3>{_text(place)} <span class="quiet">{counts}</span></h3>'
    return f'<article class="row">{head}<div class="tokens">{"".join(pieces)}</div></article>'


def _heat(nll: float) -> int:
    return int(nll / NATS) if nll < HEATS * NATS else HEATS - 1  # NaN is the hottest too


def _tip(token: int, number: int, *, guesses: Guesses, vocabulary: Vocabulary) -> str:
    """What the model expected in the place of a target; ``number`` is that of the target in its row."""
    nll = float(guesses.nll[number])
    found = zip(guesses.likeliest[number].tolist(), guesses.shares[number].tolist(), strict=True)
    others = [f"{_spell(other, vocabulary)} {share:.1%}" for other, share in found if other != token]
    lines = [
        f"{_spell(token, vocabulary)}: loss {nll:.3f}, probability {math.exp(-nll):.1%}, "
        f"rank {int(guesses.rank[number]):,}",
        f"others: {', '.join(others[:ALTERNATIVES])}",
    ]
    return "\n".join(lines)


def _spell(token: int, vocabulary: Vocabulary) -> str:
    text = next(vocabulary.to_groups([token]))[2]
    return "'" + text.replace("\n", "↵") + "'"


def _text(text: str) -> str:
    """Text for the page: what could steer it is spelled, and it opens no tag and ends no attribute."""
    return escape_html(escape(text))
