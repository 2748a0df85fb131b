"""What a run verifies before its first step, and what it prints and records about it."""

import re
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
from helpers import X, prove_records

from hf_clm.data.label import labels
from hf_clm.data.prepared import block
from hf_clm.data.proof import proof
from hf_clm.data.proof.checker import Checker
from hf_clm.errors import DataError, ExitCode, ModelError
from hf_clm.training.proof import prove_model
from hf_clm.training.run import train

# "say\n" is read (4 tokens), N letters and the end token are learned: 6, 7, 8 tokens.
RECORDS = [{"instruct": "say\n", "input": "", "label": "x" * n} for n in (1, 2, 3)]
HELD_OUT = [{"instruct": "tell\n", "input": "", "label": "yes"}]


def masked(texts: list[str]) -> list[str]:
    """Removes what differs between runs."""
    return [re.sub(r"[\d.]+ s, sha256 [0-9a-f]{12}", "...", text) for text in texts]


def test_ledger_and_certificate_of_each_set_are_shown(tmp_path):
    found = prove_records(tmp_path, RECORDS, evaluation=HELD_OUT)

    assert masked(found.lines) == [
        "train     fate                  rows        tokens       targets   tokens kept  targets kept",
        "          used                     3            21             9            21             9",
        "          the labels of all 3 rows are certified (...)",
        "          the first 3 prompts equal the input of generate",
        "eval      fate                  rows        tokens       targets   tokens kept  targets kept",
        "          used                     1             9             4             9             4",
        "          the labels of all 1 rows are certified (...)",
        "          the first 1 prompts equal the input of generate",
    ]


def test_a_set_of_one_row_shows_its_complete_table(tmp_path):
    records = [RECORDS[0], RECORDS[0], {"instruct": "say\n", "input": "", "label": 7}]

    found = prove_records(tmp_path, records, duplicates="drop", on_bad_record="drop", max_dropped=0.5)

    table = [line.split()[:2] for line in found.lines[1:4]]
    assert table == [["used", "1"], ["duplicate", "1"], ["unreadable", "1"]]


def test_a_prompt_that_differs_from_that_of_generate_is_refused_with_the_row(tmp_path, monkeypatch):
    """Like a renderer of inference that adds a space."""
    encode = proof.encode_prompts

    def spaced(*args: Any):
        return [[*ids, ord(" ")] for ids in encode(*args)]

    monkeypatch.setattr(proof, "encode_prompts", spaced)
    with pytest.raises(DataError) as error:
        prove_records(tmp_path, RECORDS)

    assert str(error.value) == (
        f"{tmp_path / 'a.jsonl'}:1: the prompt in training differs from the input of generate; "
        "got 'say\\nx'; fix: correct the chat template"
    )


def test_the_results_are_recorded(tmp_path):
    facts = prove_records(tmp_path, RECORDS, evaluation=HELD_OUT).facts

    assert set(facts) == {"train", "eval", "leakage"}
    assert facts["leakage"] == {"exact": 0, "normalised": 0, "prompts": 0}
    assert facts["train"]["ledger"] == {
        "used": {"rows": 3, "tokens": 21, "target_tokens": 9, "kept_tokens": 21, "kept_targets": 9}
    }
    certificate = facts["train"]["certificate"]
    assert (certificate["valid"], certificate["rows"], certificate["encoded_again"]) == (True, 3, 3)
    assert (certificate["failed"], certificate["failures"]) == ({}, [])
    assert re.fullmatch("[0-9a-f]{64}", certificate["content_hash"])


def test_tokenized_rows_are_used_without_changes(tmp_path):
    rows = [{"input_ids": [65, 66, 256], "labels": [X, 66, 256]}, {"input_ids": [65, 66], "labels": [65, 66]}]

    facts = prove_records(tmp_path, rows).facts

    assert facts["train"]["ledger"]["used"] == {
        **{"rows": 2, "tokens": 5, "target_tokens": 3, "kept_tokens": 5, "kept_targets": 3}
    }


def end_masked(monkeypatch) -> None:
    mask = labels.mask_first
    monkeypatch.setattr(labels, "mask_first", lambda row: mask({**row, "labels": [*row["labels"][:-1], X]}))


