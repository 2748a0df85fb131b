"""The page of losses in a headless Chromium."""

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main

INJECTED = "</script><img src=x onerror=\"document.title='injected'\">"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    model = save_folder(folder / "model", tiny_model("gpt2", n_positions=256), byte_tokenizer())
    rows = [{"prompt": f"{INJECTED} {n}", "completion": "long" * n + INJECTED} for n in range(1, 6)]
    words = [write_jsonl(folder / "rows.jsonl", rows), write_jsonl(folder / "others.jsonl", rows[:2])]
    page = folder / "losses.html"
    options = ["--html", str(page), "--before", model, "--max_new_tokens", "8", "--device", "cpu"]
    assert main(["evaluate", model, *words, *options]) == 0
    return page


@pytest.fixture(params=[(390, "dark"), (1280, "light")], ids=["phone", "desk"])
def page(request, path, browser):
    """The page, opened from disk; its test fails if it reports an error or asks for anything else."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert (asked, errors) == ([path.as_uri()], [])


def test_the_page_fits_its_window_and_runs_nothing(page):
    assert page.title() == "Losses"
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_before_and_after_are_beside_each_other_and_below_on_a_phone(page):
    before, after = (one.bounding_box() for one in page.locator(".readings >> nth=0").locator("> div").all())

    is_phone = page.viewport_size["width"] == 390
    assert (before["x"] == after["x"], before["y"] == after["y"]) == (is_phone, not is_phone)


def test_a_tap_shows_what_was_expected(page):
    token = page.locator(".tokens .t").first
    shown = "element => getComputedStyle(element, '::after').content"

    assert token.evaluate(shown) == "none"
    token.click()

    assert "loss" in token.evaluate(shown)
    assert "rank" in token.get_attribute("title")


def test_a_larger_loss_is_hotter(page):
    colour = "element => getComputedStyle(element).backgroundColor"
    swatches = page.locator(".legend .t")

    assert len({swatch.evaluate(colour) for swatch in swatches.all()}) == 10
