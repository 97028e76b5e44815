"""The bench of slow environments runs, and waits for the slow one in lockstep only."""

from __future__ import annotations

import re

from fastppo.bench import environments


def test_it_shows_three_rates(monkeypatch, capsys):
    small = {"EPISODES": 4, "TURNS": 2, "NEW_TOKENS": 3, "MODEL": (32, 1), "ROUNDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(environments, name, value)
    environments.main(["--slow-seconds", "0.5"])
    shown = capsys.readouterr().out
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"\| ([\d,]+) \|$", shown, re.MULTILINE)]
    assert len(rates) == 3 and rates[2] <= 3 * 2 * 3 / (2 * 0.5)
    assert (
        "H = 32, 1 layers, 4 episodes of 2 turns of 3 tokens, 0.5 s for each answer of the slow one, best of 1" in shown
    )
