"""Programs that ask the policy as a server: what they were answered is the episode, token by token, and nothing of them is left."""

from __future__ import annotations

import socket
import sys
import textwrap
import threading
import time
import urllib.request
from contextlib import suppress
from urllib.error import HTTPError
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import AgentProgram, Dialogue
from fastppo.envs.program_player import ProgramPlayer
from fastppo.envs.source import Episodes, EpisodeSource
from fastppo.rewards import RewardResult
from fastppo.roles import Roles
from fastppo.rollout import FinishReason, SamplingParams
from tests.envs.chat import chat_of
from tests.envs.worlds import threads, watch_pages
from tests.serve.client import ask, error_of, said
from tests.serve.models import make_random_engine, make_saying_engine
from tests.test_exact import assert_exact

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

ROWS = [{"prompt": "ab"}, {"prompt": "cde"}]
SAMPLING = SamplingParams(n=2, max_new_tokens=6, seed=3)


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """Every page is free when a session is over; every thread and process ends."""
    watch_pages(monkeypatch)
    before = set(psutil.Process().children(recursive=True))
    yield
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() and not [t for t in threading.enumerate() if t.name == "fastppo server"]
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture(scope="module")
def engine():
    return make_random_engine()


def rows_of(engine, rows=ROWS):
    return [row | {"prompt_ids": engine.tokenizer(row["prompt"])["input_ids"]} for row in rows]


def play(program, engine, *, sampling=SAMPLING, rows=ROWS, check=lambda: None, **config):
    player = ProgramPlayer(AgentProgram(program), engine, EnvironmentConfig(**config))
    try:
        dialogue = Dialogue(engine.tokenizer, chat_of(engine.tokenizer))
        return player.play(rows_of(engine, rows), sampling, dialogue, check=check)
    finally:
        player.close()


def two_turns(row, base_url, api_key):
    """Asks, and asks again with the answer before it."""
    talk = [{"role": "user", "content": row["prompt"]}]
    talk.append(said(ask(base_url, api_key, talk)))
    talk.append({"role": "user", "content": "more"})
    return float(len(said(ask(base_url, api_key, talk))["content"]))


def test_an_episode_is_one_sequence_of_the_ids_that_were_drawn(engine):
    """The chat template's text of the whole conversation, but for what the policy said: that is never made into tokens again."""
    played = play(two_turns, engine)
    rollout, tokenizer = played.rollout, engine.tokenizer
    assert rollout.num_sequences == 4 and rollout.prompt_index.tolist() == [0, 0, 1, 1]
    assert set(rollout.finish_reasons.tolist()) == {FinishReason.STOP}
    for i, episode in enumerate(played.episodes):
        begin, end = rollout.bounds[i : i + 2]
        tokens, mask = rollout.tokens[begin:end], rollout.action_mask[begin:end].tolist()
        drawn = [tokens[j].item() for j in range(len(mask)) if mask[j]]
        assert len(drawn) == sum(turn.tokens for turn in episode.turns) and len(episode.turns) == 2
        given = [tokens[j].item() for j in range(len(mask)) if not mask[j]]
        begun = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        closing = "" if drawn[episode.turns[0].tokens - 1] == tokenizer.eos_token_id else "<|im_end|>"
        expected = begun.format(episode.row["prompt"]) + closing + "\n" + begun.format("more")
        assert tokenizer.decode(given) == expected
        assert episode.turns[0].observation == [{"role": "user", "content": "more"}]
        assert [turn.reward for turn in episode.turns] == [0.0, len(episode.turns[1].completion)]
    lasts = torch.tensor(rollout.action_bounds[1:]) - 1
    assert played.turn_rewards()[lasts].tolist() == [episode.total_reward for episode in played.episodes]


def test_its_log_probs_are_those_that_training_computes(engine):
    assert_exact(Roles(engine.model, critic="shared"), play(two_turns, engine).rollout)


