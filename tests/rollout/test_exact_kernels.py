"""Exact models on a GPU: a token has the same bits sampled, scored and trained. Interpreted (tests/test_triton.py) or on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastppo import Engine, SamplingParams
from fastppo.model import make_exact, packed_hidden, prepare_model
from fastppo.model.parts import EXACT, is_exact
from fastppo.model.parts_trunk import trunk_of
from fastppo.ops import linear_token_logprobs, sample_tokens, token_logprobs, use_backend
from fastppo.plan import Lengths, Plan, plan_epochs
from fastppo.roles import Roles
from fastppo.rollout import Rollout, generation
from fastppo.rollout.graphs import GraphDecoder
from fastppo.rollout.parts_decoder import ExactDecoder
from tests.conftest import FAST_BACKEND
from tests.rollout import tiny
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

if FAST_BACKEND != "triton":
    pytest.skip("only for the process that tests Triton's kernels", allow_module_level=True)

LONG = 128  # context: sequences that go from one page of the cache to the next
# Of each: its type, layers and tokens of prompts; a page of the cache has 64.
CASES = {
    "llama": (torch.float32, 2, (1, 20)),
    "qwen2": (torch.bfloat16, 1, (66,)),
    "qwen3": (torch.bfloat16, 2, (2, 9)),
    "mistral-window": (torch.float32, 1, (3, 14)),
}


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Draws have no Triton kernel: those of the device's own."""

    def draw(*args, **options):
        with use_backend(None):
            return sample_tokens(*args, **options)

    monkeypatch.setattr(generation, "sample_tokens", draw)
    with use_backend("triton"):
        yield


def make_roles(family: str, dtype: torch.dtype, **settings: object) -> Roles:
    model = tiny.make_model(family, dtype=dtype, max_position_embeddings=LONG, **settings)
    model = prepare_model(model.to(torch.get_default_device()))
    make_exact(model)
    return Roles(model, critic="none")


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return [
        torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=generator, device="cpu").tolist() for length in lengths
    ]


def sample(roles: Roles, prompts: list[list[int]], *, side_by_side: int = 8, **settings) -> Rollout:
    settings = {"n": 2, "max_new_tokens": 3, "seed": 5, "ignore_eos": True} | settings
    return Engine(roles.policy, max_batch_size=side_by_side).generate(prompts, SamplingParams(**settings))


def logprobs(roles: Roles, rollout: Rollout) -> Tensor:
    return roles(rollout, values=False, entropy=False).logprobs


@pytest.mark.parametrize("family", CASES)
def test_whatever_was_sampled_side_by_side_and_is_packed_together(family):
    """Prompts shared and alone, on one page and beyond; grouped heads, windows, norms of heads, biases."""
    dtype, layers, lengths = CASES[family]
    roles, prompts = make_roles(family, dtype, num_hidden_layers=layers), prompts_of(*lengths)
    rollout = sample(roles, prompts, temperature=0.7)
    assert torch.equal(sample(roles, prompts, temperature=0.7, side_by_side=3).logprobs, rollout.logprobs)
    trained = logprobs(roles, rollout)
    assert trained.requires_grad and torch.equal(trained, rollout.logprobs)
    part = rollout.select([rollout.num_sequences - 1, 1])
    with torch.no_grad():
        assert torch.equal(roles(part, values=False).logprobs, part.logprobs)  # with entropies, and without gradients


def test_a_step_that_is_not_exact_would_be_found():
    """The control: the same model, sampled by the kernels that are fast for each size, in a type whose roundings show."""
    roles = make_roles("qwen3", torch.bfloat16, num_hidden_layers=1)
    EXACT.discard(roles.policy)
    rollout = sample(roles, prompts_of(5, 12))
    EXACT.add(roles.policy)
    assert not torch.equal(logprobs(roles, rollout), rollout.logprobs)


