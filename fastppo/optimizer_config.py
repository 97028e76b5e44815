"""Settings of the optimizer and of the learning rates."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Beta, NonNegative, OptionalCount, Positive, Share


@dataclass(config=STRICT)
class OptimizerConfig:
    """AdamW and the schedule of the learning rates, policy's and critic's alike."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits, with a scale for each 256 of them (Dettmers et al. 2021, arXiv:2110.02861); needs torchao."""
    bf16_stochastic_round: bool = False
    """bfloat16 weights without fp32 masters: they are rounded up or down at random, so that small updates are not lost on average (Zamirai et
    al. 2020, arXiv:2010.06192); their moments are bfloat16 too, or 8 bits. Needs torchao."""
    offload: bool = False
    """Keep moments and fp32 masters in the host's memory, and update there: a GPU then holds weights and gradients alone. (Sharded weights have
    `distributed.cpu_offload`.)"""
    lr: NonNegative = 1e-6
    """Peak learning rate of the policy."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; `linear` and `cosine` reach `min_lr_ratio` in the last step."""
    warmup_steps: OptionalCount = 0
    """Steps in which the learning rates rise linearly from 0."""
    min_lr_ratio: Share = 0.0
    """Final learning rate as a share of the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: Positive = 1e-8
    """AdamW's denominator offset."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay (matrices only)."""
    max_grad_norm: Positive = 1.0
    """Gradients of actor and critic are clipped, each for itself, to this norm."""
