"""Options of the cache wing that cannot be: refused before anything is computed, by an error that shows them."""

from importlib import import_module

import pytest
import torch

from nestling import kv
from nestling.errors import BudgetError, NestlingError, OptionError
from nestling.kv.cache.window import Window
from nestling.kv.evaluation.tasks import passkey_prompts
from nestling.options import shown

from .families import nested_cache

NAN, INF = float("nan"), float("inf")
NOT_WHOLE = (2.5, NAN, INF, -INF, None, "8", b"8", True, [8], torch.ones(2), 10**30)
NOT_POSITIVE = (0, -1, -(10**9))
NOT_NUMBERS = (NAN, INF, -INF, "0.5", True, [0.5], 1j)
NOT_FLAGS = (0, 1, 4, "yes", "False", None, [True])
NOT_SHARES = (0, -0.5, 1.5, 50, *NOT_NUMBERS)


def cases(**wrong):
    """Name and value of each."""
    return [
        pytest.param(name, value, id=f"{name}-{shown(value)}") for name, values in wrong.items() for value in values
    ]


def refused(name: str, value, call) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert name in str(caught.value) and shown(value) in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    cases(
        sinks=(-1, *NOT_WHOLE[:-1]),
        window=(-64, *(value for value in NOT_WHOLE[:-1] if value is not None)),
        context=(*NOT_POSITIVE, *NOT_WHOLE[:-1]),
        keep_tokens=(None, *NOT_SHARES),
        budget=("", "x", "0%", "101%", *NOT_SHARES[:4], *NOT_SHARES[4:6], True, [0.5], "0MiB", "-1MiB"),
        limit=(0, -1, *NOT_NUMBERS, 1e300, "0MiB", "-1MiB", "0.5", "25%", 2**63),
        allocation=(1, True, ["energy"], b"energy"),
        quantise=NOT_FLAGS,
        exact_prompt=NOT_FLAGS,
        dtype=(
            torch.int8,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
            "bf16",
            "int8",
            16,
            float,
        ),
    ),
)
def test_caches(fitted, name, value):
    case = fitted("llama-gqa")
    options = {"budget": 0.9, "window": 0, name: value}
    refused(name, value, lambda: nested_cache(case.model, case.adapter, **options))


def test_a_model_is_not_switched_by_a_call_that_fails(fitted):
    case = fitted("llama-gqa")
    for options in ({"budget": 0.9, "sinks": -1}, {"budget": 0.01}, {"limit": 1}, {"budget": {"keys": []}}):
        with pytest.raises(NestlingError):
            nested_cache(case.stock, case.adapter, **options)
        assert case.stock.config._attn_implementation != "nestling"


