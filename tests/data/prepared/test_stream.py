"""Rows made during training equal prepared rows, with each record once per pass."""

import gzip
import json
import random
import re
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from helpers import byte_tokenizer, read_split, save_folder, tiny_model, write_jsonl
from pyarrow import parquet

from hf_clm.cli import main
from hf_clm.data.prepared import chunks
from hf_clm.data.prepared.sets import load_examples, to_head
from hf_clm.data.prepared.stream import StreamedRows, StreamPlan
from hf_clm.data.prepared.stream_blocks import (
    counted_by,
    read_stream,
    shares_of,
    stream_identity,
)
from hf_clm.errors import DataError, RecipeError
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.arguments import build_stream

TOKENIZER = byte_tokenizer()
SIZE = 2500  # letters of the longest records: at least four lie in a chunk of lines, which has 8 KiB
KINDS = ("jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "txt", "packed", "hub")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts_of(numbers: Sequence[int]) -> list[str]:
    """Returns texts of 4 to SIZE letters, each of which begins with its name: r17."""
    return [f"r{number} " + "." * (number * 577 % SIZE) for number in numbers]


def write_lines(name: str, numbers: Sequence[int]) -> str:
    return write_jsonl(Path(name), [{"text": text} for text in texts_of(numbers)])


def write_packed(name: str, numbers: Sequence[int]) -> None:
    Path(name).write_bytes(gzip.compress(Path(write_lines("plain", numbers)).read_bytes()))


def write_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Writes a number of records to files of a kind, in several chunks; returns their path."""
    records = [{"text": text} for text in texts_of(range(90))]
    short = pyarrow.table({"text": [f"r{number} " for number in range(200)]})
    wide = pyarrow.array(["x" * 80_000] * 200)  # so that 50 rows are a chunk
    match kind:
        case "jsonl":
            write_lines("a.jsonl", range(60))
            write_lines("b.jsonl", range(60, 90))
        case "jsonl.gz":
            write_packed("a.jsonl.gz", range(90))
        case "json":
            Path("a.json").write_text(json.dumps(records))
        case "csv":
            Path("a.csv").write_text("\n".join(["text", *(record["text"] for record in records)]))
        case "parquet":
            parquet.write_table(short.append_column("wide", wide), "a.parquet", use_dictionary=False)
        case "arrow":
            with pyarrow.ipc.new_file("a.arrow", short.schema) as file:
                file.write_table(short, max_chunksize=20)
        case _:
            return write_many(kind, monkeypatch)
    return f"*.{kind}", 200 if kind in ("parquet", "arrow") else 90


def write_many(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Enough files to be assigned by file to two shards, but by chunk to three."""
    for number in range(20):
        if kind == "txt":
            Path(f"{number:02}.txt").write_text(texts_of([number])[0])
        elif kind == "packed":
            write_packed(f"{number:02}.jsonl.gz", range(number * 8, number * 8 + 8))
    if kind != "hub":
        return ("*.txt", 20) if kind == "txt" else ("*.jsonl.gz", 160)
    rows = [("me/data: record", {"text": text}) for text in texts_of(range(90))]
    monkeypatch.setattr(chunks, "read_hub", lambda *_, **__: iter(rows))
    return "me/data", 90


def recipe_of(train: Any, *, stage: str = "pretrain", **data: Any) -> Recipe:
    """Makes one row per record, which contains its name; a block has two chunks of lines."""
    content = {"train": train, "max_length": 48, "packing": "none", "streaming": True, "shuffle_buffer": 10}
    content |= {"overflow": "truncate"} if data.get("packing", "none") == "none" else {}
    settings = {"output_dir": "run", "max_steps": 5}
    sections = {"stage": stage, "model": {"name_or_path": "m"}, "train": settings}
    return Recipe.model_validate({**sections, "data": content | {"cache_dir": None} | data})


def stream(recipe: Recipe, *, shards: int = 1, batch_rows: int = 1, seed: int | None = 3) -> StreamedRows:
    plan = StreamPlan(100_000, batch_rows, shards, shares_of(recipe.data), counted_by(recipe.data))
    return StreamedRows(
        partial(read_stream, recipe=recipe, tokenizer=TOKENIZER),
        plan,
        seed=seed,
        max_dropped=recipe.data.max_dropped,
        identity=stream_identity(recipe),
    )


def follow(rows: StreamedRows, shard: int) -> Iterator[tuple[int, Any]]:
    """Returns the rows of a shard in the order of a run, each with its pass."""
    for index in range(shard, len(rows), rows.plan.shards):
        before = rows.positions[shard]
        row = rows[index]
        rows.passed(row["stream"])
        yield before.rests[0].epoch if before.rests else row["stream"].places[0].epoch, row


def resumed(rows: StreamedRows, recipe: Recipe, *, shards: int) -> StreamedRows:
    """Returns a stream that resumes at the position of another."""
    with tempfile.TemporaryDirectory() as folder:
        rows.write_state(Path(folder), rank=0)
        after = stream(recipe, shards=shards)
        after.read_state(Path(folder))
    return after


def one_pass(rows: StreamedRows) -> list[Any]:
    """Returns the rows of the first pass of all shards."""
    found = []
    for shard in range(rows.plan.shards):
        for epoch, row in follow(rows, shard):
            if epoch:
                break
            found.append(row)
    return found


def plain(row: Any) -> tuple[list[int], list[int], list[int]]:
    positions = row.get("position_ids", range(len(row["input_ids"])))
    return [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]], [int(i) for i in positions]


