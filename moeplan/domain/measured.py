"""What a device was measured to take: products, tasks and exchanges, where they stand in real steps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from moeplan.domain.wiring import Count, NotNegative, Positive

_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Table = tuple[tuple[float, float], ...]
"""Bytes and seconds, bytes rising."""


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CHECKED)
class Terms:
    """overhead + FLOP / peak + bytes / bandwidth; a term that is not given is 0.

    They add up since a core computes what has come from its memory, and fetches what it has not computed yet, by turns.
    """

    overhead_s: NotNegative
    peak_flops_per_s: Positive | None = None
    bandwidth_bytes_per_s: Positive | None = None

    def seconds(self, *, flops: float, size_bytes: float, count: float = 1.0) -> float:
        """Of `count` calls, which do so much together."""
        arithmetic_s = flops / self.peak_flops_per_s if self.peak_flops_per_s else 0.0
        memory_s = size_bytes / self.bandwidth_bytes_per_s if self.bandwidth_bytes_per_s else 0.0
        return count * self.overhead_s + arithmetic_s + memory_s


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CHECKED)
class Measured:
    """A device's own figures, which stand for the sheet's roofline where they are given.

    `products`: by number format and class: gemm, grouped_gemm (a call for each expert), attention; with _dgrad, _wgrad
    or _grad behind it in the backward pass. `tasks`: by format and kind, with _backward behind it: what a task takes
    beside its products, by the bytes of its elementwise kernels. `exchanges`: by operation and the size of its group,
    as in "all_to_all of 2": what the host does for it and waits, beside latency and wires, by the bytes that a member
    sends.
    """

    device: str
    """What was measured: cpu or cuda, and its name."""
    processors: Count
    """So many devices compute at a time: those that stand for more processes than there are cores share them."""
    reference_s: Positive
    """Seconds of the executor's yardstick then."""
    process_memory_bytes: Positive
    """Of a rank's process beside its tensors."""
    jitter: NotNegative = 0.0
    """The standard deviation of the logarithm of a task's time from step to step, where several ranks compute."""
    products: Mapping[str, Mapping[str, Terms]] = field(default_factory=dict, hash=False)
    tasks: Mapping[str, Mapping[str, Terms]] = field(default_factory=dict, hash=False)
    exchanges: Mapping[str, Table] = field(default_factory=dict, hash=False)

    def table(self, operation: str, members: int) -> Table:
        """Of an exchange of so many members: the measured group of that size, or else the next larger one, or the
        largest; empty where the operation was not measured.
        """
        sizes = sorted(int(key.rpartition(" ")[2]) for key in self.exchanges if key.startswith(f"{operation} of "))
        if not sizes:
            return ()
        size = sizes[min(bisect_left(sizes, members), len(sizes) - 1)]
        return self.exchanges[f"{operation} of {size}"]


def at(table: Table, size_bytes: float) -> float:
    """Seconds for so many bytes: straight between two sizes of the table on logarithmic scales, level below the first,
    in proportion to the bytes above the last; 0 without a table.
    """
    if not table:
        return 0.0
    right = bisect_left(table, (size_bytes, 0.0))
    if right == 0:
        return table[0][1]
    if right == len(table):
        return table[-1][1] * size_bytes / table[-1][0]
    (low, low_s), (high, high_s) = table[right - 1], table[right]
    share = math.log(size_bytes / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(low_s) + share * math.log(high_s))
