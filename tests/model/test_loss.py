"""The loss at the targets only: the same values and gradients as with all logits, with less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from helpers import SIZES, X
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.model import loss as module
from hf_clm.model.attention import NAME, register
from hf_clm.model.loss import (
    DeferringHead,
    LossOptions,
    TargetLoss,
    measure_targets,
    use_target_loss,
    why_not,
)
from hf_clm.training.trainer import CLMTrainer

PLAIN = LossOptions()
VOCABULARY, WIDTH = 37, 8
# Three documents of 4, 3 and 6 tokens: 2, 2 and 3 targets.
ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]},
    {"input_ids": [9, 1, 2], "labels": [X, 1, 2]},
    {"input_ids": [3, 3, 4, 4, 5, 250], "labels": [X, X, X, 4, 5, 250]},
]
LLAMA = SIZES["llama"]
HEADS_OF_8 = {**SIZES["qwen2"], "head_dim": 8}
# Architectures whose head is a plain matrix product, and others that scale or cap their logits.
PLAIN_MODELS = {
    "qwen2": SIZES["qwen2"],
    "qwen2-tied": {**SIZES["qwen2"], "tie_word_embeddings": True},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": HEADS_OF_8,
    "gemma": HEADS_OF_8,
    "gpt2": SIZES["gpt2"],
    "phi": LLAMA,  # its head has a bias
    "olmo2": LLAMA,
    "gpt_neox": LLAMA,
    "qwen3_moe": {
        **HEADS_OF_8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,  # adds a load-balancing loss
    },
}
OTHER_MODELS = {
    "gemma2": HEADS_OF_8,  # caps its logits
    "granite": {**LLAMA, "logits_scaling": 2.0},
    "cohere": {**LLAMA, "logit_scale": 0.5},
}


def build(name: str) -> PreTrainedModel:
    """A tiny model in training mode, without dropout."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**PLAIN_MODELS, **OTHER_MODELS}[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name.removesuffix("-tied"), **{"vocab_size": 260, **ids, **sizes})
    register()
    model = AutoModelForCausalLM.from_config(config).train()
    model.set_attn_implementation("eager" if name == "gemma2" else NAME)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model


def loss_and_gradients(
    model: Any, batch: dict[str, Any], **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False, **options).loss
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def assert_close(result: dict[str, Any], expected: dict[str, Any], *, rtol: float = 1e-5) -> None:
    """Asserts equal names, and tensors that differ by at most ``rtol`` of the largest element.

    For a gradient that cancels out (the bias of keys), the largest of all gradients is the reference.
    """
    assert result.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert float((result[name] - value).abs().max()) <= rtol * scale, name


