"""report.html as text; tests/browser looks at it in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import EVIL, write_run

from hf_clm.errors import RecipeError
from hf_clm.pages.report import build_report, write_report
from hf_clm.run_folder import load_folder


class Reader(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def read(folder: Path) -> Reader:
    return Reader(build_report(load_folder(folder)))


def headings(text: str) -> list[str]:
    return [found.strip() for found in re.findall(r"<(?:h2|summary)>([^<]*)", text)]


def titles(text: str) -> list[str]:
    return re.findall("<figcaption><b>(.*?)</b>", text)


def test_a_whole_run_has_every_part(tmp_path):
    text = build_report(load_folder(write_run(tmp_path / "poems")))

    assert headings(text) == [
        *("What the model reads and learns", "How the loss falls", "How the answers grow"),
        *("What it cost, and how it ran", "What was proved", "Where every record went"),
        *("Self-test of the loss", "Recipe", "Versions"),
    ]
    assert titles(text) == [
        *("Loss", "Token accuracy", "Learning rate", "Gradient norm"),
        *("Tokens per second", "MFU", "Peak memory"),
    ]


def test_the_figures_stand_at_the_top(tmp_path):
    texts = read(write_run(tmp_path / "poems")).texts

    first = texts.index("Evaluation loss")
    assert texts[first : first + 7] == [
        *("Evaluation loss", "6.5000 →", "0.2500"),
        *("Evaluation accuracy", "0% →", "97.5%"),
        "From before to after training, measured on the training data.",
    ]


def test_the_chapter_on_cost_has_every_figure_that_no_other_has(tmp_path):
    texts = read(write_run(tmp_path / "poems")).texts

    first = texts.index("Steps")
    assert texts[first : first + 16] == [
        *("Steps", "40 of 40"),
        *("Time", "5s"),
        *("Tokens", "4,000"),
        *("Target tokens", "1,600"),
        *("Tokens per second", "800"),
        *("MFU", "9.5%"),
        *("Peak memory", "1.08 GB"),
        *("Padding", "0%"),
    ]
    assert "48 input rows became 12 rows, 94.5% full." in texts


def test_the_legend_of_a_chart_has_the_last_value_of_each_series(tmp_path):
    text = build_report(load_folder(write_run(tmp_path / "poems")))

    assert re.findall('class="key c(.*?)">(.*?)<', text)[:2] == [
        ("0", "training 0.0961"),
        ("1 dots", "evaluation 0.2500"),
    ]


def test_what_is_not_there_is_left_out(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running"}')

    text = build_report(load_folder(tmp_path))

    assert headings(text) == []
    assert "<figure" not in text and "<table" not in text and "<dt>" not in text


def test_a_run_of_an_older_version_has_its_recipe_without_origins(tmp_path):
    texts = read(write_run(tmp_path / "old", facts={"origins": None})).texts

    assert "data.max_length" in texts
    assert "origin" not in texts and "Given" not in texts


def test_no_text_of_a_user_becomes_markup(tmp_path):
    folder = write_run(tmp_path / EVIL.replace("/", "-"), facts={"status": EVIL, "error": [EVIL]})
    (folder / "label_rows.jsonl").write_text(
        (folder / "label_rows.jsonl").read_text().replace("poems.jsonl:9", json.dumps(EVIL)[1:-1])
    )

    found = read(folder)

    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert "49" not in found.texts
    assert found.texts.count(EVIL) >= 4  # the model, the error, the place, the prompt


def test_the_policy_allows_the_one_style_and_nothing_else(tmp_path):
    text = build_report(load_folder(write_run(tmp_path / "run")))

    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', text)
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
    assert "url(" not in style and "@import" not in style
    assert "http://" not in text and "https://" not in text


@pytest.mark.parametrize(
    ("status", "is_live", "refreshes"),
    [("running", True, True), ("running", False, False), ("done", True, False), ("diverged", True, False)],
)
def test_the_page_loads_itself_anew_while_the_run_goes_on(tmp_path, status, is_live, refreshes):
    folder = write_run(tmp_path / "run", facts={"status": status})

    write_report(folder, is_live=is_live)

    text = (folder / "report.html").read_text(encoding="utf-8")
    assert ('<meta http-equiv="refresh" content="10">' in text) is refreshes


def test_a_running_run_says_how_far_it_is_and_how_long_it_takes(tmp_path):
    left_out = ("loss_after", "loss_before", "steps_done", "tokens_seen", "tokens_per_second")
    facts = {"status": "running", "steps": 120, "evaluated": None, **dict.fromkeys(left_out)}

    texts = read(write_run(tmp_path / "run", facts=facts)).texts

    place = texts.index("Steps")
    assert texts[place : place + 4] == ["Steps", "40 of 120", "Time", "5s, about 10s left"]


def test_before_its_second_evaluation_a_run_shows_one_value(tmp_path):
    metrics = [{"step": 0, "eval_loss": 7.0}, {"step": 5, "loss": 5.0}]

    texts = read(
        write_run(tmp_path / "run", facts={"status": "running", "evaluated": None}, metrics=metrics)
    ).texts

    assert texts[texts.index("Evaluation loss") + 1] == "7.0000"


def test_figures_of_named_sets_and_of_answers_stand_before_and_after(tmp_path):
    metrics = [
        {"step": n, "eval_loss": 2.0, "eval_news_loss": 3.0 - n, "eval_exact_match": n / 4} for n in (0, 1)
    ]

    texts = read(write_run(tmp_path / "run", metrics=metrics)).texts

    place = texts.index("News loss")
    assert texts[place : place + 6] == ["News loss", "3 →", "2", "Exact match", "0% →", "25%"]


def test_a_run_that_failed_says_why(tmp_path):
    facts = {"status": "diverged", "error": ["step 7: the loss is not finite"]}

    text = build_report(load_folder(write_run(tmp_path / "run", facts=facts)))

    assert '<span class="status diverged">diverged</span>' in text
    assert '<p class="error">step 7: the loss is not finite</p>' in text


def levels(text: str) -> list[str]:
    return re.findall('key level">(.*?)<', text)


def test_pretraining_is_compared_with_guessing_and_gradients_with_their_clip(tmp_path):
    learned = build_report(load_folder(write_run(tmp_path / "a")))
    whole = build_report(load_folder(write_run(tmp_path / "b", facts={"stage": "pretrain"})))

    assert levels(learned) == ["clipped at 1"]
    assert levels(whole) == ["guessing by frequency", "clipped at 1"]


def test_padding_is_drawn_where_there_is_some(tmp_path):
    metrics = [{"step": 1, "loss": 1.0, "padding_share": 0.25}]

    assert titles(build_report(load_folder(write_run(tmp_path / "run", metrics=metrics)))) == [
        "Loss",
        "Padding",
    ]


def stages(text: str) -> list[str]:
    return re.findall('<div class="card(?: last)?"><span class="quiet">(.*?)</span>', text)


def test_five_answers_stand_side_by_side(tmp_path):
    text = build_report(load_folder(write_run(tmp_path / "run")))

    assert "5 of 7 different answers" in text
    growth = ["before training", "step 15", "step 20", "step 25", "step 40"]
    assert [title for title in stages(text) if "t" in title and title[0] in "bs"] == growth * 2


def test_steps_with_the_same_answer_are_one_and_the_target_is_recognized(tmp_path):
    texts = {0: "?", 10: "so", 20: "boats", 30: "boats", 40: "boats"}
    samples = [{"step": step, "prompt": "Poem", "text": text} for step, text in texts.items()]
    folder = write_run(tmp_path / "run", samples=samples)
    turns = [["user", [["read control", "<|im_start|>"], ["read", "user\nPoem"]]]]
    turns.append(
        ["assistant", [["read", "assistant\n"], ["trained", "boats"], ["trained control", "<|im_end|>"]]]
    )
    row = {"place": "a:1", "tokens": 9, "targets": 2, "shown": 9, "flags": {}, "turns": turns}
    (folder / "label_rows.jsonl").write_text(json.dumps(row) + "\n")

    found = read(folder).texts

    place = found.index("target in the data")
    assert found[place : place + 10] == [
        *("target in the data", "boats"),
        *("before training", "?"),
        *("step 10", "so"),
        *("steps 20 to 40", "✓ the target", "boats"),
        "What it cost, and how it ran",
    ]


def test_answers_of_the_evaluations_are_shown_with_their_targets(tmp_path):
    folder = write_run(tmp_path / "run", samples=[])
    entry = {"set": "eval", "prompt": "7 x 7", "target": "49", "exact": False}
    lines = [{"step": 0, "text": "x", **entry}, {"step": 40, "text": "49", **entry}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = read(folder).texts

    place = found.index("7 x 7")
    assert found[place + 1 : place + 8] == [
        *("target in the data", "49", "before training", "x", "step 40", "✓ the target", "49"),
    ]


def test_targets_and_prompts_are_told_apart_in_the_labels(tmp_path):
    text = build_report(load_folder(write_run(tmp_path / "run")))

    assert '<span class="t trained">ok</span>' in text
    assert '<span class="t trained control">&lt;|endoftext|&gt;</span>' in text
    assert '<span class="t read">ask↵\n&lt;/script&gt;' in text


def test_the_recipe_says_where_each_value_was_given(tmp_path):
    texts = read(write_run(tmp_path / "run")).texts

    given = texts[texts.index("Given") + 1 : texts.index("Not given")]
    rest = texts[texts.index("Not given") + 1 :]
    assert given == [
        *("key", "value", "origin"),
        *("stage", '"sft"', "poems.yaml:1"),
        *("data.max_length", "64", "command line"),
    ]
    assert rest[rest.index("data.packing") :][:3] == ["data.packing", '"best_fit"', "default"]
    assert rest[rest.index("train.bf16") :][:3] == ["train.bf16", "true", "hf_clm default"]
    assert rest[rest.index("train.learning_rate") :][:3] == [
        "train.learning_rate",
        "0.002",
        "chosen by the run",
    ]


def test_the_ledger_and_the_certificate_are_those_of_run_json(tmp_path):
    texts = read(write_run(tmp_path / "run")).texts

    assert "all 48 rows are certified, sha256 0fb1e8d1d674" in texts
    assert "48 input rows, 12 rows, 2,911 tokens, 1,099 of them targets" in texts
    place = texts.index("used")
    assert texts[place : place + 12] == [
        *("used", "48", "2,911", "1,099", "2,911", "1,099"),
        *("unreadable", "1", "0", "0", "0", "0"),
    ]


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ({"self_test": "off"}, "not tested: off"),
        ({"round_trip": "off: the model is sharded"}, "not tested: off: the model is sharded"),
        ({"round_trip": "end"}, "tested at the end"),
        ({"train": {"certificate": {"valid": False, "rows": 3}}}, "are NOT certified"),
    ],
)
def test_what_was_not_proved_is_said(tmp_path, proof, said):
    assert said in build_report(load_folder(write_run(tmp_path / "run", facts={"proof": proof})))


def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path):
    folder = write_run(tmp_path / "run", facts={"model": "a\ud800b"})

    write_report(folder)

    assert "a\\ud800b" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_the_old_one_and_no_half(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    write_report(folder)
    before, names = (folder / "report.html").read_bytes(), sorted(folder.iterdir())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)

    assert (folder / "report.html").read_bytes() == before
    assert sorted(folder.iterdir()) == names


def test_a_folder_without_a_run_gets_no_page(tmp_path):
    with pytest.raises(RecipeError):
        write_report(tmp_path)

    assert list(tmp_path.iterdir()) == []
