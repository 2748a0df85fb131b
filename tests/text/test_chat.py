"""Rendering chats: the prompt of each assistant turn, and the target that the model must produce.

The templates are short ones of the kinds that public models have.
"""

from typing import Any

import pytest
from helpers import EOS, IM_END, byte_tokenizer

from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Chat, Message
from hf_clm.text.chat import ChatRenderer, stop_token_ids
from hf_clm.text.encode import Encoder
from hf_clm.text.tokenizer import use_chat_template

START = "{{- '<|im_start|>' + message.role + '\n' }}"
OPENS = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
THOUGHT = "{{- '<think>\n' + message.reasoning_content|default('') + '\n</think>\n\n' }}"
NOT_THINKING = "{%- if enable_thinking is defined and not enable_thinking %}"


def loop(turn: str, *, before: str = "", opens: str = OPENS) -> str:
    """Returns a template that renders ``turn`` for each message, and ``opens`` before an answer."""
    return before + "{%- for message in messages %}" + turn + "{%- endfor %}" + opens


def opening(text: str) -> str:
    return "{%- if add_generation_prompt %}" + text + "{%- endif %}"


CONTENT = "{{- message.content + '<|im_end|>\n' }}"
CALLS = "{%- for call in message.tool_calls|default([]) %}"
CHATML = loop(START + CONTENT)
# Renders a default system turn, like Qwen2.5.
DEFAULT_SYSTEM = loop(
    START + CONTENT,
    before="{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe nice.<|im_end|>\n' }}"
    "{%- endif %}",
)
# Renders reasoning only in turns after the last question, like Qwen3.
QWEN3 = loop(
    START
    + "{%- if message.role == 'assistant' and loop.index0 > ns.last %}"
    + THOUGHT
    + "{%- endif %}"
    + CONTENT,
    before="{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}",
    opens=opening(
        "{{- '<|im_start|>assistant\n' }}" + NOT_THINKING + "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    ),
)
# The prompt opens reasoning that turns omit, like DeepSeek-R1.
R1 = loop(
    START + "{{- message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}",
    opens=opening("{{- '<|im_start|>assistant\n<think>\n' }}"),
)
# The prompt opens reasoning, and turns without reasoning have only a closing mark, like GLM-4.7.
GLM = loop(
    START
    + "{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}"
    + "{%- elif message.role == 'assistant' %}{{- '</think>' }}{%- endif %}"
    + CONTENT,
    opens=opening("{{- '<|im_start|>assistant\n<think>' }}"),
)
# The prompt has an empty closed block that turns omit, like Gemma-4.
CLOSED = loop(START + CONTENT, opens=opening("{{- '<|im_start|>assistant\n<think>\n</think>\n' }}"))
# Adds a second end token at the end of a chat, like Phi-3.
PHI3 = loop(START + CONTENT, opens="{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
            "{%- else %}{{- eos_token }}{%- endif %}")  # fmt: skip
NO_END = loop("{{- message.role + ': ' + message.content + '\n' }}", opens=opening("{{- 'assistant: ' }}"))
# The end token of a turn depends on whether another turn follows, like gpt-oss.
RETURN = loop(
    START + "{{- message.content }}{%- if loop.last and message.role == 'assistant' %}{{- eos_token }}"
    "{%- else %}{{- '<|im_end|>\n' }}{%- endif %}"
)
TRIMS = loop(START + "{{- message.content | trim + '<|im_end|>\n' }}")
SPACES = loop(START + "{{- message.content + '     <|im_end|>\n' }}")
LOOPS_OVER_TOOLS = loop(
    START + CONTENT, before="{%- for tool in tools %}{{- tool.function.name }}{%- endfor %}"
)
PARTS = loop(
    START + "{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
)
# Renders the system text before the last question, if nothing follows it, like Mistral-7B-Instruct-v0.3.
SYSTEM_LAST = loop(
    "{%- if message.role == 'user' %}{{- '<|im_start|>' }}"
    "{%- if loop.last and messages[0].role == 'system' %}{{- messages[0].content + ' ' }}{%- endif %}"
    "{{- message.content + '<|im_end|>' }}"
    "{%- elif message.role == 'assistant' %}{{- message.content + eos_token }}{%- endif %}",
    opens="",
)
JSON_CALLS = loop(
    START + "{{- message.content or '' }}" + CALLS + "{{- '<call>' + call.function.name + ' ' }}"
    "{{- call.function.arguments | tojson }}{{- '</call>' }}{%- endfor %}{{- '<|im_end|>\n' }}",
    before="{%- if tools %}{{- tools | tojson + '\n' }}{%- endif %}",
)
TEXT_CALLS = JSON_CALLS.replace("call.function.arguments | tojson", "call.function.arguments")
NEEDS_CONTENT = JSON_CALLS.replace("message.content or ''", "message.content + ''")
NEEDS_IDS = JSON_CALLS.replace(
    "{{- '<call>'",
    "{%- if call.id|length != 9 %}{{- raise_exception('9 letters') }}{%- endif %}{{- call.id + '<call>'",
).replace("{{- message.content or", "{{- message.tool_call_id|default('') }}{{- message.content or")
QUOTES_RESULTS = CHATML.replace(
    "message.content +", "(message.content|tojson if message.role == 'tool' else message.content) +"
)
DEAF = CHATML.replace(
    "{{- '<|im_start|>'", "{%- if message.role != 'tool' %}{{- '<|im_start|>'"
).replace("<|im_end|>\n' }}", "<|im_end|>\n' }}{%- endif %}")  # fmt: skip

SYSTEM: Message = {"role": "system", "content": "Be kind."}
HI: Message = {"role": "user", "content": "Hi"}
YO: Message = {"role": "assistant", "content": "Yo"}
AND: Message = {"role": "user", "content": "And?"}
BYE: Message = {"role": "assistant", "content": "Bye"}
THOUGHTFUL: Message = {**YO, "reasoning": "a greeting"}
ASKED_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
ASKED_AND = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
BERLIN: Any = {
    "type": "function",
    "id": "call_1",
    "function": {"name": "weather", "arguments": {"in": "Köln"}},
}
CALL: Message = {"role": "assistant", "tool_calls": [BERLIN]}
RESULT: Message = {"role": "tool", "content": '{"t": 21}', "tool_call_id": "call_1"}
TOOLS: Any = [{"type": "function", "function": {"name": "weather"}}]


def tokenizer_with(template: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<call>", "</call>"])  # special=False
    if template in ("chatml", "plain"):
        use_chat_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    return tokenizer


def renderer_of(template: Any, **options: Any) -> ChatRenderer:
    return ChatRenderer(Encoder(tokenizer_with(template)), **options)


def turns(template: Any, *messages: Message, tools: Any = (), **variables: Any) -> list[tuple[str, str]]:
    """Returns the prompt and the target of each assistant turn."""
    found = renderer_of(template).turns(Chat(list(messages), list(tools), variables))
    return [(turn.prompt, turn.target) for turn in found]


def refusal(template: Any, *messages: Message, **options: Any) -> str:
    with pytest.raises((DataError, ModelError)) as error:
        renderer_of(template, **options).turns(Chat(list(messages)))
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "messages", "found"),
    [
        ("chatml", [HI, YO], [(ASKED_HI, "Yo<|im_end|>")]),
        (CHATML, [HI, YO, AND, BYE],
         [(ASKED_HI, "Yo<|im_end|>"), (ASKED_HI + "Yo<|im_end|>\n" + ASKED_AND, "Bye<|im_end|>")]),
        ("plain", [SYSTEM, HI, YO, AND, BYE], [
            ("System:\nBe kind.\nUser:\nHi\nAssistant:\n", "Yo<|endoftext|>"),
            ("System:\nBe kind.\nUser:\nHi\nAssistant:\nYo<|endoftext|>\nUser:\nAnd?\nAssistant:\n",
             "Bye<|endoftext|>"),
        ]),
        (DEFAULT_SYSTEM, [HI, YO], [("<|im_start|>system\nBe nice.<|im_end|>\n" + ASKED_HI, "Yo<|im_end|>")]),
        (QWEN3, [HI, THOUGHTFUL], [(ASKED_HI, "<think>\na greeting\n</think>\n\nYo<|im_end|>")]),
        (QWEN3, [HI, THOUGHTFUL, AND, BYE], [
            (ASKED_HI, "<think>\na greeting\n</think>\n\nYo<|im_end|>"),
            (ASKED_HI + "Yo<|im_end|>\n" + ASKED_AND, "<think>\n\n</think>\n\nBye<|im_end|>"),
        ]),
        (R1, [HI, THOUGHTFUL, AND, BYE], [
            (ASKED_HI + "<think>\n", "a greeting\n</think>\n\nYo<|im_end|>"),
            (ASKED_HI + "Yo<|im_end|>\n" + ASKED_AND + "<think>\n", "\n</think>\n\nBye<|im_end|>"),
        ]),
        (R1, [HI, {**YO, "content": "<think>\na greeting\n</think>\n\nYo"}],
         [(ASKED_HI + "<think>\n", "a greeting\n</think>\n\nYo<|im_end|>")]),
        (GLM, [HI, THOUGHTFUL, AND, BYE], [
            (ASKED_HI + "<think>", "a greeting</think>Yo<|im_end|>"),
            (ASKED_HI + "<think>a greeting</think>Yo<|im_end|>\n" + ASKED_AND + "<think>",
             "</think>Bye<|im_end|>"),
        ]),
        (CLOSED, [HI, YO], [(ASKED_HI + "<think>\n</think>\n", "Yo<|im_end|>")]),
        (PHI3, [HI, YO, AND, BYE],
         [(ASKED_HI, "Yo<|im_end|>"), (ASKED_HI + "Yo<|im_end|>\n" + ASKED_AND, "Bye<|im_end|>")]),
        (NO_END, [HI, YO, AND, BYE], [
            ("user: Hi\nassistant: ", "Yo<|endoftext|>"),
            ("user: Hi\nassistant: Yo\nuser: And?\nassistant: ", "Bye<|endoftext|>"),
        ]),
        (RETURN, [HI, YO, AND, BYE],
         [(ASKED_HI, "Yo<|endoftext|>"), (ASKED_HI + "Yo<|im_end|>\n" + ASKED_AND, "Bye<|endoftext|>")]),
        (TRIMS, [HI, {**YO, "content": " Yo\n"}], [(ASKED_HI, "Yo<|im_end|>")]),
        (SPACES, [HI, YO],
         [("<|im_start|>user\nHi     <|im_end|>\n<|im_start|>assistant\n", "Yo     <|im_end|>")]),
        (LOOPS_OVER_TOOLS, [HI, YO], [(ASKED_HI, "Yo<|im_end|>")]),
        (PARTS, [SYSTEM, HI, YO], [("<|im_start|>system\nBe kind.<|im_end|>\n" + ASKED_HI, "Yo<|im_end|>")]),
        (SYSTEM_LAST, [SYSTEM, HI, YO, AND, BYE], [
            ("<|im_start|>Be kind. Hi<|im_end|>", "Yo<|endoftext|>"),
            ("<|im_start|>Hi<|im_end|>Yo<|endoftext|><|im_start|>Be kind. And?<|im_end|>",
             "Bye<|endoftext|>"),
        ]),
        (QUOTES_RESULTS, [HI, YO, RESULT, BYE], [
            (ASKED_HI, "Yo<|im_end|>"),
            (ASKED_HI + 'Yo<|im_end|>\n<|im_start|>tool\n"{\\"t\\": 21}"<|im_end|>\n<|im_start|>assistant\n',
             "Bye<|im_end|>"),
        ]),
    ],
)  # fmt: skip
def test_every_turn_follows_the_generation_prompt(template, messages, found):
    assert turns(template, *messages) == found
    tokenizer = tokenizer_with(template)
    for message, (prompt, _) in zip([m for m in messages if m["role"] == "assistant"], found, strict=True):
        asked: Any = messages[: messages.index(message)]
        if template is PARTS:
            asked = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in asked]
        options: Any = {"tools": []} if template is LOOPS_OVER_TOOLS else {}
        theirs = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
        assert prompt == theirs


