"""What sampling beside the update gains in a PPO step on the CPU: where both compute, and where an environment lets sampling wait.

`python -m fastppo.bench.overlap_step` prints a Markdown table, and `--json FILE` writes the figures. Seconds are the best of the steps after the
first two, of runs that take turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastppo import PPOConfig, PPOTrainer
from fastppo.bench.rollout_workload import make_model
from fastppo.console import Reporter
from fastppo.run_folder import read_metrics

HIDDEN, LAYERS, PROMPTS, NEW, STEPS, ROUNDS, WAIT = 256, 4, 32, 32, 5, 3, 1.0


class Slow:
    """Answers `WAIT` seconds after the policy has spoken."""

    def reset(self, row: dict[str, Any]) -> str:
        return row["prompt"]

    def step(self, completion: str) -> tuple[str, float, bool, bool, dict]:
        time.sleep(WAIT)
        return "", float(len(completion) % 7), True, False, {}


class Side(NamedTuple):
    threads: int
    waits: bool
    staleness: int

    def best_step(self) -> dict[str, float]:
        """The metrics of the fastest step."""
        torch.set_num_threads(self.threads)
        rollout = {"prompts_per_step": PROMPTS, "max_new_tokens": NEW, "min_new_tokens": NEW}
        with tempfile.TemporaryDirectory() as folder:
            config = PPOConfig(
                output_dir=folder,
                total_steps=STEPS,
                device="cpu",
                rollout=rollout | {"staleness": self.staleness},
                reward={"timeout": None},
                checkpoint={"every": 0},
            )
            pays = {"environment": Slow} if self.waits else {"reward": _length}
            trainer = PPOTrainer(
                make_model.__wrapped__(HIDDEN, LAYERS),
                prompts=[f"{i} {i + 1} {i + 2}" for i in range(PROMPTS)],
                config=config,
                tokenizer=_tokenizer(),
                reporter=Reporter(STEPS, quiet=True),
                **pays,
            )
            trainer.train()
            return min(read_metrics(folder)[2:], key=lambda row: row["time/step"])


def _length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<eos>": 0} | {str(i): i + 1 for i in range(3999)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sides = [Side(threads, waits, stale) for waits in (False, True) for threads in (1, 2) for stale in (0, 1)]
    found: dict[Side, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for side in sides:
            step = side.best_step()
            if side not in found or step["time/step"] < found[side]["time/step"]:
                found[side] = step
    print(f"H = {HIDDEN}, {LAYERS} layers, {PROMPTS} prompts, {NEW} new tokens; an environment waits {WAIT} s\n")
    print(
        "| sampling waits | threads | in turn, s | side by side, s | of which both ran, s |\n|---|---:|---:|---:|---:|"
    )
    for side in sides[::2]:
        fresh, stale = found[side]["time/step"], found[side._replace(staleness=1)]
        both = stale["time/overlap"]
        print(f"| {side.waits} | {side.threads} | {fresh:.2f} | {stale['time/step']:.2f} | {both:.2f} |")
    if arguments.json:
        rows = [side._asdict() | {name: x for name, x in found[side].items() if name[:5] == "time/"} for side in sides]
        arguments.json.write_text(json.dumps({"steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
