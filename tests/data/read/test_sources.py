"""Reading data files: what is accepted, and the message for what is not."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFile
from pyarrow import ipc, parquet

from hf_clm.data.read.readers import READERS, suffix
from hf_clm.data.read.sources import (
    ReadOptions,
    ReadReport,
    check_value,
    find_files,
    open_stream,
    read_records,
)
from hf_clm.errors import DataError, EnvironmentFault, UserError

ROWS = [{"text": "one"}, {"text": "zwei €"}]
LINES = '{"text": "one"}\n{"text": "zwei €"}\n'.encode()


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def read(path: str, **options) -> tuple[list[dict], ReadReport]:
    report = ReadReport()
    return [record.data for record in read_records(path, ReadOptions(**options), report=report)], report


def read_on(path: str, **options) -> tuple[list[dict], ReadReport]:
    """Returns the usable records; the messages of the others are in the report."""
    report, found = ReadReport(), []
    with open_stream(path, ReadOptions(**options), report=report) as stream:
        for where, value in READERS[suffix(path)](stream):
            try:
                check_value(value, where)
                found.append(value)
                report.records += 1
            except DataError as error:
                report.bad_lines.append(str(error))
    return found, report


def places(path: str) -> list[str]:
    return [record.where for record in read_records(path, ReadOptions(), report=ReadReport())]


def refusal(path: str, **options) -> str:
    with pytest.raises(DataError) as error:
        read(path, **options)
    return str(error.value)


def zst(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def parquet_bytes(table: pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def arrow_bytes(table: pyarrow.Table, new_writer) -> bytes:
    buffer = io.BytesIO()
    with new_writer(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


TABLE = pyarrow.Table.from_pylist(ROWS)
CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": '[{"text": "one"},\n {"text": "zwei €"}]'.encode(),
    "lines.json": LINES,
    "a.csv": "text\none\nzwei €\n".encode(),
    "a.tsv": "text\none\nzwei €\n".encode(),
    "a.parquet": parquet_bytes(TABLE),
    "file.arrow": arrow_bytes(TABLE, ipc.new_file),
    "stream.arrow": arrow_bytes(TABLE, ipc.new_stream),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(
    "compress",
    [("", bytes), (".gz", gzip.compress), (".zst", zst), (".xz", lzma.compress), (".bz2", bz2.compress)],
    ids=["", "gz", "zst", "xz", "bz2"],
)
def test_every_file_type_gives_the_same_records_plain_and_compressed(name, compress):
    suffix, function = compress
    records, report = read(write(name + suffix, function(CONTENTS[name])))

    assert records == [{"text": "one"}, {"text": "zwei €"}]
    assert (report.files, report.records, report.blank_lines) == ([name + suffix], 2, 0)


def test_places_are_lines_in_line_files_and_records_in_others():
    assert places(write("a.jsonl", '{"a": 1}\n\n{"a": 2}')) == ["a.jsonl:1", "a.jsonl:3"]
    assert places(write("a.json", '[{"a": 1}, {"a": 2}]')) == ["a.json: record 1", "a.json: record 2"]
    assert places(write("a.csv", "a,b\n1,2\n3,4\n")) == ["a.csv: record 1", "a.csv: record 2"]
    assert places(write("a.parquet", CONTENTS["a.parquet"])) == ["a.parquet: record 1", "a.parquet: record 2"]


def test_a_text_file_is_one_record_with_normalized_newlines():
    assert read(write("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n"))[0] == [{"text": "one\n\ntwo\n"}]
    assert places("a.txt") == ["a.txt:1"]


def test_a_json_file_may_contain_a_single_object():
    assert read(write("a.json", '{\n  "text": "one"\n}\n'))[0] == [{"text": "one"}]


def test_a_table_may_have_quotes_line_ends_and_very_long_cells():
    text = "x" * 200_000
    records, _ = read(write("a.csv", f'prompt,completion\r\n"a ""b"", c","d\ne"\r\n{text},f\r\n'))
    assert records == [{"prompt": 'a "b", c', "completion": "d\ne"}, {"prompt": text, "completion": "f"}]
    assert read(write("a.tsv", "prompt\tcompletion\na, b\tc\n"))[0] == [{"prompt": "a, b", "completion": "c"}]


def test_arrow_keeps_nested_values():
    rows = [{"messages": [{"role": "user", "content": "hi"}], "input_ids": [1, 2]}]
    content = arrow_bytes(pyarrow.Table.from_pylist(rows), ipc.new_stream)
    expected = [{"messages": [{"role": "user", "content": "hi"}], "input_ids": [1, 2]}]
    assert read(write("a.arrow", content))[0] == expected


def test_a_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_accepted_and_blank_lines_counted():
    records, report = read(write("a.jsonl", b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n  \n{"a": "2"}'))
    assert records == [{"a": "é"}, {"a": "2"}]
    assert (report.records, report.blank_lines) == (2, 2)


def test_a_line_separator_inside_a_text_does_not_end_the_line():
    assert read(write("a.jsonl", '{"a": "x\u2028y\x85z"}\n'))[0] == [{"a": "x\u2028y\x85z"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "a.jsonl:2: expected an object; got int; fix: write one object per line; put"),
        ('"x"', "a.jsonl:2: expected an object; got str"),
        ("null", "a.jsonl:2: expected an object; got null"),
        ("true", "a.jsonl:2: expected an object; got bool"),
        ("[1,2]", "a.jsonl:2: expected an object; got list"),
        ('{"a": NaN}', "a.jsonl:2: NaN; fix: use null"),
        ('{"a": [{"b": -Infinity}]}', "a.jsonl:2: -Infinity; fix: use null"),
        ('{"a": 1, "b": 2, "a": 3}', "a.jsonl:2: a key occurs twice in an object; got keys a, b, a"),
        ('{"m": [{"a": 1, "a": 1}]}', "a.jsonl:2: a key occurs twice in an object; got keys a, a"),
        ('{"a": "\\ud800"}', "a.jsonl:2: a text contains half a surrogate pair, '\\ud800'; fix: remove it"),
        ('{"\\udc00": 1}', "a.jsonl:2: a text contains half a surrogate pair, '\\udc00'; fix: remove it"),
        ('{"a": 1} {"a": 2}', "a.jsonl:2: not valid JSON: Extra data (column 10); got '{\"a\": 2}'; fix"),
        ("{'a': 1}", "a.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes ("),
        ('{"a": 1', "a.jsonl:2: not valid JSON: Expecting ',' delimiter (column 8); fix: write"),
        ("[" * 100_000, "a.jsonl:2: JSON nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a.jsonl:2: not valid JSON: Exceeds the limit (4300"),
        ('{"a": "' + "x" * 200 + '"}', "a.jsonl:2: line too long; got over 150 bytes; fix: raise"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_with_its_number_or_skipped_and_listed(line, message):
    limit = 150 if "xxx" in line else 200_000
    path = write("a.jsonl", '{"a": 1}\n' + line + '\n{"a": 3}\n')

    assert refusal(path, max_line_bytes=limit).startswith(message)

    records, report = read_on(path, max_line_bytes=limit)
    assert records == [{"a": 1}, {"a": 3}]
    assert len(report.bad_lines) == 1 and report.bad_lines[0].startswith(message)
    assert report.records == 2


def test_a_line_of_exactly_the_longest_length_is_read_with_and_without_its_newline():
    assert read(write("a.jsonl", '{"a": 1}\n{"a": 2}'), max_line_bytes=8)[0] == [{"a": 1}, {"a": 2}]
    assert "a.jsonl:1: line too long" in refusal("a.jsonl", max_line_bytes=7)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            "café".encode("latin-1"),
            "byte 10 of the line; got 0xe9; fix: it looks like latin-1: iconv -f latin-1",
        ),
        ("“x”".encode("cp1252"), "byte 7 of the line; got 0x93; fix: it looks like cp1252: iconv -f cp1252"),
        (
            "古池蛙".encode("gb18030"),
            "byte 7 of the line; got 0xb9; fix: it looks like gb18030: iconv -f gb18030",
        ),
    ],
)
def test_invalid_utf_8_names_line_byte_and_the_likely_encoding(raw, message):
    path = write("a.jsonl", b'{"a": "ok"}\n{"a":"' + raw + b'"}\n')
    assert refusal(path) == f"a.jsonl:2: invalid UTF-8 at {message} -t UTF-8"
    assert read_on(path)[1].bad_lines == [refusal(path)]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv"])
def test_invalid_utf_8_names_the_line_in_the_other_text_files_too(name):
    assert refusal(write(name, b"one\n\ntwo \xe9 x\n")).startswith(
        f"{name}:3: invalid UTF-8 at byte 5 of the line; got 0xe9; fix: it looks like latin-1"
    )


def test_utf_16_without_a_byte_order_mark_is_recognised():
    message = refusal(write("a.jsonl", '{"a": "one"}\n'.encode("utf-16-le")))
    assert message.startswith("a.jsonl:1: ") and message.endswith("iconv -f utf-16 -t UTF-8")


def test_a_truncated_last_line_is_refused_with_its_number_or_skipped():
    path = write("a.jsonl", '{"a": "one"}\n{"a": "tw')
    assert refusal(path) == (
        "a.jsonl:2: not valid JSON: Unterminated string starting at (column 7); got '\"tw'; "
        "fix: the file ends in this line: download or write it again, or set on_bad_record: drop"
    )
    assert read_on(path)[0] == [{"a": "one"}]


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]\n', '[\n{"a": 1}\n]\n', '{\n  "a": 1\n}\n'])
def test_a_json_document_named_as_json_lines_is_detected(content):
    message = refusal(write("a.jsonl", content))
    assert message.startswith("a.jsonl:1: ")
    assert message.endswith("put a JSON array or a pretty-printed object into a .json file")


def test_an_error_inside_a_json_file_names_its_line_or_record():
    assert refusal(write("a.json", '\n[{"a": 1},\n {"a" 2}]')).startswith(
        "a.json:3: not valid JSON: Expecting ':' delimiter (column 7); got '2}]'"
    )
    assert refusal(write("a.json", '[{"a": 1}, 5]')).startswith(
        "a.json: record 2: expected an object; got int"
    )
    assert refusal(write("a.json", '[{"a": 1}, {"b": 1, "b": 2}]')).startswith(
        "a.json: record 2: a key occurs twice in an object; got keys b, b"
    )
    assert read_on("a.json")[0] == [{"a": 1}]
    assert refusal(write("a.json", '{"a": 1}\n{"a": }\n')).startswith("a.json:2: not valid JSON")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n  \r\n\n"),
        ("a.jsonl", "\ufeff"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "prompt,completion\n"),
        ("a.txt", " \n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", zst(b"")),
        ("a.parquet", parquet_bytes(TABLE.slice(0, 0))),
    ],
)
def test_a_file_without_a_record_is_an_error(name, content):
    assert refusal(write(name, content)) == f"{name}: empty file (0 records)"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n<!DOCTYPE html>\n<html>", "an HTML page, not data; fix: download the raw file"),
        ("<html lang=en>", "an HTML page, not data; fix: download the raw file"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "a Git-LFS pointer, not the data; fix: run git lfs pull",
        ),
    ],
)
def test_an_html_page_or_a_git_lfs_pointer_is_detected(name, content, message):
    assert refusal(write(name, content)) == f"{name}: {message}"


def test_an_escaped_surrogate_pair_is_one_character():
    assert read(write("a.jsonl", '{"a": "\\ud83d\\ude00"}\n'))[0] == [{"a": "😀"}]


def test_a_nul_character_is_counted():
    path = write("a.jsonl", '{"a": "x\\u0000y"}\n{"a": ["\\u0000"]}\n{"a": "\\\\u0000"}\n')
    records, report = read(path)
    assert records == [{"a": "x\0y"}, {"a": ["\0"]}, {"a": "\\u0000"}]
    assert report.nul_records == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "a.csv:3: expected 2 cells, as in the header; got 1"),
        ("a,b\n1,2\n\n3,4,5\n", "a.csv:4: expected 2 cells, as in the header; got 3"),
        ("a,b,a\n1,2,3\n", "a.csv:1: 2 column(s) named 'a'; fix: give each column a unique name"),
        ("a, \n1,2\n", "a.csv:1: 1 column(s) named ' '; fix: give each column a unique name"),
        ('a,b\n1,"2\n3,4\n', "a.csv:3: not a valid table: unexpected end of data; fix: {QUOTES}"),
        ('a,b\n1,"2"x\n', "a.csv:2: not a valid table: ',' expected after '\"'; fix: {QUOTES}"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(content, message):
    quotes = "check the quotes, or set quoting: none if they are part of the text"
    assert refusal(write("a.csv", content)) == message.replace("{QUOTES}", quotes)


def test_rows_with_too_many_or_few_cells_can_be_skipped():
    records, report = read_on(write("a.csv", "a,b\n1,2\n\n3\n4,5\n"))
    assert records == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert report.bad_lines == ["a.csv:4: expected 2 cells, as in the header; got 1"]
    assert report.blank_lines == 1
    assert places(write("b.csv", "a\n\n1\n2\n")) == ["b.csv: record 1", "b.csv: record 2"]


def test_parquet_columns_with_equal_names_are_refused():
    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    assert refusal(write("a.parquet", parquet_bytes(table))).startswith("a.parquet: 2 column(s) named 'text'")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("damage", ["cut off", "of another type"])
def test_a_damaged_file_is_named(name, damage):
    whole = {
        "a.jsonl.gz": gzip.compress(LINES * 100),
        "a.jsonl.zst": zst(LINES * 100),
        "a.parquet": CONTENTS["a.parquet"],
        "file.arrow": CONTENTS["file.arrow"],
        "stream.arrow": CONTENTS["stream.arrow"],
    }[name]
    message = refusal(write(name, whole[: len(whole) // 2] if damage == "cut off" else b"\0" + LINES))
    assert message.startswith(f"{name}: damaged, truncated, or not of the type that its name suggests; got ")
    assert "\n" not in message


def test_a_damaged_arrow_file_cannot_crash_the_interpreter():
    content = CONTENTS["file.arrow"]
    position = content.index(b"onezwei") - 56  # offsets of the texts come before their bytes
    for start in range(position, position + 56):
        damaged = content[:start] + b"\x7f" + content[start + 1 :]
        try:
            read(write("file.arrow", damaged))
        except UserError as error:
            assert str(error).startswith("file.arrow: ")


def test_a_zst_file_of_two_frames_is_read_completely():
    assert len(read(write("a.jsonl.zst", zst(LINES) + zst(LINES)))[0]) == 4


def test_a_glob_and_a_folder_give_their_data_files_in_order_and_the_report_lists_them():
    for name in ("d/b.jsonl", "d/a.jsonl", "d/sub/c.jsonl.gz"):
        line = json.dumps({"file": name}).encode()
        write(name, gzip.compress(line) if name.endswith(".gz") else line)
    write("d/README.md", "no data")
    write("d/.cache/x.jsonl", "no data")

    assert [record["file"] for record in read("d/*.jsonl")[0]] == ["d/a.jsonl", "d/b.jsonl"]
    assert [record["file"] for record in read("d/**/*.gz")[0]] == ["d/sub/c.jsonl.gz"]
    records, report = read("d")
    assert [record["file"] for record in records] == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl.gz"]
    assert report.files == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl.gz"]


def test_a_file_whose_name_looks_like_a_glob_is_read_as_it_is():
    assert read(write("a[1].jsonl", LINES))[0] == [{"text": "one"}, {"text": "zwei €"}]


def test_a_folder_without_data_lists_what_was_found():
    write("d/README.md", "x")
    write("d/sub/a.docx", "x")
    assert refusal("d") == (
        "d: no data file in this folder; got README.md, sub/a.docx, 2 files in all; "
        "fix: supported types are .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt, "
        ".md, .markdown, .rst, each also with .gz, .zst, .xz or .bz2"
    )


@pytest.mark.parametrize("name", ["a.docx", "a", "a.gz", "a.JSONL.lz4"])
def test_an_unknown_file_type_lists_the_known_ones(name):
    message = refusal(write(name, "x"))
    assert (
        message.startswith(f"{name}: unknown file type; got ")
        and "supported types are .jsonl, .ndjson," in message
    )


def test_a_suffix_in_capital_letters_is_supported():
    assert read(write("A.JSONL.GZ", gzip.compress(LINES)))[1].records == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("d/poem.jsonl", "d/poem.jsonl: no such file; did you mean 'poems.jsonl'?"),
        ("./poems", "./poems: no such file"),
        ("/nowhere/x/y", "/nowhere/x/y: no such file"),
        ("d/*.csv", "d/*.csv: no file matches"),
        ("not a name", "not a name: no such file"),
    ],
)
def test_a_missing_local_path_is_never_looked_up_on_the_hub(path, message):
    write("d/poems.jsonl", LINES)
    assert refusal(path) == f"{message}; fix: check the name and the working directory"


def test_a_local_file_takes_precedence_over_a_hub_name():
    write("org/name/a.jsonl", LINES)
    assert find_files("org/name") == ["org/name/a.jsonl"]
    assert find_files("org/other") is None
    assert find_files("squad") is None


@contextmanager
def not_root() -> Iterator[None]:
    """Runs as an unprivileged user, because root can read every file."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_an_unreadable_file_is_an_environment_error():
    Path(write("a.jsonl", LINES)).chmod(0)
    Path.cwd().chmod(0o755)
    with not_root(), pytest.raises(EnvironmentFault, match=r"a.jsonl: cannot be read; got Permission denied"):
        read("a.jsonl")


