"""A PPO step of TRL's `PPOTrainer` (`trl.experimental.ppo`, which TRL has up to 1.12), on the networks of `ppo_step`'s plain step."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fastppo import PPOConfig
from fastppo.bench.clock import PhaseClock
from fastppo.bench.harness import Tensors
from fastppo.bench.rollout_workload import prompts_of

if TYPE_CHECKING:
    from fastppo.bench.ppo_step import PlainStep

# Beyond the vocabulary: TRL tells padding by its id, which no token may have.
PAD = -1


def is_installed() -> bool:
    """TRL is, and a version that has a PPO trainer."""
    trl = find_spec("trl")
    return trl is not None and (Path(trl.origin).parent / "experimental" / "ppo").is_dir()


class Scored(nn.Module):
    """What TRL takes for a value or reward model: a backbone and a `score` of its last hidden states."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, score: nn.Module) -> None:
        super().__init__()
        self.backbone, self.score = backbone, score


class Reward(nn.Module):
    """A backbone whose state, of one number, is the score of the completion. Keeps the completions [B, N] that it saw last."""

    def __init__(self, score: Callable[[list[int]], float], new_tokens: int) -> None:
        super().__init__()
        self._score, self._new = score, new_tokens
        self.completions: Tensor | None = None

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        self.completions = input_ids[:, -self._new :]
        scores = torch.tensor([self._score(row) for row in self.completions.tolist()])
        return SimpleNamespace(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))


class ClippedAdamW(torch.optim.AdamW):
    """Clips the gradient norm of each group, as the other steps do; TRL's PPO trainer does not."""

    max_grad_norm = 1.0

    def step(self, closure=None):
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
        return super().step(closure)


class TRLStep:
    """One batch of `PPOTrainer.train`, on the prompts of the call."""

    def __init__(self, plain: PlainStep, score: Callable[[list[int]], float], config: PPOConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            from trl.experimental.ppo import PPOConfig as TRLConfig
            from trl.experimental.ppo import PPOTrainer

        self.shape = plain.shape
        self.phases: dict[str, float] = {}
        self.folder = tempfile.TemporaryDirectory()  # TRL makes one, and writes nothing into it
        self.reward = Reward(score, self.shape.new_tokens)
        self.prompts: list[dict] = [{} for _ in range(self.shape.prompts)]
        self.order: list[int] = []
        self.minibatches = config.learner.num_minibatches
        rates = (config.optimizer.lr, config.critic.lr)
        groups = [{"params": group, "lr": lr} for group, lr in zip(plain.groups, rates, strict=True)]
        optimizer = ClippedAdamW(groups, weight_decay=0.0)
        optimizer.max_grad_norm = config.optimizer.max_grad_norm
        options = TRLConfig(
            output_dir=self.folder.name,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=self.shape.prompts,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=self.shape.prompts,
            num_mini_batches=config.learner.num_minibatches,
            num_ppo_epochs=config.learner.epochs,
            total_episodes=self.shape.prompts,
            num_sample_generations=0,
            response_length=self.shape.new_tokens,
            temperature=1.0,
            kl_coef=config.reward.kl_coef,
            cliprange=config.loss.clip_low,
            cliprange_value=config.critic.value_clip,
            vf_coef=config.critic.vf_coef,
            gamma=config.advantage.gamma,
            lam=config.advantage.gae_lambda,
        )
        self.trainer = PPOTrainer(
            args=options,
            processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD),
            model=plain.policy,
            ref_model=plain.reference,
            reward_model=Scored(self.reward, nn.Identity()),
            value_model=Scored(plain.critic, plain.value_head),
            train_dataset=self.prompts,
            eval_dataset=self.prompts,
            data_collator=self._collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )

    def _collate(self, items: list[dict]) -> dict[str, Tensor]:
        """Left-padded; remembers the order that the sampler chose."""
        self.order = [item["index"] for item in items]
        rows = [[PAD] * (self.shape.longest - len(item["prompt"])) + item["prompt"] for item in items]
        return {"input_ids": torch.tensor(rows)}

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Keeps the phases of a batch: sampling ends with the trainer's `batch_generation`, whose logits are its old log-probs; the update
        begins where it draws the minibatches of its one epoch."""
        clock = PhaseClock()

        def ending(phase: str, function: Callable, *, after: bool) -> Callable:
            def call(*args, **kwargs):
                if not after:
                    clock.end(phase)
                result = function(*args, **kwargs)
                if after:
                    clock.end(phase)
                return result

            return call

        module = sys.modules[type(self.trainer).__module__]
        generation = ending("sampling", module.batch_generation, after=True)
        drawing = ending("scoring", np.random.permutation, after=False)
        with (
            mock.patch.object(module, "batch_generation", generation),
            mock.patch.object(np.random, "permutation", drawing),
        ):
            yield
        clock.end("update")
        self.phases = clock.seconds

    def __call__(self, x: Tensors) -> Tensors:
        """Completions [B, N], the step's losses, and the rows of its minibatches [M, B / M]."""
        prompts = prompts_of(x)
        self.prompts[:] = [{"index": index, "prompt": prompt} for index, prompt in enumerate(prompts)]
        np.random.seed(0)  # for the minibatches, which TRL draws from NumPy and tells no one
        with contextlib.redirect_stdout(io.StringIO()), self._timed():
            self.trainer.train()
        np.random.seed(0)
        order = torch.tensor(self.order)
        drawn = torch.from_numpy(np.random.permutation(len(prompts)))
        metrics = self.trainer.state.log_history[-1]
        return {
            "completions": self.reward.completions[order.argsort()],
            "losses": torch.tensor([metrics["loss/policy_avg"], metrics["loss/value_avg"]]),
            "minibatches": order[drawn].view(self.minibatches, -1),
        }
