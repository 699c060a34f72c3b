"""Folders of models and GGUF files, looked at before libraries open them."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nestling.errors import FileError, LoadError
from nestling.files.gguf import check_gguf
from nestling.files.models import check_model_folder, check_sizes
from nestling.models import load_model


@pytest.fixture
def folder(tmp_path):
    """What libraries look for, as far as it is looked at."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 9, "rope_theta": 50_000_000, "eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("card")
    save_file({f"layers.{i}": torch.ones(2) for i in range(2)}, tmp_path / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 2}')
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    check_model_folder(tmp_path)
    return tmp_path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda f: as_pipe(f / "README.md"), "README.md"),
        (lambda f: as_pipe(f / "tokenizer.json"), "tokenizer.json"),
        (lambda f: as_pipe(f / "generation_config.json"), "generation_config.json"),
        (lambda f: as_pipe(f / "1_Pooling" / "config.json"), "1_Pooling/config.json"),
        (lambda f: as_link(f / "vocab.txt", "/dev/zero"), "vocab.txt"),
        (lambda f: as_link(f / "anything", "/dev/urandom"), "anything"),
        (lambda f: as_link(f / "config.json", "config.json"), "config.json"),
        (lambda f: as_link(f / "merges.txt", "gone"), "merges.txt"),
        (lambda f: as_folder(f / "model.safetensors"), "model.safetensors"),
        (lambda f: sparse(f / "README.md"), "README.md"),
        (lambda f: sparse(f / "config.json"), "config.json"),
        (lambda f: sparse(f / "model.safetensors"), "model.safetensors"),
        (lambda f: (f / "config.json").write_text("[" * 5000), "config.json"),
        (lambda f: (f / "config.json").write_text("3"), "config.json"),
        (lambda f: (f / "config.json").write_text('{"a": ' + "1" * 5000 + "}"), "config.json"),
        (lambda f: (f / "special_tokens_map.json").write_bytes(b"\xff"), "special_tokens_map.json"),
        (lambda f: (f / "modules.json").write_text('[{"path": "../else"}]'), "modules.json"),
        (lambda f: (f / "modules.json").write_text('[{"path": "/"}]'), "modules.json"),
        (lambda f: (f / "modules.json").write_text('[{"path": 3}]'), "modules.json"),
        (lambda f: (f / "modules.json").write_text("{}"), "modules.json"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "num_hidden_layers"),  # there are two tensors
        (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda f: edit(f / "config.json", vocab_size=10**12), "vocab_size"),
        (lambda f: edit(f / "config.json", text_config={"max_position_embeddings": 1e15}), "max_position_embeddings"),
        (lambda f: edit(f / "config.json", num_labels=10**9), "num_labels"),
        (lambda f: edit(f / "1_Pooling" / "config.json", embedding_dimension=2, hidden_size=2**40), "hidden_size"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../y"}}'), "index.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "index.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}'), "gone"),
    ],
)
def test_a_folder_that_libraries_must_not_open(folder, spoil, named):
    spoil(folder)
    start = time.monotonic()
    with pytest.raises(FileError, match=named):
        check_model_folder(folder)
    assert time.monotonic() - start < 5


def test_what_nobody_opens_is_left_alone(folder):
    (folder / "notes.json").write_text("{")
    (folder / "my_config.json").write_text("// mine")
    (folder / "vocabularies").mkdir()
    as_link(folder / "somewhere", "gone")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "config.json").write_text("{")
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-1] + ', "limit": Infinity, "eps": 1}')
    check_model_folder(folder)


def test_numbers_that_count_nothing_may_be_large():
    check_sizes("x", {"rope_theta": 10**9, "seed": 2**40, "max_length": 10**30, "vocab_size": 2**20, "tie": True})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_no_pipe_is_waited_for(folder, name):
    as_pipe(folder / name)
    start = time.monotonic()
    with pytest.raises(LoadError):
        load_model(folder)
    assert time.monotonic() - start < 5


# GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def header(*entries: bytes, tensors: bytes = b"", count: int = 0, said: int | None = None, version: int = 3) -> bytes:
    number = len(entries) if said is None else said
    return b"GGUF" + struct.pack("<IQQ", version, count, number) + b"".join(entries) + tensors + bytes(64)


def tensor(dims: tuple[int, ...] = (2, 2), offset: int = 0) -> bytes:
    return text(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


TOKENS = entry(b"tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b"))
SCALAR = entry(b"n", 4, struct.pack("<I", 5))


def test_the_header_of_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(SCALAR, TOKENS, tensors=tensor(), count=1))
    assert check_gguf(path) == 1
    swapped = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 1) + b"n" + struct.pack(">II", 4, 5)
    path.write_bytes(swapped)
    assert check_gguf(path) == 0


@pytest.mark.parametrize(
    "content",
    [
        header(SCALAR, said=2**60),
        header(SCALAR, said=7),
        header(SCALAR, version=9),
        header(entry(b"n", 99, bytes(4))),
        header(text(b"")[:-8] + struct.pack("<Q", 2**62) + b"name"),
        header(entry(b"s", 8, struct.pack("<Q", 2**63) + b"text")),
        header(entry(b"a", 9, struct.pack("<IQ", 8, 2**60) + text(b"x"))),
        header(entry(b"a", 9, struct.pack("<IQ", 0, 2**40))),
        header(entry(b"a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1))),
        header(SCALAR, tensors=tensor(), count=2**50),
        header(SCALAR, tensors=tensor((2**40, 2**40)), count=1),
        header(SCALAR, tensors=tensor(offset=2**50), count=1),
        header(SCALAR, tensors=tensor((1,) * 9), count=1),
        header(SCALAR)[:30],
    ],
)
def test_a_gguf_header_that_lies(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(FileError, match="m.gguf"):
        check_gguf(tmp_path / "m.gguf")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF" + bytes(20), b"PK" * 40])
def test_what_is_no_gguf_file(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(FileError, match="m.gguf"):
        check_gguf(tmp_path / "m.gguf")
