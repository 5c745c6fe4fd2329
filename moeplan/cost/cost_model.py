"""Seconds of a task's kernels on one GPU: the slower of arithmetic and memory, and never less than a launch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from moeplan.cost.compute import arithmetic_s, start_s
from moeplan.cost.measured import measured_s
from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel, Work

ROUNDED = 4
"""How sharp the roofline's corner is; infinite would be the larger of the two."""


class Cost(NamedTuple):
    """Seconds of one task, and the part of them in which the device waits for launches."""

    seconds: float
    launch_s: float


class Shares(NamedTuple):
    """What is left of kernels' speed beside an exchange, and of a flow's fair rate beside kernels, of the same GPU."""

    compute: float = 1.0
    exchange: float = 1.0
    processors: float = inf
    """Of all GPUs so many compute at a time; more take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What a GPU takes for the kernels of a task."""

    gpu: Gpu

    @property
    def shares(self) -> Shares:
        """What kernels and exchanges of one GPU leave each other."""
        gpu = self.gpu
        processors = inf if gpu.measured is None else gpu.measured.processors
        return Shares(gpu.compute_share_beside_exchange, gpu.exchange_share_beside_compute, processors)

    def cost(self, work: Work) -> Cost:
        """The sum over the kernels of max(busy, launch): the host launches ahead, but not faster than one by one.

        Leaves out what exchanges beside cost: that is a matter of time order, see `shares`. Where tasks were measured,
        what their classes took.
        """
        if self.gpu.measured is not None:
            return Cost(measured_s(work, self.gpu.measured, otherwise=self.kernel_s), 0.0)
        busy = [self.kernel_s(kernel) for kernel in work.kernels]
        launch = sum(max(0.0, self.gpu.kernel_launch_s - seconds) for seconds in busy)
        return Cost(sum(busy) + launch, launch)

    def kernel_s(self, kernel: Kernel) -> float:
        """Its start, and FLOP over reachable peak beside bytes over reachable bandwidth; nothing without work."""
        seconds = beside_memory_s(arithmetic_s(kernel, self.gpu), self.memory_s(kernel))
        return start_s(kernel, self.gpu) + seconds if seconds else 0.0

    def memory_s(self, kernel: Kernel) -> float:
        """Bytes over reachable bandwidth."""
        return kernel.size_bytes / (self.gpu.memory_bandwidth_bytes_per_s * self.gpu.memory_efficiency)


def beside_memory_s(work_s: float, memory_s: float) -> float:
    """(arithmetic^4 + memory^4)^(1/4): no less than the slower, and up to a fifth more where both are as slow, for
    neither hides all of the other.

    Reference: Williams, Waterman, Patterson, "Roofline", CACM 52, 2009; the power as fitted in
    `benchmarks/calibrate_silicon.py`, for all GPUs.
    """
    slower, other = max(work_s, memory_s), min(work_s, memory_s)
    return float(slower * (1 + (other / slower) ** ROUNDED) ** (1 / ROUNDED)) if slower else 0.0
