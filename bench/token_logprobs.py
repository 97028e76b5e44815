"""Cases of `token_logprobs`: what a trainer does to the logits of 512 tokens of a 32,000-token vocabulary, on a GPU of 8,192 of 151,936."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Provider, Tensors, compare_tensors
from fastppo.bench.setting import DTYPES, Setting
from fastppo.reference import token_logprobs as reference

SIZES = ("N", "V")
USUAL = {"quick": (32, 4000), "cpu": (512, 32000), "cuda": (8192, 151936)}
SCALED = {"N": 2, "V": 2}
TYPED = True
OUTPUTS = ("logprobs", "entropy")
CHECKED_EVERY = 32  # rows, where fp64 of all of them is too large


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


def forward_with_entropy(function: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return dict(zip(OUTPUTS, function(x["logits"], x["labels"], return_entropy=True), strict=True))

    return run


def with_graph(function: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
    """The forward pass that `backward` goes back through."""
    return lambda x: dict(zip(OUTPUTS, function(x["logits"], x["labels"], return_entropy=True), strict=True))


def backward(x: Tensors) -> Tensors:
    outputs, upstream = [x[name] for name in OUTPUTS], (x["d_logprobs"], x["d_entropy"])
    (grad,) = torch.autograd.grad(outputs, x["logits"], upstream, retain_graph=True)
    return {"d_logits": grad}


def on_some_rows(run: Provider) -> Provider:
    """fp64 of all rows and what leads there would fill a GPU; a row knows nothing of the others."""
    return lambda x: run({name: some_rows(value) for name, value in x.items()})


def some_rows(x: Tensor) -> Tensor:
    return x.detach()[::CHECKED_EVERY].requires_grad_(x.requires_grad)


def compare_some_rows(inputs: Tensors, outputs: Tensors, exact: Tensors) -> float:
    return compare_tensors(inputs, {name: value[::CHECKED_EVERY] for name, value in outputs.items()}, exact)


def eager(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)  # float() is free for fp32 logits
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logprobs, -(log_p.exp() * log_p).sum(-1)) if return_entropy else logprobs


def gpu_cases(rows: int, vocab: int, dtype: str) -> list[Case]:
    sizes, name = (rows, vocab, DTYPES[dtype].itemsize), f"[{rows}, {vocab}] {dtype}"
    forward_work = floors.token_logprobs(*sizes, entropy=True)
    both = floors.token_logprobs(*sizes, entropy=True, backward=True)
    functions = peers.functions("token_logprobs", ops.token_logprobs, eager, "cuda")

    def d_logits(x: Tensors) -> Tensors:
        return {"d_logits": forward_backward(reference.token_logprobs)(x)["d_logits"]}

    common = {"op": "token_logprobs", "compare": compare_some_rows, "largest": rows * vocab, "dtype": dtype}
    return [
        Case(
            name=f"{name} forward, with entropy",
            inputs=make_inputs(rows, vocab, DTYPES[dtype], backward=False),
            providers={name: forward_with_entropy(function) for name, function in functions.items()},
            exact=on_some_rows(forward_with_entropy(reference.token_logprobs)),
            work=forward_work,
            **common,
        ),
        Case(
            name=f"{name} backward, with entropy",
            inputs=make_inputs(rows, vocab, DTYPES[dtype], backward=True),
            providers=dict.fromkeys(functions, backward),
            exact=on_some_rows(d_logits),
            work=floors.Work(both.bytes - forward_work.bytes),
            prepare={name: with_graph(function) for name, function in functions.items()},
            **common,
        ),
    ]


def cpu_case(rows: int, vocab: int, dtype: str, backward: bool) -> Case:
    wrap = forward_backward if backward else forward
    return Case(
        op="token_logprobs",
        name=f"[{rows}, {vocab}] {dtype} forward{' + backward, with entropy' if backward else ''}",
        inputs=make_inputs(rows, vocab, DTYPES[dtype], backward),
        providers=peers.providers("token_logprobs", wrap, ops.token_logprobs, eager, "cpu"),
        exact=wrap(reference.token_logprobs),
        work=floors.token_logprobs(rows, vocab, DTYPES[dtype].itemsize, entropy=backward, backward=backward),
        largest=rows * vocab,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    if setting.on_gpu:
        return [case for size in sizes for case in gpu_cases(*size, setting.choose_dtype())]
    asked = setting.dtype and [(setting.dtype, False), (setting.dtype, True)]
    kinds = asked or [("fp32", False), ("fp32", True), ("bf16", False)]
    return [cpu_case(*size, dtype, backward) for size in sizes for dtype, backward in kinds]
