"""The bench of slow environments runs, and waits for the slow one in lockstep only."""

from __future__ import annotations

import re

from fastppo.bench import environments
from fastppo.bench.rollout_workload import make_model


def test_it_shows_three_rates(monkeypatch, capsys):
    for name, value in {"EPISODES": 4, "TURNS": 2, "NEW_TOKENS": 3, "make_model": lambda *_: make_model(32, 1)}.items():
        monkeypatch.setattr(environments, name, value)
    environments.main(["--slow-seconds", "0.5"])
    rates = [
        float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) tok/s of the other 3", capsys.readouterr().out)
    ]
    assert len(rates) == 3 and rates[2] <= 3 * 2 * 3 / (2 * 0.5)
