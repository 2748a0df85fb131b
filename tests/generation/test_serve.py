"""hf-clm serve in a separate process: OpenAI's client, limits, many clients, clients that disconnect."""

import asyncio
import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import openai
import pytest
import torch
from by_heart import learn_by_heart
from helpers import byte_tokenizer, save_folder, tiny_model
from served import Server, served

from hf_clm.cli import main
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.service import load_page
from hf_clm.generation.worker import Ticket, Worker
from hf_clm.text.tokenizer import use_chat_template

KEY = "s3cret"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
SQUARES = {f"{n} squared": f"{n} times {n} is {n * n}" for n in range(50)}


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Alternating turns of user and assistant."""
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


CHATS = [
    chat("hi", "hello", "again", "hello twice"),
    chat("hi", "HELLO", system="loud"),
    chat("tea?", "茶 🐉 é!"),
    chat("count", "one two three four"),
    chat("<|im_end|>", "just text"),
]


def endless_model() -> Any:
    """A model that generates z forever."""
    model = tiny_model("gpt2", n_layer=1, n_positions=100_000, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[ord("z")] = 9.0
    return model


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Iterator[Server]:
    """A server whose model has memorized CHATS."""
    records = [{"messages": messages} for messages in CHATS]
    folder = tmp_path_factory.mktemp("chatty")
    with served(learn_by_heart(folder, records, format="messages", steps=120), "--name", "chatty") as server:
        yield server


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Iterator[Server]:
    """A server whose model has memorized 50 instructions."""
    records = [{"instruct": question, "label": answer} for question, answer in SQUARES.items()]
    folder = tmp_path_factory.mktemp("squares")
    run = learn_by_heart(folder, records, format="instruct", steps=200, learning_rate=5e-3, hidden_size=96)
    with served(run, "--name", "squares") as server:
        yield server


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Iterator[Server]:
    """A server that never ends an answer, generates one at a time, queues one, and requires a key."""
    folder = save_folder(tmp_path_factory.mktemp("endless"), endless_model(), byte_tokenizer())
    options = ["--name", "endless", "--max_new_tokens", "90000", "--max_prompt_tokens", "50"]
    options += ["--batch_size", "1", "--max_waiting", "1", "--max_body_bytes", "2000"]
    with served(folder, *options, HF_CLM_API_KEY=KEY) as server:
        yield server


def client(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(server: Server, text: str, **options: Any) -> Any:
    messages = chat(text) if isinstance(text, str) else text
    return client(server).chat.completions.create(model="chatty", messages=messages, **options)


def request(
    server: Server, path: str, body: Any = None, *, method: str = "", **headers: str
) -> tuple[int, str]:
    """Returns status and text of a plain request; underscores in header names become dashes."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, content, named)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def error_of(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
    """Returns status, code and message of an error response."""
    status, text = request(server, path, body, **headers)
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"], error["message"]


def metrics(server: Server, **headers: str) -> dict[str, float]:
    lines = request(server, "/metrics", **headers)[1].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end


# --- OpenAI's client


def test_a_chat_is_answered(chatty):
    reply = ask(chatty, "hi")

    assert reply.choices[0].message.content == "hello"
    assert (reply.choices[0].finish_reason, reply.model, reply.object) == (
        "stop",
        "chatty",
        "chat.completion",
    )
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (21, 5, 26)


def test_earlier_turns_and_the_system_message_matter(chatty):
    assert ask(chatty, chat("hi", "hello", "again")).choices[0].message.content == "hello twice"
    assert ask(chatty, chat("hi", system="loud")).choices[0].message.content == "HELLO"


