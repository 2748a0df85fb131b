"""Metrics that a reader can check with a pocket calculator."""

import math

import numpy as np
import pytest
import torch
from helpers import X

from hf_clm.evaluation.metrics import bits_per_byte, logit_figures, perplexity, token_nll, unigram_entropy

# Two tokens, A = 0 and B = 1; each row of logits gives A or B three times the probability of the other.
A, B = [math.log(3.0), 0.0], [0.0, math.log(3.0)]


def test_logits_are_compared_with_the_label_that_follows():
    logits = torch.tensor([[A, B, A, B]])  # predicts: 0 1 0, and what would come next
    labels = torch.tensor([[X, 0, 0, 0]])

    assert logit_figures(logits, labels).correct.tolist() == [[True, False, True]]
    assert token_nll(logits, labels)[0].tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), math.log(4 / 3)]
    )


def test_tokens_without_a_label_do_not_count():
    logits = torch.tensor([[A, B, A], [A, A, A]])
    labels = torch.tensor([[0, X, 0], [X, X, X]])

    assert logit_figures(logits, labels).is_target.tolist() == [[False, True], [False, False]]
    assert token_nll(logits, labels).tolist() == [pytest.approx([0.0, math.log(4)]), [0.0, 0.0]]


def test_chunks_do_not_change_the_result(monkeypatch):
    logits, labels = torch.tensor([[A, B, A, A, B, B]]), torch.tensor([[X, 1, 0, X, 1, 0]])
    whole = token_nll(logits, labels).tolist()
    monkeypatch.setattr("hf_clm.evaluation.metrics.NLL_CHUNK_TOKENS", 2)

    assert token_nll(logits, labels).tolist() == whole


def test_half_precision_logits_are_summed_in_float32():
    nll = token_nll(torch.tensor([[A, B]], dtype=torch.bfloat16), torch.tensor([[X, 0]]))

    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(math.log(4 / 3), abs=1e-2)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([0, 4], 0.0),
        ([0, 2, 2], math.log(2)),
        ([1, 1, 1, 1], math.log(4)),
        ([0, 2, 0, 1], math.log(3) - 2 / 3 * math.log(2)),
        ([], 0.0),
    ],
)
def test_unigram_entropy_is_the_entropy_of_the_label_frequencies(counts, entropy):
    assert unigram_entropy(np.array(counts, dtype=np.int64)) == pytest.approx(entropy)


def test_bits_per_byte_turns_nats_into_bits():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


@pytest.mark.parametrize(("loss", "value"), [(0.0, 1.0), (math.log(260), 260.0), (1000.0, math.inf)])
def test_perplexity_is_the_exponential_of_the_loss(loss, value):
    assert perplexity(loss) == pytest.approx(value)