def test_a_disk_error_is_an_environment_error(monkeypatch):
    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip, "GzipFile", refuse)
    with pytest.raises(EnvironmentFault, match=r"a.jsonl.gz: cannot be read; got Input/output error"):
        read(write("a.jsonl.gz", gzip.compress(LINES)))


class HubWithoutNetwork:
    def dataset_info(self, *_, **__):
        raise ConnectionError("Name or service not known\nmore")


class Hub:
    def dataset_info(self, *_, **__):
        return None


def test_an_unreachable_hub_is_an_environment_error_that_names_the_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", HubWithoutNetwork)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "the-cache")
    with pytest.raises(EnvironmentFault) as error:
        read("org/poems")
    assert str(error.value) == (
        "org/poems: no such file; on the Hub: Name or service not known; "
        "fix: use a local file; HF_HUB_OFFLINE=1 uses the cache in the-cache"
    )


def test_offline_a_hub_name_that_is_not_cached_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        EnvironmentFault, match=r"^org/poems: no such file; on the Hub: Couldn't reach 'org/poems'"
    ):
        read("org/poems")


def test_a_missing_hub_dataset_is_a_data_error(monkeypatch):
    def load(*_, **__):
        raise ValueError("Unknown split 'dev'")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    message = "org/poems: no such file; on the Hub: Unknown split 'dev'; fix: check name, split"
    assert refusal("org/poems").startswith(message)


