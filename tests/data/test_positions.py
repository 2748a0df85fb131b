"""The shards of a source: together they read every record once, and go on where they stopped."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import ipc, parquet

from hf_clm.config import Source
from hf_clm.data.positions import BEGIN, Found, Share, read_share, take_some
from hf_clm.data.read.readers import ReadOptions, ReadReport
from hf_clm.data.read.sources import read_hub

# Lines of unequal length, of several bytes a letter, with blank ones between.
TEXTS = ["a", "bb" * 40, "ç", "d" * 7, "€uro" * 9, "f", "g" * 100, "h", "i", "j" * 3, "k"]


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n\n" for text in texts)


def table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"text": texts})


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text(lines(texts), encoding="utf-8")


def write_gz(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress(lines(texts).encode()))


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts]))


def write_csv(path: Path, texts: list[str]) -> None:
    path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(table(texts), path, row_group_size=3)


def write_arrow(path: Path, texts: list[str]) -> None:
    with ipc.new_stream(path, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=4)


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_text(texts[0], encoding="utf-8")


WRITERS = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gz,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
}


def read(path: Path | str, number: int, count: int, start=BEGIN) -> list[Found]:
    options = {"options": ReadOptions(), "report": ReadReport()}
    return list(read_share(Source(path=str(path)), Share(number, count), **options, start=start))


def texts(found: list[Found]) -> list[str]:
    return [item.record.data["text"] for item in found]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_shards_read_every_record_once(tmp_path, kind, count):
    """Over uneven files, one of them of a single record, and over more shards than records."""
    for name, part in (("1", TEXTS[:7]), ("2", TEXTS[7:8]), ("3", TEXTS[8:])):
        WRITERS[kind](tmp_path / f"{name}{kind}", part)

    shards = [read(tmp_path, number, count) for number in range(count)]

    assert sorted(text for found in shards for text in texts(found)) == sorted(TEXTS)
    assert len({item.record.where for found in shards for item in found}) == 11
    assert texts(read(tmp_path, 0, 1)) == TEXTS


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_shard_goes_on_behind_every_record(tmp_path, kind, count):
    for name, part in (("1", TEXTS[:7]), ("2", TEXTS[7:8]), ("3", TEXTS[8:])):
        WRITERS[kind](tmp_path / f"{name}{kind}", part)

    for number in range(count):
        whole = read(tmp_path, number, count)
        for index, item in enumerate(whole):
            assert read(tmp_path, number, count, start=item.mark) == whole[index + 1 :]


def test_two_shards_of_lines_meet_at_the_first_line_that_begins_in_the_second_half(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "123456"}\n{"text": "12"}\n{"text": "1"}\n')  # 19, 15 and 14 bytes: half is 24

    assert texts(read(path, 0, 2)) == ["123456", "12"]
    assert [(item.record.where, item.mark.at) for item in read(path, 1, 2)] == [(f"{path}:3", 48)]


def test_two_shards_of_parquet_have_half_of_the_rows_each(tmp_path):
    write_parquet(tmp_path / "a.parquet", list("abcde"))

    assert texts(read(tmp_path, 0, 2)) == ["a", "b"]
    assert texts(read(tmp_path, 1, 2)) == ["c", "d", "e"]


def test_records_of_an_array_and_whole_texts_go_in_turn(tmp_path):
    write_json(tmp_path / "a.json", list("abcde"))
    for name in "vwxyz":
        write_txt(tmp_path / f"{name}.txt", [name])

    assert texts(read(tmp_path / "a.json", 1, 2)) == ["b", "d"]
    assert texts(read(tmp_path / "*.txt", 0, 2)) == ["v", "x", "z"]


def test_of_many_compressed_files_a_shard_opens_its_own_alone(tmp_path):
    for number in range(16):
        write_gz(tmp_path / f"{number:02}.jsonl.gz", [f"{number}a", f"{number}b"])
    (tmp_path / "01.jsonl.gz").write_text("not gzip, and of the other shard")

    assert texts(read(tmp_path, 0, 2))[:4] == ["0a", "0b", "2a", "2b"]


class Hub:
    """Answers the one question that is asked before a dataset is loaded."""

    def dataset_info(self, *_, **__) -> None:
        return None


def test_a_dataset_of_the_datasets_library_is_streamed_from_a_row_on(tmp_path, monkeypatch):
    """A folder in place of the Hub: the library reads both alike."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Path("org/poems").mkdir(parents=True)
    write_jsonl(Path("org/poems/train.jsonl"), list("abcde"))

    found = list(read_hub("org/poems", split="train", name=None, revision=None, first=3))

    assert found == [("org/poems: record 4", {"text": "d"}), ("org/poems: record 5", {"text": "e"})]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_of_a_dataset_on_the_hub_read_every_record_once_and_go_on(monkeypatch, count):
    rows = datasets.Dataset.from_list([{"text": text} for text in "abcde"]).to_iterable_dataset()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, streaming, **__: rows if streaming else None)

    shards = [read("org/poems", number, count) for number in range(count)]

    assert sorted(text for found in shards for text in texts(found)) == list("abcde")
    for number, found in enumerate(shards):
        for index, item in enumerate(found):
            assert read("org/poems", number, count, start=item.mark) == found[index + 1 :]


def test_a_block_ends_after_so_many_documents_or_with_the_one_that_is_too_long(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c", "d" * 100, "e"])
    found = iter(read(tmp_path, 0, 1))

    some = [take_some(found, documents=3, characters=100) for _ in range(3)]

    assert [(texts(part), is_last) for part, is_last in some] == [
        (["a", "b", "c"], False),
        (["d" * 100], False),
        (["e"], True),
    ]
