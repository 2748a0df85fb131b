"""A set is the same made in memory, block by block, or by several machines; nothing is counted twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pyarrow
import pytest
from helpers import byte_tokenizer, write_jsonl
from pyarrow import ipc, parquet

from hf_clm.cli import main
from hf_clm.config import Recipe, recipe_to_yaml
from hf_clm.data import shards
from hf_clm.data.cache import build_splits, find_place, load_named
from hf_clm.data.division import Shard
from hf_clm.data.proof.ledger import write_ledgers
from hf_clm.data.store import write_store
from hf_clm.errors import DataError
from hf_clm.tokenizer import use_chat_template
from hf_clm.training import storing
from hf_clm.training.proof import prove_data
from hf_clm.training.storing import merge_shards, shards_folder, store_shard, store_whole

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo, <|im_end|> you"}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"{'word ' * (n % 23)}{n}\n好"} for n in range(60)],
    "prompt_completion": [{"prompt": f"p{n}", "completion": "<|pad|>x" * (n % 9 + 1)} for n in range(60)],
    "messages": [{"messages": [{**CHAT[0], "content": f"Hi {n}"}, CHAT[1]]} for n in range(60)],
    "segments": [
        {"segments": [{"text": "a" * (n % 31 + 1), "train": False}, {"text": f"b{n}", "train": True}]}
        for n in range(60)
    ],
    "tokenized": [{"input_ids": [1, 2, 3, n], "labels": [-100, 2, 3, n]} for n in range(60)],
}
COMMAND = "hf-clm prepare r.yaml"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "BLOCK_ROWS", 7)  # several blocks in each set


def tokenizer() -> Any:
    made = byte_tokenizer()
    use_chat_template(made, "chatml")
    return made


def build_recipe(files: Any, *, stage: str = "sft", **data: Any) -> Recipe:
    sections = {"stage": stage, "model": {"name_or_path": "m"}, "train": {"output_dir": "run"}}
    given = {"train": files, "max_length": 64, "max_dropped": 1.0, "max_leakage": 1.0, "cache_dir": "cache"}
    return Recipe.model_validate({**sections, "data": {**given, **data}})


def store_from_memory(recipe: Recipe) -> None:
    place, made = find_place(recipe, tokenizer(), seed=0), tokenizer()
    assert place is not None
    splits = build_splits(recipe, made, loaded=load_named(recipe, 0))
    proof = prove_data(recipe, splits, tokenizer=made)
    facts = {"facts": proof.facts, "lines": proof.lines}
    ledgers = proof.ledgers
    write_store(
        place.folder,
        splits,
        files=place.files,
        proof=facts,
        write_ledger=lambda path: write_ledgers(ledgers, path),
    )


def store_in_blocks(recipe: Recipe) -> None:
    place = find_place(recipe, tokenizer(), seed=0)
    assert place is not None
    store_whole(place, recipe, tokenizer=tokenizer(), seed=0)


def store_in_shards(recipe: Recipe, count: int) -> None:
    place = find_place(recipe, tokenizer(), seed=0)
    assert place is not None
    for number in range(count, 0, -1):
        store_shard(place, recipe, tokenizer=tokenizer(), shard=Shard(number, count))
    merge_shards(place, recipe, tokenizer=tokenizer(), seed=0, command=COMMAND)


def take_store() -> dict[str, Any]:
    """The content of the one set that is kept, without the times it took; removes it."""
    (folder,) = Path("cache").iterdir()
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    index = json.loads(found.pop("prepared.json"))
    del index["digest"]  # of the times, too
    for facts in index["proof"]["facts"].values():
        facts.get("certificate", {}).pop("seconds", None)
    index["proof"]["lines"] = [line.split(" (")[0] for line in index["proof"]["lines"]]
    shutil.rmtree(folder)
    return {**found, "index": index}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


@pytest.mark.parametrize("format", RECORDS)
@pytest.mark.parametrize(
    ("stage", "packing"), [("sft", "best_fit"), ("sft", "none"), ("pretrain", "stream"), ("pretrain", "none")]
)
def test_in_memory_in_blocks_and_in_shards_the_very_same_files_are_written(stage, format, packing):
    write_jsonl(Path("a.jsonl"), RECORDS[format])
    write_jsonl(Path("b.jsonl"), RECORDS[format][:5])
    recipe = build_recipe(["a.jsonl", "b.jsonl"], stage=stage, packing=packing)
    store_from_memory(recipe)
    expected = take_store()

    store_in_blocks(recipe)
    in_blocks = take_store()
    store_in_shards(recipe, 3)

    assert differing(in_blocks, expected) == []
    assert differing(take_store(), expected) == []
    assert len(expected) == 12 + 4 * (packing != "none")


@pytest.mark.parametrize(
    "data",
    [
        {"eval_fraction": 0.2},
        {"eval_fraction": 0.2, "duplicates": "drop"},
        {"duplicates": "drop"},
        {"eval": ["b.jsonl"], "duplicates": "drop"},
        {"max_length": 24, "overflow": "drop"},
        {"max_length": 24, "overflow": "truncate"},
        {"on_bad_record": "drop", "eval": ["b.jsonl"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_the_whole_set_decides_is_decided_alike(data, count):
    """Equal rows across shards, what is held out, what is dropped, lines that cannot be read."""
    records = RECORDS["prompt_completion"]
    lines = [json.dumps(record) for record in [*records, *records[3:9], *records[50:]]]
    bad = ["{", "", json.dumps({"prompt": 1, "completion": "x"})] if "on_bad_record" in data else [""]
    Path("a.jsonl").write_text("\n".join([*lines[:20], *bad, *lines[20:]]) + "\n")
    write_jsonl(Path("b.jsonl"), [*records[:3], {"prompt": "P1", "completion": "<|pad|>X  <|pad|>x"}])
    recipe = build_recipe(["a.jsonl"], **data)
    store_from_memory(recipe)
    expected = take_store()

    store_in_shards(recipe, count) if count > 1 else store_in_blocks(recipe)

    assert differing(take_store(), expected) == []
    assert expected["index"]["splits"]["train"]["report"]["records"] == (77 if len(bad) > 1 else 76)


def write_as(kind: str, rows: list[dict[str, Any]]) -> str:
    table, path = pyarrow.Table.from_pylist(rows), f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=17)
    elif kind == "arrow":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    elif kind == "stream.arrow":
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        frame = "\n".join([",".join(rows[0]), *(f'"{r["prompt"]}\nnext","{r["completion"]}"' for r in rows)])
        Path(path).write_text(frame + "\n")
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow", "csv"])
def test_one_file_of_any_kind_is_parted_among_shards(kind):
    """And each place is named as in the whole file."""
    recipe = build_recipe([write_as(kind, RECORDS["prompt_completion"])])
    store_in_blocks(recipe)
    expected = take_store()

    place = find_place(recipe, tokenizer(), seed=0)
    assert place is not None
    for number in (1, 2, 3, 4):
        store_shard(place, recipe, tokenizer=tokenizer(), shard=Shard(number, 4))
    sizes = [json.loads((p / "part.json").read_text())["sets"]["train"]["examples"] for p in parts_of(place)]
    merge_shards(place, recipe, tokenizer=tokenizer(), seed=0, command=COMMAND)

    assert (sum(sizes), min(sizes) > 5) == (60, True)
    assert differing(take_store(), expected) == []


def parts_of(place: Any) -> list[Path]:
    return sorted(shards_folder(place).iterdir())


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_is_parted_by_its_text(ending):
    plain = write_jsonl(Path("a.jsonl"), RECORDS["text"])
    with pyarrow.CompressedOutputStream(
        plain + ending, ending[1:].replace("gz", "gzip").replace("zst", "zstd")
    ) as file:
        file.write(Path(plain).read_bytes())
    recipe = build_recipe([plain + ending], stage="pretrain")
    store_in_blocks(recipe)
    expected = take_store()

    store_in_shards(recipe, 4)

    assert differing(take_store(), expected) == []


def test_the_end_of_a_single_text_is_held_out_by_shards_too():
    Path("a.txt").write_text("A line of the book.\n" * 40)
    recipe = build_recipe(["a.txt"], stage="pretrain", eval_fraction=0.1)
    store_from_memory(recipe)
    expected = take_store()

    store_in_shards(recipe, 2)

    assert differing(take_store(), expected) == []
    assert {"train.labels.npy", "eval.labels.npy"} <= set(expected)


def test_limits_and_more_shards_than_records():
    write_jsonl(Path("a.jsonl"), RECORDS["text"])
    write_jsonl(Path("b.jsonl"), RECORDS["text"][:2])
    recipe = build_recipe([{"path": "a.jsonl", "limit": 3}, {"path": "b.jsonl"}], stage="pretrain")
    store_from_memory(recipe)
    expected = take_store()

    store_in_shards(recipe, 9)

    assert differing(take_store(), expected) == []
    assert expected["index"]["splits"]["train"]["report"]["records"] == 5


# --- what can go wrong


def save_recipe(tmp_path: Path, **data: Any) -> str:
    changes = {"cache_dir": str(tmp_path / "cache"), "packing": "best_fit", **data}
    records = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in range(1, 31)]
    recipe = helpers.build_recipe(tmp_path, records, data=changes, train={"max_steps": 1})
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    return str(tmp_path / "recipe.yaml")


def test_machines_share_the_work_by_the_command_line(tmp_path, capsys):
    recipe = save_recipe(tmp_path)
    assert main(["prepare", recipe]) == 0
    expected = take_store()
    capsys.readouterr()

    codes = [main(["prepare", recipe, "--shard", shard]) for shard in ("2/2", "1/2", "1/2")]
    made = capsys.readouterr().out.splitlines()
    codes.append(main(["prepare", recipe, "--merge"]))

    merged = capsys.readouterr().out.splitlines()
    assert codes == [0, 0, 0, 0]
    assert [line.partition(" MB in ")[0][:14] for line in made[::2]] == [
        *("shard     2/2 ", "shard     1/2 ", "shard     1/2 ")
    ]
    assert made[4].startswith("shard     1/2 is there already: ")
    assert merged[0] == "merged    2 shards"
    assert merged[1].startswith("prepared  read from cache")
    assert differing(take_store(), expected) == []


def test_a_shard_of_a_set_that_is_there_is_not_made(tmp_path, capsys):
    recipe = save_recipe(tmp_path)
    assert main(["prepare", recipe]) == 0
    capsys.readouterr()

    assert main(["prepare", recipe, "--shard", "1/2"]) == 0

    assert capsys.readouterr().out.startswith("shard     1/2 is not needed: the whole is prepared (key ")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_counted_from_1(tmp_path, capsys, shard):
    recipe = save_recipe(tmp_path)
    capsys.readouterr()

    assert main(["prepare", recipe, f"--shard={shard}"]) == 2

    assert capsys.readouterr().err == (
        f"error: --shard: no part of a whole; got {shard!r}; fix: i/n, counted from 1: "
        "--shard 1/8 on the first of eight machines, --shard 8/8 on the last\n"
    )


def prepared_shards(tmp_path: Path, count: int = 3) -> tuple[str, Path]:
    """The recipe, and the folder of its shards."""
    recipe = save_recipe(tmp_path)
    for number in range(1, count + 1):
        assert main(["prepare", recipe, "--shard", f"{number}/{count}"]) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    return recipe, folder


def test_a_missing_shard_is_named_with_the_command_that_makes_it(tmp_path, capsys):
    recipe, folder = prepared_shards(tmp_path)
    shutil.rmtree(folder / "2-of-3")

    assert main(["prepare", recipe, "--max_steps", "1", "--merge"]) == 3

    assert capsys.readouterr().err == (
        f"error: {folder}: shard 2/3 is missing; "
        f"fix: `hf-clm prepare {recipe} --max_steps 1 --shard 2/3`, or copy its folder here\n"
    )


@pytest.mark.parametrize("name", ["train.input_ids.npy", "train.places.npy", "part.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, capsys, name, damage):
    recipe, folder = prepared_shards(tmp_path)
    path = folder / "2-of-3" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content[:-1] if damage == "cut" else content)
    capsys.readouterr()

    assert main(["prepare", recipe, "--merge"]) == 3

    assert capsys.readouterr().err.startswith(
        f"error: {folder / '2-of-3'}: shard 2/3 is damaged; fix: remove"
    )
    shutil.rmtree(folder / "2-of-3")
    assert main(["prepare", recipe, "--shard", "2/3"]) == 0
    assert main(["prepare", recipe, "--merge"]) == 0


def test_shards_of_two_divisions_are_not_joined(tmp_path, capsys):
    recipe, _ = prepared_shards(tmp_path)
    assert main(["prepare", recipe, "--shard", "1/2"]) == 0
    capsys.readouterr()

    assert main(["prepare", recipe, "--merge"]) == 3

    assert "shards of more than one division; got 1 of 2 and 3 of 3; fix: " in capsys.readouterr().err


def test_a_shard_of_other_data_is_refused(tmp_path, capsys):
    recipe, folder = prepared_shards(tmp_path)
    assert main(["prepare", recipe, "--data.max_length", "50", "--shard", "2/3"]) == 0
    (other,) = (path for path in (tmp_path / "cache").iterdir() if path != folder)
    shutil.rmtree(folder / "2-of-3")
    shutil.copytree(other / "2-of-3", folder / "2-of-3")
    capsys.readouterr()

    assert main(["prepare", recipe, "--merge"]) == 3

    key = other.name.removesuffix(".shards")
    assert (
        f"not shard 2/3 of this recipe's data; got shard 2/3 of key {key}; fix: " in capsys.readouterr().err
    )


CHANGED_FACTS = {
    "a key is gone": lambda text: text.replace('"sets"', '"bets"'),
    "a count": lambda text: text.replace('"records": ', '"records": 1'),
    "the name of a file": lambda text: text.replace(".jsonl:", ".jsonk:"),
    "nothing": lambda text: "{}",
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("change", CHANGED_FACTS)
def test_a_shard_whose_facts_were_changed_is_damaged(tmp_path, capsys, change):
    recipe, folder = prepared_shards(tmp_path)
    index = folder / "2-of-3" / "part.json"
    text = index.read_text()
    index.write_text(CHANGED_FACTS[change](text))
    assert index.read_text() != text
    capsys.readouterr()

    assert main(["prepare", recipe, "--merge"]) == 3

    assert "shard 2/3 is damaged; fix: remove" in capsys.readouterr().err


def test_other_names_beside_the_shards_are_nothing_to_it(tmp_path, capsys):
    recipe, folder = prepared_shards(tmp_path)
    for name in ("2-of-3.bak", "0-of-3", "x-of-y", "notes.txt"):
        shutil.copytree(folder / "1-of-3", folder / name)

    assert main(["prepare", recipe, "--merge"]) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_merge_refuses_can_be_allowed_as_it_says_without_a_shard_made_again(tmp_path, capsys, count):
    limits = {"max_length": 30, "overflow": "drop", "max_dropped": 0.0}
    recipe = save_recipe(tmp_path, **limits)
    for number in range(1, count + 1):
        assert main(["prepare", recipe, "--shard", f"{number}/{count}"]) == 0
    capsys.readouterr()

    codes = [main(["prepare", recipe, "--merge"]) for _ in range(2)]
    errors = capsys.readouterr().err.splitlines()
    limit = errors[0].rpartition("data.max_dropped=")[2]
    codes.append(main(["prepare", recipe, "--merge", "--data.max_dropped", limit]))

    assert codes == [3, 3, 0]
    assert errors[0] == errors[1]  # the parts are as they were
    assert f"merged    {count} shards" in capsys.readouterr().out


def test_of_two_that_merge_at_once_the_slower_takes_the_set_of_the_other(tmp_path, capsys, monkeypatch):
    recipe, folder = prepared_shards(tmp_path)
    capsys.readouterr()
    codes, reach = [], storing.reach

    def let_the_other_pass(point: str) -> None:
        monkeypatch.setattr(storing, "reach", reach)
        codes.append(main(["prepare", recipe, "--merge"]))

    monkeypatch.setattr(storing, "reach", let_the_other_pass)
    codes.append(main(["prepare", recipe, "--merge"]))

    assert codes == [0, 0]
    assert capsys.readouterr().out.count("prepared  read from cache") == 2
    assert not folder.exists()


def test_merging_without_shards_says_how_they_are_made(tmp_path, capsys):
    recipe = save_recipe(tmp_path)

    assert main(["prepare", recipe, "--merge"]) == 3

    assert f"fix: `hf-clm prepare {recipe} --shard i/n` on each of n machines" in capsys.readouterr().err


def run_killed(words: list[str], point: str) -> None:
    code = "import sys; from hf_clm.data import shards; shards.BLOCK_ROWS = 4; "
    code += "from hf_clm.cli import main; sys.exit(main(sys.argv[1:]))"
    root = str(Path(shards.__file__).parents[2])
    environment = {**os.environ, "HF_CLM_FAULT": point, "PYTHONPATH": root}
    killed = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize(
    ("words", "point"),
    [
        (["--shard", "1/2"], "prepare.train.1"),
        (["--shard", "1/2"], "prepare.train.3"),
        (["--merge"], "merge.start"),
        (["--merge"], "merge.kept"),
    ],
)
def test_what_is_killed_in_the_middle_is_made_by_the_same_command_and_counts_once(
    tmp_path, capsys, words, point
):
    recipe = save_recipe(tmp_path)
    assert main(["prepare", recipe]) == 0
    expected = take_store()
    assert main(["prepare", recipe, "--shard", "2/2"]) == 0
    if words == ["--merge"]:
        assert main(["prepare", recipe, "--shard", "1/2"]) == 0

    run_killed(["prepare", recipe, *words], point)
    if words != ["--merge"]:
        assert main(["prepare", recipe, "--merge"]) == 3
    assert main(["prepare", recipe, *words]) == 0
    assert main(["prepare", recipe, "--merge"]) == 0

    for left in (tmp_path / "cache").glob(".partial-*"):  # of the merge that was killed: gone a day later
        shutil.rmtree(left)
    assert differing(take_store(), expected) == []


def test_a_schema_is_told_by_the_first_record_of_the_file_in_every_shard():
    write_jsonl(Path("a.jsonl"), [*RECORDS["text"][:20], *RECORDS["prompt_completion"][:20]])
    recipe = build_recipe(["a.jsonl"])
    place = find_place(recipe, tokenizer(), seed=0)
    assert place is not None

    with pytest.raises(DataError) as error:
        store_shard(place, recipe, tokenizer=tokenizer(), shard=Shard(4, 4))

    assert "a record of format prompt_completion in a file of format text (a.jsonl:1)" in str(error.value)


def test_an_empty_file_among_the_shards_is_found_when_they_are_joined():
    Path("a.jsonl").write_text("\n" * 50)
    write_jsonl(Path("b.jsonl"), RECORDS["text"][:3])
    recipe = build_recipe(["a.jsonl", "b.jsonl"], stage="pretrain")

    with pytest.raises(DataError, match=r"a.jsonl: empty file \(0 records\)"):
        store_in_shards(recipe, 6)