def names_of(rows: list[Any]) -> list[str]:
    """Returns the names of the records in the rows, such as r17."""
    return [name for row in rows for name in re.findall(r"r\d+", TOKENIZER.decode(row["input_ids"]))]


def documents(rows: list[Any]) -> Counter[Any]:
    """Returns the ids and labels of each document in the rows."""
    found: Counter[Any] = Counter()
    for ids, labels, positions in map(plain, rows):
        starts = [at for at, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found[tuple(ids[start:end]), tuple(labels[start:end])] += 1
    return found


def targets(rows: list[Any]) -> Counter[int]:
    """Returns how often each token has a label."""
    return Counter(label for row in rows for label in plain(row)[1] if label >= 0)


def unstreamed(recipe: Recipe, **changes: Any) -> Recipe:
    data = recipe.data.model_copy(update={"streaming": False, **changes})
    return recipe.model_copy(update={"data": data})


def prepared(recipe: Recipe) -> list[Any]:
    """Returns the rows of the prepared set, in order."""
    split = read_split(unstreamed(recipe), TOKENIZER)
    return [split.dataset[number] for number in range(len(split.dataset))]


# --- the rows


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    ("stage", "packing"),
    [("pretrain", "none"), ("sft", "none"), ("pretrain", "best_fit"), ("sft", "best_fit")],
)
def test_one_pass_of_all_shards_has_the_documents_of_the_prepared_set(stage, packing, shards):
    records = [{"text": text} for text in texts_of(range(60))]
    if stage == "sft":
        records = [{"prompt": "?", "completion": record["text"]} for record in records]
    paths = [write_jsonl(Path("1.jsonl"), records[:40]), write_jsonl(Path("2.jsonl"), records[40:])]
    recipe = recipe_of(paths, stage=stage, packing=packing, max_length=1000, overflow="truncate")

    found = one_pass(stream(recipe, shards=shards))

    assert documents(found) == documents(prepared(recipe))
    assert sum(documents(found).values()) == 60


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_one_pass_of_cut_rows_has_every_label_of_the_prepared_set(shards):
    recipe = recipe_of(write_lines("a.jsonl", range(60)), packing="stream", max_length=100)

    found = one_pass(stream(recipe, shards=shards))

    assert targets(found) == targets(prepared(recipe))
    assert sum(targets(found).values()) == sum(len(text) for text in texts_of(range(60)))
    assert max(len(row["input_ids"]) for row in found) == 100


