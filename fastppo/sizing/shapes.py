"""What of a model decides memory and time: numbers of parameters, and what its layers keep of a token, found without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.model.attention import IMPLEMENTATION, AttentionOptions, ObservingContext, register, run_trunk
from fastppo.model.parts import LlamaParts, UnlikeLlama
from fastppo.model.tensor_parallel import divided_parameters, require_divisible

PROBES = 64, 192
"""Tokens of two passes, whose difference says what a token adds."""


TEAMS = 2, 4, 8
"""Ranks that may sample together: those of one node."""


class Widths(NamedTuple):
    """Of a Llama-like layer that our kernels run: q's, k's and the gate's width, and the number of query heads."""

    query: int
    key: int
    heads: int
    inner: int


class ModelShape(NamedTuple):
    """Parameters are counted, not their bytes.

    parameters: all of them, an embedding that is the head too once. attention: of its attention modules. experts: of those that a token
    goes through a share of, `expert_share`. linears: (name, inputs, outputs, how many such) of linear layers but the head.
    cached: numbers that a token leaves in the key-value cache. query: width of all query heads of all layers.
    kept: bytes that the layers keep of a token for a backward pass, by the model's own modules. widths: None where they must run.
    divided: parameters that ranks which sample together divide among them. teams: how many such ranks there may be, but for one.
    """

    name: str
    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    tied: bool
    attention: int
    experts: int
    expert_share: float
    linears: tuple[tuple[str, int, int, int], ...]
    cached: int
    query: int
    kept: float
    widths: Widths | None
    context: int | None
    divided: int = 0
    teams: tuple[int, ...] = ()

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def trunk(self) -> int:
        """Without embedding and head."""
        return self.parameters - self.head * (1 if self.tied else 2)

    @property
    def layer(self) -> int:
        return self.trunk // self.layers

    @property
    def used_trunk(self) -> float:
        """Parameters of the trunk that one token is multiplied with."""
        return self.trunk - self.experts * (1 - self.expert_share)


def shape_of(outline: PreTrainedModel, dtype: torch.dtype, context: int | None) -> ModelShape:
    """outline: a model on "meta", as `load_outline` gives it; it is converted to `dtype`, the weights' type.

    Raises ValueError where its layers do not run without numbers.
    """
    outline = outline.to(dtype)
    embedding, head = outline.get_input_embeddings().weight, outline.get_output_embeddings().weight
    config, modules = outline.config.get_text_config(), dict(outline.named_modules())
    observed, kept = _kept_of_a_token(outline)
    return ModelShape(
        name=outline.name_or_path or type(outline).__name__,
        parameters=sum(p.numel() for p in outline.parameters()),
        vocabulary=head.shape[0],
        hidden=head.shape[1],
        layers=config.num_hidden_layers,
        tied=embedding is head,
        attention=_count(module for module in modules.values() if "attention" in type(module).__name__.lower()),
        experts=sum(p.numel() for name, p in outline.named_parameters() if ".experts." in name),
        expert_share=_expert_share(config),
        linears=_linears(modules, head),
        cached=sum(call.shape.heads * (call.shape.key_size + call.shape.value_size) for call in observed.calls),
        query=observed.query,
        kept=kept,
        widths=_widths(outline),
        context=context,
        divided=divided_parameters(outline),
        teams=tuple(size for size in TEAMS if _is_divisible(outline, size)),
    )


def _is_divisible(outline: PreTrainedModel, ranks: int) -> bool:
    try:
        require_divisible(outline, ranks)
    except ValueError:
        return False
    return True


def _linears(modules: Mapping[str, nn.Module], head: Tensor) -> tuple[tuple[str, int, int, int], ...]:
    found = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module.weight is not head
    )
    return tuple((*kind, number) for kind, number in found.items())


def _count(modules: Iterable[nn.Module]) -> int:
    """Parameters of modules, each once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _expert_share(config: PreTrainedConfig) -> float:
    """Share of the experts that a token goes through; 1 of a model without."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if total := getattr(config, name, None):
            return config.num_experts_per_tok / total
    return 1.0


def _widths(outline: PreTrainedModel) -> Widths | None:
    try:
        _, linears = LlamaParts(outline).layers[0]
    except UnlikeLlama:
        return None
    q, k, *_, gate, _, _ = (linear.weight.shape[0] for linear in linears)
    config = outline.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Widths(q, k, q // size, gate)


class _Attended(torch.autograd.Function):
    """An attention without numbers that keeps what a fused one does."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


class _Tracing(ObservingContext):
    """query: width of the query heads of all layers."""

    query = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.note(layer, k, v, options)
        self.query += q.shape[0] * q.shape[-1]
        return _Attended.apply(q, k, v)


def _kept_of_a_token(outline: PreTrainedModel) -> tuple[_Tracing, float]:
    """What the layers do with a token, and the bytes that they keep of it for a backward pass."""
    register()
    outline.set_attn_implementation(IMPLEMENTATION)
    outline.requires_grad_(True).eval()
    (few, _), (many, context) = (_kept(outline, count) for count in PROBES)
    return context, (many - few) / (PROBES[1] - PROBES[0])


def _kept(outline: PreTrainedModel, count: int) -> tuple[int, _Tracing]:
    """Bytes kept of `count` tokens, each storage once and no parameter."""
    own = {StorageWeakRef(x.untyped_storage()) for x in (*outline.parameters(), *outline.buffers())}
    found: dict[StorageWeakRef, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        key = StorageWeakRef(x.untyped_storage())
        if key not in own:
            found[key] = x
        return x

    context, places = _Tracing([0, count], torch.device("cpu")), torch.arange(count, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        try:
            run_trunk(outline, places, places, context)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"{type(outline).__name__} cannot be planned for: its layers need numbers ({' '.join(str(error).split())})"
            ) from error
    return sum(x.untyped_storage().nbytes() for x in found.values()), context
