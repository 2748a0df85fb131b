"""``hf-clm merge``: adapters and their model become one plain model, proved to be the same.

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
from hf_clm.generation.load import run_recipe
from hf_clm.generation.prompts import read_prompts, to_prompt_ids
from hf_clm.machine import follow_umask
from hf_clm.model.adapters import is_adapter, load_adapted, read_base
from hf_clm.model.load import load_config, load_model, max_positions
from hf_clm.run_folder import RunRecord, find_record, write_json, write_record
from hf_clm.schema import AnyExample, Document, Example, Segment, whole_text
from hf_clm.text.tokenizer import load_tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 512, 16
TEXT_LENGTH = 200  # characters of a document that serves as a prompt
# Of the largest logit: what rounding the merged weights changes.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

Answers = tuple[torch.Tensor, list[str]]


@dataclass(frozen=True)
class Sameness:
    """How far a merged model is from its parts; ``difference``: as a share of a prompt's largest logit."""

    difference: float
    same_answers: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """What merge.json holds of it."""
        return {
            "largest_logit_difference": self.difference,
            "greedy_agreement": self.same_answers / self.prompts,
            "prompts": self.prompts,
        }


def merge(options: Namespace) -> list[str]:
    """Writes the merged model and merge.json; returns the lines to print.

    Raises RecipeError for a folder without adapters and for an output folder in use, ModelError where the
    merged model is not the same; nothing is written then.
    """
    folder, output = options.run, Path(options.output_dir)
    if not is_adapter(folder):
        raise RecipeError("holds no adapters", where=folder, fix="name the folder of a run with lora")
    if output.exists():
        raise RecipeError("exists", where=str(output), fix="name another --output_dir")
    record = find_record(folder)
    prompts, source = _find_prompts(folder, options.prompts, record=record)
    tokenizer, (base, revision) = load_tokenizer(folder), read_base(folder)
    adapted = load_adapted(folder, tokenizer, attention=None).eval()
    expected = _answer(adapted, tokenizer, prompts=prompts, of="the adapters")
    dtype = options.dtype or _stored_dtype(base, revision)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        plain = adapted.merge_and_unload(safe_merge=True)
        plain.to(getattr(torch, dtype)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        merged = load_model(str(partial), tokenizer, dtype=dtype, attention=None).eval()
        same = _compare(expected, _answer(merged, tokenizer, prompts=prompts, of="the merged model"))
        tolerance = TOLERANCES[dtype] if options.tolerance is None else options.tolerance
        if not same.difference <= tolerance:
            got = f"a logit differs by {same.difference:.2g} of the largest, over {tolerance:g}"
            fix = "a --dtype of more bits, or another --tolerance"
            raise ModelError("the merged model is not the same", where=folder, got=got, fix=fix)
        proof = {**same.to_json(), "tolerance": tolerance, "dtype": dtype, "compared_on": source}
        write_json(partial / "merge.json", {"base": base, "adapters": str(Path(folder).resolve()), **proof})
        if record:  # so that generate and evaluate know the format
            write_record(partial, record)
        follow_umask(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [
        f"merged    {base} and {folder}, in {dtype}",
        f"compared  {same.prompts} prompts of {source}: {same.same_answers} greedy answers are the same, "
        f"logits differ by {same.difference:.1e} of the largest at most",
        f"written   {output}: opens with from_pretrained, without peft",
    ]


def _find_prompts(folder: str, file: str | None, *, record: RunRecord | None) -> tuple[list[Example], str]:
    """At most PROMPTS, and where they come from: a file, or the training data of the run."""
    if file:
        known = record or RunRecord()
        return read_prompts(file, known.format or "text", has_turns=bool(known.has_turns))[:PROMPTS], file
    place = Path(folder).expanduser()
    recipe = run_recipe(str(place)) or run_recipe(str(place.parent))
    if recipe is None:
        what = "has no recipe.yaml, which names its data"
        raise RecipeError(what, where=folder, fix="give prompts: --prompts FILE")
    data = recipe.data
    examples = load_examples(data).examples
    prompts = [_to_prompt(example) for example in examples[:: max(1, len(examples) // PROMPTS)]]
    found = [prompt for prompt in prompts if prompt is not None]
    if not found:
        raise RecipeError("its data hold no prompts", where=folder, fix="give prompts: --prompts FILE")
    return found[:PROMPTS], ", ".join(source.path for source in data.train)


def _to_prompt(example: AnyExample) -> Example | None:
    if isinstance(example, Document) and example.is_text:
        return Document([Segment(whole_text(example)[:TEXT_LENGTH], 1.0)])
    return example.question[0] if example.question else None


@torch.no_grad()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, prompts: list[Example], of: str
) -> Answers:
    """The logits after each prompt, without the pad token's, and a greedy answer to it.

    Of a prompt that is longer than the model's positions its end counts.
    """
    longest = min(PROMPT_TOKENS, max_positions(model.config) or PROMPT_TOKENS)
    logits = []
    asked = to_prompt_ids(prompts, tokenizer, LabelOptions(reasoning="drop"))
    for number in tqdm(range(len(asked)), desc=f"logits of {of}", disable=None, leave=False):
        ids = asked[number]
        found = model(input_ids=torch.tensor([ids[-longest:]]), use_cache=False).logits[0, -1].float()
        found[tokenizer.pad_token_id] = 0.0  # a row that was added for it holds any numbers
        logits.append(found)
    decoding, progress = Decoding(NEW_TOKENS), f"answers of {of}"
    answers = generate(model, tokenizer, prompts=prompts, decoding=decoding, slide=True, progress=progress)
    return torch.stack(logits), [answer.text for answer in answers]


def _compare(expected: Answers, found: Answers) -> Sameness:
    largest = expected[0].abs().amax(dim=1)
    difference = ((expected[0] - found[0]).abs().amax(dim=1) / largest).max()
    same = sum(one == other for one, other in zip(expected[1], found[1], strict=True))
    return Sameness(float(difference), same, len(expected[1]))


def _stored_dtype(base: str, revision: str | None) -> str:
    """Of the base model's files."""
    return str(load_config(base, revision=revision).dtype or torch.float32).removeprefix("torch.")
