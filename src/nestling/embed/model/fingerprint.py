"""Checksums of what a measurement depends on."""

import hashlib
import json
import zlib
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from nestling.embed.model.parts import Encoder


def checksum(value: Any) -> int:
    """CRC-32 of a module's weights, of a tensor, or of anything that JSON can hold."""
    if isinstance(value, nn.Module):
        total = 0
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            total = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), total))
        return total
    if isinstance(value, Tensor):
        return zlib.crc32(_bytes(value))
    return zlib.crc32(json.dumps(value).encode())


def reading(model: SentenceTransformer) -> dict[str, Any]:
    """What else an embedding depends on: how much of a text is read, and what is made of its token vectors."""
    head = list(model.children())[1:]
    return {
        "max_seq_length": model.max_seq_length,
        "pooling": [f"{type(m).__name__} {getattr(m, 'get_config_dict', dict)()}" for m in head],
    }


def fingerprint(model: SentenceTransformer) -> dict[str, Any]:
    """What tells one encoder from another: its shape, and the SHA-256 of the weights that its vectors depend on."""
    encoder = Encoder.of(model)
    total = hashlib.sha256()
    for part in (encoder.backbone, *encoder.head):
        for name, tensor in part.named_parameters():
            if not name.startswith("pooler."):  # BERT's, which no pooling of sentence-transformers reads
                total.update(name.encode())
                total.update(_bytes(tensor))
    return {"layers": encoder.depth, "dims": encoder.dims, "weights": total.hexdigest()}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().float().contiguous().numpy().data
