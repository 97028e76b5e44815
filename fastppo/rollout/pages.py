"""The paged key-value cache: pages of 64 tokens that belong to prompts and sequences, full ones shared (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

from typing import Literal

import psutil
import torch
from torch import Tensor

from fastppo.model.attention import LayerShape
from fastppo.model.packed_pages import PAGE_SIZE
from fastppo.ops import write_kv
from fastppo.rollout.memory import free_memory


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def bytes_per_page(shapes: dict[int, LayerShape]) -> int:
    """Over all layers."""
    return PAGE_SIZE * sum(shape.bytes_per_token for shape in shapes.values())


class PagePool:
    """Which pages are free, and how many owners each of the others has. Host numbers only."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(reversed(range(pages)))
        self._owners = [0] * pages

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Pages with one owner each. The caller has looked at `available`."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more owner for each page."""
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: list[int]) -> None:
        """One owner less; a page without owners is free."""
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)


class PagedCache:
    """Keys and values of every layer, [pages + 1, 64, Hkv, D] each. Memory that was never written is never read.

    The last page is nobody's: `spare_page`, for rows that only fill up a batch.
    """

    def __init__(self, shapes: dict[int, LayerShape], pages: int, device: torch.device) -> None:
        self.shapes, self.pages, self.spare_page = shapes, pages, pages
        self.bytes_per_page = bytes_per_page(shapes)
        self.layers = {
            layer: tuple(
                torch.empty(pages + 1, PAGE_SIZE, shape.heads, size, dtype=shape.dtype, device=device)
                for size in (shape.key_size, shape.value_size)
            )
            for layer, shape in shapes.items()
        }

    @property
    def bytes(self) -> int:
        return (self.pages + 1) * self.bytes_per_page

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k [Hkv, T, D], v [Hkv, T, Dv] at places int64 [T] (page * 64 + offset); returns the layer's pages."""
        k_pages, v_pages = self.layers[layer]
        write_kv(k.transpose(0, 1), v.transpose(0, 1), k_pages, v_pages, slots)
        return k_pages, v_pages

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, T, D] and values [Hkv, T, Dv] at places int64 [T]."""
        return tuple(pages.flatten(0, 1)[slots].transpose(0, 1) for pages in self.layers[layer])

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy pages `source` to pages `target`, both int64 [N], in every layer."""
        for pair in self.layers.values():
            for pages in pair:
                pages[target] = pages[source]


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def kv_budget(kv_memory: float | Literal["auto"], device: torch.device) -> int:
    """Bytes for keys and values: `kv_memory` GiB, or ("auto") 80 % of a GPU's free memory, half of what this process may take of a CPU machine's."""
    if kv_memory != "auto":
        return int(kv_memory * 2**30)
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.8 * (torch.cuda.mem_get_info(device)[0] + reusable))
    return free_memory() // 2
