"""A causal language model as packed trunk and head.

Packed: the T tokens of B sequences laid end to end, `cu_seqlens` int32 [B + 1] saying where each begins, `position_ids` starting
again at 0 with each. H hidden size, V vocabulary size. No function here returns padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model.attention import IMPLEMENTATION, PackedContext, run_trunk
from fastppo.model.divided import local_part, whole_columns
from fastppo.model.parts import is_exact
from fastppo.model.parts_trunk import trunk_of
from fastppo.model.shared_prompts import SharedPrompts, SharedPromptsContext
from fastppo.ops import batch_invariant_linear
from fastppo.ops._backends import choose


class LMHead(NamedTuple):
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); views of the model's own parameters, of which a team of ranks
    has its parts."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None  # Gemma 2, arXiv:2408.00118
    logit_scale: float  # Cohere's logit_scale, 1 / Granite's logits_scaling
    exact: bool = False  # on a GPU: logits, and log-probs of them, have the bits that training gives them

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N, V] in fp32 (fp64 for fp64), never rounded to a narrower type on the way."""
        if self.exact and not torch.is_grad_enabled():
            return _exact_logits(hidden, self.weight, self.bias)
        bias = None if self.bias is None else local_part(self.bias)
        logits = whole_columns(_linear_fp32(hidden, local_part(self.weight), bias), self.weight)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _linear_fp32(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != wide and not torch.is_grad_enabled():
        logits = torch.mm(hidden, weight.t(), out_dtype=wide)  # no fp32 copy of the weights
        return logits if bias is None else logits + bias
    operands = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return batch_invariant_linear(*operands)
    return F.linear(*operands)


def _exact_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear_token_logprobs(..., batch_invariant=True)` has them on a GPU."""
    from fastppo.kernels.batch_invariant_linear import batch_invariant_linear as kernel

    out = torch.empty((*hidden.shape[:-1], len(weight)), dtype=torch.float32, device=hidden.device)
    return kernel(hidden, weight, bias, out)


def _on_cpu(weight: Tensor) -> bool:
    """Whether the kernels of the CPU serve it, which are exact without being asked."""
    return choose("batch_invariant_linear", weight) == "cpu"


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's output layer as numbers that the fused ops take; the tensors are the live parameters."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if getattr(layer, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(
        layer.weight, getattr(layer, "bias", None), softcap, float(scale), is_exact(model) and not _on_cpu(layer.weight)
    )


def packed_hidden(
    model: PreTrainedModel,
    tokens: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    shared: SharedPrompts | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Last hidden states (what the head reads) of packed sequences, as if each had been run alone; differentiable.

    Args:
        model: a causal LM that `prepare_model` accepted, or its trunk.
        tokens: int64 [T]. position_ids: int64 [T]. cu_seqlens: int32 [B + 1], or the same numbers on the host.
        shared: what these sequences share; then only `shared.tokens` are run.
        prompt_lengths: [B]; only the states from the last token of each prompt on are wanted, and others may come as 0.

    Returns:
        hidden [T, H] in the model's type; hidden[t] has seen the tokens of its sequence up to and with t. With `shared`
        [R, H]: that of token t is in row `shared.rows[t]`.

    Raises:
        ValueError: nothing to run, an unprepared model, shapes that do not fit, a sequence longer than the model's context.
    """
    require_prepared(model)
    if tokens.dim() != 1 or tokens.shape != position_ids.shape or not len(tokens):
        raise ValueError(
            f"tokens and position_ids have shapes {list(tokens.shape)} and {list(position_ids.shape)}, expected [T] and T >= 1"
        )
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    _check_bounds(bounds, len(tokens), context_length(model))
    if shared is not None:
        tokens, position_ids = tokens[shared.tokens], position_ids[shared.tokens]
    trunk = trunk_of(model)
    if trunk is not None:
        layouts = trunk.layouts(bounds, shared, prompt_lengths)
        recompute = torch.is_grad_enabled() and model.training and model.is_gradient_checkpointing
        return trunk.hidden(tokens, position_ids, layouts, recompute=recompute)
    if shared is None:
        context = PackedContext(bounds, tokens.device)
    else:
        context = SharedPromptsContext(shared, tokens.device)
    return run_trunk(model, tokens, position_ids, context)


def require_prepared(model: PreTrainedModel) -> None:
    found = model.config._attn_implementation
    if found != IMPLEMENTATION:
        raise ValueError(
            f"model {type(model).__name__} has attention implementation {found!r}, expected 'fastppo': call prepare_model(model) first"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens, prompt and completion together; None where the model sets no limit.

    LongRoPE models are held to the length up to which one set of rotary frequencies serves: beyond it Transformers would switch
    the frequencies of the whole batch, and a sequence's log-probabilities would depend on its neighbours.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def _check_bounds(bounds: list[int], total: int, limit: int | None) -> None:
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if not lengths or bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens is {bounds}, expected 0 first, {total} (the number of tokens) last, never falling"
        )
    if limit is not None and max(lengths) > limit:
        longest = lengths.index(max(lengths))
        raise ValueError(
            f"sequence {longest} has {lengths[longest]} tokens, expected at most {limit}, the model's context"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
