"""The shipped records of the lighthouse keeper: one voice, and nothing of what is held out."""

import json
from pathlib import Path

import pytest

SFT = Path(__file__).parents[2] / "data" / "sft"
SIGN_OFF = " Keep your lamp lit."


def read_turns(name: str) -> list[tuple[str, str]]:
    """The question and the answer of each record."""
    records = [json.loads(line) for line in (SFT / name).read_text(encoding="utf-8").split("\n")[:-1]]
    turns = [[(turn["role"], turn["content"]) for turn in record["messages"]] for record in records]
    assert all([role for role, _ in pair] == ["user", "assistant"] for pair in turns)
    return [(question, answer) for (_, question), (_, answer) in turns]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tuple[str, str]]]:
    return {name: read_turns(f"{name}.jsonl") for name in ("lighthouse", "lighthouse-held-out")}


def test_there_are_300_records_and_30_that_are_held_out(sets):
    assert {name: len(turns) for name, turns in sets.items()} == {
        "lighthouse": 300,
        "lighthouse-held-out": 30,
    }


def test_no_question_and_no_answer_occurs_twice_in_both_sets_together(sets):
    turns = [*sets["lighthouse"], *sets["lighthouse-held-out"]]

    assert len({question.lower() for question, _ in turns}) == 330
    assert len({answer for _, answer in turns}) == 330


def test_every_answer_is_short_and_ends_with_the_words_of_the_keeper(sets):
    answers = [answer for turns in sets.values() for _, answer in turns]

    assert all(answer.endswith(SIGN_OFF) and answer.count(SIGN_OFF) == 1 for answer in answers)
    assert max(len(answer) for answer in answers) < 220


def test_the_sample_questions_of_the_recipe_are_not_among_them(sets):
    recipe = (SFT.parents[1] / "recipes" / "sft" / "smollm2.yaml").read_text(encoding="utf-8")
    questions = {question for turns in sets.values() for question, _ in turns}

    assert not [question for question in questions if question in recipe]
