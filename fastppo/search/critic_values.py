"""A critic as the value function of a search, from a trainer or from a run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.checkpoint import load_latest_checkpoint
from fastppo.critic_config import CriticConfig
from fastppo.critics import histogram_of
from fastppo.errors import CheckpointError
from fastppo.export import adapters_on, first_model, policy_adapters_on
from fastppo.model import (
    Critic,
    SharedPrompts,
    evaluating,
    load_model,
    make_value_head,
    prepare_model,
)
from fastppo.model.host import on_device
from fastppo.roles import Roles
from fastppo.rollout.record import bounds_of
from fastppo.run_folder import CHECKPOINTS
from fastppo.search.answers import Values

TOKENS_A_FORWARD = 2**14


def critic_values(critic: Critic | Roles) -> Values:
    """The values of a critic, or of the critic among a trainer's roles, which may share the policy's trunk or be an adapter on it.

    Whole sequences are run, without a cache; states that differ in the last token alone, as a look-ahead has them, share the rest.

    Raises ValueError where the roles have no critic.
    """
    network, speaking = (critic, nullcontext) if isinstance(critic, Critic) else _critic_of(critic)

    @torch.no_grad()
    def values(sequences: list[list[int]]) -> list[float]:
        with evaluating(network), speaking():
            return [value for batch in _batches(sequences) for value in _state_values(network, batch).tolist()]

    return values


def load_critic(run: str | Path, model: PreTrainedModel) -> Critic:
    """The critic of a run's newest checkpoint, on the device of `model`, which is the run's policy. A shared trunk is the policy's; that of an
    adapter is the model which the run started from, loaded besides.

    Raises ValueError where there is no checkpoint, no critic in it, or nothing that says what an adapter was made for; CheckpointError where
    `model`, or the one under the adapter, is another model.
    """
    run = Path(run).expanduser()
    found = load_latest_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise ValueError(f"{run} has no checkpoints, expected a run folder with some")
    path, (tensors, state, _) = found
    if "identity" not in state:
        raise CheckpointError(f"{path} was written by an earlier version of fastppo, expected one of this version")
    saved, identity = tensors.get("critic"), state["identity"]
    if saved is None:
        raise ValueError(f"{path} has no critic, expected one of a run with critic.kind separate, shared or lora")
    settings = {name: identity[f"critic.{name}"] for name in ("head", "bins", "value_range")}
    histogram = histogram_of(CriticConfig(**settings))
    if identity["critic.kind"] == "lora":
        adapters = adapters_on(_first_model(run, identity, model.device), path, identity)
        critic = Critic(adapters.model, make_value_head(adapters.model, histogram))
        learned = adapters.trained("policy", head=critic.head)  # names do not tell whose adapter it was
    elif identity["critic.kind"] == "shared":
        _require_same_weights(path, _policy_state(run, path, tensors["policy"], identity, model.device), model)
        critic = Critic.from_model(model, histogram, share=True)
        learned = critic.head
    else:
        critic = learned = Critic.from_model(model, histogram)
    try:
        learned.load_state_dict(saved)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds the critic of another model: {error}") from error
    return critic


def _first_model(run: Path, identity: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The model that the run started from, and its adapters stand on."""
    name = first_model(run)
    if name is None:
        raise ValueError(
            f"{run} does not say which model it started from, expected a run that does: its adapters are on that one"
        )
    return prepare_model(load_model(name, dtype=identity["model.dtype"], device=device))


def _policy_state(
    run: Path, checkpoint: Path, saved: dict[str, Tensor], identity: dict[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """The weights of the policy that a checkpoint holds, its adapter merged on the device."""
    if identity["lora"] is None:
        return saved
    adapters = policy_adapters_on(_first_model(run, identity, device), checkpoint, identity)
    adapters.trained("policy").load_state_dict(saved)
    return adapters.merged_state()


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


def _critic_of(roles: Roles) -> tuple[Critic, Callable[[], AbstractContextManager]]:
    """(critic, what it speaks in)"""
    if roles.critic is not None:
        return roles.critic, lambda: roles.speaking("critic")
    if roles.value_head is None:
        raise ValueError("the roles have no critic, expected critic.kind separate, shared or lora")
    return Critic(roles.policy.base_model, roles.value_head), nullcontext


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