def test_a_hub_dataset_is_read_with_its_split_configuration_and_revision(monkeypatch):
    asked = []

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    report = ReadReport()
    rows = read_records("org/poems", ReadOptions(), report=report, split="test", name="zh", revision="abc")

    assert [(row.where, row.data) for row in rows] == [
        ("org/poems: record 1", {"text": "one"}),
        ("org/poems: record 2", {"text": "zwei €"}),
    ]
    assert asked == [(("org/poems", "zh"), {"split": "test", "revision": "abc", "streaming": False})]
    assert (report.files, report.records) == (["org/poems"], 2)


def test_quotes_in_a_tsv_are_text():
    content = '1\t"He left early.\tHe left.\n0\tShe said no"\tIt rained.\n1\tAll well\tAll good\n'
    records, report = read(write("a.tsv", "label\ta\tb\n" + content))

    assert [record["a"] for record in records] == ['"He left early.', 'She said no"', "All well"]
    assert report.notes == []


def test_quoting_overrides_the_default_and_is_suggested():
    records, report = read(write("a.tsv", 'a\tb\n1\t"He said ""no"""\n'))
    assert records == [{"a": "1", "b": '"He said ""no"""'}]
    assert report.notes == [
        "a.tsv: 1 records with a quoted cell, whose quotes were read as part of the text; "
        "to remove the quotes, set quoting: csv on the source"
    ]
    assert read("a.tsv", quoting="csv")[0] == [{"a": "1", "b": 'He said "no"'}]
    assert read(write("a.csv", 'a,b\n1,"x\n'), quoting="none")[0] == [{"a": "1", "b": '"x'}]
    assert refusal(write("a.tsv", 'a\tb\n1\t"two\nlines"\n')) == (
        "a.tsv:3: expected 2 cells, as in the header; got 1; fix: set quoting: csv if cells are quoted"
    )
    assert read("a.tsv", quoting="csv")[0] == [{"a": "1", "b": "two\nlines"}]


