"""Writes a GGUF file with the converter of llama.cpp, which runs in a process of its own."""

import json
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hf_clm.errors import EnvironmentFault, ModelError, RecipeError

VARIABLE = "LLAMA_CPP"
CONVERTER = "convert_hf_to_gguf.py"
PREFIXES = (f"vendor/llama.cpp/{CONVERTER}", "vendor/llama.cpp/conversion/", "vendor/llama.cpp/gguf-py/")
HOW_TO_GET_IT = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, or "
    "pip download --no-deps --no-binary :all: llama-cpp-python, and name the folder or the .tar.gz with "
    "--llama_cpp or LLAMA_CPP"
)
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # dtype in transformers -> in llama.cpp
# Of published tokenizers -> llama.cpp's name. A tokenizer that is trained for a new Qwen2 has the first.
PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
}

# The converter identifies the pre-tokenizer by the hash of an encoded text, and refuses unknown hashes, as of
# tokenizers trained here, whose pre-tokenizer we know. export compares the ids in any case.
RUNNER = """
import runpy, sys
folder, pre_tokenizer, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = f"{folder}/convert_hf_to_gguf.py"
sys.path[:0] = [folder, f"{folder}/gguf-py"]
if pre_tokenizer:
    from conversion.base import TextModel
    find_published = TextModel.get_vocab_base_pre
    def find(self, tokenizer):
        try:
            return find_published(self, tokenizer)
        except NotImplementedError:
            return pre_tokenizer
    TextModel.get_vocab_base_pre = find
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_converter(place: str | None, workspace: Path) -> Path:
    """Returns the folder of llama.cpp: a checkout, or a part of the source package of llama-cpp-python.

    A ``.tar.gz`` is unpacked into ``workspace``. Raises RecipeError if the place has no converter,
    EnvironmentFault if none is named.
    """
    where = "--llama_cpp" if place else VARIABLE
    place = place or os.environ.get(VARIABLE)
    if not place:
        what = "needs the converter of llama.cpp"
        raise EnvironmentFault(what, where="hf-clm export", fix=HOW_TO_GET_IT)
    path = Path(place).expanduser()
    if path.name.endswith(".tar.gz") and path.is_file():
        path = _unpack(path, workspace)
    for folder in (path, path / "vendor" / "llama.cpp"):
        if (folder / CONVERTER).is_file():
            return folder.resolve()
    raise RecipeError(f"has no {CONVERTER}", where=where, got=place, fix=HOW_TO_GET_IT)


def convert(
    folder: Path, file: Path, *, converter: Path, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Converts a folder of transformers to a GGUF file of a ``kind``: f32, f16, bf16 or q8_0.

    Raises ModelError with the converter's last line if it refuses the model or its tokenizer.
    """
    place = folder / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    if "n_positions" in config:  # the converter reads GPT-2's old name, which transformers no longer writes
        place.write_text(json.dumps({"n_ctx": config["n_positions"], **config}), encoding="utf-8")
    place = folder / "tokenizer_config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    place.write_text(json.dumps({"add_bos_token": starts, **config}), encoding="utf-8")
    pre_tokenizer = pre_tokenizer_of(tokenizer) if (converter / "conversion").is_dir() else ""
    words = [str(converter), pre_tokenizer, str(folder), "--outfile", str(file), "--outtype", kind]
    _run(["-c", RUNNER, *words], what="llama.cpp's converter refuses the model")


def add_stop_tokens(file: Path, stop_ids: Sequence[int]) -> None:
    """Names up to two more tokens in a GGUF file at which llama.cpp ends an answer (``eot`` and ``eom``).

    Raises ModelError for more.
    """
    if len(stop_ids) > 2:
        what = "a GGUF file can name only two additional stop tokens"
        raise ModelError(what, where="hf-clm export", got=", ".join(map(str, stop_ids)))
    named = [
        ["--special-token-by-id", name, str(id)] for name, id in zip(("eot", "eom"), stop_ids, strict=False)
    ]
    changed = file.with_name(f".{file.name}")
    words = ["-m", "gguf.scripts.gguf_new_metadata", str(file), str(changed), *chain(*named), "--force"]
    _run(words, what="the stop tokens cannot be added")
    changed.replace(file)


def remove_start_token(file: Path) -> None:
    """Makes llama.cpp begin a prompt without a start token.

    In a chat, transformers leaves it to the template; llama.cpp adds it where the tokenizer does for texts.
    """
    words = [
        "-m",
        "gguf.scripts.gguf_set_metadata",
        str(file),
        "tokenizer.ggml.add_bos_token",
        "",  # false: the script reads any other text as true
        "--force",
    ]
    _run(words, what="the start token cannot be removed")


def _run(words: Sequence[str], *, what: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            what, where="hf-clm export", got=lines[-1] if lines else f"exit code {done.returncode}"
        )


def _unpack(package: Path, workspace: Path) -> Path:
    """Unpacks the converter of a source package, and returns the folder of the package."""
    try:
        with tarfile.open(package) as archive:
            names = [name for name in archive.getnames() if name.partition("/")[2].startswith(PREFIXES)]
            archive.extractall(workspace, members=[archive.getmember(name) for name in names], filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        what = "cannot be unpacked"
        raise RecipeError(what, where=str(package), got=str(error), fix=HOW_TO_GET_IT) from error
    return workspace / names[0].partition("/")[0] if names else workspace


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns llama.cpp's name for the pre-tokenizer; empty for an unusual one."""
    first = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    *before, last = first.get("pretokenizers", [first])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ""
    if not last.get("use_regex", True):
        patterns = [step.get("pattern", {}).get("Regex") for step in before]
        return PATTERNS.get(patterns[0], "") if len(patterns) == 1 else ""
    if not before:
        return "gpt-2"
    return "smollm" if before == [{"type": "Digits", "individual_digits": True}] else ""
