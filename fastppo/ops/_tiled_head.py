"""The language-model head a tile of logits at a time, rows by vocabulary: memory that depends on neither of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# 16 MiB of fp32 logits, large enough that the products run at full speed. A multiple of the 1,024 logits that the
# log-sum-exp takes at a time, so that its bits are those of whole rows.
TILE_ROWS = TILE_COLUMNS = 2048
# Logits that the forward pass may keep for the backward pass: one tile in eight, at most four tiles.
KEPT_SHARE, MOST_KEPT_TILES = 8, 4


def kept_tiles_shape(rows: int, vocabulary: int) -> tuple[int, int]:
    """[tiles, elements of a tile] of the logits worth keeping, of at most `rows` rows."""
    height, width = torch.sym_min(TILE_ROWS, rows), torch.sym_min(TILE_COLUMNS, vocabulary)
    tiles = -(-rows // TILE_ROWS) * -(-vocabulary // TILE_COLUMNS)
    return torch.sym_min(tiles // KEPT_SHARE, MOST_KEPT_TILES), height * width


class Tile(NamedTuple):
    places: slice
    """Which of the rows that count."""
    inputs: Tensor
    """fp32 [rows, H], their hidden states."""
    logits: Tensor
    """fp32 [rows, columns], contiguous; the next tile's overwrite them."""
    scratch: Tensor
    """Memory like `logits`: they themselves, unless they are kept ones that must not be overwritten."""


class TiledHead:
    """hidden [..., H], weight [V, H], bias [V] or None of any storage type, multiplied in fp32 for `rows`.

    Columns are the outer loop: then the weight's gradient is made a block at a time, each finished before the next, and a
    half-precision weight is converted once. The first tiles' logits are written into `kept` and, in a head where these are
    `filled`, read from there.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, kept: Tensor, filled: bool
    ) -> None:
        self._kept, self._filled = kept, filled
        self.hidden, self.weight = hidden.reshape(-1, weight.shape[1]), weight
        self.bias = None if bias is None else bias.float()
        self.count = rows.numel()
        self.rows = None if self.count == len(self.hidden) else rows  # all: their hidden states are read where they lie
        self._buffer = torch.empty(min(TILE_ROWS, self.count) * min(TILE_COLUMNS, len(weight)), dtype=torch.float32)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """(block of the vocabulary, its weight in fp32)."""
        for start in range(0, len(self.weight), TILE_COLUMNS):
            block = slice(start, min(start + TILE_COLUMNS, len(self.weight)))
            yield block, self.weight[block].float()

    def tiles(self, block: slice, weight: Tensor) -> Iterator[Tile]:
        starts = range(0, self.count, TILE_ROWS)
        for number, start in enumerate(starts, block.start // TILE_COLUMNS * len(starts)):
            places = slice(start, min(start + TILE_ROWS, self.count))
            inputs = (self.hidden[places] if self.rows is None else self.hidden[self.rows[places]]).float()
            shape = len(inputs), len(weight)
            scratch = self._buffer[: shape[0] * shape[1]].view(shape)
            keep = number < len(self._kept)
            logits = self._kept[number, : scratch.numel()].view(shape) if keep else scratch
            if not (keep and self._filled):
                self._multiply(inputs, weight, block, logits)
            yield Tile(places, inputs, logits, scratch)

    def _multiply(self, inputs: Tensor, weight: Tensor, block: slice, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(inputs, weight.T, out=out)
        else:
            torch.addmm(self.bias[block], inputs, weight.T, out=out)


class HeadGradients:
    """Gradients of hidden, weight and bias from the tiles' d_logits: fp32 sums, rounded once; None where not wanted."""

    def __init__(self, head: TiledHead, wanted: tuple[bool, bool, bool]) -> None:
        self._head = head
        want_hidden, want_weight, want_bias = wanted
        size, width = head.weight.shape
        self._d_rows = torch.zeros((head.count, width), dtype=torch.float32) if want_hidden else None
        # No row at all: nothing is ever written into the weight's.
        make = torch.empty if head.count else torch.zeros
        self.weight = make((size, width), dtype=head.weight.dtype) if want_weight else None
        self.bias = torch.zeros(size, dtype=torch.float32) if want_bias else None

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """The head's, with each block's gradient rounded when its last tile has been added."""
        for block, weight in self._head.columns():
            if self.weight is not None:
                in_place = self.weight.dtype == torch.float32
                self._block = self.weight[block] if in_place else torch.empty_like(weight)
            yield block, weight
            if self.weight is not None and not in_place and self._head.count:
                self.weight[block] = self._block

    def add(self, block: slice, weight: Tensor, tile: Tile) -> None:
        """Adds the products of a tile whose `scratch` has become the gradient of its logits."""
        d_logits = tile.scratch
        if self._d_rows is not None:
            self._d_rows[tile.places].addmm_(d_logits, weight)
        if self.weight is not None and tile.places.start == 0:
            torch.mm(d_logits.T, tile.inputs, out=self._block)
        elif self.weight is not None:
            self._block.addmm_(d_logits.T, tile.inputs)
        if self.bias is not None:
            self.bias[block] += d_logits.sum(0)

    def hidden(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        if self._d_rows is None or self._head.rows is None:
            return None if self._d_rows is None else self._d_rows.to(dtype).view(shape)
        d_hidden = torch.zeros(shape, dtype=dtype)
        d_hidden.view(self._head.hidden.shape)[self._head.rows] = self._d_rows.to(dtype)
        return d_hidden
