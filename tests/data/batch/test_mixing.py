"""Mixing sources: how much of each source, and which rows, depending on the seed alone."""

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import byte_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hf_clm.data.batch.mixing import (
    MixOptions,
    RecordCounts,
    apportion,
    draw_anew,
    draw_in_passes,
    mix_rows,
    nearest,
    temper,
    to_amounts,
)
from hf_clm.data.label.datasets import TokenizedRows
from hf_clm.data.prepared.block import BlockMaker
from hf_clm.data.prepared.cache import read_splits
from hf_clm.data.proof.proof import prove_mix
from hf_clm.data.split import Split, settle_splits
from hf_clm.errors import DataError, RecipeError
from hf_clm.pages.inspection import View, inspect
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.training.arguments import training_arguments
from hf_clm.training.prepare import prepare
from hf_clm.training.run import train
from hf_clm.training.summary import guessing_loss

SEED = 42


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- how much of each source


@pytest.mark.parametrize(
    ("totals", "options", "amounts"),
    [
        ([40, 40], {"weights": [3, 1]}, [60, 20]),  # as much as both hold together
        ([4, 3], {"weights": [3, 1], "size": 8}, [6, 2]),
        ([40, 40], {"weights": [0.1, 0.2], "size": 30}, [10, 20]),  # tenths are exact
        ([6, 90], {}, [6, 90]),  # by size: every row once
        ([6, 90], {"size": 32}, [2, 30]),
        ([6, 5], {"epochs": [2, 0.5]}, [12, Fraction(5, 2)]),
        ([7, 90], {"by": "tokens", "weights": [2, 1], "size": 10}, [Fraction(20, 3), Fraction(10, 3)]),
    ],
)  # fmt: skip
def test_the_amounts_follow_the_weights_the_epochs_or_the_sizes(totals, options, amounts):
    assert to_amounts(totals, MixOptions(**options)) == amounts


@pytest.mark.parametrize(
    ("totals", "temperature", "weights"),
    [
        ([100, 4], 1, [100, 4]),
        ([100, 4], 2, [1, 0.2]),  # the square roots are 10 and 2
        ([1000, 1], 3, [1, 0.1]),  # the cube roots are 10 and 1
        ([10, 5], 0.5, [1, 0.25]),  # below 1 the large source weighs even more
    ],
)
def test_a_temperature_evens_out_the_sizes(totals, temperature, weights):
    assert temper(totals, temperature) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("amounts", "whole"),
    [
        ([Fraction(10, 3)] * 3, [4, 3, 3]),
        ([Fraction(1, 2), Fraction(5, 2)], [1, 2]),
        ([Fraction(1, 4), Fraction(11, 4)], [0, 3]),
        ([6, 2], [6, 2]),
    ],
)
def test_shares_of_rows_are_rounded_without_changing_their_sum(amounts, whole):
    assert apportion(amounts) == whole


@pytest.mark.parametrize(
    ("amount", "rows"), [(0, 0), (2, 0), (3, 1), (5, 1), (7, 1), (8, 2), (10, 2), (11, 3), (99, 3)]
)
def test_rows_are_drawn_up_to_the_closest_amount(amount, rows):
    """Rows of 5, 5 and 1 tokens add up to 0, 5, 10 or 11. An amount of 7.5 is a tie."""
    assert nearest(np.array([5, 10, 11]), Fraction(amount)) == rows


def test_a_tie_draws_fewer_rows():
    assert nearest(np.array([5, 10]), Fraction(15, 2)) == 1


# --- which rows


def test_every_row_is_drawn_before_any_row_repeats():
    """14 draws from 4 rows are three passes and half of a fourth."""
    rows = draw_in_passes(np.ones(4, dtype=np.int64), 14, seed=SEED, source=0)

    assert sorted(Counter(rows.tolist()).values()) == [3, 3, 4, 4]


def test_each_pass_and_source_has_a_different_order():
    sizes = np.ones(1000, dtype=np.int64)
    first, second, other = (
        draw_in_passes(sizes, amount, seed=SEED, source=source)[passes * 1000 :].tolist()
        for amount, source, passes in ((10, 0, 0), (1010, 0, 1), (10, 1, 0))
    )

    assert len(first) == len(second) == len(other) == 10
    assert first != second != other != first


