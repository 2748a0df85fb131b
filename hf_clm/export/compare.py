"""What a run and an exported model are compared on, and how they differ.

sample of the data ---> the run              ---> greedy answers, log-probabilities of the targets
                   ---> the exported model   ---> the same, for the tokens of these answers and targets
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import Renderer
from hf_clm.data.prepared.sets import load_examples
from hf_clm.data.read.plain_template import as_messages
from hf_clm.errors import ModelError, RecipeError
from hf_clm.evaluation.evaluate import build_dataset, to_data
from hf_clm.evaluation.likelihood import measure_rows
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.llama_cpp import LlamaCppModel
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.sampling import stop_ids
from hf_clm.merge import find_recipe, to_prompt
from hf_clm.model.load import max_positions
from hf_clm.schema import Chat, Example, Json, TokenizedExample

PROMPTS, NEW_TOKENS = 100, 32
PLACE = "hf-clm export"
SHARE = 0.98  # of the greedy answers must agree
# A mean over many tokens may move by this part of the tolerance for one: most of the rounding cancels out.
LOSS_TOLERANCE = 0.1


class Prompt(NamedTuple):
    """A prompt of the data.

    ids: as in training.
    text: as rendered; None if it spells out a control token, which llama.cpp would parse as that token.
    messages: for the chat template in the exported file; None if the prompt needs more than messages.
    """

    example: Example
    ids: list[int]
    text: str | None
    messages: list[dict[str, str]] | None


@dataclass(frozen=True)
class Sample:
    """Prompts, and rows with targets: up to PROMPTS of each, evenly spread over the data.

    new_tokens: maximum length of an answer.
    too_long: number of prompts without room for an answer, which were left out.
    """

    prompts: Sequence[Prompt]
    rows: Sequence[TokenizedExample]
    source: str
    new_tokens: int = NEW_TOKENS
    too_long: int = 0

    def starts(self, token: object) -> bool:
        """Returns whether all prompts begin with this token id."""
        return all(prompt.ids[0] == token for prompt in self.prompts)

    @property
    def messages(self) -> list[list[dict[str, str]]]:
        """The prompts that are messages."""
        return [prompt.messages for prompt in self.prompts if prompt.messages]


class Answer(NamedTuple):
    """What the run answers to a prompt, greedily.

    chosen: the tokens of the answer, with the stop token if it ended.
    ids: the prompt and these tokens, except for the last one: the input for which the last one is chosen.
    """

    ids: list[int]
    chosen: list[int]


class Expected(NamedTuple):
    """What the run makes of a sample. ``nll``: negative log-likelihood of all targets, (n,) float32."""

    answers: list[Answer]
    nll: np.ndarray


class TokenCheck(NamedTuple):
    """What llama.cpp tokenizes as in training. Prompts that spell control tokens are not checked."""

    equal_prompts: int
    through_the_template: int
    unchecked_prompts: int
    stop_tokens: list[str]


@dataclass(frozen=True)
class Comparison:
    """How an exported model differs from the run. Losses are means over all targets, in nats.

    gaps: for each answer, the largest gap, over its tokens, between the best log-probability of the exported
        model and that of the run's token (nats). 0: the exported model answers with the same tokens.
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
        """Returns the number of answers whose gap is within the tolerance."""
        return sum(gap <= tolerance for gap in self.gaps)

    def check(self, tolerance: float, *, fix: str) -> None:
        """Raises ModelError if too many answers, or the loss, are not within the tolerance."""
        close, count = self.close_answers(tolerance), len(self.gaps)
        change = abs(self.exported_loss - self.loss)
        if close >= SHARE * count and change <= LOSS_TOLERANCE * tolerance:
            return
        got = f"{close} of {count} greedy answers within {tolerance:g} nats, and a loss of "
        got += f"{self.exported_loss:.4f} instead of {self.loss:.4f}"
        raise ModelError("the exported model does not answer as the run does", where=PLACE, got=got, fix=fix)

    def to_json(self, sample: Sample, *, tolerance: float) -> dict[str, Json]:
        """Returns a part of the content of export.json."""
        return {
            "compared_on": sample.source,
            "prompts": len(self.gaps),
            "prompts_too_long": sample.too_long,
            "same_answers": self.same_answers,
            "answers_within_tolerance": self.close_answers(tolerance),
            "targets": self.targets,
            "loss": self.loss,
            "exported_loss": self.exported_loss,
            "largest_log_probability_difference": self.largest_difference,
            "tolerance": tolerance,
        }

    def to_lines(self, sample: Sample, *, tolerance: float) -> list[str]:
        """Returns the lines to print."""
        same = self.same_answers
        close = self.close_answers(tolerance) - same
        rest = f", {close} differ only where the best tokens are within {tolerance:g} nats" if close else ""
        change = f"{self.loss:.4f} -> {self.exported_loss:.4f} on {self.targets:,} targets"
        left_out = f" ({sample.too_long} were too long)" if sample.too_long else ""
        return [
            f"compared  {len(self.gaps)} prompts of {sample.source}{left_out}",
            f"answers   {same} are the same{rest}",
            f"loss      {change}; log-probabilities differ by at most {self.largest_difference:.2g}",
        ]


