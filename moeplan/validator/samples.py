"""What executions tell: seconds of products, tasks and exchanges as they stood in real steps, at one speed.

A step's times are divided by how slow the device was then, as its yardstick says. Axes: S steps, T tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan.cost.measured import calls, elementwise_bytes, product_class, side, task_class
from moeplan.cost.transfer import wire_s
from moeplan.domain.program import Floats, Ints, Kernel, Program, Stream, Work
from moeplan.executor.execute import Execution
from moeplan.executor.watched import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Operation
from moeplan.network.expand import expand
from moeplan.simulator.packed import with_stream_order


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Seconds of one thing of a class: the median over steps, and over what is alike; `count` are all of them.

    `flops` and `size_bytes` are its work, `calls` how often the host called for it.
    """

    name: str
    dtype: str
    seconds: float
    flops: float
    size_bytes: float
    calls: float
    count: int
    is_held_out: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One execution, at the speed at which the yardstick takes `reference_s`."""

    found: Execution
    reference_s: float
    is_held_out: bool = False

    @property
    def program(self) -> Program:
        """What ran, on all ranks."""
        return self.found.timeline.program

    @cached_property
    def clean_S(self) -> Ints:
        """The steps that count: those that nobody disturbed, or else all but the first."""
        is_clean_S = self.found.repetitions.is_clean_S
        steps = np.flatnonzero(is_clean_S)
        return steps if len(steps) else np.arange(min(1, len(is_clean_S) - 1), len(is_clean_S))

    @cached_property
    def speed_S(self) -> Floats:
        """How fast the device was in each step that counts, of the speed at the reference."""
        speed_S: Floats = self.reference_s / self.found.repetitions.yardstick_s_SR[self.clean_S].mean(axis=1)
        return speed_S

    def _times(self, name: str) -> Floats:
        values: Floats = getattr(self.found.repetitions, name)[self.clean_S]
        return values

    @cached_property
    def start_s_ST(self) -> Floats:
        """Starts in the steps that count."""
        return self._times("start_s_ST")

    @cached_property
    def end_s_ST(self) -> Floats:
        """Ends in the steps that count."""
        return self._times("end_s_ST")

    @cached_property
    def own_s_ST(self) -> Floats:
        """What tasks took in the steps that count: of the thread's processor, or of a GPU by the clock."""
        on_processor = self.found.device == "cpu"
        return self._times("processor_s_ST") if on_processor else self.end_s_ST - self.start_s_ST

    def mean_s(self, seconds_S: Floats) -> float:
        """Over the steps, at the reference's speed."""
        return float(np.mean(seconds_S * self.speed_S))

    def median_s(self, seconds_S: Floats) -> float:
        """Over the steps, at the reference's speed."""
        return float(np.median(seconds_S * self.speed_S))

    def dtype(self) -> str:
        """The format of activations."""
        return self.found.plan.precision.activations

    # ---- compute

    def task_samples(self) -> Iterator[tuple[Sample, Work]]:
        """Each class of task with its work: until the next task of the stream begins on one rank, where nothing else
        is waited for; the time of the thread's processor on several.
        """
        tasks, alone = self.program.tasks, len(self.program.lanes) == 1
        compute = np.flatnonzero(tasks.stream_T == Stream.COMPUTE)
        end_s_ST = np.concatenate([self.start_s_ST[:, compute[1:]], self.end_s_ST[:, compute[-1:]]], axis=1)
        took_s_ST = end_s_ST - self.start_s_ST[:, compute] if alone else self.own_s_ST[:, compute]
        by_unit: dict[int, list[int]] = defaultdict(list)
        for place, unit in enumerate(tasks.unit_T[compute].tolist()):
            by_unit[unit].append(place)
        for unit, places in by_unit.items():
            work, seconds_S = self.program.works[unit], np.median(took_s_ST[:, places], axis=1)
            yield self._sample(task_class(work), seconds_S, elementwise_bytes(work), count=len(places)), work

    def _sample(self, name: str, seconds_S: Floats, size_bytes: float, *, count: int) -> Sample:
        return Sample(
            name=name, dtype=self.dtype(), seconds=self.median_s(seconds_S), flops=0.0, size_bytes=size_bytes,
            calls=1.0, count=count * len(self.clean_S), is_held_out=self.is_held_out,
        )  # fmt: skip

    def product_samples(self) -> Iterator[Sample]:
        """Each kernel that is a product or an attention, from what a watch noted."""
        rows = self.found.repetitions.operations
        rows_SN = rows.reshape(len(self.found.step_s_S), -1, rows.shape[1])[self.clean_S]
        seconds: dict[Kernel, list[Floats]] = defaultdict(list)
        noted = rows_SN[0, :, Operation._fields.index("task")].astype(int)
        for task in np.unique(noted).tolist():
            of_task = np.flatnonzero(noted == task)
            for kernel, places in _matched(self.program, task, rows_SN[0, of_task, 1].astype(int).tolist()):
                seconds[kernel].append(rows_SN[:, of_task[places], -1].sum(axis=1))
        for kernel, found in seconds.items():
            yield Sample(
                name=product_class(kernel), dtype=kernel.dtype, seconds=self.median_s(np.median(found, axis=0)),
                flops=kernel.flops, size_bytes=kernel.size_bytes, calls=calls(kernel),
                count=len(found) * len(self.clean_S), is_held_out=self.is_held_out,
            )  # fmt: skip

    # ---- exchanges

    def exchange_samples(self) -> Iterator[Sample]:
        """Each exchange from when its last member is ready until its last one goes on, less latency and wires."""
        before, after = with_stream_order(self.program)
        waits: dict[int, list[int]] = defaultdict(list)
        for early, late in zip(before.tolist(), after.tolist(), strict=True):
            waits[late].append(early)
        handed_ST = self._handed_ST(waits)
        by_meeting: dict[int, list[Floats]] = defaultdict(list)
        for (meeting, _), tasks in meetings(self.program).items():
            ready_S = np.max([self._ready_S(task, waits[task]) for task in tasks], axis=0)
            ended_S = self.end_s_ST[:, tasks].max(axis=1) + handed_ST[:, tasks].min(axis=1)
            by_meeting[meeting].append(ended_S - ready_S)
        for meeting, found in by_meeting.items():
            exchange = self.program.exchanges[self.program.meetings[meeting].exchange]
            if exchange.kind == "context":
                continue  # its task projects keys and values as well
            pattern = expand(exchange, self.found.scenario.cluster)
            name = f"{exchange.operation} of {exchange.groups_NG.shape[1]}"
            seconds = self.median_s(np.median(found, axis=0)) - wire_s(self.program, meeting)
            yield Sample(
                name=name, dtype=self.dtype(), seconds=max(seconds, 1e-6), flops=0.0,
                size_bytes=pattern.host_share * exchange.size_bytes, calls=1.0, count=len(found) * len(self.clean_S),
                is_held_out=self.is_held_out,
            )  # fmt: skip

    def _ready_S(self, task: int, waits: Sequence[int]) -> Floats:
        """When all that a task waits for has ended; when it starts, if it waits for nothing."""
        ready_S: Floats = self.end_s_ST[:, waits].max(axis=1) if waits else self.start_s_ST[:, task]
        return ready_S

    def _handed_ST(self, waits: Mapping[int, list[int]]) -> Floats:
        """What passes from the end of each task to the start of the first that it held up; 0 where it held up none."""
        handed_ST = np.full(self.end_s_ST.shape, np.inf)
        for late, early in waits.items():
            last_S = np.array(early)[self.end_s_ST[:, early].argmax(axis=1)]
            gap_S = self.start_s_ST[:, late] - self.end_s_ST[:, early].max(axis=1)
            steps = np.arange(len(last_S))
            handed_ST[steps, last_S] = np.minimum(handed_ST[steps, last_S], np.maximum(gap_S, 0.0))
        return np.where(np.isfinite(handed_ST), handed_ST, 0.0)


