"""Turns a block of records into certified rows. All training rows are made here.

    RawBlock --> examples --> rows --> certified --> two Arrow record batches: rows | ledger

It runs in a loop, in a stream during training, or as a task on a cluster.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import UNREADABLE, TokenizedRows, label_options, tokenize_rows
from hf_clm.data.label.labels import Fate
from hf_clm.data.label.render import Renderer
from hf_clm.data.prepared.chunks import RawBlock
from hf_clm.data.proof.balance import check_entry
from hf_clm.data.proof.certificate import PROVED_WHOLE, Certificate, certify_rows
from hf_clm.data.proof.checker import Checker
from hf_clm.data.proof.leakage import digest, loose_digest
from hf_clm.data.read.formats import custom_modules, provide_modules
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import check_record, read_options
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Recipe
from hf_clm.schema import AnyExample
from hf_clm.text.chat import stop_token_ids

TOKEN_LIST, WEIGHT_LIST = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
ROW_SCHEMA = pyarrow.schema({"input_ids": TOKEN_LIST, "labels": TOKEN_LIST, "place": pyarrow.string()})
WEIGHTED_ROW_SCHEMA = ROW_SCHEMA.append(pyarrow.field("weights", WEIGHT_LIST))
NUMBERS = ("tokens", "target_tokens", "cut_tokens", "kept_tokens", "kept_targets", "rows", "proved_rows")
LEDGER_SCHEMA = pyarrow.schema(
    {
        **dict.fromkeys(("place", "fate", "reason"), pyarrow.string()),
        "source": pyarrow.int32(),  # number of the source in the recipe
        **dict.fromkeys(NUMBERS, pyarrow.int64()),
        "spelled": pyarrow.list_(pyarrow.string()),  # control tokens in the text
    }
)
DIGESTS = ("exact", "loose", "prompt")  # see Block.digests


@dataclass
class Block:
    """A labelled and certified block, and what was found out about it. E = records, N = rows.

    rows, ledger  (N,) and (E,) of the schemas ROW_SCHEMA (or WEIGHTED_ROW_SCHEMA) and LEDGER_SCHEMA
    digests       (E, 2) uint64 each; of the example, of its normalized text, and of its prompt
    counted       number of records by file
    faults        errors of the records that cannot be used
    """

    rows: pyarrow.RecordBatch
    ledger: pyarrow.RecordBatch
    digests: dict[str, np.ndarray]
    certificate: Certificate
    report: ReadReport
    counted: Counter[str] = field(default_factory=Counter)
    formats: set[str] = field(default_factory=set)
    unknown_keys: set[str] = field(default_factory=set)
    faults: list[DataError] = field(default_factory=list)


class BlockMaker:
    """Makes the blocks of a recipe; deterministic for a recipe and a tokenizer.

    It carries the source code of custom format modules, for machines that do not have them.

    Args:
        digests: the DIGESTS to compute.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, digests: Sequence[str] = ()):
        self.recipe, self.tokenizer, self.digests = recipe, tokenizer, tuple(digests)
        sources = (*recipe.data.train, *recipe.data.eval)
        self.modules = custom_modules([source.format for source in sources])

    def make(self, raw: RawBlock) -> Block:
        """Reads, labels, fits and certifies a block. Raises DataError if the ledger does not balance."""
        provide_modules(self.modules)  # before records are read with a custom format
        records = read_raw(raw, self.recipe.data)
        source = self.recipe.data.sources(raw.split)[raw.source]
        options = label_options(self.recipe, source)
        readable = [number for number, example in enumerate(records.examples) if example is not None]
        examples = [example for example in records.examples if example is not None]
        faults: dict[int, DataError] = {}
        rows = tokenize_rows(examples, self.tokenizer, options, faults=faults)
        for number, error in faults.items():
            records.faults[readable[number]] = error.at(records.places[readable[number]])
        places = [records.places[number] for number in readable]
        certificate, proved = certify_rows(
            rows,
            examples,
            checker=Checker(self.tokenizer, options, stop_token_ids(self.tokenizer)),
            places=places,
            whole=PROVED_WHOLE if raw.number == 0 else 0,
        )
        spelled: Sequence[list[str] | None] = [None] * len(examples)
        if rows.control_texts:
            renderer = Renderer(self.tokenizer, options)
            spelled = [renderer.control_texts(example) or None for example in examples]
        ledger = to_ledger(rows, records, readable, source=raw.source, proved=proved, spelled=spelled)
        return Block(
            to_batch(rows, places),
            ledger,
            {name: _digest_all(name, records.examples) for name in self.digests},
            certificate,
            records.report,
            records.counted,
            records.formats,
            records.unknown_keys,
            [records.faults[number] for number in sorted(records.faults)],
        )


