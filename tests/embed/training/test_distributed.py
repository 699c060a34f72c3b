"""StarbucksLoss within DistributedDataParallel: the reducer of torch itself, alone and with a second process."""

import copy
import gc
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer import losses
from torch.nn.parallel import DistributedDataParallel

from nestling.embed.model.parts import Encoder
from nestling.embed.training.arguments import trains_unread
from nestling.embed.training.loss import StarbucksLoss

from ..families import sentence_model, some_texts

CUPS = "1x8,2x16,4x32"
Result = TypeVar("Result")


def in_group(run: Callable[[], Result], folder, rank=0, size=1) -> Result:
    """What ``run`` returns, run within a process group.

    The reducers that it makes are gone before the group is: one that outlives it is the last to hold it, and may wait
    for gloo's thread with Python's lock held, for which that thread waits.
    """
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        return run()
    finally:
        gc.collect()
        dist.destroy_process_group()


def starbucks(model, cached: bool, **starbucks_options) -> StarbucksLoss:
    options = {"mini_batch_size": 2} if cached else {}
    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    loss = StarbucksLoss(inner, kind(inner, **options), CUPS, **starbucks_options)
    loss.model = loss.loss.model = model  # as SentenceTransformerTrainer does once it has wrapped the model
    return loss


def batch(model, seed: int):
    return [model.preprocess(some_texts(4, seed)), model.preprocess(some_texts(4, seed + 100))]


def gradients(loss: StarbucksLoss, features, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(list(loss(features, None).values())).sum().backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradients_in_one_process(family, options, cached, encoder, tmp_path):
    """Over several steps: a reducer that was left half done complains, or hangs, in the next one."""
    model = encoder(family)
    assert trains_unread(Encoder.of(model)) == (family == "bert")
    if not options:  # no weights that nothing reads
        model[0].model.pooler = None
        assert not trains_unread(Encoder.of(model))
    plain = starbucks(copy.deepcopy(model), cached)

    def steps() -> None:
        wrapped = DistributedDataParallel(model, **options)
        loss = starbucks(wrapped, cached)
        for step in range(3):
            features = batch(model, step)
            expected = gradients(plain, features, plain.model)
            found = gradients(loss, features, wrapped)
            assert found.keys() >= expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)

    in_group(steps, tmp_path)


def _train(rank: int, folder: str, backbone: str) -> None:
    torch.set_num_threads(1)

    def run() -> dict:
        found = {}
        for cached in (False, True):
            model = sentence_model(backbone)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            loss = starbucks(wrapped, cached)
            for step in range(2):
                found[cached] = gradients(loss, batch(model, 10 * step + rank), wrapped)
        return found

    torch.save(in_group(run, folder, rank, 2), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_average_their_gradients(backbones, tmp_path):
    folder = str(backbones("modernbert"))
    torch.multiprocessing.spawn(_train, (str(tmp_path), folder), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = sentence_model(folder)
    loss = starbucks(model, cached=False)
    alone = [gradients(loss, batch(model, 10 + rank), model) for rank in (0, 1)]
    for cached in (False, True):
        for name in alone[0]:
            torch.testing.assert_close(first[cached][name], second[cached][name], rtol=0, atol=0)
            mean = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(first[cached][name], mean, rtol=1e-4, atol=1e-5)


def _train_gathered(rank: int, folder: str, backbone: str) -> None:
    torch.set_num_threads(1)

    def run() -> dict:
        found = {}
        for cached in (False, True):
            model = sentence_model(backbone)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            loss = starbucks(wrapped, cached, gather_across_devices=True)
            found[cached] = gradients(loss, batch(model, rank), wrapped)
        model = sentence_model(backbone)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        loss = StarbucksLoss(model, None, CUPS, teacher=torch.eye(8), gather_across_devices=True)
        loss.model = wrapped
        model.zero_grad()
        labels = torch.arange(4 * rank, 4 * rank + 4)[:, None]
        torch.stack(list(loss(batch(model, rank)[:1], labels).values())).sum().backward()
        found["alone"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found

    torch.save(in_group(run, folder, rank, 2), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_that_gather_are_one_process(backbones, tmp_path):
    """In-batch negatives, similarity rows, and the rows of a teacher are those of both processes' texts."""
    folder = str(backbones("bert"))
    torch.multiprocessing.spawn(_train_gathered, (str(tmp_path), folder), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    texts = [[some_texts(4, rank + shift) for rank in (0, 1)] for shift in (0, 100)]
    model = sentence_model(folder)
    columns = [model.preprocess(first + second) for first, second in texts]
    expected = {}
    for cached in (False, True):
        expected[cached] = gradients(starbucks(model, cached), columns, model)
    loss = StarbucksLoss(model, None, CUPS, teacher=torch.eye(8))
    model.zero_grad()
    torch.stack(list(loss(columns[:1], torch.arange(8)[:, None]).values())).sum().backward()
    expected["alone"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for kind, wanted in expected.items():
        for name, gradient in wanted.items():
            for rank in (0, 1):
                torch.testing.assert_close(found[rank][kind][name], gradient, rtol=1e-4, atol=1e-5)


def test_texts_are_not_gathered_twice(encoder):
    model = encoder()
    inner = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    with pytest.raises(ValueError, match="gathered twice"):
        StarbucksLoss(model, inner, CUPS, gather_across_devices=True)
