"""PPO and TRPO on Gymnasium's control tasks: one file on our ops, to read from top to bottom and to change; its pictures are in control_pictures.py.

    python examples/control.py CartPole-v1 [--seeds N] [--algorithm trpo] [--output DIR] [--lr 3e-4 and every other setting]

It needs gymnasium, matplotlib for the curve, and pygame-ce for the film of an episode; envpool's environments are taken where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from control_pictures import Panel, averaged, film, save_curves
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastppo.ops import gae, masked_whiten, ppo_loss, sample_tokens, token_logprobs

CLIP = 10.0  # normalised observations and rewards stay within +-CLIP


@dataclass(frozen=True)
class Settings:
    """Of one run; the defaults are CartPole's."""

    env: str = "CartPole-v1"
    algorithm: str = "ppo"
    """ppo or trpo."""
    total_steps: int = 100_000
    """Of all environments together, those included that only reset one."""
    num_envs: int = 32
    rollout_steps: int = 32
    """Of each environment between two updates."""
    gamma: float = 0.98
    gae_lambda: float = 0.8
    lr: float = 2e-3
    """Adam's, which falls linearly to 0."""
    epochs: int = 6
    num_minibatches: int = 4
    clip: float = 0.2
    vf_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 0.5
    width: int = 64
    """Of the two hidden layers of actor and critic."""
    initial_log_std: float = 0.0
    """Of continuous actions."""
    normalize_observations: bool = False
    normalize_rewards: bool = False
    max_kl: float = 0.01
    """TRPO: the limit of KL(old || new) in a step."""


_NORMALIZED = replace(Settings(), normalize_observations=True, normalize_rewards=True)
TASKS = {
    "CartPole-v1": Settings(),
    "Acrobot-v1": replace(
        _NORMALIZED,
        env="Acrobot-v1",
        epochs=4,
        total_steps=200_000,
        rollout_steps=64,
        num_minibatches=8,
        gamma=0.99,
        gae_lambda=0.94,
        lr=1e-3,
    ),
    "Pendulum-v1": replace(
        _NORMALIZED,
        env="Pendulum-v1",
        normalize_observations=False,
        rollout_steps=64,
        epochs=10,
        gamma=0.9,
        gae_lambda=0.95,
        lr=3e-3,
    ),
    "LunarLander-v3": replace(
        _NORMALIZED,
        env="LunarLander-v3",
        total_steps=1_000_000,
        rollout_steps=128,
        epochs=4,
        num_minibatches=32,
        gamma=0.999,
        gae_lambda=0.98,
        lr=1e-3,
        entropy_coef=0.01,
    ),
    "Hopper-v5": replace(
        _NORMALIZED,
        env="Hopper-v5",
        epochs=10,
        total_steps=1_000_000,
        rollout_steps=128,
        num_minibatches=16,
        gamma=0.99,
        gae_lambda=0.95,
        lr=6e-4,
    ),
}


