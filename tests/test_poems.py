"""`make sft`, and the effect of the loss mask: the same recipe for SFT and for pretraining.

Uses the first six poems, or all of them as in the README in the large variant.
"""

import json
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import load_run
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.recipe.recipe import load_recipe
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[1]
POEMS = [json.loads(line) for line in (ROOT / "data/sft/poems.jsonl").read_text("utf-8").splitlines()]
FEW = ["--max_steps", "150"]  # enough for six poems
MOST = {6: 3, 48: 44}  # how many answers must be right at least, by the number of poems


@pytest.fixture(scope="module", params=[6, pytest.param(48, marks=pytest.mark.large)])
def poems(request) -> list[dict[str, str]]:
    return POEMS[: request.param]


@pytest.fixture(scope="module")
def answers(poems, tmp_path_factory):
    """Stage -> the model's answers to instruct and input, and to instruct alone."""
    folder = tmp_path_factory.mktemp("poems")
    return {stage: _train_and_ask(str(folder / stage), stage, poems) for stage in ("sft", "pretrain")}


def _train_and_ask(folder: str, stage: str, poems: list[dict[str, str]]):
    words = ["--stage", stage, "--output_dir", folder, "--logging_steps", "200"]
    words += ["--doctor.round_trip", "off", *(FEW if len(poems) < len(POEMS) else ())]
    source = {"path": str(ROOT / "data/sft/poems.jsonl"), "format": "instruct", "limit": len(poems)}
    words += ["--data.train", json.dumps([source])]
    train(load_recipe(ROOT / "recipes/sft/poems.yaml", words))
    run = load_run(folder)
    turns = {"has_turns": run.has_turns}
    whole = [to_prompt_example(p["instruct"], "instruct", input_text=p["input"], **turns) for p in poems]
    alone = [to_prompt_example(p["instruct"], "instruct", **turns) for p in poems]
    options = {"decoding": Decoding(100)}
    return [generate(run.model, run.tokenizer, prompts=prompts, **options) for prompts in (whole, alone)]


def test_there_are_48_poems():
    assert len(POEMS) == 48


@pytest.mark.slow
def test_sft_memorises_every_label_and_stops(poems, answers):
    whole, _ = answers["sft"]

    assert [answer.text for answer in whole] == [poem["label"] for poem in poems]
    assert all(answer.stopped for answer in whole)


@pytest.mark.slow
def test_sft_given_the_instruction_alone_answers_with_the_label_and_never_with_the_input(poems, answers):
    """It has not seen this prompt. Not every label must be right, but it must never answer with an input."""
    _, alone = answers["sft"]
    nearest = [_nearest(answer.text) for answer in alone]

    assert {kind for kind, _ in nearest} == {"label"}
    assert not [
        answer.text for answer, poem in zip(alone, poems, strict=True) if poem["input"].strip() in answer.text
    ]
    assert sum(number == own for own, (_, number) in enumerate(nearest)) >= MOST[len(poems)]


@pytest.mark.slow
def test_pretraining_given_the_instruction_alone_continues_with_the_input(poems, answers):
    whole, alone = answers["pretrain"]
    continues = [answer.text.startswith(poem["input"]) for answer, poem in zip(alone, poems, strict=True)]

    assert sum(continues) >= MOST[len(poems)]
    right = sum(answer.text == poem["label"] for answer, poem in zip(whole, poems, strict=True))
    assert right >= MOST[len(poems)]


def _nearest(text: str) -> tuple[str, int]:
    """Returns which half of which poem is most similar to a text."""
    halves = [(kind, number) for number in range(len(POEMS)) for kind in ("label", "input")]
    return max(halves, key=lambda half: SequenceMatcher(None, text, POEMS[half[1]][half[0]]).ratio())
