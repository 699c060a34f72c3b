"""The compiled products: found, refused or done without, and as many threads as asked for give the same."""

import os
import shlex
import shutil
import stat
import subprocess

import pytest
import torch

from nestling.files.folders import sha256
from nestling.kv.quantisation import cpu as kernels
from nestling.kv.quantisation.packing import pack

TRITON = "cuda" if torch.cuda.is_available() else "cpu"  # where its kernels are interpreted


QUICK = ("-O0", *kernels.FLAGS[1:])  # compiles in a tenth of the time


@pytest.fixture
def fresh():
    kernels.compiled.cache_clear()
    yield
    kernels.compiled.cache_clear()


def test_without_a_compiler_there_are_none(fresh, monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.compiled() is None


def test_they_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("NESTLING_KERNELS", "0")
    assert kernels.compiled() is None


@pytest.mark.parametrize("source", ["this is no C", "int other;"])
def test_source_that_does_not_compile_or_lacks_the_functions_is_done_without(fresh, monkeypatch, tmp_path, source):
    (tmp_path / "cpu.c").write_text(source)
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "cpu.c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.compiled() is None


def test_a_compiler_without_openmp_will_do(fresh, monkeypatch, tmp_path):
    if (real := kernels.compiler()) is None:
        pytest.skip("there is no C compiler")
    other = tmp_path / "cc"
    other.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    monkeypatch.setattr(kernels, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.compiled() is not None and kernels.compiled()._name.startswith(str(tmp_path))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of compiled libraries, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("built")))
        patch.setattr(kernels, "FLAGS", QUICK)
        if "on (" not in in_another_process():
            pytest.skip("there is no C compiler")
        return kernels._folder()


@pytest.fixture
def cache(built, fresh, monkeypatch, tmp_path):
    """A copy of that folder, of which this process knows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", QUICK)
    shutil.copytree(built.parent, tmp_path / "nestling")
    return tmp_path / "nestling" / "kernels"


def library(cache):
    return cache / kernels.file_name(kernels.compiler())


def in_another_process() -> str:
    """How another process ends, and what it says of the kernels: one that loads a broken library dies of it."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, kernels.status().encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as said:
        text = said.read()
    return f"{os.waitpid(child, 0)[1]} {text}"


PLANTED = """#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("PLANTED"), "w")); }
void nestling_score(void) {}
void nestling_weighted(void) {}
"""


@pytest.fixture
def planted(cache, monkeypatch, tmp_path):
    """The cache with a library that leaves a mark where it is loaded, and its right checksum; the mark."""
    (tmp_path / "planted.c").write_text(PLANTED)
    command = [*shlex.split(kernels.compiler()), "-shared", "-fPIC", tmp_path / "planted.c", "-o", library(cache)]
    subprocess.run(command, check=True)
    library(cache).with_suffix(".sha256").write_text(sha256(library(cache)))
    monkeypatch.setenv("PLANTED", str(tmp_path / "mark"))
    return tmp_path / "mark"


def test_they_are_compiled_once_into_a_private_folder(cache):
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 == stat.S_IMODE(cache.parent.stat().st_mode)
    names = [library(cache).name, library(cache).with_suffix(".sha256").name]
    assert sorted(path.name for path in cache.iterdir()) == sorted(names)
    before = library(cache).stat()
    assert in_another_process().startswith(f"0 compiled C: on ({library(cache)});")
    after = library(cache).stat()  # it was read since, which a file system may note
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize("kind", ["empty", "half", "text", "fifo", "link", "folder", "no checksum", "other checksum"])
def test_a_library_that_is_not_what_was_compiled_is_compiled_again(cache, kind, tmp_path):
    path, whole = library(cache), library(cache).read_bytes()
    if kind in ("fifo", "link", "folder"):
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "no")
    elif kind.endswith("checksum"):
        path.with_suffix(".sha256").unlink() if kind == "no checksum" else path.with_suffix(".sha256").write_text("0")
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) * 2 // 3], "text": b"hello"}[kind])
    assert in_another_process().startswith(f"0 compiled C: on ({path});")
    assert not path.is_symlink() and path.is_file() and path.stat().st_size == len(whole)
    assert path.with_suffix(".sha256").read_text().strip() == sha256(path)


def test_a_planted_library_of_the_right_folder_would_run(cache, planted):
    """So that the tests below show what they say."""
    assert in_another_process().startswith("0 compiled C: on") and planted.exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o722, 0o770])
def test_no_library_is_loaded_that_others_could_have_planted(cache, planted, which, mode):
    folder = [cache, *cache.parents][which]
    folder.chmod(mode)
    if mode & stat.S_IWGRP:
        os.chown(folder, -1, 12345 if os.getuid() == 0 else -1)
    if mode == 0o770 and os.getuid() != 0:
        pytest.skip("the group is this user's own")
    found = in_another_process()
    assert found.startswith("0 compiled C: off (others can write to") and str(folder) in found
    assert not planted.exists()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_library_is_loaded_from_another_users_folder(cache, planted, which):
    os.chown([cache, *cache.parents][which], 65534, -1)
    found = in_another_process()
    assert found.startswith("0 compiled C: off (") and "of another user (number 65534)" in found
    assert not planted.exists()


def test_a_link_in_the_folders_place_is_not_followed(cache, planted):
    cache.rename(cache.with_name("other"))
    cache.symlink_to("other")
    assert "is not a folder (links are not followed)" in in_another_process() and not planted.exists()


