"""Mixes sources: decides how much of each source an epoch contains and which rows, from the seed alone.

              weights 3 and 1, 8 rows  drawn                      shuffled
a0 a1 a2 a3   6 rows                   a0 a1 a2 a3 | a2 a0    }   a2 b0 a0 a3 a1 a2 b2 a0
b0 b1 b2      2 rows                   b2 b0                  }

Each row is tokenized once; an epoch is a list of row numbers, some of which may repeat.
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

from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.errors import DataError
from hf_clm.schema import TokenizedExample

PURPOSE = 0x6D6978  # added to the seed, so that these random numbers are used for nothing else
CHUNK_ROWS = 65_536  # rows drawn at once
MAX_EPOCH_ROWS = 10**9  # their numbers take 8 GB
MAX_NAME_LENGTH = 40  # characters of a source's name in the table


@dataclass(frozen=True)
class MixOptions:
    """How to mix sources: by ``weights``, by ``epochs``, or by their sizes with a ``temperature``.

    Args:
        by: the unit: ``rows``, ``tokens`` or ``target_tokens``.
        weights, epochs: one value per source; mutually exclusive.
        replacement: draw rows with replacement.
        size: size of an epoch in the unit; None for the total size of all sources.
    """

    by: str = "rows"
    weights: Sequence[float] | None = None
    epochs: Sequence[float] | None = None
    temperature: float = 1.0
    replacement: bool = False
    size: int | None = None


@dataclass(frozen=True)
class Share:
    """The part of an epoch that comes from one source.

    asked          requested share, in the unit of the mix
    drawn          actual share
    rows_there     number of rows that the source has
    rows           number of rows drawn
    rows_left_out  number of rows that were never drawn
    passes         rows / rows_there
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
    """The rows of an epoch. D = tokenized rows in it, E = examples.

    numbers  (D,) int64, the tokenized rows, in order
    times    (E,) int64, number of occurrences of each example
    """

    by: str
    replacement: bool
    numbers: np.ndarray
    times: np.ndarray
    shares: list[Share]

    def to_json(self) -> dict[str, Any]:
        """Returns the entry in run.json; ``sha256`` is the digest of the ordered row numbers."""
        digest = hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()
        shares = [asdict(share) for share in self.shares]
        return {"by": self.by, "replacement": self.replacement, "sources": shares, "sha256": digest}

    def to_lines(self) -> list[str]:
        """Formats a table of the requested and the actual shares."""
        names = [_shorten(share.source) for share in self.shares]
        width = max(len(self.by) + 3, *map(len, names))
        titles = ("rows", "tokens", "targets")
        sizes = "".join(f"{title:>14}" for title in titles)
        lines = [f"{'by ' + self.by.replace('_', ' '):<{width}}{'asked':>9}{'drawn':>9}{sizes}{'passes':>9}"]
        for name, share in zip(names, self.shares, strict=True):
            counts = "".join(f"{count:>14,}" for count in (share.rows, share.tokens, share.target_tokens))
            shares = f"{share.asked:>9.2%}{share.drawn:>9.2%}"
            lines.append(f"{name:<{width}}{shares}{counts}{share.passes:>9.2f}")
        return lines


class DrawnDataset(torch.utils.data.Dataset):
    """The rows of a tokenized dataset with these ``numbers``, which may repeat; not packed."""

    def __init__(self, dataset: TokenizedDataset, numbers: np.ndarray):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.dataset[int(self.numbers[index])]

    @property
    def lengths(self) -> np.ndarray:
        """(D,) int64, length of each row in tokens."""
        return self.dataset.lengths[self.numbers]

    @cached_property
    def pieces(self) -> Pieces:
        """Each row as a single piece."""
        starts, ends = np.zeros_like(self.numbers), np.arange(len(self) + 1)
        return Pieces(self.numbers, starts, self.lengths, ends)


AnyDataset = TokenizedDataset | PackedDataset | DrawnDataset


@dataclass(frozen=True)
class RecordCounts:
    """The number of rows, tokens and target tokens of each of E records; (E,) int64 each."""

    rows: np.ndarray
    tokens: np.ndarray
    target_tokens: np.ndarray


