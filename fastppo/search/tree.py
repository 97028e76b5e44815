"""A tree of steps, grown as AlphaZero grows its tree of moves: the policy proposes, the critic judges, visits decide.

A step is what the policy says up to a stop string (a newline, a full stop) or for so many tokens. A node's steps are sampled, so a tree has few
of the many that are possible, and the prior of each is its share of the samples, as in Sampled MuZero ("Learning and planning in complex action
spaces", 2021, where samples are the policy's own). To sample more at a node is one more choice there, whose prior is the probability of what has
not been seen. A critic that guides such a search of sentences: Feng et al. 2023, arXiv:2309.17179.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastppo.model import context_length
from fastppo.ops import _checks
from fastppo.rollout.engine import Engine
from fastppo.rollout.prompts import encode_prompts, prompt_numbers
from fastppo.rollout.rollout import FinishReason
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.sequences import Turn
from fastppo.rollout.session import Session
from fastppo.search.answers import Endings, Found, Score, Values, asked_scores, asked_values, one_answer, value_score

STREAMS = 2**32  # numbers that the draws of a tree may come from, at most


@dataclass(frozen=True)
class TreeParams:
    """Settings of `puct`."""

    step_strings: tuple[str, ...] = ("\n",)
    """Strings that end a step; it keeps them. Needs a tokenizer where there are any."""
    step_tokens: int = 64
    """Longest step in tokens; the last one ends at `max_new_tokens` of the answer."""
    width: int = 2
    """Steps that are sampled at a time to follow a node; the same one drawn twice is one."""
    simulations: int = 32
    """Descents before each step of the answer is chosen."""
    c_puct: float = 1.0
    """How much the prior and what was seldom visited weigh against Q, in units of the reward."""
    budget: int | None = None
    """Most tokens sampled for one answer, at least `max_new_tokens`; None is `8 * max_new_tokens`. Of these, what the rest of the answer can
    need is always kept."""

    def __post_init__(self) -> None:
        for name in ("step_tokens", "width", "simulations"):
            _checks.integer_number(name, getattr(self, name), at_least=1)
        _checks.number("c_puct", self.c_puct, at_least=0)
        if self.budget is not None:
            _checks.integer_number("budget", self.budget, at_least=1)
        if not isinstance(self.step_strings, tuple | list):
            raise TypeError(f"step_strings is {self.step_strings!r}, expected a tuple or list")
        for i, text in enumerate(self.step_strings):
            if not isinstance(text, str) or not text:
                raise ValueError(f"step_strings[{i}] is {text!r}, expected a string that is not empty")


@dataclass(eq=False)
class Node:
    """A state: the answer up to and with a step."""

    tokens: list[int]
    """Of the step."""
    logprob: float
    """Of the step, under the distribution that steps are sampled from."""
    value: float
    """The critic's of the state after the step, or the score of a finished answer."""
    finish_reason: FinishReason | None
    """Why no step follows; None where one may."""
    sequence: int | None
    """Its number in the session; None at the root."""
    samples: int = 1
    """How often the step was drawn."""
    draws: int = 0
    """How often steps were sampled to follow it, `TreeParams.width` or fewer at a time."""
    prior: float = 1.0
    """P(s, a): the step's share of the samples there."""
    visits: int = 0
    """N(s, a)"""
    total: float = 0.0
    """W(s, a), the sum of the values that its visits found."""
    children: list[Node] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Q(s, a) = W / N; before the first visit the critic's value of the state."""
        return self.total / self.visits if self.visits else self.value

    @property
    def unseen(self) -> float:
        """The probability of all steps that were never drawn."""
        return max(0.0, 1.0 - math.fsum(math.exp(child.logprob) for child in self.children))

    def select(self, c_puct: float) -> Node:
        """The child with the greatest Q(s, a) + c_puct P(s, a) sqrt(sum_b N(s, b)) / (1 + N(s, a)), the likelier where they are equal
        (AlphaGo Zero, Silver et al. 2017, "Mastering the game of Go without human knowledge", Methods)."""
        return max(
            self.children, key=lambda child: (self._bound(c_puct, child.mean, child.prior, child.visits), child.prior)
        )

    def wants_more(self, c_puct: float) -> bool:
        """Whether another draw of steps has a greater bound than every child. Its prior is `unseen`, and its Q what a draw is worth: a child
        by the child's Q, what was never seen by the critic's value of this state."""
        unseen = self.unseen
        known = math.fsum(math.exp(child.logprob) * child.mean for child in self.children)
        bound = self._bound(c_puct, known + unseen * self.value, unseen, self.draws)
        best = self.select(c_puct)
        return bound > self._bound(c_puct, best.mean, best.prior, best.visits)

    def _bound(self, c_puct: float, q: float, prior: float, visits: int) -> float:
        return q + c_puct * prior * math.sqrt(sum(child.visits for child in self.children)) / (1 + visits)

    def most_visited(self) -> Node:
        """The child with the most visits; of these with the greatest Q, then the likelier."""
        return max(self.children, key=lambda child: (child.visits, child.mean, child.prior))


