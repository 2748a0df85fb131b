"""The page of hf-clm serve in a headless Chromium."""

import re
from collections.abc import Callable, Iterator

import pytest
from by_heart import learn_by_heart
from helpers import byte_tokenizer, save_folder, tiny_model
from served import Server, served

INJECTED = "<img src=x onerror=alert(1)>"
IDLE = "#log[aria-busy=false]"

pytestmark = pytest.mark.browser


def turns(*contents: str, system: str = "") -> dict:
    first = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    return {
        "messages": first
        + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    }


RECORDS = [
    turns("hi", "hello\nyou", "again", "hello twice 茶🐉"),
    turns("again", "what?"),
    turns("hi", "HELLO", system="loud"),
    turns(INJECTED, INJECTED),
]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chatty")
    run = learn_by_heart(folder, RECORDS, format="messages", steps=150)
    (folder / "samples.jsonl").write_text('{"step": 0, "prompt": "again", "text": ""}')
    with served(run, "--name", INJECTED) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[Server]:
    """Learned no conversations, answers at length, and asks for a key."""
    folder = save_folder(
        tmp_path_factory.mktemp("locked"), tiny_model(max_position_embeddings=100_000), byte_tokenizer()
    )
    with served(folder, "--max_new_tokens", "90000", HF_CLM_API_KEY="s3cret") as server:
        yield server


@pytest.fixture
def show(browser) -> Iterator[Callable]:
    """Opens a page; its test fails if the page reports an error or asks another server."""
    opened, errors = [], []

    def opens(server: Server, **options):
        page = browser.new_page(**options)
        opened.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on(
            "console",
            lambda message: errors.append(message.text) if "Content Security" in message.text else None,
        )
        page.on("request", lambda one: None if one.url.startswith(server.url) else errors.append(one.url))
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        return page

    yield opens
    for page in opened:
        page.close()
    assert errors == []


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def said(page) -> list[str]:
    page.wait_for_selector(IDLE)
    return page.locator(".turn").all_text_contents()


def test_a_conversation_goes_on_until_it_is_reset(show, chatty):
    page = show(chatty)

    say(page, "hi")
    assert said(page) == ["hi", "hello\nyou"]
    say(page, "again")
    assert said(page) == ["hi", "hello\nyou", "again", "hello twice 茶🐉"]
    page.click("#reset")
    say(page, "again")
    assert said(page) == ["again", "what?"]


def test_no_text_of_user_model_or_server_becomes_html(show, chatty):
    page = show(chatty)

    say(page, INJECTED)

    assert said(page) == [INJECTED, INJECTED]
    assert page.locator("img").count() == 0
    assert page.inner_text("#name") == INJECTED


def test_the_settings_are_asked_for(show, chatty):
    page = show(chatty)

    page.click("summary")
    page.fill("#system", "loud")
    say(page, "hi")
    assert said(page) == ["hi", "HELLO"]
    page.fill("#max_tokens", "3")
    say(page, "hi")
    said(page)
    note = page.locator(".turn").last.get_attribute("data-note")
    speed, why = note.split("; ")
    assert re.fullmatch(r"3 tokens in [0-9.]+ s, [0-9]+ tokens per second", speed)
    assert why == "cut at max_tokens: raise it in the settings to read on"
    page.fill("#max_tokens", "")
    page.fill("#stop", "LL")
    say(page, "hi")
    assert said(page)[-1] == "HE"
    assert page.locator(".turn").last.get_attribute("data-note").endswith('; ended at the stop text "LL"')


def test_the_first_prompts_of_the_run_are_offered_until_a_conversation_begins(show, chatty):
    page = show(chatty)

    assert page.locator("#prompts button").all_text_contents() == ["again"]
    page.click("#prompts button")
    assert said(page) == ["again", "what?"]
    assert page.is_hidden("#prompts")
    note = page.locator(".turn").last.get_attribute("data-note")
    assert note.startswith("5 tokens in ") and note.endswith("; ended by itself, with its stop token")
    page.click("#reset")
    assert page.is_visible("#prompts button")


def test_an_error_is_shown_and_the_next_text_is_answered(show, chatty):
    page = show(chatty)

    page.click("summary")
    page.fill("#stop", "x" * 201)
    say(page, "hi")
    assert said(page) == ["hi", "stop.0: String should have at most 200 characters"]
    page.fill("#stop", "")
    say(page, "hi")
    assert said(page)[2:] == ["hi", "hello\nyou"]


def test_a_text_is_completed_as_it_is(show, chatty):
    page = show(chatty)

    page.click("#complete")
    page.click("summary")
    page.fill("#max_tokens", "2")
    say(page, "<|im_start|>")

    assert len(said(page)) == 2
    assert page.inner_text("#note") == "The text is continued as it is."


def test_a_locked_server_asks_for_its_key_and_an_answer_can_be_stopped(show, locked):
    page = show(locked)

    assert page.is_visible("#key")
    page.fill("#key", "wrong")
    say(page, "a")
    page.wait_for_selector(".bad")
    page.fill("#key", "s3cret")
    page.click("#reset")
    page.click("#send")
    page.wait_for_selector("#complete[aria-pressed=true]")
    page.click("summary")
    page.fill("#max_tokens", "90000")
    say(page, "a")
    page.wait_for_selector("#log[aria-busy=true]")
    page.click("#send")
    page.wait_for_selector(IDLE)
    page.fill("#max_tokens", "2")
    say(page, "a")

    assert said(page)[-2] == "a"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(show, chatty, scheme):
    page = show(chatty, viewport={"width": 360, "height": 640}, color_scheme=scheme)

    page.click("summary")
    say(page, "hi " + "long" * 60)
    said(page)

    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.documentElement.scrollHeight") == 640
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 244)"
    assert light == (scheme == "light")
