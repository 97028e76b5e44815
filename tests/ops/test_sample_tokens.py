"""`sample_tokens`: kernel and reference agree bit for bit; kept sets, frequencies, independence of the batch."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.ops import SampledTokens, sample_tokens, token_logprobs, use_backend
from fastppo.reference.sample_tokens import exp_nonpositive, kept_tokens, multiply_high, philox, top_p_mass
from fastppo.reference.token_logprobs import log_softmax
from tests.cases import CERTAIN_WIDTHS, DTYPES, certain_rows, strided_views
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_keeps_digits, assert_rounds_to

FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.3},
    "highest temperature": {"temperature": 1e10, "top_k": 2, "top_p": 0.5},
    "top-1": {"top_k": 1},
    "top-k": {"top_k": 7},
    "top-k beyond the kernel's lanes": {"top_k": 600},
    "top-p": {"top_p": 0.9},
    "top-p of 0": {"top_p": 0.0},
    "min-p": {"min_p": 0.1},
    "min-p of 1": {"min_p": 1.0},
    "faint": {"min_p": 1e-12, "top_p": 0.9999999},
    "all": {"temperature": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
}
ROWS = 12
SIZES_BY_SPREAD = list(product((1, 2, 17, 252, 1023, 1024, 1025, 5000), (0.0, 1e-3, 1.0, 30.0)))


def assert_same(ours: SampledTokens, other: SampledTokens, exact_mass: bool = True) -> None:
    """The integers decide, so tokens and kept mass are equal to the last bit; log-probs are right, not equal."""
    assert torch.equal(ours.tokens, other.tokens)
    if exact_mass:
        assert torch.equal(ours.kept_mass, other.kept_mass)
    for name in ("kept_mass", "logprobs", "processed_logprobs"):
        a, b = getattr(ours, name), getattr(other, name)
        assert_as_exact_as_native(a, b, b.double(), name)


def compare(logits: Tensor, exact_mass: bool = True, **options) -> SampledTokens:
    ours = sample_tokens(logits, **options)
    with use_backend("reference"):
        assert_same(ours, sample_tokens(logits, **options), exact_mass)
    return ours


def adversarial_rows(vocab: int, spread: float, dtype: torch.dtype) -> Tensor:
    """[ROWS, vocab]: noise, ties, banned tokens, a lone token, a far outlier, both zeros, and three rows of errors."""
    logits = torch.randn(ROWS, vocab) * spread
    logits[1] = 0.5
    logits[2] = (logits[2] * 2).round() / 2
    logits[3, 1::2] = -torch.inf
    logits[4, :-1] = -torch.inf
    logits[5, vocab // 2] = 1e4
    logits[6] = torch.where(torch.arange(vocab) % 3 == 0, -0.0, 0.0)
    logits[7, vocab // 3] = torch.nan
    logits[8, vocab // 3] = torch.inf
    logits[9] = -torch.inf
    logits[10] -= 6e4
    return logits.to(dtype)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(fast_backend, dtype, options):
    """Executed on the CPU, CUDA's takes seconds: there each type has a third of the sizes and spreads, and all types have all."""
    cases = SIZES_BY_SPREAD if fast_backend == "cpu" else SIZES_BY_SPREAD[DTYPES.index(dtype) :: len(DTYPES)]
    for seed, (vocab, spread) in enumerate(cases):
        logits = adversarial_rows(vocab, spread, dtype)
        sampled = compare(logits, seed=seed, **options)
        error = sampled.tokens == -1
        assert error.tolist() == [row in (7, 8, 9) for row in range(ROWS)]
        assert sampled.logprobs[error].isnan().all() and sampled.processed_logprobs[error].isnan().all()
        assert (sampled.kept_mass[error] == 0).all()
        drawn = logits[~error].gather(1, sampled.tokens[~error].unsqueeze(1))
        assert (drawn > -torch.inf).all()