def test_it_depends_on_nothing_but_weights_row_seed_and_number(engine):
    def slow(row, base_url, api_key, seed):
        time.sleep(seed % 7 / 50)
        return two_turns(row, base_url, api_key)

    one, other = play(two_turns, engine).rollout, play(slow, engine, concurrent=3).rollout
    for name in ("tokens", "action_mask", "logprobs", "finish_reasons", "prompt_index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_request_that_does_not_go_on_begins_a_sequence_of_the_same_episode(engine):
    """Another conversation, choices of which one is gone on with, a branch of what was gone on with already: all are paid what the episode was."""

    def act(row, base_url, api_key):
        user = [{"role": "user", "content": row["prompt"]}]
        first = said(ask(base_url, api_key, user))
        ask(base_url, api_key, "something else")
        choices = ask(base_url, api_key, user, n=2)
        ask(base_url, api_key, [*user, said(choices, 1), {"role": "user", "content": "x"}])
        for more in ("y", "z"):
            ask(base_url, api_key, [*user, first, {"role": "user", "content": more}])
        return 2.0

    played = play(act, engine, sampling=SamplingParams(max_new_tokens=6, seed=1))
    numbers = [episode.number for episode in played.episodes]
    assert numbers == [0] * 5 + [1] * 5  # first and y, else, two choices of which one goes on, z
    assert [len(episode.turns) for episode in played.episodes[:5]] == [2, 1, 1, 2, 1]
    assert [episode.total_reward for episode in played.episodes] == [2.0] * 10
    bounds, rollout = played.rollout.bounds, played.rollout
    branch, first = rollout.tokens[bounds[4] : bounds[5]], rollout.tokens[bounds[0] : bounds[1]]
    shared = played.episodes[0].turns[0].tokens + rollout.prompt_lengths[0]
    assert torch.equal(branch[:shared], first[:shared]) and not rollout.action_mask[bounds[4] :][:shared].any()
    assert_exact(Roles(engine.model, critic="shared"), rollout)

    answers = Episodes(played)
    scored = answers.scored(RewardResult([0.0] * 10, {}, 0, []))
    alone, result = answers.per_sample(scored)
    assert alone.prompt_index.tolist() == [0, 1] and result.scores == [2.0, 2.0]
    metrics = answers.metrics([])
    assert metrics["environment/turns"] == 7 and metrics["environment/return"] == 2
    assert metrics["environment/sequences"] == 5 and metrics["environment/failure_rate"] == 0


def test_a_template_that_rewrites_what_was_said_begins_a_sequence_too():
    engine = make_random_engine()
    engine.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '...' if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    played = play(two_turns, engine, sampling=SamplingParams(max_new_tokens=6, seed=1))
    assert [episode.number for episode in played.episodes] == [0, 0, 1, 1]
    texts = [engine.tokenizer.decode(prompt) for prompt in played.rollout.prompts()]
    assert "assistant\n...<|im_end|>" in texts[1]


def test_calls_of_tools_are_carried_as_they_were_written():
    """The template would write the call in another way."""
    engine = make_saying_engine("So [up]")
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    def act(row, base_url, api_key):
        talk = [{"role": "user", "content": row["prompt"]}]
        answer = said(ask(base_url, api_key, talk, tools=[look]))
        call = answer["tool_calls"][0]
        talk += [answer, {"role": "tool", "tool_call_id": call["id"], "content": call["function"]["arguments"]}]
        ask(base_url, api_key, talk, tools=[look])
        return 1

    played = play(act, engine, sampling=SamplingParams(max_new_tokens=12))
    assert [len(episode.turns) for episode in played.episodes] == [2, 2]
    text = engine.tokenizer.decode(played.rollout.tokens[: played.rollout.bounds[1]])
    assert text.count("assistant\nSo [up]<|im_end|>") == 2 and 'tool\n{"where": "up"}<|im_end|>' in text


def test_the_runs_temperature_holds_and_the_programs_stop_and_length_do():
    engine = make_saying_engine("Some fun")

    def act(row, base_url, api_key):
        answer = ask(base_url, api_key, row["prompt"], temperature=2.0, stop=["f"], max_tokens=50)
        assert said(answer)["content"] == "Some "
        assert said(ask(base_url, api_key, row["prompt"], max_tokens=3))["content"] == "Som"
        assert said(ask(base_url, api_key, row["prompt"]))["content"] == "Some fun"
        return 1

    played = play(act, engine, sampling=SamplingParams(max_new_tokens=12, temperature=1.0))
    assert played.rollout.temperature == 1.0 and [episode.error for episode in played.episodes] == [None] * 6


def test_the_weights_are_those_of_now(engine):
    """Between two plays, where a trainer updates them."""
    first = make_random_engine()
    player = ProgramPlayer(AgentProgram(two_turns), first, EnvironmentConfig())
    try:
        options = (rows_of(first), SAMPLING, Dialogue(first.tokenizer, chat_of(first.tokenizer)))
        before, same = player.play(*options).rollout, player.play(*options).rollout
        with torch.no_grad():
            first.model.lm_head.weight.mul_(-1)
        after = player.play(*options).rollout
    finally:
        player.close()
    assert torch.equal(before.tokens, same.tokens) and not torch.equal(before.tokens[:99], after.tokens[:99])
    assert_exact(Roles(first.model, critic="shared"), after)


# What goes wrong


def fails_for_one(failure):
    """An agent that does so for the row ab, and what the others do."""

    def act(row, base_url, api_key):
        return failure(base_url, api_key) if row["prompt"] == "ab" else two_turns(row, base_url, api_key)

    return act


def raises(base_url, api_key):
    ask(base_url, api_key, "x")
    raise KeyError("what")


def says_no_number(base_url, api_key):
    ask(base_url, api_key, "x")
    return "good"


def asks_nothing(base_url, api_key):
    return 1.0


def asks_too_often(base_url, api_key):
    for _ in range(9):
        ask(base_url, api_key, "x")


def until_refused(base_url, api_key):
    """Until the key is no longer valid."""
    models = urllib.request.Request(f"{base_url}/models", headers={"Authorization": f"Bearer {api_key}"})
    deadline = time.monotonic() + 60
    with suppress(HTTPError):
        while time.monotonic() < deadline:
            urllib.request.urlopen(models).close()
            time.sleep(0.05)


def leaves_early(base_url, api_key):
    """Closes the connection before the answer is there."""
    address = urlsplit(base_url)
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    until_refused(base_url, api_key)
    return 1.0


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (raises, "the program failed: KeyError: 'what'"),
        (says_no_number, "TypeError: the reward of the program is str 'good', expected a number"),
        (asks_nothing, "the program ended without an answer of the policy"),
        (asks_too_often, "the program failed: HTTPError: HTTP Error 400: Bad Request (a request was refused: the episode has had its 8 turns"),
    ],
)  # fmt: skip
def test_a_program_that_fails_makes_its_episode_invalid_and_no_other(engine, failure, why):
    played, expected = play(fails_for_one(failure), engine), play(two_turns, engine)
    for episode in played.episodes:
        assert (episode.error or "").startswith(why) == (episode.prompt == 0), episode.error
    others, kept = [i for i, e in enumerate(played.episodes) if e.prompt == 1], [2, 3]
    one, other = played.rollout.select(others), expected.rollout.select(kept)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.logprobs, other.logprobs)
    answers = Episodes(played)
    assert answers.metrics([])["environment/failure_rate"] == 0.5
    assert [text for text in answers.scored(RewardResult([0.0] * len(played.episodes), {}, 0, [])).errors] == [
        f"2 of 4 episodes are invalid: {played.episodes[0].error}"
    ]


