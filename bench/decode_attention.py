"""Case of `decode_attention`: one step of 32 sequences with 1,024 keys each, on a GPU 8,192, against attention over a padded cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Provider, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference.decode_attention import decode_attention as reference

SIZES = ("B", "T")
USUAL = {"quick": (4, 100), "cpu": (32, 1024), "cuda": (32, 8192)}
SCALED = {"T": 2}
TYPED = True
PAGE, LARGE_PAGE = 64, 256


def run_with(function: Callable[..., Tensor]) -> Provider:
    return lambda x: {"out": function(x["q"], x["k_pages"], x["v_pages"], x["block_table"], x["context_lens"])}


def exact(x: Tensors) -> Tensors:
    scale = x["q"].shape[-1] ** -0.5
    return run_with(partial(reference, scale=scale))(x)


def eager(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor) -> Tensor:
    """scaled_dot_product_attention over the gathered pages with a mask of lengths, as a padded cache is read."""

    def gather(pages: Tensor) -> Tensor:
        return pages[block_table].flatten(1, 2).transpose(1, 2)  # [B, Hkv, L, D]

    keys, values = gather(k_pages), gather(v_pages)
    visible = torch.arange(keys.shape[2], device=keys.device) < context_lens[:, None]
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible[:, None, None], enable_gqa=True)
    return out[:, :, 0]


def larger_pages(x: Tensors) -> Tensors:
    """The same cache in pages of 256, of which flash-attn's must be multiples, in the order of the sequences."""
    table = x["block_table"].long()
    pages = {name: x[name][table].flatten(0, 2).unflatten(0, (-1, LARGE_PAGE)) for name in ("k_pages", "v_pages")}
    order = torch.arange(len(pages["k_pages"]), dtype=torch.int32, device=table.device)
    return pages | {"block_table": order.view(len(table), -1)}


def make_case(batch: int, length: int, dtype_name: str, device: str) -> Case:
    heads, kv_heads, head_size = (32, 8, 128) if device == "cuda" else (8, 4, 64)
    dtype = DTYPES[dtype_name]
    blocks = -(-length // LARGE_PAGE) * (LARGE_PAGE // PAGE)

    def inputs(generator: torch.Generator) -> Tensors:
        pages = torch.randperm(batch * blocks, generator=generator).view(batch, blocks)
        cache = (batch * blocks, PAGE, kv_heads, head_size)
        return {
            "q": torch.randn(batch, heads, head_size, generator=generator).to(dtype),
            "k_pages": torch.randn(cache, generator=generator).to(dtype),
            "v_pages": torch.randn(cache, generator=generator).to(dtype),
            "block_table": pages.int(),
            "context_lens": torch.full((batch,), length, dtype=torch.int32),
        }

    return Case(
        op="decode_attention",
        name=f"B={batch}, {length} keys, Hkv={kv_heads}, D={head_size}{suffix(dtype_name)}",
        inputs=inputs,
        providers=peers.providers("decode_attention", run_with, ops.decode_attention, eager, device),
        exact=exact,
        prepare={"flash-attn": larger_pages},
        work=floors.decode_attention(batch * length, batch, heads, kv_heads, head_size, dtype.itemsize),
        largest=batch * length * heads * head_size,
        dtype=dtype_name,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.choose_dtype(), setting.device) for size in sizes]
