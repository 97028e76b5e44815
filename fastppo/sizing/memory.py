"""Memory of a rank at the moments of a step that need most, part by part; `tests/sizing` holds it to measured peaks."""

from __future__ import annotations

from typing import NamedTuple

from fastppo.native.decoder import PREFILL_ROWS
from fastppo.ops._head import SIZES, kept_tiles_shape
from fastppo.rollout.decoder import PREFILL_TOKENS
from fastppo.rollout.pages import PAGE_SIZE, pages_for
from fastppo.sizing.devices import USABLE
from fastppo.sizing.setup import FP32, Setup, own_trunk
from fastppo.sizing.shapes import ModelShape
from fastppo.trainer import KEPT_CACHE

RECORD = 60
"""Bytes of a token in a step's records, which every rank holds: tokens, positions and masks, log-probs, values, advantages and returns."""
Parts = dict[str, float]


class Memory(NamedTuple):
    """moments: bytes of each part at the moments of a step that may need most."""

    moments: dict[str, Parts]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """Of the moment that needs most."""
        return {name: size for name, size in self.moments[self.peak_moment].items() if size}

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


def memory_of(setup: Setup) -> Memory:
    """Bytes of a rank."""
    held, cache = _held(setup), {"keys and values": float(_cache(setup))}
    kept = cache if not setup.on_cpu and _cache(setup) <= KEPT_CACHE * setup.memory else {}
    moments = {"sampling": held | cache | _sampling(setup)}
    moments["scoring"] = held | kept | _scoring(setup) | {"reference's weights": _reference(setup)}
    # What goes on beside an update: with staleness the next step's sampling.
    beside = cache | _sampling(setup) if setup.config.rollout.staleness else kept
    moments |= {name: held | beside | parts for name, parts in _updating(setup).items()}
    return Memory(moments)


def fits(setup: Setup) -> bool:
    return memory_of(setup).peak <= USABLE * setup.memory


# Through a whole step


def _held(setup: Setup) -> Parts:
    size, lora = setup.dtype.itemsize, setup.config.lora.r > 0
    own_critic = 0 if setup.critic is None else own_trunk(setup.critic)
    learns, on_host = setup.policy_learns + setup.critic_learns, setup.config.optimizer.offload
    reference = 0 if setup.config.learner.offload_reference else _reference(setup)
    parts: Parts = {
        "policy's weights": setup.policy_bytes / setup.shards,
        "critic's weights": own_critic * size / setup.shards,
        "reference's weights": reference,
        "adapters": FP32 * learns / setup.shards if lora else 0,
        "fp32 master weights": FP32 * learns / setup.shards if setup.has_masters and not on_host else 0,
        "AdamW's moments": 0 if on_host else setup.moment_bytes * learns / setup.shards,
        "records": RECORD * setup.tokens * setup.ranks,
    }
    if setup.shards > 1:
        which = "whole policy" if setup.team == 1 else "part of the policy"
        parts[f"{which} to sample from"] = setup.sampled_bytes
    if setup.config.rollout.staleness:
        parts["copy of what learns to sample from"] = FP32 * setup.policy_learns if lora else setup.policy_bytes
    return parts


def _reference(setup: Setup) -> float:
    """Bytes of its weights; with adapters it is the policy's trunk."""
    if not setup.has_reference or setup.config.lora.r:
        return 0.0
    return setup.networks.policy.parameters * setup.dtype.itemsize / setup.shards


# Sampling


