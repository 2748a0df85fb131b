"""``generate`` and ``hf-clm generate``: prompts rendered as in training, answers that end as in training."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding, ask
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
    """``text`` without the stop token; ``stopped`` says that the model gave one itself."""

    text: str
    tokens: int
    stopped: bool


def generate_from_run(options: Namespace) -> list[tuple[str, Generated]]:
    """``hf-clm generate``: each prompt as it is shown, with its answer.

    Raises RecipeError without a prompt, and for tools where they have no place.
    """
    if not options.prompt and not options.file:
        fix = '--prompt "..." or --file prompts.txt'
        raise RecipeError("needs a prompt", where="hf-clm generate", fix=fix)
    if options.tools and not options.prompt:
        fix = "give a --prompt; the records of --file hold their own tools"
        raise RecipeError("offers functions with --prompt, and there is none", where="--tools", fix=fix)
    tools = read_tools(options.tools) if options.tools else []
    base = base_decoding(options.run, use_model_settings=options.use_model_settings)
    decoding = ask(base, vars(options))
    run = load_run(options.run, attention=None, device=options.device)
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
    """Continues each prompt; a string is taken as it is, an Example is rendered as in training.

    Args:
        decoding: how tokens are chosen, greedily by default; prompt number n draws by its seed + n.
        slide: continue past the model's positions, in stretches that each reread the last half of them.
        batch_size: prompts at once. A model whose answers depend on the batch answers one at a time, and
            searches beams without a cache.
        rendering: how prompts are rendered, as in training.
        progress: the name of a bar that a terminal shows.

    Raises RecipeError for options that do not go together, and where prompt and new tokens exceed the model's
    positions; DataError for a prompt that the tokenizer cannot spell.
    """
    if slide and decoding.num_beams > 1:
        raise RecipeError("slide and num_beams exclude each other", where="generation options")
    examples = [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids, asked = to_prompt_ids(examples, tokenizer, rendering or LabelOptions()), decoding.max_new_tokens
    room = [
        (asked or NEW_TOKENS) if slide else fit_new_tokens(model, len(own), max_new_tokens=asked)
        for own in ids
    ]
    answers = [Answer(own, decoding.of_prompt(n), room[n]) for n, own in enumerate(ids)]
    is_simple = len(ids) == 1 and len(ids[0]) > 1 and decoding.num_beams == 1
    with answering(model):
        found = Probe(True, True) if is_simple else probe(model, tokenizer)
        order = sorted(answers, key=lambda answer: len(answer.prompt_ids))  # little padding
        size = batch_size if found.takes_batches else 1
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
            batch = order[start : start + size]
            if decoding.num_beams > 1:
                _search(model, tokenizer, batch, with_cache=found.takes_batches)
            else:
                stream_answers(model, tokenizer, answers=batch, with_cache=found.takes_cache)
    return [Generated(answer.text, len(answer.ids), answer.finish == "stop") for answer in answers]


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and with an attention that has a KV cache; afterwards the model is as it was."""
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
    """Beams end together, and those that are sampled draw one after the other."""
    for _, group in groupby(answers, key=lambda answer: (answer.max_new_tokens, answer.decoding)):
        search_answers(model, tokenizer, answers=list(group), with_cache=with_cache)
