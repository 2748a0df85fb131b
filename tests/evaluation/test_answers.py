"""Generated answers: comparison with the targets, listing, and the metrics of sacrebleu."""

import json
import sys

import numpy as np
import pytest
from helpers import byte_tokenizer, document, prompted, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main
from hf_clm.evaluation.answers import Answers, Sample, load_metrics, measure_answers
from hf_clm.generation.generate import Generated
from hf_clm.schema import Document, Segment

EXAMPLES = [
    prompted("ab", "cd"),
    document("no question"),
    prompted("a", "é"),
    prompted("b", "ij"),
]
GENERATED = [Generated("cd", 2, True), Generated("é", 1, False), Generated("ijk", 3, True)]


def answer_with(generated, monkeypatch) -> list:
    """Replaces the model's answers by these; returns a list that collects the prompts."""
    asked = []

    def generate(model, tokenizer, *, prompts, **options):
        asked.extend(prompts)
        return generated

    monkeypatch.setattr("hf_clm.evaluation.answers.generate", generate)
    return asked


def test_an_answer_is_exact_if_it_equals_the_target_and_stops(monkeypatch):
    asked = answer_with(GENERATED, monkeypatch)

    result = measure_answers(tiny_model(), byte_tokenizer(), examples=EXAMPLES, metrics={})

    assert result is not None
    assert asked == [Document([Segment(text, 0)]) for text in ("ab", "a", "b")]
    assert result.to_json() == {"asked": 3, "exact_match": 1 / 3, "stopped": 2 / 3}
    assert result.samples[1] == Sample(2, "a", "é", "é", False)
    assert result.select(np.array([True, True, False, False])).to_json() == {
        "asked": 1,
        "exact_match": 1.0,
        "stopped": 1.0,
    }
    assert result.select(np.array([False, True, False, False])).to_json() == {"asked": 0}


def test_documents_have_no_prompts():
    assert measure_answers(tiny_model(), byte_tokenizer(), examples=[document("a")], metrics={}) is None


def to_answers(*pairs: tuple[str, str]) -> Answers:
    samples = [Sample(n, "?", target, text, True) for n, (target, text) in enumerate(pairs)]
    return Answers(samples, load_metrics())


def test_chrf_and_bleu_are_computed_over_all_answers():
    """``abc`` for ``abd``: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple agree, so F is their mean, 7 / 18."""
    assert to_answers(("abd", "abc")).to_json()["chrf"] == pytest.approx(100 * 7 / 18)
    exact = to_answers(("yes", "yes"), ("a b c d e", "a b c d e")).to_json()
    assert (exact["chrf"], exact["bleu"]) == (pytest.approx(100), pytest.approx(100))
    assert to_answers(("yes", "no")).to_json()["chrf"] == 0.0


def test_short_answers_are_not_penalized_for_having_no_4_grams():
    assert to_answers(("yes", "yes")).to_json()["bleu"] == pytest.approx(100)


def test_a_missing_package_is_reported_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)

    assert main(["evaluate", "no-run", "no-data", "--generate"]) == 6
    assert capsys.readouterr().err == (
        "error: --generate: requires the package sacrebleu; fix: pip install 'hf_clm[eval]'\n"
    )


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())


def test_samples_are_in_the_json_and_on_the_page(folder, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "<i>", "completion": "é"}]
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[:1])]
    answer_with([Generated("cd", 2, True), Generated("<b>", 1, False), Generated("cx", 2, True)], monkeypatch)
    page = tmp_path / "page.html"
    words = ["evaluate", folder, *paths, "--generate", "--html", str(page), "--device", "cpu"]

    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert result["samples"][1] == {
        "where": f"{paths[0]}:2",
        "prompt": "<i>",
        "target": "é",
        "generated": "<b>",
        "exact": False,
        "stopped": False,
    }
    assert (result["asked"], result["exact_match"]) == (3, 1 / 3)
    assert {file: own["exact_match"] for file, own in result["sources"].items()} == {
        paths[0]: 0.5,
        paths[1]: 0.0,
    }
    assert lines[-3][-2:] == ["exact_match", "chrf"]
    text = page.read_text(encoding="utf-8")
    assert "3 of 3 answers, those that differ from their target first." in text
    places = [
        text.index(f'class="{kind}">{output}</td>')
        for kind, output in (("bad", "&lt;b&gt; …"), ("bad", "cx"), ("good", "cd"))
    ]
    assert places == sorted(places)


def test_documents_have_nothing_to_generate(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])

    assert main(["evaluate", folder, path, "--generate", "--device", "cpu"]) == 3
    assert (
        f"error: {path}: no example has a prompt to answer; fix: remove --generate" in capsys.readouterr().err
    )


def test_with_choices_nothing_is_generated_by_default(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}])
    words = [
        "evaluate",
        folder,
        path,
        "--choices",
        "c,d",
        "--max_new_tokens",
        "2",
        "--device",
        "cpu",
        "--json",
    ]

    assert main(words) == 0
    assert "asked" not in json.loads(capsys.readouterr().out)
    assert main([*words, "--generate"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 1
    assert main([*words, "--generate", "--no_generate"]) == 2
