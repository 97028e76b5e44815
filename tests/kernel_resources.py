"""Registers, shared and local memory of every kernel on every architecture, as the compilers count them; no GPU is needed.

`python -m tests.kernel_resources` writes the table in docs/performance.md.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- registers: begin -->", "<!-- registers: end -->"
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Compute capability: most shared memory that a block can have, in bytes.
MOST_SHARED = {80: 166912, 90: 232448, 100: 232448}


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes a block
    local: int  # bytes a thread: stack and spills


# ---- Triton

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
        results = {"out_ptr": partial, "lse_ptr": "*fp32", "max_sum_ptr": "*fp32"}
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
            merged |= {"lse_ptr": "*fp32"}
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


def packed_attention_launches():
    """The same of kernels/packed_attention.py, whose heads are padded to these sizes."""
    module = importlib.import_module("fastppo.kernels.packed_attention")
    for offsets in ("*i32", "*i64"):
        tensors = {
            "cu_seqlens_ptr": offsets,
            "prompts_ptr": offsets,
            "table_ptr": "*i32",
            "count": "i32",
            "tokens": "i32",
        }
        yield "_layout_kernel", tensors, {"HAS_PROMPTS": True, "BLOCK": module.LAYOUT_BLOCK}, 4
    for dtype, size in [
        *((dtype, size) for dtype in ("bfloat16", "float32") for size in (32, 64, 128, 256)),
        ("float16", 256),
    ]:
        pointer, itemsize = POINTERS[dtype] + ":16", 4 if dtype == "float32" else 2
        operands = {"q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer, "table_ptr": "*i32"}
        gradients = {"lse_ptr": "*fp32", "d_out_ptr": pointer, "delta_ptr": "*fp32"}
        numbers = {"rows": "i32", "heads": "i32", "kv_heads": "i32", "group": "i32"}
        numbers |= {f"stride_{name}": "i32:16" for name in ("q_t", "q_h", "k_t", "k_h", "v_t", "v_h")}
        numbers |= {"scale": "fp32", "window": "i32"}
        without_kv_heads, without_heads = (
            {name: kind for name, kind in numbers.items() if name != left_out} for left_out in ("kv_heads", "heads")
        )
        for name, signature in {
            "forward": operands | {"out_ptr": pointer, "lse_ptr": "*fp32"} | without_kv_heads,
            "d_q": operands | gradients | {"d_q_ptr": pointer} | without_kv_heads,
            "d_kv": operands | gradients | {"d_k_ptr": pointer, "d_v_ptr": pointer} | without_heads,
        }.items():
            blocks, launch = module.tile(name, size, itemsize)
            yield f"_packed_attention_{name}_kernel", signature, blocks, launch["num_warps"], launch["num_stages"]
        tensors = {"out_ptr": pointer, "d_out_ptr": pointer, "delta_ptr": "*fp32", "count": "i64"}
        constants = {"D": size, "BLOCK_ROWS": module.DELTA_ROWS}
        yield "_delta_kernel", tensors, constants, 4


def batch_invariant_linear_launches():
    """The same of kernels/batch_invariant_linear.py."""
    module = importlib.import_module("fastppo.kernels.batch_invariant_linear")
    for dtype, one_split, bias, aligned in [
        *((dtype, one_split, True, ":16") for dtype in POINTERS for one_split in (True, False)),
        *((dtype, True, False, "") for dtype in POINTERS),
    ]:
        pointer, partial = POINTERS[dtype] + ":16", (POINTERS[dtype] if one_split else "*fp32") + ":16"
        operands = {"x_ptr": pointer, "weight_ptr": POINTERS[dtype] + aligned, "bias_ptr": pointer}
        numbers = dict.fromkeys(("N", "K", "stride_weight"), "i32" + aligned)
        numbers |= dict.fromkeys(("rows", "row_tiles", "split_tiles"), "i32")
        tile, launch = module._tile(torch.empty(64, 64 if aligned else 60, dtype=getattr(torch, dtype), device="cpu"))
        constants = {"HAS_BIAS": bias and one_split, "BLOCK_N": module.BLOCK_N} | tile
        signature = operands | {"out_ptr": partial} | numbers
        yield "_batch_invariant_linear_kernel", signature, constants, launch["num_warps"], launch["num_stages"]
        if one_split and dtype != "float32":  # logits, which are not rounded
            logits = signature | {"out_ptr": "*fp32:16"}
            yield "_batch_invariant_linear_kernel", logits, constants, launch["num_warps"], launch["num_stages"]
        if not one_split:
            merged = {"parts_ptr": partial, "bias_ptr": pointer, "out_ptr": pointer}
            merged |= {"elements": "i64", "N": "i32" + aligned, "splits": "i32"}
            yield "_add_splits_kernel", merged, {"HAS_BIAS": bias, "BLOCK": module.MERGE_BLOCK}, module.NUM_WARPS


def decoder_launches():
    """The same of kernels/decoder.py; its other kernels are those of `rms_norm` and `swiglu`."""
    module = importlib.import_module("fastppo.kernels.decoder")
    for pointer in POINTERS.values():
        for size, rotary, norms in ((64, 64, False), (128, 128, True), (256, 64, True)):
            names = ("q", "k", "v", "q_norm", "k_norm", "cos", "sin", "out", "k_pages", "v_pages")
            signature = {f"{name}_ptr": pointer + ":16" for name in names}
            signature |= {"lengths_ptr": "*i64", "block_table_ptr": "*i32", "heads": "i32", "kv_heads": "i32"}
            signature |= {"pages": "i32", "capacity": "i32", "q_eps": "fp32", "k_eps": "fp32"}
            signature |= {f"stride_{name}": "i64" for name in ("table", "k_page", "v_page")}
            constants = {"HAS_Q_NORM": norms, "HAS_K_NORM": norms, "PAGE_SIZE": 64, "D": size, "ROTARY": rotary}
            yield "_place_heads_kernel", signature, constants | {"BLOCK_D": size}, module.HEAD_WARPS


def rms_norm_launches():
    """The same of kernels/rms_norm.py, STEPWISE as decode steps call it; the widest row that is not left to the reference, and an odd one."""
    module = importlib.import_module("fastppo.kernels.rms_norm")
    for pointer in (POINTERS["float32"], POINTERS["bfloat16"]):
        for width, aligned in ((8192, ":16"), (80, "")):
            launch = module.launch_options(width)
            numbers, block = {"width": "i32" + aligned, "eps": "fp32"}, {"BLOCK": launch["BLOCK"]}
            tensors = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "out_ptr"), pointer + aligned)
            for stepwise in (False, True):
                constants = {"HAS_RESIDUAL": True, "STEPWISE": stepwise} | block
                yield "_rms_norm_forward_kernel", tensors | numbers, constants, launch["num_warps"]
            names = ("total_ptr", "weight_ptr", "d_out_ptr", "d_total_ptr", "d_x_ptr")
            signature = dict.fromkeys(names, pointer + aligned) | {"parts_ptr": "*fp32" + aligned}
            signature |= {"rows": "i32", "part_rows": "i32"} | numbers
            constants = {"HAS_D_TOTAL": True, "WITH_WEIGHT": True} | block
            yield "_rms_norm_backward_kernel", signature, constants, launch["num_warps"]


def rotary_embedding_launches():
    """The same of kernels/rotary_embedding.py: heads of a model in halves, with tables in fp32, and one that is turned in part."""
    module = importlib.import_module("fastppo.kernels.rotary_embedding")
    for pointer in (POINTERS["float32"], POINTERS["bfloat16"]):
        for size, rotary, aligned in ((128, 128, ":16"), (81, 66, "")):
            tables = {f"{name}_ptr": "*fp32" + aligned for name in ("cos", "sin")}
            signature = {"x_ptr": pointer + aligned, "positions_ptr": "*i64", "out_ptr": pointer + aligned} | tables
            signature |= {"heads": "i32", "places": "i32", "stride_x_n": "i32" + aligned}
            for backward in (False, True):
                constants = {"BACKWARD": backward, "D": size, "ROTARY": rotary} | module.blocks(32, size)
                yield "_rotary_embedding_kernel", signature, constants, module.NUM_WARPS


def swiglu_launches():
    """The same of kernels/swiglu.py, STEPWISE as decode steps call it."""
    module = importlib.import_module("fastppo.kernels.swiglu")
    block = {"BLOCK": module.BLOCK}
    for pointer in (POINTERS["float32"], POINTERS["bfloat16"]):
        inputs = {"gate_ptr": pointer + ":16", "up_ptr": pointer + ":16"}
        for stepwise in (False, True):
            forward = inputs | {"out_ptr": pointer + ":16", "elements": "i32"}
            yield "_swiglu_forward_kernel", forward, {"STEPWISE": stepwise} | block, module.NUM_WARPS
        gradients = dict.fromkeys(("d_out_ptr", "d_gate_ptr", "d_up_ptr"), pointer + ":16")
        yield "_swiglu_backward_kernel", inputs | gradients | {"elements": "i64"}, block, module.NUM_WARPS


TRITON_LAUNCHES = [
    *(("decoder", *launch) for launch in decoder_launches()),
    *(("rms_norm", *launch) for launch in rms_norm_launches()),
    *(("rotary_embedding", *launch) for launch in rotary_embedding_launches()),
    *(("swiglu", *launch) for launch in swiglu_launches()),
    *(("batch_invariant_linear", *launch) for launch in batch_invariant_linear_launches()),
    *(("token_logprobs", *launch) for launch in token_logprobs_launches()),
    *(("token_logprobs", *launch) for launch in linear_head_launches()),
    *(("decode_attention", *launch) for launch in decode_attention_launches()),
    *(("packed_attention", *launch) for launch in packed_attention_launches()),
]


def compile_triton(launch: tuple, capability: int, folder: Path) -> Usage:
    """Compiles one of TRITON_LAUNCHES to a cubin in `folder`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stem, name, signature, constants, warps, *stages = launch
    kernel = getattr(importlib.import_module(f"fastppo.kernels.{stem}"), name)
    types = {argument: spec.split(":")[0] for argument, spec in signature.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    places = [place for place, argument in enumerate(kernel.arg_names) if signature.get(argument, "").endswith(":16")]
    divisible = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, types, constants, divisible)
    options = {"num_warps": warps} | ({"num_stages": stages[0]} if stages else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


# ---- CUDA C++


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_cuda(source: Path, capability: int, folder: Path) -> list[tuple[str, Usage]]:
    """(kernel, usage) of every instance in a file of csrc/cuda, which nvcc must accept."""
    command = [find_nvcc(), "-std=c++17", "-O3", f"-arch=sm_{capability}", "-cubin", "-Xptxas", "-v", source]
    done = subprocess.run([*command, "-o", folder / "kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [_ptxas_usage(part) for part in done.stderr.split("Compiling entry function")[1:]]


def _ptxas_usage(text: str) -> tuple[str, Usage]:
    """Of what `ptxas -v` says about one kernel."""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    mangled = re.match(r" '(\w+)'", text)[1]
    (name,) = {kernel for kernel in cuda_kernel_names() if f"{len(kernel)}{kernel}" in mangled}
    local = sum(map(number, (r"(\d+) bytes stack", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")))
    return name, Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), local)


def cuda_kernel_names() -> set[str]:
    text = "\n".join(source.read_text() for source in CUDA_SOURCES)
    return set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)+\s+)?(\w+)\(", text))


# ---- the table


def table() -> str:
    """Of each kernel on each architecture: the most registers and shared memory that one of its configurations takes."""
    found: dict[tuple[str, int], list[Usage]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for capability in MOST_SHARED:
            for launch in TRITON_LAUNCHES:
                found[launch[1], capability].append(compile_triton(launch, capability, Path(folder)))
            for source in CUDA_SOURCES:
                for name, usage in compile_cuda(source, capability, Path(folder)):
                    found[name, capability].append(usage)
    lines = [
        f"| kernel | configurations | {' | '.join(f'sm_{c}' for c in MOST_SHARED)} |",
        "|---" * (2 + len(MOST_SHARED)) + "|",
    ]
    for name in dict.fromkeys(name for name, _ in found):
        cells = (_cell(found[name, capability]) for capability in MOST_SHARED)
        lines.append(f"| `{name}` | {len(found[name, 90])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(usages: list[Usage]) -> str:
    """Registers, and where there are any shared bytes and spilled bytes."""
    registers, shared, local = map(max, zip(*usages, strict=True))
    parts = [str(registers)]
    if shared:
        parts.append(f"{shared} B" if shared < 1024 else f"{shared / 1024:.3g} KiB")
    if local:
        parts.append(f"{local} B spilled")
    return ", ".join(parts)


def main() -> None:
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
