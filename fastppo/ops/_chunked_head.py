"""The language-model head a chunk of rows at a time: fp32 logits that never exist as a whole, and their share of the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastppo.native.token_logprobs import label_error
from fastppo.ops import _checks

# What a chunk of fp32 logits, and a block of a half-precision weight in fp32, may take.
CHUNK_BYTES = 32 * 2**20
# With a large vocabulary that is so few rows that the products mostly wait for the weight: a chunk may then have up to
# this many rows, while its logits stay within an eighth of the weight's size in fp32.
LARGE_VOCABULARY_ROWS = 128


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


def kept_rows(labels: Tensor, mask: Tensor | None, vocabulary: int, ignore_index: int) -> Tensor:
    """bool [...]: the rows that count; their labels are in range."""
    keep = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    bad = keep & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        raise label_error(labels, bad.reshape(-1).nonzero()[0].item(), vocabulary, ignore_index)
    return keep


class ChunkedHead:
    """hidden [..., H], weight [V, H], bias [V] of any storage type, multiplied in fp32 for a chunk of `rows` at a time.

    gradients: fp32 sums for hidden, weight and bias, empty where not `wanted`.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, wanted: Sequence[bool]
    ) -> None:
        self.hidden, self.weight = hidden.reshape(-1, weight.shape[1]), weight
        self.bias = None if bias is None else bias.float()
        self.rows, self.wanted = rows, wanted
        self.gradients = [
            torch.zeros(x.shape if want else 0, dtype=torch.float32)
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(places among the rows, their logits); the next chunk's overwrite them."""
        count, vocabulary = self.rows.numel(), len(self.weight)
        at_least = max(min(self.weight.shape[1] // 8, LARGE_VOCABULARY_ROWS), 1)
        size = min(max(CHUNK_BYTES // (4 * vocabulary), at_least), count)
        buffer = torch.empty((size, vocabulary), dtype=torch.float32)
        for start in range(0, count, max(size, 1)):
            places = slice(start, min(start + size, count))
            inputs, logits = self._inputs(places), buffer[: places.stop - start]
            for block, weight in self._weight_blocks():
                if self.bias is None:
                    torch.mm(inputs, weight.T, out=logits[:, block])
                else:
                    torch.addmm(self.bias[block], inputs, weight.T, out=logits[:, block])
            yield places, logits

    def add_gradients(self, places: slice, d_logits: Tensor) -> None:
        d_hidden, d_weight, d_bias = self.gradients
        want_hidden, want_weight, want_bias = self.wanted
        inputs = self._inputs(places)
        d_inputs = torch.zeros_like(inputs)
        for block, weight in self._weight_blocks():
            if want_hidden:
                d_inputs.addmm_(d_logits[:, block], weight)
            if want_weight:
                d_weight[block].addmm_(d_logits[:, block].T, inputs)
        if want_hidden:
            d_hidden.view(self.hidden.shape).index_copy_(0, self.rows[places], d_inputs)
        if want_bias:
            d_bias += d_logits.sum(0)

    def _inputs(self, places: slice) -> Tensor:
        return self.hidden[self.rows[places]].float()

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in fp32, as it is or converted a block of rows at a time: no fp32 copy of all of it exists."""
        size, width = self.weight.shape
        step = size if self.weight.dtype == torch.float32 else max(CHUNK_BYTES // (4 * width), 1)
        for start in range(0, size, step):
            block = slice(start, min(start + step, size))
            yield block, self.weight[block].float()
