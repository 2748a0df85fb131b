"""The key of a prepared set depends on everything that affects its rows, and on nothing else."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer, write_jsonl
from prepared_sets import recipe_of

import hf_clm.schema
from hf_clm.data.prepared import cache
from hf_clm.data.prepared.cache import find_place, open_place, read_splits
from hf_clm.data.prepared.prepare import write_prepared
from hf_clm.data.read.formats import custom_modules
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import Data, Source, cache_folder
from hf_clm.text.tokenizer import use_chat_template

RECORDS = [{"prompt": "a", "completion": "x" * n} for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)


def build_recipe(stage: str = "sft", **data: Any) -> Recipe:
    files = data.pop("train", ["a.jsonl"])
    return recipe_of(files, stage=stage, **{"max_dropped": 0.01, "max_leakage": 0.01, **data})


def key(recipe: Recipe | None = None, tokenizer: Any = None, *, seed: int = 0, launch: str = "") -> str:
    place = find_place(
        recipe or build_recipe(), tokenizer or byte_tokenizer(), seed=seed, aside=Path("aside"), launch=launch
    )
    return place.key


def test_the_folder_is_the_key_in_the_cache_and_the_files_are_those_of_the_data(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", RECORDS)
    recipe = build_recipe(train=["b.jsonl"], eval=["a.jsonl"])

    place = find_place(recipe, byte_tokenizer(), seed=0, aside=Path("aside"))

    assert (place.folder, place.files) == (tmp_path / "cache" / place.key, ["b.jsonl", "a.jsonl"])
    assert (len(place.key), place.why_not) == (32, "")


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


def test_changing_one_byte_of_the_data_changes_the_key():
    before = key()

    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(text.replace("xxx", "xxy"))

    assert key() != before


def test_changing_one_byte_of_a_large_cached_file_changes_the_key(monkeypatch):
    monkeypatch.setattr(cache, "MIN_CACHED_BYTES", 10)
    monkeypatch.setattr(cache, "SETTLED_NS", -1)
    before = key()
    assert len(list(Path("cache/.hashes").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(cache, "hash_file", lambda file: pytest.fail("it was read before"))
        assert key() == before

    text = Path("a.jsonl").read_text()
    times = os.stat("a.jsonl").st_mtime_ns
    Path("a.jsonl").write_text(text.replace("xxx", "xxy"))
    os.utime("a.jsonl", ns=(times, times))

    assert key() != before


def test_the_type_and_the_order_of_files_belong_to_the_content():
    shutil.copy("a.jsonl", "a.json")
    write_jsonl(Path("b.jsonl"), RECORDS[:1])

    keys = [
        key(build_recipe(train=["a.json"])),
        key(build_recipe(train=["a.jsonl"])),
        key(build_recipe(train=["a.jsonl", "b.jsonl"])),
        key(build_recipe(train=["b.jsonl", "a.jsonl"])),
        key(build_recipe(train=["a.jsonl"], eval=["b.jsonl"])),
    ]

    assert len(set(keys)) == 5


# Another value of each key of a recipe's data, with the other keys that it requires.
OTHERS: dict[str, dict[str, Any]] = {
    "eval_fraction": {"eval_fraction": 0.4},
    "max_length": {"max_length": 17},
    "overflow": {"overflow": "drop"},
    "render": {"render": "plain"},
    "packing": {"packing": "none"},
    "tokens_per_batch": {"tokens_per_batch": 99, "packing": "none"},
    "window": {"window": {"size": 4, "step": 2}, "packing": "none"},
    "train_on": {"train_on": "last_turn"},
    "reasoning": {"reasoning": "drop"},
    "special_tokens_in_text": {"special_tokens_in_text": "allow"},
    "max_dropped": {"max_dropped": 0.5},
    "duplicates": {"duplicates": "drop"},
    "max_leakage": {"max_leakage": 0.5},
    "on_bad_record": {"on_bad_record": "drop"},
    "max_line_bytes": {"max_line_bytes": 1000},
    "strict": {"strict": True},
    "allow_empty_prompt": {"allow_empty_prompt": True},
}
ASIDE: dict[str, dict[str, Any]] = {
    "mixing": {"mixing": {"size": 2}},
    "eval_train_rows": {"eval_train_rows": 1},
    "cache_dir": {"cache_dir": "elsewhere"},
    "without": {"without": ["a.jsonl:1"]},
}
CONTENT = {"train", "eval", "streaming", "shuffle_buffer"}  # which have tests of their own, or are of streams
OF_A_SOURCE: dict[str, Any] = {
    "format": "prompt_completion",
    "fields": {"prompt": "completion", "completion": "prompt"},
    "template": {"text": "{prompt}"},
    "overflow": "drop",
    "limit": 2,
    "quoting": "none",
}
OF_OTHER_SOURCES = {"split", "name", "revision", "set"}  # of folders, datasets on the Hub, evaluation sets
ASIDE_OF_A_SOURCE: dict[str, Any] = {"weight": 2.0, "epochs": 2.0}


def test_every_key_of_the_data_is_tried():
    assert set(OTHERS) == Data.deciding()
    assert {*OTHERS, *ASIDE, *CONTENT} == set(Data.model_fields)
    assert {*OF_A_SOURCE, *OF_OTHER_SOURCES} == Source.deciding()
    assert {*OF_A_SOURCE, *OF_OTHER_SOURCES, *ASIDE_OF_A_SOURCE, "path"} == set(Source.model_fields)


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_that_affects_the_rows_changes_the_key(name):
    needed = {option: value for option, value in OTHERS[name].items() if option != name}

    assert key(build_recipe("pretrain" if name == "window" else "sft", **OTHERS[name])) != key(
        build_recipe("pretrain" if name == "window" else "sft", **needed)
    )


@pytest.mark.parametrize("name", ASIDE)
def test_an_option_that_does_not_affect_the_rows_keeps_the_key(name):
    assert key(build_recipe(**ASIDE[name])) == key()


def test_the_name_of_an_evaluation_set_changes_the_key():
    write_jsonl(Path("b.jsonl"), RECORDS)
    names: tuple[dict[str, str], ...] = ({}, {"set": "one"}, {"set": "two"})

    assert len({key(build_recipe(eval=[{"path": "b.jsonl", **name}])) for name in names}) == 3


def test_the_split_of_a_folder_changes_the_key():
    Path("sets").mkdir()
    for name in ("train", "validation"):
        write_jsonl(Path("sets", f"{name}.jsonl"), RECORDS)

    found = {key(build_recipe(train=[{"path": "sets", "split": name}])) for name in ("train", "validation")}

    assert len(found) == 2


@pytest.mark.parametrize("name", OF_A_SOURCE)
def test_an_option_of_a_source_changes_the_key(name):
    assert key(build_recipe(train=[{"path": "a.jsonl", name: OF_A_SOURCE[name]}])) != key()


@pytest.mark.parametrize("name", ASIDE_OF_A_SOURCE)
def test_how_often_a_source_is_drawn_keeps_the_key(name):
    write_jsonl(Path("b.jsonl"), RECORDS)
    drawn = [{"path": path, name: ASIDE_OF_A_SOURCE[name]} for path in ("a.jsonl", "b.jsonl")]

    assert key(build_recipe(train=drawn)) == key(build_recipe(train=["a.jsonl", "b.jsonl"]))


def test_the_stage_changes_the_key_and_explicit_defaults_do_not():
    assert key(build_recipe("pretrain")) != key()
    assert key(build_recipe(overflow="keep_target", packing="best_fit")) == key()


def test_the_seed_changes_the_key_only_if_records_are_held_out():
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


# --- the code


@pytest.fixture
def copied(monkeypatch, tmp_path) -> Path:
    """A copy of the package for the key's digest of the code, which a test may edit."""
    package = tmp_path / "package" / "hf_clm"
    shutil.copytree(
        Path(hf_clm.schema.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(hf_clm.schema, "__file__", str(package / "schema.py"))
    return package


@pytest.mark.parametrize(
    "module",
    [
        *("schema.py", "template.py", "text/tokenizer.py", "text/encode.py", "data/label/labels.py"),
        *("data/label/render.py", "data/read/formats.py", "data/prepared/block.py", "data/proof/checker.py"),
    ],
)
def test_changing_a_labelling_module_changes_the_key(copied, module):
    before = key()
    (copied / module).write_text((copied / module).read_text() + "\n")

    assert key() != before


@pytest.mark.parametrize("module", ["cli.py", "training/trainer.py", "pages/style.css", "model/loss.py"])
def test_changing_other_modules_keeps_the_key(copied, module):
    before = key()
    (copied / module).parent.mkdir(exist_ok=True)
    (copied / module).open("a").write("\n")

    assert key() == before


@pytest.mark.parametrize("name", ["own_format", "own_package.inner"])
def test_changing_a_custom_format_changes_the_key(monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / f"{name.replace('.', '/')}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("def read(record):\n    return record.data\n")
    recipe = build_recipe(train=[{"path": "a.jsonl", "format": f"{name}:read"}])
    before = key(recipe)
    assert key(recipe) == before
    path.write_text(path.read_text() + "\n")

    assert key(recipe) != before

    for module in [module for module in sys.modules if module.startswith("own_")]:
        monkeypatch.delitem(sys.modules, module)


def test_imports_of_a_custom_format_are_in_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_prompts.py").write_text("ASK = 'Q: '\n")
    Path("own_format.py").write_text(
        "import json\nfrom own_prompts import ASK\nimport torch.nn, own_format\n"
    )
    recipe = build_recipe(train=[{"path": "a.jsonl", "format": "own_format:read"}])
    before = key(recipe)

    Path("own_prompts.py").write_text("ASK = 'Question: '\n")

    assert key(recipe) != before
    assert list(custom_modules(["own_format:read"])) == ["own_prompts", "own_format"]


@pytest.mark.parametrize("name", ["no_module", "no_package.inner"])
def test_a_missing_format_module_is_reported_when_reading(name):
    assert key(build_recipe(train=[{"path": "a.jsonl", "format": f"{name}:read"}])) != key()


# --- what is not cached


@pytest.mark.parametrize(
    ("data", "why_not"),
    [
        ({"cache_dir": None}, "data.cache_dir is null"),
        ({"train": [{"path": "someone/something", "revision": "main"}]}, "data on the Hub without a commit"),
        ({"train": [{"path": "someone/something"}]}, "data on the Hub without a commit"),
        ({"train": [{"path": "someone/something", "revision": "0" * 40}]}, ""),
        ({}, ""),
    ],
)
def test_a_set_that_may_change_is_not_cached_and_has_a_reason(tmp_path, data, why_not):
    """A branch on the Hub may change."""
    place = find_place(build_recipe(**data), byte_tokenizer(), seed=0, aside=tmp_path / "aside", launch="1")

    assert place.why_not.startswith(why_not) and bool(place.why_not) == bool(why_not)
    assert place.folder.parent == tmp_path / ("aside" if why_not else "cache")


def test_streams_and_unpinned_data_are_keyed_by_the_launch():
    stream = build_recipe("pretrain", streaming=True)
    hub = build_recipe(train=[{"path": "someone/something"}])

    for recipe in (stream, hub):
        assert key(recipe, launch="1") == key(recipe, launch="1") != key(recipe, launch="2")
    assert key(launch="1") == key(launch="2")
    assert key(build_recipe(cache_dir=None), launch="1") == key()


def test_missing_data_are_refused():
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        key(build_recipe(train=["missing.jsonl"]))


def test_the_environment_variable_overrides_only_the_default_cache(monkeypatch, tmp_path):
    default = build_recipe(cache_dir="~/.cache/hf_clm").data
    monkeypatch.setenv("HF_CLM_CACHE", "/somewhere")
    assert str(cache_folder(default.cache_dir)) == "/somewhere"
    assert cache_folder(build_recipe().data.cache_dir) == tmp_path / "cache"

    monkeypatch.delenv("HF_CLM_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder(default.cache_dir)) == "/home/me/.cache/hf_clm"


# --- reading the splits of a recipe


def test_unprepared_sets_are_made_and_not_cached():
    splits = read_splits(build_recipe(eval_fraction=0.4), byte_tokenizer(), seed=0)

    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 2, "eval": 1}
    assert [row["input_ids"][0] for row in splits["train"].rows] == [97, 97]  # although its folder is gone
    assert not Path("cache").exists()


def test_prepared_sets_are_opened(monkeypatch):
    recipe = build_recipe()
    place = find_place(recipe, byte_tokenizer(), seed=0, aside=Path("aside"))
    write_prepared(place.folder, recipe, byte_tokenizer(), seed=0)
    monkeypatch.setattr(cache, "write_prepared", lambda *args, **options: pytest.fail("prepared again"))

    assert len(read_splits(recipe, byte_tokenizer(), seed=0)["train"].rows) == 3
    assert open_place(place, recipe) is not None


def test_one_set_serves_every_way_of_mixing_it(monkeypatch):
    write_jsonl(Path("b.jsonl"), [{**record, "prompt": "b"} for record in RECORDS])
    plain = build_recipe(train=["a.jsonl", "b.jsonl"], packing="none")
    place = find_place(plain, byte_tokenizer(), seed=0, aside=Path("aside"))
    write_prepared(place.folder, plain, byte_tokenizer(), seed=0)
    monkeypatch.setattr(cache, "write_prepared", lambda *args, **options: pytest.fail("prepared again"))

    for weights, size, rows in [((1.0, 1.0), 4, (2, 2)), ((3.0, 1.0), 8, (6, 2))]:
        sources = [{"path": f"{name}.jsonl", "weight": w} for name, w in zip("ab", weights, strict=True)]
        recipe = build_recipe(train=sources, packing="none", mixing={"size": size})
        train = read_splits(recipe, byte_tokenizer(), seed=0)["train"]
        letters = [chr(row["input_ids"][0]) for row in train.dataset]
        assert (letters.count("a"), letters.count("b")) == rows
