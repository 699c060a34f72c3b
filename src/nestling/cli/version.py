"""What ``nestling --version`` prints: one line, or all that a report of a mistake should say."""

import platform
from collections.abc import Iterator

from nestling.cli.terminal import console
from nestling.files.writing import version_of

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "sentence-transformers",
    "accelerate", "datasets", "peft", "onnxruntime", "triton", "starlette", "uvicorn",
)  # fmt: skip


def show_version(everything: bool) -> None:
    """Print the version; with ``everything`` also those of other packages, devices, threads and kernels."""
    console.print(f"nestling {version_of('nestling') or 'from a checkout'}", highlight=False)
    for name, value in _facts() if everything else ():
        console.print(f"{name}: {value}", highlight=False)


def _facts() -> Iterator[tuple[str, str]]:
    """Names and values, the quick ones first. What is missing or broken is said, and is no error."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield from ((package, version_of(package) or "not installed") for package in PACKAGES)
    for name, fact in (("devices", _devices), ("threads", _threads), ("kernels", _kernels)):
        try:
            yield name, fact()
        except Exception as error:  # a broken installation is what this is asked for
            yield name, f"unknown ({type(error).__name__}: {error})"


def _devices() -> str:
    import torch

    count = torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator()
    names = [torch.cuda.get_device_name(i) if torch.cuda.is_available() else str(kind) for i in range(count)]
    return ", ".join([f"cpu ({torch.backends.cpu.get_cpu_capability()})", *names])


def _threads() -> str:
    import torch

    return str(torch.get_num_threads())


def _kernels() -> str:
    from nestling.kv.quantisation import cpu as kernels

    return kernels.status()
