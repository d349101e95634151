"""Memory for chunks of logits: large buffers that are handed out again, and small blocks that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Element-wise passes go over blocks of this size, so that what one pass wrote is still in the cache of the core when
# the next one reads it. A GPU has no such cache; there it only bounds the temporaries.
_CPU_BLOCK_BYTES = 2**19
_DEVICE_BLOCK_BYTES = 2**26

# A chunk of logits. A CPU's products are near their full rate from some 50 rows on, and small chunks save memory. A GPU
# wants a thousand rows and more: 1024 MiB are 1766 of them at 152k ids. And each chunk reads and writes the `[V, D]`
# gradient once, 8 V D bytes beside 6 n V D operations and more for the products of n rows: docs/maths.md counts it.
_CPU_CHUNK_BYTES = 2**25
_DEVICE_CHUNK_BYTES = 2**30


def chunk_bytes_of(mib: float | None, device_type: str) -> int:
    """Return the size of a chunk of logits in bytes, from MiB or for a kind of device: 32 MiB on a CPU, else 1024."""
    if mib is not None:
        return max(1, int(mib * 2**20))
    return _CPU_CHUNK_BYTES if device_type == "cpu" else _DEVICE_CHUNK_BYTES


class Workspace:
    """Buffers of a chunk of tokens, which every chunk takes anew instead of allocating them.

    Fresh pages cost a CPU about as much as a pass over them, and an allocator that returns large blocks to the system
    hands out fresh pages every time.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: list[Tensor] = []

    def take(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, the taker's own until `reset`."""
        size = math.prod(shape)
        fits = (i for i, b in enumerate(self._free) if (b.dtype, b.device) == (dtype, device) and b.numel() >= size)
        place = next(fits, None)
        buffer = torch.empty(size, dtype=dtype, device=device) if place is None else self._free.pop(place)
        self._lent.append(buffer)
        return buffer[:size].view(shape)

    def lent(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is one that was taken since the last `reset`."""
        return any(tensor.data_ptr() == buffer.data_ptr() for buffer in self._lent)

    def reset(self) -> None:
        """End the chunk: whatever was taken may be overwritten."""
        self._free += self._lent
        self._lent = []


def empty_like(tensor: Tensor, workspace: Workspace | None) -> Tensor:
    """Return an uninitialised tensor like `tensor`, from the workspace if there is one."""
    if workspace is None:
        return torch.empty_like(tensor)
    return workspace.take(tensor.shape, tensor.dtype, tensor.device)


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Slice the rows of `[n, V]` into blocks that fit a cache; none without rows."""
    on_cpu = tensor.device.type == "cpu"
    budget = _CPU_BLOCK_BYTES * torch.get_num_threads() if on_cpu else _DEVICE_BLOCK_BYTES
    step = max(1, budget // max(1, tensor.shape[-1] * tensor.element_size()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)


def graph_is_kept() -> bool:
    """Tell, within a backward, whether it may run again (`retain_graph`): what it saved must stay then."""
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if known is None else known()