def test_a_chat_is_streamed_in_whole_characters(chatty):
    chunks = list(ask(chatty, "tea?", stream=True, stream_options={"include_usage": True}))

    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert pieces == ["", "茶", " ", "🐉", " ", "é", "!", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_continues_the_text_verbatim(squares):
    reply = client(squares).completions.create(model="squares", prompt="7 squared7 times")

    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (" 7 is 49", "stop")


@pytest.mark.parametrize(
    ("options", "text", "finish"),
    [
        ({"max_tokens": 3}, "one", "length"),
        ({"max_completion_tokens": 5}, "one t", "length"),
        ({"stop": " three"}, "one two", "stop"),
        ({"stop": ["four", "two"]}, "one ", "stop"),
        ({"stop": None}, "one two three four", "stop"),
        ({"temperature": 0}, "one two three four", "stop"),
        ({"n": 1, "frequency_penalty": 0, "user": "x", "logprobs": False}, "one two three four", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_options_have_an_effect(chatty, options, text, finish, stream):
    reply = ask(chatty, "count", stream=stream, **options)

    if stream:
        chunks = list(reply)
        output, end = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0]
    else:
        output, end = reply.choices[0].message.content, reply.choices[0]
    assert (output, end.finish_reason) == (text, finish)
    assert end.stop_reason == {"one two": " three", "one ": "two"}.get(text)


def test_a_seed_repeats_an_answer_and_top_p_0_is_greedy(chatty):
    def drawn(**options: Any) -> str:
        settings = {"temperature": 2.0, "max_tokens": 12, **options}
        return ask(chatty, "unknown", **settings).choices[0].message.content

    assert drawn(seed=1) == drawn(seed=1)
    assert len({drawn(seed=seed) for seed in range(8)}) > 1
    assert len({drawn() for _ in range(8)}) > 1
    assert drawn(top_p=1e-9) == drawn(temperature=0)


def test_text_that_spells_a_control_token_stays_text(chatty):
    assert ask(chatty, "<|im_end|>").choices[0].message.content == "just text"


def test_the_model_is_listed(chatty):
    assert [model.id for model in client(chatty).models.list()] == ["chatty"]
    assert client(chatty).models.retrieve("chatty").owned_by == "hf_clm"
    assert client(chatty).models.retrieve("chatty").prompts == []  # of a folder without logs
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-4'; this server has 'chatty'"):
        client(chatty).chat.completions.create(model="gpt-4", messages=chat("hi"))


# --- settings without an effect, and several answers

NOTHING = {
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "n": 1,
    "best_of": 1,
    "stop": "",
    "seed": -1,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "stop_token_ids": [],
    "prompt_cache_key": "x",
    "safety_identifier": "x",
    "service_tier": "auto",
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "reasoning_effort": None,
    "web_search_options": None,
    "max_tokens": 10**9,
}


@pytest.mark.parametrize("change", [{}, {"top_k": 0, "logprobs": None, "stop": [""]}, {"top_p": 0}])
def test_neutral_parameters_are_accepted_and_have_no_effect(chatty, change):
    status, text = request(chatty, "/v1/chat/completions", {"messages": chat("count"), **NOTHING, **change})

    assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, "one two three four")


def test_several_prompts_are_answered_in_order(squares):
    texts = [f"{n} squared" for n in (7, 11, 30)]
    expected = [SQUARES[text] for text in texts]

    by_text = client(squares).completions.create(model="squares", prompt=texts)
    by_ids = client(squares).completions.create(
        model="squares", prompt=[list(text.encode()) for text in texts]
    )
    one = client(squares).completions.create(model="squares", prompt=list(b"7 squared"))
    streamed = list(client(squares).completions.create(model="squares", prompt=texts, stream=True))

    for reply in (by_text, by_ids):
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert reply.usage.prompt_tokens == sum(len(text) for text in texts)
        assert reply.usage.completion_tokens == sum(len(text) for text in expected)
    assert one.choices[0].text == expected[0]
    for index, text in enumerate(expected):
        pieces = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]


# --- log-probabilities


def expected_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Returns the log-probabilities of the token after each position, (T - 1, V)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [True, False])
def test_the_logprobs_of_an_echoed_prompt_are_those_of_the_model(small, max_tokens, as_ids):
    text = "a 茶."
    ids = list(text.encode())
    body = {"prompt": ids if as_ids else text, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
    choice = json.loads(request(small, "/v1/completions", body)[1])["choices"][0]
    result = choice["logprobs"]
    model = tiny_model(max_position_embeddings=64)
    with torch.no_grad():
        prompt = torch.tensor([ids])
        plain = {"do_sample": False, "max_new_tokens": max(1, max_tokens), "pad_token_id": 257}
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), **plain)[0].tolist()
    whole = whole[: len(ids) + max_tokens]
    expected = expected_logprobs(model, whole)

    assert choice["text"].startswith(text)
    assert {len(values) for values in result.values()} == {len(whole)}
    assert (result["token_logprobs"][0], result["top_logprobs"][0]) == (None, None)
    own = expected.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    assert result["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-4)
    for place, likeliest in enumerate(result["top_logprobs"][1:]):
        assert max(likeliest.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
        assert result["token_logprobs"][place + 1] in likeliest.values()
    assert result["tokens"][:2] == ["a", " "]
    assert result["text_offset"][: len(ids)] == [0, 1, 2, 2, 2, 3]


def test_the_logprobs_of_an_answer_are_those_of_the_model(chatty):
    reply = ask(chatty, "hi", logprobs=True, top_logprobs=3)
    chunks = list(ask(chatty, "hi", logprobs=True, top_logprobs=3, stream=True))

    content = reply.choices[0].logprobs.content
    parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [one.token for one in content] == [*"hello", "<|im_end|>"]
    assert [one.bytes for one in content[:2]] == [[104], [101]]
    assert all(one.top_logprobs[0].token == one.token and len(one.top_logprobs) == 3 for one in content)
    assert all(-0.7 < one.logprob <= 0 for one in content)  # memorized
    assert [one.token for part in parts for one in part] == [*"hello", "<|im_end|>"]


@pytest.mark.parametrize("prompt", ["a 茶.", ["a", [98, 99]]])
def test_a_stream_has_the_same_logprobs_as_a_complete_reply(small, prompt):
    body = {"prompt": prompt, "max_tokens": 3, "logprobs": 1, "echo": True}

    whole = json.loads(request(small, "/v1/completions", body)[1])["choices"]
    events = request(small, "/v1/completions", {**body, "stream": True})[1].split("\n\n")[:-2]

    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [value for chunk in own for value in chunk["logprobs"][key]] == values


@pytest.mark.parametrize("prompt", ["", [""], [[]]])
def test_an_empty_prompt_is_the_start_of_a_text(small, prompt):
    reply = json.loads(request(small, "/v1/completions", {"prompt": prompt, "max_tokens": 2})[1])

    assert reply["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


# --- invalid requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n: 2 is not supported; remove the key or set it to 1"),
        ({"n": True}, "n: true is not supported; remove the key or set it to 1"),
        ({"min_tokens": 3}, "min_tokens: 3 is not supported; remove the key or set it to 0"),
        ({"top_logprobs": 3}, "top_logprobs requires logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected less than or equal to 20; got 21"),
        ({"response_format": {"type": "json_object"}}, 'response_format: {"type": "json_object"} is not'),
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature: expected greater than or equal to 0; got -1"),
        ({"top_p": -0.1}, "top_p: expected greater than or equal to 0; got -0.1"),
        ({"top_k": -2}, "top_k: expected greater than or equal to -1; got -2"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected greater than or equal to 0.01; got 0"),
        ({"max_tokens": 0}, "max_tokens: expected greater than or equal to 1; got 0"),
        ({"seed": 2**63}, "seed: expected less than 9223372036854775808"),
        ({"stop": ["x"] * 17}, "stop: Value should have at most 16 items"),
        ({"stop": 3}, "stop: expected text, or a list of texts; got 3"),
        ({"stop": [3]}, "stop.0: expected a valid string; got 3"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, "messages: expected a valid array; got 'hi'"),
        (
            {"messages": [{"role": "usr", "content": "hi"}]},
            "message 1 has unknown role 'usr'; fix: use one of system, user",
        ),
        ({"messages": chat("hi", "hello")}, "the last message must not be from the assistant"),
        ({"messages": chat("\ufdd0")}, "the text contains a noncharacter"),
        ({"tools": [{"name": "look"}]}, "the chat template has no place for tools; fix: remove them"),
        ({"tools": [{"type": "function"}]}, "tool 1 has no name; got keys 'type'"),
        ({"tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: 'tokenize' is not a template variable",
        ),
    ],
)
def test_an_invalid_request_is_rejected_with_the_reason(chatty, body, message):
    status, _, output = error_of(chatty, "/v1/chat/completions", {"messages": chat("hi"), **body})

    assert status == 400
    assert output.startswith(message)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff\xfe"]
)
def test_malformed_requests_are_rejected(chatty, content):
    status, text = request(chatty, "/v1/chat/completions", content)

    assert status == 400
    assert json.loads(text)["error"]["type"] == "invalid_request_error"


def test_conversations_are_rejected_for_a_run_without_turns(squares):
    with pytest.raises(
        openai.BadRequestError, match=r"not trained on conversations \(its format is instruct\)"
    ):
        client(squares).chat.completions.create(model="squares", messages=chat("1 squared", "x", "2 squared"))


def test_tools_are_rejected_for_a_run_without_turns(squares):
    with pytest.raises(
        openai.BadRequestError, match=r"\(its format is instruct\): it does not support tools"
    ):
        tools: Any = [{"type": "function", "function": {"name": "look"}}]
        client(squares).chat.completions.create(model="squares", messages=chat("1 squared"), tools=tools)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: expected a text, a list of texts, token ids, or a list of lists of token ids"),
        ([1, "a"], "prompt: expected a text, a list of texts, token ids"),
        ([[1], [True]], "prompt: expected a text, a list of texts, token ids"),
        (7, "prompt: expected a text, a list of texts, token ids"),
        ([1, 260], "prompt: 260 is not a token id; expected 0 to 259"),
        ([[1], [-1]], "prompt: -1 is not a token id; expected 0 to 259"),
        (["a"] * 65, "a request may have at most 64 prompts; got 65"),
    ],
)
def test_invalid_prompts_are_rejected(squares, prompt, message):
    status, _, output = error_of(squares, "/v1/completions", {"prompt": prompt})

    assert (status, output[: len(message)]) == (400, message)


