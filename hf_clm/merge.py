"""``hf-clm merge``: merges adapters into their base model, and verifies that the result is equivalent.

base + adapters ----> logits, answers <----+  compared
      |                                    |
      +--> merge --> folder --> from_pretrained
"""

import shutil
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.data.prepared.sets import load_examples
from hf_clm.errors import ModelError, RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import answer_dtype, find_device, load_quantized, move_to, run_recipe
from hf_clm.generation.prompts import read_prompts, to_prompt_ids
from hf_clm.machine import follow_umask
from hf_clm.model.adapters import attach_adapters, is_adapter, load_adapted, read_base
from hf_clm.model.load import load_config, load_model, max_positions
from hf_clm.recipe.recipe import Recipe
from hf_clm.run_folder import Quantized, RunRecord, find_record, step_of, write_json, write_record
from hf_clm.schema import AnyExample, Document, Example, Segment, whole_text
from hf_clm.text.tokenizer import load_tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 512, 16
TEXT_LENGTH = 200  # characters of a document that are used as a prompt
# Relative to the largest logit: the effect of rounding the merged weights.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

Answers = tuple[torch.Tensor, list[str]]


@dataclass(frozen=True)
class Comparison:
    """How a merged model differs from its parts. ``difference``: relative to a prompt's largest logit."""

    difference: float
    same_answers: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """Returns the content of merge.json."""
        return {
            "largest_logit_difference": self.difference,
            "greedy_agreement": self.same_answers / self.prompts,
            "prompts": self.prompts,
        }


