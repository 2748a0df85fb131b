"""Rows that are made while training: those of the prepared path, each document once a pass."""

import json
import re
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from hf_clm.data.build import build_split, load_splits
from hf_clm.data.streaming import StreamedRows, StreamPlan, load_head, read_blocks, stream_identity
from pydantic import ValidationError

from hf_clm.cli import main
from hf_clm.config import Recipe
from hf_clm.errors import DataError, RecipeError
from hf_clm.parts import build_stream

TOKENIZER = byte_tokenizer()
# 23 documents of 1 to 40 letters; the first two of each name it.
DOCUMENTS = [f"{chr(97 + number)}{'.' * (number * 7 % 41)}{number}" for number in range(23)]


def build_recipe(folder: Path, *, stage: str = "pretrain", **data: Any) -> Recipe:
    """A recipe over two files of 20 and 3 documents."""
    form = "text" if stage == "pretrain" else "prompt_completion"
    records = [
        {"text": text} if form == "text" else {"prompt": "?", "completion": text} for text in DOCUMENTS
    ]
    paths = [write_jsonl(folder / "1.jsonl", records[:20]), write_jsonl(folder / "2.jsonl", records[20:])]
    content = {"train": paths, "max_length": 48, "streaming": True, "shuffle_buffer": 5} | data
    train = {"output_dir": "run", "max_steps": 5}
    return Recipe.model_validate(
        {"stage": stage, "model": {"name_or_path": "m"}, "data": content, "train": train}
    )


def stream(recipe: Recipe, *, shards: int = 1, batch_rows: int = 1, seed: int | None = None) -> StreamedRows:
    read = partial(read_blocks, recipe=recipe, tokenizer=TOKENIZER)
    identity = stream_identity(recipe)
    return StreamedRows(read, StreamPlan(10_000, batch_rows, shards), seed=seed, identity=identity)


def one_pass(rows: StreamedRows, shard: int) -> list[dict[str, Any]]:
    """The rows of a shard up to where its second pass begins."""
    found = []
    for index in range(shard, len(rows), rows.plan.shards):
        row = rows[index]
        if row["stream"].epoch == 1:
            return found
        found.append(row)
    raise AssertionError("the pass has no end")


def plain(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    positions = row.get("position_ids", range(len(row["input_ids"])))
    return [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]], [int(i) for i in positions]


def prepared(recipe: Recipe) -> list[Any]:
    """The rows of the prepared path, in its order."""
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": False})})
    examples, _ = load_splits(whole, 0)
    return list(build_split(examples, whole, tokenizer=TOKENIZER).dataset)


def targets(rows: list[Any]) -> Counter[int]:
    """How often each token has a label."""
    return Counter(label for row in rows for label in plain(row)[1] if label >= 0)


@pytest.mark.parametrize(
    ("stage", "packing"),
    [
        ("pretrain", "stream"),
        ("pretrain", "best_fit"),
        ("pretrain", "none"),
        ("sft", "best_fit"),
        ("sft", "none"),
    ],
)
def test_one_block_gives_the_rows_of_the_prepared_path(tmp_path, stage, packing):
    recipe = build_recipe(tmp_path, stage=stage, packing=packing, shuffle_buffer=1000)
    one = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": recipe.data.train[:1]})})

    rows = one_pass(stream(one), 0)

    assert len(rows) > 5
    assert [plain(row) for row in rows] == [plain(row) for row in prepared(one)]


