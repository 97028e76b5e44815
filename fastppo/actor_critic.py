"""The networks of PPO over one packed batch: policy, critic (its own trunk or the policy's) and frozen reference."""

from __future__ import annotations

import copy
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model import Critic, ValueHead, lm_head, packed_hidden, shift_right
from fastppo.ops import linear_token_logprobs
from fastppo.rollout import Rollout


class PolicyOutputs(NamedTuple):
    """For the N action tokens of a batch, in packed order; None where it was not asked for."""

    logprobs: Tensor | None  # fp32 [N]
    entropy: Tensor | None  # fp32 [N]
    values: Tensor | None  # fp32 [N], value of the state before each token
    final_values: Tensor | None  # fp32 [B], value of the state after each sequence's last token


def action_positions(batch: Rollout) -> Tensor:
    """int64 [N]: where the action tokens stand in packed order."""
    return batch.action_mask.nonzero().squeeze(1)


class ActorCritic(nn.Module):
    """Policy and critic that learn, and the reference that does not (None where no KL term needs it)."""

    def __init__(self, policy: PreTrainedModel, *, shared_trunk: bool, with_reference: bool) -> None:
        super().__init__()
        self.policy = policy
        self.critic = None if shared_trunk else Critic.from_model(policy)
        self.value_head = ValueHead(lm_head(policy).weight.shape[1]).to(policy.device) if shared_trunk else None
        reference = copy.deepcopy(policy).requires_grad_(False) if with_reference else None
        # Not a submodule: neither optimizers nor checkpoints touch the reference.
        object.__setattr__(self, "reference", reference)

    def forward(
        self, batch: Rollout, *, policy: bool = True, values: bool = True, entropy: bool = True
    ) -> PolicyOutputs:
        """Policy log-probabilities, entropy and values of the batch's action tokens; differentiable."""
        actions = action_positions(batch)
        trunk_needed = policy or (values and self.critic is None)
        hidden = _hidden(self.policy, batch) if trunk_needed else None
        logprobs = token_entropy = None
        if policy:
            out = _head_logprobs(self.policy, hidden, batch, actions, with_entropy=entropy)
            logprobs, token_entropy = out if entropy else (out, None)
        if not values:
            return PolicyOutputs(logprobs, token_entropy, None, None)
        state_values = self._state_values(batch, hidden)
        before_token = shift_right(state_values, batch.cu_seqlens)[actions]
        return PolicyOutputs(logprobs, token_entropy, before_token, state_values[batch.cu_seqlens[1:].long() - 1])

    def _state_values(self, batch: Rollout, hidden: Tensor | None) -> Tensor:
        """fp32 [T]: value of the state after each token."""
        if self.critic is None:
            return self.value_head(hidden)
        return self.critic(batch.tokens, batch.position_ids, batch.cu_seqlens)

    @torch.no_grad()
    def reference_logprobs(self, batch: Rollout) -> Tensor:
        """fp32 [N]: the reference's log-probabilities of the action tokens, at the sampling temperature."""
        return _head_logprobs(self.reference, _hidden(self.reference, batch), batch, action_positions(batch), False)

    def critic_parameters(self) -> list[tuple[str, nn.Parameter]]:
        module = self.critic if self.critic is not None else self.value_head
        return list(module.named_parameters())

    def trained_modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by file name."""
        return {"policy": self.policy, "critic": self.critic if self.critic is not None else self.value_head}


def _hidden(model: PreTrainedModel, batch: Rollout) -> Tensor:
    return packed_hidden(model, batch.tokens, batch.position_ids, batch.cu_seqlens)


def _head_logprobs(model: PreTrainedModel, hidden: Tensor, batch: Rollout, actions: Tensor, with_entropy: bool):
    """The state before token t is hidden[t - 1]: only the rows that score an action token go through the head."""
    head = lm_head(model)
    return linear_token_logprobs(
        hidden[actions - 1],
        head.weight,
        batch.tokens[actions],
        head.bias,
        temperature=batch.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        return_entropy=with_entropy,
    )


def weights_sha256(model: nn.Module) -> str:
    """Fingerprint of a model's parameters, to notice that a resumed run was given another reference."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
