"""Twenty faults that users of other trainers met, each with their issue: which tests keep each of them out.

`ELSEWHERE` names those in other files; what stands here goes through the whole step of a trainer.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastppo.rewards import RewardModel
from fastppo.rewards.scores import Scores
from fastppo.rollout import FinishReason, Rollout
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_reward_model, make_tokenizer, ppo_config
from tests.tolerance import assert_as_exact_as_model, assert_rounds_to
from tests.trainer.test_ppo import make_roles, make_rollout, make_step, with_holes

TESTS = Path(__file__).resolve().parents[1]

FAULTS = {
    1: "token-mean is wrong under micro-batching (verl#5625, verl#906, trl#6024)",
    2: "the score lands on a pad slot; a stop token of one's own is punished as a missing end (trl#3750, trl#1893)",
    3: "pad == eos masks the real end of sequence (trl#6357, trl#2708)",
    4: "left padding against a right-padding reward model (trl#2778)",
    5: "the critic's mask is shifted by one; a value after the end leaks in when lambda < 1 (verl#1758, verl#1850)",
    6: "advantages run through tokens that nobody chose (miles#1827)",
    7: "log-probs of sampling are not at its temperature (trl#4159, prime-rl#697)",
    8: "truncation is taken for termination (trl#1536)",
    9: "an end of sequence forced onto a truncated answer is trained on (OpenRLHF#238)",
    10: "negative entropy from the sentinels of padding (trl#6121)",
    11: "negative KL from generation arguments (trl#925)",
    12: "dropout makes the ratio differ from 1 (trl#3500)",
    13: "a plain function cannot be the reward (trl#2363, trl#2451, trl#2518)",
    14: "a PPO run cannot be resumed (trl#2657)",
    15: "out of memory from logits over the whole vocabulary (trl#3664, NeMo#3793)",
    16: "host memory grows until the run is killed (verl#429, verl#4995)",
    17: "NaN, then '!!!!' for ever; NaN at a masked slot (verl#747, OpenRLHF#1240)",
    18: "a reward's time limit works on the main thread alone, and every answer scores 0 (verl#5635)",
    19: "a resume at the end of an epoch trains nothing and exits with 0 (verl#7401)",
    20: "rollouts from stale weights: adapters, tied embeddings (verl#7014, trl#5312, NeMo#227)",
}

ELSEWHERE = {
    1: [
        "trainer/test_ppo.py::test_gradients_do_not_depend_on_the_split",
        "trainer/test_ppo.py::test_holes_are_not_counted",
    ],
    2: ["ops/test_approx_kl.py::test_the_score_lands_on_the_last_trainable_token"],
    3: ["rollout/test_engine.py::TestFinish::test_pad_equal_to_eos_changes_nothing"],
    4: ["rewards/test_reward_model.py::test_scores_are_those_of_each_text_by_itself"],
    5: ["trainer/test_ppo.py::test_values_are_those_before_each_token"],
    6: ["ops/test_gae.py::test_masked_steps_carry_through_as_in_verl"],
    7: ["trainer/test_ppo.py::test_ratio_is_exactly_one_on_the_first_minibatch"],
    8: ["trainer/test_trainer.py::test_missing_eos_penalty_follows_the_finish_reason"],
    9: ["rollout/test_engine.py::TestFinish::test_max_new_tokens"],
    10: ["ops/test_token_logprobs.py::test_ignored_rows_reach_nothing"],
    11: ["ops/test_approx_kl.py::test_k3_is_never_negative"],
    12: ["test_models.py::TestPrepare::test_switches_dropout_and_noise_off"],
    13: ["rewards/test_runner.py::test_only_named_keywords_are_passed"],
    14: ["trainer/test_resume.py::test_a_killed_run_continues_bitwise"],
    15: ["ops/test_linear_ppo_loss.py::test_logits_stay_small"],
    17: [
        "trainer/test_ppo.py::test_a_poisoned_minibatch_is_skipped_and_counted",
        "trainer/test_trainer.py::test_training_stops_when_updates_stay_nan",
        "trainer/test_trainer.py::test_samples_whose_logits_broke_are_left_out",
        "ops/test_ppo_loss.py::test_what_stands_under_the_mask_reaches_nothing",
    ],
    18: [
        "rewards/test_process.py::test_time_limits_work_from_any_thread",
        "rewards/test_process.py::test_signal_based_limits_work_inside_a_function",
        "trainer/test_trainer.py::test_invalid_samples_are_left_out_never_scored_zero",
    ],
    19: ["data/test_sampler.py::test_resuming_goes_on_where_it_stopped"],
    20: [
        "rollout/test_engine.py::TestRecovery::test_weights_are_live",
        "test_lora.py::test_what_was_sampled_has_the_bits_of_scoring_and_training",
        "test_lora.py::test_merged_weights_are_the_policy",
    ],
}


def names_in(path: Path) -> set[str]:
    """`test_...` and `Class::test_...` of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        names |= {getattr(node, "name", "")} | {f"{node.name}::{part.name}" for part in inner if hasattr(part, "name")}
    return names


