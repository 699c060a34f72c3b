"""Two thousand random damages to files of every kind: each is a typed error that names the file, or does not matter.

The seed is printed, and `NESTLING_SEED` sets it; `NESTLING_MUTATIONS` says how many. A case is repeated by its number
and the seed.
"""

import os
import random
import secrets
import signal
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from nestling.errors import NestlingError

from .artefacts import Artefact, artefacts
from .hostile import copied, damage
from .watched import watched

COUNT = int(os.environ.get("NESTLING_MUTATIONS", 2000))


def one(kinds: dict[str, Artefact], expected: dict[str, Any], seed: int, number: int, place: Path, tell: Any) -> str:
    """Damage one artefact and read it."""
    rng = Random(f"{seed} {number}")
    name = rng.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]
    kind = kinds[name]
    folder = copied(kind.folder, place / f"case{os.getpid()}")
    path, how = damage(folder, rng)
    case = f"seed {seed}, case {number}: {name}, {path.relative_to(folder)}, {how}"
    tell(case)
    torch.manual_seed(0)
    random.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.read(folder)
    except NestlingError as error:
        return "refused" if folder.name in str(error) or path.name in str(error) else f"unnamed: {case}: {error}"
    except BaseException as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/nestling/" in frame.filename][-1:]
        where = "".join(f"{frame.filename}:{frame.lineno}" for frame in own)
        return f"raw: {case}: {type(error).__name__}: {str(error)[:200]} at {where}"
    if kind.sealed(path.name) and not same(found, expected[name]):
        return f"different: {case}"
    return "read"


def same(found: Any, expected: Any) -> bool:
    """Whether what was read is what is expected; nothing is where something was passed over, which is right."""
    if found == [] or found is None:
        return True
    return len(found) == len(expected) and all(
        one.shape == other.shape and one.equal(other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="how much memory is used is told by Linux")
def test_every_damage_is_told_of_or_does_not_matter(tmp_path, capsys):
    seed = int(os.environ.get("NESTLING_SEED", secrets.randbelow(10**6)))
    kinds = artefacts(tmp_path)
    expected = {name: kind.read(copied(kind.folder, tmp_path / "case")) for name, kind in kinds.items()}
    only = os.environ.get("NESTLING_CASE")
    numbers = list(range(COUNT)) if only is None else [int(only)]
    found = watched(numbers, lambda number, tell: one(kinds, expected, seed, number, tmp_path, tell))
    bad = [said for said in found if said not in ("refused", "read")]
    with capsys.disabled():
        print(f"\nseed {seed}: {Counter(said.split(':')[0] for said in found)}")  # noqa: T201
    assert not bad, f"{len(bad)} of {len(numbers)}:\n" + "\n".join(bad)
    assert found.count("refused") > len(found) / 3 or only is not None


@pytest.mark.slow
def test_what_hangs_takes_memory_or_dies_is_told_of(tmp_path):
    """The watch itself: it must not be fooled, nor end with what it watches."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def run(case: str, tell) -> str:
        tell("a case")
        if case == "waits":
            pipe.read_bytes()
        if case == "works":
            while True:
                pass
        if case == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "grows":
            return str(len(b"x" * 1_200_000_000))
        return case

    cases = ["fine", "waits", "fine", "works", "dies", "grows", "fine"]
    found = watched(cases, run)
    assert [said.split(":")[0] for said in found] == ["fine", "hang", "fine", "hang", "died", "memory", "fine"]
