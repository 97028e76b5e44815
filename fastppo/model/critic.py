"""The critic: a trunk of its own with a value head, or a value head alone on the policy's trunk; the head says a number or a histogram."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fastppo.model.histogram_head import Histogram, HistogramHead
from fastppo.model.packed import lm_head, packed_hidden, require_prepared
from fastppo.model.shared_prompts import SharedPrompts
from fastppo.native.batch_invariant_linear import batch_invariant_linear
from fastppo.ops._backends import choose


class ValueHead(nn.Module):
    """Linear(H, 1) in fp32, zero at the start: the first values are 0, whatever the trunk says."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> values fp32 [T] (fp64 for an fp64 head). On a CPU in fp32 their bits do not depend on the other rows."""
        if hidden.dtype == self.weight.dtype and choose("batch_invariant_linear", hidden) == "cpu":
            return _BatchInvariantValues.apply(hidden, self.weight, self.bias)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(-1)


class _BatchInvariantValues(torch.autograd.Function):
    """hidden [T, H], weight [1, H], bias [1] -> [T]"""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return batch_invariant_linear(hidden, weight, bias).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        d_hidden = d_values[:, None] * weight if ctx.needs_input_grad[0] else None
        return d_hidden, d_values[None] @ hidden, d_values.sum(0, keepdim=True)


def make_value_head(model: PreTrainedModel, histogram: Histogram | None = None) -> ValueHead | HistogramHead:
    """A new head for the hidden states of a causal LM, on its device: one that says a number, or a histogram."""
    hidden_size = lm_head(model).weight.shape[1]
    if histogram is None:
        return ValueHead(hidden_size, device=model.device)
    return HistogramHead(hidden_size, histogram, device=model.device)


class Critic(nn.Module):
    """A trunk of its own and a value head."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead | HistogramHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    @classmethod
    def from_model(cls, model: PreTrainedModel, histogram: Histogram | None = None, *, share: bool = False) -> Critic:
        """A critic that starts from a prepared model's trunk: from a copy, or with `share` on that trunk itself."""
        require_prepared(model)
        trunk = model.base_model if share else copy.deepcopy(model.base_model)
        return cls(trunk, make_value_head(model, histogram)).train(model.training)

    def freeze_attention(self) -> None:
        """Let the parameters of the attention modules stay as they are. Raises ValueError where there are none that are named so."""
        found = [module for module in self.trunk.modules() if "attention" in type(module).__name__.lower()]
        if not any(True for module in found for _ in module.parameters()):
            raise ValueError(
                f"freeze_attention is True, but {type(self.trunk).__name__} has no parameters in modules whose class is named Attention"
            )
        for module in found:
            module.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | Sequence[int],
        shared: SharedPrompts | None = None,
    ) -> Tensor:
        """Packed tokens and position_ids [T] -> values fp32 [T]: out[t] = V(state after token t). With `shared`: [R], as `packed_hidden`."""
        return self.head(packed_hidden(self.trunk, tokens, position_ids, cu_seqlens, shared))