def test_every_fault_has_a_test():
    for tests in ELSEWHERE.values():
        for test in tests:
            file, name = test.split("::", 1)
            assert name in names_in(TESTS / file), test
    here = {int(number) for number in re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(), re.MULTILINE)}
    assert here | set(ELSEWHERE) == set(FAULTS) == set(range(1, 21))


def rollout_of(trainer, count: int = 32, **changes) -> Rollout:
    sampling = dataclasses.replace(trainer.config.rollout.sampling(0), n=4, **changes)
    return trainer.engine.generate([[2, 3], [4]] * (count // 8), sampling)


@torch.no_grad()
def own_distributions(model, rollout: Rollout) -> list[tuple[Tensor, Tensor]]:
    """Log-probs [N, V] of Transformers' own forward, one sequence at a time, with the actions [N]: in the model's type, then in fp64."""
    found = []
    for dtype in (model.dtype, torch.float64):
        plain, logprobs = copy.deepcopy(model).to(dtype), []
        plain.set_attn_implementation("sdpa")
        for tokens, mask in zip(
            rollout.tokens.split(rollout.lengths), rollout.action_mask.split(rollout.lengths), strict=True
        ):
            logprobs.append(plain(input_ids=tokens[None]).logits[0][mask.nonzero().squeeze(1) - 1].log_softmax(-1))
        found.append((torch.cat(logprobs), rollout.tokens[rollout.actions]))
    return found


def test_02_a_stop_token_of_ones_own_is_no_missing_end(make_trainer):
    trainer = make_trainer(rollout__stop_token_ids=(5, 6, 7))
    rollout = rollout_of(trainer)
    last = rollout.tokens[rollout.actions[rollout.action_cu_seqlens[1:].long() - 1]]
    stopped = torch.isin(last, torch.tensor([5, 6, 7]))
    scores = Scores(torch.zeros(rollout.num_sequences), {}).penalised(rollout, 1.0).values
    assert stopped.any() and (scores[stopped] == 0).all()


def test_03_a_tokenizer_that_pads_with_the_end_trains_on_the_end(make_trainer, tmp_path):
    weights = []
    for pad in ("<pad>", "<eos>"):
        trainer = make_trainer(output_dir=tmp_path / pad.strip("<>"))
        trainer.tokenizer.pad_token = pad
        trainer.model.config.pad_token_id = trainer.tokenizer.pad_token_id
        rollout = rollout_of(trainer)
        ended = rollout.finish_reasons == FinishReason.STOP
        last = rollout.tokens[rollout.actions[rollout.action_cu_seqlens[1:].long() - 1]]
        assert ended.any() and torch.equal(last == trainer.tokenizer.eos_token_id, ended), "the end is an action"
        trainer.train()
        weights.append(trainer.model.lm_head.weight.clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_04_a_reward_models_scores_know_no_side_of_padding(side):
    tokenizer, prompts, completions = make_tokenizer(), ["ab", "c", "defg"], ["c", "ghijkl", "a"]
    tokenizer.padding_side = side
    reward = RewardModel(make_reward_model(), tokenizer)
    alone = [reward([prompt], [text])[0] for prompt, text in zip(prompts, completions, strict=True)]
    assert_rounds_to(torch.tensor(reward(prompts, completions)), torch.tensor(alone).double())


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_05_nothing_is_expected_after_the_end(make_trainer, gae_lambda):
    """The last action's advantage is the score less the value before it, whatever lambda is."""
    trainer = make_trainer(advantage__gae_lambda=gae_lambda, advantage__whiten=False)
    torch.nn.init.normal_(trainer.roles.critic.head.weight)
    rollout = rollout_of(trainer)
    evaluation = trainer.roles.evaluate(rollout, trainer.algorithm.needs, trainer.learner.plan(rollout, 0))
    scores = torch.linspace(-1, 1, rollout.num_sequences)
    last = rollout.action_cu_seqlens[1:].long() - 1
    found = trainer.algorithm.credit(rollout, evaluation, Scores(scores, {})).advantages[last]
    assert evaluation.values[last].abs().min() > 0
    assert_rounds_to(found, scores.double() - evaluation.values[last].double())


def test_06_what_a_tool_wrote_gets_no_advantage_and_lets_them_through():
    """Advantages of a rollout with others' tokens between are those of its actions side by side."""
    config, roles = ppo_config(advantage__whiten=False, advantage__gae_lambda=0.5), make_roles("separate")
    rollout, scores, evaluation, targets, _ = make_step(roles, config, with_holes(make_rollout(roles)))
    assert len(targets.advantages) == rollout.num_actions < sum(map(len, rollout.completions()))
    for index, (values, found) in enumerate(
        zip(*(x.split(rollout.action_counts) for x in (evaluation.values, targets.advantages)), strict=True)
    ):
        if not len(values):
            continue
        after, expected = 0.0, []
        for place in reversed(range(len(values))):
            final = place == len(values) - 1
            delta = (scores.values[index].double() if final else values[place + 1].double()) - values[place].double()
            after = delta + 0.5 * after
            expected.append(after)
        assert_rounds_to(found, torch.stack(expected[::-1]))


def test_08_only_what_was_cut_off_goes_on(make_trainer):
    """With `bootstrap_truncated`, the value of the last state counts after a truncated completion, and after no other."""
    trainer = make_trainer(advantage__bootstrap_truncated=True, advantage__whiten=False)
    rollout, learner = rollout_of(trainer), trainer.learner
    evaluation = trainer.roles.evaluate(rollout, trainer.algorithm.needs, learner.plan(rollout, 0))
    zeros, ones = (torch.full_like(evaluation.values, value) for value in (0.0, 1.0))
    last = rollout.action_cu_seqlens[1:].long() - 1
    final = ones[last]
    evaluation = dataclasses.replace(evaluation, values=zeros, final_values=final)
    targets = trainer.algorithm.credit(rollout, evaluation, Scores(torch.zeros_like(final), {}))
    cut_off = rollout.finish_reasons == FinishReason.LENGTH
    assert cut_off.any() and not cut_off.all()
    assert torch.equal(targets.advantages[last], cut_off.float())


def test_09_every_action_was_sampled_and_nothing_is_added(make_trainer):
    trainer = make_trainer()
    rollout = rollout_of(trainer)
    cut_off = rollout.finish_reasons == FinishReason.LENGTH
    assert cut_off.any()
    for index in cut_off.nonzero().squeeze(1).tolist():
        completion = rollout.completions()[index]
        assert (
            len(completion) == trainer.config.rollout.max_new_tokens
            and trainer.tokenizer.eos_token_id not in completion
        )
    assert len(rollout.logprobs) == rollout.num_actions == int(rollout.action_mask.sum())
    assert rollout.logprobs.isfinite().all()


def test_10_entropy_is_that_of_the_actions_however_ragged(make_trainer):
    """Against Transformers' own logits, a completion at a time."""
    settings = {"rollout__max_new_tokens": 12, "rollout__samples_per_prompt": 4, "learner__num_minibatches": 1}
    trainer = make_trainer(optimizer__lr=0.0, total_steps=1, **settings)
    rollouts, evaluate = [], trainer.roles.evaluate
    trainer.roles.evaluate = lambda rollout, *rest: rollouts.append(rollout) or evaluate(rollout, *rest)
    metrics = trainer.train()
    assert len(set(rollouts[0].action_counts)) > 1
    native, exact = (
        -(logprobs.exp() * logprobs).sum(-1).mean() for logprobs, _ in own_distributions(trainer.model, rollouts[0])
    )
    assert exact > 0
    assert_as_exact_as_model(torch.tensor(metrics["policy/entropy_avg"]), native, exact)


@pytest.mark.parametrize(
    "changes",
    [{"rollout__top_k": 3}, {"rollout__top_p": 0.5}, {"rollout__min_new_tokens": 4}, {"rollout__temperature": 0.6}],
    ids=lambda changes: next(iter(changes)).removeprefix("rollout__"),
)
def test_11_generation_arguments_make_no_kl(make_trainer, changes):
    """Policy and reference are compared as they are, not as they were sampled from: before the first update they are one."""
    assert make_trainer(reward__kl_coef=0.1, total_steps=1, **changes).train()["objective/kl"] == 0


def test_12_dropout_leaves_the_ratio_at_one(make_trainer):
    model = make_model(attention_dropout=0.5).train()
    metrics = make_trainer(model=model, learner__num_minibatches=1, total_steps=1).train()
    assert metrics["policy/approxkl_avg"] == metrics["policy/clipfrac_avg"] == 0


def test_13_the_reward_is_a_plain_function(make_trainer):
    assert make_trainer(lambda completions: [len(text) for text in completions], total_steps=1).train()


def test_16_no_memory_is_kept_from_step_to_step(make_trainer):
    """Neither tensors nor Python's objects, once the first steps have made what a run keeps."""
    trainer, living, heap = make_trainer(total_steps=8, checkpoint__every=0), [], []
    train_step = trainer._train_step

    def counting(folder):
        train_step(folder)
        gc.collect()
        living.append(sum(x.nbytes for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)))
        heap.append(tracemalloc.get_traced_memory()[0])

    trainer._train_step = counting
    tracemalloc.start()
    try:
        trainer.train()
    finally:
        tracemalloc.stop()
    assert living[3] == living[-1]
    assert heap[-1] - heap[3] < 50_000


def test_19_a_resume_at_the_end_of_an_epoch_goes_on(make_trainer, tmp_path):
    """Eight prompts, eight a step: every step ends an epoch of the data, and the resumed run takes the steps that remain."""
    make_trainer(total_steps=2).train()
    resumed = make_trainer(total_steps=5)
    before = resumed.model.lm_head.weight.clone()
    resumed.train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-5:] == [1, 2, 3, 4, 5]
    assert not torch.equal(before, resumed.model.lm_head.weight)


def test_20_tied_embeddings_sample_from_the_weights_of_now(make_trainer):
    """After each update a rollout's log-probs are those of the model as Transformers runs it."""
    trainer = make_trainer(model=make_model(tie_word_embeddings=True), total_steps=3, optimizer__lr=3e-2)
    before, train_step = trainer.model.lm_head.weight.clone(), trainer._train_step

    def checked(folder):
        train_step(folder)
        rollout = rollout_of(trainer, 8)
        native, exact = (
            logprobs.gather(1, labels[:, None]).squeeze(1)
            for logprobs, labels in own_distributions(trainer.model, rollout)
        )
        assert_as_exact_as_model(rollout.logprobs, native, exact)

    trainer._train_step = checked
    trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.get_input_embeddings().weight
    assert not torch.equal(before, trainer.model.lm_head.weight)