@pytest.mark.parametrize(
    "messages",
    [[YO], [SYSTEM, YO], [HI, AND, YO], [HI, YO, BYE], [HI, SYSTEM, YO], [YO, HI, BYE]],
    ids=lambda messages: "-".join(message["role"] for message in messages),
)
def test_any_order_of_turns_that_the_template_accepts_is_accepted(messages):
    last = messages[-1]["content"]

    if messages == [YO]:  # nothing asks for it, so there is nothing to learn
        assert turns(CHATML, *messages) == []
    else:
        assert turns(CHATML, *messages)[-1][1] == f"{last}<|im_end|>"
    alternate = "{%- if messages[0].role != 'user' %}{{- raise_exception('a user is first') }}{%- endif %}"
    if messages[0] is not HI:
        assert refusal(alternate + CHATML, *messages).startswith(
            "the chat template refuses the messages: a user is first"
        )


@pytest.mark.parametrize(
    "answer",
    [
        "Yo<call>",
        "<call> </call>",
        "see <call> <call> <call>",
        "<think>\n\n</think>\n\n<call>",
        "|",
        "im_end",
    ],
)
def test_tokens_at_the_end_of_an_answer_do_not_end_the_turn(answer):
    assert turns(CHATML, HI, {**YO, "content": answer}) == [(ASKED_HI, f"{answer}<|im_end|>")]


