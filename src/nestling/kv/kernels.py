"""Products with packed codes in C, compiled for this machine when they are first needed, where there is a compiler.

GPUs have theirs in gpu.py. Without a compiler or Triton everything works, in torch, more slowly.
``NESTLING_KERNELS=0`` does without them.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from nestling.kv.quantise import WIDTHS

SOURCE = Path(__file__).with_name("packed.c")
# Sums may be reordered, so that they become vectors. Not -ffast-math: a library that is linked with it turns subnormal
# numbers off for the whole process.
REORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", *REORDER, "-shared", "-fPIC")
THREADS = "-fopenmp"  # which Apple's compiler does not have: one thread then


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    found = compiler()
    if os.environ.get("NESTLING_KERNELS") == "0" or found is None:
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nestling" / "kernels"
    path = folder / file_name(found)
    try:
        if not path.is_file():
            _compile(found, path)
        loaded = ctypes.CDLL(str(path))
        return loaded if hasattr(loaded, "nestling_weighted") else None
    except (OSError, subprocess.SubprocessError):
        return None


def compiler() -> str | None:
    """The path of the C compiler: ``CC``, or ``cc``."""
    return shutil.which(os.environ.get("CC", "cc"))


def file_name(compiler: str) -> str:
    """Of the library: another one for other source, another compiler and another processor."""
    machine = f"{platform.machine()} {platform.node()} {torch.backends.cpu.get_cpu_capability()} {compiler} {FLAGS}"
    return f"{hashlib.sha256(SOURCE.read_bytes() + machine.encode()).hexdigest()[:16]}.so"


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        new = Path(work) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(new)]
        if subprocess.run([*command, THREADS], capture_output=True, timeout=120).returncode:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        new.replace(path)


def products(rows: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The module with `score` and `weighted` for packed rows and products in ``dtype``, or None: torch has to do."""
    if torch.is_grad_enabled() or os.environ.get("NESTLING_KERNELS") == "0":
        return None
    if rows.device.type == "cuda":
        return _triton()
    return sys.modules[__name__] if rows.device.type == "cpu" and dtype == torch.float32 and compiled() else None


@cache
def _triton() -> ModuleType | None:
    try:
        from nestling.kv import gpu
    except ImportError:
        return None
    return gpu


def score(rows: Tensor, tokens: int, widths: tuple[int, ...], query: Tensor, shift: Tensor, into: Tensor, add: bool):
    """``query @ codes - shift`` into, or added to, ``[g, n, tokens]`` whose last axis is contiguous.

    Args:
        rows: ``[g, packed rows, capacity]`` uint8, contiguous.
        query: ``[g, n, w]``; ``shift``: ``[g, n, 1]``; fp32.
    """
    query, shift = query.contiguous(), shift.contiguous()
    groups, queries, width = query.shape
    assert into.stride(2) == 1 and into.stride(0) == queries * into.stride(1), "not as the kernel writes"
    compiled().nestling_score(  # type: ignore[union-attr]
        _pointer(rows), _long(rows.shape[2]), _long(rows.shape[1]), _counts(widths), _pointer(query), _pointer(shift),
        _long(groups), _long(queries), _long(width), _long(tokens), _pointer(into), _long(into.stride(1)),
        ctypes.c_int(add), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip


def weighted(rows: Tensor, tokens: int, widths: tuple[int, ...], weight: Tensor) -> Tensor:
    """``weight @ codes^T``, ``[g, n, w]``, of weights ``[g, n, tokens]`` fp32."""
    groups, queries, _ = weight.shape
    if weight.stride(2) != 1 or weight.stride(0) != queries * weight.stride(1):
        weight = weight.contiguous()
    out = weight.new_zeros(groups, queries, 8 * len(widths))
    compiled().nestling_weighted(  # type: ignore[union-attr]
        _pointer(rows), _long(rows.shape[2]), _long(rows.shape[1]), _counts(widths), _pointer(weight),
        _long(weight.stride(1)), _long(groups), _long(queries), _long(out.shape[2]), _long(tokens), _pointer(out),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_long = ctypes.c_int64


@cache
def _counts(widths: tuple[int, ...]) -> ctypes.Array:
    """Blocks of each width, most bits first."""
    return (ctypes.c_int64 * len(WIDTHS))(*[widths.count(bits) for bits in sorted(WIDTHS, reverse=True)])
