"""The PPO loop: collect, score, evaluate, credit, update, record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.algorithms.ppo import PPO
from fastppo.checkpoint import CheckpointError, load_latest_checkpoint, save_checkpoint
from fastppo.config import PPOConfig
from fastppo.console import Reporter
from fastppo.data import PROMPT_COLUMNS, PromptDataset, PromptSampler, Row, load_prompts
from fastppo.learner import Learner, NonFiniteUpdates
from fastppo.metrics import Clock, engine_metrics, evaluation_metrics, reward_metrics, rollout_metrics
from fastppo.model import context_length, load_model, load_tokenizer, prepare_model
from fastppo.model.decoding import decode
from fastppo.model.writing import odd_generation_config, require_writable, write_model
from fastppo.plot import plot_run
from fastppo.rewards import RewardResult, RewardRunner
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, FinishReason, Rollout, SamplingParams
from fastppo.rollout.stopping import cut_off_warning, describe_stops, stop_ids
from fastppo.run_folder import RunFolder

EVALUATION_SEED_OFFSET = 0x5EED
SEEDS = 2**63  # of the sampler


class TrainingError(RuntimeError):
    """The run cannot go on: too many rewards failed, or too many updates were not finite."""


class PPOTrainer:
    """Proximal policy optimisation (Schulman et al. 2017) of a causal language model on prompts and a reward.

    Args:
        model: a folder or hub name, or a loaded Transformers causal LM, which is trained in place.
        reward: `fn(prompts, completions, **columns) -> list[float | None]`, sync or async, or a list of them (their sum is maximised).
        prompts: list of strings, of rows with a "prompt", a `datasets.Dataset`, a file or hub name; or, where `DataConfig` has settings for
            them, what `fastppo.data.load_prompts(source, tokenizer, DataConfig(...))` makes of these.
        config: every setting; see `PPOConfig`.
        tokenizer: needed with a loaded model; else the model's own by default.
        eval_prompts: held-out prompts, in the same forms.
        reporter: where progress is shown; by default a table on a terminal, plain lines elsewhere.
        dtype: weight type when `model` is a name: "auto" is float32 on the CPU, bfloat16 on a GPU.
        recipe: what to write to the run folder's `config.yaml`; by default the PPO settings.

    Raises:
        ValueError, TypeError: an argument that cannot be used, or a model that could not be written in the end, before anything is written.
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
        self.recipe = recipe or dataclasses.asdict(config)
        device = _resolve_device(config.device)
        # First, so that the processes which run rewards hold no copy of the model.
        with _naming("reward"):
            self.rewards = RewardRunner(reward, timeout=config.reward.timeout, retries=config.reward.retries)
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer is None, expected a tokenizer because model is a loaded model, not a name")
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model.to(device)
        self.model = prepare_model(loaded)
        require_writable(self.model, self.tokenizer)
        self.prompts = self._load(prompts, "prompts")
        self.eval_prompts = None if eval_prompts is None else self._load(eval_prompts, "eval_prompts")
        self.reporter = reporter or Reporter(config.total_steps)
        self.algorithm = PPO(config)
        self.roles = Roles(
            self.model,
            critic=config.critic.kind,
            with_reference="reference" in self.algorithm.needs,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        self.learner = Learner(
            self.roles,
            optimizer=config.optimizer,
            critic=config.critic,
            config=config.learner,
            total_steps=config.total_steps,
        )
        self.engine = Engine(self.model, self.tokenizer, max_batch_size=config.rollout.batch_size)
        self.sampler = PromptSampler(len(self.prompts), config.rollout.prompts_per_step, config.seed)
        self.step = 0

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
            self._say_what_holds()
            if self.step == 0 and self.eval_prompts is not None:
                folder.log_metrics(0, self.evaluate())
            while self.step < config.total_steps:
                metrics = self._train_step(folder)
                self.step += 1
                last = self.step == config.total_steps
                if self.eval_prompts is not None and (last or self._due(config.evaluation.every)):
                    metrics |= self.evaluate()
                folder.log_metrics(self.step, metrics)
                self.reporter.step(self.step, metrics)
                if last or self._due(config.checkpoint.every):
                    self._save(folder)
        self.save_pretrained(folder.path / "model")
        self._plot(folder)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Mean reward and length on the held-out prompts at `evaluation.temperature`; a function of the weights and the seed alone."""
        if self.eval_prompts is None:
            raise ValueError("eval_prompts is None, expected held-out prompts to evaluate on")
        rows = list(self.eval_prompts)
        sampling = self.config.rollout.sampling((self.config.seed + EVALUATION_SEED_OFFSET) % SEEDS)
        sampling = dataclasses.replace(sampling, n=1, temperature=self.config.evaluation.temperature)
        rollout = self.engine.generate([row["prompt_ids"] for row in rows], sampling)
        result, _ = self._call_rewards(rollout, rows)
        self._note_errors(result)
        if result.failures:
            count = rollout.num_sequences
            others = f"eval/scores is the mean of the other {count - result.failures}"
            self.reporter.note(
                f"held out: {result.failures} of {count} completions have no valid score; "
                f"{others if result.failures < count else 'there is no eval/scores'}"
            )
        return evaluation_metrics(rollout, result)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the policy and the tokenizer in Transformers' format, its configurations as they came."""
        write_model(self.model, self.tokenizer, path)

    # One step

    def _train_step(self, folder: RunFolder) -> dict[str, float]:
        clock, seed = Clock(self.model.device), _mix(self.config.seed, self.step)
        metrics = self.learner.start_step(self.step)
        with clock("time/rollout"):
            rollout, rows = self._collect(seed)
        sampled_tokens = rollout.num_actions
        metrics |= engine_metrics(self.engine.stats)
        if self.step == 0 and (warning := cut_off_warning(rollout, *self._stops())):
            self.reporter.note(warning)
        with clock("time/reward"):
            rollout, scores, reward = self._score(rollout, rows, folder)
        with clock("time/score"):
            plan = self.learner.plan(rollout, seed)
            evaluation = self.roles.evaluate(rollout, self.algorithm.needs, plan)
            targets = self.algorithm.credit(rollout, evaluation, scores)
        metrics |= reward | rollout_metrics(rollout, scores, evaluation, targets, self.config.reward)
        with clock("time/update"):
            try:
                metrics |= self.algorithm.update(
                    self.learner, rollout, evaluation, targets, plan, lambda *done: self.reporter.phase("update", *done)
                )
            except NonFiniteUpdates as error:
                where = folder.path / f"offending-batch-{self.step:06d}.safetensors"
                _dump_batch(where, rollout, evaluation, targets)
                raise TrainingError(f"{error}; the batch is in {where}") from error
        return metrics | clock.metrics(sampled_tokens)

    def _collect(self, seed: int) -> tuple[Rollout, list[Row]]:
        """Completions of the next prompts, and the rows that these stand in."""
        rows = [self.prompts[index] for index in self.sampler.next()]
        prompts, sampling = [row["prompt_ids"] for row in rows], self.config.rollout.sampling(seed)
        return self.engine.generate(prompts, sampling, progress=self._show_rollout), rows

    def _say_what_holds(self) -> None:
        """What is decided of the model, where it could be otherwise."""
        self.reporter.note(f"a completion ends with {describe_stops(*self._stops())}")
        if odd := odd_generation_config(self.model):
            self.reporter.note(f"the generation config will be written as it came; Transformers would refuse to: {odd}")

    def _stops(self) -> tuple[dict[int, list[str]], PreTrainedTokenizerBase, SamplingParams]:
        sampling = self.config.rollout.sampling(self.config.seed)
        return stop_ids(self.model, self.tokenizer, sampling), self.tokenizer, sampling

    def _show_rollout(self, done: int, total: int) -> None:
        self.reporter.phase("rollout", done, total, f"{self.engine.stats.tokens_per_second:,.0f} tok/s")

    def _score(self, rollout: Rollout, rows: list[Row], folder: RunFolder) -> tuple[Rollout, Scores, dict[str, float]]:
        """The samples that have a valid reward, their scores, and what the rewards said of all of them."""
        self.reporter.phase("reward", 0, 1)
        result, texts = self._call_rewards(rollout, rows)
        self._log_samples(folder, rollout, rows, texts, result)
        scores = Scores.of(result, rollout.tokens.device)
        valid = self._valid(rollout, scores, result.errors)
        self._note_errors(result)
        kept = rollout.select(valid)
        penalised = scores.select(valid).penalised(kept, self.config.reward.missing_eos_penalty)
        return kept, penalised, reward_metrics(scores)

    def _call_rewards(self, rollout: Rollout, rows: list[Row]) -> tuple[RewardResult, list[str]]:
        """Rewards of every completion, in the rollout's order; the text excludes special tokens."""
        owners = [rows[index] for index in rollout.prompt_index.tolist()]
        completion_ids = rollout.completions()
        texts = [decode(self.tokenizer, ids, skip_special_tokens=True) for ids in completion_ids]
        columns = {name: [row[name] for row in owners] for name in owners[0] if name not in PROMPT_COLUMNS}
        result = self.rewards([row["prompt"] for row in owners], texts, columns, completion_ids=completion_ids)
        return result, texts

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
        failure_rate = 1 - len(valid) / count
        if failure_rate > self.config.reward.max_failure_rate or not valid:
            odd_logits = [f"the model's logits were NaN or infinite in {broken} of {count}"] if broken else []
            empty = [f"{counts.count(0)} of {count} completions hold no token"] if 0 in counts else []
            why = "; ".join(dict.fromkeys([*odd_logits, *empty, *errors]))
            raise TrainingError(
                f"{failure_rate:.0%} of the samples of step {self.step} have no valid reward, more than "
                f"reward.max_failure_rate = {self.config.reward.max_failure_rate:.0%}: {why}"
            )
        return valid

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
        if context is not None and context <= self.config.rollout.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {self.config.rollout.max_new_tokens}, expected less than the model's context of {context} tokens"
            )
        limit = None if context is None else context - self.config.rollout.max_new_tokens
        with _naming(name):
            dataset = source if isinstance(source, PromptDataset) else load_prompts(source, self.tokenizer)
            self.rewards.check_columns(name for name in dataset[0] if name not in PROMPT_COLUMNS)
            return dataset.limited(limit, self.model.get_input_embeddings().weight.shape[0])

    def _save(self, folder: RunFolder) -> None:
        tensors, state = self.learner.state_dict()
        state |= {"sampler": self.sampler.state_dict(), "reference_sha256": self.roles.reference_sha256}
        save_checkpoint(folder.checkpoints, self.step, tensors, state, keep=self.config.checkpoint.keep)

    def _resume(self, folder: RunFolder) -> None:
        found = load_latest_checkpoint(folder.checkpoints)
        if found is None:
            self.reporter.note(f"no checkpoint in {folder.checkpoints}: starting from step 0")
            folder.rewind(-1)
            return
        path, (tensors, state, step) = found
        if state["reference_sha256"] != self.roles.reference_sha256:
            raise CheckpointError(
                f"{path} was written with another reference model: resume with the model that the run started from"
            )
        self.learner.load_state_dict(tensors, state)
        self.sampler.load_state_dict(state["sampler"])
        self.step = step
        folder.rewind(self.step)
        self.reporter.note(f"resumed from {path}")


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Errors about an argument begin with the name that the caller knows it by."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from error


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
    return (seed * 1_000_000_007 + step) % SEEDS


def _dump_batch(path: Path, *records: object) -> None:
    fields = {f.name: getattr(record, f.name) for record in records for f in dataclasses.fields(record)}
    save_file({name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}, path)
