"""PPO on episodes: what the trainer records of them, invalid ones, and a run that goes on where it was."""

from __future__ import annotations

import json
import random

import pytest
import torch

from fastppo import PPOTrainer
from fastppo.console import Reporter
from fastppo.envs import Tools, calculator
from fastppo.errors import TrainingError
from fastppo.run_folder import read_metrics
from tests.envs.worlds import Talk, threads
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a, tiny_config


def make(
    output_dir,
    environment=Talk,
    *,
    reward=None,
    prompts=PROMPTS,
    eval_prompts=None,
    tokenizer=None,
    model=None,
    **changes,
) -> PPOTrainer:
    config = tiny_config(output_dir, **changes)
    return PPOTrainer(
        model or make_model(max_position_embeddings=128),
        reward=reward,
        environment=environment,
        prompts=prompts,
        eval_prompts=eval_prompts,
        config=config,
        tokenizer=tokenizer or make_tokenizer(),
        reporter=Reporter(config.total_steps, quiet=True),
    )


def test_a_run_records_its_episodes(tmp_path):
    trainer = make(tmp_path, eval_prompts=["ab", "c"])
    trainer.train()
    rows = read_metrics(tmp_path)
    assert rows[0]["eval/scores"] >= 3 and rows[0]["eval/failures"] == 0 and rows[0]["eval/turns"] == 3
    for row in rows[1:]:
        assert row["environment/turns"] == 3 and row["environment/truncated_ratio"] == 0
        assert row["environment/return"] == pytest.approx(row["objective/scores"])
        assert row["rewards/environment/mean"] == pytest.approx(row["environment/return"])
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["turns"]) == 3 and sample["error"] is None
    assert sum(turn["reward"] for turn in sample["turns"]) == sample["score"]
    said = "".join(turn["completion"] for turn in sample["turns"])
    assert "".join(sample["tokens"]).replace("<eos>", "").replace("<pad>", "") == said
    assert len(sample["advantages"]) == len(sample["values"]) == len(sample["tokens"])


def test_a_reward_beside_the_environment_is_added(tmp_path):
    trainer = make(tmp_path, reward=count_a)
    trainer.train()
    for row in read_metrics(tmp_path)[1:]:
        parts = row["rewards/environment/mean"] + row["rewards/count_a/mean"]
        assert row["objective/scores"] == pytest.approx(parts)


@pytest.mark.parametrize("critic", ["lora", "shared"])
def test_adapters_learn_from_episodes(tmp_path, critic):
    """On the trunk as it is; what was sampled over several turns has the log-probs that scoring with adapters computes, to the last bit."""
    pytest.importorskip("peft", reason="pip install fastppo[lora]")
    settings = {"lora__r": 4, "critic__kind": critic, "reward__kl_coef": 0.05, "rollout__recompute_logprobs": "always"}
    trainer = make(tmp_path, total_steps=3, **settings)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    for row in read_metrics(tmp_path):
        assert row["environment/turns"] == 3 and row["rollout/logprob_diff_max"] == 0
    assert read_metrics(tmp_path)[-1]["objective/kl"] != 0


def test_somebody_has_to_pay(tmp_path):
    for environment in (None, Tools(calculator)):
        with pytest.raises(ValueError, match="reward: None pays nothing, expected a function, or an environment"):
            make(tmp_path, environment=environment)


def test_what_cannot_be_rendered_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="environment: tools need prompts that a chat template renders"):
        make(tmp_path, environment=Tools(calculator), reward=count_a)
    tokenizer = make_tokenizer()
    last = "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}"  # forgets what the assistant said
    tokenizer.chat_template = "{% for m in messages %}" + last + "{% endfor %}"
    with pytest.raises(ValueError, match="environment: the chat template of .* rewrites an earlier turn"):
        make(tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_on_its_own_leaves_no_environment(tmp_path):
    trainer = make(tmp_path, eval_prompts=["ab", "c"])
    assert trainer.evaluate()["eval/scores"] >= 3
    assert not threads()


def test_reward_functions_are_given_what_the_policy_said(tmp_path):
    """Texts: its turns alone. Conversations: all messages."""
    given = []

    def reward(prompts, completions):
        given.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    make(tmp_path / "texts", reward=reward, total_steps=1).train()
    assert all(isinstance(text, str) and text.count("\n") == 2 for _, text in given)
    given.clear()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]

    class Messages(Talk):
        def reset(self, row, seed):
            super().reset({"prompt": ""}, seed)

    make(tmp_path / "messages", Messages, reward=reward, prompts=prompts, tokenizer=tokenizer, total_steps=1).train()
    for _, messages in given:
        assert [message["role"] for message in messages] == ["assistant", "user"] * 3