def test_unknown_urls_are_rejected_in_the_same_format(chatty):
    assert error_of(chatty, "/v1/embeddings", {})[:2] == (404, "no_such_url")
    assert error_of(chatty, "/v1/chat/completions")[:2] == (405, "no_such_url")


def test_a_prompt_over_the_limit_is_rejected_with_the_numbers(endless):
    with pytest.raises(openai.BadRequestError) as error:
        client(endless, KEY).completions.create(model="endless", prompt="a" * 51)

    assert error.value.code == "context_length_exceeded"
    assert "the prompt has 51 tokens, over the limit of 50" in str(error.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[Server]:
    """A server with 64 positions and a chat template."""
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    folder = tmp_path_factory.mktemp("small")
    with served(save_folder(folder, tiny_model(max_position_embeddings=64), tokenizer)) as server:
        yield server


def test_max_tokens_are_capped_by_the_positions_and_by_the_limit(small, endless):
    reply = json.loads(request(small, "/v1/completions", {"prompt": "a" * 60, "max_tokens": 5})[1])
    limited = json.loads(
        request(
            endless, "/v1/completions", {"prompt": "a", "max_tokens": 10**6, "stop": "z" * 200}, **WITH_KEY
        )[1]
    )

    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 4)
    assert limited["choices"][0]["finish_reason"] == "stop"


