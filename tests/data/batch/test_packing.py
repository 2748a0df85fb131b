"""Packing into rows of one length: complete examples by best fit, or a stream that is cut."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import EOS, X, byte_tokenizer, document, prompted
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clm.data.batch.packing import (
    PackedDataset,
    Pieces,
    RowPiece,
    best_fit_rows,
    stream_blocks,
    stream_rows,
)
from hf_clm.data.label.datasets import PretrainDataset, SFTDataset

TOKENIZER = byte_tokenizer()
DOCUMENTS = [document("aaa"), document("b"), document("cccc")]  # 4, 2 and 5 tokens


def to_lists(row: Any) -> dict[str, list[int]]:
    return {key: values.tolist() for key, values in row.items()}


def textbook_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Returns the size of each row; places one example at a time, longest first, comparing all rows."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, size in enumerate(rows) if size + length <= max_length]
        if fitting:
            rows[max(fitting, key=lambda number: rows[number])] += length
        else:
            rows.append(length)
    return rows


def stream_token_by_token(lengths: list[int], max_length: int) -> list[list[RowPiece]]:
    """Packs one document at a time, row by row."""
    rows: list[list[RowPiece]] = [[]]
    room = max_length
    for number, length in enumerate(lengths):
        start = 0
        while start < length - 1 or start == 0:
            stop = min(length, start + room)
            if stop - start > 1 or length == 1:
                rows[-1].append((number, start, stop))
                room -= stop - start
                start = stop if stop == length else stop - 1
            else:
                room = 0
            if room == 0:
                rows.append([])
                room = max_length
    return [row for row in rows if row]


@pytest.mark.parametrize(
    ("lengths", "max_length", "rows"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([4, 6], 10, [[1, 0]]),
        ([6, 6, 4], 10, [[0], [1, 2]]),
        ([7, 5, 3, 2], 10, [[0, 2], [1, 3]]),
        ([5, 8, 2, 5], 10, [[1, 2], [0, 3]]),  # 2 goes to the fullest row that has room: 8, not 5 + 5
        ([3, 6, 5, 4], 10, [[1, 3], [2, 0]]),
        ([1, 1, 1], 2, [[0, 1], [2]]),
    ],
)
def test_best_fit_uses_the_fullest_row_with_room(lengths, max_length, rows):
    for sizes in (lengths, np.array(lengths, dtype=np.int64), np.array(lengths, dtype=np.int32)):
        pieces = best_fit_rows(sizes, max_length)
        assert list(pieces) == [[(i, 0, lengths[i]) for i in row] for row in rows]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 45))
@settings(max_examples=200, deadline=None)
def test_best_fit_equals_the_textbook_algorithm_and_packs_each_example_once(lengths, max_length):
    pieces = best_fit_rows(lengths, max_length)

    found = [piece for row in pieces for piece in row]
    assert sorted(found) == [(number, 0, length) for number, length in enumerate(lengths)]
    sizes = [sum(stop for _, _, stop in row) for row in pieces]
    assert sorted(sizes) == sorted(textbook_best_fit(lengths, max_length))
    assert pieces.row_tokens.tolist() == sizes


def test_many_equal_rows_are_filled_as_in_the_textbook():
    """Log-normal lengths have many equal values, so groups of rows receive groups of examples."""
    lengths = np.random.default_rng(0).lognormal(np.log(12), 1.0, 3000).clip(1, 64).astype(int).tolist()

    pieces = best_fit_rows(lengths, 64)

    assert sorted(pieces.row_tokens.tolist()) == sorted(textbook_best_fit(lengths, 64))
    assert sorted(pieces.examples.tolist()) == list(range(3000))


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_best_fit_refuses_empty_and_too_long_examples(lengths):
    with pytest.raises(AssertionError):
        best_fit_rows(lengths, 10)


@pytest.mark.parametrize(
    ("lengths", "max_length", "rows"),
    [
        ([], 4, []),
        ([4], 4, [[(0, 0, 4)]]),
        ([2, 2], 4, [[(0, 0, 2), (1, 0, 2)]]),
        ([6], 4, [[(0, 0, 4)], [(0, 3, 6)]]),  # token 3 is read again: label 4 needs it
        ([3, 5], 6, [[(0, 0, 3), (1, 0, 3)], [(1, 2, 5)]]),
        ([3, 2], 4, [[(0, 0, 3)], [(1, 0, 2)]]),  # the one place left would hold a token without a label
        ([2, 9, 2], 4, [[(0, 0, 2), (1, 0, 2)], [(1, 1, 5)], [(1, 4, 8)], [(1, 7, 9), (2, 0, 2)]]),
        ([3], 2, [[(0, 0, 2)], [(0, 1, 3)]]),
    ],
)
def test_a_stream_is_cut_where_a_row_is_full(lengths, max_length, rows):
    assert list(stream_rows(lengths, max_length)) == rows


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(2, 16))
@settings(max_examples=400, deadline=None)
def test_a_stream_equals_packing_token_by_token(lengths, max_length):
    assert list(stream_rows(lengths, max_length)) == stream_token_by_token(lengths, max_length)


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(2, 16))
@settings(max_examples=150, deadline=None)
def test_a_stream_has_each_label_once_and_fills_its_rows(lengths, max_length):
    rows = list(stream_rows(lengths, max_length))

    learned = [
        (number, token) for row in rows for number, start, stop in row for token in range(start + 1, stop)
    ]
    assert learned == [(number, token) for number, length in enumerate(lengths) for token in range(1, length)]
    sizes = [sum(stop - start for _, start, stop in row) for row in rows]
    assert all(size in (max_length - 1, max_length) for size in sizes[:-1])
    assert max(sizes, default=0) <= max_length


def test_a_stream_of_rows_of_one_token_is_refused():
    with pytest.raises(AssertionError, match="a row of one token has no label"):
        stream_rows([3], 1)


def test_positions_restart_in_each_document_of_a_packed_row():
    packed = PackedDataset(PretrainDataset(DOCUMENTS, TOKENIZER), max_length=7)

    assert len(packed) == 2
    assert to_lists(packed[0]) == {
        "input_ids": [*b"cccc", EOS, ord("b"), EOS],
        "labels": [X, *b"ccc", EOS, X, EOS],
        "position_ids": [0, 1, 2, 3, 4, 0, 1],
    }
    assert to_lists(packed[1]) == {
        "input_ids": [*b"aaa", EOS],
        "labels": [X, *b"aa", EOS],
        "position_ids": [0, 1, 2, 3],
    }


def test_a_streamed_row_repeats_the_token_before_the_cut_without_a_label():
    packed = PackedDataset(PretrainDataset(DOCUMENTS, TOKENIZER), max_length=8, packing="stream")

    assert [to_lists(packed[0]), to_lists(packed[1])] == [
        {
            "input_ids": [*b"aaa", EOS, ord("b"), EOS, *b"cc"],
            "labels": [X, *b"aa", EOS, X, EOS, X, ord("c")],
            "position_ids": [0, 1, 2, 3, 0, 1, 0, 1],
        },
        {"input_ids": [*b"ccc", EOS], "labels": [X, *b"cc", EOS], "position_ids": [0, 1, 2, 3]},
    ]
    assert list(packed.pieces) == [[(0, 0, 4), (1, 0, 2), (2, 0, 2)], [(2, 1, 5)]]


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
@given(texts=st.lists(st.text("ab", min_size=1, max_size=15), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_packing_changes_no_label(packing, texts):
    dataset = PretrainDataset([document(text) for text in texts], TOKENIZER)

    rows = [to_lists(row) for row in PackedDataset(dataset, max_length=16, packing=packing)]

    packed = Counter(label for row in rows for label in row["labels"] if label != X)
    letters = "".join(text[1:] for text in texts)  # the first of each has nothing before it
    assert packed == Counter({**Counter(letters.encode()), EOS: len(texts)})


def test_the_masked_prompts_of_packed_rows_stay_masked():
    dataset = SFTDataset([prompted("pp", "q"), prompted("r", "s")], TOKENIZER)

    row = PackedDataset(dataset, max_length=8)[0]

    assert row["labels"].tolist() == [X, X, ord("q"), EOS, X, ord("s"), EOS]


@pytest.mark.parametrize(
    ("packing", "max_length", "fill"), [("best_fit", 7, 11 / 14), ("stream", 8, 12 / 16)]
)
def test_fill_is_the_fraction_of_positions_with_a_token(packing, max_length, fill):
    packed = PackedDataset(PretrainDataset(DOCUMENTS, TOKENIZER), max_length=max_length, packing=packing)

    assert packed.fill == fill


def test_packed_rows_are_indexed_like_a_list():
    packed = PackedDataset(PretrainDataset(DOCUMENTS, TOKENIZER), max_length=7)

    assert packed[-1]["input_ids"].tolist() == [*b"aaa", EOS]
    assert packed.pieces[-1] == [(0, 0, 4)]
    assert len(list(packed)) == 2
    with pytest.raises(IndexError):
        packed[2]


def test_earlier_packings_are_read_from_memory_maps(tmp_path):
    """The arrays are read-only: rows are copies, so masking them changes no document."""
    dataset = PretrainDataset(DOCUMENTS, TOKENIZER)
    before = PackedDataset(dataset, max_length=8, packing="stream")
    arrays = {"examples": before.pieces.examples, "starts": before.pieces.starts}
    arrays |= {"stops": before.pieces.stops, "offsets": before.pieces.offsets}
    for name, values in [*arrays.items(), ("input_ids", dataset.rows.input_ids)]:
        np.save(tmp_path / f"{name}.npy", values)
    maps = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays}
    dataset.rows.input_ids = np.load(tmp_path / "input_ids.npy", mmap_mode="r")
    dataset.rows.labels.flags.writeable = False

    after = PackedDataset(dataset, max_length=8, pieces=Pieces(**maps))

    assert {values.dtype for values in arrays.values()} == {np.dtype(np.int64)}
    assert [to_lists(row) for row in after] == [to_lists(row) for row in before]
    assert after[0]["labels"].tolist() == [X, *b"aa", EOS, X, EOS, X, ord("c")]
    assert after.fill == 12 / 16


@pytest.mark.parametrize("max_length", [2, 3, 7, 16])
def test_a_stream_in_blocks_is_cut_like_a_single_one(max_length):
    draw = np.random.default_rng(max_length)
    for _ in range(50):
        lengths = draw.integers(1, 24, draw.integers(1, 30))
        cuts = np.sort(draw.integers(0, len(lengths) + 1, 3))
        whole = stream_rows(lengths, max_length)

        parts = list(stream_blocks(np.split(lengths, cuts), max_length))

        for column in ("examples", "starts", "stops", "offsets"):
            found = np.concatenate([getattr(part, column) for part in parts])
            assert found.tolist() == getattr(whole, column).tolist()


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_rows_that_are_read_at_once_are_those_read_one_at_a_time(packing):
    packed = PackedDataset(PretrainDataset(DOCUMENTS * 3, TOKENIZER), max_length=7, packing=packing)
    numbers = [3, 0, 2, 0]

    assert len(packed) > 4
    assert list(map(to_lists, packed.__getitems__(numbers))) == [to_lists(packed[row]) for row in numbers]
