"""Peak memory of a PPO step on the CPU: all weights or LoRA adapters, activations kept or computed again, a small or a large vocabulary.

`python -m fastppo.bench.step_memory` prints a Markdown table. Each row is measured in a process of its own, forked before anything was computed:
networks are made and two steps taken, of which the second finds the optimizers' moments there. A peak is that of the pages really touched
(VmHWM), less what the process held after a tiny step, before the networks: weights, gradients, moments, keys and values, activations. What is
larger than 1 MiB is given back to the system when it is free (M_MMAP_THRESHOLD): glibc's heap may hold on to more. Its free pages are given
back first, those too that the process which forks has left there.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastppo import PPOConfig
from fastppo.algorithms.ppo import PPO
from fastppo.bench.memory import CLEAR_REFS, RESET_HIGH_WATER_MARK, in_a_child, status_bytes, trim_heap
from fastppo.learner import Learner
from fastppo.lora_config import LoRAConfig
from fastppo.model import prepare_model
from fastppo.model.adapters import add_adapters
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, SamplingParams

MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # malloc.h
CONFIG = PPOConfig(reward={"kl_coef": 0.05}, learner={"epochs": 1, "num_minibatches": 2})
LORA = replace(CONFIG, lora=LoRAConfig(r=16), critic=replace(CONFIG.critic, kind="lora"))
SMALL, LARGE = 1 << 10, 1 << 17


class Row(NamedTuple):
    name: str
    config: PPOConfig
    vocabulary: int = 4096
    hidden: int = 384
    layers: int = 8
    prompts: int = 16
    new_tokens: int = 24
    tied: bool = True

    def model(self) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": self.hidden, "intermediate_size": 4 * self.hidden, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": self.tied}
        ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
        return Qwen2ForCausalLM(
            Qwen2Config(vocab_size=self.vocabulary, max_position_embeddings=1024, **sizes, **heads, **ids)
        )


def checkpointing(config: PPOConfig) -> PPOConfig:
    return replace(config, learner=replace(config.learner, gradient_checkpointing=True))


SHARED = replace(CONFIG, critic=replace(CONFIG.critic, kind="shared"))
LONG = {"hidden": 128, "layers": 8, "prompts": 32, "new_tokens": 96}  # where activations are most of a step
WIDE = {"hidden": 256, "layers": 2, "prompts": 16, "new_tokens": 24}  # where the head is
ROWS = (
    Row("all weights of policy and critic, and a reference", CONFIG),
    Row("LoRA, r = 16: policy, critic and reference on one trunk", LORA),
    Row("many tokens, shared trunk", SHARED, **LONG),
    Row("the same with gradient checkpointing", checkpointing(SHARED), **LONG),
    Row("many tokens, LoRA", LORA, **LONG),
    Row("the same with gradient checkpointing", checkpointing(LORA), **LONG),
    Row(f"shared trunk, vocabulary of {SMALL}", SHARED, SMALL, **WIDE),
    Row(f"shared trunk, vocabulary of {LARGE}", SHARED, LARGE, **WIDE),
)


def networks(row: Row) -> Roles:
    """Policy, critic and reference."""
    model, config = prepare_model(row.model()), row.config
    adapters = add_adapters(model, config.lora, seed=0) if config.lora.r else None
    options: dict[str, Any] = {
        "critic": config.critic.kind,
        "gradient_checkpointing": config.learner.gradient_checkpointing,
    }
    return Roles(model, with_reference=True, adapters=adapters, **options)


def step_peaks(row: Row, given_back: int = MIB) -> list[int]:
    """Bytes: peak of the rollout, and of scoring and updates. given_back: what is larger goes back to the system when it is free."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, given_back)
    two_steps(row._replace(vocabulary=64, hidden=32, layers=1, prompts=2, new_tokens=2))  # loads code
    trim_heap()
    before = status_bytes("VmRSS")
    return [peak - before for peak in two_steps(row)]


def two_steps(row: Row) -> list[int]:
    """Peaks of the process in the second of two steps."""
    roles, algorithm, config = networks(row), PPO(row.config), row.config
    engine = Engine(roles.policy, max_batch_size=row.prompts)
    sections = {"optimizer": config.optimizer, "critic": config.critic, "config": config.learner}
    learner = Learner(roles, **sections, total_steps=2)
    prompts = [[2 + n % 13] * 8 for n in range(row.prompts)]
    for step in range(2):
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK)
        sampling = SamplingParams(max_new_tokens=row.new_tokens, min_new_tokens=row.new_tokens, seed=step)
        rollout = engine.generate(prompts, sampling, value_head=roles.value_head)
        peaks = [status_bytes("VmHWM")]
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK)
        scores = Scores(torch.randn(row.prompts), {})
        evaluation, plan = learner.evaluate(rollout, algorithm.needs, learner.plan(rollout, seed=step))
        algorithm.update(learner, rollout, evaluation, algorithm.credit(rollout, evaluation, scores), plan)
        peaks.append(status_bytes("VmHWM"))
    return peaks


def table() -> Iterator[str]:
    yield "| step | parameters | rollout, MiB | scoring and updates, MiB |"
    yield "|---|---:|---:|---:|"
    for row in ROWS:
        found = in_a_child(partial(step_peaks, row))
        parameters = sum(p.numel() for p in row.model().parameters())
        peaks = [str(found), ""] if isinstance(found, str) else [f"{peak / MIB:.0f}" for peak in found]
        yield f"| {row.name} | {parameters / 1e6:.1f} M | {' | '.join(peaks)} |"


def main() -> None:
    importlib.import_module("peft")  # before the fork, so that no row pays for it
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