@pytest.mark.parametrize("temperature", [0.5, 1e10])
def test_denormal_logits(fast_backend, temperature):
    compare(torch.randn(6, 300) * 1e-38, temperature=temperature, top_k=2, top_p=0.5)


def test_large_vocabulary(fast_backend):
    logits = torch.randn(3, 100_000) * torch.tensor([[0.1], [1.0], [4.0]])
    for options in ({}, FILTERS["top-p"], FILTERS["all"], {"top_k": 20_000}):
        # Behind top-k nothing but the kept share depends on all masses: CUDA takes it from the sum of exponentials.
        compare(logits, exact_mass=fast_backend != "cuda" or "top_k" not in options, **options)


def test_parameters_of_each_row(backend):
    """A batch of mixed requests gives what each request gives alone."""
    logits = torch.randn(40, 700) * 3
    options = {
        "temperature": torch.rand(40) * (torch.rand(40) > 0.2),
        "top_k": torch.randint(0, 80, (40,), dtype=torch.int32),
        "top_p": torch.rand(40, dtype=torch.float64),
        "min_p": torch.rand(40) ** 4,
        "sequence_ids": torch.randint(0, 2**40, (40,)),
        "positions": torch.randint(0, 5, (40,), dtype=torch.int32),
    }
    batch = compare(logits, **options)
    for i in range(0, 40, 7):
        alone = {name: value[i : i + 1] for name, value in options.items()}
        numbers = {name: value.item() for name, value in alone.items() if name not in ("sequence_ids", "positions")}
        for given in (alone, alone | numbers):
            row = sample_tokens(logits[i : i + 1], **given)
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(batch, row, strict=True))


def test_bits_do_not_depend_on_batch_order_or_threads(fast_backend):
    logits, ids, options = torch.randn(9, 3000) * 2, torch.arange(9) * 5, {"top_p": 0.8, "temperature": 0.7}
    whole = sample_tokens(logits, sequence_ids=ids, **options)
    order = torch.randperm(9)
    shuffled = sample_tokens(logits[order], sequence_ids=ids[order], **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = sample_tokens(logits, sequence_ids=ids, **options)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(whole, shuffled, threaded, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a, c)


def isa_outputs() -> list[Tensor]:
    outputs = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        logits = (torch.randn(20, 2500) * 3).to(dtype)
        for options in (*FILTERS.values(), {"temperature": 0}):
            outputs += [*sample_tokens(logits, **options)]
    return outputs


def test_bits_do_not_depend_on_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


def test_logprobs_are_those_of_token_logprobs(cpu_backend):
    """To the bit: the sampler and the loss share one log-sum-exp."""
    logits = torch.randn(20, 3000) * 3
    sampled = sample_tokens(logits, temperature=0.7, top_k=100)
    assert torch.equal(sampled.logprobs, token_logprobs(logits, sampled.tokens, temperature=0.7))


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_logprobs_against_exact_distributions(backend, options):
    """fp64 logits go to the reference in fp64: the truth for the same tokens."""
    logits = torch.randn(30, 400) * 2
    ours, exact = sample_tokens(logits, **options), sample_tokens(logits.double(), **options)
    assert torch.equal(ours.tokens, exact.tokens)
    z = logits.double() / options.get("temperature", 1.0)
    logprobs = z.log_softmax(-1).gather(-1, ours.tokens.unsqueeze(-1)).squeeze(-1)
    assert_as_exact_as_native(ours.logprobs, exact.logprobs.float(), logprobs)
    # Conditioning on the kept set divides by its probability.
    kept = exact.processed_logprobs.exp() * ours.kept_mass
    assert_rounds_to(kept.float(), logprobs.exp())
    assert_as_exact_as_native(ours.processed_logprobs, ours.logprobs - ours.kept_mass.log(), exact.processed_logprobs)


@pytest.mark.parametrize("width", CERTAIN_WIDTHS)
def test_log_probs_of_tokens_that_are_nearly_certain(cpu_backend, width):
    """They keep their digits however near 0 they are, as those of token_logprobs do."""
    logits, _ = certain_rows(width)
    sampled = sample_tokens(logits, temperature=0.0)
    exact = log_softmax(logits.double()).gather(-1, sampled.tokens.unsqueeze(-1)).squeeze(-1)
    assert_keeps_digits(sampled.logprobs, exact)


def test_nothing_filtered_leaves_the_log_probability_as_it_is(backend):
    logits = torch.randn(6, 50)
    for options in ({}, {"top_k": 50}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"min_p": 1e-9}):
        sampled = sample_tokens(logits, **options)
        assert torch.equal(sampled.logprobs, sampled.processed_logprobs) and (sampled.kept_mass == 1).all()