@pytest.mark.parametrize("value", [None, 0, -0.5, 1.5, True, float("nan"), "x", "64MiB", [0.5]])
def test_allocations(fitted, value):
    refused("budget", value, lambda: fitted("llama-gqa").adapter.allocate(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_tables_are_of_whole_numbers(fitted, dtype):
    case = fitted("llama-gqa")
    layers, heads, width = case.adapter.shape
    bits = torch.full((layers, heads, width // 8), 8, dtype=dtype)
    with pytest.raises(BudgetError, match=str(dtype)):
        nested_cache(case.model, case.adapter, kv.Allocation(bits, bits, width))


@pytest.mark.parametrize("value", [0, -0.1, 0.99, 50, *NOT_NUMBERS[:3], True, None, "x", "90KiB"])
def test_shrinking(fitted, ids, value):
    case = fitted("llama-gqa")
    cache = nested_cache(case.model, case.adapter, 0.9, window=0)
    refused("budget", value, lambda: cache.shrink(value))


def test_saving(fitted, tmp_path):
    for value in NOT_FLAGS:
        refused(
            "half", value, lambda value=value: fitted("llama-gqa").adapter.save_pretrained(tmp_path / "a", half=value)
        )
        refused(
            "private", value, lambda value=value: fitted("llama-gqa").adapter.push_to_hub("me/mine", private=value)
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def idle(monkeypatch, fitted):
    """A model that must not be run."""
    case = fitted("llama-gqa")
    monkeypatch.setattr(type(case.model), "forward", lambda *_, **__: pytest.fail("the model was run"))
    for module in ("calibration.fit", "calibration.search", "evaluation.evaluate"):
        monkeypatch.setattr(
            import_module(f"nestling.kv.{module}"), "token_windows", lambda *_, **__: pytest.fail("text was read")
        )
    return case


@pytest.mark.parametrize(
    "name, value",
    cases(
        **dict.fromkeys(
            ("tokens", "length", "batch_tokens", "sensitivity_windows", "sensitivity_length"),
            (*NOT_POSITIVE, *NOT_WHOLE[:-1]),
        ),
        **dict.fromkeys(("sinks", "window"), (-1, *NOT_WHOLE[:-1])),
        seed=(-1, 2**32, *NOT_WHOLE),
        progress=NOT_FLAGS,
        basis=("best", "PCA", None, 3, b"pca"),
    ),
)
def test_calibration(idle, ids, name, value):
    progress = value if name == "progress" else False
    changes = {} if name == "progress" else {name: value}
    refused(
        name,
        value,
        lambda: kv.fit(
            idle.model, None, ids, kv.FitConfig(**{"length": 64, "window": 0, **changes}), progress=progress
        ),
    )


@pytest.mark.parametrize("options", [{"sensitivity_length": 40}, {"window": 50}, {"sinks": 46}, {"length": 29}])
def test_calibration_needs_more_than_the_exact_tokens(fitted, ids, monkeypatch, options):
    case = fitted("llama-gqa")
    calibrate = import_module("nestling.kv.calibration.fit")
    monkeypatch.setattr(calibrate, "collect_moments", lambda *_, **__: pytest.fail("it was calibrated"))
    name, value = next(iter(options.items()))
    with pytest.raises(OptionError, match=f"{name}={value}"):
        kv.fit(case.model, None, ids, kv.FitConfig(**{"length": 64, "window": 25, "sinks": 4, **options}))


@pytest.mark.parametrize(
    "name, value",
    cases(
        **dict.fromkeys(("windows", "length", "per_sweep"), (*NOT_POSITIVE, *NOT_WHOLE[:-1])),
        **dict.fromkeys(("sinks", "window"), (-1, *NOT_WHOLE)),
        lowest=(-0.1, 1, 2, None, *NOT_NUMBERS),
        progress=NOT_FLAGS,
        method=("best", None, 1),
    ),
)
def test_searching(idle, ids, name, value):
    def search():
        progress = value if name == "progress" else False
        changes = {} if name == "progress" else {name: value}
        config = kv.SearchConfig(**{"length": 64, "window": 0, **changes})
        kv.search(idle.model, None, ids, idle.adapter, config, progress=progress)

    refused(name, value, search)


MEASURING = {
    "windows": (-1, *NOT_WHOLE[:-1]),
    **dict.fromkeys(("length", "chunk"), (*NOT_POSITIVE, *NOT_WHOLE[:-1])),
    "passkey": (5, None, "100", [0], [-1], [2.5], [True], ["100"]),
    "progress": NOT_FLAGS,
}


@pytest.mark.parametrize("name, value", cases(**MEASURING))
def test_measuring(idle, ids, name, value):
    shown_value = value[0] if isinstance(value, list) and name == "passkey" else value
    progress = value if name == "progress" else False
    changes = {} if name == "progress" else {name: value}

    def config():
        return kv.EvalConfig(**{"length": 64, "budgets": [0.9], "window": 0, **changes})

    refused(name, shown_value, lambda: kv.compare(idle.model, None, ids, [], config(), progress=progress))
    refused(name, shown_value, lambda: kv.evaluate(idle.model, None, ids, idle.adapter, config(), progress=progress))


@pytest.mark.parametrize("budgets", [[], 0.5, [0], [0.5, 2], ["x"], [NAN], "50%,64MiB", [0.5, "50%"], None, [None]])
def test_measuring_at_budgets(idle, ids, budgets):
    with pytest.raises(BudgetError):
        kv.evaluate(idle.model, None, ids, idle.adapter, kv.EvalConfig(budgets=budgets, length=64, window=0))


@pytest.mark.parametrize("value", [*NOT_POSITIVE, *NOT_WHOLE[:-1]])
def test_prompts(value):
    refused("passkey", value, lambda: passkey_prompts(None, value))


def test_numbers_of_other_kinds_are_numbers(fitted, ids):
    """What NumPy and torch count with, and floats without a fraction."""
    import numpy as np

    case = fitted("llama-gqa")
    one = nested_cache(
        case.model, case.adapter, np.float64(0.6), sinks=np.int64(2), window=3.0, context=torch.tensor(200)
    )
    other = nested_cache(case.model, case.adapter, "60%", sinks=2, window=3, context=200)
    assert torch.equal(one.allocation.stacked, other.allocation.stacked) and one.budget == other.budget == 0.6
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.exact.sinks, a.exact.window) == (b.exact.sinks, b.exact.window) == (2, Window(3))
        assert all(type(size) is int for size in (a.exact.sinks, a.exact.window.least))


@pytest.mark.parametrize("length, window, exact", [(1, 64, 83), (40, 64, 83), (83, 64, 83), (27, None, 27)])
def test_windows_no_longer_than_the_exact_tokens_are_refused_by_their_own_name(idle, ids, length, window, exact):
    config = kv.EvalConfig(budgets=[0.9], length=length, window=window)
    with pytest.raises(OptionError, match=f"length={length} .* {exact} exact tokens"):
        kv.evaluate(idle.model, None, ids, idle.adapter, config)


@pytest.mark.parametrize("given", [0.001, "0.1%", "3%"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_training_at_budgets_out_of_reach(idle, ids, tmp_path, given, calibrated):
    with pytest.raises(BudgetError, match=f"budgets={given!r} is below the smallest possible, 0.5"):
        adapter = idle.adapter if calibrated else None
        config = kv.TrainConfig(output_dir=tmp_path / "out", budgets=[0.9, given], window=0)
        kv.train(idle.model, None, ids, adapter, config)
