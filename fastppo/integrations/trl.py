"""TRL's functions of the same names on our ops; `patch()` puts them into an installed TRL 1.16 or 1.8.

They take and give what TRL's do; sums and probabilities are fp32 or better and rounded once, to the type that TRL returns. What ours does
not take raises TypeError or ValueError before anything is computed, and a patched TRL runs its own: fp8 and integer logits, tensors of
another class (DTensor), devices that are neither CPU nor CUDA.

Where TRL's answer is a NaN that need not be, ours is the number. `strict=True` refuses those inputs, so that a patched call gets TRL's NaN.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from fastppo import ops
from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.ops import _checks

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Label of a row that row_mask leaves out. Not -100: that TRL refuses, as it does any negative index.
LEFT_OUT = -(2**31)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None, *, strict: bool = False
) -> Tensor:
    """log_softmax(logits / temperature) of logits [..., T, V] at `index`, [..., T] or [..., T, K], in the logits' type.

    On a GPU in float32, for logits that TRL gives to its Triton kernel. Where row_mask, of index's shape, is 0, so are result and gradient,
    whatever the logits hold there. A row with +inf gives NaN, as log_softmax does. strict: the logits must be finite.
    """
    _check_logits(logits, strict)
    if logits.dim() < 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [..., T, V]")
    if index.dim() == logits.dim():
        return _at_several(logits, index, temperature, row_mask).to(logits.dtype)
    labels = _labels(index, row_mask)
    logprobs = ops.token_logprobs(logits, labels, temperature=temperature, ignore_index=LEFT_OUT)
    return logprobs.to(_result_dtype(logits, row_mask))


def entropy_from_logits(logits: Tensor, chunk_size: int = 128, *, strict: bool = False) -> Tensor:
    """Entropy in nats of softmax(logits), [..., V] -> [...], in the type of `selective_log_softmax`; nothing needs chunks.

    A token of probability 0 (a logit of -inf) adds 0. strict: the logits must be finite.
    """
    _check_logits(logits, strict)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return ops.token_logprobs(logits, labels, return_entropy=True).entropy.to(_result_dtype(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` at index [...] and the entropy at that temperature, of which the logits are read once."""
    _check_logits(logits, strict)
    labels, dtype = _labels(index, row_mask), _result_dtype(logits, row_mask)
    logprobs, entropy = ops.token_logprobs(
        logits, labels, temperature=temperature, ignore_index=LEFT_OUT, return_entropy=True
    )
    return logprobs.to(dtype), (entropy if entropy_requires_grad else entropy.detach()).to(dtype)


def triton_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None, *, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """`trl.kernels.selective_log_softmax_and_entropy`: the same in float32, on the CPU too."""
    _check_logits(logits, strict)
    _refuse_double(logits=logits)
    labels = _labels(index, row_mask)
    return tuple(
        ops.token_logprobs(logits, labels, temperature=temperature, ignore_index=LEFT_OUT, return_entropy=True)
    )


class ChunkedLogProbFunction:
    """`trl.kernels.ChunkedLogProbFunction`, of which callers use `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """float32 log-probabilities of targets [N], and entropies, under the logits hidden [N, H] @ weight [V, H].T + bias [V].

        The logits are fp32, where TRL rounds them to hidden's or autocast's type. Refused: outputs that TRL has beside these, float64, and
        the weight of a model that DeepSpeed's ZeRO-3 splits, which TRL gathers anew for the backward pass.
        """
        others = [name for name in outputs if name not in ("log_probs", "entropy")]
        if others:
            raise ValueError(f"outputs holds {', '.join(map(repr, others))}, expected 'log_probs' and 'entropy' alone")
        options = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        if "entropy" not in outputs:
            return _head_logprobs(hidden, weight, bias, targets, **options), None, None, None, None
        return *_head_logprobs(hidden, weight, bias, targets, return_entropy=True, **options), None, None, None


def scores_labelled_rows(device: torch.device) -> bool:
    """Whether a model's fused head scores only rows that have a label: in TRL where Triton runs, here on the CPU too.

    What `trl.trainer.utils` asks `_use_triton` for; its kernels ask it for themselves.
    """
    return device.type in ("cpu", "cuda", "xpu")


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, *, strict: bool = False) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8), of mean and Bessel's variance inside a bool mask; + mean unless shift_mean.

    As `trl.experimental.ppo` of TRL 1.8 has it: what lies outside the mask moves along, but reaches nothing else, NaN neither. A single
    element becomes 0. strict: that is refused, as are values that are not finite. An empty mask always is.
    """
    _refuse_foreign(values=values, mask=mask)
    mean, count = ops.masked_mean(values, mask), mask.sum()
    if count < 2 and (strict or count == 0):
        raise ValueError(f"mask holds {int(count)} elements, expected at least {2 if strict else 1}")
    if strict and not values.isfinite().all():
        raise ValueError("values is not finite everywhere, as expected with strict=True")
    centred = values - mean
    variance = ops.masked_mean(centred.square(), mask) * (count / (count - 1).clamp(min=1))
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).to(values.dtype)


