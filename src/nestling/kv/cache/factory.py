"""From an adapter and a budget to a table, and what a cache was made of: enough to find the table of any budget."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.errors import AdapterError, BudgetError
from nestling.kv.allocation.bits import BitTable, bit_steps, losses
from nestling.kv.allocation.budget import Budget, read_share
from nestling.kv.allocation.ranks import (
    CONTEXT,
    RankTable,
    elements_per_token,
    energy_gains,
    gain_steps,
    uniform_steps,
)
from nestling.kv.allocation.steps import Steps
from nestling.kv.cache.groups import SIDES
from nestling.options import shown

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

WITHOUT_BITS = "this adapter has no noise and steps to quantise by: calibrate or train it again"
DIGITS = 4  # of the smallest budget, which is rounded up


def steps_of(adapter: "KVAdapter", allocation: str | None = None, *, bits: bool = False) -> Steps:
    """The steps of a named allocation of an adapter, of ranks or of bits: the tables of all budgets.

    Raises:
        AdapterError: for bits of an adapter that was made without noise.
        BudgetError: for unknown allocations.
    """
    layers, heads, width = adapter.shape
    if bits:
        if not adapter.quantises:
            raise AdapterError(WITHOUT_BITS)
        if allocation not in (None, "energy"):
            raise BudgetError(f"allocation of bits must be 'energy' or a bit table, got {shown(allocation)}")
        energy, noise = (torch.stack([values[s] for s in SIDES]) for values in (adapter.energy, adapter.noise))
        errors = torch.tensor([adapter.info["errors"][s] for s in SIDES])
        return bit_steps(losses(energy, noise, errors))
    allocation = allocation or adapter.allocation
    if allocation == "uniform":
        return uniform_steps(layers, heads, width)
    if allocation == "energy":
        return gain_steps(energy_gains(adapter.energy["key"], adapter.energy["value"]), width)
    if isinstance(allocation, str) and allocation in adapter.paths:
        return gain_steps(adapter.paths[allocation].double(), width)
    known = ", ".join(map(repr, ("energy", "uniform", *adapter.paths)))
    raise BudgetError(f"allocation must be {known} or a rank table, got {shown(allocation)}")


def ranks_at(adapter: "KVAdapter", budget: Any, allocation: str | None = None) -> RankTable:
    """The rank table of a share of the full cache, exact tokens not counted.

    Args:
        budget: see `nestling.kv.allocation.budget.read_share`.

    Raises:
        BudgetError: if it is no share, or below the smallest, which the message has; for unknown allocations.
    """
    found = _table_at(adapter, budget, allocation, bits=False)
    assert isinstance(found, RankTable)
    return found


def bits_at(adapter: "KVAdapter", budget: Any) -> BitTable:
    """The bit table of a share of the 16 bits of the full cache: as `ranks_at`.

    Raises:
        BudgetError: as `ranks_at`.
        AdapterError: for an adapter that was made without noise.
    """
    found = _table_at(adapter, budget, None, bits=True)
    assert isinstance(found, BitTable)
    return found


def _table_at(adapter: "KVAdapter", budget: Any, allocation: str | None, bits: bool) -> RankTable | BitTable:
    asked = read_share(budget)
    maker = Maker(adapter, asked, allocation=allocation, bits=bits, exact_tokens=0, context=CONTEXT, bits_help=False)
    return maker.required(asked)


class Maker:
    """The adapter, allocation and budget of a cache: plain data, which copies of the cache share.

    Args:
        adapter: whose bases the cache has.
        budget: that the cache starts from, a share.
        limit: bytes that it never exceeds, if there are any.
        allocation: the name of one, as for `steps_of`.
        bits: whether coordinates are quantised.
        exact_tokens: tokens that there is room for in full.
        context: number of tokens at which budgets are met.
        bits_help: whether ``bits=True`` may be advised where it would allow smaller budgets.
    """

    def __init__(
        self,
        adapter: "KVAdapter",
        budget: Budget,
        limit: Budget | None = None,
        *,
        allocation: str | None,
        bits: bool,
        exact_tokens: int,
        context: int,
        bits_help: bool,
    ):
        self.adapter, self.budget, self.limit, self.bits = adapter, budget, limit, bits
        self.exact_tokens, self.context = exact_tokens, context
        self.share = budget.share or 1.0
        self.full = adapter.full_elements
        self.steps = steps_of(adapter, allocation, bits=bits)
        self.smallest = self._smallest()
        self.bits_help = bits_help and not bits and adapter.quantises and allocation in (None, "energy")

    def __deepcopy__(self, memo) -> "Maker":
        return self

    def table(self, share: float) -> RankTable | BitTable | None:
        """The table of a budget; None below `smallest`."""
        try:
            elements = elements_per_token(self.full, share, None, exact_tokens=self.exact_tokens, context=self.context)
        except BudgetError:
            return None
        table = self.steps.table(16 * elements if self.bits else elements)
        if table is None:
            return None
        return BitTable(*table) if self.bits else RankTable(*table)

    def required(self, budget: Budget) -> RankTable | BitTable:
        """The table of a budget that the user gave.

        Raises:
            BudgetError: if it is out of reach; the message has the smallest one that is not.
        """
        assert budget.share is not None
        table = self.table(budget.share)
        if table is None:
            raise BudgetError(f"{budget.given} is below the smallest possible, {self._least(budget)}")
        return table

    def bases(self, row: int, device: torch.device) -> dict[str, Tensor]:
        """The bases of a compressed layer, by its row in the adapter."""
        return {name: tensor.to(device) for name, tensor in self.adapter._layer_bases(row).items()}

    def _least(self, budget: Budget) -> str:
        """The smallest budget in the unit of another one, why it is not smaller, and what would make it so."""
        if budget.full_bytes is not None:
            least = f"{round(self._smallest(1 / budget.full_bytes) * budget.full_bytes)} bytes"
        else:
            least = f"{self.smallest:.{DIGITS}g}"
        fits = self.context > self.exact_tokens
        ways = ["bits=True"] if self.bits_help and fits else []
        if self.exact_tokens and self._bare < 1:
            ways = ["fewer exact tokens", "a longer context", *ways]
            if fits:
                least += f" with {self.exact_tokens} exact tokens (sinks and window) at context={self.context}"
            else:
                exact = f"the {self.exact_tokens} exact tokens (sinks and window)"
                least += f": for less, context={self.context} must be longer than {exact}"
        return least + (f". Smaller ones are possible with {', or '.join(ways)}" if ways else "")

    @property
    def _bare(self) -> float:
        """The share of the full cache that the smallest table takes, exact tokens not counted."""
        return self.steps.least / (16 if self.bits else 1) / self.full

    def _smallest(self, unit: float | None = None) -> float:
        """The smallest budget, rounded up to a multiple of ``unit``, by default to `DIGITS` digits; at most 1."""
        least, exact = self._bare, self.exact_tokens
        if exact:
            least = (least * (self.context - exact) + exact) / self.context if self.context > exact else 1.0
        unit = unit or 10.0 ** (math.floor(math.log10(least)) + 1 - DIGITS)
        count = math.ceil(least / unit - 1e-6)
        while (found := round(count * unit, 15)) < 1 and self.table(found) is None:
            count += 1
        return min(found, 1.0)