def merge(options: Namespace) -> list[str]:
    """Writes the merged model and merge.json; returns the lines to print.

    Raises RecipeError for a folder without adapters and for an existing output folder, ModelError if the
    merged model is not equivalent. Nothing is written then.
    """
    folder, output = options.run, Path(options.output_dir)
    if not is_adapter(folder):
        raise RecipeError("contains no adapters", where=folder, fix="name the folder of a run with lora")
    if output.exists():
        raise RecipeError("already exists", where=str(output), fix="choose another --output_dir")
    record = find_record(folder)
    prompts, source = _find_prompts(folder, options.prompts, record=record)
    tokenizer, (base, revision) = load_tokenizer(folder), read_base(folder)
    stored, device = _stored_dtype(base, revision), find_device(options.device)
    dtype, quantized = options.dtype or stored, record.quantized if record else None
    kinds = {stored, dtype, answer_dtype(device)}  # if they differ, only the result is rounded
    kind = quantized.compute if quantized else dtype if len(kinds) == 1 else "float32"
    if quantized:
        adapted = load_quantized(folder, tokenizer, quantized=quantized)
    else:
        adapted = load_adapted(folder, tokenizer, attention=None, dtype=kind)
    move_to(adapted, device)
    expected = _answer(adapted.eval(), tokenizer, prompts=prompts, of="the adapters")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        plain = merge_weights(adapted, folder, is_quantized=quantized is not None)
        plain.to(getattr(torch, dtype)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del adapted, plain  # there is memory for one model
        merged = load_model(str(partial), tokenizer, dtype=dtype, attention=None).eval()
        move_to(merged, device)
        comparison = _compare(expected, _answer(merged, tokenizer, prompts=prompts, of="the merged model"))
        rounding = max(TOLERANCES[dtype], TOLERANCES[kind])
        tolerance = rounding if options.tolerance is None else options.tolerance
        if not comparison.difference <= tolerance:
            share = f"{comparison.difference:.2g} of the largest"
            got = f"a logit that differs by {share}, more than {tolerance:g}"
            fix = "choose a --dtype with more bits, or a larger --tolerance"
            raise ModelError("the merged model is not equivalent", where=folder, got=got, fix=fix)
        proof = {**comparison.to_json(), "tolerance": tolerance, "dtype": dtype, "compared_on": source}
        proof["compared_with"] = f"the base in {_base_name(quantized, kind)}"
        write_json(partial / "merge.json", {"base": base, "adapters": str(Path(folder).resolve()), **proof})
        if record:  # generate and evaluate read the format from it
            write_record(partial, record)
        follow_umask(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [
        f"merged    {base} and {folder}, in {dtype}",
        f"compared  {comparison.prompts} prompts of {source}: {comparison.same_answers} greedy answers are "
        f"the same, logits differ by at most {comparison.difference:.1e} of the largest",
        f"          expected: {base} in {_base_name(quantized, kind)}, with the adapters",
        f"written   {output}: loads with from_pretrained, without peft",
    ]


def merge_weights(adapted: Any, folder: str, *, is_quantized: bool) -> PreTrainedModel:
    """Returns the base with the adapters merged into its weights.

    The weights of a base in 4 bits are dequantized first. They are those that the adapters were trained
    with: the published weights differ from them, and peft would round the merged weights to 4 bits again.
    """
    if is_quantized:
        adapted = attach_adapters(adapted.unload().dequantize(dtype=torch.float32), folder)
    return adapted.merge_and_unload(safe_merge=True)


def _base_name(quantized: Quantized | None, kind: str) -> str:
    return f"4 bits as in training, computing in {kind}" if quantized else kind


def _find_prompts(folder: str, file: str | None, *, record: RunRecord | None) -> tuple[list[Example], str]:
    """Returns at most PROMPTS prompts and their source: a file, or the training data of the run."""
    if file:
        run = record or RunRecord()
        return read_prompts(file, run.format or "text", has_turns=bool(run.has_turns))[:PROMPTS], file
    recipe = find_recipe(folder)
    if recipe is None:
        what = "has no recipe.yaml, so its data are not known"
        raise RecipeError(what, where=folder, fix="set --prompts to a file")
    data = recipe.data
    examples = load_examples(data).examples
    sampled = [to_prompt(example) for example in examples[:: max(1, len(examples) // PROMPTS)]]
    prompts = [prompt for prompt in sampled if prompt is not None]
    if not prompts:
        raise RecipeError("its data contain no prompts", where=folder, fix="set --prompts to a file")
    return prompts[:PROMPTS], ", ".join(source.path for source in data.train)


def recipe_file(run: str) -> Path | None:
    """Returns the recipe of a run, or of the run of a checkpoint; None if there is none."""
    path = Path(run).expanduser()
    file = (path.parent if step_of(path) >= 0 else path) / "recipe.yaml"
    return file if file.is_file() else None


def find_recipe(run: str) -> Recipe | None:
    """Returns the content of ``recipe_file``."""
    file = recipe_file(run)
    return run_recipe(str(file.parent)) if file else None


def to_prompt(example: AnyExample) -> Example | None:
    """Returns the question of an example, or the beginning of a text; None if it has neither."""
    if isinstance(example, Document) and example.is_text:
        return Document([Segment(whole_text(example)[:TEXT_LENGTH], 1.0)])
    return example.question[0] if example.question else None


@torch.no_grad()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, prompts: list[Example], of: str
) -> Answers:
    """Returns the logits after each prompt, with the pad token's set to 0, and a greedy answer to it.

    Only the end of a prompt that is longer than the model's positions is used.
    """
    longest = min(PROMPT_TOKENS, max_positions(model.config) or PROMPT_TOKENS)
    logits = []
    prompt_ids = to_prompt_ids(prompts, tokenizer, LabelOptions(reasoning="drop"))
    for number in tqdm(range(len(prompt_ids)), desc=f"logits of {of}", disable=None, leave=False):
        ids = torch.tensor([prompt_ids[number][-longest:]], device=model.device)
        last = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        last[tokenizer.pad_token_id] = 0.0  # an added row of the embeddings has arbitrary values
        logits.append(last)
    decoding, progress = Decoding(NEW_TOKENS), f"answers of {of}"
    answers = generate(model, tokenizer, prompts=prompts, decoding=decoding, slide=True, progress=progress)
    return torch.stack(logits), [answer.text for answer in answers]


def _compare(expected: Answers, merged: Answers) -> Comparison:
    largest = expected[0].abs().amax(dim=1)
    difference = ((expected[0] - merged[0]).abs().amax(dim=1) / largest).max()
    same = sum(one == other for one, other in zip(expected[1], merged[1], strict=True))
    return Comparison(float(difference), same, len(expected[1]))


def _stored_dtype(base: str, revision: str | None) -> str:
    """Returns the dtype of the base model's files."""
    return str(load_config(base, revision=revision).dtype or torch.float32).removeprefix("torch.")
