"""The trunk of a Llama-like model over packed sequences, forward and backward, by the kernels that also take its decode steps.

On the CPU in fp32 a token's hidden state has the bits that a decode step gives it, for every batch, packing and number of threads: products
sum in one order (`csrc/cpu/matmul.cpp`), attention goes over tiles of keys that begin at the same positions, and all else is one row at a
time. On a GPU a model runs here where it is to be exact (`fastppo/model/exact.py`), by the kernels of its decode steps (`layer_on_gpu`).
The backward pass makes norms, rotations and gates again instead of keeping them: a layer keeps of each token its two residual states, q, k, v,
what attention gave, gate and up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastppo.model import layer_on_cpu
from fastppo.model.attention import IMPLEMENTATION, LayerCall, ObservingContext, check_windows, register, run_trunk
from fastppo.model.lora import Factors, factor_gradients, merged
from fastppo.model.packed_pages import PackedPages
from fastppo.model.parts import ALLOWED_ERROR, LARGEST_HEAD, LlamaParts, is_exact, parts_of
from fastppo.model.shared_prompts import SharedPrompts
from fastppo.native.packed_attention import Layout

PROBE_TOKENS = 9


class Layouts(NamedTuple):
    """How packed tokens attend in every layer but the last, and in that one, whose other rows nobody wants."""

    inner: Layout | PackedPages
    last: Layout | PackedPages
    wanted: Tensor | None  # int64 [W] rows, in order; None: all

    @classmethod
    def of(cls, bounds: Sequence[int], prompt_lengths: Sequence[int] | None) -> Layouts:
        """Sequences that share nothing. bounds: B + 1 places. prompt_lengths [B]: wanted are the states from the last token of each on."""
        lengths = prompt_lengths or [1] * (len(bounds) - 1)
        return cls._of_groups([[_whole(a, b, n)] for (a, b), n in zip(pairwise(bounds), lengths, strict=True)])

    @classmethod
    def of_shared(cls, shared: SharedPrompts, wants_prompts: bool) -> Layouts:
        """Roots and suffixes as they lie when `shared.tokens` run; without `wants_prompts` the last token of each prompt and what follows."""
        offset, branches = shared.root_bounds[-1], {branch.start: branch for branch in shared.branches}
        groups = []
        for (start, end), prompt in zip(pairwise(shared.root_bounds), shared.root_prompts, strict=True):
            own = [_whole(start, end, 1 if wants_prompts else prompt)]
            if branch := branches.get(start):
                suffixes = pairwise(offset + place for place in branch.bounds)
                own += [(start, end, a, b, a) for a, b in suffixes]
            groups.append(own)
        return cls._of_groups(groups)

    @classmethod
    def _of_groups(cls, groups: list[list[tuple[int, int, int, int, int]]]) -> Layouts:
        """Of each sequence the bounds of its prompt and its own, and the first token that is wanted. A prompt stands before what follows it."""
        sequences = [each for own in groups for each in own]
        bounds = _int64([0, *accumulate(map(len, groups))])
        inner = Layout(_int64([(*places, places[2], places[2]) for *places, _ in sequences]), bounds)
        if all(first == places[2] for *places, first in sequences):
            return cls(inner, inner, None)
        # Rows in the order of the tokens: a prompt's suffixes lie behind all prompts.
        by_place = sorted(range(len(sequences)), key=lambda n: sequences[n][2])
        rows, row = [0] * len(sequences), 0
        for n in by_place:
            rows[n], row = row, row + sequences[n][3] - sequences[n][4]
        last = Layout(_int64([(*each, n) for each, n in zip(sequences, rows, strict=True)]), bounds)
        return cls(inner, last, torch.cat([_int64(range(*sequences[n][4:2:-1])) for n in by_place]))


def _whole(start: int, end: int, prompt_length: int) -> tuple[int, int, int, int, int]:
    """A sequence that shares no prompt."""
    return 0, 0, start, end, min(start + max(prompt_length, 1) - 1, end)


def _int64(numbers: Sequence) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class PartsTrunk:
    """A model's parts, how its layers attend, and what these call: `layer_on_cpu` or `layer_on_gpu`."""

    def __init__(self, parts: LlamaParts, calls: Sequence[LayerCall], kernels: ModuleType) -> None:
        self._parts, self._calls, self._kernels = parts, calls, kernels

    @property
    def is_on_cpu(self) -> bool:
        return self._kernels is layer_on_cpu

    def layouts(
        self, bounds: Sequence[int], shared: SharedPrompts | None, prompt_lengths: Sequence[int] | None
    ) -> Layouts:
        """How packed tokens attend; the arguments are those of `packed_hidden`."""
        if not self.is_on_cpu:
            pages = PackedPages.of(bounds, shared, self._parts.embedding.device)
            return Layouts(pages, pages, None)
        if shared is None:
            return Layouts.of(bounds, prompt_lengths)
        return Layouts.of_shared(shared, wants_prompts=prompt_lengths is None)

    def hidden(self, tokens: Tensor, position_ids: Tensor, layouts: Layouts, *, recompute: bool) -> Tensor:
        """tokens and position_ids int64 [T] -> hidden [T, H], 0 in the rows that nobody wants; differentiable.

        recompute: keep two states a layer for the backward pass and compute the rest again.
        """
        cos, sin = self._parts.rotary_tables(_length_of(position_ids, layouts.inner))
        x, update = F.embedding(tokens, self._parts.embedding, self._parts.padding_idx), None
        layers = zip(self._parts.layers, self._parts.factors(), self._calls, strict=True)
        for (norms, linears), factors, (layer, shape, options) in layers:
            is_last = layer == len(self._calls) - 1
            layout, wanted = (layouts.last, layouts.wanted) if is_last else (layouts.inner, None)
            numbers = [norm.eps for norm in norms], shape.key_size, options.scale, options.window
            scalings = tuple(0.0 if each is None else each.scaling for each in factors)
            call = Call(*numbers, cos, sin, position_ids, layout, wanted, scalings, self._kernels)
            parameters = *(norm.weight for norm in norms), *(x for each in linears for x in each)
            if any(factors):
                parameters += tuple(x for each in factors for x in ((None, None) if each is None else each[:2]))
            arguments = x, update, call, *parameters
            apply = _Layer.apply
            x, update = checkpoint(apply, *arguments, use_reentrant=False) if recompute else apply(*arguments)
        hidden = _Norm.apply(x, update, *self._parts.norm, self._kernels)
        return hidden if layouts.wanted is None else _spread(hidden, layouts.wanted, len(tokens))


