"""Completions of prompts, and what they are worth: sampled and scored by all ranks, each its share of the prompts, and known to every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.data import Row
from fastppo.data.chat import ChatTemplate
from fastppo.distributed import Ranks
from fastppo.envs.source import Answers, AnswerSource, NoRewards
from fastppo.model.decoding import decode
from fastppo.out_of_memory import sample_within_memory
from fastppo.rewards import RewardResult, RewardRunner
from fastppo.rewards.result import RewardAnswers
from fastppo.rollout import Engine, SamplingParams


class Collector:
    """Of R ranks each samples for every R-th prompt, and scores what it has sampled. A completion does not depend on where it is sampled; whatever
    compares completions (a normalised reward) sees all of them. Ranks that sample together do so for every prompt of the team, and score each
    its own.

    Args:
        source: of the completions. engine: that it samples with. rewards: of their scores. chat: what rendered the prompts.
        device: of the records. note: hears what the user should know. team: how many ranks sample together.
    """

    def __init__(
        self,
        source: AnswerSource,
        engine: Engine,
        rewards: RewardRunner | NoRewards,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatTemplate | None,
        device: torch.device,
        ranks: Ranks,
        note: Callable[[str], None] = lambda sentence: None,
        team: int = 1,
    ) -> None:
        self.engine, self._note = engine, note
        self._source, self._rewards, self._tokenizer, self._chat = source, rewards, tokenizer, chat
        self._device, self._ranks, self._team = device, ranks, team

    def sample(
        self, rows: Sequence[Row], sampling: SamplingParams, check: Callable[..., None], **options: Any
    ) -> Answers:
        """`sampling.n` completions of each row: all of the first, all of the second, ... check: is called often, but by a team, which none of its
        ranks may leave. options: as `AnswerSource.sample` takes them."""
        return self.gather(self.share(rows, sampling, check, **options))

    def share(
        self, rows: Sequence[Row], sampling: SamplingParams, check: Callable[..., None], **options: Any
    ) -> Answers | None:
        """What `sample` samples on this rank, which meets none but its team for it; None where that is nothing."""
        ranks, together = self._ranks, self._team > 1
        numbers = list(range(len(rows))[ranks.rank // self._team :: ranks.size // self._team])
        if not numbers:
            return None
        given = rows, sampling, self._chat, _hear_nothing if together else check
        attempt = partial(self._source.sample, *given, numbers=numbers, **options)
        return sample_within_memory(attempt, self.engine, len(numbers) * sampling.n, self._note, together=together)

    def gather(self, share: Answers | None) -> Answers:
        """What `sample` returns, of the shares of all ranks."""
        ranks = self._ranks
        if ranks.size == 1:
            here = share.rollout.tokens.device.type == self._device.type
            return share if here else share.to(self._device)
        on_host = None if share is None or ranks.rank % self._team else share.to(torch.device("cpu"))
        shares = [found for found in ranks.exchange("rollout", on_host) if found is not None]
        return type(shares[0]).of_shares(shares).to(self._device)

    def score(
        self,
        answers: Answers,
        rows: Sequence[Row],
        at_once: Callable[[], AbstractContextManager[None]],
        *,
        normalise: bool = True,
    ) -> tuple[RewardResult, list[str]]:
        """(scores, texts without special tokens) of every completion, in the rollout's order.

        Args:
            rows: that the completions are of. at_once: a block in which a signal ends the waiting.
            normalise: False leaves out what a `WeightedReward` asks for.
        """
        rollout, size, rows = answers.rollout, self._ranks.size, answers.groups(rows)
        prompts, ids = rollout.prompt_index.tolist(), rollout.completions()
        own = [place for place, prompt in enumerate(prompts) if prompt % size == self._ranks.rank]
        texts = [""] * len(prompts)
        for place in own:
            texts[place] = decode(self._tokenizer, ids[place], skip_special_tokens=True)
        owners = [rows[prompts[place]] for place in own]
        columns = {name: [values[i] for i in own] for name, values in answers.columns(rows).items()}
        with at_once():
            said = answers.completions(texts)
            found = self._rewards.answers(
                [row["prompt"] for row in owners], [said[i] for i in own], columns, [ids[i] for i in own]
            )
        shares = self._ranks.exchange("rewards", (own, [texts[place] for place in own], found))
        for places, theirs, _ in shares:
            for place, text in zip(places, theirs, strict=True):
                texts[place] = text
        whole = RewardAnswers.of_shares([answered for _, _, answered in shares], [places for places, _, _ in shares])
        return answers.scored(self._rewards.result(whole, normalise)), texts


def _hear_nothing(*_: Any) -> None:
    """A check that ends no sampling."""
