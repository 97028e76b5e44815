"""The shortest time that a step can take: products at the device's dense rate, decoding at its bandwidth, collectives at the links'.

Nothing overlaps, and kernels reach what the data sheet says: no run is as fast. Sequences are as long as the settings let them become.
"""

from __future__ import annotations

from typing import NamedTuple

from fastppo.sizing.setup import FP32, Setup, own_trunk
from fastppo.sizing.shapes import ModelShape


class StepTime(NamedTuple):
    """Seconds of a step's phases on a rank."""

    sampling: float
    scoring: float
    update: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        return sum(self)


def step_time(setup: Setup) -> StepTime:
    return StepTime(
        sampling=_sampling(setup),
        scoring=_scoring(setup) / _flops(setup),
        update=_update(setup) / _flops(setup),
        optimizer=_optimizer_bytes(setup) / _bandwidth(setup),
        communication=communicated(setup) / _link(setup),
    )


def _flops(setup: Setup) -> float:
    return setup.device.flops(setup.dtype) / (setup.ranks if setup.on_cpu else 1)


def _bandwidth(setup: Setup) -> float:
    return setup.device.bandwidth / (setup.ranks if setup.on_cpu else 1)


def _sampling(setup: Setup) -> float:
    """Prompts once, then as many decode steps as there are waves of sequences side by side times new tokens; each step reads the weights that a
    token goes through and every sequence's keys and values, half of them on average."""
    policy, size, rows = setup.networks.policy, setup.dtype.itemsize, setup.side_by_side
    steps = _decode_steps(setup)
    weights = policy.trunk + policy.head  # many rows go to all experts together
    read = size * (weights + rows * policy.cached * (setup.prompt + setup.new / 2))
    multiplied = 2 * rows * (policy.used_trunk + policy.head)
    tokens = setup.sampled_prompts * setup.prompt
    prompts = 2 * policy.used_trunk * tokens + _attention(setup, policy, tokens)
    seconds = prompts / _flops(setup) + steps * max(read / _bandwidth(setup), multiplied / _flops(setup))
    return seconds / setup.team


def _decode_steps(setup: Setup) -> int:
    return -(-setup.decoded // setup.side_by_side) * setup.new


def _attention(setup: Setup, shape: ModelShape, tokens: float) -> float:
    """Products of queries with keys and of weights with values, for tokens that see half a sequence on average."""
    return 4 * shape.query * tokens * setup.longest / 2


def _trunk(setup: Setup, shape: ModelShape) -> float:
    """Flops of the forward pass of all of a step's tokens."""
    return 2 * shape.used_trunk * setup.tokens + _attention(setup, shape, setup.tokens)


def _head(setup: Setup) -> float:
    return 2 * setup.networks.policy.head * setup.sequences * setup.new


def _scoring(setup: Setup) -> float:
    """Forward passes for old log-probs and values, and for the reference's log-probs. What a Llama-like model in fp32 samples on a CPU, or
    with `rollout.exact`, has the bits of a forward pass, which is left out then."""
    policy = setup.networks.policy
    setting = setup.config.rollout.recompute_logprobs
    exact = setup.by_kernels(policy) or setup.config.rollout.exact
    recomputed = setting == "always" or (setting == "auto" and not exact)
    flops = (_trunk(setup, policy) + _head(setup)) * (recomputed + setup.has_reference)
    if setup.critic is not None:
        flops += _trunk(setup, setup.critic)
    return flops + (_trunk(setup, policy) if setup.critic_kind == "lora" else 0)


def _update(setup: Setup) -> float:
    """Forward, and backward two products for each of the forward's, one where the weight is frozen; a checkpointed trunk forward once more."""
    policy, lora = setup.networks.policy, setup.config.lora.r > 0
    passes = (2 if lora else 3) + setup.config.learner.gradient_checkpointing
    flops = passes * _trunk(setup, policy) + (3 if lora else 4) * _head(setup)  # the head makes its logits again
    if setup.critic is not None:
        flops += passes * _trunk(setup, setup.critic)
    elif setup.critic_kind == "lora":
        flops += passes * _trunk(setup, policy)
    return setup.config.learner.epochs * flops


def _optimizer_bytes(setup: Setup) -> float:
    """Read: weight, fp32 gradient, two moments; written: all but the gradient, and the weight of a master."""
    learns = (setup.policy_learns + setup.critic_learns) / setup.shards
    size = setup.dtype.itemsize
    weight = FP32 if setup.has_masters or setup.config.lora.r else size
    rounded = size if setup.has_masters else 0
    return setup.updates * learns * (2 * weight + FP32 + 2 * setup.moment_bytes + rounded)


def communicated(setup: Setup) -> float:
    """Bytes that a rank sends in a step, of collectives in rings: an all-reduce of x bytes 2 x (N - 1) / N, an all-gather or a reduce-scatter half.

    Replicated weights: the fp32 gradients of each update. Sharded ones: the weights of each forward and each backward pass of a micro-batch and
    its gradients, those of scoring, and the policy once to sample from.
    """
    ring = (setup.ranks - 1) / setup.ranks
    learns = setup.policy_learns + setup.critic_learns
    if setup.shards == 1:
        return ring * 2 * FP32 * learns * setup.updates
    policy, size = setup.networks.policy, setup.dtype.itemsize
    trained = policy.parameters + (0 if setup.critic is None else own_trunk(setup.critic))
    scored = trained + (policy.parameters if setup.has_reference else 0)
    scoring, updating = setup.microbatches * setup.config.learner.num_minibatches, setup.microbatches * setup.updates
    gathered = size * (policy.parameters + scoring * scored + 2 * updating * trained)
    return ring * (gathered + FP32 * learns * updating) + _sent_to_team(setup)


def _sent_to_team(setup: Setup) -> float:
    """Of ranks that sample together: two sums of hidden states a layer for each token, and the logits of each that is drawn."""
    policy, ring = setup.networks.policy, (setup.team - 1) / setup.team
    drawn = _decode_steps(setup) * setup.side_by_side
    tokens = setup.sampled_prompts * setup.prompt + drawn
    sums = 2 * 2 * policy.layers * policy.hidden * setup.dtype.itemsize
    return ring * (tokens * sums + drawn * FP32 * policy.vocabulary)


def _link(setup: Setup) -> float:
    """Bytes a second of the slowest link in a ring."""
    one_node = setup.ranks <= setup.device.node
    return setup.device.link if one_node else min(setup.device.link, setup.network)
