"""Reading files in chunks: every line once, in order, with its place, whichever chunks are read."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_sets import recipe_of
from pyarrow import ipc, parquet

from hf_clm.data.prepared import chunks
from hf_clm.data.prepared.chunks import Chunk, read_blocks, read_chunks, read_file_chunks
from hf_clm.data.read.readers import ReadOptions, ReadReport, is_parted
from hf_clm.errors import DataError

OPTIONS = ReadOptions()
SIZE = 64  # of a chunk, in place of CHUNK_BYTES
LENGTHS = st.lists(st.one_of(st.integers(0, 20), st.integers(50, 80), st.integers(100, 400)), max_size=40)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", SIZE)
        patch.setattr(chunks, "CHUNK_RECORDS", 3)
        yield


def text_of(lengths: list[int]) -> bytes:
    """Returns a line of each length, without the newline; each line begins with its number."""
    return b"".join(
        f"{number}".encode()[:length].ljust(length, b".") + b"\n" for number, length in enumerate(lengths)
    )


def read(file: str, options: ReadOptions = OPTIONS, **how: Any) -> list[Chunk]:
    return list(read_file_chunks(file, options, report=ReadReport(), **how))


def items_of(found: Iterable[Chunk], options: ReadOptions = OPTIONS) -> list[tuple[str, Any]]:
    return [item for chunk in found for item in chunk.items(options, ReadReport())]


def places(found: Iterable[Chunk]) -> list[str]:
    return [where for where, _ in items_of(found)]


@settings(deadline=None)
@given(lengths=LENGTHS, has_end=st.booleans(), is_gzip=st.booleans())
def test_the_chunks_of_a_file_are_its_lines_once_and_in_order(lengths, has_end, is_gzip):
    text = text_of(lengths) if has_end else text_of(lengths)[:-1]
    name = "a.jsonl.gz" if is_gzip else "a.jsonl"
    Path(name).write_bytes(gzip.compress(text) if is_gzip else text)

    found = read(name)

    assert b"".join(bytes(chunk.content) for chunk in found) == text
    assert all(bytes(chunk.content).endswith(b"\n") for chunk in found[:-1])
    counts = [bytes(chunk.content).count(b"\n") for chunk in found]
    assert [chunk.before for chunk in found] == [sum(counts[:number]) for number in range(len(found))]


@settings(deadline=None)
@given(lengths=LENGTHS, wanted=st.sets(st.integers(0, 30)), is_gzip=st.booleans())
def test_only_the_lines_of_needed_chunks_are_read(lengths, wanted, is_gzip):
    text = text_of(lengths)
    name = "a.jsonl.gz" if is_gzip else "a.jsonl"
    Path(name).write_bytes(gzip.compress(text) if is_gzip else text)
    expected, at = b"", 0
    for line in text.splitlines(keepends=True):
        expected += line if at // SIZE in wanted else b""
        at += len(line)

    assert (
        b"".join(bytes(chunk.content) for chunk in read(name, is_needed=lambda number: number in wanted))
        == expected
    )


@settings(deadline=None)
@given(
    count=st.integers(1, 40), wanted=st.sets(st.integers(0, 14)), kind=st.sampled_from(["csv", "json", "txt"])
)
def test_other_files_give_the_records_of_needed_chunks(count, wanted, kind):
    """Three records per chunk."""
    records = [{"text": f"{number}"} for number in range(count)]
    file = write_as(kind, records)
    every = list(range(count)) if kind != "txt" else [0]

    found = read(file, is_needed=lambda number: number in wanted)

    values = [value for _, value in items_of(found)]
    assert len(values) == len([number for number in every if number // 3 in wanted])
    if kind != "txt":
        assert values == [{"text": f"{number}"} for number in every if number // 3 in wanted]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
@pytest.mark.parametrize("wanted", [{0}, {1}, {0, 2}, {5}])
def test_columnar_files_give_the_needed_batches_with_their_places(kind, wanted):
    file = write_as(kind, [{"text": f"{number}"} for number in range(30)])
    whole = read(file)
    size = len(whole[0].content)

    found = read(file, is_needed=lambda number: number in wanted)

    numbers = [n for n in range(30) if (n // size if n // size in range(len(whole)) else -1) in wanted]
    assert places(found) == [f"{file}: record {number + 1}" for number in numbers]
    assert [row["text"] for chunk in found for row in chunk.content.to_pylist()] == list(map(str, numbers))
    assert size == {"parquet": 30, "arrow": 13, "stream.arrow": 10}[kind]


def write_as(kind: str, records: list[dict[str, Any]]) -> str:
    path = f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=17)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(records)
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    elif kind == "stream.arrow":
        table = pyarrow.Table.from_pylist(records)
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    elif kind == "json":
        Path(path).write_text(json.dumps(records))
    else:
        Path(path).write_text("text\n" + "".join(f"{record['text']}\n" for record in records))
    return path


def test_line_numbers_after_a_jump_name_the_byte_they_count_from():
    file = write_jsonl(Path("a.jsonl"), [{"text": "x" * 20} for _ in range(6)])  # 33 bytes a line

    assert places(read(file)) == [f"a.jsonl:{number}" for number in range(1, 7)]
    assert places(read(file, is_needed=lambda number: number == 2)) == [
        "a.jsonl (after byte 132):1",
        "a.jsonl (after byte 132):2",
    ]


def test_a_line_that_is_too_long_is_refused_and_later_lines_are_read():
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 500 + b'"}', b'{"text": "b"}']
    Path("a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    options = ReadOptions(max_line_bytes=200)

    chunks = read("a.jsonl", options)

    found = items_of(chunks, options)

    assert [(where, value) for where, value in found if isinstance(value, dict)] == [
        ("a.jsonl:1", {"text": "a"}),
        ("a.jsonl:3", {"text": "b"}),
    ]
    assert [str(value) for _, value in found if isinstance(value, DataError)] == [
        "a.jsonl:2: line too long; got over 200 bytes; fix: raise max_line_bytes"
    ]
    assert sum(chunk.size for chunk in chunks) < 300


@pytest.mark.parametrize("length", [1, 40, 100, 300])
def test_a_truncated_last_line_is_reported_in_any_chunk(length):
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * length)

    *_, (where, error) = items_of(read("a.jsonl"))

    assert where == "a.jsonl:2"
    assert error.fix.startswith("the file ends in this line")


def test_blank_lines_are_counted_and_a_byte_order_mark_is_skipped():
    Path("a.jsonl").write_text('\ufeff{"text": "a"}\n\n\r\n{"text": "b"}\n')
    report = ReadReport()

    found = [item for chunk in read("a.jsonl") for item in chunk.items(OPTIONS, report)]

    assert found == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:4", {"text": "b"})]
    assert report.blank_lines == 2


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 12, 13])
def test_a_limit_applies_to_all_files_of_a_source_together(limit):
    for name in ("a", "b", "c"):
        write_jsonl(Path(f"{name}.jsonl"), [{"text": f"{name}{number}"} for number in range(4)])
    data = recipe_of([{"path": "*.jsonl", "limit": limit}]).data
    report = ReadReport()

    found = places(read_chunks(data.train[0], data, report=report))

    assert found == [f"{name}.jsonl:{number}" for name in "abc" for number in (1, 2, 3, 4)][:limit]
    assert report.files == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_broken_line_after_the_limit_is_never_read():
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\na broken line\n')
    data = recipe_of([{"path": "a.jsonl", "limit": 2}]).data

    found = items_of(read_chunks(data.train[0], data, report=ReadReport()))

    assert [value for _, value in found] == [{"text": "a"}, {"text": "b"}]


# --- blocks


def test_a_block_has_chunks_of_one_source_and_about_its_size(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 200)
    write_jsonl(Path("a.jsonl"), [{"text": "x" * 20} for _ in range(12)])  # 33 bytes a line
    write_jsonl(Path("b.jsonl"), [{"text": "x"}])
    data = recipe_of(["a.jsonl", "b.jsonl"], eval=["b.jsonl"]).data

    found = [
        *read_blocks(data, "train", report=ReadReport()),
        *read_blocks(data, "eval", report=ReadReport()),
    ]

    assert [(raw.split, raw.source, raw.number) for raw in found] == [
        *(("train", 0, 0), ("train", 0, 1), ("train", 1, 2), ("eval", 0, 0))
    ]
    assert [sum(chunk.size for chunk in raw.chunks) for raw in found] == [264, 132, 14, 14]
    assert [len(places(raw.chunks)) for raw in found] == [8, 4, 1, 1]


def test_block_boundaries_depend_on_the_files_alone(monkeypatch):
    """They are equal for a compressed file and for repeated reads."""
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 200)
    plain = Path(write_jsonl(Path("a.jsonl"), [{"text": "x" * (n % 37)} for n in range(60)]))
    Path("b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))

    cuts = []
    for path in ("a.jsonl", "a.jsonl", "b.jsonl.gz"):
        blocks = list(read_blocks(recipe_of([path]).data, "train", report=ReadReport()))
        cuts.append([[bytes(chunk.content) for chunk in raw.chunks] for raw in blocks])

    assert cuts[0] == cuts[1] == cuts[2]
    assert len(cuts[0]) == 7


def test_a_block_knows_what_the_first_record_of_its_files_looks_like(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 100)
    write_jsonl(Path("a.jsonl"), [{"text": "x" * 20} for _ in range(9)])
    data = recipe_of(["a.jsonl"]).data

    found = list(read_blocks(data, "train", report=ReadReport()))

    assert len(found) == 3
    assert all(raw.first == {"format a.jsonl": ("text", "a.jsonl:1")} for raw in found)


def test_the_first_record_that_can_be_used_decides_whatever_file_is_in_the_block_before(monkeypatch):
    """The bad lines of b.jsonl are a separate chunk; its name is a suffix of the other file's name."""
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 100)
    write_jsonl(Path("a b.jsonl"), [{"text": "x"}])
    Path("b.jsonl").write_text("{\n" * 32 + '{"prompt": "p", "completion": "c"}\n{"text": "t"}\n' * 9)
    data = recipe_of(["a b.jsonl", "b.jsonl"]).data
    joined = recipe_of(["*b.jsonl"]).data

    for found in (list(read_blocks(each, "train", report=ReadReport())) for each in (data, joined)):
        assert found[-1].first == {"format b.jsonl": ("prompt_completion", "b.jsonl:33")}


@pytest.mark.parametrize(
    ("name", "expected"), [("a.jsonl", True), ("a.ndjson.gz", True), ("a.parquet", True), ("a.csv", False)]
)
def test_lines_and_columns_can_be_read_without_parsing_earlier_chunks(name, expected):
    assert is_parted(name) is expected


def test_a_file_of_another_type_is_refused():
    Path("a.xml").write_text("<a/>")

    with pytest.raises(DataError, match="unknown file type"):
        read("a.xml")
