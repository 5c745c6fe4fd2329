"""When flows on shared links end: our engine, SimGrid's recorded answers, and progressive filling by the book.

SimGrid is not needed here: `tests/data/simgrid/make.py` has asked it. Axes: K links, F flows, A those under way.
"""

import gzip
import importlib
import json
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _progressive_filling import filled, finish_times, incidence
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeplan.network import fluid

HOUSE = Path(__file__).parents[2]
RECORDED: dict[str, Any] = json.loads(gzip.decompress((HOUSE / "tests/data/simgrid/cases.json.gz").read_bytes()))
CASES = {case["name"]: case for case in RECORDED["cases"]}
CLOSE = 1e-9
"""How far apart two programs may be, relative to the time of a flow's end."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Flows on links, as both programs take them."""

    paths: list[list[int]]
    size_bytes_F: Floats
    start_s_F: Floats
    weight_F: Floats
    cap_F: Floats
    capacity_K: Floats

    def alone_s_F(self) -> Floats:
        """How long each flow would take if it had its links for itself."""
        narrowest_F = [min((self.capacity_K[link] for link in path), default=np.inf) for path in self.paths]
        return self.size_bytes_F / np.minimum(self.cap_F, narrowest_F)


def recorded(name: str) -> Case:
    """A case that SimGrid has answered."""
    case = CASES[name]
    flows = len(case["path_F"])
    cap_F = case["rate_cap_bytes_per_s_F"] or [None] * flows
    return Case(
        paths=case["path_F"], size_bytes_F=np.array(case["size_bytes_F"], float), start_s_F=np.array(case["start_s_F"]),
        weight_F=np.array(case["weight_F"] or [1.0] * flows),
        cap_F=np.array([np.inf if cap is None else cap for cap in cap_F]),
        capacity_K=np.array(case["capacity_bytes_per_s_K"]),
    )  # fmt: skip


def booked(case: Case) -> Floats:
    """When flows end by the book."""
    return finish_times(
        case.paths, size_bytes_F=case.size_bytes_F, start_s_F=case.start_s_F, weight_F=case.weight_F,
        cap_F=case.cap_F, capacity_K=case.capacity_K,
    )  # fmt: skip


def ours(case: Case) -> Floats:
    """When flows end according to moeplan; what is the same for all flows anyway is left out."""
    traffic = fluid.FlowSet(
        capacity_bytes_per_s_K=case.capacity_K,
        link_I=np.array([*chain(*case.paths)], np.int32),
        first_F1=np.array([0, *accumulate(len(path) for path in case.paths)], np.int64),
        size_bytes_F=case.size_bytes_F,
        start_s_F=case.start_s_F if case.start_s_F.any() else None,
        weight_F=case.weight_F if (case.weight_F != 1.0).any() else None,
        rate_cap_bytes_per_s_F=case.cap_F if np.isfinite(case.cap_F).any() else None,
    )
    return fluid.finish_times(traffic).finish_s_F


# ---- SimGrid


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len(CASES) >= 240
    assert sum(case["weight_F"] is not None for case in CASES.values()) >= 40
    assert sum(case["rate_cap_bytes_per_s_F"] is not None for case in CASES.values()) >= 40
    assert sum(len(set(case["start_s_F"])) > 1 for case in CASES.values()) >= 100


