"""Cases of `token_logprobs`: what a trainer does to the logits of 512 tokens of a 32,000-token vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Provider, Target, Tensors
from fastppo.reference import token_logprobs as reference


def make_inputs(rows: int, vocab: int, dtype: torch.dtype, backward: bool) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        logits = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).requires_grad_(backward)
        return {
            "logits": logits,
            "labels": torch.randint(vocab, (rows,), generator=generator),
            "d_logprobs": torch.randn(rows, generator=generator),
            "d_entropy": torch.randn(rows, generator=generator),
        }

    return inputs


def forward(function: Callable[..., Tensor]) -> Provider:
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return {"logprobs": function(x["logits"], x["labels"])}

    return run


def forward_backward(function: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
    def run(x: Tensors) -> Tensors:
        logprobs, entropy = function(x["logits"], x["labels"], return_entropy=True)
        (grad,) = torch.autograd.grad((logprobs, entropy), x["logits"], (x["d_logprobs"], x["d_entropy"]))
        return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": grad}

    return run


def eager(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)  # float() is free for fp32 logits
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logprobs, -(log_p.exp() * log_p).sum(-1)) if return_entropy else logprobs


def cases(quick: bool) -> list[Case]:
    rows, vocab = (16, 4000) if quick else (512, 32000)

    def case(dtype: torch.dtype, backward: bool, speedup: float) -> Case:
        wrap = forward_backward if backward else forward
        name = f"[{rows}, {vocab}] {'bf16' if dtype == torch.bfloat16 else 'fp32'} forward"
        return Case(
            op="token_logprobs",
            name=f"{name} + backward, with entropy" if backward else name,
            inputs=make_inputs(rows, vocab, dtype, backward),
            providers={"fastppo": wrap(ops.token_logprobs), "eager": wrap(eager)},
            exact=wrap(reference.token_logprobs),
            work=floors.token_logprobs(rows, vocab, dtype.itemsize, entropy=backward, backward=backward),
            target=Target(speedup=speedup),
        )

    return [
        case(torch.float32, backward=False, speedup=5.0),
        case(torch.float32, backward=True, speedup=3.0),
        case(torch.bfloat16, backward=False, speedup=8.0),
    ]
