"""Which files of a folder are read, as which split, and what is reported about the others."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars
from datasets.data_files import DataFilesDict, get_data_patterns

from hf_clm.data.read.files import find_files, sort_into_splits
from hf_clm.data.read.sources import ReadOptions, ReadReport, read_records
from hf_clm.errors import DataError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disable_progress_bars()


def write(*names: str) -> None:
    """Writes files with one record, their name; Markdown and other files contain only the name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}) if ".json" in name else name
        compress = {".xz": lzma.compress, ".bz2": bz2.compress, ".gz": gzip.compress}
        Path(name).write_bytes(compress.get(Path(name).suffix, bytes)(line.encode()))


def read(path: str, split: str = "train") -> tuple[list[str], ReadReport]:
    report = ReadReport()
    records = read_records(path, ReadOptions(), report=report, split=split)
    return [record.data["text"] for record in records], report


def refusal(path: str, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        read(path, split)
    return str(error.value)


def test_a_folder_gives_every_data_file_and_names_the_others():
    data = ["d/a.jsonl", "d/b.jsonl.xz", "d/c.jsonl.bz2", "d/e.md", "d/f.rst", "d/g.markdown", "d/sub/h.txt"]
    write(
        *data, "d/part-00001", "d/pic.png", "d/README.md", "d/config.json", "d/.hidden.jsonl", "d/.git/x.md"
    )
    texts, report = read("d")

    assert texts == data == report.files
    assert report.left_out == ["d/README.md", "d/config.json", "d/part-00001", "d/pic.png"]
    assert report.notes == []


def test_links_to_folders_are_followed_once():
    write("d/a.jsonl", "other/b.jsonl")
    os.symlink("../other", "d/link")
    os.symlink("../d", "other/back")
    os.symlink(".", "d/self")

    assert read("d")[1].files == ["d/a.jsonl", "d/link/b.jsonl"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_the_same_file_is_read_once_and_reported(link):
    write("d/a.jsonl")
    link(os.path.abspath("d/a.jsonl"), "d/b.jsonl")
    for path in ("d", "d/*.jsonl"):
        texts, report = read(path)
        assert texts == ["d/a.jsonl"]
        assert report.notes == ["d/b.jsonl is a link to the same file as d/a.jsonl; read once"]


@pytest.mark.parametrize("path", ["d", "d/*"])
def test_a_file_beside_its_compressed_form_is_refused(path):
    write("d/a.jsonl", "d/a.jsonl.gz")
    fix = "fix: remove one of them, or list the files to read"
    assert refusal(path) == f"d/a.jsonl: the same file twice, by name; got d/a.jsonl.gz; {fix}"


@pytest.mark.parametrize("split", ["validation", "valid", "dev", "val"])
def test_one_split_of_a_folder_is_read(split):
    write("d/train.jsonl", f"d/{split}.jsonl", "d/test.jsonl", "d/more.jsonl")

    texts, report = read("d")
    assert texts == ["d/train.jsonl"]
    assert report.notes == ["d: read split train (train.jsonl); not read: validation, test"]
    assert report.left_out == ["d/more.jsonl"]
    assert read("d", split)[0] == read("d", "validation")[0] == [f"d/{split}.jsonl"]
    assert len(read("d/*.jsonl")[0]) == 4  # a glob names them all


def test_a_folder_without_the_split_lists_those_that_it_has():
    write("d/poems.jsonl", "d/poems_test.jsonl")
    assert refusal("d") == (
        "d: no split 'train' in this folder; got test (poems_test.jsonl), no split of poems.jsonl; "
        "fix: set split: test, or use a glob to read all matching files: d/**/*.jsonl"
    )
    write("e/a.jsonl")
    assert refusal("e", "test").startswith("e: no split 'test' in this folder; got no split of a.jsonl")


TREES = [
    ["train.jsonl", "validation.jsonl", "test.jsonl"],
    ["train.jsonl", "dev.csv", "eval.parquet", "other.jsonl"],
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/x-00000-of-00001.csv"],
    ["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
    ["train/a.jsonl", "train/sub/b.jsonl", "test/a.jsonl", "c.jsonl"],
    ["my_train_set/a.jsonl", "val.2/b.jsonl", "trains/c.jsonl"],
    ["poems.train.jsonl", "poems-dev.jsonl", "latest.jsonl", "contest.jsonl", "trainer.jsonl"],
    ["train1.jsonl", "2test.jsonl", "1test.jsonl", "x train y.csv"],
    ["training.jsonl", "testing.jsonl", "evaluation.jsonl"],
    ["a.jsonl", "b/c.csv"],
    ["a.jsonl", "test.jsonl"],
    ["train.txt", "test.txt"],
]  # fmt: skip


@pytest.mark.parametrize("names", TREES)
def test_files_are_assigned_to_splits_as_in_datasets(names):
    write(*(f"d/{name}" for name in names))
    base = os.path.abspath("d")
    theirs = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    expected = {
        str(split): sorted(os.path.relpath(f, base) for f in files) for split, files in theirs.items()
    }

    assert (sort_into_splits(sorted(names)) or {"train": sorted(names)}) == expected


def test_a_text_among_others_is_not_a_split_by_a_word_of_its_name():
    write("d/train to paris.txt", "d/test-driven.md", "d/a.txt")
    assert len(read("d")[0]) == 3


def test_a_saved_dataset_is_read():
    Dataset.from_dict({"text": list("abcdef")}).select([4, 1, 3]).save_to_disk("d", num_shards=2)
    Path("d/cache-0123456789abcdef.arrow").write_bytes(b"left over")
    texts, report = read("d")

    assert texts == ["e", "b", "d"]
    assert report.files == ["d/data-00000-of-00002.arrow", "d/data-00001-of-00002.arrow"]
    assert report.left_out == ["d/cache-0123456789abcdef.arrow"]
    write("two/a.jsonl")
    os.rename("d", "two/d")
    assert read("two")[0] == ["two/a.jsonl", "e", "b", "d"]


def test_one_of_several_saved_splits_is_read():
    parts = {"train": Dataset.from_dict({"text": ["a"]}), "unseen": Dataset.from_dict({"text": ["b"]})}
    DatasetDict(parts).save_to_disk("d")

    assert read("d")[0] == ["a"] and read("d", "unseen")[0] == ["b"]
    assert read("d")[1].notes == ["d: read split train (train/data-00000-of-00001.arrow); not read: unseen"]
    assert refusal("d", "test").startswith("d: no split 'test' in this folder; got train (")


def test_a_saved_dataset_whose_rows_are_selected_by_indices_is_refused():
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk("d")
    state = json.loads(Path("d/state.json").read_text())
    Path("d/state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))

    assert refusal("d").startswith("d/state.json: a saved dataset with an indices mapping; fix: load it")


def test_values_that_datasets_stores_as_json_are_decoded():
    rows = {"text": [[{"a": 0}, {"b": "x"}]]}
    Dataset.from_dict(rows, on_mixed_types="use_json").save_to_disk("d")
    assert read("d")[0] == [[{"a": 0}, {"b": "x"}]]


def test_files_are_found_without_datasets_or_torch():
    write("d/train.jsonl", "d/test.jsonl")
    code = (
        "import sys; from hf_clm.data.read.sources import find_files; find_files('d');"
        "print({'datasets', 'torch', 'fsspec', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and find_files("d") == ["d/train.jsonl"]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo("pipe.jsonl")

    with pytest.raises(DataError, match=r"^pipe.jsonl: a pipe, which can be read only once; fix: write it"):
        find_files("pipe.jsonl")
