"""What LoRA adapters cost a rollout and an update on the CPU: merged into the weights, as ours are, or added beside them, as peft's modules do.

`python -m fastppo.bench.lora_rollout` prints a Markdown table; the best of five rounds each, which take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import PreTrainedModel

from fastppo.bench.rollout_workload import make_model
from fastppo.lora_config import LoRAConfig
from fastppo.model import prepare_model
from fastppo.model.adapters import add_adapters
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams

HIDDEN, LAYERS, PROMPTS, LENGTH, NEW, RANK, ROUNDS = 384, 6, 32, 32, 64, 16, 5


@contextmanager
def modules_alone() -> Iterator[None]:
    """Inside the block no model is run as parts."""
    places = ("fastppo.model.packed.trunk_of", "fastppo.roles.trunk_of", "fastppo.rollout.model_runner.parts_of")
    with mock.patch(places[0], _none), mock.patch(places[1], _none), mock.patch(places[2], _none):
        yield


def _none(model: PreTrainedModel) -> None:
    return None


class Side:
    """A model with adapters or without."""

    def __init__(self, *, rank: int) -> None:
        model = prepare_model(make_model.__wrapped__(HIDDEN, LAYERS))
        adapters = add_adapters(model, LoRAConfig(r=rank), seed=0) if rank else None
        self.roles = Roles(model, critic="none", adapters=adapters)
        self.engine = Engine(model, max_batch_size=PROMPTS)
        self.rollout: Rollout | None = None

    def sample(self) -> None:
        prompts = [[(7 * i + j) % 4000 for j in range(LENGTH)] for i in range(PROMPTS)]
        self.rollout = self.engine.generate(prompts, SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW))

    def learn(self) -> None:
        """A forward and a backward pass over the rollout."""
        self.roles(self.rollout, values=False, entropy=False).logprobs.sum().backward()
        self.roles.zero_grad()

    def modules_sample(self) -> None:
        with modules_alone():
            self.sample()

    def modules_learn(self) -> None:
        with modules_alone():
            self.learn()


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    plain, lora = Side(rank=0), Side(rank=RANK)
    calls = {
        "all weights": (plain.sample, plain.learn),
        f"LoRA, r = {RANK}, merged": (lora.sample, lora.learn),
        f"LoRA, r = {RANK}, beside, in peft's modules": (lora.modules_sample, lora.modules_learn),
        "all weights, in Transformers' modules": (plain.modules_sample, plain.modules_learn),
    }
    found = {name: [float("inf")] * 2 for name in calls}
    for _ in range(ROUNDS + 1):
        for name, pair in calls.items():
            found[name] = [min(best, seconds(call)) for best, call in zip(found[name], pair, strict=True)]
    print(
        f"H = {HIDDEN}, {LAYERS} layers, {PROMPTS} prompts of {LENGTH}, {NEW} new, {torch.get_num_threads()} threads\n"
    )
    print("| | rollout, ms | forward and backward, ms |\n|---|---:|---:|")
    for name, pair in found.items():
        print(f"| {name} | {pair[0] * 1e3:.0f} | {pair[1] * 1e3:.0f} |")


if __name__ == "__main__":
    main()
