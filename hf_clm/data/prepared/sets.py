"""Reads the sets of a recipe, in blocks or completely into memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hf_clm.data.prepared.block import ReadBlock, read_raw
from hf_clm.data.prepared.chunks import Chunk, RawBlock, read_blocks
from hf_clm.data.prepared.selection import Candidates, select
from hf_clm.data.proof.leakage import digest
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import Examples, no_example
from hf_clm.recipe.recipe import Data, Recipe
from hf_clm.recipe.sections import EVAL, TRAIN
from hf_clm.schema import AnyExample, Document, Segment, whole_text

STREAM_HEAD = 1000  # documents of each source of a stream that are prepared and proved before training
NO_EXAMPLE = Document([])  # takes the place of a record that cannot be used


@dataclass
class RawSet:
    """A set that is read block by block, and the report on its files."""

    name: str
    blocks: Iterator[RawBlock]
    report: ReadReport


def open_sets(data: Data) -> dict[str, RawSet]:
    """Opens the training set and the evaluation sets that have separate sources.

    If a fraction of a single text is held out, the text is split here.
    """
    if data.eval_fraction and not data.eval and (parts := split_single_text(data)):
        return parts
    sets = {}
    for name in (TRAIN, *data.eval_sets):
        report = ReadReport()
        sets[name] = RawSet(name, read_blocks(data, name, report=report), report)
    return sets


def split_single_text(data: Data) -> dict[str, RawSet] | None:
    """Splits a single text into a training and an evaluation set; None if there is no single text."""
    report = ReadReport()
    blocks = list(islice(read_blocks(data, "train", report=report), 2))
    read = read_raw(blocks[0], data) if len(blocks) == 1 else ReadBlock()
    if len(read.examples) != 1 or read.examples[0] is None:
        return None
    parts = split_text(read.examples[0], data.eval_fraction)
    sets = {}
    for name, part in zip((TRAIN, EVAL), parts or [], strict=False):
        chunk = Chunk(report.files[0], 0, 0, [(read.places[0], part)])
        block = replace(blocks[0], chunks=[chunk], formats=read.formats)
        part_report = report if name == TRAIN else ReadReport(report.files)  # notes are reported once
        sets[name] = RawSet(name, iter([block]), part_report)
    return sets or None


def split_text(example: AnyExample, fraction: float) -> list[Document] | None:
    """Splits a text before its last ``fraction``; None if it is not a plain text or a part would be empty."""
    if not (isinstance(example, Document) and len(example.segments) == 1 and example.is_text):
        return None
    text = whole_text(example)
    cut = round(len(text) * (1 - fraction))
    if not text[:cut].strip() or not text[cut:].strip():
        return None
    return [Document([Segment(part, 1.0)], example.weight) for part in (text[:cut], text[cut:])]


def read_examples(data: Data, name: str) -> Iterator[AnyExample]:
    """Yields the example of each record of a set, in order; NO_EXAMPLE for an unusable record."""
    for raw in open_sets(data)[name].blocks:
        yield from (example or NO_EXAMPLE for example in read_raw(raw, data).examples)


def load_examples(data: Data, name: str = "train") -> Examples:
    """Reads all examples of a set into memory. Raises DataError for the first unusable record.

    With ``on_bad_record: drop``, unusable records are left out and listed in the report.
    """
    examples, places = [], []
    loaded, origins = Examples(examples, places), []
    for raw in read_blocks(data, name, report=loaded.report):
        block = read_raw(raw, data)
        if block.faults and data.on_bad_record == "error":
            raise next(iter(block.faults.values()))
        usable = [at for at, example in enumerate(block.examples) if example is not None]
        examples += [block.examples[at] for at in usable]
        places += [block.places[at] for at in usable]
        origins += [raw.source] * len(usable)
        loaded.formats |= block.formats
        loaded.unknown_keys |= block.unknown_keys
        loaded.report.add(block.report)
        loaded.report.bad_lines += map(str, block.faults.values())
    if not examples:
        raise no_example(data.sources(name), loaded.report)
    loaded.origins = np.array(origins, dtype=np.int32)
    return loaded


def load_early(recipe: Recipe, seed: int) -> dict[str, list[AnyExample]]:
    """Returns the examples by split if the tokenizer is trained on them, split as they will be prepared."""
    if not recipe.tokenizer.train:
        return {}
    settled = to_head(recipe.for_tokenizer(has_template=recipe.tokenizer.chat_template is not None))
    data = settled.data
    examples_of = {name: list(read_examples(data, name)) for name in open_sets(data)}
    candidates = {}
    for name, examples in examples_of.items():
        usable = np.array([example is not NO_EXAMPLE for example in examples], dtype=bool)
        if not usable.any():
            raise no_example(data.sources(name), Examples().report)
        exact = b"".join(map(digest, examples)) if data.duplicates == "drop" else b""
        candidates[name] = Candidates(usable, np.frombuffer(exact, "<u8").reshape(-1, 2))
    splits = {}
    for name, selection in select(candidates, data, seed=seed).items():
        usable = candidates[selection.of].usable
        numbers = np.flatnonzero(selection.is_chosen & selection.is_new & usable).tolist()
        splits[name] = [examples_of[selection.of][number] for number in numbers]
    return splits


def to_head(recipe: Recipe) -> Recipe:
    """Returns the recipe; for a stream, limited to the first documents of each source."""
    if not recipe.data.streaming:
        return recipe
    limits = [min(source.limit or STREAM_HEAD, STREAM_HEAD) for source in recipe.data.train]
    pairs = zip(recipe.data.train, limits, strict=True)
    train = [source.model_copy(update={"limit": limit}) for source, limit in pairs]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})
