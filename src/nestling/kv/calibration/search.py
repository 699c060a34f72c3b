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
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.ranks import STEP, blended, by_gains, drop_cost_gains, edges, halvable
from nestling.kv.cache.exact import check_length
from nestling.kv.calibration.config import SearchConfig
from nestling.kv.integration.attach import attach, input_device, leaves_as_found, text_config
from nestling.kv.integration.modes import in_default_mode
from nestling.kv.simulation.student import Student
from nestling.options import flag

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of equal ranks, that are tried in a blend
BUDGETS = (0.5, 0.25)  # of the ranks, at which they are tried
BATCH_TOKENS = 2048  # of one forward pass


class KLMeter:
    """Mean KL to the full model, in nats per token, of tables of ranks or bits; the full model is read once.

    Attributes:
        forwards: texts that were read compressed so far, each counted as one forward pass.
    """

    def __init__(self, model, adapter: KVAdapter, windows: Tensor, sinks: int, window: int, teacher=None):
        """``windows``: token ids ``[n, T]``; ``teacher``: that of another meter on the same ones, if there is one."""
        self.student = Student(model, adapter, sinks=sinks, window=window).eval()
        self.windows = windows.to(input_device(model))
        self.forwards = 0
        with torch.no_grad():
            self.teacher = teacher or [self.student.teacher(w[None]) for w in self.windows]

    @torch.no_grad()
    def __call__(self, tables: Tensor) -> Tensor:
        """KL ``[n]`` of rank tables ``[n, 2, L, Hkv]``, or of bits of blocks ``[n, 2, L, Hkv, blocks]``."""
        tables = tables.to(self.windows.device)
        total = torch.zeros(len(tables), dtype=torch.float64)
        for ids, teacher in zip(self.windows, self.teacher, strict=True):
            parts = tables.split(max(1, BATCH_TOKENS // len(ids)))
            kl = [self.student.divergence(ids.expand(len(part), -1), part, teacher) for part in parts]
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
    length = min(config.length, getattr(text_config(model), "max_position_embeddings", None) or config.length)
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
    """The steps of every rank in the order in which they are worth keeping, ``[2, L, Hkv, steps]``: larger is longer.

    Steps that were never taken away, or that lie below D / 8, come first, among each other by drop cost.
    """
    layers, heads, width = adapter.shape
    bounds = edges(width)
    step = max(STEP, width // 8)
    ranks = torch.full((2, layers, heads), width)
    gains = torch.full((2, layers, heads, len(bounds) - 1), torch.inf, dtype=torch.float64)
    rise = torch.full((2, layers, heads), -torch.inf)  # of the KL by lowering a rank, as last measured; unknown first
    removed = 0
    task = bar.add_task("greedy search", total=int((1 - lowest) * ranks.sum()))
    while ranks.sum() > lowest * width * ranks.numel() and (ranks > step).any():
        units = (ranks > step).nonzero()
        if per_sweep > 1:
            known = rise[tuple(units.T)]
            units = units[known.argsort()[: max(2 * per_sweep, int(known.isinf().sum()))]]
        places = tuple(units.T)
        lowered = ranks[places] - step
        tables = ranks.repeat(len(units) + 1, 1, 1, 1)  # the last one stays as it is
        tables[(torch.arange(len(units)), *places)] = lowered
        kl = meter(tables)
        rise[places] = (kl[:-1] - kl[-1]).float()
        for index in kl[:-1].argsort()[:per_sweep].tolist():
            place, rank = tuple(units[index].tolist()), int(lowered[index])
            taken = [i for i, low in enumerate(bounds[:-1]) if rank <= low < int(ranks[place])]
            for i in reversed(taken):
                gains[(*place, i)] = removed
                removed += 1
            bar.advance(task, int(ranks[place]) - rank)
            ranks[place], rise[place] = rank, -torch.inf
    drop_cost = torch.stack([adapter.drop_cost[s] for s in SIDES]).double()
    rest = torch.stack([drop_cost[..., a:b].sum(-1) for a, b in zip(bounds, bounds[1:], strict=False)], -1)
    return torch.where(gains.isinf(), removed + 1 + rest / rest.max(), gains)


def blend(meter: KLMeter, adapter: KVAdapter, bar) -> tuple[Tensor, float]:
    """The steps of every rank between the order of their drop costs and that of equal ranks, and the share of the
    latter: of `SHARES` the one with the smallest geometric mean of the KLs at `BUDGETS`."""
    gains = drop_cost_gains(adapter.drop_cost["key"], adapter.drop_cost["value"])
    elements = [halvable(budget, adapter.shape[2]) * adapter.full_elements for budget in BUDGETS]
    means = []
    for share in bar.track(SHARES, description="blends"):
        path = blended(gains, share)
        tables = torch.stack([by_gains(path, n, adapter.shape[2]).stacked for n in elements])
        means.append(meter(tables).clamp_min(1e-30).log().mean())
    chosen = SHARES[int(torch.stack(means).argmin())]
    return blended(gains, chosen), chosen