def test_stop_tokens_that_were_banned_at_first():
    roles = make_roles("llama", torch.bfloat16, num_hidden_layers=1)
    rollout = sample(roles, prompts_of(5, 9), min_new_tokens=2, stop_token_ids=(3,), ignore_eos=False)
    assert torch.equal(logprobs(roles, rollout), rollout.logprobs)


def test_with_tokens_that_a_tool_answered():
    """What follows a turn is a prompt behind tokens that are cached, and stands on their last page."""
    roles = make_roles("qwen2", torch.float32, num_hidden_layers=1)
    with Engine(roles.policy).open(SamplingParams(max_new_tokens=2, ignore_eos=True)) as session:
        answered = set()
        session.add(prompts_of(61)[0], n=2)
        for turn in session:
            if turn.id in answered:
                session.close(turn.id)
            else:
                answered.add(turn.id)
                session.append(turn.id, prompts_of(3 + turn.id)[0])
        rollout = session.rollout()
    assert torch.equal(logprobs(roles, rollout), rollout.logprobs)


def test_with_gradient_checkpointing():
    roles = make_roles("llama", torch.float32, num_hidden_layers=1)
    rollout = sample(roles, prompts_of(4, 9))
    expected = gradients_of(roles.policy, rollout)
    roles.policy.train()
    roles.policy.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(logprobs(roles, rollout), rollout.logprobs)
    for found, kept in zip(gradients_of(roles.policy, rollout), expected, strict=True):
        assert torch.equal(found, kept)


def gradients_of(model, rollout: Rollout) -> list[Tensor]:
    """Of all parameters, from a weighted sum of log-probs."""
    roles = Roles(model, critic="none")
    outputs = logprobs(roles, rollout)
    weights = torch.linspace(-1, 1, len(outputs), dtype=outputs.dtype)
    return torch.autograd.grad((outputs * weights).sum(), list(model.parameters()))


