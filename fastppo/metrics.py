"""What a step says of itself, under the field's usual names."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastppo.config import PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.ops import approx_kl
from fastppo.rewards.scores import Scores
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.stats import GenerationStats
from fastppo.targets import Targets

# Difference of a sampled log-probability from the policy's own above which a token counts as off.
OUT_OF_BAND = 1e-3


def rollout_metrics(
    rollout: Rollout, scores: Scores, evaluation: Evaluation, targets: Targets, config: PPOConfig, kl_coef: float
) -> dict[str, float]:
    """What the samples of a rollout say about policy, critic and reward before the update. kl_coef: the coefficient of the KL in the reward."""
    if 0 < len(sampled := rollout.sampled) < rollout.num_sequences:
        rollout, scores, evaluation, targets = (x.select(sampled) for x in (rollout, scores, evaluation, targets))
    log_ratio = evaluation.logprobs - rollout.logprobs
    difference, ratio = log_ratio.abs(), log_ratio.exp()
    clipped = (ratio < 1 - config.loss.clip_low) | (ratio > 1 + config.loss.clip_high)
    sequences = rollout.num_sequences
    metrics = {
        "objective/scores": scores.values.mean().item(),
        "objective/scores_std": scores.values.std(correction=0).item(),
        "objective/entropy": -evaluation.logprobs.sum().item() / sequences,
        "completions/mean_length": rollout.num_actions / sequences,
        "completions/clipped_ratio": (rollout.finish_reasons == FinishReason.LENGTH).sum().item() / sequences,
        "rollout/logprob_diff_mean": difference.mean().item(),
        "rollout/logprob_diff_max": difference.max().item(),
        "rollout/out_of_band_rate": (difference > OUT_OF_BAND).float().mean().item(),
        "rollout/out_of_clip_rate": clipped.float().mean().item(),
    }
    if config.rollout.staleness:
        metrics["rollout/sampler_kl"] = approx_kl(rollout.logprobs, evaluation.logprobs, kind="k3").mean().item()
    if evaluation.values is not None:
        metrics["val/explained_var"] = explained_variance(evaluation.values, targets.returns)
    kl_sum = 0.0
    if evaluation.ref_logprobs is not None:
        kl = approx_kl(evaluation.logprobs, evaluation.ref_logprobs, kind=config.reward.kl_estimator)
        kl_sum = kl.sum().item() / sequences
        metrics["objective/kl"] = kl_sum
    metrics["objective/rlhf_reward"] = metrics["objective/scores"] - kl_coef * kl_sum
    return metrics


def search_metrics(
    rollout: Rollout, scores: Scores, evaluation: Evaluation, targets: Targets, prompts: int
) -> dict[str, float]:
    """What a search found for so many prompts, and how likely what is imitated of it was to the policy."""
    metrics = {"search/kept": targets.positive.sum().item() / prompts}
    if rollout.found is not None and rollout.found.any():
        metrics["search/scores"] = scores.values[rollout.found].mean().item()
    imitated = targets.positive.nonzero().squeeze(1).tolist()
    if imitated:
        metrics["search/logprobs"] = evaluation.select(imitated).logprobs.mean().item()
    return metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary beyond rounding."""
    variance = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / variance).item() if variance > 1e-8 else 0.0


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Of all samples, also those that are left out of the update."""
    metrics = {"rewards/failures": float(scores.values.isnan().sum())}
    for name, part in scores.parts.items():
        valid = part[~part.isnan()]
        if len(valid):
            metrics[f"rewards/{name}/mean"] = valid.mean().item()
            metrics[f"rewards/{name}/std"] = valid.std(correction=0).item()
    return metrics


def engine_metrics(stats: GenerationStats) -> dict[str, float]:
    return {
        "perf/rollout_tokens_per_second": stats.tokens_per_second,
        "perf/prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "perf/decode_tokens_per_second": stats.decode_tokens_per_second,
        "perf/decode_gb_per_second": stats.decode_bytes_per_second / 1e9,
        "rollout/occupancy": stats.occupancy,
        "rollout/shared_prompt_share": stats.shared_prompt_share,
    }


class Clock:
    """Wall-clock seconds of the parts of one step, each of which may come more than once. On a GPU a part ends when its kernels have;
    another thread's, on a stream of its own, are not waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, sampled_tokens: int) -> dict[str, float]:
        """Times, sampled tokens per second of the whole step, peak memory in GB (of the process on a CPU)."""
        total = sum(self.seconds.values())
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if on_gpu else _peak_process_bytes()
        return self.seconds | {
            "time/step": total,
            "perf/tokens_per_second": sampled_tokens / total,
            "perf/max_memory_gb": memory / 1e9,
        }


def _peak_process_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