def _length_of(position_ids: Tensor, layout: Layout | PackedPages) -> int:
    """How many positions the longest sequence has. On a GPU the host knows it and waits for nothing."""
    if isinstance(layout, PackedPages):
        return layout.longest
    first, last = (int(place) for place in position_ids.aminmax())
    if first < 0:
        raise ValueError(f"position_ids holds {first}, expected no position below 0")
    return last + 1


def _spread(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """x [W, H] in those rows of [count, H], 0 in the others; differentiable."""
    return x.new_zeros(count, x.shape[1]).index_copy(0, rows, x)


def trunk_of(model: PreTrainedModel) -> PartsTrunk | None:
    """The model's trunk in our kernels, where they serve it and have been seen to give what its modules give; else None."""
    parts = parts_of(model)
    kernels = None if parts is None else _kernels_of(model, parts)
    if kernels is None or torch.is_autocast_enabled(parts.embedding.device.type):
        return None
    if parts not in _CALLS:
        _CALLS[parts] = _calls_where_they_agree(model, parts, kernels)
    calls = _CALLS[parts]
    return None if calls is None else PartsTrunk(parts, calls, kernels)


def _kernels_of(model: PreTrainedModel, parts: LlamaParts) -> ModuleType | None:
    """What its layers call; None where its modules train. On a GPU adapters are a matter of the modules."""
    if parts.backend == "triton" and is_exact(model) and not parts.has_adapters:
        from fastppo.model import layer_on_gpu

        return layer_on_gpu
    return layer_on_cpu if parts.backend == "cpu" else None


_CALLS: WeakKeyDictionary[LlamaParts, list[LayerCall] | None] = WeakKeyDictionary()


@torch.no_grad()
def _calls_where_they_agree(model: PreTrainedModel, parts: LlamaParts, kernels: ModuleType) -> list[LayerCall] | None:
    """How each layer attends, or None where the parts give other numbers than the modules, or attention of another kind."""
    count = min(PROBE_TOKENS, len(parts.embedding))
    tokens = torch.arange(1, count + 1, dtype=torch.int64, device=model.device) % len(parts.embedding)
    positions = torch.arange(count, dtype=torch.int64, device=model.device)
    context = ObservingContext([0, count], model.device)
    try:
        expected = run_trunk(_under_our_attention(model), tokens, positions, context)
        check_windows(model.config.get_text_config(), context.calls)
    except ValueError:
        return None
    calls = sorted(context.calls, key=lambda call: call.layer)
    if any(map(_is_odd, calls)) or len(calls) != len(parts.layers):
        return None
    trunk = PartsTrunk(parts, calls, kernels)
    found = trunk.hidden(tokens, positions, trunk.layouts([0, count], None, None), recompute=False)
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return calls if error <= ALLOWED_ERROR[parts.embedding.dtype] else None


def _under_our_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model where it is prepared, else a copy of its modules and configuration that shares the parameters."""
    if model.config._attn_implementation == IMPLEMENTATION:
        return model
    register()
    copied = copy.deepcopy(model, {id(x): x for x in chain(model.parameters(), model.buffers())})
    copied.set_attn_implementation(IMPLEMENTATION)
    return copied.eval()


def _is_odd(call: LayerCall) -> bool:
    _, shape, options = call
    return options.needs_scores or shape.key_size != shape.value_size or shape.key_size > LARGEST_HEAD


class Call(NamedTuple):
    """What a layer needs besides states and parameters."""

    eps: list[float]  # of the input, q, k and post norms
    head_size: int
    scale: float
    window: int | None
    cos: Tensor
    sin: Tensor
    positions: Tensor
    layout: Layout | PackedPages
    wanted: Tensor | None  # int64 [W] rows that ask and go on; None: all
    scalings: tuple[float, ...]  # of the linear layers' adapters
    kernels: ModuleType

    @property
    def head_eps(self) -> list[float]:
        """Of the norms of q and k."""
        return self.eps[1:3]

    @property
    def head_positions(self) -> tuple[Tensor, Tensor]:
        """Of q's rows and k's."""
        return self.take(self.positions), self.positions

    def take(self, x: Tensor) -> Tensor:
        """The rows that go on."""
        return x if self.wanted is None else x[self.wanted]

    def place_backward(
        self, d_placed: Tensor, x: Tensor, norm: Tensor | None, eps: float, positions: Tensor, norm_wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the projected heads [T, heads, D], as [T, heads * D], and of the norm's weight from those after norm and rotation."""
        d_x = self.kernels.rotary_embedding(d_placed, self.cos, self.sin, positions, backward=True)
        d_norm = None
        if norm is not None:
            heads, d_heads = x.flatten(0, 1), d_x.flatten(0, 1)
            d_x, d_norm = self.kernels.rms_norm_backward(heads, norm, eps, d_heads, None, norm_wanted)
        return d_x.view(len(x), -1), d_norm


class _Layer(torch.autograd.Function):
    """Residual state x [T, H] and what is to be added to it (None: nothing) -> the same after the layer, [W, H] of the wanted rows.

    total = x + update; middle = total + o(attention(q, k, v of input_norm(total))); out = down(silu(gate) * up of post_norm(middle)).
    """

    @staticmethod
    def forward(ctx, x: Tensor, update: Tensor | None, call: Call, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
        input_norm, q_norm, k_norm, post_norm = parameters[:4]
        linears, kernels = _Linears(parameters[4:], call), call.kernels
        input_eps, *_, post_eps = call.eps
        total, normed = kernels.rms_norm(x, input_norm, input_eps, update)
        q, k, v = (
            linears.out(number, x).unflatten(1, (-1, call.head_size))
            for number, x in enumerate((call.take(normed), normed, normed))
        )
        attended, lse = kernels.attend(call, (q, k, v), (q_norm, k_norm))
        middle, normed = kernels.rms_norm(call.take(total), post_norm, post_eps, linears.out(3, attended.flatten(1)))
        gate, up = linears.out(4, normed), linears.out(5, normed)
        out = linears.out(6, kernels.swiglu(gate, up))
        ctx.save_for_backward(total, q, k, v, attended, lse, middle, gate, up, *parameters)
        ctx.call, ctx.has_update = call, update is not None
        return middle, out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_middle: Tensor, d_out: Tensor):
        total, q, k, v, attended, lse, middle, gate, up, *parameters = ctx.saved_tensors
        input_norm, q_norm, k_norm, post_norm = parameters[:4]
        call, kernels, (input_eps, q_eps, k_eps, post_eps) = ctx.call, ctx.call.kernels, ctx.call.eps
        wanted = ctx.needs_input_grad[3:]  # of the parameters
        products = _Linears(parameters[4:], call, wanted[4:])

        d_gated = products.d_input(6, d_out.contiguous())
        d_gate, d_up, gated = kernels.swiglu_backward(gate, up, d_gated, out_wanted=products.learns(6))
        products.learn(6, d_out, gated)
        normed = kernels.rms_norm(middle, post_norm, post_eps)[1]
        d_normed = products.d_input(5, d_up, products.d_input(4, d_gate))
        products.learn(4, d_gate, normed)
        products.learn(5, d_up, normed)
        d_middle = d_middle.contiguous()
        d_middle, d_post = kernels.rms_norm_backward(middle, post_norm, post_eps, d_normed, d_middle, wanted[3])

        d_attended = products.d_input(3, d_middle).view(attended.shape)
        products.learn(3, d_middle, attended.flatten(1))
        d_q, d_k, d_v = kernels.attend_backward(call, d_attended, (q, k, v), (q_norm, k_norm), attended, lse)
        q_positions, k_positions = call.head_positions
        d_q, d_q_norm = call.place_backward(d_q, q, q_norm, q_eps, q_positions, wanted[1])
        d_k, d_k_norm = call.place_backward(d_k, k, k_norm, k_eps, k_positions, wanted[2])
        d_v = d_v.flatten(1)
        normed = kernels.rms_norm(total, input_norm, input_eps)[1]
        products.learn(0, d_q, call.take(normed))
        products.learn(1, d_k, normed)
        products.learn(2, d_v, normed)
        d_normed = products.d_input(2, d_v, products.d_input(1, d_k))
        if call.wanted is None:
            products.d_input(0, d_q, d_normed)
        else:
            d_normed.index_add_(0, call.wanted, products.d_input(0, d_q))
            d_middle = _spread(d_middle, call.wanted, len(total))
        d_total, d_input = kernels.rms_norm_backward(total, input_norm, input_eps, d_normed, d_middle, wanted[0])
        d_update = d_total if ctx.has_update else None
        return d_total, d_update, None, d_input, d_q_norm, d_k_norm, d_post, *products.gradients


class _Linears:
    """The linear layers of a layer, by their numbers in its parts, and in a backward pass the gradients of their parameters.

    Weights and biases come first, then the factors of the adapters where there are some. These are added to a weight for each product anew:
    nothing of its size is kept, and the bits are those of a decode step, which reads weights that are merged once a rollout.
    """

    def __init__(self, parameters: Sequence[Tensor | None], call: Call, wanted: Sequence[bool] = ()) -> None:
        self._linears, self._wanted = list(zip(parameters[:14:2], parameters[1:14:2], strict=True)), wanted
        self._kernels = call.kernels
        self._factors = (
            [
                None if a is None else Factors(a, b, scaling)
                for a, b, scaling in zip(parameters[14::2], parameters[15::2], call.scalings, strict=True)
            ]
            if len(parameters) > 14
            else [None] * 7
        )
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def out(self, number: int, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]"""
        weight, bias = self._linears[number]
        return self._kernels.linear(x, merged(weight, self._factors[number]), bias)

    def d_input(self, number: int, d_out: Tensor, total: Tensor | None = None) -> Tensor:
        """d_out [T, N] -> [T, K], added to `total` where there is one."""
        weight = merged(self._linears[number][0], self._factors[number])
        return self._kernels.matmul(d_out, weight, total, accumulate=total is not None)

    def learns(self, number: int) -> bool:
        """Whether the layer's input is needed for a gradient."""
        return self._wanted[2 * number] or (self._factors[number] is not None and self._wanted[14 + 2 * number])

    def learn(self, number: int, d_out: Tensor, x: Tensor) -> None:
        if self._wanted[2 * number]:
            self.gradients[2 * number] = self._kernels.matmul(d_out.t(), x)
        if self._wanted[2 * number + 1]:
            self.gradients[2 * number + 1] = d_out.sum(0)
        place = 14 + 2 * number
        if self._factors[number] is not None and self._wanted[place]:
            self.gradients[place : place + 2] = factor_gradients(d_out, x, self._factors[number])


class _Norm(torch.autograd.Function):
    """The norm of x + update."""

    @staticmethod
    def forward(ctx, x: Tensor, update: Tensor, weight: Tensor, eps: float, kernels: ModuleType) -> Tensor:
        total, normed = kernels.rms_norm(x, weight, eps, update)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.kernels = eps, kernels
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_normed: Tensor):
        total, weight = ctx.saved_tensors
        d_normed, wanted = d_normed.contiguous(), ctx.needs_input_grad[2]
        d_total, d_weight = ctx.kernels.rms_norm_backward(total, weight, ctx.eps, d_normed, None, wanted)
        return d_total, d_total, d_weight, None, None
