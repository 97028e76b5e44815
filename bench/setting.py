"""What cases are made for: a device, sizes and a type; and how the command line names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Size = tuple[int, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """`sizes` and `dtype` stand in for what an op's case file chooses for the device, or for a quick run."""

    device: str = "cpu"
    quick: bool = False
    sizes: tuple[Size, ...] | None = None
    dtype: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def choose_sizes(self, usual: Mapping[str, Size]) -> tuple[Size, ...]:
        """Those asked for, else the usual one of a "quick" run or of the device."""
        return self.sizes or (usual["quick" if self.quick else self.device],)

    def choose_dtype(self) -> str:
        """fp32 on a CPU, bf16 on a GPU, if nothing else is asked for."""
        return self.dtype or ("bf16" if self.on_gpu else "fp32")


def parse_sizes(text: str, op: str, names: Sequence[str]) -> tuple[Size, ...]:
    """ "512x32000,1024x50257" as tuples of one number for each of `names`; ValueError where it is none."""
    if not names:
        raise ValueError(f"--sizes: {op} has no sizes to choose")
    pattern = "x".join([r"0*[1-9]\d*"] * len(names))
    sizes = []
    for part in text.split(","):
        if not re.fullmatch(pattern, part.strip()):
            raise ValueError(f"--sizes: {part!r} is no size of {op}, expected {'x'.join(names)} in positive numbers")
        sizes.append(tuple(int(number) for number in part.split("x")))
    return tuple(dict.fromkeys(sizes))


def suffix(dtype: str) -> str:
    """What a case's name says of its type: nothing where it is fp32."""
    return "" if dtype == "fp32" else f", {dtype}"
