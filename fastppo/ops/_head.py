"""The language-model head a tile of logits at a time: what linear_token_logprobs and linear_ppo_loss share on every device.

A tile is one product in fp32. Two functions of the kernels, the same in `fastppo.native.token_logprobs` and
`fastppo.kernels.token_logprobs`, read it: one adds its columns to the rows' statistics, one turns it into its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import on_huge_pages
from fastppo.native import token_logprobs as native
from fastppo.native.matmul import matmul
from fastppo.ops import _checks
from fastppo.ops._precision import full_precision
from fastppo.ops.token_logprobs import Transform


class Sizes(NamedTuple):
    """How many logits exist at a time."""

    tile_rows: int
    tile_columns: int
    """fp32, where a row's columns may come one block after another."""
    most_kept_tiles: int
    """What a forward pass may keep for the backward pass: of five tiles one, and at most these; all where together they fit into one. 0: none."""
    logits_bytes: int
    """fp32, where rows are whole."""
    gradient_bytes: int
    """Half-precision gradients of whole rows of logits, which wait to be multiplied in one product."""


SIZES = {
    # Tiles of 16 MiB, at which the products run at full speed. Columns are a multiple of the 1,024 logits that the
    # log-sum-exp takes at a time, so that its bits are those of whole rows.
    "cpu": Sizes(2048, 2048, 3, 32 * 2**20, 0),
    # Tiles of 256 MiB: eight times as many output blocks a product as a GPU has cores. With half-precision gradients of up to 2 GiB,
    # 8,192 tokens of a vocabulary of 131,072, the weight's gradient is one product and needs no fp32 sum, which would take no less.
    "triton": Sizes(8192, 8192, 0, 256 * 2**20, 2 * 2**30),
}
KEPT_SHARE = 5
# With a large vocabulary `logits_bytes` are so few rows that the products mostly wait for the weight: then up to this
# many rows, while their logits stay within an eighth of the weight's size in fp32.
LARGE_VOCABULARY_ROWS = 128
# cuBLAS is slow on rows of odd lengths: in GPU memory a row of logits begins at a multiple of this many.
ALIGNMENT = 64
# Label of a row that is left out. So small that a tile's first column can be subtracted, as from any label.
NO_LABEL = -(2**62)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """hidden [..., H], weight [V, H], bias [V] or None, labels [...]."""
    _checks.floating("hidden", hidden)
    _checks.floating("weight", weight)
    _checks.integer("labels", labels)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V, H] with V, H >= 1")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [..., {weight.shape[1]}] (weight's H)")
    _checks.shape("labels", labels, hidden.shape[:-1], "hidden's leading shape")
    for name, x in (("weight", weight), ("labels", labels)):
        _checks.same_device(name, x, "hidden", hidden)
    if bias is not None:
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, weight.shape[:1], "weight's V")
        _checks.same_device("bias", bias, "hidden", hidden)


def kept_rows(labels: Tensor, mask: Tensor | None, vocabulary: int, ignore_index: int, backend: str) -> Tensor:
    """bool [...]: the rows that count. On the CPU their labels are checked; elsewhere one out of range gives NaN."""
    keep = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    if backend == "cpu":
        bad = keep & ((labels < 0) | (labels >= vocabulary))
        if bad.any():
            raise native.label_error(labels, bad.reshape(-1).nonzero()[0].item(), vocabulary, ignore_index)
    return keep