def test_a_prompt_that_leaves_no_positions_is_rejected(small):
    status, code, output = error_of(small, "/v1/completions", {"prompt": "a" * 64, "max_tokens": 5})

    assert (status, code) == (400, "context_length_exceeded")
    assert output == "the prompt has 64 tokens, over the limit of 63"


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 32),  # the system turn has 11, the last question with the opening of the answer 21
        ({"max_tokens": 4}, 60),  # and the turns before them 28
        ({"max_tokens": 5}, 32),
    ],
)
def test_a_chat_that_is_too_long_loses_its_oldest_turns_and_the_usage_shows_it(small, options, tokens):
    body = {"messages": chat("hi", "hello", "hi", system="X"), **options}

    reply = json.loads(request(small, "/v1/chat/completions", body)[1])

    assert reply["usage"]["prompt_tokens"] == tokens
    assert reply.get("dropped_messages") == (2 if tokens == 32 else None)


def test_a_stream_reports_dropped_messages_too(small):
    body = {"messages": chat("hi", "hello", "hi", system="X"), "stream": True, "max_tokens": 9000}

    events = request(small, "/v1/chat/completions", body)[1].split("\n\n")

    assert json.loads(events[0].removeprefix("data: "))["dropped_messages"] == 2


def test_a_last_message_that_is_too_long_is_rejected_with_advice(small):
    body = {"messages": chat("hi", "hello", "x" * 60)}

    status, code, output = error_of(small, "/v1/chat/completions", body)

    assert (status, code) == (400, "context_length_exceeded")
    assert output == (
        "the prompt has 79 tokens, over the limit of 63; older messages were already dropped: "
        "shorten the last message or the system message"
    )


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_answer_may_be_sent_back(small, empty):
    """10 tokens for the first question, 13 for its answer, and 21 for hi again with the next opening."""
    messages: list[Any] = [*chat("hi"), {"role": "assistant", "content": empty}, *chat("hi")]

    status, text = request(small, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})

    assert (status, json.loads(text)["usage"]["prompt_tokens"]) == (200, 44)


