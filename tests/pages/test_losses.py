"""The page of losses, read as a browser's parser reads it; its numbers against plain transformers."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import EOS, byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main
from hf_clm.evaluation.likelihood import guess_row

INJECTED = "</script><img src=x onerror=\"document.title='injected'\">"
ROWS = [
    {"prompt": "a:", "completion": "bc"},
    {"prompt": INJECTED, "completion": f"茶{INJECTED}"},
    {"prompt": "line\n", "completion": "\u202etwo\nlines"},
]


class Page(HTMLParser):
    """Every tag of a page, and of each token its text and title."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.tokens, self.places, self.waiting = set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.waiting = tag
        if "tabindex" in dict(attrs):
            self.tokens.append(["", dict(attrs)["title"], dict(attrs)["class"]])
            self.waiting = "token"

    def handle_endtag(self, tag):
        self.waiting = ""

    def handle_data(self, data):
        if self.waiting == "token":
            self.tokens[-1][0] += data
        if self.waiting == "h3":
            self.places.append(data.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    save_folder(folder / "model", tiny_model("gpt2", n_positions=256), byte_tokenizer())
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def to_page(folder, *words: str) -> tuple[Page, str]:
    page = folder / "losses.html"
    command = ["evaluate", str(folder / "model"), str(folder / "rows.jsonl"), "--html", str(page)]
    assert main([*command, "--no_generate", "--device", "cpu", *words]) == 0
    text = page.read_text(encoding="utf-8")
    return Page(text), text


def evaluation_of(folder):
    """The words of a command that evaluates the model of this folder on its rows."""
    return ["evaluate", f"{folder}/model", f"{folder}/rows.jsonl", "--no_generate", "--device", "cpu"]


def test_a_token_has_its_loss_probability_rank_and_the_likeliest_others(folder):
    page, _ = to_page(folder)
    ids = [*b"a:bc", EOS]
    with torch.no_grad():
        logits = tiny_model("gpt2", n_positions=256)(input_ids=torch.tensor([ids])).logits[0, 1:-1]
    shares = torch.softmax(logits, dim=-1)

    start = 0 if page.tokens[0][0] == "b" else next(i for i, t in enumerate(page.tokens) if t[0] == "b")
    for number, (token, shown) in enumerate(zip(ids[2:], ["b", "c", "<|endoftext|>"], strict=True)):
        share = float(shares[number, token])
        rank = int((shares[number] > share).sum()) + 1
        text, title, _ = page.tokens[start + number]
        assert text == shown
        head, others = title.split("\n")
        assert head.startswith(f"'{shown}': loss {-np.log(share):.3f}, probability {share:.1%}, rank {rank}")
        best = [int(other) for other in shares[number].topk(5).indices if other != token]
        assert re.findall(r"[0-9.]+%", others) == [f"{shares[number, other]:.1%}" for other in best[:4]]


def test_the_row_with_the_largest_mean_loss_comes_first(folder):
    page, text = to_page(folder)
    means = [float(mean) for mean in re.findall(r"mean loss ([0-9.]+)", text)]

    assert len(means) == 3
    assert means == sorted(means, reverse=True)
    assert sorted(place.rpartition(":")[2] for place in page.places) == ["1", "2", "3"]
    worst, _ = to_page(folder, "--rows", "1")
    assert worst.places == page.places[:1]


def test_the_data_open_no_tag_and_steer_nothing(folder):
    page, text = to_page(folder)

    assert page.tags == {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p"),
        *("div", "b", "span", "article"),
    }
    assert "<img" not in text and "</script" not in text and "\u202e" not in text
    shown = "".join(token[0] for token in page.tokens)
    assert f"茶{INJECTED}<|endoftext|>" in shown
    assert "\\u202etwo↵\nlines" in shown


def test_the_figures_have_the_names_of_the_table_of_metrics(folder):
    _, text = to_page(folder)

    found = re.findall(r'<div class="card"><span class="quiet">(.*?)</span>', text)
    assert found == [
        *("Loss", "Perplexity", "Bits per byte", "Token accuracy"),
        *("Examples", "Dropped examples", "Rows", "Target tokens"),
        *("Loss of first tokens", "Loss of tokens in between", "Loss of stop tokens"),
    ]


def test_each_row_is_shown_before_and_after(folder):
    """Of a model of zeros every token has the loss log(260)."""
    zeros = tiny_model("gpt2", n_positions=256)
    torch.nn.init.zeros_(zeros.get_input_embeddings().weight)
    save_folder(folder / "zeros", zeros, byte_tokenizer())

    page, text = to_page(folder, "--before", str(folder / "zeros"), "--rows", "1")

    assert re.findall(r"<b>(before|after)</b> mean loss ([0-9.]+)", text)[0] == ("before", "5.561")
    assert text.count("<b>after</b>") == 1
    half = len(page.tokens) // 2
    assert [token[0] for token in page.tokens[:half]] == [token[0] for token in page.tokens[half:]]
    assert "loss 5.561" in page.tokens[0][1] and "loss 5.561" not in page.tokens[half][1]
    tiles = re.findall(r"Loss</span>\s*<b><span class=\"quiet\">([0-9.]+) →</span> ([0-9.]+)</b>", text)
    assert tiles == [("5.5607", "5.5654")]


def test_a_model_of_another_tokenizer_is_refused(folder, capsys):
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab()
    other = save_folder(folder / "other", tiny_model("gpt2", n_positions=256), byte_tokenizer())
    path = folder / "other" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    words = evaluation_of(folder)

    assert main([*words, "--before", other]) == 2

    assert capsys.readouterr().err == (
        f"error: --before {other}: 2 of 260 tokens have a different id in the run; got 'a'; "
        "fix: name a model with the same tokenizer\n"
    )


def test_a_folder_without_a_recipe_has_no_base(folder, capsys):
    words = evaluation_of(folder)

    assert main([*words, "--before", "base"]) == 2

    assert "is not the folder of a run; got 'base'" in capsys.readouterr().err


def test_a_character_of_three_tokens_is_one_place_with_three_losses(folder):
    page, _ = to_page(folder)

    found = next(title for text, title, _ in page.tokens if text == "茶")
    assert [line.split(":")[0] for line in found.split("\n")[::2]] == ["'\\xe8'", "'\\x8c'", "'\\xb6'"]


def test_the_page_asks_for_nothing_and_runs_nothing(folder):
    _, text = to_page(folder)

    assert "default-src 'none'; style-src 'sha256-" in text
    assert re.findall(r"<script|<link|src=|url\(|https?:", text.replace("img src=x", "")) == []


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_opened(tmp_path, capsys):
    assert main(["evaluate", "no-model", "no-data", "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --html: cannot be written; got {tmp_path}; fix: name a file in an existing folder\n"
    )


def test_ranks_count_the_tokens_that_are_likelier():
    """Row ``ab``: two targets; a model of equal logits puts every token first."""
    model = tiny_model("gpt2")
    torch.nn.init.zeros_(model.get_input_embeddings().weight)

    found = guess_row(model, {"input_ids": [97, 98, EOS], "labels": [-100, 98, EOS]}, alternatives=2)

    assert found.rank.tolist() == [1, 1]
    assert found.nll.tolist() == pytest.approx([np.log(260)] * 2)
    assert found.shares.shape == (2, 2)
    assert found.shares[0].tolist() == pytest.approx([1 / 260] * 2)


def test_a_model_that_is_broken_is_all_hot(folder):
    model = tiny_model("gpt2", n_positions=256)
    torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
    broken = save_folder(folder / "broken", model, byte_tokenizer())
    page = folder / "broken.html"
    words = ["evaluate", broken, str(folder / "rows.jsonl"), "--html", str(page), "--no_generate"]

    assert main([*words, "--device", "cpu"]) == 0

    assert {kind for _, _, kind in Page(page.read_text(encoding="utf-8")).tokens} == {"t heat h9"}
