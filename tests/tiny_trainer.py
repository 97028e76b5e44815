"""A trainer of a tiny model."""

from __future__ import annotations

from fastppo import PPOConfig, PPOTrainer
from fastppo.console import Reporter
from tests.tiny import make_model, make_tokenizer, ppo_config


def count_a(prompts, completions, **_):
    """Share of the letter a."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def tiny_config(output_dir, **changes) -> PPOConfig:
    settings = {
        "output_dir": str(output_dir),
        "total_steps": 2,
        "rollout__prompts_per_step": 8,
        "rollout__max_new_tokens": 6,
        "learner__num_minibatches": 2,
        "learner__epochs": 1,
        "optimizer__lr": 1e-3,
        "critic__lr": 1e-3,
        "reward__timeout": None,
        "device": "cpu",
    }
    return ppo_config(**settings | changes)


PROMPTS = ["ab", "cde", "f", "ghijk", "lm", "nop", "ba", "dc"]


def build_trainer(
    output_dir, *, reward=count_a, model=None, prompts=PROMPTS, eval_prompts=None, callbacks=(), **changes
) -> PPOTrainer:
    """`changes` of the settings are written as `ppo_config` takes them."""
    config = tiny_config(output_dir, **changes)
    return PPOTrainer(
        make_model() if model is None else model,
        reward=reward,
        prompts=prompts,
        eval_prompts=eval_prompts,
        callbacks=callbacks,
        config=config,
        tokenizer=make_tokenizer(),
        reporter=Reporter(config.total_steps, quiet=True),
    )