def test_blocks_are_packed_each_by_itself_in_reading_order(tmp_path):
    recipe = build_recipe(tmp_path, shuffle_buffer=2)
    write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in ["abc", "de", "f"]])
    write_jsonl(tmp_path / "2.jsonl", [{"text": "ghijk"}])

    rows = one_pass(stream(recipe), 0)

    ends = "<|endoftext|>"
    assert [TOKENIZER.decode(row["input_ids"]) for row in rows] == [
        f"abc{ends}de{ends}",
        f"f{ends}",
        f"ghijk{ends}",
    ]
    assert [plain(row)[2] for row in rows] == [[0, 1, 2, 3, 0, 1, 2], [0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("stage", "packing"), [("pretrain", "none"), ("pretrain", "stream"), ("sft", "best_fit")]
)
def test_a_pass_of_all_shards_learns_every_label_once(tmp_path, stage, packing, shards):
    recipe = build_recipe(tmp_path, stage=stage, packing=packing)
    rows = stream(recipe, shards=shards, seed=3)

    found = [row for shard in range(shards) for row in one_pass(rows, shard)]

    assert targets(found) == targets(prepared(recipe))
    assert sum(targets(found).values()) == sum(len(text) + (stage == "sft") for text in DOCUMENTS)


def test_batches_are_of_the_shards_in_turn(tmp_path):
    rows = stream(build_recipe(tmp_path, packing="none"), shards=3, batch_rows=2)

    assert [rows[index]["stream"].shard for index in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]


def test_each_pass_and_block_has_its_own_order_and_the_same_rows(tmp_path):
    recipe = build_recipe(tmp_path, packing="none")
    rows = stream(recipe, seed=1)

    texts = [TOKENIZER.decode(rows[index]["input_ids"])[0] for index in range(46)]

    first, second = texts[:23], texts[23:]
    assert "".join(sorted(first)) == "".join(sorted(second)) == "abcdefghijklmnopqrstuvw"
    assert sorted(first[:5]) == sorted(second[:5]) == list("abcde")
    assert first != second
    assert sorted(first) != first
    again = stream(recipe, seed=1)
    assert [TOKENIZER.decode(again[index]["input_ids"])[0] for index in range(46)] == texts


@pytest.mark.parametrize("shards", [1, 2])
def test_from_the_position_of_any_row_the_same_rows_follow(tmp_path, shards):
    """Through three passes, each of them cut at every row."""
    recipe = build_recipe(tmp_path, packing="stream")
    whole = stream(recipe, shards=shards, seed=5)
    rows = [whole[index] for index in range(0, 80 * shards, shards)]
    assert rows[-1]["stream"].epoch >= 2

    for taken, row in enumerate(rows[:-3], start=1):
        resumed = stream(recipe, shards=shards, seed=5)
        resumed.passed(row["stream"])
        after = [resumed[index] for index in range(0, 3 * shards, shards)]
        assert [plain(r) for r in after] == [plain(r) for r in rows[taken : taken + 3]]
        assert [r["stream"] for r in after] == [r["stream"] for r in rows[taken : taken + 3]]


def test_going_on_reads_nothing_before_the_block(tmp_path):
    """The lines before it are not even JSON any more."""
    recipe = build_recipe(tmp_path, packing="none")
    rows = stream(recipe)
    reached = [rows[index] for index in range(12)][-1]["stream"]
    path = tmp_path / "1.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"#" * (reached.mark.at - 1) + content[reached.mark.at - 1 :])

    resumed = stream(recipe)
    resumed.passed(reached)

    assert TOKENIZER.decode(resumed[0]["input_ids"])[0] == "m"


def test_positions_are_written_and_read_by_other_processes(tmp_path):
    recipe = build_recipe(tmp_path)
    whole = stream(recipe, shards=2, seed=5)
    for rank in range(2):  # each process knows the shard of its own
        own = stream(recipe, shards=2, seed=5)
        for index in range(rank, 20, 2):
            own.passed(whole[index]["stream"])
        own.write_state(tmp_path, rank=rank)

    resumed = stream(recipe, shards=2, seed=5)
    resumed.read_state(tmp_path)

    assert [plain(resumed[index]) for index in (0, 1)] == [plain(whole[index]) for index in (20, 21)]
    assert len(json.loads((tmp_path / "stream_state_1.json").read_text())["positions"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 4}, "the stream cannot go on: shards was 2; got 4; fix: as many processes x train.data"),
        ({"seed": 6}, "the stream cannot go on: seed was 5; got 6; fix: the seed"),
        (
            {"shuffle_buffer": 7},
            "the stream cannot go on: documents was 5; got 7; fix: data.shuffle_buffer as b",
        ),
    ],
)
def test_another_division_of_the_data_is_refused(tmp_path, changes, message):
    stream(build_recipe(tmp_path), shards=2, seed=5).write_state(tmp_path, rank=0)
    of_rows = {"shards": 2, "seed": 5} | {k: v for k, v in changes.items() if k in ("shards", "seed")}
    of_data = {key: value for key, value in changes.items() if key not in of_rows}

    with pytest.raises(RecipeError) as error:
        stream(build_recipe(tmp_path, **of_data), **of_rows).read_state(tmp_path)

    assert str(error.value).startswith(f"{tmp_path}: {message}")


def test_changed_files_and_a_checkpoint_without_a_position_are_refused(tmp_path):
    rows = stream(build_recipe(tmp_path))
    with pytest.raises(RecipeError, match="the checkpoint holds no position in a stream"):
        rows.read_state(tmp_path)
    rows.write_state(tmp_path, rank=0)
    recipe = build_recipe(tmp_path)
    (tmp_path / "2.jsonl").write_text('{"text": "another"}\n')

    with pytest.raises(RecipeError, match=r"cannot go on: files was .*fix: the same files as before"):
        stream(recipe).read_state(tmp_path)


