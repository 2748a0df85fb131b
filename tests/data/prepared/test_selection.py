"""The assignment of records to splits."""

import numpy as np
import pytest
from prepared_sets import recipe_of

from hf_clm.data.prepared.selection import Candidates, first_equal, hold_out, select
from hf_clm.errors import DataError


def candidates(letters: str, unusable: str = "") -> Candidates:
    """Returns a record for each letter; equal letters are equal records."""
    exact = np.array([[ord(letter), ord(letter)] for letter in letters], dtype="<u8").reshape(-1, 2)
    return Candidates(np.array([letter not in unusable for letter in letters], dtype=bool), exact)


def test_records_are_equal_if_both_halves_of_their_digests_are():
    digests = np.array([[1, 1], [1, 2], [1, 1], [2, 1], [1, 2], [1, 1]], dtype="<u8")

    assert first_equal(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(np.zeros((0, 2), "<u8")).tolist() == []


def test_a_split_has_all_records_and_marks_duplicates_if_they_are_dropped():
    sets = {"train": candidates("abacb"), "eval": candidates("aa")}

    kept = select(sets, recipe_of(["a"], eval=["b"]).data, seed=0)
    dropped = select(sets, recipe_of(["a"], eval=["b"], duplicates="drop").data, seed=0)

    assert [(name, split.of, split.is_whole) for name, split in kept.items()] == [
        ("train", "train", True),
        ("eval", "eval", True),
    ]
    assert kept["train"].equals.tolist() == [0, 1, 2, 3, 4]
    assert dropped["train"].equals.tolist() == [0, 1, 0, 3, 1]
    assert dropped["train"].is_new.tolist() == [True, True, False, True, False]
    assert (dropped["train"].numbers.tolist(), dropped["eval"].equals.tolist()) == ([0, 1, 2, 3, 4], [0, 0])


def test_a_record_is_not_a_duplicate_of_an_unusable_one():
    """The options of a source can make one of two equal records unusable."""
    exact = np.array([[1, 1], [1, 1], [1, 1]], dtype="<u8")
    sets = {"train": Candidates(np.array([False, True, True]), exact)}

    found = select(sets, recipe_of(["a"], duplicates="drop").data, seed=0)["train"]

    assert found.equals.tolist() == [0, 1, 1]


def test_the_seed_selects_the_fraction():
    first, again, other = (hold_out(100, 0.3, seed=seed) for seed in (1, 1, 2))

    assert first.sum() == 30
    assert first.tolist() == again.tolist() != other.tolist()


def test_records_that_are_held_out_are_new_and_usable_and_every_record_is_in_one_split():
    sets = {"train": candidates("abcdefghijxxxaaab", unusable="x")}
    data = recipe_of(["a"], eval_fraction=0.4, duplicates="drop").data

    found = select(sets, data, seed=3)

    train, held_out = found["train"], found["eval"]
    assert (train.of, held_out.of, train.is_whole, held_out.is_whole) == ("train", "train", False, False)
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(17))
    assert len(held_out.numbers) == 4  # of the 10 that can be used
    assert max(held_out.numbers) < 10


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.01), (1, 0.5), (3, 0.99), (0, 0.5)])
def test_a_fraction_that_leaves_a_split_empty_is_an_error(count, fraction):
    with pytest.raises(DataError) as error:
        hold_out(count, fraction, seed=0)

    assert str(error.value) == (
        f"data.eval_fraction: eval_fraction {fraction} of {count} examples leaves "
        f"{round(count * fraction)} to evaluate on; fix: raise it, or set data.eval"
    )
