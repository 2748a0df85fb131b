"""Finding all errors in the data in one pass: their grouping, and when they are shown."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl

from hf_clm.cli import main
from hf_clm.data.read.faults import CHECKED_BYTES, Faults, check_data
from hf_clm.errors import DataError, EnvironmentFault, RecipeError, UserError
from hf_clm.recipe.recipe import load_recipe

DOCUMENT_FIX = "write one object per line; put a JSON array or a pretty-printed object into a .json file"
NONCHARACTER = (
    "the text contains a noncharacter (U+FDD0 or U+FDD1); fix: remove it; no valid text contains one"
)
GOOD = {"prompt": "p", "completion": "c"}
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: a.jsonl, format: prompt_completion}]
  eval: [{path: b.jsonl, format: prompt_completion}]
train: {output_dir: run, use_cpu: true}
"""
# Seven kinds of bad records in two files, and their list.
SEVEN = f"""\
9 errors in the data; data.on_bad_record: drop skips 9 of them, up to data.max_dropped
1 x not valid JSON: Expecting value (column 12); fix: {DOCUMENT_FIX}
  a.jsonl:2 (got '}}')
2 x key 'completion' is null; fix: fill it in, or remove the record
  a.jsonl:3
  b.jsonl:2
2 x key 'prompt': expected str
  a.jsonl:4 (got int)
  b.jsonl:3 (got object)
1 x missing key 'completion'; fix: add it, or set its column with fields: {{completion: COLUMN}}
  a.jsonl:5 (got keys 'prompt')
1 x key 'prompt' is empty; fix: fill it in, or remove the record
  a.jsonl:7 (got ' ')
1 x expected an object; fix: {DOCUMENT_FIX}
  b.jsonl:4 (got list)
1 x {NONCHARACTER}
  b.jsonl:5"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> None:
    """A working directory with a recipe and two good files."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    write_jsonl(Path("a.jsonl"), [GOOD])
    write_jsonl(Path("b.jsonl"), [GOOD])


def write_lines(path: str, *lines: Any) -> None:
    """Writes values as JSON and texts unchanged."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(path).write_text("".join(f"{text}\n" for text in texts))


def write_seven() -> None:
    null, number = {**GOOD, "completion": None}, {**GOOD, "prompt": 5}
    write_lines("a.jsonl", GOOD, '{"prompt": }', null, number, {"prompt": "p"}, GOOD, {**GOOD, "prompt": " "})
    write_lines("b.jsonl", GOOD, null, {**GOOD, "prompt": {}}, [1, 2], {**GOOD, "prompt": "\ufdd0"})


def faults_of(*overrides: str) -> str:
    """Returns the error that ``check_data`` raises, or "" for valid data."""
    try:
        check_data(load_recipe("recipe.yaml", overrides))
    except UserError as error:
        return str(error)
    return ""


def run_process(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the command line in a separate process; also returns its CPU time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "hf_clm", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- grouping


def test_errors_that_differ_in_place_value_and_numbers_are_one_kind():
    faults = Faults()
    faults.add(DataError("message 3 is empty", where="a.jsonl:1", got="' '", fix="fill it in"))
    faults.add(DataError("no such file", where="c.jsonl"))
    faults.add(DataError("message 12 is empty", where="a.jsonl:7", fix="fill it in"))

    assert len(faults) == 3
    assert str(faults.to_error()) == (
        "3 errors in the data\n"
        "2 x message N is empty; fix: fill it in\n"
        "  a.jsonl:1 (N: 3, got ' ')\n"
        "  a.jsonl:7 (N: 12)\n"
        "1 x no such file\n"
        "  c.jsonl"
    )


def test_at_most_20_kinds_with_20_places_are_listed():
    faults = Faults()
    for number in range(1, 52):
        faults.add(DataError("is empty", where=f"a.jsonl:{number}"))
    for letter in "abcdefghijklmnopqrstuvwxyz":
        faults.add(DataError(f"no key {letter}", where="b.jsonl:1"))

    lines = str(faults.to_error()).splitlines()

    assert lines[:3] == ["77 errors in the data", "51 x is empty", "  a.jsonl:1"]
    assert lines[21:24] == ["  a.jsonl:20", "  and 31 more", "1 x no key a"]
    assert lines[-3:] == ["1 x no key s", "  b.jsonl:1", "7 x other errors"]


def test_a_single_error_is_raised_unchanged():
    faults = Faults()
    faults.raise_if_any()
    fault = EnvironmentFault("cannot be read", where="a.jsonl")
    faults.add(fault)

    with pytest.raises(EnvironmentFault) as error:
        faults.raise_if_any()

    assert error.value is fault


# --- what is checked


def test_seven_kinds_of_bad_records_are_found_at_once():
    write_seven()

    assert faults_of() == SEVEN


def test_one_bad_record_is_a_one_line_error():
    write_lines("b.jsonl", GOOD, {**GOOD, "prompt": 5})

    assert faults_of() == "b.jsonl:2: key 'prompt': expected str; got int"


def test_an_unreadable_file_does_not_stop_the_check_of_others():
    Path("cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08 cut off")
    Path("empty.jsonl").write_text("")
    write_lines("b.jsonl", {"prompt": "p", "completion": None})

    files = "[nope/1.jsonl, cut.jsonl.gz, empty.jsonl, b.jsonl, nope/2.jsonl]"
    shown = faults_of("--data.train", files, "--data.eval", "[]")

    places = [line for line in shown.splitlines() if line.startswith("  ")]
    assert [place.split()[0] for place in places] == [
        *("nope/1.jsonl", "nope/2.jsonl", "cut.jsonl.gz", "empty.jsonl", "b.jsonl:1"),
    ]
    assert shown.startswith(
        "5 errors in the data; data.on_bad_record: drop skips 1 of them, up to data.max_dropped\n2 x no such"
    )


def test_the_missing_files_of_all_sources_are_named():
    assert faults_of("--data.train", "first-set.jsonl", "--data.eval", "second-set.jsonl") == (
        "2 errors in the data\n"
        "2 x no such file; fix: check the name and the working directory\n"
        "  first-set.jsonl\n"
        "  second-set.jsonl"
    )


def test_a_repeated_source_is_checked_once():
    write_lines("a.jsonl", {"prompt": 5})

    assert faults_of("--data.train", "a.jsonl", "--data.eval", "a.jsonl").startswith("a.jsonl:1: ")


def test_records_after_the_limit_of_a_source_are_not_checked():
    write_lines("a.jsonl", GOOD, {"prompt": 5})

    assert faults_of("--data.train", "[{path: a.jsonl, format: prompt_completion, limit: 1}]") == ""


def test_dropped_records_are_not_errors_and_a_missing_file_is():
    write_seven()

    assert faults_of("--data.on_bad_record", "drop") == ""
    assert faults_of("--data.on_bad_record", "drop", "--data.eval", "other-set.jsonl") == (
        "other-set.jsonl: no such file; fix: check the name and the working directory"
    )


def test_a_record_that_may_be_valid_as_turns_is_not_an_error_yet():
    """Tools need a chat template, and the tokenizer is not loaded yet."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    write_lines("a.jsonl", {**GOOD, "tools": [tool]})

    assert faults_of() == ""
    assert "needs chat turns" in faults_of("--data.render", "plain")


