"""BLEU as the reward, on real sentence pairs: a model that half knows its German learns the rest, and only from the score."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import PPOTrainer
from fastppo.console import Reporter
from fastppo.rewards import bleu
from tests.tiny import make_model
from tests.tiny_trainer import tiny_config

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data" / "translations.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
LONGEST = 12
WARM_UP = 30  # epochs of teaching; after twice as many it knows nearly all of the sentences


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for row in ROWS for text in row.values() for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "=", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def half_taught(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Has seen the pairs too seldom to know them: it knows how German sentences go, and often says another one."""
    model = make_model(seed, vocab_size=len(tokenizer))
    texts = [f"{row['prompt']} = {row['references']} <eos>" for row in ROWS]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(WARM_UP):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def dealt_to_the_wrong_samples(completions, references):
    scores = bleu(completions, references)
    random.Random(0).shuffle(scores)
    return scores


def learn(tmp_path, reward=bleu, seed=0, **changes) -> tuple[float, float]:
    """Mean BLEU in the first step and over the last three."""
    found = []

    def recording(completions, references):
        scores = bleu(completions, references)
        found.append(sum(scores) / len(scores))
        return reward(completions, references)

    tokenizer = make_word_tokenizer()
    settings = {
        "total_steps": 30,
        "rollout__prompts_per_step": len(ROWS),
        "rollout__samples_per_prompt": 4,
        "rollout__batch_size": 256,
        "rollout__max_new_tokens": LONGEST,
        "optimizer__lr": 2e-3,
        "optimizer__schedule": "linear",
        "critic__lr": 2e-3,
        "learner__epochs": 4,
    }
    config = tiny_config(tmp_path / "run", seed=seed, **settings | changes)
    rows = [row | {"prompt": f"{row['prompt']} ="} for row in ROWS]
    PPOTrainer(
        half_taught(tokenizer, seed),
        reward=recording,
        prompts=rows,
        config=config,
        tokenizer=tokenizer,
        reporter=Reporter(config.total_steps, quiet=True),
    ).train()
    return found[0], sum(found[-3:]) / 3


@pytest.mark.slow
def test_ppo_learns_to_translate(tmp_path):
    first, last = learn(tmp_path)
    assert first < 0.3
    assert last > 0.42


@pytest.mark.slow
def test_nothing_is_learned_at_learning_rate_zero(tmp_path):
    first, last = learn(tmp_path, optimizer__lr=0.0, critic__lr=0.0, total_steps=4)
    assert first < 0.3 and last < 0.3


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_scores(tmp_path):
    first, last = learn(tmp_path, reward=dealt_to_the_wrong_samples, total_steps=12)
    assert first < 0.3 and last < 0.3
