"""The PPO loop: collect, score, evaluate, credit, update, record."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.ahead import SamplingAhead
from fastppo.algorithms.expert_iteration import ExpertIteration
from fastppo.algorithms.ppo import PPO
from fastppo.algorithms.trpo import TRPO, require_float32
from fastppo.best import Best
from fastppo.callbacks import Callback, Callbacks
from fastppo.collection import Collector
from fastppo.config import PPOConfig
from fastppo.console import Reporter, printable
from fastppo.critics import histogram_of, separate_critic
from fastppo.data import PromptDataset, PromptSampler, Row, load_prompts
from fastppo.data.difficulty import DifficultyPools
from fastppo.debate_config import Debate
from fastppo.distributed import device_of, ranks_of, sharding_of, team_of_ranks
from fastppo.envs import AgentProgram
from fastppo.envs.episodes import Factory
from fastppo.envs.source import Answers, AnswerSource, reward_columns, rewards_of, seat_adapters, source_of
from fastppo.errors import TrainingError
from fastppo.experience import Experience, sample_with_signal
from fastppo.held_out import load_held_out
from fastppo.interruption import Interruption
from fastppo.learner import Learner, NonFiniteUpdates
from fastppo.metrics import Clock, engine_metrics, reward_metrics, rollout_metrics, search_metrics
from fastppo.model import context_length, make_exact
from fastppo.model.adapters import Adapters, adapters_of, add_adapters
from fastppo.model.frozen_copy import FrozenCopy
from fastppo.model.host import on_device, require_gpu
from fastppo.model.loading import default_type
from fastppo.model.tensor_parallel import copy_to_sample_from
from fastppo.model.writing import odd_generation_config
from fastppo.rewards import RewardResult
from fastppo.rewards.runner import Reward
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, FinishReason, Rollout, SamplingParams
from fastppo.rollout.stopping import cut_off_warning, describe_stops, stop_ids
from fastppo.run_folder import RunFolder
from fastppo.run_loop import RunLoop, default_recipe, naming, ready_model, refuse_autocast
from fastppo.run_state import RunState, identity
from fastppo.samples import add_credit, describe_samples
from fastppo.search.expert import Expert
from fastppo.search_config import SAMPLED
from fastppo.tracking import check_installed

if TYPE_CHECKING:
    from peft import PeftModel

ROUND_SEED_OFFSET = 0x9E3779B97F4A7C15  # odd and large: no round of any step has the seed of another one
SEEDS = 2**63  # of the sampler
KEPT_CACHE = 0.1  # of a GPU's memory, at most, that the sampler keeps during updates, so that its CUDA graphs serve the next step too


class PPOTrainer(RunLoop):
    """Proximal policy optimisation (Schulman et al. 2017) of a causal language model on prompts and a reward.

    Args:
        model: a folder (text or `Path`) or hub name, or a loaded Transformers causal LM, which is trained in place; of a `peft.PeftModel` its LoRA
            adapter is.
        reward: `fn(prompts, completions, **columns) -> list[float | None]`, sync or async, or a list of them (the sum of those that apply is
            maximised); `fastppo.rewards.WeightedReward` gives one a weight, or normalises it. None where the environment alone pays.
        prompts: list of strings, of rows with a "prompt", a `datasets.Dataset`, a file or hub name; or, where `DataConfig` has settings for
            them, what `fastppo.data.load_prompts(source, tokenizer, DataConfig(...))` makes of these.
        config: every setting; see `PPOConfig`.
        tokenizer: needed with a loaded model; else the model's own by default.
        eval_prompts: held-out prompts, in the same forms; or several sets of them, a mapping from name to prompts.
        environment: makes what the policy talks to in episodes of several turns, a class for instance (`fastppo.envs.Environment`), or a program that
            talks to the policy (`fastppo.envs.AgentProgram`). What it pays is added to `reward`, where there is one. A `fastppo.envs.Debate`: the
            policy speaks in all its seats, which `reward` pays.
        callbacks: called between the steps; see `Callback`.
        reporter: where progress is shown; by default a table on a terminal, plain lines elsewhere.
        dtype: weight type when `model` is a name: "auto" is float32 on the CPU, bfloat16 on a GPU.
        recipe: what to write to the run folder's `config.yaml`; by default the PPO settings and the model's name.

    Raises:
        ValueError, TypeError: an argument that cannot be used, or a model that could not be written in the end, before anything is written.
    """

    # The networks made here are to learn, also where the caller has switched gradients off.
    @torch.inference_mode(mode=False)
    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PeftModel,
        *,
        reward: Reward | Sequence[Reward] | None = None,
        prompts: Any,
        environment: Factory | AgentProgram | Debate | None = None,
        config: PPOConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_prompts: Any = None,
        callbacks: Sequence[Callback] = (),
        reporter: Reporter | None = None,
        dtype: str = "auto",
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.config = config = config or PPOConfig()
        device = device_of(config.device)
        refuse_autocast("PPOTrainer is made", device)
        check_installed(config.tracking)
        self.callbacks = Callbacks(callbacks)
        self.recipe, self.total_steps = recipe or default_recipe(config, model), config.total_steps
        # First, so that the processes which run rewards hold no copy of the model.
        with naming("reward"):
            timing = {"timeout": config.reward.timeout, "retries": config.reward.retries}
            self.rewards = rewards_of(reward, environment, **timing)
        self.ranks = ranks_of(config.distributed, device)
        self.adapters = adapters_of(model, config.lora)
        model = model if self.adapters is None else self.adapters.model
        team = team_of_ranks(config.distributed, self.ranks, device)
        # What needs a team for its samples is divided from the host's memory.
        start, dtype = (device, dtype) if team is None else (torch.device("cpu"), default_type(dtype, device))
        self.model, self.tokenizer = ready_model(model, tokenizer, dtype, start, self.ranks)
        if config.rollout.exact:
            with naming("rollout"):
                make_exact(self.model)
        self.environment = environment
        self.prompts = self._load(prompts, "prompts")
        self.held_out = load_held_out(eval_prompts, self._load, config, SEEDS)
        self._stops()  # an id that the model does not have is said before anything is written
        self.reporter = self._reporter(reporter or Reporter(config.total_steps))
        if config.algorithm == "trpo":
            require_float32(self.model)
        self.algorithm = self._algorithm()
        if config.lora.r:
            self.adapters = add_adapters(self.model, config.lora, config.seed)
        with naming("environment"):
            seat_adapters(environment, self.adapters, config)
        if config.learner.offload_reference:
            require_gpu("learner.offload_reference", device)
        sharding = sharding_of(config.distributed, self.ranks, device)
        if sharding is not None:
            self.whole = copy_to_sample_from(self.model, self.adapters, team, device)
        self.roles = Roles(
            self.model,
            critic=config.critic.kind,
            own_critic=separate_critic(config.critic, self.model, self.tokenizer, self._longest()),
            histogram=histogram_of(config.critic),
            with_reference="reference" in self.algorithm.needs,
            gradient_checkpointing=config.learner.gradient_checkpointing,
            adapters=self.adapters,
            offload_reference=config.learner.offload_reference,
        )
        if config.lora.quantization:
            self.roles.quantize_base()
        self._require_same_ranks(self.roles)
        if sharding is not None:
            self.roles.shard(sharding)
        self.learner = Learner(
            self.roles,
            optimizer=config.optimizer,
            critic=config.critic,
            config=config.learner,
            total_steps=config.total_steps,
            note=self.reporter.note,
            ranks=self.ranks,
        )
        with naming("environment"):
            _require_whole_answers(environment, config)
            self.source, self.collector = self._sampler(
                self.model if self.whole is None else self.whole.model, self.adapters
            )
            self.ahead = None
            if config.rollout.staleness:
                frozen = FrozenCopy(self.model, self.adapters)
                sampler = self._sampler(frozen.model, frozen.adapters)
                self.ahead = SamplingAhead(frozen, *sampler, lambda: self._interruption.check())
        self.engine = self.collector.engine
        self._learned_from = self.collector if self.ahead is None else self.ahead.collector
        expert = config.algorithm == "expert_iteration" and config.search.kind not in SAMPLED
        self.expert = Expert(config.search, self.engine, self.learner, self.ranks) if expert else None
        pools = DifficultyPools.of(config.difficulty, len(self.prompts), normalised=self.rewards.normalises)
        self.sampler = PromptSampler(len(self.prompts), config.rollout.prompts_per_step, config.seed, pools)
        self.best = Best(config.evaluation)
        more = {"best": self.best, "callbacks": self.callbacks, "ahead": self.ahead}
        self.state = RunState(self.learner, self.algorithm, self.sampler, self._identity, **more)
        self._interruption = Interruption()

    @property
    def _evaluates(self) -> bool:
        return self.held_out is not None

    @contextmanager
    def _resources(self) -> Iterator[None]:
        with self.rewards, self.source, nullcontext() if self.ahead is None else self.ahead:
            self._say_what_holds()
            yield

    def evaluate(self) -> dict[str, float]:
        """What `fastppo.held_out` measures on the held-out prompts; a function of the weights and the seed alone."""
        if self.held_out is None:
            raise ValueError("eval_prompts is None, expected held-out prompts to evaluate on")
        with self.ranks.together("evaluation of the held-out prompts"):
            if self.ahead is not None:
                self.ahead.wait()  # environments and rewards are not asked from two sides
            return self.held_out.evaluate(self._complete, self.reporter.note)

    # One step

    def _train_step(self, folder: RunFolder) -> None:
        clock, seed = Clock(self.model.device), _mix(self.config.seed, self.step)
        metrics = self.learner.start_step(self.step)
        experience = self._experience(clock, seed, folder)
        rollout, scores = experience.rollout, experience.scores
        if self.ahead is not None:
            metrics |= self.ahead.step_metrics(self.step)
        metrics |= experience.metrics | reward_metrics(experience.all_scores)
        with clock("time/score"):
            plan = self.learner.plan(rollout, seed, self.reporter.note_once)
            critic_plan = self.learner.critic_plan(rollout, seed)
            recompute = self._recompute_logprobs()
            evaluation, plan = self.learner.evaluate(rollout, self.algorithm.needs, plan, recompute)
            targets = self.algorithm.credit(rollout, evaluation, scores)
            if warning := self.algorithm.range_warning(targets.returns):
                self.reporter.note_once(warning)
            add_credit(experience.described, evaluation, targets)
            folder.log_samples(self.step + 1, experience.samples)
            kl_coef = self.algorithm.reward_kl.coef
            metrics |= rollout_metrics(rollout, scores, evaluation, targets, self.config, kl_coef)
            if self.config.algorithm == "expert_iteration" and not self.algorithm.warmup.holds(self.step):
                metrics |= search_metrics(rollout, scores, evaluation, targets, experience.prompts)
        self.state.wait()  # a rank that is lost in an update costs that step alone
        with self.ranks.together("beginning of the update"):
            self._interruption.check()
        with clock("time/update"):
            self.state.begin_update()
            if self.ahead is not None:
                self._sample_ahead()
            try:
                records = rollout, evaluation, targets
                metrics |= self.algorithm.update(self.learner, *records, plan, self._show_update, critic_plan)
                self._gather()
            except NonFiniteUpdates as error:
                where = folder.path / f"offending-batch-{self.step:06d}.safetensors"
                if self.ranks.first:
                    _dump_batch(where, rollout, evaluation, targets)
                raise TrainingError(f"{error}; the batch is in {where}") from error
        metrics |= clock.metrics(experience.tokens) | self.ranks.step_metrics()
        self.state.step_done(metrics)

    def _experience(self, clock: Clock, seed: int, folder: RunFolder) -> Experience:
        """Completions to learn from, with their scores."""
        config, samples = self.config.rollout, []

        def sample(number: int) -> Experience:
            round_seed = (seed + number * ROUND_SEED_OFFSET) % SEEDS
            experience = self._sample(clock, round_seed, folder if number == 0 else None)
            samples.extend(experience.samples)
            return experience

        if not config.dynamic_sampling:
            return sample(0)
        try:
            return sample_with_signal(sample, groups=config.prompts_per_step, max_rounds=config.max_sampling_rounds)
        except TrainingError:
            folder.log_samples(self.step + 1, samples)
            raise

    def _sample(self, clock: Clock, seed: int, folder: RunFolder | None) -> Experience:
        """Completions of the next prompts and their scores; some of them are written to the folder."""
        with clock("time/rollout"):
            answers, rows = self._collect(seed)
        metrics = engine_metrics(self._learned_from.engine.stats)
        if self.expert is not None and not self.algorithm.warmup.holds(self.step):
            with clock("time/search"):
                answers, searched = self._with_found(answers, rows, seed)
            metrics |= searched
        if self.step == 0 and not answers.many_turns:
            if warning := cut_off_warning(answers.rollout, *self._stops()):
                self.reporter.note_once(warning)
        greedy = None
        if "greedy_scores" in self.algorithm.needs:
            with clock("time/baseline"):
                greedy = self._greedy_scores(rows, seed)
        with clock("time/reward"):
            experience = self._score(answers, rows, folder, greedy)
        scores, device = experience.all_scores.values, self.model.device
        sampled, final = on_device(answers.rollout.sampled, device), on_device(answers.final, device)
        seen = answers.prompts()[sampled][final], scores[final]
        metrics |= answers.metrics(scores.tolist()) | self.sampler.saw(*seen, self.config.reward.solved_score)
        return experience._replace(metrics=metrics)

    def _collect(self, seed: int) -> tuple[Answers, list[Row]]:
        """Completions of the next prompts, and the rows that these stand in."""
        sampling, check = self.config.rollout.sampling(seed), self._interruption.check
        if self.ahead is None:
            rows = self._next_rows()
            # A sharded head has no values here: no rank samples as many tokens as another.
            options = {"progress": self._show_rollout, "value_head": None if self.whole else self.roles.value_head}
            return self.collector.sample(rows, sampling, check, **options), rows
        if self.ahead.idle:
            self.ahead.begin(self._next_rows(), sampling)
        return self.ahead.take(self._show_rollout)

    def _recompute_logprobs(self) -> Literal["auto", "always", "never"]:
        """Those of sampling are not those of the policy where its weights have moved on."""
        setting = self.config.rollout.recompute_logprobs
        return "always" if self.ahead is not None and setting == "auto" else setting

    def _next_rows(self) -> list[Row]:
        return [self.prompts[index] for index in self.sampler.next()]

    def _sample_ahead(self) -> None:
        """Begin with the next step's completions, from the weights as they are before the update."""
        self.ahead.freeze(self.step)
        if self.step + 1 < self.total_steps:
            self.ahead.begin(self._next_rows(), self.config.rollout.sampling(_mix(self.config.seed, self.step + 1)))

    def _with_found(self, answers: Answers, rows: list[Row], seed: int) -> tuple[Answers, dict[str, float]]:
        """With what the search finds, and what that cost."""
        self.reporter.phase("search", 0, 1)
        prompts = [row["prompt_ids"] for row in rows]
        sampling, check = self.config.rollout.sampling(seed), self._interruption.check
        rollout, metrics = self.expert.join(answers.rollout, prompts, sampling, check)
        return Answers(rollout), metrics

    def _say_what_holds(self) -> None:
        """What is decided of the model, where it could be otherwise, and what the settings would want besides."""
        self.reporter.note(f"a completion ends with {describe_stops(*self._stops())}")
        if odd := odd_generation_config(self.model):
            self.reporter.note(f"the generation config will be written as it came; Transformers would refuse to: {odd}")
        if warning := self.config.sampling_warning():
            self.reporter.note(warning)

    def _stops(self) -> tuple[dict[int, list[str]], PreTrainedTokenizerBase, SamplingParams]:
        sampling = self.config.rollout.sampling(self.config.seed)
        return stop_ids(self.model, self.tokenizer, sampling), self.tokenizer, sampling

    def _show_rollout(self, done: int, total: int) -> None:
        self.reporter.phase("rollout", done, total, f"{self._learned_from.engine.stats.tokens_per_second:,.0f} tok/s")

    def _show_update(self, done: int, total: int) -> None:
        stopping = "" if self._interruption.number is None else "the last one: the run is being ended"
        self.reporter.phase("update", done, total, stopping)

    def _greedy_scores(self, rows: list[Row], seed: int) -> Tensor:
        """fp32 [prompts]: the scores of each prompt's greedy completion; NaN where invalid. seed: of an environment's chance."""
        greedy = dataclasses.replace(self.config.rollout.sampling(seed), n=1, temperature=0.0)
        answers = self._learned_from.sample(rows, greedy, self._interruption.check)
        rollout, result = answers.per_sample(self._learned_from.score(answers, rows, self._interruption.at_once)[0])
        self._note_errors(result)
        return (
            Scores.of(result, rollout.tokens.device).penalised(rollout, self.config.reward.missing_eos_penalty).values
        )

    def _score(self, answers: Answers, rows: list[Row], folder: RunFolder | None, greedy: Tensor | None) -> Experience:
        """The samples that have a valid reward, with their scores.

        folder: where samples are written; None describes none.
        greedy: fp32 [prompts], the scores of the prompts' greedy completions; where one is not valid, no sample of that prompt is.
        """
        self.reporter.phase("reward", 0, 1)
        rollout, (result, texts) = answers.rollout, self._learned_from.score(answers, rows, self._interruption.at_once)
        logged = 0 if folder is None else self.config.num_logged_samples
        rows = answers.groups(rows)
        samples = answers.described(describe_samples(rollout, rows, texts, result, self.tokenizer, logged))
        scores = answers.scores(result)
        if greedy is not None:
            baselines = greedy[rollout.prompt_index]
            values = torch.where(baselines.isnan(), torch.nan, scores.values)
            scores = dataclasses.replace(scores, values=values, baselines=baselines)
        try:
            valid = self._valid(rollout, scores, result.errors)
        except TrainingError:
            if folder is not None:
                folder.log_samples(self.step + 1, samples)  # what the rewards failed on
            raise
        self._note_errors(result)
        kept = rollout.select(valid)
        penalised = scores.select(valid).penalised(kept, self.config.reward.missing_eos_penalty)
        described = [samples[index] if index < len(samples) else None for index in valid]
        sampled = scores.select(rollout.sampled)
        return Experience(kept, penalised, sampled, len(rows), rollout.num_actions, samples, described, {})

    def _complete(
        self, rows: Sequence[Row], sampling: SamplingParams
    ) -> tuple[Rollout, RewardResult, Mapping[str, float]]:
        """Held-out prompts' completions, their scores and what else is measured of them."""
        answers = self.collector.sample(rows, sampling, self._interruption.check)
        result, _ = self.collector.score(answers, rows, self._interruption.at_once, normalise=False)
        self._note_errors(result)
        final = answers.final
        return answers.rollout.select(final), result.select(final), answers.held_out_metrics()

    def _note_errors(self, result: RewardResult) -> None:
        for error in result.errors:
            self.reporter.note_once(error)

    def _valid(self, rollout: Rollout, scores: Scores, errors: list[str]) -> list[int]:
        """The samples to learn from: not those without a valid score (a failed reward is never a silent 0), those that broke off because
        their logits were not finite, or those that hold no action."""
        count, counts, reasons = rollout.num_sequences, rollout.action_counts, rollout.finish_reasons.tolist()
        broken = sum(reason == FinishReason.ERROR for reason in reasons)
        valid = [
            index
            for index, finite in enumerate(scores.values.isfinite().tolist())
            if finite and counts[index] > 0 and reasons[index] != FinishReason.ERROR
        ]
        failure_rate = (count - len(valid)) / count  # rounded once: 3 of 10 are not more than 0.3
        if failure_rate > self.config.reward.max_failure_rate or not valid:
            odd_logits = [f"the model's logits were NaN or infinite in {broken} of {count}"] if broken else []
            empty = [f"{counts.count(0)} of {count} completions hold no token"] if 0 in counts else []
            why = "; ".join(dict.fromkeys([*odd_logits, *empty, *errors]))
            raise TrainingError(
                f"{failure_rate:.0%} of the samples of step {self.step} have no valid reward, more than "
                f"reward.max_failure_rate = {self.config.reward.max_failure_rate:.0%}: {printable(why)}"
            )
        return valid

    # Set-up, checkpoints

    def _sampler(self, model: PreTrainedModel, adapters: Adapters | None) -> tuple[AnswerSource, Collector]:
        """What samples from a model, and has it scored."""
        kept = KEPT_CACHE if model.device.type == "cuda" else False
        engine = Engine(model, self.tokenizer, max_batch_size=self.config.rollout.batch_size, keep_cache=kept)
        chat = self.prompts.chat
        source = source_of(self.environment, engine, self.tokenizer, chat, self.config.environment, adapters)
        given = source, engine, self.rewards, self.tokenizer, chat, model.device, self.ranks, self.reporter.note
        return source, Collector(*given, team=self.config.distributed.tensor_parallel)

    def _algorithm(self) -> PPO:
        if self.config.algorithm == "expert_iteration":
            return ExpertIteration(self.config, self.tokenizer)
        return {"ppo": PPO, "trpo": TRPO}[self.config.algorithm](self.config)

    def _load(self, source: Any, name: str) -> PromptDataset:
        context = context_length(self.model)
        if context is not None and context <= self.config.rollout.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {self.config.rollout.max_new_tokens}, expected less than the model's context of {context} tokens"
            )
        limit = None if context is None else context - self.config.rollout.max_new_tokens
        with naming(name):
            dataset = source if isinstance(source, PromptDataset) else load_prompts(source, self.tokenizer)
            self.rewards.check_columns(reward_columns(self.environment, dataset[0]))
            return dataset.limited(limit, self.model.get_input_embeddings().weight.shape[0])

    def _longest(self) -> int:
        """Most tokens of a prompt with its completion."""
        return max(len(row["prompt_ids"]) for row in self.prompts) + self.config.rollout.max_new_tokens

    def _identity(self) -> dict[str, Any]:
        return identity(self.config, self.roles, self.prompts)


