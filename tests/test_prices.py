"""Facts about what models cost: the table, and what is made of it."""

from __future__ import annotations

import csv
import datetime
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm import prices
from rlm.client import ModelInfo, Price, Usage

TEXT = resources.files("rlm").joinpath("prices.csv").read_text("utf-8")
HEADER = "\n".join(line for line in TEXT.splitlines() if line.startswith("#"))
ROWS = list(csv.DictReader(line for line in TEXT.splitlines() if not line.startswith("#")))
NAMES = [f"{row['provider']} {row['model']}" for row in ROWS]


def price_of(provider: str, model: str) -> Price:
    price = prices.lookup(provider, model).price
    assert price is not None
    return price


def test_the_table_says_where_it_is_from_and_when_it_was_read() -> None:
    assert re.search(r"litellm \d+\.\d+\.\d+", HEADER)
    found = re.search(r"read on (\d{4}-\d{2}-\d{2})", HEADER)
    assert found
    assert datetime.date.fromisoformat(found[1]) > datetime.date(2026, 1, 1)


def test_the_table_has_rows_of_every_provider_whose_prices_a_client_uses() -> None:
    assert {row["provider"] for row in ROWS} == {"openai", "anthropic", "gemini"}


def test_no_model_is_listed_twice_and_the_rows_are_in_order() -> None:
    assert len(NAMES) == len(set(NAMES))
    for provider in {row["provider"] for row in ROWS}:
        models = [row["model"] for row in ROWS if row["provider"] == provider]
        assert models == sorted(models)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_row_makes_sense(row: dict[str, str]) -> None:
    info = prices.lookup(row["provider"], row["model"])
    assert info.price is not None
    for price in filter(None, (info.price, info.price.long)):
        assert 0 <= price.input <= price.output
        assert price.cached is None or 0 <= price.cached <= price.input
        assert price.cache_write is None or price.cache_write >= price.input
        assert price.output < 10_000
    assert (info.price.above is None) == (info.price.long is None)
    if info.price.long is not None and info.price.above is not None:
        assert info.price.long.input >= info.price.input
        assert info.price.long.output >= info.price.output
        assert info.context_window is None or info.price.above < info.context_window
    assert info.context_window is None or info.context_window >= 1000
    assert info.max_output is None or info.max_output >= 1000
    assert row["temperature"] in ("", "no")
    assert (info.supports is None) == (row["temperature"] == "")


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "no-such-model"), ("openai", ""), ("nobody", "gpt-4o"),
                            (None, "gpt-4o"), ("anthropic", "gpt-4o"), ("openai", "gpt-4o-20"),
                            ("openai", "gpt-4o-preview")],
)  # fmt: skip
def test_of_a_model_that_is_not_listed_nothing_is_known(provider: str | None, model: str) -> None:
    assert prices.lookup(provider, model) == ModelInfo()


@pytest.mark.parametrize(
    ("provider", "model", "listed"),
    [
        ("openai", "gpt-4o-2024-08-06", "gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("gemini", "models/gemini-2.5-pro", "gemini-2.5-pro"),
        ("gemini", "gemini/gemini-2.5-pro", "gemini-2.5-pro"),
        ("openai", "openai/gpt-4o-mini", "gpt-4o-mini"),
    ],
)
def test_a_dated_or_prefixed_name_is_the_model(provider: str, model: str, listed: str) -> None:
    assert prices.lookup(provider, model) == prices.lookup(provider, listed) != ModelInfo()


def test_a_model_that_takes_no_temperature_supports_all_else() -> None:
    supports = prices.lookup("anthropic", "claude-opus-5").supports
    assert supports == {"stop", "seed", "schema", "stream"}


# --- what a call costs ---------------------------------------------------------------------------


def test_a_call_costs_what_it_read_and_wrote() -> None:
    assert Price(2, 8).cost(Usage(1_000_000, 500_000)) == pytest.approx(6)


def test_what_was_cached_costs_its_own_price() -> None:
    usage = Usage(1_000_000, 0, cached_tokens=600_000, cache_write_tokens=100_000)
    assert Price(10, 0, cached=1, cache_write=12.5).cost(usage) == pytest.approx(3 + 0.6 + 1.25)


def test_what_was_cached_costs_as_much_as_the_rest_where_no_other_price_is_known() -> None:
    usage = Usage(1_000_000, 0, cached_tokens=600_000, cache_write_tokens=100_000)
    assert Price(10, 0).cost(usage) == pytest.approx(10)


@pytest.mark.parametrize(("tokens", "cost"), [(200_000, 0.2), (200_001, 0.400002)])
def test_above_its_tier_the_whole_call_is_dearer(tokens: int, cost: float) -> None:
    assert Price(1, 0, above=200_000, long=Price(2, 0)).cost(Usage(tokens, 0)) == pytest.approx(cost)


def test_a_row_with_tiers_has_them() -> None:
    price = price_of("gemini", "gemini-2.5-pro")
    assert (price.above, price.input, price.output) == (200_000, 1.25, 10)
    assert price.long == Price(2.5, 15, 0.25)
    assert price.cost(Usage(300_000, 1000)) == pytest.approx(0.3 * 2.5 + 0.015)


def test_more_cached_than_was_read_costs_no_less_than_nothing() -> None:
    assert Price(10, 0, cached=1).cost(Usage(10, 0, cached_tokens=1_000_000)) == pytest.approx(1)


@given(
    row=st.sampled_from(ROWS), read=st.integers(0, 10**6), wrote=st.integers(0, 10**6), share=st.floats(0, 1)
)
def test_a_cache_never_makes_a_call_dearer(row: dict[str, str], read: int, wrote: int, share: float) -> None:
    price = price_of(row["provider"], row["model"])
    plain = price.cost(Usage(read, wrote))
    assert 0 <= price.cost(Usage(read, wrote, cached_tokens=int(read * share))) <= plain + 1e-9
