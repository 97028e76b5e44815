"""Optimizers that keep less, by torchao, with which tests/trainer/test_low_bit.py starts it: what they learn beside fp32 AdamW, what a
checkpoint holds of them, which settings are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastppo import Callback, PPOConfig
from fastppo.config import OptimizerConfig
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.optimizer import Optimizer
from fastppo.roles import Roles
from tests.tiny import make_model
from tests.tiny_trainer import build_trainer

pytest.importorskip("torchao.optim", reason="torchao is not installed")

EIGHT_BIT, AT_RANDOM = {"name": "adamw_8bit"}, {"bf16_stochastic_round": True}
KINDS = [
    (EIGHT_BIT, torch.float32),
    (EIGHT_BIT, torch.bfloat16),
    (AT_RANDOM, torch.bfloat16),
    (EIGHT_BIT | AT_RANDOM, torch.bfloat16),
]
IDS = ["8 bits", "8 bits, masters", "at random", "8 bits, at random"]
SIZE = 64  # whose square is the least that has moments in 8 bits
LR = 3e-3


def fresh(options: dict, dtype: torch.dtype) -> tuple[nn.Parameter, Optimizer]:
    weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype))
    return weight, Optimizer([("w", weight)], LR, OptimizerConfig(max_grad_norm=1e9, **options))


def train(weight: nn.Parameter, optimizer: Optimizer, steps: int) -> list[float]:
    """Towards a target, by gradients of two micro-batches; the losses."""
    target = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        for _ in range(2):
            loss = (weight.float() - target).square().mean() / 2
            loss.backward()
        losses.append(2 * loss.item())
        optimizer.step(optimizer.gradient_norm())
        optimizer.clear_gradients()
    return losses


@pytest.mark.parametrize("options, dtype", KINDS, ids=IDS)
def test_learns_as_adamw_does(options, dtype):
    """The loss after thirty steps is that of fp32 AdamW to a hundredth of what was learned, also where a step is a third of bf16's spacing."""
    expected = train(*fresh({}, torch.float32), 30)
    got = train(*fresh(options, dtype), 30)
    assert expected[0] - expected[-1] > 0.1
    assert got[-1] == pytest.approx(expected[-1], abs=0.01 * (expected[0] - expected[-1]) + 2e-3)


def test_rounded_to_the_nearest_bf16_weights_alone_would_stand_still():
    """The control: the same small steps without masters and without chance."""
    weight = fresh({}, torch.float32)[0].detach().bfloat16()
    assert torch.equal(weight + torch.where(weight.abs() > 1, 1e-3, 0.0).bfloat16(), weight)
    parameter, optimizer = nn.Parameter(weight.clone()), None
    optimizer = Optimizer([("w", parameter)], 1e-3, OptimizerConfig(**AT_RANDOM))
    before = parameter.detach().clone()
    for _ in range(20):
        parameter.float().sum().backward()
        optimizer.step(optimizer.gradient_norm())
        optimizer.clear_gradients()
    moved = (before.float() - parameter.detach().float())[weight.abs() > 1]
    assert moved.mean().item() == pytest.approx(20e-3, rel=0.1)


@pytest.mark.parametrize("options, dtype", KINDS, ids=IDS)
def test_goes_on_bit_for_bit_from_what_a_checkpoint_holds(options, dtype):
    """Chance included, whatever the process has drawn meanwhile; and what is held are plain tensors."""
    weight, optimizer = fresh(options, dtype)
    train(weight, optimizer, 3)
    tensors, state = optimizer.state_dict()
    assert all(type(x) in (Tensor, nn.Parameter) for x in tensors.values())
    saved = {name: x.clone() for name, x in tensors.items()}
    masters = {name: x.detach().clone() for name, x in optimizer.separate_masters().items()}
    other, resumed = fresh(options, dtype)
    other.data.copy_(weight.data)
    resumed.restore_masters(masters)
    resumed.load_state_dict(saved, state)
    train(weight, optimizer, 2)
    torch.randn(7)
    train(other, resumed, 2)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("options, dtype", KINDS, ids=IDS)
def test_keeps_as_many_bytes_as_it_says(options, dtype):
    weight, optimizer = fresh(options, dtype)
    train(weight, optimizer, 1)
    held = sum(x.nbytes for name, x in optimizer.state_dict()[0].items() if not name.startswith("step"))
    held += sum(x.nbytes for x in optimizer.separate_masters().values())
    a_weight = {"8 bits": 2, "8 bits, masters": 6, "at random": 4, "8 bits, at random": 2}[
        IDS[KINDS.index((options, dtype))]
    ]
    tables = 2 * (256 * 4 + SIZE * SIZE // 256 * 4) if "name" in options else 0
    assert held == a_weight * weight.numel() + tables


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """Policy and critic in bf16 with 8-bit moments, stopped after the first of two steps."""
    options = {"optimizer__name": "adamw_8bit", "optimizer__bf16_stochastic_round": True, "checkpoint__every": 1}

    def trainer(name: str, **changes):
        return build_trainer(tmp_path / name, model=make_model(hidden_size=SIZE).bfloat16(), **options | changes)

    whole = trainer("whole")
    whole.train()
    moments = whole.learner.state_dict()[0]["policy_optimizer"]
    assert any(name.startswith("exp_avg_sq.codes/") for name in moments)
    part = trainer("parts", callbacks=[StopAfterOne()])
    part.train()
    resumed = trainer("parts")
    assert resumed.train(resume=True)["grad_norm/policy"] > 0
    for (name, expected), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, got), name


class StopAfterOne(Callback):
    def on_step(self, trainer, metrics):
        trainer.stop("one is enough")


def test_chance_needs_bf16_weights():
    sections = {"optimizer": OptimizerConfig(**AT_RANDOM), "critic": PPOConfig().critic, "config": PPOConfig().learner}
    with pytest.raises(
        ValueError,
        match="bf16_stochastic_round is true, expected false where the weights that learn are float32, none bfloat16",
    ):
        Learner(Roles(prepare_model(make_model())), **sections, total_steps=1)