def jitter(runs: Sequence[Run]) -> float:
    """The standard deviation of a task's time from step to step over its mean, long tasks counting more: the root of
    the sum of squares over all tasks that compute. Of their threads' time, as what exchanges take of it is told apart.
    """
    spread, whole = 0.0, 0.0
    for run in runs:
        took_s_ST = run.own_s_ST[:, run.program.tasks.stream_T == Stream.COMPUTE] * run.speed_S[:, None]
        steps = len(took_s_ST)
        if steps > 1:
            spread += float(took_s_ST.var(axis=0, ddof=1).sum())
            whole += float((took_s_ST.mean(axis=0) ** 2).sum())
    return (spread / whole) ** 0.5 if whole else 0.0


def meetings(program: Program) -> dict[tuple[int, int], list[int]]:
    """The tasks that are one exchange, by meeting and how often its lanes have met before."""
    tasks, seen = program.tasks, dict[tuple[int, int], int]()
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for task in np.flatnonzero(tasks.stream_T != Stream.COMPUTE).tolist():
        key = int(tasks.unit_T[task]), int(tasks.lane_T[task])
        seen[key] = seen.get(key, -1) + 1
        found[key[0], seen[key]].append(task)
    return found


def _matched(program: Program, task: int, kinds: Sequence[int]) -> Iterator[tuple[Kernel, list[int]]]:
    """The products of a task's work, each with the places of its calls among those that were noted."""
    kernels = [each for each in program.works[int(program.tasks.unit_T[task])].kernels if each.kind != "elementwise"]
    which = {"": FORWARD, "_dgrad": INPUT_GRADIENT, "_grad": INPUT_GRADIENT, "_wgrad": WEIGHT_GRADIENT}
    for kind in dict.fromkeys(which.values()):
        places = [place for place, each in enumerate(kinds) if each == kind]
        for kernel in [each for each in kernels if which[side(each)] == kind]:
            count = sum(rows > 0 for rows in kernel.rows_per_expert) if kind == WEIGHT_GRADIENT else calls(kernel)
            count = max(1, count)
            yield kernel, places[:count]
            places = places[count:]
        assert not places, f"{program.kind(task)}: calls that are no kernel's"
