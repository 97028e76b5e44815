"""Networks that are divided among ranks compute and learn what one process does."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from fastppo.errors import TrainingError
from fastppo.model.divided import local_part
from fastppo.model.sharding import Sharding, Traffic, shard_network
from fastppo.plan import Lengths, Plan
from fastppo.rollout import Engine, SamplingParams
from fastppo.sft_config import SFTConfig
from tests.distributed.sharded import KINDS, PLAN, PROMPTS, Networks, Together
from tests.distributed.traffic import CountedTraffic
from tests.tiny import ppo_config
from tests.tolerance import assert_same_on_ranks

STEPS = 2
SAMPLED = [("separate", torch.float32), ("lora", torch.float32), ("shared", torch.bfloat16)]
PARTS = ("forward", "backward")
# Four ranks learn like two, on which every kind is tried; but for the first they are slow.
RANKS_AND_KINDS = [(2, kind) for kind in KINDS] + [(4, "separate")]
RANKS_AND_KINDS += [pytest.param(4, kind, marks=pytest.mark.slow) for kind in KINDS if kind != "separate"]
REDUCED = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def together() -> Together:
    kinds = _installed()
    by_all = {kind: (_told, kind, True) for kind in kinds} | {"measured": (_measured,)}
    by_two = {f"sampled {kind}": (_sampled, kind, dtype) for kind, dtype in SAMPLED if kind in kinds}
    by_two |= {f"reduced in {dtype}": (_reduced, dtype) for dtype in REDUCED}
    by_two |= {f"short of memory in the {part}": (_short_of_memory, part) for part in PARTS}
    by_two |= {"offloaded": (_told, "none", True, {"cpu_offload": True}), "refused": (_refused,)}
    return Together({2: by_all | by_two, 4: {name: by_all[name] for name in ("separate", "measured")}})


@pytest.fixture(scope="module")
def four() -> Together:
    """What is slow of four ranks."""
    return Together({4: {kind: (_told, kind, True) for kind in _installed() if kind != "separate"}})


def _installed() -> list[str]:
    return [kind for kind in KINDS if kind != "lora" or importlib.util.find_spec("peft")]


def _told(kind: str, sharded: bool, options: dict[str, Any] | None = None) -> dict[str, Any]:
    networks = Networks(kind, sharded=sharded, **options or {})
    told: dict[str, Any] = {"evaluation": networks.evaluate(), "gradients": networks.gradients()}
    for optimizer in networks.learner.optimizers.values():
        optimizer.clear_gradients()
    told["metrics"] = networks.learn(STEPS)
    return told | {"weights": networks.weights(), "later": networks.evaluate()}


@cache
def _told_alone(kind: str) -> dict[str, Any]:
    return _told(kind, sharded=False)


def _same(ours: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == other.keys()
    for name, tensor in other.items():
        scale = tensor.abs().max().clamp_min(torch.finfo(tensor.dtype).tiny)
        assert_same_on_ranks(ours[name] / scale, tensor / scale, f"{what} {name}")


@pytest.mark.parametrize(("ranks", "kind"), RANKS_AND_KINDS)
def test_sharded_networks_learn_what_whole_ones_do(together: Together, four: Together, ranks: int, kind: str) -> None:
    """Every kind of critic, the reference and adapters; evaluation, gradients, their norms and weights after four updates."""
    if kind == "lora":
        pytest.importorskip("peft")
    alone = _told_alone(kind)
    everyone = (together if ranks == 2 or kind == "separate" else four).run(ranks, kind)
    for told in everyone:
        for what in ("evaluation", "gradients", "weights", "later"):
            _same(told[what], alone[what], f"{kind}, {ranks} ranks, {what}")
    for step, metrics in enumerate(alone["metrics"]):
        assert {"loss", "grad_norm/policy"} <= metrics.keys()
        assert all(told["metrics"][step] == pytest.approx(metrics, abs=1e-5) for told in everyone)


def _sampled(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    networks = Networks(kind, sharded=True, dtype=dtype)
    copy, policy = networks.copy, networks.roles.policy
    engine = Engine(copy.model)
    pointers = [p.data_ptr() for p in copy.model.parameters()]
    blocks = {p.untyped_storage().data_ptr() for p in copy.model.parameters()}
    networks.learn(1)
    copy.refresh(policy)
    found = {name: p.detach().clone() for name, p in copy.model.named_parameters()}
    return {
        "same places": pointers == [p.data_ptr() for p in copy.model.parameters()],
        "blocks": len(blocks),
        "weights": found,
        "rollout": engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=6, seed=7)).tokens,
        "hidden type": networks.roles.action_states(networks.rollout).dtype,
        "part types": {local_part(p).dtype for p in policy.parameters()},
        "later": networks.evaluate(),
    }


@pytest.mark.parametrize("kind, dtype", SAMPLED)
def test_each_rank_samples_from_gathered_weights_that_stay_in_their_place(
    together: Together, kind: str, dtype: torch.dtype
) -> None:
    """The copy has what the update has left, in one block of memory, and every rank samples the same from it."""
    if kind == "lora":
        pytest.importorskip("peft")
    alone = Networks(kind, sharded=False, dtype=dtype)
    alone.learn(1)
    expected = dict(alone.roles.policy.named_parameters())
    two = together.run(2, f"sampled {kind}")
    assert all(told["same places"] and told["blocks"] == 1 for told in two)
    assert torch.equal(two[0]["rollout"], two[1]["rollout"])
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]) and weight.dtype == dtype
        if dtype == torch.float32:
            assert_same_on_ranks(weight, expected[name].detach(), name)
        else:  # by how far a rounding to bfloat16 may go the other way
            apart = (weight.float() - expected[name].float()).abs()
            assert (apart <= torch.finfo(dtype).eps * expected[name].float().abs()).all(), name
    assert two[0]["hidden type"] == dtype and two[0]["part types"] == {torch.float32}


def _measured() -> dict[str, Any]:
    networks = Networks("separate", sharded=True)
    networks.learn(1)
    roles, ranks = networks.roles, torch.distributed.get_world_size()
    roots = [roles.policy, roles.critic.trunk, roles.critic.head]
    moments = [
        x for o in networks.learner.optimizers.values() for state in o.adamw.state.values() for x in state.values()
    ]
    with CountedTraffic(ranks) as step:
        for loss, _ in networks.losses(roles, [[0, 1]], [[0, 1]]):
            loss.backward()
    with CountedTraffic(ranks) as evaluation, torch.no_grad():
        roles.reference_logprobs(networks.rollout)
    with CountedTraffic(ranks) as sampling:
        networks.copy.refresh(roles.policy)
    return {
        "weights": sum(local_part(p).nbytes for root in (*roots, roles.reference) for p in root.parameters()),
        "moments": sum(x.nbytes for x in moments if x.dim()),
        "step": (step.gathered, step.reduced),
        "step by formula": [Traffic.of(root, ranks, learns=True) for root in roots],
        "evaluation": (evaluation.gathered, evaluation.reduced),
        "evaluation by formula": Traffic.of(roles.reference, ranks, learns=False),
        "sampling": (sampling.gathered, sampling.reduced),
        "sampling by formula": Traffic.of(roles.policy, ranks, learns=False),
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_falls_with_the_ranks_and_bytes_are_those_of_the_formula(together: Together, ranks: int) -> None:
    roles = Networks("separate", sharded=False).roles
    learned = sum(p.nbytes for p in roles.parameters())
    frozen = sum(p.nbytes for p in roles.reference.parameters())
    everyone = together.run(ranks, "measured")
    assert sum(told["weights"] for told in everyone) == learned + frozen
    assert sum(told["moments"] for told in everyone) == 2 * learned
    for told in everyone:
        # 18 rows of the vocabulary and a head's one row cannot be divided evenly.
        assert told["weights"] < 1.1 * (learned + frozen) / ranks
        assert told["step"] == tuple(map(sum, zip(*told["step by formula"], strict=True)))
        assert told["evaluation"] == told["evaluation by formula"]
        assert told["sampling"] == told["sampling by formula"]


def test_parts_that_lie_in_the_hosts_memory_learn_the_same(together: Together) -> None:
    alone = _told_alone("none")
    for told in together.run(2, "offloaded"):
        for what in ("gradients", "weights"):
            _same(told[what], alone[what], what)


def test_gradients_are_summed_in_the_type_that_is_asked_for(together: Together) -> None:
    """Half the bytes, and gradients that are those of fp32 sums but for a rounding to bfloat16."""
    fp32, narrow = (together.run(2, f"reduced in {dtype}")[0] for dtype in REDUCED)
    assert narrow["bytes"] * 2 == fp32["bytes"] > 0
    assert fp32["gradients"].keys() == narrow["gradients"].keys()
    for name, gradient in fp32["gradients"].items():
        apart = (narrow["gradients"][name] - gradient).abs().max()
        assert apart <= 2 * torch.finfo(torch.bfloat16).eps * gradient.abs().max(), name
    assert any(not torch.equal(narrow["gradients"][name], x) for name, x in fp32["gradients"].items())


def _reduced(dtype: torch.dtype) -> dict[str, Any]:
    networks = Networks("none", sharded=True, dtype=torch.bfloat16, reduce_dtype=dtype)
    with CountedTraffic(2) as traffic:
        gradients = networks.gradients()
    return {"bytes": traffic.reduced, "gradients": gradients}


def _short_of_memory(part: str) -> dict[str, Any]:
    """Memory runs out on rank 1 once, while the other waits for its part of a layer: on the way back after its MLP has its gradients."""
    networks = Networks("none", sharded=True)
    projection = networks.roles.policy.model.layers[0].self_attn.o_proj
    failures = [torch.OutOfMemoryError("this rank alone")] * networks.ranks.rank

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    if part == "forward":
        projection.register_forward_pre_hook(fail)
    else:
        projection.register_full_backward_pre_hook(fail)
    metrics, tokens = networks.learn(STEPS), networks.learner.budget.tokens
    return {"metrics": metrics, "weights": networks.weights(), "tokens": tokens, "left": failures}


@pytest.mark.parametrize("part", PARTS)
def test_memory_that_runs_out_on_one_rank_halves_all_budgets_and_changes_nothing(together: Together, part: str) -> None:
    alone = _told_alone("none")
    first, second = together.run(2, f"short of memory in the {part}")
    assert not second["left"], "it has failed"
    assert first["tokens"] == second["tokens"] < 20, "half of the largest micro-batch"
    for told in (first, second):
        _same(told["weights"], alone["weights"], part)
        for ours, theirs in zip(told["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_an_older_torch_cannot_go_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks("none", sharded=False)
    monkeypatch.setattr(networks.learner, "is_sharded", True)
    monkeypatch.delattr(FSDPModule, "reset_iter_state")

    def fail(plan: Plan) -> None:
        raise torch.OutOfMemoryError("here")

    with pytest.raises(TrainingError, match=r"memory ran out \(here\).*expected less; with .* it takes torch 2.13"):
        networks.learner.within_memory(fail, PLAN, Lengths.of(networks.rollout))


def _refused() -> None:
    networks = Networks("none", sharded=False)
    sharding = Sharding(init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="distributed.sharding is full, expected none: Linear has no layers"):
        shard_network(torch.nn.Linear(2, 2), sharding)
    networks.roles.policy.lm_head.half()
    with pytest.raises(ValueError, match="has weights in .*, expected one"):
        networks.roles.policy.model.bfloat16()
        shard_network(networks.roles.policy, sharding)


def test_what_cannot_be_divided_is_refused_by_name(together: Together) -> None:
    together.run(2, "refused")
    with pytest.raises(ValueError, match="reduce_dtype is bfloat16, expected float32 with sharding none"):
        ppo_config(distributed__reduce_dtype="bfloat16")
    for odd in ({"optimizer__name": "adamw_8bit"}, {"lora__r": 2, "lora__quantization": "nf4"}):
        with pytest.raises(ValueError, match=r" is \w+, expected \w+ with distributed.sharding full: \w+ of \d bits"):
            ppo_config(distributed__sharding="full", **odd)
    with pytest.raises(ValueError, match="optimizer.offload is true, expected false with distributed.sharding full"):
        SFTConfig(distributed={"sharding": "full"}, optimizer={"offload": True})
