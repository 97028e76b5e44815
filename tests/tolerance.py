"""The one error rule of every kernel test: our error against fp64 is at most native-dtype torch's own error, plus rounding.

After Apple CCE's tests. `exact` is the reference run in fp64 on the same (already rounded) inputs, `native` the reference in the input's own
type. A test passes tensors; it never sets a tolerance (tests/test_layout.py looks for one). Sums of a few Python floats may be compared by
pytest.approx as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding steps that a kernel's last operations may add, in units of the output type's epsilon.
ROUNDINGS = 32
# Two orders of a model's thousands of roundings differ in where they err and a little in how much: worst errors of one size.
MODEL_SHARE = 2
# The same for two sides in fp64, of which neither is the exact one: terms that cancel leave roundings that the result's size does not show.
FP64_ROUNDINGS = 4096


def assert_as_exact_as_native(ours: Tensor, native: Tensor, exact: Tensor, what: str = "output") -> None:
    """|ours - exact| <= |native - exact| + 32 eps(ours.dtype) * scale, elementwise, scale = max(|exact|, mean |exact|, 1e-6).

    The mean allows for sums that cancel; infinities and NaN must stand in the same places. Where native is not finite and exact is, roundings
    alone are allowed.
    """
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert exact.dtype == torch.float64, "the exact value is computed in fp64"
    ours64, native64 = ours.double(), native.double()
    finite = exact.isfinite()
    assert torch.equal(ours64.isnan(), exact.isnan()), f"{what}: NaN in other places than the exact result"
    infinite = exact.isinf()
    assert torch.equal(ours64[infinite], exact[infinite]), f"{what}: infinities differ from the exact result"
    if not finite.any():
        return
    ours64, native64, exact = ours64[finite], native64[finite], exact[finite]
    assert ours64.isfinite().all(), f"{what}: not finite where the exact result is"
    native_error = torch.where(native64.isfinite(), (native64 - exact).abs(), 0)  # who fails altogether allows nothing
    scale = exact.abs().clamp_min(max(exact.abs().mean().item(), 1e-6))
    allowed = native_error + ROUNDINGS * torch.finfo(ours.dtype).eps * scale
    excess = (ours64 - exact).abs() - allowed
    worst = excess.argmax()
    assert excess[worst] <= 0, (
        f"{what}: {ours64[worst]:.9g} at flat finite position {worst.item()}, exact {exact[worst]:.9g}, "
        f"native {native64[worst]:.9g}, allowed error {allowed[worst]:.3g}"
    )


def assert_as_exact_as_model(ours: Tensor, native: Tensor, exact: Tensor, what: str = "output") -> None:
    """The same rule for what a whole model makes, where native's error at one place is chance: twice its worst error is allowed everywhere.

    `native` is the model's own forward in Transformers, `exact` that of its copy in fp64.
    """
    worst = (native.double() - exact).abs().max() if exact.numel() else 0
    assert_as_exact_as_native(ours, exact + MODEL_SHARE * worst, exact, what)


def assert_no_worse_than(ours: Tensor, theirs: Tensor, exact: Tensor, what: str = "output") -> None:
    """The same rule beside another package's formula, where sums cancel in other places than ours: its worst error is allowed everywhere."""
    worst = (theirs.double() - exact).abs().max() if exact.numel() else 0
    assert_as_exact_as_native(ours, exact + worst, exact, what)


def assert_rounds_to(ours: Tensor, exact: Tensor | float, what: str = "output") -> None:
    """The same rule where the exact value is known: `native` is that value, rounded once."""
    exact = torch.as_tensor(exact, dtype=torch.float64, device=ours.device).expand(ours.shape)
    assert_as_exact_as_native(ours, exact.to(ours.dtype), exact, what)


def assert_same_in_fp64(ours: Tensor, other: Tensor, what: str = "output") -> None:
    """|ours - other| <= 4096 eps(fp64) * max |other|, elementwise: one formula computed twice in fp64; what fails alike is alike."""
    assert ours.dtype == other.dtype == torch.float64, f"{what}: {ours.dtype} and {other.dtype}, expected fp64"
    assert ours.shape == other.shape, f"{what}: shape {list(ours.shape)}, expected {list(other.shape)}"
    finite = other.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(1.0), other[~finite].nan_to_num(1.0)), (
        f"{what}: not finite in other ways"
    )
    if finite.any():
        ours, other = ours[finite], other[finite]
        excess = (ours - other).abs() - FP64_ROUNDINGS * torch.finfo(torch.float64).eps * other.abs().max()
        assert (excess <= 0).all(), f"{what}: {ours[excess.argmax()]:.17g}, expected {other[excess.argmax()]:.17g}"


def assert_keeps_digits(ours: Tensor, exact: Tensor, what: str = "output") -> None:
    """|ours - exact| <= 32 eps(ours.dtype) * |exact|, elementwise: for results that no cancellation excuses, however small they are.

    Neither native torch's error nor the size of the numbers beside it allows a small one more.
    """
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert exact.dtype == torch.float64 and exact.isfinite().all(), "the exact value is computed in fp64"
    excess = (ours.double() - exact).abs() - ROUNDINGS * torch.finfo(ours.dtype).eps * exact.abs()
    wrong = ~(excess <= 0)  # NaN too
    assert not wrong.any(), (
        f"{what}: {ours[wrong][0]:.9g} at {wrong.nonzero()[0].tolist()}, exact {exact[wrong][0]:.9g}, {int(wrong.sum())} of {wrong.numel()}"
    )


def assert_same_on_ranks(ours: Tensor, alone: Tensor, what: str = "output") -> None:
    """|ours - alone| <= 1e-5 * max(max |alone|, 1), elementwise: what several ranks make of a step in fp32 is what one process makes of it, in
    another order of sums."""
    assert ours.shape == alone.shape, f"{what}: shape {list(ours.shape)}, expected {list(alone.shape)}"
    error = (ours.double() - alone.double()).abs()
    limit = 1e-5 * max(1.0, alone.abs().max().item() if alone.numel() else 0.0)
    assert (error <= limit).all(), f"{what}: differs by {error.max().item():.2e}, expected at most {limit:.2e}"
