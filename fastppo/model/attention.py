"""The attention that fastppo gives to a Transformers model: packed sequences, for training and for whatever a context adds to it.

`register()` adds `attention_forward` to Transformers' attention interface. Every model call passes a *context* in the keyword
`fastppo`; the context knows where the sequences of the packed [1, T] input lie and does the work of each layer. It travels with the
call (not in a global), so gradient checkpointing recomputes with the same one.

Shapes: T packed tokens, B sequences, L padded length, Hq/Hkv query and key heads (Hq a multiple of Hkv), D head size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from fastppo.model.host import on_device

IMPLEMENTATION = "fastppo"

# Sequences up to this length share one padded group whatever their lengths.
SMALLEST_GROUP_LENGTH = 128


class MissingContextError(ValueError):
    """The attention was reached without the context that says where the sequences lie."""


class AttentionOptions(NamedTuple):
    """What a layer asks of its attention besides q, k and v."""

    scale: float  # multiplies q·k
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118)
    sinks: Tensor | None = None  # [Hq] scores of a key without value (gpt-oss)

    @property
    def needs_scores(self) -> bool:
        """Scaled-dot-product attention has neither soft-capping nor sinks."""
        return self.softcap is not None or self.sinks is not None


class LayerShape(NamedTuple):
    """What one token of a layer keeps: keys [heads, key_size] and values [heads, value_size]."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class AttentionContext(Protocol):
    """One model call's knowledge of its sequences."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, Dv] -> [T, Hq, Dv]."""
        ...


