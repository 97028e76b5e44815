"""Searches on models whose every next token is known, with hand-made judges: which branch they take, what they spend, what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastppo import Engine, SamplingParams
from fastppo.model import Critic, prepare_model
from fastppo.roles import Roles
from fastppo.rollout import FinishReason
from fastppo.search import (
    Node,
    TreeParams,
    best_of_n,
    critic_values,
    majority_vote,
    puct,
    value_guided,
    value_score,
)
from tests.rollout.tiny import make_chain
from tests.rollout.tiny import make_model as make_random_model
from tests.tiny import make_model, make_tokenizer

EOS, A, B, C = 1, 2, 3, 4  # as the tokenizer has them: <eos>, a, b, c
PROMPTS = [[A, B], [C], [B, B, C]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine():
    """A random model of letters: every token may follow every other."""
    return Engine(make_model(), make_tokenizer(), max_batch_size=16)


def share_of_b(states):
    """A judge who likes the letter b."""
    return [state.count(B) / len(state) for state in states]


def flat(states):
    return [0.0] * len(states)


def fork_model():
    """After `a` the likeliest is b, then c; each repeats itself. Nothing else is worth a look."""
    model = make_chain([0, 1, B, B, C, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], gap=9.0)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[C, A] = weight[B, A] - 1.0 / model.config.hidden_size**0.5  # c is a nat behind b after a
    model.config.eos_token_id = EOS
    return model


# Whole answers


def test_the_best_of_n_is_the_first_of_those_with_the_highest_score(engine):
    sampling = SamplingParams(n=5, max_new_tokens=6, seed=3)
    rollout = engine.generate(PROMPTS, sampling)
    completions = rollout.completions()
    scores = [float(len(set(tokens))) for tokens in completions]
    seen = []

    def score(numbers, answers):
        seen.append((numbers, answers))
        return scores

    found = best_of_n(engine, PROMPTS, sampling, score)
    assert seen == [(rollout.prompt_index.tolist(), completions)]
    for i, answer in enumerate(found):
        own = scores[5 * i : 5 * i + 5]
        assert answer.score == max(own) and answer.completion == completions[5 * i + own.index(max(own))]
        assert answer.new_tokens == sum(map(len, completions[5 * i : 5 * i + 5]))


def test_the_majority_says_what_most_say_and_silence_is_no_vote(engine):
    sampling = SamplingParams(n=7, max_new_tokens=4, seed=1)
    texts = engine.tokenizer.batch_decode(engine.generate([[A]], sampling).completions(), skip_special_tokens=True)
    said = dict(zip(texts, [None, None, None, "x", "y", "y", "x"], strict=True))
    assert len(said) == 7
    (found,) = majority_vote(engine, [[A]], sampling, said.__getitem__)
    text = engine.tokenizer.decode(found.completion, skip_special_tokens=True)
    assert said[text] == "x" and texts.index(text) == 3 and found.score == 2 / 7
    (silent,) = majority_vote(engine, [[A]], sampling, lambda text: None)
    assert silent.score == 0


# One token ahead


def test_the_critic_decides_between_likely_tokens():
    engine = Engine(fork_model())
    sampling = SamplingParams(max_new_tokens=5, min_p=0.1)

    def likes(token):
        return lambda states: [float(state[-1] == token) for state in states]

    for token in (B, C):
        (found,) = value_guided(engine, [[A]], sampling, likes(token))
        assert found.completion == [token] * 5 and found.finish_reason == FinishReason.LENGTH
        assert found.new_tokens == 2 + 4, "two candidates after a, and one where nothing else is likely"
    (plain,) = value_guided(engine, [[A]], sampling, flat)
    assert plain.completion == [B] * 5, "of equal ones the likeliest"


def test_the_end_of_an_answer_is_worth_its_score(engine):
    sampling = SamplingParams(max_new_tokens=8)
    for reward, ends in ((1.0, True), (-1.0, False)):
        found = value_guided(engine, PROMPTS, sampling, flat, width=18, score=lambda n, _, r=reward: [r] * len(n))
        assert all((answer.finish_reason == FinishReason.STOP) == ends for answer in found)
    assert [answer.completion for answer in value_guided(
        engine, PROMPTS, sampling, lambda states: [1.0] * len(states), width=18, score=lambda n, _: [0.95] * len(n), gamma=0.9
    )] == [[EOS]] * 3, "what comes a token later counts gamma times"  # fmt: skip


@pytest.mark.parametrize("budget", [8, 11, 40, 1000])
def test_looking_ahead_never_spends_more_than_the_budget(engine, budget):
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    seen = []
    found = value_guided(
        engine, PROMPTS, sampling, lambda states: [*map(len, seen.append(states) or states)], width=5, budget=budget
    )
    assert [len(answer.completion) for answer in found] == [8] * 3
    assert all(answer.new_tokens == min(budget, 5 * 8) for answer in found)
    assert sum(map(len, seen)) == sum(answer.new_tokens for answer in found)


# Trees

TREE = TreeParams(step_strings=(), step_tokens=2, width=3, simulations=6, budget=60)


def test_selection_is_the_formula():
    node = Node([], 0.0, 0.0, None, None)
    for prior, visits, total in ((0.5, 3, 0.9), (0.3, 1, 0.6), (0.2, 0, 0.0)):
        node.children.append(Node([A], 0.0, 0.25, None, 0, prior=prior, visits=visits, total=total))
    for c_puct in (0.0, 0.5, 1.0, 4.0):
        scores = [
            q + c_puct * child.prior * math.sqrt(4) / (1 + child.visits)
            for q, child in zip((0.3, 0.6, 0.25), node.children, strict=True)
        ]
        assert node.select(c_puct) is node.children[scores.index(max(scores))]
    assert node.most_visited() is node.children[0]


def test_more_steps_are_drawn_where_the_critic_says_that_those_seen_are_bad():
    """Of the one step seen, of probability p: a draw is worth p Q + (1 - p) V."""
    p, node = 0.75, Node([], 0.0, 0.2, None, None, draws=1)
    node.children = [Node([A], math.log(p), 0.0, None, 0)]
    assert abs(node.unseen - 0.25) < 1e-15
    for value, wanted in ((-0.1, True), (0.1, True), (0.3, False)):
        node.children[0].value = value
        assert node.wants_more(0.0) == (0.75 * value + 0.25 * 0.2 > value) == wanted
    node.children[0].logprob = 0.0
    assert not node.wants_more(1.0), "nothing is left to be seen"


def test_the_tree_prefers_the_branch_that_the_critic_prefers():
    """Both for the critic's liking and against it, where the policy's prior speaks for b."""
    engine = Engine(fork_model())
    sampling = SamplingParams(max_new_tokens=6, seed=2)
    params = TreeParams(step_strings=(), step_tokens=2, width=8, simulations=24, c_puct=0.3)
    for liked, other in ((B, C), (C, B)):
        trees: list[Node] = []
        (found,) = puct(engine, [[A]], sampling, lambda s, t=liked: [x.count(t) / 6 for x in s], params, trees=trees)
        assert found.completion == [liked] * 6, liked
        visits = {tuple(child.tokens): child.visits for child in trees[0].children}
        assert visits[liked, liked] > visits[other, other]
        priors = {tuple(child.tokens): child.prior for child in trees[0].children}
        assert priors[B, B] > priors[C, C] and abs(sum(priors.values()) - 1) < 1e-12


def test_the_score_of_finished_answers_is_found(engine):
    """A critic leads to answers that the judge of whole ones likes better than the first sample."""
    sampling = SamplingParams(max_new_tokens=6, seed=1)

    def score(numbers, completions):
        return [tokens.count(B) / 6 for tokens in completions]

    params = replace(TREE, simulations=12, width=6, budget=300)
    found = puct(engine, PROMPTS * 5, sampling, share_of_b, params, score=score)
    assert all(answer.score == score([0], [answer.completion])[0] for answer in found)
    plain = best_of_n(engine, PROMPTS * 5, sampling, score)
    assert sum(answer.score for answer in found) > 2 * sum(one.score for one in plain) > 0


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


def test_the_same_search_gives_the_same_trees_and_another_seed_others(engine):
    def statistics(seed):
        trees: list[Node] = []
        puct(engine, PROMPTS, SamplingParams(max_new_tokens=8, seed=seed), share_of_b, TREE, trees=trees)
        return [[(n.tokens, n.prior, n.value, n.visits, n.total) for n in walk(tree)] for tree in trees]

    assert statistics(4) == statistics(4) != statistics(5)


def test_a_tree_does_not_depend_on_those_beside_it(engine):
    """It is what it would be among all prompts, also where others are searched elsewhere; another number is another tree."""

    def grown(prompts, numbers=None):
        trees: list[Node] = []
        sampling = SamplingParams(max_new_tokens=8, seed=4)
        puct(engine, prompts, sampling, share_of_b, TREE, trees=trees, numbers=numbers)
        return [[(n.tokens, n.prior, n.value, n.visits, n.total) for n in walk(tree)] for tree in trees]

    whole = grown(PROMPTS)
    assert grown(PROMPTS[::2], [0, 2]) == whole[::2] and grown(PROMPTS[1:2], [1]) == whole[1:2] != grown(PROMPTS[1:2])


def test_a_node_has_the_visits_of_its_children_and_its_own(engine):
    trees: list[Node] = []
    puct(engine, PROMPTS, SamplingParams(max_new_tokens=8), share_of_b, TREE, trees=trees)
    for tree in trees:
        assert tree.visits == TREE.simulations
        for node in walk(tree):
            below = sum(child.visits for child in node.children)
            assert node.visits <= below + 2 * TREE.simulations and (
                node is tree or node.visits >= below - TREE.simulations
            )


@pytest.mark.parametrize("budget", [8, 13, 29, 64])
def test_a_tree_spends_what_it_says_and_never_more(engine, budget):
    sampling, params = SamplingParams(max_new_tokens=8, ignore_eos=True), replace(TREE, step_tokens=3, budget=budget)
    found = puct(engine, PROMPTS, sampling, share_of_b, params)
    assert all(answer.new_tokens <= budget for answer in found)
    assert sum(answer.new_tokens for answer in found) == engine.stats.new_tokens
    assert [len(answer.completion) for answer in found] == [8] * 3, "there is always an answer, of full length"
    assert all(answer.finish_reason == FinishReason.LENGTH for answer in found)


def test_steps_end_where_they_are_told_to(engine):
    """At a letter, which the step keeps; an end of the answer is an end."""
    trees: list[Node] = []
    params = TreeParams(step_strings=("b",), step_tokens=5, width=4, simulations=6)
    sampling = SamplingParams(max_new_tokens=12, stop_strings=("cc",), seed=7)
    found = puct(engine, PROMPTS, sampling, flat, params, trees=trees)
    nodes = [node for tree in trees for node in walk(tree) if node is not tree]
    assert all(B not in node.tokens[:-1] and EOS not in node.tokens[:-1] for node in nodes)
    assert {node.finish_reason for node in nodes if node.tokens[-1] == EOS} == {FinishReason.STOP}
    assert all(node.tokens[-1] in (B, EOS) or len(node.tokens) == 5 or node.finish_reason is not None for node in nodes)
    assert all(answer.completion for answer in found)


@pytest.mark.parametrize("pages", [None, 3], ids=["roomy", "scarce"])
def test_nothing_leaks(monkeypatch, pages):
    """What no step will follow gives its pages back at once, all are free in the end; scarce ones change nothing."""
    model = make_random_model("llama", max_position_embeddings=512, eos_token_id=7)
    memory = "auto" if pages is None else pages * 16 / 2**20
    engine, held = Engine(model, max_batch_size=8, kv_memory=memory), []
    opened = engine.open

    def remembered(*args, **options):
        held.append(opened(*args, **options))
        return held[-1]

    monkeypatch.setattr(engine, "open", remembered)
    sampling = SamplingParams(max_new_tokens=12, seed=3)

    def values(states):
        return [(sum(state) % 7) / 7 for state in states]

    found = puct(engine, [[5] * 60, [9] * 10], sampling, values, TreeParams((), 4, 3, 5))
    pool = held[0]._generation.admission.pool
    left = [s for s in held[0]._generation.sequences if not s.closed]
    for sequence in left:
        held[0]._generation.close(sequence, [])
    assert pool.available == pool.pages
    assert found == puct(Engine(model), [[5] * 60, [9] * 10], sampling, values, TreeParams((), 4, 3, 5))


def test_a_model_whose_logits_break_ends_its_answer():
    engine = Engine(fork_model())
    with torch.no_grad():
        engine.model.lm_head.weight[:, B] = math.nan
    (found,) = puct(engine, [[B]], SamplingParams(max_new_tokens=6), flat, TREE)
    assert found.finish_reason == FinishReason.ERROR and found.completion == []
    with pytest.raises(ValueError, match="not finite"):
        value_guided(engine, [[B]], SamplingParams(max_new_tokens=6), flat)


# Critics


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_critic_says_what_it_says_of_whole_sequences(kind):
    """Side by side, with and without a common past, to the last bit as alone."""
    model = prepare_model(make_model())
    roles = Roles(model, critic=kind)
    head = roles.value_head if kind == "shared" else roles.critic.head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    critic = Critic(model.base_model, head) if kind == "shared" else roles.critic
    states = [[A, B, token] for token in range(2, 9)] + [[C], [B, B], [C]]

    def alone(state):
        with torch.no_grad():
            tokens = torch.tensor(state)
            return critic(tokens, torch.arange(len(state)), [0, len(state)])[-1].item()

    assert critic_values(roles)(states) == [alone(state) for state in states] == critic_values(critic)(states)
    assert critic_values(roles)([]) == [] and model.training
    score = value_score(critic_values(roles), [[A, B], [C]])
    assert score([0, 1], [[5, EOS], [EOS]]) == [alone([A, B, 5]), alone([C])]


def test_roles_without_a_critic_are_refused():
    with pytest.raises(ValueError, match="critic.kind"):
        critic_values(Roles(prepare_model(make_model()), critic="none"))


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, s: puct(e, PROMPTS, replace(s, temperature=0), flat), "sampling.temperature is 0"),
        (lambda e, s: puct(e, PROMPTS, replace(s, n=2), flat), "sampling.n is 2"),
        (lambda e, s: puct(e, PROMPTS, replace(s, min_new_tokens=2), flat, TREE), "sampling.min_new_tokens is 2"),
        (lambda e, s: puct(Engine(e.model), PROMPTS, s, flat, TreeParams()), "needs a tokenizer"),
        (lambda e, s: puct(e, PROMPTS, s, flat, replace(TREE, budget=7)), "budget is 7, expected at least"),
        (lambda e, s: puct(e, PROMPTS, s, lambda states: [math.nan] * len(states), TREE), "values returned nan"),
        (lambda e, s: puct(e, [], s, flat, TREE), "prompts is empty"),
        (lambda e, s: puct(e, PROMPTS, s, flat, TREE, numbers=[0]), "numbers has 1 entries, expected 3"),
        (lambda e, s: value_guided(e, PROMPTS, replace(s, top_k=3), flat), "sampling.top_k is 3"),
        (lambda e, s: value_guided(e, PROMPTS, s, flat, width=0), "width is 0"),
        (lambda e, s: value_guided(e, PROMPTS, s, flat, gamma=1.5), "gamma is 1.5"),
        (lambda e, s: value_guided(e, PROMPTS, s, flat, budget=7), "budget is 7"),
        (lambda e, s: value_guided(e, PROMPTS, s, lambda states: [0.0]), "values returned 1 numbers, expected"),
        (lambda e, s: best_of_n(e, PROMPTS, s, lambda n, c: [math.inf] * 3), "score returned inf in place 0"),
        (lambda e, s: majority_vote(Engine(e.model), PROMPTS, s, str), "needs a tokenizer"),
        (lambda e, s: TreeParams(width=0), "width is 0"),
        (lambda e, s: TreeParams(step_strings=("",)), r"step_strings\[0\] is ''"),
    ],
)  # fmt: skip
def test_mistakes_are_named(engine, call, message):
    with pytest.raises(ValueError, match=message):
        call(engine, SamplingParams(max_new_tokens=8))
