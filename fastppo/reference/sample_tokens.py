"""Sampling in plain PyTorch: the arithmetic that every backend repeats bit for bit.

A token follows from its row of logits, the row's parameters, the seed, the sequence id and the position, and from
nothing else. Sums are over integers, so that no order of summation, thread count or chip can change a choice.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastppo.reference.token_logprobs import log_softmax

MASS_BITS = 40  # the most likely token weighs 2^40; with V <= 2^22 a sum stays below 2^63
TOP_P_BITS = 31
LOW_32 = 0xFFFFFFFF


def _fp32(decimal: float) -> float:
    return struct.unpack("f", struct.pack("f", decimal))[0]


LOG2_E = _fp32(1.44269504088896341)
LN2_HIGH, LN2_LOW = 0.693359375, _fp32(-2.12194440e-4)
SHIFTER = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer
EXP_COEFFICIENTS = [
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
]


def exp_nonpositive(x: Tensor) -> Tensor:
    """exp(x) for fp32 x <= 0, the very operations of csrc/cpu/simd.h's `vexp_nonpositive`; below -87.3 it is 0.

    x = n ln 2 + r (Cody and Waite 1980, ch. 6), exp(x) = 2^n (1 + r + r^2 P(r)), with P of Cephes' expf.
    """
    shifted = x * LOG2_E + SHIFTER
    n = shifted - SHIFTER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    poly = torch.full_like(r, _fp32(EXP_COEFFICIENTS[0]))
    for coefficient in EXP_COEFFICIENTS[1:]:
        poly = poly * r + _fp32(coefficient)
    mantissa = (poly * (r * r) + r) + 1.0
    result = (mantissa.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return torch.where(x < -87.3, 0.0, result)


def philox(seed: int, sequence_ids: Tensor, positions: Tensor) -> Tensor:
    """64 random bits [B] as int64: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    The key is the seed, the counter is (position, sequence id); of the four words the first two, low one first.
    """
    key = [seed & LOW_32, (seed >> 32) & LOW_32]
    c0, c1 = positions & LOW_32, (positions >> 32) & LOW_32
    c2, c3 = sequence_ids & LOW_32, (sequence_ids >> 32) & LOW_32
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; int64 wraps, the bits are right
        high0, high1 = (product0 >> 32) & LOW_32, (product1 >> 32) & LOW_32
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], product1 & LOW_32, high0 ^ c3 ^ key[1], product0 & LOW_32
        key = [(key[0] + 0x9E3779B9) & LOW_32, (key[1] + 0xBB67AE85) & LOW_32]
    return c0 | (c1 << 32)


def multiply_high(u: Tensor, total: Tensor) -> Tensor:
    """floor(u * total / 2^64) for u the bits of a uint64 and 0 <= total < 2^63."""
    u_high, u_low = (u >> 32) & LOW_32, u & LOW_32
    t_high, t_low = total >> 32, total & LOW_32
    low_low, low_high, high_low = u_low * t_low, u_low * t_high, u_high * t_low
    middle = ((low_low >> 32) & LOW_32) + (low_high & LOW_32) + (high_low & LOW_32)
    return u_high * t_high + (low_high >> 32) + ((high_low >> 32) & LOW_32) + (middle >> 32)


def top_p_mass(top_p: Tensor, total: Tensor) -> Tensor:
    """ceil(top_p * total), with top_p rounded to a multiple of 2^-31."""
    share = (top_p.double() * 2.0**TOP_P_BITS).round().long()
    rest = total & ((1 << TOP_P_BITS) - 1)
    return share * (total >> TOP_P_BITS) + ((share * rest + (1 << TOP_P_BITS) - 1) >> TOP_P_BITS)


def kept_tokens(z: Tensor, exps: Tensor, mass: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """bool [B, V]: what top-k, then top-p, then min-p leave. Each is a threshold: ties stand or fall together."""
    ordered, order = z.sort(dim=-1, descending=True)
    width = z.shape[-1]
    last = torch.where((top_k > 0) & (top_k < width), top_k, width) - 1
    keep = z >= ordered.gather(-1, last.unsqueeze(-1))
    cumulative = torch.where(keep, mass, 0).gather(-1, order).cumsum(-1)
    needed = top_p_mass(top_p, cumulative[:, -1]).clamp_min(1)
    last = (cumulative < needed.unsqueeze(-1)).sum(-1).clamp_max(width - 1)
    keep &= z >= ordered.gather(-1, last.unsqueeze(-1))
    return keep & (exps >= min_p.unsqueeze(-1))


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [B, V] floating; fp32 temperature, top_p, min_p [B]; int64 top_k, sequence_ids, positions [B].

    z = logits / temperature; w_v = round(2^40 exp(z_v - max z)), integers. Kept: top-k {z >= k-th largest z}, of it
    top-p, the smallest {z >= t} with mass >= top_p of top-k's, of it min-p {exp(z - max z) >= min_p}. The token is the
    first v whose cumulative kept mass exceeds floor(u * kept mass / 2^64), with u = philox(seed, sequence id,
    position).

    Returns tokens int64 [B], log softmax(z)[token], the same within the kept tokens, and kept mass / mass: fp32 [B]
    (log-probs fp64 for fp64 logits). Temperature 0: the largest logit, the first of equals, unfiltered, with log-probs
    at temperature 1. A row without a distribution (NaN, +inf, only -inf, or a parameter out of range): -1, NaN, NaN, 0.
    """
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature).unsqueeze(-1)
    z = logits.float() / divisor
    top = z.amax(-1, keepdim=True)
    valid_parameters = (temperature >= 0) & (top_k >= 0) & (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    valid = top.squeeze(-1).isfinite() & temperature.isfinite() & valid_parameters

    exps = exp_nonpositive(torch.where(valid.unsqueeze(-1), z - top, 0))
    mass = (exps.double() * 2.0**MASS_BITS).round().long()
    keep = kept_tokens(z, exps, mass, top_k, top_p, min_p) | greedy.unsqueeze(-1)
    kept = torch.where(keep, mass, 0)
    kept_total, total = kept.sum(-1), mass.sum(-1)
    target = multiply_high(philox(seed, sequence_ids, positions), kept_total)
    drawn = (kept.cumsum(-1) <= target.unsqueeze(-1)).sum(-1).clamp_max(z.shape[-1] - 1)
    index = torch.arange(z.shape[-1], dtype=torch.int64, device=z.device)
    largest = torch.where(z == top, index, z.shape[-1] - 1).amin(-1)
    tokens = torch.where(greedy, largest, drawn)

    place = tokens.unsqueeze(-1)
    exact_z = logits / divisor.double() if logits.dtype == torch.float64 else z
    logprobs = log_softmax(exact_z).gather(-1, place).squeeze(-1)
    log_kept = torch.log(kept_total.double() * 2.0**-MASS_BITS)
    within = (z.gather(-1, place).double() - top.double()).squeeze(-1) - log_kept
    # All mass kept: the same distribution, so the same number.
    processed = torch.where(kept_total == total, logprobs, within.to(logprobs.dtype))
    kept_mass = (kept_total.double() / total.double()).float()
    return (
        torch.where(valid, tokens, -1),
        torch.where(valid, logprobs, torch.nan),
        torch.where(valid, processed, torch.nan),
        torch.where(valid, kept_mass, 0),
    )
