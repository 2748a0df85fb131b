"""A set as its blocks gave it: written to files, and what is known of the whole of it."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
from tqdm import tqdm

from hf_clm.data.label.datasets import UNREADABLE, rare_collection
from hf_clm.data.prepared.block import DIGESTS, LEDGER, ROWS, Block, read_raw
from hf_clm.data.prepared.selection import Candidates
from hf_clm.data.prepared.sets import RawSet, open_sets
from hf_clm.data.prepared.tables import DATA, TableWriter, read_batches
from hf_clm.data.proof.certificate import KEPT, Certificate
from hf_clm.data.read.faults import Faults
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import no_example
from hf_clm.data.read.sources import no_record
from hf_clm.errors import UserError
from hf_clm.recipe.recipe import Data

SAID_SECONDS = 60.0  # between two lines on how far it has come
READ_ON_SECONDS = 60.0  # after the first record that cannot be used, to find others


@dataclass
class Part:
    """E records of a set, their rows in ``folder/rows``, their ledger in ``folder/ledger``.

    digests  (E, 2) uint64 each, see Block
    usable   (E,) bool, which are no fault
    """

    folder: Path
    name: str
    report: ReadReport = field(default_factory=ReadReport)
    counted: Counter[str] = field(default_factory=Counter)  # records by file
    formats: set[str] = field(default_factory=set)
    unknown_keys: set[str] = field(default_factory=set)
    certificate: Certificate = field(default_factory=lambda: Certificate(0, ""))
    digests: dict[str, np.ndarray] = field(default_factory=dict)
    usable: np.ndarray = field(default_factory=partial(np.zeros, 0, bool))

    def enter(self, block: Block) -> None:
        """Counts in what was found of a block; stops where enough is wrong to be shown."""
        self.counted += block.counted
        self.formats |= block.formats
        self.unknown_keys |= block.unknown_keys
        self.report.add(block.report)
        self.report.bad_lines += map(str, block.faults)
        whole = self.certificate
        for failure in block.certificate.failures:
            whole.enter(replace(failure, row=failure.row + whole.rows))
        whole.rows, whole.seconds = (
            whole.rows + block.certificate.rows,
            whole.seconds + block.certificate.seconds,
        )
        if len(whole.failures) == KEPT:
            whole.require()

    def batches(self, table: str) -> Iterator[pyarrow.RecordBatch]:
        """Those of its ``rows`` or its ``ledger``."""
        return read_batches(self.folder / table / DATA)

    @property
    def candidates(self) -> Candidates:
        """What decides which split each record is in."""
        return Candidates(self.usable, self.digests["exact"])


@rare_collection()
def write_part(folder: Path, raw: RawSet, blocks: Iterable[Block], *, data: Data) -> Part:
    """Writes the blocks of a set.

    Raises DataError for labels that are not certified, and, unless they are dropped, for records that cannot
    be used: all of them, or those that are found in READ_ON_SECONDS after the first.
    """
    part = Part(folder, raw.name, raw.report)
    digests: dict[str, list[np.ndarray]] = {name: [np.zeros((0, 2), "<u8")] for name in DIGESTS}
    usable = [part.usable]
    with (
        TableWriter(folder / "rows", ROWS) as rows,
        TableWriter(folder / "ledger", LEDGER) as ledger,
    ):
        for number, block in enumerate(watched(blocks, raw.name)):
            if block.faults and data.on_bad_record == "error":
                raise list_faults(raw.name, number, block, data=data)
            rows.write(block.rows)
            ledger.write(block.ledger)
            for kind, found in block.digests.items():
                digests[kind].append(found)
            usable.append(np.array([fate != UNREADABLE for fate in block.ledger.column("fate").to_pylist()]))
            part.enter(block)
    part.certificate.require()
    part.digests = {kind: np.concatenate(found) for kind, found in digests.items()}
    part.usable = np.concatenate(usable)
    return part


def watched(blocks: Iterable[Block], name: str) -> Iterator[Block]:
    """Yields the blocks, and shows how many records are done: a bar on a terminal, else a line a minute."""
    said, records = time.monotonic(), 0
    what = f"preparing {name}"
    with tqdm(desc=what, unit=" records", disable=not sys.stderr.isatty(), leave=False) as bar:
        for block in blocks:
            yield block
            records += block.ledger.num_rows
            bar.update(block.ledger.num_rows)
            if bar.disable and time.monotonic() - said > SAID_SECONDS:
                said = time.monotonic()
                sys.stderr.write(f"{what}: {records:,} records\n")


def list_faults(name: str, number: int, block: Block, *, data: Data) -> UserError:
    """The error for the records of block ``number`` that cannot be used, and for those of later blocks.

    The later blocks are read again, whoever was to make them, and not labelled.
    """
    faults, ends = Faults(), time.monotonic() + READ_ON_SECONDS
    for error in block.faults:
        faults.add(error, is_record=True)
    for later in open_sets(data)[name].blocks:
        if time.monotonic() > ends:
            break
        if later.number > number:
            for error in read_raw(later, data).faults.values():
                faults.add(error, is_record=True)
    return faults.to_error()


def check_read(part: Part, data: Data) -> None:
    """Raises DataError for a file or a set that gave nothing."""
    sources = data.sources(part.name)
    has_limit = any(source.limit for source in sources)  # then some files may not have been read
    for file in part.report.files:
        if not part.counted[file] and not has_limit:
            raise no_record(file, [line for line in part.report.bad_lines if line.startswith(f"{file}:")])
    if not part.report.records:
        raise no_example(sources, part.report)