@pytest.mark.parametrize("given", ["", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/generate?prompt=a", "/v1/nope"])
def test_without_the_key_nothing_is_revealed(endless, given, path):
    headers = {"Authorization": given} if given else {}

    assert error_of(endless, path, **headers)[:2] == (401, "invalid_api_key")


def test_the_key_grants_access_and_the_page_needs_none(endless):
    assert [model.id for model in client(endless, KEY).models.list()] == ["endless"]
    assert [request(endless, path)[0] for path in ("/", "/health")] == [200, 200]
    with pytest.raises(openai.AuthenticationError):
        client(endless, "wrong").models.list()


def test_a_body_over_the_limit_is_rejected_with_and_without_a_content_length(endless):
    whole = error_of(endless, "/v1/completions", {"prompt": "a" * 2000}, **WITH_KEY)

    connection = http.client.HTTPConnection(urlsplit(endless.url).netloc, timeout=60)
    parts = (part for part in [b'{"prompt": "', *[b"a" * 100] * 30, b'"}'])
    connection.request("POST", "/v1/completions", parts, WITH_KEY)
    reply = connection.getresponse()

    assert whole == (413, "request_too_large", "a request may have at most 2,000 bytes")
    assert (reply.status, json.loads(reply.read())["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "evil.example:80", "Origin": "http://evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_are_rejected(chatty, headers, status):
    assert request(chatty, "/v1/models", **headers)[0] == status


# --- /generate


def test_generate_accepts_a_query_or_a_body(squares):
    expected = {
        "text": "7 times 7 is 49",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 9, "completion_tokens": 15, "total_tokens": 24},
    }
    place = f"/generate?prompt={quote('7 squared')}"

    assert json.loads(request(squares, place)[1]) == expected
    assert json.loads(request(squares, place, b"")[1]) == expected
    assert json.loads(request(squares, "/generate", {"prompt": "7 squared"})[1]) == expected
    assert json.loads(request(squares, f"{place}&max_tokens=3&temperature=0&stop=x")[1])["text"] == "7 t"
    assert json.loads(request(squares, f"{place}&stop=i&stop=m")[1])["text"] == "7 t"
    assert error_of(squares, "/generate")[2] == "prompt: is missing"
    assert error_of(squares, f"{place}&stream=true")[2].startswith("/generate does not support streaming")


# --- many clients


def test_50_clients_at_once_each_get_their_own_answer(squares):
    """Half of them stream, and some sample with a seed; no answer is lost or mixed up."""

    async def answer(api: openai.AsyncOpenAI, number: int) -> str:
        options: dict[str, Any] = {"model": "squares", "messages": chat(f"{number} squared")}
        if number % 5 == 0:
            options |= {"temperature": 0.01, "seed": number}
        if number % 2:
            return (await api.chat.completions.create(**options)).choices[0].message.content or ""
        chunks = await api.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{squares.url}/v1", api_key="x", max_retries=0) as api:
            return await asyncio.gather(*(answer(api, number) for number in range(50)))

    assert asyncio.run(answers()) == list(SQUARES.values())


def test_a_full_queue_is_reported_and_disconnected_clients_free_it(endless):
    """One is generated, one waits, the third is rejected; the first two free their places as they leave."""
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 90000}).encode()
    first, second = (http.client.HTTPConnection(urlsplit(endless.url).netloc, timeout=60) for _ in range(2))

    cancelled = metrics(endless, **WITH_KEY).get('hf_clm_answers_total{finish="cancelled"}', 0)

    first.request("POST", "/v1/completions", body, WITH_KEY)
    assert first.getresponse().read(6) == b"data: "
    second.request("POST", "/v1/completions", body.replace(b"true", b"false"), WITH_KEY)
    wait_until(lambda: metrics(endless, **WITH_KEY)["hf_clm_waiting"] == 1)
    third = error_of(endless, "/v1/completions", {"prompt": "a"}, **WITH_KEY)
    health = request(endless, "/health")
    second.close()
    wait_until(lambda: metrics(endless, **WITH_KEY)["hf_clm_waiting"] == 0)
    first.close()
    wait_until(lambda: metrics(endless, **WITH_KEY)["hf_clm_generating"] == 0)

    assert health == (200, '{"status":"ok"}')
    assert third == (429, "queue_full", "the queue is full (1 waiting); try again later")
    assert metrics(endless, **WITH_KEY)['hf_clm_answers_total{finish="cancelled"}'] == cancelled + 1
    assert json.loads(request(endless, "/generate?prompt=a&max_tokens=2", **WITH_KEY)[1])["text"] == "zz"


def test_a_client_that_disconnects_without_a_stream_ends_its_generation(endless):
    cancelled = metrics(endless, **WITH_KEY).get('hf_clm_answers_total{finish="cancelled"}', 0)
    connection = http.client.HTTPConnection(urlsplit(endless.url).netloc, timeout=60)

    connection.request(
        "POST",
        "/generate",
        b'{"prompt": "a", "max_tokens": 90000}',
        WITH_KEY,
    )
    wait_until(lambda: metrics(endless, **WITH_KEY)["hf_clm_generating"] == 1)
    connection.close()
    wait_until(lambda: metrics(endless, **WITH_KEY)["hf_clm_generating"] == 0)

    counted = 'hf_clm_answers_total{finish="cancelled"}'
    wait_until(lambda: metrics(endless, **WITH_KEY).get(counted) == cancelled + 1)


def test_metrics_count(squares):
    before = metrics(squares)
    request(squares, "/generate?prompt=7%20squared")
    request(squares, "/nowhere")
    wait_until(
        lambda: metrics(squares).get("hf_clm_batches_total", 0) > before.get("hf_clm_batches_total", 0)
    )
    after = metrics(squares)

    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['hf_clm_answers_total{finish="stop"}'] == 1
    assert (grown["hf_clm_prompt_tokens_total"], grown["hf_clm_generated_tokens_total"]) == (9, 15)
    assert grown['hf_clm_replies_total{status="404"}'] == 1
    assert (after["hf_clm_waiting"], after["hf_clm_generating"]) == (0, 0)


def test_metrics_measure_the_time_of_an_answer(squares):
    """In the text format of Prometheus, buckets are cumulative, so the last one is the count."""
    before = metrics(squares)
    client(squares).completions.create(model="squares", prompt=["7 squared", "8 squared"])
    wait_until(lambda: metrics(squares)["hf_clm_generating"] == 0)
    after, text = metrics(squares), request(squares, "/metrics")[1]

    for name in ("hf_clm_answer_seconds", "hf_clm_queue_seconds", "hf_clm_first_token_seconds"):
        buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
        assert after[f"{name}_count"] - before[f"{name}_count"] == 2
        assert buckets == sorted(buckets) and buckets[-1] == after[f"{name}_count"]
        assert f"# TYPE {name} histogram" in text
    assert after["hf_clm_answer_seconds_sum"] - before["hf_clm_answer_seconds_sum"] > 0
    assert after["hf_clm_answer_seconds_sum"] >= after["hf_clm_first_token_seconds_sum"]
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")] == families


# --- startup and shutdown


def test_pending_answers_are_finished_before_the_server_stops(tmp_path):
    with served(save_folder(tmp_path, endless_model(), byte_tokenizer())) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.request("POST", "/v1/completions", b'{"prompt": "a", "stream": true, "max_tokens": 600}')
        reply = connection.getresponse()
        begun = reply.read(6)
        code, printed = server.stop(signal.SIGTERM)
        text = (begun + reply.read()).decode()

    assert text.count('"text": "z"') == 600
    assert text.endswith("data: [DONE]\n\n")
    assert (code, printed) == (0, "stopped\n")


def test_answers_that_take_too_long_get_an_error_when_the_server_stops(tmp_path):
    folder = save_folder(tmp_path, endless_model(), byte_tokenizer())
    with served(folder, "--max_new_tokens", "90000", "--grace_seconds", "0.1") as server:
        connections = [http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60) for _ in range(2)]
        body = b'{"prompt": "a", "max_tokens": 90000, "stream": true}'
        connections[0].request("POST", "/v1/completions", body)
        streamed = connections[0].getresponse()
        streamed.read(6)
        connections[1].request("POST", "/v1/completions", body.replace(b"true", b"false"))
        wait_until(lambda: metrics(server)["hf_clm_waiting"] == 1)
        code, printed = server.stop()
        whole = connections[1].getresponse()
        replies = [streamed.read().decode().rpartition("data: ")[2], whole.read().decode()]

    assert [json.loads(reply)["error"]["code"] for reply in replies] == ["server_stopping"] * 2
    assert whole.status == 503
    assert (code, printed) == (0, "stopped\n")