def assert_same_pass(result: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert result[0] == pytest.approx(expected[0], rel=1e-5)
    assert_close(result[1], expected[1])


# --- measure_targets alone


@pytest.fixture(params=["one-chunk", "many-chunks", "few-bytes"])
def chunks(request, monkeypatch) -> None:
    """11 rows: in one chunk, in chunks of 4 with blocks of 3, or in chunks of 2, which fit into 300 bytes."""
    if request.param == "many-chunks":
        monkeypatch.setitem(module.LOGIT_CHUNK_TOKENS, "cpu", 4)
        monkeypatch.setitem(module.BLOCK_TOKENS, "cpu", 3)
    if request.param == "few-bytes":
        monkeypatch.setitem(module.LOGIT_CHUNK_BYTES, "cpu", 300)


def head_inputs(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns hidden, weight, bias, targets; the first, sixth and last two of 11 rows have no target."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True)
    targets = torch.tensor([X, 3, 0, 36, 3, X, 9, 17, 3, X, X])[:rows]
    return hidden, weight, bias, targets


def gradients_of(loss: torch.Tensor, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ["hidden", "weight", "bias"][: len(parts)]
    return dict(zip(names, torch.autograd.grad(3.5 * loss, parts), strict=True))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "options", [PLAIN, LossOptions(0.1), LossOptions(0.0, 1e-2), LossOptions(0.2, 0.3)], ids=str
)
def test_sum_figures_and_gradients_are_those_of_cross_entropy(options, has_bias, chunks):
    """The reference is the formula of the z-loss and PyTorch's label smoothing; backward is given 3.5."""
    hidden, weight, bias, targets = head_inputs()
    parts = [hidden, weight, bias] if has_bias else [hidden, weight]
    logits = linear(hidden, weight, bias if has_bias else None)
    expected = cross_entropy(
        logits, targets, ignore_index=X, label_smoothing=options.label_smoothing, reduction="sum"
    )
    expected = expected + options.z_loss * logits.logsumexp(dim=-1)[targets != X].square().sum()
    nlls = cross_entropy(logits, targets, ignore_index=X, reduction="none").detach()

    total, nll, correct = measure_targets(
        hidden, weight, bias=bias if has_bias else None, targets=targets, options=options
    )

    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(nll, nlls, rtol=1e-5, atol=1e-6)
    assert correct.tolist() == (logits.argmax(dim=-1) == targets).tolist()
    assert (nll.requires_grad, correct.requires_grad) == (False, False)
    assert_close(gradients_of(total, parts), gradients_of(expected, parts))


@pytest.mark.parametrize("options", [PLAIN, LossOptions(0.2, 0.3)], ids=str)
def test_weights_scale_every_term_of_the_loss_but_not_the_figures(options, chunks):
    """The reference is PyTorch's smoothed likelihood and the formula of the z-loss, target by target."""
    hidden, weight, bias, targets = head_inputs()
    weights = torch.tensor([9, 0.5, 2, 0, 1, 9, 0.3, 1, 4, 9, 9])  # 9 marks rows without a target
    logits = linear(hidden, weight, bias)
    terms = cross_entropy(
        logits, targets, ignore_index=X, label_smoothing=options.label_smoothing, reduction="none"
    )
    terms = terms + options.z_loss * logits.logsumexp(dim=-1).square()
    at = [1, 2, 3, 4, 6, 7, 8]
    expected = (terms[at] * torch.tensor([0.5, 2, 0, 1, 0.3, 1, 4])).sum()
    unweighted = measure_targets(hidden, weight, bias=bias, targets=targets, options=options)

    total, nll, correct = measure_targets(
        hidden, weight, bias=bias, targets=targets, options=options, target_weights=weights
    )

    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(nll, unweighted[1])
    assert torch.equal(correct, unweighted[2])
    parts = [hidden, weight, bias]
    assert_close(gradients_of(total, parts), gradients_of(expected, parts))


def test_under_bfloat16_autocast_weights_are_not_rounded():
    """257/256 would round to 1 in bfloat16, which would make every gradient 0.4 % smaller."""
    hidden, weight, bias, targets = head_inputs()
    parts = [hidden, weight, bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, weighted = (
            measure_targets(
                hidden, weight, bias=bias, targets=targets, options=PLAIN, target_weights=weights
            )[0]
            for weights in (None, torch.full((11,), 257 / 256))
        )

    assert weighted.item() == pytest.approx(257 / 256 * whole.item(), rel=1e-6)
    expected, result = gradients_of(whole, parts), gradients_of(weighted, parts)
    for name, gradient in result.items():
        share = (gradient * expected[name]).sum() / expected[name].square().sum()
        assert share.item() == pytest.approx(257 / 256, abs=2e-3), name


def test_without_gradients_the_results_are_the_same(chunks):
    hidden, weight, bias, targets = head_inputs()
    expected = measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)

    with torch.no_grad():
        result = measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)

    assert not result[0].requires_grad
    assert all(torch.equal(part, other) for part, other in zip(result, expected, strict=True))


@pytest.mark.parametrize("targets", [[], [X], [X, X, X]], ids=str)
def test_rows_without_targets_have_zero_loss_and_gradients(targets):
    hidden, weight, bias, _ = head_inputs(len(targets))

    total, nll, correct = measure_targets(
        hidden,
        weight,
        bias=bias,
        targets=torch.tensor(targets, dtype=torch.int64),
        options=LossOptions(0.1, 0.1),
    )

    assert (total.item(), nll.tolist(), correct.tolist()) == (
        0.0,
        [0.0] * len(targets),
        [False] * len(targets),
    )
    for gradient in torch.autograd.grad(total, [hidden, weight, bias]):
        assert not gradient.any()


def test_with_equal_logits_the_first_token_is_the_prediction():
    hidden, weight = torch.ones(3, WIDTH), torch.zeros(VOCABULARY, WIDTH)

    total, nll, correct = measure_targets(
        hidden, weight, bias=None, targets=torch.tensor([0, 1, 0]), options=PLAIN
    )

    assert correct.tolist() == [True, False, True]
    assert nll.tolist() == pytest.approx([3.610918] * 3, abs=1e-6)  # ln 37
    assert total.item() == pytest.approx(10.832753, abs=1e-5)


def test_a_target_with_probability_0_in_float32_has_a_finite_loss():
    """exp(-200) is 0 in float32, and its logarithm would be minus infinity."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[200.0], [0.0]])

    total, nll, _ = measure_targets(hidden, weight, bias=None, targets=torch.tensor([1]), options=PLAIN)

    assert (total.item(), nll.item()) == (200.0, 200.0)
    assert torch.autograd.grad(total, hidden)[0].item() == 200.0


class HeadShapeCounter(TorchDispatchMode):
    """Counts the tensors created with the shape of the head's weight."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += torch.is_tensor(result) and result.shape == (VOCABULARY, WIDTH)
        return result


def test_a_frozen_head_has_no_gradient_and_no_tensor_of_its_size_is_created():
    hidden, weight, bias, targets = head_inputs()
    expected = gradients_of(
        measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)[0], [hidden]
    )
    with HeadShapeCounter() as trained:
        measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)[0].backward()
    weight, bias = (part.detach() for part in (weight, bias))
    hidden.grad = None

    with HeadShapeCounter() as frozen:
        measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)[0].backward()

    assert trained.made >= 1
    assert frozen.made == 0
    assert weight.grad is bias.grad is None
    assert torch.equal(3.5 * hidden.grad, expected["hidden"])


