"""Arrays that are written and read in blocks are the arrays that numpy writes and reads."""

import numpy as np
import pytest

from hf_clm.data import arrays
from hf_clm.data.arrays import (
    ArrayWriter,
    dropped,
    item_blocks,
    map_array,
    release,
    row_blocks,
    to_fates,
    to_places,
)
from hf_clm.data.label.labels import Fate


@pytest.mark.parametrize("blocks", [[], [[]], [[1]], [[1, 2], [], [3, 4, 5]], [range(1000)] * 120])
def test_a_file_that_grew_is_the_file_that_numpy_saves(tmp_path, blocks):
    writer = ArrayWriter(tmp_path / "grown.npy", "<i4")
    for block in blocks:
        writer.append(block)
    writer.close()

    np.save(tmp_path / "saved.npy", np.array([item for block in blocks for item in block], dtype=np.int32))

    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_columns_grow_too(tmp_path):
    writer = ArrayWriter(tmp_path / "grown.npy", "<i8", columns=2)
    writer.append([[1, 2]])
    writer.append(np.zeros((0, 2)))
    writer.append([[3, 4], [5, 6]])
    writer.close()

    assert map_array(tmp_path / "grown.npy").tolist() == [[1, 2], [3, 4], [5, 6]]


def test_released_maps_read_the_same_again(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10_000))
    mapped = map_array(tmp_path / "a.npy")

    before = int(mapped.sum())
    release(mapped, mapped[5:], np.arange(3))

    assert (before, int(mapped.sum())) == (49_995_000, 49_995_000)


def test_fates_and_places_come_back_from_numbers():
    fates = [Fate("used", tokens=3), Fate("dropped", "no target token"), Fate("cut", cut_tokens=2, tokens=9)]
    places = ["b.jsonl:12", "a.csv: record 3", "b.jsonl:7"]

    assert list(to_fates(fates)) == fates
    assert [to_fates(fates)[2].cut_tokens, to_fates(fates)[2].tokens] == [2, 9]
    assert to_fates(fates).kinds == [("cut", ""), ("dropped", "no target token"), ("used", "")]
    assert dropped(fates).tolist() == [1]
    assert (list(to_places(places)), to_places(places)[1:]) == (places, places[1:])
    assert to_places(places).prefixes == ["a.csv: record ", "b.jsonl:"]


def test_a_block_of_rows_ends_before_it_holds_too_much(monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK_TOKENS", 10)
    monkeypatch.setattr(arrays, "BLOCK_ITEMS", 3)

    lengths = [4, 4, 4, 30, 1, 1, 1, 1]

    assert list(row_blocks(np.cumsum([0, *lengths]))) == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert list(row_blocks(np.array([0]))) == []
    assert [(part.start, part.stop) for part in item_blocks(7)] == [(0, 3), (3, 6), (6, 7)]