def kept_tiles_shape(rows: int, vocabulary: int, backend: str) -> tuple[int, int]:
    """[tiles, elements of a tile] of the logits worth keeping, of at most `rows` rows."""
    sizes = SIZES[backend]
    height, width = torch.sym_min(sizes.tile_rows, rows), torch.sym_min(sizes.tile_columns, vocabulary)
    tiles = -(-rows // sizes.tile_rows) * -(-vocabulary // sizes.tile_columns)
    # Arithmetic instead of a condition: one on a symbolic size would compile anew for every other length.
    kept = torch.sym_min(tiles // KEPT_SHARE, sizes.most_kept_tiles)
    if sizes.most_kept_tiles:
        fit = torch.sym_min(sizes.tile_rows * sizes.tile_columns // torch.sym_max(tiles * height * width, 1), 1)
        kept = torch.sym_max(kept, fit * tiles)
    return kept, height * width


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """On x's device, without autocast or a reduced precision, which would round what is multiplied."""
    with torch.autocast(x.device.type, enabled=False), full_precision(x.device), torch.cuda.device_of(x):
        yield


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b or, to `accumulate`, out += a @ b: fp32 sums, rounded once to out's type (a's and b's own, or fp32)."""
    if a.dtype != out.dtype and not a.is_cuda:  # interpreted kernels: the CPU has no such product
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if not accumulate:
        torch.mm(a, b, **wider, out=out)
    elif not wider:
        out.addmm_(a, b)
    else:  # batched: not every version's addmm takes an fp32 sum beside half-precision factors
        total = out[None]
        torch.baddbmm(total, a[None], b[None], **wider, out=total)


class Statistics(NamedTuple):
    """fp32, of the rows that count."""

    logprobs: Tensor
    entropy: Tensor
    max_logsum: Tensor


class Head:
    """hidden [..., H] times weight [V, H] plus bias [V] or None, of any storage types, for the rows that `keep` names.

    On the CPU those rows are gathered and all products are fp32. On a GPU, whose host does not know how many they are,
    every row is multiplied, the others as zeros, in the type that holds both hidden and weight.

    count: rows that are multiplied. mask: bool [count], those of them that count; None for all. batch_invariant: logits have the bits of
    `batch_invariant_linear`; on a GPU, where these depend on how many columns the weight has, a tile then has `whole_rows`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor,
        backend: str,
        batch_invariant: bool = False,
    ) -> None:
        self.weight, self.backend, self.sizes = weight, backend, SIZES[backend]
        self.batch_invariant, self.whole_rows = batch_invariant, batch_invariant and backend == "triton"
        if self.whole_rows:
            rows = max(self.sizes.tile_rows * self.sizes.tile_columns // len(weight), 1)
            self.sizes = self.sizes._replace(tile_rows=rows, tile_columns=len(weight))
        self.bias = None if bias is None else bias.float()
        self.hidden, self.keep, self._shape = hidden.reshape(-1, weight.shape[1]), keep.reshape(-1), keep.shape
        self.count, self.rows, self.mask = len(self.keep), None, None
        if backend == "cpu":
            self.dtype = torch.float32
            rows = self.keep.nonzero().squeeze(1)
            if len(rows) < self.count:  # else their hidden states are read where they lie
                self.count, self.rows = len(rows), rows
        else:
            self.dtype, self.mask = torch.promote_types(hidden.dtype, weight.dtype), self.keep
            self.hidden = torch.where(self.keep.unsqueeze(1), self.hidden, 0).to(self.dtype)

    @property
    def kernels(self) -> ModuleType:
        if self.backend == "triton":
            from fastppo.kernels import token_logprobs as triton_kernels

            return triton_kernels
        return native

    def take(self, x: Tensor) -> Tensor:
        """x [..., k] -> [count, k] of the rows that are multiplied."""
        x = x.reshape(len(self.keep), *x.shape[len(self._shape) :])
        return x.contiguous() if self.rows is None else x[self.rows]

    def put(self, x: Tensor) -> Tensor:
        """x [count, k] -> [..., k], 0 in the rows that do not count."""
        if self.rows is not None:
            x = x.new_zeros((len(self.keep), *x.shape[1:])).index_copy_(0, self.rows, x)
        elif self.mask is not None:
            x = torch.where(self.mask.view(-1, *[1] * (x.dim() - 1)), x, 0)
        return x.view((*self._shape, *x.shape[1:]))

    def labels(self, labels: Tensor) -> Tensor:
        """[count], NO_LABEL in the rows that do not count."""
        taken = self.take(labels)
        return taken if self.mask is None else torch.where(self.mask, taken, NO_LABEL)

    def inputs(self, places: slice) -> Tensor:
        return (self.hidden[places] if self.rows is None else self.hidden[self.rows[places]]).to(self.dtype)

    def slices(self, width: int) -> list[slice]:
        """Of the vocabulary."""
        size = len(self.weight)
        return [slice(start, min(start + width, size)) for start in range(0, size, width)]

    def blocks(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """(block of the vocabulary, its weight): no converted copy of all of the weight exists."""
        for block in self.slices(width):
            yield block, self.weight[block].to(self.dtype)

    def multiply(self, inputs: Tensor, block: slice, weight: Tensor, out: Tensor) -> None:
        """out = the fp32 logits of these inputs in this block."""
        if self.whole_rows:
            from fastppo.kernels.batch_invariant_linear import batch_invariant_linear as kernel

            kernel(inputs, weight, self.bias, out)
            return
        if self.batch_invariant:
            matmul(inputs, weight.T, out, bias=None if self.bias is None else self.bias[block])
            return
        if self.bias is not None:
            out.copy_(self.bias[block])
        multiply(inputs, weight.T, out, accumulate=self.bias is not None)

    def pitch(self, columns: int) -> int:
        """From one row of logits to the next, in elements."""
        return columns if self.backend == "cpu" or self.whole_rows else -(-columns // ALIGNMENT) * ALIGNMENT

    def matrix(self, memory: Tensor, rows: int, columns: int) -> Tensor:
        pitch = self.pitch(columns)
        return memory[: rows * pitch].view(rows, pitch)[:, :columns]

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.weight.device)

    def new_state(self, count: int) -> Tensor:
        """What `token_logprobs_add_tile` adds to; a label that no tile holds leaves NaN."""
        state = torch.zeros((count, 4), dtype=torch.float64, device=self.weight.device)
        state[:, 0], state[:, 1], state[:, 3] = -torch.inf, -1, torch.nan
        return state


def finish_state(state: Tensor) -> Statistics:
    peak, rest, weighted, label_z = state.unbind(1)
    log_sum = rest.log1p()
    logprobs, entropy = (label_z - peak) - log_sum, log_sum - weighted / (1 + rest)
    return Statistics(logprobs.float(), entropy.float(), torch.stack([peak, log_sum], 1).float())


class Tile(NamedTuple):
    places: slice
    """Which of the rows that count."""
    block: slice
    """Which columns."""
    weight: Tensor
    """[columns, H], the block's."""
    inputs: Tensor
    """[rows, H], their hidden states."""
    logits: Tensor
    """fp32 [rows, columns]; the next tile's overwrite them."""
    gradient: Tensor
    """Memory for their gradient, in the type of the products: the logits' own where that is fp32 and they need not last."""


def tiles(head: Head, kept: Tensor, backward: bool) -> Iterator[Tile]:
    """Every tile of the head: blocks of columns one after another, in each of them all rows.

    So the weight's gradient is made a block at a time, each finished before the next, and a block is converted once. The
    first tiles' logits are written into `kept` [tiles, elements] and, in the `backward` pass, read from there.
    """
    rows, columns = min(head.sizes.tile_rows, head.count), min(head.sizes.tile_columns, len(head.weight))
    starts = range(0, head.count, max(rows, 1))
    all_kept = len(kept) == len(starts) * len(head.slices(columns))
    needed = 0 if all_kept and not backward else rows * head.pitch(columns)
    logits_memory = gradient_memory = head.empty(needed, torch.float32)
    if backward and head.dtype != torch.float32:
        gradient_memory = torch.empty_like(logits_memory, dtype=head.dtype)
    for block, weight in head.blocks(columns):
        for number, start in enumerate(starts, block.start // columns * len(starts)):
            places = slice(start, min(start + rows, head.count))
            inputs = head.inputs(places)
            memory = kept[number] if number < len(kept) else logits_memory
            logits = head.matrix(memory, len(inputs), len(weight))
            gradient = head.matrix(gradient_memory, len(inputs), len(weight)) if backward else logits
            if not (backward and number < len(kept)):
                head.multiply(inputs, block, weight, logits)
            yield Tile(places, block, weight, inputs, logits, gradient)


def whole_row_statistics(
    head: Head, kept: Tensor, labels: Tensor, ignore_index: int, transform: Transform
) -> Statistics:
    """Of a head with `whole_rows`, by the kernel of `token_logprobs`; entropies always, so that it is the very same kernel with them and without."""
    made = head.empty(head.count, torch.float32)
    found = Statistics(made, torch.empty_like(made), made.new_empty(head.count, 2))
    for tile in tiles(head, kept, backward=False):
        own = tile.logits[None], labels[tile.places], ignore_index, transform, True
        for whole, part in zip(found, head.kernels.token_logprobs_forward(*own), strict=True):
            whole[tile.places] = part
    return found


class WholeRows:
    """The head's logits for whole rows: of as many at a time as fit, and the gradients of those of a chunk of rows.

    In fp32 a chunk is that many rows, and gradients overwrite logits. In half precision it is more: the more rows a product
    sums over, the fewer times it adds to the gradient of the whole weight.
    """

    def __init__(self, head: Head, with_gradients: bool) -> None:
        self._head, (vocabulary, width) = head, head.weight.shape
        self._columns = vocabulary if head.weight.dtype == head.dtype else head.sizes.tile_columns
        at_least = max(min(width // 8, LARGE_VOCABULARY_ROWS), 1)
        self._rows = self._chunk_rows = max(
            min(max(head.sizes.logits_bytes // (4 * vocabulary), at_least), head.count), 1
        )
        row_size = sum(head.pitch(block.stop - block.start) for block in head.slices(self._columns))
        self._logits = self._gradients = head.empty(self._rows * row_size, torch.float32)
        if with_gradients and head.dtype != torch.float32:
            most = max(head.sizes.gradient_bytes // (head.dtype.itemsize * row_size), self._rows)
            chunks = max(-(-head.count // most), 1)
            self._chunk_rows = max(-(-head.count // chunks), 1)  # chunks of one size
            self._gradients = head.empty(self._chunk_rows * row_size, head.dtype)

    def chunks(self) -> Iterator[slice]:
        return _cut(0, self._head.count, self._chunk_rows)

    def parts(self, chunk: slice) -> Iterator[slice]:
        return _cut(chunk.start, chunk.stop, self._rows)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return self._head.blocks(self._columns)

    def logits(self, part: slice) -> list[Tensor]:
        """fp32 [rows, columns] for each block, made anew; the next part's overwrite them."""
        inputs, made = self._head.inputs(part), self._matrices(self._logits, part)
        for (block, weight), logits in zip(self.blocks(), made, strict=True):
            self._head.multiply(inputs, block, weight, logits)
        return made

    def gradients(self, chunk: slice) -> list[Tensor]:
        """[rows, columns] for each block: memory for the gradients of a chunk's logits."""
        return self._matrices(self._gradients, chunk)

    def statistics(self, logits: list[Tensor], labels: Tensor, transform: Transform, with_entropy: bool) -> Statistics:
        state = self._head.new_state(len(labels))
        for block, tile in zip(self._head.slices(self._columns), logits, strict=True):
            add_tile = self._head.kernels.token_logprobs_add_tile
            add_tile(tile, labels - block.start, transform, with_entropy, state)
        return finish_state(state)

    def differentiate(self, logits: list[Tensor], rows: Upstream, transform: Transform, out: list[Tensor]) -> None:
        """Writes the gradient of a part's logits into `out`, which may be they."""
        for block, tile, gradient in zip(self._head.slices(self._columns), logits, out, strict=True):
            tile_gradient(self._head, block, tile, rows, transform, gradient)

    def _matrices(self, memory: Tensor, rows: slice) -> list[Tensor]:
        count, made, start = rows.stop - rows.start, [], 0
        for block in self._head.slices(self._columns):
            made.append(self._head.matrix(memory[start:], count, block.stop - block.start))
            start += count * self._head.pitch(block.stop - block.start)
        return made


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


class _Sums:
    """Sums of products, each rounded into its part of `out` when its last product has been added.

    rows: where the parts' rows stand in `out`, None where they lie there as they are. lift: a power of two that all
    products contain, or None. round_in_product: a sum of one product may be written by it.
    """

    def __init__(self, out: Tensor, rows: Tensor | None, lift: Tensor | None, round_in_product: bool) -> None:
        self.out, self._rows, self._lift, self._round_in_product = out, rows, lift, round_in_product
        self._open: dict[int, Tensor] = {}  # by where their part begins

    def add(self, part: slice, a: Tensor, b: Tensor, first: bool, last: bool) -> None:
        by_product = first and last and self._round_in_product and self._lift is None and self.out.dtype == a.dtype
        in_place = self._rows is None and (by_product or self.out.dtype == torch.float32)
        if first:
            shape = part.stop - part.start, self.out.shape[1]
            self._open[part.start] = self.out[part] if in_place else self.out.new_empty(shape, dtype=torch.float32)
        total = self._open[part.start]
        multiply(a, b, total, accumulate=not first)
        if last:
            del self._open[part.start]
            if self._lift is not None:
                total /= self._lift
            if not in_place:
                self.out[part if self._rows is None else self._rows[part]] = total.to(self.out.dtype)


class HeadGradients:
    """Gradients of hidden [N, H], weight [V, H] and bias [V] in the given types, None where not wanted.

    They are sums in fp32 over the gradients of the logits, which a head with fp16 products holds times `lift`.
    """

    def __init__(self, head: Head, dtypes: Sequence[torch.dtype | None], lift: Tensor | None = None) -> None:
        self._head, self._lift = head, lift
        hidden, weight, self._bias_dtype = dtypes
        # Memory that the tiles do not reach: rows that do not count, all of the weight's where none does.
        self._hidden = self._sums(head.hidden.shape, hidden, head.rows is not None, head.rows, False)
        self._weight = self._sums(head.weight.shape, weight, head.count == 0, None, True)
        self._bias = None if self._bias_dtype is None else head.weight.new_zeros(len(head.weight), dtype=torch.float32)

    def _sums(
        self, shape: torch.Size, dtype: torch.dtype | None, zero: bool, rows: Tensor | None, round_in_product: bool
    ) -> _Sums | None:
        if dtype is None:
            return None
        make = torch.zeros if zero else torch.empty
        out = on_huge_pages(make(shape, dtype=dtype, device=self._head.weight.device))
        return _Sums(out, rows, self._lift, round_in_product)

    def add(self, places: slice, block: slice, weight: Tensor, inputs: Tensor, d_logits: Tensor) -> None:
        if self._hidden is not None:
            self._hidden.add(places, d_logits, weight, block.start == 0, block.stop == len(self._head.weight))
        if self._weight is not None:
            self._weight.add(block, d_logits.T, inputs, places.start == 0, places.stop == self._head.count)
        if self._bias is not None:
            self._bias[block] += d_logits.sum(0, dtype=torch.float32)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight = (None if x is None else x.out for x in (self._hidden, self._weight))
        if self._bias is None:
            return hidden, weight, None
        bias = self._bias if self._lift is None else self._bias / self._lift
        return hidden, weight, bias.to(self._bias_dtype)


class Upstream(NamedTuple):
    """Of rows [count]: what their tiles' gradients need besides the logits. Without d_entropy there is no entropy."""

    labels: Tensor
    max_logsum: Tensor
    entropy: Tensor | None
    d_logprobs: Tensor
    d_entropy: Tensor | None

    def part(self, places: slice) -> Upstream:
        return Upstream(*(None if x is None else x[places] for x in self))

    def lifted(self, lift: Tensor | None) -> Upstream:
        if lift is None:
            return self
        d_entropy = None if self.d_entropy is None else self.d_entropy * lift
        return self._replace(d_logprobs=self.d_logprobs * lift, d_entropy=d_entropy)

    def peak(self) -> Tensor:
        """The largest upstream gradient of rows that count."""
        counts = self.labels != NO_LABEL
        given = [torch.where(counts, x, 0).abs() for x in (self.d_logprobs, self.d_entropy) if x is not None]
        return torch.stack(given).max() if len(counts) else self.d_logprobs.new_zeros(())


def lift_for(peak: Tensor) -> Tensor:
    """Power of two that brings `peak` to about 64: its products with small probabilities then keep their digits in fp16."""
    exponent = torch.frexp(peak).exponent
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), 6 - exponent)


def tile_gradient(head: Head, block: slice, logits: Tensor, rows: Upstream, transform: Transform, out: Tensor) -> None:
    """Writes the gradient of a block of these rows' logits into `out`, 0 in rows that do not count."""
    labels, *statistics = rows
    head.kernels.token_logprobs_backward(
        logits[None], labels - block.start, NO_LABEL - block.start, transform, *statistics, out[None]
    )
