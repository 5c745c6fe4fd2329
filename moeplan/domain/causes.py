"""Why a step takes as long as it does: its time by cause, and the chain of tasks that decides it.

Axes: T tasks, A tasks that are exchanges of several lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from moeplan.domain.program import Floats, Ints, Stream
from moeplan.domain.timeline import Timeline

CAUSES = (
    "dense_compute", "expert_compute", "optimizer", "overlap_slowdown", "launch_overhead", "imbalance",
    "exposed_all_to_all", "gradient_traffic", "tensor_traffic", "pipeline_traffic", "pipeline_bubble",
)  # fmt: skip
_OF_KIND = {
    "experts": "expert_compute", "merge": "expert_compute", "optimizer": "optimizer",
    "dispatch": "exposed_all_to_all", "combine": "exposed_all_to_all",
    "gradients": "gradient_traffic", "parameters": "gradient_traffic", "tensor_gradients": "gradient_traffic",
    "tensor": "tensor_traffic", "context": "tensor_traffic", "expert_tensor": "tensor_traffic",
    "scores": "tensor_traffic", "send": "pipeline_traffic",
}  # fmt: skip
_NOTHING = -1


def breakdown_s(timeline: Timeline) -> dict[str, float]:
    """Seconds of the step by cause, all `CAUSES` present: disjoint parts that sum to `timeline.step_s`.

    Seen from the compute stream of the busiest lane. While it computes: `dense_compute` (all but what follows),
    `expert_compute` (experts and the sum of what they send back), `optimizer`; `launch_overhead` is taken out of these,
    and so is `overlap_slowdown`, what exchanges beside it cost, and the `imbalance` of its experts: their time beyond
    the mean over the GPUs of the stage.
    While it waits, the time goes to what ended last among what the next task waited for; time before that had started
    goes to what ended last among what that waited for, and so on. Exchanges count by their kind, `imbalance` while a
    partner of the same stage had not arrived; `pipeline_bubble` is what another stage was busy with. A wait that
    nothing explains, as in a measured timeline, is `launch_overhead`. The sum's rounding goes to the largest part.
    """
    lane = timeline.busiest_lane
    chosen = timeline.tasks_of(lane, Stream.COMPUTE)
    found = dict.fromkeys(CAUSES, 0.0)
    _computing(found, timeline, lane, chosen)
    history = _History(timeline=timeline, latest_T=_latest(timeline), last_T=_last_to_arrive(timeline), lane=lane)
    idle_s = np.concatenate([[0.0], timeline.end_s_T[chosen]])
    for place in np.flatnonzero(timeline.start_s_T[chosen] > idle_s[:-1]).tolist():
        task = int(chosen[place])
        history.charge(found, int(history.latest_T[task]), float(idle_s[place]), float(timeline.start_s_T[task]))
    _tail(found, history, float(idle_s[-1]))
    _balance(found, timeline.step_s)
    return found


def critical_path(timeline: Timeline) -> list[int]:
    """The tasks that decide the step's time, from its end to its start.

    Each is what ended last among what the one before it in the list waited for: a dependency, the task before on its
    stream or, in an exchange, one of these of the partner that was last to arrive.
    """
    latest, last = _latest(timeline).tolist(), _last_to_arrive(timeline).tolist()
    path, task = [], int(np.argmax(timeline.end_s_T))
    while task != _NOTHING:
        path.append(task)
        task = latest[last[task]]
    return path


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _History:
    """What each task waited for: `latest_T` ended last before it, `last_T` was the last partner at its exchange."""

    timeline: Timeline
    latest_T: Ints
    last_T: Ints
    lane: int

    def charge(self, found: dict[str, float], task: int, since_s: float, until_s: float) -> None:
        """Charges a wait that ended with `task`, walked back to its beginning."""
        tasks, start_s_T = self.timeline.program.tasks, self.timeline.start_s_T
        while until_s > since_s:
            if task == _NOTHING or (tasks.lane_T[task] == self.lane and tasks.stream_T[task] == Stream.COMPUTE):
                found["launch_overhead"] += until_s - since_s
                return
            if tasks.lane_T[task] != self.lane:
                self._elsewhere(found, task, since_s, until_s)
                return
            from_s = max(since_s, float(start_s_T[task]))
            met_s = min(max(from_s, float(start_s_T[self.last_T[task]])), until_s)
            found[self._whose(int(self.last_T[task]))] += met_s - from_s
            found[_OF_KIND[self.timeline.program.kind(task)]] += until_s - met_s
            task, until_s = int(self.latest_T[task]), from_s

    def _elsewhere(self, found: dict[str, float], task: int, since_s: float, until_s: float) -> None:
        """A wait for a task of another lane: a send's transfer is traffic, what came before it is that lane's doing."""
        sent_s = until_s
        if self.timeline.program.tasks.stream_T[task] == Stream.PIPELINE:
            sent_s = min(max(since_s, float(self.timeline.start_s_T[task])), until_s)
        found["pipeline_traffic"] += until_s - sent_s
        found[self._whose(task)] += sent_s - since_s

    def _whose(self, task: int) -> str:
        """The cause of a wait for the lane of `task`."""
        program = self.timeline.program
        same = program.lanes[program.tasks.lane_T[task]].stage == program.lanes[self.lane].stage
        return "imbalance" if same else "pipeline_bubble"


def _computing(found: dict[str, float], timeline: Timeline, lane: int, chosen: Ints) -> None:
    program = timeline.program
    causes = [CAUSES.index(_OF_KIND.get(work.kind, "dense_compute")) for work in program.works]
    cause = np.array(causes, np.int64)[program.tasks.unit_T[chosen]]
    launch, lost, rest = _parts_s(timeline, chosen)
    found.update(zip(CAUSES, np.bincount(cause, weights=rest, minlength=len(CAUSES)).tolist(), strict=True))
    found["launch_overhead"] += float(launch.sum())
    found["overlap_slowdown"] += float(lost.sum())
    over_s = min(max(0.0, _beyond_mean_s(timeline, lane)), found["expert_compute"])
    found["expert_compute"] -= over_s
    found["imbalance"] += over_s


def _parts_s(timeline: Timeline, chosen: Ints) -> tuple[Floats, Floats, Floats]:
    """Of the time of each chosen task: waits for launches, what exchanges beside it cost, and the rest."""
    seconds = timeline.end_s_T[chosen] - timeline.start_s_T[chosen]
    launch = np.minimum(timeline.launch_s_T[chosen], seconds)
    known = np.zeros(len(chosen)) if timeline.lost_s_T is None else timeline.lost_s_T[chosen]
    lost = np.minimum(known, seconds - launch)
    return launch, lost, seconds - launch - lost


def _beyond_mean_s(timeline: Timeline, lane: int) -> float:
    """Seconds of a lane's experts less their mean over the GPUs of its stage."""
    program, tasks = timeline.program, timeline.program.tasks
    is_experts = np.array([work.kind == "experts" for work in program.works], np.bool_)
    compute = np.flatnonzero(tasks.stream_T == Stream.COMPUTE)
    chosen = compute[is_experts[tasks.unit_T[compute]]]
    own = _parts_s(timeline, chosen)[2]
    by_lane = np.bincount(tasks.lane_T[chosen], weights=own, minlength=len(program.lanes))
    stage = program.lanes[lane].stage
    weight = np.array([each.multiplicity if each.stage == stage else 0 for each in program.lanes])
    return float(by_lane[lane] - by_lane @ weight / weight.sum())


