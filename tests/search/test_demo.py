"""On the demo's task, with numbers of two digits: the searches by the critic solve far more than votes on as many tokens of samples, and to learn
from what they find lifts the samples too."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastppo import PPOTrainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    """examples/search.py, made small; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("arithmetic", "search"):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        small = {"DIGITS": 2, "IMITATION_EPOCHS": 6, "HELD_OUT": 64, "TRAIN": 1500, "CRITIC_STEPS": 10, "SOLUTION": 21}
        small |= {"ROUND": 128}
        for setting, value in small.items():
            if hasattr(module, setting):
                monkeypatch.setattr(module, setting, value)
    yield module
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_search_beats_as_many_tokens_of_samples_and_teaches_to_sample(demo, tmp_path, monkeypatch):
    """The control is the same round with samples that were drawn by lot."""
    output, before, made = tmp_path / "run", tmp_path / "before", []

    def train_critic(*arguments, make=demo.train_critic):
        made.append(make(*arguments))
        shutil.copytree(output, before)
        return made[0]

    def distil(trainer, make=demo.distil):
        made.append(make(trainer))
        return made[1]

    monkeypatch.setattr(demo, "train_critic", train_critic)
    monkeypatch.setattr(demo, "distil", distil)
    solved = demo.main(["--output", str(output)])
    sampled = max(solved["one sample"], solved["majority of 8"])
    assert min(solved["value-guided"], solved["PUCT"], solved["best of 8 by the critic"]) > sampled + 0.2
    assert solved[demo.AFTER] > solved["one sample"] + 0.2

    (_, held_out), expert = made
    changes = {"output_dir": str(before), "search": {"kind": "best-of-n"}, "reward": {"timeout": None}}
    config = replace(expert.config, rollout=replace(expert.config.rollout, samples_per_prompt=2), **changes)
    control = PPOTrainer(expert.model, reward=lot, prompts=expert.prompts, config=config, tokenizer=expert.tokenizer)
    assert control.train(resume=True)["search/kept"] > 0.5, "it has something to imitate"
    found = demo.searches(control, held_out, 0)["one sample"]()
    texts = control.tokenizer.batch_decode([answer.completion for answer in found], skip_special_tokens=True)
    right = demo.right_answer([], texts, [row["answer"] for row in held_out])
    assert sum(right) / len(right) < solved["one sample"] + 0.1


def lot(prompts, completions, **_):
    drawn = random.Random(0)
    return [float(drawn.random() < 0.5) for _ in completions]
