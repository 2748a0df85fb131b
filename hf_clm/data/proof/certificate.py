"""The label certificate: an independent implementation checks every row before training.

Labels are made by ``text/`` and ``data/label/``. None of that code is used here: texts come from the examples
and from transformers' ``apply_chat_template``, ids from calling the tokenizer.

    example ---- pieces ---- ids, labels ---- decode ----+
       |                                                 = ?
       +---- apply_chat_template, tokenizer(text) -------+

Every row is decoded and compared with the texts of its example. Rows are also grouped by shape (source,
roles, tools, reasoning, cut or not): the first rows of each shape in a block, and a share of all rows, are
compared id for id with the prompts for generation.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.datasets import TokenizedRows, rare_collection
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.proof.checker import Checker
from hf_clm.data.proof.texts import LABEL_CHECKS
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

LISTED_FAILURES = 3  # in an error message
MAX_FAILURES = 100  # in a certificate
PROVED_WHOLE = 2000  # in the first block of a source, this many rows are all proved


@dataclass(frozen=True)
class Failure:
    """A row that does not match its example. ``check`` is a key of ``LABEL_CHECKS``."""

    row: int
    place: str
    check: str
    expected: str
    got: str


@dataclass
class Certificate:
    """The result of checking a tokenized set. ``content_hash`` is the sha256 of all rows."""

    rows: int
    content_hash: str
    seconds: float = 0.0
    encoded_again: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        return not self.failed

    def require(self) -> None:
        """Raises DataError, listing the first failures, unless every row passed."""
        if self.is_valid:
            return
        listed = [
            f"{f.place}: {LABEL_CHECKS[f.check]}: expected {f.expected}, got {f.got}"
            for f in self.failures[:LISTED_FAILURES]
        ]
        counts = ", ".join(f"{count:,} {name}" for name, count in self.failed.most_common())
        raise DataError(
            f"the labels are not certified ({counts} of {self.rows:,} rows)",
            where=self.failures[0].place,
            got="; ".join(listed),
            fix="correct these records or the chat template; `hf-clm inspect` shows the rows",
        )

    def enter(self, failure: Failure) -> None:
        """Counts a failure and stores the first MAX_FAILURES."""
        self.failed[failure.check] += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(failure)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry in run.json."""
        return {"valid": self.is_valid, **asdict(self), "failed": dict(self.failed)}


def certify(
    rows: TokenizedRows,
    examples: Sequence[AnyExample],
    *,
    tokenizer: PreTrainedTokenizerFast,
    options: LabelOptions,
    stop_ids: Sequence[int],
    places: Sequence[str] | None = None,
) -> Certificate:
    """Checks every row against its example. ``places`` names the examples ("poems.jsonl:17")."""
    checker = Checker(tokenizer, options, stop_ids)
    return certify_rows(rows, examples, checker=checker, places=places, whole=PROVED_WHOLE)[0]


@rare_collection()
def certify_rows(
    rows: TokenizedRows,
    examples: Sequence[AnyExample],
    *,
    checker: Checker,
    places: Sequence[str] | None,
    origins: Sequence[int] | None = None,
    whole: int = 0,
) -> tuple[Certificate, list[int]]:
    """Does the same for a block, without the hash; also returns the numbers of the proved rows."""
    started = time.monotonic()
    certificate, proved = Certificate(len(rows), ""), []
    for number, *finding in checker.check(rows, examples, origins, whole=whole, proved=proved):
        source = int(rows.sources[number])
        place = places[source] if places is not None else f"example {source}"
        certificate.enter(Failure(number, place, *finding))
    certificate.encoded_again = len(proved)
    certificate.seconds = time.monotonic() - started
    return certificate, proved
