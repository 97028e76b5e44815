"""`gae` against the O(T^2) sum of its definition and the fp64 reference: masks, episode ends, packing, strides."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo.ops import gae
from fastppo.reference.gae import gae as reference
from tests.cases import DTYPES, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

# One step, tails of the sixteen lanes and of the sixteen-step tiles, several groups of lanes, no sequences, no steps.
SHAPES = [(1, 1), (3, 17), (16, 16), (17, 33), (5, 100), (40, 48), (0, 5), (4, 0)]
FEATURES = ["plain", "mask", "dones", "bootstrap", "truncated", "lam", "all"]


def make_case(batch: int, length: int, feature: str, dtype: torch.dtype = torch.float32) -> dict:
    """Random arguments; `feature` names the optional ones that are given."""

    def random(*shape):
        return torch.randn(*shape).to(dtype)

    case = {"rewards": random(batch, length), "values": random(batch, length), "gamma": 0.97, "lam": 0.9}
    if feature in ("mask", "all"):
        case["mask"] = torch.rand(batch, length) < 0.7
        case["mask"][: batch // 3, : length // 2] = False  # prompts
        case["mask"][batch // 2 : batch // 2 + 1] = False  # a sequence with nothing to train on
    if feature in ("dones", "all"):
        case["dones"] = torch.rand(batch, length) < 0.1
    if feature == "bootstrap":
        case["next_values"] = random(batch)
    if feature in ("truncated", "all"):
        case["truncated"] = torch.rand(batch, length) < 0.1
        case["next_values"] = random(batch, length)
    if feature in ("lam", "all"):
        case["lam"] = torch.rand(batch)
    return case


def to_fp64(case: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}


def pack(case: dict, lengths: list[int]) -> dict:
    """The first lengths[i] steps of each row, without padding."""
    inside = torch.arange(case["values"].shape[1]) < torch.tensor(lengths)[:, None]
    shape = case["values"].shape
    packed = {k: v[inside] if isinstance(v, Tensor) and v.shape == shape else v for k, v in case.items()}
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return packed | {"cu_seqlens": offsets}


def direct_sum(case: dict, row: int) -> list[float]:
    """A_t = sum_k (gamma * lam)^k delta_{t+k} over the kept steps of one row's episode, term by term."""

    def column(name, default):
        x = case.get(name)
        return [default] * case["values"].shape[1] if x is None else x[row].tolist()

    rewards, values, keep = column("rewards", 0.0), column("values", 0.0), column("mask", True)
    done, cut = column("dones", False), column("truncated", False)
    following = case.get("next_values")
    each_step = following is not None and following.dim() == 2
    final = following[row].item() if following is not None and not each_step else 0.0
    lam = case["lam"][row].item() if isinstance(case["lam"], Tensor) else case["lam"]
    steps = [t for t in range(len(keep)) if keep[t]]
    next_value = dict(zip(steps, [values[t] for t in steps[1:]] + [final], strict=False))
    advantages = [0.0] * len(keep)
    for i, t in enumerate(steps):
        weight = 1.0
        for u in steps[i:]:
            after = 0.0 if done[u] else following[row, u].item() if each_step else next_value[u]
            advantages[t] += weight * (rewards[u] + case["gamma"] * after - values[u])
            if done[u] or cut[u]:
                break
            weight *= case["gamma"] * lam
    return advantages


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", [(4, 1), (5, 23)], ids=str)
def test_equals_the_direct_sum(shape, feature):
    case = to_fp64(make_case(*shape, feature))
    advantages, returns = gae(**case)
    expected = torch.tensor([direct_sum(case, row) for row in range(shape[0])], dtype=torch.float64)
    assert advantages.dtype == returns.dtype == torch.float64
    assert_rounds_to(advantages, expected)
    keep = case.get("mask", torch.ones(shape, dtype=torch.bool))
    assert_rounds_to(returns, torch.where(keep, expected + case["values"], 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_the_reference(backend, shape, feature, dtype):
    case = make_case(*shape, feature, dtype)
    ours, native, exact = gae(**case), reference(**case), reference(**to_fp64(case))
    for name, a, b, c in zip(("advantages", "returns"), ours, native, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == shape and a.is_contiguous()
        assert_as_exact_as_native(a, b, c, name)
        # A GPU composes the steps in parallel, with other roundings.
        assert backend == "cuda" or torch.equal(a, b), f"{name}: not the bits of the sequential recursion"


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_equals_padded_equals_single(backend, feature):
    """The same bits in a batch padded on the right, packed without padding, and alone; empty sequences in between.

    On a GPU, where steps are composed in groups counted from the end, padding moves the groups and so changes roundings.
    """
    lengths = [5, 0, 1, 40, 16, 17, 33, 0, 2, 40, 31, 1, 8, 9, 10, 11, 12, 13, 40, 0]
    case = make_case(len(lengths), 40, feature)
    inside = torch.arange(40) < torch.tensor(lengths)[:, None]
    mask = {"mask": inside & case.get("mask", inside)}
    padded, packed = gae(**case | mask), gae(**pack(case, lengths))
    native, exact = reference(**case | mask), reference(**to_fp64(case) | mask)
    for ours, flat, fp32, fp64 in zip(padded, packed, native, exact, strict=True):
        if backend == "cuda":
            assert_as_exact_as_native(ours, fp32, fp64)
            assert_as_exact_as_native(flat, fp32[inside], fp64[inside])
        else:
            assert torch.equal(ours[inside], flat)
    rows = packed.advantages.split(lengths)
    for i, length in enumerate(lengths):
        row = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in case.items()}
        row = {k: v[:, :length] if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in row.items()}
        assert torch.equal(gae(**row).advantages[0], rows[i])


# Sequences beside the chunks of 256 steps, and the tiles of 1, 8 and 16 chunks, that CUDA blocks take at a time.
CHUNKS = [[257, 256, 255, 1], [200, 0, 300, 128]]
TILES = [[2047, 2048, 2049, 700], [4095, 4097], [3000, *[1] * 60]]


@pytest.mark.parametrize(
    ("lengths", "feature"),
    [*product(CHUNKS, FEATURES), *product(TILES, ("mask", "all"))],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}x{max(value)}",
)
def test_long_sequences(fast_backend, lengths, feature):
    """A step's features are read alike in any tile; what is carried from tile to tile, over masked steps too, ends at a done."""
    case = make_case(len(lengths), max(lengths), feature)
    if feature in ("mask", "all"):
        case["mask"][:, -280:-240] = case["mask"][:, -1026:-1023] = False  # beside and over the chunks' borders
        case["mask"][-1, -600:-200] = case["mask"][0, -1:] = False  # whole chunks, the first of all steps
    case = pack(case, lengths)
    ours, native, exact = gae(**case), reference(**case), reference(**to_fp64(case))
    for name, a, b, c in zip(("advantages", "returns"), ours, native, exact, strict=True):
        assert_as_exact_as_native(a, b, c, name)


def test_bits_of_a_sequence_in_any_batch(backend):
    """Alone, among short sequences and among long ones: what a block takes at a time differs, the bits do not."""
    case = make_case(1, 2600, "all")

    def among(lengths: list[int]) -> Tensor:
        others = make_case(len(lengths), max(lengths), "all")
        values = {k: v for k, v in pack(others, lengths).items() if k != "cu_seqlens"}
        both = {k: torch.cat([case[k].flatten(), v]) if isinstance(v, Tensor) else v for k, v in values.items()}
        offsets = torch.tensor([0, 2600, *lengths]).cumsum(0)
        return gae(**both, cu_seqlens=offsets).advantages[:2600]

    alone = gae(**case).advantages[0]
    for lengths in ([3] * 40, [1200] * 3, [6000]):
        assert torch.equal(among(lengths), alone)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_lies_far_behind_still_shows(backend, poison):
    """Through products of thousands of decays, which underflow, and not beyond the end of an episode."""
    case = make_case(2, 3000, "plain")
    case["dones"] = torch.zeros(2, 3000, dtype=torch.bool)
    case["dones"][1, 1023] = True
    case["rewards"][:, 2900] = poison
    advantages = gae(**case).advantages
    expected = torch.zeros(2, 3000, dtype=torch.bool)
    expected[0, :2901] = expected[1, 1024:2901] = True
    shown = advantages.isnan() if poison != poison else advantages == poison
    assert torch.equal(shown, expected) and torch.equal(~advantages.isfinite(), expected)


def test_int64_offsets_and_no_sequences(backend):
    case = pack(make_case(3, 7, "all"), [7, 2, 5])
    expected = gae(**case)
    ours = gae(**case | {"cu_seqlens": case["cu_seqlens"].long()})
    assert torch.equal(ours.advantages, expected.advantages)
    empty = torch.zeros(0)
    for offsets in ([0], [0, 0, 0]):
        assert gae(empty, empty, gamma=1.0, lam=1.0, cu_seqlens=torch.tensor(offsets)).returns.shape == (0,)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lambda_zero_and_one(backend, lam):
    """lam = 0: the TD error. lam = 1: the discounted rewards to come, less the value (eq. 17 and 18 of the paper)."""
    rewards, values = torch.randn(2, 30), torch.randn(2, 30)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    expected = rewards.double() + 0.9 * following - values
    if lam:
        distance = torch.arange(30) - torch.arange(30)[:, None]
        expected = rewards.double() @ (0.9 ** distance.double()).triu().T - values
    assert_rounds_to(gae(rewards, values, gamma=0.9, lam=lam).advantages, expected)


@pytest.mark.parametrize("length", [3000, 20_000])
def test_long_episode_without_discount(fast_backend, length):
    """gamma = lam = 1: the sum of all rewards to come, as exact as one fp32 addition after another."""
    rewards, values = torch.randn(1, length), torch.randn(1, length)
    returns = gae(rewards, values, gamma=1.0, lam=1.0).returns
    native = reference(rewards, values, gamma=1.0, lam=1.0)[1]
    assert_as_exact_as_native(returns, native, rewards.double().flip(1).cumsum(1).flip(1))


def test_masked_steps_carry_through_as_in_verl(backend):
    """Next value and running sum skip tool output; decaying through it would be the fault of miles#1827."""
    case = make_case(6, 25, "mask")
    wide = to_fp64(case)
    expected = torch.zeros(6, 25, dtype=torch.float64)
    next_value, running = torch.zeros(6), torch.zeros(6)
    for t in reversed(range(25)):
        kept = case["mask"][:, t].double()
        delta = wide["rewards"][:, t] + 0.97 * next_value - wide["values"][:, t]
        running = kept * (delta + 0.97 * 0.9 * running) + (1 - kept) * running
        next_value = kept * wide["values"][:, t] + (1 - kept) * next_value
        expected[:, t] = running * kept
    assert_rounds_to(gae(**case).advantages, expected)


def test_time_major_as_cleanrl_calls_it(backend):
    """CleanRL: [T, N], dones[t] = the episode ended *before* step t, next_done and next_value after the last."""
    steps, envs = 35, 20
    rewards, values, dones = torch.randn(steps, envs), torch.randn(steps, envs), (torch.rand(steps, envs) < 0.2)
    next_value, next_done = torch.randn(envs), torch.rand(envs) < 0.5
    expected, running = torch.zeros(steps, envs, dtype=torch.float64), torch.zeros(envs)
    for t in reversed(range(steps)):
        alive = 1.0 - (next_done if t == steps - 1 else dones[t + 1]).double()
        after = next_value if t == steps - 1 else values[t + 1]
        running = rewards[t] + 0.99 * after * alive - values[t] + 0.99 * 0.95 * alive * running
        expected[t] = running
    ends = torch.cat([dones[1:], next_done[None]])
    ours = gae(rewards.T, values.T, gamma=0.99, lam=0.95, dones=ends.T, next_values=next_value)
    assert_rounds_to(ours.advantages.T, expected)


def test_terminated_and_truncated_as_torchrl_has_them(backend):
    """Terminated cuts the bootstrap, terminated or truncated the recursion; V(s_{t+1}) is given for every step."""
    case = make_case(5, 20, "truncated")
    dones = torch.rand(5, 20) < 0.2
    wide = to_fp64(case)
    expected, running = torch.zeros(5, 20, dtype=torch.float64), torch.zeros(5)
    for t in reversed(range(20)):
        ended, cut = dones[:, t].double(), (dones | case["truncated"])[:, t].double()
        delta = wide["rewards"][:, t] + 0.97 * wide["next_values"][:, t] * (1 - ended) - wide["values"][:, t]
        running = delta + 0.97 * 0.9 * (1 - cut) * running
        expected[:, t] = running
    assert_rounds_to(gae(**case, dones=dones).advantages, expected)


def test_truncation_at_the_last_step_bootstraps(backend):
    """The length limit: `truncated` at the last unmasked step just bootstraps from next_values; EOS does not."""
    case = make_case(3, 9, "bootstrap")
    case["mask"] = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    truncated = torch.zeros(3, 9, dtype=torch.bool)
    truncated[0, 8] = truncated[1, 5] = True
    truncated[1, 7] = True  # masked: not looked at
    ours = gae(**case, truncated=truncated)
    assert torch.equal(ours.advantages, gae(**case).advantages)
    dones = torch.zeros(3, 9, dtype=torch.bool)
    dones[2, 3] = True
    ended = gae(**case, dones=dones).advantages[2]
    assert torch.equal(ended, gae(**case | {"next_values": torch.zeros(3)}).advantages[2])
    assert torch.equal(gae(**case, truncated=dones, dones=dones).advantages[2], ended), "dones wins over truncated"


def test_truncation_inside_a_sequence_needs_every_value(backend):
    """ValueError, or NaN at that step and back to its episode's first one where the host does not wait for the device."""
    case = make_case(20, 50, "bootstrap")
    truncated = torch.zeros(20, 50, dtype=torch.bool)
    truncated[11, 30] = truncated[11, 40] = truncated[19, 2] = True
    if backend == "cuda":
        expected = torch.zeros(20, 50, dtype=torch.bool)
        expected[11, :41] = expected[19, :3] = True
        assert torch.equal(gae(**case, truncated=truncated).advantages.isnan(), expected)
        assert torch.equal(gae(**case, truncated=truncated).returns.isnan(), expected)
        return
    with pytest.raises(ValueError, match="truncated is set at step 30 of sequence 11"):
        gae(**case, truncated=truncated)
    with pytest.raises(ValueError, match="truncated is set at step 30 of sequence 11"):
        gae(**pack(case | {"truncated": truncated}, [50, 0, *[49] * 18]))
    with pytest.raises(ValueError, match="truncated is set at step 30 of sequence 11"):
        gae(case["rewards"].T.contiguous().T, case["values"], gamma=1.0, lam=1.0, next_values=torch.zeros(20),
            truncated=truncated.T.contiguous().T)  # fmt: skip
    mask = torch.ones(20, 50, dtype=torch.bool)
    mask[11, 31:], mask[19, 2] = False, False
    gae(**case, truncated=truncated, mask=mask)  # now the last unmasked step, and a masked one


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_under_the_mask_is_read(backend, poison):
    case = make_case(18, 37, "all")
    clean = gae(**case)
    hidden = ~case["mask"]
    dirty = {
        "rewards": case["rewards"].masked_fill(hidden, poison),
        "values": case["values"].masked_fill(hidden, poison),
        "next_values": case["next_values"].masked_fill(hidden | case["dones"], poison),
        "dones": case["dones"] | hidden,
        "truncated": case["truncated"] | hidden,
    }
    ours = gae(**case | dirty)
    assert torch.equal(ours.advantages, clean.advantages) and torch.equal(ours.returns, clean.returns)
    assert (ours.advantages[hidden] == 0).all() and (ours.returns[hidden] == 0).all()


def test_flags_that_are_never_set_change_no_bit(backend):
    case = make_case(3, 700, "mask")
    unset = torch.zeros(3, 700, dtype=torch.bool)
    ours = gae(**case, dones=unset, truncated=unset, next_values=torch.zeros(3))
    assert torch.equal(ours.advantages, gae(**case).advantages)


def test_nan_stays_in_its_episode(backend):
    """A NaN reward reaches the steps before it in its own episode and nothing else."""
    case = make_case(17, 40, "plain")
    case["dones"] = torch.zeros(17, 40, dtype=torch.bool)
    case["dones"][:, 19] = True
    case["rewards"][3, 30] = torch.nan
    expected = torch.zeros(17, 40, dtype=torch.bool)
    expected[3, 20:31] = True
    assert torch.equal(gae(**case).advantages.isnan(), expected)


def strided(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to x [B, T] in another memory layout, with garbage between its elements."""
    batch, length = x.shape
    if layout == "time-major":
        return x.T.contiguous().T
    if layout == "sliced":
        wide = torch.full((batch + 1, length + 3), 1, dtype=x.dtype)
        wide[1:, 2:-1] = x
        return wide[1:, 2:-1]
    if layout == "every-other":
        wide = torch.full((batch, 2 * length), 1, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x[:1].expand(batch, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["time-major", "sliced", "every-other", "expanded"])
def test_strides(backend, layout, dtype):
    case = make_case(35, 50, "all", dtype)
    views = {k: strided(v, layout) for k, v in case.items() if isinstance(v, Tensor) and v.dim() == 2}
    expected = gae(**case | {k: v.contiguous() for k, v in views.items()})
    ours = gae(**case | views)
    assert torch.equal(ours.advantages, expected.advantages) and torch.equal(ours.returns, expected.returns)
    rewards, values = (torch.stack([case[k].reshape(-1)] * 2, 1)[:, 0] for k in ("rewards", "values"))
    offsets = torch.tensor([0, 50, 700, 1750])
    ours = gae(rewards, values, gamma=0.9, lam=0.8, cu_seqlens=offsets)
    expected = gae(rewards.contiguous(), values.contiguous(), gamma=0.9, lam=0.8, cu_seqlens=offsets)
    assert torch.equal(ours.advantages, expected.advantages)


def test_mixed_types(backend):
    """fp32 rewards beside bf16 values; fp64 anywhere goes to the reference."""
    rewards, values = torch.randn(3, 20), torch.randn(3, 20).bfloat16()
    ours = gae(rewards, values, gamma=0.9, lam=0.9, next_values=torch.ones(3).half())
    expected = gae(rewards, values.float(), gamma=0.9, lam=0.9, next_values=torch.ones(3))
    assert torch.equal(ours.advantages, expected.advantages)
    assert gae(rewards, values, gamma=0.9, lam=0.9, next_values=torch.ones(3).double()).returns.dtype == torch.float64


def test_outputs_are_detached(backend):
    rewards, values = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    out = gae(rewards, values, gamma=0.9, lam=0.9)
    assert not out.advantages.requires_grad and not out.returns.requires_grad


def test_bits_do_not_depend_on_threads(cpu_backend):
    case = make_case(70, 600, "all")
    single, several = with_threads(1, lambda: gae(**case)), with_threads(3, lambda: gae(**case))
    assert torch.equal(single.advantages, several.advantages) and torch.equal(single.returns, several.returns)


def isa_outputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [x for dtype in DTYPES for feature in ("plain", "all") for x in gae(**make_case(35, 70, feature, dtype))]


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("feature", ["plain", "all"])
def test_opcheck(fast_backend, feature, packed):
    case = make_case(3, 20, feature)
    case = pack(case, [20, 3, 0]) if packed else case
    names = ("rewards", "values", "mask", "dones", "truncated", "next_values", "cu_seqlens")
    decays = case["lam"] if isinstance(case["lam"], Tensor) else None
    torch.library.opcheck(torch.ops.fastppo.gae, (*map(case.get, names), decays, 0.9, 0.8))


@pytest.mark.parametrize("feature", ["plain", "all"])
def test_compiles_without_graph_breaks(fast_backend, feature):
    """One graph for every batch size and length."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gae, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for shape in ((3, 20), (5, 31), (4, 7)):
        case = make_case(*shape, feature)
        ours, expected = compiled(**case), gae(**case)
        assert torch.equal(ours.advantages, expected.advantages) and torch.equal(ours.returns, expected.returns)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    case = pack(make_case(3, 20, feature), [20, 3, 0])
    assert torch.equal(compiled(**case).returns, gae(**case).returns)


X = torch.zeros(2, 6)
FLAGS = torch.zeros(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, "gamma is 1.5"),
        ({"gamma": "1"}, TypeError, "gamma is '1'"),
        ({"lam": -0.1}, ValueError, "lam is -0.1"),
        ({"lam": torch.ones(3)}, ValueError, r"lam has shape \[3\], expected \[2\]"),
        ({"lam": torch.ones(2, dtype=torch.long)}, TypeError, "lam has dtype torch.int64"),
        ({"values": torch.zeros(6)}, ValueError, r"values has shape \[6\], expected \[B, T\]"),
        ({"values": torch.zeros(2, 6, dtype=torch.long)}, TypeError, "values has dtype torch.int64"),
        ({"rewards": torch.zeros(2, 5)}, ValueError, r"rewards has shape \[2, 5\], expected \[2, 6\]"),
        ({"rewards": None}, TypeError, "rewards is NoneType"),
        ({"mask": X}, TypeError, r"mask has dtype torch.float32, expected bool"),
        ({"mask": FLAGS[:1]}, ValueError, r"mask has shape \[1, 6\]"),
        ({"dones": X}, TypeError, "dones has dtype torch.float32"),
        ({"dones": FLAGS[:, 1:]}, ValueError, r"dones has shape \[2, 5\]"),
        ({"truncated": FLAGS}, ValueError, "truncated is given but next_values is None"),
        ({"next_values": torch.zeros(6)}, ValueError, r"next_values has shape \[6\], expected \[2\] .* or \[2, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"values has shape \[2, 6\], expected \[total\]"),
        ({"values": X.to("meta")}, ValueError, "rewards is on .*, expected meta like values"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        gae(**{"rewards": X, "values": X, "gamma": 0.9, "lam": 0.9} | change)


@pytest.mark.parametrize("offsets", [[1, 6], [0, 7], [0, 5], [0, 4, 3, 6], [0, -1, 6], [0, 9, 6], [0], [6]], ids=str)
def test_wrong_offsets_are_refused(backend, offsets):
    """ValueError, or NaN everywhere where the host does not wait for the device."""
    if backend == "cuda":
        for x in gae(X[0], X[0], gamma=0.9, lam=0.9, cu_seqlens=torch.tensor(offsets)):
            assert x.isnan().all()
        return
    with pytest.raises(ValueError, match="cu_seqlens"):
        gae(X[0], X[0], gamma=0.9, lam=0.9, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("offsets", [torch.zeros(0).long(), torch.tensor(0), torch.tensor([0.0, 6.0])], ids=str)
def test_wrong_kinds_of_offsets_are_refused(backend, offsets):
    with pytest.raises((TypeError, ValueError), match="cu_seqlens has"):
        gae(X[0], X[0], gamma=0.9, lam=0.9, cu_seqlens=offsets)
