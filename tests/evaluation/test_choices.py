"""Choices, compared with plain transformers and with tables computed by hand."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, byte_tokenizer, document, prompted, save_folder, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM

from hf_clm.cli import main
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError, ModelError, RecipeError
from hf_clm.evaluation.choices import (
    Verdicts,
    choice_rows,
    find_expected,
    measure_choices,
    to_choices,
    with_answer,
)
from hf_clm.evaluation.evaluate import evaluate_run
from hf_clm.model.attention import NAME, register
from hf_clm.recipe.recipe import load_recipe
from hf_clm.schema import Chat, Document, Segment, Tokens
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.run import train

CHOICES = ["yes", "no", "maybe"]
PROMPTS = ["Is it?", "a", "Does the lamp turn at night? Answer:"]


def packed_model(**settings):
    register()
    model = tiny_model(**settings)
    model.set_attn_implementation(NAME)
    return model


def read_examples(examples) -> Examples:
    return Examples(examples, [f"a.jsonl:{number}" for number in range(1, len(examples) + 1)])


def to_rows(examples, *, choices=CHOICES, max_length=64, tokenizer=None):
    settings = {"max_length": max_length, "special_tokens_in_text": "encode_as_text"}
    return choice_rows(read_examples(examples), tokenizer or byte_tokenizer(), choices=choices, **settings)


def log_probabilities(prompt: bytes, choice: bytes) -> list[float]:
    """Returns the log-probabilities of the choice's bytes and the end token, each given all before it."""
    model, ids, result = tiny_model(), [*prompt], []
    for token in [*choice, EOS]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        result.append(float(torch.log_softmax(logits, dim=-1)[token]))
        ids.append(token)
    return result


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_score_is_the_sum_over_the_tokens_of_the_choice_and_its_stop_token(batch_size):
    rows = to_rows([prompted(prompt, "yes") for prompt in PROMPTS])

    result = measure_choices(packed_model(), rows, choices=3, by="sum", batch_size=batch_size)

    by_hand = [[sum(log_probabilities(p.encode(), c.encode())) for c in CHOICES] for p in PROMPTS]
    assert result.shape == (3, 3)
    assert result == pytest.approx(np.array(by_hand), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_score_can_be_the_mean_over_the_tokens(batch_size):
    rows = to_rows([prompted("Is it?", "yes")])

    result = measure_choices(packed_model(), rows, choices=3, by="mean", batch_size=batch_size)

    by_hand = [
        sum(log_probabilities(b"Is it?", choice.encode())) / count
        for choice, count in zip(CHOICES, (4, 3, 6), strict=True)
    ]
    assert result[0].tolist() == pytest.approx(by_hand, rel=1e-5)


def test_a_model_that_computes_all_logits_gives_the_same_scores(monkeypatch):
    rows = to_rows([prompted(prompt, "yes") for prompt in PROMPTS])
    result = measure_choices(packed_model(), rows, choices=3, by="sum", batch_size=4)
    monkeypatch.setattr("hf_clm.evaluation.likelihood.takes_targets", lambda model: False)

    assert measure_choices(packed_model(), rows, choices=3, by="sum", batch_size=4) == pytest.approx(result)


def test_nan_log_probabilities_are_an_error():
    model = packed_model()
    torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))

    with pytest.raises(ModelError, match="--choices: the model's log-probabilities are NaN"):
        measure_choices(model, to_rows([prompted("a", "yes")]), choices=3, by="sum", batch_size=4)


def test_a_choice_replaces_the_column_of_a_template_and_keeps_the_text_around_it():
    own = {"weight": 1, "is_own": True}
    prompt = [Segment("Lamp?", False), Segment(" A:", False, is_own=True)]
    example = Document([*prompt, Segment(" ", **own), Segment("no", True), Segment(".", **own)])

    rows = to_rows([example], choices=["no", "yes"])

    assert find_expected(read_examples([example]), ["yes", "no"]).tolist() == [1]
    assert [bytes(i for i in row["input_ids"] if i < 256) for row in rows] == [
        b"Lamp? A: no.",
        b"Lamp? A: yes.",
    ]
    assert [[label for label in row["labels"] if label >= 0] for row in rows] == [
        [*b" no.", EOS],
        [*b" yes.", EOS],
    ]


