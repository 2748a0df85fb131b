"""Writes the blocks of a set to files and collects their statistics."""

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
from hf_clm.data.prepared.block import DIGESTS, LEDGER_SCHEMA, ROW_SCHEMA, Block, read_raw
from hf_clm.data.prepared.selection import Candidates
from hf_clm.data.prepared.sets import RawSet, open_sets
from hf_clm.data.prepared.tables import DATA, TableWriter, read_batches
from hf_clm.data.proof.certificate import MAX_FAILURES, Certificate
from hf_clm.data.read.faults import Faults
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import no_example
from hf_clm.data.read.sources import no_record
from hf_clm.errors import UserError
from hf_clm.recipe.recipe import Data

PROGRESS_SECONDS = 60.0  # between two progress lines
FAULT_SEARCH_SECONDS = 60.0  # time to look for more unusable records after the first one


@dataclass
class SetPart:
    """A set of E records with its rows in ``folder/rows`` and its ledger in ``folder/ledger``.

    digests  (E, 2) uint64 each; see Block
    usable   (E,) bool, which records can be used
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
        """Adds the statistics of a block. Raises DataError once there are MAX_FAILURES failures."""
        self.counted += block.counted
        self.formats |= block.formats
        self.unknown_keys |= block.unknown_keys
        self.report.add(block.report)
        self.report.bad_lines += map(str, block.faults)
        total = self.certificate
        for failure in block.certificate.failures:
            total.enter(replace(failure, row=failure.row + total.rows))
        total.rows += block.certificate.rows
        total.seconds += block.certificate.seconds
        if len(total.failures) == MAX_FAILURES:
            total.require()

    def batches(self, table: str) -> Iterator[pyarrow.RecordBatch]:
        """Yields the batches of ``rows`` or ``ledger``."""
        return read_batches(self.folder / table / DATA)

    @property
    def candidates(self) -> Candidates:
        """The data that decide which split each record belongs to."""
        return Candidates(self.usable, self.digests["exact"])


@rare_collection()
def write_part(folder: Path, raw: RawSet, blocks: Iterable[Block], *, data: Data) -> SetPart:
    """Writes the blocks of a set.

    Raises DataError for labels that are not certified, and for unusable records unless they are dropped. The
    error lists the unusable records found within FAULT_SEARCH_SECONDS after the first one.
    """
    part = SetPart(folder, raw.name, raw.report)
    digests: dict[str, list[np.ndarray]] = {name: [np.zeros((0, 2), "<u8")] for name in DIGESTS}
    usable = [part.usable]
    with (
        TableWriter(folder / "rows", ROW_SCHEMA) as rows,
        TableWriter(folder / "ledger", LEDGER_SCHEMA) as ledger,
    ):
        for number, block in enumerate(show_progress(blocks, raw.name)):
            if block.faults and data.on_bad_record == "error":
                raise list_faults(raw.name, number, block, data=data)
            rows.write(block.rows)
            ledger.write(block.ledger)
            for kind, values in block.digests.items():
                digests[kind].append(values)
            usable.append(np.array([fate != UNREADABLE for fate in block.ledger.column("fate").to_pylist()]))
            part.enter(block)
    part.certificate.require()
    part.digests = {kind: np.concatenate(values) for kind, values in digests.items()}
    part.usable = np.concatenate(usable)
    return part


def show_progress(blocks: Iterable[Block], name: str) -> Iterator[Block]:
    """Yields the blocks and shows progress: a bar on a terminal, otherwise a line every minute."""
    last_line, records = time.monotonic(), 0
    what = f"preparing {name}"
    with tqdm(desc=what, unit=" records", disable=not sys.stderr.isatty(), leave=False) as bar:
        for block in blocks:
            yield block
            records += block.ledger.num_rows
            bar.update(block.ledger.num_rows)
            if bar.disable and time.monotonic() - last_line > PROGRESS_SECONDS:
                last_line = time.monotonic()
                sys.stderr.write(f"{what}: {records:,} records\n")


def list_faults(name: str, number: int, block: Block, *, data: Data) -> UserError:
    """Returns the error for the unusable records of block ``number`` and of later blocks.

    The later blocks are read again here, but not labelled.
    """
    faults, ends = Faults(), time.monotonic() + FAULT_SEARCH_SECONDS
    for error in block.faults:
        faults.add(error, is_record=True)
    for later in open_sets(data)[name].blocks:
        if time.monotonic() > ends:
            break
        if later.number > number:
            for error in read_raw(later, data).faults.values():
                faults.add(error, is_record=True)
    return faults.to_error()


def check_read(part: SetPart, data: Data) -> None:
    """Raises DataError for a file or a set without usable records."""
    sources = data.sources(part.name)
    has_limit = any(source.limit for source in sources)  # then some files may not have been read
    for file in part.report.files:
        if not part.counted[file] and not has_limit:
            raise no_record(file, [line for line in part.report.bad_lines if line.startswith(f"{file}:")])
    if not part.report.records:
        raise no_example(sources, part.report)
