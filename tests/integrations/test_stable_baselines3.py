"""stable-baselines3's rollout buffer with our advantages: the bits of its own, whatever the flags, and a whole run of its PPO."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.integrations import stable_baselines3 as ours

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed: make peers")
from gymnasium import spaces  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.logger import Logger  # noqa: E402

theirs = RolloutBuffer.compute_returns_and_advantage
BOX = spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def filled(steps: int, envs: int, seed: int = 0, kind: type = RolloutBuffer, **options) -> RolloutBuffer:
    """A buffer of random numbers; the advantages are NaN, so that a step which nobody writes is seen."""
    random = np.random.default_rng(seed)
    space = spaces.Dict({"a": BOX}) if kind is DictRolloutBuffer else BOX
    buffer = kind(steps, space, spaces.Discrete(2), device="cpu", n_envs=envs, **options)
    buffer.rewards[:] = random.normal(size=(steps, envs))
    buffer.values[:] = random.normal(size=(steps, envs))
    buffer.episode_starts[:] = random.random((steps, envs)) < 0.15
    buffer.advantages[:] = np.nan
    return buffer


def last(envs: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Values [envs, 1] and dones [envs] after the last step, as the collection of rollouts passes them."""
    random = np.random.default_rng(seed + 1)
    return torch.from_numpy(random.normal(size=(envs, 1)).astype(np.float32)), random.random(envs) < 0.4


def assert_same_results(one: RolloutBuffer, other: RolloutBuffer) -> None:
    for name in ("advantages", "returns"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
        assert np.array_equal(a, b, equal_nan=True), name


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(
    steps=st.integers(1, 40),
    envs=st.integers(1, 20),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0, 1]),
    gae_lambda=st.sampled_from([0.0, 0.95, 1.0, 1]),
    flags=st.sampled_from([np.bool_, np.int64, np.float32, np.float64]),
    dict_observations=st.booleans(),
    flat=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_theirs(steps, envs, gamma, gae_lambda, flags, dict_observations, flat, seed):
    """Their error against fp64 is therefore ours too."""
    kind = DictRolloutBuffer if dict_observations else RolloutBuffer
    buffers = [filled(steps, envs, seed, kind, gamma=gamma, gae_lambda=gae_lambda) for _ in range(2)]
    last_values, dones = last(envs, seed)
    last_values = last_values.flatten() if flat else last_values
    for function, buffer in zip((theirs, ours.compute_returns_and_advantage), buffers, strict=True):
        function(buffer, last_values.clone(), dones.astype(flags))
    assert_same_results(*buffers)


def test_long_rollout_has_the_same_bits():
    buffers = [filled(2048, 3, gamma=0.99, gae_lambda=0.95) for _ in range(2)]
    theirs(buffers[0], *last(3))
    ours.compute_returns_and_advantage(buffers[1], *last(3))
    assert_same_results(*buffers)


def test_arrays_of_other_strides():
    """Views that a subclass may hold: environments first in memory, every second step."""
    buffers = [filled(12, 5) for _ in range(2)]
    for buffer in buffers:
        buffer.rewards = np.asfortranarray(buffer.rewards)
        buffer.values = np.repeat(buffer.values, 2, axis=0)[::2]
        buffer.advantages = np.asfortranarray(buffer.advantages)
    theirs(buffers[0], *last(5))
    ours.compute_returns_and_advantage(buffers[1], *last(5))
    assert_same_results(*buffers)


@pytest.mark.parametrize("function", [theirs, ours.compute_returns_and_advantage], ids=["theirs", "ours"])
def test_advantages_are_written_in_place_and_returns_are_new(function):
    """What somebody else holds of the last rollout: its returns stay as they were, in theirs and in ours."""
    buffer = filled(6, 2)
    advantages, returns = buffer.advantages, buffer.returns
    function(buffer, *last(2))
    assert buffer.advantages is advantages and np.isfinite(advantages).all()
    assert buffer.returns is not returns and not returns.any()


def test_nan_behind_the_end_of_an_episode_stays_there():
    """Theirs multiplies it by 0, which is NaN again; with strict ours leaves such a buffer to theirs."""

    def spoiled() -> RolloutBuffer:
        buffer = filled(10, 1)
        buffer.episode_starts[:] = 0
        buffer.episode_starts[6] = 1
        buffer.rewards[8] = np.nan
        return buffer

    usual, fixed = spoiled(), spoiled()
    theirs(usual, *last(1))
    ours.compute_returns_and_advantage(fixed, *last(1))
    assert np.isnan(usual.advantages[:9]).all()
    assert np.isfinite(fixed.advantages[:6]).all() and np.isnan(fixed.advantages[6:9]).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        ours.compute_returns_and_advantage(spoiled(), *last(1), strict=True)
    with ours.patch(strict=True):
        strict = spoiled()
        strict.compute_returns_and_advantage(*last(1))
    assert_same_results(usual, strict)


