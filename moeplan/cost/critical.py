"""What a step's critical path consists of: seconds by kind of task and by the resource that the task was held up by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.cost.compute import arithmetic_s
from moeplan.cost.cost_model import CostModel
from moeplan.cost.transfer import link_s_K
from moeplan.domain.causes import critical_path
from moeplan.domain.program import Stream, Work
from moeplan.domain.timeline import Timeline

ARITHMETIC, MEMORY, LAUNCH, BESIDE = "arithmetic", "memory bandwidth", "kernel launches", "exchanges beside kernels"
LATENCY, SHARED, WAITING = "message latency", "links shared with other exchanges", "waiting"
COMPUTING = (ARITHMETIC, MEMORY, LAUNCH)
"""What computation takes where no exchange is near."""
_ROUNDING = 1e-9
"""Of an exchange's time; less than that is no sharing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathPart:
    """Seconds of the critical path in which tasks of one kind were held up by one resource."""

    kind: str
    resource: str
    seconds: float


def critical_parts(timeline: Timeline, cost_model: CostModel) -> tuple[PathPart, ...]:
    """The parts of the critical path, the largest first; they sum to the step.

    A task owns the time from the end of the task before it on the path to its own end. Kernels: the roofline's slower
    side, launches, and what exchanges beside them cost. Exchanges: latency, the busiest link by its kind, and the rest,
    when the links were shared. On this path nobody waits, but for holes of a measured timeline: a pipeline's bubble is
    a wait for something that is on the path.
    """
    path, found = critical_path(timeline), dict[tuple[str, str], float]()
    reader = _Reader(timeline, cost_model)
    for task, earlier in zip(path, [*path[1:], None], strict=True):
        start_s, end_s = float(timeline.start_s_T[task]), float(timeline.end_s_T[task])
        since_s = 0.0 if earlier is None else float(timeline.end_s_T[earlier])
        parts = reader.parts_s(task, end_s - max(start_s, since_s)) | {WAITING: max(0.0, start_s - since_s)}
        for resource, seconds in parts.items():
            key = (timeline.program.kind(task), resource)
            found[key] = found.get(key, 0.0) + seconds
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return tuple(PathPart(kind=kind, resource=resource, seconds=each) for (kind, resource), each in ordered if each > 0)


def by_resource(parts: tuple[PathPart, ...]) -> dict[str, float]:
    """Seconds of each resource, the most first."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.resource] = found.get(part.resource, 0.0) + part.seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class _Reader:
    """What tasks are held up by; works and meetings are looked at once."""

    def __init__(self, timeline: Timeline, cost_model: CostModel) -> None:
        self.timeline, self.program, self.cost_model = timeline, timeline.program, cost_model
        self.arithmetic_shares, self.alone = dict[int, float](), dict[int, dict[str, float]]()

    def parts_s(self, task: int, seconds: float) -> dict[str, float]:
        """`seconds` of a task, which is all of it or its end, by resource."""
        unit = int(self.program.tasks.unit_T[task])
        if self.program.tasks.stream_T[task] == Stream.COMPUTE:
            return _fitted(self._kernels_s(task, unit), seconds)
        if unit not in self.alone:
            self.alone[unit] = self._exchange_s(unit)
        alone = self.alone[unit]
        shared_s = seconds - sum(alone.values())
        return _fitted({**alone, SHARED: shared_s if shared_s > _ROUNDING * seconds else 0.0}, seconds)

    def _kernels_s(self, task: int, unit: int) -> dict[str, float]:
        line = self.timeline
        lost = 0.0 if line.lost_s_T is None else float(line.lost_s_T[task])
        launch = float(line.launch_s_T[task])
        busy = max(0.0, float(line.end_s_T[task] - line.start_s_T[task]) - launch - lost)
        if unit not in self.arithmetic_shares:
            self.arithmetic_shares[unit] = self._arithmetic_share(self.program.works[unit])
        share = self.arithmetic_shares[unit]
        return {ARITHMETIC: busy * share, MEMORY: busy * (1 - share), LAUNCH: launch, BESIDE: lost}

    def _arithmetic_share(self, work: Work) -> float:
        """Of the time of a work's kernels that of kernels whose arithmetic takes longer than their memory traffic."""
        model = self.cost_model
        seconds = {kernel: model.kernel_s(kernel) for kernel in work.kernels}
        total = sum(seconds[kernel] for kernel in work.kernels)
        bound = sum(
            seconds[kernel] for kernel in work.kernels if arithmetic_s(kernel, model.gpu) >= model.memory_s(kernel)
        )
        return bound / total if total else 0.0

    def _exchange_s(self, unit: int) -> dict[str, float]:
        """What the exchange takes alone: latencies, copies in memory, and the busiest link of each phase."""
        size = self.program.exchanges[self.program.meetings[unit].exchange].size_bytes
        found = {LATENCY: 0.0, MEMORY: 0.0}
        for phase in self.program.meetings[unit].phases:
            found[LATENCY] += phase.latency_s
            found[MEMORY] += phase.delay_s(size) - phase.latency_s
            busy_s_K = link_s_K(self.program, phase, size)
            if busy_s_K.size and busy_s_K.max() > 0:
                link = f"{self.program.flows.link_kind_K[int(busy_s_K.argmax())]} bandwidth"
                found[link] = found.get(link, 0.0) + float(busy_s_K.max())
        return found


def _fitted(parts_s: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The parts in proportion, so that they sum to `seconds`; without parts all of it is waiting."""
    total = sum(parts_s.values())
    return {name: each * seconds / total for name, each in parts_s.items()} if total else {WAITING: seconds}
