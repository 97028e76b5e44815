"""What rests in the host's memory: moments and masters, which are updated there, and the reference between scorings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastppo import PPOConfig
from fastppo.config import OptimizerConfig
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.model.host import require_gpu
from fastppo.optimizer import Optimizer
from fastppo.roles import Roles
from fastppo.rollout import Engine, SamplingParams
from tests.stand_in_gpu import DEVICE, stand_in_gpu
from tests.tiny import make_model, ppo_config
from tests.tiny_trainer import build_trainer


def fresh(offload: bool, dtype: torch.dtype) -> tuple[nn.Module, Optimizer]:
    """A layer in a type of its own, and an fp32 head."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(5, 7).to(dtype), nn.Linear(7, 1))
    config = OptimizerConfig(max_grad_norm=0.5, weight_decay=0.1, offload=offload)
    return network, Optimizer(network.named_parameters(), 1e-2, config)


def train(network: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Gradient norms of steps of two micro-batches each."""
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(4, 5, generator=generator)
            network[1](network[0](x.to(network[0].weight.dtype)).float()).square().sum().backward()
        optimizer.take_gradients()
        norm = optimizer.gradient_norm()
        optimizer.step(norm)
        optimizer.clear_gradients()
        norms.append(norm.item())
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learns_the_same_bits(dtype):
    (plain, here), (moved, there) = (fresh(offload, dtype) for offload in (False, True))
    assert train(plain, here, 4) == train(moved, there, 4)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(moved.named_parameters())[name]), name
        assert torch.equal(here.masters[name], there.masters[name]), name
    assert not {x.data_ptr() for x in moved.parameters()} & {x.data_ptr() for x in there.masters.values()}
    assert here.separate_masters().keys() == there.separate_masters().keys()


@pytest.mark.parametrize("saved, resumed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_goes_on_bit_for_bit_with_either_setting(dtype, saved, resumed):
    network, optimizer = fresh(saved, dtype)
    train(network, optimizer, 2)
    tensors, state = optimizer.state_dict()
    kept = {name: x.clone() for name, x in tensors.items()}
    masters = {name: x.detach().clone() for name, x in optimizer.separate_masters().items()}
    other, again = fresh(resumed, dtype)
    other.load_state_dict(network.state_dict())
    again.restore_masters(masters)
    again.load_state_dict(kept, state)
    assert train(network, optimizer, 2, seed=1) == train(other, again, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_moments_are_on_the_host_and_gradients_on_the_gpu():
    with stand_in_gpu():
        network = nn.Linear(5, 7, dtype=torch.bfloat16, device=DEVICE)
        optimizer = Optimizer(network.named_parameters(), 1e-2, OptimizerConfig(offload=True))
        network(torch.ones(3, 5, dtype=torch.bfloat16, device=DEVICE)).sum().backward()
        assert {x.grad.dtype for x in network.parameters()} == {torch.float32}
        assert {x.grad.device for x in network.parameters()} == {DEVICE}
        optimizer.step(optimizer.gradient_norm())
        held = [*optimizer.masters.values(), *(x for s in optimizer.adamw.state.values() for x in s.values())]
        assert {x.device.type for x in held} == {"cpu"} and {x.device for x in network.parameters()} == {DEVICE}


def test_a_reference_that_rests_scores_the_same(monkeypatch):
    """And is as it was where that fails."""
    model = prepare_model(make_model())
    rollout = Engine(model).generate([[2, 3], [4]], SamplingParams(n=2, max_new_tokens=5))
    plain, moved = (Roles(model, with_reference=True, offload_reference=offload) for offload in (False, True))
    plan = [[[[0, 1], [2, 3]]]]
    found = [roles.evaluate(rollout, {"logprobs", "reference"}, plan) for roles in (plain, moved)]
    assert torch.equal(found[0].ref_logprobs, found[1].ref_logprobs)
    assert plain.reference_sha256 == moved.reference_sha256
    monkeypatch.setattr(Roles, "reference_logprobs", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moved.evaluate(rollout, {"reference"}, plan)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.reference.parameters(), moved.reference.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"optimizer__offload": True, "optimizer__bf16_stochastic_round": True},
            "expected false with optimizer.offload",
        ),
        ({"optimizer__offload": True, "distributed__sharding": "full"}, "distributed.cpu_offload moves all"),
        ({"learner__offload_reference": True, "lora__r": 2}, "the reference is the policy's own trunk"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        ppo_config(**settings)


@pytest.mark.parametrize("setting", ["optimizer.offload", "learner.offload_reference"])
def test_a_cpu_has_nowhere_else(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting} is true, expected false on a CPU"):
        build_trainer(tmp_path / "run", reward__kl_coef=0.1, **{setting.replace(".", "__"): True})
    assert not (tmp_path / "run").exists()
    require_gpu(setting, DEVICE)
    sections = {"optimizer": OptimizerConfig(offload=True), "critic": PPOConfig().critic, "config": PPOConfig().learner}
    with pytest.raises(ValueError, match="optimizer.offload is true"):
        Learner(Roles(prepare_model(make_model())), **sections, total_steps=1)
