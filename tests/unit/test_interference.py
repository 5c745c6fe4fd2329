"""Kernels and exchanges of one GPU slow each other down by the shares of its sheet, in both engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import Cost, CostModel, Shares
from moeplan.domain.causes import breakdown_s
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange, Flows, Lane, Phase, Program, Rendezvous, Stream, Tasks, Work
from moeplan.domain.timeline import Timeline
from moeplan.simulator.simulate import simulate

GPUS = sorted((Path(__file__).parents[2] / "cost_models" / "gpus").glob("*.yaml"))
COMPUTE, TENSOR, EXPERT = Stream.COMPUTE, Stream.TENSOR, Stream.EXPERT
ENGINES = ("simpy", "compiled")


@dataclass(frozen=True)
class Costs:
    """A work's kind is its seconds."""

    shares: Shares

    def cost(self, work: Work) -> Cost:
        return Cost(float(work.kind), 0.0)


@dataclass(frozen=True)
class Wire:
    """An exchange of some lanes: what each of them sends over the wires of its own, or all over one."""

    size_L: dict[int, float]
    latency_s: float = 0.0
    is_shared: bool = False
    stream: Stream = TENSOR


Row = tuple[int, float | int, bool]
"""Lane, seconds of kernels or number of the exchange, and whether it is an exchange."""


def step(
    rows: Sequence[Row], wires: Sequence[Wire], shares: Shares, *, engine: str, arbitration: str = "fair"
) -> Timeline:
    """What the lanes do, one after another on each stream, over wires of 1 byte/s."""
    num_lanes = 1 + max(row[0] for row in rows)
    sizes = [(number, lane, size) for number, wire in enumerate(wires) for lane, size in wire.size_L.items()]
    crossing = np.zeros((len(sizes), len(wires) * num_lanes))
    for place, (number, lane, _) in enumerate(sizes):
        crossing[place, 0 if wires[number].is_shared else number * num_lanes + lane] = 1.0
    flows = Flows(
        share_C=np.array([size for _, _, size in sizes]), extra_bytes_C=np.zeros(len(sizes)),
        count_C=np.ones(len(sizes), np.int64), crossing_CK=crossing,
        capacity_bytes_per_s_K=np.ones(crossing.shape[1]), link_kind_K=("wire",) * crossing.shape[1],
        num_links_K=np.ones(crossing.shape[1], np.int64), lanes_C=tuple((lane,) for _, lane, _ in sizes),
    )  # fmt: skip
    classes = [tuple(c for c, each in enumerate(sizes) if each[0] == number) for number in range(len(wires))]
    meetings = [
        Rendezvous(
            exchange=number, lanes=tuple(sorted(wire.size_L)),
            phases=(Phase(latency_s=wire.latency_s, classes=classes[number]),),
        )
        for number, wire in enumerate(wires)
    ]  # fmt: skip
    kinds, group = {TENSOR: "tensor", EXPERT: "dispatch"}, np.zeros((1, 1), np.int64)
    exchanges = tuple(
        Exchange(kind=kinds[wire.stream], operation="all_to_all", algorithm="", groups_NG=group, size_bytes=1.0)
        for wire in wires
    )
    works = tuple(Work(kind=str(float(what)), kernels=()) for _, what, away in rows if not away)
    number = iter(range(len(works)))
    none = np.zeros(len(rows), np.int64)
    tasks = Tasks(
        lane_T=np.array([row[0] for row in rows]),
        stream_T=np.array([int(wires[int(what)].stream) if away else int(COMPUTE) for _, what, away in rows]),
        unit_T=np.array([int(what) if away else next(number) for _, what, away in rows]), pass_T=none, layer_T=none,
        microbatch_T=none, chunk_T=none,
    )  # fmt: skip
    nothing = np.zeros(0, np.int64)
    program = Program(
        lanes=tuple(Lane(stage=0, ranks_R=np.array([rank])) for rank in range(num_lanes)), works=works,
        exchanges=exchanges, meetings=tuple(meetings), flows=flows, tasks=tasks, before_D=nothing, after_D=nothing,
        arbitration=arbitration, micro_op_bytes=1e9, step_tokens=1, model_flops=1.0, num_gpus=num_lanes,
    )  # fmt: skip
    return simulate(program, Costs(shares), engine=engine)  # type: ignore[arg-type]


