"""A recipe from a model and data alone, with a reason for each value that is chosen.

    model --config.json, sizes of its weights--> ModelSize --.
                                                             +--> choices --> Recipe
    data ---the first records, sizes of files--> DataSize ---'

The rows in a step are a power of two, however many processes share them, as long as their number is one too.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from hf_clm.data.read.files import find_files
from hf_clm.data.read.formats import detect_format
from hf_clm.data.read.opening import file_size, is_remote
from hf_clm.data.read.readers import TEXTS, ReadOptions, ReadReport, compression, suffix
from hf_clm.data.read.sources import read_file
from hf_clm.errors import DataError, RecipeError
from hf_clm.hub import load_options
from hf_clm.machine import has_gpu
from hf_clm.recipe.faults import shorten
from hf_clm.recipe.recipe import Recipe, build_recipe, describe_recipe, load_recipe, read_overrides
from hf_clm.recipe.sections import Source, to_sources
from hf_clm.recipe.text import COMMAND_LINE, override

SAMPLED_RECORDS = 1000
BYTES_PER_TOKEN = 4  # of UTF-8 text, in English and in Chinese alike
# The usual words in the name of a GGUF file -> bytes for each parameter; 4 to 5 bits otherwise.
GGUF_BYTES = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8": 1.1, "q6": 0.8}
PACKED = 5  # about how much larger the text of a compressed file or of Parquet is
STEPS = 100  # in a run at least, if the data suffice
LARGE = 1_500_000_000  # parameters; from here on LoRA: AdamW alone would take more than 24 GB
CHOSEN = "chosen: "  # begins the place of a value that was chosen here


@dataclass(frozen=True)
class ModelSize:
    """``parameters`` and ``positions`` (the longest input, in tokens) are None if the files do not tell."""

    parameters: int | None = None
    positions: int | None = None


@dataclass(frozen=True)
class DataSize:
    """What the training data are like, estimated.

    length     tokens that 99 of 100 records do not exceed
    is_text    whether the records are texts without prompts
    """

    records: int
    tokens: int
    length: int
    is_text: bool

    def __str__(self) -> str:
        if not self.records:
            return "data of unknown size"
        records = f"{self.records:,} record{'s' * (self.records != 1)}"
        return f"about {records} and {self.tokens:,} tokens"


@dataclass(frozen=True)
class Choice:
    """A value of a recipe that is chosen, and why."""

    key: str
    value: object
    reason: str


def open_recipe(target: str, overrides: Sequence[str], *, options: Sequence[str] = ()) -> Recipe:
    """Loads a recipe, or drafts one around ``["--model", MODEL, "--data", FILE, ...]`` if there is no target.

    Args:
        target, overrides, options: see ``load_recipe``.
    """
    if target:
        return load_recipe(target, overrides, options=options)
    return draft_recipe(list(read_overrides(overrides, options=options)), origin=COMMAND_LINE)


def draft_recipe(given: Sequence[tuple[str, object]], *, origin: str) -> Recipe:
    """Drafts a recipe around what is given: (dotted key, value), a model and training data among them.

    Args:
        origin: where the given values come from, such as "command line".

    Raises RecipeError without a model or data, and for a value that no recipe takes; DataError for missing
    files; ModelError and EnvironmentFault for a model that cannot be found.
    """
    values = dict(given)
    name, train = values.get("model.name_or_path"), values.get("data.train")
    if not isinstance(name, str) or not name or not train:
        missing = "data" if name else "a model"
        fix = "hf-clm train --model MODEL --data FILE [--key value ...], or hf-clm train RECIPE"
        raise RecipeError(f"needs a recipe, or a model and data: {missing} is missing", fix=fix)
    revision = values.get("model.revision")
    size, data = measure_model(name, str(revision) if revision else None), measure_data(train)
    tree: dict[str, Any] = {}
    places: dict[str, str] = {}
    for choice in choose(values, size, data):
        override(tree, places, key=choice.key, value=choice.value, place=f"{CHOSEN}{choice.reason}")
    for key, value in given:
        override(tree, places, key=key, value=value, place=origin)
    # Without the places of sections, a missing key is not blamed on the first key chosen in its section.
    return build_recipe(tree, {key: place for key, place in places.items() if "." in key or key == "stage"})


def to_lines(recipe: Recipe) -> list[str]:
    """Returns the lines that show what was chosen and why; none for a recipe that was read."""
    choices = list(_choices_of(recipe))
    if not choices:
        return []
    width = max(len(f"{key}: {value}") for key, value, _ in choices)
    names = [recipe.model.name_or_path, ", ".join(source.path for source in recipe.data.train)]
    lines = [f"recipe    made for {names[0]} and {names[1]}; every value can be given instead"]
    lines += [f"{'':<10}{f'{key}: {value}':<{width}}  {reason}".rstrip() for key, value, reason in choices]
    return lines


def choose(values: Mapping[str, object], size: ModelSize, data: DataSize) -> Iterator[Choice]:
    """Yields what is chosen around the given values, in the order of a recipe."""
    stage = str(values.get("stage") or ("pretrain" if data.is_text else "sft"))
    yield Choice("stage", stage, "texts without prompts" if stage == "pretrain" else "prompts and answers")
    parameters = size.parameters or 500_000_000
    is_adapted = bool(values.get("lora", parameters >= LARGE)) or any(
        key.startswith("lora.") for key in values
    )
    if is_adapted and "lora" not in values:
        reason = f"adapters, as training all {_billions(parameters)} parameters takes over 24 GB"
        yield Choice("lora.r", 16, reason)
    length = choose_length(size, data, stage=stage)
    yield Choice("data.max_length", length, _length_reason(length, size, data, stage=stage))
    epochs = _epochs(data, stage=stage)
    given_length, given_epochs = values.get("data.max_length"), values.get("train.num_train_epochs")
    length = given_length if isinstance(given_length, int) else length
    is_packed = values.get("data.packing") != "none"
    rows_per_epoch = data.tokens // max(1, length) if is_packed else data.records
    rows = max(1, rows_per_epoch) * float(str(given_epochs or epochs))
    per_step = 2 ** min(4, max(0, math.floor(math.log2(max(1, rows / STEPS)))))
    can_hold_out = data.records >= 20 or (data.records == 1 and data.is_text and data.tokens >= 2000)
    holds_out = can_hold_out and not values.keys() & {"data.eval", "data.eval_fraction", "data.streaming"}
    if holds_out:
        fraction = round(min(0.1, max(0.005, 100 / data.records)), 3)
        yield Choice("data.eval_fraction", fraction, "held out, to see the loss on new data")
    if holds_out and stage == "sft" and not any(key.startswith("evaluation") for key in values):
        yield Choice("evaluation.generate", 3, "held-out prompts that are answered before and after")
        yield Choice("evaluation.every", 10, "evaluations from one set of answers to the next")
        yield Choice("evaluation.max_new_tokens", 64, "the longest answer")
    yield Choice("train.output_dir", _output_dir(values, is_adapted=is_adapted), "from both names")
    yield Choice("train.num_train_epochs", epochs, f"usual for {data}")
    yield from _batch(per_step, values.get("train.per_device_train_batch_size"))
    rate = learning_rate(parameters, is_adapted=is_adapted)
    what = "LoRA" if is_adapted else f"{_billions(parameters)} parameters"
    yield Choice("train.learning_rate", rate, f"usual for {what}")
    share = 0.1 if rows / per_step >= 20 else 0.5
    if (holds_out or values.get("data.eval") or values.get("data.eval_fraction")) and (
        "train.eval_strategy" not in values
    ):
        yield Choice("train.eval_strategy", "steps", "to follow the loss on new data")
        yield Choice("train.eval_steps", share, "a share of the run")
    if "train.save_strategy" not in values:
        yield Choice(
            "train.save_strategy", "steps", "so that the same command resumes a run that was stopped"
        )
        yield Choice("train.save_steps", share, "a share of the run")
    is_long = rows / per_step >= 50
    reason = "about 50 lines in the log" if is_long else "every step"
    yield Choice("train.logging_steps", 0.02 if is_long else 1, reason)


def choose_length(size: ModelSize, data: DataSize, *, stage: str) -> int:
    """Returns the tokens of a row: a power of two that 99 % of the records fit, within the model's limit."""
    wanted = 1024 if stage == "pretrain" else 2 ** math.ceil(math.log2(max(256, data.length)))
    return min(wanted, 2048, size.positions or 2048)


