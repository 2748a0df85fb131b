"""The sets of a recipe as they are read: in blocks, or in memory where all of it is looked at."""

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

STREAM_HEAD = 1000  # documents of each source of a stream that are prepared and proved before the first step
NOTHING = Document([])  # in the place of a record that cannot be used


@dataclass
class RawSet:
    """A set that is read block by block; ``report``: the files, and what was told of them."""

    name: str
    blocks: Iterator[RawBlock]
    report: ReadReport


def open_sets(data: Data) -> dict[str, RawSet]:
    """The sets as they are read: train and, if they have sources of their own, those of the evaluation.

    A single text of which a share is held out is parted here.
    """
    if data.eval_fraction and not data.eval and (parts := part_alone(data)):
        return parts
    sets = {}
    for name in (TRAIN, *data.eval_sets):
        report = ReadReport()
        sets[name] = RawSet(name, read_blocks(data, name, report=report), report)
    return sets


def part_alone(data: Data) -> dict[str, RawSet] | None:
    """Both parts of a single text; None where there are more records, or it cannot be parted."""
    report = ReadReport()
    blocks = list(islice(read_blocks(data, "train", report=report), 2))
    read = read_raw(blocks[0], data) if len(blocks) == 1 else ReadBlock()
    if len(read.examples) != 1 or read.examples[0] is None:
        return None
    parts = split_text(read.examples[0], data.eval_fraction)
    found = {}
    for name, part in zip((TRAIN, EVAL), parts or [], strict=False):
        chunk = Chunk(report.files[0], 0, 0, [(read.places[0], part)])
        block = replace(blocks[0], chunks=[chunk], formats=read.formats)
        own = report if name == TRAIN else ReadReport(report.files)  # what was read is told once
        found[name] = RawSet(name, iter([block]), own)
    return found or None


def split_text(alone: AnyExample, fraction: float) -> list[Document] | None:
    """A single text without its end, and the end; None where it is no text, or one of them would be empty."""
    if not (isinstance(alone, Document) and len(alone.segments) == 1 and alone.is_text):
        return None
    text = whole_text(alone)
    cut = round(len(text) * (1 - fraction))
    if not text[:cut].strip() or not text[cut:].strip():
        return None
    return [Document([Segment(part, 1.0)], alone.weight) for part in (text[:cut], text[cut:])]


def read_examples(data: Data, name: str) -> Iterator[AnyExample]:
    """The examples of a set as it is read, in the order of the records; NOTHING for one without."""
    for raw in open_sets(data)[name].blocks:
        yield from (example or NOTHING for example in read_raw(raw, data).examples)


def load_examples(data: Data, name: str = "train") -> Examples:
    """All examples of a set, in memory, to be looked at. Raises DataError for the first that is wrong.

    With ``on_bad_record: drop`` those that are wrong are left out, and told of in the report.
    """
    examples, places = [], []
    found, origins = Examples(examples, places), []
    for raw in read_blocks(data, name, report=found.report):
        read = read_raw(raw, data)
        if read.faults and data.on_bad_record == "error":
            raise next(iter(read.faults.values()))
        usable = [at for at, example in enumerate(read.examples) if example is not None]
        examples += [read.examples[at] for at in usable]
        places += [read.places[at] for at in usable]
        origins += [raw.source] * len(usable)
        found.formats |= read.formats
        found.unknown_keys |= read.unknown_keys
        found.report.add(read.report)
        found.report.bad_lines += map(str, read.faults.values())
    if not examples:
        raise no_example(data.sources(name), found.report)
    found.origins = np.array(origins, dtype=np.int32)
    return found


def load_early(recipe: Recipe, seed: int) -> dict[str, list[AnyExample]]:
    """The examples by split where the tokenizer is trained on them, divided as they will be prepared."""
    if not recipe.tokenizer.train:
        return {}
    settled = to_head(recipe.for_tokenizer(has_template=recipe.tokenizer.chat_template is not None))
    data = settled.data
    read = {name: list(read_examples(data, name)) for name in open_sets(data)}
    candidates = {}
    for name, examples in read.items():
        usable = np.array([example is not NOTHING for example in examples], dtype=bool)
        if not usable.any():
            raise no_example(data.sources(name), Examples().report)
        exact = b"".join(map(digest, examples)) if data.duplicates == "drop" else b""
        candidates[name] = Candidates(usable, np.frombuffer(exact, "<u8").reshape(-1, 2))
    found = {}
    for name, selection in select(candidates, data, seed=seed).items():
        usable = candidates[selection.of].usable
        kept = np.flatnonzero(selection.is_chosen & selection.is_new & usable).tolist()
        found[name] = [read[selection.of][number] for number in kept]
    return found


def to_head(recipe: Recipe) -> Recipe:
    """The recipe; of a stream with the first documents of each source in place of all."""
    if not recipe.data.streaming:
        return recipe
    limits = [min(source.limit or STREAM_HEAD, STREAM_HEAD) for source in recipe.data.train]
    pairs = zip(recipe.data.train, limits, strict=True)
    train = [source.model_copy(update={"limit": limit}) for source, limit in pairs]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})