def test_a_sticky_folder_around_will_do(cache):
    cache.parent.parent.chmod(0o1777)
    assert in_another_process().startswith("0 compiled C: on")


@pytest.mark.parametrize("value", ["", ".", "cache"])
def test_a_relative_cache_folder_means_the_usual_one(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels._folder() == tmp_path / ".cache" / "nestling" / "kernels"


def test_the_compiler_may_have_arguments(cache, monkeypatch):
    program = shlex.split(kernels.compiler())[0]
    monkeypatch.setenv("CC", f"'{program}' -g0 -DA='b c'")
    assert kernels.compiler() == shlex.join([program, "-g0", "-DA=b c"])
    assert kernels.compiled() is not None and len(list(cache.glob("*.so"))) == 2


@pytest.mark.parametrize("value", ["no-such-compiler -m64", "'cc", " "])
def test_a_compiler_that_is_none_is_named(fresh, monkeypatch, value):
    monkeypatch.setenv("CC", value)
    assert kernels.compiler() is None and kernels.compiled() is None
    assert kernels.status().startswith("compiled C: off (") and repr(value) in kernels.status()


def test_why_they_are_off_is_logged_once(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    for _ in range(3):
        kernels.compiled()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "no-such-compiler" in caplog.text
    monkeypatch.setenv("NESTLING_KERNELS", "0")
    assert kernels.status().startswith("compiled C: off (NESTLING_KERNELS=0)")


def test_loading_them_leaves_subnormal_numbers_alone():
    """Flags such as -ffast-math change the processor's state for all of the process."""
    if kernels.compiled() is None:
        pytest.skip("there is no C compiler")
    assert float(torch.tensor([2.0**-140]) * torch.tensor([2.0])) == 2.0**-139


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("which", ["compiled", "triton"])
def test_products_equal_those_of_unpacked_codes(which, threads):
    if which == "compiled" and kernels.compiled() is None:
        pytest.skip("there is no C compiler")
    fused, device = kernels, "cpu"
    if which == "triton":
        fused, device = pytest.importorskip("nestling.kv.quantisation.triton"), TRITON
    rng = torch.Generator().manual_seed(0)
    widths, tokens, before = (8, 4, 4, 3, 2, 1), 700, torch.get_num_threads()
    codes = torch.cat([torch.randint(0, 1 << b, (3, 8, 1024), generator=rng) for b in widths], 1).to(torch.uint8)
    rows, real = pack(codes, widths), codes.float()[..., :tokens]
    query, shift = torch.randn(3, 5, 48, generator=rng), torch.randn(3, 5, 1, generator=rng)
    weight = torch.rand(3, 5, tokens + 9, generator=rng)
    rows, real, query, shift, weight = (x.to(device) for x in (rows, real, query, shift, weight))
    weight = weight[..., :tokens]
    torch.set_num_threads(threads)
    try:
        for add in (False, True):
            into = torch.full((3, 5, 1000), 0.5, device=device)
            fused.score(rows, tokens, widths, query, shift, into[..., :tokens], add)
            expected = query @ real - shift + 0.5 * add
            torch.testing.assert_close(into[..., :tokens], expected, rtol=1e-4, atol=1e-2)
            assert (into[..., tokens:] == 0.5).all()
        found = fused.weighted(rows, tokens, widths, weight)
        torch.testing.assert_close(found, weight @ real.mT, rtol=1e-4, atol=1e-2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("widths", [(8,), (4, 4), (3,), (2, 2, 2), (1,)])
@pytest.mark.parametrize("queries, tokens", [(1, 1), (3, 256), (9, 300)])
def test_triton_reads_every_width_in_bf16(widths, queries, tokens):
    gpu = pytest.importorskip("nestling.kv.quantisation.triton")
    rng = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randint(0, 1 << b, (2, 8, 320), generator=rng) for b in widths], 1).to(torch.uint8)
    rows, real, width = pack(codes, widths).to(TRITON), codes[..., :tokens].float().to(TRITON), 8 * len(widths)
    query = (torch.randn(2, queries, width, generator=rng) / 99).bfloat16().to(TRITON)
    weight = torch.rand(2, queries, tokens, generator=rng).bfloat16().to(TRITON)
    into = torch.zeros(2, queries, tokens, dtype=torch.bfloat16, device=TRITON)
    gpu.score(rows, tokens, widths, query, torch.zeros(2, queries, 1, device=TRITON), into, False)
    torch.testing.assert_close(into.float(), query.float() @ real, rtol=1e-2, atol=1e-2)
    found = gpu.weighted(rows, tokens, widths, weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), weight.float() @ real.mT, rtol=1e-2, atol=1e-2)


def test_gpus_have_triton_and_others_do_not(monkeypatch):
    gpu = pytest.importorskip("nestling.kv.quantisation.triton")
    with torch.no_grad():
        on = type("Rows", (), {"device": torch.device("cuda")})
        assert kernels.products(on, torch.bfloat16) is gpu
        assert kernels.products(type("Rows", (), {"device": torch.device("mps")}), torch.float16) is None
        monkeypatch.setenv("NESTLING_KERNELS", "0")
        assert kernels.products(on, torch.bfloat16) is None
    monkeypatch.delenv("NESTLING_KERNELS")
    assert kernels.products(on, torch.bfloat16) is None, "gradients go through torch"
