"""Processes that work together, as launchers say."""

import pytest

from nestling.jobs.processes import processes, rank


@pytest.mark.parametrize(("environment", "expected"), [({}, (1, 0)), ({"WORLD_SIZE": "4", "RANK": "3"}, (4, 3))])
def test_count_and_number(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (processes(), rank()) == expected
