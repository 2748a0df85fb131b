"""Preparing in blocks: the result does not depend on their order, and every record is accounted for."""

import json
import weakref
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import EOS, IM_END, X, byte_tokenizer, prove_records, write_jsonl
from prepared_sets import backwards, content_of, differing, open_set, recipe_of, table_of, write_set
from pyarrow import ipc, parquet

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.prepared import chunks, parts, prepare
from hf_clm.data.prepared.block import Block, BlockMaker
from hf_clm.data.prepared.cache import read_splits
from hf_clm.data.prepared.chunks import RawBlock
from hf_clm.data.proof.certificate import Failure
from hf_clm.data.proof.texts import LABEL_CHECKS
from hf_clm.data.read import faults
from hf_clm.data.split import Split
from hf_clm.errors import DataError, ExitCode
from hf_clm.schema import whole_text
from hf_clm.text.tokenizer import use_chat_template

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo, <|im_end|> you"}]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"{'word ' * (n % 23)}{n}\n好"} for n in range(60)],
    "prompt_completion": [{"prompt": f"p{n}", "completion": "<|pad|>x" * (n % 9 + 1)} for n in range(60)],
    "messages": [{"messages": [{**CHAT[0], "content": f"Hi {n}"}, CHAT[1]]} for n in range(60)],
    "segments": [
        {"segments": [{"text": "a" * (n % 31 + 1), "train": False}, {"text": f"b{n}", "train": True}]}
        for n in range(60)
    ],
    "tokenized": [{"input_ids": [1, 2, 3, n], "labels": [-100, 2, 3, n]} for n in range(60)],
    "weighted": [{"prompt": f"p{n}", "completion": "x", "weight": 1.0 if n < 40 else 0.5} for n in range(60)],
}
# "say\n" is context (4 tokens); N letters and the end token are targets: 6, 7, 8 tokens.
RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in range(1, 41)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 400)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    monkeypatch.setattr(chunks, "CHUNK_RECORDS", 3)


def tokenizer() -> Any:
    made = byte_tokenizer()
    use_chat_template(made, "chatml")
    return made


