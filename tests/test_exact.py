"""One set of kernels: on the CPU in fp32 a Llama-like model's log-prob has the same bits sampled, scored and trained."""

from __future__ import annotations

import pytest
import torch

from fastppo import Engine, PPOConfig, SamplingParams
from fastppo.model import lm_head, make_exact, prepare_model
from fastppo.model.parts_trunk import trunk_of
from fastppo.plan import Lengths, Plan, plan_epochs
from fastppo.roles import Roles
from fastppo.rollout import Rollout
from tests.rollout.tiny import VOCAB_SIZE, make_model

FAMILIES = ["llama", "mistral-window", "qwen2", "qwen3"]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def assert_exact(roles: Roles, rollout: Rollout, expected: torch.Tensor | None = None) -> None:
    """With gradients and without, the log-probs are those that were sampled, bit for bit."""
    expected = rollout.logprobs if expected is None else expected
    trained = roles(rollout, values=False, entropy=False).logprobs
    with torch.no_grad():
        scored = roles(rollout, values=False).logprobs
    assert torch.equal(trained, expected) and torch.equal(scored, expected)


@pytest.fixture(params=FAMILIES)
def roles(request) -> Roles:
    model = prepare_model(make_model(request.param))
    assert trunk_of(model) is not None
    return Roles(model, critic="shared")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_whatever_was_sampled_side_by_side(roles, temperature):
    """One row at a time, few and many; prompts alone and shared, of one token and across tiles and blocks of prompt rows."""
    prompts, sampling = (
        prompts_of(1, 3, 16, 17, 40),
        SamplingParams(n=3, temperature=temperature, max_new_tokens=9, seed=5),
    )
    rollouts = [Engine(roles.policy, max_batch_size=size).generate(prompts, sampling) for size in (1, 4, 15)]
    for rollout in rollouts:
        assert torch.equal(rollout.logprobs, rollouts[0].logprobs)
    assert_exact(roles, rollouts[0])


def test_whatever_is_packed_together(roles):
    rollout = Engine(roles.policy).generate(prompts_of(5, 20, 33), SamplingParams(n=4, max_new_tokens=12, seed=1))
    for indices in ([0], [7, 2, 9], [0, 1, 2, 3], list(range(12))):
        assert_exact(roles, rollout.select(indices))


def test_whatever_the_number_of_threads(roles):
    threads = torch.get_num_threads()
    rollout = Engine(roles.policy).generate(prompts_of(5, 20, 33), SamplingParams(n=4, max_new_tokens=12, seed=1))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_exact(roles, rollout)
    finally:
        torch.set_num_threads(threads)


def test_with_tokens_that_a_tool_answered(roles):
    with Engine(roles.policy).open(SamplingParams(max_new_tokens=6, ignore_eos=True)) as session:
        answered = set()
        session.add(prompts_of(7)[0], n=3)
        for turn in session:
            if turn.id in answered:
                session.close(turn.id)
            else:
                answered.add(turn.id)
                session.append(turn.id, prompts_of(5 + turn.id)[0])
        rollout = session.rollout()
    assert_exact(roles, rollout)


def test_a_model_as_wide_as_several_blocks_of_a_sum():
    roles = Roles(prepare_model(make_model("llama", hidden_size=320, intermediate_size=600)), critic="shared")
    assert trunk_of(roles.policy) is not None
    assert_exact(roles, Engine(roles.policy).generate(prompts_of(4, 30), SamplingParams(n=2, max_new_tokens=8)))


def test_with_gradient_checkpointing():
    roles = Roles(prepare_model(make_model("qwen2")), critic="shared", gradient_checkpointing=True)
    assert_exact(roles, Engine(roles.policy).generate(prompts_of(4, 30), SamplingParams(n=2, max_new_tokens=8)))


def plan_of(rollout: Rollout) -> Plan:
    return plan_epochs(Lengths.of(rollout), epochs=1, num_minibatches=2, max_tokens=100, seed=0)