@pytest.mark.parametrize("name", CASES)
def test_every_flow_ends_when_simgrid_says(name: str) -> None:
    np.testing.assert_allclose(ours(recorded(name)), CASES[name]["finish_s_F"], rtol=CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_simgrid_goes_by_the_book(name: str) -> None:
    np.testing.assert_allclose(booked(recorded(name)), CASES[name]["finish_s_F"], rtol=CLOSE)


@pytest.mark.parametrize(
    ("gpus", "pattern", "oversub", "completion_s", "sum_s"),
    [
        (16, "uniform", 1.0, 0.00016777216, 0.023301688888888887),
        (16, "uniform", 2.0, 0.00029360128, 0.035381284408888894),
        (16, "zipf", 1.0, 0.00043541001999999993, 0.02069101630809517),
        (16, "zipf", 2.0, 0.0005290881799999999, 0.02918110450606205),
        (16, "sparse", 1.0, 0.0002400662639285714, 0.027195798255896034),
        (16, "sparse", 2.0, 0.0003764284933333335, 0.04254596172009164),
        (64, "uniform", 1.0, 0.00117440512, 4.216375359715556),
        (64, "uniform", 2.0, 0.0020552089600000003, 6.583976081635556),
        (64, "zipf", 1.0, 0.005225667580000002, 3.578224225554052),
        (64, "zipf", 2.0, 0.005225667579999994, 4.830807541283451),
        (64, "sparse", 1.0, 0.0008207460016050354, 0.9143885528072301),
        (64, "sparse", 2.0, 0.00114204594430761, 1.3475313432752651),
    ],
)
def test_what_is_benchmarked_ends_when_simgrid_says(
    gpus: int, pattern: str, oversub: float, completion_s: float, sum_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimGrid 3.32.0, run by `benchmarks/simgrid_runs.py`."""
    monkeypatch.syspath_prepend(HOUSE / "benchmarks")
    flows = importlib.import_module("network_workload").workload(gpus, pattern, oversub=oversub)
    traffic = fluid.FlowSet(
        capacity_bytes_per_s_K=flows.capacity_bytes_per_s_K, link_I=flows.link_I, first_F1=flows.first_F1,
        size_bytes_F=flows.size_bytes_F, start_s_F=flows.start_s_F,
    )  # fmt: skip
    finish_s_F = fluid.finish_times(traffic).finish_s_F
    assert (finish_s_F.max(), finish_s_F.sum()) == pytest.approx((completion_s, sum_s), rel=1e-11)


# ---- by the book


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few flows, many of them alike in something, since what happens at one instant is what goes wrong."""
    links, flows = draw(st.integers(1, 7)), draw(st.integers(1, 12))

    def each(usual: list[float], least: float, most: float) -> Floats:
        some = st.sampled_from(usual) | st.floats(least, most)
        return np.array(draw(st.lists(some, min_size=flows, max_size=flows)))

    path = st.lists(st.integers(0, links - 1), min_size=1, max_size=4, unique=True)
    capacity = st.sampled_from([1.0, 2.0, 3.0, 5.0, 7.5, 0.25]) | st.floats(0.1, 10.0)
    return Case(
        paths=draw(st.lists(path, min_size=flows, max_size=flows)),
        size_bytes_F=each([1.0, 2.0, 3.5, 10.0], 1e-3, 100.0),
        start_s_F=each([0.0, 0.0, 0.5, 1.0, 2.25, 6.0], 0.0, 30.0),
        weight_F=each([1.0, 1.0, 2.0, 3.0], 0.1, 10.0),
        cap_F=each([np.inf, np.inf, 1.0, 0.5, 0.1], 0.05, 10.0),
        capacity_K=np.array(draw(st.lists(capacity, min_size=links, max_size=links))),
    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(cases())
def test_every_flow_ends_when_the_book_says(case: Case) -> None:
    np.testing.assert_allclose(ours(case), booked(case), rtol=CLOSE)


def tied(rng: np.random.Generator) -> Case:
    """Small whole numbers of everything: links and caps at one level, flows that start and end at one instant."""
    links, flows = rng.integers(1, 13), rng.integers(2, 21)
    most = min(links, 6)
    return Case(
        paths=[rng.permutation(links)[: rng.integers(1, most + 1)].tolist() for _ in range(flows)],
        size_bytes_F=rng.integers(1, 5, flows) * 1.0,
        start_s_F=rng.integers(0, 4 * flows, flows) / 4,
        weight_F=rng.integers(1, rng.choice([2, 5]), flows) * 1.0,
        cap_F=rng.choice([np.inf, 0.25, 0.5, 0.75, 1.0], flows),
        capacity_K=rng.integers(1, 3, links) * 1.0,
    )


@pytest.mark.parametrize("seed", range(8))
def test_ties_of_levels_and_of_instants_are_no_trouble(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in (tied(rng) for _ in range(250)):
        np.testing.assert_allclose(ours(case), booked(case), rtol=CLOSE, err_msg=str(case))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases())
def test_every_flow_is_carried_whole_between_its_start_and_its_end(case: Case) -> None:
    """At fair rates, worked out anew for the flows that are there between one start or end and the next."""
    finish_s_F, crossing_FK = ours(case), incidence(case.paths, len(case.capacity_K))
    carried_bytes_F = np.zeros(len(case.paths))
    for begin_s, end_s in pairwise(np.unique(np.concatenate([case.start_s_F, finish_s_F]))):
        there_F = (case.start_s_F <= begin_s) & (finish_s_F > begin_s)
        rate_A = filled(crossing_FK[there_F], case.weight_F[there_F], case.cap_F[there_F], case.capacity_K)
        carried_bytes_F[there_F] += rate_A * (end_s - begin_s)
    lost_s_F = (carried_bytes_F - case.size_bytes_F) / case.size_bytes_F * (finish_s_F - case.start_s_F)
    np.testing.assert_allclose(lost_s_F, 0.0, atol=CLOSE * finish_s_F.max())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases(), st.floats(1e-3, 1e12))
def test_more_bytes_on_faster_links_take_the_same_time(case: Case, factor: float) -> None:
    more = replace(
        case, size_bytes_F=case.size_bytes_F * factor, capacity_K=case.capacity_K * factor, cap_F=case.cap_F * factor
    )
    np.testing.assert_allclose(ours(more), ours(case), rtol=CLOSE)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases(), st.floats(1e-9, 1e3))
def test_more_bytes_that_start_later_take_longer_in_proportion(case: Case, factor: float) -> None:
    longer = replace(case, size_bytes_F=case.size_bytes_F * factor, start_s_F=case.start_s_F * factor)
    np.testing.assert_allclose(ours(longer), ours(case) * factor, rtol=CLOSE)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases(), st.floats(1e-3, 1e3))
