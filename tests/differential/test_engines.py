"""The compiled engine against the readable one: random programs, and real plans; operations on serial resources
against a plain loop.

Random programs cannot deadlock: a global order of operations is drawn, every stream and every dependency follows it,
and nothing but the tail of the step waits for exchanges that may be held back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import Cost, CostModel, Shares
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange, Flows, Lane, Phase, Program, Rendezvous, Stream, Tasks, Work
from moeplan.domain.timeline import Timeline
from moeplan.errors import SimulationError
from moeplan.simulator.dag import run_dag
from moeplan.simulator.noise import Noise
from moeplan.simulator.simulate import COMPILED_FROM, simulate

STREAM_OF = {
    "tensor": Stream.TENSOR, "dispatch": Stream.EXPERT, "combine": Stream.EXPERT, "gradients": Stream.SHARD,
    "parameters": Stream.SHARD, "send": Stream.PIPELINE,
}  # fmt: skip
ARBITRATIONS = ("fair", "fifo", "a2a_first")
SHARES = (Shares(), Shares(0.85, 1.0), Shares(1.0, 0.6), Shares(0.8, 0.5))


@dataclass(frozen=True)
class Costs:
    """A work's kind is the number of its seconds."""

    seconds: tuple[float, ...]
    shares: Shares

    def cost(self, work: Work) -> Cost:
        return Cost(self.seconds[int(work.kind)], 0.0)


def same(program: Program, costs: Any, **options: Any) -> Timeline:
    """The timeline, which both engines say to 1e-9 of the step."""
    wanted, found = (simulate(program, costs, engine=engine, **options) for engine in ("simpy", "compiled"))
    assert differ(wanted, found) <= 1e-9
    return found


def differ(one: Timeline, other: Timeline) -> float:
    """The worst difference of a start, an end or a loss, as a part of the step."""
    both = [(one.start_s_T, other.start_s_T), (one.end_s_T, other.end_s_T), (one.lost_s_T, other.lost_s_T)]
    worst = max(float(np.abs(mine - its).max(initial=0.0)) for mine, its in both)
    return worst / max(one.step_s, 1e-300)


# ---- random programs


