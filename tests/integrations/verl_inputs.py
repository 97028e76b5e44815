"""What the tests of verl's functions are called with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

workers_config = pytest.importorskip("verl.workers.config", reason="verl is not installed")

POLICY_LOSSES = ["vanilla", "gspo", "cispo"]
NOWHERE = torch.zeros(2, 5, dtype=torch.bool)


def tokens(shape: tuple[int, int], mask_dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Log-probabilities of two policies, advantages, weights of a rollout; a mask with holes, an empty row and two tokens at least."""
    torch.manual_seed(seed)
    old = -3 * torch.rand(shape)
    mask = torch.rand(shape) < 0.7
    mask[torch.randint(shape[0], ())] = False
    mask[0, :2] = True
    return {
        "old_log_prob": old,
        "log_prob": old + torch.randn(shape),
        "advantages": torch.randn(shape),
        "response_mask": mask.to(mask_dtype),
        "rollout_is_weights": 0.1 + 2 * torch.rand(shape),
    }


def actor(**options) -> object:
    return workers_config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
