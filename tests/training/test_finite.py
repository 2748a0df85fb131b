"""A loss or gradient that is not finite is noticed without waiting for the device."""

import math

import pytest
import torch

from hf_clm.training.finite import FiniteGuard, skip_update

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def watch(guard: FiniteGuard, step: int, loss: float, norm: float) -> torch.Tensor:
    return guard.watch(step, torch.tensor([loss, norm]), learning_rate=0.1, batches=[{"step": step}])


@pytest.mark.parametrize(("loss", "norm", "flag"), [(1.0, 2.0, 0.0), (NAN, 2.0, 1.0), (1.0, INF, 1.0)])
def test_a_step_is_flagged_on_the_device_and_reported_with_its_batches(loss, norm, flag):
    guard = FiniteGuard(CPU, defers=True)

    assert watch(guard, 7, loss, norm).tolist() == flag

    step = guard.settle()
    assert (step is None) == (flag == 0.0)
    if step:
        assert (step.step, step.batches, step.learning_rate) == (7, [{"step": 7}], 0.1)


def test_a_step_is_reported_once():
    guard = FiniteGuard(CPU, defers=True)
    watch(guard, 1, NAN, NAN)

    assert guard.settle() is not None
    assert guard.settle() is None


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_fused_optimizer_makes_no_update_if_the_step_is_not_finite(flag):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    weight.grad = torch.full((3,), NAN if flag else 1.0)

    skip_update(optimizer, torch.tensor(flag))
    optimizer.step()

    assert weight.tolist() == pytest.approx([1.0] * 3 if flag else [0.9] * 3)
    assert optimizer.state[weight]["step"].item() == (0.0 if flag else 1.0)


def test_other_optimizers_are_left_alone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)

    skip_update(optimizer, torch.tensor(1.0))

    assert "found_inf" not in vars(optimizer)
