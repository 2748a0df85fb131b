"""``hf-clm export``: writes a trained model for another runtime, and compares its answers with the run's.

run ----> answers, log-probabilities, token ids <----+  compared: export.json
 |                                                    |
 +--> merged weights, rounded once --> GGUF, or safetensors

Nothing is left behind if the comparison fails.
"""

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_clm.doctor.round_trip import Question, start_round_trip
from hf_clm.errors import RecipeError
from hf_clm.export.compare import PLACE, Sample, check_tokens, compare, observe, read_sample
from hf_clm.export.convert import TYPES, add_stop_tokens, convert, find_converter, remove_start_token
from hf_clm.export.ollama import MODELFILE, write_modelfile
from hf_clm.generation.llama_cpp import LlamaCppModel, import_llama_cpp
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.sampling import stop_ids
from hf_clm.gguf import EXPORT_FILE, SUFFIX, exported_file
from hf_clm.machine import follow_umask, version_of
from hf_clm.merge import find_recipe, merge_weights, recipe_file
from hf_clm.model.adapters import is_adapter
from hf_clm.run_folder import find_record, step_of, write_json, write_record
from hf_clm.schema import Json

ROUND_TRIP_QUESTIONS = 3
SENTENCEPIECE_FILE = "tokenizer.model"  # transformers does not write it again, but the converter needs it
SHARD = "5GB"  # of a file of safetensors
# The largest gap in log-probability (nats) allowed between the exported model's best token and the run's:
# when two tokens are almost tied, rounding decides which one wins.
TOLERANCES = {"f32": 0.02, "f16": 0.02, "bf16": 0.15, "q8_0": 0.5}


def export(options: Namespace) -> list[str]:
    """Writes the folder for another runtime and its export.json; returns the lines to print.

    Raises RecipeError for an existing output folder, for options that conflict and for data without prompts,
    EnvironmentFault without llama.cpp, ModelError for a model that cannot be converted or does not answer as
    the run does.
    """
    output = Path(options.output_dir).expanduser()
    weights = _check_options(options, output)
    tolerance = TOLERANCES[TYPES.get(weights, weights)] if options.tolerance is None else options.tolerance
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as name:
        workspace, folder = Path(name), Path(name) / "export"
        folder.mkdir()
        converter = None if options.to == "safetensors" else _find_llama_cpp(options, workspace)
        run = _load(options)
        sample = read_sample(options, run)
        expected = observe(run, sample)
        plain = _merge(run, options.run)
        facts: dict[str, Json] = {"model": options.run, "to": options.to, "weights": weights}
        if converter is None:
            exported = _write_safetensors(plain, run, folder, sample=sample, dtype=weights)
            lines = [
                "reloaded  with plain from_pretrained in a fresh process: same tokens, template, answers"
            ]
        else:
            file = folder / f"{_name(options.run)}-{weights}{SUFFIX}"
            source = _write_source(plain, run, workspace / "plain", origin=options.run)
            convert(source, file, converter=converter, kind=weights, tokenizer=run.tokenizer)
            exported = _open_gguf(plain, run, file, starts=sample.starts(run.tokenizer.bos_token_id))
            check = check_tokens(exported, run, sample, expected)
            facts |= {"file": file.name, **check._asdict()}
            lines = [f"tokens    llama.cpp tokenizes {check.equal_prompts} prompts as in training"]
            if options.to == "ollama":
                lines += write_modelfile(folder, file.name, run, exported, asked=sample.messages)
        comparison = compare(exported, sample, expected)
        comparison.check(tolerance, fix=_fix(weights))
        lines += comparison.to_lines(sample, tolerance=tolerance)
        _describe(folder, options.run, {**facts, **comparison.to_json(sample, tolerance=tolerance)})
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    return [f"exported  {options.run}, in {weights}", *lines, *_next(output, facts)]


def _check_options(options: Namespace, output: Path) -> str:
    """Returns the type of the weights. Raises RecipeError for options that have no effect."""
    is_folder, quantizes = options.to == "safetensors", options.quantize != "none"
    if output.exists():
        raise RecipeError("already exists", where=str(output), fix="choose another --output_dir")
    if exported_file(options.run):
        raise RecipeError("is an exported model", where=options.run, fix="name the run that was exported")
    for option, is_useless, by in (
        ("--quantize", is_folder and quantizes, "with --to safetensors"),
        ("--llama_cpp", is_folder and options.llama_cpp, "with --to safetensors"),
        ("--dtype", quantizes and options.dtype, "with --quantize"),
        ("--format", options.format and not options.data, "without --data"),
    ):
        if is_useless:
            raise RecipeError(f"has no effect {by}", where=option, fix="remove it")
    if is_folder:
        return options.dtype or "bfloat16"
    return options.quantize if quantizes else TYPES[options.dtype or "float16"]