def learning_rate(parameters: int, *, is_adapted: bool) -> float:
    """Returns the rate that is usual for AdamW at this size; that of LoRA is about ten times as high."""
    rate = 5e-5 if parameters < 300_000_000 else 2e-5 if parameters < 3_000_000_000 else 1e-5
    return min(2e-4, 10 * rate) if is_adapted else rate


def measure_model(name: str, revision: str | None = None) -> ModelSize:
    """Reads sizes from the files of a model, or asks the Hub, without loading it.

    Raises ModelError and EnvironmentFault for a model that cannot be found.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return ModelSize(int(path.stat().st_size / _gguf_bytes(path.name)))
    load_options(name, revision=revision, where="--model")
    if not path.is_dir():
        return _measure_on_hub(name, revision)
    config = _read_json(path / "config.json")
    return ModelSize(_count_parameters(sorted(path.glob("*.safetensors"))), _positions(config))


def measure_data(train: Any) -> DataSize:
    """Estimates the size of the training data from the first records and the sizes of the files.

    Raises RecipeError for what is no source, and DataError for files that do not exist.
    """
    try:
        sources = [Source.model_validate(item) for item in to_sources(train)]
    except ValidationError:
        return DataSize(0, 0, 1024, is_text=False)  # the recipe will say what is wrong
    lengths: list[int] = []
    records = size = 0.0
    is_text = bool(sources)
    for source in sources:
        files = None if is_remote(source.path) else find_files(source.path, split=source.split)
        if files is None:
            return DataSize(0, 0, 1024, is_text=source.format == "text")
        found, share = _sample(files, source)
        lengths += [bytes // BYTES_PER_TOKEN for bytes, _ in found]
        count = min(len(found) / share, source.limit or math.inf)
        records, size = records + count, size + count * float(np.mean([bytes for bytes, _ in found] or [0]))
        is_text = is_text and all(is_whole for _, is_whole in found)
    longest = int(np.percentile(lengths, 99)) if lengths else 0
    return DataSize(round(records), round(size / BYTES_PER_TOKEN), longest, is_text and bool(lengths))


def _sample(files: Sequence[str], source: Source) -> tuple[list[tuple[int, bool]], float]:
    """(bytes of text, whether it is a text without prompt) of the first records, and the share they are."""
    found: list[tuple[int, bool]] = []
    seen = 0.0
    total = sum(_text_bytes(file) for file in files)
    for file in files:
        left = SAMPLED_RECORDS - len(found)
        try:
            records = islice(read_file(file, ReadOptions(quoting=source.quoting), report=ReadReport()), left)
            values = [record.data for record in records]
        except DataError:
            break  # the checks of the data say more about it
        found += [(_bytes_of(value), _is_text(value, file, source)) for value in values]
        is_cut = len(values) == left
        seen += (
            sum(len(json.dumps(value, default=str)) + 1 for value in values) if is_cut else _text_bytes(file)
        )
        if len(found) >= SAMPLED_RECORDS:
            break
    return found, min(1.0, max(seen / total, 1e-9)) if total else 1.0


def _is_text(value: dict[str, Any], file: str, source: Source) -> bool:
    if source.format or source.template:
        return source.format == "text" or (source.template is not None and bool(source.template.text))
    try:
        return suffix(file) in TEXTS or detect_format(value, fields=source.fields) == "text"
    except (DataError, RecipeError):
        return False


def _bytes_of(value: object) -> int:
    """Returns the number of bytes in the texts of a record."""
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list):
        return sum(map(_bytes_of, value)) if not value or not isinstance(value[0], int) else 4 * len(value)
    return len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0


def _text_bytes(file: str) -> int:
    return file_size(file) * (PACKED if compression(file) or suffix(file) == ".parquet" else 1)


def _gguf_bytes(name: str) -> float:
    return next((size for word, size in GGUF_BYTES.items() if word in name.lower()), 0.6)


def _measure_on_hub(name: str, revision: str | None) -> ModelSize:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        config = _read_json(Path(hf_hub_download(name, "config.json", revision=revision)))
        weights = HfApi().model_info(name, revision=revision, timeout=10).safetensors
    except Exception:  # a draft can do without; what loads the model says what is wrong
        return ModelSize()
    return ModelSize(weights.total if weights else None, _positions(config))


def _count_parameters(files: Sequence[Path]) -> int | None:
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                names = weights.keys()
                shapes = [weights.get_slice(name).get_shape() for name in names]
        except (OSError, SafetensorError):
            return None
        count += sum(math.prod(shape) for shape in shapes)
    return count or None


def _positions(config: dict[str, Any]) -> int | None:
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    return next((value for value in found if isinstance(value, int) and value > 1), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _epochs(data: DataSize, *, stage: str) -> int:
    if not data.records:
        return 1
    if stage == "pretrain":
        return 3 if data.tokens < 1_000_000 else 1
    return 3 if data.records < 10_000 else 2 if data.records < 50_000 else 1


def _length_reason(length: int, size: ModelSize, data: DataSize, *, stage: str) -> str:
    if length == size.positions:
        return "all that the model can read"
    if stage == "pretrain":
        return "the usual length of a row"
    return "99 % of the records fit" if data.length <= length else "the longest records are cut"


def _batch(rows: int, given: object) -> Iterator[Choice]:
    """Micro-batches of up to 4 rows on a GPU; on a CPU a larger one would only take more memory.

    Args:
        given: the rows that are computed at once, if the caller chooses.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    largest = given if isinstance(given, int) and given > 0 else 4 if has_gpu() else 1
    micro = largest if given else max(1, min(rows // processes, largest))
    accumulated = max(1, rows // (micro * processes))
    yield Choice("train.per_device_train_batch_size", micro, "rows that are computed at once")
    total = micro * accumulated * processes
    yield Choice("train.gradient_accumulation_steps", accumulated, f"rows in a step: {total}")


def _output_dir(values: Mapping[str, object], *, is_adapted: bool) -> str:
    sources = to_sources(values["data.train"])
    first = sources[0].get("path", "") if isinstance(sources[0], dict) else ""
    model = Path(str(values["model.name_or_path"])).name.removesuffix(".gguf")
    names = [model, Path(first).name.partition(".")[0]]
    parts = [re.sub(r"[^\w.-]+", "-", name).strip("-.").lower() for name in names]
    return "runs/" + "-".join([*filter(None, parts), *(["lora"] if is_adapted else [])])


def _choices_of(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    for key, value, origin in describe_recipe(recipe):
        if origin.startswith(CHOSEN):
            text = value if isinstance(value, str) else shorten(value)
            yield key.removeprefix("train."), text, origin.removeprefix(CHOSEN)


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