def transformers_keeps(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return (MinPLogitsWarper(min_p)(None, scores) if min_p else scores) > -torch.inf


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("filters", [(50, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (40, 0.8, 0.03)], ids=str)
def test_kept_set_is_that_of_transformers(backend, filters, temperature):
    """Without ties; kept mass is a fingerprint of the set, and draws stay inside."""
    logits = torch.randn(50, 300) * 2
    keep = transformers_keeps(logits, temperature, *filters)
    top_k, top_p, min_p = filters
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampled = sample_tokens(logits, **options)
    expected = torch.where(keep, (logits.double() / temperature).softmax(-1), 0).sum(-1)
    assert_rounds_to(sampled.kept_mass, expected)
    assert keep.gather(1, sampled.tokens.unsqueeze(1)).all()


def test_ties_are_kept_together():
    z = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    exps = exp_nonpositive(z - 3)
    mass = (exps.double() * 2**40).round().long()

    def kept(top_k=0, top_p=1.0, min_p=0.0):
        parameters = (torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        return kept_tokens(z, exps, mass, *parameters)[0].nonzero().squeeze(1).tolist()

    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == kept(top_k=4) == [0, 2, 3, 4]
    assert kept(top_p=0.0) == kept(top_p=0.4) == [0]
    assert kept(top_p=0.5) == kept(top_p=0.85) == [0, 2, 3, 4]
    assert kept(top_p=0.95) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.3) == [0, 2, 3, 4]
    # Top-p counts what top-k left: 1 / (1 + 3 / e) = 0.475 of it is the first token.
    assert kept(top_k=2, top_p=0.47) == [0] and kept(top_k=2, top_p=0.48) == [0, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 12}, {"min_p": 0.1}], ids=str)
def test_frequencies_follow_the_distribution(backend, options):
    """Chi-square of 10,000 draws from 30 tokens: below the 99.9 % point for 29 degrees of freedom."""
    logits, draws = torch.randn(30), 10_000
    sampled = sample_tokens(logits.expand(draws, 30), temperature=0.8, seed=3, **options)
    filters = (options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0))
    keep = transformers_keeps(logits.unsqueeze(0), 0.8, *filters)[0]
    expected = (logits.double() / 0.8).masked_fill(~keep, -torch.inf).softmax(-1) * draws
    counts = torch.bincount(sampled.tokens, minlength=30)
    assert (counts[~keep] == 0).all()
    assert ((counts - expected).square() / expected)[keep].sum() < 58.3
    positions = sample_tokens(logits.expand(draws, 30), sequence_ids=torch.zeros(draws, dtype=torch.long),
                              positions=torch.arange(draws), temperature=0.8, seed=3, **options)  # fmt: skip
    counts = torch.bincount(positions.tokens, minlength=30)
    assert ((counts - expected).square() / expected)[keep].sum() < 58.3


def test_tail_below_fp32_uniforms_is_reached(backend):
    """65,536 tokens of probability 2^-26 each: with uniforms of 24 bits only every fourth could ever be drawn."""
    logits = torch.full((1 + (1 << 16),), -26 * math.log(2.0))
    logits[0] = 0.0
    positions = torch.arange(1 << 16)
    uniforms = philox(0, torch.zeros_like(positions), positions)
    positions = positions[(uniforms >> 53) & 0x7FF == 0x7FF]  # the last 2^-11 of the unit interval lie in the tail
    sampled = sample_tokens(
        logits.expand(len(positions), -1), sequence_ids=torch.zeros_like(positions), positions=positions
    )
    assert len(positions) > 20 and (sampled.tokens > 1 << 15).all()
    assert set((sampled.tokens % 4).tolist()) == {0, 1, 2, 3}
    assert (sampled.logprobs.exp() < 2.0**-24).all()


