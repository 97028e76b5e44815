"""fastppo: a PPO engine for language models.

Ops replace the PyTorch code in any trainer; `Engine` samples on the weights that train; `PPOTrainer` is the loop over both,
and `SFTTrainer` makes the model that it begins with.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastppo import ops
from fastppo.ops import *  # noqa: F403 - the ops' own __all__ is the list

if TYPE_CHECKING:
    from fastppo.callbacks import Callback
    from fastppo.config import PPOConfig
    from fastppo.rollout import Engine, Rollout, SamplingParams
    from fastppo.sft import SFTTrainer
    from fastppo.sft_config import SFTConfig
    from fastppo.trainer import PPOTrainer

try:
    __version__ = version("fastppo")
except PackageNotFoundError:  # in a zipped or frozen application, which brings the package without its metadata
    __version__ = "unknown"

# Imported at first use: whoever wants the ops alone does not wait for Transformers.
_LAZY = {
    "Callback": "fastppo.callbacks",
    "Engine": "fastppo.rollout",
    "PPOConfig": "fastppo.config",
    "PPOTrainer": "fastppo.trainer",
    "Rollout": "fastppo.rollout",
    "SFTConfig": "fastppo.sft_config",
    "SFTTrainer": "fastppo.sft",
    "SamplingParams": "fastppo.rollout",
}

__all__ = [
    "Callback",
    "Engine",
    "PPOConfig",
    "PPOTrainer",
    "Rollout",
    "SFTConfig",
    "SFTTrainer",
    "SamplingParams",
    "__version__",
    *ops.__all__,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastppo' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