@pytest.mark.parametrize("mark", ["sep=;\n", "\ufeffsep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_the_delimiter_line_of_excel_is_supported(mark):
    assert read(write("a.csv", mark + 'a;b\n1,5;"x;y"\n'))[0] == [{"a": "1,5", "b": "x;y"}]
    assert refusal(write("a.csv", mark + "a;b\n1\n")).startswith("a.csv:3: expected 2 cells")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a;b\n1;2\n", "a single column, whose name contains ';'; got 'a;b'; fix: separate the"),
        ("a.csv", "a\tb\n1\t2\n", "a single column, whose name contains '\\t'; got 'a\\tb'; fix: rename"),
        ("a.tsv", "a,b\n1,2\n", "a single column, whose name contains ','; got 'a,b'; fix: separate the"),
        ("a.csv", ",a\n0,x\n", "the first column has no name; fix: omit pandas' index (to_csv("),
        ("a.csv", "a,b\r1,2\r", "not a valid table: new-line character seen in unquoted field"),
    ],
)  # fmt: skip
def test_a_table_with_the_wrong_delimiter_is_reported(name, content, message):
    assert refusal(write(name, content)).startswith(f"{name}:1: {message}")


def test_a_pandas_index_column_is_noted():
    records, report = read(write("a.csv", "Unnamed: 0,text\n0,x\n"))
    assert records == [{"Unnamed: 0": "0", "text": "x"}]
    assert report.notes == ["a.csv: column 'Unnamed: 0' is a pandas index; to_csv(..., index=False) omits it"]


