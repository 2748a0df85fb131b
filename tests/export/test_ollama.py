"""The Modelfile of Ollama: its template writes what the run's own writes, or there is no Modelfile."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import byte_tokenizer, tiny_model
from ollama_templates import GEMMA, LLAMA_3, QWEN, TEMPLATES, with_template

from hf_clm.data.read.plain_template import plain_template
from hf_clm.export.ollama import find_default_system, find_shape, write_modelfile
from hf_clm.generation.load import to_loaded_run
from hf_clm.run_folder import RunRecord
from hf_clm.template import Template
from hf_clm.text.tokenizer import use_chat_template


def opened(*, stop_ids: list[int], starts: bool = False) -> Any:
    """What write_modelfile reads of a file that llama.cpp has opened."""
    config = tiny_model(max_position_embeddings=128).config
    return SimpleNamespace(
        config=config, stop_ids=lambda: stop_ids, tokenize=lambda text, is_chat: [1] if starts else []
    )


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_the_shapes_of_published_templates_are_found(name, template):
    tokenizer, start = with_template(template), "<|endoftext|>" if "bos_token" in template else ""

    shape = find_shape(tokenizer, default=find_default_system(tokenizer), start=start)

    assert shape is not None and shape.name == name.partition(",")[0]


def test_the_built_in_chat_template_has_a_shape():
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")

    shape = find_shape(tokenizer)

    assert shape is not None and shape.name == "ChatML"


@pytest.mark.parametrize("format", ["alpaca", "instruct", "prompt_completion"])
def test_plain_prompts_have_a_shape(format):
    tokenizer = with_template(str(plain_template(format, None, starts=False)))
    default = find_default_system(tokenizer)

    shape = find_shape(tokenizer, default=default)

    assert shape is not None and shape.name == "for single questions"
    tokenizer.chat_template = plain_template(format, None, starts=True)
    assert find_shape(tokenizer, default=default, start="<|endoftext|>") == shape
    assert default.startswith("Below is an instruction") == (format == "alpaca")


def test_the_template_of_a_source_has_a_shape_if_it_has_one_column():
    one = Template(prompt="Q: {question}\nA:", completion="{answer}")
    two = Template(prompt="{text} in {language}:", completion="{answer}")
    record = {"role": "user", "content": "One", "language": "German"}
    shapes = []
    for source in (one, two):
        tokenizer = with_template(str(plain_template("prompt_completion", source, starts=False)))
        shapes.append(find_shape(tokenizer, asked=[[record]]))

    assert shapes[0] is not None and '"Q: "' in shapes[0].go
    assert shapes[1] is None


@pytest.mark.parametrize(
    "change",
    [
        ("<|im_end|>\n' }}{% endfor %}", "<|im_end|>' }}{% endfor %}"),
        ("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
        ("m.role + '\n'", "m.role + ' '"),
        ("{% for m in messages %}", "{{ 'Today is Monday.' }}{% for m in messages %}"),
        ("{% for m in messages %}", "{% for m in messages[-2:] %}"),
        ("m.content", "m.content | upper"),
        ("m.content", "m.content | trim"),  # Ollama keeps white space
        ("m.content", "m.content.split('</think>')[-1]"),  # without the reasoning of earlier turns
    ],
)
def test_a_template_that_differs_has_no_shape(change):
    tokenizer = with_template(QWEN.replace(*change))
    assert change[0] in QWEN

    assert find_shape(tokenizer, default=find_default_system(tokenizer)) is None


def test_the_modelfile_answers_like_the_run(tmp_path):
    tokenizer = with_template(QWEN)
    run = to_loaded_run(tiny_model(), tokenizer, RunRecord(format="messages"))
    run.model.generation_config.max_new_tokens = 60

    lines = write_modelfile(tmp_path, "x-f16.gguf", run, opened(stop_ids=[256, 259]), asked=[])

    written = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines == ["ollama    Modelfile with the template ChatML, which writes the prompts of this run"]
    assert written[0] == "FROM ./x-f16.gguf" and written[1].startswith('TEMPLATE """{{ range .Messages }}')
    assert written[2:] == [
        'SYSTEM """You are Qwen."""',
        'PARAMETER stop """<|endoftext|>"""',
        'PARAMETER stop """<|im_end|>"""',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 128",
        "PARAMETER num_predict 60",
    ]


@pytest.mark.parametrize(
    ("template", "format", "starts", "is_written"),
    [
        (LLAMA_3, "messages", True, True),
        (LLAMA_3, "messages", False, False),  # Ollama would not write the start token
        (QWEN, "messages", True, False),  # Ollama would write one
        (GEMMA + "{{ 'x' }}", "messages", True, False),
        (None, "segments", False, False),  # prompts of several kinds
        (None, "text", False, True),
        (QWEN, "text", False, True),  # a run that continues texts does not use the template
    ],
)
def test_there_is_no_modelfile_for_another_prompt(template, format, starts, is_written, tmp_path):
    run = to_loaded_run(tiny_model(), with_template(template), RunRecord(format=format))

    lines = write_modelfile(tmp_path, "x.gguf", run, opened(stop_ids=[256], starts=starts), asked=[])

    assert (tmp_path / "Modelfile").exists() == is_written
    assert lines[0].startswith("ollama    Modelfile with" if is_written else "ollama    no Modelfile: ")
    if format == "text":
        assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text()