def test_sources_over_the_size_limit_are_not_checked():
    write_lines("a.jsonl", {"prompt": "x" * CHECKED_BYTES})
    write_lines("b.jsonl", GOOD, {"prompt": 5})

    assert faults_of().startswith("b.jsonl:2: ")


def test_noncharacters_are_allowed_with_control_tokens():
    write_lines("a.jsonl", {**GOOD, "prompt": "\ufdd0"})

    assert faults_of() == f"a.jsonl:1: {NONCHARACTER}"
    assert faults_of("--data.special_tokens_in_text", "allow") == ""


# --- the command line


@pytest.mark.parametrize("command", ["train", "prepare", "doctor", "inspect"])
def test_each_command_shows_the_same_list_and_exits_with_the_data_code(command, capsys):
    write_seven()

    assert main([command, "recipe.yaml"]) == 3
    assert capsys.readouterr().err == f"error: {SEVEN}\n"


def test_the_json_of_the_doctor_has_the_list(capsys):
    write_seven()

    assert main(["doctor", "recipe.yaml", "--json"]) == 3
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert (check["name"], check["what"]) == ("data", SEVEN)


def test_the_check_is_fast_and_does_not_import_torch():
    """About 0.6 s, most of it imports."""
    write_seven()

    done, seconds = run_process("train", "recipe.yaml")
    missing, seconds_missing = run_process("prepare", "recipe.yaml", "--data.eval", "other-set.jsonl")

    assert (done.returncode, done.stderr) == (3, f"error: {SEVEN}\n")
    assert (missing.returncode, missing.stderr[:29]) == (3, "error: 6 errors in the data; ")
    assert seconds < 2.5
    assert seconds_missing < 2.5
    code = "from hf_clm.cli import main; main(['train', 'recipe.yaml']); import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "hf_clm.data.read.faults" in loaded
    assert {"torch", "transformers", "datasets", "pyarrow"} & set(loaded) == set()


def test_one_of_two_processes_reports_the_errors_and_both_exit():
    write_seven()

    first, _ = run_process("train", "recipe.yaml", RANK="2", LOCAL_RANK="0", WORLD_SIZE="4")
    second, _ = run_process("train", "recipe.yaml", RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")

    assert (first.returncode, first.stderr) == (3, f"error on rank 2: {SEVEN}\n")
    assert (second.returncode, second.stderr) == (3, "")


# --- the name in version 0.4


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("skip_bad_lines: {}", "use on_bad_record: drop"),
        ("nul: {}", "remove it, and remove U+0000 from the data"),
        ("mixing: {stopping_strategy: {}}", "remove it, and set size to the rows or tokens of an epoch"),
    ],
)
def test_a_key_of_version_0_4_is_accepted_only_at_its_default(line, fix):
    text = Path("recipe.yaml").read_text()
    default, other = {"s": ("false", "true"), "n": ("warn", "error"), "m": ("null", "all_exhausted")}[line[0]]

    Path("recipe.yaml").write_text(text.replace("data:\n", f"data:\n  {line.replace('{}', default)}\n"))
    assert load_recipe("recipe.yaml").data.on_bad_record == "error"

    Path("recipe.yaml").write_text(text.replace("data:\n", f"data:\n  {line.replace('{}', other)}\n"))
    with pytest.raises(RecipeError, match=re.escape(f"is a key of version 0.4; fix: {fix}")):
        load_recipe("recipe.yaml")