def test_greedy(backend):
    logits = torch.randn(8, 2100)
    logits[1, [5, 1500, 1501]] = 9.0
    logits[2, 2099] = 9.0
    logits[3] = 0.0
    sampled = sample_tokens(logits, temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert sampled.tokens[1:4].tolist() == [5, 2099, 0]
    assert torch.equal(sampled.tokens[4:], logits[4:].argmax(-1))
    expected = logits.double().log_softmax(-1).gather(1, sampled.tokens.unsqueeze(1)).squeeze(1)
    assert_rounds_to(sampled.logprobs, expected)
    assert torch.equal(sampled.logprobs, sampled.processed_logprobs) and (sampled.kept_mass == 1).all()


def test_dividing_by_a_tiny_temperature_can_leave_no_distribution(backend):
    sampled = sample_tokens(torch.tensor([[1e30, 2e30], [0.0, -1e30]]), temperature=1e-10)
    assert sampled.tokens.tolist() == [-1, 0]


@pytest.mark.parametrize("temperature", [1e-10, 1e-3, 1e10])
def test_every_temperature_gives_the_log_probability(backend, temperature):
    """From all but greedy to all but uniform, for logits far beyond those of a model."""
    logits = torch.randn(8, 300) * torch.logspace(-3, 12, 8).unsqueeze(1)
    sampled = sample_tokens(logits, temperature=temperature)
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, sampled.tokens.unsqueeze(1)).squeeze(1)
    native = (logits / temperature).log_softmax(-1).gather(1, sampled.tokens.unsqueeze(1)).squeeze(1)
    assert_as_exact_as_native(sampled.logprobs, native, exact)


def test_a_temperature_that_fp32_takes_for_0_is_not_greedy(backend):
    """1e-300 used to be; where the host does not wait for the device it gives an error row."""
    with pytest.raises(ValueError, match="temperature is 1e-300, expected 0 or a number from 1e-10"):
        sample_tokens(torch.randn(2, 5), temperature=1e-300)
    step = torch.compile(lambda x, t: sample_tokens(x, temperature=t).tokens, fullgraph=True, backend="eager")
    tokens = step(torch.randn(2, 5), torch.tensor([1.0, 1e-300], dtype=torch.float64))
    assert (tokens >= 0).tolist() == [True, False]


def test_bad_parameters_beyond_the_checks_give_error_rows(fast_backend):
    """As on a GPU and in a compiled graph, where looking at the values would wait for the device."""
    parameters = {
        "temperature": torch.tensor([1.0, -1.0, torch.nan, 1, 1, 1, 1, 1, torch.inf]),
        "top_k": torch.tensor([0, 0, 0, -1, 0, 0, 0, 0, 0]),
        "top_p": torch.tensor([1.0, 1, 1, 1, 1.5, torch.nan, 1, 1, 1]),
        "min_p": torch.tensor([0.0, 0, 0, 0, 0, 0, -0.5, torch.nan, 0]),
    }
    numbers = (torch.arange(9), torch.zeros(9, dtype=torch.long), 0)
    ours = SampledTokens(*torch.ops.fastppo.sample_tokens(torch.randn(9, 40), *parameters.values(), *numbers))
    assert (ours.tokens >= 0).tolist() == [True] + [False] * 8


@pytest.mark.parametrize("layout", ["sliced", "time-major", "vocabulary-major"])
def test_strides(backend, layout):
    logits = torch.randn(3, 4, 70)
    view = strided_views(logits)[layout][:, 1]
    for a, b in zip(sample_tokens(view, top_p=0.9), sample_tokens(logits[:, 1], top_p=0.9), strict=True):
        assert torch.equal(a, b)