def test_each_process_may_go_on_twice(tmp_path):
    """Two processes of one shard each: what one knows of the other's shard is as old as the last start."""
    recipe = build_recipe(tmp_path)
    place = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(["", *place]):
        for rank in (0, 1):
            rows = stream(recipe, shards=2, seed=1)
            if folder:
                rows.read_state(folder)
            own = [rows[index] for index in range(rank, 6, 2)]
            rows.passed(own[-1]["stream"])
            if number < 2:
                rows.write_state(place[number], rank=rank)
            if number == 2:
                whole = stream(recipe, shards=2, seed=1)
                expected = [whole[index] for index in range(rank, 18, 2)][6:]
                assert [row["stream"] for row in own] == [row["stream"] for row in expected]


def test_what_was_dropped_or_unreadable_is_counted_pass_by_pass(tmp_path):
    recipe = build_recipe(
        tmp_path, stage="sft", packing="none", overflow="drop", on_bad_record="drop", max_dropped=1
    )
    record = {"prompt": "?", "completion": "yes"}
    long = {"prompt": "?", "completion": "y" * 60}
    write_jsonl(tmp_path / "1.jsonl", [record, long, record])
    (tmp_path / "2.jsonl").write_text(json.dumps(record) + "\nno json\n" + json.dumps(record) + "\n{cut\n")
    rows = stream(recipe)

    counts = [dict(rows[index]["stream"].counts) for index in range(5)]

    assert counts[1] == {"used": 2, "dropped: longer than max_length": 1}
    assert counts[3] == {"used": 4, "dropped: longer than max_length": 1, "unreadable": 2}
    assert counts[4] == {"used": 6, "dropped: longer than max_length": 2, "unreadable": 2}


def test_bad_lines_at_the_end_of_a_file_are_counted_once_after_going_on_too(tmp_path):
    recipe = build_recipe(tmp_path, packing="none", shuffle_buffer=2, on_bad_record="drop")
    (tmp_path / "1.jsonl").write_text('{"text": "aa"}\n{"text": "bb"}\n{"text": "cc"}\nno json\n')
    (tmp_path / "2.jsonl").write_text('{"text": "dd"}\n{"text": "ee"}\n{"text": "ff"}\n')
    whole = stream(recipe, seed=1)
    rows = [whole[index] for index in range(14)]

    assert dict(rows[11]["stream"].counts) == {"used": 12, "unreadable": 2}
    for taken, row in enumerate(rows[:-1], start=1):
        resumed = stream(recipe, seed=1)
        resumed.passed(row["stream"])
        found = resumed[0]
        assert (plain(found), found["stream"]) == (plain(rows[taken]), rows[taken]["stream"])


def test_memory_does_not_grow_with_the_data(tmp_path):
    """At its peak it holds as much of 2,000 documents as of 200: a block of 50, and the next."""
    peaks = []
    for documents in (200, 2000):
        recipe = build_recipe(tmp_path, shuffle_buffer=50, max_length=512)
        write_jsonl(tmp_path / "1.jsonl", [{"text": f"{number:04} " * 100} for number in range(documents)])
        rows = stream(recipe)
        rows[0]
        tracemalloc.start()
        tokens = 0
        for index in range(1, len(rows)):
            if (row := rows[index])["stream"].epoch == 1:
                break
            tokens += len(row["input_ids"])
        assert tokens > documents * 490
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 1.2 * peaks[0]


def test_too_many_drops_stop_the_stream_once_a_thousand_documents_tell(tmp_path):
    good, long = {"prompt": "?", "completion": "yes"}, {"prompt": "?", "completion": "y" * 60}
    recipe = build_recipe(tmp_path, stage="sft", packing="none", overflow="drop", shuffle_buffer=500)
    write_jsonl(tmp_path / "1.jsonl", [good] * 900 + [long] * 200)
    rows = stream(recipe)
    rows.max_dropped = 0.01

    with pytest.raises(DataError) as error:
        one_pass(rows, 0)

    message = (
        "data.train: 100 of 1,000 documents of a stream cannot be trained on; got 100 dropped: longer than"
    )
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("data.max_dropped=0.1")


