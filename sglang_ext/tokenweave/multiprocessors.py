"""Keep the matrix products of one half off the multiprocessors that the fused kernel holds.

A product planned for all multiprocessors waits for those that the kernel sits on, at the end of its last
wave. On an H100 a block of products beside the kernel with 8 thread blocks took 1.18 to 1.43 times its time
alone as it is, and 1.03 to 1.12 times when planned for the remaining multiprocessors; with 2, 4 or 16 blocks
the plan did not help (``docs/benchmarks/tokenweave_resident.csv``).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

#: Thread blocks of the kernel beside which reserving was measured to help.
HELPS_WITH = frozenset({8})


@contextlib.contextmanager
def reserved_multiprocessors(count: int) -> Iterator[None]:
    """Have cuBLAS plan this thread's products for all but ``count`` multiprocessors of the current GPU.

    Raises:
        RuntimeError: cuBLAS refused.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    _set_target(total - count)
    try:
        yield
    finally:
        _set_target(0)


def _set_target(count: int) -> None:
    """Set the multiprocessor target of torch's cuBLAS handle; 0 is the library's default."""
    major = str(torch.version.cuda).split(".")[0]
    library = ctypes.CDLL(f"libcublas.so.{major}")
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    if status := library.cublasSetSmCountTarget(handle, count):
        raise RuntimeError(f"cublasSetSmCountTarget({count}) failed with status {status}")
