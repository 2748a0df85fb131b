"""From the data section of a recipe to datasets, with everything counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import X, byte_tokenizer, document, prompted, write_jsonl

from hf_clm.config import Recipe
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.build import (
    Split,
    build_split,
    check_dropped,
    load_examples,
    load_splits,
    split_examples,
    texts_of,
)
from hf_clm.data.label.labels import Fate
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError, ExitCode
from hf_clm.schema import Chat, Document, Segment, Tokens, whole_text
from hf_clm.train_tokenizer import train_characters

# "a\n" and N letters and the end token: 4, 5, 6, 7 tokens, of which 2, 3, 4, 5 are learned.
RECORDS = [{"instruct": "a\n", "input": "", "label": "x" * n} for n in range(1, 5)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "say.jsonl", RECORDS)


def build_recipe(stage: str = "sft", **data: Any) -> Recipe:
    content = {"train": [{"path": "say.jsonl"}], "max_length": 16} | data
    train = {"output_dir": "run"}
    return Recipe.model_validate(
        {"stage": stage, "model": {"name_or_path": "m"}, "data": content, "train": train}
    )


def build(stage: str = "sft", **data: Any) -> Split:
    recipe = build_recipe(stage, **data)
    return build_split(load_splits(recipe, 42)[0], recipe, tokenizer=byte_tokenizer())


def refusal(stage: str = "sft", **data: Any) -> str:
    with pytest.raises(DataError) as error:
        build(stage, **data)
    assert error.value.exit_code == ExitCode.DATA
    return str(error.value)


def test_examples_keep_their_order_and_their_place(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "t"}])
    recipe = build_recipe(train=[{"path": "say.jsonl"}, {"path": "b.jsonl"}])

    found = load_examples(recipe.data.train, recipe.data)

    assert found.examples[0] == prompted("a\n", "x")
    assert found.examples[4] == document("t")
    assert found.places == ["say.jsonl:1", "say.jsonl:2", "say.jsonl:3", "say.jsonl:4", "b.jsonl:1"]
    assert found.formats == {"instruct", "text"}
    assert found.report.files == ["say.jsonl", "b.jsonl"]


def test_a_wrong_record_is_named_by_file_and_line(tmp_path):
    write_jsonl(tmp_path / "say.jsonl", [*RECORDS, {"instruct": "a\n", "input": "", "label": 5}])

    assert refusal().startswith("say.jsonl:5: ")


def test_wrong_records_are_skipped_and_counted_on_request(tmp_path):
    write_jsonl(
        tmp_path / "say.jsonl", [RECORDS[0], {"instruct": "a\n", "input": "", "label": 5}, *RECORDS[1:]]
    )

    split = build(on_bad_record="drop", max_dropped=0.5)

    assert len(split.rows) == 4
    assert [line.split(": ")[0] for line in split.examples.report.bad_lines] == ["say.jsonl:2"]


def test_skipped_records_count_as_dropped(tmp_path):
    write_jsonl(tmp_path / "say.jsonl", [RECORDS[0], {"instruct": "a\n", "input": "", "label": 5}])

    message = refusal(on_bad_record="drop")

    assert message.startswith("say.jsonl: 1 of 2 rows cannot be trained on")
    assert "say.jsonl:2: " in message


def test_two_schemas_in_one_file_are_an_error(tmp_path):
    write_jsonl(tmp_path / "say.jsonl", [RECORDS[0], {"text": "t"}])

    message = refusal()

    assert "say.jsonl:2" in message and "say.jsonl:1" in message


def test_unknown_keys_are_collected_or_refused(tmp_path):
    write_jsonl(tmp_path / "say.jsonl", [{**RECORDS[0], "source": "me"}])

    assert build().examples.unknown_keys == {"source"}
    assert refusal(strict=True).startswith("say.jsonl:1: ")


def test_without_a_usable_record_there_is_nothing_to_train_on(tmp_path):
    (tmp_path / "say.jsonl").write_text('{"instruct": 1}\n')

    assert refusal(on_bad_record="drop") == (
        "say.jsonl: no example to train on; got 1 records read, 1 skipped"
    )


def test_columns_are_renamed_for_each_source(tmp_path):
    write_jsonl(tmp_path / "qa.jsonl", [{"q": "a", "a": "x"}])
    fields = {"prompt": "q", "completion": "a"}
    recipe = build_recipe(train=[{"path": "qa.jsonl", "format": "prompt_completion", "fields": fields}])

    assert load_examples(recipe.data.train, recipe.data).examples == [prompted("a", "x")]


# --- held-out examples


def numbered(count: int) -> Examples:
    return Examples([document(str(n)) for n in range(count)], [f"f:{n}" for n in range(count)])


def test_a_share_is_held_out_by_the_seed_and_keeps_the_order():
    train, held_out = split_examples(numbered(10), 0.3, seed=1)
    again = split_examples(numbered(10), 0.3, seed=1)[1]
    other = split_examples(numbered(10), 0.3, seed=2)[1]

    chosen = [int(place[2:]) for place in held_out.places]
    assert len(chosen) == 3 and chosen == sorted(chosen)
    assert [int(place[2:]) for place in train.places] == [n for n in range(10) if n not in chosen]
    assert [whole_text(example) for example in held_out.examples] == [str(n) for n in chosen]
    assert again.places == held_out.places
    assert other.places != held_out.places


def test_a_limit_reads_the_first_records_of_its_source_only(tmp_path):
    write_jsonl(tmp_path / "more.jsonl", RECORDS)
    (tmp_path / "more.jsonl").open("a").write("a broken line that is never reached\n")

    found = load_splits(
        build_recipe(train=[{"path": "more.jsonl", "limit": 2}, {"path": "more.jsonl", "limit": 1}]), 0
    )

    assert found[0].places == ["more.jsonl:1", "more.jsonl:2", "more.jsonl:1"]
    assert found[0].report.records == 3


def test_of_a_single_text_the_end_is_held_out_as_a_document_of_its_own():
    read = Examples([document("abcdefghij")], ["book.txt"])

    train, held_out = split_examples(read, 0.3, seed=0)

    assert (train.examples, held_out.examples) == ([document("abcdefg")], [document("hij")])
    assert train.places == held_out.places == ["book.txt"]


@pytest.mark.parametrize("example", [prompted("a", "b"), document("abc       ")])
def test_a_single_example_that_cannot_be_divided_is_an_error(example):
    with pytest.raises(DataError, match="leaves 0 to evaluate on"):
        split_examples(Examples([example], ["x:1"]), 0.3, seed=0)


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.01), (1, 0.5), (3, 0.99)])
def test_a_share_that_leaves_a_part_empty_is_an_error(count, fraction):
    with pytest.raises(DataError) as error:
        split_examples(numbered(count), fraction, seed=0)

    assert str(error.value).startswith("data.eval_fraction: ")


def test_the_evaluation_data_come_from_their_own_files_or_from_a_share_or_are_none(tmp_path):
    write_jsonl(tmp_path / "eval.jsonl", RECORDS[:1])

    own = load_splits(build_recipe(eval=[{"path": "eval.jsonl"}]), 42)
    share = load_splits(build_recipe(eval_fraction=0.25), 42)
    none = load_splits(build_recipe(), 42)

    assert [len(part) for part in own] == [4, 1]
    assert own[1].places == ["eval.jsonl:1"]
    assert [len(part) for part in share] == [3, 1]
    assert (len(none[0]), none[1]) == (4, None)


# --- tokenizing and packing


def test_sft_learns_the_answers_and_pretraining_the_whole_texts():
    sft, pretrain = build(packing="none"), build("pretrain", packing="none")

    assert sft.dataset[1] == {"input_ids": [97, 10, 120, 120, 256], "labels": [X, X, 120, 120, 256]}
    assert pretrain.dataset[1] == {"input_ids": [97, 10, 120, 120, 256], "labels": [X, 10, 120, 120, 256]}
    assert (sft.tokens, sft.target_tokens) == (22, 14)
    assert (pretrain.tokens, pretrain.target_tokens) == (22, 18)


def test_sft_packs_whole_examples_and_pretraining_a_stream():
    sft, pretrain = build(max_length=11), build("pretrain", max_length=8)

    assert isinstance(sft.dataset, PackedDataset) and isinstance(pretrain.dataset, PackedDataset)
    assert sorted(len(sft.dataset[i]["input_ids"]) for i in range(2)) == [11, 11]  # 7 + 4 and 6 + 5
    learned = sum(label != X for i in range(len(pretrain.dataset)) for label in pretrain.dataset[i]["labels"])
    assert learned == 18


def test_without_packing_the_rows_are_the_dataset():
    split = build(packing="none")

    assert split.dataset is split.rows


def test_a_window_cuts_overlapping_pieces():
    split = build("pretrain", packing="none", window={"size": 4, "step": 2})

    assert [len(split.dataset[i]["input_ids"]) for i in range(len(split.dataset))] == [4, 4, 3, 4, 4, 4, 4, 3]


def test_rows_are_accounted_for():
    split = build(max_length=6, overflow="drop", max_dropped=0.5)

    assert split.fates == Counter({"used": 3, "dropped: longer than max_length": 1})


def test_too_many_dropped_rows_are_an_error_that_lists_the_first():
    assert refusal(max_length=4, overflow="drop") == (
        "say.jsonl: 3 of 4 rows cannot be trained on within data.max_length=4; "
        "got say.jsonl:2 (longer than max_length); say.jsonl:3 (longer than max_length); "
        "say.jsonl:4 (longer than max_length); "
        "fix: raise data.max_length, mend the rows, or allow it by data.max_dropped=0.75"
    )


def test_all_rows_dropped_are_an_error_whatever_is_allowed():
    assert refusal(max_length=2, max_dropped=1.0).startswith("say.jsonl: 4 of 4 rows cannot be trained on")


@pytest.mark.parametrize(("dropped", "allowed"), [(1, 0.25), (2, 0.5), (3, 0.75), (0, 0.0)])
def test_the_share_that_is_allowed_is_inclusive(dropped, allowed):
    fates = [Fate("dropped", "no target token")] * dropped + [Fate("used")] * (4 - dropped)

    check_dropped(numbered(4), fates, data=build_recipe(max_dropped=allowed).data)


def test_an_error_in_a_row_is_named_by_its_place(tmp_path):
    write_jsonl(tmp_path / "say.jsonl", [*RECORDS, {**RECORDS[0], "label": "<|endoftext|>"}])

    assert refusal(special_tokens_in_text="error").startswith("say.jsonl:5: the text holds a control token")


def test_overflow_error_names_the_row():
    assert refusal(max_length=6, overflow="error").startswith(
        "say.jsonl:4: longer than max_length=6; got 7 tokens"
    )


def test_a_character_without_a_token_is_named_with_its_row(tmp_path):
    write_jsonl(tmp_path / "poem.jsonl", [{"text": "abba"}, {"text": "bad 雪"}])
    recipe = build_recipe("pretrain", train=[{"path": "poem.jsonl"}])
    examples = load_splits(recipe, 42)[0]

    with pytest.raises(DataError) as error:
        build_split(examples, recipe, tokenizer=train_characters(["abba", "bd "]))

    assert str(error.value) == (
        "poem.jsonl:2: the tokenizer has no token for it; got '雪' (U+96EA); "
        "fix: take it out, or add a text that holds it to those that the tokenizer is trained on"
    )
    whole = build_split(examples, recipe, tokenizer=train_characters(["ab", "d 雪"]))
    assert whole.tokens == 4 + 1 + 5 + 1


def test_the_name_of_the_unknown_token_in_a_text_is_no_unknown_character(tmp_path):
    write_jsonl(tmp_path / "poem.jsonl", [{"text": "a <|unk|> b"}])
    recipe = build_recipe("pretrain", train=[{"path": "poem.jsonl"}])
    tokenizer = train_characters(["ab <|unk>"])

    split = build_split(load_splits(recipe, 42)[0], recipe, tokenizer=tokenizer)

    assert split.tokens == len("a <|unk|> b") + 1
    assert tokenizer.unk_token_id not in split.rows[0]["input_ids"]


def test_a_tokenizer_can_be_trained_on_every_kind_of_example():
    examples = [
        document("a"),
        prompted("b", "c"),
        Chat([{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]),
        Document([Segment("f", False), Segment("g", True)]),
        Tokens([1], [1], [1]),
    ]

    assert list(texts_of(examples)) == ["a", "b", "c", "d", "e", "f", "g"]


def test_lines_lost_in_reading_do_not_count_against_the_part_that_is_held_out():
    """2 bad lines are 2 % of 100 rows, and would be 20 % of the 10 that are held out."""
    lines = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(98)] + ["{", "["]
    Path("rows.jsonl").write_text("\n".join(lines))
    data = {"on_bad_record": "drop", "eval_fraction": 0.1, "max_dropped": 0.05}
    recipe = build_recipe(train=[{"path": "rows.jsonl", "format": "prompt_completion"}], **data)

    train, held_out = load_splits(recipe, 0)

    assert held_out is not None
    assert (len(train), len(held_out)) == (88, 10)
    assert (len(train.report.bad_lines), held_out.report.bad_lines) == (2, [])
    build_split(held_out, recipe, tokenizer=byte_tokenizer())