def test_a_shard_without_a_document_is_refused(tmp_path):
    recipe = build_recipe(tmp_path, packing="none")

    with pytest.raises(DataError) as error:
        one_pass(stream(recipe, shards=400), 1)

    assert str(error.value) == (
        "data.train: no document to train on for shard 2 of 400; "
        "fix: fewer processes or train.dataloader_num_workers, or data.streaming: false"
    )


def test_the_head_is_the_first_thousand_documents_of_each_source(tmp_path):
    recipe = build_recipe(tmp_path)
    write_jsonl(tmp_path / "1.jsonl", [{"text": f"one {number}"} for number in range(1200)])
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"eval": [recipe.data.train[1]]})}
    )

    head, evaluation = load_head(recipe)

    assert len(head) == 1003
    assert head.places[999:1001] == [f"{tmp_path}/1.jsonl:1000", f"{tmp_path}/2.jsonl:1"]
    assert evaluation is not None
    assert len(evaluation) == 3


def test_all_commands_say_that_they_look_at_the_head_and_prepare_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build_recipe(tmp_path)
    save_folder(tmp_path / "m", tiny_model(), TOKENIZER)
    (tmp_path / "recipe.yaml").write_text(
        "stage: pretrain\nmodel: {name_or_path: ./m}\n"
        "data: {train: '[12].jsonl', streaming: true, max_length: 48}\n"
        "train: {output_dir: run, max_steps: 5, use_cpu: true}\n"
    )

    codes = [main([command, "recipe.yaml"]) for command in ("inspect", "doctor", "prepare")]

    said = capsys.readouterr()
    assert codes == [0, 0, 2]
    assert "stream: the first 1,000 documents of each source" in said.out
    assert "8 rows of a stream; what is said here is of its first documents" in said.out
    assert said.err.endswith(
        "error: data.streaming: nothing is prepared of a stream; "
        "fix: hf-clm train reads it, and prepares data.eval alone; or set data.streaming to false\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"max_steps": -1}},
            "data.streaming needs train.max_steps: the length of a stream is not known",
        ),
        (
            {"data": {"eval_fraction": 0.1}},
            "data.eval_fraction is chosen from all examples, which nobody has",
        ),
        ({"data": {"duplicates": "drop"}}, "data.duplicates: drop compares all examples, which nobody has"),
        (
            {"data": {"train": [{"path": "a", "limit": 3}]}},
            "a shard of a stream does not know how many were read",
        ),
        (
            {"model": {"init": "scratch", "config": {"model_type": "gpt2"}}, "tokenizer": {"train": {}}},
            "tokenizer.train reads all of the data, which nobody has of a stream",
        ),
        (
            {"train": {"train_sampling_strategy": "group_by_length"}},
            "train.train_sampling_strategy and data.streaming exclude each other: no other order is known",
        ),
        (
            {"train": {"accelerator_config": {"dispatch_batches": True}}},
            "train.accelerator_config and data.streaming exclude each other: each process reads a part of",
        ),
        (
            {"train": {"save_strategy": "epoch"}},
            "train.save_strategy and data.streaming exclude each other: no end of an epoch is known",
        ),
        (
            {"train": {"torch_compile": True}},
            "train.torch_compile and data.streaming exclude each other: the longest batch is not known",
        ),
    ],
)
def test_what_needs_all_of_the_data_is_refused(changes, message):
    sections: dict[str, Any] = {
        "stage": "pretrain",
        "model": {"name_or_path": "m"},
        "data": {"train": ["a.jsonl"], "streaming": True},
        "train": {"output_dir": "run", "max_steps": 5},
    }
    for name, change in changes.items():
        sections[name] = change if name == "model" else {**sections.get(name, {}), **change}

    with pytest.raises(ValidationError, match=re.escape(message)):
        Recipe.model_validate(sections)


def test_the_rows_of_a_run_are_of_as_many_shards_as_there_are_workers_of_all_processes(tmp_path):
    recipe = build_recipe(tmp_path)
    arguments: Any = SimpleNamespace(
        max_steps=5,
        train_batch_size=2,
        gradient_accumulation_steps=3,
        world_size=4,
        dataloader_num_workers=2,
        seed=7,
        data_seed=None,
        train_sampling_strategy="random",
    )

    rows = build_stream(recipe, TOKENIZER, arguments=arguments)

    assert rows is not None
    assert rows.plan == StreamPlan(rows=120, batch_rows=2, shards=8)
    assert rows.seed == 7
    arguments.train_sampling_strategy, arguments.dataloader_num_workers = "sequential", 0
    assert build_stream(recipe, TOKENIZER, arguments=arguments).seed is None
    assert len(build_stream(recipe, TOKENIZER, arguments=arguments).positions) == 4
