"""What an op cannot avoid: the bytes it must move, the flops it must spend, and how fast this machine copies memory.

Bytes: every input read once, every output written once; a backward pass reads again what it needs of the inputs. Labels
and masks count as they are stored (int64, bool). Flops: those of matrix products; elsewhere memory is the limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from fastppo.bench import clock
from fastppo.bench.setting import DTYPES

INT64, FP32, BOOL = 8, 4, 1
UNKNOWN_CACHE_BYTES = 32 << 20
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}  # of the square products that show how fast the machine multiplies


class Work(NamedTuple):
    bytes: int
    flops: int = 0


class Ceilings(NamedTuple):
    """What this machine reaches in the same run: bytes a second, read and written, and flops a second by type."""

    copy_bandwidth: float
    matmul_rates: Mapping[str, float] = MappingProxyType({})


def token_logprobs(rows: int, vocab: int, itemsize: int, *, entropy: bool = False, backward: bool = False) -> Work:
    """logits [rows, vocab] and labels in, logprobs (and entropy) out; backward: logits in again, their gradient out."""
    per_row = FP32 * (1 + entropy)
    logits = rows * vocab * itemsize
    forward = logits + rows * (INT64 + per_row)
    return Work(forward + (2 * logits + rows * (INT64 + per_row) if backward else 0))


def linear_token_logprobs(
    rows: int,
    hidden: int,
    vocab: int,
    itemsize: int,
    *,
    entropy: bool = False,
    backward: bool = False,
    recomputed: bool = False,
) -> Work:
    """hidden [rows, hidden] and weight [vocab, hidden] in, logprobs out; backward: both in again, both gradients out.

    2·rows·hidden·vocab flops for each of the logits, the gradient of hidden and the gradient of weight; `recomputed`: the logits twice, as
    who keeps no matrix of them must.
    """
    operands = (rows + vocab) * hidden * itemsize
    per_row = INT64 + FP32 * (1 + entropy)
    product = 2 * rows * hidden * vocab
    if not backward:
        return Work(operands + rows * per_row, product)
    return Work(3 * operands + 2 * rows * per_row, (3 + recomputed) * product)


def linear_ppo_loss(rows: int, hidden: int, vocab: int, itemsize: int) -> Work:
    """hidden, weight, labels, old_logprobs, advantages and mask in, the gradients of hidden and weight out."""
    operands = (rows + vocab) * hidden * itemsize
    return Work(2 * operands + rows * (INT64 + 2 * FP32 + BOOL), 3 * 2 * rows * hidden * vocab)


def gae(tokens: int, *, mask: bool = False) -> Work:
    """rewards, values (and mask) in, advantages and returns out."""
    return Work(tokens * (4 * FP32 + BOOL * mask))


def masked_whiten(tokens: int) -> Work:
    """x and mask in, whitened x out. The second read of x, which a cache may save, is not counted."""
    return Work(tokens * (2 * FP32 + BOOL))


def approx_kl(tokens: int, *, backward: bool = False) -> Work:
    """logprobs and ref_logprobs in, the estimate out; backward: both and its gradient in, that of logprobs out."""
    return Work(tokens * FP32 * (3 + 4 * backward))


def ppo_loss(tokens: int, *, values: bool = False, reference: bool = False) -> Work:
    """logprobs, old_logprobs, advantages, mask in, the gradient of logprobs out, in one pass forward and backward.

    The value loss adds values, old_values, returns and a gradient; the reference adds ref_logprobs.
    """
    return Work(tokens * (4 * FP32 + BOOL + 4 * FP32 * values + FP32 * reference))


def sample_tokens(rows: int, vocab: int, itemsize: int) -> Work:
    """logits [rows, vocab] in; token, raw and processed log-prob and kept mass out."""
    return Work(rows * (vocab * itemsize + INT64 + 3 * FP32))


def decode_attention(keys: int, batch: int, heads: int, kv_heads: int, head_size: int, itemsize: int = FP32) -> Work:
    """`keys` keys and values in all, read once; queries in, results out."""
    return Work(2 * keys * kv_heads * head_size * itemsize + 2 * batch * heads * head_size * itemsize)


def packed_attention(tokens: int, pairs: int, heads: int, kv_heads: int, head_size: int, itemsize: int = FP32) -> Work:
    """q, k, v in and out; backward: these, out and its gradient in, three gradients out.

    `pairs` of a query and a key that it sees, for each head: two products forward, five backward, as who keeps no scores must.
    """
    return Work(tokens * 6 * (heads + kv_heads) * head_size * itemsize, (2 + 5) * 2 * pairs * heads * head_size)


def batch_invariant_linear(rows: int, columns: int, inner: int, itemsize: int = FP32) -> Work:
    """x [rows, inner] and weight [columns, inner] in, [rows, columns] out."""
    elements = rows * inner + columns * inner + rows * columns
    return Work(elements * itemsize, 2 * rows * columns * inner)


def rms_norm(rows: int, width: int, itemsize: int) -> Work:
    """x and residual [rows, width] in, the norm and the total out, weight [width] in; backward: the total, both upstream gradients and weight in,
    the gradients of x, which is the residual's, and of weight out."""
    return Work((4 + 4) * rows * width * itemsize + 3 * width * itemsize)


