"""``hf-clm inspect`` on a recipe and on a run's folder, and the data in its page.

How the page shows them is tested in a browser.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, X, byte_tokenizer, write_jsonl

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.errors import RecipeError
from hf_clm.pages.inspection import View, inspect, padded_fill
from hf_clm.pages.labels import Lengths, to_content, write_labels
from hf_clm.pages.rows import Document, Row, Vocabulary, to_rows

RECORDS = [{"prompt": "Say hi.\n", "completion": "Hi"}, {"prompt": "p", "completion": "q"}] * 2


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe beside its data and tokenizer, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "d.jsonl", RECORDS)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: sft\n"
        "model: {init: scratch, config: {model_type: gpt2}, attention: sdpa}\n"
        "tokenizer: {name_or_path: tokenizer}\n"
        "data: {train: d.jsonl, max_length: 16, packing: none}\n"
        "train: {output_dir: runs/x, use_cpu: true, per_device_train_batch_size: 2}\n"
    )
    return path


def test_a_recipe_is_shown_with_counts_legend_and_rows(recipe):
    text = inspect(str(recipe), [], view=View(rows=2))

    assert text.splitlines() == [
        "rows: 4 (2 shown), of 4 documents",
        "tokens: 28, 10 targets (35.7%)",
        "examples: 4 used",
        "length: median 7, longest 11; 0.0% over max_length 16",
        "fill: padded in batches of 2 63.6%",
        "",
        "⟦trained⟧  read only  ⟪control token⟫  ⦃partly trained character⦄",
        "",
        "row 0: 11 tokens, 1 document, 3 targets (27.3%)",
        "┌ d.jsonl:1  11 tokens, 3 targets",
        "├ prompt",
        "│ Say hi.↵",
        "├ completion",
        "│ ⟦Hi⟪<|endoftext|>⟫⟧",
        "",
        "row 1: 3 tokens, 1 document, 2 targets (66.7%)",
        "┌ d.jsonl:2  3 tokens, 2 targets",
        "├ prompt",
        "│ p",
        "├ completion",
        "│ ⟦q⟪<|endoftext|>⟫⟧",
        "└ padding: 8 × <|pad|>",
    ]
    assert not Path("runs").exists()


def test_the_worst_rows_are_found_among_all_and_dropped_ones_are_named(recipe):
    overrides = ["--data.max_length", "10", "--data.max_dropped", "1", "--data.special_tokens_in_text=allow"]
    write_jsonl(Path("d.jsonl"), [*RECORDS, {"prompt": "a", "completion": "0123456789<|pad|>"}])

    lines = inspect(str(recipe), overrides, view=View(rows=1, worst=True)).splitlines()

    assert lines[2] == "examples: 2 cut, 2 used, 1 dropped: no whole target fits in max_length"
    assert lines[3] == "length: median 11, longest 13; 60.0% over max_length 10"
    assert lines[5] == "dropped: d.jsonl:5 (no whole target fits in max_length)"
    assert lines[6] == "control tokens in text: '<|pad|>' × 1"
    assert lines[10] == "row 2: 10 tokens, 1 document, 3 targets (30.0%)"
    assert lines[12:14] == ["├ ! cut prompt: the first 1 tokens are gone", "├ ! duplicate: of d.jsonl:1"]


def test_the_page_holds_more_rows_than_the_terminal(recipe):
    text = inspect(str(recipe), ["--data.packing", "best_fit"], view=View(rows=0, html="labels.html"))

    assert text.splitlines()[-1] == "wrote labels.html: 2 of 2 rows"
    assert '["from","' in Path("labels.html").read_text(encoding="utf-8")


def test_a_run_is_inspected_with_the_tokenizer_that_it_trained(recipe):
    """The recipe would train another one, on data that have changed since."""
    run = Path("run")
    byte_tokenizer().save_pretrained(run)
    text = recipe.read_text().replace("name_or_path: tokenizer", "train: {vocab_size: 300}")
    (run / "recipe.yaml").write_text(text)

    assert "tokens: 28, 10 targets (35.7%)" in inspect("run", [], view=View(rows=0))


def test_a_tokenizer_that_a_recipe_trains_leaves_no_folder(recipe):
    recipe.write_text(recipe.read_text().replace("name_or_path: tokenizer", "train: {vocab_size: 260}"))

    assert "⟦Hi⟪<|endoftext|>⟫⟧" in inspect(str(recipe), [], view=View(rows=1))
    assert not Path("runs").exists()


def test_the_eval_split_is_shown_on_request(recipe):
    write_jsonl(Path("e.jsonl"), [{"prompt": "only", "completion": "here"}])

    text = inspect(str(recipe), ["--data.eval", "e.jsonl"], view=View(split="eval"))

    assert "┌ e.jsonl:1  9 tokens, 5 targets" in text.splitlines()


def test_a_missing_eval_split_and_a_folder_without_a_run_are_refused(recipe):
    with pytest.raises(RecipeError, match="the recipe has no set 'eval'"):
        inspect(str(recipe), [], view=View(split="eval"))
    with pytest.raises(RecipeError, match="not the folder of a run"):
        inspect("tokenizer", [], view=View())


@pytest.mark.parametrize(
    ("color", "no_color", "is_colored"),
    [("always", "1", True), ("never", "", False), ("auto", "", True), ("auto", "1", False)],
)
def test_colours_are_for_terminals_and_can_be_turned_off(recipe, monkeypatch, color, no_color, is_colored):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")

    assert ("\x1b[" in inspect(str(recipe), [], view=View(rows=1, color=color))) == is_colored


def test_the_padded_fill_counts_the_longest_of_each_batch():
    """Batches of [4, 2] and [3]: 9 tokens in 8 + 3 places; a 5 over max_length 4 makes a 4 and a 1."""
    assert padded_fill(np.array([4, 2, 3]), 4, batch_size=2) == 9 / 11
    assert padded_fill(np.array([5, 3]), 4, batch_size=2) == 8 / 11


VOCABULARY = Vocabulary(byte_tokenizer())


def to_row(ids: list[int], labels: list[int], *documents: Document) -> Row:
    return Row(4, np.array(ids), np.array(labels), documents or (Document(0, len(ids)),))


def read_data(path: Path) -> dict[str, Any]:
    _, _, rest = path.read_text(encoding="utf-8").partition('id="data">')
    return json.loads(rest.partition("</script>")[0])


def decode(data: dict[str, Any], name: str) -> list[int]:
    return np.frombuffer(base64.b64decode(data[name]), dtype="<i4").tolist()


def test_the_page_holds_ids_labels_and_the_text_of_each_id():
    content = to_content([to_row([98, EOS, 97, 97, 0xE8], [X, EOS, 97, 7, X])], VOCABULARY)

    assert decode(content, "tokens") == [98, EOS, 97, 97, 0xE8]
    assert decode(content, "labels") == [X, EOS, 97, 7, X]
    assert content["texts"] == {97: "a", 98: "b", 0xE8: [0xE8], EOS: "<|endoftext|>"}
    assert content["control"] == [EOS]


def test_a_row_has_its_number_its_length_and_what_is_known_of_its_documents():
    first = Document(0, 3, "a.jsonl:17", ((0, "user"), (1, "assistant")), 0, 5, {"cut answer": "x"})
    second = Document(3, 4, "b.json: record 2", before=2)
    row = to_row([97, 98, 99, 100, PAD], [X, 98, 99, 7, X], first, second)

    ((number, length, documents),) = to_content([row], VOCABULARY)["rows"]

    assert (number, length) == (4, 5)
    assert documents[0] == {
        "start": 0,
        "stop": 3,
        "place": "a.jsonl:17",
        "roles": ((0, "user"), (1, "assistant")),
        "before": 0,
        "after": 5,
        "flags": {"cut answer": "x"},
        "loss": None,
        "note": "",
        "file": "a.jsonl",
        "line": ":17",
    }
    assert (documents[1]["file"], documents[1]["line"]) == ("b.json", ": record 2")


def test_nothing_in_the_data_can_end_its_script_element(tmp_path):
    document = Document(0, 1, place="</script><script>alert(1)</script>:3", flags={"duplicate": "<!--"})

    write_labels(
        tmp_path / "labels.html",
        [to_row([60], [60], document)],
        vocabulary=VOCABULARY,
        facts={"<b>": "</SCRIPT ><img src=x onerror=alert(1)>"},
    )

    text = (tmp_path / "labels.html").read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>\n<script>")[0]
    assert "<" not in data
    assert json.loads(data)["texts"] == {"60": "<"}
    assert read_data(tmp_path / "labels.html")["facts"] == [["<b>", "</SCRIPT ><img src=x onerror=alert(1)>"]]


def test_the_page_names_no_address_to_load_from(tmp_path):
    write_labels(tmp_path / "labels.html", [], vocabulary=VOCABULARY, facts={})

    text = (tmp_path / "labels.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert [word for word in ("src=", "href=", "url(", "@import", "https:", "fetch(") if word in text] == []


def test_the_page_holds_a_histogram_of_the_lengths(tmp_path):
    lengths = Lengths(np.array([1, 10, 30, 40]), 30)

    write_labels(tmp_path / "labels.html", [], vocabulary=VOCABULARY, facts={"rows": 4}, lengths=lengths)

    text = (tmp_path / "labels.html").read_text(encoding="utf-8")
    assert "<b>Tokens in an example: 25.0% are over max_length 30</b>" in text  # that is 40; 30 fits
    assert text.count('fill="var(--s0)"') == 40 - 10 and text.count('fill="var(--on-bad)"') == 10
    assert read_data(tmp_path / "labels.html")["facts"] == [["rows", "4"]]


def test_a_batch_of_a_trainer_can_be_written_without_its_records(tmp_path):
    batch = DataCollatorForCausalLM(PAD)([{"input_ids": [65, 66], "labels": [X, 66]}])
    batch["labels"] = batch["labels"].to(torch.int32)
    facts = {"step": 17, "learning rate": 1e-3, "gradient norm": float("nan")}

    write_labels(tmp_path / "batch.html", to_rows(batch), vocabulary=VOCABULARY, facts=facts)

    data = read_data(tmp_path / "batch.html")
    assert data["facts"] == [["step", "17"], ["learning rate", "0.001"], ["gradient norm", "nan"]]
    assert (decode(data, "tokens"), decode(data, "labels")) == ([65, 66], [X, 66])
    assert "<svg" not in (tmp_path / "batch.html").read_text(encoding="utf-8")
