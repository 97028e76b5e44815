"""PPO learns over turns: a tool that is needed is used, and credit for a number crosses the turns that follow it."""

from __future__ import annotations

import random

import pytest

from fastppo import PPOTrainer
from fastppo.console import Reporter
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import tiny_config

pytestmark = pytest.mark.slow

SETTINGS = {
    "total_steps": 30,
    "rollout__prompts_per_step": 64,
    "rollout__batch_size": 64,
    "rollout__samples_per_prompt": 2,
    "optimizer__lr": 3e-3,
    "critic__lr": 3e-3,
    "learner__num_minibatches": 4,
    "learner__epochs": 2,
    "optimizer__schedule": "linear",
}


def learn(tmp_path, tokenizer, environment, prompts, success, reward=None, **changes) -> tuple[float, float]:
    """What `success` holds of the first step's episodes, and of the last three steps'."""
    config = tiny_config(tmp_path, **SETTINGS | changes)
    trainer = PPOTrainer(
        make_model(seed=config.seed, vocab_size=len(tokenizer), max_position_embeddings=64),
        environment=environment,
        reward=reward,
        prompts=prompts,
        config=config,
        tokenizer=tokenizer,
        reporter=Reporter(config.total_steps, quiet=True),
    )
    trainer.train()
    size = len(success) // config.total_steps
    last = success[-3 * size :]
    return sum(success[:size]) / size, sum(last) / len(last)


# A secret that only a tool knows

SECRETS = "abcd"
PROMPTS = [{"prompt": "?", "secret": secret} for secret in SECRETS]


def tool_tokenizer():
    tokenizer = make_tokenizer(SECRETS + "[?!")
    messages = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    tokenizer.chat_template = "{% if tools %}!{% endif %}" + messages
    tokenizer.response_template = {
        "start_anchor": "!",
        "fields": {
            "tool_calls": {
                "open": "[",
                "close": "<eos>",
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": {"name": "look", "arguments": {"where": "{content}"}}},
            },
            "content": {"content": "text"},
        },
    }
    return tokenizer


class Safe:
    """Tells its secret to who looks; looking is worth something by itself."""

    tells = True

    def reset(self, secret, **columns):
        self.secret, self.looked = secret, False

    def look(self, where: str) -> str:
        """
        Looks into the safe.

        Args:
            where: Anything.
        """
        self.looked = True
        return self.secret if self.tells else random.choice(SECRETS)

    def get_reward(self) -> float:
        return 0.3 * self.looked


@pytest.mark.parametrize("tells", [True, False], ids=["tells", "control: a tool that knows nothing"])
def test_a_tool_that_is_needed_is_used(tmp_path, tells):
    found = []

    def says_the_secret(prompts, completions, secret):
        right = [float(text.split("\n")[-1][:1] == own) for text, own in zip(completions, secret, strict=True)]
        found.extend(right)
        return right

    changes = {"rollout__max_new_tokens": 2, "environment__max_turns": 2, "advantage__gae_lambda": 1.0}
    world = type("Safe", (Safe,), {"tells": tells})
    first, last = learn(tmp_path, tool_tokenizer(), world, PROMPTS, found, says_the_secret, **changes)
    assert first < 0.25
    assert last > 0.9 if tells else last < 0.45


# A number that is paid for two turns later

NUMBERS = "0123"


class FirstNumber:
    """Three turns of one token; the first is to be the prompt's number, and the last is paid for it."""

    found: list[float]

    def reset(self, row):
        self.wanted, self.said = row["prompt"], []

    def step(self, completion):
        self.said.append(completion)
        over = len(self.said) == 3
        right = float(self.said[0] == self.wanted)
        if over:
            self.found.append(right)
        return "=", right * over, over, False, {}


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({"advantage__gae_lambda": 1.0}, True),
        ({"advantage__gae_lambda": 0.0}, False),
        ({"advantage__gae_lambda": 1.0, "optimizer__lr": 0.0}, False),
    ],
    ids=["lambda 1", "lambda 0", "control: learning rate 0"],
)
def test_lambda_carries_credit_over_turns(tmp_path, changes, learns):
    tokenizer = make_tokenizer(NUMBERS + "=")
    found: list[float] = []
    world = type("FirstNumber", (FirstNumber,), {"found": found})
    changes = {"rollout__max_new_tokens": 1} | changes
    first, last = learn(tmp_path, tokenizer, world, list(NUMBERS), found, **changes)
    assert first < 0.3
    assert last > 0.9 if learns else last < 0.6
