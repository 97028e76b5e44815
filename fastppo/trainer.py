"""The PPO loop: sample, score, estimate advantages, update, record."""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fastppo.actor_critic import ActorCritic, weights_sha256
from fastppo.checkpoint import (
    CheckpointError,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from fastppo.config import DataConfig, PPOConfig
from fastppo.console import Reporter
from fastppo.data import PromptDataset, PromptSampler, load_prompts
from fastppo.experience import compute_advantages, evaluate_networks, penalise_unfinished, rollout_metrics
from fastppo.minibatch import plan_epochs
from fastppo.model import context_length, load_model, load_tokenizer, prepare_model
from fastppo.optimizer import Optimizer, learning_rate_factor
from fastppo.plot import plot_run
from fastppo.rewards import RewardResult, RewardRunner
from fastppo.rollout import Engine, GenerationStats, Rollout, SamplingParams
from fastppo.run_folder import RunFolder
from fastppo.update import update

EVALUATION_SEED_OFFSET = 0x5EED


class TrainingError(RuntimeError):
    """The run cannot go on: too many rewards failed, or too many updates were not finite."""


class PPOTrainer:
    """Proximal policy optimisation (Schulman et al. 2017) of a causal language model on prompts and a reward.

    Args:
        model: a folder or hub name, or a loaded Transformers causal LM, which is trained in place.
        reward: `fn(prompts, completions, **columns) -> list[float | None]`, sync or async, or a list of them (their sum is maximised).
        prompts: list of strings, of rows with a "prompt", a `datasets.Dataset`, a file or hub name, or a `PromptDataset`.
        config: every setting; see `PPOConfig`.
        tokenizer: needed with a loaded model; else the model's own by default.
        eval_prompts: held-out prompts, in the same forms.
        reporter: where progress is shown; by default a table on a terminal, plain lines elsewhere.
        dtype: weight type when `model` is a name: "auto" is float32 on the CPU, bfloat16 on a GPU.
        recipe: what to write to the run folder's `config.yaml`; by default the PPO settings.

    Raises:
        ValueError, TypeError: an argument that cannot be used, named, before anything is written.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        reward: Callable | Sequence[Callable],
        prompts: Any,
        config: PPOConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_prompts: Any = None,
        reporter: Reporter | None = None,
        dtype: str = "auto",
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.config = config = config or PPOConfig()
        self.recipe = recipe or {"ppo": dataclasses.asdict(config)}
        device = _resolve_device(config.device)
        # First, so that the processes which run rewards hold no copy of the model.
        with _naming("reward"):
            self.rewards = RewardRunner(reward, timeout=config.reward_timeout, retries=config.reward_retries)
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer is None, expected a tokenizer because model is a loaded model, not a name")
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model.to(device)
        self.model = prepare_model(loaded)
        self.prompts = self._load(prompts, "prompts")
        self.eval_prompts = None if eval_prompts is None else self._load(eval_prompts, "eval_prompts")
        self.reporter = reporter or Reporter(config.total_steps)
        # The critic's head is initialised to zero, so building the networks draws no random numbers.
        self.networks = ActorCritic(
            self.model, shared_trunk=config.critic == "shared", with_reference=config.kl_coef > 0
        )
        self.engine = Engine(self.model, self.tokenizer, max_batch_size=config.rollout_batch_size)
        self.optimizers = {
            "policy": Optimizer(self.model.named_parameters(), config.lr, config),
            "critic": Optimizer(self.networks.critic_parameters(), config.critic_lr, config),
        }
        self.sampler = PromptSampler(len(self.prompts), config.prompts_per_step, config.seed)
        self.step = 0
        self.skipped_in_a_row = 0

    # Public

    def train(self, resume: bool = False) -> dict[str, float]:
        """Run to `total_steps`, recording into `output_dir`; with `resume`, go on from its newest checkpoint.

        Returns the last step's metrics. Raises TrainingError when the run cannot go on; what was written stays.
        """
        config, folder = self.config, RunFolder(self.config.output_dir, self.recipe, resume=resume)
        if resume:
            self._resume(folder)
        metrics: dict[str, float] = {}
        with self.reporter, self.rewards:
            if self.step == 0 and self.eval_prompts is not None:
                folder.log_metrics(0, self.evaluate())
            while self.step < config.total_steps:
                metrics = self._train_step(folder)
                self.step += 1
                last = self.step == config.total_steps
                if self.eval_prompts is not None and (last or self._due(config.eval_every)):
                    metrics |= self.evaluate()
                folder.log_metrics(self.step, metrics)
                self.reporter.step(self.step, metrics)
                if last or self._due(config.save_every):
                    self._save(folder)
        self.save_pretrained(folder.path / "model")
        self._plot(folder)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Mean reward and length on the held-out prompts at `eval_temperature`; a function of the weights and the seed alone."""
        if self.eval_prompts is None:
            raise ValueError("eval_prompts is None, expected held-out prompts to evaluate on")
        rows = [self.eval_prompts[i] for i in range(len(self.eval_prompts))]
        sampling = self._sampling(self.config.seed + EVALUATION_SEED_OFFSET)
        sampling = dataclasses.replace(sampling, n=1, temperature=self.config.eval_temperature)
        rollout = self.engine.generate([row["prompt_ids"] for row in rows], sampling)
        result, _ = self._score(rollout, rows)
        valid = [score for score in result.scores if not math.isnan(score)]
        return {
            "eval/scores": sum(valid) / len(valid) if valid else math.nan,
            "eval/mean_length": rollout.completion_lengths.float().mean().item(),
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write the policy and the tokenizer in Transformers' format."""
        with _no_progress_bar():
            self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    # One step

    def _train_step(self, folder: RunFolder) -> dict[str, float]:
        config, clock = self.config, _Clock()
        rows = [self.prompts[index] for index in self.sampler.next()]
        with clock("time/rollout"):
            rollout = self.engine.generate(
                [row["prompt_ids"] for row in rows],
                self._sampling(_mix(config.seed, self.step)),
                progress=self._show_rollout,
            )
        sampled_tokens = int(rollout.action_mask.sum())
        with clock("time/reward"):
            self.reporter.phase("reward", 0, 1)
            result, texts = self._score(rollout, rows)
            self._log_samples(folder, rollout, rows, texts, result)
            rollout = self._keep_valid(rollout, result)
        plan = plan_epochs(
            rollout.lengths.cpu(),
            epochs=config.ppo_epochs,
            num_minibatches=config.num_minibatches,
            max_tokens=config.tokens_per_microbatch,
            seed=_mix(config.seed, self.step),
        )
        with clock("time/score"):
            first_epoch = [indices for minibatch in plan[0] for indices in minibatch]
            final_values = evaluate_networks(self.networks, rollout, first_epoch)
            penalise_unfinished(rollout, config.missing_eos_penalty)
            compute_advantages(rollout, final_values, config)
        metrics = rollout_metrics(rollout, config) | _engine_metrics(self.engine.stats) | _reward_metrics(result)
        with clock("time/update"):
            metrics |= self._update(folder, rollout, plan)
        return metrics | clock.metrics(sampled_tokens, self.model.device)

    def _show_rollout(self, done: int, total: int) -> None:
        self.reporter.phase("rollout", done, total, f"{self.engine.stats.tokens_per_second:,.0f} tok/s")

    def _sampling(self, seed: int) -> SamplingParams:
        config = self.config
        return SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            stop_token_ids=config.stop_token_ids,
            stop_strings=config.stop_strings,
            seed=seed,
        )

    def _score(self, rollout: Rollout, rows: list[dict]) -> tuple[RewardResult, list[str]]:
        """Rewards of every completion, in the rollout's order; the text excludes special tokens."""
        owners = [rows[index] for index in rollout.prompt_index.tolist()]
        completion_ids = rollout.completions()
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        reserved = {"prompt", "prompt_ids"}
        columns = {name: [row[name] for row in owners] for name in owners[0] if name not in reserved}
        result = self.rewards([row["prompt"] for row in owners], texts, columns, completion_ids=completion_ids)
        return result, texts

    def _keep_valid(self, rollout: Rollout, result: RewardResult) -> Rollout:
        """Attach the scores and drop the samples that have none: a failed reward is never a silent 0."""
        rollout.scores = torch.tensor(result.scores, dtype=torch.float32, device=rollout.tokens.device)
        trainable = rollout.scores.isfinite() & (rollout.completion_lengths > 0)
        failure_rate = 1 - trainable.float().mean().item()
        if failure_rate > self.config.max_reward_failure_rate or not trainable.any():
            reasons = "; ".join(dict.fromkeys(result.errors)) or "the scores are NaN or None"
            raise TrainingError(
                f"{failure_rate:.0%} of the samples of step {self.step} have no valid reward, more than "
                f"max_reward_failure_rate = {self.config.max_reward_failure_rate:.0%}: {reasons}"
            )
        return rollout.select(trainable.nonzero().squeeze(1).tolist())

    def _update(self, folder: RunFolder, rollout: Rollout, plan: list) -> dict[str, float]:
        factor = learning_rate_factor(self.config, self.step)
        rates = {name: optimizer.set_learning_rate(factor) for name, optimizer in self.optimizers.items()}
        metrics = update(
            self.networks,
            self.optimizers,
            rollout,
            plan,
            self.config,
            train_policy=self.step >= self.config.critic_warmup_steps,
            progress=lambda done, total: self.reporter.phase("update", done, total),
        )
        skipped = int(metrics["update/skipped"])
        all_skipped = skipped == sum(len(epoch) for epoch in plan)
        self.skipped_in_a_row = self.skipped_in_a_row + skipped if all_skipped else 0
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            where = folder.path / f"offending-batch-{self.step:06d}.safetensors"
            _dump_batch(rollout, where)
            raise TrainingError(f"{self.skipped_in_a_row} updates in a row were not finite; the batch is in {where}")
        return metrics | {"lr": rates["policy"], "critic_lr": rates["critic"]}

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log_samples(
        self, folder: RunFolder, rollout: Rollout, rows: list[dict], texts: list[str], result: RewardResult
    ) -> None:
        prompt_index = rollout.prompt_index.tolist()
        for i in range(min(self.config.num_logged_samples, len(texts))):
            folder.log_sample(self.step + 1, rows[prompt_index[i]]["prompt"], texts[i], result.scores[i])

    def _plot(self, folder: RunFolder) -> None:
        try:
            plot_run(folder.path)
        except ImportError as error:
            self.reporter.note(f"no curve.png: {error}")

    # Set-up, checkpoints

    def _load(self, source: Any, name: str) -> PromptDataset:
        context = context_length(self.model)
        if context is not None and context <= self.config.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {self.config.max_new_tokens}, expected less than the model's context of {context} tokens"
            )
        limit = None if context is None else context - self.config.max_new_tokens
        with _naming(name):
            if isinstance(source, PromptDataset):
                return source.limited(limit)
            return load_prompts(source, self.tokenizer, DataConfig(), limit)

    def _save(self, folder: RunFolder) -> None:
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {"sampler": self.sampler.state_dict(), "skipped_in_a_row": self.skipped_in_a_row}
        for name, module in self.networks.trained_modules().items():
            optimizer = self.optimizers[name]
            tensors[name] = module.state_dict()
            tensors[f"{name}_optimizer"], state[f"{name}_optimizer"] = flatten_optimizer(
                optimizer.adamw, optimizer.masters
            )
            if masters := optimizer.separate_masters():
                tensors[f"{name}_masters"] = masters
        state["reference_sha256"] = self._reference_sha256()
        save_checkpoint(folder.checkpoints, self.step, tensors, state, keep=self.config.keep_checkpoints)

    def _resume(self, folder: RunFolder) -> None:
        path = latest_checkpoint(folder.checkpoints)
        if path is None:
            self.reporter.note(f"no checkpoint in {folder.checkpoints}: starting from step 0")
            folder.rewind(-1)
            return
        tensors, state, self.step = load_checkpoint(path)
        if state["reference_sha256"] != self._reference_sha256():
            raise CheckpointError(
                f"{path} was written with another reference model: resume with the model that the run started from"
            )
        for name, module in self.networks.trained_modules().items():
            module.load_state_dict(tensors[name])
            optimizer = self.optimizers[name]
            optimizer.restore_masters(tensors.get(f"{name}_masters", {}))
            restore_optimizer(
                optimizer.adamw, optimizer.masters, tensors[f"{name}_optimizer"], state[f"{name}_optimizer"]
            )
        self.sampler.load_state_dict(state["sampler"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        folder.rewind(self.step)
        self.reporter.note(f"resumed from {path}")

    def _reference_sha256(self) -> str | None:
        reference = self.networks.reference
        return None if reference is None else weights_sha256(reference)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws a bar for each file it writes, across the run's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Errors about an argument begin with the name that the caller knows it by."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from error


def _engine_metrics(stats: GenerationStats) -> dict[str, float]:
    return {
        "perf/rollout_tokens_per_second": stats.tokens_per_second,
        "perf/prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "perf/decode_tokens_per_second": stats.decode_tokens_per_second,
        "perf/decode_gb_per_second": stats.decode_bytes_per_second / 1e9,
        "rollout/occupancy": stats.occupancy,
        "rollout/shared_prompt_share": stats.shared_prompt_share,
    }


class _Clock:
    """Wall-clock seconds of the parts of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def metrics(self, sampled_tokens: int, device: torch.device) -> dict[str, float]:
        """Times, sampled tokens per second of the whole step, peak memory in GB (of the process on a CPU)."""
        total = sum(self.seconds.values())
        on_gpu = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_process_bytes()
        return self.seconds | {
            "time/step": total,
            "perf/tokens_per_second": sampled_tokens / total,
            "perf/max_memory_gb": memory / 1e9,
        }


def _peak_process_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device here")
    return device


def _mix(seed: int, step: int) -> int:
    """A seed for each step of a run; runs whose seeds differ share none of the first billion steps' seeds."""
    return (seed * 1_000_000_007 + step) % 2**63


def _reward_metrics(result: RewardResult) -> dict[str, float]:
    metrics = {"rewards/failures": float(result.failures)}
    for name, scores in result.by_name.items():
        valid = torch.tensor([score for score in scores if not math.isnan(score)])
        if len(valid):
            metrics[f"rewards/{name}/mean"] = valid.mean().item()
            metrics[f"rewards/{name}/std"] = valid.std(correction=0).item()
    return metrics


def _dump_batch(rollout: Rollout, path: Path) -> None:
    fields = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    save_file({name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}, path)
