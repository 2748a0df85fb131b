"""Recipes that come with hf_clm are found by name, with their data, from any folder."""

from pathlib import Path

import pytest

from hf_clm.cli import main
from hf_clm.data.read.files import find_files
from hf_clm.errors import DataError, ModelError, RecipeError
from hf_clm.hub import load_options
from hf_clm.recipe.recipe import load_recipe
from hf_clm.recipe.shipped import find_recipe, list_recipes, shipped_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["sft/poems", "poems", "sft/poems.yaml", "recipes/sft/poems.yaml"])
def test_a_shipped_recipe_is_found_by_its_name_with_its_data(name):
    recipe = load_recipe(name, ["--max_steps", "5"])

    assert recipe.file == str(ROOT / "recipes/sft/poems.yaml")
    assert recipe.data.train[0].path == str(ROOT / "data/sft/poems.jsonl")
    assert recipe.train["output_dir"] == "runs/sft-poems"  # of the working directory


def test_a_file_here_comes_before_a_shipped_one():
    Path("recipes/sft").mkdir(parents=True)
    text = (ROOT / "recipes/sft/poems.yaml").read_text()
    Path("recipes/sft/poems.yaml").write_text(text)
    Path("data/sft").mkdir(parents=True)
    Path("data/sft/poems.jsonl").write_text("")

    recipe = load_recipe("recipes/sft/poems.yaml")

    assert (recipe.file, recipe.data.train[0].path) == ("recipes/sft/poems.yaml", "data/sft/poems.jsonl")


def test_paths_are_looked_up_beside_the_recipe_and_typed_ones_are_not(tmp_path):
    folder = tmp_path / "project"
    (folder / "base").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "chat.jinja").write_text("")
    (folder / "r.yaml").write_text(
        "stage: sft\nmodel: {name_or_path: base}\ntokenizer: {chat_template: chat.jinja}\n"
        "data: {train: [rows.jsonl, 'r*.jsonl', none.jsonl]}\ntrain: {output_dir: out}\n"
    )

    recipe = load_recipe("project/r.yaml")
    typed = load_recipe("project/r.yaml", ["--data", "rows.jsonl", "--model", "base"])

    assert recipe.model.name_or_path == "project/base"
    assert recipe.tokenizer.chat_template == "project/chat.jinja"
    paths = [source.path for source in recipe.data.train]
    assert paths == ["project/rows.jsonl", "project/r*.jsonl", "none.jsonl"]
    assert (typed.data.train[0].path, typed.model.name_or_path) == ("rows.jsonl", "base")


def test_every_shipped_recipe_has_a_line_of_its_own(capsys):
    assert main(["recipes"]) == 0

    shown = capsys.readouterr().out
    names = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in ROOT.glob("recipes/[ps]*/*.yaml")
    }
    assert {name for name, _ in list_recipes()} == names and len(names) > 10
    assert [name for name, text in list_recipes() if not 20 < len(text) < 160] == []
    assert all(f"{name} " in shown for name in names)
    assert shipped_folder() == ROOT


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my.jsonl", "my.jsonl: this is data, not a recipe; fix: hf-clm train --model MODEL --data my.jsonl"),
        ("a.csv.gz", "a.csv.gz: this is data, not a recipe; fix: "),
        ("sft/poem", "sft/poem: no such recipe; did you mean sft/poems"),
        ("poms", "poms: no such recipe; did you mean sft/poems?; fix: hf-clm recipes lists the shipped ones"),
        ("qwen2.5-0.5b", "qwen2.5-0.5b: no such recipe; did you mean pretrain/qwen2.5-0.5b or sft/"),
        ("Qwen/Qwen2-1B", "Qwen/Qwen2-1B: no such recipe; a model is named with --model; fix: hf-clm train"),
        ("model", "model: this is a model, not a recipe; fix: hf-clm train --model model --data FILE"),
        ("empty", "empty: no recipe.yaml in this folder: it is not the folder of a run; fix: name"),
        ("./x.yaml", "./x.yaml: no such recipe"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_what_it_is(target, message):
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("empty").mkdir()

    with pytest.raises(RecipeError) as error:
        load_recipe(target)
    assert str(error.value).startswith(message)


def test_json_records_are_data_and_a_json_recipe_is_a_recipe():
    Path("rows.json").write_text('[{"text": "a"}]')
    Path("recipe.json").write_text((ROOT / "recipes/sft/poems.yaml").read_text())

    assert find_recipe("recipe.json") == "recipe.json"
    with pytest.raises(
        RecipeError, match=r"^rows\.json: this is data, not a recipe; got list; fix: hf-clm train"
    ):
        load_recipe("rows.json")


def test_what_a_script_makes_is_told_with_its_command():
    with pytest.raises(DataError) as missing:
        find_files(load_recipe("python-docs").data.train[0].path)
    with pytest.raises(ModelError) as model:
        load_options("./local/smollm2-135m-instruct", revision=None, where="model")

    assert str(missing.value).endswith(f"fix: python {ROOT}/data/build_corpus.py --output data/local")
    assert str(model.value).endswith(
        f"fix: python {ROOT}/data/get_smollm2.py --output_dir ./local/smollm2-135m-instruct"
    )
