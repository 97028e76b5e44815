"""Cases of `Engine.generate`: a small Qwen2 samples with log-probabilities, against Transformers' `generate`; seconds a new token."""

from __future__ import annotations

import torch

from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.rollout_workload import LONG_ROUNDS, ROUNDS, SLOTS, STOP_IDS, VOCABULARY, Workload, make_model
from fastppo.bench.setting import Setting


def cases(setting: Setting) -> list[Case]:
    size = (32, 1) if setting.quick else (256, 4)

    def case(name: str, count: int, lengths: tuple[int, int], workload: Workload, rounds: int) -> Case:
        def inputs(generator: torch.Generator) -> Tensors:
            shortest, longest = lengths
            return {
                "tokens": torch.randint(0, VOCABULARY, (count, longest), generator=generator),
                "lengths": torch.randint(shortest, longest + 1, (count,), generator=generator),
            }

        return Case(
            op="rollout",
            name=f"{name}, a token",
            inputs=inputs,
            providers={"fastppo": workload.ours, "eager": workload.transformers},
            exact=lambda x: {},
            compare=workload.compare,
            work=floors.decode(make_model(*size), SLOTS),
            per="new_tokens",
            rounds=rounds,
        )

    few = 4 if setting.quick else 1  # times fewer sequences and tokens
    return [
        case("32 prompts of 32, 64 new", 32 // few, (32, 32), Workload(size, 1, 64 // few, 64 // few, ()), ROUNDS),
        case(
            "128 prompts of 8-256, 4-128 new",
            128 // few**2,
            (8, 256 // few),
            Workload(size, 1, 4, 128 // few, STOP_IDS),
            LONG_ROUNDS,
        ),
        case(
            "16 prompts of 256, 8 samples each, 64 new",
            16 // few,
            (256 // few,) * 2,
            Workload(size, 8, 64 // few, 64 // few, ()),
            LONG_ROUNDS,
        ),
    ]
