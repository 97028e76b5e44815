"""The whole step: every way of doing it agrees with fp64 on its own tokens, and a step that learns something else is caught."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import pytest
import torch

from fastppo.bench import ppo_step, ppo_step_gpu, trl_ppo_step
from fastppo.bench.catalog import load_cases
from fastppo.bench.clock import PhaseClock
from fastppo.bench.harness import check_provider, make_inputs
from fastppo.bench.peers import SEPARATE
from fastppo.bench.setting import Setting

CPU = torch.device("cpu")
TRL = pytest.param(
    "trl", marks=pytest.mark.skipif(not trl_ppo_step.is_installed(), reason="no TRL with a PPO trainer, such as 1.8")
)


def quick_case(samples: bool = False, shared_trunk: bool = False):
    """Of single answers, or of several samples a prompt, or of those with a shared trunk."""
    return load_cases("ppo_step", Setting(quick=True))[samples + shared_trunk]


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


@pytest.mark.parametrize("provider", ["fastppo", "eager", SEPARATE])
def test_steps_with_a_shared_trunk_agree_with_fp64(monkeypatch, provider):
    """And ours with a critic of its own beside them, with the step that has one."""
    case = quick_case(samples=True, shared_trunk=True)
    assert case.name.endswith(", shared trunk")
    row = checked(monkeypatch, provider, case)
    assert row.status == "ok", row.reason


@pytest.mark.parametrize("provider", ["fastppo", "eager"])
def test_a_separate_critic_is_no_shared_trunk(monkeypatch, provider):
    """The losses tell them apart, though the values before the first update are the same."""
    separate, shared = quick_case(samples=True), quick_case(samples=True, shared_trunk=True)
    swapped = replace(shared, providers={provider: separate.providers[provider]})
    row = checked(monkeypatch, provider, swapped)
    assert row.status == "wrong"


@pytest.mark.parametrize("provider", ["fastppo", "eager", TRL])
def test_a_step_tells_its_phases(provider):
    """They follow each other and leave nothing out but the packing of outputs."""
    case = quick_case()
    run, inputs = case.providers[provider], make_inputs(case, CPU)
    assert run.phases is None, "before the first call"
    run(inputs)
    started = perf_counter()
    run(inputs)
    elapsed = perf_counter() - started
    assert list(run.phases) == ["sampling", "scoring", "update"] == list(case.phase_flops)
    assert all(seconds > 0 for seconds in run.phases.values())
    assert 0.5 * elapsed < sum(run.phases.values()) <= elapsed


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


@pytest.mark.parametrize("number", [0, 1], ids=["bf16", "fp16"])
def test_a_gpu_s_steps_run_and_are_checked(number):
    """Tried on the CPU, with a tiny model; log-probs that are off, and losses that are not finite, are caught."""
    case = ppo_step_gpu.cases(Setting(quick=True))[number]
    inputs = make_inputs(case, CPU)
    row, _ = check_provider(case, "fastppo", inputs, {})
    assert row.status == "ok" and 0 < row.error, row.reason
    assert list(case.providers["fastppo"].phases) == list(case.phase_flops)
    outputs = case.providers["fastppo"](inputs)
    for name, change in (("old_logprobs", 0.3), ("values", 0.3), ("losses", torch.inf)):
        frozen = replace(case, providers={"fastppo": lambda x, n=name, c=change: outputs | {n: outputs[n] + c}})
        assert check_provider(frozen, "fastppo", inputs, {})[0].status == "wrong"


def test_a_gpu_s_cases_have_real_shapes():
    """Built from outlines: Qwen2.5-0.5B has 494 million weights, 136 million of them its embedding and head."""
    cases = load_cases("ppo_step", Setting("cuda"))
    assert [case.name.split(", ", 1)[1] for case in cases] == [
        "64 prompts of 64, 64 new, a step, bf16",
        "64 prompts of 64, 64 new, a step, fp16",
        "256 prompts of 105, 239 new, a step, bf16",
    ]
    trunk, head = 358e6, 136e6
    tokens, actions = 256 * 344, 256 * 239
    update = 2 * (6 * tokens * trunk + 3 * actions * head)
    assert cases[-1].phase_flops["update"] == pytest.approx(update, rel=5e-3)


def test_phases_on_a_gpu_end_with_their_kernels(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = PhaseClock(torch.device("cuda"))
    clock.end("sampling")
    clock.end("update")
    assert len(waits) == 2 and list(clock.seconds) == ["sampling", "update"]
