"""Measured costs as a table, as values and as a sentence."""

from __future__ import annotations

import pytest
from rich.console import Console

from vitgraph.bench.curve import costs_as_dict, costs_table, crossover_text
from vitgraph.bench.plot import plot_costs
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import CostModel

BUDGETS = [Budget(tokens, {"patch": 4 * tokens, "token": tokens}) for tokens in range(64, 64 * 41, 64)]
ROWS = tuple(b.capacity["patch"] for b in BUDGETS)
COST = CostModel(
    tuple(1000.0 + rows for rows in ROWS), (1e-4,) * len(ROWS), ROWS, (256, 8192), (5000.0, 6000.0), (True,) * len(ROWS)
)


def test_values_and_crossover() -> None:
    costs = costs_as_dict(COST, BUDGETS)
    assert costs["budgets"][0] == {
        "tokens": 64, "patches": 256, "fixed_us": 1256.0, "us_per_load": 1e-4, "measured": True,
    }  # fmt: skip
    assert costs["eager"][-1] == {"patches": 8192, "us": 6000.0}
    crossover = costs["crossover_patches"]
    assert 5000 - 256 <= 1000 + crossover - 256 <= 6000
    assert str(crossover) in crossover_text(costs)


def test_a_guess_is_not_reported() -> None:
    assert costs_as_dict(CostModel.guess(BUDGETS), BUDGETS) == {}


def test_the_table_holds_the_ends_of_the_ladder() -> None:
    console = Console(width=120, record=True, file=None)
    with console.capture() as shown:
        console.print(costs_table(COST, BUDGETS))
    text = shown.get()
    for number in ("64", "2560", "10240", f"{(1000 + 10240 + 1e-4 * 10240**2) / 1e3:.2f}"):
        assert number in text
    assert len(text.splitlines()) < 30


def test_the_plot_is_a_picture(tmp_path) -> None:
    PIL = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    path = tmp_path / "costs.png"
    plot_costs(costs_as_dict(COST, BUDGETS), path, "a tower")
    with PIL.open(path) as picture:
        assert picture.size == (1120, 630)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
