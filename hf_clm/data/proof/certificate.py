"""The label certificate: an independent path proves every row before it is trained on.

The labels are made by ``text/`` and ``data/label/``. Nothing of that is used here: texts come from the
examples and from transformers' own ``apply_chat_template``, ids from the tokenizer's own call.

    example ---- pieces ---- ids, labels ---- decode ----+
       |                                                 = ?
       +---- apply_chat_template, tokenizer(text) -------+

Every row is decoded and compared with the texts of its example. Rows are sorted by shape (source, roles,
tools, reasoning, cut or whole): the first ones of each shape in a block and a share of all are also compared
id for id with the prompts that generation is given.
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
from hf_clm.data.proof.texts import CHECKS
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

LISTED_FAILURES = 3  # in an error message
MAX_FAILURES = 100  # in a certificate
PROVED_WHOLE = 2000  # every row is proved of a set of up to this many


@dataclass(frozen=True)
class Failure:
    """One row that is not what its example says. ``check`` is a key of ``CHECKS``."""

    row: int
    place: str
    check: str
    expected: str
    got: str


@dataclass
class Certificate:
    """What was proved of a tokenized set; ``content_hash`` as in ``hash_content``."""

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
        """Raises DataError, with the first rows that fail and why, unless every row was proved."""
        if self.is_valid:
            return
        listed = [
            f"{f.place}: {CHECKS[f.check]}: expected {f.expected}, got {f.got}"
            for f in self.failures[:LISTED_FAILURES]
        ]
        counts = ", ".join(f"{count:,} {name}" for name, count in self.failed.most_common())
        raise DataError(
            f"the labels are not certified ({counts} of {self.rows:,} rows)",
            where=self.failures[0].place,
            got="; ".join(listed),
            fix="correct these rows or the chat template; `hf-clm inspect` shows them",
        )

    def enter(self, failure: Failure) -> None:
        """Counts a failure; the first ones are kept."""
        self.failed[failure.check] += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(failure)

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
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
    """The same without the hash, of all rows or a block; and the numbers of the rows that were proved."""
    started = time.monotonic()
    certificate, proved = Certificate(len(rows), ""), []
    for number, *found in checker.check(rows, examples, origins, whole=whole, proved=proved):
        source = int(rows.sources[number])
        place = places[source] if places is not None else f"example {source}"
        certificate.enter(Failure(number, place, *found))
    certificate.encoded_again = len(proved)
    certificate.seconds = time.monotonic() - started
    return certificate, proved
