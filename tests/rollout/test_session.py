"""Conversations: turns of many sequences, tokens given between them, forks, pages that are taken away, and a model that others use meanwhile."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from fastppo.model import prepare_model
from fastppo.rollout import Engine, FinishReason, Rollout, SamplingParams, Session, Turn
from fastppo.rollout.generation import DRAWS_AHEAD
from fastppo.rollout.model_runner import ModelRunner
from tests.rollout.tiny import (
    CONTEXT,
    FAMILIES,
    VOCAB_SIZE,
    assert_logprobs_are_the_models,
    make_chain,
    make_model,
    ragged_prompts,
)

PROMPTS = ragged_prompts((130, 64, 5, 63, 128, 65))
SAMPLING = SamplingParams(n=2, max_new_tokens=9, seed=5)
PAGE = 16 / 2**20  # GiB of the model below


@pytest.fixture(scope="module")
def model():
    return make_model("llama", max_position_embeddings=512, eos_token_id=7)


@pytest.fixture(params=[0, 1], ids=["in-step", "ahead"], autouse=True)
def draws_ahead(request, monkeypatch):
    """Everything here holds as well where the host looks at a draw when the next is under way, as on a GPU."""
    monkeypatch.setitem(DRAWS_AHEAD, "cpu", request.param)


def reply(sequence: int, turn: int) -> list[int]:
    """What an environment says after a turn: of many lengths, over the border of pages."""
    length = 1 + (sequence * 37 + turn * 23) % 80
    return torch.randint(
        1, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(sequence * 9 + turn)
    ).tolist()


def answer(session: Session, turn: Turn, had: dict[int, int], turns: int) -> None:
    """As an environment does, for so many turns of each sequence; `had` counts them."""
    had[turn.id] += 1
    if had[turn.id] < turns:
        session.append(turn.id, reply(turn.id, had[turn.id]))
    else:
        session.close(turn.id)


def conversations(engine: Engine, turns: int = 3, prompts=PROMPTS, sampling=SAMPLING) -> Rollout:
    with engine.open(sampling) as session:
        for prompt in prompts:
            session.add(prompt)
        had: dict[int, int] = defaultdict(int)
        for turn in session:
            answer(session, turn, had, turns)
        assert had == dict.fromkeys(range(len(prompts) * sampling.n), turns)
        return session.rollout()


def assert_same(found: Rollout, expected: Rollout) -> None:
    for name in (
        "tokens",
        "cu_seqlens",
        "action_mask",
        "logprobs",
        "processed_logprobs",
        "finish_reasons",
        "prompt_index",
    ):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_one_turn_is_what_generate_samples(model):
    engine = Engine(model, max_batch_size=3)
    assert_same(conversations(engine, turns=1), engine.generate(PROMPTS, SAMPLING))


def test_draws_come_from_the_streams_that_are_asked_for(model):
    """Sequences that are added in another order, each with its own stream, say what they would have said."""
    expected, count = conversations(Engine(model), turns=1, sampling=SAMPLING), len(PROMPTS) * 2
    with Engine(model).open(SAMPLING) as session:
        for place in reversed(range(len(PROMPTS))):
            session.add(PROMPTS[place], streams=[2 * place + 1, 2 * place])
        for turn in session:
            session.close(turn.id)
        rollout = session.rollout().select(reversed(range(count)))
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.logprobs, expected.logprobs)
    with Engine(model).open(SAMPLING) as session:
        with pytest.raises(ValueError, match="streams has 1 numbers, expected 2, one for each new sequence"):
            session.add(PROMPTS[0], streams=[0])
        with pytest.raises(ValueError, match=r"streams\[1\] is -1"):
            session.add(PROMPTS[0], streams=[0, -1])


def test_last_words_end_a_sequence(model):
    with Engine(model).open(SamplingParams(max_new_tokens=4, seed=5), max_length=20) as session:
        session.add(PROMPTS[2])
        [turn] = session
        with pytest.raises(ValueError, match=r"tokens\[1\] is 96"):
            session.close(turn.id, [1, VOCAB_SIZE])
        with pytest.raises(ValueError, match="would have .* tokens with those given, expected at most 19"):
            session.close(turn.id, [1] * 15)
        session.close(turn.id, [3, 4])
        rollout = session.rollout()
    assert rollout.tokens.tolist() == PROMPTS[2] + turn.tokens + [3, 4]
    assert rollout.action_mask.tolist() == [False] * 5 + [True] * len(turn.tokens) + [False] * 2


def test_a_turn_is_what_generate_samples_after_the_same_tokens(model):
    """To the last bit: the draws come from seed, number and position, the keys from the pages of the turns before."""
    rollout = conversations(Engine(model), prompts=PROMPTS[:1], sampling=SamplingParams(max_new_tokens=9, seed=5))
    tokens, mask, places = rollout.tokens.tolist(), rollout.action_mask.tolist(), rollout.actions.tolist()
    bounds = rollout.turn_bounds
    assert len(bounds) == 4 and not mask[129] and sum(mask) == rollout.num_actions
    for first, last in zip(bounds, bounds[1:], strict=False):
        start, end = places[first], places[last - 1] + 1
        single = Engine(model).generate([tokens[:start]], SamplingParams(max_new_tokens=9, seed=5))
        assert single.completions() == [tokens[start:end]]
        assert torch.equal(single.logprobs, rollout.logprobs[first:last])


@pytest.mark.parametrize("pages", [6, 9, 20])
@pytest.mark.parametrize("max_batch_size", [2, 64])
def test_few_pages_change_nothing(model, pages, max_batch_size):
    """Conversations whose pages were taken away between two turns, or while they waited, are run again."""
    expected = conversations(Engine(model))
    engine = Engine(model, max_batch_size=max_batch_size, kv_memory=pages * PAGE)
    assert_same(conversations(engine), expected)
    assert engine.stats.peak_pages <= engine.stats.pages <= pages


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_every_family(family, monkeypatch):
    """Several sequences go on in one forward of the modules: windows, soft-capping and sinks reach back into what they have cached."""
    prompts, sampling = ragged_prompts((13, 1, 9)), SamplingParams(n=2, max_new_tokens=4, seed=3)
    model = prepare_model(make_model(family))
    monkeypatch.setattr(ModelRunner, "_parts", lambda _: None)
    monkeypatch.setattr("fastppo.rollout.decoder.CHUNK_TOKENS", 5)
    with Engine(model).open(sampling) as session:
        for prompt in prompts:
            session.add(prompt)
        first = list(session)
        for turn in first:
            session.append(turn.id, reply(turn.id, 1)[:11])
        assert len(list(session)) == len(first) == 6
        rollout = session.rollout()
    assert_logprobs_are_the_models(rollout, model)


def test_going_on_without_a_reply(model):
    """A turn that `max_new_tokens` broke off: no token is given, and it is one turn of the rollout."""
    whole = Engine(model).generate(PROMPTS, SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True))
    with Engine(model).open(SamplingParams(max_new_tokens=5, seed=1, ignore_eos=True)) as session:
        for prompt in PROMPTS:
            session.add(prompt)
        drawn: dict[int, int] = defaultdict(int)
        for turn in session:
            drawn[turn.id] += len(turn.tokens)
            if drawn[turn.id] < 20:
                session.append(turn.id, [])
        rollout = session.rollout()
        assert_same(rollout, whole)
        assert len(rollout.turn_bounds) == 1 + len(PROMPTS)


class TestForks:
    def test_share_full_pages_and_go_their_own_way(self, model):
        engine = Engine(model)
        with engine.open(SamplingParams(max_new_tokens=9, seed=5, ignore_eos=True)) as session:
            (trunk,) = session.add(PROMPTS[0])
            assert [turn.id for turn in session] == [trunk]
            before, run = session.stats.peak_pages, session.stats.prefill_tokens
            twins = [session.fork(trunk) for _ in range(3)]
            assert session.stats.peak_pages == before
            for id in (trunk, *twins):
                session.append(id, [1, 2, 3])
            turns = {turn.id: turn.tokens for turn in session}
            assert session.stats.prefill_tokens - run == 4 + 3 * (138 - 128 + 4), "two full pages are not run again"
            rollout = session.rollout()
        assert len({tuple(tokens) for tokens in turns.values()}) == 4
        assert rollout.prompt_index.tolist() == [0] * 4
        first = [rollout.completions()[i][:12] for i in range(4)]
        assert first == [first[0]] * 4
        assert_logprobs_are_the_models(rollout, model)

    def test_of_closed_sequences_and_when_the_source_is_gone(self, model):
        sampling = SamplingParams(max_new_tokens=9, seed=5, ignore_eos=True)
        found = []
        for close_first in (True, False):
            with Engine(model).open(sampling) as session:
                (trunk,) = session.add(PROMPTS[0])
                list(session)
                if close_first:
                    session.close(trunk)
                twin = session.fork(trunk)
                if not close_first:
                    session.close(trunk)
                session.append(twin, [4])
                list(session)
                found.append(session.rollout())
        assert_same(*found)

    def test_draw_from_the_streams_that_they_are_given(self, model):
        with Engine(model).open(SamplingParams(max_new_tokens=9, seed=5, ignore_eos=True)) as session:
            (trunk,) = session.add(PROMPTS[0])
            list(session)
            twins = [session.fork(trunk, stream=stream) for stream in (2**40, 7, 2**40)]
            for id in twins:
                session.append(id, [1])
            turns = {turn.id: turn.tokens for turn in session}
            first, other, again = (turns[id] for id in twins)
            assert first == again != other
            with pytest.raises(TypeError, match="stream is 'a'"):
                session.fork(trunk, stream="a")

    def test_give_all_pages_back(self, model):
        with Engine(model).open(SAMPLING) as session:
            session.add(PROMPTS[0], n=3)
            list(session)
            twins = [session.fork(id) for id in (0, 1, 2, 0)]
            for id in (0, 1, 2, *twins):
                session.close(id)
            pool = session._generation.admission.pool
            assert pool.available == pool.pages


class TestIteration:
    # From token k it takes k steps to 0, which is the end.
    successors = (0, 0, 1, 2, 3, 4, 5, 6)

    def test_turns_come_as_they_end_while_others_go_on(self):
        with Engine(make_chain(list(self.successors))).open(
            SamplingParams(temperature=0, max_new_tokens=20)
        ) as session:
            for prompt in ([7], [2], [5]):
                session.add(prompt)
            seen = []
            for turn in session:
                seen.append(turn)
                if len(seen) == 1:
                    session.append(turn.id, [2])
        tokens = [(1, [1, 0]), (1, [1, 0]), (2, [4, 3, 2, 1, 0]), (0, [6, 5, 4, 3, 2, 1, 0])]
        assert seen == [(*each, FinishReason.STOP) for each in tokens]

    def test_turns_that_end_together_are_told_one_by_one_and_none_twice(self):
        with Engine(make_chain(list(self.successors))).open(SamplingParams(temperature=0)) as session:
            session.add([3], n=4)
            first = next(iter(session))
            assert [first.id, *(turn.id for turn in session)] == [0, 1, 2, 3]
            assert list(session) == [] and session.step() == []

    def test_step_by_step(self):
        with Engine(make_chain(list(self.successors))).open(SamplingParams(temperature=0)) as session:
            session.add([3])
            found = [[turn.tokens for turn in session.step()] for _ in range(5)]
            assert sum(found, []) == [[2, 1, 0]] and found[:2] == [[], []] == 2 * found[-1:], "a token a step"

    def test_new_sequences_join_while_others_run(self, model):
        with Engine(model).open(SAMPLING) as session:
            session.add(PROMPTS[0])
            session.step()
            session.step()
            session.add(PROMPTS[1])
            for turn in session:
                session.close(turn.id)
            assert_same(session.rollout(), Engine(model).generate(PROMPTS[:2], SAMPLING))


def test_between_two_turns_the_model_is_as_it_was_and_others_may_use_it(model):
    model.train()
    expected = conversations(Engine(model))
    engine, had = Engine(model), (defaultdict(int), defaultdict(int))
    with engine.open(SAMPLING) as session, engine.open(SAMPLING) as other:
        for prompt in PROMPTS:
            session.add(prompt)
            other.add(prompt)
        for turn in session:
            assert all(module.training and "forward" not in vars(module) for module in model.modules())
            engine.generate([[3, 4]], SAMPLING)
            for another in other.step():
                answer(other, another, had[1], turns=3)
            answer(session, turn, had[0], turns=3)
        for another in other:
            answer(other, another, had[1], turns=3)
    model.eval()
    assert_same(session.rollout(), expected)
    assert_same(other.rollout(), expected)


def test_weights_that_change_under_a_session_are_noticed():
    model = make_model("llama")
    with Engine(model).open(SAMPLING) as session:
        session.add([1, 2])
        list(session)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        session.append(0, [3])
        with pytest.raises(RuntimeError, match="weights have changed"):
            session.step()


def test_cache_is_kept_or_given_back(model):
    for keep in (False, True):
        engine = Engine(model, keep_cache=keep)
        with engine.open(SAMPLING):
            assert engine.runner.kept_cache is None
        assert (engine.runner.kept_cache is not None) == keep


def test_samples_whose_logits_broke_end_there():
    engine = Engine(make_model("llama"))
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(torch.nan)
    with engine.open(SAMPLING) as session:
        session.add([1, 2], n=1)
        (turn,) = session
        assert turn == (0, [], FinishReason.ERROR)
        with pytest.raises(ValueError, match="logits were not finite"):
            session.append(0, [3])
        assert session.rollout().finish_reasons.tolist() == [FinishReason.ERROR]


class TestErrors:
    @pytest.fixture
    def session(self):
        with Engine(make_model("llama"), max_batch_size=2).open(
            SamplingParams(max_new_tokens=3), max_length=40
        ) as session:
            session.add([1, 2])
            list(session)
            yield session

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda s: s.append(1, [1]), r"id is 1, expected the number of a sequence \(there are 1\)"),
            (lambda s: s.append("0", [1]), "id is '0', expected the number"),
            (lambda s: s.append(0, [VOCAB_SIZE]), r"tokens\[0\] is 96, expected an integer from 0 to 95"),
            (lambda s: s.append(0, [1] * 36), "sequence 0 would have 41 tokens with those given, expected at most 39"),
            (lambda s: s.add([1] * 40), "prompt has 40 tokens, expected at most 39"),
            (lambda s: s.add([]), "empty, expected at least one token"),
            (lambda s: s.add([1], n=0), "n is 0, expected an integer from 1"),
            (lambda s: (s.close(0), s.close(0)), "sequence 0 is closed, expected an open one"),
            (lambda s: (s.close(0), s.append(0, [1])), "sequence 0 is closed, expected an open one"),
            (
                lambda s: (s.append(0, [1]), s.append(0, [1])),
                "the turn of sequence 0 is under way, expected it to have ended",
            ),
            (lambda s: (s.append(0, [1]), s.close(0)), "the turn of sequence 0 is under way"),
            (lambda s: (s.append(0, [1]), s.fork(0)), "the turn of sequence 0 is under way"),
            (lambda s: (s.append(0, [1]), s.rollout()), "the turn of sequence 0 is under way"),
        ],
    )
    def test_of_calls(self, session, call, message):
        with pytest.raises(ValueError, match=message):
            call(session)
        assert len(list(session)) <= 1 and session.rollout().num_sequences == 1, "the session goes on"

    @pytest.mark.parametrize("call", [lambda s: s.append(0, [1.5]), lambda s: s.append(0, [True])])
    def test_tokens_are_integers(self, session, call):
        with pytest.raises(TypeError, match=r"tokens\[0\] is .*, expected an integer"):
            call(session)

    def test_after_the_end(self, session):
        session.append(0, [1])
        session.__exit__(None, None, None)
        for call in (session.step, lambda: session.add([1]), lambda: session.append(0, [1]), lambda: list(session)):
            with pytest.raises(ValueError, match="the session is over"):
                call()

    @pytest.mark.parametrize("max_length", [1, CONTEXT + 1])
    def test_of_lengths(self, max_length):
        with pytest.raises(ValueError, match=f"max_length is {max_length}, expected an integer from 2 to {CONTEXT}"):
            Engine(make_model("llama")).open(SAMPLING, max_length=max_length)

    def test_a_model_without_a_limit_needs_one(self, monkeypatch):
        engine = Engine(make_model("llama"))
        monkeypatch.setattr("fastppo.rollout.engine.context_length", lambda _: None)
        with pytest.raises(ValueError, match="max_length is None, expected a number"):
            engine.open(SAMPLING)
        with engine.open(SAMPLING, max_length=20) as session:
            session.add([1])
            assert len(list(session)) == 2

    def test_no_sequence(self):
        with Engine(make_model("llama")).open(SAMPLING) as session, pytest.raises(ValueError, match="has no sequence"):
            session.rollout()

    def test_a_turn_that_can_never_fit(self, model):
        with Engine(model, kv_memory=2 * PAGE).open(SamplingParams(max_new_tokens=60)) as session:
            session.add([1] * 10)
            list(session)
            with pytest.raises(
                ValueError, match=r"sequence 0 with \d+ tokens and 60 new ones needs .* expected at most"
            ):
                session.append(0, [1] * 100)
            with pytest.raises(ValueError, match="prompt with 100 tokens and 60 new ones needs"):
                session.add([1] * 100)
            session.close(0)
            session.add([1] * 20)
            assert len(list(session)) == 1


def test_a_turn_may_be_shorter_than_the_others(model):
    """And what it says is the beginning of what it would have said."""
    said = []
    for most in (None, 3):
        with Engine(model).open(SamplingParams(max_new_tokens=6, ignore_eos=True, seed=1)) as session:
            session.add(PROMPTS[2], n=1)
            (first,) = session
            session.append(first.id, [3, 4], max_new_tokens=most)
            said += list(session)
    assert [len(turn.tokens) for turn in said] == [6, 3] and said[0].tokens[:3] == said[1].tokens
    assert said[1].finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize("most", [0, 7])
def test_a_turn_is_never_longer_than_the_settings_say(model, most):
    with Engine(model).open(SamplingParams(max_new_tokens=6)) as session:
        session.add(PROMPTS[2], n=1)
        (first,) = session
        with pytest.raises(ValueError, match=f"max_new_tokens is {most}, expected an integer from 1 to 6"):
            session.append(first.id, [], max_new_tokens=most)


# Sequences that are sampled in a way of their own

OWN = [
    SamplingParams(n=2, max_new_tokens=9, seed=5, temperature=0.5, top_k=9),
    SamplingParams(n=2, max_new_tokens=4, seed=5, temperature=1.7, top_p=0.8),
    SamplingParams(n=2, max_new_tokens=9, seed=5, temperature=0, min_p=0.1),
    SAMPLING,
]


def test_each_sequence_may_be_sampled_in_a_way_of_its_own(model):
    """It draws what it would in a session where all are sampled so; with the log-probs that a rollout of that session has."""
    engine, found = Engine(model, max_batch_size=4), {}
    with engine.open(SAMPLING) as session:
        for i, own in enumerate(OWN):
            session.add(PROMPTS[2], streams=[7, 8 + i], sampling=None if own is SAMPLING else own)
        for turn in session:
            found[turn.id] = (turn.tokens, session.logprobs(turn.id))
            session.close(turn.id)
        with pytest.raises(ValueError, match="several temperatures or filters"):
            session.rollout()
    for i, own in enumerate(OWN):
        with engine.open(own) as session:
            ids = session.add(PROMPTS[2], streams=[7, 8 + i])
            for turn in session:
                session.close(turn.id)
            rollout = session.rollout()
        for id in ids:
            begin, end = rollout.action_bounds[id : id + 2]
            assert found[2 * i + id] == (rollout.completions()[id], rollout.logprobs[begin:end].tolist())


def test_a_turn_may_be_sampled_otherwise_than_the_one_before(model):
    def second(**append):
        with Engine(model).open(SAMPLING) as session:
            session.add([3, 4, 5], n=1)
            (first,) = session
            session.append(first.id, [6], **append)
            (turn,) = session
            return turn.tokens

    greedy = SamplingParams(n=1, max_new_tokens=3, seed=5, temperature=0)
    assert second() != second(sampling=greedy) and len(second(sampling=greedy)) <= 3
    assert second(sampling=greedy, max_new_tokens=2) == second(sampling=greedy)[:2]


def test_what_a_session_has_once_is_no_sequences_own(model):
    with Engine(model).open(SAMPLING) as session:
        for changes, message in [
            ({"seed": 6}, "seed of sampling is 6, expected the session's 5"),
            ({"ignore_eos": True}, "ignore_eos"),
        ]:
            with pytest.raises(ValueError, match=message):
                session.add([3], sampling=SamplingParams(**{"n": 2, "seed": 5} | changes))
        with pytest.raises(ValueError, match="stop_strings needs a tokenizer"):
            session.add([3], sampling=SamplingParams(seed=5, stop_strings=("a",)))


def test_a_turn_that_is_cut_ends_with_its_next_token_and_no_other_does(model):
    """Also where it had to wait for a row; those that are on their way on a GPU are still taken."""
    sampling = SamplingParams(n=1, max_new_tokens=40, seed=5, ignore_eos=True)
    with Engine(model, max_batch_size=2).open(sampling) as session:
        one, other, waiting = (session.add(prompt)[0] for prompt in ([3], [4], [5]))
        for _ in range(6):
            session.step()
        session.cut(one)
        session.cut(waiting)
        turns = {turn.id: turn for turn in session}
        assert 1 <= len(turns[one].tokens) <= 8 and len(turns[waiting].tokens) <= 1 + DRAWS_AHEAD["cpu"]
        assert len(turns[other].tokens) == 40
        assert {turn.finish_reason for turn in turns.values()} == {FinishReason.LENGTH}
        session.cut(one)  # it has ended: nothing happens
        session.append(one, [6])
        (again,) = session
        assert len(again.tokens) == 40