@dataclass
class ReadBlock:
    """The examples of a block, and the errors of unusable records by record number."""

    places: list[str] = field(default_factory=list)
    examples: list[AnyExample | None] = field(default_factory=list)
    faults: dict[int, DataError] = field(default_factory=dict)
    report: ReadReport = field(default_factory=ReadReport)
    counted: Counter[str] = field(default_factory=Counter)
    formats: set[str] = field(default_factory=set)
    unknown_keys: set[str] = field(default_factory=set)


def read_raw(raw: RawBlock, data: Data) -> ReadBlock:
    """Parses and checks the records of a block. Unusable records have an error instead of an example."""
    source = data.sources(raw.split)[raw.source]
    block, first = ReadBlock(formats=set(raw.formats)), dict(raw.first)
    options = read_options(data, source)
    for chunk in raw.chunks:
        for where, value in chunk.items(options, block.report):
            example = value if isinstance(value, AnyExample) else None
            try:
                if example is None:
                    format, example, unknown, has_nul = check_record(
                        value, where, source, data=data, first=first
                    )
                    block.formats.add(format)
                    block.unknown_keys.update(unknown)
                    block.report.nul_records += has_nul
                block.counted[chunk.file] += 1
            except DataError as error:
                block.faults[len(block.places)] = error
            block.places.append(where)
            block.examples.append(example)
    block.report.records = len(block.places) - len(block.faults)
    return block


def to_batch(rows: TokenizedRows, places: Sequence[str]) -> pyarrow.RecordBatch:
    """Converts rows to an Arrow batch without copying the tokens. ``places`` are those of the examples."""
    offsets = pyarrow.array(rows.offsets.astype(np.int32))
    columns = {
        "input_ids": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(rows.input_ids)),
        "labels": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(rows.labels)),
        "place": pyarrow.array([places[number] for number in rows.sources.tolist()], pyarrow.string()),
    }
    if rows.weights is None:
        return pyarrow.RecordBatch.from_pydict(columns, schema=ROW_SCHEMA)
    columns["weights"] = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(rows.weights))
    return pyarrow.RecordBatch.from_pydict(columns, schema=WEIGHTED_ROW_SCHEMA)


def to_ledger(
    rows: TokenizedRows,
    read: ReadBlock,
    readable: Sequence[int],
    *,
    source: int,
    proved: Sequence[int],
    spelled: Sequence[list[str] | None],
) -> pyarrow.RecordBatch:
    """Returns the fate of each record of a block. Raises DataError if the ledger does not balance.

    Args:
        readable: numbers of the records that became examples.
        proved: the rows that the certificate encoded again.
    """
    count = len(read.places)
    fates = [Fate(UNREADABLE)] * count
    all_spelled: list[list[str] | None] = [None] * count
    for number, fate, texts in zip(readable, rows.fates, spelled, strict=True):
        fates[number], all_spelled[number] = fate, texts
    records = np.asarray(readable, dtype=np.int64)[rows.sources]  # the record of each row
    labels_before = np.concatenate([[0], np.cumsum(rows.labels >= 0)])
    sums = {
        "kept_tokens": np.bincount(records, weights=rows.lengths, minlength=count),
        "kept_targets": np.bincount(records, weights=np.diff(labels_before[rows.offsets]), minlength=count),
        "rows": np.bincount(records, minlength=count),
        "proved_rows": np.bincount(records[proved], minlength=count),
    }
    numbers = {name: values.astype(np.int64) for name, values in sums.items()}
    for number, fate in enumerate(fates):
        tokens, targets = int(numbers["kept_tokens"][number]), int(numbers["kept_targets"][number])
        check_entry(fate, tokens, targets, where=read.places[number])
    reasons = [
        str(read.faults[n].at("")) if n in read.faults else fate.reason for n, fate in enumerate(fates)
    ]
    return pyarrow.RecordBatch.from_pydict(
        {
            "place": read.places,
            "fate": [fate.kind for fate in fates],
            "reason": reasons,
            "source": np.full(count, source, dtype=np.int32),
            "tokens": [fate.tokens for fate in fates],
            "target_tokens": [fate.target_tokens for fate in fates],
            "cut_tokens": [fate.cut_tokens for fate in fates],
            **numbers,
            "spelled": all_spelled,
        },
        schema=LEDGER_SCHEMA,
    )


def _digest_all(name: str, examples: Iterable[AnyExample | None]) -> np.ndarray:
    """Returns (E, 2) uint64 digests; zeros for examples without a digest of this kind."""
    none, digests = bytes(16), []
    for example in examples:
        if name == "prompt":
            question = example.question if example is not None else None
            digests.append(loose_digest(question[0]) if question else none)
        else:
            digests.append((digest if name == "exact" else loose_digest)(example) if example else none)
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
