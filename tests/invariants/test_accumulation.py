"""A batch of 8, 2 x 4 and 4 x 2 rows give the same step, even if rows have unequal numbers of targets."""

import pytest
import torch
from helpers import X, tiny_model
from transformers import TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.model.attention import NAME, register
from hf_clm.training.trainer import CLMTrainer

# 24 rows with 1 to 70 targets: a mean of means would be far off.
ROWS = [
    {
        "input_ids": [5, 6] + [(7 * n + i) % 250 for i in range(3 * n + 1)],
        "labels": [X, X] + [(n + i) % 250 for i in range(3 * n + 1)],
    }
    for n in range(24)
]


# The load-balancing loss is as large as that of the tokens: counting it 8 times would be noticed.
MODELS = {"qwen2": {}, "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 1.0}}


def three_steps(
    folder, *, batch: int, accumulation: int, packed: bool, kind: str
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    register()
    model = tiny_model(kind, **MODELS[kind])
    model.set_attn_implementation(NAME if packed else "sdpa")
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    collator = DataCollatorForPackedCausalLM() if packed else DataCollatorForCausalLM(257)
    trainer = CLMTrainer(model, arguments, data_collator=collator, train_dataset=ROWS)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], model.state_dict()


@pytest.mark.parametrize(("packed", "kind"), [(False, "qwen2"), (True, "mixtral")])
def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(tmp_path, packed, kind):
    whole, weights = three_steps(tmp_path, batch=8, accumulation=1, packed=packed, kind=kind)

    for batch, accumulation in [(2, 4), (4, 2), (1, 8)]:
        logs, others = three_steps(tmp_path, batch=batch, accumulation=accumulation, packed=packed, kind=kind)
        for key in ("loss", "grad_norm"):
            assert [log[key] for log in logs] == pytest.approx([log[key] for log in whole], rel=1e-5)
        for key in ("tokens_seen", "target_tokens_seen", "token_accuracy", "learning_rate"):
            assert [log[key] for log in logs] == [log[key] for log in whole]
        for name, weight in weights.items():
            assert torch.allclose(others[name], weight, rtol=1e-5, atol=1e-5), name
    assert whole[2]["target_tokens_seen"] == 852  # 1 + 4 + ... + 70