@pytest.mark.parametrize("packing", ["none", "best_fit", "stream"])
def test_one_block_has_the_rows_of_the_prepared_set_in_order(packing):
    recipe = recipe_of(write_lines("a.jsonl", range(20)), packing=packing, shuffle_buffer=1000)

    rows = one_pass(stream(recipe, seed=None))

    assert len(rows) >= 20
    assert [plain(row) for row in rows] == [plain(row) for row in prepared(recipe)]


def test_blocks_are_packed_separately_in_reading_order():
    long = "x" * 8200
    texts = ["ab", "c", long, "de", "f", long, "ghi"]
    write_jsonl(Path("a.jsonl"), [{"text": text} for text in texts[:5]])
    write_jsonl(Path("b.jsonl"), [{"text": text} for text in texts[5:]])
    recipe = recipe_of(["a.jsonl", "b.jsonl"], packing="best_fit", shuffle_buffer=1, overflow="truncate")

    rows = one_pass(stream(recipe, seed=None))

    ends = "<|endoftext|>"
    assert [TOKENIZER.decode(row["input_ids"]) for row in rows] == [
        "x" * 48,
        f"ab{ends}c{ends}",
        f"de{ends}f{ends}",
        "x" * 48,
        f"ghi{ends}",
    ]
    assert plain(rows[1])[2] == [0, 1, 2, 0, 1]


def test_batches_take_turns_among_the_shards():
    rows = stream(recipe_of(write_lines("a.jsonl", range(60))), shards=3, batch_rows=2)

    assert [rows[index]["stream"].shard for index in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]


def test_each_pass_and_block_has_its_own_order_and_the_same_rows():
    lines = [f'{{"text": "r{number} '.ljust(2045, ".") + '"}\n' for number in range(32)]
    Path("a.jsonl").write_text("".join(lines))  # four to a chunk
    recipe = recipe_of("a.jsonl", shuffle_buffer=8)
    rows, again = (stream(recipe) for _ in range(2))

    names = names_of([rows[index] for index in range(64)])

    first, second = names[:32], names[32:]
    assert set(first[:8]) == set(second[:8]) == {f"r{number}" for number in range(8)}
    assert set(first) == set(second) == {f"r{number}" for number in range(32)}
    assert first != second
    assert first[:8] != [f"r{number}" for number in range(8)]
    assert names_of([again[index] for index in range(64)]) == names


def test_memory_does_not_grow_with_the_data():
    peaks = []
    for records in (100, 1000):
        write_jsonl(Path("a.jsonl"), [{"text": f"{number:04} " * 400} for number in range(records)])
        recipe = recipe_of("a.jsonl", packing="best_fit", max_length=512, shuffle_buffer=20)
        rows = stream(recipe, seed=1)
        rows[0]
        tracemalloc.start()
        tokens = 0
        for index in range(1, len(rows)):
            if (row := rows[index])["stream"].places[0].epoch:
                break
            tokens += len(row["input_ids"])
        assert tokens > records * 490
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 1.2 * peaks[0]


