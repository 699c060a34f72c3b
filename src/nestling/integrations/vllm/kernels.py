"""The compiled functions that write and read vLLM's pages (paged.c), and what they are told of a layer."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.kv.cache import drift
from nestling.kv.cache.bases import LayerBases
from nestling.kv.cache.window import TOKENS_PER_BLOCK
from nestling.kv.quantisation.cpu import library

SOURCE = Path(__file__).with_name("paged.c")
LONG, POINTER = ctypes.c_int64, ctypes.c_void_p


@cache
def compiled() -> ctypes.CDLL:
    """The functions of paged.c, compiled for this machine.

    Raises:
        KernelError: they cannot be had; the message is the reason.
    """
    return library(SOURCE, "nestling_attend")


class _Pages(ctypes.Structure):
    _fields_ = [
        ("data", POINTER), ("block_stride", LONG), ("head_stride", LONG), ("tokens", LONG), ("rank", LONG),
        ("table", POINTER), ("table_stride", LONG), ("slots", POINTER),
    ]  # fmt: skip

    @classmethod
    def of(cls, pages: Tensor, table: Tensor | None = None, slots: Tensor | None = None) -> "_Pages":
        """Args: pages ``[blocks, heads, tokens, 2 rank]``; their blocks of each request; places of new tokens."""
        _, _, tokens, numbers = pages.shape
        assert pages.stride(2) == numbers and pages.stride(3) == 1, "pages of a block and head lie in one piece"
        assert table is None or (table.dtype == torch.int32 and table.stride(1) == 1)
        assert slots is None or (slots.dtype == torch.int64 and slots.is_contiguous())
        return cls(
            pages.data_ptr(), pages.stride(0), pages.stride(1), tokens, numbers // 2,
            None if table is None else table.data_ptr(), 0 if table is None else table.stride(0),
            None if slots is None else slots.data_ptr(),
        )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, LONG) for name in ("heads", "group", "width", "half", "sinks", "window", "block", "spans", "span")),
        ("scale", ctypes.c_float),
        *((name, POINTER) for name in ("key_encode", "key_decode", "value_encode", "value_decode")),
        *((name, POINTER) for name in ("key_bias", "value_bias", "key_drift")),
    ]


@dataclass(frozen=True)
class Heads:
    """Those of a layer.

    Attributes:
        count: KV heads, with ``group`` queries each.
        width: coordinates of a head.
        scale: of logits.
        dtype: of queries, keys, values and pages: fp32 or bf16.
    """

    count: int
    group: int
    width: int
    scale: float
    dtype: torch.dtype


class PagedLayer:
    """Writes and reads the pages of one layer.

    Args:
        heads: of it.
        bases: what its coordinates are read by, heads in the model's order; None where nothing is compressed: then
            all tokens are in one kind of pages as they are.
        sinks, window: exact tokens.
    """

    def __init__(self, heads: Heads, bases: LayerBases | None, sinks: int, window: int):
        self.heads = heads
        tensors: list[Tensor | None] = [None] * 7
        if bases is not None:
            ((keys, values),) = bases.sides
            tensors = [keys.encode, keys.decode, values.encode, values.decode, *bases.biases, bases.drift]
        self._kept = [None if t is None else t.float().contiguous() for t in tensors]  # what the pointers point to
        self._layer = _Layer(
            heads.count, heads.group, heads.width, heads.dtype == torch.bfloat16, sinks, window, TOKENS_PER_BLOCK,
            0 if tensors[-1] is None else tensors[-1].shape[1], drift.SPAN, heads.scale,
            *(None if t is None else t.data_ptr() for t in self._kept),
        )  # fmt: skip

    def store(self, key: Tensor, value: Tensor, coded: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor] | None):
        """Write new tokens.

        Args:
            key, value: ``[tokens, heads, width]``, of which there may be more than places.
            coded, exact: pages ``[blocks, heads, tokens of a block, 2 rank]`` and a place for each token, in tokens
                from the first block on, or -1.
        """
        pages = [_Pages.of(data, slots=slots) for data, slots in filter(None, (coded, exact))]
        compiled().nestling_store(
            ctypes.byref(self._layer), *_both(pages), *self._rows(key), *self._rows(value), LONG(len(coded[1])),
            ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip

    def attend(self, query: Tensor, out: Tensor, pages: list[tuple[Tensor, Tensor]], starts: Tensor, lengths: Tensor):
        """Attention of new tokens to all of theirs, those of compressed ones before the window in coordinates.

        Args:
            query, out: ``[tokens, heads * group, width]``; ``out`` is written to.
            pages: of coordinates, and of exact tokens if there are any, each with its blocks of every request, int32
                ``[requests, n]``.
            starts: of each request's first query and the end, int32 ``[requests + 1]``.
            lengths: tokens of each request, int32; its queries are the last of them.
        """
        assert starts.dtype == lengths.dtype == torch.int32 and starts.is_contiguous() and lengths.is_contiguous()
        compiled().nestling_attend(
            ctypes.byref(self._layer), *_both([_Pages.of(data, table) for data, table in pages]), *self._rows(query),
            *self._rows(out), POINTER(starts.data_ptr()), POINTER(lengths.data_ptr()), LONG(len(starts) - 1),
            ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip

    def _rows(self, rows: Tensor) -> tuple[Any, Any]:
        """Numbers ``[tokens, heads, width]``, and how far tokens are apart."""
        assert rows.dtype == self.heads.dtype and rows.stride(2) == 1 and rows.stride(1) == self.heads.width
        return POINTER(rows.data_ptr()), LONG(rows.stride(0))


def _both(pages: list[_Pages]) -> tuple[Any, Any]:
    return ctypes.byref(pages[0]), ctypes.byref(pages[1]) if len(pages) > 1 else None