def test_rows_may_repeat_early_with_replacement():
    """In 1,000 independent draws from 1,000 rows, 368 +- 10 rows (1 in e) are expected to be missing."""
    rows = draw_anew(np.ones(1000, dtype=np.int64), 1000, seed=SEED, source=0)

    assert len(rows) == 1000
    assert 328 < 1000 - len(set(rows.tolist())) < 408


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    amount=st.fractions(min_value=0, max_value=4000),
    seed=st.integers(0, 2**32 - 1),
    source=st.integers(0, 5),
)
def test_no_row_repeats_early_and_the_amount_is_met_within_half_a_row(sizes, amount, seed, source):
    rows = draw_in_passes(np.array(sizes), amount, seed=seed, source=source)

    times = np.bincount(rows, minlength=len(sizes))
    assert times.max() - times.min() <= 1
    assert abs(sum(sizes[row] for row in rows) - amount) <= Fraction(max(sizes), 2)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    amount=st.fractions(min_value=0, max_value=4000),
    seed=st.integers(0, 2**32 - 1),
)
def test_with_replacement_the_amount_is_met_within_half_a_row(sizes, amount, seed):
    rows = draw_anew(np.array(sizes), amount, seed=seed, source=0)

    assert abs(sum(sizes[row] for row in rows) - amount) <= Fraction(max(sizes), 2)


@settings(deadline=None)
@given(totals=st.lists(st.integers(1, 500), min_size=1, max_size=5), data=st.data())
def test_the_default_epoch_has_the_size_of_all_sources(totals, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(totals), max_size=len(totals)))

    amounts = to_amounts(totals, MixOptions(weights=weights))

    assert [amount / sum(amounts) for amount in amounts] == [Fraction(w, sum(weights)) for w in weights]
    assert sum(amounts) == sum(totals)