def test_under_bfloat16_autocast_it_is_as_precise_as_the_stock_loss(chunks):
    """Loss within 1e-3, gradients within 2 % of their norm: a bfloat16 keeps 8 bits (0.4 %)."""
    hidden, weight, bias, targets = head_inputs()
    parts = [hidden, weight, bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(hidden, weight, bias)
        stock = cross_entropy(logits.float(), targets, ignore_index=X, reduction="sum")
        result, nll, _ = measure_targets(hidden, weight, bias=bias, targets=targets, options=PLAIN)

    assert (result.dtype, nll.dtype) == (torch.float32, torch.float32)
    assert result.item() == pytest.approx(stock.item(), rel=1e-3)
    expected = gradients_of(stock, parts)
    for name, gradient in gradients_of(result, parts).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm()) <= 2e-2 * float(expected[name].norm()), name


# --- in a model


def float16_gradients(
    *, ours: bool, scale: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns those by hidden states and head with a GradScaler's ``scale``, unscaled.

    512 rows whose states have a mean of 250, as those of models with massive activations; a fifth of them
    have the same target, as frequent words do. In float16, all rows together overflow.
    """
    torch.manual_seed(0)
    hidden = (torch.randn(512, 16) * 20 + 250).requires_grad_()
    weight = (torch.randn(50304, 16) * 0.01).requires_grad_()
    targets = torch.where(torch.arange(512) % 5 == 0, 7, torch.randint(50304, (512,)))
    with torch.autocast("cpu", dtype=torch.float16):
        if ours:
            total = measure_targets(
                hidden, weight, bias=None, targets=targets, options=PLAIN, target_weights=weights
            )[0]
        else:
            losses = cross_entropy(linear(hidden, weight).float(), targets, reduction="none")
            total = (losses if weights is None else losses * weights).sum()
    (total / len(targets) * scale).backward()
    return tuple(part.grad / scale for part in (hidden, weight))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [64.0, 65536.0])
def test_under_float16_autocast_gradients_are_finite_and_those_of_the_stock_loss(scale, weighted):
    """With a scale of 65,536, those of the stock loss overflow, and the GradScaler skips the step."""
    weights = torch.linspace(0.001, 100, 512) if weighted else None

    result = float16_gradients(ours=True, scale=scale, weights=weights)

    expected = float16_gradients(ours=False, scale=1.0 if weighted else 64.0, weights=weights)
    assert all(part.isfinite().all() for part in (*result, *expected))
    for part, other in zip(result, expected, strict=True):
        assert float((part - other).norm() / other.norm()) < 3e-3


def test_under_float16_autocast_a_probability_that_the_stock_loss_keeps_is_not_rounded_to_0():
    """A probability of 1e-9 is 0 in float16, but not times the scale of a GradScaler."""
    weight = torch.zeros(4, 2)
    weight[0, 0] = 20.75  # exp(-20.75) is 1e-9
    weight.requires_grad_()
    hidden = torch.ones(1, 2)

    with torch.autocast("cpu", dtype=torch.float16):
        total = measure_targets(hidden, weight, bias=None, targets=torch.tensor([0]), options=PLAIN)[0]
    total.backward()

    assert weight.grad is not None
    assert weight.grad[1:, 0].tolist() == pytest.approx([9.7e-10] * 3, rel=0.1)


@pytest.fixture(params=PLAIN_MODELS)
def model(request) -> PreTrainedModel:
    return build(request.param)


def test_it_equals_the_loss_and_gradients_of_the_model(model):
    """In a padded batch, with and without a given number of targets per step."""
    batch = DataCollatorForCausalLM(0)(ROWS)
    expected = [loss_and_gradients(model, batch, **more) for more in ({}, {"num_items_in_batch": 7})]
    assert why_not(model) == ""

    target_loss = use_target_loss(model)

    for more, stock in zip(({}, {"num_items_in_batch": 7}), expected, strict=True):
        with target_loss.measuring():
            assert_same_pass(loss_and_gradients(model, batch, **more), stock)
    assert int(target_loss.figures.is_target.sum()) == 7


def test_it_equals_the_loss_of_the_model_in_a_packed_row_with_targets(model):
    plain, targets = (DataCollatorForPackedCausalLM(with_targets=given)(ROWS) for given in (False, True))
    items = torch.tensor(23)
    expected = loss_and_gradients(model, plain, num_items_in_batch=items)

    target_loss = use_target_loss(model)

    with target_loss.measuring():
        assert_same_pass(loss_and_gradients(model, targets, num_items_in_batch=items), expected)
    assert target_loss.figures.is_target.tolist() == [True] * 7


def test_outside_of_measuring_the_model_works_as_usual(model, tmp_path):
    batch = DataCollatorForCausalLM(0)(ROWS)
    prompt = torch.tensor([[5, 6, 7]])
    names = list(model.state_dict())
    expected = loss_and_gradients(model, batch)
    with torch.no_grad():
        logits = model(input_ids=prompt, use_cache=False).logits

    target_loss = use_target_loss(model)
    with target_loss.measuring(), torch.no_grad():
        model(**batch, use_cache=False)

    result = loss_and_gradients(model, batch)
    assert result[0] == expected[0]
    assert all(torch.equal(result[1][name], expected[1][name]) for name in expected[1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt, use_cache=False).logits, logits)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert type(loaded.get_output_embeddings()) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=prompt, use_cache=False).logits, logits)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_generation_is_unchanged(kind):
    model = build(kind).eval()
    model.set_attn_implementation("sdpa")
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(torch.tensor([[5, 6, 7]]), **options).tolist()

    use_target_loss(model)

    assert model.generate(torch.tensor([[5, 6, 7]]), **options).tolist() == expected


def test_a_second_use_only_changes_the_options():
    model = build("qwen2")
    batch = DataCollatorForCausalLM(0)(ROWS)
    own = model.loss_function

    first = use_target_loss(model, LossOptions(z_loss=0.5))
    second = use_target_loss(model)

    assert second is first is model.loss_function
    assert (first.options, first.stock) == (PLAIN, own)
    assert why_not(model) == ""
    assert isinstance(model.get_output_embeddings(), DeferringHead)
    plain = model(**batch).loss
    with first.measuring():
        assert model(**batch).loss.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_model_that_scales_or_caps_its_logits_is_detected(name):
    model = build(name)

    assert why_not(model) == "it transforms the output of its head"
    assert type(model.loss_function) is not TargetLoss


def test_the_detection_does_not_change_the_model():
    model = build("gpt2")
    own, state = model.loss_function, torch.get_rng_state()

    why_not(model)

    assert model.loss_function is own
    assert model.training
    assert len(model.get_output_embeddings()._forward_hooks) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_whose_output_is_transformed_is_detected():
    """As if the model's forward changed after why_not: a wrong loss is never computed silently."""
    model = build("qwen2")
    target_loss = use_target_loss(model)
    model.get_output_embeddings().register_forward_hook(lambda head, given, result: 2 * result)

    with target_loss.measuring(), pytest.raises(AssertionError, match="the model transforms its logits"):
        model(**DataCollatorForCausalLM(0)(ROWS))


# --- in the Trainer


class Gradients(TrainerCallback):
    """Records the gradients of each step before the optimizer uses them."""

    def __init__(self):
        self.of_steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.of_steps.append({name: weight.grad.clone() for name, weight in trained})


def build_trainer(folder: Path, model: Any, *, trainer: type[Trainer] = CLMTrainer, **settings: Any) -> Any:
    """Builds a trainer for two steps of 2 x 2 rows; for the stock Trainer, batches have only labels."""
    options = {**settings}
    terms = LossOptions(z_loss=options.pop("z_loss", 0.0))
    collator = DataCollatorForPackedCausalLM(with_targets=trainer is CLMTrainer)
    defaults: dict[str, Any] = {
        **{"use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_steps": 2},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
        **{"remove_unused_columns": False, "disable_tqdm": True, "max_grad_norm": 0.0},
        "train_sampling_strategy": "sequential",
    }
    rows = [{key: values * n for key, values in row.items()} for n in (1, 3) for row in ROWS]
    arguments = TrainingArguments(str(folder), **(defaults | options))
    own = {"loss_options": terms} if trainer is CLMTrainer else {}
    return trainer(model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows, **own)


def two_steps(trainer: Trainer) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], gradients.of_steps


