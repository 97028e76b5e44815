"""A small case, and a record of three rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastppo.bench import floors, record
from fastppo.bench.harness import Case, Row, Tensors

CEILINGS = floors.Ceilings(copy_bandwidth=1e10, matmul_rates={"fp32": 1e11})


def double(x: Tensors) -> Tensors:
    return {"y": x["x"] * 2}


def toy_case(**changes) -> Case:
    case = Case(
        op="toy",
        name="[1000]",
        inputs=lambda generator: {"x": torch.randn(1000, generator=generator)},
        providers={"fastppo": double, "eager": lambda x: {"y": x["x"] + x["x"]}},
        exact=double,
        work=floors.Work(8000),
    )
    return replace(case, **changes)


def timed(provider: str, p20: float, median: float, p80: float, **changes) -> Row:
    row = Row("gae", "[256, 1024]", provider, "ok", error=1e-7, rounds=20, median_s=median, p20_s=p20, p80_s=p80)
    row.floor_bytes, row.gb_per_s, row.copy_share = 8000, 8e-6 / median, 8e-6 / median / 25
    return replace(row, **changes)


def a_record(**changes) -> record.Record:
    rows = [
        timed("fastppo", 0.9e-3, 1e-3, 1.1e-3, speedup=50.0, target_speedup=80.0),
        timed("eager", 4e-2, 5e-2, 6e-2),
        Row("ppo_loss", "16 tokens", "fastppo", "wrong", "loss is off", 0.5),
    ]
    machine = record.Machine("cpu", "A Processor (R) 3", 2, "avx2", "Linux 6", 32 << 20, 2.5e10, {"fp32": 1e11})
    whole = record.Record(machine, {"torch": "2.13.0"}, "a" * 40, "2026-11-22T10:00:00+00:00", False, 20, rows)
    return replace(whole, **changes)