def failure(words: list[str], capsys: Any) -> tuple[int, str]:
    return main(["serve", *words]), capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com", ""])
def test_other_machines_may_only_connect_with_a_key(host, capsys, monkeypatch):
    monkeypatch.delenv("HF_CLM_API_KEY", raising=False)

    code, output = failure(["run", "--host", host], capsys)

    assert code == 2
    assert output.startswith("error: --host: an API key is required because other machines can connect; ")


def test_an_address_in_use_is_an_error_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = failure(["run", "--port", str(taken.getsockname()[1])], capsys)

    assert code == 6
    assert "cannot listen: Address already in use" in output


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_names_the_extra(package, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)

    assert failure(["run"], capsys) == (
        6,
        f"error: serve needs the package {package}; fix: pip install 'hf_clm[serve]'\n",
    )


def test_the_page_may_only_run_its_own_script():
    page, headers = load_page()

    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "innerHTML" not in page and "://" not in page


# --- failures


def broken_worker(error: Exception) -> Worker:
    """A worker whose first generation fails."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    run = LoadedRun(model, tokenizer, format="text", stage="sft", max_length=64)
    worker = Worker(run, batch_size=1, max_waiting=9)
    original = model.generate

    def generate(**options: Any) -> Any:
        model.generate = original
        raise error

    model.generate = generate
    return worker


def asked(worker: Worker) -> Ticket:
    ticket = Ticket([97], Decoding(), max_new_tokens=3)
    worker.submit([ticket])
    return ticket


def test_a_failed_generation_fails_only_its_own_requests():
    async def both() -> tuple[str, int]:
        worker = broken_worker(RuntimeError("out of memory\nat 0x1"))
        running = asyncio.create_task(worker.run())
        first, second = asked(worker), asked(worker)
        with pytest.raises(ApiError) as error:
            [piece async for piece in first]
        [piece async for piece in second]
        worker.close()
        await running
        return str(error.value), len(second.ids)

    assert asyncio.run(both()) == ("generation failed: out of memory", 3)


def test_no_client_waits_forever_after_a_bug():
    async def both() -> list[int]:
        worker = broken_worker(KeyError("ours"))
        running = asyncio.create_task(worker.run())
        statuses = []
        for ticket in (asked(worker), asked(worker)):
            with pytest.raises(ApiError) as error:
                [piece async for piece in ticket]
            statuses.append(error.value.status)
        with pytest.raises(ApiError, match="the server is stopping"):
            worker.check_alive()
        with pytest.raises(KeyError):
            await running
        return statuses

    assert asyncio.run(both()) == [503, 503]


def test_requests_that_do_not_fit_together_are_generated_in_separate_batches():
    """With 64 positions, a prompt of 40 leaves room for 20 new tokens in its batch, but not for 30."""

    async def batches() -> list[int]:
        model = tiny_model(max_position_embeddings=64)
        worker = Worker(LoadedRun(model, byte_tokenizer(), "text", "sft", 64), batch_size=8, max_waiting=9)
        for prompt, new in ((40, 20), (4, 20), (4, 30), (4, 30)):
            worker.submit([Ticket([97] * prompt, Decoding(), max_new_tokens=new)])
        return [len(worker._next_batch()), len(worker._next_batch())]

    assert asyncio.run(batches()) == [2, 2]
