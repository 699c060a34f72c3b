"""Statistics against brute force: stock eager models that record, and explicit per-sample gradients."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import Cache

from nestling import kv
from nestling.basis import pca
from nestling.errors import TextTooShortError
from nestling.kv.adapter_files import SIDES
from nestling.kv.calibration import moments as module
from nestling.kv.calibration.costs import QuantisationErrors
from nestling.kv.calibration.fit import measure
from nestling.kv.calibration.moments import SKIP, collect_moments, make_bases
from nestling.kv.calibration.sensitivity import sensitivity, spread
from nestling.kv.integration.attach import (
    PassThroughLayer,
    attach,
    cached,
    compressible_layers,
    head_shape,
    stock_layers,
)

from ..families import FAMILIES, tiny_fit, tiny_model

RECORDED = ["llama-gqa", "llama-mha", "qwen3", "gemma3", "partial-rotary"]


@torch.no_grad()
def record(monkeypatch, family: str, ids, mask=None) -> dict[int, tuple[torch.Tensor, ...]]:
    """Query, key, value ``[B, H, T, D]``, output ``[B, T, Hq, D]`` and attention weights of a stock eager model."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    modelling = importlib.import_module(type(model).__module__)
    stock, found = modelling.eager_attention_forward, {}

    def recording(module, query, key, value, *args, **kwargs):
        out = stock(module, query, key, value, *args, **kwargs)
        found[module.layer_idx] = tuple(t.clone() for t in (query, key, value, *out))
        return out

    monkeypatch.setattr(modelling, "eager_attention_forward", recording)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert sorted(found) == [0, 1, 2]
    return found


