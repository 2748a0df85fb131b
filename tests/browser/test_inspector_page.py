"""labels.html in a headless Chromium."""

from pathlib import Path

import numpy as np
import pytest
from helpers import EOS, PAD, X, byte_tokenizer

from hf_clm.pages.labels import Lengths, write_labels
from hf_clm.pages.rows import Document, Row, Vocabulary

INJECTED = "<script>document.title = 'injected'</script><img src=x onerror=\"document.title='injected'\">"

pytestmark = pytest.mark.browser


def to_row(number: int, text: str, *, read: int, place: str = "a.jsonl:1", padding: int = 0, **known) -> Row:
    """A document of one token a byte, trained after its first ``read``, with an end token and padding."""
    ids = [*text.encode(), EOS, *[PAD] * padding]
    labels = [X] * read + ids[read : len(ids) - padding] + [X] * padding
    stop = len(ids) - padding
    return Row(number, np.array(ids), np.array(labels), (Document(0, stop, place=place, **known),))


def to_packed() -> Row:
    """Documents ``ab`` and ``cd`` in one row."""
    first, second = Document(0, 2, place="a.jsonl:8"), Document(2, 4, place="b.jsonl:9")
    return Row(3, np.array([*b"abcd"]), np.array([X, 98, X, 100]), (first, second))


