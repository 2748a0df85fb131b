"""Generates text: the prompt rendered as in training, stopped at the stop tokens of training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.attention import use_for_generation, use_for_training
from hf_clm.data.label.datasets import unspelled
from hf_clm.data.label.labels import cut_chat, encode_prompts
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.read.formats import join_turn, to_prompt
from hf_clm.data.read.templating import to_template_words
from hf_clm.errors import RecipeError
from hf_clm.model import NEW_TOKENS, max_positions
from hf_clm.schema import Chat, Document, Example, Segment, whole_text
from hf_clm.template import Template
from hf_clm.tokenizer import find_unknown


@dataclass(frozen=True)
class Generated:
    """``text`` without the stop token; ``stopped`` says that the model gave one itself."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompts: Sequence[Example | str],
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    rendering: LabelOptions | None = None,
    watch: Callable[[range], Iterable[int]] = iter,
    **options: Any,
) -> list[Generated]:
    """Continues each prompt; a string is taken as it is, an Example is rendered as in training.

    Args:
        max_new_tokens: None is 256, or what the model has positions for.
        rendering: how prompts are rendered, as in training.
        watch: passes on the starts of the batches, and may show how far they are.
        options: of ``transformers.GenerationConfig``: do_sample, temperature, top_k, top_p, num_beams,
            no_repeat_ngram_size, ...; and slide: go on past the model's positions, in stretches that each
            reread the last half of them.

    Raises RecipeError for options that do not go together, and where prompt and new tokens exceed the model's
    positions; DataError for a prompt that the tokenizer cannot spell.
    """
    examples = [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = to_prompt_ids(examples, tokenizer, rendering or LabelOptions())
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # a long prompt shortens no other
    answer_batch = _slide_batch if options.pop("slide", False) else _generate_batch
    was_training, attention = model.training, str(model.config._attn_implementation)
    model.eval()
    use_for_generation(model)
    try:
        answers = {}
        for start in watch(range(0, len(ids), batch_size)):
            numbers = order[start : start + batch_size]
            batch = [ids[number] for number in numbers]
            found = answer_batch(
                model, tokenizer, batch=batch, options={**options, "max_new_tokens": max_new_tokens}
            )
            answers |= zip(numbers, found, strict=True)
        return [answers[number] for number in range(len(ids))]
    finally:
        use_for_training(model, attention)
        model.train(was_training)


def to_text(text: str) -> Document:
    """A text that is continued as it is."""
    return Document([Segment(text, 1.0)])


def to_prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, rendering: LabelOptions
) -> list[list[int]]:
    """The ids that the model continues, of each prompt; an empty one is what follows the end of a text.

    Raises DataError for a prompt that the tokenizer cannot spell, and for tools that its template leaves out.
    """
    check_prompts(examples, tokenizer)
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "load_tokenizer requires one"
    return [ids or [eos] for ids in encode_prompts(examples, tokenizer, rendering)]


def to_fitting_prompt(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, *, rendering: LabelOptions, most: int | None
) -> tuple[list[int], Chat]:
    """The ids of a chat's prompt, and the chat that they are of.

    Where they are more than ``most``, the oldest turns after the system turn are left out, as many as must
    be. The last turn of the user stays, even if it does not fit.
    """

    def to_ids(part: Chat) -> list[int]:
        return to_prompt_ids([part], tokenizer, rendering)[0]

    def fits(part: Chat) -> bool:
        is_last = sum(message["role"] == "user" for message in part.messages) <= 1
        return is_last or len(to_ids(part)) <= (most or 0)

    ids = to_ids(chat)
    if most is None or len(ids) <= most:
        return ids, chat
    cut = cut_chat(chat, fits)
    return (to_ids(cut[1]), cut[1]) if cut else (ids, chat)


