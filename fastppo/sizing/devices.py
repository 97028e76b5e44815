"""Devices by their vendors' data sheets: memory, bandwidth, products, links. A CPU's are those of this machine, measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

GB, TFLOPS = 10**9, 10**12
USABLE = 0.9
"""Share of a device's memory that a plan may fill: CUDA's context, fragmentation and what an estimate misses take the rest."""
MOST_DEVICES = 1024


class Device(NamedTuple):
    """memory in bytes, bandwidth and link in bytes a second, flops a second of dense products with sums in fp32.

    link: what one device sends to the others of its node while it receives as much; node: devices of a node.
    """

    name: str
    memory: float
    bandwidth: float
    half_flops: float
    fp32_flops: float
    link: float
    node: int = 8

    def flops(self, dtype: torch.dtype) -> float:
        return self.half_flops if dtype.itemsize == 2 else self.fp32_flops


def _gpu(name: str, memory: float, bandwidth: float, half: float, fp32: float, link: float) -> Device:
    """GB, GB a second, Tflop/s in half precision and in fp32 outside of tensor cores, GB a second in each direction."""
    return Device(name, memory * GB, bandwidth * GB, half * TFLOPS, fp32 * TFLOPS, link * GB)


# NVIDIA's data sheets, of the SXM boards where there are several; products without sparsity. Links are half of what stands there, of both directions.
_GPUS = (
    _gpu("a100-40gb", 40, 1555, 312, 19.5, 300),  # A100 data sheet (2021)
    _gpu("a100", 80, 2039, 312, 19.5, 300),
    _gpu("h100", 80, 3350, 989, 67, 450),  # H100 data sheet (2023)
    _gpu("h200", 141, 4800, 989, 67, 450),  # H200 data sheet (2024)
    _gpu("b200", 180, 8000, 2250, 80, 900),  # HGX B200 and DGX B200 data sheets (2024, 2025)
    _gpu("l4", 24, 300, 121, 30.3, 32),  # L4 data sheet (2023); PCIe 4.0 x16
    _gpu("l40s", 48, 864, 362, 91.6, 32),  # L40S data sheet (2023); PCIe 4.0 x16
    _gpu("rtx3090", 24, 936, 71, 35.6, 32),  # GA102 whitepaper (2021), appendix A; PCIe 4.0 x16
    _gpu("rtx4090", 24, 1008, 165.2, 82.6, 32),  # Ada whitepaper (2023), appendix A; PCIe 4.0 x16
    _gpu("rtx5090", 32, 1792, 209.5, 104.8, 64),  # RTX Blackwell whitepaper (2025), appendix A; PCIe 5.0 x16
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


def device_named(name: str) -> Device:
    """Of a GPU's name as `h200` or `RTX 4090`; of `cpu` this machine. Raises ValueError for a name that is not known."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key == "cpu":
        return this_cpu()
    if key not in GPUS:
        raise ValueError(f"--gpu is {name!r}, expected one of {', '.join(GPUS)}, or cpu")
    return GPUS[key]


def this_cpu() -> Device:
    """Memory that this process may take; bandwidth and products as measured now, in a second or so. Ranks of one machine share all of it."""
    from fastppo.bench.floors import copy_bandwidth, matmul_rate
    from fastppo.rollout.memory import free_memory

    device = torch.device("cpu")
    bandwidth, flops = copy_bandwidth(device, 3), matmul_rate(device, "fp32", 3)
    return Device("cpu", free_memory(), bandwidth, flops, flops, bandwidth, node=MOST_DEVICES)