# --- resuming


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("packing", ["none", "stream"])
def test_a_stream_resumes_identically_from_any_row(packing, shards):
    """Interrupts at every row of more than one pass, in the order of the last shard."""
    paths = [write_lines("1.jsonl", range(15)), write_lines("2.jsonl", range(15, 25))]
    recipe = recipe_of(paths, packing=packing, max_length=1500)
    whole = stream(recipe, shards=shards)
    shard, rows = shards - 1, []
    for epoch, row in follow(whole, shard):
        rows.append(row)
        if epoch and len(rows) > 20:
            break

    for taken, row in enumerate(rows[:-3], start=1):
        before = stream(recipe, shards=shards)
        before.passed(row["stream"])
        later = resumed(before, recipe, shards=shards)
        after = [later[shard + number * shards] for number in range(3)]
        assert [plain(r) for r in after] == [plain(r) for r in rows[taken : taken + 3]]
        assert [r["stream"] for r in after] == [r["stream"] for r in rows[taken : taken + 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_change_of_shards_each_record_comes_once_per_pass(kind, monkeypatch):
    """Resumes with other numbers of shards at random rows; some shards are a pass ahead of others."""
    path, count = write_all(kind, monkeypatch)
    recipe = recipe_of(path, packing="best_fit" if kind == "packed" else "none", overflow="truncate")
    everything = Counter(f"r{number}" for number in range(count))
    for seed, numbers in enumerate(([2, 3], [3, 1], [1, 2], [2, 3, 2], [3, 2, 1, 3])):
        draw, read = random.Random(seed), Counter()
        rows = stream(recipe, shards=numbers[0])
        for at, shards in enumerate(numbers):
            if at:
                rows = resumed(rows, recipe, shards=shards)
            taken = [follow(rows, shard) for shard in range(shards)]
            for own in taken:
                most = count // shards * (2 if draw.random() < 0.2 else 1)
                for epoch, row in islice(own, draw.randrange(most)):
                    read.update((epoch, name) for name in names_of([row]))

        last = max(epoch for epoch, _ in read)
        for own in taken:
            for epoch, row in own:
                if epoch > last:
                    break
                read.update((epoch, name) for name in names_of([row]))

        for number in range(last + 1):
            found = Counter({name: times for (epoch, name), times in read.items() if epoch == number})
            assert found == everything, (numbers, number)


def test_a_block_does_not_depend_on_earlier_bytes():
    """All earlier lines but the first are no longer valid JSON."""
    recipe = recipe_of(write_lines("a.jsonl", range(60)))
    rows = stream(recipe)
    reached = [rows[index] for index in range(30)][-1]["stream"]
    path, begin = Path("a.jsonl"), reached.places[0].mark.chunk * chunks.CHUNK_BYTES
    content = path.read_bytes()
    head = content.index(b"\n") + 1
    path.write_bytes(content[:head] + b"#" * (begin - head) + content[begin:])

    after = stream(recipe)
    after.passed(reached)

    assert begin > 3 * chunks.CHUNK_BYTES
    assert plain(after[0]) == plain(rows[30])


def test_each_process_saves_its_shards_and_any_process_can_resume():
    recipe = recipe_of(write_lines("a.jsonl", range(60)))
    whole = stream(recipe, shards=2)
    for rank in range(2):
        own = stream(recipe, shards=2)
        for index in range(rank, 20, 2):
            own.passed(whole[index]["stream"])
        own.write_state(Path("state"), rank=rank)

    after = stream(recipe, shards=2)
    after.read_state(Path("state"))

    assert [plain(after[index]) for index in (0, 1)] == [plain(whole[index]) for index in (20, 21)]
    assert len(json.loads(Path("state/stream_state_1.json").read_text())["positions"]) == 1


def test_each_process_may_resume_twice():
    """Two processes with one shard each; each only knows the other's position at the last start."""
    recipe = recipe_of(write_lines("a.jsonl", range(60)))
    whole = stream(recipe, shards=2)
    expected = [whole[index]["stream"] for index in range(18)]
    before = None
    for state in (Path("1"), Path("2"), Path("3")):
        for rank in (0, 1):
            own = stream(recipe, shards=2)
            if before:
                own.read_state(before)
            last = [own[index] for index in range(rank, 6, 2)][-1]["stream"]
            own.passed(last)
            own.write_state(state, rank=rank)
            if state.name == "3":
                assert last == expected[16 + rank]
        before = state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "cannot resume the stream: seed was 3; got 6; fix: use the same seed"),
        (
            {"shuffle_buffer": 7},
            "cannot resume the stream: documents was 10; got 7; fix: use the same data.shuffle",
        ),
        ({"train": ["a.jsonl"]}, "cannot resume the stream: files was "),
        (
            {"train": [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 2}]},
            "cannot resume the stream: weights was None; got ['rows', 1.0, 2.0]; fix: use the same source",
        ),
    ],
)
def test_resuming_with_other_rows_is_refused(changes, message):
    paths = [write_lines("a.jsonl", range(9)), write_lines("b.jsonl", range(9))]
    stream(recipe_of(paths)).write_state(Path("state"), rank=0)
    seed, data = changes.pop("seed", 3), {"train": paths} | changes

    with pytest.raises(RecipeError) as error:
        stream(recipe_of(data.pop("train"), **data), seed=seed).read_state(Path("state"))

    assert str(error.value).startswith(f"state: {message}")


