"""What is planned for: a run's settings, its networks, and the devices that share them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from fastppo.config import CRITIC_ESTIMATORS, PPOConfig
from fastppo.model import context_length, load_outline
from fastppo.model.tensor_parallel import require_divisible
from fastppo.sizing.devices import Device
from fastppo.sizing.shapes import ModelShape, shape_of

Sharding = Literal["none", "full"]
FP32 = 4
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: with a scale of 8 bits for each 64 weights, and an fp32 one for each 256 of these (arXiv:2305.14314, section 3)."""
SCALED_8_BIT = 1 + 4 / 256
"""Bytes of a number in 8 bits with an fp32 scale for each 256 (arXiv:2110.02861)."""


class Networks(NamedTuple):
    """Shapes of the policy, and of the critic's trunk where that is another model's."""

    policy: ModelShape
    critic: ModelShape | None


def networks_of(config: PPOConfig, model: str, dtype: torch.dtype) -> Networks:
    """From the models' configurations alone. Raises ValueError where there is no such model, or where model or algorithm cannot be planned for."""
    if config.algorithm != "ppo":
        raise ValueError(
            f"algorithm is {config.algorithm}, expected ppo: what another one needs is not known to a plan"
        )
    critic = config.critic.model
    policy = _shape(model, dtype, config.distributed.tensor_parallel)
    return Networks(policy, None if critic is None else _shape(critic, dtype))


def weights_type(name: str, on_cpu: bool) -> torch.dtype:
    """Of `model.dtype`."""
    return getattr(torch, ("float32" if on_cpu else "bfloat16") if name == "auto" else name)


def _shape(model: str, dtype: torch.dtype, team: int = 1) -> ModelShape:
    outline = load_outline(model)
    if team > 1:
        require_divisible(outline, team)
    return shape_of(outline, dtype, context_length(outline))


