"""torchrl's estimates of advantages and returns against ours: any shape, time dimension and dtype, and through its estimator modules."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import torchrl as ours
from tests.tolerance import assert_as_exact_as_native

pytest.importorskip("torchrl", reason="torchrl is not installed: make peers")
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402
from torchrl.objectives.value import GAE, TDLambdaEstimator, advantages, functional  # noqa: E402

ADVANTAGES = ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]
RETURNS = ["td_lambda_return_estimate", "vec_td_lambda_return_estimate"]
NAMES = ADVANTAGES + RETURNS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def make_case(shape: list[int], dtypes: list[torch.dtype] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Steps of which some are done, some of those terminated, and a few terminated without being done."""
    generator = torch.Generator().manual_seed(seed)
    names = ("state_value", "next_state_value", "reward")
    case = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, dtype in zip(names, dtypes or [torch.float32] * 3, strict=True)
    }
    case["done"] = torch.rand(shape, generator=generator) < 0.15
    chance = torch.rand(shape, generator=generator)
    case["terminated"] = (case["done"] & (chance < 0.5)) | (chance < 0.02)
    return case


def call(function: Callable, gamma: object, lmbda: object, case: dict[str, Tensor], **options) -> list[Tensor]:
    """The results as a list; TD(lambda) takes no state_value."""
    if "td_lambda" in function.__name__:
        case = {name: x for name, x in case.items() if name != "state_value"}
    found = function(gamma, lmbda, **case, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def exact(name: str, gamma: object, lmbda: object, case: dict[str, Tensor], time_dim: int = -2) -> list[Tensor]:
    """The definitions, step by step in fp64."""
    gamma, lmbda = float(gamma), float(lmbda)
    wide = {key: x.movedim(time_dim, 0).double() for key, x in case.items()}
    done, rewards = wide["done"], wide["reward"]
    following = torch.where(wide.get("terminated", done) > 0, 0.0, wide["next_state_value"])
    values = wide["state_value"]
    results, later = torch.zeros_like(rewards), following[-1:].sum(0) if name in RETURNS else 0.0
    for t in reversed(range(len(rewards))):
        if name in RETURNS:
            later = torch.where(done[t] > 0, following[t], later)
            later = rewards[t] + gamma * ((1 - lmbda) * following[t] + lmbda * later)
        else:
            later = rewards[t] + gamma * following[t] - values[t] + gamma * lmbda * (1 - done[t]) * later
        results[t] = later
    found = [results] if name in RETURNS else [results, results + values]
    return [x.movedim(0, time_dim) for x in found]


def assert_parity(name: str, gamma: object, lmbda: object, case: dict[str, Tensor], time_dim: int = -2) -> None:
    """Their dtypes and shapes, and no larger an error than theirs."""
    native = call(getattr(functional, name), gamma, lmbda, case, time_dim=time_dim)
    found = call(getattr(ours, name), gamma, lmbda, case, time_dim=time_dim)
    for a, b, c in zip(found, native, exact(name, gamma, lmbda, case, time_dim), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        assert_as_exact_as_native(a, b, c, name)


@pytest.mark.parametrize("name", NAMES)
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    steps=st.integers(1, 40),
    place=st.integers(0, 3),
    negative=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    gamma=st.sampled_from([0.5, 0.99, 1.0, 1]),
    lmbda=st.sampled_from([0.5, 0.95, 1.0, 1]),
    tensors=st.booleans(),
    terminated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_as_exact_as_theirs(name, shape, steps, place, negative, dtypes, gamma, lmbda, tensors, terminated, seed):
    place %= len(shape)
    shape[place] = steps
    case = make_case(shape, dtypes, seed)
    if not terminated:
        del case["terminated"]
    if tensors:
        gamma, lmbda = torch.tensor(float(gamma)), torch.tensor(float(lmbda))
    assert_parity(name, gamma, lmbda, case, place - len(shape) if negative else place)


@pytest.mark.parametrize("name", NAMES)
def test_long_trajectories(name):
    assert_parity(name, torch.tensor(0.99), torch.tensor(0.95), make_case([3, 1500, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_views_of_other_strides(name):
    """Time first in memory, every second step, and flags that are shared by the features."""
    case = {key: x.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2] for key, x in make_case([4, 30, 3]).items()}
    case |= {key: case[key][..., :1].expand(4, 15, 3) for key in ("done", "terminated")}
    assert_parity(name, 0.9, 0.8, case)


def test_plain_advantages_are_theirs_to_the_bit():
    case = make_case([5, 200, 2])
    for a, b in zip(*(call(getattr(of, ADVANTAGES[0]), 0.99, 0.95, case) for of in (functional, ours)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name, gamma, lmbda", [(ADVANTAGES[1], 0.99, 0.0), (RETURNS[1], 1e-4, 1e-4)])
def test_decays_at_which_their_vectorised_forms_raise(name, gamma, lmbda):
    """Below a gamma * lmbda of 1e-7 they index an empty filter."""
    case = make_case([2, 9, 1])
    with pytest.raises(IndexError):
        call(getattr(functional, name), gamma, lmbda, case)
    plain = call(getattr(functional, name.removeprefix("vec_")), gamma, lmbda, case)
    found = call(getattr(ours, name), gamma, lmbda, case)
    for a, b, c in zip(found, plain, exact(name, gamma, lmbda, case), strict=True):
        assert_as_exact_as_native(a, b, c)


def test_a_step_that_their_vectorised_form_leaves_out():
    """With gamma * lmbda = 3e-4 the next step weighs 3e-4, but their filter has room for one step only."""
    case = make_case([1, 2, 1])
    case |= {"done": torch.zeros(1, 2, 1, dtype=torch.bool), "terminated": torch.zeros(1, 2, 1, dtype=torch.bool)}
    case["reward"][0, 1] = 1e4
    expected = exact(ADVANTAGES[1], 0.03, 0.01, case)[0]
    found = call(ours.vec_generalized_advantage_estimate, 0.03, 0.01, case)[0]
    assert_as_exact_as_native(found, call(ours.generalized_advantage_estimate, 0.03, 0.01, case)[0], expected)
    assert call(functional.vec_generalized_advantage_estimate, 0.03, 0.01, case)[0][0, 0] < expected[0, 0] - 2


@pytest.mark.parametrize("name", NAMES)
def test_nan_behind_the_end_of_an_episode_stays_there(name):
    """Theirs multiplies it by 0, which is NaN again; with strict ours leaves such inputs to theirs."""
    case = make_case([1, 8, 1])
    case["done"][:], case["terminated"][:] = False, False
    case["done"][0, 3] = case["terminated"][0, 3] = True
    case["next_state_value"][0, 3] = torch.nan
    usual = call(getattr(functional, name), 0.9, 0.8, case)
    assert all(x[0, :4].isnan().all() for x in usual)
    assert all(x.isfinite().all() for x in call(getattr(ours, name), 0.9, 0.8, case))
    with pytest.raises(ValueError, match="next_state_value holds NaN or infinities"):
        call(getattr(ours, name), 0.9, 0.8, case, strict=True)
    with ours.patch(strict=True):
        strict = call(getattr(functional, name), 0.9, 0.8, case)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(usual, strict, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 1), (2, 3, 0), (2, 0, 1)], ids=str)
def test_nothing_to_estimate(name, shape):
    found = call(getattr(ours, name), 0.9, 0.8, make_case(list(shape)))
    assert all(x.shape == shape for x in found)


REFUSED = {
    "gamma [B, T, F]": {"gamma": torch.full((2, 5, 1), 0.9)},
    "gamma [1]": {"gamma": torch.tensor([0.9])},
    "gamma in bfloat16": {"gamma": torch.tensor(0.9, dtype=torch.bfloat16)},
    "lmbda with a gradient": {"lmbda": torch.tensor(0.9, requires_grad=True)},
    "gamma above 1": {"gamma": 1.01},
    "float64": {"reward": torch.ones(2, 5, 1, dtype=torch.float64)},
    "integers": {"reward": torch.ones(2, 5, 1, dtype=torch.int64)},
    "a gradient": {"next_state_value": torch.ones(2, 5, 1, requires_grad=True)},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refused", REFUSED)
def test_what_ours_refuses_goes_to_theirs(name, refused, caplog):
    case = make_case([2, 5, 1]) | {"gamma": 0.9, "lmbda": 0.8} | REFUSED[refused]
    gamma, lmbda = case.pop("gamma"), case.pop("lmbda")
    with pytest.raises((TypeError, ValueError)):
        call(getattr(ours, name), gamma, lmbda, case)
    expected = call(getattr(functional, name), gamma, lmbda, case)
    with ours.patch(), caplog.at_level(logging.WARNING):
        found = call(getattr(functional, name), gamma, lmbda, case)
    assert "runs as its package has it" in caplog.text
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"done": torch.ones(2, 5, 1)}, TypeError, "integer and Boolean-type"),
        ({"reward": torch.ones(2, 5)}, RuntimeError, "must share a unique shape"),
        ({"time_dim": 3}, RuntimeError, "time dimension are not compatible"),
    ],
    ids=["done", "reward", "time_dim"],
)
def test_what_neither_takes_raises_as_theirs_does(change, error, message):
    arguments = make_case([2, 5, 1]) | {"gamma": 0.9, "lmbda": 0.8} | change
    with pytest.raises(error, match=message):
        functional.generalized_advantage_estimate(**arguments)
    with ours.patch(), pytest.raises(error, match=message):
        functional.generalized_advantage_estimate(**arguments)


def test_a_default_dtype_of_float64_is_for_theirs():
    """Their vectorised forms compute in the dtype that gamma then has."""
    case = make_case([2, 5, 1])
    torch.set_default_dtype(torch.float64)
    try:
        assert call(functional.vec_generalized_advantage_estimate, 0.9, 0.8, case)[0].dtype == torch.float64
        for name in (ADVANTAGES[1], RETURNS[1]):
            with pytest.raises(TypeError, match="the result would have dtype torch.float64"):
                call(getattr(ours, name), 0.9, 0.8, case)
        for name in (ADVANTAGES[0], RETURNS[0]):
            assert_parity(name, 0.9, 0.8, case)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rolling_gamma_is_for_theirs():
    case = make_case([2, 5, 1])
    assert torch.equal(
        *(call(ours.td_lambda_return_estimate, 0.9, 0.8, case, rolling_gamma=x)[0] for x in (None, True))
    )
    with pytest.raises(ValueError, match="rolling_gamma"):
        call(ours.td_lambda_return_estimate, 0.9, 0.8, case, rolling_gamma=False)


@pytest.mark.parametrize("gamma", [0.9, torch.tensor(0.9)], ids=["number", "tensor"])
def test_one_compiled_graph(gamma):
    """A tensor's value cannot be read in it, so that such a call is theirs."""
    case = make_case([2, 5, 1])
    expected = functional.generalized_advantage_estimate(gamma, 0.8, **case)
    with ours.patch():
        compiled = torch.compile(functional.generalized_advantage_estimate, fullgraph=True, backend="eager")
        found = compiled(gamma, 0.8, **case)
    assert all(map(torch.equal, found, expected))


def test_a_recorded_cuda_graph_reads_no_tensor(monkeypatch):
    class OnTheGPU(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="gamma is a tensor"):
        ours.generalized_advantage_estimate(torch.tensor(0.9).as_subclass(OnTheGPU), 0.8, **make_case([2, 5, 1]))


@pytest.mark.parametrize("module", ["GAE", "GAE vectorized", "TDLambda", "TDLambda vectorized"])
def test_their_estimator_modules_run_ours(module, caplog):
    """From observations to the tensordict's advantage and value target."""
    kind = GAE if "GAE" in module else TDLambdaEstimator
    network = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_value"])
    options = {"gamma": 0.98, "lmbda": 0.9, "value_network": network, "vectorized": "vectorized" in module}
    estimator = kind(**options, average_gae=False) if kind is GAE else kind(**options)
    case = make_case([4, 30, 1])
    following = {key: case[key] for key in ("reward", "done", "terminated")} | {"observation": torch.randn(4, 30, 3)}
    data = TensorDict({"observation": torch.randn(4, 30, 3), "next": following}, [4, 30])
    usual = estimator(data.clone())
    with ours.patch(), caplog.at_level(logging.WARNING):
        found = estimator(data.clone())
    assert "runs as its package has it" not in caplog.text
    case |= {"state_value": usual["state_value"], "next_state_value": usual["next", "state_value"]}
    name = ADVANTAGES[0] if kind is GAE else RETURNS[0]
    truth = exact(name, torch.tensor(0.98), torch.tensor(0.9), case)
    truth = truth if kind is GAE else [truth[0] - case["state_value"].double(), truth[0]]
    for key, wide in zip(("advantage", "value_target"), truth, strict=True):
        assert_as_exact_as_native(found[key], usual[key], wide, key)


def test_one_return_estimate_calls_another():
    """torchrl's TD(1) and its advantages are its TD(lambda) underneath, which is ours while patched."""
    case = make_case([2, 12, 1])
    expected = functional.vec_td1_advantage_estimate(0.9, **case)
    with ours.patch():
        found = functional.vec_td1_advantage_estimate(0.9, **case)
    wide = exact(RETURNS[1], 0.9, 1.0, case)[0] - case["state_value"].double()
    assert not torch.equal(found, expected)
    assert_as_exact_as_native(found, expected, wide)


def test_patch_reaches_the_estimators_and_unpatch_restores_them():
    own = {name: getattr(functional, name) for name in NAMES}
    with ours.patch() as patch:
        assert sorted(map(id, patch.values())) == sorted(map(id, own.values()))
        for name in NAMES:
            assert getattr(advantages, name) is getattr(functional, name) is not own[name]
    for name in NAMES:
        assert getattr(advantages, name) is getattr(functional, name) is own[name]