def write_records(records: list[Any], *, path: str = "a.jsonl") -> None:
    """Writes one record per line; a str is written unchanged."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(path).write_text("".join(f"{line}\n" for line in lines))


def prepared(records: list[Any], **data: Any) -> dict[str, Split]:
    write_records(records)
    return write_set(recipe_of(["a.jsonl"], **data)).splits


def refusal(records: list[Any], **data: Any) -> str:
    with pytest.raises(DataError) as error:
        prepared(records, **data)
    assert error.value.exit_code == ExitCode.DATA
    assert list(Path("cache").iterdir()) == []
    return str(error.value)


def rows_of(split: Split) -> list[dict[str, list[int]]]:
    return [{key: list(map(int, values)) for key, values in row.items()} for row in split.dataset]


# --- what datasets opens


def test_datasets_opens_the_rows_and_the_ledger():
    write_records([*RECORDS, "{", RECORDS[0], {**RECORDS[3], "instruct": "long\n" * 30}])
    recipe = recipe_of(
        ["a.jsonl"], eval_fraction=0.1, duplicates="drop", on_bad_record="drop", overflow="drop"
    )

    write_set(recipe)

    train, held_out = (table_of(Path("cache/key"), name) for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (36, 4)
    assert {tuple(row) for row in train + held_out} == {("input_ids", "labels", "place")}
    first = next(row for row in train + held_out if row["place"] == "a.jsonl:1")
    assert first == {
        "input_ids": [*b"say\n", ord("x"), EOS],
        "labels": [X, X, X, X, ord("x"), EOS],
        "place": "a.jsonl:1",
    }
    lines = [line for name in ("train", "eval") for line in table_of(Path("cache/key/ledger"), name)]
    assert sorted(int(line["place"].split(":")[1]) for line in lines) == list(range(1, 44))
    fates = {line["place"]: (line["fate"], line["reason"].split(": ")[0]) for line in lines}
    assert [fates[f"a.jsonl:{number}"] for number in (40, 41, 42, 43)] == [
        ("used", ""),
        ("unreadable", "not valid JSON"),
        ("duplicate", "of a.jsonl:1"),
        ("dropped", "longer than max_length"),
    ]


@pytest.mark.parametrize("at", [0, 35])
def test_a_late_record_with_a_weight_adds_the_column(at):
    records = [dict(record) for record in RECORDS]
    records[at]["weight"] = 0.5

    splits = prepared(records, packing="none")

    found = table_of(Path("cache/key"))
    assert found[at]["weights"] == [0.5] * (at + 6)
    assert all(row["weights"] in (None, [1.0] * len(row["labels"])) for row in found if row is not found[at])
    assert splits["train"].rows[at]["weights"] == [0.5] * (at + 6)
    assert splits["train"].rows[20]["weights"] == [1.0] * 26


DATA = [
    {},
    {"eval_fraction": 0.2},
    {"eval_fraction": 0.2, "duplicates": "drop"},
    {"duplicates": "drop"},
    {"eval": ["b.jsonl"], "duplicates": "drop"},
    {"eval": ["b.jsonl"]},
    {"max_length": 24, "overflow": "drop"},
    {"max_length": 24, "overflow": "truncate"},
    {"train": [{"path": "a.jsonl", "limit": 7}, {"path": "b.jsonl"}]},
]


@pytest.mark.parametrize("data", DATA, ids=str)
def test_every_record_has_one_line_in_the_ledger_and_the_totals_balance(data):
    records = FORMATS["prompt_completion"]
    write_records([*records[:20], "{", *records[20:], *records[3:9], {"prompt": 1, "completion": "x"}])
    write_records([*records[:3], {"prompt": "P1", "completion": "<|pad|>X  <|pad|>x"}], path="b.jsonl")
    files = data.get("train") or ["a.jsonl"]
    recipe = recipe_of(files, on_bad_record="drop", **{k: v for k, v in data.items() if k != "train"})

    splits = write_set(recipe).splits

    lines = {name: table_of(Path("cache/key/ledger"), name) for name in splits}
    read = 4 * ("eval" in data) + (68 if "train" not in data else 7 + 4)
    places = [(line["place"], line["source"], name) for name in lines for line in lines[name]]
    assert len(places) == len(set(places)) == read
    for name, split in splits.items():
        rows = table_of(Path("cache/key"), name)
        assert sum(line["rows"] for line in lines[name]) == len(rows) == len(split.rows)
        assert sum(line["kept_tokens"] for line in lines[name]) == sum(len(r["input_ids"]) for r in rows)
        assert sum(line["kept_targets"] for line in lines[name]) == sum(
            label != X for row in rows for label in row["labels"]
        )
        assert split.id_counts.sum() == split.tokens
        assert split.label_counts.sum() == split.target_tokens


# --- results do not depend on who makes the blocks


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("stage", "packing"), [("sft", "best_fit"), ("sft", "none"), ("pretrain", "stream"), ("pretrain", "none")]
)
def test_blocks_made_in_another_order_give_identical_files(stage, packing, format):
    write_jsonl(Path("a.jsonl"), FORMATS[format])
    write_jsonl(Path("b.jsonl"), FORMATS[format][:5])
    recipe = recipe_of(["a.jsonl", "b.jsonl"], stage=stage, packing=packing)

    write_set(recipe, Path("cache/one"), tokenizer=tokenizer())
    write_set(recipe, Path("cache/other"), tokenizer=tokenizer(), make_blocks=backwards)

    found = content_of(Path("cache/one"))
    assert differing(found, content_of(Path("cache/other"))) == []
    assert len(found) == 11 + 4 * (packing != "none")


@pytest.mark.parametrize("data", DATA, ids=str)
def test_decisions_about_the_complete_set_do_not_depend_on_the_order_of_blocks(data):
    records = FORMATS["prompt_completion"]
    write_records([*records[:20], "{", *records[20:], *records[3:9], {"prompt": 1, "completion": "x"}])
    write_records([*records[:3], {"prompt": "P1", "completion": "<|pad|>X  <|pad|>x"}], path="b.jsonl")
    files = data.get("train") or ["a.jsonl"]
    recipe = recipe_of(files, on_bad_record="drop", **{k: v for k, v in data.items() if k != "train"})

    write_set(recipe, Path("cache/one"))
    write_set(recipe, Path("cache/other"), make_blocks=backwards)

    assert differing(content_of(Path("cache/one")), content_of(Path("cache/other"))) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_set_of_many_blocks_has_the_rows_of_one_block(format, monkeypatch):
    write_jsonl(Path("a.jsonl"), FORMATS[format])
    recipe = recipe_of(["a.jsonl"], eval_fraction=0.2, duplicates="drop")
    many = write_set(recipe, Path("cache/many"), tokenizer=tokenizer())
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 1 << 20)

    one = write_set(recipe, Path("cache/one"), tokenizer=tokenizer())

    for name, split in one.splits.items():
        assert rows_of(many.splits[name]) == rows_of(split)
        assert list(many.splits[name].ledger.fates) == list(split.ledger.fates)
        assert (len(split.stored.batches), len(many.splits[name].stored.batches) > 4) == (1, True)
    facts = [[found.proof["facts"][name]["ledger"] for name in one.splits] for found in (one, many)]
    assert facts[0] == facts[1]


def write_as(kind: str, records: list[dict[str, Any]]) -> str:
    table, path = pyarrow.Table.from_pylist(records), f"z.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=17)
    elif kind == "arrow":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    elif kind == "stream.arrow":
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind in ("jsonl.gz", "jsonl.zst"):
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        with pyarrow.CompressedOutputStream(path, {"gz": "gzip", "zst": "zstd"}[kind[6:]]) as file:
            file.write(text)
    else:
        lines = (f'"{record["prompt"]}\nnext","{record["completion"]}"\n' for record in records)
        Path(path).write_text("prompt,completion\n" + "".join(lines))
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow", "jsonl.gz", "jsonl.zst", "csv"])
def test_places_do_not_depend_on_the_blocks_of_a_file(kind):
    records = FORMATS["prompt_completion"]
    recipe = recipe_of([write_as(kind, records)], packing="none", max_length=100)

    split = write_set(recipe).splits["train"]

    place = f"z.{kind}:" if "jsonl" in kind else f"z.{kind}: record "
    assert list(split.ledger.places) == [f"{place}{number}" for number in range(1, 61)]
    end = "\nnext" if kind == "csv" else ""
    assert rows_of(split)[7]["input_ids"] == [*f"p7{end}{records[7]['completion']}".encode(), EOS]


def test_the_labels_are_those_of_the_tokenizer_called_alone():
    """Compares with ids from transformers and labels made by hand, independently of the blocks."""
    write_jsonl(Path("a.jsonl"), FORMATS["prompt_completion"])
    answers = [{"role": "assistant", "content": f"No {n}"} for n in range(20)]
    write_jsonl(Path("b.jsonl"), [{"messages": [CHAT[0], answer]} for answer in answers])
    plain, chat = byte_tokenizer(), tokenizer()

    texts = read_splits(
        recipe_of(["a.jsonl"], packing="none", max_length=100, cache_dir=None), plain, seed=0
    )["train"]
    chats = read_splits(recipe_of(["b.jsonl"], packing="none", cache_dir=None), chat, seed=0)["train"]

    for row, record in zip(texts.dataset, FORMATS["prompt_completion"], strict=True):
        prompt = plain(record["prompt"], split_special_tokens=True)["input_ids"]
        target = plain(record["completion"], split_special_tokens=True)["input_ids"]
        assert row == {"input_ids": [*prompt, *target, EOS], "labels": [X] * len(prompt) + [*target, EOS]}
    prompt = chat.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    for row, answer in zip(chats.dataset, answers, strict=True):
        whole = chat.apply_chat_template([CHAT[0], answer], tokenize=True, return_dict=False)
        assert row["input_ids"] == whole[: len(row["input_ids"])]
        assert row["input_ids"][-1] == IM_END
        assert row["labels"] == [X] * len(prompt) + row["input_ids"][len(prompt) :]


def test_memory_use_is_bounded_by_one_block():
    alive: list[weakref.ref[Block]] = []
    most = []

    def make_blocks(maker: BlockMaker, blocks: Iterable[RawBlock]) -> Generator[Block, None, None]:
        for raw in blocks:
            block = maker.make(raw)
            alive.append(weakref.ref(block))
            most.append(sum(found() is not None for found in alive))
            yield block
            del block

    write_records(RECORDS)
    write_set(recipe_of(["a.jsonl"], eval_fraction=0.2, duplicates="drop"), make_blocks=make_blocks)

    assert len(most) > 5
    assert max(most) <= 2  # the one that was written is let go when the next is there


# --- duplicates, held-out records, evaluation


def test_duplicates_are_kept_by_default_and_dropped_on_request():
    records = [*RECORDS[:30], *RECORDS[2:4], *RECORDS[30:], RECORDS[2]]

    kept = prepared(records)["train"]
    dropped = write_set(recipe_of(["a.jsonl"], duplicates="drop"), Path("cache/other")).splits["train"]

    assert (len(kept.rows), len(dropped.rows)) == (43, 40)
    assert kept.ledger.totals == {("used", ""): 43}
    assert dropped.ledger.totals == {("used", ""): 40, ("duplicate", ""): 3}
    assert [dropped.ledger.places[at] for at in dropped.ledger.where("duplicate")] == [
        *("a.jsonl:31", "a.jsonl:32", "a.jsonl:43")
    ]
    assert dropped.ledger.reasons("duplicate") == ["of a.jsonl:3", "of a.jsonl:4", "of a.jsonl:3"]
    assert [len(row["input_ids"]) for row in dropped.rows] == [n + 5 for n in range(1, 41)]


def test_the_seed_selects_held_out_records_and_order_is_kept():
    write_records(RECORDS)
    recipe = recipe_of(["a.jsonl"], eval_fraction=0.2)

    sets = [write_set(recipe, Path("cache", str(n)), seed=seed).splits for n, seed in enumerate((1, 1, 2))]

    numbers = [
        [[int(place[8:]) for place in found[name].ledger.places] for name in ("train", "eval")]
        for found in sets
    ]
    assert [len(part) for part in numbers[0]] == [32, 8]
    assert sorted([*numbers[0][0], *numbers[0][1]]) == list(range(1, 41))
    assert numbers[0] == [sorted(part) for part in numbers[0]] == numbers[1] != numbers[2]
    assert [len(row["labels"]) - 5 for row in sets[0]["eval"].rows] == numbers[0][1]


def test_the_evaluation_data_come_from_their_own_files_or_from_a_share_or_are_none():
    write_records(RECORDS)
    write_records([{**RECORDS[0], "instruct": "tell\n"}], path="b.jsonl")

    own = write_set(recipe_of(["a.jsonl"], eval=["b.jsonl"]), Path("cache/own")).splits
    share = write_set(recipe_of(["a.jsonl"], eval_fraction=0.1), Path("cache/share")).splits
    none = write_set(recipe_of(["a.jsonl"]), Path("cache/none")).splits

    assert {name: len(split.rows) for name, split in own.items()} == {"train": 40, "eval": 1}
    assert list(own["eval"].ledger.places) == ["b.jsonl:1"]
    assert {name: len(split.rows) for name, split in share.items()} == {"train": 36, "eval": 4}
    assert list(none) == ["train"]


def test_the_end_of_a_single_text_is_held_out():
    text = "".join(f"Line {number} of the book.\n" for number in range(100))
    Path("book.txt").write_text(text)
    recipe = recipe_of(["book.txt"], stage="pretrain", eval_fraction=0.1)

    stored = write_set(recipe)
    write_set(recipe, Path("cache/other"), make_blocks=backwards)
    again = open_set(recipe, files=["book.txt"])

    assert again is not None
    for found in (stored, again):
        parts = [whole_text(split.examples.examples[0]) for split in found.splits.values()]
        assert ("".join(parts), len(parts[1])) == (text, round(len(text) * 0.1))
        assert [split.examples.report.records for split in found.splits.values()] == [1, 1]
    assert differing(content_of(Path("cache/key")), content_of(Path("cache/other"))) == []


@pytest.mark.parametrize("example", [RECORDS[0], {"text": "abc       "}])
def test_a_single_record_that_cannot_be_split_is_an_error(example):
    assert "leaves 0 to evaluate on" in refusal([example], eval_fraction=0.3)


def test_evaluation_rows_that_are_training_rows_are_refused_over_max_leakage():
    write_records(
        [RECORDS[30], {**RECORDS[0], "instruct": "SAY  ", "label": " X"}, *RECORDS[:2]], path="b.jsonl"
    )
    write_records(RECORDS[1:])

    with pytest.raises(DataError) as error:
        write_set(recipe_of(["a.jsonl"], eval=["b.jsonl"], max_leakage=0.4))

    assert str(error.value).startswith(
        "data.eval: 50.0% of the evaluation rows are training rows (2 exactly, 0 up to case and "
        "whitespace); got b.jsonl:1, b.jsonl:4; fix: "
    )


def test_leakage_of_rows_and_prompts_is_reported_and_recorded(tmp_path):
    evaluation = [
        {"instruct": "say\n", "input": "", "label": "xxx"},  # a training row
        {"instruct": "Say ", "input": "", "label": " XXX "},  # equal up to case and whitespace
        {"instruct": "say\n", "input": "", "label": "another answer"},  # its prompt alone
        {"instruct": "tell\n", "input": "", "label": "xxx"},
    ]

    proof = prove_records(tmp_path, RECORDS, evaluation=evaluation, max_leakage=1.0, max_length=64)

    assert proof.facts["leakage"] == {"exact": 1, "normalised": 1, "prompts": 3}
    assert "note      50.0% of the evaluation rows are training rows" in proof.lines
    assert "note      75.0% of the evaluation prompts are training prompts" in proof.lines


def test_a_held_out_record_with_an_equal_training_record_leaks():
    write_records([*RECORDS, *RECORDS])

    found = write_set(recipe_of(["a.jsonl"], eval_fraction=0.3))
    clean = write_set(recipe_of(["a.jsonl"], eval_fraction=0.3, duplicates="drop"), Path("cache/b"))

    assert found.proof["facts"]["leakage"]["exact"] > 5
    assert clean.proof["facts"]["leakage"]["exact"] == 0


# --- records that cannot be used


BAD = {"instruct": "say\n", "input": "", "label": 7}


def test_errors_of_later_blocks_are_listed_with_the_first(monkeypatch):
    """Uses a set that is too large to be checked before it is prepared."""
    monkeypatch.setattr(faults, "CHECKED_BYTES", 100)
    records = [*RECORDS[:20], BAD, *RECORDS[20:30], "{", *RECORDS[30:], BAD]
    write_records(records)
    faults.check_data(recipe_of(["a.jsonl"]))  # leaves it to the preparation

    for make_blocks in (prepare.in_turn, backwards):
        with pytest.raises(DataError) as error:
            write_set(recipe_of(["a.jsonl"]), make_blocks=make_blocks)

        lines = str(error.value).splitlines()
        assert lines[0] == (
            "3 errors in the data; data.on_bad_record: drop skips 3 of them, up to data.max_dropped"
        )
        assert [line.split()[0] for line in lines if line.startswith("  ")] == [
            *("a.jsonl:21", "a.jsonl:43", "a.jsonl:32")
        ]


def test_a_single_error_has_its_file_and_line():
    assert refusal([*RECORDS, BAD]).startswith("a.jsonl:41: ")


def test_the_search_for_more_errors_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(parts, "FAULT_SEARCH_SECONDS", -1.0)

    assert refusal([BAD, *RECORDS, BAD]).startswith("a.jsonl:1: ")


def test_dropped_records_are_unreadable_in_the_ledger():
    split = prepared([*RECORDS, BAD, "{"], on_bad_record="drop")["train"]

    lines = {line["place"]: line for line in table_of(Path("cache/key/ledger"))}
    assert len(lines) == 42
    assert [lines[f"a.jsonl:{n}"]["fate"] for n in (40, 41, 42)] == ["used", "unreadable", "unreadable"]
    assert lines["a.jsonl:42"]["reason"].startswith("not valid JSON")
    assert [line.split(": ")[0] for line in split.examples.report.bad_lines] == ["a.jsonl:41", "a.jsonl:42"]
    assert (len(split.rows), split.examples.report.records) == (40, 40)


@pytest.mark.parametrize(("dropped", "is_allowed"), [(1, True), (2, True), (3, False)])
def test_max_dropped_limits_unreadable_records_inclusively(dropped, is_allowed):
    records = [*RECORDS[: 40 - dropped], *[BAD] * dropped]

    if is_allowed:
        assert len(prepared(records, on_bad_record="drop", max_dropped=0.05)["train"].rows) == 40 - dropped
    else:
        message = refusal(records, on_bad_record="drop", max_dropped=0.05)
        assert message.startswith("a.jsonl: 3 of 40 records cannot be trained on; got a.jsonl:38: ")
        assert message.endswith("; fix: correct the records, or set data.max_dropped=0.075")


def test_max_dropped_limits_too_long_records_and_lists_the_first():
    assert refusal(RECORDS[:4], max_length=6, overflow="drop", max_dropped=0.1) == (
        "a.jsonl: 3 of 4 records cannot be trained on within data.max_length=6; "
        "got a.jsonl:2 (longer than max_length); a.jsonl:3 (longer than max_length); "
        "a.jsonl:4 (longer than max_length); "
        "fix: raise data.max_length, correct the records, or set data.max_dropped=0.75"
    )


def test_a_text_without_room_in_a_row_is_refused_with_the_way_to_split_it():
    assert refusal([{"text": "a long text " * 10}], max_length=32) == (
        "a.jsonl: 1 of 1 records cannot be trained on within data.max_length=32; "
        "got a.jsonl:1 (no whole target fits in max_length); "
        "fix: raise data.max_length, set overflow: split for plain text, or correct the records"
    )


def test_all_rows_dropped_are_an_error_whatever_is_allowed():
    message = refusal(RECORDS[:4], max_length=2, overflow="drop")

    assert message.startswith("a.jsonl: 4 of 4 records cannot be trained on")


def test_bad_lines_do_not_count_against_the_held_out_split():
    """Two bad lines are 5 % of 42 records, but would be a third of the 4 held-out records."""
    found = prepared([*RECORDS, BAD, "{"], on_bad_record="drop", eval_fraction=0.1, max_dropped=0.06)

    assert {name: len(split.rows) for name, split in found.items()} == {"train": 36, "eval": 4}
    assert [len(split.examples.report.bad_lines) for split in found.values()] == [2, 0]


def test_without_a_usable_record_there_is_nothing_to_train_on():
    message = refusal([BAD, BAD], on_bad_record="drop")

    assert message.startswith("a.jsonl: no usable record in 2 lines; got a.jsonl:1: ")


def test_an_empty_file_among_others_is_refused():
    Path("a.jsonl").write_text("\n" * 50)
    write_records(RECORDS[:3], path="b.jsonl")

    with pytest.raises(DataError, match=r"a\.jsonl: empty file \(0 records\)"):
        write_set(recipe_of(["a.jsonl", "b.jsonl"]))


def test_blank_lines_and_unknown_keys_are_counted():
    split = prepared([*RECORDS[:20], "", {**RECORDS[20], "more": 1}, "", *RECORDS[21:]])["train"]

    assert (split.examples.report.blank_lines, split.examples.report.records) == (2, 40)
    assert (split.examples.formats, split.examples.unknown_keys) == ({"instruct"}, {"more"})


def test_labels_that_are_not_certified_are_refused_with_their_place(monkeypatch):
    make = BlockMaker.make

    def fail(self: BlockMaker, raw: RawBlock) -> Block:
        block = make(self, raw)
        if raw.number == 1:
            block.certificate.enter(Failure(2, "a.jsonl:9", next(iter(LABEL_CHECKS)), "one", "another"))
        return block

    monkeypatch.setattr(BlockMaker, "make", fail)

    message = refusal(RECORDS)

    assert message.startswith("a.jsonl:9: the labels are not certified (1 ")


# --- packing and mixing


def test_sft_packs_whole_examples_and_pretraining_a_stream():
    sft = prepared(RECORDS[:4], max_length=15)["train"]
    pretrain = write_set(recipe_of(["a.jsonl"], stage="pretrain", max_length=8), Path("cache/b")).splits[
        "train"
    ]

    assert isinstance(sft.dataset, PackedDataset) and isinstance(pretrain.dataset, PackedDataset)
    assert sorted(len(row["input_ids"]) for row in sft.dataset) == [15, 15]  # 9 + 6 and 8 + 7
    assert sum(label != X for row in pretrain.dataset for label in row["labels"]) == 30 - 4
    assert (pretrain.tokens, pretrain.target_tokens) == (30, 26)


def test_a_window_cuts_overlapping_pieces():
    split = prepared(RECORDS[:2], stage="pretrain", packing="none", window={"size": 4, "step": 2})["train"]

    assert [len(row["input_ids"]) for row in split.dataset] == [4, 4, 4, 4, 3]


def test_a_set_is_mixed_when_it_is_opened_and_holds_every_row():
    write_records(RECORDS[:10])
    write_records([{**record, "instruct": "tell\n"} for record in RECORDS[:30]], path="b.jsonl")
    sources: list[Any] = [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 1.0}]
    recipe = recipe_of(sources, packing="none", mixing={"size": 20}, cache_dir=None)

    train = read_splits(recipe, byte_tokenizer(), seed=0)["train"]

    assert (len(train.rows), len(train.dataset)) == (40, 20)
    assert train.mix is not None
    assert (train.mix.times[:10].sum(), train.mix.times[10:].sum()) == (10, 10)


def test_a_prepared_set_has_its_proof_and_its_files():
    write_records(RECORDS)

    stored = write_set(recipe_of(["a.jsonl"]))

    certificate = stored.proof["facts"]["train"]["certificate"]
    assert (certificate["rows"], certificate["valid"]) == (40, True)
    assert stored.proof["facts"]["train"]["ledger"]["used"]["rows"] == 40
    assert isinstance(stored.splits["train"].examples.report.files, list)
    assert stored.splits["train"].examples.report.files == ["a.jsonl"]


def test_the_first_examples_of_a_split_are_stored_with_it():
    write_records(RECORDS)

    found: Any = write_set(recipe_of(["a.jsonl"], eval_fraction=0.2)).splits
    Path("a.jsonl").unlink()

    for split in found.values():
        letters = [list(example.texts)[-1] for example in split.examples.examples[:5]]
        assert [f"a.jsonl:{len(text)}" for text in letters] == list(split.ledger.places[:5])


def test_a_long_preparation_reports_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "PROGRESS_SECONDS", 0.0)
    records = [{"prompt": f"{n}?\n", "completion": "x" * 100} for n in range(1_200)]
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 50_000)
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", records), max_length=256)

    write_set(recipe, tmp_path / "prepared")

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert lines[-1] == "preparing train: 1,200 records"
