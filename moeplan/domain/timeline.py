"""A timeline: who did what from when to when; predicted or measured, the same type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeplan.domain.program import Floats, Ints, Program, Stream

_NONE = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """Start and end of every task of a program, seconds from the start of the step."""

    program: Program
    start_s_T: Floats
    end_s_T: Floats
    launch_s_T: Floats
    """Part of each task's time that the device waits for its kernels to be launched."""
    lost_s_T: Floats | None = None
    """Part of each compute task's time that exchanges beside it cost. None: not known, as where it was measured."""
    source: Literal["predicted", "measured"] = "predicted"

    @property
    def step_s(self) -> float:
        """From the start of the step to the end of its last task."""
        return float(self.end_s_T.max(initial=0.0))

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens of the whole batch over step time and GPUs."""
        return self.program.step_tokens / self.step_s / self.program.num_gpus

    def mfu(self, peak_flops_per_s: float) -> float:
        """Model FLOPs of the step (recomputation left out) over what all GPUs could do in that time (PaLM, appendix
        B).
        """
        return self.program.model_flops / (self.step_s * self.program.num_gpus * peak_flops_per_s)

    def tasks_of(self, lane: int, stream: Stream) -> Ints:
        """The tasks of one stream of one lane, in the order in which they ran."""
        tasks = self.program.tasks
        return np.flatnonzero((tasks.lane_T == lane) & (tasks.stream_T == stream))

    def busy_s(self, lane: int, stream: Stream = Stream.COMPUTE) -> float:
        """Seconds in which that stream of that lane ran a task."""
        chosen = self.tasks_of(lane, stream)
        return float((self.end_s_T[chosen] - self.start_s_T[chosen]).sum())

    @property
    def busiest_lane(self) -> int:
        """The lane that computes longest: the one whose waiting explains the step."""
        busy = [self.busy_s(lane) for lane in range(len(self.program.lanes))]
        return int(np.argmax(busy))
