"""Text with a unit to plain SI numbers and back: the only place where a unit is parsed.

Inside moeplan a number is in bytes, FLOP, seconds, tokens, watts or a share of one. Bits become bytes. `400 Gb/s` is
refused, because half the world reads it as gigabits and the other half as gigabytes.
"""

from __future__ import annotations

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# unit -> (dimension, factor to SI, prefixes that may stand before it)
_UNITS: dict[str, tuple[str, float, dict[str, float]]] = {
    "B": ("B", 1.0, _DECIMAL | _BINARY),
    "bit": ("B", 1 / 8, _DECIMAL),
    "FLOP": ("FLOP", 1.0, _DECIMAL),
    "s": ("s", 1.0, _SMALL),
    "tokens": ("tokens", 1.0, _DECIMAL),
    "W": ("W", 1.0, _DECIMAL),
    "%": ("share", 1e-2, {"": 1.0}),
}
_ALLOWED = "a number and a unit (B bit FLOP s tokens W %, per second with /s; k M G T P or Ki Mi Gi Ti before it)"
_TEXT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z%]+)(/s)?\s*\Z")


def parse(text: str, dimension: str) -> float:
    """The SI number in `text`, which must have `dimension`: B, B/s, FLOP, FLOP/s, s, tokens, tokens/s, W or share.

    `parse("400 Gbit/s", "B/s")` is 5e10. Raises ValueError with what was found, what is allowed and a remedy.
    """
    match = _TEXT.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not {_ALLOWED}")
    number, unit, per_second = match.groups()
    found, factor = _unit(text, unit)
    found += per_second or ""
    if found != dimension:
        raise ValueError(f"{text!r} is in {found}, but {dimension} is wanted, as in '{_EXAMPLES[dimension]}'")
    value = float(number) * factor
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number; use one below 1e308")
    return value


def _unit(text: str, unit: str) -> tuple[str, float]:
    if re.fullmatch(r"[kKMGTP]?i?b(ps)?", unit):
        prefix = unit.removesuffix("ps")[:-1]
        raise ValueError(f"{text!r} can be read as bits or as bytes; write '{prefix}bit' or '{prefix}B'")
    for name, (dimension, factor, prefixes) in _UNITS.items():
        prefix = unit.removesuffix(name)
        if unit.endswith(name) and prefix in prefixes:
            return dimension, factor * prefixes[prefix]
    raise ValueError(f"{text!r} has the unknown unit {unit!r}; use {_ALLOWED}")


def scaled(text: str, factor: float) -> str:
    """`text` with its number times `factor`: scaled("400 Gbit/s", 1.1) is '440 Gbit/s'; a share stops at 100 %."""
    match = _TEXT.match(text)
    assert match is not None, "what is scaled has been parsed before"
    number, unit, per_second = match.groups()
    most = 100.0 if unit == "%" else math.inf
    return f"{min(float(number) * factor, most):.12g} {unit}{per_second or ''}"


_EXAMPLES = {
    "B": "80 GB", "B/s": "400 Gbit/s", "FLOP": "1 GFLOP", "FLOP/s": "989 TFLOP/s", "s": "4 us",
    "tokens": "4096 tokens", "tokens/s": "10 ktokens/s", "W": "700 W", "share": "80 %",
}  # fmt: skip


def show(value: float, dimension: str) -> str:
    """`value` in SI as a person reads it, four figures: show(5e10, "B/s") is '50 GB/s'."""
    if dimension == "share":
        return f"{100 * value:.4g} %"
    base, rate = dimension.removesuffix("/s"), "/s" if dimension.endswith("/s") else ""
    steps = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9} if base == "s" else _DECIMAL
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {base}{rate}"
    fitting = [(size, prefix) for prefix, size in steps.items() if abs(value) >= size * 0.99995]
    size, prefix = max(fitting) if fitting else min((size, prefix) for prefix, size in steps.items())
    return f"{value / size:.4g} {prefix}{base}{rate}"
