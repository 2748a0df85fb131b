"""What the README files say: commands run, options and keys exist, paths and links lead somewhere."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model

import hf_clm.draft
from hf_clm import PUBLIC_NAMES
from hf_clm.cli import COMMANDS, main
from hf_clm.data.prepared.prepare import write_prepared
from hf_clm.errors import UserError
from hf_clm.recipe.recipe import Recipe, list_keys
from hf_clm.recipe.trainer_fields import train_fields

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hf_clm", "recipes", "data", "tests")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(
        [
            ROOT / "README.md",
            ROOT / "hf_clm" / "CHANGES.md",
            *(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
        ]
    )
    if "data/local" not in path.as_posix()
}
KILOBYTE = 1000
# An option of one of these is the recipe's: it is read in place of a placeholder.
OF_RECIPES = ("train", "config", "prepare", "inspect", "doctor", "bench")
REFUSED = re.compile(r"unrecognized|unknown|no such command|invalid choice|is a name of")


def blocks(*kinds: str) -> Iterator[tuple[str, str]]:
    """(page, text) of every fenced block of these kinds."""
    for page, text in PAGES.items():
        for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
            if kind in kinds:
                yield page, block


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command in a block of shell lines, or in backticks in the text."""
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield page, words
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            if code.split()[0] in ("hf-clm", "make", "python", "pytest", "accelerate", "srun"):
                yield page, shlex.split(code)


def own_words(words: list[str]) -> list[str] | None:
    """The words after ``hf-clm``, or after the launcher's ``-m hf_clm``."""
    if "hf_clm" in words[:-1] and words[words.index("hf_clm") - 1] == "-m":
        return words[words.index("hf_clm") + 1 :]
    return words[words.index("hf-clm") + 1 :] if "hf-clm" in words[:2] else None


COMMANDS_OF_PAGES = list(commands())


def test_the_pages_and_commands_are_found():
    assert len(PAGES) >= 19
    assert len(COMMANDS_OF_PAGES) >= 60
    known = {"hf-clm", "make", "python", "pytest", "accelerate", "srun", "source"}
    assert {words[0] for _, words in COMMANDS_OF_PAGES} == known


def test_a_page_is_short():
    limits = {page: (12 if page == "README.md" else 8) * KILOBYTE for page in PAGES}
    sizes = {page: len(text.encode()) for page, text in PAGES.items()}

    assert [f"{page}: {sizes[page]}" for page in PAGES if sizes[page] > limits[page]] == []


def test_the_pictures_are_small_and_each_is_shown():
    pictures = list((ROOT / "data" / "pictures").glob("*"))
    text = "\n".join(PAGES.values())

    assert pictures
    assert sum(path.stat().st_size for path in pictures) < 400 * KILOBYTE
    assert [path.name for path in pictures if f"pictures/{path.name})" not in text] == []


def test_the_command_has_one_spelling():
    others = r"\S*bin/hf-clm|\bhf_clm (?:train|generate|evaluate|prepare)\b|python3? -m hf_clm|\bhfclm\b"
    wrong = [
        f"{page}: {match[0]}"
        for page, text in PAGES.items()
        for match in re.finditer(others, text)
        if not text[: match.start()].endswith("-m ")  # a launcher's
    ]

    assert wrong == []


def test_every_link_leads_to_a_file():
    links = [
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)#]+)\)", text)
        if "://" not in target
    ]

    assert len(links) > 30
    assert [f"{page}: {to}" for page, to in links if not (ROOT / page).parent.joinpath(to).exists()] == []


def test_every_path_that_is_named_exists():
    """From the top of the repository or from the page's folder; data/local is made by scripts."""
    below = r"(?:tests|hf_clm|recipes|data|\.ci)/[\w./-]*\w"
    inside = r"(?:[\w-]+/)*[\w-]+\.(?:py|jinja)|(?:[\w-]+/)+[\w.-]+\.yaml"
    path = rf"(?<![\w./~:$-])({below}|{inside})\b"
    named = [
        (page, name)
        for page, text in PAGES.items()
        for name in re.findall(path, re.sub(r"\w+://\S+", "", text))
        if not name.startswith("data/local/")
    ]
    missing = [
        f"{page}: {name}"
        for page, name in named
        if not any((folder / name).exists() for folder in (ROOT, (ROOT / page).parent))
    ]

    assert len(named) > 100
    assert missing == []


def test_every_make_target_exists():
    made = [(page, words) for page, words in COMMANDS_OF_PAGES if words[0] == "make"]
    wrong = [
        f"{page}: {shlex.join(words)}"
        for page, words in made
        if subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, check=False).returncode
    ]

    assert len(made) > 10
    assert wrong == []


def test_every_script_has_the_options_it_is_called_with():
    called = [(page, words) for page, words in COMMANDS_OF_PAGES if words[0] == "python"]
    wrong = []
    for page, words in called:
        name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        options = [word for word in words[3:] if word.startswith("--")]
        source = (ROOT / name).read_text(encoding="utf-8")
        wrong += [f"{page}: {name} {option}" for option in options if f'"{option}"' not in source]

    assert len(called) > 4
    assert wrong == []


class Understood(UserError):
    """Ends a command as soon as its recipe and options have been read."""

    exit_code = 0


