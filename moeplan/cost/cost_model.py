"""Seconds of a task's kernels on one GPU: the slower of arithmetic and memory, and never less than a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moeplan.cost.compute import arithmetic_s
from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel, Work


class Cost(NamedTuple):
    """Seconds of one task, and the part of them in which the device waits for launches."""

    seconds: float
    launch_s: float


class Shares(NamedTuple):
    """What is left of kernels' speed beside an exchange, and of a flow's fair rate beside kernels, of the same GPU."""

    compute: float = 1.0
    exchange: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What a GPU takes for the kernels of a task."""

    gpu: Gpu

    @property
    def shares(self) -> Shares:
        """What kernels and exchanges of one GPU leave each other."""
        gpu = self.gpu
        return Shares(gpu.compute_share_beside_exchange, gpu.exchange_share_beside_compute)

    def cost(self, work: Work) -> Cost:
        """The sum over the kernels of max(busy, launch): the host launches ahead, but not faster than one by one.

        Leaves out what exchanges beside cost: that is a matter of time order, see `shares`.
        """
        busy = [self.kernel_s(kernel) for kernel in work.kernels]
        launch = sum(max(0.0, self.gpu.kernel_launch_s - seconds) for seconds in busy)
        return Cost(sum(busy) + launch, launch)

    def kernel_s(self, kernel: Kernel) -> float:
        """max(FLOP over reachable peak, bytes over reachable bandwidth).

        Reference: Williams, Waterman, Patterson, "Roofline", CACM 52, 2009.
        """
        return max(self.memory_s(kernel), arithmetic_s(kernel, self.gpu))

    def memory_s(self, kernel: Kernel) -> float:
        """Bytes over reachable bandwidth."""
        return kernel.size_bytes / (self.gpu.memory_bandwidth_bytes_per_s * self.gpu.memory_efficiency)