@dataclass(frozen=True)
class Setup:
    """A run on `ranks` devices, each with a process of its own.

    prompt: tokens of the longest prompt. sharding: "full" spreads weights, gradients and optimizer over the ranks (FSDP2); with "none" each rank
    has all of them. network: bytes a second from a device to those of other nodes.
    """

    config: PPOConfig
    networks: Networks
    device: Device
    dtype: torch.dtype
    prompt: int
    ranks: int = 1
    sharding: Sharding = "none"
    network: float = 0.0

    def changed(self, sharding: Sharding | None = None, ranks: int | None = None, **settings: Any) -> Setup:
        """With other settings: section__key=value."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            section, _, key = name.partition("__")
            sections.setdefault(section, {})[key] = value
        changed = {section: replace(getattr(self.config, section), **values) for section, values in sections.items()}
        config = replace(self.config, **changed)
        return replace(self, config=config, sharding=sharding or self.sharding, ranks=ranks or self.ranks)

    @property
    def shards(self) -> int:
        """Over how many ranks weights and optimizer are spread."""
        return self.ranks if self.sharding == "full" else 1

    @property
    def team(self) -> int:
        """How many ranks sample together."""
        return self.config.distributed.tensor_parallel if self.shards > 1 else 1

    @property
    def on_cpu(self) -> bool:
        return self.device.name == "cpu"

    @property
    def memory(self) -> float:
        """Bytes of a device; of the machine's, where ranks share it, a rank's part."""
        return self.device.memory / (self.ranks if self.on_cpu else 1)

    # A step, at the longest that its sequences may become

    @property
    def new(self) -> int:
        return self.config.rollout.max_new_tokens

    @property
    def longest(self) -> int:
        return self.prompt + self.new

    @property
    def prompts(self) -> int:
        """Of a rank in a step."""
        return -(-self.config.rollout.prompts_per_step // self.ranks)

    @property
    def sequences(self) -> int:
        """Of a rank in a step."""
        return -(-self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt // self.ranks)

    @property
    def sampled_prompts(self) -> int:
        """That a rank, or the team that it is one of, samples for in a step."""
        return -(-self.config.rollout.prompts_per_step * self.team // self.ranks)

    @property
    def sampled(self) -> int:
        """Sequences of these prompts."""
        return self.sampled_prompts * self.config.rollout.samples_per_prompt

    @property
    def decoded(self) -> int:
        """Sequences that a rank decodes in a step: its own, or those of its team."""
        return self.sampled if self.team > 1 else self.sequences

    @property
    def side_by_side(self) -> int:
        """Sequences that a rank decodes together."""
        return min(self.config.rollout.batch_size, self.decoded)

    @property
    def tokens(self) -> int:
        """That a rank runs in a pass over a step; a prompt's once for all its samples."""
        return self.prompts * self.prompt + self.sequences * self.new

    @property
    def action_share(self) -> float:
        return self.sequences * self.new / self.tokens

    @property
    def minibatch(self) -> int:
        """Tokens of a rank's share of a minibatch."""
        return max(-(-self.tokens // self.config.learner.num_minibatches), self.longest)

    @property
    def microbatch(self) -> int:
        """Most tokens that run together."""
        return min(max(self.config.learner.tokens_per_microbatch, self.longest), self.minibatch)

    @property
    def microbatches(self) -> int:
        """Of a minibatch."""
        return -(-self.minibatch // self.microbatch)

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.config.learner.epochs * self.config.learner.num_minibatches

    # Networks

    @property
    def critic_kind(self) -> str:
        return self.config.critic.kind or "none"

    @property
    def critic(self) -> ModelShape | None:
        """Of a critic's own trunk."""
        return (self.networks.critic or self.networks.policy) if self.critic_kind == "separate" else None

    @property
    def has_reference(self) -> bool:
        return self.config.reward.kl_coef > 0 or self.config.loss.kl_coef > 0

    @property
    def has_values(self) -> bool:
        return self.config.advantage.estimator in CRITIC_ESTIMATORS

    @property
    def sampled_bytes(self) -> float:
        """Of the copy of sharded weights that a rank samples from: all of them, or its part in a team's."""
        policy, size = self.networks.policy, self.dtype.itemsize
        if self.team == 1:
            return self.policy_bytes
        return size * (policy.parameters - policy.divided + policy.divided / self.team)

    @property
    def policy_bytes(self) -> float:
        """Of the policy's weights, those beside adapters perhaps in 4 bits."""
        policy, size = self.networks.policy, self.dtype.itemsize
        quantised = 0
        if self.config.lora.quantization is not None:
            quantised = sum(inputs * outputs * number for _, inputs, outputs, number in self._targets())
        return size * (policy.parameters - quantised) + NF4 * quantised

    def by_kernels(self, shape: ModelShape) -> bool:
        """Whether our kernels run the layers of this trunk, forward and backward."""
        return (
            self.on_cpu
            and self.dtype.itemsize == FP32
            and shape.widths is not None
            and not self.config.lora.quantization
        )

    @property
    def has_masters(self) -> bool:
        """Whether what learns has fp32 copies. Adapters are fp32 whatever the type of the weights."""
        stochastic = self.config.optimizer.bf16_stochastic_round and self.dtype == torch.bfloat16
        return self.dtype.itemsize < FP32 and not self.config.lora.r and not stochastic

    @property
    def moment_bytes(self) -> float:
        """Of both moments of a parameter that learns."""
        if self.config.optimizer.name == "adamw_8bit":
            return 2 * SCALED_8_BIT
        own = FP32 if self.config.lora.r or self.has_masters else self.dtype.itemsize
        return 2 * own

    @cached_property
    def adapter(self) -> int:
        """Parameters of one role's LoRA adapter."""
        rank = self.config.lora.r
        return sum(rank * (inputs + outputs) * number for _, inputs, outputs, number in self._targets())

    def _targets(self) -> list[tuple[str, int, int, int]]:
        """The linear layers that get an adapter."""
        names = self.config.lora.target_modules
        return [each for each in self.networks.policy.linears if names is None or each[0] in names]

    @property
    def policy_learns(self) -> int:
        """Parameters."""
        return self.adapter if self.config.lora.r else self.networks.policy.parameters

    @property
    def critic_learns(self) -> int:
        """Parameters, without a value head's few."""
        if self.critic_kind == "lora":
            return self.adapter
        if self.critic is None:
            return 0
        return own_trunk(self.critic) - (self.critic.attention if self.config.critic.freeze_attention else 0)


def own_trunk(shape: ModelShape) -> int:
    """Parameters of a critic with this trunk: embedding and layers."""
    return shape.trunk + shape.head