def to_rows() -> list[Row]:
    chat = {"roles": ((0, "user"), (3, "assistant"))}
    return [
        to_row(0, INJECTED, read=3),
        to_row(1, "茶🐉x", read=4, place="b.jsonl:2", padding=2, **chat),
        to_row(2, "a\x1b\u202e\nend", read=1, flags={"duplicate": "of a.jsonl:1"}),
        to_packed(),
        to_row(4, "Q", read=1, flags={"lost stop token": "<b>", "cut prompt": "x"}),
        *(to_row(number, f"row {number}", read=1) for number in range(5, 120)),
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "labels.html"
    lengths = Lengths(np.array([5, 9, 60]), 32)
    facts = {"from": INJECTED, "step": 17}
    write_labels(path, to_rows(), vocabulary=Vocabulary(byte_tokenizer()), facts=facts, lengths=lengths)
    return path


@pytest.fixture
def page(browser, path):
    """The page, opened from disk; its test fails if it reports an error or asks for anything else."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    assert (asked, errors) == ([path.as_uri()], [])
    page.close()


def titles(page) -> list[str]:
    """The rows on the page: "Row 4", ..."""
    return [
        text.partition(" tokens")[0].rpartition(" ")[0] for text in page.locator("h3").all_text_contents()
    ]


def test_the_worst_rows_come_first_and_50_make_a_page(page):
    assert titles(page)[:4] == ["Row 4", "Row 2", "Row 0", "Row 1"]
    assert len(titles(page)) == 50
    assert page.inner_text("#count") == "120 of 120 rows, page 1 of 3"

    page.click("#next")
    page.click("#next")

    assert titles(page)[-1] == "Row 119"
    assert len(titles(page)) == 20
    assert page.is_disabled("#next")


def test_content_is_text_and_runs_nothing(page):
    assert page.title() == "Labels"
    assert page.locator("#facts dd").first.inner_text() == INJECTED
    page.select_option("#sort", "order")
    assert page.locator(".tokens").first.text_content() == INJECTED + "<|endoftext|>"
    assert page.locator("img").count() == 0


def test_search_finds_text_across_tokens_and_marks_it(page):
    page.fill("#text", "ROW 77")
    page.locator(".row").nth(1).wait_for(state="detached")

    assert titles(page) == ["Row 77"]
    assert page.locator(".hit").all_text_contents() == ["r", "o", "w", " ", "7", "7"]


def test_rows_are_filtered_by_file_role_and_flag(page):
    page.select_option("#file", label="b.jsonl")
    assert titles(page) == ["Row 1", "Row 3"]
    assert page.locator(".doc.other").count() == 1

    page.select_option("#role", label="assistant")
    assert titles(page) == ["Row 1"]

    page.select_option("#file", label="All files")
    page.select_option("#role", label="All roles")
    page.check("text=duplicate (1)")
    assert titles(page) == ["Row 2"]
    assert page.locator("#flags label").all_text_contents() == [
        "lost stop token (1)",
        "cut prompt (1)",
        "duplicate (1)",
    ]


def test_flags_stand_beside_their_document_with_their_details(page):
    assert page.locator(".flag").all_text_contents() == [
        "lost stop token: <b>",
        "cut prompt: x",
        "duplicate: of a.jsonl:1",
    ]


def test_characters_of_several_tokens_are_whole_and_controls_are_spelled(page):
    page.select_option("#file", label="b.jsonl")
    spans = page.locator(".row").first.locator(".t")
    assert spans.all_text_contents() == ["茶", "🐉", "x", "<|endoftext|>"]
    assert [span.get_attribute("class") for span in spans.all()] == [
        "t read",
        "t mixed",
        "t trained",
        "t trained control",
    ]
    assert page.locator(".row").first.locator("b").all_text_contents() == ["user", "assistant"]
    assert page.locator(".padding").last.text_content() == "<|pad|>"

    page.select_option("#file", label="All files")
    page.check("text=duplicate (1)")
    assert page.locator(".tokens").first.text_content() == "a\\x1b\\u{202e}↵\nend<|endoftext|>"


def test_pointing_at_a_token_tells_id_position_label_and_attention(page):
    page.fill("#text", "cd")
    page.locator(".row").nth(1).wait_for(state="detached")

    page.hover("#rows .t:text-is('d')")

    assert page.inner_text("#tip").splitlines() == [
        "id 100, position 1 (3 in the row)",
        "label 100 (trained)",
        "attends to tokens 2 to 3 of the row",
    ]


def test_a_character_of_several_tokens_tells_about_each(page):
    page.hover("#rows .t:text-is('🐉')")

    lines = page.inner_text("#tip").splitlines()
    assert lines[:4] == [
        "id 240, position 3",
        "label -100 (read only)",
        "id 159, position 4",
        "label 159 (trained)",
    ]
    assert lines[-1] == "attends to tokens 0 to 6 of the row"


def test_tokens_are_reached_and_left_by_keyboard(page):
    page.select_option("#file", label="b.jsonl")
    page.focus("#flags input >> nth=-1")
    page.keyboard.press("Tab")
    assert page.inner_text("#tip").startswith("id 232, position 0")

    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").startswith("id 256, position 8")

    page.keyboard.press("Home")
    assert page.inner_text("#tip").startswith("id 232, position 0")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_the_histogram_tells_the_share_over_max_length(page):
    assert page.inner_text("#lengths b") == "Tokens in an example: 33.3% are over max_length 32"
    assert page.locator("#lengths svg").bounding_box()["width"] > 300


def test_light_and_dark_follow_the_system_and_can_be_switched(browser, path):
    page = browser.new_page(color_scheme="dark")
    page.goto(path.as_uri())

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert (background(), page.inner_text("#theme")) == ("rgb(20, 22, 25)", "Light")
    page.click("#theme")
    assert (background(), page.inner_text("#theme")) == ("rgb(246, 246, 244)", "Dark")
    page.close()


def test_a_phone_needs_no_sideways_scrolling(browser, path):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")

    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_10000_rows_open_in_under_3_seconds(browser, tmp_path):
    text = "An instruction of some length, and 茶 " * 6
    rows = [
        to_row(number, f"{number} {text}", read=40, place=f"a.jsonl:{number}") for number in range(10_000)
    ]
    path = tmp_path / "labels.html"
    write_labels(path, rows, vocabulary=Vocabulary(byte_tokenizer()), facts={})
    page = browser.new_page()

    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")

    assert page.inner_text("#count") == "10,000 of 10,000 rows, page 1 of 200"
    assert page.evaluate("Number(document.documentElement.dataset.ready)") < 3000
    page.close()