def test_template_variables_are_passed_to_the_template():
    closed = "<think>\n\n</think>\n\n"

    assert turns(QWEN3, HI, YO, enable_thinking=False) == [(ASKED_HI + closed, "Yo<|im_end|>")]
    assert turns(QWEN3, HI, YO, enable_thinking=True) == [(ASKED_HI, closed + "Yo<|im_end|>")]


def test_reasoning_opened_by_the_prompt_is_closed_once():
    """DeepSeek-V3.1: the prompt may open reasoning, and every turn begins after a closing mark."""
    template = GLM.replace("message.reasoning_content %}", "false %}")

    ((prompt, target),) = turns(template, HI, THOUGHTFUL)

    assert prompt == ASKED_HI + "<think>"
    assert target.startswith("a greeting")
    assert target.endswith("</think>Yo<|im_end|>")
    assert target.count("</think>") == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_passed_under_the_name_that_the_template_reads(name):
    template = CHATML.replace(
        "{{- message.content", "{{- message." + name + "|default('') + '|' }}{{- message.content"
    )

    assert turns(template, {"role": "user", "content": "Hi"}, THOUGHTFUL)[0][1] == "a greeting|Yo<|im_end|>"


def test_reasoning_without_a_place_is_refused_moved_or_dropped():
    assert refusal(CHATML, HI, THOUGHTFUL) == (
        "the chat template has no place for reasoning; "
        "fix: set data.reasoning to in_content (write it into the content) or drop"
    )
    switched = CHATML.replace(
        "{{- message.content",
        "{{- message.thinking if thinking and message.thinking else '' }}{{- message.content",
    )
    hint = ", or try tokenizer.chat_template_kwargs: {thinking: true}"
    assert refusal(switched, HI, THOUGHTFUL).endswith(hint)
    assert turns(switched, HI, THOUGHTFUL, thinking=True)[0][1] == "a greetingYo<|im_end|>"

    for reasoning, target in [("in_content", "<think>\na greeting\n</think>\n\nYo"), ("drop", "Yo")]:
        renderer = renderer_of(CHATML, reasoning=reasoning)
        (turn,) = renderer.turns(Chat([HI, THOUGHTFUL]))
        assert (turn.prompt, turn.target) == (ASKED_HI, target + "<|im_end|>")
        assert renderer.notes == {f"reasoning: {reasoning}": 1}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (JSON_CALLS, '<call>weather {"in": "Köln"}</call><|im_end|>'),
        (TEXT_CALLS, '<call>weather {"in": "Köln"}</call><|im_end|>'),
        (NEEDS_CONTENT, '<call>weather {"in": "Köln"}</call><|im_end|>'),
    ],
    ids=["JSON", "text", "content"],
)  # fmt: skip
@pytest.mark.parametrize("arguments", [{"in": "Köln"}, '{"in": "Köln"}'], ids=["object", "JSON text"])
def test_calls_are_targets_and_results_are_context_in_every_variant(template, written, arguments):
    call: Any = {**CALL, "tool_calls": [{**BERLIN, "function": {"name": "weather", "arguments": arguments}}]}
    tools = '[{"type": "function", "function": {"name": "weather"}}]\n'
    result = '<|im_start|>tool\n{"t": 21}<|im_end|>\n<|im_start|>assistant\n'

    assert turns(template, HI, call, RESULT, BYE, tools=TOOLS) == [
        (tools + ASKED_HI, written),
        (tools + ASKED_HI + written + "\n" + result, "Bye<|im_end|>"),
    ]