def _require_whole_answers(environment: Factory | AgentProgram | Debate | None, config: PPOConfig) -> None:
    """Raises ValueError where a search would have to be one of episodes, or ranks would have to hold them together."""
    kind, team = config.search.kind, config.distributed.tensor_parallel
    if environment is not None and team > 1:
        raise ValueError(
            f"distributed.tensor_parallel is {team}, expected 1: ranks that sample together sample single answers"
        )
    if environment is not None and config.algorithm == "expert_iteration" and kind != "best-of-n":
        raise ValueError(
            f"search.kind is {kind}, expected best-of-n with an environment, whose episodes have many turns"
        )


def _mix(seed: int, step: int) -> int:
    """A seed for each step of a run; runs whose seeds differ share none of the first billion steps' seeds."""
    return (seed * 1_000_000_007 + step) % SEEDS


def _dump_batch(path: Path, *records: object) -> None:
    """Each tensor under its record's name and its own: two records have log-probs. Copies, because records share tensors, which safetensors
    refuses."""
    fields = {
        f"{type(record).__name__.lower()}.{f.name}": getattr(record, f.name)
        for record in records
        for f in dataclasses.fields(record)
    }
    save_file({name: value.clone().contiguous() for name, value in fields.items() if isinstance(value, Tensor)}, path)
