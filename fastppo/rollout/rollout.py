"""The one batch format: packed sequences with everything that is known about their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

TOKEN, SEQUENCE, BOUND = "token", "sequence", "bound"


class FinishReason(IntEnum):
    """Why a completion ended; the event itself, never inferred from a length."""

    STOP = 0
    """End-of-sequence, a stop id or a stop string."""
    LENGTH = 1
    """`max_new_tokens` or the model's context was reached."""
    ERROR = 2
    """The logits held NaN or +inf; the token that could not be drawn is not in the completion."""


def _per(what: str, dtype: torch.dtype, **kwargs: object) -> Any:
    return field(metadata={"per": what, "dtype": dtype}, **kwargs)


@dataclass
class Rollout:
    """B sequences in `total` packed tokens: sequence i is `cu_seqlens[i]:cu_seqlens[i + 1]`, prompt first, then completion.

    Every per-token tensor is indexed by the token it is about: `logprobs[t]` = log p(tokens[t] | tokens before t), and `values[t]`
    is the value of the state before token t. Where `action_mask` is False per-token results are 0 and never used.
    """

    tokens: Tensor = _per(TOKEN, torch.int64)
    """int64 [total]"""
    cu_seqlens: Tensor = _per(BOUND, torch.int32)
    """int32 [B + 1]"""
    position_ids: Tensor = _per(TOKEN, torch.int64)
    """int64 [total], starts again at 0 with each sequence."""
    action_mask: Tensor = _per(TOKEN, torch.bool)
    """bool [total], True where the policy chose the token."""
    logprobs: Tensor = _per(TOKEN, torch.float32)
    """fp32 [total], of the policy at the sampling temperature, nothing cut off ("raw")."""
    processed_logprobs: Tensor = _per(TOKEN, torch.float32)
    """fp32 [total], of the distribution that was sampled from: after top-k, top-p, min-p and bans."""
    finish_reasons: Tensor = _per(SEQUENCE, torch.int8)
    """int8 [B], values of `FinishReason`."""
    prompt_index: Tensor = _per(SEQUENCE, torch.int64)
    """int64 [B], which prompt of the `generate` call a sequence continues."""
    temperature: float
    """The sampling temperature; 0 was greedy, with the log-probabilities at temperature 1."""
    scores: Tensor | None = _per(SEQUENCE, torch.float32, default=None)
    """fp32 [B], the reward function's; NaN is invalid."""
    old_logprobs: Tensor | None = _per(TOKEN, torch.float32, default=None)
    ref_logprobs: Tensor | None = _per(TOKEN, torch.float32, default=None)
    values: Tensor | None = _per(TOKEN, torch.float32, default=None)
    rewards: Tensor | None = _per(TOKEN, torch.float32, default=None)
    advantages: Tensor | None = _per(TOKEN, torch.float32, default=None)
    returns: Tensor | None = _per(TOKEN, torch.float32, default=None)

    def __post_init__(self) -> None:
        if not self.cu_seqlens.numel():
            raise ValueError("cu_seqlens has shape [0], expected [B + 1]")
        sizes = {TOKEN: self.num_tokens, SEQUENCE: self.num_sequences, BOUND: self.num_sequences + 1}
        for spec in _tensor_fields():
            value = getattr(self, spec.name)
            if value is not None or spec.default is not None:
                _check_tensor(spec.name, value, spec.metadata["dtype"], sizes[spec.metadata["per"]])

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        """Prompts and completions together."""
        return self.tokens.numel()

    @property
    def lengths(self) -> Tensor:
        """int64 [B] tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 [B] tokens before the first that the policy chose (all of them where it chose none)."""
        bounds = self.cu_seqlens.long()
        place = torch.where(self.action_mask, self._places(), self.num_tokens)
        first = bounds.new_full((self.num_sequences,), self.num_tokens)
        first.scatter_reduce_(0, self.sequence_ids(), place, "amin")
        return torch.minimum(first, bounds[1:]) - bounds[:-1]

    @property
    def completion_lengths(self) -> Tensor:
        """int64 [B]"""
        return self.lengths - self.prompt_lengths

    @property
    def last_action(self) -> Tensor:
        """int64 [B] place in the packed order of the last token that the policy chose in each sequence; -1 if there is none."""
        place = torch.where(self.action_mask, self._places(), -1)
        last = place.new_full((self.num_sequences,), -1)
        return last.scatter_reduce_(0, self.sequence_ids(), place, "amax")

    def sequence_ids(self) -> Tensor:
        """int64 [total]: the sequence each token belongs to."""
        order = torch.arange(self.num_sequences, device=self.tokens.device)
        return order.repeat_interleave(self.lengths, output_size=self.num_tokens)

    def completions(self) -> list[list[int]]:
        """Token ids of each completion, end-of-sequence included."""
        return [tokens[prompt:] for tokens, prompt in self._token_lists()]

    def prompts(self) -> list[list[int]]:
        """Token ids of each sequence's prompt."""
        return [tokens[:prompt] for tokens, prompt in self._token_lists()]

    def select(self, indices: Sequence[int] | Tensor) -> Rollout:
        """The sequences at `indices` (integers, repeats allowed, or a bool mask [B]) in that order, with all that is known of them."""
        chosen = torch.as_tensor(indices, device=self.tokens.device)
        chosen = chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen.long()
        lengths = self.lengths[chosen]
        bounds = _bounds(lengths)
        total = int(bounds[-1])
        shift = self.cu_seqlens.long()[chosen] - bounds[:-1]
        places = torch.arange(total, device=chosen.device) + shift.repeat_interleave(lengths, output_size=total)
        picks = {TOKEN: places, SEQUENCE: chosen}
        return replace(
            self,
            cu_seqlens=bounds.int(),
            **{name: value[picks[per]] for name, value, per in self._present() if per in picks},
        )

    def to(self, device: torch.device | str) -> Rollout:
        """Every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value, _ in self._present()})

    @staticmethod
    def cat(rollouts: Sequence[Rollout]) -> Rollout:
        """All sequences of all rollouts, in order. They must agree in temperature and in which optional tensors they have.

        `prompt_index` is kept as it is: entries of different rollouts may be equal without meaning the same prompt.
        """
        if not rollouts:
            raise ValueError("rollouts is empty, expected at least one Rollout")
        first = rollouts[0]
        names = [name for name, _, _ in first._present()]
        for i, other in enumerate(rollouts):
            if other.temperature != first.temperature:
                raise ValueError(f"rollouts[{i}] has temperature {other.temperature}, rollouts[0] {first.temperature}")
            if odd := {name for name, _, _ in other._present()} ^ set(names):
                raise ValueError(f"rollouts[{i}] and rollouts[0] differ in having {', '.join(sorted(odd))}")
        joined = {name: torch.cat([getattr(r, name) for r in rollouts]) for name in names if name != "cu_seqlens"}
        bounds = _bounds(torch.cat([r.lengths for r in rollouts]))
        return replace(first, cu_seqlens=bounds.int(), **joined)

    def _present(self) -> list[tuple[str, Tensor, str]]:
        """(name, tensor, what it has an entry for) of each tensor that is there."""
        found = [(f.name, getattr(self, f.name), f.metadata["per"]) for f in _tensor_fields()]
        return [entry for entry in found if entry[1] is not None]

    def _places(self) -> Tensor:
        return torch.arange(self.num_tokens, device=self.tokens.device)

    def _token_lists(self) -> list[tuple[list[int], int]]:
        tokens, bounds, prompts = self.tokens.tolist(), self.cu_seqlens.tolist(), self.prompt_lengths.tolist()
        return [(tokens[bounds[i] : bounds[i + 1]], prompt) for i, prompt in enumerate(prompts)]


def _tensor_fields() -> list[Field]:
    return [f for f in fields(Rollout) if "per" in f.metadata]


def _check_tensor(name: str, value: object, dtype: torch.dtype, size: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")
    # Results may be wider than fp32 in checks against fp64.
    if value.dtype != dtype and not (value.dtype.is_floating_point and dtype.is_floating_point):
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")
    if value.shape != (size,):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [{size}]")


def _bounds(lengths: Tensor) -> Tensor:
    """int64 [B] -> int64 [B + 1], cumulative, from 0."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