def test_what_was_sampled_is_taken_once_a_forward_pass_has_had_its_bits(roles, monkeypatch):
    rollout = Engine(roles.policy).generate(prompts_of(5, 20), SamplingParams(n=2, max_new_tokens=8))
    passes = []
    forward = roles.forward
    monkeypatch.setattr(
        roles, "forward", lambda *args, **wants: passes.append(wants["policy"]) or forward(*args, **wants)
    )
    for recompute, expected in (("auto", True), ("auto", False), ("always", True)):
        passes.clear()
        evaluation = roles.evaluate(rollout, {"logprobs", "values"}, plan_of(rollout), recompute)
        assert set(passes) == {expected} and torch.equal(evaluation.logprobs, rollout.logprobs)
    passes.clear()
    roles.evaluate(rollout, {"logprobs"}, plan_of(rollout))
    assert not passes


def test_values_of_a_shared_trunk_come_with_the_samples(roles, monkeypatch):
    """They have the bits of a forward pass; only the state after the last token, which nothing was drawn from, takes one."""
    torch.nn.init.normal_(roles.value_head.weight)
    engine, sampling = Engine(roles.policy), SamplingParams(n=3, max_new_tokens=8)
    rollout = engine.generate(prompts_of(5, 20), sampling, value_head=roles.value_head)
    assert torch.equal(roles(rollout).values, rollout.values)
    part = rollout.select([4, 1])
    assert torch.equal(roles(part).values, part.values)
    want = {"logprobs", "values"}
    exact = roles.evaluate(rollout, want, plan_of(rollout), "always")
    assert torch.equal(exact.values, rollout.values) and exact.final_values is None
    with monkeypatch.context() as patched:
        patched.setattr(roles, "forward", None)  # is not called
        assert torch.equal(roles.evaluate(rollout, want, plan_of(rollout)).values, rollout.values)
    assert roles.evaluate(rollout, want | {"final_values"}, plan_of(rollout)).final_values is not None


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_others_are_scored_every_time(family):
    roles = Roles(prepare_model(make_model(family)), critic="shared")
    rollout = Engine(roles.policy).generate(prompts_of(5, 20), SamplingParams(n=2, max_new_tokens=8))
    for _ in range(2):
        evaluation = roles.evaluate(rollout, {"logprobs"}, plan_of(rollout))
        assert torch.equal(
            evaluation.logprobs, roles.evaluate(rollout, {"logprobs"}, plan_of(rollout), "always").logprobs
        )


def test_on_a_cpu_a_model_that_is_asked_to_be_exact_is_what_it_was():
    model = prepare_model(make_model("llama"))
    make_exact(model)
    assert trunk_of(model).is_on_cpu and not lm_head(model).exact


@pytest.mark.parametrize(
    ("family", "dtype", "reason"),
    [("gpt2", torch.float32, "GPT2Model consists of"), ("llama", torch.bfloat16, "of one type and device")],
)
def test_models_that_cannot_be_exact_on_a_cpu(family, dtype, reason):
    model = prepare_model(make_model(family, dtype=dtype))
    with pytest.raises(ValueError, match=f"exact is True, expected False for {type(model).__name__}: .*{reason}"):
        make_exact(model)


def test_a_trainer_says_so(make_trainer):
    with pytest.raises(
        ValueError, match="rollout: exact is True, expected False for GPT2LMHeadModel: GPT2Model consists of"
    ):
        make_trainer(model=make_model("gpt2"), rollout__exact=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"r": 4}, "critic": {"kind": "lora"}}, "with lora.r 4"),
        ({"distributed": {"sharding": "full"}}, "with distributed.sharding full"),
    ],
)
def test_settings_that_go_without(settings, message):
    with pytest.raises(ValueError, match=f"rollout.exact is true, expected false {message}"):
        PPOConfig(rollout={"exact": True}, **settings)