def test_choices_replace_the_last_turn_of_a_chat_and_the_last_target_of_segments():
    chat = Chat(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "no"},
        ]
    )
    segments = Document([Segment("a", False), Segment("b", True), Segment("c", False), Segment("no", True)])
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    model = packed_model(max_position_embeddings=512)

    rows = to_rows([chat, segments], choices=["no", "yes"], max_length=400, tokenizer=tokenizer)
    result = measure_choices(model, rows, choices=2, by="sum", batch_size=8)

    assert [sum(label >= 0 for label in row["labels"]) for row in rows] == [3, 4, 3, 4]
    assert result[1].tolist() == pytest.approx(
        [sum(log_probabilities(b"abc", b"no")), sum(log_probabilities(b"abc", b"yes"))], rel=1e-5
    )
    assert with_answer(chat, "yes") == Chat([*chat.messages[:-1], {"role": "assistant", "content": "yes"}])


def test_a_long_prompt_is_truncated_equally_for_all_choices():
    rows = to_rows([prompted("0123456789", "yes")], choices=["yes", "no"], max_length=8)

    assert [row["input_ids"] for row in rows] == [[*b"6789yes", EOS], [*b"6789no", EOS]]


def test_choices_that_leave_no_room_for_a_prompt_are_an_error():
    with pytest.raises(
        DataError, match=r"^a.jsonl:1: the choices leave no room for the prompt within 4 tokens"
    ):
        to_rows([prompted("ab", "yes")], choices=["yes", "no"], max_length=4)


@pytest.mark.parametrize("text", ["yes", "", "yes,", "yes,yes", "yes, "])
def test_fewer_than_two_choices_are_rejected(text):
    with pytest.raises(RecipeError, match="--choices: expected two or more different choices; got"):
        to_choices(text)


def test_a_completion_that_is_not_a_choice_is_reported_with_its_line():
    examples = read_examples([prompted("a", "yes"), prompted("a", "maybe")])

    with pytest.raises(DataError) as error:
        find_expected(examples, ["yes", "no"])

    assert str(error.value) == (
        "a.jsonl:2: the completion is not one of the choices 'yes', 'no'; got 'maybe'; "
        "fix: add it to --choices"
    )


@pytest.mark.parametrize(
    "example",
    [document("a"), prompted("", "yes"), Tokens([1, 2], [-100, 2], [2])],
    ids=["document", "no prompt", "tokenized"],
)
def test_a_record_without_prompt_and_completion_is_an_error(example):
    with pytest.raises(DataError, match=r"^a.jsonl:1: the example has no prompt and completion"):
        find_expected(read_examples([example]), ["yes", "no"])


def test_a_completion_with_two_columns_is_an_error():
    own = Segment(" and ", True, is_own=True)
    example = Document([Segment("a", False), Segment("b", True), own, Segment("c", True)])

    with pytest.raises(RecipeError, match="a choice cannot replace several columns of a completion"):
        find_expected(read_examples([example]), ["b", "c"])


def to_verdicts(choices: str, expected: str, chosen: str) -> Verdicts:
    """Builds verdicts from one letter per choice and one per example."""
    scores = [[0.0 if choice == one else -1.0 for choice in choices] for one in chosen]
    return Verdicts([*choices], np.array([choices.index(one) for one in expected]), np.array(scores))


def test_with_two_choices_the_first_is_the_positive_class():
    """Correct: 2 of 3 y, 1 of 2 n. F1 of y: 2 * 2 / (2 * 2 + 1 + 1)."""
    result = to_verdicts("yn", "yyynn", "yynyn").to_json()

    assert result == {
        "accuracy": 0.6,
        "majority": 0.6,
        "f1": pytest.approx(2 / 3),
        "f1_of": "y",
        "confusion": {"y": {"y": 2, "n": 1}, "n": {"y": 1, "n": 1}},
    }


def test_with_more_choices_f1_is_the_macro_average():
    """F1 of a: 2 / (2 + 0 + 1), of b: 2 / (2 + 1 + 0), of c, which never occurs: 0."""
    result = to_verdicts("abc", "aab", "abb").to_json()

    assert (result["f1"], result["f1_of"]) == (pytest.approx(4 / 9), "macro")


# --- a run