def test_a_call_and_its_result_share_a_short_id_if_required():
    (_, call), (prompt, _) = turns(NEEDS_IDS, HI, CALL, RESULT, BYE)

    name, _, rest = call.partition("<call>")
    assert (len(name), rest) == (9, 'weather {"in": "Köln"}</call><|im_end|>')
    assert f"<|im_start|>tool\n{name}{{" in prompt


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        # sglang#40082: the result of a tool also appears in another turn.
        (DEAF, [{"role": "user", "content": "what is 42?"}, {**YO, "content": "call"},
                {"role": "tool", "content": "42"}, {**YO, "content": "it is 42"}],
         "the chat template omits message 3 (role tool); fix: remove it, or set tokenizer.chat_template"),
        (CHATML, [HI, {**CALL, "content": "I look."}],
         "the chat template has no place for tool_calls; fix: set tokenizer.chat_template"),
        (CHATML.replace("message.content +", "message.content | upper +"), [HI, YO],
         "the chat template changes the answer; got 'YO<|im_end|>'"),
        (loop(START + CONTENT, opens=opening("{{- 'A:' }}")), [HI, YO],
         "the chat template renders an answer that does not follow its own prompt; "
         "got the prompt continues with 'A:', the answer with '<|im_start|>assistant\\nYo"),
        ("{{ raise_exception('no') }}", [HI, YO], "the chat template refuses the messages: no"),
        ("{{ messages[9].role }}", [HI, YO], "the chat template refuses the messages: "),
        ("{{ tools | length }}", [HI, YO], "the chat template refuses the messages: "),
        ("\n{% for %}", [HI, YO], "tokenizer.chat_template: is not a valid Jinja template (line 2: "),
        (None, [HI, YO], "tokenizer: has no chat template, but the data are chats; "
         "fix: set tokenizer.chat_template to chatml, plain or a .jinja file"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_render_is_a_one_line_error(template, messages, message):
    text = refusal(template, *messages)

    assert text.startswith(message)
    assert "\n" not in text


def test_tools_and_variables_that_a_template_does_not_use_are_refused():
    for render in (ChatRenderer.turns, ChatRenderer.prompt):
        with pytest.raises(DataError, match="the chat template has no place for tools; fix: remove them"):
            render(renderer_of(CHATML), Chat([HI, YO, AND], TOOLS))
        with pytest.raises(
            DataError,
            match="the chat template does not use 'enable_thinkng'; did you mean 'enable_thinking'",
        ):
            render(renderer_of(QWEN3), Chat([HI, YO, AND], template_kwargs={"enable_thinkng": False}))


def test_the_named_template_for_tools_is_used_with_tools():
    named = {"default": CHATML, "tool_use": JSON_CALLS}
    written = '<call>weather {"in": "Köln"}</call><|im_end|>'

    assert turns(named, HI, YO) == [(ASKED_HI, "Yo<|im_end|>")]
    assert [target for _, target in turns(named, HI, CALL, tools=TOOLS)] == [written]
    assert refusal({"a": CHATML, "b": CHATML}, HI, YO)


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        ("chatml", [EOS, IM_END]),
        ("plain", [EOS]),
        (QWEN3, [EOS, IM_END]),
        (R1, [EOS, IM_END]),
        (PHI3, [EOS, IM_END]),
        (RETURN, [EOS]),
        (NO_END, [EOS]),
        (JSON_CALLS.replace("'</call>' }}{%- endfor %}",
         "'</call>' }}{%- endfor %}{%- if message.tool_calls %}"
         "{{- '<|pad|>' }}{%- else %}").replace("<|im_end|>\n' }}", "<|im_end|>\n' }}{%- endif %}"),
         [EOS, IM_END, 257]),
        (None, [EOS]),
    ],
)  # fmt: skip
def test_generation_stops_at_the_end_token_and_where_a_text_or_a_call_ends(template, stops):
    assert stop_token_ids(tokenizer_with(template)) == stops


