"""On a GPU: the Triton kernels as they are compiled there, and caches and training with the numbers of the CPU."""

import copy

import pytest
import torch

from nestling.kv.adapter_files import SIDES
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import evaluate, held_bytes
from nestling.kv.integration.attach import cached
from nestling.kv.quantisation import cpu as kernels
from nestling.kv.quantisation.packing import pack

from .cache.test_cache import run
from .cache.test_quantised_cache import some_table
from .families import FAMILIES, nested_cache, tiny_fit, tiny_model
from .training.test_train import run as train


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, of all numbers together."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("widths", [(8,), (4, 4), (3,), (2, 2, 2), (1,), (8, 4, 4, 3, 2, 1)])
@pytest.mark.parametrize("queries, tokens", [(1, 1), (3, 256), (9, 5000)])
def test_compiled_kernels_read_every_width(widths, queries, tokens, dtype, tolerance):
    gpu = pytest.importorskip("nestling.kv.quantisation.triton")
    rng = torch.Generator().manual_seed(tokens)
    codes = torch.cat([torch.randint(0, 1 << b, (3, 8, tokens + 7), generator=rng) for b in widths], 1)
    rows, real = pack(codes.to(torch.uint8), widths).cuda(), codes[..., :tokens].double()
    query = torch.randn(3, queries, 8 * len(widths), generator=rng).to(dtype)
    shift = torch.randn(3, queries, 1, generator=rng).to(dtype)
    weight = torch.rand(3, queries, tokens, generator=rng).to(dtype)
    into = torch.full((3, queries, tokens + 7), float("nan"), dtype=dtype, device="cuda")

    expected = query.double() @ real - shift.double()
    gpu.score(rows, tokens, widths, query.cuda(), shift.cuda(), into[..., :tokens], False)
    assert apart(into[..., :tokens].cpu(), expected) < tolerance and into[..., tokens:].isnan().all()
    gpu.score(rows, tokens, widths, query.cuda(), shift.cuda(), into[..., :tokens], True)
    assert apart(into[..., :tokens].cpu(), 2 * expected) < tolerance
    assert apart(gpu.weighted(rows, tokens, widths, weight.cuda()).cpu(), weight.double() @ real.mT) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [True, False])
def test_quantised_caches_give_the_logits_of_the_cpu(fitted, ids, family, fused, monkeypatch):
    """But for products in 16 bits, and where a rounding error puts a coordinate into another cell."""
    if not fused:
        monkeypatch.setenv("NESTLING_KERNELS", "0")
    with torch.no_grad():
        assert fused == (kernels.products(torch.empty(1, device="cuda"), torch.float32) is not None)
    made = fitted(family)
    there, table, found = copy.deepcopy(made.model).cuda(), some_table(made.adapter), []
    for model in (made.model, there):
        cache = nested_cache(model, made.adapter, table, sinks=2, window=4)
        found.append(run(model, ids[:2, :40].to(model.device), cache, [24, 5, *[1] * 11]).cpu())
    torch.testing.assert_close(found[1][:, :24], found[0][:, :24], rtol=1e-3, atol=1e-3)  # exact keys and values
    assert apart(found[1][:, 24:], found[0][:, 24:]) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_cache_generates_what_the_stock_model_does(fitted, ids, family):
    made = fitted(family)
    model, stock = copy.deepcopy(made.model).cuda(), copy.deepcopy(made.stock).cuda()
    arguments = {"input_ids": ids[:2, :20].cuda(), "max_new_tokens": 12, "do_sample": False}
    found = model.generate(**arguments, **cached(model, nested_cache(model, made.adapter, 1.0)))
    assert torch.equal(found, stock.generate(**arguments))


def test_shrinking_leaves_what_a_smaller_cache_would_hold(fitted, ids):
    made = fitted("llama-gqa")
    model = copy.deepcopy(made.model).cuda()
    tokens, options = ids[:2, :60].cuda(), {"quantise": True, "sinks": 2, "window": 4, "context": 256}
    large, small = (nested_cache(model, made.adapter, share, **options) for share in (0.6, 0.3))
    for cache in (large, small):
        run(model, tokens[:, :50], cache, [50])
    large.shrink(0.3)
    assert held_bytes(large) == held_bytes(small)
    found, expected = (run(model, tokens[:, 50:], cache, [10]) for cache in (large, small))
    assert apart(found, expected) < 0.02, "products of other shapes round differently there, so codes may be one off"


def test_calibration_and_quality_are_those_of_the_cpu(fitted, ids):
    made = fitted("llama-gqa")
    model = copy.deepcopy(made.model).cuda()
    adapter = tiny_fit(model, ids, sensitivity_windows=8)
    for side in SIDES:
        torch.testing.assert_close(adapter.mean[side], made.adapter.mean[side], rtol=1e-4, atol=1e-4)
        found, expected = (a.drop_cost[side].log().mean() for a in (adapter, made.adapter))
        assert abs(float(found - expected)) < 0.5, "labels are drawn by another generator"
    measured = [
        evaluate(
            m, None, ids, made.adapter, EvalConfig(length=64, windows=4, budgets=[0.75], window=4), progress=False
        )
        for m in (made.model, model)
    ]
    for one, other in zip(*measured, strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=0.02, abs=1e-6)


@pytest.mark.parametrize("sampling", ["path", "bits"])
def test_training_follows_the_cpu(tmp_path, ids, fitted, sampling):
    curves = []
    for name in ("cpu", "cuda"):
        model, options = tiny_model("llama-gqa").to(name), {"eval_texts": ids, "eval_windows": 8}
        if name == "cpu":
            options["use_cpu"] = True
        trained = train(
            tmp_path / f"{name}-{len(curves)}",
            ids,
            fitted("llama-gqa").adapter,
            model,
            recipe={"sampling": sampling},
            **options,
        )
        curves.append([p["kl_0.5"] for p in trained.info["training"]["curve"] if "kl_0.5" in p])
    assert len(curves[0]) > 3 and curves[1] == pytest.approx(curves[0], rel=0.02)
