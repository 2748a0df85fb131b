"""The targets of ``make`` and the commands they would run, without installing or training anything."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["help", "setup", "sft", "sft-real", "pretrain", "generate"]
TARGETS += [
    "test",
    "test-large",
    "test-peers",
    "test-real",
    "test-browser",
    "test-fake-cuda",
    "bench-peers",
    "bench-real",
    "soak",
    "test-fast",
    "lint",
    "format",
    "clean",
]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs make at the root as in a new shell, independent of the make that runs the tests."""
    own = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C", **environment}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )


@pytest.fixture
def ready(tmp_path) -> str:
    """A folder that looks to make like a finished virtual environment."""
    (tmp_path / ".setup").touch()
    return f"VENV={tmp_path}"


def commands(done: subprocess.CompletedProcess[str], venv: str) -> list[str]:
    """Returns the commands that make would run, with the virtual environment's folder as ``VENV``."""
    assert done.returncode == 0, done.stderr
    return [line.strip().replace(venv.removeprefix("VENV="), "VENV") for line in done.stdout.splitlines()]


def fake_python(folder: Path, *, version: str, has_venv: bool = True, pip_works: bool = True) -> str:
    """A fake Python that prints its version and creates environments with a pip that installs nothing."""
    inner = f"""case "$*" in
        -c*) echo {version};;
        *install*) exit {0 if pip_works else 1};;
        esac"""
    outer = f"""case "$*" in
        *ensurepip*) exit {0 if has_venv else 1};;
        -c*) echo {version};;
        "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"
            cp {folder}/inner "$4/bin/python";;
        esac"""
    for name, body in {"inner": inner, "python": outer}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}/python"


def test_help_lists_every_target_and_is_the_default():
    done = make()

    listed = re.findall(r"^make ([a-z-]+) +\S", done.stdout, re.MULTILINE)
    assert listed == TARGETS
    assert done.stdout == make("help").stdout


def test_every_phony_target_is_documented():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")

    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    documented = re.findall(r"^([a-z-]+):.*  ## \S", text, re.MULTILINE)

    assert [line.split() for line in phony] == [TARGETS]
    assert documented == TARGETS


def test_sft_trains_the_poems_and_generates_an_answer(ready):
    assert commands(make("-n", "sft", ready), ready) == [
        "VENV/bin/hf-clm train 'recipes/sft/poems.yaml' --overwrite done",
        "VENV/bin/hf-clm generate 'runs/sft-poems'"
        " --prompt 'Complete the poem about the lighthouse in winter.'",
    ]


def test_another_recipe_answers_if_run_names_its_folder(ready):
    without_run = commands(make("-n", "sft", ready, "RECIPE=my.yaml", "ARGS=--max_steps 3"), ready)
    with_run = commands(make("-n", "sft", ready, "RECIPE=my.yaml", "RUN=runs/mine", "PROMPT=Hello"), ready)

    assert without_run == ["VENV/bin/hf-clm train 'my.yaml' --overwrite done  --max_steps 3"]
    assert with_run == [
        "VENV/bin/hf-clm train 'my.yaml' --overwrite done --output_dir 'runs/mine'",
        "VENV/bin/hf-clm generate 'runs/mine' --prompt 'Hello'",
    ]


def test_the_real_model_is_fetched_once_and_takes_the_place_of_the_one_on_the_hub(ready):
    train = "VENV/bin/hf-clm train 'recipes/sft/smollm2.yaml' --overwrite done   --model.name_or_path"

    missing = commands(make("-n", "sft-real", ready, "MODEL=no/such/folder"), ready)
    there = commands(make("-n", "sft-real", ready, "MODEL=recipes"), ready)

    assert missing == ["VENV/bin/python data/get_smollm2.py", f"{train} no/such/folder"]
    assert there == [f"{train} recipes"]


def test_two_gpus_go_through_accelerate(ready):
    done = make("-n", "sft", ready, "GPUS=2")

    assert commands(done, ready)[0] == (
        "VENV/bin/accelerate launch --multi_gpu --num_processes '2' -m hf_clm"
        " train 'recipes/sft/poems.yaml' --overwrite done"
    )


