"""Difficulty pools in a run: what is solved is what the rewards say, and steps have more prompts to learn from."""

from __future__ import annotations

import pytest
import torch

from fastppo.rewards import WeightedReward
from fastppo.run_folder import read_metrics
from tests.tiny_trainer import PROMPTS, count_a

SETTINGS = {"rollout__samples_per_prompt": 4, "rollout__prompts_per_step": 4, "difficulty__min_samples": 4}
ON = SETTINGS | {"difficulty__easy_weight": 0.1, "difficulty__hard_weight": 0.1}


def graded(prompts, completions, **_):
    """Of the eight prompts, four are never solved, two always, two by every other completion."""
    kinds = {prompt: index % 4 for index, prompt in enumerate(PROMPTS)}
    scores = {0: lambda i: 0.0, 1: lambda i: 0.0, 2: lambda i: 1.0, 3: lambda i: float(i % 2)}
    return [scores[kinds.get(prompt, 0)](i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("seed", range(3))
def test_steps_have_more_prompts_with_signal(make_trainer, tmp_path, seed):
    """A quarter of the prompts; of those that are drawn 2 / (2 + 6 * 0.1) = 77 % where the others have a weight of 0.1."""
    shares = {}
    for name, settings in (("on", ON), ("off", SETTINGS)):
        trainer = make_trainer(graded, output_dir=tmp_path / name, total_steps=24, seed=seed, **settings)
        seen, credit = [], trainer.algorithm.credit

        def recording(rollout, evaluation, scores, seen=seen, credit=credit):
            seen.append(scores.values.reshape(4, 4))
            return credit(rollout, evaluation, scores)

        trainer.algorithm.credit = recording
        trainer.train()
        groups = torch.cat(seen[4:])  # two epochs have judged every prompt
        shares[name] = (groups.amax(1) != groups.amin(1)).float().mean().item()
    assert shares["off"] == 0.25 and shares["on"] > 0.5
    rows = read_metrics(tmp_path / "on")
    pools = {"difficulty/easy": 0.25, "difficulty/mid": 0.25, "difficulty/hard": 0.5}
    assert {name: rows[-1][name] for name in pools} == pools
    assert not any(name.startswith("difficulty/") for name in read_metrics(tmp_path / "off")[-1])


def test_dynamic_sampling_tells_the_pools_of_what_it_leaves_out(make_trainer, tmp_path):
    trainer = make_trainer(graded, total_steps=3, rollout__dynamic_sampling=True, **ON)
    trainer.train()
    rows = read_metrics(tmp_path / "run")
    assert (
        rows[-1]["difficulty/hard"] == 0.5 and rows[0]["rollout/sampling_rounds"] > rows[-1]["rollout/sampling_rounds"]
    )


def test_other_prompts_begin_anew(make_trainer, tmp_path):
    make_trainer(graded, total_steps=3, **ON).train()
    resumed = make_trainer(graded, total_steps=4, prompts=[*PROMPTS[:-1], "a"], **ON)
    resumed.train(resume=True)
    assert sum(read_metrics(tmp_path / "run")[-1][f"difficulty/{pool}"] for pool in ("easy", "mid", "hard")) <= 0.5


def test_a_reward_that_is_normalised_is_refused(make_trainer):
    with pytest.raises(ValueError, match="difficulty.easy_weight or hard_weight is below 1.*normalised"):
        make_trainer(WeightedReward(count_a, normalise=True), **ON)