def test_zero_rows(backend):
    sampled = sample_tokens(torch.randn(0, 8))
    assert [x.shape for x in sampled] == [(0,)] * 4
    assert sampled.tokens.dtype == torch.int64 and sampled.logprobs.dtype == torch.float32


def test_nothing_requires_a_gradient(backend):
    assert not any(x.requires_grad for x in sample_tokens(torch.randn(2, 8, requires_grad=True)))


def test_float64_logits_are_chosen_from_in_float32():
    logits = torch.randn(50, 200)
    exact, ours = sample_tokens(logits.double(), top_p=0.9), sample_tokens(logits, top_p=0.9)
    assert exact.logprobs.dtype == torch.float64
    assert torch.equal(exact.tokens, ours.tokens) and torch.equal(exact.kept_mass, ours.kept_mass)


def test_exp_is_monotone_where_its_pieces_meet():
    """Thresholds on logits and on probabilities agree only if exp never falls. (Checked once over every float.)"""
    edges = -torch.arange(0, 127).double() * torch.tensor(2.0, dtype=torch.float64).log() / 2
    bits = edges.float().view(torch.int32).unsqueeze(1) + torch.arange(-2000, 2000, dtype=torch.int32)
    x = bits.view(torch.float32)
    e = exp_nonpositive(x.masked_fill(~(x <= 0), 0.0)).sort(descending=True).values
    x, order = x.masked_fill(~(x <= 0), 0.0).sort(dim=1, descending=True)
    assert torch.equal(exp_nonpositive(x), e)
    assert ((exp_nonpositive(x).double() - x.double().exp()).abs() <= 1.5e-7 * x.double().exp()).all()


def test_opcheck(fast_backend):
    logits = torch.randn(4, 33)
    arguments = (torch.ones(4), torch.full((4,), 5), torch.full((4,), 0.9), torch.zeros(4))
    torch.library.opcheck(
        torch.ops.fastppo.sample_tokens, (logits, *arguments, torch.arange(4), torch.zeros(4, dtype=torch.long), 7)
    )


def test_compiles_once_for_all_parameters(fast_backend):
    """fullgraph, and neither a number, a seed nor a batch size compiles anew after the second call."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, seed, **options: sample_tokens(x, seed=seed, **options), fullgraph=True, backend=backend
    )
    for i, batch in enumerate((3, 4, 5, 7)):
        logits = torch.randn(batch, 60)
        options = {"temperature": 0.5 + i / 8, "top_k": 5 + i, "top_p": 0.9 + i / 100}
        ours, expected = compiled(logits, i + 1, **options), sample_tokens(logits, seed=i + 1, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(graphs) <= 2


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": 1e11}, ValueError, "temperature is 100000000000.0, expected a finite number >= 0 and <= 1"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \[3\], expected \[2\]"),
        ({"top_k": 2.5}, TypeError, "top_k is 2.5, expected an integer"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_k": torch.tensor([1.0, 2.0])}, TypeError, "top_k has dtype torch.float32"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
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


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("temperature", [1.0, -2.0], r"temperature\[1\] is -2.0"),
        ("temperature", [1.0, 1e-11], r"temperature\[1\] is .*e-1., expected 0 or a number from 1e-10"),
        ("temperature", [1e11, 1.0], r"temperature\[0\] is 9.*, expected a finite number >= 0 and <= 1"),
        ("top_p", [0.5, torch.nan], r"top_p\[1\] is nan"),
        ("min_p", [2.0, 0.5], r"min_p\[0\] is 2.0"),
    ],
)
def test_errors_name_the_row(cpu_backend, name, values, message):
    """On a GPU it is an error row, as above: a look at its values would wait for the device."""
    with pytest.raises(ValueError, match=message):
        sample_tokens(torch.zeros(2, 50), **{name: torch.tensor(values)})
