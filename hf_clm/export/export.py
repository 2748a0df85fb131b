"""``hf-clm export``: writes a trained model for another runtime, and compares its answers with the run's.

run ----> ids, answers, log-probabilities <----+  compared: export.json
 |                                              |
 +--> plain weights --> GGUF, or safetensors ---+

The weights are rounded once: adapters are merged in float32. Nothing is left behind if the comparison fails.
"""

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import Renderer
from hf_clm.data.prepared.sets import load_examples
from hf_clm.data.read.plain_template import as_messages
from hf_clm.data.read.records import Examples
from hf_clm.doctor.round_trip import Question, start_round_trip
from hf_clm.errors import ModelError, RecipeError
from hf_clm.evaluation.evaluate import build_dataset, to_data
from hf_clm.evaluation.likelihood import measure_rows
from hf_clm.export.convert import TYPES, add_stop_tokens, convert, find_converter
from hf_clm.export.ollama import MODELFILE, write_modelfile
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.llama_cpp import LlamaCppModel, import_llama_cpp
from hf_clm.generation.load import LoadedRun, load_run, run_recipe
from hf_clm.generation.sampling import stop_ids
from hf_clm.gguf import EXPORT_FILE, SUFFIX, exported_file
from hf_clm.machine import follow_umask, version_of
from hf_clm.merge import merge_weights, to_prompt
from hf_clm.model.adapters import is_adapter
from hf_clm.run_folder import RunRecord, find_record, step_of, write_json, write_record
from hf_clm.schema import Chat, Example, TokenizedExample

PROMPTS, NEW_TOKENS = 100, 32
ROUND_TRIP_QUESTIONS = 3
PLACE = "hf-clm export"
SHARD = "5GB"  # of a file of safetensors
SHARE = 0.98  # of the greedy answers must agree
# How much less likely than its own choice the exported model may find a token of the run's answer, in nats:
# rounding decides between tokens that are about equally likely. In a mean over many tokens, such as the loss,
# most of the rounding cancels out.
TOLERANCES = {"f32": 0.02, "f16": 0.02, "bf16": 0.15, "q8_0": 0.5}
LOSS_TOLERANCE = 0.1


class Prompt(NamedTuple):
    """A prompt of the run's data.

    ids: as in training.
    text: as it is rendered; None if it spells out a control token, which llama.cpp would read as that token.
    messages: for the chat template in the exported file; None if the prompt needs more than messages.
    """

    example: Example
    ids: list[int]
    text: str | None
    messages: list[dict[str, str]] | None


@dataclass(frozen=True)
class Sample:
    """What the run and the exported model are compared on: up to PROMPTS prompts, and rows with targets."""

    prompts: Sequence[Prompt]
    rows: Sequence[TokenizedExample]
    source: str


class Answer(NamedTuple):
    """What the run answers to a prompt, greedily.

    chosen: the tokens of the answer, with the stop token if it ended.
    ids: the prompt and these tokens, except for the last one: what a model has read when it chooses that.
    """

    ids: list[int]
    chosen: list[int]


@dataclass(frozen=True)
class Comparison:
    """How an exported model differs from the run. Losses are means over all targets, in nats.

    gaps: for each answer of the run, how much less likely one of its tokens is in the exported model than the
        most likely one, at most (nats). 0: the exported model answers with the same tokens.
    largest_difference: of the log-probability of one target.
    """

    gaps: Sequence[float]
    targets: int
    loss: float
    exported_loss: float
    largest_difference: float

    @property
    def same_answers(self) -> int:
        """The number of answers that are the same, token for token."""
        return sum(gap == 0 for gap in self.gaps)

    def close_answers(self, tolerance: float) -> int:
        """Returns the number of answers that differ at most where two tokens are about as likely."""
        return sum(gap <= tolerance for gap in self.gaps)

    def check(self, tolerance: float) -> None:
        """Raises ModelError if too many answers differ by more than the tolerance, or if the loss moves."""
        close, count = self.close_answers(tolerance), len(self.gaps)
        change = abs(self.exported_loss - self.loss)
        if close >= SHARE * count and change <= LOSS_TOLERANCE * tolerance:
            return
        got = f"{close} of {count} greedy answers within {tolerance:g} nats, and a loss of "
        got += f"{self.exported_loss:.4f} instead of {self.loss:.4f}"
        fix = "choose --quantize none, a --dtype with more bits, or a larger --tolerance"
        raise ModelError("the exported model does not answer as the run does", where=PLACE, got=got, fix=fix)