class _Expansion(NamedTuple):
    tree: _Tree
    node: Node
    count: int
    completion: list[int]  # up to and with the node


class _Tree:
    """The search for one answer. `grow` says which node it wants steps for, and goes on once the node has them."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        limit: int,
        params: TreeParams,
        budget: int,
        start: Node,
        streams: Iterator[int],
    ) -> None:
        """streams: what the draws of its steps come from, so that they are the same whatever trees grow beside it."""
        self.number, self.prompt, self.limit, self.params, self.streams = number, prompt, limit, params, streams
        self.left, self.spent = budget, 0
        self.start = self.root = start
        self.completion: list[int] = []
        self.dropped: list[int] = []  # sequences that no step will follow

    def grow(self) -> Iterator[_Expansion]:
        while self.root.finish_reason is None:
            for _ in range(self.params.simulations):
                yield from self._simulate()
            if not self.root.children and self.root.finish_reason is None:  # with what was kept for it
                yield _Expansion(self, self.root, 1, self.completion)
            if self.root.children:
                self._move()

    def _simulate(self) -> Iterator[_Expansion]:
        """Down to a leaf, whose value is added all the way up. A leaf that is come to again gets steps and hands on to the best of them."""
        path, completion = [self.root], list(self.completion)
        while path[-1].finish_reason is None:
            node, count = path[-1], self._affordable(completion)
            due = node.wants_more(self.params.c_puct) if node.children else node is self.root or node.visits
            if due and count:
                yield _Expansion(self, node, count, list(completion))
            if not node.children:
                break
            path.append(node.select(self.params.c_puct))
            completion += path[-1].tokens
        for node in path:
            node.visits += 1
            node.total += path[-1].value

    def step_limit(self, completion: list[int]) -> int:
        """Tokens that a step after these may have."""
        return min(self.params.step_tokens, self.limit - len(completion))

    def _affordable(self, completion: list[int]) -> int:
        """How many steps may be sampled after these, so that the rest of the answer can still be."""
        kept = self.limit - len(self.completion)
        return min(self.params.width, max(0, self.left - kept) // max(1, self.step_limit(completion)))

    def _move(self) -> None:
        """The most visited step is the answer's next; what is below it stays."""
        chosen = self.root.most_visited()
        self.dropped += [node.sequence for child in self.root.children if child is not chosen for node in _below(child)]
        self.dropped += [] if self.root.sequence is None else [self.root.sequence]
        self.root = chosen
        self.completion += chosen.tokens

    def found(self) -> Found:
        return Found(self.completion, self.root.value, self.root.finish_reason, self.spent)


def puct(
    engine: Engine,
    prompts: Any,
    sampling: SamplingParams,
    values: Values,
    params: TreeParams | None = None,
    *,
    score: Score | None = None,
    trees: list[Node] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Found]:
    """Answers put together step by step, each the most visited one of a tree (AlphaZero, Silver et al. 2017, arXiv:1712.01815, without its noise).

    `simulations` times it goes down from the step that was chosen last by `Node.select` to a leaf, whose value is added to every node on the
    way; a leaf that is come to again gets steps of its own, forks of its sequence in a session. The trees of all prompts grow side by
    side. The same prompts with the same settings give the same trees.

    Args:
        sampling: of the steps; `max_new_tokens` and what ends a completion hold for the whole answer. `temperature` is above 0, `n` is 1.
        values: V, say `critic_values(trainer.roles)`.
        score: of finished answers; by default the value of the state before the last token.
        trees: a list that gets the first node of each tree.
        numbers: which prompts of a larger call these are, whose others are searched elsewhere: their trees are what they would be there. By
            default 0, 1, ...

    Raises:
        ValueError: settings that say otherwise, values or scores that are not one finite number each, and as `Engine.open` and `Session.add`.
    """
    params = params or TreeParams()
    sampling = _checked(sampling, params)
    grown = _plant(engine, prompts, sampling, params, values, numbers)
    score = score or value_score(values, [tree.prompt for tree in grown])
    per_step = replace(
        sampling,
        max_new_tokens=min(params.step_tokens, sampling.max_new_tokens),
        stop_strings=sampling.stop_strings + tuple(params.step_strings),
    )
    longest = max(len(tree.prompt) + tree.limit for tree in grown)
    growing = {tree.number: tree.grow() for tree in grown}
    with engine.open(per_step, max_length=longest) as session:
        forest = _Forest(session, Endings(engine, sampling), values, score)
        while growing:
            wanted = {number: next(steps, None) for number, steps in growing.items()}
            growing = {number: growing[number] for number, expansion in wanted.items() if expansion is not None}
            forest.expand([expansion for expansion in wanted.values() if expansion is not None])
            forest.close(grown)
    if trees is not None:
        trees += [tree.start for tree in grown]
    return [tree.found() for tree in grown]