@pytest.mark.parametrize(
    ("name", "smoothing"), [("qwen2", 0.1), ("gpt2", 0.0), ("gemma2", 0.1), ("granite", 0.0), ("cohere", 0.1)]
)
def test_a_run_has_the_losses_and_gradients_of_the_stock_trainer(name, smoothing, tmp_path):
    """Also for models that keep their own loss. The steps accumulate batches with unequal targets."""
    option = {"label_smoothing_factor": smoothing}
    losses, gradients = two_steps(build_trainer(tmp_path, build(name), trainer=Trainer, **option))

    trainer = build_trainer(tmp_path, build(name), **option)
    found_losses, found_gradients = two_steps(trainer)

    assert (trainer.target_loss is None) == (name in OTHER_MODELS) == bool(trainer.own_loss)
    assert len(losses) == len(gradients) == 2
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert_close(found_gradients[0], gradients[0])


@pytest.mark.parametrize("name", ["qwen2", "granite"])
def test_label_smoothing_is_that_of_pytorch(name, tmp_path):
    model = build(name)
    rows = [{key: values * n for key, values in row.items()} for n in (1, 3) for row in ROWS]
    logits, targets = flat_logits(model, rows)
    expected = cross_entropy(logits, targets, ignore_index=X, label_smoothing=0.3).item()
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 1}

    losses, _ = two_steps(build_trainer(tmp_path, model, label_smoothing_factor=0.3, **settings))

    assert losses == pytest.approx([expected], rel=1e-5)


