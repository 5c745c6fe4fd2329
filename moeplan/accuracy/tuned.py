"""What a record of training leaves open of its pipeline and micro-batch, as who publishes a benchmark has tuned it.

One after another, model chunks of a pipeline rank (`vpp`) and then sequences of a micro-batch (`mbs`), each is what
makes the predicted step shortest among what fits in memory, with the least recomputation that does. What the record
measured is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeplan.accuracy.cases import Case, fits, training_case
from moeplan.errors import CatalogueError, PlanError

Row = Mapping[str, Any]


def tuned_case(record: Row, seconds: Callable[[Case], float]) -> Case:
    """The case of a record; `seconds` predicts its step. Raises CatalogueError and PlanError."""
    fills: dict[str, int] = {}
    for key, values in _open(record):
        fills[key] = _fastest(record, fills, key, values, seconds)
    return training_case(record, fills)


def _fastest(
    record: Row, fills: Mapping[str, int], key: str, values: list[int], seconds: Callable[[Case], float]
) -> int:
    """Up to the first that is slower than the one before; 1 where none fits."""
    best, best_s = 1, math.inf
    for value in (1, *values):
        case = _case(record, {**fills, key: value})
        if case is None:
            continue
        taken_s = seconds(case)
        if taken_s >= best_s:
            break
        best, best_s = value, taken_s
    return best


def _open(record: Row) -> Iterator[tuple[str, list[int]]]:
    """What is left open, with the numbers above 1 that it may be, from the least."""
    asked, model = record["parallel"], record["model"]
    pp, layers = asked.get("pp") or 1, model.get("layers") or 0
    if asked.get("vpp") is None and pp > 1 and layers % pp == 0:
        per_rank = layers // pp
        yield "vpp", [count for count in range(2, per_rank + 1) if per_rank % count == 0]
    if asked.get("mbs") is None and asked.get("gbs"):
        yield "mbs", [1 << power for power in range(1, int(asked["gbs"]).bit_length())]


def _case(record: Row, fills: Mapping[str, int]) -> Case | None:
    """None: not legal, or it does not fit."""
    try:
        case = training_case(record, fills)
    except (CatalogueError, PlanError):
        return None
    return case if fits(case) else None