def _tail(found: dict[str, float], history: _History, since_s: float) -> None:
    """What follows the lane's last computation: its own exchanges, then those who are still at work when it is done."""
    timeline = history.timeline
    own = np.flatnonzero(timeline.program.tasks.lane_T == history.lane)
    last = int(own[np.argmax(timeline.end_s_T[own])])
    done_s = max(since_s, float(timeline.end_s_T[last]))
    history.charge(found, last, since_s, done_s)
    history.charge(found, int(np.argmax(timeline.end_s_T)), done_s, timeline.step_s)


def _balance(found: dict[str, float], step_s: float) -> None:
    """Makes `sum` of the parts the step to the last bit; rounding to even may refuse a whole residue but take half."""
    largest_first = sorted(found, key=lambda cause: found[cause], reverse=True)
    for cause, part in product(largest_first, (1.0, 0.5, 0.25)):
        residue_s = step_s - sum(found.values())
        if residue_s == 0.0:
            return
        found[cause] = max(0.0, found[cause] + part * residue_s)


def _latest(timeline: Timeline) -> Ints:
    """What ended last among what each task waited for: a dependency, or the task before on its stream."""
    program, tasks = timeline.program, timeline.program.tasks
    order = np.argsort(tasks.lane_T * len(Stream) + tasks.stream_T, kind="stable")
    same = (np.diff(tasks.lane_T[order]) == 0) & (np.diff(tasks.stream_T[order]) == 0)
    before = np.concatenate([program.before_D, order[:-1][same]])
    after = np.concatenate([program.after_D, order[1:][same]])
    by_end = np.argsort(timeline.end_s_T[before], kind="stable")
    latest = np.full(len(tasks), _NOTHING, np.int64)
    latest[after[by_end]] = before[by_end]
    return latest


def _last_to_arrive(timeline: Timeline) -> Ints:
    """The partner that came last to each task's exchange; the task itself where it is alone.

    The n-th task of each lane in one meeting are partners.
    """
    program, tasks = timeline.program, timeline.program.tasks
    last = np.arange(len(tasks))
    together = np.array([len(meeting.lanes) > 1 for meeting in program.meetings], np.bool_)
    away = np.flatnonzero(tasks.stream_T != Stream.COMPUTE)
    away = away[together[tasks.unit_T[away]]]
    if not len(away):
        return last
    order = away[np.lexsort((tasks.lane_T[away], tasks.unit_T[away]))]
    first = np.flatnonzero(np.append(True, (np.diff(tasks.unit_T[order]) != 0) | (np.diff(tasks.lane_T[order]) != 0)))
    turn = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    meeting_A = tasks.unit_T[order] * (turn.max() + 1) + turn
    by_start = np.argsort(timeline.start_s_T[order], kind="stable")
    latest = np.zeros(int(meeting_A.max()) + 1, np.int64)
    latest[meeting_A[by_start]] = order[by_start]
    last[order] = latest[meeting_A]
    return last