def tokenized(lengths: list[int], sources: list[int]) -> TokenizedRows:
    """Returns rows of these lengths with labels for all tokens but the first."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.arange(offsets[-1], dtype=np.int32)
    labels[offsets[:-1]] = -1
    return TokenizedRows(np.abs(labels), labels, offsets, np.array(sources))


def counts_of(rows: TokenizedRows) -> RecordCounts:
    """Returns the counts of each example of the rows."""
    size = int(rows.sources.max()) + 1
    learned = [int((rows.labels[a:b] >= 0).sum()) for a, b in pairwise(rows.offsets.tolist())]
    counts = (np.bincount(rows.sources, weights, size) for weights in (None, rows.lengths, learned))
    return RecordCounts(*(found.astype(np.int64) for found in counts))


def test_all_rows_of_a_split_example_are_drawn_together():
    """Example 0 is rows 0 and 1, example 1 was dropped, 2 is row 2; the second source has rows 3 and 4."""
    rows = tokenized([4, 4, 3, 5, 5], [0, 0, 2, 3, 4])
    options = MixOptions(epochs=[3, 0.5])

    mix = mix_rows(counts_of(rows), np.array([0, 0, 0, 1, 1]), sources=["a", "b"], options=options, seed=SEED)

    first, second = mix.shares
    assert mix.times[:3].tolist() == [3, 0, 3]
    assert sorted(mix.times[3:].tolist()) == [0, 1]
    assert Counter(mix.numbers.tolist())[0] == Counter(mix.numbers.tolist())[1] == 3
    assert [b for a, b in zip(mix.numbers, mix.numbers[1:], strict=False) if a == 0] == [1, 1, 1]
    assert (first.rows_there, first.rows, first.rows_left_out, first.passes) == (2, 6, 0, 3.0)
    assert (first.tokens, first.target_tokens) == (3 * (4 + 4 + 3), 3 * (3 + 3 + 2))
    assert (second.rows_there, second.rows, second.rows_left_out, second.passes) == (2, 1, 1, 0.5)
    assert (second.asked, second.drawn) == (1 / 7, 1 / 7)


@pytest.mark.parametrize(("by", "drawn"), [("tokens", [15, 30]), ("target_tokens", [12, 24])])
def test_shares_of_tokens_are_met_with_complete_rows(by, drawn):
    """Sources of 2 and 6 rows of 5 tokens with 4 labels; weights 1 and 2 give 3 and 6 rows."""
    rows = tokenized([5] * 8, list(range(8)))
    options = MixOptions(by=by, weights=[1, 2], size=sum(drawn))

    mix = mix_rows(counts_of(rows), np.array([0] * 2 + [1] * 6), sources=["a", "b"], options=options, seed=1)

    assert [getattr(share, by) for share in mix.shares] == drawn
    assert [share.drawn for share in mix.shares] == [1 / 3, 2 / 3]


# --- from a recipe to rows

# "a", N letters and the end token: N + 3 tokens with N + 1 labels.
SHORT = [{"instruct": "a\n", "input": "", "label": "x" * n} for n in (1, 2, 3, 4)]
PATHS = ["a.jsonl", "b.jsonl"]
LONG = [{"instruct": "b\n", "input": "", "label": "y" * n} for n in (10, 11, 12)]


def build_recipe(folder: Path, *sources: dict[str, Any], **data: Any) -> Recipe:
    """Writes two sources of 4 and 3 rows."""
    write_jsonl(folder / "a.jsonl", SHORT)
    write_jsonl(folder / "b.jsonl", LONG)
    given = [{"path": path, **more} for path, more in zip(PATHS, sources or ({}, {}), strict=True)]
    section = {"train": given, "max_length": 24, "cache_dir": str(folder / "cache"), **data}
    model = {"name_or_path": None, "init": "scratch", "config": TINY}
    run = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "logging_steps": 1,
    }
    return Recipe.model_validate(
        {
            "stage": "sft",
            "model": model,
            "tokenizer": {"name_or_path": save_tokenizer(folder)},
            "data": section,
            "doctor": {"round_trip": "off"},
            "train": {**run, "save_strategy": "no"},
        }
    )


TINY = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "n_positions": 64,
}


def save_tokenizer(folder: Path) -> str:
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def build(recipe: Recipe) -> Split:
    return read_splits(recipe, byte_tokenizer(), seed=SEED)["train"]


def letters(split: Split) -> Counter[str]:
    """Returns how often each letter occurs in the training rows."""
    rows = [split.dataset[number]["input_ids"] for number in range(len(split.dataset))]
    return Counter(chr(letter) for row in rows for letter in row if letter < 128)


def test_the_example_of_the_readme(tmp_path):
    """Weights 3 and 1 and 8 rows: one pass over all 4 rows and a half, and 2 of 3 rows."""
    mix = build(build_recipe(tmp_path, {"weight": 3}, {"weight": 1}, mixing={"size": 8})).mix

    assert mix is not None
    assert [share.rows for share in mix.shares] == [6, 2]
    assert [share.rows_left_out for share in mix.shares] == [0, 1]
    assert [(share.asked, share.drawn) for share in mix.shares] == [(0.75, 0.75), (0.25, 0.25)]
    assert sorted(mix.times[:4].tolist()) == [1, 1, 2, 2]
    assert sorted(mix.times[4:].tolist()) == [0, 1, 1]


@pytest.mark.parametrize(
    "packing", [{"packing": "none"}, {"packing": "best_fit"}, {"packing": "none", "tokens_per_batch": 48}]
)
def test_the_rows_contain_what_was_drawn(tmp_path, packing):
    """3 passes over a, whose labels are 10 letters, and 2 over b, whose labels are 33."""
    split = build(build_recipe(tmp_path, {"epochs": 3}, {"epochs": 2}, **packing))

    assert letters(split) == {"x": 30, "y": 66, "a": 12, "b": 6, "\n": 18}
    assert (split.tokens, split.target_tokens) == (3 * 22 + 2 * 42, 3 * 14 + 2 * 36)


def test_a_stream_contains_what_was_drawn(tmp_path):
    recipe = build_recipe(tmp_path, {"epochs": 3}, {"epochs": 2})
    recipe = recipe.model_copy(update={"stage": "pretrain"})

    split = build(recipe)

    assert sum(row["labels"][1:].tolist().count(ord("y")) for row in split.dataset) == 66
    assert (split.tokens, split.target_tokens) == (3 * 22 + 2 * 42, 3 * 18 + 2 * 39)


def test_packed_rows_without_a_drawn_row_are_detected(tmp_path):
    """The packer receives the first row once more than it was drawn."""
    split = build(build_recipe(tmp_path, {"epochs": 3}, {"epochs": 2}, packing="best_fit"))
    assert split.mix is not None
    assert prove_mix(split) == ["mixed     the packed rows contain each label as often as its row was drawn"]

    split.mix.times[0] += 1

    with pytest.raises(DataError, match=r"packing has 18 of 19 rows"):
        prove_mix(split)


def test_packed_rows_with_a_wrong_row_are_detected(tmp_path):
    """Two rows with equal label counts are exchanged, so the sums are equal."""
    write_jsonl(tmp_path / "same.jsonl", [SHORT[0], SHORT[0]])
    recipe = build_recipe(tmp_path, {"epochs": 1}, {"epochs": 2}, packing="best_fit")
    same = recipe.data.train[0].model_copy(update={"path": "same.jsonl"})
    data = recipe.data.model_copy(update={"train": [same, recipe.data.train[1]]})
    split = build(recipe.model_copy(update={"data": data}))
    assert split.mix is not None

    split.mix.times[:2] = [2, 0]

    with pytest.raises(DataError, match=r"packing has 8 of 8 rows, or repeats or loses parts of some"):
        prove_mix(split)


def test_the_loss_of_guessing_weights_labels_by_their_draws(tmp_path):
    """Of 114 labels, 30 are x, 66 are y and 18 are the end token."""
    split = build(build_recipe(tmp_path, {"epochs": 3}, {"epochs": 2}))

    shares = [30 / 114, 66 / 114, 18 / 114]
    assert guessing_loss(split) == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_without_weights_epochs_and_mixing_nothing_is_drawn(tmp_path):
    split = build(build_recipe(tmp_path))

    assert split.mix is None
    assert letters(split) == {"x": 10, "y": 33, "a": 4, "b": 3, "\n": 7}


def test_the_rows_depend_on_the_seed_alone(tmp_path):
    recipe = build_recipe(tmp_path, {"epochs": 7.5}, {"epochs": 9.4})
    splits = read_splits(recipe, byte_tokenizer(), seed=SEED)
    first, again, other = (settle_splits(splits, recipe, seed=seed)["train"].mix for seed in (1, 1, 2))

    assert first and again and other
    assert first.numbers.tolist() == again.numbers.tolist() != other.numbers.tolist()
    assert first.to_json() == again.to_json()
    assert first.to_json()["sha256"] != other.to_json()["sha256"]


def test_an_epoch_mixes_the_sources_instead_of_concatenating_them(tmp_path):
    mix = build(build_recipe(tmp_path, {"epochs": 10}, {"epochs": 10})).mix

    assert mix is not None
    is_second = (mix.numbers >= 4).tolist()
    assert is_second != sorted(is_second)


def test_held_out_rows_are_never_drawn(tmp_path):
    recipe = build_recipe(tmp_path, {"epochs": 3}, {"epochs": 3}, eval_fraction=0.3)
    splits = read_splits(recipe, byte_tokenizer(), seed=SEED)

    assert splits["eval"].mix is None
    assert len(splits["eval"].dataset) >= 1
    held_out = {str(example) for example in splits["eval"].examples.examples[:]}
    trained = {str(example) for example in splits["train"].examples.examples[:]}
    assert len(held_out) == 2 and len(trained) == 5 and not held_out & trained
    assert splits["train"].mix and splits["train"].mix.times.tolist() == [3, 3, 3, 3, 3]


# --- cached once, whatever the weights


def test_changing_weights_does_not_tokenize_again(tmp_path, monkeypatch):
    recipe = build_recipe(tmp_path, {"weight": 1}, {"weight": 1})
    tokenizer, arguments = byte_tokenizer(), training_arguments(recipe)
    prepare(recipe, tokenizer, arguments=arguments)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("prepared again")

    monkeypatch.setattr(BlockMaker, "make", refuse)
    others = [
        build_recipe(tmp_path, {"weight": 3}, {"weight": 1}, mixing={"by": "target_tokens"}),
        build_recipe(tmp_path, {"epochs": 3}, {}),
        build_recipe(tmp_path, mixing={"temperature": 5.0, "replacement": True}),
    ]
    found = [prepare(other, tokenizer, arguments=arguments).splits["train"].mix for other in others]

    assert all(found)
    assert found[1] and found[1].times.tolist() == [3, 3, 3, 3, 1, 1, 1]


def test_cached_and_fresh_data_give_the_same_epoch(tmp_path):
    recipe = build_recipe(tmp_path, {"weight": 1}, {"weight": 3}, packing="best_fit")
    arguments = training_arguments(recipe)
    mixed = [
        prepare(recipe, byte_tokenizer(), arguments=arguments).splits["train"],  # prepared
        prepare(recipe, byte_tokenizer(), arguments=arguments).splits["train"],  # opened
        build(recipe),
    ]

    rows = [[row["input_ids"].tolist() for row in split.dataset] for split in mixed]
    assert rows[0] == rows[1] == rows[2]


# --- what a run reports


def test_a_run_reports_requested_and_actual_shares(tmp_path, capsys):
    recipe = build_recipe(tmp_path, {"weight": 1}, {"weight": 1}, mixing={"by": "tokens", "size": 84})

    train(recipe)

    run = json.loads((tmp_path / "run" / "run.json").read_text())
    first, second = run["mixing"]["sources"]
    assert (run["mixing"]["by"], run["mixing"]["replacement"]) == ("tokens", False)
    assert first["source"] == "a.jsonl"
    assert (first["asked"], first["rows_there"], first["rows_left_out"]) == (0.5, 4, 0)
    assert 40 <= first["tokens"] <= 44  # nearest to 42: two passes of 22, or but the last row of 4 tokens
    assert (second["tokens"], second["rows"], second["passes"], second["rows_left_out"]) == (42, 3, 1.0, 0)
    assert run["train"]["tokens"] == first["tokens"] + 42
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mixing", "by", "tokens", "asked", "drawn", "rows", "tokens", "targets", "passes"] in lines
    shown = next(line[1:] for line in lines if line[:1] == ["b.jsonl"])
    assert shown[0] == "50.00%"
    assert shown[2:] == ["3", "42", "36", "1.00"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| b.jsonl | " in card
    assert "share of the tokens" in card
    assert "mixed by tokens" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_without_a_mix_reports_no_shares(tmp_path, capsys):
    train(build_recipe(tmp_path))

    assert "mixing" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert "mixing  " not in capsys.readouterr().out
    assert "times" not in parquet.read_table(tmp_path / "run" / "ledger.parquet").column_names


@pytest.mark.parametrize("cache_dir", ["kept", None])
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_the_ledger_has_the_draws_and_places_of_each_record(tmp_path, packing, cache_dir):
    held = {"eval": [write_jsonl(tmp_path / "c.jsonl", [{"instruct": "c\n", "input": "", "label": "z"}])]}
    kept = cache_dir and str(tmp_path / cache_dir)
    recipe = build_recipe(tmp_path, {"epochs": 3}, {"epochs": 2}, packing=packing, cache_dir=kept, **held)
    prepared = prepare(recipe, byte_tokenizer(), arguments=training_arguments(recipe))

    prepared.write_ledger(tmp_path / "ledger.parquet")

    ledger = parquet.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [row["times"] for row in ledger] == [3, 3, 3, 3, 2, 2, 2, 1]
    assert [row["split"] for row in ledger] == ["train"] * 7 + ["eval"]
    assert sum(row["times"] * row["kept_tokens"] for row in ledger[:7]) == 3 * 22 + 2 * 42
    dataset = prepared.splits["train"].dataset
    rows: Any = [list(dataset[number]["input_ids"]) for number in range(len(dataset))]
    for entry in ledger[4:7]:  # the last row of b is "b\n" with 12 letters
        written = [*map(ord, "b\n"), *[ord("y")] * (entry["tokens"] - 3), 256]
        assert len(entry["rows"]) == 2
        for number in entry["rows"]:
            text = rows[number]
            assert any(text[i : i + len(written)] == written for i in range(len(text)))
    assert ledger[7]["rows"] == [0]


def test_the_inspector_shows_the_rows_of_the_mix(tmp_path):
    recipe = build_recipe(tmp_path, {"epochs": 2}, {"epochs": 1}, packing="none")
    train(recipe)

    text = inspect(str(tmp_path / "run"), [], view=View(rows=11, color="never"))

    assert "rows: 11 (11 shown), of 11 documents" in text
    assert [text.count(f"a.jsonl:{line} ") for line in (1, 2, 3, 4)] == [2, 2, 2, 2]
    assert [text.count(f"b.jsonl:{line} ") for line in (1, 2, 3)] == [1, 1, 1]
    assert "mixing:" in text
    assert "duplicate" not in text.split("row 0")[1]


# --- what is refused


def refusal(recipe: Recipe) -> str:
    with pytest.raises(DataError) as error:
        build(recipe)
    return str(error.value)


def test_a_share_below_half_a_row_is_refused(tmp_path):
    recipe = build_recipe(tmp_path, {"weight": 1000}, {"weight": 1})

    assert "b.jsonl: the share is less than half a row; got 0.00699 rows" in refusal(recipe)


@pytest.mark.parametrize(
    ("weights", "mixing"),
    [
        ([{"weight": 1}, {"weight": 1e12}], {"size": 10**13}),
        ([{"epochs": 1}, {"epochs": 1e12}], None),
        ([{"weight": 1}, {"weight": 1}], {"size": 10**15}),
        ([{"weight": 1}, {"weight": 1}], {"size": 10**15, "by": "tokens", "replacement": True}),
    ],
)
def test_an_epoch_beyond_memory_is_refused(tmp_path, weights, mixing):
    recipe = build_recipe(tmp_path, *weights, **({"mixing": mixing} if mixing else {}))

    assert "jsonl: an epoch of more than 1,000,000,000 rows; got " in refusal(recipe)


def test_a_source_without_a_row_is_refused(tmp_path):
    """The rows of b.jsonl are 13 to 15 tokens long."""
    sizes = {"max_length": 12, "overflow": "drop", "max_dropped": 0.5}
    recipe = build_recipe(tmp_path, {"weight": 1}, {"weight": 1}, **sizes)

    assert refusal(recipe).startswith("b.jsonl: has no rows to draw; fix: remove it from data.train; ")


def test_a_source_that_only_repeats_another_is_refused(tmp_path):
    recipe = build_recipe(tmp_path, {"weight": 1}, {"weight": 1}, duplicates="drop")
    write_jsonl(tmp_path / "b.jsonl", SHORT[:2])

    assert refusal(recipe).startswith("b.jsonl: has no rows to draw")


def test_sources_with_equal_paths_are_distinguished(tmp_path):
    recipe = build_recipe(tmp_path, {"epochs": 1}, {"epochs": 2})
    again = [recipe.data.train[0], recipe.data.train[0].model_copy(update={"epochs": 0.5})]
    data = recipe.data.model_copy(update={"train": again})

    mix = build(recipe.model_copy(update={"data": data})).mix

    assert mix is not None
    assert [(share.source, share.rows) for share in mix.shares] == [("a.jsonl (1)", 4), ("a.jsonl (2)", 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data.train=[{path: a, weight: 1}, {path: b}]"],
            "data.train.1 has no weight, but data.train.0 has one; got b; fix: set a weight for each source",
        ),
        (
            ["--data.train=[{path: a, weight: 1}, {path: b, epochs: 2}]"],
            "data.train.1.epochs and weight exclude each other, as both set the share of a source",
        ),
        (["--data.train=[{path: a, weight: 1}]"], "weight has no effect with a single source"),
        (["--data.train=[{path: a, weight: 0}, b]"], "data.train.0.weight: expected a number greater than 0"),
        (["--data.train=[{path: a, epochs: -1}]"], "data.train.0.epochs: expected a number greater than 0"),
        (["--data.eval=[{path: a, weight: 1}]"], "weight has no effect on a source of data.eval"),
        (["--data.eval=[{path: a, epochs: 2}]"], "epochs has no effect on a source of data.eval"),
        (
            ["--data.train=[{path: a, weight: 1}, {path: b, weight: 2}]", "--data.mixing.temperature=2.0"],
            "data.mixing.temperature derives shares from the sizes of sources, but they have weights",
        ),
        (
            ["--data.train=[{path: a, epochs: 2}, b]", "--data.mixing.temperature=2.0"],
            "data.mixing.temperature derives shares from the sizes of sources, but they have epochs",
        ),
        (
            ["--data.train=[{path: a, epochs: 2}, b]", "--data.mixing.size=20"],
            "data.mixing.size has no effect if the sources have epochs",
        ),
        (
            ["--data.mixing.stopping_strategy=all_exhausted"],
            "data.mixing.stopping_strategy is a key of version 0.4; fix: remove it, and set size",
        ),
        (["--data.mixing.size=0"], "data.mixing.size: expected a number greater than or equal to 1"),
        (["--data.mixing.by=row"], "data.mixing.by: expected one of rows, tokens, target_tokens"),
    ],
)
def test_a_mix_without_effect_or_with_contradictions_is_refused(tmp_path, words, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage: sft\nmodel: {name_or_path: m}\ndata: {train: a}\ntrain: {output_dir: r}\n")

    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, words)

    assert message in str(error.value)