def read_sample(options: Namespace, run: LoadedRun) -> Sample:
    """Reads examples of ``--data``, or of the training data of the run.

    Raises RecipeError if the data of the run are not known or contain no prompts that fit, DataError if they
    cannot be read.
    """
    recipe = find_recipe(options.run)
    if not (options.data or recipe):
        what = "has no recipe.yaml, so its data are not known"
        raise RecipeError(what, where=options.run, fix="set --data to files to take prompts from")
    data = to_data(options, recipe) if options.data or recipe is None else recipe.data
    source = ", ".join(source.path for source in data.train)
    every = load_examples(data)
    indices = np.linspace(0, len(every) - 1, min(len(every), PROMPTS)).astype(int).tolist()
    examples = replace(
        every,
        examples=[every.examples[at] for at in indices],
        places=[every.places[at] for at in indices],
        origins=every.origins[indices],
    )
    dataset = build_dataset(examples, run, stage=run.stage, recipe=recipe, max_length=run.max_length)
    rows = [dataset[at] for at in range(min(len(dataset), PROMPTS))]
    prompts = read_prompts([prompt for one in examples.examples if (prompt := to_prompt(one))], run)
    limit = max_positions(run.model.config)
    new_tokens = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit // 2)
    fitting = [prompt for prompt in prompts if limit is None or len(prompt.ids) + new_tokens <= limit]
    if not fitting:
        what = "no prompt leaves room for an answer" if prompts else "its data contain no prompts"
        raise RecipeError(what, where=source, fix="set --data to files to take prompts from")
    return Sample(fitting, rows, source, new_tokens, len(prompts) - len(fitting))


def read_prompts(examples: Sequence[Example], run: LoadedRun) -> list[Prompt]:
    """Renders and tokenizes prompts as in training."""
    renderer, has_template = Renderer(run.tokenizer, run.rendering), bool(run.tokenizer.chat_template)
    prompts = []
    all_ids = encode_prompts(examples, run.tokenizer, run.rendering)
    for example, ids in zip(examples, all_ids, strict=True):
        text = messages = None
        if not renderer.encoder.may_have_control(example.texts):
            text = "".join(piece.text for piece in renderer.prompt(example))
            messages = as_messages(example, run.format, run.template) if has_template else None
        prompts.append(Prompt(example, ids, text, messages))
    return prompts


def observe(run: LoadedRun, sample: Sample) -> Expected:
    """Answers the prompts greedily, and measures the targets."""
    generated = generate(
        run.model,
        run.tokenizer,
        prompts=[prompt.example for prompt in sample.prompts],
        decoding=Decoding(sample.new_tokens),
        rendering=run.rendering,
        progress="answers of the run",
    )
    answers = []
    for prompt, one in zip(sample.prompts, generated, strict=True):
        chosen = [*one.ids]
        if one.stopped:  # at one of several stop tokens
            chosen.append(int(_next_logprobs(run.model, [*prompt.ids, *chosen], count=1).argmax()))
        answers.append(Answer([*prompt.ids, *chosen[:-1]], chosen))
    return Expected(answers, _measure(run.model, sample, of="the run"))


