"""Allocations as tables: what they store, as dictionaries of either kind, and what does not fit."""

import pytest
import torch

from nestling import kv
from nestling.errors import BudgetError
from nestling.kv import Allocation
from nestling.kv.allocation.table import bits_of_ranks, block_sizes


def test_ranks_are_sixteen_bits_for_the_first_blocks():
    table = Allocation.of_ranks(torch.tensor([[8, 20]]), torch.tensor([[16, 8]]), 20)
    assert table.keys.tolist() == [[[16, 0, 0], [16, 16, 16]]] and table.values.tolist() == [[[16, 16, 0], [16, 0, 0]]]
    assert table.coordinates.tolist() == [[[8, 20]], [[16, 8]]]
    assert table.bits == 16 * (8 + 20 + 16 + 8) and table.token_bytes(2) == [2 * 52]
    assert not table.quantised and table.full == [False]
    assert Allocation.of_ranks(*[torch.full((2, 1), 20)] * 2, 20).full == [True, True]


def test_codes_of_a_last_block_take_as_much_as_those_of_a_whole_one():
    table = Allocation(torch.tensor([[[16, 4, 2]]]), torch.tensor([[[0, 0, 16]]]), 20)
    assert block_sizes(20).tolist() == [8, 8, 4]
    assert table.bits == 8 * (16 + 4 + 2) + 4 * 16 and table.token_bytes(2) == [16 + 4 + 2 + 8]
    assert table.coordinates.tolist() == [[[20]], [[4]]] and table.quantised


@pytest.mark.parametrize("rank", [0, -8, 4, 12, 17, 24])
def test_ranks_end_with_a_block(rank):
    with pytest.raises(BudgetError, match=f"multiples of 8 or the whole width, 20: got {rank}"):
        bits_of_ranks(torch.tensor([8, rank]), 20)


def test_groups_are_heads_of_equal_bits():
    table = Allocation.of_ranks(torch.tensor([[8, 16, 8, 16]]), torch.tensor([[8, 8, 8, 24]]), 24)
    low, middle, high = (16, 0, 0), (16, 16, 0), (16, 16, 16)
    assert table.groups(0) == [([3], (middle, high)), ([1], (middle, low)), ([0, 2], (low, low))]


def test_a_dictionary_is_ranks_or_bits():
    ranks = {"keys": [[8, 16]], "values": [[24, 8]]}
    table = Allocation.of_dict(ranks, 24)
    assert table.coordinates.tolist() == [ranks["keys"], ranks["values"]]
    coded = Allocation(torch.tensor([[[8, 2, 0]] * 2]), table.values, 24)
    for one in (table, coded):
        again = Allocation.of_dict(one.to_dict(), 24)
        assert torch.equal(again.stacked, one.stacked)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"keys": [[8]]},
        {"keys": [[8]], "values": None},
        {"keys": [[8], [8, 8]], "values": [[8]]},
        {"keys": [["8"]], "values": [[8]]},
        {"keys": [[8.5]], "values": [[8]]},
        {"keys": [[10**30]], "values": [[8]]},
    ],
)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(BudgetError, match="an allocation is"):
        Allocation.of_dict(table, 8)


def test_tables_must_fit():
    good = torch.full((2, 3, 1), 16)
    Allocation(good, good, 8).check(2, 3, 8)
    for keys, values, width, message in (
        (good[:1], good, 8, r"keys is \[1, 3, 1\], expected \[2, 3, 1\]"),
        (good, good.mT, 8, r"values is \[2, 1, 3\]"),
        (good, good * 2, 8, "values holds 32 bits, expected some of"),
        (good - 7, good, 8, "keys holds 9 bits"),
        (good, good, 16, "heads of 16 coordinates, expected 8"),
        (good.double(), good, 8, "keys are torch.float64, expected whole numbers"),
    ):
        with pytest.raises(BudgetError, match=message):
            Allocation(keys, values, width).check(2, 3, 8)


def test_a_table_of_another_model_is_refused(fitted):
    adapter = fitted("llama-gqa").adapter
    table = adapter.allocate(0.6)
    assert adapter.allocate(table) is table
    assert torch.equal(adapter.allocate(table.to_dict()).stacked, table.stacked)
    with pytest.raises(kv.BudgetError, match="heads of 16 coordinates, expected 24"):
        fitted("qwen3").adapter.allocate(table)