def brute_force(states, keep) -> dict[str, torch.Tensor]:
    """First and second moments ``[Hkv, D(, D)]``, summed token by token and head by head."""
    query, key, value, output, weights = (t.double() for t in states)
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    names = ("keys", "queries", "values", "outputs")
    total = {name: torch.zeros(heads, key.shape[-1], key.shape[-1], dtype=torch.float64) for name in names}
    sums = ("key_sum", "value_sum", "output_sum", "attended_sum")
    total |= {name: torch.zeros(heads, key.shape[-1], dtype=torch.float64) for name in sums}
    for b, t in keep.nonzero().tolist():
        for h in range(heads):
            total["keys"][h] += torch.outer(key[b, h, t], key[b, h, t])
            total["values"][h] += torch.outer(value[b, h, t], value[b, h, t])
            total["key_sum"][h] += key[b, h, t]
            total["value_sum"][h] += value[b, h, t]
            for g in range(h * group, (h + 1) * group):
                total["queries"][h] += torch.outer(query[b, g, t], query[b, g, t])
                total["outputs"][h] += torch.outer(output[b, t, g], output[b, t, g])
                total["output_sum"][h] += output[b, t, g]
    total["mass"], total["attended"] = torch.zeros(heads, dtype=torch.float64), torch.zeros_like(total["keys"])
    for b, t in keep.nonzero().tolist():
        for g in range(query.shape[1] if (keep.shape[1] - 1 - t) % module.QUERY_STRIDE == 0 else 0):
            read, rows = weights[b, g, t] * keep[b], key[b, g // group]
            mass, mean = read.sum(), read @ rows / read.sum()
            total["mass"][g // group] += mass
            total["attended_sum"][g // group] += read @ rows
            total["attended"][g // group] += sum(
                a * torch.outer(k - mean, k - mean) for a, k in zip(read, rows, strict=True)
            )
    return total


# Moments


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", RECORDED)
def test_moments_are_sums_over_the_kept_tokens(monkeypatch, ids, family, padded):
    monkeypatch.setattr(module, "QUERY_STRIDE", 3)
    ids, mask = ids[:3, :20], torch.ones(3, 20, dtype=torch.long)
    keep = mask.bool().clone()
    keep[:, :4] = False
    if padded:
        for row, pad in ((1, 5), (2, 18)):  # the last row is shorter than what is skipped
            mask[row, :pad] = 0
            keep[row, : pad + 4] = False
        mask[0, -3:] = keep[0, -3:] = False  # and one is padded on the right
    states = record(monkeypatch, family, ids, mask)
    model = tiny_model(family)
    moments = collect_moments(model, [ids], skip=4, padding=[mask] if padded else None)
    assert list(moments) == compressible_layers(model.config)
    for layer, moment in moments.items():
        assert moment.tokens == int(keep.sum())
        for name, expected in brute_force(states[layer], keep).items():
            got = getattr(moment, name)
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        rows = states[layer][1].transpose(1, 2)[keep].double()
        for head in range(rows.shape[1]):
            covariance = torch.cov(rows[:, head].mT, correction=0)
            torch.testing.assert_close(moment.key_covariance[head], covariance, rtol=1e-3, atol=1e-3)


def softmax_by_hand(query, key, visible, scaling: float) -> torch.Tensor:
    """The attention weights ``[T]`` of one query ``[D]`` over keys ``[T, D]``, in fp64."""
    powers = torch.tensor([float(query @ k) * scaling for k in key], dtype=torch.float64).exp() * visible
    return powers / powers.sum()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "qwen3", "gemma3"])
def test_attended_keys_are_what_a_sample_of_queries_reads(monkeypatch, ids, family, padded):
    """From weights that are made here, out of logits: variances, means and mass of what queries 20, 12 and 4 read."""
    monkeypatch.setattr(module, "QUERY_STRIDE", 8)
    ids, mask = ids[:4, :21], torch.ones(4, 21, dtype=torch.long)
    if padded:
        mask[1, :5] = mask[2, :15] = 0
        mask[3, -3:] = 0  # the last query is none
    keep = [[t for t in range(21) if mask[b, t] and int(mask[b, :t].sum()) >= 4] for b in range(4)]
    assert [len(row) for row in keep] == ([17, 12, 2, 14] if padded else [17] * 4)
    states = record(monkeypatch, family, ids, mask)
    moments = collect_moments(tiny_model(family), ids.split(2), skip=4, padding=mask.split(2) if padded else None)
    for layer, moment in moments.items():
        query, key, value, output, _ = (t.double() for t in states[layer])
        heads, width = key.shape[1], key.shape[-1]
        group = query.shape[1] // heads
        for head in range(heads):
            mass, total, scatter, reads = 0.0, torch.zeros(width).double(), torch.zeros(width, width).double(), 0
            for b, t in [(b, t) for b in range(4) for t in (20, 12, 4) if t in keep[b]]:
                visible = mask[b].bool() & (torch.arange(21) <= t)
                for g in range(head * group, (head + 1) * group):
                    weight = softmax_by_hand(query[b, g, t], key[b, head], visible, width**-0.5)[keep[b]]
                    rows = key[b, head, keep[b]]
                    mean = (weight[:, None] * rows).sum(0) / weight.sum()
                    deviation = (rows - mean) * weight.sqrt()[:, None]
                    mass, total, reads = mass + weight.sum(), total + weight @ rows, reads + 1
                    scatter += deviation.mT @ deviation
            assert reads == group * (8 if padded else 12)
            assert 0 < mass < reads  # the first four hold some of it
            close = lambda got, expected: torch.testing.assert_close(  # noqa: E731
                got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )
            close(moment.mass[head], mass)
            close(moment.attended_sum[head], total)
            close(moment.attended[head], scatter)
            key_mean, value_mean = moment.means("balanced")
            assert key_mean.shape == value_mean.shape == (heads, width)
            close(key_mean[head], total / mass)
            own = range(head * group, (head + 1) * group)
            outs = torch.stack([output[b, t, g] for b in range(4) for t in keep[b] for g in own])
            close(value_mean[head], outs.mean(0))
            pca_key_mean, pca_value_mean = moment.means("pca")
            close(pca_key_mean[head], torch.cat([key[b, head, keep[b]] for b in range(4)]).mean(0))
            assert not pca_value_mean.any()


def test_queries_are_counted_from_the_last_and_padding_reads_nothing(monkeypatch):
    """A query that reads one key has no variance, and queries that are not in the sample change nothing."""
    monkeypatch.setattr(module, "QUERY_STRIDE", 8)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 18, 8, generator=generator) for _ in range(2))
    keep = torch.arange(18)[None] >= 4
    found = []
    for changed in (None, 16, 10, 17, 9):  # of 18, queries 17, 9 and 1 are read, and 1 is left out
        moment, other = module.Moments.zeros(1, 8), query.clone()
        if changed is not None:
            other[:, :, changed] += 3
        moment.add_attended(other, key, None, keep, 0.5)
        found.append(moment)
    for same in found[1:3]:
        assert torch.equal(same.attended, found[0].attended) and torch.equal(same.mass, found[0].mass)
    for different in found[3:]:
        assert not torch.allclose(different.attended, found[0].attended, rtol=1e-2)
    alone, mask = module.Moments.zeros(1, 8), torch.eye(18, dtype=torch.bool)[None, None].clone()
    mask[:, :, 9] = False  # padding sees nothing, and is not kept
    alone.add_attended(query, key, mask, keep & (torch.arange(18) != 9), 0.5)
    torch.testing.assert_close(alone.mass, torch.ones(1).double())
    torch.testing.assert_close(alone.attended_sum[0], key[0, 0, 17].double())
    torch.testing.assert_close(alone.attended, torch.zeros(1, 8, 8).double(), rtol=0, atol=1e-5)


