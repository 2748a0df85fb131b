"""Writes the Modelfile of Ollama, which renders chats with a template of Go, not with the model's own.

SHAPES has pairs of templates that write the same text. The one in Jinja is compared with that of the run: if
they are equal in every conversation that the latter accepts, the Modelfile contains the one in Go. Only white
space at the ends of a message differs for Llama 3 and Gemma, whose templates remove it: Ollama cannot.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from hf_clm.generation.llama_cpp import LlamaCppModel
from hf_clm.generation.load import LoadedRun
from hf_clm.model.load import max_positions
from hf_clm.run_folder import write_text

MODELFILE = "Modelfile"
LARGEST_CONTEXT = 8192  # tokens: Ollama reserves memory for all of them

Messages = Sequence[dict[str, str]]
SYSTEM, USER, ANSWER = "Answer in 3 words.", "What is 2 + 2?\nPlease.", "It is 4."
ALONE: Messages = [{"role": "user", "content": USER}]
WITH_SYSTEM: Messages = [{"role": "system", "content": SYSTEM}, *ALONE]
TURNS: Messages = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "等于 5 吗？"}]
REASONED: Messages = [
    *(
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nFour."},
        {"role": "user", "content": "Why?"},
    ),
]
CONVERSATIONS = [
    *(ALONE, WITH_SYSTEM, [*ALONE, *TURNS], [*WITH_SYSTEM, *TURNS], [*ALONE, *TURNS, *TURNS]),
    [*ALONE, *REASONED],  # some templates leave out the reasoning of earlier turns
]
PADDED: Messages = [{"role": "user", "content": " 2 + 2 \n"}]


class Shape(NamedTuple):
    """A way to write a chat, without the start token, up to the opening of the answer.

    In Jinja, ``messages`` begin with a system message if there is one or if the run has a default. In Go, as
    Ollama executes it, the same is true of ``.Messages``: the Modelfile sets the default.
    """

    name: str
    jinja: str
    go: str


SHAPES = [
    Shape(
        "ChatML",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        '{{ range .Messages }}<|im_start|>{{ .Role }}{{ "\\n" }}{{ .Content }}<|im_end|>{{ "\\n" }}{{ end }}'
        '<|im_start|>assistant{{ "\\n" }}',
    ),
    Shape(
        "Llama 3",
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
        '{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>{{ "\\n\\n" }}{{ .Content }}'
        '<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>{{ "\\n\\n" }}',
    ),
    Shape(
        "Gemma",
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% else %}{{ '<start_of_turn>' }}"
        "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + ns.system + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
        "{{ '<start_of_turn>model\n' }}",
        '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = .Content }}{{ else }}'
        '<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}{{ "\\n" }}'
        '{{ if $system }}{{ $system }}{{ "\\n\\n" }}{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>'
        '{{ "\\n" }}{{ end }}{{ end }}<start_of_turn>model{{ "\\n" }}',
    ),
]


TEXT = Shape("for texts", "", "{{ .Prompt }}")  # of a run in the format ``text``, which continues texts


def write_modelfile(
    folder: Path, file: str, run: LoadedRun, exported: LlamaCppModel, *, asked: Sequence[Messages]
) -> list[str]:
    """Writes the Modelfile for a GGUF file in ``folder``; returns the lines to print.

    Nothing is written if no shape writes the prompts of the run. ``asked``: prompts of its data.
    """
    tokenizer, shape, default = run.tokenizer, TEXT if run.format == "text" else None, ""
    if shape is None and tokenizer.chat_template:
        default = find_default_system(tokenizer)
        # Ollama writes the start token where the file asks for it; a template of Go never does.
        start = str(tokenizer.bos_token) if exported.tokenize("", is_chat=True) else ""
        shape = find_shape(tokenizer, asked=asked, default=default, start=start)
    if shape is None:
        return [
            "ollama    no Modelfile: no known Go template writes the prompts of this run",
            "          llama-server --jinja uses the template of the run, which the GGUF file contains",
        ]
    limit = min(max_positions(exported.config) or LARGEST_CONTEXT, LARGEST_CONTEXT)
    stops = [str(tokenizer.decode([token])) for token in exported.stop_ids()]
    lines = [f"FROM ./{file}", f'TEMPLATE """{shape.go}"""']
    lines += [f'SYSTEM """{default}"""'] if default else []
    lines += [f'PARAMETER stop """{stop}"""' for stop in stops]
    # By default, Ollama samples, penalizes repetition and shortens the context.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {limit}"]
    settings = run.model.generation_config
    if settings is not None and settings.max_new_tokens:
        lines.append(f"PARAMETER num_predict {settings.max_new_tokens}")
    write_text(folder / MODELFILE, "\n".join(lines) + "\n")
    return [f"ollama    Modelfile with the template {shape.name}, which writes the prompts of this run"]


def find_shape(
    tokenizer: PreTrainedTokenizerFast,
    *,
    asked: Sequence[Messages] = (),
    default: str = "",
    start: str = "",
) -> Shape | None:
    """Returns the shape that writes, after ``start``, what the tokenizer's template writes.

    It is compared on all CONVERSATIONS that this template accepts, and on what is ``asked`` of the model.
    ``default``: the system text of chats without one.
    """
    expected = [(messages, render(tokenizer, messages)) for messages in [*CONVERSATIONS, PADDED, *asked]]
    accepted = [(messages, text) for messages, text in expected if text is not None]
    for shape in [*SHAPES, *_plain_shape(tokenizer, start)]:
        template = ImmutableSandboxedEnvironment().from_string(shape.jinja)
        written = [template.render(messages=with_default(messages, default)) for messages, _ in accepted]
        if accepted and [start + text for text in written] == [text for _, text in accepted]:
            return shape
    return None


def find_default_system(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the system text that a template writes if a chat has none; empty if there is none."""
    without, with_system = render(tokenizer, ALONE), render(tokenizer, WITH_SYSTEM)
    if without is None or with_system is None or with_system.count(SYSTEM) != 1:
        return ""
    before, _, after = with_system.partition(SYSTEM)
    has_default = (
        without.startswith(before) and without.endswith(after) and len(without) > len(before + after)
    )
    return without[len(before) : len(without) - len(after)] if has_default else ""


