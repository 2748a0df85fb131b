"""A checkout on a machine with torch, transformers and accelerate, but without much else: no installation."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = ("datasets", "ruamel", "zstandard", "hf_clm")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the installed packages except the MISSING ones, and without their metadata."""
    folder = tmp_path_factory.mktemp("packages")
    for path in [path for place in site.getsitepackages() for path in Path(place).iterdir()]:
        if not path.name.startswith(MISSING) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def run(packages: Path, *words: str, expects: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a Python that finds the checkout and these packages only."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    done = subprocess.run(
        [sys.executable, "-S", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expects, done.stdout + done.stderr
    return done


TRAIN = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from hf_clm import CLMTrainer, DataCollatorForCausalLM

model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=8))
row = {"input_ids": torch.arange(6), "labels": torch.arange(6)}
trainer = CLMTrainer(
    model,
    TrainingArguments(sys.argv[1], max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
    train_dataset=[row] * 16,
    data_collator=DataCollatorForCausalLM(0),
)
trainer.train()
unneeded = ("hf_clm.recipe", "hf_clm.data.read.records", "ruamel", "datasets", "pyarrow")
print(trainer.state.global_step, [name for name in sys.modules if name.startswith(unneeded)])
"""


def test_the_trainer_takes_two_steps_without_a_recipe_and_its_packages(packages, tmp_path):
    done = run(packages, "-c", TRAIN, str(tmp_path))

    assert done.stdout.splitlines()[-1] == "2 []"


def test_every_public_name_can_be_imported(packages):
    code = "import hf_clm; print(len([getattr(hf_clm, name) for name in hf_clm.PUBLIC_NAMES]))"

    assert run(packages, "-c", code).stdout == "18\n"


def test_every_command_prints_its_help(packages):
    code = "import sys; from hf_clm.cli import COMMANDS, main; sys.exit(sum(map(fails, COMMANDS)))"
    helper = (
        "def fails(name):\n try: return main([name, '--help'])\n except SystemExit as done: return done.code"
    )

    done = run(packages, "-c", f"{helper}\n{code}")

    assert done.stdout.count("usage: hf-clm ") == 17


def test_a_recipe_needs_a_package_that_one_line_names(packages):
    done = run(packages, "-m", "hf_clm", "train", "sft/poems", expects=6)

    assert done.stderr == (
        "error: needs the package ruamel.yaml, which is not installed; fix: pip install ruamel.yaml\n"
    )


@pytest.fixture
def with_yaml(packages, tmp_path) -> Path:
    """Returns the packages and ruamel.yaml, but still no datasets, and no version of hf_clm."""
    import ruamel.yaml

    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "ruamel").symlink_to(Path(ruamel.yaml.__file__).parents[1])
    for path in packages.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_a_recipe_is_trained_and_answers_without_the_rest(with_yaml, tmp_path):
    """run.json has no version of a package that is not installed."""
    words = ("--max_steps", "2", "--output_dir", str(tmp_path / "run"), "--data.cache_dir", "null")
    lean = ("--doctor.round_trip", "off", "--eval_strategy", "no", "--samples", "null")

    run(with_yaml, "-m", "hf_clm", "train", "pretrain/char-gpt", *words, *lean)

    versions = json.loads((tmp_path / "run" / "run.json").read_text())["versions"]
    missing = {name for name, version in versions.items() if version is None}
    assert missing - {"hf_clm"} == {"datasets"}  # an installation of hf_clm may have left its metadata
    words = ("generate", str(tmp_path / "run"), "--prompt", "a", "--max_new_tokens", "2")
    assert len(run(with_yaml, "-m", "hf_clm", *words).stdout) == 3
