"""From the data section of a recipe to the datasets that a Trainer takes, and the count of what was read."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.config import Data, Recipe, Source
from hf_clm.data.arrays import dropped, to_fates
from hf_clm.data.batch.mixing import DrawnDataset, Mix, MixOptions, mix_rows, require_sources
from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import TRAIN_ON, TokenizedDataset, TokenizedRows, join_rows, tokenize_rows
from hf_clm.data.label.labels import Fate
from hf_clm.data.label.render import LabelOptions, TrainOn
from hf_clm.data.proof.ledger import find_duplicates
from hf_clm.data.read.records import Examples, check_records, no_example, read_options
from hf_clm.data.read.sources import ReadReport, read_records
from hf_clm.errors import DataError
from hf_clm.recipe_sections import Mixing
from hf_clm.schema import AnyExample, Document, Segment, whole_text
from hf_clm.tokenizer import find_unknown, unique_ids, unknown_id

SHOWN_LETTERS = 8  # of a word that the tokenizer cannot spell
SHOWN_DROPS = 3  # an error lists the first few rows, not thousands

AnyDataset = TokenizedDataset | PackedDataset | DrawnDataset


@dataclass
class Split:
    """A tokenized set (``rows``) and what is trained on (``dataset``; the same without packing).

    ``mix``: which of the rows an epoch holds, and how often; None: each once.
    """

    rows: TokenizedDataset
    dataset: AnyDataset
    examples: Examples
    mix: Mix | None = None

    @property
    def lengths(self) -> np.ndarray:
        """(D,) int64, tokens of each tokenized row of an epoch."""
        return self.rows.lengths if self.mix is None else self.rows.lengths[self.mix.numbers]

    @property
    def tokens(self) -> int:
        """Of an epoch."""
        if self.mix is not None:
            return sum(share.tokens for share in self.mix.shares)
        offsets = self.rows.rows.offsets
        return int(offsets[-1] - offsets[0])

    @property
    def target_tokens(self) -> int:
        """Of an epoch."""
        if self.mix is not None:
            return sum(share.target_tokens for share in self.mix.shares)
        return int(self.label_counts.sum())

    @cached_property
    def id_counts(self) -> np.ndarray:
        """(V,) int64, how often each id stands in the set; V is the largest id and one."""
        return count_ids(self.rows.rows.input_ids)

    @cached_property
    def least_id(self) -> int:
        """0, or a negative id, which no embedding has a row for."""
        return int(self.rows.rows.input_ids.min(initial=0))

    @cached_property
    def label_counts(self) -> np.ndarray:
        """(V,) int64, how often each id is learned."""
        return count_ids(self.rows.rows.labels)

    @cached_property
    def fates(self) -> Counter[str]:
        """How many input rows were used, cut, split or dropped (and why)."""
        fates = to_fates(self.rows.rows.fates)
        counts = np.bincount(fates.array[:, 0], minlength=len(fates.kinds)).tolist()
        names = (f"{kind}: {reason}" if reason else kind for kind, reason in fates.kinds)
        return Counter(dict(zip(names, counts, strict=True)))


def load_examples(sources: Iterable[Source], data: Data) -> Examples:
    """Reads and checks every record. Raises DataError with file and line for the first that is wrong."""
    examples, places, origins = [], [], []
    found = Examples(examples, places)
    found.sources = list(sources)
    for number, source in enumerate(found.sources):
        kind = {"split": source.split, "name": source.name, "revision": source.revision}
        records = read_records(source.path, read_options(data, source), report=found.report, **kind)
        limited = islice(records, source.limit)
        for place, example in check_records(limited, source, data=data, found=found, first={}):
            examples.append(example)
            places.append(place)
            origins.append(number)
    if not found.examples:
        raise no_example(found.sources, found.report)
    found.origins = np.array(origins, dtype=np.int32)
    return drop_duplicates(found) if data.duplicates == "drop" else found


def drop_duplicates(examples: Examples) -> Examples:
    """Without the examples that equal an earlier one; their places are kept in ``duplicates``."""
    earlier = find_duplicates(examples.examples)
    kept = examples.select(number for number, first in enumerate(earlier) if first is None)
    places = zip(examples.places, earlier, strict=True)
    return replace(kept, duplicates=[place for place, first in places if first is not None])


def split_examples(examples: Examples, eval_fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """Holds out a share of the examples, chosen by ``seed``; both parts keep the order of the files.

    Of a single text the end is held out; both parts are documents then. Raises DataError where one of the
    parts would be empty.
    """
    alone = examples.examples[0] if len(examples) == 1 else None
    parts = split_text(examples, alone, fraction=eval_fraction) if alone is not None else None
    if parts:
        return parts
    is_held_out = hold_out(len(examples), eval_fraction, seed=seed)
    kept, held = np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()
    return examples.select(kept), without_report(examples.select(held))


def hold_out(count: int, eval_fraction: float, *, seed: int) -> np.ndarray:
    """(count,) bool, which examples are held out. Raises DataError where that, or the rest, is nothing."""
    held_out = round(count * eval_fraction)
    if not 0 < held_out < count:
        what = f"eval_fraction {eval_fraction} of {count} examples leaves {held_out} to evaluate on"
        raise DataError(what, where="data.eval_fraction", fix="raise it, or name data.eval")
    found = np.zeros(count, dtype=bool)
    found[np.random.default_rng(seed).permutation(count)[:held_out]] = True
    return found


def split_text(examples: Examples, alone: AnyExample, *, fraction: float) -> tuple[Examples, Examples] | None:
    """A single text without its end, and the end; None where it is no text, or one of them would be empty."""
    if not (isinstance(alone, Document) and len(alone.segments) == 1 and alone.is_text):
        return None
    text = whole_text(alone)
    cut = round(len(text) * (1 - fraction))
    if not text[:cut].strip() or not text[cut:].strip():
        return None
    parts = [Document([Segment(part, 1.0)]) for part in (text[:cut], text[cut:])]
    kept, held = (replace(examples, examples=[part]) for part in parts)
    return kept, without_report(held)


def without_report(examples: Examples) -> Examples:
    """The part that is held out: what was lost in reading is counted once, with the training part."""
    return replace(examples, report=ReadReport(files=examples.report.files), duplicates=[])


def count_ids(ids: np.ndarray) -> np.ndarray:
    """How often each id from 0 on occurs; negative ones do not count."""
    return np.bincount(ids[ids >= 0])


def load_splits(recipe: Recipe, seed: int) -> tuple[Examples, Examples | None]:
    """The training examples and, if the recipe asks for them, those to evaluate on."""
    train, evaluation = load_examples(recipe.data.train, recipe.data), None
    if recipe.data.eval:
        evaluation = load_examples(recipe.data.eval, recipe.data)
    elif recipe.data.eval_fraction:
        train, evaluation = split_examples(train, recipe.data.eval_fraction, seed=seed)
    if mix_options(recipe.data):
        require_sources(train.origins, [source.path for source in recipe.data.train])
    return train, evaluation


def build_split(examples: Examples, recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast) -> Split:
    """Tokenizes, fits and packs. Raises DataError where more than ``data.max_dropped`` of it is lost."""
    rows = tokenize_examples(examples, recipe, tokenizer=tokenizer)
    check_dropped(examples, rows.rows.fates, data=recipe.data)
    return Split(rows, pack_rows(rows, recipe), examples)


def label_options(recipe: Recipe, source: Source | None = None) -> LabelOptions:
    """What decides how the examples of a recipe, or of one of its sources, are labelled."""
    data, packing = recipe.data, recipe.resolved_packing
    train_on = data.train_on
    is_named = isinstance(train_on, str)
    learned = TRAIN_ON[train_on] if is_named else TrainOn(train_on.turns, train_on.reasoning)
    return LabelOptions(
        stage=recipe.stage,
        max_length=None if packing == "stream" else data.max_length,  # a stream cuts by itself
        overflow=(source.overflow if source else None) or recipe.resolved_overflow,
        window=(data.window.size, data.window.step) if data.window else None,
        train_on=learned,
        special_tokens_in_text=data.special_tokens_in_text,
        reasoning=data.reasoning,
    )


def by_options(examples: Examples, recipe: Recipe) -> Iterator[tuple[slice, LabelOptions]]:
    """The examples in stretches that are labelled alike: sources may have an overflow of their own."""
    sources = examples.sources
    if not any(source.overflow for source in sources):
        yield slice(0, len(examples)), label_options(recipe)
        return
    borders = np.flatnonzero(np.diff(examples.origins)) + 1
    for start, stop in pairwise([0, *borders.tolist(), len(examples)]):
        yield slice(start, stop), label_options(recipe, sources[int(examples.origins[start])])


def tokenize_examples(
    examples: Examples, recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast
) -> TokenizedDataset:
    """Labels, encodes and fits. Raises DataError for the first that cannot be read, or spelled."""
    found = []
    for part, options in by_options(examples, recipe):
        try:
            found.append(tokenize_rows(examples.examples[part], tokenizer, options))
        except DataError as error:
            raise (
                error if error.row is None else error.at(examples.places[int(part.start) + error.row])
            ) from error
    rows = join_rows(found)
    check_spelled(examples, rows, tokenizer=tokenizer)
    return TokenizedDataset(rows)


def check_spelled(examples: Examples, rows: TokenizedRows, *, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError for the first example with a character that the tokenizer has no token for."""
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return
    places = np.flatnonzero(rows.input_ids == unknown)
    for number in unique_ids(rows.sources[np.searchsorted(rows.offsets, places, side="right") - 1].tolist()):
        example = examples.examples[number]
        found = find_unknown(whole_text(example), tokenizer)
        if found is not None:
            raise unspelled(found, where=examples.places[number])


