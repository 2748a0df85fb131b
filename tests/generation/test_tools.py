"""Tools and reasoning end to end: serve, chat and generate with a model built to call a tool.

The model gives the right answer only after a prompt with exactly as many tokens as transformers renders.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from helpers import IM_END, byte_tokenizer, save_folder, tiny_model, write_jsonl
from served import Server, served
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.cli import main
from hf_clm.errors import DataError, RecipeError
from hf_clm.generation.chat import Conversation
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.prompts import read_prompts, read_tools, to_prompt_example, to_prompt_ids, with_tools
from hf_clm.generation.protocol import ChatBody, read_body
from hf_clm.model.load import fit_to_tokenizer
from hf_clm.text.tokenizer import use_chat_template

TEMPLATE = """\
{%- if tools %}<|im_start|>system{{ '\\n' + (tools | tojson) }}<|im_end|>{{ '\\n' }}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role + '\\n' }}
{%- if m.reasoning_content and keep %}{{ '<think>\\n' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "look", "description": "Looks."}}]
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "a map"}}}]
QUESTION = [{"role": "user", "content": "Where?"}]
RESULT = [
    *QUESTION,
    {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
    {"role": "tool", "content": "Rome"},
]
CALLING = 'I look.\n<tool_call>\n{"name": "look", "arguments": {"at": "a map"}}\n</tool_call>'
SAYING = "<think>\nEasy.\n</think>\n\nRome."


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def expected_ids(messages: list[dict], tools: list[dict] | None = TOOLS, **variables: Any) -> list[int]:
    tokenizer: Any = build_tokenizer()
    options = {"add_generation_prompt": True, "return_dict": False, **variables}
    return tokenizer.apply_chat_template(messages, tools=tools, **options)


def calling_model() -> PreTrainedModel:
    """A GPT-2 built by hand: it answers QUESTION with CALLING, and RESULT with SAYING.

    Its next token depends on its position alone.
    """
    says: dict[int, int] = {}
    for messages, text in ((QUESTION, CALLING), (RESULT, SAYING)):
        start = len(expected_ids(messages)) - 1
        says |= {start + n: token for n, token in enumerate([*text.encode(), IM_END])}
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": len(says), "n_positions": 2048}
    model = tiny_model("gpt2", tie_word_embeddings=False, **sizes)
    fit_to_tokenizer(model, build_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        for row, (position, token) in enumerate(says.items()):
            model.transformer.wpe.weight[position, row] = 1.0
            model.lm_head.weight[token, row] = 1.0
    return model


def build_run() -> LoadedRun:
    return LoadedRun(calling_model(), build_tokenizer(), "messages", "sft", 2048, has_turns=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_folder(tmp_path_factory.mktemp("calling"), calling_model(), build_tokenizer())


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    with served(folder, "--name", "calling") as server:
        yield server


@pytest.fixture
def tools_file(tmp_path) -> str:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    return str(path)


def ask(server: Server, messages: list[Any], **options: Any) -> Any:
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    return api.chat.completions.create(model="calling", messages=messages, **options)


# --- serve


def test_a_call_is_returned_and_its_result_is_read(server):
    first = ask(server, QUESTION, tools=TOOLS, tool_choice="auto")
    message, call = first.choices[0].message, first.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rome"}
    second = ask(server, [*QUESTION, message.model_dump(), result], tools=TOOLS)

    assert (message.content, first.choices[0].finish_reason) == ("I look.", "tool_calls")
    assert (call.type, call.function.name, call.function.arguments) == ("function", "look", '{"at": "a map"}')
    assert first.usage.prompt_tokens == len(expected_ids(QUESTION))
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("Rome.", "stop")
    assert second.choices[0].message.reasoning_content == "Easy."
    assert second.choices[0].message.tool_calls is None


def test_in_a_stream_calls_come_last_and_reasoning_is_separate(server):
    chunks = [chunk.choices[0] for chunk in ask(server, QUESTION, tools=TOOLS, stream=True)]
    answer = [chunk.choices[0].delta for chunk in ask(server, RESULT, tools=TOOLS, stream=True)]

    assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
    call = chunks[-2].delta.tool_calls[0]
    assert (call.index, call.function.name, call.function.arguments) == (0, "look", '{"at": "a map"}')
    assert [chunk.finish_reason for chunk in chunks[-2:]] == [None, "tool_calls"]
    assert "".join(delta.content or "" for delta in answer) == "Rome."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in answer) == "Easy."


def test_a_truncated_call_is_text(server):
    cut = ask(server, QUESTION, tools=TOOLS, max_tokens=len(CALLING) - 15).choices[0]

    assert (cut.message.content, cut.finish_reason) == (CALLING[:-15], "length")
    assert cut.message.tool_calls is None


def test_with_tool_choice_none_the_prompt_has_no_tools(server):
    reply = ask(server, QUESTION, tools=TOOLS, tool_choice="none", max_tokens=1)

    assert reply.usage.prompt_tokens == len(expected_ids(QUESTION, None))


def test_template_variables_are_accepted_and_options_of_transformers_are_not(server):
    said = [*QUESTION, {"role": "assistant", "content": "Rome", "reasoning_content": "Easy."}, *QUESTION]
    kept = {"chat_template_kwargs": {"keep": True}}
    reply = ask(server, said, max_tokens=1, extra_body=kept)

    assert reply.usage.prompt_tokens == len(expected_ids(said, None, keep=True))
    with pytest.raises(openai.BadRequestError, match="'chat_template' is not a template variable"):
        ask(server, QUESTION, extra_body={"chat_template_kwargs": {"chat_template": "x"}})


# --- the same prompt everywhere


def served_prompt(tmp_path: Path) -> list[int]:
    body = read_body(ChatBody, {"messages": RESULT, "tools": TOOLS})
    run = build_run()
    return to_prompt_ids(body.to_prompts(run), run.tokenizer, run.rendering)[0]


def recorded_prompt(tmp_path: Path) -> list[int]:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": RESULT, "tools": json.dumps(TOOLS)}])
    run = build_run()
    return to_prompt_ids(read_prompts(file, "messages", has_turns=True), run.tokenizer, run.rendering)[0]


def chat_prompt(tmp_path: Path) -> list[int]:
    talk = Conversation(build_run(), Decoding(), system="", tools=TOOLS)
    talk.answer("Where?", lambda text: None)
    answer = talk.take_result("Rome", lambda text: None)
    assert answer is not None
    return answer.prompt_ids


@pytest.mark.parametrize("prompt", [served_prompt, recorded_prompt, chat_prompt])
def test_the_prompt_is_that_of_transformers(prompt, tmp_path):
    assert prompt(tmp_path) == expected_ids(RESULT)


# --- chat


def test_chat_shows_a_call_reads_its_result_and_continues(folder, tools_file, monkeypatch, capsys):
    lines = io.BytesIO(b"/tool Rome\nWhere?\n/tool Rome\n/tool Rome\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))

    assert main(["chat", folder, "--device", "cpu", "--tools", tools_file]) == 0

    fault = "error: there is no tool call to give a result for; fix: start chat with --tools FILE\n"
    assert capsys.readouterr().out == f"{fault}{CALLING}\n{SAYING}\n{fault}"


def test_chat_separates_reasoning_and_calls():
    talk = Conversation(build_run(), Decoding(), system="", tools=TOOLS)
    talk.answer("Where?", lambda text: None)
    talk.take_result("Rome", lambda text: None)

    ids = [message.pop("id") for message in talk.messages[1]["tool_calls"]]
    assert talk.messages == [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
        {"role": "tool", "content": "Rome", "name": "look", "tool_call_id": ids[0]},
        {"role": "assistant", "content": "Rome.", "reasoning": "Easy."},
    ]


# --- generate


def test_generate_offers_the_tools_of_a_file(folder, tools_file, capsys):
    assert main(["generate", folder, "--device", "cpu", "--prompt", "Where?", "--tools", tools_file]) == 0

    assert capsys.readouterr().out == CALLING + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "tools.json: key 'tools': expected list; got object"),
        ("[{}]", "tools.json: tool 1 has no name; got keys none"),
        ("[", "tools.json: not valid JSON: Expecting value: line 1 column 2 (char 1)"),
    ],
)
def test_a_file_without_tools_is_rejected(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(content)

    with pytest.raises(DataError) as error:
        read_tools("tools.json")

    assert str(error.value) == message


def test_tools_are_rejected_if_the_prompt_cannot_include_them():
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    prompt = with_tools(to_prompt_example("hi", "messages"), TOOLS)

    with pytest.raises(DataError, match=r"^the chat template has no place for tools; fix: remove them"):
        to_prompt_ids([prompt], tokenizer, build_run().rendering)
    with pytest.raises(RecipeError, match="--tools: prompts are not rendered with a chat template"):
        with_tools(to_prompt_example("hi", "text"), TOOLS)
