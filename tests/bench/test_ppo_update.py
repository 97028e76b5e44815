"""The update alone: every way of doing it agrees with fp64 on what all are given, and begins where a trainer rests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.bench import ppo_update
from fastppo.bench.catalog import load_cases
from fastppo.bench.harness import check_provider, in_fp64, make_inputs
from fastppo.bench.setting import Setting

CPU = torch.device("cpu")
PROVIDERS = ("fastppo", "eager", ppo_update.PARTED)


def quick_case():
    (case,) = load_cases("ppo_update", Setting(quick=True))
    return case


def checked(provider: str, case=None):
    """The row of a provider against the exact update."""
    case = case or quick_case()
    inputs = make_inputs(case, CPU)
    return check_provider(case, provider, inputs, quick_case().exact(in_fp64(inputs)))[0]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_updates_agree_with_fp64(provider):
    row = checked(provider)
    assert row.status == "ok", row.reason


@pytest.mark.parametrize(
    "change", [{"loss": {"clip_high": 0.01}}, {"optimizer": {"lr": 1e-2}}, {"critic": {"value_clip": 0.01}}]
)
def test_an_update_that_does_something_else_is_wrong(monkeypatch, change):
    case, config = quick_case(), ppo_update.SPARING
    inputs = make_inputs(case, CPU)
    with monkeypatch.context() as patch:
        changed = {section: replace(getattr(config, section), **fields) for section, fields in change.items()}
        patch.setattr(ppo_update, "SPARING", replace(config, **changed))
        outputs = case.providers["fastppo"](inputs)
    assert checked("fastppo", replace(case, providers={"fastppo": lambda x: outputs})).status == "wrong"


def test_a_call_begins_with_moments_and_without_gradients():
    """Else the peak of the first call would be that of making the networks."""
    case = quick_case()
    inputs = make_inputs(case, CPU)
    ours, plain = (case.providers[name] for name in ("fastppo", "eager"))
    for name, update in (("fastppo", ours), ("eager", plain)):
        assert case.prepare[name](inputs) == {}
        resting = update.update
        case.prepare[name](inputs)
        assert update.update is resting, "made once"
    optimizers = [trained.adamw for trained in ours.update.step.learner.optimizers.values()]
    for optimizer in [*optimizers, *plain.update.step.optimizers]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all("exp_avg_sq" in optimizer.state[p] and p.grad is None for p in parameters)


def test_its_memory_is_measured():
    assert quick_case().peaks and quick_case().prepare.keys() == quick_case().providers.keys()


def test_completions_follow_their_prompts():
    x = {
        "tokens": torch.tensor([[1, 2, 0], [3, 4, 5]]),
        "lengths": torch.tensor([2, 3]),
        "completions": torch.tensor([[7, 8], [9, 10], [11, 12], [13, 14]]),
        "old_logprobs": torch.arange(8.0).view(4, 2),
    }
    rollout = ppo_update.packed(x, samples=2)
    assert rollout.prompts() == [[1, 2], [1, 2], [3, 4, 5], [3, 4, 5]]
    assert rollout.completions() == x["completions"].tolist()
    assert rollout.logprobs.tolist() == list(range(8)) and rollout.prompt_index.tolist() == [0, 0, 1, 1]
