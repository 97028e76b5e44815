"""What one slow environment costs the others: `python -m fastppo.bench.environments`.

64 episodes of a small Qwen2 with 6 turns of 16 tokens each, on the CPU. One environment takes a second for each answer. Shown are the tokens a second
of the other 63 until the last of them has ended: with nobody slow, with the slow one, and with the slow one where each turn waits for everybody's
(lockstep, as in a loop that steps all environments together).
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastppo.bench.record import cpu_model
from fastppo.bench.rollout_workload import make_model
from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import Dialogue, EpisodePlayer
from fastppo.rollout import Engine, SamplingParams

EPISODES, TURNS, NEW_TOKENS, SLOW_SECONDS = 64, 6, 16, 1.0
MODEL = (256, 4)  # hidden size, layers
ROUNDS = 3
PROMPT, REPLY = list(range(1000, 1024)), list(range(2000, 2008))


class Ids(Dialogue):
    """Token ids without texts: tokenizers are not what is measured."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def prompt(self, row: Mapping[str, Any], observation: Any, tools: Any = ()) -> list[int]:
        return row["prompt_ids"]

    def said(self, tokens: Sequence[int]) -> str:
        return ""

    def reply(self, row: Mapping[str, Any], last: int, observation: Any) -> list[int]:
        return REPLY


class World:
    """Answers at once, but for the slow one; `meeting` is where all wait for each other, or None."""

    meeting: threading.Barrier | None = None
    ended: list[float] = []
    slow_seconds = 0.0

    def reset(self, row: Mapping[str, Any]) -> None:
        self.slow, self.turns = row["slow"], 0

    def step(self, completion: str) -> tuple[None, float, bool, bool, dict]:
        self.turns += 1
        if self.slow:
            time.sleep(self.slow_seconds)
        if self.meeting is not None:
            self.meeting.wait()
        if self.turns == TURNS and not self.slow:
            self.ended.append(time.perf_counter())
        return None, 0.0, self.turns == TURNS, False, {}


def tokens_per_second(engine: Engine, *, slow_seconds: float, lockstep: bool) -> float:
    """Of all episodes but the slow one, until the last of them has ended."""
    meeting = threading.Barrier(EPISODES) if lockstep else None
    kind = type("World", (World,), {"meeting": meeting, "ended": [], "slow_seconds": slow_seconds})
    rows = [{"prompt_ids": PROMPT, "slow": i == 0} for i in range(EPISODES)]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
    player = EpisodePlayer(kind, engine, EnvironmentConfig(max_tokens=256, concurrent=EPISODES))
    start = time.perf_counter()
    played = player.play(rows, sampling, Ids())
    player.close()
    assert not any(episode.error for episode in played.episodes)
    return (EPISODES - 1) * TURNS * NEW_TOKENS / (max(kind.ended) - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastppo.bench.environments", description=__doc__)
    parser.add_argument("--slow-seconds", type=float, default=SLOW_SECONDS, help="of each answer of the slow one")
    slow = parser.parse_args(arguments).slow_seconds
    engine = Engine(make_model(*MODEL), max_batch_size=EPISODES)
    cases = {
        "nobody is slow": dict(slow_seconds=0.0, lockstep=False),
        "one is slow": dict(slow_seconds=slow, lockstep=False),
        "one is slow, in lockstep": dict(slow_seconds=slow, lockstep=True),
    }
    tokens_per_second(engine, slow_seconds=0.0, lockstep=False)  # warm
    found = {name: 0.0 for name in cases}
    for _ in range(ROUNDS):
        for name, options in cases.items():
            found[name] = max(found[name], tokens_per_second(engine, **options))
    hidden, layers = MODEL
    print(
        f"{cpu_model()}, {torch.get_num_threads()} threads, fp32; H = {hidden}, {layers} layers, {EPISODES} episodes of {TURNS} turns of "
        f"{NEW_TOKENS} tokens, {slow:g} s for each answer of the slow one, best of {ROUNDS}\n"
    )
    print(f"| | tokens a second of the other {EPISODES - 1} |\n|---|---:|")
    for name, rate in found.items():
        print(f"| {name} | {rate:,.0f} |")


if __name__ == "__main__":
    main()
