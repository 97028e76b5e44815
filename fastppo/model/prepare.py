"""One check that packed forwards of a Transformers model are right, after which it runs under fastppo's attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model import attention
from fastppo.model.attention import ObservingContext, check_windows, run_trunk
from fastppo.model.divided import has_own_rows
from fastppo.model.packed import context_length, evaluating, lm_head

# Relative error (Frobenius norm) between packed and plain logits above which a model is refused. Far above the rounding noise (in fp64
# too norms and softmax are fp32 in most models), far below what a wrong mask, position or scale does.
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
PROBE_LENGTHS = (23, 14)

NOISE_NAMES = ("dropout", "pdrop", "layerdrop", "jitter")


def prepare_model(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """Give the model fastppo's attention and switch off all dropout, after one check that nothing else changes. In place.

    The check runs two short sequences packed and in training mode through our attention and `lm_head`, and one at a time through the
    model's own forward: the logits must be equal up to rounding, and nothing but a plain linear layer may stand between them and the trunk
    (what does nothing yet, as a new adapter, would never learn). A prepared model runs under fastppo only; its weights and all that
    `save_pretrained` writes are untouched, and `model.set_attn_implementation("sdpa")` gives plain Transformers back. With `device` it is
    moved there first.

    Returns the same object. Raises TypeError for anything but a PreTrainedModel, and ValueError naming the architecture and the
    reason where the model cannot be supported; the model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}, expected a transformers.PreTrainedModel")
    _require_weights(model)
    _require_plain_head(model)  # of a prepared model too: adapters may have come since
    if device is not None:
        model.to(device)
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
        for module, name, value in noise:
            setattr(module, name, value)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{type(model).__name__} is not supported: {error}") from error
    return model


def _require_weights(model: PreTrainedModel) -> None:
    """Raises ValueError where parameters have a shape but no numbers."""
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{type(model).__name__} is not supported: its parameter {empty} is on the meta device, without numbers: load the whole model "
            "onto one device (neither offloaded by a device_map nor made inside torch.device('meta'))"
        )


def _require_plain_head(model: PreTrainedModel) -> None:
    """Raises ValueError where the output head is more than the weight and bias that `lm_head` takes of it."""
    head = model.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        name = next((name for name, module in model.named_modules() if module is head), "")
        raise ValueError(
            f"{type(model).__name__} is not supported: its output head {name} is {type(head).__name__}, expected a plain torch.nn.Linear: "
            "adapters and wrappers on it would be passed over and never learn"
        )


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention implementation of the model ("") and of each of its sub-configurations."""
    config = model.config
    found = {"": config._attn_implementation}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            found[name] = getattr(config, name)._attn_implementation
    return found


def _disable_noise(model: PreTrainedModel) -> list[tuple[nn.Module, str, float]]:
    """Set every dropout, layer-drop and router-jitter rate of the modules to 0; returns (module, attribute, former value) of those changed.

    A policy that samples without dropout and trains with it has a ratio other than 1 on the first step. The configuration stays as it
    came, since it is saved with the model: of what a layer reads there at each call, attention dropout is passed over by our attention, and
    anything else shows in the probe.
    """
    changed = []
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    changed += [(module, "p", module.p) for module in dropouts if module.p]
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = isinstance(value, float) and value != 0
            if is_rate and any(word in name for word in NOISE_NAMES):
                changed.append((module, name, value))
    for module, name, _ in changed:
        setattr(module, name, 0.0)
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
    for name, module in (("its output head", model.get_output_embeddings()), ("it", model)):
        own = "forward" in vars(module) and not has_own_rows(getattr(module, "weight", None))
        if own or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{name} has hooks or a forward of its own, which would be passed over: remove them")


def _probe(model: PreTrainedModel) -> None:
    """Leaves the model with fastppo's attention, or raises ValueError with the reason."""
    sequences = _probe_sequences(model)
    model.set_attn_implementation("eager")  # the one implementation that has soft-capping and sinks in every model
    with _nothing_after_the_trunk(model):
        expected = torch.cat([_own_logits(model, ids) for ids in sequences])
    model.set_attn_implementation(attention.IMPLEMENTATION)
    if model.config._attn_implementation != attention.IMPLEMENTATION:
        raise ValueError("it does not use Transformers' attention interface")
    model.train()  # whatever noise training adds must show here
    try:
        hidden, context = _packed_states(model, sequences)
    except attention.MissingContextError as error:
        raise ValueError("it drops keyword arguments on the way from its forward to its attention") from error
    check_windows(model.config.get_text_config(), context.calls)
    _check_logits(lm_head(model).logits(hidden), expected, hidden.dtype)


def _packed_states(model: PreTrainedModel, sequences: list[Tensor]) -> tuple[Tensor, ObservingContext]:
    """[T, H] of two sequences side by side, and how the layers attended."""
    bounds = [0, len(sequences[0]), sum(map(len, sequences))]
    context = ObservingContext(bounds, model.device)
    positions = torch.cat([torch.arange(len(ids), dtype=torch.int64, device=model.device) for ids in sequences])
    return run_trunk(model, torch.cat(sequences), positions, context), context


def require_same_logits(model: PreTrainedModel, whole: PreTrainedModel, what: str) -> None:
    """Raises ValueError where the parts of a prepared model do not give what the whole of it does. what: divides it, in errors."""
    with torch.no_grad(), evaluating(model), evaluating(whole):
        try:
            found, expected = (
                lm_head(each).logits(_packed_states(each, _probe_sequences(each))[0]).cpu() for each in (model, whole)
            )
            _check_logits(found, expected, whole.dtype)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{type(whole).__name__} is not supported with {what}: {error}") from error


@contextmanager
def _nothing_after_the_trunk(model: PreTrainedModel) -> Iterator[None]:
    """Raises ValueError where a forward inside the block runs parameters besides those of trunk and head: zero as yet, they would show
    in no probe.
    """
    passed_over: dict[str, str] = {}
    head, trunk = set(model.get_output_embeddings().parameters()), set(model.base_model.modules())
    handles = [
        module.register_forward_pre_hook(lambda module, _, name=name: passed_over.update({name: type(module).__name__}))
        for name, module in model.named_modules()
        if module is not model and module not in trunk and not head.issuperset(module.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if passed_over:
        name, kind = next(iter(passed_over.items()))
        raise ValueError(f"{name} ({kind}) stands between its trunk and its logits, expected the output head alone")


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
    draws = [
        torch.randint(len(ordinary), (min(n, limit),), generator=generator, dtype=torch.int64, device="cpu")
        for n in PROBE_LENGTHS
    ]
    return [
        torch.tensor([ordinary[i] for i in draw.tolist()], dtype=torch.int64, device=model.device) for draw in draws
    ]


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
