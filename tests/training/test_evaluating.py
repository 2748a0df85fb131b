"""Several evaluation sets, and answers during training: log events, the best model, the report."""

import json
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
from helpers import write_jsonl
from launched import prepare, read_metrics, train_on_two
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.errors import DataError, RecipeError
from hf_clm.evaluation.metrics import token_nll
from hf_clm.pages.inspection import View, inspect
from hf_clm.pages.report import build_report
from hf_clm.recipe.recipe import Recipe, load_recipe, recipe_to_yaml
from hf_clm.run_folder import load_folder
from hf_clm.training.run import train

RECORDS = [{"prompt": f"say {n}\n", "completion": "xyz"[n % 3] * n} for n in range(1, 17)]
SETS = {
    "news": [{"prompt": f"news {n}\n", "completion": "ab" * n} for n in range(1, 5)],
    "chat": [{"prompt": f"chat {n}\n", "completion": "c" * n} for n in range(1, 4)],
}
EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}


def build(folder: Path, *, sets: Any = None, train: Any = (), watched: int = 0, **changes: Any) -> Recipe:
    """4 steps of 2 rows, evaluated every 2 steps, on ``news`` and ``chat`` unless other sets are given."""
    named = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in SETS.items()}
    data = {"train": [write_jsonl(folder / "rows.jsonl", RECORDS)], "eval": named if sets is None else sets}
    data |= {"max_length": 64, "packing": "none", "cache_dir": None, "max_leakage": 1.0}
    data |= {"eval_train_rows": watched}
    settings = {"output_dir": str(folder / "run"), **EVERY_TWO, **dict(train)}
    return helpers.build_recipe(folder, RECORDS, data=data, train=settings, **changes)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "eval_loss" in entry]


def plain_loss(folder: Path, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Returns the summed nll of targets and end tokens, and their number, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        both = tokenizer(row["prompt"] + row["completion"] + "<|endoftext|>", return_tensors="pt").input_ids
        labels = both.clone()
        labels[:, : prompt.shape[1]] = -100
        total += float(token_nll(model(both).logits, labels).sum())
        count += int((labels >= 0).sum())
    return total, count


def test_each_set_has_its_figures_and_eval_loss_is_over_all_sets(tmp_path):
    result = train(build(tmp_path))

    found = evaluations(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 4]
    sums = {name: plain_loss(tmp_path / "run", rows) for name, rows in SETS.items()}
    for name, (total, count) in sums.items():
        assert found[-1][f"eval_{name}_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found[-1][f"eval_{name}_target_tokens"] == count
    total, count = (sum(part) for part in zip(*sums.values(), strict=True))
    assert found[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    pair = [found[0]["eval_news_loss"], found[-1]["eval_news_loss"]]
    assert list(result["evaluated"]["eval_news_loss"]) == pair
    assert result["evaluations"]["news"]["input_rows"] == 4 and result["evaluation"]["input_rows"] == 7


def test_a_single_named_set_is_logged_as_eval_loss_too_and_can_select_the_best_model(tmp_path):
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    train(build(tmp_path, sets={"news": str(tmp_path / "news.jsonl")}, train=best))

    assert [entry["eval_loss"] - entry["eval_news_loss"] for entry in evaluations(tmp_path)] == [0.0] * 4


def test_the_summary_and_the_report_show_every_set_before_and_after(tmp_path, capsys):
    train(build(tmp_path))
    before, after = (evaluations(tmp_path)[at]["eval_chat_loss"] for at in (0, -1))

    assert f"          chat loss {before:.4g} -> {after:.4g}" in capsys.readouterr().out.splitlines()
    page = build_report(load_folder(tmp_path / "run"))
    tile = f'Chat loss</span>\n<b><span class="quiet">{before:.4g} →</span> {after:.4g}</b>'
    assert tile in page
    assert "labels, eval_news" in page


def test_a_recipe_with_named_sets_survives_writing_and_reading(tmp_path):
    recipe = build(tmp_path)
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(recipe))

    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert [source.set for source in recipe.data.eval] == ["news", "chat"]


def test_the_inspector_shows_a_set_by_its_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(build(tmp_path)))

    assert "chat 1" in inspect(str(tmp_path / "recipe.yaml"), [], view=View(split="chat"))
    with pytest.raises(RecipeError, match="no set 'talk'; fix: --split train or eval_news or eval_chat"):
        inspect(str(tmp_path / "recipe.yaml"), [], view=View(split="talk"))


def test_training_rows_in_one_of_the_sets_are_found(tmp_path):
    recipe = build(tmp_path, sets={"news": str(tmp_path / "news.jsonl"), "old": str(tmp_path / "rows.jsonl")})
    strict = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_leakage": 0.5})})

    with pytest.raises(DataError, match=r"100.0% of the evaluation rows are training rows"):
        train(strict)


def test_answers_are_measured_at_the_first_the_last_and_every_nth_evaluation(tmp_path):
    asked = {"generate": 2, "every": 2, "max_new_tokens": 3, "metrics": ["exact_match", "chrf"]}
    train(build(tmp_path, evaluation=asked, train={"max_steps": 6}))

    found = evaluations(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6]
    assert ["eval_news_chrf" in entry for entry in found] == [True, False, True, True]
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [(one["step"], one["set"]) for one in answers[:4]] == [(0, "eval_chat")] * 2 + [
        (0, "eval_news")
    ] * 2
    assert [one["target"] for one in answers[:4]] == ["c", "cc", "ab", "abab"]
    assert {one["step"] for one in answers} == {0, 4, 6}


OWN = """
def length(answers, targets):
    return {"mean": sum(map(len, answers)) / len(answers), "targets": len("".join(targets))}


def of_numpy(answers, targets):
    import numpy

    return numpy.float32(0.5)


def wrong(answers, targets):
    return "much"
"""


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    """A user's module with metrics."""
    (tmp_path / "metrics_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("metrics_of_mine", None)


@pytest.mark.usefixtures("own_metrics")
def test_a_function_of_answers_and_targets_can_select_the_best_model(tmp_path):
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_chat_length_mean", "save_total_limit": 5}
    asked = {"generate": 3, "metrics": "metrics_of_mine:length", "max_new_tokens": 8}
    train(build(tmp_path, evaluation=asked, train=best))

    found = evaluations(tmp_path)
    lengths = {entry["step"]: entry["eval_chat_length_mean"] for entry in found[:3]}
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(lengths[2], lengths[4])
    assert {entry["eval_chat_length_targets"] for entry in found} == {6.0}


@pytest.mark.usefixtures("own_metrics")
def test_a_metric_may_return_a_numpy_number(tmp_path):
    train(build(tmp_path, evaluation={"generate": 1, "metrics": "metrics_of_mine:of_numpy"}))

    assert {entry["eval_news_of_numpy"] for entry in evaluations(tmp_path)} == {0.5}


def test_a_set_may_have_the_name_of_a_key_of_a_source(tmp_path):
    recipe = build(tmp_path, sets={"name": "a.jsonl", "test": "b.jsonl"})

    assert [(source.set, source.path) for source in recipe.data.eval] == [
        ("name", "a.jsonl"),
        ("test", "b.jsonl"),
    ]


@pytest.mark.usefixtures("own_metrics")
@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (
            "metrics_of_mine:wrong",
            "a metric must return a number, or a dict of numbers; got wrong returned str",
        ),
        ("metrics_of_mine:none", "no such metric 'metrics_of_mine:none'"),
        ("no_such_module:f", "no such metric 'no_such_module:f'"),
        ("metrics_of_mine:OWN", "no such metric"),
    ],
)
def test_a_metric_that_fails_is_reported_in_one_line(tmp_path, metric, said):
    with pytest.raises(RecipeError, match=said):
        train(build(tmp_path, evaluation={"generate": 1, "metrics": metric}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"every": 2}}, "evaluation.every needs evaluation.generate"),
        (
            {"evaluation": {"generate": 1, "metrics": ["rouge"]}},
            "expected one of exact_match, chrf, bleu, or module:function",
        ),
        ({"evaluation": {"generate": 1}, "stage": "pretrain"}, "evaluation.generate needs stage: sft"),
        ({"evaluation": {"generate": 1}, "sets": []}, "evaluation.generate needs an evaluation set"),
        ({"sets": {"train": "a.jsonl"}}, "data.eval: the name is reserved"),
        ({"sets": [{"path": "a", "set": "one"}, "b"]}, "belong to a named set, and others do not"),
        ({"train": {"metric_for_best_model": "news_chrf"}}, "expected one of eval_loss, .*eval_news_loss"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_with_the_recipe(tmp_path, changes, said):
    with pytest.raises(ValidationError, match=said):
        build(tmp_path, **changes)


def test_a_best_model_needs_its_metric_at_every_evaluation(tmp_path):
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    best["metric_for_best_model"] = "eval_news_exact_match"

    with pytest.raises(ValidationError, match=r"evaluation.every skips evaluations"):
        build(tmp_path, train=best, evaluation={"generate": 1, "every": 2})


def test_a_set_without_prompts_is_reported(tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}])

    with pytest.raises(DataError, match="no example has a prompt to answer"):
        train(build(tmp_path, sets={"texts": texts}, evaluation={"generate": 1}))


