"""The law of the collectives menu, on every dish found there: every byte arrives once, sent by one who has got it."""

from functools import lru_cache
from types import ModuleType

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.cost.transfer import wire_s
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Wave
from moeplan.simulator.simulate import simulate

OPERATIONS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
NAMES = menu.names("collectives")
GROUPS = {
    "one node": np.arange(8).reshape(2, 4),
    "two nodes, all": np.arange(8)[None],
    "two nodes, two each": np.array([[0, 2, 4, 6], [1, 3, 5, 7]]),
    "a rank in each node": np.arange(16).reshape(4, 4).T.copy(),
    "four nodes, two each": np.arange(16).reshape(8, 2).T.copy(),
    "out of order": np.array([[6, 0, 4, 2], [3, 5, 1, 7]]),
    "uneven": np.array([[0, 1, 2, 4, 5]]),
    "a pair": np.array([[3, 12]]),
    "alone": np.arange(4)[:, None],
}


@lru_cache
def cluster() -> Cluster:
    """Four nodes of four GPUs."""
    changes = {"cluster.nodes": 4, "cluster.gpus_per_node": 4, "cluster.nic.per_node": 4}
    return catalogue.load("mixtral-8x7b-64xh100", changes={**changes, "workload.global_batch": 64}).cluster


def cases(operation: str) -> list[tuple[str, str]]:
    """Dishes that do an operation, with the groups on which they apply."""
    found = [name for name in NAMES if operation in menu.load("collectives", name, "OPERATIONS")]
    applies = {name: menu.load("collectives", name, "applies") for name in found}
    return [(name, where) for name in found for where in GROUPS if applies[name](GROUPS[where], cluster())]


def waves(name: str, operation: str, where: str, share_GG: np.ndarray | None = None) -> list[Wave]:
    found: list[Wave] = menu.load("collectives", name, "waves")(operation, GROUPS[where], share_GG, cluster())
    return found