def register() -> None:
    """Make the name "fastppo" known to `model.set_attn_implementation`.

    The mask interface stays without that name, so Transformers builds no mask and hands over `attention_mask=None`.
    """
    AttentionInterface.register(IMPLEMENTATION, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    fastppo: AttentionContext | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    A layer's dropout is passed over, as `prepare_model` says: the ratio of the first PPO step would not be 1.
    """
    if fastppo is None:
        raise MissingContextError(
            f"{type(module).__name__} has fastppo's attention but was not called by fastppo: "
            f"call model.set_attn_implementation('sdpa') to use the model without fastppo"
        )
    if attention_mask is not None or position_bias is not None:
        raise ValueError(f"{type(module).__name__} passes an attention mask or bias of its own")
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    return fastppo.attend(module.layer_idx, query[0], key[0], value[0], options).unsqueeze(0), None


class PackedContext:
    """Causal attention inside each sequence of a packed batch, without cache; differentiable.

    Sequences of similar length are gathered into right-padded groups (padding at most doubles the work), where a causal mask is
    all that keeps queries from seeing padding. Padding repeats the sequence's own last token: a NaN stays in its sequence.
    """

    def __init__(self, bounds: list[int], device: torch.device) -> None:
        """bounds: B + 1 places, `cu_seqlens` on the host. All indices are made here, once for all layers."""
        self._bounds, self._device = bounds, device
        self.groups = self._make_groups()
        self._places = self._make_places()
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        padded = [causal_attention(*group.pad(q, k, v), options, self._mask(group, options)) for group in self.groups]
        return self.unpad(padded)

    def unpad(self, padded: list[Tensor]) -> Tensor:
        """Each group's [B, H, L, D] -> [T, H, D]."""
        flat = [out.transpose(1, 2).flatten(0, 1) for out in padded]
        out = flat[0] if len(flat) == 1 else torch.cat(flat)
        return out if self._places is None else out.index_select(0, self._places)

    def _make_groups(self) -> list[Group]:
        """Sequences whose lengths lie between the same powers of two."""
        buckets: dict[int, list[int]] = {}
        for i in range(len(self._bounds) - 1):
            if length := self._bounds[i + 1] - self._bounds[i]:
                buckets.setdefault((max(SMALLEST_GROUP_LENGTH, length) - 1).bit_length(), []).append(i)
        return [Group(self._bounds, members, self._device) for members in buckets.values()]

    def _make_places(self) -> Tensor | None:
        """[T] row of each token in the groups' padded outputs laid end to end; None where they lie in place already."""
        if len(self.groups) == 1 and self.groups[0].index is None:
            return None
        rows, offset = torch.empty(self._bounds[-1], dtype=torch.int64, device="cpu"), 0
        for group in self.groups:
            for i, sequence in enumerate(group.members):
                start, end = self._bounds[sequence], self._bounds[sequence + 1]
                rows[start:end] = torch.arange(end - start, dtype=torch.int64, device="cpu") + (
                    offset + i * group.length
                )
            offset += len(group.members) * group.length
        return on_device(rows, self._device)

    def _mask(self, group: Group, options: AttentionOptions) -> Tensor | None:
        """bool [L, L], built once per length and window; None where `is_causal` says it all."""
        window = options.window if options.window is not None and options.window < group.length else None
        if window is None and not options.needs_scores:
            return None
        key = (group.length, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(group.length, window, self._device)
        return self._masks[key]


class Group:
    """Sequences padded to the length of the longest of them."""

    def __init__(self, bounds: list[int], members: list[int], device: torch.device) -> None:
        first = torch.tensor([bounds[i] for i in members], dtype=torch.int64, device="cpu")
        lengths = torch.tensor([bounds[i + 1] - bounds[i] for i in members], dtype=torch.int64, device="cpu")
        self.members = members
        self.length = int(lengths.max())
        index = first[:, None] + torch.minimum(
            torch.arange(self.length, dtype=torch.int64, device="cpu"), lengths[:, None] - 1
        )
        self.padding: Tensor | None = None  # bool [B, 1, L, 1]; None where there is none
        if lengths.min() < self.length:
            places = torch.arange(self.length, dtype=torch.int64, device="cpu")
            self.padding = on_device((places >= lengths[:, None])[:, None, :, None], device, torch.bool)
        in_place = index.numel() == bounds[-1] and bool((lengths == self.length).all())
        self.index: Tensor | None = None if in_place else on_device(index.flatten(), device)

    def pad(self, *tensors: Tensor) -> list[Tensor]:
        """[H, T, D] -> [B, H, L, D]."""
        if self.index is not None:
            tensors = tuple(t.index_select(1, self.index) for t in tensors)
        return [t.unflatten(1, (len(self.members), self.length)).transpose(0, 1) for t in tensors]


class LayerCall(NamedTuple):
    """One layer's call of the attention: what it keeps of a token, and how it attends."""

    layer: int
    shape: LayerShape
    options: AttentionOptions


class ObservingContext(PackedContext):
    """Notes how each layer calls the attention."""

    def __init__(self, bounds: list[int], device: torch.device) -> None:
        super().__init__(bounds, device)
        self.calls: list[LayerCall] = []

    @property
    def shapes(self) -> dict[int, LayerShape]:
        return {call.layer: call.shape for call in self.calls}

    @property
    def options(self) -> dict[int, AttentionOptions]:
        return {call.layer: call.options for call in self.calls}

    def note(self, layer: int, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
        self.calls.append(LayerCall(layer, LayerShape(k.shape[0], k.shape[-1], v.shape[-1], k.dtype), options))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.note(layer, k, v, options)
        return super().attend(layer, q, k, v, options)


def check_windows(config: PreTrainedConfig, calls: list[LayerCall]) -> None:
    """Raises ValueError unless each layer asked our attention once, with the window that the configuration gives it."""
    layers = [call.layer for call in calls]
    if sorted(layers) != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"layers {layers} use the attention interface, expected 0 to {config.num_hidden_layers - 1}, once each"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    for layer, _, options in calls:
        expected = window if types[layer] == "sliding_attention" else None
        if options.window != expected:
            raise ValueError(
                f"layer {layer} gives its attention the window {options.window}, expected {expected} from the configuration"
            )


def causal_mask(length: int, window: int | None, device: torch.device, first: int = 0) -> Tensor:
    """bool [length - first, length]: which keys the queries from position `first` on see."""
    key = torch.arange(length, dtype=torch.int64, device=device)
    query = key[first:, None]
    return (key <= query) if window is None else (key <= query) & (key > query - window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, mask: Tensor | None) -> Tensor:
    """q [B, Hq, L, D], k and v [B, Hkv, L, D], mask bool [L, L] or None for plain causal -> [B, Hq, L, Dv]."""
    if options.needs_scores:
        return _attention_from_scores(q, k, v, options, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attention_from_scores(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, mask: Tensor) -> Tensor:
    """softmax(cap(scale q·k), sinks) v, written out: q [B, Hq, L, D], k and v [B, Hkv, S, D], mask [..., L, S] -> [B, Hq, L, Dv].

    The softmax is in fp32 or wider, as in Transformers' eager attention.
    """
    batch, heads, length, _ = q.shape
    # The query heads of one key head become more queries of one head: no key or value is repeated.
    shared = (batch, k.shape[1], -1)
    scores = q.reshape(*shared, q.shape[-1]) @ k.transpose(-1, -2) * options.scale
    scores = scores.view(batch, heads, length, -1)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    weights = weights[..., : k.shape[2]].reshape(*shared, k.shape[2])
    return (weights @ v).view(batch, heads, length, -1)


def run_trunk(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """tokens, position_ids [T] -> hidden [T, H]; `context` says which tokens each of them sees."""
    # use_cache defaults to True, and then position resets would be ignored.
    outputs = model.base_model(
        input_ids=tokens[None], position_ids=position_ids[None], use_cache=False, fastppo=context
    )
    return outputs.last_hidden_state[0]
