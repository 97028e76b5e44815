"""Decoding that looks one token ahead with a critic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.model import context_length, evaluating, lm_head, packed_hidden
from fastppo.model.host import on_device
from fastppo.ops import _checks
from fastppo.rollout.engine import Engine
from fastppo.rollout.prompts import encode_prompts
from fastppo.rollout.record import bounds_of
from fastppo.rollout.rollout import FinishReason
from fastppo.rollout.sampling import SamplingParams
from fastppo.search.answers import Endings, Found, Score, Values, asked_scores, asked_values, one_answer, value_score


class _Candidate(NamedTuple):
    line: _Line
    token: int
    ends: bool  # the answer


@dataclass
class _Line:
    """An answer that grows."""

    number: int  # of its prompt
    prompt: list[int]
    limit: int  # tokens that the answer may have
    left: int  # of the budget
    quality: float = math.nan  # of the newest token
    completion: list[int] = field(default_factory=list)
    spent: int = 0
    finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.completion

    @property
    def width(self) -> int:
        """Candidates of the next token that the budget allows, when each token after it gets as many."""
        return self.left // (self.limit - len(self.completion))


@torch.no_grad()
def value_guided(
    engine: Engine,
    prompts: Any,
    sampling: SamplingParams,
    values: Values,
    *,
    width: int = 8,
    budget: int | None = None,
    gamma: float = 1.0,
    score: Score | None = None,
) -> list[Found]:
    """Answers of which each token is the candidate with the greatest Q(s, a) = r + gamma V(s'), where s' is the state after it.

    The critic is so read as Q-learning would have it: one step of its own Bellman equation, maximised over the candidates. These are the likeliest
    tokens under the policy, without those that `sampling.min_p` leaves out; of several with the same Q the likeliest is taken. No chance is
    involved. Policy and critic run whole sequences at each token, without a cache: the time grows with the square of the length.

    Args:
        sampling: what ends an answer, `min_p`, and `temperature`, which `min_p` is seen at (0: at 1). `n` is 1, top-k and top-p are off.
        values: V, say `critic_values(trainer.roles)`.
        width: most candidates of a token.
        budget: most tokens that may be looked at as candidates for one answer, at least `max_new_tokens`; by default `width * max_new_tokens`.
            What is left of it is spread evenly over the tokens that may still come.
        score: r of finished answers; r is 0 before. By default an answer's end is worth the value of the state before it.

    Raises:
        ValueError: settings that say otherwise, values or scores that are not one finite number each, logits that are NaN, and as `Engine.generate`.
    """
    _check(sampling, width, gamma)
    lines = _lines(engine, prompts, sampling, width, budget)
    ends, score = Endings(engine, sampling), score or value_score(values, [line.prompt for line in lines])
    while growing := [line for line in lines if line.finish_reason is None]:
        logits = _next_logits(engine, [line.tokens for line in growing])
        candidates = _candidates(growing, logits, sampling, width, ends)
        _grow(candidates, _qualities(candidates, values, score, gamma))
    return [Found(line.completion, line.quality, line.finish_reason, line.spent) for line in lines]


def _check(sampling: SamplingParams, width: int, gamma: float) -> None:
    one_answer(sampling)
    for name, off in (("top_k", 0), ("top_p", 1.0)):
        if getattr(sampling, name) != off:
            raise ValueError(
                f"sampling.{name} is {getattr(sampling, name)}, expected {off}: candidates are the `width` likeliest tokens"
            )
    _checks.integer_number("width", width, at_least=1)
    _checks.number("gamma", gamma, at_least=0, at_most=1)


def _lines(engine: Engine, prompts: Any, sampling: SamplingParams, width: int, budget: int | None) -> list[_Line]:
    most = sampling.max_new_tokens
    budget = width * most if budget is None else _checks.integer_number("budget", budget, at_least=most)
    context = context_length(engine.model) or 2**62
    encoded = encode_prompts(prompts, engine.model, engine.tokenizer)
    return [_Line(i, prompt, min(most, context - len(prompt)), budget) for i, prompt in enumerate(encoded)]


def _next_logits(engine: Engine, sequences: list[list[int]]) -> Tensor:
    """fp32 [n, V], of the tokens after these."""
    model, device = engine.model, engine.model.device
    lengths = [len(sequence) for sequence in sequences]
    tokens = on_device([token for sequence in sequences for token in sequence], device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    bounds = bounds_of(lengths)
    with evaluating(model):
        hidden = packed_hidden(model, tokens, positions, bounds)
        return lm_head(model).logits(hidden[on_device(bounds[1:], device) - 1])


def _candidates(
    lines: list[_Line], logits: Tensor, sampling: SamplingParams, width: int, ends: Endings
) -> list[_Candidate]:
    """Those of each line, the likeliest first."""
    widths = [min(width, line.width, logits.shape[1]) for line in lines]
    found = (logits / (sampling.temperature or 1.0)).topk(max(widths), dim=1)
    gaps = (found.values - found.values[:, :1]).tolist()  # nats behind the likeliest
    if any(math.isnan(row[0]) for row in gaps):
        raise ValueError("the logits of the policy are not finite, expected finite ones")
    floor = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    candidates = []
    for line, count, row, tokens in zip(lines, widths, gaps, found.indices.tolist(), strict=True):
        for gap, token in list(zip(row, tokens, strict=True))[:count]:
            if gap >= floor and gap > -math.inf:
                candidates.append(_Candidate(line, token, ends.reached([*line.completion, token])))
    return candidates


def _qualities(candidates: list[_Candidate], values: Values, score: Score, gamma: float) -> list[float]:
    """Q of each candidate."""
    going_on = [c for c in candidates if not c.ends]
    ending = [c for c in candidates if c.ends]
    after = iter(asked_values(values, [[*c.line.tokens, c.token] for c in going_on]))
    answers = [c.line.number for c in ending], [[*c.line.completion, c.token] for c in ending]
    scores = iter(asked_scores(score, *answers))
    return [next(scores) if c.ends else gamma * next(after) for c in candidates]


def _grow(candidates: list[_Candidate], qualities: list[float]) -> None:
    """Each line by its best candidate, the likeliest where several are."""
    best: dict[int, int] = {}
    for place, candidate in enumerate(candidates):
        line = candidate.line
        line.left, line.spent = line.left - 1, line.spent + 1
        if line.number not in best or qualities[place] > qualities[best[line.number]]:
            best[line.number] = place
    for place in best.values():
        line, token, ends = candidates[place]
        line.completion.append(token)
        line.quality = qualities[place]
        if ends:
            line.finish_reason = FinishReason.STOP
        elif len(line.completion) == line.limit:
            line.finish_reason = FinishReason.LENGTH
