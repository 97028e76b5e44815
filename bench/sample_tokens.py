"""Case of `sample_tokens`: one decoding step of 64 sequences, on a GPU of 256 over a large vocabulary, against Transformers' own logits warpers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Provider, Tensors, WrongResult, relative_error
from fastppo.bench.setting import DTYPES, Setting

SIZES = ("B", "V")
USUAL = {"quick": (16, 2000), "cpu": (64, 32000), "cuda": (256, 151936)}
SCALED = {"V": 2}
TYPED = True
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
# A token whose cumulative mass rounding puts on the other side of top_p is not wrong.
MASS_ROUNDING = 1e-4
# Standard deviations that the mean log-probability of the drawn tokens may lie off its expectation.
MAX_DEVIATION = 6.0


def run_with(function: Callable[..., Tensors]) -> Provider:
    return lambda x: function(x["logits"], temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P)


def ours(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensors:
    rows = torch.arange(len(logits), device=logits.device)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = ops.sample_tokens(logits, **options, seed=0, sequence_ids=rows, positions=rows)
    return {"tokens": drawn.tokens, "logprobs": drawn.logprobs, "processed_logprobs": drawn.processed_logprobs}


def eager(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensors:
    """The tokens alone, as `generate` draws them: our op returns both log-probabilities too."""
    scores, no_ids = logits.float(), None
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        scores = warper(no_ids, scores)
    return {"tokens": torch.multinomial(torch.softmax(scores, dim=-1), 1).squeeze(-1)}


def exact(x: Tensors) -> Tensors:
    """fp64 [B, V] log-probabilities: of all tokens, of the kept ones, and of those that rounding may keep."""
    logprobs = torch.log_softmax(x["logits"] / TEMPERATURE, dim=-1)
    return {
        "logprobs": logprobs,
        "processed_logprobs": processed(logprobs, TOP_P),
        "widest": processed(logprobs, TOP_P + MASS_ROUNDING),
    }


def processed(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probabilities among the TOP_K most likely tokens, up to the one with which their mass reaches `top_p`."""
    top, tokens = logprobs.topk(TOP_K, dim=-1)
    top = torch.log_softmax(top, dim=-1)
    mass_before = top.exp().cumsum(-1) - top.exp()
    top = torch.log_softmax(top.masked_fill(mass_before >= top_p, -torch.inf), dim=-1)
    return torch.full_like(logprobs, -torch.inf).scatter(-1, tokens, top)


def compare(inputs: Tensors, outputs: Tensors, exact: Tensors) -> float:
    """Largest error of the returned log-probabilities; WrongResult where a token was dropped or draws are skewed."""
    tokens = outputs["tokens"].unsqueeze(-1)
    dropped = exact["widest"].gather(-1, tokens).isneginf().sum().item()
    if dropped:
        raise WrongResult(f"{dropped} of {len(tokens)} tokens are outside top-k {TOP_K}, top-p {TOP_P}")
    deviation = draw_deviation(exact["widest"], tokens)
    if not deviation <= MAX_DEVIATION:
        raise WrongResult(f"the tokens' mean log-probability is {deviation:.1f} standard deviations off")
    named = [name for name in ("logprobs", "processed_logprobs") if name in outputs]
    return max(
        (relative_error(name, outputs[name], exact[name].gather(-1, tokens).squeeze(-1)) for name in named), default=0.0
    )


def draw_deviation(logprobs: Tensor, tokens: Tensor) -> float:
    """How many standard deviations the summed log-probability of one token a row lies off its expectation."""
    p, finite = logprobs.exp(), logprobs.clamp_min(-1e3)
    mean = (p * finite).sum(-1)
    variance = (p * finite.square()).sum(-1) - mean.square()
    drawn = logprobs.gather(-1, tokens).squeeze(-1)
    return ((drawn - mean).sum().abs() / variance.sum().sqrt()).item()


def make_case(rows: int, vocab: int, dtype_name: str, device: str) -> Case:
    dtype = DTYPES[dtype_name]

    def inputs(generator: torch.Generator) -> Tensors:
        return {"logits": (torch.randn(rows, vocab, generator=generator) * 3).to(dtype)}

    return Case(
        op="sample_tokens",
        name=f"[{rows}, {vocab}] {dtype_name}, top-k {TOP_K}, top-p {TOP_P}",
        inputs=inputs,
        providers=peers.providers("sample_tokens", run_with, ours, eager, device),
        exact=exact,
        work=floors.sample_tokens(rows, vocab, dtype.itemsize),
        compare=compare,
        largest=rows * vocab,
        dtype=dtype_name,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.choose_dtype(), setting.device) for size in sizes]
