"""Environments of a few lines, and what plays them."""

from __future__ import annotations

import random
import threading

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import Dialogue, EpisodePlayer, Played
from fastppo.rollout import Engine, SamplingParams, Session
from tests.tiny import LETTERS, make_model, make_tokenizer

TURNS = 3
ROWS = [{"prompt": text, "level": len(text)} for text in ("ab", "cde", "f", "ghijk")]
SAMPLING = SamplingParams(n=2, max_new_tokens=5, seed=3)


class Talk:
    """Answers with letters that depend on the seed and on all that was said; pays for the letter a; ends after three turns."""

    def reset(self, row, seed):
        self.random, self.said = random.Random(seed), []
        return row["prompt"] + self.random.choice(LETTERS)

    def step(self, completion):
        self.said.append(completion)
        draws = random.Random(f"{self.said}{self.random.random()}")
        observation = "".join(draws.choices(LETTERS, k=draws.randrange(4)))
        return observation, completion.count("a") + 1.0, len(self.said) == TURNS, False, {}


def make_engine(**changes) -> Engine:
    model = make_model(max_position_embeddings=256)
    return Engine(model, make_tokenizer(), **{"max_batch_size": 4} | changes)


def rows_of(tokenizer, rows=ROWS) -> list[dict]:
    return [row | {"prompt_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]


def play(factory, engine=None, *, rows=ROWS, sampling=SAMPLING, player=None, check=lambda *_: None, **config) -> Played:
    """Episodes of a player that is closed afterwards, unless one is given."""
    engine = engine or make_engine()
    used = player or EpisodePlayer(factory, engine, EnvironmentConfig(**config))
    try:
        return used.play(rows_of(engine.tokenizer, rows), sampling, Dialogue(engine.tokenizer, None), check=check)
    finally:
        if player is None:
            used.close()


def watch_pages(monkeypatch) -> None:
    """From now on every page is free when a session is over."""
    leave = Session.__exit__

    def checked(session, *exception):
        pool = session._generation.admission.pool
        if exception[0] is None:
            assert pool.available == pool.pages
        leave(session, *exception)

    monkeypatch.setattr(Session, "__exit__", checked)


def threads() -> list[threading.Thread]:
    """Those of environments."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastppo environment")]