def _cache(setup: Setup) -> int:
    """Keys and values of the sequences that are decoded side by side, in pages; the samples of a prompt share its full ones. A team divides heads."""
    samples = setup.config.rollout.samples_per_prompt
    shared = setup.prompt // PAGE_SIZE
    prompts = min(-(-setup.side_by_side // samples), setup.sampled_prompts)
    pages = prompts * shared + setup.side_by_side * (pages_for(setup.longest) - shared) + 1
    return pages * PAGE_SIZE * setup.networks.policy.cached * setup.dtype.itemsize // setup.team


def _sampling(setup: Setup) -> Parts:
    policy, size = setup.networks.policy, setup.dtype.itemsize
    rows, widths = setup.side_by_side, policy.widths
    copies = 2 if setup.team == 1 else 3  # those that the ranks of a team give each other
    parts: Parts = {"logits of the tokens drawn": copies * FP32 * rows * policy.vocabulary}
    if setup.config.lora.r and widths is not None and not setup.config.lora.quantization:
        parts["layers with the adapter merged in"] = policy.trunk * size
    if setup.by_kernels(policy) and setup.team == 1:
        width = 2 * (policy.hidden + widths.query + widths.key + widths.inner)
        parts["layers' results"] = FP32 * max(rows, PREFILL_ROWS) * width
    else:
        tokens = min(PREFILL_TOKENS, max(setup.sampled_prompts * setup.prompt, rows))
        parts["layers' results"] = tokens * policy.kept / policy.layers
    return parts


# Scoring and updates


def _scoring(setup: Setup) -> Parts:
    layers = Layers(setup, setup.networks.policy)
    parts: Parts = {"layers' results": layers.of_one + setup.microbatch * layers.state}
    parts["a chunk of the head"] = _head_chunk(setup, backward=False)
    return parts | _gathered(setup, setup.networks.policy, backward=False)


class Layers:
    """Bytes that a trunk keeps of a micro-batch for its backward pass.

    state: a hidden state. of_one, of_last: of a layer; the last one asks for actions alone where our kernels run it.
    """

    def __init__(self, setup: Setup, shape: ModelShape) -> None:
        self._setup, self._shape, size = setup, shape, setup.dtype.itemsize
        self.tokens, self.state = setup.microbatch, shape.hidden * size
        self.actions = min(self.tokens, self.tokens * setup.action_share + setup.microbatch / setup.longest)
        self.by_kernels = setup.by_kernels(shape)
        if self.by_kernels:
            query, key, heads, inner = shape.widths
            asked = FP32 * (2 * query + heads + shape.hidden + 2 * inner)
            self.of_one = self.tokens * (asked + FP32 * (shape.hidden + 2 * key))
            self.of_last = self.of_one - (self.tokens - self.actions) * asked
        else:
            self.of_one = self.of_last = self.tokens * shape.kept / shape.layers

    @property
    def kept(self) -> float:
        """Of all layers, and of what follows them."""
        ends = (2 * self.tokens + 2 * self.actions) * self.state
        if self._setup.config.learner.gradient_checkpointing:
            states = 2 if self.by_kernels else 1
            return states * self._shape.layers * self.tokens * self.state + ends
        return self.of_one * (self._shape.layers - 1) + self.of_last + ends

    @property
    def kept_of_first(self) -> float:
        """When all layers but the first have gone backward."""
        if self._setup.config.learner.gradient_checkpointing:
            return 2 * self.tokens * self.state
        return self.of_one

    def backward(self, of_last: bool) -> float:
        """What a layer's backward pass makes on its way, and before it what was not kept."""
        share = self.actions / self.tokens if of_last and self.by_kernels else 1.0
        again = (self.of_last if of_last else self.of_one) if self._setup.config.learner.gradient_checkpointing else 0
        if not self.by_kernels:
            return again + self.of_one
        query, key, _, inner = self._shape.widths
        made = share * (4 * inner + 4 * self._shape.hidden + 4 * query) + 2 * self._shape.hidden + 3 * key
        merged = (
            max(inputs * outputs for _, inputs, outputs, _ in self._shape.linears) if self._setup.config.lora.r else 0
        )
        return again + FP32 * (self.tokens * made + merged)


class Pass(NamedTuple):
    """One trunk's part in a backward pass: gradients are those of all that learns with it, in fp32."""

    shape: ModelShape
    layers: Layers
    gradients: float
    with_head: bool
    learns_all: bool


def _passes(setup: Setup) -> list[Pass]:
    """In the order in which they go backward: the critic's, whose forward pass was the last, first."""
    policy, critic, lora = setup.networks.policy, setup.critic, setup.config.lora.r > 0
    passes = [Pass(policy, Layers(setup, policy), FP32 * setup.policy_learns, True, not lora)]
    if setup.critic_kind == "lora":
        passes.insert(0, Pass(policy, Layers(setup, policy), FP32 * setup.critic_learns, False, False))
    elif critic is not None:
        passes.insert(0, Pass(critic, Layers(setup, critic), FP32 * setup.critic_learns, False, True))
    return passes


def _updating(setup: Setup) -> dict[str, Parts]:
    """The moments when a network's backward pass begins, and when its last gradients are made."""
    passes, moments = _passes(setup), {}
    accumulated = setup.microbatches > 1
    gradients = sum(each.gradients for each in passes) if accumulated else 0.0
    waiting = sum(each.layers.kept for each in passes)
    for each in passes:
        role = "policy" if each.with_head else "critic"
        gathered = _gathered(setup, each.shape, backward=True)
        layers, new = each.layers, (FP32 * each.shape.layer if each.learns_all and accumulated else 0.0)
        head = each.shape.head * setup.dtype.itemsize if each.learns_all else 0
        chunk = _head_chunk(setup, backward=True) if each.with_head else 0.0
        moments[f"update, {role}'s backward pass begins"] = gathered | {
            "gradients": gradients / setup.shards,
            "gradient of the head": head if each.with_head else 0,
            "activations": waiting,
            "a layer's backward pass": max(layers.backward(of_last=True) + new, chunk),
        }
        waiting -= layers.kept
        if not accumulated:
            gradients += each.gradients
        # A tied weight's two gradients meet at the end; else the embedding's alone is new beside those that it is added to.
        twice = head if (each.shape.tied and each.with_head) or accumulated else 0
        moments[f"update, {role}'s backward pass ends"] = gathered | {
            "gradients": gradients / setup.shards,
            "gradient of the embedding": twice,
            "activations": waiting + layers.kept_of_first,
            "a layer's backward pass": layers.backward(of_last=False) + new,
        }
    return moments


def _head_chunk(setup: Setup, *, backward: bool) -> float:
    """Logits that exist at a time, those kept for the backward pass, and the gradients of hidden states."""
    policy, size = setup.networks.policy, setup.dtype.itemsize
    backend = "cpu" if setup.on_cpu else "triton"
    sizes, rows = SIZES[backend], int(setup.microbatch * setup.action_share)
    tile = min(sizes.tile_rows, rows) * min(sizes.tile_columns, policy.vocabulary) * FP32
    tiles, elements = kept_tiles_shape(max(rows, 1), policy.vocabulary, backend)
    gradients = tile * size / FP32 if backward and size < FP32 else 0
    states = rows * policy.hidden * (FP32 + size) if backward else 0
    return tile + FP32 * tiles * elements + gradients + states


def _gathered(setup: Setup, shape: ModelShape, *, backward: bool) -> Parts:
    """What sharded weights need while they compute: two layers whole (one is fetched while the other runs), embedding and head, and backward
    the gradients of a layer and of these before they are spread."""
    if setup.shards == 1:
        return {}
    ends = shape.parameters - shape.trunk
    learned = FP32 * (shape.layer + ends) if backward and not setup.config.lora.r else 0
    return {"layers gathered": setup.dtype.itemsize * (2 * shape.layer + ends) + learned}
