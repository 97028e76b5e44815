"""Kinds of critics: another model's trunk, frozen attention, histograms, an own plan and optimizer, a warm-up that waits; and resuming each."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastppo.algorithms.controllers import CriticWarmup
from fastppo.algorithms.ppo import within_bounds
from fastppo.errors import CheckpointError
from fastppo.model import Histogram
from fastppo.run_folder import read_metrics
from tests.tiny import LETTERS, make_model, make_tokenizer, ppo_config
from tests.tiny_trainer import count_a
from tests.tolerance import assert_as_exact_as_model, assert_as_exact_as_native, assert_rounds_to, assert_same_in_fp64
from tests.trainer.test_ppo import gradients, make_roles, make_step

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HL_GAUSS = {"critic__head": "hl-gauss", "critic__value_range": (-0.2, 1.2), "critic__bins": 21}
TWO_HOT = HL_GAUSS | {"critic__head": "two-hot"}


@pytest.fixture
def small_model(tmp_path):
    """A folder with a smaller model and the same tokenizer."""
    return save_model(tmp_path / "small", **SMALL)


def save_model(path, letters=LETTERS, **changes) -> str:
    make_model(seed=3, **changes).save_pretrained(path)
    make_tokenizer(letters).save_pretrained(path)
    return str(path)


def parameters_of(trainer) -> dict[str, torch.Tensor]:
    trained = trainer.roles.trained()
    return {f"{who}.{name}": x.clone() for who, module in trained.items() for name, x in module.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


BAD = {
    "value_range is None, expected the lowest and the highest value with head two-hot": {"critic__head": "two-hot"},
    "expected none with head scalar": {"critic__value_range": (0.0, 1.0)},
    "value_range is [1.0, 0.0], expected finite numbers, the lower one first": HL_GAUSS
    | {"critic__value_range": (1, 0)},
    "expected finite numbers": HL_GAUSS | {"critic__value_range": (0, math.inf)},
    "greater than or equal to 2": HL_GAUSS | {"critic__bins": 1},
    "value_clip is 0.5, expected none with head hl-gauss": HL_GAUSS | {"critic__value_clip": 0.5},
    "critic.epochs is 2, expected None with critic.kind shared": {"critic__kind": "shared", "critic__epochs": 2},
    "critic.model is x, expected None with critic.kind shared": {"critic__kind": "shared", "critic__model": "x"},
    "critic.freeze_attention is True, expected False with critic.kind none (advantage.estimator remax)": {
        "advantage__estimator": "remax",
        "critic__freeze_attention": True,
    },
    "dual_clip is 3.0, expected none with objective dis": {"loss__objective": "dis", "loss__dual_clip": 3.0},
    "ratio_level is sequence, expected token with objective dis": {
        "loss__objective": "dis",
        "loss__ratio_level": "sequence",
    },
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ppo_config(**BAD[message])


def test_a_histogram_has_no_value_clip():
    assert ppo_config(**HL_GAUSS).critic.value_clip is None
    assert ppo_config().critic.value_clip == 0.2


def test_a_smaller_model_is_the_critics_trunk(make_trainer, small_model):
    trainer = make_trainer(critic__model=small_model)
    assert trainer.roles.critic.trunk.config.hidden_size == 16 and trainer.model.config.hidden_size == 32
    expected = make_model(seed=3, **SMALL).model.state_dict()
    for name, value in trainer.roles.critic.trunk.state_dict().items():
        assert torch.equal(value, expected[name]), name
    before = parameters_of(trainer)
    metrics = trainer.train()
    assert all(map(math.isfinite, metrics.values()))
    assert {name.split(".")[0] for name in changed(before, parameters_of(trainer))} == {"policy", "critic"}


def test_a_folder_that_is_not_there_is_named_by_its_setting(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="^critic.model is .*nowhere.*there is no such folder"):
        make_trainer(critic__model=str(tmp_path / "nowhere"))


def test_another_tokenizer_is_refused_and_both_are_named(make_trainer, tmp_path):
    other = save_model(tmp_path / "other", LETTERS[::-1], **SMALL)
    message = rf"critic.model is '{other}', whose tokenizer .* of the policy's tokenizer .*'a' has id 17 there and has id 2 here"
    with pytest.raises(ValueError, match=message):
        make_trainer(critic__model=other)
    fewer = save_model(tmp_path / "fewer", LETTERS[:-1], **SMALL)
    with pytest.raises(ValueError, match=r"17 tokens, expected the 18 .*'p' is not there and has id 17 here"):
        make_trainer(critic__model=fewer)


def test_a_context_that_is_too_short_is_refused(make_trainer, tmp_path):
    short = save_model(tmp_path / "short", **SMALL, max_position_embeddings=9)
    with pytest.raises(ValueError, match="whose context has 9 tokens, expected 11 at least"):
        make_trainer(critic__model=short)


def test_ids_that_only_the_policys_embedding_has_are_read_as_nothing(make_trainer, small_model):
    """Models of one family pad their embeddings to different numbers of rows."""
    trainer = make_trainer(model=make_model(vocab_size=24), critic__model=small_model, total_steps=1)
    weight = trainer.roles.critic.trunk.get_input_embeddings().weight
    assert weight.shape == (24, 16) and not weight[18:].any() and weight[:18].any(-1).sum() == 17  # one is padding
    trainer.train()


@pytest.mark.parametrize("own_model", [False, True])
def test_frozen_attention_stays_and_the_rest_learns(make_trainer, small_model, own_model):
    settings = {"critic__model": small_model} if own_model else {}
    trainer = make_trainer(critic__freeze_attention=True, **settings)
    before = parameters_of(trainer)
    trainer.train()
    moved = changed(before, parameters_of(trainer))
    critic = {name for name in before if name.startswith("critic.")}
    assert {name for name in critic if "self_attn" in name}, "there is an attention"
    assert not {name for name in moved & critic if "self_attn" in name}
    assert {name for name in critic - moved if "self_attn" not in name} == set()
    assert any("self_attn" in name for name in moved if name.startswith("policy.")), "the policy's learns"


def test_an_attention_that_is_not_found_is_said(make_trainer, monkeypatch):
    trainer = make_trainer()
    for module in trainer.roles.critic.trunk.modules():
        if "Attention" in type(module).__name__:
            module.__class__ = type("Mixer", (type(module),), {})
    with pytest.raises(ValueError, match="no parameters in modules whose class is named Attention"):
        trainer.roles.critic.freeze_attention()


def test_an_own_plan_changes_no_bit_where_it_is_the_same(make_trainer, tmp_path):
    """The critic learns apart from the policy what it would have learned beside it."""
    found = []
    for name, settings in {"beside": {}, "apart": {"critic__epochs": 2}}.items():
        trainer = make_trainer(learner__epochs=2, output_dir=tmp_path / name, **settings)
        metrics = trainer.train()
        found.append((parameters_of(trainer), metrics))
    (beside, metrics), (apart, own) = found
    assert not changed(beside, apart)
    stable = {name for name in metrics if not name.startswith(("time/", "perf/"))}
    assert {name: own[name] for name in stable} == {name: metrics[name] for name in stable}


def test_the_critics_own_epochs_are_its_own(make_trainer):
    trainer = make_trainer(critic__epochs=3, total_steps=1)
    trainer.train()
    counts = {
        name: {int(state["step"]) for state in optimizer.adamw.state.values()}
        for name, optimizer in trainer.learner.optimizers.items()
    }
    assert counts == {"policy": {2}, "critic": {6}}


def test_the_critics_microbatches_do_not_change_what_it_learns(make_trainer, tmp_path):
    found = {}
    for budget in (None, 12):
        trainer = make_trainer(critic__tokens_per_microbatch=budget, total_steps=1, output_dir=tmp_path / str(budget))
        sizes, original = [], trainer.roles.critic.head.forward
        trainer.roles.critic.head.forward = lambda hidden, o=original, s=sizes: s.append(len(hidden)) or o(hidden)
        trainer.train()
        found[budget] = sizes, parameters_of(trainer)["critic.head.weight"]
    assert max(found[12][0][-2:]) <= 12 < max(found[None][0])
    assert_as_exact_as_model(found[12][1], found[None][1], found[None][1].double())


def test_the_critics_own_optimizer(make_trainer):
    trainer = make_trainer(
        critic__lr=0.5,
        critic__lr_warmup_steps=4,
        critic__weight_decay=0.25,
        critic__max_grad_norm=3.0,
        optimizer__warmup_steps=2,
    )
    policy, critic = (trainer.learner.optimizers[name] for name in ("policy", "critic"))
    assert (policy.max_grad_norm, critic.max_grad_norm) == (1.0, 3.0)
    assert [max(group["weight_decay"] for group in o.adamw.param_groups) for o in (policy, critic)] == [0.0, 0.25]
    assert trainer.learner.start_step(1) == {"lr": 1e-3, "critic_lr": 0.25}


def test_a_warmup_waits_for_the_values_and_then_is_over():
    warmup = CriticWarmup(steps=1, target=0.5, max_steps=10)
    held = []
    for step, explained in enumerate((0.9, 0.1, 0.5, 0.0)):
        warmup.update(step, explained)
        held.append(warmup.holds(step))
    assert held == [True, True, False, False]
    late = CriticWarmup(steps=0, target=1.0, max_steps=2)
    for step in range(3):
        late.update(step, 0.0)
        assert late.holds(step) == (step < 2)
    assert [CriticWarmup(2, None, 1).holds(step) for step in range(3)] == [True, True, False]


@pytest.mark.parametrize("algorithm", ["ppo", "trpo"])
@pytest.mark.parametrize("epochs", [None, 1])
def test_the_policy_stays_while_the_warmup_waits(make_trainer, algorithm, epochs):
    trainer = make_trainer(
        algorithm=algorithm,
        critic__warmup_explained_var=1.0,
        critic__max_warmup_steps=2,
        critic__epochs=epochs,
        total_steps=3,
    )
    seen, update = [], trainer.algorithm.update

    def watching(*arguments):
        before = parameters_of(trainer)
        metrics = update(*arguments)
        seen.append({name.split(".")[0] for name in changed(before, parameters_of(trainer))})
        return metrics

    trainer.algorithm.update = watching
    trainer.train()
    assert seen == [{"critic"}, {"critic"}, {"critic", "policy"}]


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("head", [TWO_HOT, HL_GAUSS], ids=["two-hot", "hl-gauss"])
def test_a_histogram_trains(make_trainer, tmp_path, critic, head):
    trainer = make_trainer(critic__kind=critic, **head)
    before = parameters_of(trainer)
    trainer.train()
    rows = read_metrics(tmp_path / "run")
    uniform = math.log(21)  # the cross-entropy of a head that says nothing yet
    assert 0.5 * uniform < rows[-1]["loss/value_avg"] < 1.5 * uniform
    assert "val/clipfrac_avg" not in rows[0] and "val/ratio" in rows[0] and "val/explained_var" in rows[0]
    assert {name for name in changed(before, parameters_of(trainer)) if name.endswith(("head.weight", "critic.weight"))}


def test_a_histograms_gradient_does_not_depend_on_the_split():
    """Under every aggregation, with the whole minibatch's denominator."""
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "fixed-denominator"):
        config = ppo_config(**HL_GAUSS, loss__aggregation=aggregation)
        roles = make_roles("separate", histogram=Histogram("hl-gauss", 21, -0.2, 1.2))
        step = make_step(roles, config)
        everything = list(range(step.rollout.num_sequences))
        whole_loss = step.accumulate(roles, [everything], config)["loss/value_avg"]
        whole = gradients(roles)
        split_loss = step.accumulate(roles, [everything[:5], everything[5:6], everything[6:]], config)["loss/value_avg"]
        split = gradients(roles)
        for name, gradient in whole.items():
            assert_as_exact_as_native(split[name].float(), gradient.float(), gradient.double(), name)
        assert_rounds_to(torch.tensor(split_loss), whole_loss)