def test_changed_files_and_a_checkpoint_without_a_position_are_refused():
    recipe = recipe_of(write_lines("a.jsonl", range(9)))
    rows = stream(recipe)
    with pytest.raises(RecipeError, match="the checkpoint has no stream position"):
        rows.read_state(Path())
    rows.write_state(Path(), rank=0)
    Path("a.jsonl").write_text('{"text": "another"}\n')

    with pytest.raises(
        RecipeError, match=r"cannot resume the stream: files was .*fix: use the same files as before"
    ):
        stream(recipe).read_state(Path())


# --- mixing


def write_mixed(weights: Sequence[float] = (3, 1)) -> list[dict[str, Any]]:
    """Writes sources of 60 and 20 records: r0 to r59 and r100 to r119."""
    paths = [write_lines("a.jsonl", range(60)), write_lines("b.jsonl", range(100, 120))]
    return [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]


def measure(row: Any, by: str) -> int:
    """Returns the size of a row in the unit of the mix."""
    if by == "rows":
        return len(names_of([row]))
    return len(row["input_ids"]) if by == "tokens" else sum(label >= 0 for label in plain(row)[1])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("packing", "by", "largest"),
    [
        ("none", "rows", 1),
        ("none", "tokens", 700),
        ("none", "target_tokens", 700),
        ("best_fit", "rows", 30),
        ("stream", "rows", 30),
        ("stream", "tokens", 700),
    ],
)
def test_shares_are_met_within_a_row(packing, by, largest, shards):
    mixing = {"mixing": {"by": by}, "packing": packing, "max_length": 700}
    recipe = recipe_of(write_mixed((3, 2)), **mixing)
    rows, taken = stream(recipe, shards=shards), Counter()

    for index in range(150 * shards):
        before = rows.positions[index % shards]
        row = rows[index]
        rows.passed(row["stream"])
        pairs = zip(before.places, row["stream"].places, strict=True)
        lane = [old != new for old, new in pairs].index(True)
        taken[index % shards, lane] += measure(row, by)

        if index % shards == 0:
            total = taken[0, 0] + taken[0, 1]
            assert abs(taken[0, 0] - total * 3 / 5) <= largest
    assert min(taken.values()) > 0


def test_each_mixed_source_has_its_own_passes():
    recipe = recipe_of(write_mixed((1, 1)))
    rows = stream(recipe)

    found = [rows[index] for index in range(120)]

    times = Counter(names_of(found))
    assert {times[f"r{number}"] for number in range(60)} == {1}
    assert {times[f"r{number}"] for number in range(100, 120)} == {3}
    assert [place.epoch for place in found[-1]["stream"].places] == [0, 2]


def test_a_mixed_stream_resumes_from_any_row():
    recipe = recipe_of(write_mixed(), packing="best_fit", max_length=1000, mixing={"by": "tokens"})
    whole = stream(recipe)
    rows = [whole[index] for index in range(100)]

    for taken in range(1, 97, 3):
        after = stream(recipe)
        after.passed(rows[taken - 1]["stream"])
        assert [plain(after[number]) for number in range(3)] == [plain(r) for r in rows[taken : taken + 3]]


def test_a_mixed_stream_on_other_shards_keeps_its_records_and_shares():
    recipe = recipe_of(write_mixed((3, 1)))
    rows = stream(recipe, shards=2)
    read = [row for shard in range(2) for _, row in islice(follow(rows, shard), 15)]

    rows = resumed(rows, recipe, shards=1)
    read += [rows[index] for index in range(50)]

    names = Counter(names_of(read))
    assert names == Counter(f"r{number}" for number in [*range(60), *range(100, 120)])


