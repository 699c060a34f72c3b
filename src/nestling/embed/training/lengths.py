"""The texts of a batch: embedded at once, in parts of like length, so that little of it is padding; and those of all
processes in each of them, so that a loss over a batch is the one of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import _create_minibatch
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from torch import Tensor

PARTS, ROWS = 6, 16  # at most that many parts, of at least that many texts
Features = dict[str, Any]
Represent = Callable[[Features], dict[str, Tensor]]


def embed_by_length(represent: Represent, columns: Sequence[Features]) -> list[Tensor]:
    """What ``represent`` makes of each column's texts, ``[B, S]``, with gradients; the same but for rounding.

    A column of texts is padded to its longest one, and more than half of a batch can be padding: of captions beside
    passages, say. Sorted by length, and each part padded to its own longest text, little is. The number of parts
    depends on the number of texts alone, so that all processes of a distributed training run as many forwards.

    Columns that cannot be put together (images, packed texts) are embedded as sentence-transformers does it.
    """
    merged = merge_feature_batches(list(columns)) if len(columns) > 1 else dict(columns[0])
    if merged is None or not _is_rows_of_tokens(merged):
        return embed_columns(represent, list(columns))  # type: ignore[arg-type]
    mask = merged["attention_mask"]
    parts = max(1, min(PARTS, len(mask) // ROWS))
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    order = ends.argsort(stable=True)
    ordered = {key: value[order] if _has_rows(key, value) else value for key, value in merged.items()}
    made, begin = [], 0
    for count in [len(rows) for rows in torch.tensor_split(order, parts)]:
        part = _create_minibatch(ordered, begin, begin + count)  # cut behind its longest text
        made.append(represent(part)["sentence_embedding"])
        begin += count
    vectors = torch.cat(made)[order.argsort()]
    return list(vectors.split([len(column["attention_mask"]) for column in columns]))


def _is_rows_of_tokens(features: Features) -> bool:
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or "cu_seq_lens_q" in features:
        return False
    return all(len(value) == len(mask) for key, value in features.items() if _has_rows(key, value))


def _has_rows(key: str, value: Any) -> bool:
    """All tensors have a row a text, but for the one that says how long a prompt is."""
    return isinstance(value, Tensor) and value.ndim > 0 and key != "prompt_length"


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
