"""Vectors at 8 bits a number: each is a row of bytes, its codes and one scale, and is read by itself.

Recent tokens are stored so: at 8 bits about a two-hundredth of the largest number is lost, and no statistics are
needed.
"""

import torch
from torch import Tensor

LARGEST = 127  # code; codes are symmetric about zero
SCALE_DTYPE = torch.bfloat16  # reaches as far as fp32


def row_bytes(width: int) -> int:
    """Bytes of a vector of ``width`` numbers."""
    return width + SCALE_DTYPE.itemsize


def encode_rows(vectors: Tensor) -> Tensor:
    """Bytes ``[..., D + 2]`` of finite vectors ``[..., D]``."""
    vectors = vectors.detach().float()
    scale = (vectors.abs().amax(-1, keepdim=True) / LARGEST).to(SCALE_DTYPE)
    # A scale is rounded, perhaps down, and may be zero: the largest number then gets the largest code.
    divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = (vectors / divisor).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    scale_bytes = scale.flatten().view(torch.uint8).view(*scale.shape[:-1], SCALE_DTYPE.itemsize)
    return torch.cat((codes.view(torch.uint8), scale_bytes), -1)


def decode_rows(rows: Tensor) -> Tensor:
    """The vectors ``[..., D]``, fp32."""
    width = rows.shape[-1] - SCALE_DTYPE.itemsize
    scale = rows[..., width:]
    if width % SCALE_DTYPE.itemsize or not rows.numel():  # scales that are not aligned have to be copied
        scale = scale.flatten().view(SCALE_DTYPE).view(*rows.shape[:-1], 1)
    else:
        scale = scale.view(SCALE_DTYPE)
    return rows[..., :width].view(torch.int8) * scale.float()
