"""What models cost, as far as that is known: a dated table, and what the user says.

The table is `prices.csv` beside this file. A model that is not in it has no price: its calls
cost an unknown amount, never nothing.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec

from .client import Feature, ModelInfo, Price
from .errors import ConfigError

_DATED = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")

_FEATURES: frozenset[Feature] = frozenset(("temperature", "stop", "seed", "schema", "stream"))


class _Row(msgspec.Struct):
    provider: str
    model: str
    input: str
    cached: str
    cache_write: str
    output: str
    above: str
    input_above: str
    cached_above: str
    cache_write_above: str
    output_above: str
    context_window: str
    max_output: str
    temperature: str
    """"no" where a request that sets one is refused."""

    def info(self) -> ModelInfo:
        dear = (self.input_above, self.output_above, self.cached_above, self.cache_write_above)
        price = _price(self.input, self.output, self.cached, self.cache_write)
        if self.above:
            price = msgspec.structs.replace(price, above=int(self.above), long=_price(*dear))
        return ModelInfo(
            context_window=int(self.context_window) if self.context_window else None,
            max_output=int(self.max_output) if self.max_output else None,
            price=price,
            supports=_FEATURES - {"temperature"} if self.temperature == "no" else None,
        )


def _price(input: str, output: str, cached: str, cache_write: str) -> Price:
    return Price(
        float(input),
        float(output),
        float(cached) if cached else None,
        float(cache_write) if cache_write else None,
    )


@functools.cache
def _table() -> dict[tuple[str, str], ModelInfo]:
    import csv
    from importlib import resources

    text = resources.files(__package__).joinpath("prices.csv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    rows = [_Row(**row) for row in csv.DictReader(lines)]
    return {(row.provider, row.model): row.info() for row in rows}


def lookup(provider: str | None, model: str) -> ModelInfo:
    """What the table says of a provider's model, its dated versions included; else nothing."""
    if provider is None:
        return ModelInfo()
    name = model.removeprefix("models/").removeprefix(f"{provider}/")
    table = _table()
    return table.get((provider, name)) or table.get((provider, _DATED.sub("", name))) or ModelInfo()


def as_price(given: Any) -> Price | None:
    """What a user gives for a price: a `Price`, its fields, or None. Anything else is a ConfigError."""
    if given is None or isinstance(given, Price):
        return given
    try:
        return msgspec.convert(given, Price)
    except msgspec.ValidationError as error:  # it is not shown: a key may be in the wrong place
        raise ConfigError(f"price= is no price, but a {type(given).__name__}: {error}") from None