def test_skipped_positions_leave_no_trace(ids):
    model = tiny_model("llama-gqa")
    few, all_ = (collect_moments(model, [ids[:2, :20]], skip=skip) for skip in (19, 0))
    assert (few[0].tokens, all_[0].tokens) == (2, 40)
    assert torch.linalg.matrix_rank(few[0].keys[0], rtol=1e-5) == 2
    assert collect_moments(model, [ids[:2, :20]])[0].tokens == 2 * (20 - SKIP)


def test_moments_do_not_depend_on_the_batches(ids):
    model = tiny_model("llama-gqa")
    whole = collect_moments(model, [ids])
    for size in (1, 3):
        parts = collect_moments(model, ids.split(size))
        for layer, moment in whole.items():
            assert parts[layer].tokens == moment.tokens
            for name in ("keys", "queries", "values", "outputs", "attended", "mass"):
                torch.testing.assert_close(getattr(parts[layer], name), getattr(moment, name), rtol=1e-4, atol=1e-3)
            for name in ("key_sum", "value_sum", "output_sum", "attended_sum"):
                torch.testing.assert_close(getattr(parts[layer], name), getattr(moment, name), rtol=1e-4, atol=1e-3)


def test_no_token_is_an_error(ids, fitted):
    with pytest.raises(kv.CalibrationError, match="no token is left after the first 4 positions"):
        collect_moments(tiny_model("llama-gqa"), [ids[:, :4]])
    with pytest.raises(kv.CalibrationError, match="no windows"):
        sensitivity(fitted("llama-gqa").model, fitted("llama-gqa").adapter, [], kv.FitConfig())


