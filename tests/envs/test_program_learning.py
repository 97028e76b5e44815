"""PPO learns in the hands of a program: a function of two turns, and a command in a process of its own."""

from __future__ import annotations

import sys
import textwrap

import pytest

from fastppo import PPOTrainer
from fastppo.console import Reporter
from fastppo.envs import AgentProgram
from fastppo.run_folder import read_metrics
from tests.serve.client import ask, said
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import tiny_config

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytestmark = pytest.mark.slow

LETTERS = "abcd"
TEMPLATE = (
    "{% for m in messages %}{{ '?' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}?{% endif %}"
)


def learn(tmp_path, program, **changes) -> tuple[float, float]:
    """Mean reward of the first step, and of the last three."""
    settings = {
        "rollout__max_new_tokens": 1,
        "optimizer__lr": 5e-3,
        "critic__lr": 5e-3,
        "learner__epochs": 4,
        "optimizer__schedule": "linear",
    }
    config = tiny_config(tmp_path / "run", **settings | changes)
    tokenizer = make_tokenizer(LETTERS + "?!")
    tokenizer.chat_template = TEMPLATE
    trainer = PPOTrainer(
        make_model(seed=config.seed, vocab_size=len(tokenizer)),
        environment=AgentProgram(program),
        prompts=list(LETTERS),
        config=config,
        tokenizer=tokenizer,
        reporter=Reporter(config.total_steps, quiet=True),
    )
    trainer.train()
    returns = [row["environment/return"] for row in read_metrics(tmp_path / "run")]
    assert len(returns) == config.total_steps
    return returns[0], sum(returns[-3:]) / 3


def remembers(row, base_url, api_key):
    """Is paid when the policy repeats the letter, now and one turn later."""
    talk = [{"role": "user", "content": row["prompt"]}]
    talk.append(said(ask(base_url, api_key, talk)))
    talk.append({"role": "user", "content": "!"})
    found = [talk[1]["content"], said(ask(base_url, api_key, talk))["content"]]
    return sum(text == row["prompt"] for text in found) / 2


@pytest.mark.parametrize("lr", [5e-3, 0.0], ids=["", "control: learning rate 0"])
def test_a_function(tmp_path, lr):
    size = {"total_steps": 20 if lr else 3, "rollout__prompts_per_step": 48, "optimizer__lr": lr}
    first, last = learn(tmp_path, remembers, **size)
    assert first < 0.35
    assert last > 0.85 if lr else last < 0.35


COMMAND = """
    import json, os, sys
    sys.path.insert(0, {root!r})
    from tests.serve.client import ask, said

    row = json.load(sys.stdin)
    answer = ask(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], row["prompt"])
    print(float(said(answer)["content"] == "a"))
"""


@pytest.mark.parametrize("lr", [2e-2, 0.0], ids=["", "control: learning rate 0"])
def test_a_command(tmp_path, request, lr):
    agent = tmp_path / "agent.py"
    agent.write_text(textwrap.dedent(COMMAND).format(root=str(request.config.rootpath)))
    size = {"total_steps": 7 if lr else 3, "rollout__prompts_per_step": 16, "environment__concurrent": 4}
    first, last = learn(tmp_path, [sys.executable, "-S", str(agent)], **size, optimizer__lr=lr)
    assert first < 0.4
    assert last > 0.8 if lr else last < 0.4
