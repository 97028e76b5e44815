"""An OpenEnv server on loopback: `python openenv_server.py`, which prints its port."""

from __future__ import annotations

import os
import socket
import time

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Said(Action):
    message: str


class Heard(Observation):
    text: str


class Mirror(Environment):
    """Says everything backwards, pays for each letter a, and ends after three turns."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, level=0, **others):
        self.turns = 0
        return Heard(text=f"{seed} {level}")

    def step(self, action, timeout_s=None, **others):
        self.turns += 1
        if action.message == "die":
            os._exit(3)
        if action.message == "hang":
            time.sleep(600)
        return Heard(text=action.message[::-1], reward=float(action.message.count("a")), done=self.turns == 3)

    @property
    def state(self):
        return State()


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    app = create_fastapi_app(Mirror, Said, Heard, max_concurrent_envs=8)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listening])
