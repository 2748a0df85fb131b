"""The key of a prepared set: the content of all that decides it, and nothing else."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer, write_jsonl

from hf_clm.config import Recipe
from hf_clm.data.cache import cache_folder, find_place, load_early, read_splits
from hf_clm.errors import DataError
from hf_clm.tokenizer import use_chat_template

RECORDS = [{"prompt": "a", "completion": "x" * n} for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)


def build_recipe(stage: str = "sft", **data: Any) -> Recipe:
    content = {"train": ["a.jsonl"], "max_length": 16, "cache_dir": "cache"} | data
    sections = {"stage": stage, "model": {"name_or_path": "m"}, "train": {"output_dir": "run"}}
    return Recipe.model_validate({**sections, "data": content})


def key(recipe: Recipe | None = None, tokenizer: Any = None, *, seed: int = 0) -> str:
    place = find_place(recipe or build_recipe(), tokenizer or byte_tokenizer(), seed=seed)
    assert place is not None
    return place.key


def test_the_folder_is_the_key_in_the_cache_and_the_files_are_those_of_the_data(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", RECORDS)

    place = find_place(build_recipe(train=["b.jsonl"], eval=["a.jsonl"]), byte_tokenizer(), seed=0)

    assert place is not None
    assert (place.folder, place.files) == (tmp_path / "cache" / place.key, ["b.jsonl", "a.jsonl"])


def test_the_same_content_has_the_same_key_touched_renamed_or_in_another_folder(tmp_path):
    before = key()

    os.utime("a.jsonl", (1, 1))
    shutil.copy("a.jsonl", "b.jsonl")
    (tmp_path / "other").mkdir()
    shutil.copy("a.jsonl", "other/z.jsonl")

    assert key() == before
    assert key(build_recipe(train=["b.jsonl"])) == before
    assert key(build_recipe(train=["other"])) == before
    assert key(build_recipe(train=[str(tmp_path / "other/z.jsonl")], cache_dir="elsewhere")) == before


def test_one_byte_of_the_data_is_another_key():
    before = key()

    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(text.replace("xxx", "xxy"))

    assert key() != before


def test_the_type_and_the_order_of_files_belong_to_the_content():
    shutil.copy("a.jsonl", "a.json")
    write_jsonl(Path("b.jsonl"), RECORDS[:1])

    assert key(build_recipe(train=["a.json"])) != key()
    assert key(build_recipe(train=["a.jsonl", "b.jsonl"])) != key(build_recipe(train=["b.jsonl", "a.jsonl"]))
    assert key(build_recipe(train=["a.jsonl"], eval=["b.jsonl"])) != key(
        build_recipe(train=["a.jsonl", "b.jsonl"])
    )


@pytest.mark.parametrize(
    "data",
    [
        {"max_length": 17},
        {"overflow": "drop"},
        {"packing": "none"},
        {"train_on": "last_turn"},
        {"special_tokens_in_text": "allow"},
        {"max_dropped": 0.5},
        {"duplicates": "drop"},
        {"on_bad_record": "drop"},
        {"strict": True},
        {"eval_fraction": 0.4},
        {"train": [{"path": "a.jsonl", "format": "prompt_completion"}]},
        {"train": [{"path": "a.jsonl", "fields": {"prompt": "completion", "completion": "prompt"}}]},
    ],
    ids=str,
)
def test_an_option_of_the_data_is_another_key(data):
    assert key(build_recipe(**data)) != key()


def test_the_stage_is_part_of_the_key_and_what_is_the_default_may_be_said():
    assert key(build_recipe("pretrain")) != key()
    assert key(build_recipe(overflow="keep_target", packing="best_fit")) == key()


def test_the_seed_counts_only_where_it_chooses_what_is_held_out():
    share = build_recipe(eval_fraction=0.4)

    assert key(seed=1) == key(seed=0)
    assert key(share, seed=1) != key(share, seed=0)


def test_vocabulary_template_and_special_tokens_of_the_tokenizer_are_part_of_the_key():
    chat = byte_tokenizer()
    use_chat_template(chat, "chatml")

    tokenizers = [
        byte_tokenizer(),
        chat,
        byte_tokenizer(merges=[("a", "b")]),
        byte_tokenizer(eos="<|im_end|>"),
    ]

    assert len({key(tokenizer=tokenizer) for tokenizer in tokenizers}) == 4


def test_a_tokenizer_that_was_used_has_the_key_of_a_fresh_one():
    used = byte_tokenizer()
    used("abc", truncation=True, max_length=2, padding="max_length")

    assert key(tokenizer=used) == key()


def test_without_a_cache_there_is_no_place():
    assert find_place(build_recipe(cache_dir=None), byte_tokenizer(), seed=0) is None


@pytest.mark.parametrize(("revision", "is_kept"), [(None, False), ("main", False), ("0" * 40, True)])
def test_data_on_the_hub_are_kept_where_a_commit_is_named(revision, is_kept):
    """A branch may say something else tomorrow."""
    recipe = build_recipe(train=[{"path": "someone/something", "revision": revision}])

    assert (find_place(recipe, byte_tokenizer(), seed=0) is not None) == is_kept


def test_data_that_are_not_there_are_refused():
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        find_place(build_recipe(train=["missing.jsonl"]), byte_tokenizer(), seed=0)


def test_the_environment_moves_the_default_cache_and_no_other(monkeypatch, tmp_path):
    default = build_recipe(cache_dir="~/.cache/hf_clm").data
    monkeypatch.setenv("HF_CLM_CACHE", "/somewhere")
    assert str(cache_folder(default)) == "/somewhere"
    assert cache_folder(build_recipe().data) == tmp_path / "cache"

    monkeypatch.delenv("HF_CLM_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder(default)) == "/home/me/.cache/hf_clm"


def test_sets_that_were_not_prepared_are_made_and_nothing_is_written():
    splits = read_splits(build_recipe(eval_fraction=0.4), byte_tokenizer(), seed=0)

    assert {name: len(split.examples) for name, split in splits.items()} == {"train": 2, "eval": 1}
    assert not Path("cache").exists()


def test_examples_are_read_early_for_a_tokenizer_that_is_trained_on_them():
    trained = build_recipe().model_copy(
        update={"tokenizer": Recipe.model_fields["tokenizer"].default.model_copy(update={"train": object()})}
    )

    assert load_early(build_recipe(), 0) == {}
    assert [len(examples) for examples in load_early(trained, 0).values()] == [3]