def test_only_the_ratio_of_weights_matters(case: Case, factor: float) -> None:
    np.testing.assert_allclose(ours(replace(case, weight_F=case.weight_F * factor)), ours(case), rtol=CLOSE)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases())
def test_the_order_of_flows_and_links_does_not_matter(case: Case) -> None:
    last = len(case.capacity_K) - 1
    turned = Case(
        paths=[[last - link for link in path[::-1]] for path in case.paths[::-1]],
        size_bytes_F=case.size_bytes_F[::-1].copy(), start_s_F=case.start_s_F[::-1].copy(),
        weight_F=case.weight_F[::-1].copy(), cap_F=case.cap_F[::-1].copy(), capacity_K=case.capacity_K[::-1].copy(),
    )  # fmt: skip
    np.testing.assert_allclose(ours(turned)[::-1], ours(case), rtol=CLOSE)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases(), cases())
def test_traffic_on_other_links_changes_nothing(case: Case, other: Case) -> None:
    first = len(case.capacity_K)
    paths = case.paths + [[first + link for link in path] for path in other.paths]
    joined = {
        name: np.concatenate([getattr(case, name), getattr(other, name)])
        for name in ("size_bytes_F", "start_s_F", "weight_F", "cap_F", "capacity_K")
    }
    np.testing.assert_allclose(ours(Case(paths=paths, **joined)), [*ours(case), *ours(other)], rtol=CLOSE)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases())
def test_no_flow_is_faster_than_it_would_be_alone(case: Case) -> None:
    assert (ours(case) >= (case.start_s_F + case.alone_s_F()) * (1 - CLOSE)).all()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cases())
def test_no_link_carries_more_than_it_can_after_its_first_flow_starts(case: Case) -> None:
    finish_s_F = ours(case)
    for link, capacity in enumerate(case.capacity_K):
        flows = [flow for flow, path in enumerate(case.paths) if link in path]
        if flows:
            begin_s = case.start_s_F[flows].min()
            assert finish_s_F[flows].max() >= (begin_s + case.size_bytes_F[flows].sum() / capacity) * (1 - CLOSE)


def test_a_flow_without_links_goes_at_its_cap() -> None:
    case = Case(
        paths=[[], [0]], size_bytes_F=np.array([6.0, 6.0]), start_s_F=np.array([1.0, 0.0]), weight_F=np.ones(2),
        cap_F=np.array([2.0, np.inf]), capacity_K=np.array([3.0]),
    )  # fmt: skip
    assert ours(case).tolist() == booked(case).tolist() == [4.0, 2.0]


def test_a_flow_without_bytes_ends_as_it_starts() -> None:
    case = Case(
        paths=[[0], [0]], size_bytes_F=np.array([0.0, 6.0]), start_s_F=np.array([1.0, 0.0]), weight_F=np.ones(2),
        cap_F=np.full(2, np.inf), capacity_K=np.array([3.0]),
    )  # fmt: skip
    assert ours(case).tolist() == booked(case).tolist() == [1.0, 2.0]
