"""Products with packed codes in C, compiled for this machine when they are first needed, where there is a compiler.

GPUs have theirs in gpu.py. Without a compiler or Triton everything works, in torch, more slowly.
``NESTLING_KERNELS=0`` does without them; `status` says whether there are any, and why not.

Compiled libraries are kept in a folder that belongs to the user alone, each with its checksum beside it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from nestling.errors import FileError, KernelError
from nestling.files.private import private_folder
from nestling.files.temporary import sweep, temporary_folder
from nestling.files.writing import naming, sync, write_file
from nestling.kv.quantisation.quantiser import WIDTHS

SOURCE = Path(__file__).with_name("cpu.c")
# Sums may be reordered, so that they become vectors. Not -ffast-math: a library that is linked with it turns subnormal
# numbers off for the whole process.
REORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", *REORDER, "-shared", "-fPIC")
THREADS = "-fopenmp"  # which Apple's compiler does not have: one thread then
TURNED_OFF = "NESTLING_KERNELS=0"

log = logging.getLogger(__name__)


def status() -> str:
    """Whether the kernels of this machine are on, and if not, why: one line for people."""
    return f"compiled C: {_state()}; Triton: {_triton_state()}"


def _triton_state() -> str:
    if not torch.cuda.is_available():
        return "off (no CUDA device)"
    if _is_turned_off():
        return f"off ({TURNED_OFF})"
    return "off (Triton is not installed)" if _triton() is None else "on"


def _state() -> str:
    try:
        return f"on ({_loaded()._name})"
    except KernelError as reason:
        return f"off ({reason})"


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had, which is logged once."""
    try:
        return _loaded()
    except KernelError as reason:
        level = logging.INFO if _is_turned_off() else logging.WARNING
        log.log(level, "compiled kernels are off, products are slower: %s", reason)
        return None


def _loaded() -> ctypes.CDLL:
    if _is_turned_off():
        raise KernelError(TURNED_OFF)
    return library(SOURCE, "nestling_weighted")


def library(source: Path, function: str) -> ctypes.CDLL:
    """A file of C as a library, compiled for this machine if it is not there yet.

    Args:
        function: that it has to have.

    Raises:
        KernelError: it cannot be had; the message is the reason.
    """
    if (program := compiler()) is None:
        raise KernelError(f"there is no C compiler {os.environ.get('CC') or 'cc'!r}; CC names another")
    try:
        folder = private_folder(_folder())
        sweep(folder)
        path = folder / file_name(program, source)
        if not _is_whole(path):
            _compile(program, source, path)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        raise KernelError(f"{program} failed: {_last_line(error.stderr)}") from error
    except (FileError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise KernelError(str(error)) from error
    if not hasattr(loaded, function):
        raise KernelError(f"{path} lacks functions")
    return loaded


def _is_turned_off() -> bool:
    return os.environ.get("NESTLING_KERNELS") == "0"


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


def _folder() -> Path:
    """Of compiled libraries. As its specification has it, an XDG_CACHE_HOME that is not absolute means nothing."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / "nestling" / "kernels"


def compiler() -> str | None:
    """The command of the C compiler: ``CC``, perhaps with arguments, or ``cc``; None if there is none."""
    try:
        program, *arguments = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:  # quotes that do not end, or nothing but spaces
        return None
    path = shutil.which(program)
    return None if path is None else shlex.join([os.path.abspath(path), *arguments])


def file_name(compiler: str, source: Path | None = None) -> str:
    """Of the library: another one for other source, another compiler and another processor."""
    machine = f"{platform.machine()} {platform.node()} {torch.backends.cpu.get_cpu_capability()} {compiler} {FLAGS}"
    return f"{hashlib.sha256((source or SOURCE).read_bytes() + machine.encode()).hexdigest()[:16]}.so"


def _is_whole(path: Path) -> bool:
    """Whether a library is there, as it was compiled: loading half of one would end the process."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                return False
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return path.with_suffix(".sha256").read_text("utf-8").strip() == checksum
    except (OSError, ValueError):
        return False


def _compile(compiler: str, source: Path, path: Path) -> None:
    with naming(path), temporary_folder(path.parent) as work:
        new = work / path.name
        command = [*shlex.split(compiler), *FLAGS, str(source), "-o", str(new)]
        if subprocess.run([*command, THREADS], capture_output=True, timeout=120).returncode:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        sync(new)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        checksum = hashlib.sha256(new.read_bytes()).hexdigest()
        new.replace(path)
        write_file(path.with_suffix(".sha256"), checksum + "\n")


def products(rows: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The module with `score` and `weighted` for packed rows and products in ``dtype``, or None: torch has to do."""
    if torch.is_grad_enabled() or _is_turned_off():
        return None
    if rows.device.type == "cuda":
        return _triton()
    return sys.modules[__name__] if rows.device.type == "cpu" and dtype == torch.float32 and compiled() else None


@cache
def _triton() -> ModuleType | None:
    try:
        from nestling.kv.quantisation import triton as gpu
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