class _Of18:
    """The functions whose signatures TRL 1.8 has otherwise; it has no Triton kernel, so that results are always in the logits' type."""

    @staticmethod
    def selective_log_softmax(logits: Tensor, index: Tensor, *, strict: bool = False) -> Tensor:
        return selective_log_softmax(logits, index, strict=strict).to(logits.dtype)

    @staticmethod
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128, *, strict: bool = False) -> Tensor:
        return entropy_from_logits(logits, chunk_size, strict=strict).to(logits.dtype)

    @staticmethod
    def chunked_logprobs(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        *,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The entropy has its gradient; strict: it has none, as in TRL."""
        options = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        logprobs, entropy = _head_logprobs(last_hidden, weight, None, targets, return_entropy=True, **options)
        return logprobs, entropy.detach() if strict else entropy


def _head_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options):
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    _refuse_foreign(**parts)
    _refuse_double(**parts)
    if hasattr(weight, "ds_status"):
        raise TypeError(
            "weight is a parameter of DeepSpeed's ZeRO-3, expected one that is whole in the backward pass too"
        )
    if hidden.is_cuda:  # products in TRL's type; on the CPU they are fp32 whatever the type
        autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else hidden.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return ops.linear_token_logprobs(hidden, weight, targets, bias, ignore_index=LEFT_OUT, **options)


def _at_several(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> Tensor:
    """[..., K]: the log-probability of the likeliest of the K tokens, and how much less likely each is."""
    _checks.integer("index", index)
    _checks.shape("index", index, (*logits.shape[:-1], index.shape[-1]), "logits' leading shape and K")
    index = index.long()
    best, place = logits.gather(-1, index).max(-1, keepdim=True)
    likeliest = index.gather(-1, place).squeeze(-1)
    if torch.isneginf(best).any():  # of impossible tokens no difference says anything: then the row's likeliest
        likeliest = logits.argmax(-1)
    logprobs = ops.token_logprobs(logits, likeliest, temperature=temperature).unsqueeze(-1)
    z = logits.gather(-1, torch.cat([likeliest.unsqueeze(-1), index], -1)).to(logprobs.dtype) / temperature
    logprobs = logprobs + (z[..., 1:] - z[..., :1])
    return logprobs if row_mask is None else logprobs.masked_fill(_left_out(index, row_mask), 0.0)


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(_left_out(index, row_mask), LEFT_OUT)


def _left_out(index: Tensor, row_mask: Tensor) -> Tensor:
    _checks.integer("index", index)
    _checks.shape("row_mask", row_mask, index.shape, "index's shape")
    return row_mask == 0


def _result_dtype(logits: Tensor, row_mask: Tensor | None = None) -> torch.dtype:
    """float32 where TRL 1.16 runs its Triton kernel: on a GPU, for up to three dimensions of whole rows and a mask of these types."""
    masked = row_mask is None or row_mask.dtype in (torch.bool, torch.int32, torch.int64)
    fused = masked and logits.is_cuda and 1 <= logits.dim() <= 3 and logits.stride(-1) == 1
    return torch.float32 if fused and logits.dtype != torch.float64 else logits.dtype


def _check_logits(logits: Tensor, strict: bool) -> None:
    _refuse_foreign(logits=logits)
    _checks.floating("logits", logits)
    if strict and not logits.isfinite().all():
        raise ValueError("logits is not finite everywhere, as expected with strict=True")


def _refuse_foreign(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if type(x) not in (Tensor, Parameter):
            raise TypeError(f"{name} is {type(x).__name__}, expected a torch.Tensor and no class made of it")
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on {x.device}, expected the CPU or a CUDA device")


def _refuse_double(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype == torch.float64:
            raise TypeError(f"{name} has dtype {x.dtype}, expected float32, bfloat16 or float16")


_UTILS = "trl.trainer.utils"
_CHUNKED = "trl.kernels.chunked_logprob:ChunkedLogProbFunction"
_CHUNKED_18 = f"{_UTILS}:_ChunkedLogProbFunction"
_TRITON = (
    Replacement("trl.kernels.logprob_entropy:selective_log_softmax_and_entropy", triton_log_softmax_and_entropy),
)
_PEER = Peer(
    "trl",
    "trl",
    {
        "1.8": (
            Replacement(f"{_UTILS}:selective_log_softmax", _Of18.selective_log_softmax),
            Replacement(f"{_UTILS}:entropy_from_logits", _Of18.entropy_from_logits),
            Replacement(f"{_CHUNKED_18}.apply", _Of18.chunked_logprobs, signature=f"{_CHUNKED_18}.forward"),
            Replacement("trl.experimental.ppo.ppo_trainer:masked_whiten", masked_whiten),
        ),
        "1.16": (
            Replacement(f"{_UTILS}:selective_log_softmax", selective_log_softmax),
            Replacement(f"{_UTILS}:entropy_from_logits", entropy_from_logits),
            Replacement(f"{_UTILS}:selective_log_softmax_and_entropy", selective_log_softmax_and_entropy),
            Replacement(f"{_CHUNKED}.apply", ChunkedLogProbFunction.apply, signature=f"{_CHUNKED}.forward"),
            Replacement(f"{_UTILS}:_use_triton", scores_labelled_rows, everywhere=False),
            *(_TRITON if find_spec("triton") else ()),
        ),
    },
)


def patch(strict: bool = False) -> Patch:
    """Puts ours into the installed TRL; `unpatch()`, or leaving it as a context manager, puts its own back."""
    return _PEER.patch(strict)


def unpatch() -> None:
    _PEER.unpatch()
