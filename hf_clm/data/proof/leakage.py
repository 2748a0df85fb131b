"""Finds training records among the evaluation records, by digests, since the texts do not fit in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

LISTED_LEAKS = 3  # in an error message


def digest(example: AnyExample) -> bytes:
    """Returns a 16-byte digest of an example; equal for equal examples."""
    return _digest(example.identity)


def loose_digest(example: AnyExample) -> bytes:
    """Returns a digest that ignores case and whitespace."""
    return _digest(_normalised(example.identity))


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows that are also training rows: exactly, or up to case and whitespace (``normalised``).

    ``prompts``: number of rows with the prompt of a training row; only reported, as the answers may differ.
    """

    rows: int
    exact: Sequence[str]
    normalised: Sequence[str]
    prompts: int = 0

    @property
    def share(self) -> float:
        return (len(self.exact) + len(self.normalised)) / max(1, self.rows)


def check_leakage(leakage: Leakage, max_leakage: float) -> None:
    """Raises DataError if more than ``max_leakage`` of the evaluation rows are training rows."""
    if leakage.share > max_leakage:
        listed = [*leakage.exact, *leakage.normalised][:LISTED_LEAKS]
        raise DataError(
            f"{leakage.share:.1%} of the evaluation rows are training rows "
            f"({len(leakage.exact):,} exactly, {len(leakage.normalised):,} up to case and whitespace)",
            where="data.eval",
            got=", ".join(listed),
            fix="remove them, set data.duplicates=drop, or raise data.max_leakage",
        )


def are_among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns (N,) bool, which of N digests are among others. Digests of zeros mean "none" and never are."""
    is_among = np.isin(digests[:, 0], others[:, 0]) & digests.any(axis=1)  # first halves first, for speed
    if is_among.any():
        pool = set(map(tuple, others.tolist()))
        is_among[is_among] = [tuple(digest) in pool for digest in digests[is_among].tolist()]
    return is_among


def _digest(key: tuple[str, ...]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in key:
        text = part.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(text))
        content.update(text)
    return content.digest()


def _normalised(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.casefold().split()) for part in key)
