"""Transformers models as fastppo uses them: loading, one check that packed forwards are right, packed hidden states, critics.

Packed: the T tokens of B sequences laid end to end, `cu_seqlens` int32 [B + 1] saying where each begins, `position_ids` starting
again at 0 with each. H hidden size, V vocabulary size. No function here returns padding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastppo.ops import batch_invariant_linear
from fastppo.rollout import attention
from fastppo.rollout.attention import AttentionContext, AttentionOptions, PackedContext

# Relative error (Frobenius norm) between packed and plain logits above which a model is refused. Far above the rounding noise (in fp64
# too norms and softmax are fp32 in most models), far below what a wrong mask, position or scale does.
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
PROBE_LENGTHS = (23, 14)

NOISE_NAMES = ("dropout", "pdrop", "layerdrop", "jitter")


def load_model(name_or_path: str, *, dtype: str | torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A causal language model from a folder in Transformers' format or from the hub; code in the repository is never run.

    dtype: a torch type or its name; "auto" is float32 on the CPU and bfloat16 on a GPU.
    Raises ValueError where there is no such model or it cannot be read.
    """
    device = torch.device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected auto or the name of a torch type")
    with _named_errors("model", name_or_path):
        model = AutoModelForCausalLM.from_pretrained(str(name_or_path), dtype=dtype, trust_remote_code=False)
    return model.to(device)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; ValueError where there is none."""
    with _named_errors("tokenizer", name_or_path):
        return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)


@contextmanager
def _named_errors(what: str, name_or_path: str) -> Iterator[None]:
    looks_local = str(name_or_path).startswith((".", "/", "~"))
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{what} is {str(name_or_path)!r}, expected a folder in Transformers' format: there is no such folder"
        )
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        where = "read from this folder" if Path(name_or_path).is_dir() else "found as a folder here or as a hub name"
        raise ValueError(f"{what} {str(name_or_path)!r} cannot be {where}: {error}") from error


class LMHead(NamedTuple):
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); views of the model's own parameters."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None  # Gemma 2, arXiv:2408.00118
    logit_scale: float  # Cohere's logit_scale, 1 / Granite's logits_scaling

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N, V] in fp32 (fp64 for fp64), never rounded to a narrower type on the way."""
        logits = _linear_fp32(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _linear_fp32(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != wide and not torch.is_grad_enabled():
        logits = torch.mm(hidden, weight.t(), out_dtype=wide)  # no fp32 copy of the weights
        return logits if bias is None else logits + bias
    operands = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return batch_invariant_linear(*operands)
    return F.linear(*operands)


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's output layer as numbers that the fused ops take; the tensors are the live parameters."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if getattr(layer, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(layer.weight, getattr(layer, "bias", None), softcap, float(scale))


def packed_hidden(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Last hidden states (what the head reads) of packed sequences, as if each had been run alone; differentiable.

    Args:
        model: a causal LM that `prepare_model` accepted, or its trunk.
        tokens: int64 [T]. position_ids: int64 [T]. cu_seqlens: int32 [B + 1].

    Returns:
        hidden [T, H] in the model's type; hidden[t] has seen the tokens of its sequence up to and with t.

    Raises:
        ValueError: nothing to run, an unprepared model, shapes that do not fit, a sequence longer than the model's context.
    """
    require_prepared(model)
    if tokens.dim() != 1 or tokens.shape != position_ids.shape or not len(tokens):
        raise ValueError(
            f"tokens and position_ids have shapes {list(tokens.shape)} and {list(position_ids.shape)}, expected [T] and T >= 1"
        )
    bounds = cu_seqlens.tolist()
    _check_bounds(bounds, len(tokens), context_length(model))
    return run_trunk(model, tokens, position_ids, PackedContext(bounds, tokens.device))


def run_trunk(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """tokens, position_ids [T] -> hidden [T, H]; `context` says which tokens each of them sees."""
    # use_cache defaults to True, and then position resets would be ignored.
    outputs = model.base_model(
        input_ids=tokens[None], position_ids=position_ids[None], use_cache=False, fastppo=context
    )
    return outputs.last_hidden_state[0]


def require_prepared(model: PreTrainedModel) -> None:
    found = model.config._attn_implementation
    if found != attention.IMPLEMENTATION:
        raise ValueError(
            f"model {type(model).__name__} has attention implementation {found!r}, expected 'fastppo': call prepare_model(model) first"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens, prompt and completion together; None where the model sets no limit.

    LongRoPE models are held to the length up to which one set of rotary frequencies serves: beyond it Transformers would switch
    the frequencies of the whole batch, and a sequence's log-probabilities would depend on its neighbours.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def shift_right(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y[t] = x[t - 1] inside each sequence and 0 at its first token; x [T, ...], cu_seqlens int32 [B + 1]."""
    first = torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device).index_fill_(0, cu_seqlens.long(), True)[: len(x)]
    shifted = torch.cat([x.new_zeros(1, *x.shape[1:]), x])[: len(x)]
    return torch.where(first.view(-1, *[1] * (x.dim() - 1)), 0, shifted)


def _check_bounds(bounds: list[int], total: int, limit: int | None) -> None:
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if not lengths or bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens is {bounds}, expected 0 first, {total} (the number of tokens) last, never falling"
        )
    if limit is not None and max(lengths) > limit:
        longest = lengths.index(max(lengths))
        raise ValueError(
            f"sequence {longest} has {lengths[longest]} tokens, expected at most {limit}, the model's context"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class ValueHead(nn.Module):
    """Linear(H, 1) in fp32, zero at the start: the first values are 0, whatever the trunk says."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> values fp32 [T] (fp64 for an fp64 head)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(-1)


class Critic(nn.Module):
    """A trunk of its own and a value head."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Critic:
        """A critic that starts from a copy of a prepared model's trunk; nothing is shared with the model."""
        require_prepared(model)
        trunk = copy.deepcopy(model.base_model)
        hidden_size = lm_head(model).weight.shape[1]
        return cls(trunk, ValueHead(hidden_size, device=model.device)).train(model.training)

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Packed tokens and position_ids [T] -> values fp32 [T]: out[t] = V(state after token t)."""
        return self.head(packed_hidden(self.trunk, tokens, position_ids, cu_seqlens))


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model fastppo's attention and switch off all dropout, after one check that nothing else changes. In place.

    The check runs two short sequences packed and in training mode through our attention and `lm_head`, and one at a time through the
    model's own forward: the logits must be equal up to rounding. A prepared model runs under fastppo only; `save_pretrained` and
    weights are untouched, and `model.set_attn_implementation("sdpa")` gives plain Transformers back.

    Returns the same object. Raises TypeError for anything but a PreTrainedModel, and ValueError naming the architecture and the
    reason where the model cannot be supported; the model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}, expected a transformers.PreTrainedModel")
    if model.config._attn_implementation == attention.IMPLEMENTATION:
        _disable_noise(model)
        return model
    attention.register()
    implementations = _implementations(model)
    noise = _disable_noise(model)
    try:
        with evaluating(model), torch.no_grad():
            _require_supported_config(model)
            _probe(model)
    except BaseException as error:
        model.config._attn_implementation = implementations
        for owner, name, value in noise:
            setattr(owner, name, value)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{type(model).__name__} is not supported: {error}") from error
    return model


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention implementation of the model ("") and of each of its sub-configurations."""
    config = model.config
    found = {"": config._attn_implementation}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            found[name] = getattr(config, name)._attn_implementation
    return found


def _disable_noise(model: PreTrainedModel) -> list[tuple[object, str, float]]:
    """Set every dropout, layer-drop and router-jitter rate to 0; returns (owner, attribute, former value) of those changed.

    A policy that samples without dropout and trains with it has a ratio other than 1 on the first step.
    """
    changed = []
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    changed += [(module, "p", module.p) for module in dropouts if module.p]
    for owner in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in vars(owner).items():
            is_rate = isinstance(value, float) and value != 0
            if is_rate and any(word in name for word in NOISE_NAMES):
                changed.append((owner, name, value))
    for owner, name, _ in changed:
        setattr(owner, name, 0.0)
    return changed


def _require_supported_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError("encoder-decoder models cannot be packed")
    if getattr(model, "_is_stateful", False):
        raise ValueError("it carries a recurrent state besides the key-value cache")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        raise ValueError(f"it has layers of type {', '.join(odd)}, expected full_attention or sliding_attention only")
    lm_head(model)


class _ProbeContext(PackedContext):
    """Notes which layers call the attention, and with which window."""

    def __init__(self, bounds: list[int], device: torch.device) -> None:
        super().__init__(bounds, device)
        self.windows: list[tuple[int, int | None]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.windows.append((layer, options.window))
        return super().attend(layer, q, k, v, options)


def _probe(model: PreTrainedModel) -> None:
    """Leaves the model with fastppo's attention, or raises ValueError with the reason."""
    sequences = _probe_sequences(model)
    model.set_attn_implementation("eager")  # the one implementation that has soft-capping and sinks in every model
    expected = torch.cat([_own_logits(model, ids) for ids in sequences])
    model.set_attn_implementation(attention.IMPLEMENTATION)
    if model.config._attn_implementation != attention.IMPLEMENTATION:
        raise ValueError("it does not use Transformers' attention interface")
    bounds = [0, len(sequences[0]), len(expected)]
    context = _ProbeContext(bounds, model.device)
    positions = torch.cat([torch.arange(len(ids), device=model.device) for ids in sequences])
    model.train()  # whatever noise training adds must show here
    try:
        hidden = run_trunk(model, torch.cat(sequences), positions, context)
    except attention.MissingContextError as error:
        raise ValueError("it drops keyword arguments on the way from its forward to its attention") from error
    _check_windows(model.config.get_text_config(), context.windows)
    _check_logits(lm_head(model).logits(hidden), expected, hidden.dtype)


def _own_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """tokens [T] -> logits [T, V]"""
    try:
        return model(input_ids=tokens[None], use_cache=False).logits[0]
    except Exception as error:
        raise ValueError(f"its own forward failed: {type(error).__name__}: {error}") from error


def _probe_sequences(model: PreTrainedModel) -> list[Tensor]:
    """Two fixed sequences of ordinary tokens: padding and image tokens get special treatment in some models."""
    config = model.config.get_text_config()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    named = [v for c in (model.config, config) for k, v in vars(c).items() if k.endswith(("token_id", "token_index"))]
    special = {i for value in named for i in (value if isinstance(value, list | tuple) else [value])}
    ordinary = [i for i in range(min(vocab_size, 4096)) if i not in special] or list(range(vocab_size))
    limit = context_length(model) or max(PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(ordinary), (min(n, limit),), generator=generator) for n in PROBE_LENGTHS]
    return [torch.tensor([ordinary[i] for i in draw.tolist()], device=model.device) for draw in draws]


def _check_windows(config: PreTrainedConfig, found: list[tuple[int, int | None]]) -> None:
    """Each layer asked our attention once, with the window that the configuration gives it."""
    layers = [layer for layer, _ in found]
    if sorted(layers) != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"layers {layers} use the attention interface, expected 0 to {config.num_hidden_layers - 1}, once each"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    for layer, given in found:
        expected = window if types[layer] == "sliding_attention" else None
        if given != expected:
            raise ValueError(
                f"layer {layer} gives its attention the window {given}, expected {expected} from the configuration"
            )


def _check_logits(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"hidden states and head give logits of shape {list(found.shape)}, its forward {list(expected.shape)}"
        )
    found, expected = found.double(), expected.double()
    if not expected.isfinite().all():
        raise ValueError("its own logits hold NaN or infinities: are the weights intact?")
    error = ((found - expected).norm() / (expected - expected.mean()).norm().clamp_min(1e-30)).item()
    if not error <= PROBE_TOLERANCE[dtype]:
        raise ValueError(
            f"packed logits differ from its own forward by {error:.1e} (relative), expected at most {PROBE_TOLERANCE[dtype]:.0e}"
        )