class Fragile(Talk):
    """Fails in episodes that begin with one of some letters."""

    letters = ""

    def reset(self, row, seed):
        observation = super().reset(row, seed)
        self.fails = observation[-1] in self.letters
        return observation

    def step(self, completion):
        if self.fails:
            raise ConnectionError("the server is gone")
        return super().step(completion)


def test_invalid_episodes_are_left_out_and_counted(tmp_path):
    environment = type("Some", (Fragile,), {"letters": LETTERS[:4]})
    trainer = make(tmp_path, environment, rollout__prompts_per_step=16, reward__max_failure_rate=0.9)
    trainer.train()
    rates = [row["environment/failure_rate"] for row in read_metrics(tmp_path)[1:]]
    assert any(rates) and all(
        row["rewards/failures"] == 16 * rate for row, rate in zip(read_metrics(tmp_path)[1:], rates, strict=True)
    )


def test_too_many_invalid_episodes_end_the_run_with_the_reason(tmp_path):
    environment = type("All", (Fragile,), {"letters": LETTERS})
    with pytest.raises(
        TrainingError, match="8 of 8 episodes are invalid: step failed: ConnectionError: the server is gone"
    ):
        make(tmp_path, environment).train()
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["error"].startswith("step failed")


class Dying:
    """Ends the process's run at the n-th update."""

    def __init__(self, monkeypatch, trainer, nth):
        original, calls = trainer.algorithm.update, []

        def update(*args, **kwargs):
            calls.append(1)
            if len(calls) == nth:
                raise RuntimeError("power cut")
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer.algorithm, "update", update)


SETTINGS = {"total_steps": 3, "checkpoint__every": 1, "rollout__samples_per_prompt": 2, "environment__max_turns": 2}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_run_that_broke_off_goes_on_bit_for_bit(tmp_path, monkeypatch, critic):
    settings = SETTINGS | {"critic__kind": critic}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    broken = make(tmp_path / "broken", **settings)
    Dying(monkeypatch, broken, 2)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = make(tmp_path / "broken", **settings)
    resumed.train(resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage__estimator": "grpo", "rollout__samples_per_prompt": 4},
        {"advantage__estimator": "remax"},
        {"rollout__dynamic_sampling": True, "rollout__samples_per_prompt": 4, "rollout__prompts_per_step": 4},
        {
            "reward__kl_coef": 0.1,
            "reward__whiten": True,
            "advantage__bootstrap_truncated": True,
            "environment__max_turns": 2,
        },
        {"algorithm": "trpo", "reward__missing_eos_penalty": 1.0, "environment__max_turns": 2},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_every_algorithm_takes_episodes(tmp_path, changes):
    metrics = make(tmp_path, **{"total_steps": 1} | changes).train()
    assert metrics["environment/turns"] >= 2


@pytest.mark.parametrize("seed", [0, 1])
def test_chance_of_an_environment_comes_from_the_runs_seed(tmp_path, seed):
    seeds = []

    class Told(Talk):
        def reset(self, row, seed):
            seeds.append(seed)
            return super().reset(row, seed)

    random.seed(seed)  # nobody's chance but the run's counts
    make(tmp_path, Told, total_steps=2).train()
    first = sorted(seeds)
    seeds.clear()
    make(tmp_path / "again", Told, total_steps=2).train()
    assert sorted(seeds) == first and len(set(seeds)) == 16
