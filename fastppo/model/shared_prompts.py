"""Packed sequences that share prompts: each prompt's tokens run once for all its samples, forward and backward, with exact gradients.

R of the T packed tokens run. First the *roots*: each shared prompt once, and whole every sequence that shares none. Then the *suffixes*:
what follows the shared prompts, those of one prompt side by side. Roots attend as packed sequences do. A suffix attends to its prompt
and, causally, to itself: two calls of an attention kernel, merged by their log-sum-exps as FlashAttention merges its blocks (Dao et al.
2022, arXiv:2205.14135, algorithm 1). Given the merged output and log-sum-exp, the kernel's backward pass gives each part's share of the
exact gradient, since it makes the probabilities anew as exp(score - log-sum-exp) (algorithm 4 there).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.model.attention import AttentionOptions, PackedContext, causal_attention, causal_mask
from fastppo.model.host import on_device

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Branch(NamedTuple):
    """A shared prompt, tokens `start:end` of the roots, and B + 1 places of what follows it among the suffixes' tokens."""

    start: int
    end: int
    bounds: list[int]


class SharedPrompts:
    """Which packed tokens run where sequences share prompts, and which row of the result holds each packed token's state.

    Args:
        bounds: B + 1 places of the sequences in the T packed tokens, on the host.
        prompt_lengths: [B] tokens of each sequence's prompt.
        groups: [B] numbers, equal for sequences whose prompts are equal token for token.

    tokens: int64 [R], places of the tokens that run. rows: int64 [T], the row of each packed token's state.
    """

    def __init__(
        self, bounds: Sequence[int], prompt_lengths: Sequence[int], groups: Sequence[int], device: torch.device
    ) -> None:
        self._bounds, self._running = bounds, []
        self._rows = torch.empty(bounds[-1], dtype=torch.int64, device="cpu")
        self._count = 0
        members: dict[int, list[int]] = {}
        for sequence, group in enumerate(groups):
            members.setdefault(group, []).append(sequence)
        self.root_prompts: list[int] = []  # tokens of each root that are its prompt's
        roots = [self._add_root(own, prompt_lengths[own[0]]) for own in members.values()]
        self.root_bounds = [0, *(end for ends in roots for end in ends)]
        self.branches = [
            self._add_suffixes(own, ends[0], prompt_lengths[own[0]])
            for own, ends in zip(members.values(), roots, strict=True)
            if _shares(own, prompt_lengths[own[0]])
        ]
        self.tokens, self.rows = on_device(torch.cat(self._running), device), on_device(self._rows, device)

    def _add_root(self, own: list[int], prompt_length: int) -> list[int]:
        """The prompt of the sequences `own` once, or, where there is nothing to share, each of them whole; returns where they end."""
        if _shares(own, prompt_length):
            self._add([(self._bounds[sequence], prompt_length) for sequence in own])
            self.root_prompts.append(prompt_length)
            return [self._count]
        ends = []
        self.root_prompts += [prompt_length] * len(own)
        for sequence in own:
            self._add([(self._bounds[sequence], self._bounds[sequence + 1] - self._bounds[sequence])])
            ends.append(self._count)
        return ends

    def _add_suffixes(self, own: list[int], prompt_end: int, prompt_length: int) -> Branch:
        places = [self._count - self.root_bounds[-1]]
        for sequence in own:
            start = self._bounds[sequence] + prompt_length
            self._add([(start, self._bounds[sequence + 1] - start)])
            places.append(self._count - self.root_bounds[-1])
        return Branch(prompt_end - prompt_length, prompt_end, places)

    def _add(self, copies: list[tuple[int, int]]) -> None:
        """Equal pieces of the packed tokens, as (start, length): the first one runs, for all."""
        start, length = copies[0]
        self._running.append(torch.arange(start, start + length, dtype=torch.int64, device="cpu"))
        rows = torch.arange(self._count, self._count + length, dtype=torch.int64, device="cpu")
        for start, _ in copies:
            self._rows[start : start + length] = rows
        self._count += length


def _shares(own: list[int], prompt_length: int) -> bool:
    return len(own) > 1 and prompt_length > 0


