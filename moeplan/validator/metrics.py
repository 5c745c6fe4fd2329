"""How far a prediction is off, how much of that is noise, and whether the ranking of plans held.

Errors are predicted / measured - 1: below 0 the prediction was too fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median, pstdev

import numpy as np

from moeplan.domain.program import Pass, Stream
from moeplan.domain.timeline import Timeline
from moeplan.validator.samples import meetings


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """What was predicted and measured of one thing, in seconds or bytes. `noise` is the coefficient of variation of the
    measured value over launches; 0 where there was one.
    """

    predicted: float
    measured: float
    noise: float = 0.0

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1 if self.measured else 0.0

    def is_within(self, tolerance: float) -> bool:
        """Whether the error is no more than the tolerance, or no more than twice the noise."""
        return abs(self.error) <= max(tolerance, 2 * self.noise)


def noise(values: Sequence[float]) -> float:
    """Coefficient of variation."""
    mean = sum(values) / len(values)
    return pstdev(values) / mean if len(values) > 1 and mean else 0.0


def busy_s(timeline: Timeline) -> dict[str, float]:
    """Seconds of each kind of task, a rank on average: of an exchange from when its last rank has come to it, since
    what comes before is waiting for others.
    """
    start_s_T = np.array(timeline.start_s_T)
    for tasks in meetings(timeline.program).values():
        start_s_T[tasks] = start_s_T[tasks].max()
    took_s_T = np.maximum(timeline.end_s_T - start_s_T, 0.0)
    total: dict[str, float] = {}
    program = timeline.program
    ranks = np.array([lane.multiplicity for lane in program.lanes])[program.tasks.lane_T] / program.num_gpus
    for task, seconds in enumerate((took_s_T * ranks).tolist()):
        kind = program.kind(task)
        total[kind] = total.get(kind, 0.0) + seconds
    return total


def phases_s(timeline: Timeline) -> dict[str, float]:
    """Seconds of each phase of the step, from the first start of its computation to the last end, on any rank: forward,
    backward and update. Under a pipeline the first two overlap.
    """
    tasks = timeline.program.tasks
    passes = {"forward": (Pass.FORWARD,), "backward": (Pass.BACKWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT),
              "update": (Pass.STEP,)}  # fmt: skip
    found = {}
    for name, which in passes.items():
        chosen = np.flatnonzero(np.isin(tasks.pass_T, which) & (tasks.stream_T == Stream.COMPUTE))
        if len(chosen):
            found[name] = float(timeline.end_s_T[chosen].max() - timeline.start_s_T[chosen].min())
    return found


def joined(predicted: Mapping[str, float], measured: Sequence[Mapping[str, float]]) -> dict[str, Error]:
    """By name the prediction beside the median of launches."""
    return {
        name: Error(
            predicted=predicted.get(name, 0.0), measured=median(each.get(name, 0.0) for each in measured),
            noise=noise([each.get(name, 0.0) for each in measured]),
        )
        for name in measured[0]
    }  # fmt: skip


def bias(predicted: Timeline, measured: Timeline) -> float:
    """Of all computation the predicted seconds over the measured ones, less 1: what cannot be by chance alone."""
    chosen = predicted.program.tasks.stream_T == Stream.COMPUTE
    seconds = [float((each.end_s_T - each.start_s_T)[chosen].sum()) for each in (predicted, measured)]
    return seconds[0] / seconds[1] - 1 if seconds[1] else 0.0


def task_error(predicted: Timeline, measured: Timeline) -> float:
    """The mean over tasks that compute of |predicted / measured - 1|, each counted by its measured time."""
    chosen = predicted.program.tasks.stream_T == Stream.COMPUTE
    one, other = ((each.end_s_T - each.start_s_T)[chosen] for each in (predicted, measured))
    return float(np.abs(one - other).sum() / other.sum()) if other.sum() else 0.0


def kendall_tau(predicted: Sequence[float], measured: Sequence[float], *, noise: Sequence[float] = ()) -> float:
    """Pairs in the same order less pairs in the other, over all pairs that both tell apart (tau-b); 1 without any.

    `noise` are coefficients of variation of the measured values: two that differ by less than theirs are a tie.

    Reference: Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.
    """
    agree, one, other = 0, 0, 0
    for i, j in combinations(range(len(predicted)), 2):
        a, b = np.sign(predicted[i] - predicted[j]), np.sign(measured[i] - measured[j])
        if noise and abs(measured[i] - measured[j]) <= np.hypot(noise[i] * measured[i], noise[j] * measured[j]):
            b = 0
        agree, one, other = agree + int(a * b), one + int(a != 0), other + int(b != 0)
    return agree / float(np.sqrt(one * other)) if one and other else 1.0


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """By how much the plan that was predicted to be the fastest is slower than the fastest one that was measured."""
    return measured[int(np.argmin(predicted))] / min(measured) - 1
