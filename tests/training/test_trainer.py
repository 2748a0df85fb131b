"""CLMTrainer on rows that are written by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import X, tiny_model
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.errors import DivergedError, ExitCode
from hf_clm.model.flops import FlopCount
from hf_clm.training.finite import FiniteGuard
from hf_clm.training.trainer import CLMTrainer

ROWS = [
    {"input_ids": [1, 0, 0, 2], "labels": [X, 0, 0, 2]},
    {"input_ids": [3, 0], "labels": [X, 0]},
]


def build_trainer(folder: Path, model: PreTrainedModel, rows: list[dict], **settings: Any) -> CLMTrainer:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 1,
    }
    defaults |= {"remove_unused_columns": False, "disable_tqdm": True, "logging_nan_inf_filter": False}
    arguments = TrainingArguments(str(folder), **(defaults | settings))
    return CLMTrainer(
        model, arguments, data_collator=DataCollatorForCausalLM(257), train_dataset=rows, eval_dataset=rows
    )


def model_that_predicts_id_0(kind: str = "qwen2") -> PreTrainedModel:
    """All logits are 0, so the loss is ln 260 at every token, and argmax is id 0."""
    model = tiny_model(kind, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


def first_log(trainer: CLMTrainer) -> dict[str, float]:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_log_event_counts_tokens_targets_and_correct_predictions(tmp_path):
    trainer = build_trainer(tmp_path, model_that_predicts_id_0(), ROWS, per_device_train_batch_size=2)

    log = first_log(trainer)

    assert log["loss"] == pytest.approx(5.560682, abs=1e-5)  # ln 260
    assert log["token_accuracy"] == 0.75  # 0, 0 and 0 of 0, 0, 2 and 0
    assert (log["tokens_seen"], log["target_tokens_seen"]) == (6, 4)  # 2 of the 8 places are padding
    assert log["tokens_per_second"] > 0


def test_gradient_accumulation_counts_every_micro_step(tmp_path):
    trainer = build_trainer(
        tmp_path,
        model_that_predicts_id_0(),
        ROWS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )

    log = first_log(trainer)

    assert (log["token_accuracy"], log["tokens_seen"], log["target_tokens_seen"]) == (0.75, 6, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("collator", [DataCollatorForCausalLM(257), DataCollatorForPackedCausalLM()])
def test_evaluation_weights_all_targets_equally_for_any_batch_size(tmp_path, batch_size, collator):
    """Rows have 1 to 8 targets. The expected sum is computed one row at a time."""
    rows = [{"input_ids": [9] * 3 + [n] * n, "labels": [X] * 3 + [n] * n} for n in range(1, 9)]
    model = tiny_model()
    nll, right = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 2:-1].detach()
        targets = torch.tensor(row["labels"][3:])
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
    if isinstance(collator, DataCollatorForPackedCausalLM):
        from hf_clm.model.attention import NAME, register

        register()
        model.set_attn_implementation(NAME)
    trainer = build_trainer(tmp_path, model, rows, per_device_eval_batch_size=batch_size)
    trainer.data_collator = collator

    metrics = trainer.evaluate()

    assert metrics["eval_target_tokens"] == 36
    assert metrics["eval_loss"] == pytest.approx(nll / 36, abs=1e-6)
    assert metrics["eval_token_accuracy"] == right / 36


def test_predictions_are_not_kept_and_the_prefix_is_applied(tmp_path):
    trainer = build_trainer(tmp_path, model_that_predicts_id_0(), ROWS)

    metrics = trainer.evaluate(metric_key_prefix="test")

    assert metrics["test_loss"] == pytest.approx(5.560682, abs=1e-5)
    assert metrics["test_token_accuracy"] == 0.75
    assert metrics["test_target_tokens"] == 4


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append({name: value.clone() for name, value in model.state_dict().items()})


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    """At this rate, the first step spoils the weights. The second has a non-finite loss and is not made."""
    weights = Weights()
    trainer = build_trainer(tmp_path, tiny_model(), ROWS, learning_rate=1e30, max_steps=5)
    trainer.add_callback(weights)

    with pytest.raises(DivergedError) as error:
        trainer.train()

    assert error.value.exit_code == ExitCode.DIVERGED
    assert str(error.value).startswith(
        "step 2: the loss or its gradient is not finite; no weight was updated"
    )
    assert "learning rate 8e+29" in str(error.value)  # linear decay: 4 of 5 steps are left
    assert len(weights.after) == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, weights.after[0][name]), name


def spoil_gradient(model: PreTrainedModel, *, step: int) -> None:
    """Makes the gradients of one step NaN. A backward pass is a step."""
    passes = iter(range(1, 100))
    weight = model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: gradient * (math.nan if next(passes) == step else 1.0))


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_on_a_gpu_a_step_is_checked_during_the_next_and_nothing_is_saved_in_between(
    tmp_path, monkeypatch, strategy
):
    """Fused AdamW skips the update of step 3. The run stops in step 4, or before the checkpoint of step 3."""
    monkeypatch.setattr(
        "hf_clm.training.trainer.FiniteGuard", lambda device, defers: FiniteGuard(device, defers=True)
    )
    weights, model = Weights(), tiny_model()
    spoil_gradient(model, step=3)
    every = {"save_strategy": strategy, "save_steps": 1, "logging_steps": 100, "max_steps": 5}
    trainer = build_trainer(tmp_path, model, ROWS, **every)
    trainer.add_callback(weights)

    with pytest.raises(DivergedError) as error:
        trainer.train()

    assert str(error.value).startswith("step 3: the loss or its gradient is not finite; the last checkpoint")
    assert len(weights.after) == 3
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights.after[1][name]), name
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == (["checkpoint-1", "checkpoint-2"] if strategy == "steps" else [])


def test_the_checks_of_a_gpu_change_no_weight_of_a_finite_run(tmp_path, monkeypatch):
    expected = build_trainer(tmp_path / "cpu", tiny_model(), ROWS, max_steps=4)
    expected.train()
    monkeypatch.setattr(
        "hf_clm.training.trainer.FiniteGuard", lambda device, defers: FiniteGuard(device, defers=True)
    )
    trainer = build_trainer(tmp_path / "gpu", tiny_model(), ROWS, max_steps=4)
    trainer.train()

    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_found_at_the_first_step(tmp_path, value):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 7] = value

    with pytest.raises(DivergedError) as error:
        build_trainer(tmp_path, model, ROWS).train()

    assert str(error.value).startswith("step 1: ")


def test_a_non_finite_gradient_of_a_finite_loss_is_found(tmp_path):
    model = tiny_model()
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(DivergedError) as error:
        build_trainer(tmp_path, model, ROWS).train()

    assert "gradient norm nan" in str(error.value)


def test_non_finite_values_are_found_without_clipping(tmp_path):
    model = tiny_model()
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(DivergedError):
        build_trainer(tmp_path, model, ROWS, max_grad_norm=0.0).train()


def test_a_saved_model_uses_its_kv_cache_and_a_trained_one_does_not(tmp_path):
    trainer = build_trainer(tmp_path, tiny_model(), ROWS, save_strategy="steps", save_steps=1, max_steps=2)

    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path / "final"):
        assert '"use_cache": true' in (folder / "config.json").read_text()
        assert not (folder / "training_args.bin").exists()
    assert trainer.model.config.use_cache is False


def test_time_spent_elsewhere_is_not_counted_as_training(tmp_path, monkeypatch):
    clock = iter([100.0, 105.0, 107.0, 110.0])
    trainer = build_trainer(tmp_path, tiny_model(), ROWS)
    monkeypatch.setattr("hf_clm.training.trainer.time.monotonic", lambda: next(clock))
    trainer._counted_since = next(clock)
    trainer._counts += torch.tensor([4, 2, 24, 50, 32])
    trainer.peak_flops = 1e6
    trainer._flops = FlopCount(per_token=1000, per_target=2500, per_pair=20)

    with trainer.aside():  # from 105 to 107
        pass
    metrics = trainer._token_metrics()  # at 110: 8 of the 10 seconds were training

    assert metrics["tokens_per_second"] == 3.0
    assert metrics["token_accuracy"] == 0.5
    assert metrics["padding_share"] == 0.25  # 24 of 32 places
    assert metrics["mfu"] == trainer.mfu == 35_000 / 8 / 1e6


def test_a_step_faster_than_the_peak_measures_the_peak_again(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, tiny_model(), ROWS)
    measured = iter([100.0, 300.0, 250.0])  # the machine was busy at first
    monkeypatch.setattr("hf_clm.training.trainer.measure_peak", lambda *given: next(measured))

    shares = [trainer._utilisation(flops) for flops in (80.0, 240.0, 150.0, 600.0, 300.0)]

    assert shares == [0.8, 0.8, 0.5, 1.0, 0.5]


def test_watched_training_rows_are_evaluated_with_the_evaluation_set(tmp_path):
    trainer = build_trainer(tmp_path, model_that_predicts_id_0(), ROWS)
    trainer.watched_rows = [ROWS[1]]

    metrics = trainer.evaluate()

    assert (metrics["eval_token_accuracy"], metrics["eval_target_tokens"]) == (0.75, 4)
    assert (metrics["eval_train_token_accuracy"], metrics["eval_train_target_tokens"]) == (1.0, 1)
    assert metrics["eval_train_loss"] == pytest.approx(5.560682, abs=1e-5)  # ln 260
    assert [set(entry) & {"eval_loss", "eval_train_loss"} for entry in trainer.state.log_history] == [
        {"eval_loss", "eval_train_loss"}
    ]


def test_other_rows_are_evaluated_without_the_watched_ones(tmp_path):
    trainer = build_trainer(tmp_path, model_that_predicts_id_0(), ROWS)
    trainer.watched_rows = [ROWS[1]]

    assert "eval_train_loss" not in trainer.evaluate([ROWS[0]])


def test_deepspeed_may_return_no_norm_and_updates_before_the_check(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, tiny_model(), ROWS)
    monkeypatch.setattr("transformers.Trainer._get_grad_norm", lambda *args, **options: None)
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(trainer, "_get_learning_rate", lambda: 0.1)

    trainer._step_loss = torch.tensor(2.5)
    assert trainer._get_grad_norm(trainer.model) is None
    trainer._step_loss = torch.tensor(math.nan)
    with pytest.raises(DivergedError, match="is not finite; the last checkpoint is intact; got loss nan"):
        trainer._get_grad_norm(trainer.model)
