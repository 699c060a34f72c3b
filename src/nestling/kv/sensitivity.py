"""Sensitivity: what dropping each coordinate does to the predictions, in one unit for all layers, keys and values.

The Fisher information of a mask on each coordinate. With labels y drawn from the model,
``F_i = E[(d log p(y) / d m_i)^2]`` and dropping coordinate i costs about ``F_i / 2`` nats of KL to the full model.
Divided by the tokens of a window it is a KL per token.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nestling.basis import NestedBasis
from nestling.kv import attention
from nestling.kv.adapter import KVAdapter
from nestling.kv.files import SIDES
from nestling.kv.moments import SKIP, CalibrationError
from nestling.progress import progress_bar


def sensitivity(
    model,
    bases: dict[int, tuple[NestedBasis, NestedBasis]],
    means: dict[int, tuple[Tensor, Tensor]],
    windows: Iterable[Tensor],
    *,
    skip: int = SKIP,
    seed: int = 0,
) -> dict[int, tuple[Tensor, Tensor]]:
    """The KL per token expected from fixing each coordinate of keys and of values at its mean, ``[Hkv, D]``, by layer.

    Half the Fisher information of a mask on the coordinate, over the tokens of a row, with labels sampled from the
    model. Cross terms between coordinates are left out. One forward and one backward pass without weight gradients.

    Args:
        windows: batches of token ids ``[B, T]``; every row is one sample of the gradient.
    """
    config = attention.text_config(model)
    total = {i: [torch.zeros_like(b.energy) for b in pair] for i, pair in bases.items()}
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = 0
    with attention.served(model), torch.enable_grad():
        for ids in windows:
            ids = ids.to(model.device)
            layers = attention.stock_layers(config)
            taps = {index: _TapLayer() for index in bases}
            for index, tap in taps.items():
                layers[index] = tap
            logits = model(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True).logits
            log_p = logits.float().log_softmax(-1)
            with torch.no_grad():
                labels = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(*ids.shape, 1)
            leaves = [leaf for tap in taps.values() for leaf in tap.leaves]
            gradients = iter(torch.autograd.grad(log_p.gather(-1, labels).sum(), leaves))
            tokens += ids.numel()
            for index, tap in taps.items():
                for side, basis in enumerate(bases[index]):
                    states, gradient = (t[:, :, skip:].double().cpu() for t in (tap.states[side], next(gradients)))
                    deviation = (states - means[index][side][:, None]) @ basis.encode
                    effect = (deviation * (gradient @ basis.decode.mT)).sum(2)
                    total[index][side] += effect.square().sum(0) / 2
    if not tokens:
        raise CalibrationError("no windows were given to measure the sensitivity")
    return {i: (pair[0] / tokens, pair[1] / tokens) for i, pair in total.items()}


def measured_energy(
    model, adapter: KVAdapter, windows: Tensor, *, count: int = 48, length: int = 128, seed: int = 0, progress=True
) -> dict[str, Tensor]:
    """The energies of an adapter whose bases have changed, fp32 ``[L, Hkv, D]`` by side; see `sensitivity`.

    Args:
        windows: token ids ``[n, T]``; the first ``count`` pieces of ``length`` tokens are read.
    """
    batches = short_batches(attention.text_config(model), windows, count, length)
    bases, means = {}, {}
    for row, layer in enumerate(adapter.fingerprint["layers"]):
        key, value = (_basis(adapter.encode[s][row].double(), adapter.decode[s][row].double()) for s in SIDES)
        bases[layer] = (key, value)
        means[layer] = (adapter.mean["key"][row].double(), adapter.mean["value"][row].double())
    with progress_bar(progress) as bar:
        energy = sensitivity(model, bases, means, bar.track(batches, description="energies"), seed=seed)
    return {side: torch.stack([energy[i][s] for i in energy]).float() for s, side in enumerate(SIDES)}


def _basis(encode: Tensor, decode: Tensor) -> NestedBasis:
    """A basis whose energies and condition are not known, as ones."""
    return NestedBasis(encode, decode, torch.ones_like(encode[..., 0]), torch.ones_like(encode[..., 0, 0]))


def short_batches(config, windows: Tensor, count: int, length: int) -> tuple[Tensor, ...]:
    """The first ``count`` pieces of ``length`` tokens of windows ``[n, T]``, in batches.

    Logits of the whole vocabulary are kept with their gradient: small batches for large vocabularies.
    """
    length = min(length, windows.shape[1])
    pieces = windows.flatten()[: windows.numel() // length * length].view(-1, length)[:count]
    return pieces.split(max(1, min(8, 2**26 // (config.vocab_size * length))))


def order_by_energy(bases: dict, energy: dict) -> tuple[dict, dict]:
    """Sort the coordinates of every head by measured energy, largest first, in place of the closed form's order.

    The closed forms order by the error of logits and of the output, the energies by what it does to the predictions.
    """
    orders = {i: [e.argsort(-1, descending=True) for e in pair] for i, pair in energy.items()}
    sorted_bases = {i: tuple(b.permuted(o) for b, o in zip(bases[i], orders[i], strict=True)) for i in bases}
    sorted_energy = {i: tuple(e.gather(-1, o) for e, o in zip(energy[i], orders[i], strict=True)) for i in energy}
    return sorted_bases, sorted_energy


class _TapLayer(attention.PassThroughLayer):
    """Adds zero leaves to keys and values, to read the gradient of the loss by each of them."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.states = (key_states.detach(), value_states.detach())
        self.leaves = [torch.zeros_like(s).requires_grad_() for s in self.states]
        return key_states + self.leaves[0], value_states + self.leaves[1]