class Draw:
    """Draws a program. With `even`, all sizes are small whole numbers, so that much happens at the same time."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.even = bool(self.rng.random() < 0.4)
        self.num_lanes, self.num_links = int(self.rng.integers(1, 6)), int(self.rng.integers(1, 6))
        self.classes: list[tuple[float, float, np.ndarray, tuple[int, ...]]] = []

    def number(self, most: float, *, zero: float = 0.1) -> float:
        if self.rng.random() < zero:
            return 0.0
        return float(self.rng.integers(1, 4)) if self.even else float(self.rng.uniform(0.01, most))

    def some(self, items: Any, most: int) -> tuple[int, ...]:
        size = int(self.rng.integers(1, min(most, len(items)) + 1))
        return tuple(sorted(int(each) for each in self.rng.choice(items, size=size, replace=False)))

    def flow_class(self, lanes: tuple[int, ...]) -> int:
        ends = set(self.some(lanes, 2)) | (
            set(self.some(range(self.num_lanes), 1)) if self.rng.random() < 0.3 else set()
        )
        crossing = np.zeros(self.num_links)
        crossing[list(self.some(range(self.num_links), 3))] = self.rng.choice([1.0, 1.0, 2.0, 1 / 3])
        extra = 0.0 if self.even else self.number(0.1, zero=0.7)
        self.classes.append((self.number(1.0), extra, crossing, tuple(sorted(ends))))
        return len(self.classes) - 1

    def phase(self, lanes: tuple[int, ...]) -> Phase:
        num_classes = int(self.rng.choice([0, 1, 1, 2, 3, 4]))
        copy = 0.0 if self.even else self.number(0.1, zero=0.7)
        classes = tuple(self.flow_class(lanes) for _ in range(num_classes))
        return Phase(latency_s=self.number(0.5, zero=0.5), classes=classes, copy_s_per_byte=copy)

    def meeting(self, exchange: int) -> Rendezvous:
        lanes = self.some(range(self.num_lanes), 4)
        num_phases = int(self.rng.choice([0, 1, 1, 1, 2, 3]))
        return Rendezvous(exchange=exchange, lanes=lanes, phases=tuple(self.phase(lanes) for _ in range(num_phases)))

    def exchange(self) -> Exchange:
        kind = str(self.rng.choice(list(STREAM_OF)))
        group = np.zeros((1, 1), np.int64)
        size = self.number(5.0, zero=0.05)
        return Exchange(kind=kind, operation="all_to_all", algorithm="linear", groups_NG=group, size_bytes=size)

    def flows(self) -> Flows:
        capacity = (
            self.rng.integers(1, 3, self.num_links).astype(float)
            if self.even
            else self.rng.uniform(0.5, 3, self.num_links)
        )
        share, extra, crossing, lanes = zip(*self.classes, strict=True) if self.classes else ((), (), (), ())
        return Flows(
            share_C=np.array(share, float), extra_bytes_C=np.array(extra, float),
            count_C=np.ones(len(share), np.int64),
            crossing_CK=np.array(crossing, float).reshape(len(share), self.num_links),
            capacity_bytes_per_s_K=capacity, link_kind_K=("wire",) * self.num_links,
            num_links_K=np.ones(self.num_links, np.int64), lanes_C=tuple(lanes),
        )  # fmt: skip

    def program(self) -> tuple[Program, Costs]:
        exchanges = tuple(self.exchange() for _ in range(self.rng.integers(1, 7)))
        meetings = tuple(self.meeting(number) for number in range(len(exchanges)))
        works = tuple(Work(kind=str(number), kernels=()) for number in range(6))
        listing = Listing(self, exchanges, meetings)
        none = np.zeros(len(listing.lane), np.int64)
        tasks = Tasks(
            lane_T=np.array(listing.lane, np.int64), stream_T=np.array(listing.stream, np.int64),
            unit_T=np.array(listing.unit, np.int64), pass_T=none, layer_T=none, microbatch_T=none, chunk_T=none,
        )  # fmt: skip
        after = np.array(listing.after, np.int64).reshape(-1, 2)
        program = Program(
            lanes=tuple(Lane(stage=0, ranks_R=np.array([rank])) for rank in range(self.num_lanes)), works=works,
            exchanges=exchanges, meetings=meetings, flows=self.flows(), tasks=tasks, before_D=after[:, 0],
            after_D=after[:, 1], arbitration=str(self.rng.choice(ARBITRATIONS)),
            micro_op_bytes=float(self.rng.choice([0.7, 1.5, 100.0])), step_tokens=1, model_flops=1.0,
            num_gpus=self.num_lanes,
        )  # fmt: skip
        seconds = tuple(self.number(2.0, zero=0.15) for _ in works)
        return program, Costs(seconds, SHARES[int(self.rng.integers(len(SHARES)))])


class Listing:
    """The tasks of each lane and stream in one global order, each behind some that were listed before."""

    def __init__(self, draw: Draw, exchanges: tuple[Exchange, ...], meetings: tuple[Rendezvous, ...]) -> None:
        self.draw, self.exchanges, self.meetings = draw, exchanges, meetings
        self.lane: list[int] = []
        self.stream: list[int] = []
        self.unit: list[int] = []
        self.after: list[tuple[int, int]] = []
        self.may_wait_for: list[int] = []
        num_operations = int(draw.rng.integers(3, 25))
        for number in range(num_operations):
            self.operation(is_tail=number >= 0.8 * num_operations)

    def operation(self, *, is_tail: bool) -> None:
        rng, first = self.draw.rng, len(self.lane)
        known = list(range(first)) if is_tail else self.may_wait_for
        number = int(rng.integers(len(self.meetings)))
        stream = STREAM_OF[self.exchanges[number].kind]
        if rng.random() < 0.5 or (is_tail and stream != Stream.SHARD):
            stream = Stream.COMPUTE
            self.task(int(rng.integers(self.draw.num_lanes)), stream, int(rng.integers(6)), known)
        else:
            for lane in self.meetings[number].lanes:
                self.task(lane, stream, number, known)
        if stream != Stream.SHARD and not is_tail:
            self.may_wait_for = [*known, *range(first, len(self.lane))]

    def task(self, lane: int, stream: Stream, unit: int, known: list[int]) -> None:
        for before in self.draw.rng.permutation(known)[: self.draw.rng.integers(0, 3)]:
            self.after.append((int(before), len(self.lane)))
        self.lane.append(lane)
        self.stream.append(int(stream))
        self.unit.append(unit)


BATCH = 100


@pytest.mark.parametrize("batch", range(20))
def test_both_engines_say_the_same_of_2000_random_programs(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        program, costs = Draw(seed).program()
        noise = Noise(jitter=0.3, stragglers=1, slowdown=2.0, seed=seed) if seed % 5 == 0 else None
        same(program, costs, noise=noise)


def test_the_random_programs_are_not_trivial() -> None:
    """All arbitrations and shares, exchanges that share links, that wait for one another, and that come in parts."""
    programs = [Draw(seed).program() for seed in range(200)]
    assert {program.arbitration for program, _ in programs} == set(ARBITRATIONS)
    assert {costs.shares for _, costs in programs} == set(SHARES)
    timelines = [simulate(*each, engine="simpy") for each in programs]
    assert sum(bool((each.lost_s_T > 0).any()) for each in timelines) > 30
    assert np.mean([len(each.program.tasks) for each in timelines]) > 15
    cut = [max(each.size_bytes for each in program.exchanges) > program.micro_op_bytes for program, _ in programs]
    assert sum(cut) > 50


@pytest.mark.parametrize("what", ["capacity", "work", "share", "arbitration"])
def test_the_comparison_finds_engines_that_differ(what: str) -> None:
    """One engine is told a program in which one number differs by a millionth, or another rule."""
    found = 0.0
    for seed in range(40):
        program, costs = Draw(seed).program()
        other, its = program, costs
        if what == "capacity":
            wider = program.flows.capacity_bytes_per_s_K * (1 + 1e-6)
            other = replace(program, flows=replace(program.flows, capacity_bytes_per_s_K=wider))
        elif what == "work":
            its = replace(costs, seconds=tuple(seconds * (1 + 1e-6) for seconds in costs.seconds))
        elif what == "share":
            its = replace(costs, shares=Shares(costs.shares.compute * (1 - 1e-6), costs.shares.exchange * (1 - 1e-6)))
        else:
            other = replace(program, arbitration="fifo" if program.arbitration == "fair" else "fair")
        found = max(found, differ(simulate(program, costs, engine="simpy"), simulate(other, its, engine="compiled")))
    assert found > 1e-8


def test_both_engines_name_the_first_task_that_never_ends() -> None:
    program, costs = next(each for each in map(drawn, range(100)) if len(each[0].tasks) > 5)
    last = len(program.tasks) - 1
    stuck = replace(program, before_D=np.append(program.before_D, last), after_D=np.append(program.after_D, 0))
    said = []
    for engine in ("simpy", "compiled"):
        with pytest.raises(SimulationError, match="deadlock: task") as error:
            simulate(
                replace(stuck, before_D=np.append(stuck.before_D, 0), after_D=np.append(stuck.after_D, last)),
                costs,
                engine=engine,
            )  # type: ignore[arg-type]
        said.append(str(error.value))
    assert said[0] == said[1]


def drawn(seed: int) -> tuple[Program, Costs]:
    return Draw(seed).program()


# ---- real plans


@lru_cache
def compiled(
    scenario: str, changes: tuple[tuple[str, Any], ...], plan: tuple[tuple[str, Any], ...]
) -> tuple[Program, Any]:
    given = catalogue.load(scenario, changes=dict(changes))
    chosen = Plan(**dict(plan), capacity=given.choices.capacity, precision=given.choices.precision)
    return compile_plan(chosen, given), given.cluster.gpu


DEEPSEEK = {"dp": 128, "pp": 16, "ep": 64, "stages": (3, *(4,) * 13, 3, 3)}
MIXTRAL = {"dp": 16, "pp": 4, "ep": 8, "stages": (8, 8, 8, 8)}
REAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("tiny-moe-2-ranks", {}, {"dp": 2, "ep": 2}),
    ("small-4-gpus", {}, {"dp": 4, "ep": 4}),
    ("small-8-gpus", {}, {"dp": 8, "ep": 8, "overlap_degree": 2}),
    ("small-two-nodes", {"routing.skew": 1.0}, {"dp": 4, "ep": 4, "zero_dense": 3, "zero_expert": 3}),
    ("small-two-nodes", {}, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}),
    ("small-two-nodes", {"routing.skew": 0.5}, {"dp": 4, "ep": 4, "all_to_all": "two_stage"}),
    ("mixtral-8x7b-64xh100", {"workload.global_batch": 64, "routing.skew": 0.8}, MIXTRAL),
    ("mixtral-8x7b-64xh100", {"workload.global_batch": 32, "routing.skew": 0.8}, {**MIXTRAL, "overlap_degree": 2}),
    ("deepseek-v3-2048xh800", {"workload.global_batch": 512}, DEEPSEEK),
]


@pytest.mark.parametrize("shares", [Shares(), Shares(0.848, 0.62)], ids=["alone", "beside"])
@pytest.mark.parametrize("arbitration", ARBITRATIONS)
@pytest.mark.parametrize("number", range(len(REAL)))
def test_both_engines_say_the_same_of_real_plans(number: int, arbitration: str, shares: Shares) -> None:
    scenario, changes, plan = REAL[number]
    layers = len(catalogue.load(scenario).model.all_layers)
    whole = {"stages": (layers,), "arbitration": arbitration, **plan}
    program, gpu = compiled(scenario, tuple(changes.items()), tuple(whole.items()))
    slow = replace(gpu, compute_share_beside_exchange=shares.compute, exchange_share_beside_compute=shares.exchange)
    same(program, CostModel(gpu=slow))


def test_which_engine_runs_hangs_on_the_program_alone() -> None:
    program, gpu = compiled("small-4-gpus", (), (("dp", 4), ("ep", 4), ("stages", (4,))))
    assert len(program.tasks) != COMPILED_FROM
    named = "compiled" if len(program.tasks) >= COMPILED_FROM else "simpy"
    first, again = simulate(program, CostModel(gpu=gpu)), simulate(program, CostModel(gpu=gpu), engine=named)  # type: ignore[arg-type]
    assert first.end_s_T.tobytes() == again.end_s_T.tobytes()


# ---- operations on serial resources


def by_plain_loop(duration: np.ndarray, resource: np.ndarray, priority: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """End of each operation: from instant to instant, looking at everything."""
    size, now = len(duration), 0.0
    end, running = np.full(size, np.inf), dict[int, int]()
    waits = [{int(before) for before, after in ties if after == each} for each in range(size)]
    started: set[int] = set()
    while True:
        done = {each for each in started if end[each] <= now}
        running = {where: each for where, each in running.items() if each not in done}
        ready = [each for each in range(size) if each not in started and waits[each] <= done]
        for each in sorted(ready, key=lambda each: (priority[each], each)):
            if int(resource[each]) not in running:
                running[int(resource[each])] = each
                started.add(each)
                end[each] = now + duration[each]
        if not running:
            return end
        now = min(end[each] for each in running.values())


@pytest.mark.parametrize("even", [False, True])
def test_operations_run_as_a_plain_loop_says(even: bool) -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        size, num_resources = int(rng.integers(1, 25)), int(rng.integers(1, 5))
        duration = rng.integers(0, 3, size).astype(float) if even else rng.random(size)
        resource, priority = rng.integers(0, num_resources, size), rng.integers(-2, 3, size)
        ties = np.array([(b, a) for a in range(size) for b in range(a) if rng.random() < 0.15], np.int64).reshape(-1, 2)
        start, end = run_dag(duration, resource, priority, ties[:, 0], ties[:, 1])
        assert end.tolist() == by_plain_loop(duration, resource, priority, ties).tolist()
        assert np.array_equal(start + duration, end)


def test_operations_that_wait_for_one_another_never_start() -> None:
    start, end = run_dag(np.ones(4), np.zeros(4, int), np.zeros(4, int), np.array([1, 2, 0]), np.array([2, 1, 3]))
    assert start.tolist() == [0.0, -1.0, -1.0, 1.0]
    assert end.tolist() == [1.0, -1.0, -1.0, 2.0]


def test_a_resource_takes_the_most_urgent_of_all_that_came_in_an_instant() -> None:
    """2 and 3 are ready at once, when 0 and 1 end; 3 is the more urgent."""
    start, _ = run_dag(np.ones(4), np.array([0, 1, 2, 2]), np.array([0, 0, 1, 0]), np.array([0, 1]), np.array([2, 3]))
    assert start.tolist() == [0.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([1.0], [0, 0], [0], [], []), "arrays of 1, 2, 1, 0, 0 values"),
        (([-1.0], [0], [0], [], []), "duration_s_T: holds a value below 0"),
        (([float("nan")], [0], [0], [], []), "duration_s_T: holds a value below 0"),
        (([1.0], [-1], [0], [], []), "resource_T: -1 to -1; use 0 to"),
        (([1.0, 1.0], [0, 0], [0, 0], [0], [2]), "after_D: 2 to 2; use 0 to 1"),
    ],
)
def test_operations_that_do_not_fit_together_are_refused(given: tuple[list[Any], ...], said: str) -> None:
    arrays = [np.array(given[0]), *(np.array(each, np.int64) for each in given[1:])]
    with pytest.raises(SimulationError, match=said):
        run_dag(*arrays)


def test_no_operations_take_no_time() -> None:
    nothing = np.zeros(0, np.int64)
    assert [len(each) for each in run_dag(np.zeros(0), nothing, nothing, nothing, nothing)] == [0, 0]
