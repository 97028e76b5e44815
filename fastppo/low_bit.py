"""AdamW that keeps less: moments in 8 bits, or bf16 weights that are rounded at random instead of fp32 masters. Both are torchao's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastppo.config import OptimizerConfig


def make_adamw(groups: Sequence[dict[str, Any]], lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """groups: parameters with their weight decay. Raises ImportError where the settings need torchao, which is not installed."""
    options: dict[str, Any] = {"lr": lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw" and not config.bf16_stochastic_round:
        return torch.optim.AdamW(groups, fused=True, **options)
    optim = _imported_torchao()
    # The second is what torchao calls an AdamW whose moments have the weights' type.
    kind = getattr(optim, "AdamW8bit" if config.name == "adamw_8bit" else "_AdamW")
    return kind(groups, bf16_stochastic_round=config.bf16_stochastic_round, **options)


def _imported_torchao() -> Any:
    try:
        import torchao.optim
    except ImportError as error:
        raise ImportError(
            f"optimizer.name = adamw_8bit and optimizer.bf16_stochastic_round need torchao ({error}): pip install 'fastppo[low-bit]'"
        ) from error
    return torchao.optim


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside the block rounding at random draws from this seed; the generators of the process are afterwards as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def parts_of(state: Tensor) -> dict[str, Tensor]:
    """The plain tensors of one of an optimizer's, by what is added to its name: "" of one that is plain."""
    if not is_traceable_wrapper_subclass(state):
        return {"": state}
    return {f".{name}": getattr(state, name) for name in state.__tensor_flatten__()[0]}


def joined(key: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What `parts_of` has taken apart. key: "exp_avg", of signed numbers, or "exp_avg_sq". dtype: of the parameter."""
    if parts.keys() == {""}:
        return parts[""]
    _imported_torchao()
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(parts[".codes"], parts[".scale"], parts[".qmap"], key == "exp_avg", dtype)