def test_carriage_return_line_ends_are_reported_or_read():
    fix = "its lines end in a carriage return only: tr '\\r' '\\n' < FILE > NEW_FILE"

    assert refusal(write("a.jsonl", '{"a": 1}\r{"a": 2}\r')).endswith(fix)
    assert refusal("a.jsonl", max_line_bytes=12).endswith(fix)
    assert refusal(write("a.csv", "a,b\r1,2\r")).endswith(fix)
    assert read(write("a.txt", "one\rtwo\r"))[0] == [{"text": "one\ntwo\n"}]


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x" * 100)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


OTHER_KINDS = {
    "gzip": (gzip.compress(LINES), "rename it to a.jsonl.gz"),
    "zstd": (zst(LINES), "rename it to a.jsonl.zst"),
    "xz": (lzma.compress(LINES), "rename it to a.jsonl.xz"),
    "bzip2": (bz2.compress(LINES), "rename it to a.jsonl.bz2"),
    "a Parquet file": (CONTENTS["a.parquet"], "rename it to a.parquet"),
    "an Arrow file": (CONTENTS["file.arrow"], "rename it to a.arrow"),
    "an Excel or other Office file": (
        zipped("[Content_Types].xml"),
        "save it as .csv, .jsonl or .parquet",
    ),
    "a zip archive": (zipped("a.jsonl"), "unpack it"),
    "a tar archive": (tarred(), "unpack it"),
    "a Python pickle": (pickle.dumps({"a": 1}), "save it as .csv, .jsonl or .parquet"),
    "a PDF": (b"%PDF-1.7\n", "extract its text into a .txt file"),
    "an SQLite database": (b"SQLite format 3\0", "export the table as .csv"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_with_a_wrong_name_is_detected_by_its_first_bytes(kind):
    content, fix = OTHER_KINDS[kind]

    assert refusal(write("a.jsonl", content)) == f"a.jsonl: {kind}, not .jsonl; fix: {fix}"
    assert refusal(write("a.csv", content)).startswith(f"a.csv: {kind}, not .csv; fix: ")
    assert refusal(write("a.txt.gz", gzip.compress(content))).startswith(f"a.txt.gz: {kind}, not .txt; fix: ")
    assert refusal(write("part-00001", content)).startswith(
        f"part-00001: unknown file type ''; it is {kind}; fix: "
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet", "a"])
def test_text_in_another_encoding_is_detected_by_its_byte_order_mark(name, encoding):
    message = f"{name}: {encoding.upper()} text, not UTF-8; fix: iconv -f {encoding.upper()} -t UTF-8"
    assert refusal(write(name, "text\n".encode(encoding))) == message


def test_an_uncompressed_file_with_a_compression_suffix_is_detected():
    message = "a.jsonl.gz: not compressed despite its suffix .gz; fix: remove .gz"
    assert refusal(write("a.jsonl.gz", LINES)) == message


@pytest.mark.parametrize("url", ["memory://d", "memory://d/", "memory://d/*"])
def test_remote_files_are_read_by_url(url):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name, content in CONTENTS.items():
        fs.pipe(f"/d/{name}", content)
    fs.pipe("/d/b.jsonl.gz", gzip.compress(LINES))
    records, report = read(url)

    assert len(records) == 2 * (len(CONTENTS) + 1)
    assert report.files[0].endswith("/d/a.csv") and report.files[0].startswith("memory://")
    assert read("memory://d/b.jsonl.gz")[0] == [{"text": "one"}, {"text": "zwei €"}]
    assert places("memory://d/b.jsonl.gz")[1] == "memory://d/b.jsonl.gz:2"
    with pytest.raises(DataError, match=r"^memory://d/no.jsonl: no such file; fix: check the URL$"):
        read("memory://d/no.jsonl")
    with pytest.raises(DataError, match=r"^memory://d/\*.rst: no file matches; fix: check the URL$"):
        read("memory://d/*.rst")
    with pytest.raises(DataError, match=r"not a supported URL; got Protocol not known: nowhere"):
        read("nowhere://a.jsonl")


def test_a_url_without_its_package_suggests_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(EnvironmentFault, match=r"^abfs://b/a.jsonl: .*; fix: pip install adlfs$"):
        read("abfs://b/a.jsonl")


def test_an_unreachable_service_is_an_environment_error(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Unable to locate credentials\nmore")

    fsspec.filesystem("memory").pipe("/d/a.jsonl", LINES)
    monkeypatch.setattr(MemoryFile, "read", refuse)
    message = "^memory://d/a.jsonl: cannot be read; got Unable to locate credentials; fix: check the network"
    with pytest.raises(EnvironmentFault, match=message):
        read("memory://d/a.jsonl")


def test_files_in_a_bucket_are_read_through_s3fs(monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "none")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = s3fs.S3FileSystem()
        fs.mkdir("poems")
        for name, content in CONTENTS.items():
            fs.pipe(f"poems/d/{name}", content)
        assert len(read("s3://poems/d")[0]) == 2 * len(CONTENTS)
        assert read("s3://poems/d/*.jsonl")[1].files == ["s3://poems/d/a.jsonl"]
        with pytest.raises(DataError, match=r"^s3://poems/no.jsonl: no such file"):
            read("s3://poems/no.jsonl")
        with pytest.raises(UserError, match=r"^s3://nowhere/no.jsonl: "):
            read("s3://nowhere/no.jsonl")
    finally:
        server.stop()
