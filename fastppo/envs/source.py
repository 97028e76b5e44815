"""Where completions come from, and what they are paid: single answers of the engine, or episodes with an environment."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.data import PROMPT_COLUMNS
from fastppo.data.chat import ChatTemplate
from fastppo.debate_config import OWN_COLUMNS, Debate
from fastppo.environment_config import EnvironmentConfig
from fastppo.envs.debate import HeldDebates, hold_debates
from fastppo.envs.dialogue import Dialogue
from fastppo.envs.episodes import EpisodePlayer, Factory, Played, Row, check_max_tokens
from fastppo.envs.program import AgentProgram
from fastppo.envs.program_player import ProgramPlayer
from fastppo.envs.tools import TextMaker, has_tools, pays
from fastppo.model.adapters import Adapters
from fastppo.model.host import on_device
from fastppo.rewards import RewardResult, RewardRunner
from fastppo.rewards.result import RewardAnswers
from fastppo.rewards.runner import Reward
from fastppo.rewards.scores import Scores
from fastppo.rollout import Engine, Rollout, SamplingParams

NAME = "environment"  # of what episodes earned, among the rewards


class Answers:
    """Completions of one turn, which reward functions alone pay."""

    many_turns = False

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.final = list(range(len(rollout.sampled)))
        """Of the sampled sequences those whose scores tell how well a prompt was answered."""

    def prompts(self) -> Tensor:
        """int64 [B], which of the sampled prompts a sequence is of."""
        return self.rollout.prompt_index

    def groups(self, rows: Sequence[Row]) -> list[Row]:
        """Those that `rollout.prompt_index` counts, of the rows that were sampled for."""
        return list(rows)

    def columns(self, groups: Sequence[Row]) -> dict[str, list[Any]]:
        """What reward functions are told of each sequence besides its prompt: name -> [B] values."""
        owners = [groups[index] for index in self.rollout.prompt_index.tolist()]
        return {name: [row[name] for row in owners] for name in owners[0] if name not in PROMPT_COLUMNS}

    def to(self, device: torch.device) -> Answers:
        """The same with the tensors on another device."""
        return Answers(self.rollout.to(device))

    @classmethod
    def of_shares(cls, shares: Sequence[Answers]) -> Answers:
        """Of one call, whose rows were divided among several places."""
        return cls(Rollout.of_shares([share.rollout for share in shares]))

    def scored(self, result: RewardResult) -> RewardResult:
        """What the completions come to, where reward functions said `result` of them."""
        return result

    def scores(self, result: RewardResult) -> Scores:
        """What `scored` returned, as tensors."""
        return Scores.of(result, self.rollout.tokens.device)

    def per_sample(self, result: RewardResult) -> tuple[Rollout, RewardResult]:
        """One sequence for each sample of a prompt, and its part of what `scored` returned."""
        return self.rollout, result

    def completions(self, texts: list[str]) -> list[Any]:
        """What reward functions are given, of completions whose whole text is `texts`."""
        return texts

    def metrics(self, scores: Sequence[float]) -> dict[str, float]:
        """scores: [B], NaN where invalid."""
        return {}

    def held_out_metrics(self) -> dict[str, float]:
        """Of held-out prompts' completions, besides what their scores come to."""
        return {}

    def described(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of samples.jsonl, of the first completions, with what else there is to say of them."""
        return samples


class Episodes(Answers):
    """Conversations with an environment, which pays for each turn; what reward functions pay besides is paid at the end."""

    many_turns = True

    def __init__(self, played: Played) -> None:
        super().__init__(played.rollout)
        self._played = played
        self._earned = [episode.total_reward for episode in played.episodes]
        numbers = [episode.number for episode in played.episodes]
        self.final = [i for i, number in enumerate(numbers) if numbers[i + 1 : i + 2] != [number]]

    def to(self, device: torch.device) -> Episodes:
        return Episodes(replace(self._played, rollout=self.rollout.to(device)))

    @classmethod
    def of_shares(cls, shares: Sequence[Episodes]) -> Episodes:
        rollout = Rollout.of_shares([share.rollout for share in shares])
        return cls(Played.joined([share._played for share in shares], rollout))

    def scored(self, result: RewardResult) -> RewardResult:
        """The sum; invalid where either is."""
        samples = [self._played.episodes[i] for i in self.final]
        scores = [a + b for a, b in zip(result.scores, self._earned, strict=True)]
        failed = Counter(episode.error for episode in samples if episode.error is not None)
        errors = [f"{times} of {len(samples)} episodes are invalid: {why}" for why, times in failed.items()]
        by_name = {NAME: self._earned} | result.by_name
        return RewardResult(scores, by_name, sum(map(math.isnan, scores)), errors + result.errors)

    def per_sample(self, result: RewardResult) -> tuple[Rollout, RewardResult]:
        """Of the sequences of one episode the last."""
        if len(self.final) == self.rollout.num_sequences:
            return self.rollout, result
        return self.rollout.select(self.final), result.select(self.final)

    def scores(self, result: RewardResult) -> Scores:
        earned = on_device(self._earned, self.rollout.tokens.device, torch.float32)
        return super().scores(result).paid_by_turn(self._played.turn_rewards(), earned, self.rollout)

    def completions(self, texts: list[str]) -> list[Any]:
        """Messages where the prompt is a conversation; else the turns of the policy alone, a line each, so that nothing is paid for what the
        environment said."""
        return [
            episode.messages()
            if isinstance(episode.row["prompt"], list)
            else "\n".join(turn.completion for turn in episode.turns)
            for episode in self._played.episodes
        ]

    def metrics(self, scores: Sequence[float]) -> dict[str, float]:
        """Of the valid episodes, and of what waiting for environments cost."""
        episodes, lasts = self._played.episodes, self.final
        valid = [episodes[i] for i in lasts if episodes[i].error is None]
        turns = sum(len(episode.turns) for episode in episodes if episode.error is None)
        metrics = {
            "failure_rate": 1 - len(valid) / len(lasts),
            "sequences": len(episodes) / len(lasts),
            "waited_seconds": self._played.waited,
            "hanging_calls": float(self._played.hanging),
        }
        if valid:
            metrics["turns"] = turns / len(valid)
            metrics["return"] = sum(episode.total_reward for episode in valid) / len(valid)
            metrics["truncated_ratio"] = sum(episode.truncated for episode in valid) / len(valid)
        return {f"{NAME}/{name}": value for name, value in metrics.items()}

    def held_out_metrics(self) -> dict[str, float]:
        """`turns`, the mean of the valid episodes; nothing where none is."""
        metrics = self.metrics([])
        return {"turns": metrics[f"{NAME}/turns"]} if f"{NAME}/turns" in metrics else {}

    def described(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            sample
            | {
                "turns": [
                    {"completion": turn.completion, "reward": turn.reward, "observation": turn.observation}
                    for turn in episode.turns
                ],
                "error": episode.error,
            }
            for sample, episode in zip(samples, self._played.episodes, strict=False)
        ]


class Debates(Answers):
    """Debates, each seat of which reward functions pay for itself. A seat's completion is what it said last."""

    many_turns = True

    def __init__(self, held: HeldDebates, debate: Debate) -> None:
        super().__init__(held.rollout)
        self._held, self._debate = held.debates, debate
        self._episodes = [episode for one in held.debates for episode in one.seats.values()]
        self.final = [i for i, episode in enumerate(self._episodes) if episode.seat == debate.answering]

    def to(self, device: torch.device) -> Debates:
        return Debates(HeldDebates(self.rollout.to(device), self._held), self._debate)

    @classmethod
    def of_shares(cls, shares: Sequence[Debates]) -> Debates:
        whole = Rollout.joined([share.rollout for share in shares], [0] * len(shares))
        numbers = [episode.number for share in shares for episode in share._episodes]
        rollout = whole.select(sorted(range(len(numbers)), key=numbers.__getitem__))
        held = sorted((one for share in shares for one in share._held), key=lambda one: one.number)
        return cls(HeldDebates(rollout, held), shares[0]._debate)

    def prompts(self) -> Tensor:
        return super().prompts() // len(self._debate.seats)

    def groups(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows for _ in self._debate.seats]

    def columns(self, groups: Sequence[Row]) -> dict[str, list[Any]]:
        return super().columns(groups) | self._own_columns()

    def _own_columns(self) -> dict[str, list[Any]]:
        transcripts = [one.transcript(self._debate) for one in self._held for _ in one.seats]
        return dict(zip(OWN_COLUMNS, ([episode.seat for episode in self._episodes], transcripts), strict=True))

    def completions(self, texts: list[str]) -> list[Any]:
        """Messages where the prompt is a conversation."""
        said = [episode.turns[-1].completion if episode.turns else "" for episode in self._episodes]
        return [
            [{"role": "assistant", "content": text}] if isinstance(episode.row["prompt"], list) else text
            for episode, text in zip(self._episodes, said, strict=True)
        ]

    def scored(self, result: RewardResult) -> RewardResult:
        """Invalid where the debate is."""
        count = len(self._held)
        failed = Counter(one.error for one in self._held if one.error is not None)
        errors = [f"{times} of {count} debates are invalid: {why}" for why, times in failed.items()]
        scores = [
            score if episode.error is None else math.nan
            for score, episode in zip(result.scores, self._episodes, strict=True)
        ]
        return RewardResult(scores, result.by_name, sum(map(math.isnan, scores)), errors + result.errors)

    def metrics(self, scores: Sequence[float]) -> dict[str, float]:
        """What each seat earned and how many tokens it said, in the valid debates."""
        metrics = {"debate/failure_rate": sum(one.error is not None for one in self._held) / len(self._held)}
        for seat in self._debate.seats:
            own = [
                (score, sum(turn.tokens for turn in episode.turns))
                for score, episode in zip(scores, self._episodes, strict=True)
                if episode.seat == seat and not math.isnan(score)
            ]
            if own:
                metrics[f"seat/{seat}/reward"] = sum(score for score, _ in own) / len(own)
                metrics[f"seat/{seat}/tokens"] = sum(tokens for _, tokens in own) / len(own)
        return metrics

    def described(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        columns = self._own_columns()
        return [
            sample | {name: columns[name][place] for name in OWN_COLUMNS} | {"error": self._episodes[place].error}
            for place, sample in enumerate(samples)
        ]


class AnswerSource:
    """Single answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> AnswerSource:
        return self

    def __exit__(self, *exception: object) -> None:
        """There is nothing to end."""

    def sample(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams,
        chat: ChatTemplate | None,
        check: Callable[..., None],
        *,
        numbers: Sequence[int] | None = None,
        **options: Any,
    ) -> Answers:
        """`sampling.n` completions of each row.

        Args:
            chat: what rendered the prompts. check: called often; what it raises ends the sampling.
            numbers: the rows that are sampled for here, the others being elsewhere; by default all.
            options: `progress` and `value_head`, as `Engine.generate` takes them.
        """
        numbers = range(len(rows)) if numbers is None else numbers
        prompts = [rows[number]["prompt_ids"] for number in numbers]
        return Answers(self._engine.generate(prompts, sampling, on_tokens=check, numbers=numbers, **options))


class EpisodeSource(AnswerSource):
    """Episodes. Between `__enter__` and `__exit__` environments stay open for the next ones, else they are closed after each `sample`.

    dialogue: how texts become tokens where the prompts' chat template does not say it.
    """

    def __init__(
        self,
        player: EpisodePlayer | ProgramPlayer,
        tokenizer: PreTrainedTokenizerBase,
        dialogue: Dialogue | None = None,
    ) -> None:
        self._player, self._tokenizer, self._dialogue, self._kept = player, tokenizer, dialogue, False

    def __enter__(self) -> EpisodeSource:
        self._kept = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept = False
        self._player.close()

    def sample(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams,
        chat: ChatTemplate | None,
        check: Callable[..., None],
        **options: Any,
    ) -> Episodes:
        dialogue = self._dialogue or Dialogue(self._tokenizer, chat)
        try:
            return Episodes(self._player.play(rows, sampling, dialogue, check=check, **options))
        finally:
            if not self._kept:
                self._player.close()


class DebateSource(AnswerSource):
    """Debates."""

    def __init__(
        self,
        debate: Debate,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        config: EnvironmentConfig,
        adapters: Adapters | None,
    ) -> None:
        super().__init__(engine)
        self._adapters = adapters if debate.own_adapters else None
        check_max_tokens(engine.model, config.max_tokens)
        self._debate, self._tokenizer, self._max_tokens = debate, tokenizer, config.max_tokens

    def sample(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams,
        chat: ChatTemplate | None,
        check: Callable[..., None],
        **options: Any,
    ) -> Debates:
        dialogue, limit = Dialogue(self._tokenizer, chat), self._max_tokens
        options |= {"max_tokens": limit, "adapters": self._adapters, "check": check}
        held = hold_debates(self._debate, self._engine, rows, sampling, dialogue, **options)
        return Debates(held, self._debate)


def source_of(
    environment: Factory | AgentProgram | Debate | None,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate | None,
    config: EnvironmentConfig,
    adapters: Adapters | None = None,
) -> AnswerSource:
    """Raises TypeError for what makes no environment, ValueError where the chat template cannot render its episodes.

    adapters: the policy's, with those of a debate's seats.
    """
    if environment is None:
        return AnswerSource(engine)
    if isinstance(environment, AgentProgram):
        if not tokenizer.chat_template:
            raise ValueError("a program speaks in messages, and the tokenizer has no chat template, expected one")
        spoken = Dialogue(tokenizer, ChatTemplate(tokenizer, None))  # the program says everything
        return EpisodeSource(ProgramPlayer(environment, engine, config), tokenizer, spoken)
    if isinstance(environment, Debate):
        if chat is not None:
            Dialogue(tokenizer, chat).check("user")
        return DebateSource(environment, engine, tokenizer, config, adapters)
    if has_tools(environment):
        Dialogue(tokenizer, chat).check_tools()
    elif chat is not None and _answers(environment):
        Dialogue(tokenizer, chat).check("user")
    return EpisodeSource(EpisodePlayer(environment, engine, config), tokenizer)


def _answers(environment: Factory) -> bool:
    """Whether it is known before it makes anything that this will say something upon a turn, and has no tools."""
    if isinstance(environment, TextMaker):
        return environment.answers
    return isinstance(environment, type) and not hasattr(environment, "tools")


class NoRewards:
    """In place of a `RewardRunner` where the environment alone pays: 0 for everything."""

    def answers(self, prompts: Sequence[Any], completions: Sequence[str], *_: Any) -> RewardAnswers:
        return RewardAnswers({}, [], len(completions))

    def result(self, answers: RewardAnswers, normalise: bool = True) -> RewardResult:
        return RewardResult([0.0] * answers.count, {}, 0, [])

    normalises = False

    def check_columns(self, names: Iterable[str]) -> None:
        """No column is asked for."""

    def __enter__(self) -> NoRewards:
        return self

    def __exit__(self, *exception: object) -> None:
        """There is nothing to end."""


def rewards_of(
    reward: Reward | Sequence[Reward] | None, environment: Factory | AgentProgram | Debate | None, **timing: Any
) -> RewardRunner | NoRewards:
    """Raises ValueError where nobody pays. timing: as `RewardRunner` takes it."""
    if reward is not None:
        return RewardRunner(reward, **timing)
    if isinstance(environment, Debate):
        raise ValueError("None pays no seat of the debate, expected a function: its judge")
    if environment is None or not pays(environment):
        raise ValueError("None pays nothing, expected a function, or an environment that pays (tools alone do not)")
    return NoRewards()


def reward_columns(environment: Factory | Debate | None, row: Row) -> list[str]:
    """Names of what reward functions are told besides the prompt, of data with such rows. Raises ValueError where these do not suit the debate."""
    names = [name for name in row if name not in PROMPT_COLUMNS]
    if not isinstance(environment, Debate):
        return names
    environment.check_columns(names)
    return [*names, *OWN_COLUMNS]


def seat_adapters(environment: Factory | AgentProgram | Debate | None, adapters: Adapters | None, config: Any) -> None:
    """Add the adapters of a debate's seats where each has its own. config: of the run. Raises ValueError where they cannot have."""
    if not isinstance(environment, Debate) or not environment.own_adapters:
        return
    if adapters is None:
        raise ValueError("own_adapters of the debate is True, expected False without adapters (lora.r, or a PeftModel)")
    for name, value, why in (
        ("algorithm", config.algorithm == "trpo", "trpo, whose step is of one policy"),
        ("distributed.sharding", config.distributed.sharding == "full", "full, which samples from one merged copy"),
    ):
        if value:
            raise ValueError(f"own_adapters of the debate is True, expected False with {name} {why}")
    adapters.add_seats(environment.seats, environment.answering)
