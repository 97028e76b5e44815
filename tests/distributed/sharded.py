"""What learns in these tests: networks of a tiny model, sharded or whole, on the same completions on every rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastppo.critics import histogram_of
from fastppo.distributed import ALONE, Ranks
from fastppo.learner import Learner, Losses
from fastppo.model import prepare_model
from fastppo.model.adapters import add_adapters
from fastppo.model.sharding import Sharding, WholeCopy
from fastppo.plan import Lengths, Microbatch, Minibatch, Plan
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.rollout.record import places_in
from tests.distributed.ranks import SECONDS, run_ranks
from tests.tiny import make_model, ppo_config

Found = TypeVar("Found")

PROMPTS = [[2, 3], [4, 5, 6], [7], [8, 9], [3, 5, 8, 9], [2], [11, 4, 3], [16, 2]]
# Every minibatch has four micro-batches of two, so that 1, 2 and 4 ranks have the same number of them.
PLAN: Plan = [[[[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13], [14, 15]]]]
KINDS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"critic__kind": "shared", "model": {"tie_word_embeddings": True}},
    "histogram": {"critic__head": "hl-gauss", "critic__bins": 5, "critic__value_range": (-1.0, 1.0)},
    "frozen-attention": {"critic__freeze_attention": True, "learner__gradient_checkpointing": True},
    "lora": {"lora__r": 2, "lora__alpha": 4.0},
    "none": {"advantage__estimator": "rloo", "rollout__samples_per_prompt": 2},
}


class Networks:
    """kind: of `KINDS`. sharded: among the ranks of this process's world, with those options of `Sharding`."""

    def __init__(self, kind: str, *, sharded: bool, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        settings = dict(KINDS[kind])
        model = prepare_model(make_model(**settings.pop("model", {})).to(dtype))
        rates = {"optimizer__lr": 1e-3, "critic__lr": 1e-3, "optimizer__eps": 1e-3}
        self.config = ppo_config(**rates | settings)
        self.rollout = Engine(model).generate(PROMPTS, SamplingParams(n=2, max_new_tokens=6, seed=5))
        adapters = add_adapters(model, self.config.lora, seed=0) if self.config.lora.r else None
        self.copy = WholeCopy(model, adapters) if sharded else None
        self.roles = Roles(
            model,
            critic=self.config.critic.kind,
            histogram=histogram_of(self.config.critic),
            with_reference=True,
            gradient_checkpointing=self.config.learner.gradient_checkpointing,
            adapters=adapters,
        )
        if self.config.critic.freeze_attention:
            self.roles.critic.freeze_attention()
        self.ranks = ALONE
        if sharded:
            self.ranks = Ranks(dist.get_rank(), dist.get_world_size(), timeout=SECONDS)
            meet = partial(self.ranks.exchange, "part of a layer")
            self.roles.shard(Sharding(init_device_mesh("cpu", (dist.get_world_size(),)), **options, meet=meet))
        sections = {"optimizer": self.config.optimizer, "critic": self.config.critic, "config": self.config.learner}
        self.learner = Learner(self.roles, **sections, total_steps=9, ranks=self.ranks)

    def evaluate(self) -> dict[str, Tensor]:
        """By all ranks together."""
        want = {"logprobs", "reference"} | ({"values"} if len(self.learner.optimizers) > 1 else set())
        found = self.roles.evaluate(self.rollout, want, PLAN, "always", self.ranks)
        return {name: x for name, x in vars(found).items() if isinstance(x, Tensor) and x.is_floating_point()}

    def gradients(self) -> dict[str, Tensor]:
        """Of the first minibatch, whole."""
        for loss, _ in self.losses(self.roles, PLAN[0][0], self.ranks.own(PLAN[0][0])):
            loss.backward()
        return {
            f"{name}/{key}": whole(p.grad)
            for name, module in self.roles.trained().items()
            for key, p in module.named_parameters()
            if p.grad is not None
        }

    def learn(self, steps: int) -> list[dict[str, float]]:
        """Metrics of each step."""
        found = []
        for step in range(steps):
            self.learner.start_step(step)
            names, lengths = list(self.learner.optimizers), Lengths.of(self.rollout)
            found.append(self.learner.minimise(self.losses, PLAN, lengths, learned=names))
        return found

    def weights(self) -> dict[str, Tensor]:
        """Whole copies of all that a checkpoint holds."""
        tensors, _ = self.learner.state_dict()
        return {f"{file}/{name}": whole(x).clone() for file, named in tensors.items() for name, x in named.items()}

    def losses(self, roles: Roles, minibatch: Minibatch, own: list[Microbatch]) -> Losses:
        """Sums over actions, however they are split, whose gradients reach everything that learns."""
        weights_of_all = torch.linspace(-1, 1, self.rollout.num_actions)
        for indices in own:
            batch: Rollout = self.rollout.select(indices)
            outputs = roles(batch, values=len(self.learner.optimizers) > 1)
            weights = weights_of_all[places_in(self.rollout.action_bounds, indices)]
            total = (weights * outputs.logprobs - 0.1 * outputs.entropy).sum()
            if outputs.value_logits is not None:
                total = total + roles.critic.head.cross_entropy(outputs.value_logits, weights).sum()
            elif outputs.values is not None:
                total = total + (outputs.values - weights).square().sum()
            yield total / self.rollout.num_actions, {"loss": total.detach() / self.rollout.num_actions}


class Together:
    """Calls by name, made one after another in one set of processes for each number of ranks: to start processes takes longer than most tests.

    calls: ranks -> name -> (function, arguments).
    """

    def __init__(self, calls: Mapping[int, Mapping[str, tuple]]) -> None:
        self._calls = calls
        self._found: dict[int, list[dict[str, tuple[Any, str]]]] = {}

    def run(self, ranks: int, name: str) -> list[Any]:
        """What each rank's call returned. Raises AssertionError with what one has raised."""
        if ranks not in self._found:
            self._found[ranks] = run_ranks(ranks, in_world, _one_by_one, self._calls[ranks])
        texts = [f"rank {rank}: {found[name][1]}" for rank, found in enumerate(self._found[ranks]) if found[name][1]]
        assert not texts, "\n".join(texts)
        return [found[name][0] for found in self._found[ranks]]


def _one_by_one(calls: Mapping[str, tuple]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for name, (function, *arguments) in calls.items():
        try:
            found[name] = function(*arguments), ""
        except Exception:
            found[name] = None, traceback.format_exc()
    return found


def in_world(function: Callable[..., Found], *arguments: Any) -> Found:
    """What the function returns in a process of `run_ranks` that is connected with the others by gloo."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