# --- what cannot be trained on


def test_dropped_documents_are_counted_per_pass():
    good, long = {"prompt": "?", "completion": "yes"}, {"prompt": "?", "completion": "y" * 60}
    path = write_jsonl(Path("a.jsonl"), [good, long, good])
    Path("b.jsonl").write_text(f"{json.dumps(good)}\nno json\n{json.dumps(good)}\n{{cut")
    recipe = recipe_of([path, "b.jsonl"], stage="sft", overflow="drop", max_dropped=1)
    rows = stream(recipe)

    counts = [dict(rows[index]["stream"].places[0].counts) for index in range(5)]

    assert counts[1] == {"used": 2, "dropped: longer than max_length": 1}
    assert counts[3] == {"used": 4, "dropped: longer than max_length": 1, "unreadable": 2}
    assert counts[4] == {"used": 6, "dropped: longer than max_length": 2, "unreadable": 2}


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        (b"no json", {}),
        (b'{"text": 7}', {}),
        (b'{"text": "\xff"}', {}),
        ('{"text": "\ufdd0"}'.encode(), {}),
        (b'{"text": "<|endoftext|>"}', {"special_tokens_in_text": "error"}),
        (b'{"prompt": "?", "completion": "!"}', {}),
        (b'{"text": "' + b"x" * 60_000 + b'"}', {"max_line_bytes": 50_000}),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_bad_record_is_dropped_whatever_on_bad_record_says(line, changes, shards):
    """The record is in the middle, so only one of three shards reads it, and not the first record."""
    lines = [json.dumps({"text": text}).encode() for text in texts_of(range(60))]
    Path("a.jsonl").write_bytes(b"\n".join([*lines[:35], line, *lines[35:]]))
    recipe = recipe_of("a.jsonl", on_bad_record="error", **changes)
    rows = stream(recipe, shards=shards)

    found = one_pass(rows)

    assert sorted(names_of(found)) == sorted(f"r{number}" for number in range(60))
    lost = Counter()
    for position in rows.positions.values():
        lost += Counter(
            {kind: n for kind, n in position.places[0].before.items() if kind not in ("used", "cut")}
        )
    assert lost == {"unreadable": 1}


def test_bad_lines_at_the_end_of_a_file_are_counted_once_after_a_resume():
    write_lines("a.jsonl", range(12))
    with Path("a.jsonl").open("a") as file:
        file.write("no json\n" * 2000)
    recipe = recipe_of(["a.jsonl", write_lines("b.jsonl", range(20, 30))], max_dropped=1)
    whole = stream(recipe)
    rows = [whole[index] for index in range(50)]

    assert rows[43]["stream"].places[0].counts["unreadable"] == 4000
    for taken, row in enumerate(rows[:-1], start=1):
        after = stream(recipe)
        after.passed(row["stream"])
        found = after[0]
        assert (plain(found), found["stream"]) == (plain(rows[taken]), rows[taken]["stream"])


@pytest.mark.parametrize(("shards", "reader"), [(1, 0), (3, 1)])
def test_records_of_another_format_from_the_1100th_on_are_bad(shards, reader):
    """As in a prepared set, the first record of the file decides, even for a shard that does not read it."""
    records = [{"text": f"r{number} " + "." * 99} for number in range(1100)]
    others = [{"prompt": "?", "completion": f"r{number}"} for number in range(1100, 1200)]
    recipe = recipe_of(write_jsonl(Path("a.jsonl"), [*records, *others]), max_dropped=0.3)
    rows = stream(recipe, shards=shards)

    found = one_pass(rows)

    assert sorted(names_of(found)) == sorted(f"r{number}" for number in range(1100))
    before = [position.places[0].before for position in rows.positions.values()]
    assert sum(counts.get("unreadable", 0) for counts in before) == 100
    ledger = read_split(unstreamed(recipe, on_bad_record="drop"), TOKENIZER).ledger
    assert sum(n for (kind, _), n in ledger.totals.items() if kind == "unreadable") == 100


