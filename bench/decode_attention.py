"""Case of `decode_attention`: one step of 32 sequences with 1,024 keys each, on a GPU 8,192, against attention over a padded cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Target, Tensors
from fastppo.reference.decode_attention import decode_attention as reference

PAGE = 64


def ours(x: Tensors) -> Tensors:
    return {"out": ops.decode_attention(x["q"], x["k_pages"], x["v_pages"], x["block_table"], x["context_lens"])}


def exact(x: Tensors) -> Tensors:
    tables = x["block_table"].int(), x["context_lens"].int()
    return {"out": reference(x["q"], x["k_pages"], x["v_pages"], *tables, scale=x["q"].shape[-1] ** -0.5)}


def eager(x: Tensors) -> Tensors:
    """scaled_dot_product_attention over the gathered pages with a mask of lengths, as a padded cache is read."""

    def gather(pages: Tensor) -> Tensor:
        return pages[x["block_table"]].flatten(1, 2).transpose(1, 2)  # [B, Hkv, L, D]

    keys, values = gather(x["k_pages"]), gather(x["v_pages"])
    visible = torch.arange(keys.shape[2], device=keys.device) < x["context_lens"][:, None]
    out = F.scaled_dot_product_attention(
        x["q"][:, :, None], keys, values, attn_mask=visible[:, None, None], enable_gqa=True
    )
    return {"out": out[:, :, 0]}


def cases(quick: bool, device: str = "cpu") -> list[Case]:
    on_gpu = device == "cuda"
    batch, length = (4, 100) if quick else (32, 8192 if on_gpu else 1024)
    heads, kv_heads, head_size, dtype = (32, 8, 128, torch.bfloat16) if on_gpu else (8, 4, 64, torch.float32)
    blocks = -(-length // PAGE)

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

    return [
        Case(
            op="decode_attention",
            name=f"B={batch}, {length} keys, Hkv={kv_heads}, D={head_size}{', bf16' if on_gpu else ''}",
            inputs=inputs,
            providers={"fastppo": ours, "eager": eager},
            exact=exact,
            work=floors.decode_attention(batch * length, batch, heads, kv_heads, head_size, dtype.itemsize),
            target=Target(copy_share=0.8) if on_gpu else Target(),
        )
    ]