def with_default(messages: Messages, default: str) -> Messages:
    """Returns the messages as Ollama passes them to a template: with the default system text, if any."""
    has_system = messages[0]["role"] == "system"
    return messages if has_system or not default else [{"role": "system", "content": default}, *messages]


def render(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> str | None:
    """Returns a prompt as the tokenizer's template writes it; None if it refuses the chat."""
    try:
        text = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):  # some need tools
        return None
    return str(text)


def _plain_shape(tokenizer: PreTrainedTokenizerFast, start: str) -> list[Shape]:
    """Returns the shape of a template for single questions, with fixed texts around the words of the user.

    Returns nothing for a template that renders several turns.
    """
    alone, with_system = render(tokenizer, ALONE), render(tokenizer, WITH_SYSTEM)
    if alone is None or render(tokenizer, CONVERSATIONS[2]) is not None:
        return []
    opening = middle = before = ""
    if with_system is None:
        before, _, after = alone.removeprefix(start).partition(USER)
    else:
        opening, _, rest = with_system.removeprefix(start).partition(SYSTEM)
        middle, _, after = rest.partition(USER)
    quoted = [json.dumps(part, ensure_ascii=False) for part in (opening, middle, before, after)]
    jinja = (
        "{{% for m in messages %}}{{% if m.role == 'system' %}}{{{{ {0} + m.content + {1} }}}}"
        "{{% else %}}{{{{ {2} + m.content + {3} }}}}{{% endif %}}{{% endfor %}}"
    )
    go = (
        '{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{{{{ {0} }}}}{{{{ .Content }}}}{{{{ {1} }}}}'
        '{{{{ else if eq .Role "user" }}}}{{{{ {2} }}}}{{{{ .Content }}}}{{{{ {3} }}}}{{{{ end }}}}'
        "{{{{ end }}}}"
    )
    return [Shape("for single questions", jinja.format(*quoted), go.format(*quoted))]
