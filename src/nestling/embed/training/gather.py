"""The texts of all processes in each of them, so that a loss over a batch is the one of the global batch."""

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """Rows ``[B, ...]`` of every process, ``[processes * B, ...]`` in the order of ranks; the same B everywhere.

    Only a process's own rows carry a gradient, times the number of processes: every process computes the same loss of
    all rows, and DistributedDataParallel averages what the processes find. So nothing is sent in the backward pass.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    count = dist.get_world_size()
    found = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(count)]
    dist.all_gather(found, rows.detach().contiguous())
    if rows.requires_grad:
        found[dist.get_rank()] = rows + (count - 1) * (rows - rows.detach())
    return torch.cat(found)
