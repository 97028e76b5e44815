"""Case of `linear_token_logprobs`: the head of a small model over 2,048 tokens, on a GPU of a large one over 8,192, with both gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Target, Tensors
from fastppo.reference import linear_token_logprobs as reference


def run_with(function):
    def run(x: Tensors) -> Tensors:
        logprobs = function(x["hidden"], x["weight"], x["labels"])
        d_hidden, d_weight = torch.autograd.grad(logprobs, (x["hidden"], x["weight"]), x["d_logprobs"])
        return {"logprobs": logprobs.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    return run


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As exact as the logits, which the product rounds to the head's type: the result says so by its own."""
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1).to(weight.dtype)


def cases(quick: bool, device: str = "cpu") -> list[Case]:
    on_gpu = device == "cuda"
    rows, hidden, vocab = (32, 64, 1000) if quick else (8192, 4096, 131072) if on_gpu else (2048, 512, 32000)
    dtype, spread = (torch.bfloat16, 1) if on_gpu else (torch.float32, 2)
    # A matrix of logits that nobody keeps is computed again for the gradients; 2 GiB beyond inputs and gradients.
    target = Target(flop_share=0.85, peak_bytes=2 << 30) if on_gpu else Target(speedup=1 / 1.1, memory_share=0.1)

    def inputs(generator: torch.Generator) -> Tensors:
        weight = torch.randn(vocab, hidden, generator=generator) * spread / hidden**0.5
        return {
            "hidden": torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_(),
            "weight": weight.to(dtype).requires_grad_(),
            "labels": torch.randint(vocab, (rows,), generator=generator),
            "d_logprobs": torch.randn(rows, generator=generator),
        }

    return [
        Case(
            op="linear_token_logprobs",
            name=f"{rows} tokens, H={hidden}, V={vocab}{', bf16' if on_gpu else ''}, forward + backward",
            inputs=inputs,
            providers=peers.providers("linear_token_logprobs", run_with, ops.linear_token_logprobs, eager, device),
            exact=run_with(reference.linear_token_logprobs),
            work=floors.linear_token_logprobs(rows, hidden, vocab, dtype.itemsize, backward=True, recomputed=on_gpu),
            target=target,
        )
    ]