def test_scores_beyond_the_range_are_said_once(make_trainer):
    trainer = make_trainer(**(HL_GAUSS | {"critic__value_range": (0.0, 0.1)}))
    notes = []
    trainer.reporter.note = notes.append
    trainer.train()
    assert len([note for note in notes if "outside of critic.value_range = [0, 0.1]" in note]) == 1
    quiet = make_trainer(**HL_GAUSS, output_dir=trainer.config.output_dir + "2")
    quiet.reporter.note = notes.append
    quiet.train()
    assert len([note for note in notes if "critic.value_range" in note]) == 1


def test_double_sided_importance_sampling_is_the_plain_formula():
    """Loss and gradient of -mean f(r) A logprob, f(r) = r within the bounds and 0 outside, a constant."""
    config = ppo_config(loss__objective="dis", loss__clip_low=0.1, loss__clip_high=0.15, critic__vf_coef=0.0)
    roles = make_roles("separate")
    step = make_step(roles, config)
    with torch.no_grad():
        roles.policy.lm_head.weight.add_(0.02 * torch.randn(roles.policy.lm_head.weight.shape, dtype=torch.float64))
    everything = list(range(step.rollout.num_sequences))
    metrics = step.accumulate(roles, [everything], config)
    ours = gradients(roles)
    logprobs = roles(step.rollout, values=False).logprobs
    ratio = (logprobs - step.evaluation.logprobs).exp().detach()
    inside = (ratio > 0.9) & (ratio < 1.15)
    weight, advantages = torch.where(inside, ratio, 0), step.targets.advantages
    assert 0.2 < inside.double().mean() < 0.95, "some are outside"
    assert ((ratio < 0.9) & (advantages > 0)).any() and ((ratio > 1.15) & (advantages < 0)).any(), (
        "PPO would keep these"
    )
    (-(weight * advantages * logprobs).mean()).backward()
    plain = gradients(roles)
    for name, gradient in plain.items():
        assert_same_in_fp64(ours[name], gradient, name)
    assert_rounds_to(torch.tensor(metrics["policy/clipfrac_avg"]), (~inside).double().mean())


