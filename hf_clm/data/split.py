"""The splits of a run: their records, and the rows that are trained on."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPackedCausalLM,
    StaticShape,
)
from hf_clm.data.batch.left_out import LEFT_OUT, LeavingOutDataset
from hf_clm.data.batch.mixing import AnyDataset, DrawnDataset, Mix, MixOptions, RecordCounts, mix_rows
from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.label.labels import NO_ROOM
from hf_clm.data.prepared.tables import StoredLedger, StoredRows
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError, RecipeError, to_limit
from hf_clm.model.attention import NAME as PACKED
from hf_clm.recipe.recipe import Data, Recipe
from hf_clm.recipe.sections import Mixing

SHOWN_DROPS = 3  # an error lists the first few rows, not thousands


@dataclass
class Split:
    """A prepared set and the rows of it that are trained on.

    stored         all rows; ``rows`` is a dataset of them
    dataset        the rows to train on: packed, mixed or as they are
    examples       the first examples, and the places of all
    id_counts      (V,) int64, occurrences of each id in the set; V is the largest id plus one
    label_counts   (V,) int64, occurrences of each id as a label
    least_id       0, or a negative id, which is invalid
    mix            the rows that an epoch contains; None if it contains each row once
    left_out       numbers of the records whose labels are masked in training (``data.without``)
    """

    stored: StoredRows
    dataset: AnyDataset
    examples: Examples
    ledger: StoredLedger
    id_counts: np.ndarray
    label_counts: np.ndarray
    least_id: int = 0
    mix: Mix | None = None
    left_out: tuple[int, ...] = ()

    def __post_init__(self):
        self.rows = TokenizedDataset(self.stored)

    @property
    def lengths(self) -> np.ndarray:
        """(D,) length of each tokenized row of an epoch, in tokens."""
        return self.rows.lengths if self.mix is None else self.rows.lengths[self.mix.numbers]

    @property
    def tokens(self) -> int:
        """Number of tokens in an epoch."""
        if self.mix is not None:
            return sum(share.tokens for share in self.mix.shares)
        return int(self.rows.lengths.sum(dtype=np.int64))

    @property
    def target_tokens(self) -> int:
        """Number of target tokens in an epoch."""
        if self.mix is not None:
            return sum(share.target_tokens for share in self.mix.shares)
        return int(self.label_counts.sum())

    @property
    def drawn_label_counts(self) -> np.ndarray:
        """(V,) int64, occurrences of each id as a label in an epoch."""
        if self.mix is None:
            return self.label_counts
        times, counts, first = self.mix.times[self.stored.sources], np.zeros_like(self.label_counts), 0
        for block in self.stored.blocks():
            weights = np.repeat(times[first : first + len(block)], block.lengths)
            is_learned = block.labels >= 0
            block_counts = np.bincount(block.labels[is_learned], weights[is_learned], minlength=len(counts))
            counts, first = counts + block_counts.astype(np.int64), first + len(block)
        return counts

    @property
    def fates(self) -> Counter[str]:
        """Number of records that were used, cut, split, left out or dropped (and why)."""
        fates = Counter(self.ledger.totals)
        for number in self.left_out:
            fate = self.ledger.fates[number]
            fates[fate.kind, fate.reason] -= 1
            fates[LEFT_OUT, ""] += 1
        names = {fate: f"{fate[0]}: {fate[1]}" if fate[1] else fate[0] for fate in fates}
        return Counter({names[fate]: count for fate, count in fates.items() if count})


def note_lines(splits: Mapping[str, Split]) -> list[str]:
    """Returns lines to print about data that were skipped, dropped or read in a special way."""
    train = splits["train"]
    report = train.examples.report
    counts = {
        "blank lines skipped": report.blank_lines,
        "bad records dropped": len(report.bad_lines),
        "records with a NUL character": report.nul_records,
        "control tokens in the text encoded as plain text": sum(train.ledger.spelled.values()),
    }
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    notes += [note for split in splits.values() for note in split.examples.report.notes]
    if train.examples.unknown_keys:
        notes.append(f"unused keys: {', '.join(sorted(train.examples.unknown_keys))}")
    return [f"note      {note}" for note in notes]


def pack_rows(
    rows: TokenizedDataset,
    recipe: Recipe,
    *,
    pieces: Pieces | None = None,
    numbers: np.ndarray | None = None,
) -> AnyDataset:
    """Returns the rows to train on: packed, or as they are.

    Args:
        pieces: an earlier packing of the rows.
        numbers: the rows of an epoch, in order; None for each row once.
    """
    capacity, kind = packing_of(recipe)
    if capacity:
        return PackedDataset(rows, max_length=capacity, packing=kind, pieces=pieces, numbers=numbers)
    return rows if numbers is None else DrawnDataset(rows, numbers)


def settle_splits(splits: Mapping[str, Split], recipe: Recipe, *, seed: int) -> dict[str, Split]:
    """Returns the splits with what is not stored with them: the mixture, and the records to leave out.

    Draws and packs the training rows if the recipe mixes its sources. Raises DataError if no row of a source
    can be drawn, or none would be; RecipeError for a record of ``data.without`` that is not there.
    """
    train = replace(splits["train"], left_out=find_records(splits["train"], recipe.data.without))
    options = mix_options(recipe.data)
    if options is None:
        return {**splits, "train": train}
    paths = [source.path for source in recipe.data.train]
    names = [path if paths.count(path) == 1 else f"{path} ({at})" for at, path in enumerate(paths, 1)]
    counts = (train.ledger.numbers(name) for name in ("rows", "kept_tokens", "kept_targets"))
    origins = train.ledger.numbers("source")
    mix = mix_rows(RecordCounts(*counts), origins, sources=names, options=options, seed=seed)
    dataset = pack_rows(train.rows, recipe, numbers=mix.numbers)
    return {**splits, "train": replace(train, dataset=dataset, mix=mix)}


def find_records(split: Split, places: Sequence[str], *, where: str = "data.without") -> tuple[int, ...]:
    """Returns the number of each record that ``places`` name, as ``FILE:LINE``, or by the end of that path.

    Raises RecipeError for a place with no record, with several, or whose record has no row.
    """
    numbers: dict[str, list[int]] = {place: [] for place in places}
    for number, own in enumerate(split.ledger.places if numbers else ()):
        for place, same in numbers.items():
            if own == place or own.endswith(f"/{place}"):
                same.append(number)
    for place, same in numbers.items():
        if len(same) != 1:
            what = "several training records have this place" if same else "no training record has this place"
            fix = f"name a record as in {split.ledger.places[0]}; hf-clm inspect shows the places"
            raise RecipeError(what, where=where, got=place, fix=fix)
        if not split.ledger.numbers("rows")[same[0]]:
            got = f"{place} ({split.ledger.fates[same[0]].kind})"
            raise RecipeError("the record has no row to leave out", where=where, got=got, fix="remove it")
    return tuple(dict.fromkeys(same[0] for same in numbers.values()))


def leave_out(split: Split) -> AnyDataset | LeavingOutDataset:
    """Returns the rows to train on, with the labels of the records that are left out marked."""
    if not split.left_out:
        return split.dataset
    return LeavingOutDataset(split.dataset, np.flatnonzero(np.isin(split.stored.sources, split.left_out)))


def mix_options(data: Data) -> MixOptions | None:
    """Returns how to mix the sources, or None if an epoch contains each row once."""
    weights = [source.weight for source in data.train if source.weight is not None]
    has_epochs = any(source.epochs is not None for source in data.train)
    if not (weights or has_epochs or data.mixing):
        return None
    epochs = [source.epochs or 1.0 for source in data.train] if has_epochs else None
    section = data.mixing or Mixing()
    return MixOptions(weights=weights or None, epochs=epochs, **section.model_dump())


def packing_of(recipe: Recipe) -> tuple[int | None, str]:
    """Returns (length of a packed row in tokens or None if rows are not packed, packing strategy)."""
    packing = recipe.resolved_packing
    capacity = recipe.data.tokens_per_batch if packing == "none" else recipe.data.max_length
    return capacity, "best_fit" if packing == "none" else packing


def build_collator(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    with_targets: bool = False,
    static: StaticShape | None = None,
) -> Callable[..., dict[str, Any]]:
    """Returns the collator of a recipe: it concatenates rows, and pads only if the attention requires it."""
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
    if recipe.resolved_packing == "none" and recipe.model.attention != PACKED:
        return DataCollatorForCausalLM(tokenizer.pad_token_id)
    return DataCollatorForPackedCausalLM(
        with_targets=with_targets, static=static, pad_token_id=tokenizer.pad_token_id
    )


def check_dropped(split: Split, data: Data) -> None:
    """Raises DataError, listing the first records, if too many or all of them cannot be trained on."""
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
    fixes = ["raise data.max_length"] if within else []
    fixes += ["set overflow: split for plain text"] if any(NO_ROOM in place for place in listed) else []
    fixes += ["correct the records"]
    fixes += [f"set data.max_dropped={to_limit(lost / total)}"] if lost < total else []
    raise DataError(
        f"{lost:,} of {total:,} records cannot be trained on{within}",
        where=", ".join(split.examples.report.files[:2]),
        got="; ".join(listed[:SHOWN_DROPS]),
        fix=", ".join(fixes[:-1]) + (", or " if fixes[1:] else "") + fixes[-1],
    )
