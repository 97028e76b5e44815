"""`linear_token_logprobs(tp_group=...)`: a head whose vocabulary two or four processes share gives what the whole head gives, by fp64."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops import _head, linear_token_logprobs, use_backend
from fastppo.reference.linear_token_logprobs import linear_token_logprobs as reference
from tests.cases import DTYPES
from tests.tolerance import assert_as_exact_as_native, assert_keeps_digits

RANKS = 4
ROWS, HIDDEN, VOCABULARY = 9, 24, 70
NAMES = ["logprobs", "entropy", "d_hidden", "d_weight", "d_bias"]
PATIENCE = timedelta(minutes=5)  # seconds on a machine that does nothing else


class Case(NamedTuple):
    """What a head is called with, and where its slices begin and end by the number of ranks."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    options: dict
    cuts: dict[int, list[int]] = {2: [0, 35, 70], 4: [0, 18, 36, 54, 70]}
    backend: str = "cpu"


def operands(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    made = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY) if bias else None
    return [None if x is None else x.to(dtype) for x in made] + [torch.randint(0, VOCABULARY, (ROWS,))]


def ignored() -> Case:
    """Two rows that are left out, whose hidden states are NaN."""
    hidden, weight, bias, labels = operands()
    hidden[[0, 4]], labels[[0, 4]] = torch.nan, 1 << 20
    return Case(hidden, weight, bias, labels, {"ignore_index": 1 << 20})


def banned() -> Case:
    """A slice, or two, of tokens that nobody may take, one of them a label."""
    hidden, weight, bias, labels = operands()
    bias[:36] = -torch.inf
    labels[:], labels[3] = torch.arange(60, 69), 7
    return Case(hidden, weight, bias, labels, {})


def odd() -> Case:
    """A row with NaN, one with inf in some slices and -inf in others, and a slice whose logits are far below the others."""
    hidden, weight, bias, labels = operands()
    hidden[:, 0], weight[:40, 0], weight[40:, 0] = 0, -1, 1
    hidden[2, 0], hidden[5, 0] = torch.nan, torch.inf
    bias[:18] -= 2000
    return Case(hidden, weight, bias, labels, {})


def certain() -> Case:
    """One token has nearly all the probability: 1 - p, from 1e-4 to 1e-25, is what the other slices hold."""
    logits = torch.zeros(ROWS, VOCABULARY)
    logits[:, 50] = torch.linspace(14, 60, ROWS)
    return Case(torch.eye(ROWS), logits.T.contiguous(), None, torch.full((ROWS,), 50), {})


def uneven() -> Case:
    return Case(*operands(), {}, {2: [0, 69, 70], 4: [0, 1, 40, 68, 70]})


def none() -> Case:
    hidden, weight, bias, labels = operands()
    return Case(hidden[:0], weight, bias, labels[:0], {})


CASES: dict[str, Callable[[], Case]] = {
    **{f"{dtype}": lambda dtype=dtype: Case(*operands(dtype), {"temperature": 0.7}) for dtype in DTYPES},
    "softcap, no bias": lambda: Case(*operands(bias=False), {"softcap": 5.0, "logit_scale": 0.25, "temperature": 1.3}),
    "float64": lambda: Case(*operands(torch.float64), {"temperature": 0.7}),
    "reference": lambda: Case(*operands(), {}, backend="reference"),
    "ignored": ignored,
    "banned": banned,
    "odd": odd,
    "certain": certain,
    "uneven": uneven,
    "no rows": none,
}


