"""Expert iteration end to end: every search's answers reach policy, critic, metrics and samples, and a run goes on bitwise."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastppo.rollout import FinishReason
from fastppo.run_folder import read_metrics, read_samples
from tests.tiny import ppo_config
from tests.tiny_trainer import PROMPTS
from tests.trainer.test_learning import SETTINGS, copies_of_first, learn, shuffled

EXPERT = {"algorithm": "expert_iteration", "rollout__samples_per_prompt": 3, "reward__solved_score": 0.01}
TREE = {"search__kind": "puct", "search__step": "b", "search__step_tokens": 2, "search__simulations": 3}
GUIDED = {"search__kind": "value-guided", "search__width": 3}
SEARCHES = {
    "best-of-n": {},
    "best-of-n without critic": {"critic__kind": "none"},
    "majority": {"search__kind": "majority", "search__answer": "a|b"},
    "value-guided": GUIDED,
    "value-guided, shared": GUIDED | {"critic__kind": "shared"},
    "puct": TREE,
    "puct, histogram": TREE | {"critic__head": "hl-gauss", "critic__value_range": [0, 1], "critic__bins": 11},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_teaches(make_trainer, tmp_path, search):
    trainer = make_trainer(**EXPERT, **SEARCHES[search])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(map(math.isfinite, metrics.values()))
    assert ("loss/value_avg" in metrics) == (search != "best-of-n without critic")
    put_together = not search.startswith(("best", "majority"))
    assert ("search/tokens" in metrics) == ("time/search" in metrics) == ("search/scores" in metrics) == put_together
    assert not any(name.startswith(("policy/clipfrac", "policy/approxkl", "val/ratio")) for name in metrics)
    assert any(row["search/kept"] > 0 and row["search/logprobs"] < 0 for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("search", ["majority", "value-guided, shared", "puct, histogram"])
def test_a_run_goes_on_bitwise(make_trainer, tmp_path, search):
    settings = EXPERT | SEARCHES[search] | {"total_steps": 3, "checkpoint__every": 2}
    whole = make_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    make_trainer(**settings | {"total_steps": 2}).train()
    resumed = make_trainer(**settings)
    resumed.train(resume=True)
    for role, module in whole.roles.trained().items():
        after = resumed.roles.trained()[role].state_dict()
        assert all(torch.equal(value, after[name]) for name, value in module.state_dict().items()), role


def test_what_is_found_stands_before_its_samples_and_has_the_policys_log_probs(make_trainer, tmp_path):
    trainer = make_trainer(**EXPERT, **GUIDED, critic__warmup_steps=1, num_logged_samples=8)
    update, seen = trainer.algorithm.update, []

    def watching(learner, rollout, evaluation, *records):
        seen.append((rollout, evaluation))
        return update(learner, rollout, evaluation, *records)

    trainer.algorithm.update = watching
    trainer.train()
    (first, _), (rollout, evaluation) = seen
    assert first.found is None, "in the critic's warm-up nothing is searched for"
    assert rollout.found.tolist() == [True, False, False, False] * 8
    assert rollout.prompt_index.tolist() == [i for i in range(8) for _ in range(4)]
    prompts = rollout.prompts()
    assert all(prompts[i] == prompts[i - i % 4] for i in range(32))
    assert torch.equal(rollout.logprobs, evaluation.logprobs), "the kernels of sampling, scoring and search agree"
    rows = {step: [row for row in read_samples(tmp_path / "run") if row["step"] == step] for step in (1, 2)}
    assert [row.get("found", False) for row in rows[2]] == [True, False, False, False] * 2
    assert not any("found" in row for row in rows[1])


def test_the_metrics_of_samples_are_of_samples_alone(make_trainer, tmp_path):
    """What is found gets 100 where a sample gets its number: the marks of the reward, told apart by order."""

    def marked(prompts, completions, **_):
        return [100.0 if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    make_trainer(marked, **EXPERT, **GUIDED, total_steps=1).train()
    (row,) = read_metrics(tmp_path / "run")
    assert row["objective/scores"] == 2 and row["search/scores"] == 100 and row["search/kept"] == 1
    assert row["rewards/marked/mean"] == 2


def test_a_prompt_without_a_valid_answer_is_left_out(make_trainer, tmp_path):
    def failing(prompts, completions, **_):
        return [None if i == 0 else 1.0 for i in range(len(completions))]

    make_trainer(failing, **EXPERT, **GUIDED, total_steps=1).train()
    assert read_metrics(tmp_path / "run")[0]["search/kept"] == 7 / 8


def test_interrupted_searches_end_at_once(make_trainer, monkeypatch):
    trainer = make_trainer(**EXPERT, **TREE)

    class Stop(Exception):
        pass

    def check(*_):
        raise Stop

    with trainer._resources(), torch.no_grad():
        rows = [trainer.prompts[i] for i in range(2)]
        sampling = trainer.config.rollout.sampling(0)
        rollout = trainer.engine.generate([row["prompt_ids"] for row in rows], sampling)
        with pytest.raises(Stop):
            trainer.expert.join(rollout, [row["prompt_ids"] for row in rows], sampling, check)
    assert trainer.engine.generate([[2]], sampling).finish_reasons[0] != FinishReason.ERROR


@pytest.mark.parametrize("kind", ["lora", "shared"])
def test_adapters_are_searched_with_and_learn(make_trainer, tmp_path, kind):
    pytest.importorskip("peft")
    trainer = make_trainer(**EXPERT, **TREE, critic__kind=kind, lora__r=4, lora__alpha=8, total_steps=3)
    before = {name: value.clone() for name, value in trainer.roles.trained()["policy"].state_dict().items()}
    trainer.train()
    after = trainer.roles.trained()["policy"].state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert read_metrics(tmp_path / "run")[-1]["search/kept"] > 0


class World:
    def reset(self, row):
        return []

    def step(self, completion):
        return None, 1.0, True, False, {}


def test_episodes_are_chosen_among_but_not_put_together(make_trainer, tmp_path):
    from fastppo import PPOTrainer
    from tests.tiny import make_model, make_tokenizer
    from tests.tiny_trainer import tiny_config

    config = tiny_config(tmp_path / "run", **EXPERT, **GUIDED)
    with pytest.raises(ValueError, match="environment: search.kind is value-guided, expected best-of-n"):
        PPOTrainer(make_model(), prompts=PROMPTS, environment=World, config=config, tokenizer=make_tokenizer())
    assert not (tmp_path / "run").exists()


WRONG = {
    "search.kind is set, expected no setting of search with algorithm ppo": {
        "search__kind": "puct",
        "search__width": 3,
    },
    "answer is None, expected a regular expression": EXPERT | {"search__kind": "majority"},
    r"answer is '\(', expected a regular expression": EXPERT | {"search__kind": "majority", "search__answer": "("},
    "step_tokens is 3, expected none with kind value-guided, which takes width, min_p": EXPERT
    | {"search__kind": "value-guided", "search__step_tokens": 3},
    "width is 3, expected none with kind best-of-n": EXPERT | {"search__width": 3},
    "search.budget is 5, expected at least rollout.max_new_tokens = 256": EXPERT | TREE | {"search__budget": 5},
    "rollout.min_new_tokens is 2, expected 0 with search.kind puct": EXPERT | TREE | {"rollout__min_new_tokens": 2},
    "distributed.sharding is full, expected none with search.kind puct": EXPERT
    | TREE
    | {"distributed__sharding": "full"},
    "rollout.samples_per_prompt is 1, expected at least 2 with search.kind best-of-n": EXPERT
    | {"rollout__samples_per_prompt": 1},
    "loss.clip_low is set, expected no setting of loss with algorithm expert_iteration": EXPERT
    | {"loss__clip_low": 0.1},
    "reward.kl_coef is 0.1, expected 0 with algorithm expert_iteration": EXPERT | {"reward__kl_coef": 0.1},
    "advantage.estimator is grpo, expected gae": EXPERT | {"advantage__estimator": "grpo"},
    "critic.kind is none, expected separate or shared or lora": EXPERT | TREE | {"critic__kind": "none"},
    "advantage.bootstrap_truncated is True, expected False with critic.kind none": EXPERT
    | {"critic__kind": "none", "advantage__bootstrap_truncated": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        ppo_config(**WRONG[message])


def bandit(make_trainer, tmp_path, reward=copies_of_first, **changes) -> tuple[float, float]:
    """Share of the letters that are right, in the first and over the last steps."""
    settings = {name: value for name, value in SETTINGS.items() if name != "rollout__min_new_tokens"}
    settings |= {"algorithm": "expert_iteration", "critic__kind": "none", "rollout__ignore_eos": True}
    settings |= {"reward__solved_score": 0.0, "rollout__samples_per_prompt": 8, "total_steps": 16}
    return learn(make_trainer, tmp_path, reward, **settings | changes)


@pytest.mark.slow
def test_it_learns_the_bandit(make_trainer, tmp_path):
    first, last = bandit(make_trainer, tmp_path)
    assert first < 0.15 and last > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"reward": shuffled}, {"optimizer__lr": 0.0}], ids=["shuffled", "no rate"])
def test_nothing_is_learned_without_the_reward(make_trainer, tmp_path, change):
    random.seed(0)
    first, last = bandit(make_trainer, tmp_path, **change)
    assert first < 0.15 and last < 0.3
