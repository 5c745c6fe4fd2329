"""What makes real steps differ from one another: jitter of every task, and GPUs that are slow all the time."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from moeplan.domain.program import Floats, Program, Stream
from moeplan.errors import SimulationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """`jitter` is the standard deviation of the logarithm of a task's time on one GPU; `stragglers` GPUs take
    `slowdown` times as long for everything (1.1: ten per cent longer)."""

    jitter: float = 0.0
    stragglers: int = 0
    slowdown: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter <= 2:
            raise SimulationError(f"noise: jitter {self.jitter} is out of range; use 0 to 2, such as 0.02")
        if self.stragglers < 0 or not 1 <= self.slowdown <= 1000:
            raise SimulationError(
                f"noise: stragglers {self.stragglers}, slowdown {self.slowdown}; use 0 or more GPUs and 1 to 1000 times"
            )


def factors(program: Program, noise: Noise) -> Floats:
    """What each task's time is multiplied with. A lane goes at the pace of the slowest of its ranks.

    The slowest of n independent ranks is drawn at once: the quantile u^(1/n) of a uniform u. Raises SimulationError
    for more stragglers than GPUs.
    """
    if noise.stragglers > program.num_gpus:
        raise SimulationError(
            f"noise: {noise.stragglers} stragglers are more than the GPUs there are; use at most {program.num_gpus}"
        )
    rng = np.random.default_rng(noise.seed)
    tasks = program.tasks
    factor = np.ones(len(tasks))
    ranks = np.array([lane.multiplicity for lane in program.lanes])[tasks.lane_T]
    compute = tasks.stream_T == Stream.COMPUTE
    if noise.jitter:
        quantile = rng.random(int(compute.sum())) ** (1 / ranks[compute])
        normal = np.array([NormalDist().inv_cdf(min(max(q, 1e-300), 1 - 1e-16)) for q in quantile])
        factor[compute] = np.exp(noise.jitter * normal)
    slow = rng.choice(program.num_gpus, size=noise.stragglers, replace=False)
    slow_lanes = [number for number, lane in enumerate(program.lanes) if np.isin(lane.ranks_R, slow).any()]
    factor[compute & np.isin(tasks.lane_T, slow_lanes)] *= noise.slowdown
    return factor
