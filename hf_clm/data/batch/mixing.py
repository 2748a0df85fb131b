"""How much of each source an epoch of the run holds, and which of its rows: the seed alone decides.

              asked: 3 to 1, 8 rows    drawn                      in one order
a0 a1 a2 a3   6 rows                   a0 a1 a2 a3 | a2 a0    }   a2 b0 a0 a3 a1 a2 b2 a0
b0 b1 b2      2 rows                   b2 b0                  }

The rows were tokenized before, each once; an epoch is a list of their numbers, some of them more than once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any

import numpy as np
import torch

from hf_clm.data.batch.packing import Pieces
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.errors import DataError
from hf_clm.schema import TokenizedExample

PURPOSE = 0x6D6978  # beside the seed: numbers that nothing else is drawn by
CHUNK_ROWS = 65_536  # that are drawn in one step
MOST_ROWS = 10**9  # of an epoch: their numbers take 8 GB
LONGEST_NAME = 40  # letters of a source in the table


@dataclass(frozen=True)
class MixOptions:
    """How sources are mixed: by ``weights``, by ``epochs``, or by their sizes under a ``temperature``.

    Args:
        by: what is counted: ``rows``, ``tokens`` or ``target_tokens``.
        weights, epochs: one for each source, not both.
        replacement: every row is drawn anew.
        size: of an epoch; None: as much as all sources hold together.
    """

    by: str = "rows"
    weights: Sequence[float] | None = None
    epochs: Sequence[float] | None = None
    temperature: float = 1.0
    replacement: bool = False
    size: int | None = None


@dataclass(frozen=True)
class Share:
    """What an epoch holds of one source; ``asked`` and ``drawn`` are shares of what the mix counts.

    ``rows_there`` can be drawn, ``rows`` are, ``rows_left_out`` are not, ``passes`` is ``rows / rows_there``.
    """

    source: str
    asked: float
    drawn: float
    rows_there: int
    rows: int
    rows_left_out: int
    passes: float
    tokens: int
    target_tokens: int


@dataclass(frozen=True, eq=False)
class Mix:
    """An epoch of the run. D = tokenized rows in it, E = examples.

    numbers  (D,) int64: the tokenized rows, in their order
    times    (E,) int64: how often it holds each example
    """

    by: str
    replacement: bool
    numbers: np.ndarray
    times: np.ndarray
    shares: list[Share]

    def to_json(self) -> dict[str, Any]:
        """What run.json holds; ``sha256`` is that of the rows in their order."""
        digest = hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()
        shares = [asdict(share) for share in self.shares]
        return {"by": self.by, "replacement": self.replacement, "sources": shares, "sha256": digest}

    def to_lines(self) -> list[str]:
        """A small table: what was asked, and what an epoch holds."""
        names = [_shorten(share.source) for share in self.shares]
        width = max(len(self.by) + 3, *map(len, names))
        heads = ("rows", "tokens", "targets")
        sizes = "".join(f"{head:>14}" for head in heads)
        lines = [f"{'by ' + self.by.replace('_', ' '):<{width}}{'asked':>9}{'drawn':>9}{sizes}{'passes':>9}"]
        for name, share in zip(names, self.shares, strict=True):
            counts = "".join(f"{count:>14,}" for count in (share.rows, share.tokens, share.target_tokens))
            shares = f"{share.asked:>9.2%}{share.drawn:>9.2%}"
            lines.append(f"{name:<{width}}{shares}{counts}{share.passes:>9.2f}")
        return lines


class DrawnDataset(torch.utils.data.Dataset):
    """The rows of a tokenized dataset with these ``numbers``, some maybe more than once, unpacked."""

    def __init__(self, dataset: TokenizedDataset, numbers: np.ndarray):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.dataset[int(self.numbers[index])]

    @property
    def lengths(self) -> np.ndarray:
        """(D,) int64, tokens of each row."""
        return self.dataset.lengths[self.numbers]

    @cached_property
    def pieces(self) -> Pieces:
        """Each row as the one piece of its own."""
        starts, ends = np.zeros_like(self.numbers), np.arange(len(self) + 1)
        return Pieces(self.numbers, starts, self.lengths, ends)


@dataclass(frozen=True)
class RecordCounts:
    """Of each of E records, (E,) int64: its tokenized rows, their tokens, and those with a label."""

    rows: np.ndarray
    tokens: np.ndarray
    target_tokens: np.ndarray


def mix_rows(
    records: RecordCounts, origins: np.ndarray, *, sources: Sequence[str], options: MixOptions, seed: int
) -> Mix:
    """Draws an epoch.

    Args:
        origins: (E,) the number of the source of each record.
        sources: their names.

    Raises DataError for a source that has no row, or of which not one row would be drawn, and for more than
    MOST_ROWS.
    """
    firsts = np.concatenate([[0], np.cumsum(records.rows)])  # the rows of record i are firsts[i:i + 2]
    counts = {
        "rows": (records.rows > 0).astype(np.int64),
        "tokens": records.tokens,
        "target_tokens": records.target_tokens,
    }
    pools = [np.flatnonzero((origins == number) & (counts["rows"] > 0)) for number in range(len(sources))]
    require_sources(origins[counts["rows"] > 0], sources)
    sizes = [counts[options.by][pool] for pool in pools]
    amounts = to_amounts([int(size.sum()) for size in sizes], options)
    require_few(amounts, sizes, sources=sources)
    wanted = apportion(amounts) if options.by == "rows" and not options.epochs else amounts
    drawn = []
    for number, amount in enumerate(wanted):
        draw = draw_anew if options.replacement else draw_in_passes
        drawn.append(pools[number][draw(sizes[number], amount, seed=seed, source=number)])
        if not len(drawn[-1]):
            fix = "raise its weight, its epochs or data.mixing.size"
            got = f"{float(amounts[number]):.3g} {options.by}"
            raise DataError("its share is less than half a row", where=sources[number], got=got, fix=fix)
    order = np.random.default_rng([seed, PURPOSE, len(sources), 0])
    chosen = order.permutation(np.concatenate(drawn))
    times = np.bincount(chosen, minlength=len(origins)).astype(np.int64)
    asked = dict(zip(sources, amounts, strict=True))
    shares = _to_shares(pools, times, asked=asked, counts=counts, by=options.by)
    return Mix(options.by, options.replacement, _expand(firsts, chosen), times, shares)


def require_sources(origins: np.ndarray, sources: Sequence[str]) -> None:
    """Raises DataError for a source that none of the examples come from."""
    for number, name in enumerate(sources):
        if not (origins == number).any():
            fix = "take it out of data.train; are its rows duplicates, dropped or held out?"
            raise DataError("has no row to draw", where=name, fix=fix)


def require_few(amounts: Sequence[Fraction], sizes: Sequence[np.ndarray], *, sources: Sequence[str]) -> None:
    """Raises DataError for an epoch that would hold more than MOST_ROWS."""
    passes = [amount / max(1, int(size.sum())) for amount, size in zip(amounts, sizes, strict=True)]
    rows = [count * len(size) for count, size in zip(passes, sizes, strict=True)]
    if sum(rows) > MOST_ROWS:
        most = max(range(len(rows)), key=rows.__getitem__)
        got = f"{float(rows[most]):.3g} rows of it, {float(passes[most]):.3g} passes"
        fix = "other weights or epochs, or a smaller data.mixing.size"
        raise DataError(f"an epoch of more than {MOST_ROWS:,} rows", where=sources[most], got=got, fix=fix)


def to_amounts(totals: Sequence[int], options: MixOptions) -> list[Fraction]:
    """What an epoch takes of each source, exactly; ``totals`` is what they hold, counted in the same way."""
    if options.epochs:
        return [total * _exact(epochs) for total, epochs in zip(totals, options.epochs, strict=True)]
    parts = [_exact(weight) for weight in options.weights or temper(totals, options.temperature)]
    shares = [part / sum(parts) for part in parts]
    size = options.size or sum(totals)
    return [share * size for share in shares]


def temper(totals: Sequence[int], temperature: float) -> list[float] | list[int]:
    """Weights in proportion to ``total ** (1 / temperature)``: above 1 a small source weighs more than it is.

    As in multilingual pretraining (Devlin et al. 2018, Conneau et al. 2020, where 1 / temperature is alpha).
    """
    if temperature == 1:
        return list(totals)
    return [(total / max(totals)) ** (1 / temperature) for total in totals]


def apportion(amounts: Sequence[Fraction]) -> list[int]:
    """Whole numbers of the same sum, each within one of its amount: the largest remainders are rounded up."""
    whole = [floor(amount) for amount in amounts]
    missing = int(sum(amounts)) - sum(whole)
    by_remainder = sorted(range(len(whole)), key=lambda i: amounts[i] - whole[i], reverse=True)
    for number in by_remainder[:missing]:
        whole[number] += 1
    return whole


def draw_in_passes(sizes: np.ndarray, amount: Fraction | int, *, seed: int, source: int) -> np.ndarray:
    """Rows whose sizes sum up to nearly ``amount``: whole passes, then the beginning of a shuffled one.

    The order of the last pass follows from (seed, source, pass). Returns positions in ``sizes``.
    """
    passes, rest = divmod(Fraction(amount), int(sizes.sum()))
    order = np.random.default_rng([seed, PURPOSE, source, passes]).permutation(len(sizes))
    part = order[: nearest(np.cumsum(sizes[order]), rest)]
    return np.concatenate([np.tile(np.arange(len(sizes)), passes), part])


def draw_anew(sizes: np.ndarray, amount: Fraction | int, *, seed: int, source: int) -> np.ndarray:
    """Independent draws, each row as likely as the others, until the sizes sum up to nearly ``amount``."""
    random = np.random.default_rng([seed, PURPOSE, source])
    drawn, reached = [np.zeros(0, dtype=np.int64)], 0
    while reached < amount:
        drawn.append(random.integers(len(sizes), size=CHUNK_ROWS))
        reached += int(sizes[drawn[-1]].sum())
    rows = np.concatenate(drawn)
    return rows[: nearest(np.cumsum(sizes[rows]), Fraction(amount))]


def nearest(reached: np.ndarray, amount: Fraction) -> int:
    """How many rows come nearest to ``amount``, fewer at a tie; ``reached[i]`` is the size of i + 1 rows."""
    count = int(np.searchsorted(reached, floor(amount), side="right"))
    below = int(reached[count - 1]) if count else 0
    is_last = count == len(reached)
    return count if is_last or amount - below <= int(reached[count]) - amount else count + 1


def _to_shares(
    pools: Sequence[np.ndarray],
    times: np.ndarray,
    *,
    asked: Mapping[str, Fraction],
    counts: Mapping[str, np.ndarray],
    by: str,
) -> list[Share]:
    """What was drawn of each pool; ``asked``: the amount of each source, by its name."""
    drawn = [{name: int(sizes[pool] @ times[pool]) for name, sizes in counts.items()} for pool in pools]
    whole = sum(one[by] for one in drawn)
    return [
        Share(
            source=name,
            asked=float(amount / sum(asked.values())),
            drawn=one[by] / whole,
            rows_there=len(pool),
            rows=one["rows"],
            rows_left_out=int((times[pool] == 0).sum()),
            passes=one["rows"] / len(pool),
            tokens=one["tokens"],
            target_tokens=one["target_tokens"],
        )
        for (name, amount), pool, one in zip(asked.items(), pools, drawn, strict=True)
    ]


def _expand(firsts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The tokenized rows of the examples: one each, or several of one that was split."""
    begins, counts = firsts[chosen], firsts[chosen + 1] - firsts[chosen]
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(begins - (ends - counts), counts)


def _exact(number: float) -> Fraction:
    """0.1 as one tenth."""
    return Fraction(str(number))


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"
