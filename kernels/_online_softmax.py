"""The maths of one row's softmax that several kernels share: logit transform, and max / sum / weighted sum read once."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh through one exponential of a non-positive number, and its series where 1 - e would cancel."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = a + a * s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885)))
    magnitude = tl.where(a < 0.1875, small, large)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def transform_logits(x, scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """z = softcap * tanh(x * scale / softcap) / temperature, fp32."""
    z = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z / temperature


@triton.jit
def transform_slope(x, scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """dz/dx."""
    slope = tl.zeros_like(x.to(tl.float32)) + scale / temperature
    if HAS_SOFTCAP:
        th = tanh(x.to(tl.float32) * scale / softcap)
        slope = slope * (1.0 - th * th)
    return slope


@triton.jit
def online_update(z, running_max, rest, weighted, WITH_ENTROPY: tl.constexpr):
    """Fold a block z [BLOCK_V] (-inf where there is nothing) into (max, sum exp(z - max) - 1, sum exp(z - max) (z - max)).

    Milakov and Gimelshein 2018. The sum leaves out one element that is the largest, whose term is 1: beside it the others would lose
    their digits where they are small. So it begins at -1. While all is -inf the shift is 0, so that -inf - shift stays -inf and a NaN
    still shows.
    """
    new_max = tl.maximum(running_max, tl.max(z, axis=0))
    rises = new_max > running_max
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    moved = tl.where(
        running_max == -float("inf"), 0.0, running_max - shift
    )  # log of the factor for what was summed so far
    factor = tl.where(running_max == -float("inf"), 0.0, tl.exp(moved))
    shifted = z - shift
    e = tl.exp(shifted)
    if WITH_ENTROPY:
        # e = 0 adds nothing though `shifted` may be -inf.
        weighted = factor * (weighted + moved * (rest + 1.0)) + tl.sum(tl.where(e == 0.0, 0.0, e * shifted), axis=0)
    # The largest are counted, not added; in a block without them there are none.
    largest = shifted == 0.0
    below = tl.sum(tl.where(largest, 0.0, e), axis=0)
    others = tl.sum(largest.to(tl.int32), axis=0) - rises.to(tl.int32)
    rest = tl.where(rises, factor * (rest + 1.0), rest) + (below + others.to(tl.float32))
    return new_max, rest, weighted


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1, to fp32's last digits: what 1 + x loses is made good (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) = -expm1(x) for x <= 0, to fp32's last digits also where the difference cancels: there x (1 + x/2 (1 + x/3 ...))."""
    series = 1.0 + x / 8.0
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))