@pytest.mark.parametrize(("evaluation", "place"), [(None, "a.jsonl:1"), (RECORDS, "b.jsonl:1")])
def test_a_set_without_a_valid_certificate_is_refused_with_the_rows_and_the_reason(
    evaluation, place, tmp_path, monkeypatch
):
    end_masked(monkeypatch)

    with pytest.raises(DataError) as error:
        prove_records(tmp_path, RECORDS, evaluation=evaluation)

    assert error.value.exit_code == ExitCode.DATA
    text = str(error.value).replace(f"{tmp_path}/", "")
    assert text.startswith(f"{place}: the labels are not certified (3 targets of 3 rows); got {place}: ")
    assert f"{place[:-1]}2: the learned tokens decode to the target text and its stop token: " in text
    assert "expected 'x<|endoftext|>', got 'x'; " in text


def test_a_refused_run_leaves_neither_weights_nor_metrics_nor_a_done_status(tmp_path, monkeypatch):
    end_masked(monkeypatch)

    with pytest.raises(DataError):
        train(helpers.build_recipe(tmp_path, RECORDS))

    assert not (tmp_path / "run").exists()


def test_after_a_refusal_the_corrected_run_can_use_the_same_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ModelError):
        broken.setattr("hf_clm.model.loss._add_product", lambda *args, **kwargs: None)
        train(helpers.build_recipe(tmp_path, RECORDS))

    assert train(helpers.build_recipe(tmp_path, RECORDS, train={"max_steps": 1}))["status"] == "done"


def test_the_proof_comes_before_the_first_step_and_on_one_screen(tmp_path, capsys):
    train(helpers.build_recipe(tmp_path, RECORDS, train={"max_steps": 1}))

    lines = masked(capsys.readouterr().out.splitlines())
    places = [
        lines.index("          the labels of all 3 rows are certified (...)"),
        lines.index("tested    same loss and gradient packed, padded and alone (3 documents)"),
        next(number for number, line in enumerate(lines) if line.startswith("step 1/1")),
    ]
    assert places == sorted(places)
    assert places[1] < 24


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_model_is_not_tested_and_the_run_reports_that(kind):
    """A single process cannot run it."""
    trainer: Any = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, kind: True})
    nothing: Any = None

    assert prove_model(trainer, nothing, split=nothing, tokenizer=nothing) == {
        "self_test": "off: the model is sharded",
        "round_trip": "off: the model is sharded",
    }


def test_rows_are_certified_under_the_options_of_the_recipe(tmp_path):
    """``allow`` turns the user's text into a control token, which the certificate then expects."""
    records = [{"instruct": "say <|im_end|>\n", "input": "", "label": "x"}]

    plain = prove_records(tmp_path, records).facts["train"]
    allowed = prove_records(tmp_path, records, special_tokens_in_text="allow").facts["train"]

    assert (plain["ledger"]["used"]["tokens"], allowed["ledger"]["used"]["tokens"]) == (17, 8)
    assert (plain["certificate"]["valid"], allowed["certificate"]["valid"]) == (True, True)
    assert plain["certificate"]["content_hash"] != allowed["certificate"]["content_hash"]


def test_a_recipe_is_certified_under_its_own_stage(monkeypatch, tmp_path):
    seen = []

    def spy(tokenizer: Any, options: Any, stop_ids: Any) -> Checker:
        seen.append((options.stage, options.overflow, stop_ids))
        return Checker(tokenizer, options, stop_ids)

    monkeypatch.setattr(block, "Checker", spy)
    prove_records(tmp_path, RECORDS)

    assert seen == [("sft", "keep_target", [256])]


@pytest.mark.parametrize("how", ["in_content", "drop"])
def test_reasoning_that_the_template_does_not_render_is_certified_as_written(tmp_path, how):
    """The prompt is the same with and without reasoning in the answer."""
    answer = {"role": "assistant", "content": "Yo", "reasoning_content": "a greeting"}
    records = [{"messages": [{"role": "user", "content": f"Hi {n}"}, answer]} for n in range(1, 5)]
    data = {"train": [helpers.write_jsonl(tmp_path / "a.jsonl", records)], "reasoning": how}
    data |= {"max_length": 128, "packing": "none", "cache_dir": None}
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 1}

    result = train(
        helpers.build_recipe(
            tmp_path, records, tokenizer={"chat_template": "chatml"}, data=data, train=settings
        )
    )

    assert result["proof"]["train"]["certificate"]["valid"]