def test_another_format_in_a_json_array_is_bad_for_a_shard_that_does_not_read_the_first():
    records = [{"prompt": "?", "completion": f"r{number}"} for number in range(16)]
    records += [{"text": f"r{number}"} for number in range(16, 20)]
    Path("a.json").write_text(json.dumps([*records, {"prompt": "?", "completion": "r20"}]))
    rows = stream(recipe_of("a.json", stage="sft", max_dropped=1), shards=2)

    row = rows[1]

    assert names_of([row]) == ["r20"]
    assert dict(row["stream"].places[0].counts) == {"used": 1, "unreadable": 4}


def test_too_many_drops_stop_the_stream_after_a_thousand_documents():
    good, long = {"prompt": "?", "completion": "yes"}, {"prompt": "?", "completion": "y" * 60}
    path = write_jsonl(Path("a.jsonl"), [good] * 900 + [long] * 400)
    recipe = recipe_of(path, stage="sft", overflow="drop", shuffle_buffer=500, max_dropped=0.01)

    with pytest.raises(DataError) as error:
        one_pass(stream(recipe))

    assert str(error.value).startswith("data.train: ")
    assert " documents of the stream cannot be trained on; got " in str(error.value)
    assert " dropped: longer than max_length; fix: raise data.max_length, correct the documents" in str(
        error.value
    )


def test_a_shard_without_a_document_is_refused():
    with pytest.raises(DataError) as error:
        one_pass(stream(recipe_of(write_lines("a.jsonl", range(20))), shards=40))

    assert str(error.value).startswith("data.train: no document to train on for shard ")
    assert str(error.value).endswith(
        " of 40; fix: use fewer processes or train.dataloader_num_workers, or set data.streaming: false"
    )


def test_a_source_that_is_mixed_needs_a_document_for_each_shard():
    sources = write_mixed()
    write_lines("b.jsonl", range(2))

    with pytest.raises(DataError, match=r"^data\.train\.1: no document to train on for shard 2 of 2"):
        one_pass(stream(recipe_of(sources), shards=2))


# --- a run


def test_the_head_is_the_first_thousand_documents_of_each_source():
    recipe = recipe_of([write_lines("a.jsonl", range(1200)), write_lines("b.jsonl", range(3))])

    head = load_examples(to_head(recipe).data)

    assert len(head) == 1003
    assert head.places[999:1001] == ["a.jsonl:1000", "b.jsonl:1"]


def test_commands_report_that_they_use_the_head_and_prepare_refuses(capsys):
    write_lines("a.jsonl", range(20))
    save_folder(Path("m"), tiny_model(), TOKENIZER)
    Path("recipe.yaml").write_text(
        "stage: pretrain\nmodel: {name_or_path: ./m}\n"
        "data: {train: a.jsonl, streaming: true, max_length: 48, cache_dir: cache}\n"
        "train: {output_dir: run, max_steps: 5, use_cpu: true}\n"
    )

    codes = [main([command, "recipe.yaml"]) for command in ("inspect", "doctor", "prepare")]

    said = capsys.readouterr()
    assert codes == [0, 0, 2]
    assert "stream: the first 1,000 documents of each source" in said.out
    assert "8 rows of a stream; only its first documents are checked" in said.out
    assert (
        "error: data.streaming: streamed data are not prepared in advance; fix: start hf-clm train"
        in said.err
    )


def test_a_run_has_one_shard_per_worker_of_each_process():
    recipe = recipe_of(write_mixed((3, 1)), mixing={"by": "tokens"})
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
    assert rows.plan == StreamPlan(rows=120, batch_rows=2, shards=8, shares=(3.0, 1.0), by="tokens")
    assert rows.seed == 7
    arguments.train_sampling_strategy, arguments.dataloader_num_workers = "sequential", 0
    assert build_stream(recipe, TOKENIZER, arguments=arguments).seed is None
    assert len(build_stream(recipe, TOKENIZER, arguments=arguments).positions) == 4
