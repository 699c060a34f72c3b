"""The compiled products: found, refused or done without, and as many threads as asked for give the same."""

import pytest
import torch

from nestling.kv import kernels
from nestling.kv.pack import pack

TRITON = "cuda" if torch.cuda.is_available() else "cpu"  # where its kernels are interpreted


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
    (tmp_path / "packed.c").write_text(source)
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "packed.c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.compiled() is None


def test_a_compiler_without_openmp_will_do(fresh, monkeypatch, tmp_path):
    if (real := kernels.compiler()) is None:
        pytest.skip("there is no C compiler")
    other = tmp_path / "cc"
    other.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.compiled() is not None and kernels.compiled()._name.startswith(str(tmp_path))


def test_a_damaged_library_is_done_without(fresh, monkeypatch, tmp_path):
    if kernels.compiled() is None:
        pytest.skip("there is no C compiler")
    kernels.compiled.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = tmp_path / "nestling" / "kernels" / kernels.file_name(kernels.compiler())
    built.parent.mkdir(parents=True)
    built.write_bytes(b"not a library")
    assert kernels.compiled() is None


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
        fused, device = pytest.importorskip("nestling.kv.gpu"), TRITON
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
    gpu = pytest.importorskip("nestling.kv.gpu")
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
    gpu = pytest.importorskip("nestling.kv.gpu")
    with torch.no_grad():
        on = type("Rows", (), {"device": torch.device("cuda")})
        assert kernels.products(on, torch.bfloat16) is gpu
        assert kernels.products(type("Rows", (), {"device": torch.device("mps")}), torch.float16) is None
        monkeypatch.setenv("NESTLING_KERNELS", "0")
        assert kernels.products(on, torch.bfloat16) is None
    monkeypatch.delenv("NESTLING_KERNELS")
    assert kernels.products(on, torch.bfloat16) is None, "gradients go through torch"
