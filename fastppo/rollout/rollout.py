"""The one batch format: packed sequences, which of their tokens the policy chose, and what was known when it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from fastppo.model import SharedPrompts
from fastppo.model.host import on_device
from fastppo.rollout.record import bounds_of, lengths_of, places_in


class FinishReason(IntEnum):
    """Why a completion ended; the event itself, never inferred from a length."""

    STOP = 0
    """End-of-sequence, a stop id or a stop string."""
    LENGTH = 1
    """`max_new_tokens` or the model's context was reached."""
    ERROR = 2
    """The logits held NaN or +inf; the token that could not be drawn is not in the completion."""


# What each tensor has an entry for, and its type.
TOKEN = {"tokens": torch.int64, "position_ids": torch.int64, "action_mask": torch.bool}
ACTION = {"logprobs": torch.float32, "processed_logprobs": torch.float32}
SEQUENCE = {"finish_reasons": torch.int8, "prompt_index": torch.int64}


@dataclass(frozen=True, eq=False)
class Rollout:
    """B sequences in T packed tokens: sequence i is `cu_seqlens[i]:cu_seqlens[i + 1]`, prompt first, then completion.

    The N tokens that the policy chose are *actions*; in a completion others may stand between them (what a tool answered). All that is
    known of an action has length N and stands in packed order: `logprobs[k]` is log p of token `tokens[actions[k]]` after those before it.
    The host keeps the bounds, so that taking sequences out never waits for the device. Raises ValueError where a sequence begins with an
    action: nothing came before it that could have scored it.
    """

    tokens: Tensor
    """int64 [T]"""
    cu_seqlens: Tensor
    """int32 [B + 1]"""
    position_ids: Tensor
    """int64 [T], starts again at 0 with each sequence."""
    action_mask: Tensor
    """bool [T], True where the policy chose the token."""
    logprobs: Tensor
    """fp32 [N], of the policy at the sampling temperature, nothing cut off ("raw")."""
    processed_logprobs: Tensor
    """fp32 [N], of the distribution that was sampled from: after top-k, top-p, min-p and bans."""
    finish_reasons: Tensor
    """int8 [B], values of `FinishReason`."""
    prompt_index: Tensor
    """int64 [B], which prompt of the `generate` call a sequence continues: samples of one prompt are a group."""
    temperature: float
    """The sampling temperature; 0 was greedy, with the log-probabilities at temperature 1."""
    values: Tensor | None = None
    """fp32 [N], of the state before each action, where the sampler had a value head."""
    found: Tensor | None = None
    """bool [B], which completions a search put together: their log-probabilities are the policy's own. None: the policy sampled all."""
    speakers: Sequence[str] | None = None
    """[B] on the host: the role in which the model said a sequence, where not all are the policy's (`Adapters.speaking`)."""

    def __post_init__(self) -> None:
        _check_tensor("cu_seqlens", self.cu_seqlens, torch.int32, None)
        if not self.cu_seqlens.numel():
            raise ValueError("cu_seqlens has shape [0], expected [B + 1]")
        _check_tensor("tokens", self.tokens, torch.int64, None)
        for name, dtype in (TOKEN | SEQUENCE).items():
            _check_tensor(name, getattr(self, name), dtype, self.num_tokens if name in TOKEN else self.num_sequences)
        for name, dtype in ACTION.items():
            _check_tensor(name, getattr(self, name), dtype, self.num_actions)
        if self.values is not None:
            _check_tensor("values", self.values, torch.float32, self.num_actions)
        if self.found is not None:
            _check_tensor("found", self.found, torch.bool, self.num_sequences)
        if self.speakers is not None and len(self.speakers) != self.num_sequences:
            raise ValueError(f"speakers has {len(self.speakers)} names, expected {self.num_sequences}, one a sequence")

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        """Prompts and completions together."""
        return self.tokens.numel()

    @property
    def num_actions(self) -> int:
        return self.actions.numel()

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return self.cu_seqlens.tolist()

    @property
    def lengths(self) -> list[int]:
        """[B] tokens of each sequence."""
        return lengths_of(self.bounds)

    @cached_property
    def actions(self) -> Tensor:
        """int64 [N]: where the actions stand in packed order."""
        begins = self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0].long()
        first = self.action_mask[begins]
        if first.any():
            place = begins[first][0].item()
            raise ValueError(
                f"action_mask is True at place {place}, the first of its sequence, expected False: no token is before it"
            )
        return self.action_mask.nonzero().squeeze(1)

    @cached_property
    def action_bounds(self) -> list[int]:
        """B + 1 numbers: the actions of sequence i are `action_bounds[i]:action_bounds[i + 1]` of the N."""
        counts = torch.cat([self.tokens.new_zeros(1), self.action_mask.long().cumsum(0)])
        return counts[self.cu_seqlens.long()].tolist()

    @property
    def action_counts(self) -> list[int]:
        """[B] actions of each sequence."""
        return lengths_of(self.action_bounds)

    @cached_property
    def turn_bounds(self) -> list[int]:
        """The actions of turn k are `turn_bounds[k]:turn_bounds[k + 1]` of the N. A turn is what the policy said in one go: actions side by
        side. Turns stand in packed order; a sequence without actions has none."""
        begins = torch.ones_like(self.actions, dtype=torch.bool)
        begins[1:] = self.actions.diff() > 1  # a sequence never begins with an action
        return [*begins.nonzero().squeeze(1).tolist(), self.num_actions]

    @cached_property
    def action_cu_seqlens(self) -> Tensor:
        """int32 [B + 1]: `action_bounds` beside the other tensors."""
        return on_device(self.action_bounds, self.tokens.device, torch.int32)

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """[B] tokens before the first action (all of them where there is none)."""
        actions, bounds = self.actions.tolist(), self.action_bounds
        firsts = [actions[bounds[i]] if bounds[i] < bounds[i + 1] else end for i, end in enumerate(self.bounds[1:])]
        return [first - start for first, start in zip(firsts, self.bounds, strict=False)]

    @cached_property
    def prompt_groups(self) -> list[int]:
        """[B] numbers, the same where the prompts are the same, token for token."""
        numbers: dict[tuple[int, ...], int] = {}
        return [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in self.prompts()]

    @cached_property
    def shared_prompts(self) -> SharedPrompts | None:
        """How these sequences run with each prompt once; None where no two of them share one."""
        if len(set(self.prompt_groups)) == self.num_sequences:
            return None
        return SharedPrompts(self.bounds, self.prompt_lengths, self.prompt_groups, self.tokens.device)

    @property
    def sampled(self) -> list[int]:
        """The sequences whose completions the policy sampled."""
        found = [False] * self.num_sequences if self.found is None else self.found.tolist()
        return [i for i, by_search in enumerate(found) if not by_search]

    def completions(self) -> list[list[int]]:
        """Token ids of each completion, end-of-sequence included, from the first action to the end."""
        return [tokens[prompt:] for tokens, prompt in self._token_lists()]

    def prompts(self) -> list[list[int]]:
        """Token ids of each sequence's prompt."""
        return [tokens[:prompt] for tokens, prompt in self._token_lists()]

    def select(self, indices: Sequence[int]) -> Rollout:
        """The sequences at `indices` (repeats allowed), in that order."""
        indices, device = list(indices), self.tokens.device
        bounds = bounds_of(self.bounds[i + 1] - self.bounds[i] for i in indices)
        action_bounds = bounds_of(self.action_bounds[i + 1] - self.action_bounds[i] for i in indices)
        chosen = on_device(indices, device)
        tokens = on_device(places_in(self.bounds, indices), device)
        actions = on_device(places_in(self.action_bounds, indices), device)
        shifts = torch.tensor(
            [new - self.bounds[i] for new, i in zip(bounds, indices, strict=False)], dtype=torch.int64, device="cpu"
        )
        counts = torch.tensor(lengths_of(action_bounds), dtype=torch.int64, device="cpu")
        part = object.__new__(Rollout)
        # Nothing is checked again, and what was computed of the whole is taken over: both would wait for the device.
        vars(part).update(
            {name: getattr(self, name)[tokens] for name in TOKEN}
            | {name: getattr(self, name)[actions] for name in ACTION}
            | {name: getattr(self, name)[chosen] for name in SEQUENCE},
            cu_seqlens=on_device(bounds, device, torch.int32),
            temperature=self.temperature,
            values=None if self.values is None else self.values[actions],
            found=None if self.found is None else self.found[chosen],
            speakers=None if self.speakers is None else [self.speakers[i] for i in indices],
            bounds=bounds,
            action_bounds=action_bounds,
            prompt_lengths=[self.prompt_lengths[i] for i in indices],
            prompt_groups=[self.prompt_groups[i] for i in indices],
            actions=self.actions[actions] + on_device(shifts.repeat_interleave(counts), device),
        )
        return part

    @classmethod
    def joined(cls, rollouts: Sequence[Rollout], prompts: Sequence[int]) -> Rollout:
        """The sequences of rollouts with the same settings, one after another; `prompts`, how many each was made of, number on."""
        optional = [name for name in ("values", "found") if getattr(rollouts[0], name) is not None]
        names = [*TOKEN, *ACTION, *SEQUENCE, *optional]
        tensors = {name: torch.cat([getattr(rollout, name) for rollout in rollouts]) for name in names}
        firsts = zip(bounds_of(prompts), rollouts, strict=False)
        tensors["prompt_index"] = torch.cat([rollout.prompt_index + first for first, rollout in firsts])
        bounds = bounds_of(length for rollout in rollouts for length in rollout.lengths)
        cu_seqlens = on_device(bounds, tensors["tokens"].device, torch.int32)
        speakers = None
        if rollouts[0].speakers is not None:
            speakers = [name for rollout in rollouts for name in rollout.speakers]
        return cls(cu_seqlens=cu_seqlens, temperature=rollouts[0].temperature, speakers=speakers, **tensors)

    @classmethod
    def of_shares(cls, shares: Sequence[Rollout]) -> Rollout:
        """The sequences of one call that were sampled in several places, each its prompts, in the order that they would have in one."""
        whole = cls.joined(shares, [0] * len(shares))
        prompts = whole.prompt_index.tolist()
        return whole.select(sorted(range(len(prompts)), key=prompts.__getitem__))

    def to(self, device: torch.device) -> Rollout:
        """The same sequences on another device."""
        moved = {name: getattr(self, name).to(device) for name in (*TOKEN, *ACTION, *SEQUENCE, "cu_seqlens")}
        for name in ("values", "found"):
            value = getattr(self, name)
            moved[name] = None if value is None else value.to(device)
        return Rollout(**moved, temperature=self.temperature, speakers=self.speakers)

    def _token_lists(self) -> list[tuple[list[int], int]]:
        tokens, bounds = self.tokens.tolist(), self.bounds
        return [(tokens[bounds[i] : bounds[i + 1]], prompt) for i, prompt in enumerate(self.prompt_lengths)]


def _check_tensor(name: str, value: object, dtype: torch.dtype, size: int | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")
    # Results may be wider than fp32 in checks against fp64.
    if value.dtype != dtype and not (value.dtype.is_floating_point and dtype.is_floating_point):
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")
    if value.dim() != 1 or (size is not None and len(value) != size):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [{'' if size is None else size}]")
