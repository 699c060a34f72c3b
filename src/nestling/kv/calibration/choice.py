"""Which basis each layer gets for its keys and for its values: the one whose errors the model's predictions mind less.

Predicted costs do not tell: in balanced bases, normalised keys as those of Gemma 3 lose several times as much as
predicted on text of another kind than the calibration's. So it is measured, by the KL to the full model where one side
of one layer alone is quantised, in each basis to equally many bits. What comes of it is measured as a whole beside
each basis everywhere, and the best is kept.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import losses_of
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.allocation.steps import fill
from nestling.kv.allocation.table import CHOICES
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.costs import Costs
from nestling.kv.calibration.search import KLMeter
from nestling.kv.integration.attach import decoder_and_head, input_device, longest_text
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK

ALONE = 0.125  # of the bits, where a side of a layer is measured by itself
TOGETHER = (0.25, 0.125)  # of the bits, at which whole adapters are measured
WINDOWS = 4  # of text that nothing was fitted on, where there is enough

Candidates = Mapping[str, tuple[KVAdapter, Costs]]


@torch.no_grad()
def can_choose(model) -> bool:
    """Whether `choose` can compare predictions: it needs the last hidden states of the decoder that a model names.

    Some families (Llama 4, ModernBERT's decoder) name another part so: they get balanced bases.
    """
    decoder, _ = decoder_and_head(model)
    ids = torch.ones(1, 2, dtype=torch.long, device=input_device(model))
    try:
        return hasattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state")
    except TypeError:
        return False


def choose(model, candidates: Candidates, windows: Tensor, config: FitConfig, bar) -> KVAdapter:
    """The adapter whose bases were measured to be the best: one of the candidates, or a mixture of them.

    Args:
        candidates: adapters for the same model, by the name of their basis, with their costs.
        windows: token ids ``[n, T]``, of texts that the bases were not fitted on. Whole adapters read pairs of them in
            one, since bases that fit the positions they have seen best are not always those for later ones.
        config: exact tokens, and the length of the pieces on which a side of a layer is measured by itself.
        bar: a progress bar.

    Returns:
        The adapter with its costs; ``info["basis"]`` names the basis of each layer, by side.
    """
    names = list(candidates)
    layers = next(iter(candidates.values()))[0].shape[0]
    sides = torch.stack([torch.full((2, layers), place) for place in range(len(names))])
    pieces = windows[[0, -1] if len(windows) > 1 else [0], : config.sensitivity_length]
    alone = bar.add_task("bases, layer by layer", total=2 * layers * len(names))
    meters, teacher = [], None
    for adapter, _ in candidates.values():
        meters.append(KLMeter(model, adapter, pieces, config.sinks, config.window, teacher))
        teacher = meters[-1].teacher
    kl = torch.empty(len(names), 2, layers, dtype=torch.float64)
    for place, (adapter, costs) in enumerate(candidates.values()):
        table = _equal(losses_of(costs.of(adapter)), ALONE)
        for side in range(2):
            for row in range(layers):
                single = torch.full_like(table, FULL_BITS)
                single[side, row] = table[side, row]
                kl[place, side, row] = meters[place](single[None])[0]
                bar.advance(alone)
    mixtures = torch.cat((sides, kl.argmin(0, keepdim=True))).unique(dim=0)
    adapters = [mixed(candidates, chosen) for chosen in mixtures]
    positions = longest_text(model)
    if len(windows) > 1 and positions and 2 * windows.shape[1] <= positions:
        windows = windows[: len(windows) // 2 * 2].reshape(len(windows) // 2, -1)
    return adapters[int(measured(model, adapters, windows, config, bar).argmin())]


def measured(model, adapters: list[KVAdapter], texts: Tensor, config: FitConfig, bar) -> Tensor:
    """The geometric mean of the KL at `TOGETHER` of quantised adapters, ``[n]``, on texts ``[m, T]``."""
    means, teacher = [], None
    for adapter in bar.track(adapters, description="bases, together"):
        meter = KLMeter(model, adapter, texts, config.sinks, config.window, teacher)
        teacher = meter.teacher
        steps = fill(losses_of(adapter), adapter.shape[2])
        means.append(meter(steps.tables(TOGETHER)).clamp_min(1e-30).log().mean().exp())
    return torch.stack(means)


def mixed(candidates: Candidates, chosen: Tensor) -> KVAdapter:
    """An adapter with the basis of one of the candidates for each side of each layer, ``chosen`` ``[2, L]``."""
    adapters, costs = zip(*candidates.values(), strict=True)

    def pick(sources, name: str) -> dict[str, Tensor]:
        rows = torch.arange(chosen.shape[1])
        return {s: torch.stack([getattr(x, name)[s] for x in sources])[chosen[i], rows] for i, s in enumerate(SIDES)}

    bases = {name: pick(adapters, name) for name in ("encode", "mean")}
    names = list(candidates)
    basis = {side: [names[place] for place in chosen[i].tolist()] for i, side in enumerate(SIDES)}
    mixture = replace(adapters[0], **bases, info={**adapters[0].info, "basis": basis})
    return Costs(*(pick(costs, name) for name in ("drop_cost", "quantisation_cost", "step"))).of(mixture)


def _equal(lost: Tensor, share: float) -> Tensor:
    """The bits of every block, ``[2, L, Hkv, blocks]``, with the least loss of each side of each layer at a share of
    its bits: reverse water-filling, the price of a bit by bisection."""
    bits = torch.tensor(CHOICES, dtype=torch.float64)
    low, high = torch.full(lost.shape[:2], -60.0, dtype=torch.float64), torch.full(lost.shape[:2], 30.0).double()
    most = share * FULL_BITS * lost.shape[2] * lost.shape[3]
    for _ in range(60):
        price = (low + high) / 2
        table = bits[(lost + price.exp()[:, :, None, None, None] * COORDINATES_PER_BLOCK * bits).argmin(-1)]
        above = table.sum((2, 3)) > most
        low, high = torch.where(above, price, low), torch.where(above, high, price)
    return bits[(lost + high.exp()[:, :, None, None, None] * COORDINATES_PER_BLOCK * bits).argmin(-1)].long()
