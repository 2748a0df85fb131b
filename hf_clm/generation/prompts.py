"""Prompts: texts, files and chats, rendered and tokenized as in training, and the room for their answers."""

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
from hf_clm.recipe.template import Template
from hf_clm.schema import Chat, Document, Example, Format, Json, Segment, whole_text
from hf_clm.text.tokenizer import find_unknown


def to_text(text: str) -> Document:
    """A text that is continued as it is."""
    return Document([Segment(text, 1.0)])


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


def read_prompts(
    path: str, format: str, *, template: Template | None = None, has_turns: bool = False
) -> list[Example]:
    """Prompts from a txt file, one a line, or from records whose target side may be missing.

    Raises DataError for a file that is not there or not UTF-8, and for one without a prompt.
    """
    prompts: list[Example]
    if path.endswith(".txt"):
        lines = [line for line in _read_text(path).splitlines() if line.strip()]
        prompts = [to_prompt_example(line, format, template=template, has_turns=has_turns) for line in lines]
    else:
        records = read_records(path, ReadOptions(), report=ReadReport())
        asked, render = cast(Format, format), "chat" if has_turns else "plain"
        prompts = [
            to_template_prompt(record.data, template, where=record.where)
            if template
            else to_prompt(record.data, format=asked, where=record.where, render=render)
            for record in records
        ]
    if not prompts:
        raise DataError("holds no prompt", where=path)
    return prompts


def _read_text(path: str) -> str:
    """Raises DataError for a file that cannot be read."""
    fix = "name a file with --file"
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError("cannot be read", where=path, got=str(error.strerror), fix=fix) from error
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at {error.start}"
        fix = "save it as UTF-8, or name the right file"
        raise DataError("not UTF-8", where=path, got=got, fix=fix) from error


def read_tools(path: str) -> list[dict[str, Json]]:
    """The tools of a JSON file: a list of functions as OpenAI's API takes them.

    Raises RecipeError for a file that cannot be read, DataError for one that holds something else.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError("cannot be read", where="--tools", got=f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"not a JSON file: {error}", where=path) from error
    question = {"role": "user", "content": "Hi"}
    example = to_prompt({"messages": [question], "tools": content}, format="messages", where=path)
    assert isinstance(example, Chat)
    return example.tools


def with_tools(prompt: Example, tools: list[dict[str, Json]]) -> Chat:
    """The chat with these tools. Raises RecipeError for a prompt that is no chat."""
    if not isinstance(prompt, Chat):
        what = "the model is not asked through a chat template, so it takes no tools"
        raise RecipeError(what, where="--tools", fix="leave it out")
    return replace(prompt, tools=tools)


def to_prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, rendering: LabelOptions
) -> list[list[int]]:
    """The ids that the model continues, of each prompt; an empty one is the start token.

    Raises DataError for a prompt that the tokenizer cannot spell, and for tools that its template leaves out.
    """
    for number, example in enumerate(examples, start=1):
        if (unknown := find_unknown(whole_text(example), tokenizer)) is not None:
            raise unspelled(unknown, where=f"prompt {number}")
    return [ids or [start_id(tokenizer)] for ids in encode_prompts(examples, tokenizer, rendering)]


def start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What a text begins after: the start token, or else the end of another text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(start, int), "load_tokenizer requires an end token"
    return start


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

    An answer gets ``max_new_tokens``, but at most half of the positions; without it 256, or a quarter.
    """
    limit = max_positions(model.config)
    if limit is None:
        return None
    answer = min(NEW_TOKENS, limit // 4) if max_new_tokens is None else min(max_new_tokens, limit // 2)
    return limit - answer


def cap_new_tokens(
    model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None, fix: str = "shorten it"
) -> int:
    """The length of an answer: what is asked for, or 256 tokens, as far as there are positions.

    Raises RecipeError, with this ``fix``, for a prompt that leaves none.
    """
    limit, most = max_positions(model.config), NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if limit is None:
        return most
    if prompt_tokens >= limit:
        got = f"{prompt_tokens} tokens, and the model has {limit} positions"
        raise RecipeError("the text is too long to be answered", got=got, fix=fix)
    return min(most, limit - prompt_tokens)


def fit_new_tokens(model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None) -> int:
    """As ``cap_new_tokens``, but raises RecipeError too where all that is asked for does not fit."""
    limit, asked = max_positions(model.config), max_new_tokens or 1
    if limit is not None and prompt_tokens + asked > limit:
        raise RecipeError(
            f"the model has {limit} positions",
            got=f"a prompt of {prompt_tokens} tokens and max_new_tokens {asked}",
            fix="shorten the prompt or lower max_new_tokens; hf-clm generate --slide continues past them",
        )
    return cap_new_tokens(model, prompt_tokens, max_new_tokens=max_new_tokens)