def _find_llama_cpp(options: Namespace, workspace: Path) -> Path:
    import_llama_cpp(PLACE)
    return find_converter(options.llama_cpp, workspace)


def _load(options: Namespace) -> LoadedRun:
    """Loads the run in float32; adapters of a base in 4 bits on that base, as they were trained."""
    dtype = None if _is_quantized(options.run) else "float32"
    return load_run(options.run, attention=None, device=options.device, dtype=dtype)


def _is_quantized(run: str) -> bool:
    record = find_record(run)
    return is_adapter(run) and record is not None and record.quantized is not None


def _merge(run: LoadedRun, folder: str) -> PreTrainedModel:
    """Returns a model without adapters. It replaces that of the run, whose weights it takes."""
    if not is_adapter(folder):
        return run.model
    return merge_weights(run.model, folder, is_quantized=_is_quantized(folder))


def _write_source(plain: PreTrainedModel, run: LoadedRun, folder: Path, *, origin: str) -> Path:
    """Writes what the converter reads: the model in float32, the tokenizer, and its SentencePiece file."""
    plain.float().save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    recipe = find_recipe(origin)
    names = [origin, recipe.model.name_or_path, recipe.tokenizer.name_or_path] if recipe else [origin]
    for path in (Path(name).expanduser() for name in names if name):
        file = path if path.suffix == ".model" else path / SENTENCEPIECE_FILE
        if file.is_file():
            shutil.copy(file, folder / SENTENCEPIECE_FILE)
            break
    return folder


def _open_gguf(plain: PreTrainedModel, run: LoadedRun, file: Path, *, starts: bool) -> LlamaCppModel:
    """Writes what describes the model beside the file, and opens it with llama.cpp.

    Prompts of the run decide about the start token (``starts``) and the stop tokens in the file.
    """
    run.tokenizer.save_pretrained(file.parent)
    plain.config.save_pretrained(file.parent)
    if plain.generation_config is not None:
        plain.generation_config.save_pretrained(file.parent)
    exported = LlamaCppModel(plain.config, file, device=plain.device)
    missing = sorted(stop_ids(plain) - set(exported.stop_ids()))
    if missing:
        add_stop_tokens(file, missing)
    adds_start = exported.tokenize("", is_chat=False) != []
    if adds_start and not starts:
        remove_start_token(file)
    if missing or adds_start != starts:
        exported = LlamaCppModel(plain.config, file, device=plain.device)
    return exported


def _write_safetensors(
    plain: PreTrainedModel, run: LoadedRun, folder: Path, *, sample: Sample, dtype: str
) -> PreTrainedModel:
    """Writes the folder; loads it in a fresh process with transformers alone, and here."""
    plain.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD)
    run.tokenizer.save_pretrained(folder)
    questions = [Question(prompt.messages, prompt.ids) for prompt in sample.prompts if prompt.messages]
    trip = start_round_trip(folder, sample.rows[0]["input_ids"], questions=questions[:ROUND_TRIP_QUESTIONS])
    trip.finish(plain, run.tokenizer)
    return load_run(str(folder), attention=None, device=str(plain.device), dtype=dtype).model


def _describe(folder: Path, run: str, facts: Mapping[str, Json]) -> None:
    """Writes export.json, and the record and the recipe of the run, which chat and evaluate read."""
    packages = ("hf_clm", "torch", "transformers", "llama_cpp_python")
    write_json(folder / EXPORT_FILE, {**facts, "versions": {name: version_of(name) for name in packages}})
    if record := find_record(run):
        write_record(folder, record)
    if (recipe := recipe_file(run)) is not None:
        shutil.copy(recipe, folder)
    follow_umask(folder)


def _fix(weights: str) -> str:
    better = "--quantize none" if weights == "q8_0" else "a --dtype with more bits"
    return f"choose {better}, or a larger --tolerance"


def _name(run: str) -> str:
    """Returns the name of a run, and of its checkpoint, for the files."""
    path = Path(run).expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if step_of(path) >= 0 else path.name


def _next(output: Path, facts: Mapping[str, Json]) -> list[str]:
    lines = [f"written   {output}"]
    if "file" not in facts:
        return [*lines, f"next      vllm serve {output}"]
    file = output / str(facts["file"])
    lines.append(f"next      llama-server -m {file} --jinja")
    lines.append(f"          hf-clm chat {file}")
    if (output / MODELFILE).exists():
        name = _name(str(facts["model"]))
        lines.append(f"          ollama create {name} -f {output / MODELFILE} && ollama run {name}")
    return lines
