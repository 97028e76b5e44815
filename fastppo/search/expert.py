"""The expert of expert iteration: with each prompt's samples an answer that a search puts together with policy and critic as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fastppo.distributed import Ranks
from fastppo.learner import Learner
from fastppo.model.host import on_device
from fastppo.rollout.engine import Engine
from fastppo.rollout.record import bounds_of
from fastppo.rollout.rollout import Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.search.answers import Found, Values
from fastppo.search.critic_values import critic_values
from fastppo.search.lookahead import value_guided
from fastppo.search.tree import TreeParams, puct
from fastppo.search_config import SearchConfig

SEED_OFFSET = 0x5851F42D4C957F2D  # odd and large: the steps of a tree are not drawn as the samples beside it
SEEDS = 2**63  # of the sampler


class Expert:
    """Searches with the weights of a learner, whose policy is the engine's model. Of R ranks each searches for every R-th prompt; what is found
    does not depend on where.

    config: of kind value-guided or puct; the answer's end is worth what the critic says of the state before it.
    """

    def __init__(self, config: SearchConfig, engine: Engine, learner: Learner, ranks: Ranks) -> None:
        self._config, self._engine, self._learner, self._ranks = config, engine, learner, ranks
        self._values = critic_values(learner.roles)

    def join(
        self, rollout: Rollout, prompts: list[list[int]], sampling: SamplingParams, check: Callable[[], None]
    ) -> tuple[Rollout, dict[str, float]]:
        """The rollout with an answer to each prompt before the samples of that prompt, and metrics of the search.

        Args:
            rollout: `sampling.n` completions of each of the prompts, the same on every rank.
            check: called whenever the critic is asked; what it raises ends the search.
        """
        found = self._search_by_all(prompts, replace(sampling, n=1, seed=(sampling.seed + SEED_OFFSET) % SEEDS), check)
        answers = self._with_logprobs(
            _packed(prompts, found, rollout.temperature, rollout.tokens.device), sampling.seed
        )
        sampled = replace(rollout, values=None, found=torch.zeros_like(rollout.finish_reasons, dtype=torch.bool))
        both = Rollout.joined([answers, sampled], [0, len(prompts)])  # both are of the same prompts
        order = both.prompt_index.argsort(stable=True).tolist()
        return both.select(order), {"search/tokens": sum(answer.new_tokens for answer in found) / len(found)}

    def _search_by_all(
        self, prompts: list[list[int]], sampling: SamplingParams, check: Callable[[], None]
    ) -> list[Found]:
        """An answer to each prompt, the same on every rank."""

        def values(states: list[list[int]]) -> list[float]:
            check()
            return self._values(states)

        own = self._ranks.own(range(len(prompts)))
        found = self._search([prompts[i] for i in own], own, sampling, values) if own else []
        shares = [iter(share) for share in self._ranks.exchange("search", found)]
        return [next(shares[i % len(shares)]) for i in range(len(prompts))]

    def _search(
        self, prompts: list[list[int]], numbers: Sequence[int], sampling: SamplingParams, values: Values
    ) -> list[Found]:
        config, engine = self._config, self._engine
        if config.kind == "value-guided":
            # Its candidates are the likeliest tokens, whatever samples are drawn from.
            sampling = replace(sampling, top_k=0, top_p=1.0, min_p=config.min_p or 0.0)
            return value_guided(engine, prompts, sampling, values, **config.given("width", "budget"))
        settings = config.given("width", "step_tokens", "simulations", "c_puct", "budget")
        settings |= {} if config.step is None else {"step_strings": config.step}
        return puct(engine, prompts, sampling, values, TreeParams(**settings), numbers=numbers)

    def _with_logprobs(self, rollout: Rollout, seed: int) -> Rollout:
        """With the policy's own log-probabilities."""
        plan = self._learner.plan(rollout, seed)
        evaluation, _ = self._learner.evaluate(rollout, {"logprobs"}, plan, "always")
        return replace(rollout, logprobs=evaluation.logprobs, processed_logprobs=evaluation.logprobs)


def _packed(prompts: list[list[int]], found: list[Found], temperature: float, device: torch.device) -> Rollout:
    """Answers as a record, with log-probabilities of 0."""
    lengths = [len(prompt) + len(answer.completion) for prompt, answer in zip(prompts, found, strict=True)]
    tokens = [token for prompt, answer in zip(prompts, found, strict=True) for token in prompt + answer.completion]
    mask = [place >= len(prompt) for prompt, length in zip(prompts, lengths, strict=True) for place in range(length)]
    zeros = torch.zeros(sum(mask), dtype=torch.float32, device=device)
    return Rollout(
        tokens=on_device(tokens, device),
        cu_seqlens=on_device(bounds_of(lengths), device, torch.int32),
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths]),
        action_mask=on_device(mask, device, torch.bool),
        logprobs=zeros,
        processed_logprobs=zeros,
        finish_reasons=on_device([int(answer.finish_reason) for answer in found], device, torch.int8),
        prompt_index=torch.arange(len(prompts), device=device),
        temperature=temperature,
        found=torch.ones(len(prompts), dtype=torch.bool, device=device),
    )