def export(options: Namespace) -> list[str]:
    """Writes the folder for another runtime and its export.json; returns the lines to print.

    Raises RecipeError for an existing output folder and for options that conflict, EnvironmentFault without
    llama.cpp, ModelError for a model that cannot be converted or does not answer as the run does.
    """
    output = Path(options.output_dir).expanduser()
    kind = _check_options(options, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        workspace = Path(name)
        converter = None
        if options.to != "safetensors":
            import_llama_cpp(PLACE)
            converter = find_converter(options.llama_cpp, workspace)
        record = find_record(options.run)
        run = _load(options, record)
        sample = read_sample(options, run)
        answers, expected = answer(run, sample), measure(run.model, sample, of="the run")
        plain = run.model
        if is_adapter(options.run):
            is_quantized = record is not None and record.quantized is not None
            plain = merge_weights(run.model, options.run, is_quantized=is_quantized)
        made = workspace / "made"
        made.mkdir()
        facts: dict[str, Any] = {"model": options.run, "to": options.to, "compared_on": sample.source}
        if converter is None:
            lines, exported = _write_safetensors(plain, run.tokenizer, made, sample=sample, dtype=kind)
        else:
            file = made / f"{_name(options.run)}-{kind}{SUFFIX}"
            exported = _write_gguf(plain, run, file, converter=converter)
            facts |= {"file": file.name, **check_tokens(exported, run, sample, answers)}
            lines = [
                f"tokens    {facts['prompts_with_equal_ids']} prompts have the same token ids in llama.cpp"
            ]
        comparison = compare(exported, sample, answers, expected=expected)
        tolerance = TOLERANCES[TYPES.get(kind, kind)] if options.tolerance is None else options.tolerance
        comparison.check(tolerance)
        if isinstance(exported, LlamaCppModel) and options.to == "ollama":
            asked = [prompt.messages for prompt in sample.prompts if prompt.messages]
            lines += write_modelfile(made, facts["file"], run, exported, asked=asked)
        facts |= _figures(comparison, tolerance=tolerance, kind=kind)
        write_json(made / EXPORT_FILE, facts)
        if record:  # chat and evaluate read the format from it
            write_record(made, record)
        follow_umask(made)
        made.rename(output)
    return [
        f"exported  {options.run}, in {kind}",
        *lines,
        *_to_lines(comparison, sample, tolerance=tolerance),
        *_next(output, facts),
    ]


def read_sample(options: Namespace, run: LoadedRun) -> Sample:
    """Reads up to PROMPTS examples of ``--data``, or of the training data of the run, evenly spread.

    Raises RecipeError if the data of the run are not known, DataError if they cannot be read.
    """
    place = Path(options.run).expanduser()
    recipe = run_recipe(str(place)) or run_recipe(str(place.parent))
    if not (options.data or recipe):
        what = "has no recipe.yaml, so its data are not known"
        raise RecipeError(what, where=options.run, fix="set --data to files to compare on")
    data = to_data(options, recipe) if options.data or recipe is None else recipe.data
    every = load_examples(data)
    chosen = range(0, len(every), max(1, -(-len(every) // PROMPTS)))
    read: Examples = replace(
        every,
        examples=[every.examples[at] for at in chosen],
        places=[every.places[at] for at in chosen],
        origins=every.origins[list(chosen)] if len(every.origins) else every.origins,
    )
    dataset = build_dataset(read, run, stage=run.stage, recipe=recipe, max_length=run.max_length)
    questions = [prompt for example in read.examples if (prompt := to_prompt(example))]
    renderer = Renderer(run.tokenizer, run.rendering)
    all_ids = encode_prompts(questions, run.tokenizer, run.rendering)
    prompts = []
    for example, ids in zip(questions, all_ids, strict=True):
        is_literal = not renderer.encoder.may_have_control(example.texts)
        text = "".join(piece.text for piece in renderer.prompt(example)) if is_literal else None
        prompts.append(Prompt(example, ids, text, _to_messages(example, run) if is_literal else None))
    rows = [dataset[at] for at in range(len(dataset))][:PROMPTS]
    return Sample(prompts, rows, ", ".join(source.path for source in data.train))


def answer(run: LoadedRun, sample: Sample) -> list[Answer]:
    """Answers the prompts greedily."""
    generated = generate(
        run.model,
        run.tokenizer,
        prompts=[prompt.example for prompt in sample.prompts],
        decoding=Decoding(NEW_TOKENS),
        slide=True,
        rendering=run.rendering,
        progress="answers of the run",
    )
    answers = []
    for prompt, one in zip(sample.prompts, generated, strict=True):
        chosen = [*one.ids]
        if one.stopped:  # at one of several stop tokens
            chosen.append(int(_next_logprobs(run.model, [*prompt.ids, *chosen], count=1).argmax()))
        answers.append(Answer([*prompt.ids, *chosen[:-1]], chosen))
    return answers


def measure(model: PreTrainedModel, sample: Sample, *, of: str) -> list[np.ndarray]:
    """Returns the negative log-likelihood of the targets of each row, (n,) float32."""
    rows = tqdm(sample.rows, desc=f"loss of {of}", disable=None, leave=False)
    return [measure_rows(model, [row])[0][0] for row in rows]


def compare(
    model: PreTrainedModel, sample: Sample, answers: Sequence[Answer], *, expected: Sequence[np.ndarray]
) -> Comparison:
    """Reads the answers of the run with the exported model, and measures the targets.

    While each token of an answer is also the choice of the exported model, that model answers the same.
    """
    gaps = []
    for ids, chosen in tqdm(answers, desc="answers of the exported model", disable=None, leave=False):
        logprobs = _next_logprobs(model, ids, count=len(chosen))
        found = logprobs.gather(1, torch.tensor(chosen)[:, None])[:, 0]
        gaps.append(float((logprobs.amax(dim=1) - found).max()))
    one, other = np.concatenate(expected), np.concatenate(measure(model, sample, of="the exported model"))
    return Comparison(
        gaps=gaps,
        targets=len(one),
        loss=float(one.mean(dtype=np.float64)),
        exported_loss=float(other.mean(dtype=np.float64)),
        largest_difference=float(np.abs(one - other).max()),
    )


@torch.no_grad()
def _next_logprobs(model: PreTrainedModel, ids: Sequence[int], *, count: int) -> torch.Tensor:
    """Returns the log-probabilities of the tokens after the last ``count`` places, (count, V) on the CPU."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -count:]
    return logits.float().cpu().log_softmax(-1)


def check_tokens(
    exported: LlamaCppModel, run: LoadedRun, sample: Sample, answers: Sequence[Answer]
) -> dict[str, Any]:
    """Compares the ids that llama.cpp reads for each prompt with those of training.

    Prompts that messages can express are rendered with the template in the file. Returns figures for
    export.json. Raises ModelError for the first prompt that differs, and if llama.cpp would stop earlier or
    later than the run.
    """
    tokenizer, literal = run.tokenizer, [prompt for prompt in sample.prompts if prompt.text is not None]
    stops, inside = set(exported.stop_ids()), {id for answer in answers for id in answer.chosen[:-1]}
    for what, tokens in (
        ("would not stop at a stop token of the run", stop_ids(run.model) - stops),
        ("would stop inside an answer of the run", inside & stops),
    ):
        if tokens:
            got = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(tokens))
            raise ModelError(f"llama.cpp {what}", where=PLACE, got=got)
    for prompt in literal:
        text = exported.render(prompt.messages) if prompt.messages else str(prompt.text)
        is_chat = prompt.messages is not None or isinstance(prompt.example, Chat)
        ids = exported.tokenize(text, is_chat=is_chat)
        if ids != prompt.ids:
            at = next((n for n, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), 0)
            got, expected = tokenizer.decode(ids[at:][:12]), tokenizer.decode(prompt.ids[at:][:12])
            what = "llama.cpp reads other tokens than the run was trained on"
            raise ModelError(what, where=PLACE, got=f"{got!r} at token {at} instead of {expected!r}")
    return {
        "prompts_with_equal_ids": len(literal),
        "prompts_through_the_template": sum(prompt.messages is not None for prompt in literal),
        "prompts_that_spell_control_tokens": len(sample.prompts) - len(literal),
        "stop_tokens": [str(tokenizer.convert_ids_to_tokens(token)) for token in exported.stop_ids()],
    }


def _check_options(options: Namespace, output: Path) -> str:
    """Returns the type of the weights. Raises RecipeError for options that have no effect."""
    if output.exists():
        raise RecipeError("already exists", where=str(output), fix="choose another --output_dir")
    if exported_file(options.run):
        raise RecipeError("is an exported model", where=options.run, fix="name the run that was exported")
    if options.to == "safetensors":
        for name, value in (("--quantize", options.quantize), ("--llama_cpp", options.llama_cpp)):
            if value not in (None, "none"):
                raise RecipeError("has no effect with --to safetensors", where=name, fix="remove it")
        return options.dtype or "bfloat16"
    if options.quantize != "none" and options.dtype:
        raise RecipeError("has no effect with --quantize", where="--dtype", fix="remove one of them")
    return options.quantize if options.quantize != "none" else TYPES[options.dtype or "float16"]


def _load(options: Namespace, record: RunRecord | None) -> LoadedRun:
    """Loads the run in float32, or with its base in 4 bits as it was trained."""
    is_quantized = is_adapter(options.run) and record is not None and record.quantized is not None
    dtype = None if is_quantized else "float32"
    return load_run(options.run, attention=None, device=options.device, dtype=dtype)


def _to_messages(example: Example, run: LoadedRun) -> list[dict[str, str]] | None:
    return as_messages(example, run.format, run.template) if run.tokenizer.chat_template else None


def _write_gguf(plain: PreTrainedModel, run: LoadedRun, file: Path, *, converter: Path) -> LlamaCppModel:
    """Writes the file, and beside it what else describes the model; opens it with llama.cpp."""
    with tempfile.TemporaryDirectory(prefix=".plain.", dir=file.parent.parent) as source:
        plain.float().save_pretrained(source)
        run.tokenizer.save_pretrained(source)
        kind = file.stem.rpartition("-")[2]
        convert(Path(source), file, converter=converter, kind=kind, tokenizer=run.tokenizer)
    plain.config.save_pretrained(file.parent)
    if plain.generation_config is not None:
        plain.generation_config.save_pretrained(file.parent)
    run.tokenizer.save_pretrained(file.parent)
    exported = LlamaCppModel(plain.config, file, device=plain.device)
    if missing := sorted(stop_ids(plain) - set(exported.stop_ids())):
        add_stop_tokens(file, missing)
        exported = LlamaCppModel(plain.config, file, device=plain.device)
    return exported


def _write_safetensors(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, *, sample: Sample, dtype: str
) -> tuple[list[str], PreTrainedModel]:
    """Writes the folder, and loads it in a fresh process and here."""
    plain.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    questions = [Question(prompt.messages, prompt.ids) for prompt in sample.prompts if prompt.messages]
    trip = start_round_trip(folder, sample.rows[0]["input_ids"], questions=questions[:ROUND_TRIP_QUESTIONS])
    trip.finish(plain, tokenizer)
    line = (
        "reloaded  with plain from_pretrained in a fresh process: same logits, tokens, template and answers"
    )
    return [line], load_run(str(folder), attention=None, device=str(plain.device), dtype=dtype).model


def _name(run: str) -> str:
    """Returns the name of a run, and of its checkpoint, for the files."""
    path = Path(run).expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if step_of(path) >= 0 else path.name


def _figures(comparison: Comparison, *, tolerance: float, kind: str) -> dict[str, Any]:
    return {
        "weights": kind,
        "prompts": len(comparison.gaps),
        "same_answers": comparison.same_answers,
        "answers_within_tolerance": comparison.close_answers(tolerance),
        "targets": comparison.targets,
        "loss": comparison.loss,
        "exported_loss": comparison.exported_loss,
        "largest_log_probability_difference": comparison.largest_difference,
        "tolerance": tolerance,
        "versions": {name: version_of(name) for name in ("hf_clm", "transformers", "llama_cpp_python")},
    }


def _to_lines(comparison: Comparison, sample: Sample, *, tolerance: float) -> list[str]:
    c, same = comparison, comparison.same_answers
    close = c.close_answers(tolerance) - same
    equal = f", {close} differ only where tokens are equally likely to {tolerance:g} nats" if close else ""
    change = f"{c.loss:.4f} -> {c.exported_loss:.4f} on {c.targets:,} targets"
    return [
        f"compared  {len(c.gaps)} prompts of {sample.source}",
        f"answers   {same} are the same{equal}",
        f"loss      {change}; log-probabilities differ by at most {c.largest_difference:.2g}",
    ]


def _next(output: Path, facts: dict[str, Any]) -> list[str]:
    lines = [f"written   {output}"]
    if facts["to"] == "safetensors":
        return [*lines, f"next      vllm serve {output}"]
    file = output / facts["file"]
    lines.append(f"next      llama-server -m {file} --jinja")
    lines.append(f"          hf-clm chat {file}")
    if (output / MODELFILE).exists():
        name = _name(facts["model"])
        lines.append(f"          ollama create {name} -f {output / MODELFILE} && ollama run {name}")
    return lines