def test_an_answer_that_nobody_reads_is_not_learned_from():
    engine = make_random_engine()
    played = play(fails_for_one(leaves_early), engine, sampling=SamplingParams(max_new_tokens=400, seed=1))
    assert played.episodes[0].error == "the program closed a request before it was answered"
    assert played.episodes[-1].error is None


def test_a_refusal_that_the_program_survives_truncates_its_episode(engine):
    def act(row, base_url, api_key):
        for text in ("x", "x" * 600):
            try:
                ask(base_url, api_key, text)
            except HTTPError as error:
                assert error_of(error)["code"] == "context_length_exceeded"
        return 1.0

    played = play(act, engine, sampling=SamplingParams(max_new_tokens=3))
    assert [e.finish_reason for e in played.episodes] == [FinishReason.LENGTH] * 2 and played.episodes[0].error is None


def test_a_function_that_hangs_is_left_behind_and_can_ask_no_more(engine):
    release, late = threading.Event(), []

    def hangs(base_url, api_key):
        ask(base_url, api_key, "x")
        release.wait(60)
        try:
            ask(base_url, api_key, "y")
        except HTTPError as error:
            late.append(error.code)

    player = ProgramPlayer(AgentProgram(fails_for_one(hangs)), engine, EnvironmentConfig(episode_timeout=3))
    try:
        dialogue = Dialogue(engine.tokenizer, chat_of(engine.tokenizer))
        played = player.play(rows_of(engine), SAMPLING, dialogue)
        why = "the program took longer than 3 s (environment.episode_timeout)"
        assert [episode.error for episode in played.episodes] == [why, why, None, None] and played.hanging == 2
        release.set()
        deadline = time.monotonic() + 30
        while len(late) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        player.close()
    assert late == [401, 401]