REFUSED = {
    "float64 rewards": lambda buffer, arguments: setattr(buffer, "rewards", buffer.rewards.astype(np.float64)),
    "bool episode starts": lambda buffer, arguments: setattr(buffer, "episode_starts", buffer.episode_starts != 0),
    "half an episode start": lambda buffer, arguments: buffer.episode_starts.fill(0.5),
    "half a done": lambda buffer, arguments: arguments.update(dones=np.full(3, 0.5)),
    "float64 last values": lambda buffer, arguments: arguments.update(last_values=torch.zeros(3, dtype=torch.float64)),
    "one last value": lambda buffer, arguments: arguments.update(last_values=torch.ones(1)),
    "gamma above 1": lambda buffer, arguments: setattr(buffer, "gamma", 1.01),
    "gamma of NumPy's float64": lambda buffer, arguments: setattr(buffer, "gamma", np.float64(0.9)),
    "fewer steps than the buffer has": lambda buffer, arguments: setattr(buffer, "buffer_size", 4),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_refuses_goes_to_theirs_untouched(case, caplog):
    buffers = [filled(7, 3) for _ in range(3)]
    calls = []
    for buffer in buffers:
        arguments = dict(zip(("last_values", "dones"), last(3), strict=True))
        REFUSED[case](buffer, arguments)
        calls.append(arguments)
    with pytest.raises((TypeError, ValueError)):
        ours.compute_returns_and_advantage(buffers[0], **calls[0])
    assert np.isnan(buffers[0].advantages).all() and not buffers[0].returns.any()
    theirs(buffers[1], **calls[1])
    with ours.patch(), caplog.at_level(logging.WARNING):
        buffers[2].compute_returns_and_advantage(**calls[2])
    assert "runs as its package has it" in caplog.text
    for name in ("advantages", "returns"):
        assert np.array_equal(getattr(buffers[1], name), getattr(buffers[2], name), equal_nan=True)


def test_patch_reaches_every_buffer_and_unpatch_restores_it():
    class Derived(RolloutBuffer):
        pass

    own = theirs  # this module's own name for it gets ours too, while patched
    with ours.patch() as patch:
        assert list(patch.values()) == [own]
        for kind in (RolloutBuffer, DictRolloutBuffer, Derived):
            assert kind.compute_returns_and_advantage is theirs is not own
    for kind in (RolloutBuffer, DictRolloutBuffer, Derived):
        assert kind.compute_returns_and_advantage is theirs is own


class Rollouts(BaseCallback):
    """Keeps each rollout's advantages and returns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.kept += [buffer.advantages.copy(), buffer.returns.copy()]


class Curves(Logger):
    """Keeps what training logs, but for the times."""

    def __init__(self) -> None:
        super().__init__(folder=None, output_formats=[])
        self.kept: list[tuple[str, float]] = []

    def record(self, key, value, exclude=None) -> None:
        if not key.startswith("time/"):
            self.kept.append((key, float(value)))


def cartpole_run() -> tuple[list[np.ndarray], list[tuple[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=512, batch_size=64, n_epochs=3, seed=7, device="cpu")
    curves, rollouts = Curves(), Rollouts()
    model.set_logger(curves)
    model.learn(3072, callback=rollouts)
    return rollouts.kept, curves.kept, model.policy.state_dict()


def test_a_whole_run_on_cartpole_has_the_same_bits(caplog):
    """Advantages of every rollout, all losses and rewards that are logged, and the policy in the end."""
    rollouts, curves, policy = cartpole_run()
    with ours.patch(), caplog.at_level(logging.WARNING):
        our_rollouts, our_curves, our_policy = cartpole_run()
    assert "runs as its package has it" not in caplog.text
    assert len(rollouts) == 12 and {"train/loss", "train/value_loss", "rollout/ep_rew_mean"} <= {
        key for key, _ in curves
    }
    assert all(map(np.array_equal, rollouts, our_rollouts))
    assert curves == our_curves
    assert all(torch.equal(policy[name], our_policy[name]) for name in policy)
