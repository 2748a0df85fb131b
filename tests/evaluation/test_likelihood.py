"""Likelihood, compared with sums computed by hand."""

import math

import numpy as np
import pytest
import torch
from helpers import EOS, X, byte_tokenizer, document, prompted, tiny_model

from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.evaluation.likelihood import Likelihood, measure_likelihood, target_kinds
from hf_clm.model.attention import NAME, register
from hf_clm.schema import Chat, Document, Segment

EXAMPLES = [prompted("ab", "cd"), prompted("a", "é"), prompted("abcdefgh", "ijklmnop")]


def packed_model():
    register()
    model = tiny_model()
    model.set_attn_implementation(NAME)
    return model


def nll_by_hand(texts: list[tuple[bytes, bytes]]) -> float:
    """Returns the summed nll of all target bytes and end tokens."""
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

    result = measure_likelihood(packed_model(), byte_tokenizer(), dataset=dataset, batch_size=batch_size)

    assert result.tokens.tolist() == [[1, 1, 1], [1, 1, 1], [1, 7, 1]]  # first, content, stop
    assert result.text_bytes.tolist() == [2, 2, 8]
    by_hand = nll_by_hand([(b"ab", b"cd"), (b"a", "é".encode()), (b"abcdefgh", b"ijklmnop")])
    assert result.nll.sum() == pytest.approx(by_hand, rel=1e-6)
    assert result.row_losses[1] == pytest.approx(nll_by_hand([(b"a", "é".encode())]) / 3, rel=1e-5)


def test_pretraining_counts_the_complete_text():
    dataset = PretrainDataset([document("abc"), prompted("d", "e")], byte_tokenizer(), max_length=32)

    result = measure_likelihood(packed_model(), byte_tokenizer(), dataset=dataset)

    assert result.tokens.tolist() == [[1, 1, 1], [1, 0, 1]]  # b, c, end; e, end
    assert result.nll.sum() == pytest.approx(nll_by_hand([(b"a", b"bc"), (b"d", b"e")]), rel=1e-6)


def test_means_are_computed_over_all_targets():
    """Two rows with one first token, zero or one content token, and one stop token."""
    nll = np.array([[2.0, 0.0, 1.0], [1.0, 3.0, 1.0]]) * math.log(2)
    counts = np.array([[1, 0, 1], [1, 1, 1]])
    result = Likelihood(nll, counts, np.array([1, 3]), np.array([1, 3]))

    assert result.to_json() == {
        "rows": 2,
        "target_tokens": 5,
        "loss": pytest.approx(8 / 5 * math.log(2)),
        "perplexity": pytest.approx(2**1.6),
        "bits_per_byte": pytest.approx(2.0),
        "token_accuracy": 0.8,
        "loss_first": pytest.approx(1.5 * math.log(2)),
        "loss_content": pytest.approx(3 * math.log(2)),
        "loss_stop": pytest.approx(math.log(2)),
    }
    assert "loss_content" not in result.select(np.array([0])).to_json()
    assert result.select(np.array([False, False])).to_json() == {"rows": 0, "target_tokens": 0}


@pytest.mark.parametrize(
    ("labels", "kinds"),
    [
        ([X, X, 65, 66, 67, EOS], ["first", "content", "content", "stop"]),
        ([X, 65, EOS, X, 66, EOS], ["first", "stop", "first", "stop"]),
        ([X, X, EOS], ["stop"]),  # an empty answer
        ([X, 65, EOS, 66, 67], ["first", "content", "content", "content"]),  # a stop token in the text; cut
        ([X, X, 65], ["first"]),
    ],
)
def test_the_kind_of_a_target_token_depends_on_its_position(labels, kinds):
    result = target_kinds(np.array(labels), [EOS])

    assert [("first", "content", "stop")[kind] for kind in result] == kinds


def test_the_question_of_a_chat_is_all_but_its_last_turn():
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}

    assert Chat([user, assistant]).question == (Chat([user]), "ho")
    assert Chat([user, assistant, user]).question is None
    assert Document([Segment("a", 1)]).question is None
