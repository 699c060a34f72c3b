"""Vectors at 8 bits a number: each is a row of bytes, its codes and one scale, and is read by itself.

Recent tokens are stored so: at 8 bits about a two-hundredth of the largest number is lost. That is too much where some
numbers of a vector are always much larger than others, as in the keys of Gemma 3: `Units` even these out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127  # code; codes are symmetric about zero
SCALE_DTYPE = torch.bfloat16  # reaches as far as fp32
EVENED = 0.5  # a number's unit is this power of its standard deviation: 0 leaves numbers as they are, 1 evens them out
LEAST = 1e-3  # of the largest unit: what has never varied may do so in another text


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


@dataclass(frozen=True, eq=False, slots=True)
class Units:
    """What the numbers of keys and of values are measured in before they become rows, for some heads.

    Attributes:
        centre: of keys, ``[Hkv, 1, 1, D]`` fp32: they have large means, and 8 bits of what is left lose less.
        key, value: ``[Hkv, 1, 1, D]`` fp16, positive, the largest of a head 1: a row has a scale of its own.
    """

    centre: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, mean: Tensor, variances: Sequence[Tensor]) -> "Units":
        """From means of keys and the variances of keys and of values, up to a factor, ``[Hkv, D]`` each."""
        units = []
        for variance in variances:
            unit = variance.clamp_min(0) ** (EVENED / 2)
            largest = unit.amax(-1, keepdim=True)
            units.append((unit / torch.where(largest > 0, largest, 1.0)).clamp_min(LEAST).half())
        return cls(*(part[:, None, None] for part in (mean, *units)))

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Rows of keys and of values ``[Hkv, B, t, D]``."""
        return [encode_rows((keys.float() - self.centre) / self.key), encode_rows(values.float() / self.value)]

    def decode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Keys and values ``[Hkv, B, t, D]`` of rows, fp32."""
        return [decode_rows(keys).mul_(self.key).add_(self.centre), decode_rows(values).mul_(self.value)]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.centre, self.key, self.value

    def to(self, device: torch.device) -> "Units":
        return Units(*(part.to(device) for part in self.tensors()))
