"""Which records of the sets that were read are in which split: decided by a few bytes of each."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data
from hf_clm.recipe.sections import TRAIN


@dataclass(frozen=True)
class Candidates:
    """The records of a set, E of them.

    usable  (E,) bool
    exact   (E, 2) uint64, the digest of each; only looked at where duplicates are dropped
    """

    usable: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Selection:
    """Which records of a set are in a split. E = records of the set.

    of         the name of the set
    is_chosen  (E,) bool; duplicates of a chosen set are among them
    equals     (E,) int64, the first record that each one equals: its own number where duplicates are kept
    is_whole   whether all of the set is taken as it is
    """

    of: str
    is_chosen: np.ndarray
    equals: np.ndarray
    is_whole: bool = True

    @property
    def numbers(self) -> np.ndarray:
        """The records that are in the split, duplicates included."""
        return np.flatnonzero(self.is_chosen)

    @property
    def is_new(self) -> np.ndarray:
        """(E,) bool, which records equal no earlier one."""
        return self.equals == np.arange(len(self.equals))


def select(sets: Mapping[str, Candidates], data: Data, *, seed: int) -> dict[str, Selection]:
    """The splits: train, and what is evaluated. Raises DataError where one of them would be empty."""
    found = {}
    for name in sorted(sets, key=lambda name: name != TRAIN):  # first train, the others in their order
        equals = np.arange(len(sets[name].usable))
        if data.duplicates == "drop":
            usable = np.flatnonzero(sets[name].usable)
            equals[usable] = usable[first_equal(sets[name].exact[usable])]
        is_chosen = np.ones(len(equals), dtype=bool)
        found[name] = Selection(name, is_chosen, equals, is_whole=data.duplicates == "keep")
    if len(found) > 1 or not data.eval_fraction:
        return found
    train = found["train"]
    is_kept = sets["train"].usable & train.is_new
    held_out = np.zeros(len(is_kept), dtype=bool)
    held_out[is_kept] = hold_out(int(is_kept.sum()), data.eval_fraction, seed=seed)
    return {
        "train": Selection("train", ~held_out, train.equals, is_whole=False),
        "eval": Selection("train", held_out, train.equals, is_whole=False),
    }


def hold_out(count: int, eval_fraction: float, *, seed: int) -> np.ndarray:
    """(count,) bool, which examples are held out. Raises DataError where that, or the rest, is nothing."""
    held_out = round(count * eval_fraction)
    if not 0 < held_out < count:
        what = f"eval_fraction {eval_fraction} of {count} examples leaves {held_out} to evaluate on"
        raise DataError(what, where="data.eval_fraction", fix="raise it, or name data.eval")
    found = np.zeros(count, dtype=bool)
    found[np.random.default_rng(seed).permutation(count)[:held_out]] = True
    return found


def first_equal(digests: np.ndarray) -> np.ndarray:
    """(N,) int64, the number of the first of N digests, (N, 2) uint64, that each one equals."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    found = np.zeros(len(order), dtype=np.int64)
    found[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    return found
