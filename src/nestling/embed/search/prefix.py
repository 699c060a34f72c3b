"""The first coordinates of all vectors in 8 bits: what a first stage reads."""

import numpy as np
import torch
from torch import Tensor

LARGEST = 127  # of a code


class PrefixTable:
    """Codes ``[n, width]`` of one byte a number, with one step for all, so that codes are compared as numbers are.

    Vectors that come later are rounded by the same step, and clipped where they are out of its range.
    """

    def __init__(self, prefix: np.ndarray):
        """``prefix``: fp32 ``[n, width]``."""
        self.step = float(np.abs(prefix).max()) / LARGEST or 1.0
        self.codes = self.code(prefix)

    def code(self, prefix: np.ndarray) -> Tensor:
        """Codes of a prefix ``[n, width]``."""
        scaled = torch.from_numpy(np.ascontiguousarray(prefix)) / self.step
        return scaled.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)

    def scores(self, query: np.ndarray) -> Tensor:
        """Dot products ``[n]`` with the prefix ``[width]`` of a query, in fp32, of an unknown unit."""
        largest = float(np.abs(query).max()) or 1.0
        codes = torch.from_numpy(np.rint(query * (LARGEST / largest)).astype(np.int8))
        return products(self.codes, codes).float()


def products(codes: Tensor, query: Tensor) -> Tensor:
    """``codes [n, width] @ query [width]`` of bytes, as int32 ``[n]``."""
    return torch._int_mm(codes, query[:, None])[:, 0]