def test_bounds_are_strict_on_both_sides():
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, 1.0, 2.0, 1.5]).log()
    assert within_bounds(logprobs, old, 0.5, 1.0).tolist() == [False, True, False, True]


def test_log_probs_of_sampling_are_taken_as_they_are(make_trainer):
    trainer = make_trainer(rollout__recompute_logprobs="never", total_steps=1)
    seen, credit = [], trainer.algorithm.credit
    trainer.algorithm.credit = lambda *records: seen.append(records) or credit(*records)
    trainer.train()
    rollout, evaluation, _ = seen[0]
    assert evaluation.logprobs is rollout.logprobs and evaluation.values is not None


RESUMED = {
    "smaller model": {"critic__model": "SMALL"},
    "frozen attention": {"critic__freeze_attention": True},
    "hl-gauss": HL_GAUSS,
    "two-hot, shared": TWO_HOT | {"critic__kind": "shared"},
    "own plan and optimizer": {
        "critic__epochs": 2,
        "critic__tokens_per_microbatch": 16,
        "critic__lr_warmup_steps": 3,
        "critic__weight_decay": 0.1,
    },
    "waiting warm-up": {"critic__warmup_explained_var": 1.0, "critic__max_warmup_steps": 2},
    "a warm-up that is over": {"critic__warmup_explained_var": 0.0},
    "SAO": {
        "loss__objective": "dis",
        "loss__clip_low": 0.3,
        "loss__clip_high": 5.0,
        "rollout__recompute_logprobs": "never",
        "critic__freeze_attention": True,
        "critic__epochs": 2,
    },
}