@pytest.mark.parametrize(
    "layer, name, said", [(1, "k_proj", "layer 1: the keys"), (2, "v_proj", "layer 2: the values")]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_weights_are_named(ids, layer, name, said, bad):
    model = tiny_model("llama-gqa")
    getattr(model.model.layers[layer].self_attn, name).weight.data[3, 3] = bad
    with pytest.raises(kv.CalibrationError, match=f"{said} hold NaN or infinity"):
        tiny_fit(model, ids, sensitivity_length=64, window=16)


# Bases


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
def test_balanced_bases_balance_what_they_should(ids, family):
    """Keys: attended keys against queries. Values: centred outputs against the group's W_O; also H * D != hidden."""
    model = tiny_model(family)
    moments = collect_moments(model, [ids])
    heads, kv_heads, width = head_shape(model.config)
    bases = make_bases(model, moments, "balanced")
    for layer, (key, value) in bases.items():
        moment, weight = moments[layer], model.model.layers[layer].self_attn.o_proj.weight.detach().double()
        assert weight.shape == (64, heads * width)
        metric = torch.zeros(kv_heads, width, width, dtype=torch.float64)
        for head in range(heads):
            block = weight[:, head * width : (head + 1) * width]
            metric[head // (heads // kv_heads)] += block.mT @ block
        count = moment.tokens * heads // kv_heads
        mean = moment.output_sum / count
        outputs = torch.stack([s / count - torch.outer(x, x) for s, x in zip(moment.outputs, mean, strict=True)])
        for basis, c, m in (
            (key, moment.attended / moment.mass[:, None, None], moment.queries / moment.tokens),
            (value, outputs, metric),
        ):
            assert basis.encode.shape == (kv_heads, width, width)
            diagonal = torch.diag_embed(basis.energy.sqrt())
            atol = 1e-3 * float(diagonal.max())
            torch.testing.assert_close(basis.encode.mT @ c @ basis.encode, diagonal, rtol=0, atol=atol)
            torch.testing.assert_close(basis.decode @ m @ basis.decode.mT, diagonal, rtol=0, atol=atol)


def test_pca_bases_are_those_of_keys_and_values(monkeypatch, ids):
    model = tiny_model("llama-gqa")
    moments = collect_moments(model, [ids])
    states = record(monkeypatch, "llama-gqa", ids)
    for layer, (key, value) in make_bases(model, moments, "pca").items():
        for basis, state, centred in zip((key, value), states[layer][1:3], (True, False), strict=True):
            rows = state[:, :, SKIP:].transpose(0, 1).flatten(1, 2).double()
            c = torch.stack([torch.cov(r.mT, correction=0) if centred else r.mT @ r / len(r) for r in rows])
            torch.testing.assert_close(basis.energy, pca(c).energy, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                basis.encode.mT @ c @ basis.encode, torch.diag_embed(basis.energy), rtol=0, atol=1e-4
            )
            torch.testing.assert_close(
                basis.encode.mT @ basis.encode, torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
            )
    with pytest.raises(ValueError, match="svd"):
        make_bases(model, moments, "svd")


# Sensitivity


def masked_log_p(model, adapter, masks, ids, sinks: int, window: int) -> torch.Tensor:
    """Log-probabilities ``[1, T, V]`` when masks ``[2, L, Hkv, D]`` shrink coordinates towards those of the means.

    Written out query by query: which keys and values are exact is a matter of which query reads them.
    """

    class Handle:
        def __init__(self, row, states):
            self.exact = states
            self.cut = []
            for side, (name, state) in enumerate(zip(SIDES, states, strict=True)):
                encode, decode, mean = (getattr(adapter, n)[name][row].to(state) for n in ("encode", "decode", "mean"))
                mean, mask = mean[:, None], masks[side, row].to(state)[:, None]
                self.cut.append(mean + ((state - mean) @ encode * mask) @ decode)

        def attend(self, module, query, mask, scaling, **kwargs):
            outputs, places = [], torch.arange(query.shape[2])
            group = query.shape[1] // self.exact[0].shape[1]
            for i in places.tolist():
                gone = max(i + 1 - sinks - window, 0) // (16 if window else 1) * (16 if window else 1)
                coded = (places >= sinks) & (places < sinks + gone)
                keys, values = (
                    torch.where(coded[:, None], c, e)[:, :, : i + 1].repeat_interleave(group, 1)
                    for e, c in zip(self.exact, self.cut, strict=True)
                )
                weights = (query[:, :, i : i + 1] @ keys.mT * scaling).softmax(-1)
                outputs.append((weights @ values).transpose(1, 2))
            return torch.cat(outputs, 1)

    class Masked(PassThroughLayer):
        def __init__(self, row):
            super().__init__()
            self.row = row

        def update(self, key_states, value_states, *args, **kwargs):
            handle = Handle(self.row, (key_states, value_states))
            return handle, handle

    attach(model)
    layers = stock_layers(model.config)
    for row, index in enumerate(adapter.fingerprint["layers"]):
        layers[index] = Masked(row)
    cache = Cache(layers=layers)
    return model(input_ids=ids, **cached(model, cache), use_cache=True).logits.log_softmax(-1)


@pytest.fixture(scope="module")
def small():
    """An fp64 model, an adapter and eight rows of 24 tokens."""
    model = tiny_model("llama-gqa", dtype=torch.float64, num_hidden_layers=2, vocab_size=31)
    ids = torch.randint(3, 31, (8, 24), generator=torch.Generator().manual_seed(1))
    return model, tiny_fit(model, ids, length=24, sensitivity_windows=8, sinks=1, window=2), ids


EXACT = [(0, 0), (4, 0), (1, 2)]


@pytest.mark.parametrize("sinks, window", EXACT)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("rank", [16, 8])
def test_sensitivity_is_half_the_squared_gradient_of_every_row(monkeypatch, small, sinks, window, rows, rank):
    model, adapter, ids = small
    ranks = torch.full((2, 2, 2), 16)
    ranks[:, 1] = rank
    allocation = None if rank == 16 else kv.Allocation.of_ranks(*ranks, 16)
    draw, drawn = torch.multinomial, []
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    config = kv.FitConfig(sinks=sinks, window=window, seed=3)
    got = sensitivity(model, adapter, ids.split(rows), config, allocation)
    labels = torch.cat(drawn).view(8, 24, 1)
    total = torch.zeros(2, *adapter.shape, dtype=torch.float64)
    for row in range(8):
        mask = (torch.arange(16) < ranks[..., None]).double().requires_grad_()
        log_p = masked_log_p(model, adapter, mask, ids[row : row + 1], sinks, window)
        log_p.gather(-1, labels[row : row + 1]).sum().backward()
        total += mask.grad.square() / 2 / ids.numel()
    for expected, side in zip(total.float(), SIDES, strict=True):
        torch.testing.assert_close(got[side], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    zero = replace(adapter, mean={side: torch.zeros_like(mean) for side, mean in adapter.mean.items()})
    other = sensitivity(model, zero, ids.split(rows), config, allocation)
    if rank == 16:  # the means matter, but for a shift that all keys share
        assert torch.allclose(other["key"], got["key"], rtol=1e-3) == (sinks == window == 0)
    assert not torch.allclose(other["value"], got["value"], rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("sinks, window", EXACT[1:])
def test_sensitivity_predicts_the_kl_of_a_small_change(small, sinks, window):
    """Averaged over label draws, ``eps^2 F / 2`` is the KL per token of moving a coordinate to its mean by eps."""
    model, adapter, ids = small
    draws = 150
    mean = torch.zeros(2, *adapter.shape)
    for seed in range(draws):
        found = sensitivity(model, adapter, [ids], kv.FitConfig(sinks=sinks, window=window, seed=seed))
        mean += torch.stack([found[side] for side in SIDES]) / draws
    ones = torch.ones(2, *adapter.shape, dtype=torch.float64)
    full, eps = masked_log_p(model, adapter, ones, ids, sinks, window), 1e-3
    places = [(s, i, h, c) for s in (0, 1) for i in range(2) for h in (0, 1) for c in (0, 3, 8)]
    measured = []
    for place in places:
        mask = ones.clone()
        mask[place] -= eps
        less = masked_log_p(model, adapter, mask, ids, sinks, window)
        measured.append(float((full.exp() * (full - less)).sum()) / ids.numel() / eps**2)
    predicted, measured = torch.stack([mean[place] for place in places]), torch.tensor(measured)
    # 1,200 squared gradients a coordinate: a standard error of 4 % and more where they have heavy tails
    torch.testing.assert_close(predicted, measured, rtol=0.3, atol=1e-4)
    assert float((predicted / measured).log().mean().abs()) < 0.05


def test_sensitivity_needs_no_weight_gradients_and_leaves_none(ids):
    model = tiny_model("llama-gqa")
    adapter = tiny_fit(model, ids, sensitivity_windows=2, sinks=0)
    text, config = ids[:2, :16], kv.FitConfig(sinks=0, window=0)
    live = sensitivity(model, adapter, [text], config)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    frozen = sensitivity(model.requires_grad_(False), adapter, [text], config)
    other = sensitivity(model, adapter, [text], replace(config, seed=1))
    for side in SIDES:
        assert torch.equal(live[side], frozen[side]) and not torch.equal(live[side], other[side])


def test_what_only_near_tokens_read_is_worth_nothing(ids):
    model = tiny_model("llama-gqa")
    adapter = tiny_fit(model, ids, sensitivity_windows=2, sinks=0)
    config = kv.FitConfig(sinks=1, window=3)
    drop_cost = sensitivity(model, adapter, [ids[:2, :19]], config)  # up to 18 recent ones are exact
    assert all(float(e.abs().max()) == 0 for e in drop_cost.values())
    with pytest.raises(ValueError, match="pieces of 19 tokens hold nothing beyond the 19 exact ones"):
        measure(model, adapter, ids[:1, :19], config)
    with pytest.raises(ValueError, match="pieces of 19 tokens hold nothing beyond the 19 exact ones"):
        measure(model, adapter, ids, replace(config, sensitivity_length=19))


def test_pieces_are_from_all_over_the_windows():
    windows = torch.arange(60).view(3, 20)
    found = torch.cat(spread(windows, 3, 8, 100))
    assert found[:, 0].tolist() == [0, 20, 48] and found.shape == (3, 8)
    assert torch.equal(torch.cat(spread(windows, 100, 20, 100)), windows)
    for length, most in ((28, 2), (32, 1), (100, 1)):  # longer ones go on in the next window, as far as there is text
        found, count = torch.cat(spread(windows, 100, length, 100)), min(length, 60)
        assert torch.equal(found, torch.arange(most * count).view(most, count))
    assert [len(part) for part in spread(windows, 3, 20, 2**21)] == [1, 1, 1]


# Fit


@pytest.mark.parametrize("basis", ["balanced", "pca"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits(ids, family, basis):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = tiny_fit(model, ids, basis=basis, length=32, tokens=256, sensitivity_length=16)
    layers, heads, width = adapter.shape
    assert (heads, width) == head_shape(model.config)[1:]
    for side in ("key", "value"):
        drop_cost = adapter.drop_cost[side]
        assert drop_cost.shape == (layers, heads, width) and (drop_cost >= 0).all() and (drop_cost.sum(-1) > 0).all()
        assert adapter.mean[side].shape == drop_cost.shape and adapter.mean[side].dtype == torch.float32
        if basis == "pca":
            eye = torch.eye(width).expand(layers, heads, width, width)
            torch.testing.assert_close(adapter.encode[side].mT @ adapter.encode[side], eye, rtol=0, atol=1e-5)
    assert (adapter.info["basis"], adapter.info["tokens"], adapter.info["length"]) == (basis, 256, 32)
    assert adapter.info["condition"] == 1 if basis == "pca" else adapter.info["condition"] > 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("basis", ["balanced", "pca"])
def test_fit_is_the_sum_of_its_parts(ids, basis, monkeypatch):
    """And orders the balanced coordinates by what they were measured to be worth; PCA keeps the paper's order."""
    monkeypatch.setattr("nestling.kv.calibration.fit.corrected", lambda model, adapter, *args, **options: adapter)
    config = kv.FitConfig(sinks=2, window=4, seed=5)
    given = dict(pieces=4, piece_length=32, context=128, sensitivity_windows=8, sinks=2, window=4, seed=5)
    adapter = tiny_fit(tiny_model("qwen3"), ids, basis=basis, **given)
    model = tiny_model("qwen3")  # heads of width 24: drop costs are measured again at 16
    moments = collect_moments(model, [ids])
    bases, means = make_bases(model, moments, basis), {i: m.means(basis) for i, m in moments.items()}
    expected = kv.KVAdapter.from_bases(model.config, bases, means, {})
    pieces = ids.view(16, 32)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5))
    positions = torch.tensor([0, 32, 64, 96])[order].tolist()  # each piece is measured by itself, at one of them
    for chosen in ([0, 5, 10, 15], [0, 2, 4, 6, 9, 11, 13, 15]):
        if len(chosen) == 4:
            watch = QuantisationErrors(expected, torch.ones(2, *expected.shape), torch.device("cpu"))
            sensitivity(model, expected, pieces[chosen].split(1), config, positions=positions, watch=[watch])
            drop_cost = watch.measured(4 * 32, 4).drop_cost
        else:  # at no bits the geometric mean of what they cost at full and at half ranks, at the level of the former
            full, half = expected.drop_cost, expected.allocate(2 / 3)
            drop_cost = sensitivity(model, expected, [pieces[chosen]], config, half)
            none = {s: (d * full[s]).sqrt() * (full[s].sum() / d.sum()).sqrt() for s, d in drop_cost.items()}
        order = {s: e.argsort(-1, descending=True) if basis == "balanced" else None for s, e in drop_cost.items()}
        encode = dict(expected.encode)
        for side, o in order.items():
            if o is not None:
                drop_cost[side] = drop_cost[side].gather(-1, o)
                encode[side] = encode[side].gather(-1, o[..., None, :].expand_as(encode[side]))
                none = {**none, side: none[side].gather(-1, o)} if len(chosen) == 8 else {}
        expected = replace(expected, encode=encode, drop_cost=drop_cost)
    assert (adapter.info["sinks"], adapter.info["window"], adapter.info["context"]) == (2, 4, 128)
    for side in SIDES:
        torch.testing.assert_close(adapter.drop_cost[side], expected.drop_cost[side], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.quantisation_cost[side][..., 0], none[side], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.mean[side], expected.mean[side], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.encode[side], expected.encode[side], rtol=1e-4, atol=1e-5)


def test_ids_and_strings_are_the_same_text(ids):
    class Numbers:
        eos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [int(i) for i in text.split()]}

    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    config = kv.FitConfig(basis="pca", length=64, sensitivity_windows=2, sensitivity_length=16, window=0)
    one, other = (
        kv.fit(tiny_model("llama-gqa"), t, x, config, progress=False) for t, x in ((None, ids), (Numbers(), texts))
    )
    assert torch.equal(one.encode["key"], other.encode["key"]) and torch.equal(
        one.drop_cost["key"], other.drop_cost["key"]
    )
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        kv.fit(tiny_model("llama-gqa"), None, texts, config, progress=False)


def test_too_little_text_and_wrong_ids_are_refused(ids):
    model = tiny_model("llama-gqa")
    with pytest.raises(TextTooShortError, match="shorter than one window of 65 tokens"):
        tiny_fit(model, ids, length=65, sensitivity_length=65)
    with pytest.raises(ValueError, match="integer tensor"):
        tiny_fit(model, ids.float(), length=32)


def test_windows_are_no_longer_than_the_model(ids):
    model = tiny_model("llama-gqa", max_position_embeddings=32)
    assert tiny_fit(model, ids, length=1024, sensitivity_length=512, sensitivity_windows=2).info["length"] == 32


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(ids, training):
    model = tiny_model("llama-gqa", attention_dropout=0.5).train(training)
    one, other = (tiny_fit(model, ids, length=32, sensitivity_windows=2, sensitivity_length=16) for _ in range(2))
    assert model.training is training
    assert torch.equal(one.encode["key"], other.encode["key"])  # no dropout in it
