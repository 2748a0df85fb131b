"""report.html, compare.html and the page of traced answers in a headless Chromium."""

from pathlib import Path

import pytest
from report_runs import EVIL, to_metrics, write_run

from hf_clm.pages.compare import compare
from hf_clm.pages.report import write_report
from hf_clm.pages.traces import TracedAnswer, TracedRow, Traces, write_traces

# Pairs of labels of one axis, or of one caption, that lie on each other.
OVERLAPS = """() => [...document.querySelectorAll('svg.plot, figcaption')].flatMap(axis => {
  const labels = [...axis.querySelectorAll('text, b, span')];
  const boxes = labels.map(label => [label.textContent, label.getBoundingClientRect()]);
  const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1
    && p.top < q.bottom - 1 && q.top < p.bottom - 1;
  return boxes.flatMap(([name, box], i) =>
    boxes.slice(i + 1).filter(other => meet(box, other[1])).map(other => [name, other[0]]));
})"""
# Labels of a chart that reach over the edge of its card.
OUTSIDE = """() => [...document.querySelectorAll('figure')].flatMap(figure => {
  const card = figure.getBoundingClientRect();
  const isInside = box => box.left >= card.left && box.right <= card.right;
  return [...figure.querySelectorAll('svg.plot text, figcaption *')]
    .filter(label => !isInside(label.getBoundingClientRect())).map(label => label.textContent);
})"""
# Texts whose contrast with what lies behind them is under the 4.5 of WCAG 2 AA.
FAINT = """() => {
  const parse = color => color.match(/[0-9.]+/g).map(Number);
  const linear = part => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) =>
    .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const behind = node => {
    const color = parse(getComputedStyle(node).backgroundColor);
    return color.length < 4 || color[3] > 0 ? color : behind(node.parentElement);
  };
  const contrast = node => {
    const style = getComputedStyle(node), color = node instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [luminance(parse(color)), luminance(behind(node))].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const hasText = node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll('main *')]
    .filter(node => hasText(node) && node.getClientRects().length && contrast(node) < 4.5)
    .map(node => [node.textContent.slice(0, 40), contrast(node)]);
}"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Of a run with texts that try to be markup."""
    folder = write_run(tmp_path_factory.mktemp("report") / "poems", facts={"status": EVIL, "error": [EVIL]})
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Of seven runs, one of which took hours and millions of tokens."""
    folder = tmp_path_factory.mktemp("compare")
    long = [{**one, "seconds": one["seconds"] * 9000} for one in to_metrics(100)]
    long = [{**one, "tokens_seen": one.get("tokens_seen", 0) * 123_456} for one in long]
    write_run(folder / "a-run-with-a-rather-long-name", metrics=long)
    write_run(folder / EVIL.replace("/", "-"), metrics=to_metrics(20))
    for name in ("c", "d", "e", "f", "g"):  # one more than there are colours
        write_run(folder / name)
    compare([str(path) for path in sorted(folder.iterdir())], path=str(folder / "compare.html"))
    return folder / "compare.html"


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    """A row that was proved, one that was not, and a random one."""
    path = tmp_path_factory.mktemp("traces") / "traces.html"
    atoms = [(EVIL, "read"), (EVIL * 30, "trained")]
    rows = [TracedRow(EVIL, atoms, rank, 0.5, (8.0, None, -2.0)[rank - 1], rank == 3) for rank in (1, 2, 3)]
    write_traces(path, Traces(EVIL, {"proved": EVIL}, [TracedAnswer(EVIL, [(EVIL, -1.0)], rows)]))
    return path


def open_page(browser, path: Path, *, width: int = 1280, scheme: str = "light"):
    """The page from disk, with what it asked for and what went wrong."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(path.as_uri())
    return page, asked, errors


@pytest.mark.parametrize("name", ["report", "comparison", "traces"])
def test_nothing_is_asked_for_and_nothing_runs(browser, name, request):
    path = request.getfixturevalue(name)

    page, asked, errors = open_page(browser, path)

    assert (asked, errors) == ([path.as_uri()], [])
    assert page.locator("script, img, iframe, object").count() == 0
    assert page.title() != "injected"
    assert page.locator("text=<img src=x onerror").count() > 1
    page.close()


def test_a_script_that_came_in_all_the_same_would_not_run(browser, report, tmp_path):
    text = report.read_text(encoding="utf-8")
    path = tmp_path / "report.html"
    evil = "<script>document.title='injected'</script><p style='color: red' id='styled'>x</p>"
    path.write_text(text.replace("<main>", f"<main>{evil}"), encoding="utf-8")

    page, _, errors = open_page(browser, path)

    assert page.title() == "poems"
    assert page.evaluate("getComputedStyle(document.getElementById('styled')).color") == "rgb(27, 28, 31)"
    assert len(errors) == 2
    assert all("Content Security Policy" in error for error in errors)
    page.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_label_overlaps_leaves_its_card_or_is_hard_to_read(browser, name, scheme, width, request):
    page, _, errors = open_page(browser, request.getfixturevalue(name), width=width, scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()

    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("figure").count() >= 7
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(FAINT) == []
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_bars_of_an_answer_share_an_axis_that_fits_the_page(browser, traces, width):
    """The largest effect is 8, so the bar of -2 is a quarter as long, and both begin at zero."""
    page, _, errors = open_page(browser, traces, width=width)

    up, down = (page.locator(f".bar.{kind}").bounding_box() for kind in ("trained", "against"))

    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert down["width"] == pytest.approx(up["width"] / 4, abs=0.5)
    assert down["x"] + down["width"] == pytest.approx(up["x"], abs=0.5)
    page.close()


def test_light_and_dark_follow_the_system(browser, report):
    colors = {}
    for scheme in ("light", "dark"):
        page, _, _ = open_page(browser, report, scheme=scheme)
        colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()

    assert colors == {"light": "rgb(246, 246, 244)", "dark": "rgb(20, 22, 25)"}


@pytest.mark.parametrize("width", [390, 1280])
def test_a_chart_is_as_wide_as_its_card_and_its_ticks_can_be_read(browser, report, width):
    page, _, _ = open_page(browser, report, width=width)

    box = page.locator("svg.plot").first.bounding_box()
    letters = page.locator("svg.plot text").first.bounding_box()

    assert box["width"] > 300
    assert letters["height"] > 10
    page.close()


def test_the_recipe_opens_at_a_click(browser, report):
    page, _, _ = open_page(browser, report)
    cell = page.locator("td", has_text="data.max_length")
    assert cell.is_hidden()

    page.click("summary:text-is('Recipe')")

    assert cell.is_visible()
    page.close()
