"""Training records among the evaluation records: told by digests, as memory does not hold the texts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

SHOWN = 3  # rows in an error


def digest(example: AnyExample) -> bytes:
    """16 bytes that stand for an example where memory cannot hold it; equal for equal ones."""
    return _digest(example.identity)


def loose_digest(example: AnyExample) -> bytes:
    """The same but for case and white space."""
    return _digest(_normalised(example.identity))


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows that are training rows: exactly, or but for case and white space (``normalised``).

    ``prompts``: how many ask what a training row asks; only said, as the answers may differ.
    """

    rows: int
    exact: Sequence[str]
    normalised: Sequence[str]
    prompts: int = 0

    @property
    def share(self) -> float:
        return (len(self.exact) + len(self.normalised)) / max(1, self.rows)


def check_leakage(leakage: Leakage, max_leakage: float) -> None:
    """Raises DataError where more than ``max_leakage`` of the evaluation rows are training rows."""
    if leakage.share > max_leakage:
        listed = [*leakage.exact, *leakage.normalised][:SHOWN]
        raise DataError(
            f"{leakage.share:.1%} of the evaluation rows are training rows "
            f"({len(leakage.exact):,} exactly, {len(leakage.normalised):,} but for case and white space)",
            where="data.eval",
            got=", ".join(listed),
            fix="remove them, set data.duplicates=drop, or allow it by data.max_leakage",
        )


def are_among(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool, which of N digests are among others; one of zeros, which stands for nothing, is not."""
    found = np.isin(own[:, 0], others[:, 0]) & own.any(axis=1)  # by their first half, and then as a whole
    if found.any():
        known = set(map(tuple, others.tolist()))
        found[found] = [tuple(digest) in known for digest in own[found].tolist()]
    return found


def _digest(key: tuple[str, ...]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in key:
        text = part.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(text))
        content.update(text)
    return content.digest()


def _normalised(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.casefold().split()) for part in key)