def run(function: Callable, case: Case, part: slice | None = None, **more: object) -> list[Tensor | None]:
    """Values and gradients; part: of the vocabulary."""
    bias = case.bias if part is None or case.bias is None else case.bias[part]
    weight = case.weight if part is None else case.weight[part]
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in (case.hidden, weight, bias)]
    options = case.options | {"return_entropy": True} | more
    logprobs, entropy = function(leaves[0], leaves[1], case.labels, leaves[2], **options)
    up = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype)
    ((logprobs * up).sum() + (entropy * up.flip(0)).sum()).backward()
    return [logprobs.detach(), entropy.detach(), *(None if x is None else x.grad for x in leaves)]


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _refused(group: dist.ProcessGroup, size: int) -> dict[str, str]:
    hidden, weight, bias, labels = operands()
    part, rank = weight[: VOCABULARY // size], dist.get_rank(group)
    far = labels.clone()
    far[3] = VOCABULARY
    rows = slice(0, ROWS - (rank == 1))
    calls = {
        "label": lambda: linear_token_logprobs(hidden, part, far, tp_group=group),
        "rows": lambda: linear_token_logprobs(hidden[rows], part, labels[rows], tp_group=group),
        "batch_invariant": lambda: linear_token_logprobs(hidden, part, labels, batch_invariant=True, tp_group=group),
        "group": lambda: linear_token_logprobs(hidden, part, labels, tp_group=rank),
    }
    return {name: _refusal(call) for name, call in calls.items()}


def _frozen(group: dist.ProcessGroup, case: Case, part: slice) -> list[bool]:
    """Which of hidden, weight and bias have a gradient where they are frozen one after another, and no entropy is asked for."""
    found = []
    for frozen in range(3):
        leaves = [case.hidden.clone(), case.weight[part].clone(), case.bias[part].clone()]
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(place != frozen)
        linear_token_logprobs(leaves[0], leaves[1], case.labels, leaves[2], tp_group=group).sum().backward()
        found += [leaf.grad is not None for leaf in leaves]
    return found


def _rank(rank: int, folder: str) -> None:
    """Every case in the group of all ranks and in that of this rank's half."""
    torch.set_num_threads(1)
    sizes = {backend: sizes._replace(tile_rows=4, tile_columns=10) for backend, sizes in _head.SIZES.items()}
    _head.SIZES.update(sizes)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for group in (dist.group.WORLD, halves[rank // 2]):
        size, place = dist.get_world_size(group), dist.get_rank(group)
        for name, make in CASES.items():
            case = make()
            with use_backend(case.backend):
                own = slice(*case.cuts[size][place : place + 2])
                found[size, name] = run(linear_token_logprobs, case, own, tp_group=group)
        found[size, "errors"] = _refused(group, size)
        case = Case(*operands(), {})
        found[size, "frozen"] = _frozen(group, case, slice(*case.cuts[size][place : place + 2]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of four processes found."""
    if os.environ.get("FASTPPO_TEST_BACKEND", "cpu") != "cpu":
        pytest.skip("processes of their own, with the kernels of a CPU")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_rank, (str(folder),), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole(ranks: list[dict], size: int, name: str) -> list[Tensor | None]:
    """The group's result: values and hidden's gradient of its first rank, weight's and bias's of all; what ranks share has the same bits."""
    parts = [found[size, name] for found in ranks[:size]]
    for other in parts[1:]:
        for mine, first in zip(other[:3], parts[0][:3], strict=True):
            assert torch.equal(mine.nan_to_num(7.0), first.nan_to_num(7.0)), name
    shards = zip(*(part[3:] for part in parts), strict=True)
    return parts[0][:3] + [None if shard[0] is None else torch.cat(shard) for shard in shards]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_slices_give_what_the_whole_head_gives(cpu_backend, ranks, name, size):
    case = CASES[name]()
    assert all(b > a for a, b in pairwise(case.cuts[size])) and case.cuts[size][-1] == VOCABULARY
    wide = case._replace(
        **{
            key: None if x is None else x.double()
            for key, x in case._asdict().items()
            if key in ("hidden", "weight", "bias")
        }
    )
    results = whole(ranks, size, name), run(reference, case), run(reference, wide)
    for what, ours, native, exact in zip(NAMES, *results, strict=True):
        if exact is not None:
            assert_as_exact_as_native(ours, native, exact, f"{name}: {what}")


@pytest.mark.parametrize("size", [2, 4])
def test_a_certain_token_keeps_its_digits(cpu_backend, ranks, size):
    """The log-prob is what the other slices hold, less than fp32's epsilon beside the whole."""
    case = certain()
    exact = run(reference, case._replace(hidden=case.hidden.double(), weight=case.weight.double()))
    for what, ours, wanted in zip(NAMES[:2], whole(ranks, size, "certain"), exact, strict=False):
        assert_keeps_digits(ours, wanted, what)


def test_what_is_frozen_has_no_gradient(cpu_backend, ranks):
    for found in ranks:
        for size in (2, 4):
            assert found[size, "frozen"] == [place != frozen for frozen in range(3) for place in range(3)]


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_refuses_what_is_wrong(cpu_backend, ranks, size):
    for found in ranks:
        errors = found[size, "errors"]
        slices = VOCABULARY // size * size
        assert errors["label"].startswith("ValueError: labels holds 70 at flat position 3"), errors["label"]
        assert f"expected 0 <= label < {slices} or ignore_index" in errors["label"]
        counts = [ROWS - (rank == 1) for rank in range(size)]
        assert (
            errors["rows"]
            == f"ValueError: labels are {counts} on the ranks of tp_group, expected the same labels on all"
        )
        assert "batch_invariant is True, expected False with tp_group" in errors["batch_invariant"]
        assert errors["group"].startswith("TypeError: tp_group is int, expected a torch.distributed.ProcessGroup")