class _Forest:
    """The trees' common session: steps of all that are wanted are sampled, and judged, together."""

    def __init__(self, session: Session, ends: Endings, values: Values, score: Score) -> None:
        self.session, self.ends, self.values, self.score = session, ends, values, score

    def expand(self, expansions: list[_Expansion]) -> None:
        """Give each node the steps that are wanted for it."""
        if not expansions:
            return
        owners = [self._begin(expansion) for expansion in expansions]
        turns = {turn.id: turn for turn in self.session}
        logprobs = self._logprobs(turns)
        for expansion, ids in zip(expansions, owners, strict=True):
            spent = sum(len(turns[i].tokens) for i in ids)
            expansion.tree.left, expansion.tree.spent = expansion.tree.left - spent, expansion.tree.spent + spent
            self._attach(expansion, [turns[i] for i in ids], logprobs)
        self._judge(expansions)

    def _begin(self, expansion: _Expansion) -> list[int]:
        """Turns for the steps, each in a sequence of its own; their numbers."""
        tree, node = expansion.tree, expansion.node
        streams = list(itertools.islice(tree.streams, expansion.count))
        if node.sequence is None:
            return self.session.add(tree.prompt, n=expansion.count, streams=streams)
        forks = [self.session.fork(node.sequence, stream=stream) for stream in streams]
        for fork in forks:
            self.session.append(fork, [], max_new_tokens=tree.step_limit(expansion.completion))
        return forks

    def _logprobs(self, turns: dict[int, Turn]) -> dict[int, float]:
        """Of the turns as wholes, under the distribution that they were sampled from."""
        rollout = self.session.rollout()
        ends, logprobs = rollout.action_bounds[1:], rollout.processed_logprobs.tolist()
        return {i: math.fsum(logprobs[ends[i] - len(turn.tokens) : ends[i]]) for i, turn in turns.items()}

    def _attach(self, expansion: _Expansion, turns: list[Turn], logprobs: dict[int, float]) -> None:
        """Nodes for the steps that are new, without values yet, but for those whose logits were not finite."""
        node, tree = expansion.node, expansion.tree
        node.draws += 1
        known = {tuple(child.tokens): child for child in node.children}
        for turn in turns:
            if turn.finish_reason != FinishReason.ERROR and tuple(turn.tokens) not in known:
                reason = self._finish_reason(tree, expansion.completion + turn.tokens)
                child = Node(turn.tokens, logprobs[turn.id], math.nan, reason, turn.id)
                known[tuple(turn.tokens)] = child
                node.children.append(child)
                continue
            tree.dropped.append(turn.id)
            if turn.finish_reason != FinishReason.ERROR:
                known[tuple(turn.tokens)].samples += 1
        for child in node.children:
            child.prior = child.samples / sum(other.samples for other in node.children)
        if not node.children:
            node.finish_reason = FinishReason.ERROR

    def _finish_reason(self, tree: _Tree, completion: list[int]) -> FinishReason | None:
        if self.ends.reached(completion):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(completion) == tree.limit else None

    def _judge(self, expansions: list[_Expansion]) -> None:
        """Values of the new nodes: the critic's of those that go on, the scores of the others."""
        new = [(e, c, e.completion + c.tokens) for e in expansions for c in e.node.children if math.isnan(c.value)]
        going_on = [(e, child, tokens) for e, child, tokens in new if child.finish_reason is None]
        finished = [(e, child, tokens) for e, child, tokens in new if child.finish_reason is not None]
        states = [e.tree.prompt + tokens for e, _, tokens in going_on]
        for (_, child, _), value in zip(going_on, asked_values(self.values, states), strict=True):
            child.value = value
        answers = [e.tree.number for e, _, _ in finished], [tokens for _, _, tokens in finished]
        for (_, child, _), value in zip(finished, asked_scores(self.score, *answers), strict=True):
            child.value = value

    def close(self, trees: list[_Tree]) -> None:
        """Free the pages of what no step will follow."""
        for tree in trees:
            for sequence in tree.dropped:
                self.session.close(sequence)
            tree.dropped.clear()


def _checked(sampling: SamplingParams, params: TreeParams) -> SamplingParams:
    """Raises ValueError for settings that a tree has no use for."""
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0, expected one above: the steps that follow a node are samples")
    if params.budget is not None and params.budget < sampling.max_new_tokens:
        raise ValueError(
            f"budget is {params.budget}, expected at least sampling.max_new_tokens = {sampling.max_new_tokens}"
        )
    return one_answer(sampling)


def _plant(
    engine: Engine,
    prompts: Any,
    sampling: SamplingParams,
    params: TreeParams,
    values: Values,
    numbers: Sequence[int] | None,
) -> list[_Tree]:
    most, context = sampling.max_new_tokens, context_length(engine.model) or 2**62
    budget = 8 * most if params.budget is None else params.budget
    encoded = encode_prompts(prompts, engine.model, engine.tokenizer)
    streams = [itertools.count(number * STREAMS) for number in prompt_numbers(numbers, len(encoded))]
    starts = [Node([], 0.0, value, None, None) for value in asked_values(values, encoded)]
    limits = [min(most, context - len(tokens)) for tokens in encoded]
    return [_Tree(i, encoded[i], limits[i], params, budget, start, streams[i]) for i, start in enumerate(starts)]


def _below(node: Node) -> Iterator[Node]:
    """The node and all nodes under it."""
    yield node
    for child in node.children:
        yield from _below(child)
