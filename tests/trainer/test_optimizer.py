"""AdamW with fp32 masters: schedule, clipping, and small updates that bf16 weights alone would lose."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastppo.config import OptimizerConfig
from fastppo.optimizer import LossScale, Optimizer, learning_rate_factor
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to


def test_schedule_warms_up_then_decays_to_its_end():
    """The last step has the least rate: a schedule that would reach it one step later never does."""
    config = OptimizerConfig(warmup_steps=2, schedule="linear", min_lr_ratio=0.1)
    factors = [learning_rate_factor(config, step, 12) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors == sorted(factors[:2]) + sorted(factors[2:], reverse=True)
    assert factors[-1] == 0.1
    cosine = OptimizerConfig(schedule="cosine")
    assert [learning_rate_factor(cosine, step, 11) for step in (0, 10)] == [1.0, 0.0]
    assert learning_rate_factor(cosine, 5, 11) == 0.5 * (1 + math.cos(math.pi / 2))
    assert learning_rate_factor(OptimizerConfig(), 10**6, 100) == 1.0


def test_loss_scale_falls_on_overflow_and_rises_again():
    scale = LossScale.for_types({torch.float16})
    highest = scale.value
    assert highest > 1 and not scale.keep(False) and scale.value < highest
    for _ in range(2 * LossScale.GROWTH_INTERVAL):
        assert scale.keep(True)
    assert scale.value == highest


def test_what_is_not_finite_at_scale_1_is_no_overflow():
    """A NaN in one minibatch must not leave all later ones without a scale."""
    scale = LossScale(LossScale.LARGEST / 2)
    tried = [scale.value]
    while not scale.keep(False):
        tried.append(scale.value)
    assert tried[-1] == 1 and scale.value == tried[0]


def test_small_fp16_gradients_survive():
    """1e-9 is below fp16's smallest number; multiplied by the loss scale it is not."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = Optimizer([("w", parameter)], 0.0, OptimizerConfig())
    optimizer.loss_scale = LossScale.for_types({parameter.dtype})
    (parameter.float().sum() * 1e-9 * optimizer.loss_scale.value).backward()
    scale = optimizer.loss_scale.value
    assert_rounds_to((optimizer.masters["w"].grad * scale).half(), 1e-9 * scale)


def one_step(optimizer: Optimizer) -> float:
    norm = optimizer.gradient_norm()
    optimizer.step(norm)
    optimizer.clear_gradients()
    return norm.item()


def weights_after_100_updates(dtype: torch.dtype) -> torch.Tensor:
    """What torch's AdamW makes of the next test's weights in a type that can hold its updates."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    adamw = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        adamw.step()
    return weight.detach()


def test_masters_keep_updates_that_bf16_cannot_hold():
    """100 updates of 1e-4 on a weight of 1: each is lost in bf16 (spacing 2^-7), their sum must not be."""
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = Optimizer(layer.named_parameters(), 1e-4, OptimizerConfig())
    for _ in range(100):
        layer.weight.sum().backward()
        one_step(optimizer)
    assert layer.weight.dtype == torch.bfloat16
    native, exact = (weights_after_100_updates(dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as_native(optimizer.masters["weight"].detach(), native, exact)
    assert (layer.weight < 1).all()


def test_masters_accumulate_micro_batches_in_fp32():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], 0.0, OptimizerConfig())
    for _ in range(300):  # bf16 accumulation would stop at 256
        parameter.sum().backward()
    assert optimizer.gradient_norm().item() == 300
    assert parameter.grad is None


def test_updates_stay_in_the_same_storage():
    """The sampler reads the same memory as the optimizer writes."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(3, 3, dtype=dtype)
        address = layer.weight.data_ptr()
        optimizer = Optimizer(layer.named_parameters(), 0.1, OptimizerConfig())
        layer.weight.sum().backward()
        one_step(optimizer)
        assert layer.weight.data_ptr() == address


def test_gradients_are_clipped_to_the_norm():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([("w", parameter)], 1.0, OptimizerConfig(max_grad_norm=0.5))
    parameter.grad = torch.full((4,), 3.0)
    norm = optimizer.gradient_norm()
    assert norm == 6
    optimizer.step(norm)
    assert_rounds_to(parameter.grad.norm(), 0.5)


def test_weight_decay_spares_vectors():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer([("m", matrix), ("v", vector)], 0.1, OptimizerConfig(weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    one_step(optimizer)
    assert (matrix < 1).all() and (vector == 1).all()
