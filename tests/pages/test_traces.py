"""The page of traced answers, read as a browser's parser reads it, and the same traces in a terminal."""

import re
from html.parser import HTMLParser

import pytest

from hf_clm.pages.traces import TracedAnswer, TracedRow, Traces, to_lines, write_traces

INJECTED = "</script><img src=x onerror=\"document.title='injected'\"><b>"
ATOMS = [("<|im_start|>", "read control"), ("user\nHow ", "read"), ("many?", "read"), ("Seven.", "trained")]
FACTS = {"ranked": "48 rows at 4 checkpoints, 12.3 s", "proved": "4 replays of 2,400 steps, 9 min"}


class Page(HTMLParser):
    """The tags of a page, its headings, each token of an answer, and the parts of each traced row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.headings, self.tokens, self.rows, self.waiting = set(), [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.waiting = tag
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([tag, ""])
        if "tabindex" in attributes:
            self.tokens.append(["", attributes["title"], attributes["class"]])
            self.waiting = "token"
        if tag == "li":
            self.rows.append({"bars": [], "spans": [], "text": ""})
        if self.rows and tag == "svg":
            self.rows[-1]["axis"] = attributes["viewbox"]
        if self.rows and tag == "rect":
            self.rows[-1]["bars"].append([attributes[name] for name in ("class", "x", "width")])
        if self.rows and tag == "span":
            self.rows[-1]["spans"].append([attributes["class"], ""])

    def handle_endtag(self, tag):
        self.waiting = ""

    def handle_data(self, data):
        if re.fullmatch("h[1-6]", self.waiting):
            self.headings[-1][1] += data
        elif self.waiting == "token":
            self.tokens[-1][0] += data
        elif self.rows:
            self.rows[-1]["text"] += data
            if self.waiting == "span":
                self.rows[-1]["spans"][-1][1] += data


def to_row(
    number: int, effect: float | None, *, rank: int | None = None, is_random=False, **others
) -> TracedRow:
    known = {"place": f"a.jsonl:{number}", "atoms": ATOMS, "similarity": 1 / number, **others}
    return TracedRow(rank=rank or number, effect=effect, is_random=is_random, **known)


def to_traces(*rows: TracedRow, prompt: str = "How many?", tokens=(("Sev", -0.25), ("en.", -1.5))) -> Traces:
    return Traces("runs/poems", FACTS, [TracedAnswer(prompt, tokens, rows)])


def to_page(folder, traces: Traces) -> tuple[Page, str]:
    write_traces(folder / "traces.html", traces)
    text = (folder / "traces.html").read_text(encoding="utf-8")
    return Page(text), text


def columns(line: str) -> int:
    """The columns of a line whose wide letters are all Chinese."""
    return len(line) + len(re.findall("[\u3000-\u9fff\uff00-\uffef]", line))


def test_a_bar_is_as_long_as_its_effect_is_large_beside_the_largest(tmp_path):
    """The largest is 8, so 4 is half as long, and -2 a quarter, to the left of zero."""
    rows = [to_row(1, 8.0), to_row(2, 4.0), to_row(3, -2.0), to_row(9, 0.0, is_random=True)]

    page, _ = to_page(tmp_path, to_traces(*rows))

    assert [row["bars"][1] for row in page.rows] == [
        ["bar trained", "0.00", "100.00"],
        ["bar trained", "0.00", "50.00"],
        ["bar against", "-25.00", "25.00"],
        ["bar trained", "0.00", "0.00"],
    ]
    assert {row["axis"] for row in page.rows} == {"-25.00 0 125.00 2"}
    assert {tuple(row["bars"][0]) for row in page.rows} == {("bar read", "-25.00", "125.00")}


def test_a_negative_effect_can_be_the_largest(tmp_path):
    page, _ = to_page(tmp_path, to_traces(to_row(1, 1.0), to_row(2, -10.0)))

    assert page.rows[0]["bars"][1] == ["bar trained", "0.00", "10.00"]
    assert page.rows[1]["bars"][1] == ["bar against", "-100.00", "100.00"]
    assert page.rows[0]["axis"] == "-100.00 0 110.00 2"


def test_an_axis_without_any_effect_is_still_an_axis(tmp_path):
    page, _ = to_page(tmp_path, to_traces(to_row(1, 0.0), to_row(2, -0.0)))

    assert [row["axis"] for row in page.rows] == ["0.00 0 100.00 2"] * 2
    assert [row["bars"][1][2] for row in page.rows] == ["0.00", "0.00"]
    assert "+0.00 nats" in page.rows[1]["text"]


def test_each_answer_has_its_own_axis(tmp_path):
    answers = [TracedAnswer("a", [("b", -1.0)], [to_row(1, effect)]) for effect in (20.0, 0.5)]

    page, _ = to_page(tmp_path, Traces("runs/poems", {}, answers))

    assert [row["bars"][1][2] for row in page.rows] == ["100.00", "100.00"]
    assert [text for tag, text in page.headings if tag == "h2"] == ["Answer 1 of 2", "Answer 2 of 2"]


def test_the_figures_are_written_beside_the_bars(tmp_path):
    rows = [to_row(1, 1234.567), to_row(2, -0.5, similarity=-0.0625), to_row(3, -0.001)]

    page, _ = to_page(tmp_path, to_traces(*rows))

    texts = [" ".join(row["text"].split()) for row in page.rows]
    assert texts[0].startswith("a.jsonl:1 rank 1, similarity 1.000 +1,234.57 nats")
    assert texts[1].startswith("a.jsonl:2 rank 2, similarity -0.062 -0.50 nats")
    assert texts[2].startswith("a.jsonl:3 rank 3, similarity 0.333 +0.00 nats")


def test_a_row_that_is_only_ranked_has_no_bar(tmp_path):
    page, _ = to_page(tmp_path, to_traces(to_row(1, 8.0), to_row(2, None)))

    assert page.rows[1]["bars"] == []
    assert "ranked only, not proved" in page.rows[1]["text"]
    assert "nats" not in page.rows[1]["text"]
    assert "not proved" not in page.rows[0]["text"]


def test_rows_are_in_order_of_rank_and_random_ones_last_under_their_own_heading(tmp_path):
    rows = [to_row(31, 0.1, is_random=True), to_row(2, 3.0), to_row(7, 0.2, is_random=True), to_row(1, 2.0)]

    page, text = to_page(tmp_path, to_traces(*rows))

    places = [row["text"].split()[0] for row in page.rows]
    assert places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:31", "a.jsonl:7"]
    assert page.headings == [
        ["h1", "Which rows taught the answer"],
        ["h2", "The answer"],
        ["h3", "Rows, the most similar first"],
        ["h3", "Random rows, left out for comparison"],
    ]
    assert text.index("a.jsonl:2<") < text.index("Random rows") < text.index("a.jsonl:31<")


def test_a_heading_without_rows_is_left_out(tmp_path):
    page, _ = to_page(tmp_path, to_traces())

    assert [text for _, text in page.headings] == ["Which rows taught the answer", "The answer"]


def test_a_token_has_its_loss_and_probability_and_the_colour_of_the_loss(tmp_path):
    """exp(-0.25) = 77.9%; exp(-1.5) = 22.3%; a colour for each half nat, the last for 4.5 and more."""
    tokens = [("Sev", -0.25), ("en\n", -1.5), ("!", -70.0), ("", 0.0), ("?", float("nan"))]

    page, text = to_page(tmp_path, to_traces(tokens=tokens))

    assert page.tokens == [
        ["Sev", "'Sev': loss 0.250, probability 77.9%", "t heat h0"],
        ["en↵\n", "'en↵': loss 1.500, probability 22.3%", "t heat h3"],
        ["!", "'!': loss 70.000, probability 0.0%", "t heat h9"],
        ["", "'': loss 0.000, probability 100.0%", "t heat h0"],
        ["?", "'?': loss nan, probability nan%", "t heat h9"],
    ]
    _, text = to_page(tmp_path, to_traces())
    assert "answer, log-probability -1.75 nats" in text


def test_the_text_of_a_row_has_the_styles_of_what_is_read_and_learned(tmp_path):
    page, text = to_page(tmp_path, to_traces(to_row(1, 8.0, atoms=[*ATOMS, ("茶", "mixed")])))

    assert page.rows[0]["spans"][1:] == [
        ["t read control", "<|im_start|>"],
        ["t read", "user↵\nHow many?"],
        ["t trained", "Seven."],
        ["t mixed", "茶"],
    ]
    assert "partly learned character" in text
    assert "partly learned character" not in to_page(tmp_path, to_traces(to_row(1, 8.0)))[1]


def test_the_facts_are_at_the_top(tmp_path):
    _, text = to_page(tmp_path, to_traces())

    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text) == [("run", "runs/poems"), *FACTS.items()]


def test_the_data_open_no_tag_and_steer_nothing(tmp_path):
    evil = f"{INJECTED}\x1b[2J\u202e"
    row = to_row(1, 8.0, place=evil, atoms=[(evil, "trained")])
    others = to_traces(row, prompt=evil, tokens=[(evil, -1.0)])

    page, text = to_page(tmp_path, Traces(evil, {evil: evil}, others.answers))

    assert page.tags == {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "b"),
        *("dl", "dt", "dd", "div", "span", "ol", "li", "svg", "rect", "path"),
    }
    assert "<img" not in text and "</script" not in text and "\x1b" not in text and "\u202e" not in text
    assert page.tokens[0][0] == page.rows[0]["spans"][1][1] == f"{INJECTED}\\x1b[2J\\u202e"
    assert page.rows[0]["text"].strip().startswith(f"{INJECTED}\\x1b[2J\\u202e")


def test_the_page_asks_for_nothing_runs_nothing_and_has_no_style_that_its_policy_blocks(tmp_path):
    _, text = to_page(tmp_path, to_traces(to_row(1, 8.0)))

    assert "default-src 'none'; style-src 'sha256-" in text
    assert re.findall(r"<script|<link|src=|url\(|https?:|style=", text) == []


def test_the_terminal_says_what_is_estimated_and_what_was_measured_then_shows_a_table():
    rows = [to_row(1, 12.314), to_row(2, -0.5, similarity=-0.0625), to_row(3, None)]

    lines = to_lines(to_traces(*rows, to_row(40, 0.05, is_random=True)), width=100)

    assert lines == [
        "ranked  all training rows, by the similarity of their gradient to that of the answer at stored",
        "        checkpoints; an estimate",
        "proved  the run was trained again without the row (its labels masked, everything else unchanged),",
        "        and the change of the answer was measured",
        "effect  the log-probability of the whole answer as trained, minus that without the row; positive if",
        "        the row taught the answer",
        "",
        "run     runs/poems",
        "ranked  48 rows at 4 checkpoints, 12.3 s",
        "proved  4 replays of 2,400 steps, 9 min",
        "",
        "prompt",
        "  How many?",
        "answer, log-probability -1.75 nats",
        "  Seven.",
        "",
        "rank  similarity       effect  place       text",
        "   1       1.000  +12.31 nats  a.jsonl:1   user↵How many?Seven.",
        "   2      -0.062   -0.50 nats  a.jsonl:2   user↵How many?Seven.",
        "   3       0.333   not proved  a.jsonl:3   user↵How many?Seven.",
        "Random rows, left out for comparison:",
        "  40       0.025   +0.05 nats  a.jsonl:40  user↵How many?Seven.",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    """A Chinese letter takes two columns. The figures and the lines of the places are never cut."""
    row = to_row(
        1,
        12.314,
        place="data/一个很长的文件夹的名字/poems.jsonl:17",
        atoms=[("老茶馆里水初开，" * 9, "read")],
    )
    traces = to_traces(
        row, to_row(2, -3.0), prompt="老茶馆里水初开，" * 9, tokens=[("一缕热气绕窗台。" * 9, -2.0)]
    )

    lines = to_lines(traces, width=width)

    assert max(map(columns, lines)) <= width
    (first, second) = (line for line in lines if re.search(r" nats  .*:\d", line) or " nats  …" in line)
    assert first.startswith("   1       1.000  +12.31 nats  " + ("…" if width < 120 else "data/"))
    assert ":17  " in first and first.endswith("…")
    assert second.startswith("   2       0.500   -3.00 nats  ")
    assert columns(first) >= width - 1
    assert "".join(line.strip() for line in lines).count("老茶馆里水初开，") >= 9


def test_texts_in_the_terminal_stay_on_their_lines_and_steer_nothing():
    row = to_row(1, 1.0, place="a\n\x1b.jsonl:1", atoms=[("one\ntwo\x1b[2J\u202e", "trained")])

    lines = to_lines(to_traces(row, prompt="a\n\nb\x1b", tokens=[("\x07\n", -1.0)]), width=100)

    assert lines[11:14] == ["prompt", "  a↵", "  ↵"]
    assert lines[14:17] == ["  b\\x1b", "answer, log-probability -1.00 nats", "  \\x07↵"]
    assert lines[-1] == "   1       1.000  +1.00 nats  a↵\\x1b.jsonl:1  one↵two\\x1b[2J\\u202e"
