"""Whose keys and values a cache layer holds: one attention module, known again by its weights after a restart."""

import math
import weakref

from transformers import PreTrainedConfig, PreTrainedModel

from nestling.errors import CacheMismatchError, UnsupportedModelError
from nestling.kv.integration.interface import base_model
from nestling.kv.integration.state import decoder_part
from nestling.kv.integration.structure import fingerprint, text_config

SAMPLE = 8  # weights of each parameter that are compared
ROUNDING = 0.01  # by which they may differ, as a share: a model may be loaded again in another precision


class Owner:
    """The attention module that a cache layer was used with first.

    It is known by identity. Another one is accepted in its place if the configs agree in all that matters to a cache,
    and so do some weights: the same model loaded again, in this process or in another one.
    """

    __slots__ = ("config", "_module", "_weights")

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self._module: weakref.ref | None = None
        self._weights: dict[str, tuple[float, ...]] | None = None

    def check(self, module) -> None:
        """Raise `CacheMismatchError` unless ``module`` is the layer's."""
        if self._module is not None and self._module() is module:
            return
        weights = _sample(module)
        if not _alike(getattr(module, "config", self.config), self.config) or not _equal(self._weights, weights):
            raise CacheMismatchError("this cache was made for another model: make a NestedCache of its own")
        self._module, self._weights = weakref.ref(module), weights

    @property
    def weights(self) -> dict[str, tuple[float, ...]] | None:
        """Some weights of the module that are numbers, by name; None before there is one."""
        if self._weights is None:
            return None
        return {name: row for name, row in self._weights.items() if all(map(math.isfinite, row))}

    def recognise(self, model: PreTrainedModel, index: int, weights: dict[str, tuple[float, ...]]) -> None:
        """Take ``weights`` for those of the module, and look whether a model has them in the layer of that index.

        Raises:
            CacheMismatchError: it has others.
        """
        self._weights = weights
        for part in decoder_part(base_model(model)).modules():
            if getattr(part, "layer_idx", None) == index and weights.keys() <= dict(part.named_parameters()).keys():
                return self.check(part)

    def __getstate__(self) -> tuple:
        return self.config, self._weights

    def __setstate__(self, state: tuple) -> None:
        self.config, self._weights = state
        self._module = None

    def __deepcopy__(self, memo) -> "Owner":
        twin = Owner(self.config)
        twin._module, twin._weights = self._module, self._weights
        return twin


def _sample(module) -> dict[str, tuple[float, ...]]:
    """Some numbers of each parameter, by name; of none that does not give them out."""
    sampled = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta" and parameter.numel():
            try:
                row = parameter.detach()[(0,) * (parameter.dim() - 1)]
                sampled[name] = tuple(row[:SAMPLE].float().tolist())
            except (RuntimeError, NotImplementedError, TypeError):  # quantised weights are objects of many kinds
                continue
    return sampled


def _equal(known: dict[str, tuple[float, ...]] | None, weights: dict[str, tuple[float, ...]]) -> bool:
    """Whether what is known of weights by now, if anything, is true of these."""
    return not known or all(_near(known[name], weights[name]) for name in known.keys() & weights.keys())


def _near(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    if len(left) != len(right):
        return False
    least = ROUNDING**2 * max(map(abs, left))
    return all(math.isclose(x, y, rel_tol=ROUNDING, abs_tol=least) for x, y in zip(left, right, strict=True))


def _alike(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two configs are of models whose caches have the same form."""
    try:
        if one is other or one == other:
            return True
    except RuntimeError:  # layers have configs of their own, and transformers does not say what is common to them
        pass
    try:
        return fingerprint(text_config(one)) == fingerprint(other)
    except UnsupportedModelError:
        return False
