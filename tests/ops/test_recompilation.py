"""torch.compile compiles an op's graph once for fixed numbers and sizes and once for all others: never anew for a value.

The first value of a number is compiled as a constant, the second makes it an input of the graph. A graph of constants calls the op that a CUDA
graph may record, one of dynamic numbers that which it may not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo import ops
from fastppo.ops._numbers import as_tensor
from fastppo.ops._registry import Op

Tensors = dict[str, Tensor]
Call = Callable[..., tuple[Tensor, ...]]
LENGTH, VOCABULARY, WIDTH = 7, 19, 5


def make_inputs(batch: int) -> Tensors:
    """`batch` sequences. (Sizes that are equal in the first call would count as one: no two are.)"""
    columns = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "logprobs", "advantages", "values", "old_values")
    x = {name: torch.randn(batch, LENGTH) / 4 for name in (*columns, "returns", "entropy")}
    x |= {"logits": torch.randn(batch, LENGTH, VOCABULARY), "hidden": torch.randn(batch, LENGTH, WIDTH)}
    x |= {"weight": torch.randn(VOCABULARY, WIDTH), "mask": torch.rand(batch, LENGTH) < 0.8}
    x["labels"] = torch.randint(VOCABULARY, (batch, LENGTH))
    x |= {"q": torch.randn(batch, 4, 16), "pages": torch.randn(2, batch * 3, 8, 2, 16)}
    x |= {"heads": torch.randn(batch * LENGTH, 4, 6), "keys": torch.randn(2, batch * LENGTH, 2, 6)}
    x |= {"cu_seqlens": torch.arange(batch + 1) * LENGTH, "prompts": torch.arange(batch).clamp_max(1) - 1}
    x["block_table"] = torch.arange(batch * 3, dtype=torch.int32).view(batch, 3)
    x["context_lens"] = torch.randint(1, 25, (batch,), dtype=torch.int32)
    x |= {"norm": torch.randn(WIDTH), "residual": torch.randn(batch, LENGTH, WIDTH)}
    return x


class Case(NamedTuple):
    call: Call  # of the tensors and the options below
    options: dict[str, tuple]  # four values of each number
    leaves: tuple[str, ...] = ()  # what the first result is differentiated by

    def numbers(self, turn: int) -> dict[str, float]:
        return {name: values[turn] for name, values in self.options.items()}


def policy(x: Tensors, *names: str) -> Tensors:
    return {
        name: x[name] for name in ("old_logprobs", "advantages", "mask", "ref_logprobs", "rollout_logprobs", *names)
    }


def ppo_loss(x: Tensors, low: float, high: float, **options: float) -> tuple[Tensor, ...]:
    columns = policy(x, "logprobs", "values", "old_values", "returns", "entropy")
    loss, stats = ops.ppo_loss(**columns, rollout_correction="truncate", rollout_bounds=(low, high), **options)
    return loss, *stats


def linear_ppo_loss(x: Tensors, low: float, high: float, **options: float) -> tuple[Tensor, ...]:
    columns = policy(x, "hidden", "weight", "labels")
    found = ops.linear_ppo_loss(**columns, rollout_correction="truncate", rollout_bounds=(low, high), **options)
    return found.loss, *found.stats, found.logprobs


def decode_attention(x: Tensors, **options: float) -> tuple[Tensor, ...]:
    return (ops.decode_attention(x["q"], *x["pages"], x["block_table"], x["context_lens"], **options),)


def packed_attention(x: Tensors, **options: float) -> tuple[Tensor, ...]:
    return (ops.packed_attention(x["heads"], *x["keys"], x["cu_seqlens"], prompts=x["prompts"], **options),)


def kl_shaped_rewards(x: Tensors, coef: float) -> tuple[Tensor, ...]:
    return (ops.kl_shaped_rewards(x["values"][:, 0], x["logprobs"], x["ref_logprobs"], x["mask"], coef=coef),)


def token_logprobs(x: Tensors, **options: float) -> tuple[Tensor, ...]:
    return tuple(ops.token_logprobs(x["logits"], x["labels"], return_entropy=True, **options))


def linear_token_logprobs(x: Tensors, **options: float) -> tuple[Tensor, ...]:
    return (ops.linear_token_logprobs(x["hidden"], x["weight"], x["labels"], **options),)


def rms_norm(x: Tensors, eps: float) -> tuple[Tensor, ...]:
    return tuple(ops.rms_norm(x["hidden"], x["norm"], eps=eps, residual=x["residual"]))


SHARES = (0.99, 0.9, 0.8, 0.7)
LOGIT_OPTIONS = {
    "temperature": (1.0, 0.7, 0.8, 0.9),
    "softcap": (5.0, 3.0, 4.0, 2.0),
    "logit_scale": (1.0, 0.5, -2.0, 3.0),
}
LOGIT_OPTIONS |= {"ignore_index": (-100, 3, 4, 5)}
POLICY_OPTIONS = {
    "clip_low": (0.2, 0.1, 0.3, 0.2),
    "clip_high": (0.2, 0.1, 0.4, 0.3),
    "dual_clip": (3.0, 2.0, 4.0, 5.0),
}
POLICY_OPTIONS |= {"kl_coef": (0.1, 0.2, 0.3, 0.4), "entropy_coef": (0.01, 0.02, 0.03, 0.04)}
POLICY_OPTIONS |= {"low": (0.5, 0.6, 0.7, 0.4), "high": (2.0, 3.0, 1.5, 1.2), "denominator": (10.0, 11.0, 12.0, 13.0)}
VALUE_OPTIONS = {"value_clip": (0.2, 0.1, 0.3, 0.5), "vf_coef": (0.5, 0.25, 1.0, 2.0)}
SAMPLING = {
    "temperature": (1.0, 0.7, 0.8, 0.9),
    "top_k": (3, 4, 5, 6),
    "top_p": SHARES,
    "min_p": (0.1, 0.01, 0.02, 0.03),
}
ATTENTION = {"scale": (1.0, 0.5, 0.25, 2.0), "softcap": (5.0, 3.0, 4.0, 2.0), "window": (3, 4, 5, 6)}

CASES = {
    "token_logprobs": Case(token_logprobs, LOGIT_OPTIONS, ("logits",)),
    "linear_token_logprobs": Case(linear_token_logprobs, LOGIT_OPTIONS, ("hidden", "weight")),
    "linear_ppo_loss": Case(linear_ppo_loss, LOGIT_OPTIONS | POLICY_OPTIONS, ("hidden", "weight")),
    "ppo_loss": Case(ppo_loss, POLICY_OPTIONS | VALUE_OPTIONS, ("logprobs", "values", "entropy")),
    "gae": Case(lambda x, **o: tuple(ops.gae(x["values"], x["returns"], x["mask"], **o)), {"gamma": SHARES, "lam": SHARES}),
    "kl_shaped_rewards": Case(kl_shaped_rewards, {"coef": (0.1, 0.2, 0.3, 0.4)}),
    "sample_tokens": Case(lambda x, **o: tuple(ops.sample_tokens(x["logits"][:, 0], **o)), SAMPLING | {"seed": (5, 6, 7, 8)}),
    "decode_attention": Case(decode_attention, ATTENTION),
    "packed_attention": Case(
        packed_attention, {name: ATTENTION[name] for name in ("scale", "window")}, ("heads", "keys")
    ),
    "rms_norm": Case(rms_norm, {"eps": (1e-5, 1e-6, 1e-4, 1e-3)}, ("hidden", "norm", "residual")),
}  # fmt: skip
INTEGERS = {
    "token_logprobs": {"temperature": (1, 2, 3, 4), "softcap": (5, 4, 3, 2), "logit_scale": (2, 3, 4, 5)},
    "ppo_loss": {name: (2, 3, 4, 5) for name in POLICY_OPTIONS | VALUE_OPTIONS},
    "decode_attention": {"scale": (2, 3, 4, 5), "softcap": (5, 4, 3, 2)},
}  # fmt: skip


def with_gradients(call: Call, x: Tensors, leaves: tuple[str, ...], options: dict[str, float]) -> list[Tensor]:
    made = {name: x[name].clone().requires_grad_() for name in leaves}
    results = call(x | made, **options)
    return [*results, *(torch.autograd.grad(results[0].sum(), list(made.values())) if leaves else ())]


def graphs_compiled(case: Case, sizes: tuple[int, ...], attributes: bool = False) -> list[int]:
    """How many graphs there are after each call; the results are those without a compiler, to the last bit."""
    torch._dynamo.reset()
    counter, config, counts = CompileCounterWithBackend("aot_eager"), SimpleNamespace(), []

    def with_config(x: Tensors) -> tuple[Tensor, ...]:
        return case.call(x, **{name: getattr(config, name) for name in case.options})

    compiled = torch.compile(with_config if attributes else case.call, fullgraph=True, backend=counter)
    for turn, size in enumerate(sizes):
        numbers, x = case.numbers(turn), make_inputs(size)
        vars(config).update(numbers)
        found = with_gradients(compiled, x, case.leaves, {} if attributes else numbers)
        assert all(map(torch.equal, found, with_gradients(case.call, x, case.leaves, numbers)))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", CASES)
def test_new_numbers_and_sizes_compile_nothing(cpu_backend, name):
    """All numbers of an op vary at once: one that were pinned would compile each time."""
    assert graphs_compiled(CASES[name], (3, 4, 6, 9)) == [1, 2, 2, 2]


@pytest.mark.parametrize("name", ["token_logprobs", "gae", "sample_tokens"])
def test_attributes_are_as_good_as_arguments(cpu_backend, name):
    assert graphs_compiled(CASES[name], (3, 4, 6, 9), attributes=True) == [1, 2, 2, 2]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_for_floats_compile_nothing(cpu_backend, name):
    assert graphs_compiled(CASES[name]._replace(options=INTEGERS[name]), (3, 3, 3, 3)) == [1, 2, 2, 2]


@pytest.mark.parametrize("name", CASES)
def test_the_dynamic_op_is_the_same_op(cpu_backend, name, monkeypatch):
    """For each op that a call and its gradients run, what it gives for floats and for tensors, and that both are sound."""
    calls, case = {}, CASES[name]

    def record(op: Op, *args: object) -> tuple[Tensor, ...]:
        in_backward = "backward" in op.overload.name()
        calls[op] = [x.detach() if in_backward and isinstance(x, Tensor) else x for x in args]
        return op.overload(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", record)
        with_gradients(case.call, make_inputs(3), case.leaves, case.numbers(1))
    with_numbers = [(op, args) for op, args in calls.items() if op.numbers]
    assert with_numbers or name == "sample_tokens"  # whose numbers are tensors anyhow
    for op, args in with_numbers:
        tensors = [as_tensor(x) if place in op.numbers else x for place, x in enumerate(args)]
        found, expected = op.dynamic(*tensors), op.overload(*args)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        torch.library.opcheck(op.dynamic, tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_of_constants_can_be_a_cuda_graph(cpu_backend, name):
    """Its op has the numbers as such. Those that are dynamic are read anew at each call, which a CUDA graph would not do."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.append({node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)})
        return graph

    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, options: case.call(x, **options), fullgraph=True, backend=backend)
    for turn in (0, 1):
        compiled(make_inputs(3), case.numbers(turn))
    unfit = [[op for op in targets if torch.Tag.cudagraph_unsafe in op.tags] for targets in seen]
    assert unfit[0] == [] and (len(unfit[1]) == 1 or name == "sample_tokens")
