"""Prompts from texts, files and chats, rendered and tokenized as in training, and room for their answers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.datasets import unspelled
from hf_clm.data.label.labels import cut_chat, encode_prompts
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.read.formats import join_turn, to_prompt
from hf_clm.data.read.sources import ReadOptions, ReadReport, read_records
from hf_clm.data.read.templating import to_template_prompt, to_template_words
from hf_clm.errors import DataError, RecipeError
from hf_clm.model.load import NEW_TOKENS, max_positions
from hf_clm.run_folder import load_folder, step_of
from hf_clm.schema import Chat, Document, Example, Format, Json, Segment, whole_text
from hf_clm.template import Template
from hf_clm.text.tokenizer import find_unknown

OFFERED, LONGEST_OFFERED = 6, 500  # prompts on the chat page, and characters of one
TAKING_TEXT = ("instruct", "prompt_completion")  # formats whose prompts are rendered as they are


def to_text(text: str) -> Document:
    """Wraps a text that is to be continued verbatim."""
    return Document([Segment(text, 1.0)])


def to_prompt_example(
    text: str,
    format: str,
    *,
    input_text: str = "",
    template: Template | None = None,
    has_turns: bool = False,
) -> Example:
    """Converts plain text to a prompt of ``format``: an instruction, a user turn, or the text itself.

    With a ``template``, the text fills its first column and ``input_text`` the second. ``has_turns`` makes it
    a user turn whatever the format.
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


def read_prompts(
    path: str, format: str, *, template: Template | None = None, has_turns: bool = False
) -> list[Example]:
    """Reads prompts from a text file with one per line, or from records, whose target may be missing.

    Raises DataError if the file is missing, not UTF-8, or has no prompts.
    """
    prompts: list[Example]
    if path.endswith(".txt"):
        lines = [line for line in _read_text(path).splitlines() if line.strip()]
        prompts = [to_prompt_example(line, format, template=template, has_turns=has_turns) for line in lines]
    else:
        records = read_records(path, ReadOptions(), report=ReadReport())
        record_format, render = cast(Format, format), "chat" if has_turns else "plain"
        prompts = [
            to_template_prompt(record.data, template, where=record.where)
            if template
            else to_prompt(record.data, format=record_format, where=record.where, render=render)
            for record in records
        ]
    if not prompts:
        raise DataError("the file has no prompts", where=path, fix="add at least one prompt")
    return prompts


def first_prompts(folder: str) -> list[str]:
    """Returns prompts to try a run with: those it was sampled with, then those of its first documents.

    Returns none for a folder or a model that is not a run.
    """
    path = Path(folder).expanduser()
    try:
        run = load_folder(path.parent if step_of(path) >= 0 else path)
    except RecipeError:
        return []
    takes_text = run.record.has_turns or run.record.format in TAKING_TEXT
    prompts = [entry["prompt"] for entry in run.samples] + (list(run.questions) if takes_text else [])
    return [prompt for prompt in dict.fromkeys(prompts) if 0 < len(prompt) <= LONGEST_OFFERED][:OFFERED]


def _read_text(path: str) -> str:
    """Reads a text file. Raises DataError if it cannot be read."""
    fix = "give an existing file with --file"
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError("cannot be read", where=path, got=str(error.strerror), fix=fix) from error
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at offset {error.start}"
        fix = "save it as UTF-8, or give another file"
        raise DataError("not UTF-8", where=path, got=got, fix=fix) from error


def read_tools(path: str) -> list[dict[str, Json]]:
    """Reads tools from a JSON file with a list of functions in the format of OpenAI's API.

    Raises RecipeError if the file cannot be read, DataError if its content is not such a list.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError("cannot be read", where="--tools", got=f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", where=path) from error
    question = {"role": "user", "content": "Hi"}
    example = to_prompt({"messages": [question], "tools": content}, format="messages", where=path)
    assert isinstance(example, Chat)
    return example.tools


def with_tools(prompt: Example, tools: list[dict[str, Json]]) -> Chat:
    """Returns the chat with these tools added. Raises RecipeError if the prompt is not a chat."""
    if not isinstance(prompt, Chat):
        what = "prompts are not rendered with a chat template, so tools are not supported"
        raise RecipeError(what, where="--tools", fix="remove the option")
    return replace(prompt, tools=tools)


def to_prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, rendering: LabelOptions
) -> list[list[int]]:
    """Returns the token ids of each prompt; the start token alone for an empty prompt.

    Raises DataError for text that the tokenizer cannot represent, and for tools if the chat template ignores
    them.
    """
    for number, example in enumerate(examples, start=1):
        if (unknown := find_unknown(whole_text(example), tokenizer)) is not None:
            raise unspelled(unknown, where=f"prompt {number}")
    return [ids or [start_id(tokenizer)] for ids in encode_prompts(examples, tokenizer, rendering)]


def start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the token before a text: the start token or, without one, the end token of another text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(start, int), "load_tokenizer requires an end token"
    return start


def to_fitting_prompt(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, *, rendering: LabelOptions, most: int | None
) -> tuple[list[int], Chat]:
    """Returns the prompt ids of a chat, and the part of the chat that they contain.

    If there are more than ``most`` ids, the oldest turns after the system turn are dropped until the rest
    fits. The last user turn is always kept, even if it does not fit.
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
    """Returns the maximum number of prompt tokens that leaves room for an answer; None if there is no limit.

    Room for an answer is ``max_new_tokens``, but at most half of the model's positions. By default it is 256
    tokens, but at most a quarter of the positions.
    """
    limit = max_positions(model.config)
    if limit is None:
        return None
    answer = min(NEW_TOKENS, limit // 4) if max_new_tokens is None else min(max_new_tokens, limit // 2)
    return limit - answer


def cap_new_tokens(
    model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None, fix: str = "shorten it"
) -> int:
    """Returns the maximum length of an answer: ``max_new_tokens`` (default: 256), or the positions left.

    Raises RecipeError with ``fix`` if the prompt leaves no positions.
    """
    limit, most = max_positions(model.config), NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if limit is None:
        return most
    if prompt_tokens >= limit:
        got = f"{prompt_tokens} tokens for a model with {limit} positions"
        raise RecipeError("the prompt leaves no room for an answer", got=got, fix=fix)
    return min(most, limit - prompt_tokens)


def fit_new_tokens(model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None) -> int:
    """Like ``cap_new_tokens``, but also raises RecipeError if ``max_new_tokens`` do not all fit."""
    limit, least = max_positions(model.config), max_new_tokens or 1
    if limit is not None and prompt_tokens + least > limit:
        raise RecipeError(
            f"the model has {limit} positions",
            got=f"a prompt of {prompt_tokens} tokens and max_new_tokens {least}",
            fix="shorten the prompt, lower max_new_tokens, or use hf-clm generate --slide",
        )
    return cap_new_tokens(model, prompt_tokens, max_new_tokens=max_new_tokens)