def mix_rows(
    records: RecordCounts, origins: np.ndarray, *, sources: Sequence[str], options: MixOptions, seed: int
) -> Mix:
    """Draws the rows of an epoch.

    Args:
        origins: (E,) source number of each record.
        sources: names of the sources.

    Raises DataError if a source has no rows or none of its rows would be drawn, or if the epoch would have
    more than MAX_EPOCH_ROWS rows.
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
    quotas = apportion(amounts) if options.by == "rows" and not options.epochs else amounts
    draws = []
    for number, amount in enumerate(quotas):
        draw = draw_anew if options.replacement else draw_in_passes
        draws.append(pools[number][draw(sizes[number], amount, seed=seed, source=number)])
        if not len(draws[-1]):
            fix = "raise its weight, its epochs or data.mixing.size"
            got = f"{float(amounts[number]):.3g} {options.by}"
            raise DataError("the share is less than half a row", where=sources[number], got=got, fix=fix)
    order = np.random.default_rng([seed, PURPOSE, len(sources), 0])
    examples = order.permutation(np.concatenate(draws))
    times = np.bincount(examples, minlength=len(origins)).astype(np.int64)
    requested = dict(zip(sources, amounts, strict=True))
    shares = _to_shares(pools, times, asked=requested, counts=counts, by=options.by)
    return Mix(options.by, options.replacement, _expand(firsts, examples), times, shares)


def require_sources(origins: np.ndarray, sources: Sequence[str]) -> None:
    """Raises DataError if a source has no examples."""
    for number, name in enumerate(sources):
        if not (origins == number).any():
            fix = "remove it from data.train; its rows may be duplicates, dropped or held out"
            raise DataError("has no rows to draw", where=name, fix=fix)


def require_few(amounts: Sequence[Fraction], sizes: Sequence[np.ndarray], *, sources: Sequence[str]) -> None:
    """Raises DataError if an epoch would have more than MAX_EPOCH_ROWS rows."""
    passes = [amount / max(1, int(size.sum())) for amount, size in zip(amounts, sizes, strict=True)]
    rows = [count * len(size) for count, size in zip(passes, sizes, strict=True)]
    if sum(rows) > MAX_EPOCH_ROWS:
        most = max(range(len(rows)), key=rows.__getitem__)
        got = f"{float(rows[most]):.3g} of its rows, {float(passes[most]):.3g} passes"
        fix = "change the weights or epochs, or reduce data.mixing.size"
        raise DataError(
            f"an epoch of more than {MAX_EPOCH_ROWS:,} rows", where=sources[most], got=got, fix=fix
        )


def to_amounts(totals: Sequence[int], options: MixOptions) -> list[Fraction]:
    """Returns the exact amount that an epoch takes from each source; ``totals`` are the sources' sizes."""
    if options.epochs:
        return [total * _exact(epochs) for total, epochs in zip(totals, options.epochs, strict=True)]
    parts = [_exact(weight) for weight in options.weights or temper(totals, options.temperature)]
    shares = [part / sum(parts) for part in parts]
    size = options.size or sum(totals)
    return [share * size for share in shares]


def temper(totals: Sequence[int], temperature: float) -> list[float] | list[int]:
    """Returns weights proportional to ``total ** (1 / temperature)``; above 1, small sources are upsampled.

    Used for multilingual pretraining (Devlin et al. 2018; Conneau et al. 2020, with alpha = 1 / temperature).
    """
    if temperature == 1:
        return list(totals)
    return [(total / max(totals)) ** (1 / temperature) for total in totals]


def apportion(amounts: Sequence[Fraction]) -> list[int]:
    """Rounds amounts to integers with the same sum: the largest remainders are rounded up."""
    counts = [floor(amount) for amount in amounts]
    missing = int(sum(amounts)) - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda i: amounts[i] - counts[i], reverse=True)
    for number in by_remainder[:missing]:
        counts[number] += 1
    return counts


def draw_in_passes(sizes: np.ndarray, amount: Fraction | int, *, seed: int, source: int) -> np.ndarray:
    """Draws rows whose sizes add up to about ``amount``: complete passes, then part of a shuffled pass.

    The order of the last pass depends on (seed, source, pass). Returns positions in ``sizes``.
    """
    passes, rest = divmod(Fraction(amount), int(sizes.sum()))
    order = np.random.default_rng([seed, PURPOSE, source, passes]).permutation(len(sizes))
    part = order[: nearest(np.cumsum(sizes[order]), rest)]
    return np.concatenate([np.tile(np.arange(len(sizes)), passes), part])


def draw_anew(sizes: np.ndarray, amount: Fraction | int, *, seed: int, source: int) -> np.ndarray:
    """Draws rows uniformly with replacement until their sizes add up to about ``amount``."""
    random = np.random.default_rng([seed, PURPOSE, source])
    batches, reached = [np.zeros(0, dtype=np.int64)], 0
    while reached < amount:
        batches.append(random.integers(len(sizes), size=CHUNK_ROWS))
        reached += int(sizes[batches[-1]].sum())
    rows = np.concatenate(batches)
    return rows[: nearest(np.cumsum(sizes[rows]), Fraction(amount))]


def nearest(reached: np.ndarray, amount: Fraction) -> int:
    """Returns the number of rows whose size is closest to ``amount``; the smaller number if tied.

    ``reached[i]`` is the size of the first i + 1 rows.
    """
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
    """Returns the share of each pool; ``asked`` is the requested amount by source name."""
    sums = [{name: int(sizes[pool] @ times[pool]) for name, sizes in counts.items()} for pool in pools]
    total = sum(one[by] for one in sums)
    return [
        Share(
            source=name,
            asked=float(amount / sum(asked.values())),
            drawn=one[by] / total,
            rows_there=len(pool),
            rows=one["rows"],
            rows_left_out=int((times[pool] == 0).sum()),
            passes=one["rows"] / len(pool),
            tokens=one["tokens"],
            target_tokens=one["target_tokens"],
        )
        for (name, amount), pool, one in zip(asked.items(), pools, sums, strict=True)
    ]


def _expand(firsts: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Returns the tokenized rows of the examples: one each, or several if the example was split."""
    begins, counts = firsts[examples], firsts[examples + 1] - firsts[examples]
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(begins - (ends - counts), counts)


def _exact(number: float) -> Fraction:
    """Converts a decimal exactly: 0.1 is one tenth."""
    return Fraction(str(number))


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else f"...{name[3 - MAX_NAME_LENGTH :]}"
