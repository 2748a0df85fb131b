"""What the README says can be typed and run; every file that it names exists, and every file is named."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model

from hf_clm.cli import main
from hf_clm.data.prepared.prepare import write_prepared
from hf_clm.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
LINES = [
    line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line]
MAKES = [words for words in COMMANDS if words[0] == "make"]
OURS = [
    words[words.index("hf_clm") + 1 :] if "hf_clm" in words else words[1:]
    for words in COMMANDS
    if words[0].endswith("hf-clm") or "hf_clm" in words
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_the_commands_are_found():
    assert len(MAKES) >= 5
    assert {words[0] for words in OURS} >= {"train", "generate", "evaluate", "config"}
    assert len(MAKES) + len(OURS) == len(COMMANDS), "a command of another kind: test it too"
    assert len(PYTHON) == 3


@pytest.mark.parametrize("words", MAKES, ids=" ".join)
def test_a_make_command_names_a_target_that_is_there(words):
    result = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [words for words in OURS if words[0] in ("train", "config")], ids=" ".join)
def test_a_recipe_command_gives_a_recipe(words, monkeypatch):
    monkeypatch.chdir(ROOT)

    assert load_recipe(words[1], words[2:]).train["output_dir"].startswith("runs/")


@pytest.mark.parametrize(
    "words", [words for words in OURS if words[0] not in ("train", "config")], ids=" ".join
)
def test_another_command_has_options_that_are_there(words, capsys, tmp_path, monkeypatch):
    """The run or recipe is missing here, which is found only after the options were understood."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert main(words) in (2, 3, 4, 6)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "unrecognized" not in error
    assert "unknown option" not in error


@pytest.mark.parametrize("text", PYTHON, ids=["from_pretrained", "parts", "prepared"])
def test_the_python_examples_run(text, tmp_path):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    recipe = build_recipe(tmp_path, [{"prompt": "Hi\n", "completion": "Yes"}])
    write_prepared(tmp_path / "prepared", recipe, byte_tokenizer(), seed=0)

    names = {"runs/sft-poems": folder, "Qwen/Qwen2.5-0.5B": folder}
    for name, path in (names | {"~/.cache/hf_clm/KEY": str(tmp_path / "prepared")}).items():
        text = text.replace(name, path)
    exec(text, {})


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Shell scripts by name, which stand in for programs that are not here."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def test_the_slurm_script_starts_a_ray_cluster_and_prepares_on_it(tmp_path):
    """With programs that only say how they were called; three boxes."""
    (script,) = (text for _, text in BLOCKS if "ray start --head --port" in text)
    programs = {
        "scontrol": 'printf "box-7\nbox-8\nbox-9\n"',
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done; echo "$*"',
        "hf-clm": 'echo "hf-clm $*"',
        "sleep": "exec /bin/sleep 0.3",
    }
    write_programs(tmp_path, programs)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "3"}

    done = subprocess.run(["bash", "-eu"], input=script, env=environment, capture_output=True, text=True)

    assert done.stdout.splitlines() == [
        "ray start --head --port=6379 --block",
        "ray start --address=box-7:6379 --block",
        "hf-clm prepare RECIPE --ray box-7:6379",
    ]


def test_the_slurm_script_starts_a_launcher_on_each_box(tmp_path):
    """With programs that only say how they were called; two boxes of 64 cores, this one is the second."""
    (script,) = (text for _, text in BLOCKS if "#SBATCH" in text)
    programs = {
        "scontrol": 'echo "$*" >&2; printf "box-7\\nbox-8\\n"',
        "srun": 'echo "srun $1" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; shift; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'echo "$*"',
    }
    write_programs(tmp_path, programs)
    slurm = {"SLURM_JOB_NODELIST": "box-[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SCRATCH": "/scratch", **slurm}

    done = subprocess.run(["bash", "-eu"], input=script, env=environment, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "show hostnames box-[7-8]\n")
    assert done.stdout.splitlines() == [
        "srun --cpus-per-task=64 110",
        "launch --config_file recipes/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 "
        "--machine_rank 1 --main_process_ip box-7 --main_process_port 29500 "
        "-m hf_clm train RECIPE --output_dir /scratch/runs/mine",
    ]
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [line.split()[-1] for line in options] == ["--signal=TERM@120"]  # 110 s fit into 120


def test_every_folder_and_module_of_the_package_stands_in_the_tree():
    """Those inside the folders are described by their own docstrings."""
    entries = sorted(path for path in (ROOT / "hf_clm").iterdir() if not path.name.startswith("__"))
    missing = [path.name for path in entries if path.name not in README]

    assert len(entries) > 10
    assert missing == []


def test_every_recipe_stands_in_the_table():
    recipes = sorted((ROOT / "recipes").glob("[ps]*/*.yaml"))

    assert len(recipes) >= 6
    assert [path.name for path in recipes if f"{path.parent.name}/{path.name}" not in README] == []


def test_every_test_and_module_that_the_readme_names_is_there():
    named = set(re.findall(r"\b(?:tests|hf_clm|recipes|data)/[\w./-]+\.(?:py|yaml|md)\b", README))

    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