def test_z_loss_follows_its_formula_and_evaluation_excludes_it(tmp_path):
    """Evaluation is the mean negative log-likelihood of the targets alone."""
    model = build("qwen2")
    rows = [{key: values * n for key, values in row.items()} for n in (1, 3) for row in ROWS]
    logits, targets = flat_logits(model, rows)
    is_target = targets != X
    nll = cross_entropy(logits, targets, ignore_index=X)
    expected = nll + 0.5 * logits.logsumexp(dim=-1)[is_target].square().mean()
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = build_trainer(tmp_path, model, z_loss=0.5, **settings)

    metrics = trainer.evaluate()
    losses, _ = two_steps(trainer)

    assert losses == pytest.approx([expected.item()], rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(nll.item(), rel=1e-6)
    assert metrics["eval_target_tokens"] == int(is_target.sum()) == 28  # 7 and 3 x 7
    assert metrics["eval_token_accuracy"] == (logits.argmax(dim=-1) == targets)[is_target].float().mean()


def flat_logits(model: PreTrainedModel, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (T, V) and targets (T,) of the rows, each computed alone by the stock model."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1] for row in rows]
    return torch.cat(logits), torch.cat([torch.tensor(row["labels"][1:]) for row in rows])


# --- with other libraries


def test_adapters_of_peft_have_the_gradients_of_stock_peft_and_the_head_has_none(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    def adapted() -> Any:
        model = build("qwen2")
        torch.manual_seed(1)
        return peft.get_peft_model(model, settings)

    losses, gradients = two_steps(build_trainer(tmp_path, adapted(), trainer=Trainer))
    trainer = build_trainer(tmp_path, adapted())
    found_losses, found_gradients = two_steps(trainer)

    assert trainer.own_loss == ""
    assert trainer.target_loss.figures is not None
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert len(gradients[0]) == 8  # A and B of 2 matrices in 2 layers
    assert_close(found_gradients[0], gradients[0])
    assert trainer.model.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_model_whose_head_peft_wraps_keeps_its_own_loss(option):
    peft = pytest.importorskip("peft")
    chosen = {"target_modules": ["q_proj"], option: ["lm_head"]}

    assert why_not(peft.get_peft_model(build("qwen2"), peft.LoraConfig(**chosen))).startswith(
        "its head is a peft."
    )


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_compiled_model_has_the_same_gradients_and_is_not_recompiled(name):
    """Only the number of targets varies: the second batch makes it dynamic, and the others then fit."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    shape = StaticShape(tokens=16, documents=3, max_length=8)
    collate = DataCollatorForPackedCausalLM(with_targets=True, static=shape)
    batches = [collate(rows) for rows in (ROWS, ROWS[:2], ROWS[1:], ROWS[:1], ROWS[2:])]
    for batch in batches:
        del batch["padding_tokens"]
    model = build(name)
    model.set_attn_implementation("eager")
    expected = [loss_and_gradients(model, batch, num_items_in_batch=7) for batch in batches]
    target_loss = use_target_loss(model)
    reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter)

    compiled = []
    for batch, stock in zip(batches, expected, strict=True):
        with target_loss.measuring():
            assert_same_pass(loss_and_gradients(model, batch, num_items_in_batch=7), stock)
        compiled.append(counter.frame_count)
    reset()

    assert compiled == [1, 2, 2, 2, 2]  # one graph, then one with a dynamic size


# --- memory

PEAK = """
import resource, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from hf_clm.model.loss import use_target_loss

torch.manual_seed(0)
arm, vocabulary, rows = sys.argv[1], *map(int, sys.argv[2:])
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}
config = AutoConfig.for_model("qwen2", **sizes, intermediate_size=64, vocab_size=vocabulary)
model = AutoModelForCausalLM.from_config(config)
ids = torch.randint(0, vocabulary, (rows, 513))
model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
without = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
target_loss = use_target_loss(model)
if arm == "targets":
    with target_loss.measuring():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
else:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - without, loss.item())
"""


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(25_000, 6), pytest.param(151_936, 8, marks=pytest.mark.large)]
)
def test_a_large_vocabulary_takes_under_a_quarter_of_the_stock_memory(tmp_path, vocabulary, rows):
    """512 targets per row in float32, excluding the memory of the model. The stock loss takes 0.9 or 7 GB."""
    (tmp_path / "peak.py").write_text(PEAK)
    result = {}
    for arm in ("stock", "targets"):
        process = Forked(tmp_path, ["peak.py", arm, str(vocabulary), str(rows)])
        assert process.wait() == 0, process.read().err
        result[arm] = [float(word) for word in process.read().out.split()]

    assert result["targets"][1] == pytest.approx(result["stock"][1], rel=1e-5)
    assert result["targets"][0] < 0.25 * result["stock"][0]
