"""Triton kernels without a GPU: run by the interpreter against the references, and compiled to cubins without spills."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # compute capability: most shared memory a block can have, in bytes
TESTED_OPS = [
    "token_logprobs",
    "linear_token_logprobs",
    "linear_ppo_loss",
    "decode_attention",
    "batch_invariant_linear",
]

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def token_logprobs_launches():
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


def linear_head_launches():
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


def decode_attention_launches():
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


def batch_invariant_linear_launches():
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


@pytest.mark.slow
@pytest.mark.parametrize("op", TESTED_OPS)
def test_interpreter_agrees_with_the_reference(op):
    """The op's whole test file again, its kernels interpreted: a process of its own, since Triton reads the switch at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTPPO_TEST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-n0"]
    done = subprocess.run(
        [*command, f"tests/ops/test_{op}.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(
    "launch", LAUNCHES, ids=[f"{launch[1].strip('_')}-{i // 2}" for i, launch in enumerate(LAUNCHES)]
)
def test_compiles_without_spills(launch, capability, tmp_path, monkeypatch, record_property):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stem, name, signature, constants, warps, *stages = launch
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module(f"fastppo.kernels.{stem}"), name)
    types = {argument: spec.split(":")[0] for argument, spec in signature.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    places = [place for place, argument in enumerate(kernel.arg_names) if signature.get(argument, "").endswith(":16")]
    divisible = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, types, constants, divisible)
    options = {"num_warps": warps} | ({"num_stages": stages[0]} if stages else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = resource_usage(cubin)
    record_property("registers", usage["REG"])
    print(f"{name} sm_{capability}: {usage['REG']} registers, {compiled.metadata.shared} bytes of shared memory")
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, "spills"
    assert compiled.metadata.shared <= ARCHITECTURES[capability]


def resource_usage(cubin: Path) -> dict[str, int]:
    """What Triton's own cuobjdump says of a cubin: REG, STACK, SHARED, LOCAL."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
