"""The compiled products: found, refused or done without, and as many threads as asked for give the same."""

import pytest
import torch

from nestling.kv import kernels
from nestling.kv.pack import pack


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
def test_products_equal_those_of_unpacked_codes(threads):
    if kernels.compiled() is None:
        pytest.skip("there is no C compiler")
    rng = torch.Generator().manual_seed(0)
    widths, tokens, before = (8, 4, 4, 3, 2, 1), 700, torch.get_num_threads()
    codes = torch.cat([torch.randint(0, 1 << b, (3, 8, 1024), generator=rng) for b in widths], 1).to(torch.uint8)
    rows, real = pack(codes, widths), codes.float()[..., :tokens]
    query, shift = torch.randn(3, 5, 48, generator=rng), torch.randn(3, 5, 1, generator=rng)
    weight = torch.rand(3, 5, tokens + 9, generator=rng)[..., :tokens]
    torch.set_num_threads(threads)
    try:
        for add in (False, True):
            into = torch.full((3, 5, 1000), 0.5)
            kernels.score(rows, tokens, widths, query, shift, into[..., :tokens], add)
            expected = query @ real - shift + 0.5 * add
            torch.testing.assert_close(into[..., :tokens], expected, rtol=1e-4, atol=1e-2)
            assert (into[..., tokens:] == 0.5).all()
        found = kernels.weighted(rows, tokens, widths, weight)
        torch.testing.assert_close(found, weight @ real.mT, rtol=1e-4, atol=1e-2)
    finally:
        torch.set_num_threads(before)
