"""The whole step: every way of doing it agrees with fp64 on its own tokens, and a step that learns something else is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.bench import ppo_step, trl_ppo_step
from fastppo.bench.catalog import load_cases
from fastppo.bench.harness import check_provider, make_inputs
from fastppo.bench.setting import Setting

CPU = torch.device("cpu")
TRL = pytest.param(
    "trl", marks=pytest.mark.skipif(not trl_ppo_step.is_installed(), reason="no TRL with a PPO trainer, such as 1.8")
)


def quick_case(samples: bool = False):
    """Of single answers, or of several samples a prompt."""
    return load_cases("ppo_step", Setting(quick=True))[samples]


def checked(monkeypatch, provider: str, case=None, **changes):
    """The row of a provider whose settings are changed from what the exact step is computed with."""
    case = case or quick_case()
    inputs = make_inputs(case, CPU)
    run, config = case.providers[provider], ppo_step.CONFIG
    with monkeypatch.context() as patch:
        patch.setattr(
            ppo_step, "CONFIG", replace(config, **{s: replace(getattr(config, s), **c) for s, c in changes.items()})
        )
        outputs = run(inputs)
    frozen = replace(case, providers={provider: lambda x: outputs})
    return check_provider(frozen, provider, inputs, {})[0]


@pytest.mark.parametrize("provider", ["fastppo", "eager", TRL])
def test_steps_agree_with_fp64_on_the_tokens_they_drew(monkeypatch, provider):
    row = checked(monkeypatch, provider)
    assert row.status == "ok", row.reason


@pytest.mark.parametrize("provider", ["fastppo", "eager"])
def test_steps_of_several_samples_a_prompt_agree_with_fp64(monkeypatch, provider):
    row = checked(monkeypatch, provider, quick_case(samples=True))
    assert row.status == "ok", row.reason


@pytest.mark.parametrize("provider", ["fastppo", TRL])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": {"kl_coef": 0.5}}, "advantages|returns|losses"),
        ({"advantage": {"gae_lambda": 0.5}}, "advantages|returns|losses"),
        ({"optimizer": {"lr": 1e-2}}, "losses"),
    ],
)
def test_a_step_that_does_something_else_is_wrong(monkeypatch, provider, change, reason):
    row = checked(monkeypatch, provider, **change)
    assert row.status == "wrong" and any(word in row.reason for word in reason.split("|"))


def test_a_step_is_checked_in_the_minibatches_that_it_took():
    """TRL's are its own; the exact step follows them."""
    case = quick_case()
    inputs = make_inputs(case, CPU)
    outputs = case.providers["eager"](inputs)
    taken = torch.tensor(ppo_step.minibatches(ppo_step.Shape(32, 1, 8, 2, 8, 8)))
    for minibatches, status in ((taken, "ok"), (taken.flip(0)[:2], "wrong")):
        frozen = replace(case, providers={"eager": lambda x, m=minibatches: outputs | {"minibatches": m}})
        assert check_provider(frozen, "eager", inputs, {})[0].status == status


def test_the_score_is_a_share_of_tokens():
    assert ppo_step.score([0, 1, ppo_step.VOCABULARY - 1, ppo_step.VOCABULARY // 2]) == 0.5
