"""The splits of a run: which records are in them, and what of their rows is trained on."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hf_clm.data.batch.mixing import DrawnDataset, Mix, MixOptions, RecordCounts, mix_rows
from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.prepared.tables import StoredLedger, StoredRows
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Recipe
from hf_clm.recipe.sections import Mixing

SHOWN_DROPS = 3  # an error lists the first few rows, not thousands

AnyDataset = TokenizedDataset | PackedDataset | DrawnDataset


@dataclass
class Split:
    """A prepared set (``stored``; ``rows`` is a dataset of them) and what of it is trained on (``dataset``).

    examples              the first of them, and where all came from
    id_counts             (V,) int64, how often each id stands in the set; V is the largest id and one
    label_counts          (V,) int64, how often each id is learned
    least_id              0, or a negative id, which no embedding has a row for
    mix                   which of the rows an epoch holds, and how often; None: each once
    """

    stored: StoredRows
    dataset: AnyDataset
    examples: Examples
    ledger: StoredLedger
    id_counts: np.ndarray
    label_counts: np.ndarray
    least_id: int = 0
    mix: Mix | None = None

    def __post_init__(self):
        self.rows = TokenizedDataset(self.stored)

    @property
    def lengths(self) -> np.ndarray:
        """(D,) tokens of each tokenized row of an epoch."""
        return self.rows.lengths if self.mix is None else self.rows.lengths[self.mix.numbers]

    @property
    def tokens(self) -> int:
        """Of an epoch."""
        if self.mix is not None:
            return sum(share.tokens for share in self.mix.shares)
        return int(self.rows.lengths.sum(dtype=np.int64))

    @property
    def target_tokens(self) -> int:
        """Of an epoch."""
        if self.mix is not None:
            return sum(share.target_tokens for share in self.mix.shares)
        return int(self.label_counts.sum())

    @property
    def drawn_label_counts(self) -> np.ndarray:
        """(V,) int64, how often each id is learned in an epoch."""
        if self.mix is None:
            return self.label_counts
        times, counts, first = self.mix.times[self.stored.sources], np.zeros_like(self.label_counts), 0
        for block in self.stored.blocks():
            weights = np.repeat(times[first : first + len(block)], block.lengths)
            is_learned = block.labels >= 0
            found = np.bincount(block.labels[is_learned], weights[is_learned], minlength=len(counts))
            counts, first = counts + found.astype(np.int64), first + len(block)
        return counts

    @property
    def fates(self) -> Counter[str]:
        """How many records were used, cut, split or dropped (and why)."""
        return Counter(
            {f"{kind}: {reason}" if reason else kind: n for (kind, reason), n in self.ledger.totals.items()}
        )


def note_lines(splits: Mapping[str, Split]) -> list[str]:
    """Lines to print on what of the records was not read, or in one of two ways."""
    train = splits["train"]
    read = train.examples.report
    counts = {
        "blank lines skipped": read.blank_lines,
        "bad records dropped": len(read.bad_lines),
        "records with a NUL character": read.nul_records,
        "control tokens in the text read as plain text": sum(train.ledger.spelled.values()),
    }
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    notes += [note for split in splits.values() for note in split.examples.report.notes]
    if train.examples.unknown_keys:
        notes.append(f"keys not used: {', '.join(sorted(train.examples.unknown_keys))}")
    return [f"note      {note}" for note in notes]


def pack_rows(
    rows: TokenizedDataset,
    recipe: Recipe,
    *,
    pieces: Pieces | None = None,
    numbers: np.ndarray | None = None,
) -> AnyDataset:
    """What is trained on: the rows themselves, or packed ones; ``pieces`` if they were packed before.

    ``numbers``: of the rows that an epoch holds, in their order; None: each once.
    """
    capacity, kind = packing_of(recipe)
    if capacity:
        return PackedDataset(rows, max_length=capacity, packing=kind, pieces=pieces, numbers=numbers)
    return rows if numbers is None else DrawnDataset(rows, numbers)


def mix_splits(splits: Mapping[str, Split], recipe: Recipe, *, seed: int) -> dict[str, Split]:
    """The splits with the training rows drawn and packed as the recipe mixes its sources, if it does.

    Raises DataError for a source of which no row can be drawn, or none would be.
    """
    options = mix_options(recipe.data)
    if options is None:
        return dict(splits)
    train = splits["train"]
    paths = [source.path for source in recipe.data.train]
    names = [path if paths.count(path) == 1 else f"{path} ({at})" for at, path in enumerate(paths, 1)]
    counts = (train.ledger.numbers(name) for name in ("rows", "kept_tokens", "kept_targets"))
    known = {"sources": names, "options": options, "seed": seed}
    mix = mix_rows(RecordCounts(*counts), train.ledger.numbers("source"), **known)
    dataset = pack_rows(train.rows, recipe, numbers=mix.numbers)
    return {**splits, "train": replace(train, dataset=dataset, mix=mix)}


def mix_options(data: Data) -> MixOptions | None:
    """How the sources are mixed; None where every row is read once."""
    weights = [source.weight for source in data.train if source.weight is not None]
    has_epochs = any(source.epochs is not None for source in data.train)
    if not (weights or has_epochs or data.mixing):
        return None
    epochs = [source.epochs or 1.0 for source in data.train] if has_epochs else None
    section = data.mixing or Mixing()
    return MixOptions(weights=weights or None, epochs=epochs, **section.model_dump())


def packing_of(recipe: Recipe) -> tuple[int | None, str]:
    """(tokens of a packed row, how rows are packed); None for rows that are not packed."""
    packing = recipe.resolved_packing
    capacity = recipe.data.tokens_per_batch if packing == "none" else recipe.data.max_length
    return capacity, "best_fit" if packing == "none" else packing


def check_dropped(split: Split, data: Data) -> None:
    """Raises DataError where too many records, or all of them, cannot be trained on; lists the first."""
    counts: Counter[str] = Counter()
    for (kind, _), count in split.ledger.totals.items():
        counts[kind] += count
    total, lost = counts.total() - counts["duplicate"], counts["dropped"] + counts["unreadable"]
    if lost <= data.max_dropped * total and lost < total:
        return
    ledger = split.ledger
    listed = [
        f"{ledger.places[at]} ({ledger.fates[at].reason})" for at in ledger.where("dropped")[:SHOWN_DROPS]
    ]
    listed += ledger.unreadable
    within = f" within data.max_length={data.max_length}" if counts["dropped"] else ""
    raise DataError(
        f"{lost:,} of {total:,} rows cannot be trained on{within}",
        where=", ".join(split.examples.report.files[:2]),
        got="; ".join(listed[:SHOWN_DROPS]),
        fix=f"{'raise data.max_length, ' if within else ''}mend the rows, "
        f"or allow it by data.max_dropped={to_limit(lost / total)}",
    )


def to_limit(share: float) -> str:
    """A share in two digits, rounded up: as a limit it allows what is there."""
    digits = max(2, 1 - math.floor(math.log10(share)))
    return f"{math.ceil(share * 10**digits) / 10**digits:g}"
