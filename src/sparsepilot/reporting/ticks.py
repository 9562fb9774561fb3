"""Where an axis has its ticks and what stands at them: the same in every drawing of a picture."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from sparsepilot.reporting.figure import Axis

NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


class Tick(NamedTuple):
    """A place on an axis and its text; `10^3` in a text is a power, which each drawing sets in its own way."""

    value: float
    text: str


def ticks(axis: Axis) -> list[Tick]:
    """The labelled ticks of an axis.

    >>> [t.text for t in ticks(Axis("steps", 1, 12_000, log=True, text="power"))]
    ['10^0', '10^1', '10^2', '10^3', '10^4']
    >>> [t.text for t in ticks(Axis("samples", 0, 1.825e9, text="samples", most_ticks=5))]
    ['0', '500M', '1G', '1.5G']
    >>> [t.text for t in ticks(Axis("L0", 20, 70, log=True))]
    ['20', '50']
    """
    if axis.log:
        values = decades(axis.low, axis.high)
        if axis.text != "power":
            if len(values) < 3:
                values = _multiples(axis.low, axis.high, (1, 2, 5))
            if len(values) < 2:
                values = linear_places(axis.low, axis.high, 4)
    else:
        values = linear_places(axis.low, axis.high, axis.most_ticks)
    if not axis.zero_tick:
        values = [v for v in values if v != 0]
    if axis.text == "number":
        return [Tick(v, text) for v, text in zip(values, _alike(values), strict=True)]
    return [Tick(v, f"10^{round(math.log10(v))}" if axis.text == "power" else samples_text(v)) for v in values]


def minor_places(axis: Axis) -> list[float]:
    """Unlabelled marks between the decades of a log axis: they show that it is one."""
    if not axis.log or math.log10(axis.high / axis.low) > 12:
        return []
    return _multiples(axis.low, axis.high, range(2, 10))


def linear_places(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], in at most `most` intervals.

    >>> linear_places(0, 200, 8)
    [0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0, 175.0, 200.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        s * power for s in NICE_STEPS if s * power >= rough * 0.99
    )  # a last batch over the budget is no tick more
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high].

    >>> decades(0.02, 150)
    [0.1, 1.0, 10.0, 100.0]
    """
    return _multiples(low, high, (1,))


def samples_text(samples: float) -> str:
    """A number of samples as one says it.

    >>> [samples_text(s) for s in (0, 4096, 200_000, 500e6, 1.825e9)]
    ['0', '4.096k', '200k', '500M', '1.825G']
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(samples) >= unit * (1 - 1e-9):
            return f"{samples / unit:.4g}{name}"
    return f"{samples:.6g}"


def number_text(value: float) -> str:
    """A number for people.

    >>> [number_text(v) for v in (0, 0.0004, 0.05, 32, 12_000, 2e7)]
    ['0', '4e-4', '0.05', '32', '12,000', '2e7']
    """
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    return _scientific(value)


def with_error(value: float, error: float | None) -> str:
    """A measurement with its standard error, where there is one.

    >>> with_error(2.34567, 0.01), with_error(2.34567, None)
    ('2.3457 ± 0.0100', '2.3457')
    """
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _alike(values: list[float]) -> list[str]:
    """Their texts, with as many decimals as the one that needs most, where they are of one size.

    >>> _alike([2.5, 2.75, 3.0]), _alike([0.0, 0.5]), _alike([0.01, 0.1, 1.0])
    (['2.50', '2.75', '3.00'], ['0', '0.5'], ['0.01', '0.1', '1'])
    """
    texts = [number_text(v) for v in values]
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(values)}
    if len(steps) > 1:
        return texts
    if any("e" in text for text in texts):
        return [_scientific(v) for v in values]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{v:,.{decimals}f}" if v else "0" for v in values]


def _multiples(low: float, high: float, factors: tuple[int, ...] | range) -> list[float]:
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    places = (float(f"{factor}e{exponent}") for exponent in exponents for factor in factors)
    return [p for p in places if low * (1 - 1e-9) <= p <= high * (1 + 1e-9)]