@pytest.mark.parametrize("kind", RESUMED)
def test_each_kind_goes_on_bitwise(make_trainer, tmp_path, small_model, kind):
    settings = {key: small_model if value == "SMALL" else value for key, value in RESUMED[kind].items()}
    settings |= {"total_steps": 3, "checkpoint__every": 1}
    whole = make_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    calls = []

    def failing(prompts, completions, **_):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return count_a(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(failing, **settings).train()
    resumed = make_trainer(**settings)
    resumed.train(resume=True)
    assert not changed(parameters_of(whole), parameters_of(resumed))


OTHERS = {
    "critic.head is 'two-hot', was 'hl-gauss'": TWO_HOT,
    "critic.bins is 11, was 21": HL_GAUSS | {"critic__bins": 11},
    "critic.value_range is [-0.2, 2.0], was [-0.2, 1.2]": HL_GAUSS | {"critic__value_range": (-0.2, 2.0)},
    "critic.freeze_attention is True, was False": HL_GAUSS | {"critic__freeze_attention": True},
    "critic.hidden_size is 16, was 32": HL_GAUSS | {"critic__model": "SMALL"},
}


def test_another_critic_is_refused_by_name(make_trainer, small_model):
    make_trainer(**HL_GAUSS, total_steps=1).train()
    for message, settings in OTHERS.items():
        settings = {key: small_model if value == "SMALL" else value for key, value in settings.items()}
        with pytest.raises(CheckpointError, match=re.escape(message)):
            make_trainer(**settings, total_steps=2).train(resume=True)
