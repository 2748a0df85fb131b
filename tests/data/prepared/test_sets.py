"""Reading the sets of a recipe, before they are tokenized."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import document, prompted, write_jsonl
from prepared_sets import recipe_of

from hf_clm.data.prepared import chunks, sets
from hf_clm.data.prepared.block import read_raw
from hf_clm.data.prepared.sets import load_early, load_examples, open_sets, read_examples, split_text, to_head
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import Tokenizer, TokenizerTraining
from hf_clm.schema import whole_text

RECORDS = [{"prompt": "a", "completion": "x" * n} for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)


def test_examples_keep_their_order_their_place_and_their_source():
    write_jsonl(Path("b.jsonl"), [{"text": "t"}])

    found = load_examples(recipe_of(["a.jsonl", "b.jsonl"]).data)

    assert list(found.examples) == [
        prompted("a", "x"),
        prompted("a", "xx"),
        prompted("a", "xxx"),
        document("t"),
    ]
    assert found.places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    assert found.origins.tolist() == [0, 0, 0, 1]
    assert (found.formats, found.report.files) == ({"prompt_completion", "text"}, ["a.jsonl", "b.jsonl"])
    assert found.report.records == 4


def test_the_first_bad_record_is_raised_or_all_are_skipped():
    lines = [json.dumps(record) for record in RECORDS]
    Path("a.jsonl").write_text("\n".join([lines[0], "{", *lines[1:], '{"prompt": 1, "completion": "x"}']))

    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        load_examples(recipe_of(["a.jsonl"]).data)
    found = load_examples(recipe_of(["a.jsonl"], on_bad_record="drop").data)

    assert found.places == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert [line.split(": ")[0] for line in found.report.bad_lines] == ["a.jsonl:2", "a.jsonl:5"]
    assert found.report.records == 3


def test_unknown_keys_are_collected_or_refused():
    write_jsonl(Path("a.jsonl"), [{**RECORDS[0], "source": "me"}])

    assert load_examples(recipe_of(["a.jsonl"]).data).unknown_keys == {"source"}
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        load_examples(recipe_of(["a.jsonl"], strict=True).data)


def test_columns_are_renamed_for_each_source():
    write_jsonl(Path("qa.jsonl"), [{"q": "a", "a": "x"}])
    fields = {"prompt": "q", "completion": "a"}
    source = {"path": "qa.jsonl", "format": "prompt_completion", "fields": fields}

    assert list(load_examples(recipe_of([source]).data).examples) == [prompted("a", "x")]


def test_records_of_two_formats_in_a_file_are_an_error(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50)
    write_jsonl(Path("a.jsonl"), [*({"text": "x" * 20} for _ in range(30)), RECORDS[0]])

    with pytest.raises(DataError) as error:
        load_examples(recipe_of(["a.jsonl"]).data)

    assert str(error.value).startswith(
        "a.jsonl:31: the record has format prompt_completion, but a.jsonl:1 has format text"
    )


# --- a single text


def parts_of(recipe: Recipe) -> dict[str, list[str]]:
    return {name: list(map(whole_text, read_examples(recipe.data, name))) for name in open_sets(recipe.data)}


def test_the_end_of_a_single_text_becomes_a_separate_document():
    Path("book.txt").write_text("abcdefghij")
    recipe = recipe_of(["book.txt"], stage="pretrain", eval_fraction=0.3)

    read = {name: read_raw(next(part.blocks), recipe.data) for name, part in open_sets(recipe.data).items()}

    assert parts_of(recipe) == {"train": ["abcdefg"], "eval": ["hij"]}
    assert [part.places for part in read.values()] == [["book.txt:1"], ["book.txt:1"]]
    assert [part.formats for part in read.values()] == [{"text"}, {"text"}]


@pytest.mark.parametrize(
    ("example", "fraction"),
    [(prompted("a", "b"), 0.3), (document("abc    "), 0.3), (document("   abc"), 0.7)],
)
def test_a_single_example_without_two_parts_is_not_split(example, fraction):
    assert split_text(example, fraction) is None


def test_only_a_single_text_without_an_evaluation_set_is_split():
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("abcdefghij")

    assert parts_of(recipe_of(["a.txt", "b.txt"], eval_fraction=0.3)) == {"train": ["abcdefghij"] * 2}
    assert parts_of(recipe_of(["a.txt"], eval=["b.txt"])) == {"train": ["abcdefghij"], "eval": ["abcdefghij"]}
    assert parts_of(recipe_of(["a.txt"])) == {"train": ["abcdefghij"]}


# --- read before there is a tokenizer


def trained(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"tokenizer": Tokenizer(train=TokenizerTraining())})


def early(*, seed: int = 0, **data: Any) -> dict[str, list[str]]:
    loaded = load_early(trained(recipe_of(["a.jsonl"], **data)), seed)
    return {name: [list(example.texts)[-1] for example in examples] for name, examples in loaded.items()}


def test_examples_are_read_early_only_to_train_a_tokenizer():
    assert load_early(recipe_of(["a.jsonl"]), 0) == {}
    assert early() == {"train": ["x", "xx", "xxx"]}


def test_held_out_and_dropped_records_do_not_train_the_tokenizer():
    write_jsonl(Path("a.jsonl"), [*RECORDS, RECORDS[0], {"prompt": 1, "completion": "bad"}])

    found = early(eval_fraction=0.4, duplicates="drop", on_bad_record="drop")

    assert sorted([*found["train"], *found["eval"]]) == ["x", "xx", "xxx"]
    assert (len(found["train"]), len(found["eval"])) == (2, 1)


def test_without_a_usable_record_there_is_nothing_to_train_a_tokenizer_on():
    Path("a.jsonl").write_text('{"prompt": 1}\n')

    with pytest.raises(DataError, match=r"^a\.jsonl: no example to train on"):
        early(on_bad_record="drop")


def test_the_head_of_each_source_of_a_stream_is_prepared(monkeypatch):
    monkeypatch.setattr(sets, "STREAM_HEAD", 2)
    streamed = recipe_of(["a.jsonl", "a.jsonl"], stage="pretrain", streaming=True)

    assert [source.limit for source in to_head(streamed).data.train] == [2, 2]
    assert to_head(recipe_of(["a.jsonl"])).data.train[0].limit is None