class Agent(nn.Module):
    """Actor and critic, two networks. Actions are int64 [...] of a Discrete space, or float32 [..., A] of a Box."""

    def __init__(self, envs: VectorEnv, settings: Settings) -> None:
        super().__init__()
        observations, actions = envs.single_observation_space, envs.single_action_space
        if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
            raise ValueError(f"the observations of {settings.env} are {observations}, expected a Box of one dimension")
        if not isinstance(actions, gym.spaces.Discrete | gym.spaces.Box):
            raise ValueError(f"the actions of {settings.env} are {actions}, expected Discrete or Box")
        self.action_space = actions
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        size = int(actions.n) if self.discrete else math.prod(actions.shape)
        self.actor = network(observations.shape[0], settings.width, size, last_gain=0.01)
        self.critic = network(observations.shape[0], settings.width, 1, last_gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((size,), settings.initial_log_std))

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters(), *([] if self.log_std is None else [self.log_std])]

    @torch.no_grad()
    def act(self, observations: Tensor, *, step: int = 0, seed: int = 0, greedy: bool = False) -> Tensor:
        """Actions for observations [N, D]; drawn ones depend on seed and step (Box: on torch's generator)."""
        found = self.actor(observations)
        if self.discrete:
            positions = torch.full((len(found),), step)
            return sample_tokens(found, temperature=float(not greedy), seed=seed, positions=positions).tokens
        return found if greedy else torch.normal(found, self.log_std.exp().expand_as(found))

    def logprobs(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """([M], [M]): log-probs of the actions and entropies in nats."""
        if self.discrete:
            return token_logprobs(self.actor(observations), actions, return_entropy=True)
        policy = self.distribution(observations)
        return policy.log_prob(actions), policy.entropy()

    def distribution(self, observations: Tensor) -> Distribution:
        found = self.actor(observations)
        if self.discrete:
            return Categorical(logits=found, validate_args=False)
        return Independent(Normal(found, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def values(self, observations: Tensor) -> Tensor:
        return self.critic(observations).squeeze(-1)


def network(inputs: int, width: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers with tanh; orthogonal weights, small ones in the last layer of an actor: it begins undecided."""
    layers = [nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Rollout(NamedTuple):
    """T steps of N environments, time first."""

    observations: Tensor  # float32 [T + 1, N, D]
    actions: Tensor  # int64 [T, N] or float32 [T, N, A], as drawn
    rewards: Tensor  # float32 [T, N]
    terminated: Tensor  # bool [T, N]
    truncated: Tensor  # bool [T, N]
    real: Tensor  # bool [T, N]; False where the environment ignored the action and reset itself


class Normalizer:
    """Running moments of observations, and of the discounted sum of rewards, by whose deviation rewards are divided."""

    def __init__(self, num_envs: int, size: int, settings: Settings) -> None:
        self.settings = settings
        self.of_observations, self.of_sums = RunningMeanStd(shape=(size,)), RunningMeanStd()
        self.sums = np.zeros(num_envs)

    def observations(self, x: np.ndarray, learn: bool = True) -> Tensor:
        """float32 of observations [N, D]."""
        if self.settings.normalize_observations:
            if learn:
                self.of_observations.update(x)
            x = (x - self.of_observations.mean) / np.sqrt(self.of_observations.var + 1e-8)
            x = x.clip(-CLIP, CLIP)
        return torch.from_numpy(np.asarray(x, np.float32))

    def rewards(self, x: np.ndarray, real: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Of rewards [N] of a step; an environment's sum begins again after its episode has ended."""
        if not self.settings.normalize_rewards:
            return x
        self.sums = self.sums * self.settings.gamma + x
        if real.any():
            self.of_sums.update(self.sums[real])
        self.sums[ended] = 0.0
        return (x / np.sqrt(self.of_sums.var + 1e-8)).clip(-CLIP, CLIP)


class Collector:
    """Steps the environments with the agent, and counts the returns of their episodes."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.steps = settings, seed, 0
        self.envs, first = make_envs(settings.env, settings.num_envs, seed)
        self.normalizer = Normalizer(settings.num_envs, first.shape[1], settings)
        self.observations = self.normalizer.observations(first)
        self.real = np.ones(settings.num_envs, bool)
        self.sums = np.zeros(settings.num_envs)
        self.returns: list[tuple[int, float]] = []
        """(steps so far, undiscounted return) of each episode that has ended."""

    def collect(self, agent: Agent) -> Rollout:
        """The environments reset themselves in the step after an episode's last (AutoresetMode.NEXT_STEP): what follows an episode's last
        action in `observations` is therefore the state it led to, from whose value a truncated episode is bootstrapped.
        """
        steps = []
        for _ in range(self.settings.rollout_steps):
            actions = agent.act(self.observations, step=self.steps, seed=self.seed)
            observations, rewards, terminated, truncated, _ = self.envs.step(
                within_bounds(actions.numpy(), self.envs.single_action_space)
            )
            ended = terminated | truncated
            scaled = self.normalizer.rewards(rewards, self.real, ended)
            steps.append((self.observations, actions, scaled, terminated, truncated, self.real))
            self.steps += self.settings.num_envs
            self._count(rewards, ended)
            self.observations, self.real = self.normalizer.observations(observations), ~ended
        observations, actions, *rest = zip(*steps, strict=True)
        rewards, *flags = (torch.from_numpy(np.stack(x)) for x in rest)
        return Rollout(torch.stack([*observations, self.observations]), torch.stack(actions), rewards.float(), *flags)

    def _count(self, rewards: np.ndarray, ended: np.ndarray) -> None:
        self.sums += rewards
        self.returns += [(self.steps, float(x)) for x in self.sums[ended]]
        self.sums[ended] = 0.0


def make_envs(env: str, count: int, seed: int) -> tuple[VectorEnv, np.ndarray]:
    """Environments and their first observations [N, D]: envpool's where it has the task, else Gymnasium's, vectorised where there is a version so."""
    if in_envpool(env):
        import envpool

        # One thread: a step takes microseconds, and waiting for other threads would take longer.
        envs = envpool.make(env, env_type="gymnasium", num_envs=count, num_threads=1, seed=seed)
        return envs, envs.reset()[0]
    envs = gym.make_vec(env, num_envs=count)
    if (mode := envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)) is not AutoresetMode.NEXT_STEP:
        raise ValueError(f"the autoreset mode of {env} is {mode}, expected {AutoresetMode.NEXT_STEP}")
    return envs, envs.reset(seed=seed)[0]


def in_envpool(env: str) -> bool:
    """Whether envpool is installed and has the task; an envpool that cannot be imported is told of and left aside."""
    if importlib.util.find_spec("envpool") is None:
        return False
    try:
        import envpool
    except (ImportError, OSError) as error:  # OSError: files that come with envpool-assets are missing
        warnings.warn(
            f"Gymnasium's environments are taken: envpool is installed, but its import fails: {error}", stacklevel=2
        )
        return False
    return env in envpool.list_all_envs()


def within_bounds(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    return actions if isinstance(space, gym.spaces.Discrete) else actions.clip(space.low, space.high)


class Batch(NamedTuple):
    """The M real steps of a rollout."""

    observations: Tensor  # [M, D]
    actions: Tensor  # [M] or [M, A]
    logprobs: Tensor  # [M], of the policy that acted
    advantages: Tensor  # [M]
    returns: Tensor  # [M]


@torch.no_grad()
def credit(agent: Agent, rollout: Rollout, settings: Settings) -> Batch:
    """Advantages and returns. After a terminated step nothing counts, after a truncated one the value of the state it led to."""
    values = agent.values(rollout.observations)
    advantages, returns = gae(
        rollout.rewards.T,
        values[:-1].T,
        rollout.real.T,
        gamma=settings.gamma,
        lam=settings.gae_lambda,
        dones=rollout.terminated.T,
        truncated=rollout.truncated.T,
        next_values=values[1:].T,
    )
    observations, actions = rollout.observations[:-1][rollout.real], rollout.actions[rollout.real]
    logprobs, _ = agent.logprobs(observations, actions)
    return Batch(observations, actions, logprobs, advantages.T[rollout.real], returns.T[rollout.real])


def ppo_update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings) -> None:
    """Policy and critic over epochs of minibatches, within which advantages are whitened."""
    for chosen in minibatches(batch, settings):
        part = Batch(*(x[chosen] for x in batch))
        logprobs, entropy = agent.logprobs(part.observations, part.actions)
        loss, _ = ppo_loss(
            logprobs,
            part.logprobs,
            masked_whiten(part.advantages),
            values=agent.values(part.observations),
            returns=part.returns,
            entropy=entropy,
            clip_low=settings.clip,
            clip_high=settings.clip,
            vf_coef=settings.vf_coef,
            entropy_coef=settings.entropy_coef,
        )
        descend(loss, agent, optimizer, settings)


def minibatches(batch: Batch, settings: Settings) -> Iterator[Tensor]:
    """Places in the batch, each once an epoch, in a new order each."""
    for _ in range(settings.epochs):
        yield from torch.randperm(len(batch.advantages)).tensor_split(settings.num_minibatches)


def descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
    optimizer.step()


def trpo_update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings) -> None:
    """One step of the policy within a trust region, then epochs of minibatches for the critic."""
    # Here, so that whoever takes PPO does not wait for Transformers, which the trainer of language models brings along.
    from fastppo.algorithms.trust_region import Comparison, flat, line_search, longest_step
    from fastppo.config import TRPOConfig

    config, parameters = TRPOConfig(max_kl=settings.max_kl), agent.policy_parameters()
    theta, advantages = parameters_to_vector(parameters).detach(), masked_whiten(batch.advantages)
    with torch.no_grad():
        old = agent.distribution(batch.observations)

    def gradient_of(x: Tensor, **options: bool) -> Tensor:
        return flat(torch.autograd.grad(x, parameters, **options))

    def fisher_vector(v: Tensor) -> Tensor:
        kl = kl_divergence(old, agent.distribution(batch.observations)).mean()
        return gradient_of(gradient_of(kl, create_graph=True) @ v)

    @torch.no_grad()
    def move_and_compare(step: Tensor) -> Comparison:
        vector_to_parameters(theta + step, parameters)
        new = agent.distribution(batch.observations)
        surrogate = (new.log_prob(batch.actions) - batch.logprobs).exp() * advantages
        found = kl_divergence(old, new), surrogate, old.entropy()
        return Comparison(*(x.mean().item() for x in found))

    logprobs = agent.distribution(batch.observations).log_prob(batch.actions)
    step = longest_step(fisher_vector, gradient_of((logprobs * advantages).mean()), config)
    line_search(move_and_compare, step, advantages.mean().item(), config)
    for chosen in minibatches(batch, settings):
        loss = nn.functional.mse_loss(agent.values(batch.observations[chosen]), batch.returns[chosen])
        descend(loss, agent.critic, optimizer, settings)


class Run(NamedTuple):
    agent: Agent
    normalizer: Normalizer
    returns: list[tuple[int, float]]
    """(steps so far, return) of the episodes that ended in training."""
    steps: int
    seconds: float
    cpu_seconds: float

    def policy(self, observations: np.ndarray) -> np.ndarray:
        """The likeliest actions, within the environment's bounds."""
        actions = self.agent.act(self.normalizer.observations(observations, learn=False), greedy=True)
        return within_bounds(actions.numpy(), self.agent.action_space)


def train(settings: Settings, seed: int) -> Run:
    """`settings.total_steps` steps; the times are without the making of environments and agent."""
    update = {"ppo": ppo_update, "trpo": trpo_update}[settings.algorithm]
    torch.manual_seed(seed)
    collector = Collector(settings, seed)
    agent = Agent(collector.envs, settings)
    optimizer = torch.optim.Adam(agent.parameters(), lr=settings.lr, eps=1e-5, fused=True)
    wall, cpu = time.perf_counter(), time.process_time()
    while collector.steps < settings.total_steps:
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - collector.steps / settings.total_steps)
        batch = credit(agent, collector.collect(agent), settings)
        update(agent, optimizer, batch, settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    collector.envs.close()
    return Run(agent, collector.normalizer, collector.returns, collector.steps, wall, cpu)


Policy = Callable[[np.ndarray], np.ndarray]  # actions for observations [N, D]


def evaluate(policy: Policy, env: str, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of an episode in each of so many environments, Gymnasium's own."""
    envs = gym.make_vec(env, num_envs=episodes)
    observations, _ = envs.reset(seed=seed)
    running, returns = np.ones(episodes, bool), np.zeros(episodes)
    while running.any():
        observations, rewards, terminated, truncated, _ = envs.step(policy(observations))
        returns[running] += rewards[running]
        running &= ~(terminated | truncated)
    envs.close()
    return returns.tolist()


def read_arguments(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Every setting is an option; what is not given is the task's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help=f"with settings of their own: {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, with the seeds 1, 2, ... (default 1)")
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation after each run (default 100)")
    parser.add_argument("--output", type=Path, help="folder for results and pictures (default runs/control/ENV)")
    for field in fields(Settings)[1:]:
        kind = argparse.BooleanOptionalAction if field.type == "bool" else None
        options = {"action": kind} if kind else {"type": type(field.default)}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    arguments = parser.parse_args(argv)
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}, expected at least 1")
    if arguments.algorithm not in (None, "ppo", "trpo"):
        parser.error(f"--algorithm is {arguments.algorithm!r}, expected ppo or trpo")
    task = TASKS.get(arguments.env, Settings())
    return replace(task, **{name: x for name, x in given.items() if x is not None}), arguments


def main(argv: list[str] | None = None) -> list[float]:
    """Train and evaluate with each seed; returns the mean return of each."""
    settings, arguments = read_arguments(argv)
    folder = arguments.output or Path("runs/control") / settings.env
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are too small for more
    runs, means = [], []
    for seed in range(1, arguments.seeds + 1):
        runs.append(run := train(settings, seed))
        means.append(float(np.mean(evaluate(run.policy, settings.env, arguments.episodes, seed=10_000 + seed))))
        print(f"seed {seed}: mean return {means[-1]:.1f}, {run.steps / run.seconds:,.0f} steps/s", flush=True)
    found = {
        "settings": asdict(settings),
        "mean_returns": means,
        "steps_per_second": [r.steps / r.seconds for r in runs],
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    curves = {settings.algorithm: [averaged(run.returns, run.steps) for run in runs]}
    save_curves([Panel(settings.env, runs[0].steps, curves)], folder / "curve.png")
    try:
        film(runs[-1].policy, settings.env, folder)
    except Exception as error:  # it only shows; without a display mujoco raises an error of its own
        print(f"no film of an episode: {error}")
    print(f"{settings.env}: {np.mean(means):.1f} over {len(runs)} seeds; {folder}")
    return means


if __name__ == "__main__":
    main()