def kernels(lane: int, seconds: float) -> Row:
    return lane, seconds, False


def exchange(lane: int, number: int = 0) -> Row:
    return lane, number, True


# ---- by hand


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_go_at_their_share_while_an_exchange_moves(engine: str) -> None:
    """4 s of exchange let 2 s of kernels pass; the other 8 s are undisturbed."""
    found = step([kernels(0, 10), exchange(0)], [Wire({0: 4.0})], Shares(compute=0.5), engine=engine)
    assert found.end_s_T.tolist() == [12.0, 4.0]
    assert found.lost_s_T is not None
    assert found.lost_s_T.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exchange_goes_at_its_share_while_a_lane_computes(engine: str) -> None:
    """3 s of kernels let 1.5 bytes pass; the other 2.5 take 2.5 s."""
    found = step([kernels(0, 3), exchange(0)], [Wire({0: 4.0})], Shares(exchange=0.5), engine=engine)
    assert found.end_s_T.tolist() == [3.0, 5.5]
    assert found.lost_s_T is not None
    assert found.lost_s_T.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_half_for_each_hides_nothing(engine: str) -> None:
    """As where the transfer is work of the same core."""
    found = step([kernels(0, 4), exchange(0)], [Wire({0: 4.0})], Shares(0.5, 0.5), engine=engine)
    assert found.step_s == pytest.approx(8.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_exchanges_at_once_cost_no_more_than_one(engine: str) -> None:
    wires = [Wire({0: 4.0}), Wire({0: 4.0}, stream=EXPERT)]
    found = step([kernels(0, 10), exchange(0), exchange(0, 1)], wires, Shares(compute=0.5), engine=engine)
    assert found.end_s_T.tolist() == [12.0, 4.0, 4.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_kernel_after_another_leaves_no_gap_to_the_exchange(engine: str) -> None:
    rows = [*(kernels(0, 1) for _ in range(4)), exchange(0)]
    found = step(rows, [Wire({0: 3.0})], Shares(exchange=0.5), engine=engine)
    assert found.end_s_T.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_waiting_for_a_partner_costs_nothing_and_latency_does(engine: str) -> None:
    """Lane 1 comes after 5 s; then 2 s pass before the 4 bytes flow: lane 0 loses half of 6 s."""
    wires = [Wire({0: 4.0, 1: 4.0}, latency_s=2.0), Wire({1: 5.0})]
    rows = [kernels(0, 20), exchange(0), exchange(1, 1), exchange(1)]
    found = step(rows, wires, Shares(compute=0.5), engine=engine)
    assert found.end_s_T.tolist() == [23.0, 11.0, 5.0, 11.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lane_whose_part_is_done_computes_at_full_speed_again(engine: str) -> None:
    rows = [kernels(0, 10), exchange(0), kernels(1, 10), exchange(1)]
    found = step(rows, [Wire({0: 1.0, 1: 4.0})], Shares(compute=0.5), engine=engine)
    assert found.end_s_T.tolist() == [10.5, 1.0, 12.0, 4.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exchange_that_is_not_let_through_yet_costs_nothing(engine: str) -> None:
    wires = [Wire({0: 4.0}), Wire({0: 4.0}, stream=EXPERT)]
    rows = [kernels(0, 10), exchange(0), exchange(0, 1)]
    found = step(rows, wires, Shares(compute=0.5), engine=engine, arbitration="fifo")
    assert found.end_s_T.tolist() == [14.0, 4.0, 8.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_gets_what_a_slowed_flow_leaves(engine: str) -> None:
    """Two flows on one wire, half a byte/s each; that of lane 0 has half of this while lane 0 computes."""
    rows = [kernels(0, 4), exchange(0), exchange(1, 1)]
    found = step(
        rows, [Wire({0: 2.0}, is_shared=True), Wire({1: 2.0}, is_shared=True)], Shares(exchange=0.5), engine=engine
    )
    assert found.end_s_T.tolist() == [4.0, 5.0, 4.0]


# ---- real plans

PLANS: list[dict[str, Any]] = [
    {"dp": 4, "ep": 4, "stages": (4,), "overlap_degree": 2},
    {"dp": 4, "ep": 2, "stages": (4,), "overlap_degree": 2, "zero_dense": 2, "zero_expert": 2, "arbitration": "fifo"},
    {"dp": 2, "pp": 2, "ep": 2, "stages": (2, 2), "zero_dense": 2, "arbitration": "a2a_first"},
    {"dp": 4, "ep": 4, "stages": (4,), "zero_dense": 3},
]
BESIDE = [Shares(), Shares(0.8, 1.0), Shares(1.0, 0.6), Shares(0.8, 0.6)]


@lru_cache
def simulated(number: int, skew: float, shares: Shares, *, folded: bool = True) -> Timeline:
    given = catalogue.load("small-two-nodes", changes={"routing.skew": skew})
    gpu = replace(
        given.cluster.gpu, compute_share_beside_exchange=shares.compute, exchange_share_beside_compute=shares.exchange
    )
    return simulate(compile_plan(Plan(**PLANS[number]), given, folded=folded), CostModel(gpu=gpu))


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(PLANS)))
def test_slower_kernels_make_these_steps_longer_and_lose_what_the_share_says(number: int, skew: float) -> None:
    """Slower flows need not: who comes later may find the wires free."""
    alone, computes, exchanges, both = (simulated(number, skew, shares) for shares in BESIDE)
    assert alone.step_s < computes.step_s
    assert exchanges.step_s < both.step_s
    for timeline in (computes, both):
        compute = timeline.program.tasks.stream_T == COMPUTE
        assert timeline.lost_s_T is not None
        spent, lost = (timeline.end_s_T - timeline.start_s_T)[compute], timeline.lost_s_T[compute]
        assert lost.min() >= 0
        assert (lost <= 0.2 * spent * (1 + 1e-9) + 1e-12).all()
        assert lost.sum() > 0.005 * spent.sum()


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(PLANS)))
def test_the_loss_of_the_busiest_lane_is_a_cause_of_its_own(number: int, skew: float) -> None:
    for shares in BESIDE:
        timeline = simulated(number, skew, shares)
        found, mine = breakdown_s(timeline), timeline.program.tasks.lane_T == timeline.busiest_lane
        assert timeline.lost_s_T is not None
        assert found["overlap_slowdown"] == pytest.approx(timeline.lost_s_T[mine].sum(), rel=1e-9, abs=1e-15)
        assert (found["overlap_slowdown"] > 0) == (shares.compute < 1)
        assert sum(found.values()) == timeline.step_s


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_lanes_that_stand_for_several_gpus_say_the_same_as_each_gpu_alone(number: int) -> None:
    for skew in (0.0, 1.0):
        both = [simulated(number, skew, Shares(0.8, 0.6), folded=folded).step_s for folded in (True, False)]
        assert both[0] == pytest.approx(both[1], rel=1e-9)


# ---- sheets


def written(name: str) -> dict[str, Any]:
    """A sheet laid over what it extends."""
    data = YAML(typ="safe", pure=True).load((GPUS[0].parent / f"{name}.yaml").read_text(encoding="utf-8"))
    base = written(data["extends"]) if "extends" in data else {"calibration": {}, "sources": {}}
    return {part: {**base[part], **data.get(part, {})} for part in ("calibration", "sources")}


@pytest.mark.parametrize("path", GPUS, ids=lambda path: path.stem)
def test_every_sheet_says_what_kernels_and_exchanges_leave_each_other(path: Path) -> None:
    sheet = written(path.stem)
    for key in ("compute_share_beside_exchange", "exchange_share_beside_compute"):
        figure = sheet["calibration"][key]
        assert figure["source"] in sheet["sources"]
        assert 50 <= float(figure["value"].removesuffix(" %")) <= 100


def test_an_h800_computes_with_112_of_132_sms_beside_an_exchange() -> None:
    gpu = catalogue.load("deepseek-v3-2048xh800").cluster.gpu
    assert gpu.compute_share_beside_exchange == pytest.approx(112 / gpu.num_sms, abs=5e-4)
    assert 0.5 <= gpu.exchange_share_beside_compute <= 1 / 1.3