def test_a_coroutine_is_cancelled(engine):
    import asyncio

    async def act(row, base_url, api_key):
        await asyncio.to_thread(ask, base_url, api_key, "x")
        await asyncio.sleep(60 if row["prompt"] == "ab" else 0)
        return 1.0

    played = play(act, engine, episode_timeout=3)
    assert [episode.error is None for episode in played.episodes] == [False, False, True, True]
    assert played.hanging == 0


def test_a_run_that_is_interrupted_leaves_nothing(engine):
    def check():
        if engine.stats.new_tokens > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(two_turns, engine, check=check, sampling=SamplingParams(n=2, max_new_tokens=100))


# Commands

COMMAND = """
    import json, os, signal, subprocess, sys, time
    sys.path.insert(0, {root!r})
    from tests.serve.client import ask, said

    row = json.load(sys.stdin)
    base_url, api_key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    text = said(ask(base_url, api_key, row["prompt"]))["content"]
    print("thinking ...")
    {then}
    print(len(text))
    print()
"""


@pytest.fixture
def command(tmp_path, request):
    def make(then="pass"):
        (tmp_path / "agent.py").write_text(
            textwrap.dedent(COMMAND).format(root=str(request.config.rootpath), then=then)
        )
        return [sys.executable, str(tmp_path / "agent.py")]

    return make


def test_a_command_reads_the_row_and_prints_its_reward(engine, command):
    played = play(command(), engine)
    assert [episode.error for episode in played.episodes] == [None] * 4
    assert [e.total_reward for e in played.episodes] == [len(e.turns[0].completion) for e in played.episodes]
    assert_exact(Roles(engine.model, critic="shared"), played.rollout)


CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("sys.exit('no ' * 2)", "the program failed: RuntimeError: it ended with exit code 1: no no"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the program failed: RuntimeError: it ended by SIGKILL"),
        (f"{CHILD}; time.sleep(600)", "the program took longer than 12 s (environment.episode_timeout)"),
        ("print('good'); sys.exit()", "ValueError: the last line that it printed is 'good', expected a number"),
    ],
)  # fmt: skip
def test_a_command_that_dies_or_hangs_is_killed_with_what_it_started(engine, command, then, why):
    played = play(
        command(f"if row['prompt'] == 'ab': {then}"),
        engine,
        sampling=SamplingParams(max_new_tokens=4),
        episode_timeout=12,
    )
    assert why in played.episodes[0].error and played.episodes[1].error is None
    assert played.episodes[0].finish_reason == FinishReason.ERROR


def test_a_command_that_leaves_a_process_behind(engine, command):
    """The reward counts; the fixture looks for the process."""
    played = play(command(CHILD), engine, sampling=SamplingParams(max_new_tokens=4))
    assert [episode.error for episode in played.episodes] == [None] * 2


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("", ValueError, "program is empty, expected a command"),
        ("no-such-command here", ValueError, "there is no command no-such-command"),
        (3, TypeError, "program is 3, expected a command .* or a function"),
        (lambda row: 0, TypeError, r"cannot be called as \(row, base_url, api_key\)"),
    ],
)
def test_what_is_no_program(program, kind, message):
    with pytest.raises(kind, match=message):
        AgentProgram(program)


def test_a_source_closes_its_server_after_each_sample_unless_it_is_kept(engine):
    urls = []

    def act(row, base_url, api_key):
        urls.append(base_url)
        return two_turns(row, base_url, api_key)

    player = ProgramPlayer(AgentProgram(act), engine, EnvironmentConfig())
    dialogue = Dialogue(engine.tokenizer, chat_of(engine.tokenizer))
    with EpisodeSource(player, engine.tokenizer, dialogue) as source:
        for _ in range(2):
            source.sample(rows_of(engine), SAMPLING, None, lambda: None)
    assert len(set(urls)) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(urls[0]).hostname, urlsplit(urls[0]).port)).close()