def prompt_room(model: PreTrainedModel, *, max_new_tokens: int | None) -> int | None:
    """The tokens that a prompt may have, so that an answer has positions left; None where there is no limit.

    Without ``max_new_tokens`` an answer gets 256, or a quarter of the positions.
    """
    limit = max_positions(model.config)
    return None if limit is None else limit - (max_new_tokens or min(NEW_TOKENS, limit // 4))


def to_prompt_example(
    text: str,
    format: str,
    *,
    input_text: str = "",
    template: Template | None = None,
    has_turns: bool = False,
) -> Example:
    """Plain text as a prompt of ``format``: an instruction, a user's turn, or the text itself.

    With a ``template`` the text is its first column, and ``input_text`` the second. ``has_turns``: the run
    learned turns of a chat, whatever format its records had.
    """
    if template is not None:
        return to_template_words(text, template, input_text=input_text)
    if has_turns or format in ("messages", "sharegpt"):
        return Chat([{"role": "user", "content": join_turn(text, input_text)}])
    if format == "instruct":
        return to_prompt({"instruct": text, "input": input_text}, format="instruct")
    if format == "alpaca":
        return to_prompt({"instruction": text, "input": input_text}, format="alpaca")
    return to_text(text)


def check_prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError for the first prompt with a character that the tokenizer has no token for."""
    for number, example in enumerate(examples, start=1):
        if (found := find_unknown(whole_text(example), tokenizer)) is not None:
            raise unspelled(found, where=f"prompt {number}")


def fit_new_tokens(model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None) -> int:
    """How many tokens to generate at most; by default as many as there is room for after the longest prompt.

    Raises RecipeError where prompt and new tokens do not fit into the model's positions.
    """
    limit = max_positions(model.config)
    if max_new_tokens is None:
        max_new_tokens = NEW_TOKENS if limit is None else max(1, min(NEW_TOKENS, limit - prompt_tokens))
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise RecipeError(
            f"the model has {limit} positions",
            got=f"a prompt of {prompt_tokens} tokens and max_new_tokens {max_new_tokens}",
            fix="shorten the prompt or lower max_new_tokens; hf-clm generate --slide goes on past them",
        )
    return max_new_tokens


def to_left_padded(batch: Sequence[list[int]], pad: int, *, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (B, T) int64, T the longest prompt; padding comes first."""
    width = max(map(len, batch))
    rows = [[pad] * (width - len(ids)) + ids for ids in batch]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def stop_ids(model: PreTrainedModel) -> set[int | None]:
    """The ids at which the model's answers end."""
    assert model.generation_config is not None
    stop = model.generation_config.eos_token_id
    return set(stop if isinstance(stop, list) else [stop])


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch: list[list[int]],
    options: dict[str, Any],
) -> list[Generated]:
    room = fit_new_tokens(model, max(map(len, batch)), max_new_tokens=options["max_new_tokens"])
    found = _generate_ids(model, tokenizer, batch=batch, options={**options, "max_new_tokens": room})
    stops = stop_ids(model)
    answers = [_to_generated(ids, tokenizer, stops=stops) for ids in found]
    return [_cut_at(answer, options.get("stop_strings", [])) for answer in answers]


def _slide_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch: list[list[int]],
    options: dict[str, Any],
) -> list[Generated]:
    """Answers of any length. What looks back (no_repeat_ngram_size, ...) sees what a stretch rereads."""
    limit, stops, ends = max_positions(model.config), stop_ids(model), options.get("stop_strings", [])
    left = options["max_new_tokens"] or NEW_TOKENS
    if options.get("num_beams", 1) > 1:
        raise RecipeError("slide and num_beams exclude each other", where="generation options")
    found: list[list[int]] = [[] for _ in batch]
    answers: list[Generated] = [Generated("", 0, False) for _ in batch]
    going = list(range(len(batch)))
    while going and left:
        read = [batch[number] + found[number] for number in going]
        read = [ids if limit is None or len(ids) < limit else ids[-(limit // 2) :] for ids in read]
        room = left if limit is None else min(left, limit - max(map(len, read)))
        new = _generate_ids(model, tokenizer, batch=read, options={**options, "max_new_tokens": room})
        left -= room
        for number, ids in zip(going, new, strict=True):
            found[number] += ids
            answers[number] = _cut_at(_to_generated(found[number], tokenizer, stops=stops), ends)
        going = [number for number in going if not answers[number].stopped]
    return answers


def _generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch: list[list[int]],
    options: dict[str, Any],
) -> list[list[int]]:
    """What follows each prompt; after a stop token padding."""
    pad: Any = tokenizer.pad_token_id
    prompts = to_left_padded(batch, pad, device=model.device)
    decoder: Any = model  # typed without the generate that it has
    settings = {"use_cache": True, "pad_token_id": pad, "tokenizer": tokenizer, **options}
    try:
        output = decoder.generate(**prompts, **settings)
    except ValueError as error:  # transformers' checks of the options
        raise RecipeError(str(error).splitlines()[0], where="generation options") from error
    return [row[prompts["input_ids"].shape[1] :].tolist() for row in output]


def _to_generated(ids: list[int], tokenizer: PreTrainedTokenizerFast, *, stops: set[int | None]) -> Generated:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids[:end] if end is not None else [token for token in ids if token != tokenizer.pad_token_id]
    return Generated(str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept), end is not None)


def _cut_at(answer: Generated, stop_strings: list[str]) -> Generated:
    ends = [answer.text.find(stop) for stop in stop_strings if stop in answer.text]
    return Generated(answer.text[: min(ends)], answer.tokens, True) if ends else answer
