"""Case of `packed_attention`: four samples of each of 4 prompts of 256 tokens, 64 tokens each, with all gradients, against padded attention
in which every sample has a copy of its prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Provider, Tensors, compare_tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference.packed_attention import packed_attention as reference

SIZES = ("B", "P", "T")
USUAL = {"quick": (2, 20, 12), "cpu": (4, 256, 64), "cuda": (4, 1024, 512)}
TYPED = True
SAMPLES = 4  # of a prompt
NAMES = "q", "k", "v"


def run_packed(function: Callable[..., Tensor]) -> Provider:
    def run(x: Tensors) -> Tensors:
        leaves = [x[name] for name in NAMES]
        out = function(*leaves, x["cu_seqlens"], prompts=x["prompts"])
        return results(out, torch.autograd.grad(out, leaves, x["d_out"]))

    return run


def run_padded(function: Callable[..., Tensor]) -> Provider:
    def run(x: Tensors) -> Tensors:
        leaves = [x[f"padded_{name}"] for name in NAMES]
        out = function(*leaves)
        return results(out, torch.autograd.grad(out, leaves, x["padded_d_out"]))

    return run


def results(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out.detach()} | {f"d_{name}": x for name, x in zip(NAMES, gradients, strict=True)}


def exact(x: Tensors) -> Tensors:
    scale = x["q"].shape[-1] ** -0.5
    return run_packed(lambda *tensors, **options: reference(*tensors, scale=scale, **options))(x)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of as many sequences as samples, each with its prompt: [B, heads, L, D], as a model makes them."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def padded(x: Tensors) -> Tensors:
    """The same tokens, those of a prompt once for each of its samples; the gradient of its results goes to the first."""
    rows = x["rows"]
    found = {f"padded_{name}": x[name].detach()[rows].transpose(1, 2).contiguous().requires_grad_() for name in NAMES}
    d_out = x["d_out"][rows].masked_fill(~x["is_first"][..., None, None], 0)
    return found | {"padded_d_out": d_out.transpose(1, 2).contiguous()}


def compare(inputs: Tensors, outputs: Tensors, exact: Tensors) -> float:
    """Padded results by their tokens: a prompt's result once, its gradients summed."""
    if outputs["out"].dim() == 4:
        outputs = {name: packed(inputs, name, x.transpose(1, 2)) for name, x in outputs.items()}
    return compare_tensors(inputs, outputs, exact)


def packed(inputs: Tensors, name: str, x: Tensor) -> Tensor:
    """x [B, L, heads, D] -> [T, heads, D]."""
    wanted = inputs["is_first"] if name == "out" else torch.ones_like(inputs["is_first"])
    total = x.new_zeros(len(inputs["q"]), *x.shape[2:])
    return total.index_add_(0, inputs["rows"][wanted], x[wanted])


def make_case(prompts: int, prompt: int, new: int, dtype_name: str, device: str) -> Case:
    heads, kv_heads, size = (32, 8, 128) if device == "cuda" else (8, 2, 64)
    dtype, tokens = DTYPES[dtype_name], prompts * (prompt + SAMPLES * new)

    def inputs(generator: torch.Generator) -> Tensors:
        def noise(count: int) -> Tensor:
            return torch.randn(tokens, count, size, generator=generator).to(dtype)

        lengths = torch.tensor([prompt] * prompts + [new] * (prompts * SAMPLES))
        own = prompts * prompt + torch.arange(prompts * SAMPLES * new).view(-1, new)
        shared = torch.arange(prompts * prompt).view(-1, prompt).repeat_interleave(SAMPLES, 0)
        first = torch.ones(len(own), prompt + new, dtype=torch.bool)
        first[:, :prompt] = (torch.arange(len(own)) % SAMPLES == 0)[:, None]
        return {
            "q": noise(heads).requires_grad_(),
            "k": noise(kv_heads).requires_grad_(),
            "v": noise(kv_heads).requires_grad_(),
            "d_out": noise(heads),
            "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)),
            "prompts": torch.cat([torch.full((prompts,), -1), torch.arange(prompts).repeat_interleave(SAMPLES)]),
            "rows": torch.cat([shared, own], 1),
            "is_first": first,
        }

    pairs = prompts * (prompt * (prompt + 1) // 2 + SAMPLES * (new * prompt + new * (new + 1) // 2))
    functions = peers.functions("packed_attention", ops.packed_attention, eager, device)
    wrap = {name: run_packed if name == peers.OURS else run_padded for name in functions}
    return Case(
        op="packed_attention",
        name=f"{prompts * SAMPLES} samples of {prompts} prompts, {prompt} + {new} tokens, Hkv={kv_heads}, D={size}"
        f"{suffix(dtype_name)}, forward + backward",
        inputs=inputs,
        providers={name: wrap[name](function) for name, function in functions.items()},
        exact=exact,
        compare=compare,
        prepare={name: padded for name in functions if name != peers.OURS},
        work=floors.packed_attention(tokens, pairs, heads, kv_heads, size, dtype.itemsize),
        largest=pairs * heads,
        dtype=dtype_name,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.choose_dtype(), setting.device) for size in sizes]
