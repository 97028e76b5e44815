"""`sample_tokens`: kernel and reference agree bit for bit; kept sets, frequencies, independence of the batch."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import sample_tokens
from fastppo.reference.sample_tokens import multiply_high, philox, top_p_mass


def as_int64(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), 0, 0xE169C58D6627E8D5),
        ((0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF), 0xFFFFFFFFFFFFFFFF, 0x41C83B0E408F276D),
        ((0x85A308D3243F6A88, 0x0370734413198A2E), 0x299F31D0A4093822, 0x94FDCCEBD16CFE09),
    ],
)
def test_philox_gives_its_authors_vectors(counter, key, expected):
    """Known answers of Random123's kat_vectors, philox4x32 with 10 rounds: the first two of the four words."""
    position, sequence_id = (torch.tensor([as_int64(word)]) for word in counter)
    assert philox(as_int64(key), sequence_id, position).item() == as_int64(expected)


def test_wide_multiplication_is_exact():
    u = torch.randint(-(2**63), 2**63 - 1, (500,))
    u[:3] = torch.tensor([0, -1, 2**63 - 1])
    total = torch.randint(0, 2**62, (500,))
    total[:3] = 2**62
    expected = [(a % 2**64) * b >> 64 for a, b in zip(u.tolist(), total.tolist(), strict=True)]
    assert multiply_high(u, total).tolist() == expected
    top_p = torch.rand(500)
    top_p[:2] = torch.tensor([0.0, 1.0])
    expected = [-(-round(p * 2**31) * t >> 31) for p, t in zip(top_p.tolist(), total.tolist(), strict=True)]
    assert top_p_mass(top_p, total).tolist() == expected


def test_frequencies_follow_the_distribution():
    """Chi-square over 30 tokens and 200,000 draws: below the 99.9 % point for 29 degrees of freedom."""
    logits, draws = torch.randn(30), 200_000
    tokens = sample_tokens(logits.expand(draws, 30), temperature=0.8, seed=3).tokens
    expected = (logits.double() / 0.8).softmax(-1) * draws
    chi_square = ((torch.bincount(tokens, minlength=30) - expected).square() / expected).sum()
    assert chi_square < 58.3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature\[1\] is -2.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \[3\], expected \[2\]"),
        ({"top_k": 2.5}, TypeError, "top_k is 2.5, expected an integer"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_k": torch.tensor([1.0, 2.0])}, TypeError, "top_k has dtype torch.float32"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"top_p": torch.tensor([0.5, torch.nan])}, ValueError, r"top_p\[1\] is nan"),
        ({"min_p": torch.tensor([2.0, 0.5])}, ValueError, r"min_p\[0\] is 2.0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 1.0}, TypeError, "seed is 1.0"),
        ({"sequence_ids": torch.zeros(2)}, TypeError, "sequence_ids has dtype torch.float32"),
        ({"positions": torch.zeros(1, dtype=torch.long)}, ValueError, "positions has shape"),
        ({"logits": torch.zeros(50)}, ValueError, r"logits has shape \[50\], expected \[B, V\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "1 <= V"),
        ({"logits": torch.zeros(2, 5, dtype=torch.long)}, TypeError, "logits has dtype torch.int64"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(**({"logits": torch.zeros(2, 50)} | change))