def test_pretrain_trains_on_the_corpus(ready):
    done = make("-n", "-W", "data/build_corpus.py", "pretrain", ready)

    assert commands(done, ready) == [
        "VENV/bin/python data/build_corpus.py",
        "VENV/bin/hf-clm train 'recipes/pretrain/python-docs.yaml' --overwrite done",
    ]


def test_quotes_and_dollars_of_a_prompt_reach_the_model_as_typed(ready):
    done = make("-n", "generate", ready, 'PROMPT=it\'s $5 $(HOME) "x" `ls`')

    assert commands(done, ready) == [
        "VENV/bin/hf-clm generate 'runs/sft-poems' --prompt 'it'\\''s $5 $(HOME) \"x\" `ls`'"
    ]


def test_a_second_setup_does_nothing(ready):
    assert make("setup", ready).stdout == "make: Nothing to be done for 'setup'.\n"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_setup_is_repeated_when_its_dependencies_change(ready, changed):
    done = make("-n", "-W", changed, "setup", ready)

    assert "-m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'" in done.stdout


@pytest.mark.parametrize("version", ["3.9", "3.14", "2.7"])
def test_a_python_out_of_range_is_refused(tmp_path, version):
    python = fake_python(tmp_path, version=version)

    done = make("setup", f"VENV={tmp_path}/venv", f"PYTHON={python}")

    assert done.stderr.splitlines()[0] == (
        f"error: {python} is Python {version}; 3.10 to 3.13 are supported;"
        " fix: run make setup PYTHON=/path/to/python3.11"
    )


def test_a_python_without_venv_is_refused_with_the_package_to_install(tmp_path):
    python = fake_python(tmp_path, version="3.12", has_venv=False)

    done = make("setup", f"VENV={tmp_path}/venv", f"PYTHON={python}")

    assert done.stderr.splitlines()[0] == (
        f"error: {python} cannot create virtual environments;"
        " fix: run apt install python3.12-venv, or set PYTHON to another one"
    )


def test_a_python_that_does_not_run_is_refused(tmp_path):
    done = make("setup", f"VENV={tmp_path}/venv", "PYTHON=no/such python")

    assert (
        done.stderr.splitlines()[0]
        == "error: no/such python is not a working Python interpreter; fix: set PYTHON to another one"
    )


def test_a_folder_in_use_is_never_cleared(tmp_path):
    python = fake_python(tmp_path, version="3.11")

    done = make("setup", f"VENV={tmp_path}", f"PYTHON={python}")

    assert done.stderr.splitlines()[0] == (
        f"error: {tmp_path} exists and is not a virtual environment; fix: set VENV to another folder"
    )


def test_an_interrupted_setup_leaves_no_stamp_and_starts_afresh(tmp_path):
    venv, python = tmp_path / "venv", fake_python(tmp_path, version="3.11", pip_works=False)

    first = make("setup", f"VENV={venv}", f"PYTHON={python}")
    left_behind = sorted(path.name for path in venv.iterdir())
    fake_python(tmp_path, version="3.11")
    (venv / "half a package").touch()
    second = make("setup", f"VENV={venv}", f"PYTHON={python}")

    assert (first.returncode, second.returncode) == (2, 0)
    assert left_behind == [".unfinished", "bin", "pyvenv.cfg"]
    assert sorted(path.name for path in venv.iterdir()) == [".setup", "bin", "pyvenv.cfg"]


def test_a_setup_for_changed_dependencies_keeps_the_environment(tmp_path):
    venv, python = tmp_path / "venv", fake_python(tmp_path, version="3.11")

    make("setup", f"VENV={venv}", f"PYTHON={python}")
    (venv / "own package").touch()
    again = make("-W", "constraints.txt", "setup", f"VENV={venv}", f"PYTHON={python}")

    assert again.returncode == 0
    assert sorted(path.name for path in venv.iterdir()) == [".setup", "bin", "own package", "pyvenv.cfg"]
