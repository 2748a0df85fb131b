"""Makes chat templates for models trained on plain prompts, which render the prompts used in training.

``pipeline("text-generation")(messages)`` then prompts such a model as it was trained. The template accepts a
single question, and a system text if the format has one. Other fields of a record are keys of the message:

    {"role": "user", "content": "Translate to German.", "input": "chat"}
"""

import re
from collections.abc import Iterable
from typing import Any, cast

from transformers import (
    PreTrainedTokenizerFast,
)

from hf_clm.data.read.formats import (
    ALPACA_HEAD,
    ALPACA_INPUT,
    ALPACA_PREAMBLE,
    ALPACA_PREAMBLE_WITH_INPUT,
    ALPACA_TAIL,
)
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import Chat, Example
from hf_clm.template import Template, split_template
from hf_clm.text.tokenizer import (
    bos_token,
)

ALPACA = re.compile(
    rf"(?P<head>.*?)\n\n{ALPACA_HEAD}(?P<instruction>.*?)"
    rf"(?:{ALPACA_INPUT}(?P<input>.*?))?{ALPACA_TAIL}",
    re.DOTALL,
)
MARK = "{#- Renders the plain prompts that this model was trained on. -#}"
ONE_QUESTION = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{%- if turns | length > 2 or turns[0].role != 'user' %}"
    "{{- raise_exception('this model was trained on single questions') }}{%- endif %}"
    "{%- set user = turns[0] %}"
)
NO_SYSTEM = (
    "{%- if system %}{{- raise_exception('this model was trained without system texts') }}{%- endif %}"
)
ANSWER = "{%- if turns | length > 1 %}{{- turns[1].content + eos_token }}{%- endif %}"


def plain_template(format: str, template: Template | None, *, starts: bool) -> str | None:
    """Returns the Jinja source for the prompts of a format or of a source's template, or None.

    ``starts``: whether the tokenizer adds its start token to every text.
    """
    start = "{{- bos_token }}" if starts else ""
    if template is not None:
        return None if template.completion is None else _assemble(start, NO_SYSTEM, _of_columns(template))
    if format == "alpaca":
        return _assemble(start, "", _alpaca())
    if format == "instruct":
        return _assemble(start, NO_SYSTEM, "{{- user.content }}{{- user.input or '' }}")
    return _assemble(start, NO_SYSTEM, "{{- user.content }}") if format == "prompt_completion" else None


def as_messages(example: Example, format: str, template: Template | None) -> list[dict[str, str]] | None:
    """Returns a prompt as messages for its chat template, or None if messages are not enough.

    The parts of a plain prompt are recovered from its text.
    """
    if isinstance(example, Chat):
        plain = [{"role": m["role"], "content": m.get("content", "")} for m in example.messages]
        is_plain = not (example.tools or example.template_kwargs)
        return (
            plain
            if is_plain and all(set(m) <= {"role", "content", "weight"} for m in example.messages)
            else None
        )
    text = "".join(example.texts)
    if template is not None:
        parts = split_template(template.shown)
        pattern = "".join("(.+?)" if part.is_column else re.escape(part.text) for part in parts)
        columns = [part.text for part in parts if part.is_column]
        match = re.fullmatch(pattern, text, re.DOTALL)
        cells = dict(zip(columns, match.groups(), strict=True)) if match else {}
        first = template.columns[0]
        others = {key: value for key, value in cells.items() if key != first}
        return [{"role": "user", "content": cells[first], **others}] if match else None
    if format == "alpaca":
        match = ALPACA.fullmatch(text)
        if match is None:
            return None
        extra = {"input": match["input"]} if match["input"] else {}
        preambles = (ALPACA_PREAMBLE, ALPACA_PREAMBLE_WITH_INPUT)
        system = [] if match["head"] in preambles else [{"role": "system", "content": match["head"]}]
        return [*system, {"role": "user", "content": match["instruction"], **extra}]
    return [{"role": "user", "content": text}] if format in ("instruct", "prompt_completion") else None


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer's template was made here."""
    return str(cast(Any, tokenizer).chat_template or "").startswith(MARK)


def _assemble(start: str, checks: str, prompt: str) -> str:
    return MARK + ONE_QUESTION + checks + start + prompt + ANSWER


def _alpaca() -> str:
    preamble = f"{_text(ALPACA_PREAMBLE_WITH_INPUT)} if user.input else {_text(ALPACA_PREAMBLE)}"
    input_part = f"{{%- if user.input %}}{{{{- {_text(ALPACA_INPUT)} + user.input }}}}{{%- endif %}}"
    return (
        f"{{{{- system or ({preamble}) }}}}{{{{- {_text(chr(10) * 2 + ALPACA_HEAD)} + user.content }}}}"
        f"{input_part}{{{{- {_text(ALPACA_TAIL)} }}}}"
    )


def _of_columns(template: Template) -> str:
    """Renders a source's template: its first column is the message's content, the others are keys."""
    first = template.columns[0]
    pieces = []
    for part in split_template(template.shown):
        column = "user.content" if part.text == first else f"user[{_text(part.text)}]"
        pieces.append(f"{{{{- {column if part.is_column else _text(part.text)} }}}}")
    return "".join(pieces)


def _text(text: str) -> str:
    """Quotes a text as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def settle_render(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Recipe:
    """Resolves ``data.render: auto``. A template for plain prompts does not count as a chat template."""
    return recipe.for_tokenizer(has_template=bool(tokenizer.chat_template) and not is_plain(tokenizer))


def give_plain_template(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, formats: Iterable[str]
) -> list[str]:
    """Sets a chat template that renders the plain prompts of a run; returns lines to print.

    The model can then be prompted with transformers alone. Has no effect for chats and for pretraining.
    """
    names = sorted(formats)
    if recipe.stage != "sft" or recipe.data.render == "chat" or {"messages", "sharegpt"}.intersection(names):
        return []
    templates = [source.template for source in recipe.data.train]
    starts = bos_token(tokenizer) is not None
    is_alike = len(names) == 1 and all(template == templates[0] for template in templates)
    text = plain_template(names[0], templates[0], starts=starts) if is_alike else None
    if text is None:
        why = f"{', '.join(names)} have no common prompt format"
        return [f"prompts   only hf-clm generate can prompt this model: no chat template is saved ({why})"]
    tokenizer.chat_template = text
    return [f"prompts   saved a chat template that renders these prompts ({names[0]}) from messages"]