def test_without_an_eval_set_the_watched_training_rows_are_evaluated(tmp_path):
    result = train(build(tmp_path, sets=[], watched=3))

    found = evaluations(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 4]
    assert [entry["eval_target_tokens"] for entry in found] == [1 + 2 + 3 + 3] * 3  # say 1, say 2 and say 3
    assert not any("eval_train_loss" in entry for entry in found)
    assert "evaluation" not in result or result["evaluation"] is None


def test_two_processes_share_the_answers_and_log_the_same_as_one(tmp_path):
    two = prepare(tmp_path / "two")
    words = ["--evaluation.generate", "5", "--evaluation.metrics", "[exact_match, chrf]"]
    train_on_two(two, *words, "--samples", "null", "--max_steps", "4")
    recipe = load_recipe(two / "recipe.yaml", [*words, "--samples", "null", "--max_steps", "4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(two)
        rows = {"per_device_train_batch_size": 4, "output_dir": "alone"}
        train(recipe.model_copy(update={"train": {**recipe.train, **rows}}))

    found = [entry for entry in read_metrics(two) if "eval_loss" in entry]
    lines = (two / "alone" / "metrics.jsonl").read_text().splitlines()
    alone = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    for key in ("step", "eval_exact_match", "eval_chrf"):
        assert [entry[key] for entry in found] == pytest.approx([entry[key] for entry in alone])
    assert (two / "run" / "answers.jsonl").read_text() == (two / "alone" / "answers.jsonl").read_text()


def test_the_best_checkpoint_of_a_mixture_is_loaded(tmp_path):
    """Its files contain each expert separately, and the Trainer would not load them into the model."""
    folder = helpers.save_folder(
        tmp_path / "experts", helpers.tiny_model("mixtral"), helpers.byte_tokenizer()
    )
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.05}

    train(build(tmp_path, model={"name_or_path": folder}, train=best))

    found = evaluations(tmp_path)
    assert found[-1]["eval_loss"] == min(entry["eval_loss"] for entry in found[1:])
    plain = [plain_loss(tmp_path / "run", rows) for rows in SETS.values()]
    total, count = sum(nll for nll, _ in plain), sum(targets for _, targets in plain)
    assert found[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
