"""The template of a source: parsing, and errors before any record is read."""

import pytest

from hf_clm.errors import RecipeError
from hf_clm.recipe.recipe import Recipe, load_recipe, recipe_to_yaml
from hf_clm.template import Template, split_template, to_cell

HEAD = "stage: sft\nmodel: {name_or_path: m}\ntrain: {output_dir: runs/x}\ndata:\n  train:\n"


def read(folder, source: str) -> Recipe:
    (folder / "recipe.yaml").write_text(f"{HEAD}    - {source}\n", encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


def refusal(folder, source: str) -> str:
    with pytest.raises(RecipeError) as error:
        read(folder, source)
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{a}", [("a", True)]),
        ("Is {a} = {b}?\n", [("Is ", False), ("a", True), (" = ", False), ("b", True), ("?\n", False)]),
        ("{first name}<sep>", [("first name", True), ("<sep>", False)]),
        ("{{}} {a}", [("{", False), ("}", False), (" ", False), ("a", True)]),
    ],
)
def test_a_template_is_split_into_text_and_columns(text, parts):
    assert split_template(text) == parts


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), ("1", "1"), (True, "true"), ("yes", "yes"), (2.5, "2.5")]
)
def test_a_value_has_the_same_text_from_every_type_of_file(value, text):
    assert to_cell(value) == text


def test_the_values_of_labels_are_converted_to_text(tmp_path):
    source = '{path: a.csv, template: {prompt: "{s}?", completion: "{label}", labels: {0: no, 1: yes}}}'

    recipe = read(tmp_path, source)

    template = recipe.data.train[0].template
    assert template == Template(prompt="{s}?", completion="{label}", labels={"0": "no", "1": "yes"})
    assert template.columns == ["s"]
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_plain_path_keeps_the_template_of_the_recipe(tmp_path):
    read(tmp_path, '{path: a.csv, template: {text: "{a}"}}')

    recipe = load_recipe(tmp_path / "recipe.yaml", ["--data.train", "b.csv"])

    assert (recipe.data.train[0].path, recipe.data.train[0].template) == ("b.csv", Template(text="{a}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            '{path: a, template: {prompt: "{a"}}',
            "recipe.yaml:6: data.train.0.template.prompt: expected '}' before end of string; "
            "write a literal brace twice; got '{a'",
        ),
        (
            '{path: a, template: {text: "{a:>5}"}}',
            "recipe.yaml:6: data.train.0.template.text: expected only the name of a column between braces; "
            "write a literal brace twice; got '{a:>5}'",
        ),
        (
            '{path: a, template: {text: "always this"}}',
            "recipe.yaml:6: data.train.0.template.text: contains no column, so every record has the same "
            "text; got 'always this'",
        ),
        (
            '{path: a, template: {prompt: "{a}"}}',
            "recipe.yaml:6: data.train.0.template: expected either prompt and completion, or text; "
            "got {'prompt': '{a}'}",
        ),
        (
            '{path: a, template: {text: "{a}", labels: {1: yes}}}',
            "recipe.yaml:6: data.train.0.template: labels require a completion, but this is a text; "
            "got {'text': '{a}', 'labels': {1: 'yes'}}",
        ),
        (
            '{path: a, format: text, template: {text: "{a}"}}',
            "recipe.yaml:6: data.train.0.format has no effect with a template, which names the columns "
            "itself; fix: remove it",
        ),
    ],
)
def test_an_invalid_template_is_refused_with_its_line(source, message, tmp_path):
    assert refusal(tmp_path, source) == message
