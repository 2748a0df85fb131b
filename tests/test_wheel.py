"""The wheel: recipes and their data are in it, and work in any folder without the checkout."""

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(folder), str(ROOT)], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def hf_clm(*words: str, site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command with the package of the wheel, not that of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "hf_clm", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_recipes_and_their_data(wheel):
    names = {name.removeprefix("hf_clm/shipped/") for name in wheel.namelist() if "/shipped/" in name}

    shipped = [
        *ROOT.glob("recipes/**/*.yaml"),
        *ROOT.glob("data/sft/*"),
        *ROOT.glob("data/pretrain/**/*.txt"),
    ]
    assert {path.relative_to(ROOT).as_posix() for path in shipped} <= names
    assert not [name for name in wheel.namelist() if "local/" in name or name.startswith(("tests", "data"))]


def test_the_wheel_says_what_it_is(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = message_from_bytes(wheel.read(name))

    assert (metadata["Name"], metadata["License-Expression"]) == ("hf_clm", "Apache-2.0")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# hf_clm")
    assert "hf_clm/py.typed" in wheel.namelist()


def test_a_shipped_recipe_trains_from_the_wheel_in_any_folder(installed, tmp_path):
    words = ["--max_steps", "2", "--doctor.round_trip", "off", "--output_dir", "runs/mine"]

    listed = hf_clm("recipes", site=installed, folder=tmp_path)
    trained = hf_clm("train", "sft/poems", *words, site=installed, folder=tmp_path)

    assert f"the files are in {installed / 'hf_clm' / 'shipped' / 'recipes'}" in listed.stdout
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/mine/model.safetensors").is_file()
