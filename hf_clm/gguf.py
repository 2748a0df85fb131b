"""A model in a GGUF file, the format of llama.cpp, as a folder of transformers.

    model.Q4_1.gguf --dequantized, once--> ~/.cache/hf_clm/gguf/model.Q4_1-1a2b3c4d5e6f/ --> from_pretrained

Everything after that reads the folder: a Trainer needs plain weights, and adapters a base that peft opens.
"""

import json
import logging
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.hashing import fingerprint
from hf_clm.hub import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SUFFIX = ".gguf"
READER = "pip install gguf"
EXPORT_FILE = "export.json"  # lies beside a file that ``hf-clm export`` wrote
KEY_LETTERS = 12  # of the sha256, in the name of the folder

LOGGER = logging.getLogger(__name__)


def is_gguf(name_or_path: str) -> bool:
    """Whether a name is that of a GGUF file, which may be missing."""
    return name_or_path.endswith(SUFFIX) and not Path(name_or_path).expanduser().is_dir()


def exported_file(name_or_path: str) -> Path | None:
    """Returns the GGUF file that a name stands for if it lies in a folder of ``hf-clm export``, else None.

    The name is that of the folder, or of a file in it, such as one that was quantized further.
    """
    path = Path(name_or_path).expanduser()
    folder = path.parent if is_gguf(name_or_path) else path
    try:
        facts = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or another program's
        return None
    name = facts.get("file") if isinstance(facts, dict) else None
    if not isinstance(name, str):
        return None
    file = path if is_gguf(name_or_path) else folder / name
    return file if file.is_file() else None


def settings_folder(name_or_path: str, *, where: str) -> str:
    """Returns the folder with the tokenizer and the configuration of a model; a name on the Hub unchanged.

    For other GGUF files, see ``local_model``.
    """
    file = exported_file(name_or_path)
    return str(file.parent) if file else local_model(name_or_path, where=where)


def local_model(name_or_path: str, *, where: str = "model.name_or_path") -> str:
    """The folder that takes the place of a GGUF file, made where it is missing; any other name unchanged.

    Raises ModelError for a missing file and for a model that transformers cannot read, EnvironmentFault
    without the package gguf and where the folder cannot be written.
    """
    if not is_gguf(name_or_path):
        return name_or_path
    file = Path(name_or_path).expanduser().resolve()
    if not file.is_file():
        raise ModelError("no such file", where=where, got=repr(name_or_path))
    if find_spec("gguf") is None:
        raise EnvironmentFault("needs the package gguf", where=f"{where} {name_or_path}", fix=READER)
    facts = file.stat()
    key = fingerprint([str(file), [facts.st_size, facts.st_mtime_ns]])[:KEY_LETTERS]
    from hf_clm.recipe.sections import Data  # most models are not GGUF files, and need no recipe

    cache = Path(os.environ.get("HF_CLM_CACHE") or Data.model_fields["cache_dir"].default).expanduser()
    folder = cache.absolute() / "gguf" / f"{file.stem}-{key}"
    try:
        if not folder.is_dir():
            _write_folder(file, folder)
    except OSError as error:
        fix = "free the disk, or set HF_CLM_CACHE to another folder"
        raise EnvironmentFault("cannot be written", where=str(folder), got=str(error), fix=fix) from error
    return str(folder)


def load_gguf(file: Path) -> "tuple[PreTrainedTokenizerFast, PreTrainedModel]":
    """The tokenizer and the float32 model of a GGUF file, with what transformers does not read of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as alone:  # other files beside it would be read too
        Path(alone, file.name).symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            alone,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else transformers refuses to save it
        )
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    if _pre_tokenizer_name(file) == "smollm":
        _split_as_smollm(tokenizer)
    return tokenizer, model


def _write_folder(file: Path, folder: Path) -> None:
    """Writes the folder under another name, and renames it when it is complete."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # other processes wait for the first
    with lock, tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        if folder.is_dir():
            return
        with loading(str(file), where="model"):
            tokenizer, model = load_gguf(file)
        made = Path(partial, "model")
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    size = sum(part.stat().st_size for part in folder.iterdir()) / 1e9
    LOGGER.warning("%s: dequantized to %s (%.2f GB), which is used in its place", file.name, folder, size)


def _pre_tokenizer_name(file: Path) -> str:
    """How llama.cpp calls the way in which the text is split before it is tokenized."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field else ""


def _split_as_smollm(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Changes the tokenizer, which transformers gives the splitting of GPT-2: "\\n 12" is split elsewhere."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
