"""Who fastppo is compared with: eager PyTorch compiled, and the functions of other packages where those are installed.

Every function here has the signature that the case file of its op gives to `fastppo` and `eager`, and imports its package when it is
called: a package that is absent costs nothing, and one that fails has a row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._inductor import config as inductor

OURS, EAGER, COMPILED = "fastppo", "eager", "compile"
SEPARATE = "fastppo, separate critic"  # our own step, beside the one with a shared trunk
OWN = (OURS, SEPARATE)
COMPILING = (
    COMPILED,
    "cce",
    "liger",
    "openrlhf",
)  # on a CPU: what they compiled for one size they compile again for another
TRL_VOCABULARY_CHUNK = 32768  # what TRL's own trainers pass
CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Package:
    module: str
    distribution: str


PACKAGES = {
    "trl": Package("trl", "trl"),
    "liger": Package("liger_kernel", "liger-kernel"),
    "cce": Package("cut_cross_entropy", "cut-cross-entropy"),
    "verl": Package("verl", "verl"),
    "flash-attn": Package("flash_attn", "flash-attn"),
    "flashinfer": Package("flashinfer", "flashinfer-python"),
    "openrlhf": Package("openrlhf", "openrlhf"),
    "stable-baselines3": Package("stable_baselines3", "stable-baselines3"),
    "torchrl": Package("torchrl", "torchrl"),
    "transformers": Package("transformers", "transformers"),
}
DROP_IN = (
    "trl",
    "verl",
    "openrlhf",
    "liger",
    "stable-baselines3",
    "torchrl",
    "transformers",
)  # fastppo.integrations has theirs


def trl_token_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    return (selective_log_softmax_and_entropy if return_entropy else selective_log_softmax)(logits, labels)


def verl_token_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    logprobs = logprobs_from_logits(logits, labels, inplace_backward=False)
    return (logprobs, entropy_from_logits(logits)) if return_entropy else logprobs


def trl_linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    options = 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()  # temperature, chunk, softcap, scale, no further outputs
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, *options)[0]


def liger_linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def cce_linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=implementation)


def verl_linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, 1.0, "none")[0]


def liger_linear_ppo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float, clip_high: float,
) -> tuple[Tensor]:  # fmt: skip
    """Its GRPO loss without KL is PPO's policy loss. It has one advantage a sequence: each token is a sequence of one, all in one chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        chunk_size=len(labels),
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        loss_type="bnpo",
    )
    sequences = hidden[:, None], weight, labels[:, None], mask[:, None].float(), advantages
    return (loss(*sequences, old_per_token_logps=old_logprobs[:, None])[0],)


def verl_gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """It whitens the advantages too; they are taken from its returns, and masked, which it leaves to the loss."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    kept = torch.ones_like(rewards) if mask is None else mask.float()
    _, returns = compute_gae_advantage_return(rewards, values, kept, gamma, lam)
    return (returns - values) * kept, returns * kept


def verl_masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Masked, which it leaves to the loss."""
    from verl.utils.torch_functional import masked_whiten

    return masked_whiten(x, mask) * mask


def flash_attn_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    cache = {"cache_seqlens": context_lens, "block_table": block_table}
    return flash_attn_with_kvcache(q[:, None], k_pages, v_pages, **cache)[:, 0]


def flashinfer_sample_tokens(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> dict[str, Tensor]:
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    scaled = logits.float() / temperature
    return {"tokens": top_k_top_p_sampling_from_logits(scaled, top_k, top_p, filter_apply_order="top_k_first").long()}


# op -> package -> (its function, the devices it runs on)
FUNCTIONS: dict[str, dict[str, tuple[Callable, tuple[str, ...]]]] = {
    "token_logprobs": {
        "trl": (trl_token_logprobs, (CPU, CUDA)),
        "verl": (verl_token_logprobs, (CPU, CUDA)),
    },
    "linear_token_logprobs": {
        "trl": (trl_linear_token_logprobs, (CPU, CUDA)),
        "liger": (liger_linear_token_logprobs, (CPU, CUDA)),
        "cce": (cce_linear_token_logprobs, (CPU, CUDA)),
        "verl": (verl_linear_token_logprobs, (CUDA,)),
    },
    "linear_ppo_loss": {"liger": (liger_linear_ppo_loss, (CPU, CUDA))},
    "gae": {"verl": (verl_gae, (CPU, CUDA))},
    "masked_whiten": {"verl": (verl_masked_whiten, (CPU, CUDA))},
    "sample_tokens": {"flashinfer": (flashinfer_sample_tokens, (CUDA,))},
    "decode_attention": {"flash-attn": (flash_attn_decode_attention, (CUDA,))},
}


def installed() -> dict[str, Package]:
    """Not what a folder of that name beside the caller looks like, such as a package's checkout."""
    specs = {name: find_spec(package.module) for name, package in PACKAGES.items()}
    return {name: PACKAGES[name] for name, spec in specs.items() if spec and spec.origin}


def functions(op: str, ours: Callable, eager: Callable, device: str, *, compiles: bool = True) -> dict[str, Callable]:
    """Who computes `op` on `device`, by provider name: ours, eager, eager compiled, the installed packages' own functions.

    `compiles` is False for what a compiler does not help: a loop that it would unroll, a single product.
    """
    found = {OURS: ours, EAGER: eager}
    if compiles:
        inductor.compile_threads = 1  # no processes that compile beside what is timed
        found[COMPILED] = torch.compile(eager, dynamic=False, fullgraph=True)
    present = installed()
    for name, (function, devices) in FUNCTIONS.get(op, {}).items():
        if name in present and device in devices:
            found[name] = function
    return found


def providers(
    op: str,
    wrap: Callable[[Callable], Callable],
    ours: Callable,
    eager: Callable,
    device: str,
    *,
    compiles: bool = True,
) -> dict[str, Callable]:
    """`functions`, each as a case calls it."""
    found = functions(op, ours, eager, device, compiles=compiles)
    return {name: wrap(function) for name, function in found.items()}


def absent() -> list[str]:
    """Of those whose functions `drop_in` has beside ours."""
    return [name for name in DROP_IN if name not in installed()]


def left_out(device: str) -> list[str]:
    """The installed packages that have something for an op, but nothing for `device`."""
    devices = {name: set() for row in FUNCTIONS.values() for name in row}
    for row in FUNCTIONS.values():
        for name, (_, places) in row.items():
            devices[name].update(places)
    return [name for name in installed() if name in devices and device not in devices[name]]


def check(names: Iterable[str]) -> None:
    """ValueError naming the nearest provider where there is none of a name, or the package that is not installed."""
    known = [EAGER, COMPILED, *PACKAGES]
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown peer {name!r}, did you mean {nearest!r}? The peers are {', '.join(known)}")
        if name in PACKAGES and name not in installed():
            raise ValueError(f"{name} is not installed here: pip install {PACKAGES[name].distribution}")
