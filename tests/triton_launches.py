"""Everything that the launchers of kernels/ can launch: (kernel name, signature, constants, warps[, stages]) of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def token_logprobs_launches() -> Iterator[tuple]:
    """(kernel name, signature, constants, warps) of everything the launchers of kernels/token_logprobs.py can launch."""
    module = importlib.import_module("fastppo.kernels.token_logprobs")
    for dtype, softcap, entropy, block in [
        *((dtype, False, True, module.BLOCK_V) for dtype in POINTERS),
        ("bfloat16", True, True, module.BLOCK_V),
        ("bfloat16", False, False, module.BLOCK_V),
        ("float32", True, False, 128),
    ]:
        pointer = POINTERS[dtype]
        constants = {"HAS_SOFTCAP": softcap, "WITH_ENTROPY": entropy, "BLOCK_V": block}
        numbers = {"inner": "i64", "V": "i32", "stride_outer": "i64", "stride_inner": "i64"}
        options = {"scale": "fp32", "softcap": "fp32", "temperature": "fp32", "ignore_index": "i32"}
        outputs = {"logprobs_ptr": "*fp32", "entropy_ptr": "*fp32", "max_logsum_ptr": "*fp32"}
        forward = {"logits_ptr": pointer, "labels_ptr": "*i64"} | outputs | numbers | options
        yield "_token_logprobs_forward_kernel", forward, constants, module.NUM_WARPS
        inputs = {
            "max_logsum_ptr": "*fp32",
            "entropy_ptr": "*fp32",
            "d_logprobs_ptr": "*fp32",
            "d_entropy_ptr": "*fp32",
        }
        gradient = {"grad_ptr": pointer} | numbers | {"grad_stride_outer": "i64", "grad_stride_inner": "i64"}
        backward = {"logits_ptr": pointer, "labels_ptr": "*i64"} | inputs | gradient | options
        yield "_token_logprobs_backward_kernel", backward, constants, module.NUM_WARPS


def linear_head_launches() -> Iterator[tuple]:
    """What the ops of the fused head launch of kernels/token_logprobs.py: fp32 tiles, gradients in the type of the products."""
    module = importlib.import_module("fastppo.kernels.token_logprobs")
    options = {"scale": "fp32", "softcap": "fp32", "temperature": "fp32"}
    for softcap, entropy, block in [(False, True, module.BLOCK_V), (False, False, module.BLOCK_V), (True, True, 128)]:
        constants = {"HAS_SOFTCAP": softcap, "WITH_ENTROPY": entropy, "BLOCK_V": block}
        pointers = {"tile_ptr": "*fp32", "labels_ptr": "*i64", "state_ptr": "*fp64"}
        add_tile = pointers | {"width": "i32", "stride_row": "i32"} | options
        yield "_token_logprobs_add_tile_kernel", add_tile, constants, module.NUM_WARPS
    for name, signature, constants, warps in token_logprobs_launches():
        if "backward" in name and signature["grad_ptr"] != "*fp32":
            yield name, signature | {"logits_ptr": "*fp32", "ignore_index": "i64"}, constants, warps


def decode_attention_launches() -> Iterator[tuple]:
    """The same of kernels/decode_attention.py, and the stages of its pipeline; ":16" marks what Triton finds divisible by 16."""
    module = importlib.import_module("fastppo.kernels.decode_attention")
    for dtype, size, value_size, page, softcap, sinks, one_split, aligned in [
        *((dtype, size, size, 64, False, False, False, ":16") for dtype in POINTERS for size in (64, 128, 256)),
        *((dtype, 128, 128, 60, True, True, True, "") for dtype in POINTERS),
        ("bfloat16", 80, 80, 64, True, False, True, ":16"),
        ("bfloat16", 192, 128, 64, False, False, False, ":16"),
        ("bfloat16", 256, 256, 60, True, True, False, ":16"),
        ("float32", 256, 256, 16, True, True, False, ":16"),
        ("bfloat16", 256, 256, 16, True, True, False, ""),
    ]:
        pointer, partial = POINTERS[dtype] + aligned, (POINTERS[dtype] if one_split else "*fp32") + aligned
        blocks, launch = module._tile(size, value_size, 4 if dtype == "float32" else 2, bool(aligned))
        tensors = dict.fromkeys(("q_ptr", "k_pages_ptr", "v_pages_ptr"), pointer)
        tables = {"block_table_ptr": "*i32", "context_lens_ptr": "*i32", "sinks_ptr": "*fp32"}
        results = {"out_ptr": partial, "max_sum_ptr": "*fp32"}
        numbers = dict.fromkeys(("kv_heads", "group", "pages", "capacity", "splits"), "i32")
        strides = ("q_b", "q_h", "k_page", "k_token", "v_page", "v_token", "table")
        numbers |= {f"stride_{name}": "i64" + aligned for name in strides}
        options = {"scale": "fp32", "softcap": "fp32", "window": "i32"}
        constants = {"HAS_SOFTCAP": softcap, "HAS_SINKS": sinks, "ONE_SPLIT": one_split, "PAGE_SIZE": page}
        constants |= {
            "D": size,
            "DV": value_size,
            "BLOCK_HEADS": module.BLOCK_HEADS,
            "SPLIT_TOKENS": module.SPLIT_TOKENS,
        }
        signature = tensors | tables | results | numbers | options
        yield "_decode_attention_kernel", signature, constants | blocks, launch["num_warps"], launch["num_stages"]
        if not one_split:
            merged = {"parts_ptr": partial, "max_sum_ptr": "*fp32", "context_lens_ptr": "*i32", "out_ptr": pointer}
            merged |= dict.fromkeys(("heads", "capacity", "splits", "window"), "i32")
            constants = {"DV": value_size, "BLOCK_DV": blocks["BLOCK_DV"], "BLOCK_SPLITS": module.BLOCK_SPLITS}
            constants |= {"SPLIT_TOKENS": module.SPLIT_TOKENS}
            yield "_merge_splits_kernel", merged, constants, module.NUM_WARPS
    for dtype, size, value_size, aligned in [(dtype, 128, 128, ":16") for dtype in POINTERS] + [
        ("bfloat16", 80, 96, "")
    ]:
        tensors = dict.fromkeys(("k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr"), POINTERS[dtype] + aligned)
        numbers = {"slots_ptr": "*i64", "kv_heads": "i32", "places": "i64"}
        numbers |= {f"stride_{name}": "i64" + aligned for name in ("k_t", "k_h", "v_t", "v_h", "k_page", "v_page")}
        constants = {"PAGE_SIZE": 64, "D": size, "DV": value_size, "BLOCK": module.COPY_BLOCK}
        yield "_write_kv_kernel", tensors | numbers, constants, module.NUM_WARPS


def batch_invariant_linear_launches() -> Iterator[tuple]:
    """The same of kernels/batch_invariant_linear.py: weights whose rows begin at multiples of 16, and any."""
    module = importlib.import_module("fastppo.kernels.batch_invariant_linear")
    for dtype, one_split, bias, aligned in [
        *((dtype, one_split, True, ":16") for dtype in POINTERS for one_split in (True, False)),
        *((dtype, True, False, "") for dtype in POINTERS),
    ]:
        pointer, partial = POINTERS[dtype] + ":16", (POINTERS[dtype] if one_split else "*fp32") + ":16"
        operands = {"x_ptr": pointer, "weight_ptr": POINTERS[dtype] + aligned, "bias_ptr": pointer}
        numbers = {"rows": "i32", "N": "i32" + aligned, "K": "i32" + aligned, "row_tiles": "i32", "split_tiles": "i32"}
        numbers |= {"stride_weight": "i32" + aligned}
        tile, launch = module._tile(torch.empty(64, 64 if aligned else 60, dtype=getattr(torch, dtype)))
        constants = {"HAS_BIAS": bias and one_split, "BLOCK_N": module.BLOCK_N} | tile
        signature = operands | {"out_ptr": partial} | numbers
        yield "_batch_invariant_linear_kernel", signature, constants, launch["num_warps"], launch["num_stages"]
        if not one_split:
            merged = {"parts_ptr": partial, "bias_ptr": pointer, "out_ptr": pointer}
            merged |= {"elements": "i64", "N": "i32" + aligned, "splits": "i32"}
            yield "_merge_splits_kernel", merged, {"HAS_BIAS": bias, "BLOCK": module.MERGE_BLOCK}, module.NUM_WARPS


LAUNCHES = [
    *(("token_logprobs", *launch) for launch in token_logprobs_launches()),
    *(("token_logprobs", *launch) for launch in linear_head_launches()),
    *(("decode_attention", *launch) for launch in decode_attention_launches()),
    *(("batch_invariant_linear", *launch) for launch in batch_invariant_linear_launches()),
]
