"""Assigns the records of the sets to splits, based on a few bytes of each record."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data
from hf_clm.recipe.sections import TRAIN


@dataclass(frozen=True)
class Candidates:
    """The E records of a set.

    usable  (E,) bool
    exact   (E, 2) uint64, their digests; used only if duplicates are dropped
    """

    usable: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Selection:
    """The records of a set that belong to a split. E = records of the set.

    of         name of the set
    is_chosen  (E,) bool, including duplicates
    equals     (E,) int64, number of the first equal record; the record's own number if duplicates are kept
    is_whole   whether the split is the complete set, unchanged
    """

    of: str
    is_chosen: np.ndarray
    equals: np.ndarray
    is_whole: bool = True

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the records in the split, including duplicates."""
        return np.flatnonzero(self.is_chosen)

    @property
    def is_new(self) -> np.ndarray:
        """(E,) bool, False for records that equal an earlier one."""
        return self.equals == np.arange(len(self.equals))


def select(sets: Mapping[str, Candidates], data: Data, *, seed: int) -> dict[str, Selection]:
    """Returns the training split and the evaluation splits. Raises DataError if a split would be empty."""
    selections = {}
    for name in sorted(sets, key=lambda name: name != TRAIN):  # train first, the others in order
        equals = np.arange(len(sets[name].usable))
        if data.duplicates == "drop":
            usable = np.flatnonzero(sets[name].usable)
            equals[usable] = usable[first_equal(sets[name].exact[usable])]
        is_chosen = np.ones(len(equals), dtype=bool)
        selections[name] = Selection(name, is_chosen, equals, is_whole=data.duplicates == "keep")
    if len(selections) > 1 or not data.eval_fraction:
        return selections
    train = selections["train"]
    is_candidate = sets["train"].usable & train.is_new
    held_out = np.zeros(len(is_candidate), dtype=bool)
    held_out[is_candidate] = hold_out(int(is_candidate.sum()), data.eval_fraction, seed=seed)
    return {
        "train": Selection("train", ~held_out, train.equals, is_whole=False),
        "eval": Selection("train", held_out, train.equals, is_whole=False),
    }


def hold_out(count: int, eval_fraction: float, *, seed: int) -> np.ndarray:
    """Returns (count,) bool, True for held-out examples. Raises DataError if all or none are held out."""
    held_out = round(count * eval_fraction)
    if not 0 < held_out < count:
        what = f"eval_fraction {eval_fraction} of {count} examples leaves {held_out} to evaluate on"
        raise DataError(what, where="data.eval_fraction", fix="raise it, or set data.eval")
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[np.random.default_rng(seed).permutation(count)[:held_out]] = True
    return is_held_out


def first_equal(digests: np.ndarray) -> np.ndarray:
    """Returns (N,) int64, the number of the first equal digest of each of N digests, (N, 2) uint64."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in order
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    firsts = np.zeros(len(order), dtype=np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    return firsts
