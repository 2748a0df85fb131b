"""Padding is never a target, never attended to and never counted, whatever its id and width."""

import pytest
import torch
from helpers import EOS, PAD, X, tiny_model

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.evaluation.metrics import token_nll
from hf_clm.model.attention import NAME, register

# The text itself contains the end token and the pad token.
ROWS = [
    {"input_ids": [10, 11, EOS], "labels": [X, 11, EOS]},
    {"input_ids": [20, PAD, 21, 22, 23, 24, EOS], "labels": [X, PAD, 21, 22, 23, 24, EOS]},
]


@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("pad", "multiple"), [(PAD, 1), (PAD, 64), (EOS, 1), (0, 8), (22, 16)])
def test_id_and_width_of_the_padding_do_not_change_the_loss(attention, kind, pad, multiple):
    register()
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    alone = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        alone.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist())

    batch = DataCollatorForCausalLM(pad, pad_to_multiple_of=multiple)(ROWS)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    nll = token_nll(logits, batch["labels"])

    assert int((batch["labels"][:, 1:] != -100).sum()) == 8
    assert nll[0, :2].tolist() == pytest.approx(alone[0], abs=1e-5)
    assert nll[1, :6].tolist() == pytest.approx(alone[1], abs=1e-5)
    assert float(nll[0, 2:].abs().sum() + nll[1, 6:].abs().sum()) == 0.0


def test_no_gradient_reaches_the_padding():
    register()
    model = tiny_model("gpt2", tie_word_embeddings=False)
    model.set_attn_implementation(NAME)
    batch = DataCollatorForCausalLM(99, pad_to_multiple_of=16)(ROWS)

    model(**batch, use_cache=False).loss.backward()

    gradient = model.get_input_embeddings().weight.grad.abs().sum(dim=1)
    assert gradient[99] == 0.0
    assert gradient[PAD] > 0.0  # the pad token in the text
