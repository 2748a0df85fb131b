"""Likelihood and exact match, against sums and answers written out here."""

import math

import pytest
import torch
from helpers import EOS, byte_tokenizer, tiny_model

from hf_clm.attention import NAME, register
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.evaluation.evaluate import Answers, Likelihood, measure_answers, measure_likelihood, to_question
from hf_clm.generation.generate import Generated
from hf_clm.schema import ChatExample, PromptExample, Segment, SegmentsExample, TextExample

EXAMPLES = [PromptExample("ab", "cd"), PromptExample("a", "é"), PromptExample("abcdefgh", "ijklmnop")]


def packed_model():
    register()
    model = tiny_model()
    model.set_attn_implementation(NAME)
    return model


def nll_by_hand(texts: list[tuple[bytes, bytes]]) -> float:
    """Of every target byte and the end token after them."""
    model, total = tiny_model(), 0.0
    for prompt, target in texts:
        ids = [*prompt, *target, EOS]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(ids[len(prompt) :])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").detach())
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_likelihood_is_the_sum_over_targets_for_any_batch_size(batch_size):
    dataset = SFTDataset(EXAMPLES, byte_tokenizer(), max_length=32)

    found = measure_likelihood(packed_model(), byte_tokenizer(), dataset=dataset, batch_size=batch_size)

    assert (found.rows, found.target_tokens, found.text_bytes) == (
        3,
        15,
        12,
    )  # cd, é (2 bytes), 8 letters, 3 ends
    by_hand = nll_by_hand([(b"ab", b"cd"), (b"a", "é".encode()), (b"abcdefgh", b"ijklmnop")])
    assert found.nll == pytest.approx(by_hand, rel=1e-6)


def test_a_pretraining_set_counts_the_whole_text():
    dataset = PretrainDataset([TextExample("abc"), PromptExample("d", "e")], byte_tokenizer(), max_length=32)

    found = measure_likelihood(packed_model(), byte_tokenizer(), dataset=dataset)

    assert (found.rows, found.target_tokens) == (2, 5)  # b, c, end; e, end
    assert found.nll == pytest.approx(nll_by_hand([(b"a", b"bc"), (b"d", b"e")]), rel=1e-6)


def test_the_figures_are_divided_once():
    figures = Likelihood(
        rows=2, target_tokens=4, correct_tokens=3, nll=8 * math.log(2), text_bytes=2
    ).to_json()

    assert figures == {
        "rows": 2,
        "target_tokens": 4,
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(4.0),
        "token_accuracy": 0.75,
    }


def test_an_answer_is_exact_if_it_equals_the_target_and_stops(monkeypatch):
    asked = []

    def answers(model, tokenizer, *, prompts, **options):
        asked.extend(prompts)
        return [Generated("cd", 2, True), Generated("é", 1, False), Generated("ijk", 3, True)]

    monkeypatch.setattr("hf_clm.evaluation.evaluate.generate", answers)

    found = measure_answers(tiny_model(), byte_tokenizer(), examples=[*EXAMPLES, TextExample("no question")])

    assert asked == [PromptExample("ab", ""), PromptExample("a", ""), PromptExample("abcdefgh", "")]
    assert found == Answers(asked=3, exact=1, stopped=2)
    assert found.to_json() == {"asked": 3, "exact_match": 1 / 3, "stopped": 2 / 3}


def test_documents_ask_nothing():
    assert measure_answers(tiny_model(), byte_tokenizer(), examples=[TextExample("a")]) is None


def test_the_question_of_a_chat_is_all_but_its_last_turn():
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}

    assert to_question(ChatExample([user, assistant])) == (ChatExample([user]), "ho")
    assert to_question(ChatExample([user, assistant, user])) is None
    assert to_question(SegmentsExample([Segment("a", True)])) is None