@pytest.mark.parametrize("family", CASES)
def test_gradients(family):
    """As near to fp64 as those of the model's own modules in fp32, prompts shared and not. (Of bfloat16 the interpreter's roundings would show.)"""
    _, layers, lengths = CASES[family]
    exact = make_roles(family, torch.float32, num_hidden_layers=layers)
    rollout = sample(exact, prompts_of(*lengths, 4), max_new_tokens=2).select([0, 1, 2])
    own = copy.deepcopy(exact.policy)
    assert is_exact(exact.policy) and not is_exact(own)
    found, native = gradients_of(exact.policy, rollout), gradients_of(own, rollout)
    with use_backend("reference"):
        wide = gradients_of(copy.deepcopy(own).double(), rollout)
    names = [name for name, _ in own.named_parameters()]
    for name, ours, theirs, truth in zip(names, found, native, wide, strict=True):
        assert_no_worse_than(ours, theirs, truth, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states(dtype):
    """As near to fp64 as the modules'; NaN on one sequence's way reaches no other."""
    model = make_roles("qwen3", dtype, num_hidden_layers=1).policy
    own = copy.deepcopy(model)
    tokens = torch.tensor([token for own in prompts_of(3, 20) for token in own])
    positions = torch.cat([torch.arange(3), torch.arange(20)])
    with torch.no_grad():
        found, native = (packed_hidden(each, tokens, positions, [0, 3, 23]) for each in (model, own))
        with use_backend("reference"):
            wide = packed_hidden(copy.deepcopy(own).double(), tokens, positions, [0, 3, 23])
        assert_no_worse_than(found, native, wide, "hidden states")
        assert torch.equal(packed_hidden(model, tokens[3:], positions[3:], [0, 20]), found[3:])
        model.model.embed_tokens.weight[tokens[0]] = torch.nan
        alone = (tokens != tokens[0])[3:].cumprod(0).bool()
        assert torch.equal(packed_hidden(model, tokens, positions, [0, 3, 23])[3:][alone], found[3:][alone])


def plan_of(rollout: Rollout) -> Plan:
    return plan_epochs(Lengths.of(rollout), epochs=1, num_minibatches=2, max_tokens=100, seed=0)


def test_what_was_sampled_is_taken_once_a_forward_pass_has_had_its_bits(monkeypatch):
    roles = make_roles("llama", torch.bfloat16, num_hidden_layers=1)
    rollout = sample(roles, prompts_of(2, 5))
    passes, forward = [], roles.forward
    monkeypatch.setattr(roles, "forward", lambda *args, **wants: passes.append(1) or forward(*args, **wants))
    for expected in (True, False):
        passes.clear()
        evaluation = roles.evaluate(rollout, {"logprobs"}, plan_of(rollout))
        assert bool(passes) == expected and torch.equal(evaluation.logprobs, rollout.logprobs)


def test_a_model_that_is_not_asked_to_be_exact_runs_its_modules():
    model = prepare_model(tiny.make_model("llama").to(torch.get_default_device()))
    assert trunk_of(model) is None
    make_exact(model)
    make_exact(model)  # once more changes nothing
    assert trunk_of(model) is not None and trunk_of(copy.deepcopy(model)) is None
    runner = Engine(model).runner
    with runner.alone(), runner.lend(2, 70, pages=4) as (_, decoder):
        assert type(decoder._decoder if isinstance(decoder, GraphDecoder) else decoder) is ExactDecoder


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt2", {}, "GPT2Model consists of"),
        ("granite", {}, "its head caps or scales its logits"),
        ("granite", {"logits_scaling": 1.0, "residual_multiplier": 0.5}, "other numbers than its modules"),
    ],
)
def test_models_that_cannot_be(family, settings, reason):
    model = prepare_model(tiny.make_model(family, **settings).to(torch.get_default_device()))
    with pytest.raises(ValueError, match=f"exact is True, expected False for {type(model).__name__}: .*{reason}"):
        make_exact(model)
    assert not is_exact(model) and trunk_of(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head(dtype, monkeypatch):
    """Log-probs are those of whole rows of logits, whatever other rows there are and however many fit into a tile; gradients by the rule."""
    from fastppo.kernels.batch_invariant_linear import batch_invariant_linear
    from fastppo.ops import _head

    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((37, 24), (300, 24), (300,)))
    weight = weight / 24**0.5
    labels = torch.randint(0, 300, (37,))
    labels[3] = -100
    logits = batch_invariant_linear(hidden, weight, bias, torch.empty(37, 300))
    expected = token_logprobs(logits, labels, temperature=0.7, return_entropy=True)
    options = {"temperature": 0.7, "return_entropy": True, "batch_invariant": True}
    found = linear_token_logprobs(hidden, weight, labels, bias, **options)
    assert torch.equal(found.logprobs, expected.logprobs) and torch.equal(found.entropy, expected.entropy)
    monkeypatch.setitem(_head.SIZES, "triton", _head.SIZES["triton"]._replace(tile_rows=10, tile_columns=300))
    part = linear_token_logprobs(hidden[2:30], weight, labels[2:30], bias, **options)
    assert torch.equal(part.logprobs, expected.logprobs[2:30])

    def gradients(*inputs: Tensor, **options) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = linear_token_logprobs(*inputs[:2], labels, inputs[2], return_entropy=True, temperature=0.7, **options)
        return torch.autograd.grad((out.logprobs + 0.3 * out.entropy).sum(), inputs)

    ours = gradients(hidden, weight, bias, batch_invariant=True)
    with use_backend("reference"):
        native, exact = gradients(hidden, weight, bias), gradients(hidden.double(), weight.double(), bias.double())
    for mine, theirs, truth in zip(ours, native, exact, strict=True):
        assert_as_exact_as_native(mine, theirs, truth)
    empty = linear_token_logprobs(hidden[:0], weight, labels[:0], bias, batch_invariant=True)
    assert empty.shape == (0,)