def unspelled(text: str, *, where: str) -> DataError:
    """The error for ``text``, which the tokenizer has no token for."""
    codes = " ".join(f"U+{ord(letter):04X}" for letter in text[:SHOWN_LETTERS])
    fix = "take it out, or add a text that holds it to those that the tokenizer is trained on"
    return DataError("the tokenizer has no token for it", where=where, got=f"{text!r} ({codes})", fix=fix)


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
    mix = mix_rows(train.rows.rows, train.examples.origins, sources=names, options=options, seed=seed)
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
    """(tokens of a packed row, best_fit or stream); None for rows that are not packed."""
    packing = recipe.resolved_packing
    capacity = recipe.data.tokens_per_batch if packing == "none" else recipe.data.max_length
    return capacity, "stream" if packing == "stream" else "best_fit"


def check_dropped(examples: Examples, fates: Sequence[Fate], *, data: Data) -> None:
    """Raises DataError where too many rows, or all of them, cannot be trained on; lists the first."""
    drops = dropped(fates)
    bad = examples.report.bad_lines
    total = len(fates) + len(bad)
    lost = len(drops) + len(bad)
    if lost <= data.max_dropped * total and len(drops) < len(fates):
        return
    listed = [f"{examples.places[at]} ({fates[at].reason})" for at in drops[:SHOWN_DROPS].tolist()] + bad
    raise DataError(
        f"{lost:,} of {total:,} rows cannot be trained on within data.max_length={data.max_length}",
        where=", ".join(examples.report.files[:2]),
        got="; ".join(listed[:SHOWN_DROPS]),
        fix=f"raise data.max_length, mend the rows, or allow it by data.max_dropped={to_limit(lost / total)}",
    )


def to_limit(share: float) -> str:
    """A share in two digits, rounded up: as a limit it allows what is there."""
    digits = max(2, 1 - math.floor(math.log10(share)))
    return f"{math.ceil(share * 10**digits) / 10**digits:g}"


def texts_of(examples: Iterable[AnyExample]) -> Iterator[str]:
    """Every text that a tokenizer can be trained on."""
    return (text for example in examples for text in example.texts if text)