def places(wave: Wave, groups_NG: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Group, sending member, receiving member and share of each transfer."""
    return [
        (group, groups_NG[group].tolist().index(source), groups_NG[group].tolist().index(target), share)
        for group, source, target, share in zip(
            wave.group_F.tolist(), wave.source_F.tolist(), wave.target_F.tolist(), wave.share_F.tolist(), strict=True
        )
    ]


def matrix(size: int, seed: int) -> np.ndarray:
    """Shares of which one third are nothing, the mean row being 1."""
    rng = np.random.default_rng(seed)
    share = rng.random((size, size)) * (rng.random((size, size)) > 1 / 3)
    return share / share.sum() * size if share.any() else np.ones((size, size)) / size


@pytest.fixture(params=NAMES)
def dish(request: pytest.FixtureRequest) -> ModuleType:
    """Each algorithm on the menu."""
    return menu.module("collectives", request.param)


def test_every_dish_does_an_operation_that_exists_on_some_group(dish: ModuleType) -> None:
    assert set(dish.OPERATIONS) <= set(OPERATIONS)
    assert any(dish.applies(groups, cluster()) for groups in GROUPS.values())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_can_be_done(operation: str) -> None:
    assert cases(operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_transfers_stay_inside_their_group_and_go_somewhere(operation: str) -> None:
    for name, where in cases(operation):
        groups = GROUPS[where]
        if groups.shape[1] == 1:
            continue
        for wave in waves(name, operation, where):
            sizes = {
                len(column) for column in (wave.source_F, wave.target_F, wave.share_F, wave.group_F, wave.bundle_F)
            }
            assert len(sizes) == 1
            assert wave.steps > 0
            assert (wave.share_F > 0).all()
            assert (wave.source_F != wave.target_F).all()
            assert (groups[wave.group_F] == wave.source_F[:, None]).any(axis=1).all()
            assert (groups[wave.group_F] == wave.target_F[:, None]).any(axis=1).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bundle_is_of_one_group_and_one_share(operation: str) -> None:
    for name, where in cases(operation):
        for wave in waves(name, operation, where):
            for bundle in np.unique(wave.bundle_F):
                mine = wave.bundle_F == bundle
                assert len(set(wave.group_F[mine].tolist())) == len(set(wave.share_F[mine].tolist())) == 1


# ---- all-to-all: parcels from i to j, followed through the waves


def is_delivered(tables: list[list[tuple[int, int, float]]], share: np.ndarray) -> bool:
    """Whether some choice of what each transfer (sender, receiver, amount) carries brings every parcel to its receiver.

    A linear program. x[t, p] is what transfer t carries of parcel p:  sum over p of x[t, p] = amount of t;  what leaves
    a member in a wave is at most what it held before the wave;  in the end each parcel is where it is for.
    """
    problem = pulp.LpProblem("parcels")
    members, parcels = range(len(share)), [(i, j) for i, j in np.argwhere(share > 0).tolist()]
    held = {(m, p): pulp.LpAffineExpression(constant=share[p] if m == p[0] else 0.0) for m in members for p in parcels}
    for number, table in enumerate(tables):
        leaving = {key: pulp.LpAffineExpression() for key in held}
        coming = {key: pulp.LpAffineExpression() for key in held}
        for row, (source, target, amount) in enumerate(table):
            carried = {p: problem.add_variable(f"x_{number}_{row}_{p[0]}_{p[1]}", 0) for p in parcels}
            problem += pulp.lpSum(carried.values()) == amount
            for p, variable in carried.items():
                leaving[source, p] += variable
                coming[target, p] += variable
        for key, there in held.items():
            if len(leaving[key]):
                problem += leaving[key] <= there
        held = {key: there - leaving[key] + coming[key] for key, there in held.items()}
    for (member, p), there in held.items():
        problem += there == (share[p] if member == p[1] else 0.0)
    return pulp.LpStatus[problem.solve(pulp.HiGHS(msg=False))] == "Optimal"


def tables_of(found: list[Wave], groups_NG: np.ndarray, group: int) -> list[list[tuple[int, int, float]]]:
    return [[row[1:] for row in places(wave, groups_NG) if row[0] == group] for wave in found]


@pytest.mark.parametrize(("name", "where"), cases("all_to_all"))
def test_every_byte_of_an_all_to_all_arrives_once(name: str, where: str) -> None:
    groups = GROUPS[where]
    for seed in range(2):
        share = matrix(groups.shape[1], seed)
        found = waves(name, "all_to_all", where, share)
        for group in {0, len(groups) - 1}:
            assert is_delivered(tables_of(found, groups, group), share)


@pytest.mark.parametrize(("name", "where"), cases("all_to_all"))
def test_a_missing_byte_would_be_noticed(name: str, where: str) -> None:
    share = matrix(GROUPS[where].shape[1], 5)
    tables = tables_of(waves(name, "all_to_all", where, share), GROUPS[where], 0)
    if tables[-1]:
        source, target, amount = tables[-1].pop()
        assert not is_delivered([*tables[:-1], [*tables[-1], (source, target, 0.9 * amount)]], share)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.sampled_from(cases("all_to_all")), st.integers(0, 10**6))
def test_each_member_sends_and_gets_at_least_what_is_for_others(case: tuple[str, str], seed: int) -> None:
    name, where = case
    size = GROUPS[where].shape[1]
    share = matrix(size, seed)
    rows = [row for wave in waves(name, "all_to_all", where, share) for row in places(wave, GROUPS[where])]
    for member in range(size):
        sent, got = (sum(row[3] for row in rows if row[0] == 0 and row[side] == member) for side in (1, 2))
        assert sent >= share[member].sum() - share[member, member] - 1e-9
        assert got >= share[:, member].sum() - share[member, member] - 1e-9


@pytest.mark.parametrize(("name", "where"), cases("all_to_all"))
def test_no_matrix_means_equal_shares(name: str, where: str) -> None:
    size = GROUPS[where].shape[1]
    equal, none = (waves(name, "all_to_all", where, share) for share in (np.full((size, size), 1 / size), None))
    for one, other in zip(equal, none, strict=True):
        assert places(one, GROUPS[where]) == places(other, GROUPS[where])


def test_two_stages_cross_between_nodes_only_on_their_own_rail() -> None:
    for name, where in cases("all_to_all"):
        if name == "two_stage":
            inside, between = waves(name, "all_to_all", where, matrix(GROUPS[where].shape[1], 3))
            assert (inside.source_F // 4 == inside.target_F // 4).all()
            assert (between.source_F // 4 != between.target_F // 4).all()


# ---- gathers and reductions: nobody can do with less, and a ring needs no more


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter", "all_reduce"])
def test_each_member_of_a_gather_or_reduction_moves_enough(operation: str) -> None:
    """A gather brings (G - 1) / G to each member; a reduce-scatter takes that from each; an all-reduce needs both."""
    for name, where in cases(operation):
        groups = GROUPS[where]
        least = (groups.shape[1] - 1) / groups.shape[1]
        rows = [row for wave in waves(name, operation, where) for row in places(wave, groups)]
        for group, member in np.ndindex(groups.shape):
            sent, got = (sum(row[3] for row in rows if row[0] == group and row[side] == member) for side in (1, 2))
            assert got >= least - 1e-9 or operation == "reduce_scatter"
            assert sent >= least - 1e-9 or operation == "all_gather"
            if name == "ring":
                times = 2 if operation == "all_reduce" else 1
                assert sent == pytest.approx(times * least)
                assert got == pytest.approx(times * least)


@pytest.mark.parametrize("where", [where for where, groups in GROUPS.items() if groups.shape[1] > 1])
def test_rings_visit_every_member_and_load_every_card_alike(where: str) -> None:
    groups = GROUPS[where]
    (wave,) = waves("ring", "all_gather", where)
    for bundle in np.unique(wave.bundle_F):
        mine = wave.bundle_F == bundle
        following = dict(zip(wave.source_F[mine].tolist(), wave.target_F[mine].tolist(), strict=True))
        ring = [next(iter(following))]
        while following[ring[-1]] != ring[0]:
            ring.append(following[ring[-1]])
        assert sorted(ring) == sorted(groups[wave.group_F[mine][0]].tolist())
    crosses = wave.source_F // 4 != wave.target_F // 4
    if crosses.any() and where != "uneven":
        out = np.bincount(wave.source_F[crosses], weights=wave.share_F[crosses], minlength=16)
        assert out[groups[0]] == pytest.approx(np.full(groups.shape[1], out[groups[0, 0]]))


# ---- time


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "all_to_all" in menu.load("collectives", name, "OPERATIONS")]
)
def test_no_exchange_is_faster_than_its_busiest_wire(name: str, skew: float) -> None:
    changes = {"cluster.nodes": 2, "workload.global_batch": 16, "routing.skew": skew}
    scenario = catalogue.load("mixtral-8x7b-64xh100", changes=changes)
    plan = Plan(dp=16, ep=8, stages=(32,), rank_order="tp-cp-dp-ep-pp", all_to_all=name)
    program = compile_plan(plan, scenario)
    timeline = simulate(program, CostModel(gpu=scenario.cluster.gpu))
    away = np.flatnonzero(program.tasks.stream_T > 0)
    begin, end = (np.full(len(program.meetings), fill) for fill in (-np.inf, -np.inf))
    np.maximum.at(begin, program.tasks.unit_T[away], timeline.start_s_T[away])
    np.maximum.at(end, program.tasks.unit_T[away], timeline.end_s_T[away])
    least = np.array([wire_s(program, meeting) for meeting in range(len(program.meetings))])
    assert (end - begin >= least * (1 - 1e-9)).all()
    assert least.min() > 0
