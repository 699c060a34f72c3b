"""Checksums of what a measurement depends on."""

import json
import zlib
from typing import Any

from torch import Tensor, nn


def checksum(value: Any) -> int:
    """CRC-32 of a module's weights, or of anything that JSON can hold."""
    if isinstance(value, nn.Module):
        total = 0
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            total = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), total))
        return total
    return zlib.crc32(json.dumps(value).encode())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().float().contiguous().numpy().data