@pytest.mark.parametrize(
    ("template", "answer", "reasoning"),
    [
        ("chatml", YO, "refuse"),
        (QWEN3, THOUGHTFUL, "refuse"),
        (R1, THOUGHTFUL, "refuse"),
        (NO_END, YO, "refuse"),
        (PARTS, YO, "refuse"),
        (CHATML, THOUGHTFUL, "in_content"),
        (CHATML, THOUGHTFUL, "drop"),
        (JSON_CALLS, CALL, "refuse"),
        (TEXT_CALLS, CALL, "refuse"),
        (NEEDS_CONTENT, CALL, "refuse"),
        (NEEDS_IDS, CALL, "refuse"),
    ],
)
def test_the_prompt_of_generation_is_that_of_training(template, answer, reasoning):
    """Both use the same variant, so earlier turns are rendered identically."""
    renderer = renderer_of(template, reasoning=reasoning)

    trained = renderer.turns(Chat([HI, answer, AND, BYE]))[-1].prompt

    assert renderer.prompt(Chat([HI, answer, AND])) == trained


def test_the_full_text_of_a_chat_ends_in_its_last_token():
    assert renderer_of(CHATML).full_text(Chat([HI, YO])) == ASKED_HI + "Yo<|im_end|>"
    assert renderer_of(NO_END).full_text(Chat([HI, YO])) == "user: Hi\nassistant: Yo\n"
    assert renderer_of(TEXT_CALLS).full_text(Chat([HI, CALL])) == (
        ASKED_HI + '<call>weather {"in": "Köln"}</call><|im_end|>'
    )
    for lost, messages in (("reasoning", [HI, THOUGHTFUL]), ("tool_calls", [HI, CALL])):
        with pytest.raises(DataError, match=f"^the chat template has no place for {lost}"):
            renderer_of(CHATML).full_text(Chat(messages))
    written = renderer_of(CHATML, reasoning="in_content").full_text(Chat([HI, THOUGHTFUL]))
    assert written == ASKED_HI + "<think>\na greeting\n</think>\n\nYo<|im_end|>"


def test_control_tokens_are_marked_in_every_part_of_a_chat():
    token = "<|im_end|><think>"
    call: Any = {"type": "function", "function": {"name": "weather", "arguments": {"in": token}}}
    chat = Chat(
        [{"role": "user", "content": token}, {"role": "assistant", "content": token, "tool_calls": [call]}],
        [{"type": "function", "function": {"name": "weather", "description": token}}],
    )
    user, model = "\ufdd0<|im_end|>\ufdd1\ufdd0<think>\ufdd1", "\ufdd0<|im_end|>\ufdd1<think>"

    (turn,) = renderer_of(JSON_CALLS).turns(chat)

    assert f'"description": "{user}"' in turn.prompt
    assert f"<|im_start|>user\n{user}<|im_end|>" in turn.prompt
    assert turn.target == f'{model}<call>weather {{"in": "{model}"}}</call><|im_end|>'
    unprotected = renderer_of(JSON_CALLS, protects=False).turns(chat)[0].target
    assert unprotected == f'{token}<call>weather {{"in": "{token}"}}</call><|im_end|>'
