"""``hf-clm generate``: prompts from the command line or a file, rendered as the run was trained."""

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from hf_clm.data.read.formats import to_prompt
from hf_clm.data.read.sources import ReadOptions, ReadReport, Record, read_records
from hf_clm.data.read.templating import to_template_prompt
from hf_clm.errors import DataError, RecipeError
from hf_clm.generation.decoding import ask, base_decoding
from hf_clm.generation.generate import Generated, generate, to_prompt_example
from hf_clm.generation.load import load_run
from hf_clm.generation.progress import watched
from hf_clm.recipe.template import Template
from hf_clm.schema import Chat, Example, Format, Json


def generate_from_run(options: Namespace) -> list[tuple[str, Generated]]:
    """Each prompt as it is shown, with its answer.

    Raises RecipeError without a prompt, and for tools where they have no place.
    """
    if not options.prompt and not options.file:
        raise RecipeError(
            "needs a prompt", where="hf-clm generate", fix='--prompt "..." or --file prompts.txt'
        )
    if options.tools and not options.prompt:
        fix = "give a --prompt; the records of --file hold their own tools"
        raise RecipeError("offers functions with --prompt, and there is none", where="--tools", fix=fix)
    tools = read_tools(options.tools) if options.tools else []
    base = base_decoding(options.run, use_model_settings=options.use_model_settings)
    decoding = ask(base, options)
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
        watch=partial(watched, what="answers"),
    )
    return [(prompt.shown, answer) for prompt, answer in zip(prompts, answers, strict=True)]


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
        prompts = [
            to_record_prompt(record, format, template=template, has_turns=has_turns) for record in records
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
        fix = "save it as UTF-8, or name the right file"
        raise DataError(
            "not UTF-8", where=path, got=f"byte {error.object[error.start]:#x} at {error.start}", fix=fix
        ) from error


def to_record_prompt(record: Record, format: str, *, template: Template | None, has_turns: bool) -> Example:
    """A record whose target side may be missing, as a prompt."""
    if template:
        return to_template_prompt(record.data, template, where=record.where)
    render = "chat" if has_turns else "plain"
    return to_prompt(record.data, format=cast(Format, format), where=record.where, render=render)
