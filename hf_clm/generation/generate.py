"""``generate`` and ``hf-clm generate``, with the same prompt format and stop tokens as training."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding, update_decoding
from hf_clm.generation.load import load_run
from hf_clm.generation.padding import Probe, probe
from hf_clm.generation.prompts import (
    fit_new_tokens,
    read_prompts,
    read_tools,
    to_prompt_example,
    to_prompt_ids,
    to_text,
    with_tools,
)
from hf_clm.generation.sampling import base_decoding
from hf_clm.generation.stream import Answer, search_answers, stream_answers
from hf_clm.model.attention import use_for_generation, use_for_training
from hf_clm.model.load import NEW_TOKENS
from hf_clm.schema import Example

GREEDY = Decoding()


@dataclass(frozen=True)
class Generated:
    """A generated answer.

    text: the answer without its stop token.
    tokens: the number of generated tokens, without the stop token.
    stopped: whether the model ended the answer itself.
    ids: the generated tokens, without the stop token.
    """

    text: str
    tokens: int
    stopped: bool
    ids: Sequence[int] = field(default=(), compare=False)


def generate_from_run(options: Namespace) -> list[tuple[str, Generated]]:
    """Answers the prompts of ``hf-clm generate``; returns pairs of a prompt's text and its answer.

    Raises RecipeError if there is no prompt, or for tools that cannot be used.
    """
    if not options.prompt and not options.file:
        fix = 'add --prompt "..." or --file prompts.txt'
        raise RecipeError("needs a prompt", where="hf-clm generate", fix=fix)
    if options.tools and not options.prompt:
        fix = "add a --prompt; the records of --file bring their own tools"
        raise RecipeError("applies to --prompt only", where="--tools", fix=fix)
    tools = read_tools(options.tools) if options.tools else []
    base = base_decoding(options.run, use_model_settings=options.use_model_settings)
    decoding = update_decoding(base, vars(options))
    run = load_run(options.run, attention=None, device=options.device, dtype=options.dtype)
    format, template = ("text", None) if options.raw else (run.format, run.template)
    has_turns = run.has_turns and not options.raw
    prompts = [
        to_prompt_example(text, format, input_text=options.input, template=template, has_turns=has_turns)
        for text in options.prompt
    ]
    if tools:
        prompts = [with_tools(prompt, tools) for prompt in prompts]
    if options.file:
        prompts += read_prompts(options.file, format, template=template, has_turns=has_turns)
    answers = generate(
        run.model,
        run.tokenizer,
        prompts=prompts,
        decoding=decoding,
        slide=options.slide,
        batch_size=options.batch_size,
        rendering=run.rendering,
        progress="answers",
    )
    return [(prompt.prompt_text, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompts: Sequence[Example | str],
    decoding: Decoding = GREEDY,
    slide: bool = False,
    batch_size: int = 16,
    rendering: LabelOptions | None = None,
    progress: str = "",
) -> list[Generated]:
    """Generates an answer to each prompt. A string is continued verbatim, an Example is rendered as in
    training.

    Args:
        decoding: the decoding settings, greedy by default; prompt n, counted from 0, samples with seed + n.
        slide: keep generating past the model's maximum length. Each time it is reached, the model starts
            again from the last half of the text.
        batch_size: the maximum number of prompts in a batch. Models that do not support padding answer one
            prompt at a time, and run beam search without a KV cache.
        rendering: how to render examples, as in training.
        progress: the label of a progress bar; none by default.

    Raises RecipeError if options conflict, or if prompt and new tokens exceed the model's positions;
    DataError for a prompt that the tokenizer cannot represent.
    """
    if slide and decoding.num_beams > 1:
        raise RecipeError("slide and num_beams cannot be combined", where="generation options")
    examples = [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    prompt_ids = to_prompt_ids(examples, tokenizer, rendering or LabelOptions())
    most = decoding.max_new_tokens
    room = [
        (most or NEW_TOKENS) if slide else fit_new_tokens(model, len(ids), max_new_tokens=most)
        for ids in prompt_ids
    ]
    answers = [Answer(ids, decoding.of_prompt(n), room[n]) for n, ids in enumerate(prompt_ids)]
    is_simple = len(prompt_ids) == 1 and len(prompt_ids[0]) > 1 and decoding.num_beams == 1
    with generation_mode(model):
        support = Probe(True, True) if is_simple else probe(model, tokenizer)
        order = sorted(
            answers, key=lambda answer: len(answer.prompt_ids)
        )  # similar lengths need less padding
        size = batch_size if support.takes_batches else 1
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
            batch = order[start : start + size]
            if decoding.num_beams > 1:
                _search(model, tokenizer, batch, with_cache=support.takes_batches)
            else:
                stream_answers(model, tokenizer, answers=batch, with_cache=support.takes_cache)
    return [
        Generated(answer.text, len(answer.ids), answer.finish == "stop", answer.ids) for answer in answers
    ]


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Turns dropout off and selects an attention that supports a KV cache; restores both at the end."""
    was_training, attention = model.training, str(model.config._attn_implementation)
    model.eval()
    use_for_generation(model)
    try:
        yield
    finally:
        use_for_training(model, attention)
        model.train(was_training)


def _search(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], *, with_cache: bool
) -> None:
    """Runs one beam search for each group of answers with the same settings.

    Seeds differ between prompts, so with a seed each sampled prompt is a group by itself.
    """
    for _, group in groupby(answers, key=lambda answer: (answer.max_new_tokens, answer.decoding)):
        search_answers(model, tokenizer, answers=list(group), with_cache=with_cache)
