"""A critic as the value function of a search, from a trainer or from a run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.checkpoint import load_latest_checkpoint
from fastppo.errors import CheckpointError
from fastppo.model import Critic, SharedPrompts, ValueHead, evaluating, lm_head
from fastppo.model.host import on_device
from fastppo.roles import Roles
from fastppo.rollout.record import bounds_of
from fastppo.run_folder import CHECKPOINTS
from fastppo.search.answers import Values

TOKENS_A_FORWARD = 2**14


def critic_values(critic: Critic | Roles) -> Values:
    """The values of a critic, or of the critic among a trainer's roles, which may share the policy's trunk.

    Whole sequences are run, without a cache; states that differ in the last token alone, as a look-ahead has them, share the rest.

    Raises ValueError where the roles have no critic, or one that is an adapter on the policy's trunk (critic.kind lora).
    """
    if isinstance(critic, Roles):
        critic = _critic_of(critic)

    @torch.no_grad()
    def values(sequences: list[list[int]]) -> list[float]:
        with evaluating(critic):
            return [value for batch in _batches(sequences) for value in _state_values(critic, batch).tolist()]

    return values


def load_critic(run: str | Path, model: PreTrainedModel) -> Critic:
    """The critic of a run's newest checkpoint, on the device of `model`, which is the run's policy. A shared trunk is the policy's.

    Raises ValueError where there is no checkpoint or no critic in it, CheckpointError where `model` is another model.
    """
    run = Path(run).expanduser()
    found = load_latest_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise ValueError(f"{run} has no checkpoints, expected a run folder with some")
    path, (tensors, _, _) = found
    saved = tensors.get("critic")
    if saved is None:
        raise ValueError(f"{path} has no critic, expected one of a run with critic.kind separate or shared")
    shared = not any(name.startswith("trunk.") for name in saved)
    if shared:
        _require_same_weights(path, tensors["policy"], model)
        critic = Critic(model.base_model, ValueHead(lm_head(model).weight.shape[1], device=model.device))
    else:
        critic = Critic.from_model(model)
    try:
        (critic.head if shared else critic).load_state_dict(saved)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds the critic of another model: {error}") from error
    return critic


def _require_same_weights(path: Path, policy: dict[str, Tensor], model: PreTrainedModel) -> None:
    """A head on the policy's trunk reads this very trunk."""
    mine = model.state_dict()
    same = policy.keys() == mine.keys() and all(
        policy[name].shape == tensor.shape and torch.equal(policy[name].to(tensor.device, tensor.dtype), tensor)
        for name, tensor in mine.items()
    )
    if not same:
        raise CheckpointError(
            f"{path} has a critic on the trunk of its own policy, which the model is not: fastppo export writes that policy"
        )


def _critic_of(roles: Roles) -> Critic:
    if roles.adapters is not None and roles.critic is not None:
        raise ValueError(
            "the critic is an adapter on the policy's trunk, expected critic.kind separate or shared in a search"
        )
    if roles.critic is not None:
        return roles.critic
    if roles.value_head is None:
        raise ValueError("the roles have no critic, expected critic.kind separate or shared")
    return Critic(roles.policy.base_model, roles.value_head)


def _batches(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences side by side, of at most `TOKENS_A_FORWARD` tokens or a single one."""
    batch: list[list[int]] = []
    tokens = 0
    for sequence in sequences:
        if batch and tokens + len(sequence) > TOKENS_A_FORWARD:
            yield batch
            batch, tokens = [], 0
        batch.append(sequence)
        tokens += len(sequence)
    if batch:
        yield batch


def _state_values(critic: Critic, sequences: list[list[int]]) -> Tensor:
    """fp32 [n], of the states after the last tokens."""
    device = critic.head.weight.device
    lengths = [len(sequence) for sequence in sequences]
    bounds = bounds_of(lengths)
    tokens = on_device([token for sequence in sequences for token in sequence], device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    numbers: dict[tuple[int, ...], int] = {}
    groups = [numbers.setdefault(tuple(sequence[:-1]), len(numbers)) for sequence in sequences]
    shared = None
    if len(numbers) < len(sequences):
        shared = SharedPrompts(bounds, [length - 1 for length in lengths], groups, device)
    ends = on_device(bounds[1:], device) - 1
    return critic(tokens, positions, bounds, shared)[ends if shared is None else shared.rows[ends]]