def test_every_command_has_the_options_it_is_called_with(capsys, tmp_path, monkeypatch):
    """Runs and data are missing here, which is found only after the options were understood."""
    open_recipe = hf_clm.draft.open_recipe

    def understand(*words, **options):
        open_recipe(*words, **options)
        raise Understood("understood")

    monkeypatch.setattr(hf_clm.draft, "open_recipe", understand)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = []
    ours = [(page, found) for page, words in COMMANDS_OF_PAGES if (found := own_words(words))]
    for page, words in ours:
        if words[0] in OF_RECIPES:
            words = ["sft/poems" if word in ("RECIPE", "NAME") else word for word in words]
        code = main(words) if words[0] != "COMMAND" else 0
        error = capsys.readouterr().err
        if code not in (0, 2, 3, 4, 6) or REFUSED.search(error):
            wrong.append(f"{page}: hf-clm {shlex.join(words)}: {error}")

    assert {words[0] for _, words in ours} >= {"train", "generate", "evaluate", "config", "merge", "prepare"}
    assert wrong == []


def test_every_command_is_in_the_table():
    assert [name for name in COMMANDS if f"| `hf-clm {name}` |" not in PAGES["README.md"]] == []


def test_every_key_of_a_recipe_that_is_named_exists():
    keys = {key for key, _ in list_keys(Recipe)} | {f"train.{name}" for name in train_fields()}
    sections = {key.partition(".")[0] for key in keys}
    named = [
        (page, key)
        for page in PAGES
        if page != "hf_clm/CHANGES.md"
        for key in re.findall(r"`(?:--)?(\w+\.[a-z][\w.]*)", prose(page))
        if key.partition(".")[0] in sections and not key.endswith((".py", ".png", ".pdf"))
    ]

    assert len(named) > 30
    assert [f"{page}: {key}" for page, key in named if key not in keys] == []


def test_every_extra_that_is_named_exists():
    extras = re.search(
        r"(?s)\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text("utf-8")
    )
    assert extras
    known = set(re.findall(r"(?m)^(\w+) = \[", extras[1]))
    named = {name for text in PAGES.values() for name in re.findall(r"hf_clm\[(\w+)\]", text)}

    assert len(named) > 5
    assert named - known == set()


def test_every_variable_of_the_environment_that_is_named_is_read():
    named = {name for text in PAGES.values() for name in re.findall(r"\bHF_CLM_[A-Z_]+\b", text)}
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "hf_clm").rglob("*.py"))

    assert len(named) >= 3
    assert [name for name in named if name not in source] == []


def test_the_error_in_the_readme_is_the_one_that_is_printed(tmp_path, monkeypatch, capsys):
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "%s", "content": "Hello!"}]}\n'
    (tmp_path / "my.jsonl").write_text(chat % "assistant" + chat % "asistant")
    monkeypatch.chdir(tmp_path)

    assert main(["train", "sft/poems", "--data.train", "{path: my.jsonl, format: messages}"]) == 3

    error = capsys.readouterr().err
    assert error.startswith("error: my.jsonl:2: ")
    assert f"```\n{error}```" in PAGES["README.md"]


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda text: text.splitlines()[0][:40])
def test_a_python_example_runs(page, text, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (ROOT / "hf_clm" / "text" / "templates" / "chatml.jinja").read_text("utf-8")
    folder = save_folder(tmp_path / "model", tiny_model(), tokenizer)
    recipe = build_recipe(tmp_path, [{"prompt": "Hi\n", "completion": "Yes"}])
    write_prepared(tmp_path / "prepared", recipe, byte_tokenizer(), seed=0)
    monkeypatch.chdir(tmp_path)

    places = {"~/.cache/hf_clm/KEY": str(tmp_path / "prepared"), "Qwen/Qwen2.5-0.5B-Instruct": folder}
    for name, path in (places | {"runs/sft-poems": folder, "Qwen/Qwen2.5-0.5B": folder}).items():
        text = text.replace(name, path)
    exec(compile(ast.parse(text), page, "exec"), {})


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Shell scripts by name, which stand in for programs that are not here."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def test_the_slurm_script_starts_a_ray_cluster_and_prepares_on_it(tmp_path):
    """With programs that only say how they were called; three boxes."""
    (script,) = (text for _, text in blocks("sh") if "ray start --head" in text)
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
    (script,) = (text for _, text in blocks("") if "#SBATCH" in text)
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


def test_every_folder_and_module_of_the_package_is_in_its_map():
    """Those inside the folders are described by their own docstrings."""
    entries = sorted(path for path in (ROOT / "hf_clm").glob("*[!d]") if not path.name.startswith("__"))
    missing = [path.name for path in entries if path.name not in PAGES["hf_clm/README.md"]]

    assert len(entries) > 10
    assert missing == []


def test_every_public_name_is_in_the_map():
    assert [name for name in PUBLIC_NAMES if f"`{name}`" not in PAGES["hf_clm/README.md"]] == []


def test_every_recipe_is_in_the_table():
    recipes = sorted((ROOT / "recipes").glob("[aps]*/*.yaml"))
    names = [f"{path.parent.name}/{path.name}" for path in recipes]

    assert len(recipes) >= 18
    assert [name for name in names if f"| `{name}` |" not in PAGES["recipes/README.md"]] == []
