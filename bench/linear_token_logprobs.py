"""Case of `linear_token_logprobs`: the head of a small model over 2,048 tokens, on a GPU of a large one over 8,192, with both gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference import linear_token_logprobs as reference

SIZES = ("N", "H", "V")
USUAL = {"quick": (32, 64, 1000), "cpu": (2048, 512, 32000), "cuda": (8192, 4096, 131072)}
SCALED = {"N": 8}
SCALED_FROM = {"cpu": (1024, 32, 8000)}  # a smaller head, over enough tokens to fill the tiles
TYPED = True


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


def make_case(rows: int, hidden: int, vocab: int, dtype_name: str, device: str) -> Case:
    dtype, on_gpu = DTYPES[dtype_name], device == "cuda"
    spread = 1 if on_gpu else 2

    def inputs(generator: torch.Generator) -> Tensors:
        weight = torch.randn(vocab, hidden, generator=generator) * spread / hidden**0.5
        return {
            "hidden": torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_(),
            "weight": weight.to(dtype).requires_grad_(),
            "labels": torch.randint(vocab, (rows,), generator=generator),
            "d_logprobs": torch.randn(rows, generator=generator),
        }

    return Case(
        op="linear_token_logprobs",
        name=f"{rows} tokens, H={hidden}, V={vocab}{suffix(dtype_name)}, forward + backward",
        inputs=inputs,
        providers=peers.providers("linear_token_logprobs", run_with, ops.linear_token_logprobs, eager, device),
        exact=run_with(reference.linear_token_logprobs),
        # A matrix of logits that nobody keeps is computed again for the gradients.
        work=floors.linear_token_logprobs(rows, hidden, vocab, dtype.itemsize, backward=True, recomputed=on_gpu),
        largest=rows * vocab,
        peaks=True,
        dtype=dtype_name,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.choose_dtype(), setting.device) for size in sizes]