TEMPLATE = """\
stage: sft
model: {init: scratch, config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64}}
tokenizer: {name_or_path: letters}
data:
  train:
    - path: train.tsv
      template: {prompt: "{first} {second}\\nPlant?", completion: " {label}", labels: {0: no, 1: yes}}
  max_length: 64
doctor: {round_trip: "off", self_test: false}
train:
  {output_dir: run, max_steps: 60, learning_rate: 1.0e-2, per_device_train_batch_size: 8, use_cpu: true,
   bf16: false, save_strategy: "no", logging_steps: 60, eval_on_start: false}
"""
WORDS = ["tree", "boat", "moss", "gate"]
PAIRS = [(first, second, int(first in ("tree", "moss"))) for first in WORDS for second in WORDS]  # 8 of each


def write_pairs(path, pairs) -> str:
    lines = ["first\tsecond\tlabel", *("\t".join(map(str, pair)) for pair in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that learned whether the first of two words is a plant."""
    folder = tmp_path_factory.mktemp("choices")
    byte_tokenizer().save_pretrained(folder / "letters")
    write_pairs(folder / "train.tsv", PAIRS)
    (folder / "recipe.yaml").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("recipe.yaml"))
    return folder


def to_options(folder, *data: str, **changes) -> Namespace:
    values = {
        "run": str(folder / "run"),
        "data": list(data),
        "format": None,
        "stage": None,
        "max_length": None,
    }
    values |= {"batch_size": 8, "choices": "yes,no", "choices_by": "sum", "max_new_tokens": 4}
    values |= {"generate": False, "no_generate": True, "before": None, "device": "cpu", "dtype": None}
    return Namespace(**values | changes)


def test_a_small_model_learns_yes_and_no(folder):
    result = evaluate_run(to_options(folder, str(folder / "train.tsv"))).to_json()

    assert (result["accuracy"], result["majority"], result["f1"], result["f1_of"]) == (1.0, 0.5, 1.0, "yes")
    assert result["confusion"] == {"yes": {"yes": 8, "no": 0}, "no": {"yes": 0, "no": 8}}
    assert result["token_accuracy"] == 1.0


def test_the_command_agrees_with_plain_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "run").eval()
    result = evaluate_run(to_options(folder, str(folder / "train.tsv")))

    assert result.verdicts is not None
    for number in (0, 1, 7):
        first, second, _ = PAIRS[number]
        prompt = [*f"{first} {second}\nPlant?".encode()]
        for choice, score in zip((b" yes", b" no"), result.verdicts.scores[number].tolist(), strict=True):
            ids = torch.tensor([[*prompt, *choice, EOS]])
            labels = torch.tensor([[-100] * len(prompt) + [*choice, EOS]])
            with torch.no_grad():
                loss = float(model(input_ids=ids, labels=labels).loss)
            assert score == pytest.approx(-loss * (len(choice) + 1), rel=1e-4, abs=1e-5)


def test_metrics_are_listed_per_file_and_over_all_files(folder, capsys):
    right = write_pairs(folder / "right.tsv", PAIRS[2:6])
    wrong = write_pairs(
        folder / "wrong.tsv", [(first, second, 1 - label) for first, second, label in PAIRS[:4]]
    )
    words = ["evaluate", str(folder / "run"), right, wrong, "--choices", "yes,no", "--device", "cpu"]

    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert (result["examples"], result["accuracy"]) == (8, 0.5)
    assert {file: (own["examples"], own["accuracy"]) for file, own in result["sources"].items()} == {
        right: (4, 1.0),
        wrong: (4, 0.0),
    }
    assert result["loss"] == pytest.approx(
        sum(own["loss"] for own in result["sources"].values()) / 2, rel=0.2
    )
    assert ["is", "yes", "2", "0"] in lines and ["is", "no", "4", "2"] in lines
    assert [line[0] for line in lines[-3:]] == ["file", right, wrong]


def test_an_unknown_label_is_an_error_before_the_model_is_loaded(folder, capsys):
    words = ["evaluate", str(folder / "run"), str(folder / "train.tsv"), "--choices", "yes,nope"]

    assert main(words) == 3
    output = capsys.readouterr().err
    assert "train.tsv: record 5: the completion is not one of the choices 'yes', 'nope'; got 'no'" in output
    assert "did you mean 'nope'?" in output


def test_completions_are_compared_verbatim_for_a_model_without_a_format(tmp_path, capsys):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    rows = [{"prompt": "a:", "completion": " yes"}, {"prompt": "b:", "completion": " no"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    assert main(["evaluate", folder, path, "--choices", " yes, no", "--device", "cpu", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert sum(sum(row.values()) for row in result["confusion"].values()) == 2
    assert math.isfinite(result["loss"]) and PAD != EOS
