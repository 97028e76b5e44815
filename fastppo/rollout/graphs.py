"""Decode steps on a GPU as CUDA graphs: launching a step's kernels from Python takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.rollout.decoder import Decoder
from fastppo.rollout.pages import PagedCache


class Captured(NamedTuple):
    replay: Callable[[], object]
    hidden: Tensor  # what a replay writes
    pool: object  # where its memory lies


def capture(run: Callable[[], Tensor], pool: object) -> Captured:
    """`run` recorded as a CUDA graph, after a run that compiles and allocates what it needs. Raises RuntimeError where it waits for the device.

    Graphs of one pool use the same memory for what they compute on the way; only one of them runs at a time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # What another thread launches meanwhile is no part of it, and no error.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = run()
    return Captured(graph.replay, hidden, graph.pool())


def bucket(rows: int) -> int:
    """The batch size that serves `rows`: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., so at most half as many rows again."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def _waits_for_the_device(error: RuntimeError) -> bool:
    """Whether a step cannot be captured. Memory that ran out in a capture can end in an error of the capture's own; that it ran out counts."""
    causes: BaseException | None = error
    while causes is not None:
        if isinstance(causes, torch.OutOfMemoryError):
            return False
        causes = causes.__cause__ or causes.__context__
    return "captur" in str(error)


class GraphDecoder:
    """Replays the steps of another decoder, one graph for each bucket of batch sizes, captured when first met.

    Rows that fill a bucket up are sequences of one token, on the page that the cache keeps for them. The graphs read the parameters where
    they lie, so they outlast updates in place; `serves` tells when a parameter, or the cache, has moved. A model whose step cannot be
    captured (it waits for the device, as some mixtures of experts do) runs without graphs.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameters: list[Tensor],
        cache: PagedCache,
        *,
        rows: int,
        blocks: int,
        device: torch.device,
        capture: Callable[[Callable[[], Tensor], object], Captured] = capture,
    ) -> None:
        """For at most `rows` sequences of at most `blocks` pages."""
        self._decoder, self._cache, self._capture = decoder, cache, capture
        self._places = [p.data_ptr() for p in parameters]
        self._rows, self._blocks, most = rows, blocks, bucket(rows)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._lengths = torch.ones(most, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(most, blocks, dtype=torch.int32, device=device)
        self._captured: dict[int, Captured] | None = {}
        self._pool: object = None

    def serves(self, parameters: list[Tensor], cache: PagedCache, *, rows: int, blocks: int) -> bool:
        """Whether the graphs still fit: the same parameters and cache, no more and no longer sequences."""
        same = cache is self._cache and [p.data_ptr() for p in parameters] == self._places
        return same and rows <= self._rows and blocks <= self._blocks

    def at_least(self, rows: int, blocks: int) -> tuple[int, int]:
        """Sizes for the graphs that come after these: calls that alternate, each larger in one of the two, then share them."""
        return max(rows, self._rows), max(blocks, self._blocks)

    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        """As every decoder's, without graphs."""
        return self._decoder.prefill(tokens, pages, past)

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """As every decoder's; hidden [B, H] is overwritten by the next step."""
        if self._captured is None:
            return self._decoder.step(tokens, lengths, block_table)
        rows = len(tokens)
        size = bucket(rows)
        self._tokens[:rows] = tokens
        self._lengths[:rows] = lengths
        self._lengths[rows:size] = 1
        self._block_table[:rows, : block_table.shape[1]] = block_table
        self._block_table[rows:size, 0] = self._cache.spare_page
        if size not in self._captured:
            inputs = self._tokens[:size], self._lengths[:size], self._block_table[:size]
            try:
                self._captured[size] = self._capture(lambda: self._decoder.step(*inputs), self._pool)
            except RuntimeError as error:
                if not _waits_for_the_device(error):
                    raise
                self._captured = None
                return self._decoder.step(tokens, lengths, block_table)
        captured = self._captured[size]
        self._pool = captured.pool
        captured.replay()
        return captured.hidden[:rows]
