"""Memory for large tensors that live for a moment.

A conversion spends more time touching new pages than copying into them. In pages of 2 MB there are 512 times fewer; and
memory of its own goes back to the system with its tensor, where an allocator would keep it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
"""Bytes; below it the ordinary allocator does as well."""


def uninitialised(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty, in huge pages where the system has them (madvise(2), MADV_HUGEPAGE)."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its elements lie in order, else a copy in which they do."""
    if tensor.is_meta or tensor.is_contiguous():
        return tensor.contiguous()
    return uninitialised(tensor.shape, tensor.dtype).copy_(tensor)


def concatenated(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat; on tensors without data that one imports a compiler, which costs a plan most of a second (torch 2.13).

    Raises:
        RuntimeError: the parts are of several types; one of them would be rounded.
    """
    if len({part.dtype for part in parts}) > 1:
        raise RuntimeError(f"they are of several types: {', '.join(str(part.dtype) for part in parts)}")
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    if parts[0].is_meta:
        return parts[0].new_empty(shape)
    return torch.cat(list(parts), dim, out=uninitialised(shape, parts[0].dtype))
