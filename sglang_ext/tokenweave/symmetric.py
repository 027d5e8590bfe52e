"""Hidden-state buffers and barrier flags in torch symmetric memory, shared by the ranks of one node."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sglang_ext.tokenweave.kernel import FLAGS_PER_RANK, RankBuffers

_ALIGNMENT = 256
_FLAG_BYTES = 4


def symmetric_ranks(
    group: dist.ProcessGroup,
    max_tokens: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    multicast: bool,
) -> RankBuffers:
    """Allocate this rank's buffer, exchange it with all ranks of ``group``, and clear the flags.

    Collective: every rank calls it with the same arguments. No multicast object is created unless the
    environment allows it (``TORCH_SYMM_MEM_DISABLE_MULTICAST``); its address is used only if ``multicast``.

    Args:
        group: ranks of one node, CPU (gloo) or CUDA backend.
        max_tokens: rows of the buffer.
        hidden: elements of a row.
        dtype: bf16 or fp16.
        device: this rank's GPU.
        multicast: use the multicast address where there is one.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    element = torch.empty((), dtype=dtype).element_size()
    row_bytes = -(-max_tokens * hidden * element // _ALIGNMENT) * _ALIGNMENT
    total = row_bytes + FLAGS_PER_RANK * _FLAG_BYTES
    memory = _SymmetricMemory.empty_strided_p2p((total,), [1], torch.uint8, device, group.group_name)
    handle = _SymmetricMemory.rendezvous(memory)
    memory[row_bytes:].zero_()
    torch.cuda.synchronize(device)
    # No rank may raise a flag before all have been cleared.
    dist.barrier(group=group)

    rows = memory[: max_tokens * hidden * element].view(dtype).view(max_tokens, hidden)
    return RankBuffers(
        hidden=(rows,),
        ranks=(handle.rank,),
        buffers=tuple(handle.buffer_ptrs),
        flags=tuple(address + row_bytes for address in handle.buffer_ptrs),
        multicast=handle.multicast_ptr if multicast else 0,
        owner=(memory, handle),
    )
