"""Rank search by measurement: the paper's greedy descent, and how far the drop costs are to be trusted.

Both measure the KL to the full model on calibration texts, at ranks that are cut by masks (see
`nestling.kv.simulation.student`). What they find serves every budget and is kept in the adapter: nothing is searched
when a cache is made.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from nestling.data.windows import token_windows
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.allocate import ENERGY, SIDES, blended, by_block, by_rank, halvable, worth
from nestling.kv.allocation.steps import fill
from nestling.kv.allocation.table import first_blocks
from nestling.kv.cache.rule import check_length
from nestling.kv.calibration.config import SearchConfig
from nestling.kv.calibration.sensitivity import LOGITS, some
from nestling.kv.integration.attach import attach, input_device, leaves_as_found, longest_text, text_config
from nestling.kv.integration.modes import in_default_mode
from nestling.kv.simulation.student import Student
from nestling.options import flag

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of equal ranks, that are tried in a blend
BUDGETS = (0.5, 0.25)  # of the ranks, at which they are tried
BATCH_TOKENS = 2048  # of one forward pass


class KLMeter:
    """Mean KL to the full model, in nats per token, of tables of ranks or bits; the full model is read once.

    Where the vocabulary is large, the KL is of some of the tokens, always the same.

    Attributes:
        forwards: texts that were read compressed so far, each counted as one forward pass.
    """

    def __init__(self, model, adapter: KVAdapter, windows: Tensor, sinks: int, window: int, teacher=None):
        """``windows``: token ids ``[n, T]``; ``teacher``: that of another meter on the same ones, if there is one."""
        self.student = Student(model, adapter, sinks=sinks, window=window).eval()
        self.windows = windows.to(input_device(model))
        self.forwards = 0
        generator = torch.Generator(self.windows.device).manual_seed(0)
        self.tokens = some(self.windows.shape[1], LOGITS // text_config(model).vocab_size, generator)
        with torch.no_grad():
            self.teacher = teacher or [self.student.teacher(w[None]) for w in self.windows]

    @torch.no_grad()
    def __call__(self, tables: Tensor) -> Tensor:
        """KL ``[n]`` of allocations, stacked: ``[n, 2, L, Hkv, blocks]``."""
        tables = tables.to(self.windows.device)
        total = torch.zeros(len(tables), dtype=torch.float64)
        for ids, teacher in zip(self.windows, self.teacher, strict=True):
            parts = tables.split(max(1, BATCH_TOKENS // len(ids)))
            kl = [self.student.divergence(ids.expand(len(part), -1), part, teacher, self.tokens) for part in parts]
            total += torch.cat(kl).double().cpu()
            self.forwards += len(tables)
        return total / len(self.windows)


@leaves_as_found
@in_default_mode
def search(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    adapter: KVAdapter,
    config: SearchConfig | None = None,
    *,
    progress: bool = True,
) -> KVAdapter:
    """Search ranks on texts, best those of the later use; the result is an adapter for every budget.

    ``blend`` moves the ranks that follow from the drop costs towards equal ones, by the share that is best when it is
    measured: drop costs add up what single coordinates are worth, and ranks that are cut too unevenly cost more than
    that. 10 measurements, at half and a quarter of the ranks.

    ``greedy`` is Algorithm 1 of arXiv 2410.14731: from full ranks on, lower the one rank of all layers, heads and
    sides by D / 8 that leaves the smallest KL. It measures every rank before every step, 2 L Hkv + 1 forward passes a
    text for one step of one rank, which is what ``per_sweep=1`` does. With more, that many ranks are lowered at a
    time, and only twice as many are measured: those just lowered, and those that cost least when they were last
    measured (costs rise as the others are lowered, so that old ones are lower bounds, more or less).

    What was found is what the adapter's caches use from then on; ``allocation=`` names any other.

    Args:
        model: the causal LM of the adapter.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``.
        config: the method, and how much is measured.

    Returns:
        A copy of the adapter; ``info["search"]`` has the method and the number of forward passes.

    Raises:
        OptionError: if an option has a value that it cannot have.
        TextTooShortError, AdapterError.
    """
    config, progress = SearchConfig.of(config), flag("progress", progress)
    adapter.check(model)
    length = min(config.length, longest_text(model) or config.length)
    check_length(length, config.sinks, config.window)
    attach(model)
    ids = torch.stack(list(token_windows(tokenizer, texts, length, limit=config.windows)))
    training = model.training
    with progress_bar(progress) as bar:
        try:
            meter = KLMeter(model.eval(), adapter, ids, config.sinks, config.window)
            if config.method == "greedy":
                path, chosen = greedy(meter, adapter, config.per_sweep, config.lowest, bar), {}
            else:
                path, share = blend(meter, adapter, bar)
                chosen = {"equal": share}
        finally:
            model.train(training)
    measured = {"method": config.method, "forwards": meter.forwards, "windows": len(ids), "length": length, **chosen}
    return replace(adapter, paths={**adapter.paths, config.method: path}, info={**adapter.info, "search": measured})


def greedy(meter: KLMeter, adapter: KVAdapter, per_sweep: int, lowest: float, bar) -> Tensor:
    """The blocks of every rank in the order in which they are worth keeping, ``[2, L, Hkv, blocks]``: most last.

    Blocks that were never taken away, or that lie below D / 8, come first, among each other by drop cost.
    """
    drop_cost = by_block(torch.stack([adapter.drop_cost[side] for side in SIDES]).double())
    shape, blocks = drop_cost.shape[:3], drop_cost.shape[3]
    step = max(1, blocks // 8)
    kept = torch.full(shape, blocks)  # blocks of each rank
    order = torch.full(drop_cost.shape, torch.inf, dtype=torch.float64)
    rise = torch.full(shape, -torch.inf)  # of the KL by lowering a rank, as last measured; unknown first
    removed = 0
    task = bar.add_task("greedy search", total=int((1 - lowest) * kept.sum()))
    while kept.sum() > lowest * blocks * kept.numel() and (kept > step).any():
        units = (kept > step).nonzero()
        if per_sweep > 1:
            known = rise[tuple(units.T)]
            units = units[known.argsort()[: max(2 * per_sweep, int(known.isinf().sum()))]]
        places = tuple(units.T)
        lowered = kept.repeat(len(units) + 1, 1, 1, 1)  # the last one stays as it is
        lowered[(torch.arange(len(units)), *places)] -= step
        kl = meter(first_blocks(lowered, blocks))
        rise[places] = (kl[:-1] - kl[-1]).float()
        for index in kl[:-1].argsort()[:per_sweep].tolist():
            place = tuple(units[index].tolist())
            for _ in range(step):
                kept[place] -= 1
                order[(*place, int(kept[place]))] = removed
                removed += 1
            bar.advance(task, step)
            rise[place] = -torch.inf
    return torch.where(order.isinf(), removed + 1 + drop_cost / drop_cost.max(), order)


def blend(meter: KLMeter, adapter: KVAdapter, bar) -> tuple[Tensor, float]:
    """The blocks of every rank between the order of their drop costs and that of equal ranks, and the share of the
    latter: of `SHARES` the one with the smallest geometric mean of the KLs at `BUDGETS`."""
    by_cost, width = worth(adapter, ENERGY), adapter.shape[2]
    budgets = [halvable(budget, width) for budget in BUDGETS]
    means = []
    for share in bar.track(SHARES, description="blends"):
        steps = fill(by_rank(blended(by_cost, width, share), width), width)
        means.append(meter(steps.tables(budgets)).clamp_min(1e-30).log().mean())
    chosen = SHARES[int(torch.stack(means).argmin())]
    return blended(by_cost, width, chosen), chosen