def rotary_embedding(rows: int, heads: int, head_size: int, places: int, itemsize: int) -> Work:
    """x [rows, heads, head_size] in and out, backward its gradients; each time two tables [places, head_size] and a position a row."""
    return Work(2 * (2 * rows * heads * head_size * itemsize + 2 * places * head_size * itemsize + rows * INT64))


def swiglu(elements: int, itemsize: int) -> Work:
    """gate and up in, their product out; backward: both and the upstream gradient in, two gradients out."""
    return Work((3 + 5) * elements * itemsize)


def decode(model: nn.Module, batch: int, context: int = 0) -> Work:
    """A token of a decode step: its share of the weights, read once a step for the whole batch, the keys and values of `context` tokens, and
    the products with weights."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - (0 if embedding is head else embedding.numel())
    token = kept_of_a_token(model) if context else 0
    return Work(head.itemsize * (weights // batch + context * token), 2 * weights)


def kept_of_a_token(model: nn.Module) -> int:
    """Numbers: a key and a value in every layer."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size


def ppo_step_flops(
    model: nn.Module, prompts: int, samples: int, prompt: int, new: int, *, shared_trunk: bool = False
) -> dict[str, int]:
    """Products in each phase of one epoch over `samples` of each of `prompts` of at least `prompt` tokens, with exactly `new` ones each, by a
    policy, a reference and a critic like `model`.

    Every token that differs (a prompt's once for all its samples) goes once through the trunk when it is sampled and for its old and reference
    log-probs and its value, and three times (forward, two gradients) through policy and critic in the update; new tokens alone through the
    head. With a shared trunk a value is read off the policy's pass: none for it in scoring, none through a critic in the update.
    """
    trunk, head = trunk_and_head(model)
    critics = 0 if shared_trunk else 1
    passes = {"sampling": (1, 1), "scoring": (2 + critics, 2), "update": (3 * (1 + critics), 3)}
    tokens, actions = prompts * (prompt + samples * new), prompts * samples * new
    return {
        phase: 2 * (through_trunk * tokens * trunk + through_head * actions * head)
        for phase, (through_trunk, through_head) in passes.items()
    }


def ppo_update(model: nn.Module, prompts: int, samples: int, prompt: int, new: int, updates: int) -> Work:
    """The update of `ppo_step_flops`. Bytes: what AdamW reads (weight, gradient, two moments) and writes (all but the gradient) in each of
    `updates` of policy and critic."""
    flops = ppo_step_flops(model, prompts, samples, prompt, new)["update"]
    return Work(adam_bytes(model, updates, shared_trunk=False), flops)


def ppo_step(
    model: nn.Module, prompts: int, samples: int, prompt: int, new: int, updates: int, *, shared_trunk: bool = False
) -> Work:
    """All phases of `ppo_step_flops`. Bytes: the weights for each decode step, and AdamW's as in `ppo_update`; with a shared trunk those of
    the policy alone."""
    flops = ppo_step_flops(model, prompts, samples, prompt, new, shared_trunk=shared_trunk)
    decoding = model.get_output_embeddings().weight.itemsize * new * sum(trunk_and_head(model))
    return Work(decoding + adam_bytes(model, updates, shared_trunk=shared_trunk), sum(flops.values()))


def trunk_and_head(model: nn.Module) -> tuple[int, int]:
    """Weights that a token goes through; the embedding is looked up, and may be the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = 0 if embedding is head else embedding.numel()
    return sum(p.numel() for p in model.parameters()) - head.numel() - looked_up, head.numel()


def adam_bytes(model: nn.Module, updates: int, *, shared_trunk: bool) -> int:
    policy = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight
    tied = model.get_input_embeddings().weight is head  # then it is the critic's embedding too
    critic = 0 if shared_trunk else policy - (0 if tied else head.numel())
    return FP32 * 7 * updates * (policy + critic)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of a GPU, the largest cache that Linux names for CPU 0, else 32 MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=UNKNOWN_CACHE_BYTES)


def ceilings(device: torch.device, rounds: int, dtypes: Iterable[str]) -> Ceilings:
    """`dtypes`: those that something is multiplied in. A CPU without instructions for bf16 takes seconds for one product."""
    return Ceilings(copy_bandwidth(device, rounds), {dtype: matmul_rate(device, dtype, rounds) for dtype in dtypes})


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second, read and written, of `copy_` between two existing buffers that are each at least four times the cache."""
    smallest = 1 << 30 if device.type == "cuda" else 256 << 20
    source = torch.rand(max(4 * cache_bytes(device), smallest) // FP32, device=device)
    target = torch.empty_like(source)
    seconds = [clock.seconds(lambda: target.copy_(source), device) for _ in range(rounds + 1)]
    # The first copy also maps the target's pages.
    return 2 * source.numel() * FP32 / statistics.median(seconds[1:])


def matmul_rate(device: torch.device, dtype: str, rounds: int) -> float:
    """Flops a second of a square product of random numbers: of zeros a GPU, which then draws less power, makes more."""
    size = MATMUL_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(left)
    seconds = [clock.seconds(lambda: torch.mm(left, right, out=out), device) for _ in range(rounds + 1)]
    return 2 * size**3 / statistics.median(seconds[1:])
