"""From an adapter to the steps of one of its allocations: the tables of all budgets."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.errors import AdapterError, BudgetError
from nestling.kv.allocation.bits import bit_steps, losses
from nestling.kv.allocation.ranks import drop_cost_gains, gain_steps, uniform_steps
from nestling.kv.allocation.steps import Steps
from nestling.options import shown

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

SIDES = ("key", "value")
WITHOUT_BITS = "this adapter has no quantisation costs and steps: calibrate or train it again"


def losses_of(adapter: "KVAdapter") -> Tensor:
    """What blocks lose at each number of bits by the costs of an adapter that quantises; see `losses`."""
    dropped, quantised = (
        torch.stack([costs[side] for side in SIDES]) for costs in (adapter.drop_cost, adapter.quantisation_cost)
    )
    return losses(dropped, quantised, torch.tensor([adapter.info["errors"][side] for side in SIDES]))


def steps_of(adapter: "KVAdapter", allocation: str | None = None, *, bits: bool = False) -> Steps:
    """The steps of a named allocation of an adapter, of ranks or of bits: the tables of all budgets.

    Raises:
        AdapterError: for bits of an adapter that was made without quantisation costs.
        BudgetError: for unknown allocations.
    """
    layers, heads, width = adapter.shape
    if bits:
        if not adapter.quantises:
            raise AdapterError(WITHOUT_BITS)
        if allocation not in (None, "energy"):
            raise BudgetError(f"allocation of bits must be 'energy' or a bit table, got {shown(allocation)}")
        return bit_steps(losses_of(adapter))
    allocation = allocation or adapter.allocation
    if allocation == "uniform":
        return uniform_steps(layers, heads, width)
    if allocation == "energy":
        return gain_steps(drop_cost_gains(adapter.drop_cost["key"], adapter.drop_cost["value"]), width)
    if isinstance(allocation, str) and allocation in adapter.paths:
        return gain_steps(adapter.paths[allocation].double(), width)
    known = ", ".join(map(repr, ("energy", "uniform", *adapter.paths)))
    raise BudgetError(f"allocation must be {known} or a rank table, got {shown(allocation)}")