class SharedPromptsContext:
    """Attention of roots and suffixes; differentiable."""

    def __init__(self, shared: SharedPrompts, device: torch.device) -> None:
        self._shared, self._device = shared, device
        self._roots = PackedContext(shared.root_bounds, device)
        self._suffixes = PackedContext(
            [0, *(place for branch in shared.branches for place in branch.bounds[1:])], device
        )
        self._longest = max(
            branch.end - branch.start + b - a for branch in shared.branches for a, b in pairwise(branch.bounds)
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        size = self._shared.root_bounds[-1]
        roots, suffixes = [x[:, :size] for x in (q, k, v)], [x[:, size:] for x in (q, k, v)]
        of_roots = self._roots.attend(layer, *roots, options)
        if not self._suffixes.groups:
            return of_roots
        if self._merges(q, v, options):
            of_suffixes = _MergedAttention.apply(
                *suffixes, *roots[1:], self._suffixes, self._shared.branches, options.scale
            )
        else:
            of_suffixes = torch.cat([self._attend_whole(branch, suffixes, roots, options) for branch in self._own])
        return torch.cat([of_roots, of_suffixes])

    def _merges(self, q: Tensor, v: Tensor, options: AttentionOptions) -> bool:
        """Whether the kernel that tells its log-sum-exps has all that is asked for."""
        sees_all = options.window is None or options.window >= self._longest
        return q.device.type == "cpu" and sees_all and not options.needs_scores and q.shape[-1] == v.shape[-1]

    @cached_property
    def _own(self) -> list[tuple[Branch, PackedContext]]:
        """Each branch with its suffixes as packed sequences."""
        return [
            (branch, PackedContext([place - branch.bounds[0] for place in branch.bounds], self._device))
            for branch in self._shared.branches
            if branch.bounds[0] < branch.bounds[-1]
        ]

    def _attend_whole(
        self, own: tuple[Branch, PackedContext], suffixes: list[Tensor], roots: list[Tensor], options: AttentionOptions
    ) -> Tensor:
        """The suffixes of one prompt, each beside a copy of the prompt's keys and values, under one mask -> [S, Hq, Dv]."""
        (start, end, bounds), context = own
        padded = []
        for group in context.groups:
            q, k, v = group.pad(*(x[:, bounds[0] : bounds[-1]] for x in suffixes))
            prompt = [x[None, :, start:end].expand(len(q), -1, -1, -1) for x in roots[1:]]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(prompt, (k, v), strict=True))
            mask = causal_mask(keys.shape[2], options.window, self._device, first=end - start)
            padded.append(causal_attention(q, keys, values, options, mask))
        return context.unpad(padded)


class _MergedAttention(torch.autograd.Function):
    """Suffixes q [Hq, S, D], k and v [Hkv, S, D] and the roots' k and v -> [S, Hq, D]."""

    @staticmethod
    def forward(ctx, q, k, v, root_k, root_v, suffixes: PackedContext, branches: list[Branch], scale: float) -> Tensor:
        found = [_flash(*group.pad(q, k, v), 0.0, True, scale=scale) for group in suffixes.groups]
        out = suffixes.unpad([out for out, _ in found]).clone()
        lse = suffixes.unpad([lse.unsqueeze(-1) for _, lse in found]).clone()  # [S, Hq, 1]
        for start, end, bounds in branches:
            own, prompt = slice(bounds[0], bounds[-1]), slice(start, end)
            if bounds[0] < bounds[-1]:
                seen, seen_lse = _flash(q[None, :, own], root_k[None, :, prompt], root_v[None, :, prompt], scale=scale)
                seen, seen_lse = seen[0].transpose(0, 1), seen_lse[0].t().unsqueeze(-1)
                both = torch.logaddexp(lse[own], seen_lse)
                out[own] = (out[own] * (lse[own] - both).exp() + seen * (seen_lse - both).exp()).to(out.dtype)
                lse[own] = both
        ctx.save_for_backward(q, k, v, root_k, root_v, out, lse)
        ctx.suffixes, ctx.branches, ctx.scale = suffixes, branches, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, root_k, root_v, out, lse = ctx.saved_tensors
        grad, out, lse = (x.transpose(0, 1) for x in (grad, out, lse))  # heads first, as q, k and v
        grads = [_own_gradients(ctx, group, grad, q, k, v, out, lse) for group in ctx.suffixes.groups]
        grad_q, grad_k, grad_v = (ctx.suffixes.unpad(list(x)).transpose(0, 1) for x in zip(*grads, strict=True))
        grad_q, grad_root_k, grad_root_v = grad_q.contiguous(), torch.zeros_like(root_k), torch.zeros_like(root_v)
        for start, end, bounds in ctx.branches:
            own, prompt = slice(bounds[0], bounds[-1]), slice(start, end)
            if bounds[0] < bounds[-1]:
                inputs = q[None, :, own], root_k[None, :, prompt], root_v[None, :, prompt]
                found = _flash_backward(
                    grad[None, :, own], *inputs, out[None, :, own], lse[None, :, own, 0], 0.0, False, scale=ctx.scale
                )
                grad_q[:, own] += found[0][0]
                grad_root_k[:, prompt], grad_root_v[:, prompt] = found[1][0], found[2][0]
        return grad_q, grad_k, grad_v, grad_root_k, grad_root_v, None, None, None


def _own_gradients(ctx, group, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor):
    """Gradients of a group's q, k and v from what its suffixes see of themselves, padded."""
    grad, q, k, v, out, lse = group.pad(grad, q, k, v, out, lse)
    if group.padding is not None:
        grad = grad.masked_fill(group.padding, 0)
    return _flash_backward(grad, q, k, v, out, lse.squeeze(-1), 0.0, True, scale=ctx.scale)
