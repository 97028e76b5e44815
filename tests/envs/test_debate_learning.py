"""PPO learns in debate: what one seat knows reaches the other by its words alone, and each seat learns from its own reward."""

from __future__ import annotations

import pytest

from fastppo.envs import Debate, Speech
from tests.envs.test_learning import learn
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.slow

SECRETS = "abcd"
PROMPTS = [{"prompt": "?", "secret": secret} for secret in SECRETS]


@pytest.mark.parametrize(
    ("reads", "changes", "learns"),
    [
        ("?{witness}", {}, True),
        ("?", {}, False),
        ("?{witness}", {"optimizer__lr": 0.0, "critic__lr": 0.0}, False),
    ],
    ids=["reads the witness", "control: reads nothing", "control: learning rate 0"],
)
def test_a_seat_learns_to_tell_and_another_to_listen(tmp_path, reads, changes, learns):
    """The witness alone sees the secret and is paid for telling it; the guesser is paid for knowing it."""
    found: list[float] = []

    def judge(seat, transcript, secret):
        told, guessed = (
            [speeches[i]["text"] == own for speeches, own in zip(transcript, secret, strict=True)] for i in (0, 1)
        )
        found.extend(float(right) for name, right in zip(seat, guessed, strict=True) if name == "guesser")
        return [float(t if name == "witness" else g) for name, t, g in zip(seat, told, guessed, strict=True)]

    debate = Debate([Speech("witness", "{secret}="), Speech("guesser", reads)])
    changes = {"rollout__max_new_tokens": 1, "advantage__gae_lambda": 1.0} | changes
    first, last = learn(tmp_path, make_tokenizer(SECRETS + "=?"), debate, PROMPTS, found, judge, **changes)
    assert first < 0.3
    assert last > 0.9 if learns else last < 0.45
