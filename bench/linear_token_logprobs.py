"""Case of `linear_token_logprobs`: the head of a small model over 2,048 tokens, with both gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Target, Tensors
from fastppo.reference import linear_token_logprobs as reference


def run_with(function):
    def run(x: Tensors) -> Tensors:
        logprobs = function(x["hidden"], x["weight"], x["labels"])
        d_hidden, d_weight = torch.autograd.grad(logprobs, (x["hidden"], x["weight"]), x["d_logprobs"])
        return {"logprobs": logprobs.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    return run


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_p = torch.log_softmax(F.linear(hidden, weight), dim=-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cases(quick: bool) -> list[Case]:
    rows, hidden, vocab = (32, 64, 1000) if quick else (2048, 512, 32000)

    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "hidden": torch.randn(rows, hidden, generator=generator).requires_grad_(),
            "weight": (torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5).requires_grad_(),
            "labels": torch.randint(vocab, (rows,), generator=generator),
            "d_logprobs": torch.randn(rows, generator=generator),
        }

    return [
        Case(
            op="linear_token_logprobs",
            name=f"{rows} tokens, H={hidden}, V={vocab}, forward + backward",
            inputs=inputs,
            providers={"fastppo": run_with(ops.linear_token_logprobs), "eager": run_with(eager)},
            exact=run_with(reference.linear_token_logprobs),
            work=floors.linear_token_logprobs(rows, hidden, vocab, torch.float32.itemsize, backward=True),
            target=Target(speedup=1 / 1.1, memory_share=0.1),
        )
    ]