def compare(model: PreTrainedModel, sample: Sample, expected: Expected) -> Comparison:
    """Reads the answers of the run with the exported model, and measures the targets.

    As long as each token of an answer is also the choice of the exported model, that model answers the same.
    """
    gaps = []
    for ids, chosen in tqdm(expected.answers, desc="answers, exported", disable=None, leave=False):
        logprobs = _next_logprobs(model, ids, count=len(chosen))
        of_chosen = logprobs.gather(1, torch.tensor(chosen)[:, None])[:, 0]
        gaps.append(float((logprobs.amax(dim=1) - of_chosen).max()))
    nll = _measure(model, sample, of="the exported model")
    return Comparison(
        gaps=gaps,
        targets=len(nll),
        loss=float(expected.nll.mean(dtype=np.float64)),
        exported_loss=float(nll.mean(dtype=np.float64)),
        largest_difference=float(np.abs(expected.nll - nll).max()),
    )


def check_tokens(exported: LlamaCppModel, run: LoadedRun, sample: Sample, expected: Expected) -> TokenCheck:
    """Compares the token ids of the prompts, and the stop tokens, in llama.cpp with those of training.

    Prompts that are messages are rendered with the template in the file. Raises ModelError for the first
    prompt that differs, if none can be checked, and if llama.cpp would stop earlier or later than the run.
    """
    tokenizer, stops = run.tokenizer, set(exported.stop_ids())
    of_run, generated = stop_ids(run.model), {id for answer in expected.answers for id in answer.chosen}
    for what, tokens in (
        ("would not stop at a stop token of the run", of_run - stops),
        ("would stop inside an answer of the run", (generated - of_run) & stops),
    ):
        if tokens:
            got = ", ".join(repr(tokenizer.decode([token])) for token in sorted(tokens))
            raise ModelError(f"llama.cpp {what}", where=PLACE, got=got)
    checked = [prompt for prompt in sample.prompts if prompt.text is not None]
    if not checked:
        what = "all prompts spell control tokens, which llama.cpp parses differently"
        raise ModelError(what, where=PLACE, fix="set --data to files to take prompts from")
    for prompt in checked:
        text = exported.render(prompt.messages) if prompt.messages else str(prompt.text)
        is_chat = prompt.messages is not None or isinstance(prompt.example, Chat)
        ids = exported.tokenize(text, is_chat=is_chat)
        if ids != prompt.ids:
            pairs = enumerate(zip(ids, prompt.ids, strict=False))
            at = next((n for n, (one, other) in pairs if one != other), min(len(ids), len(prompt.ids)))
            found, of_training = (repr(tokenizer.decode(part[at:][:12])) for part in (ids, prompt.ids))
            what = "llama.cpp tokenizes a prompt differently from training"
            raise ModelError(what, where=PLACE, got=f"{found} at token {at} instead of {of_training}")
    return TokenCheck(
        equal_prompts=len(checked),
        through_the_template=sum(prompt.messages is not None for prompt in checked),
        unchecked_prompts=len(sample.prompts) - len(checked),
        stop_tokens=[str(tokenizer.decode([token])) for token in sorted(stops)],
    )


def _measure(model: PreTrainedModel, sample: Sample, *, of: str) -> np.ndarray:
    rows = tqdm(sample.rows, desc=f"loss of {of}", disable=None, leave=False)
    return np.concatenate([measure_rows(model, [row])[0][0] for row in rows])


@torch.no_grad()
def _next_logprobs(model: PreTrainedModel, ids: Sequence[int], *, count: int) -> torch.Tensor:
    """Returns the log-probabilities of the tokens after the last ``count`` places, (count, V) on the CPU."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -count:]
    return logits.float().cpu().log_softmax(-1)
