"""Triton kernels without a GPU: run by the interpreter against the references, and compiled to cubins without spills."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # compute capability: most shared memory a block can have, in bytes
TESTED_OPS = ["token_logprobs", "linear_token_logprobs", "linear_ppo_loss"]

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


LAUNCHES = [
    ("token_logprobs", *launch)
    for launches in (token_logprobs_launches(), linear_head_launches())
    for launch in launches
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

    stem, name, signature, constants, warps = launch
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module(f"fastppo.kernels.{stem}"), name)
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
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
