"""The law of the collectives menu, on every dish found there: every byte arrives once, sent by one who has got it."""

from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

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
from moeplan.domain.program import Exchange, Wave
from moeplan.domain.scenario import Scenario
from moeplan.network.expand import expand
from moeplan.simulator.simulate import simulate

OPERATIONS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast")
NAMES = menu.names("collectives")
GROUPS = {
    "one node": np.arange(8).reshape(2, 4),
    "three of a node": np.array([[4, 5, 7]]),
    "two nodes, all": np.arange(8)[None],
    "two nodes, two each": np.array([[0, 2, 4, 6], [1, 3, 5, 7]]),
    "a rank in each node": np.arange(16).reshape(4, 4).T.copy(),
    "four nodes, two each": np.arange(16).reshape(8, 2).T.copy(),
    "three nodes, two each": np.array([[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]),
    "two nodes, three each": np.array([[4, 5, 6, 8, 9, 10]]),
    "out of order": np.array([[6, 0, 4, 2], [3, 5, 1, 7]]),
    "other rails": np.array([[0, 1, 6, 7]]),
    "uneven": np.array([[0, 1, 2, 4, 5]]),
    "unevenly in two ways": np.array([[0, 1, 2, 4, 5], [6, 7, 8, 9, 10]]),
    "a pair": np.array([[3, 12]]),
    "neighbours": np.array([[1, 2]]),
    "alone": np.arange(4)[:, None],
}


@lru_cache
def cluster() -> Cluster:
    """Four nodes of four GPUs."""
    changes = {"cluster.nodes": 4, "cluster.gpus_per_node": 4, "cluster.nic.per_node": 4}
    return catalogue.load("mixtral-8x7b-64xh100", changes={**changes, "workload.global_batch": 64}).cluster


def cases(operation: str, *, alone: bool = False) -> list[tuple[str, str]]:
    """Dishes that do an operation, with the groups on which they apply."""
    found = [name for name in NAMES if operation in menu.load("collectives", name, "OPERATIONS")]
    applies = {name: menu.load("collectives", name, "applies") for name in found}
    return [
        (name, where)
        for name in found
        for where in GROUPS
        if applies[name](GROUPS[where], cluster()) and (alone or GROUPS[where].shape[1] > 1)
    ]


def counts_copies(name: str) -> bool:
    return getattr(menu.module("collectives", name), "COUNTS_COPIES", False)


SENDING = [case for case in cases("all_to_all") if not counts_copies(case[0])]
COPYING = [case for case in cases("all_to_all") if counts_copies(case[0])]


def exchange(
    name: str, operation: str, where: str, share_GG: np.ndarray | None = None, *,
    reach_GB: np.ndarray | None = None, kind: str = "dispatch",
) -> Exchange:  # fmt: skip
    return Exchange(
        kind=kind, operation=operation, algorithm=name, groups_NG=GROUPS[where], size_bytes=1.0, share_GG=share_GG,
        reach_GB=reach_GB,
    )  # fmt: skip


def waves_of(asked: Exchange) -> list[Wave]:
    found: list[Wave] = menu.load("collectives", asked.algorithm, "waves")(asked, cluster())
    return found


def waves(name: str, operation: str, where: str, share_GG: np.ndarray | None = None) -> list[Wave]:
    return waves_of(exchange(name, operation, where, share_GG))


def places(wave: Wave, groups_NG: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Group, sending member, receiving member and share of each transfer."""
    return [
        (group, groups_NG[group].tolist().index(source), groups_NG[group].tolist().index(target), share)
        for group, source, target, share in zip(
            wave.group_F.tolist(), wave.source_F.tolist(), wave.target_F.tolist(), wave.share_F.tolist(), strict=True
        )
    ]


Table = list[tuple[int, int, float]]
"""Sending member, receiving member, amount."""


def tables_of(found: list[Wave], groups_NG: np.ndarray, group: int) -> list[Table]:
    return [[row[1:] for row in places(wave, groups_NG) if row[0] == group] for wave in found]


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


@pytest.mark.parametrize("name", NAMES)
def test_an_all_to_all_for_itself_applies_where_it_differs_from_linear(name: str) -> None:
    for where, groups in GROUPS.items():
        applies = menu.load("collectives", name, "applies")(groups, cluster())
        alone = menu.load("collectives", name, "OPERATIONS") == ("all_to_all",)
        if alone and applies and name != "linear":
            share = matrix(groups.shape[1], 1) + 0.01
            tables = [tables_of(waves(each, "all_to_all", where, share), groups, 0) for each in (name, "linear")]
            assert [sorted(table) for table in tables[0] if table] != [sorted(table) for table in tables[1] if table]


@pytest.mark.parametrize(("name", "where"), [(n, w) for o in OPERATIONS for n, w in cases(o, alone=True)])
def test_transfers_stay_inside_their_group_and_go_somewhere(name: str, where: str) -> None:
    groups = GROUPS[where]
    for operation in menu.load("collectives", name, "OPERATIONS"):
        found = waves(name, operation, where)
        assert found
        for wave in found if groups.shape[1] > 1 else []:
            columns = (wave.source_F, wave.target_F, wave.share_F, wave.group_F, wave.bundle_F)
            assert len({len(column) for column in columns}) == 1
            assert wave.steps > 0
            assert wave.messages > 0
            assert wave.copy_share >= 0
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


def is_delivered(tables: list[Table], share: np.ndarray) -> bool:
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
    return pulp.LpStatus[problem.solve(pulp.HiGHS(msg=False, threads=1))] == "Optimal"


@pytest.mark.parametrize(
    ("name", "where"), [case for case in SENDING if case[0] != "scheduled" or GROUPS[case[1]].shape[1] < 6]
)
def test_every_byte_of_an_all_to_all_arrives_once(name: str, where: str) -> None:
    groups = GROUPS[where]
    for seed in range(2 if groups.shape[1] < 8 else 1):
        share = matrix(groups.shape[1], seed)
        found = waves(name, "all_to_all", where, share)
        for group in {0, len(groups) - 1}:
            assert is_delivered(tables_of(found, groups, group), share)


@pytest.mark.parametrize(("name", "where"), [case for case in SENDING if GROUPS[case[1]].shape[1] < 6])
def test_a_missing_byte_would_be_noticed(name: str, where: str) -> None:
    share = matrix(GROUPS[where].shape[1], 5)
    tables = tables_of(waves(name, "all_to_all", where, share), GROUPS[where], 0)
    if tables[-1]:
        source, target, amount = tables[-1].pop()
        assert not is_delivered([*tables[:-1], [*tables[-1], (source, target, 0.9 * amount)]], share)


@pytest.mark.parametrize("name", ["linear", "pairwise_rounds", "grouped_pairwise", "scheduled"])
def test_what_is_sent_straight_adds_up_to_what_each_pair_has(name: str) -> None:
    for where in [where for each, where in SENDING if each == name]:
        groups = GROUPS[where]
        share = matrix(groups.shape[1], 7)
        for group in range(len(groups)):
            total = np.zeros(share.shape)
            for table in tables_of(waves(name, "all_to_all", where, share), groups, group):
                for source, target, amount in table:
                    total[source, target] += amount
            np.testing.assert_allclose(total, share * (1 - np.eye(len(share))), rtol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(SENDING), st.integers(0, 10**6))
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


@pytest.mark.parametrize(("name", "where"), cases("all_to_all"))
def test_a_member_without_anything_to_send_or_get_is_left_alone(name: str, where: str) -> None:
    """But for what it passes on, and for gathers that bring everybody everything."""
    size = GROUPS[where].shape[1]
    nothing = waves(name, "all_to_all", where, np.diag(np.ones(size)))
    assert sum(len(wave.source_F) for wave in nothing) == 0 or name == "tp_coordinated"


# ---- copies: a token goes to a node once, however many members of the node it is for


class Parcel(NamedTuple):
    """A token, or a piece of a buffer: who has it first, and whom it is for."""

    origin: int
    targets: frozenset[int]


def is_spread(tables: list[Table], parcels: list[Parcel], *, piece: float, members: int) -> bool:
    """Whether some choice of which parcels, all of size `piece`, each transfer copies brings each to all its targets.

    A binary program. x[t, p] says whether transfer t carries parcel p:  sum over p of x[t, p] pieces are what t moves;
    a member sends a parcel only if it had it before the wave;  no parcel comes to a member twice;  in the end each has
    what is for it.
    """
    problem = pulp.LpProblem("copies")
    numbers = range(len(parcels))
    held = {
        (m, p): pulp.LpAffineExpression(constant=1.0 if parcels[p].origin == m else 0.0)
        for m in range(members)
        for p in numbers
    }
    for number, table in enumerate(tables):
        coming = dict(held)
        for row, (source, target, amount) in enumerate(table):
            carried = [problem.add_variable(f"x_{number}_{row}_{p}", 0, 1, "Integer") for p in numbers]
            problem += pulp.lpSum(carried) == pytest.approx(amount / piece).expected
            for p, variable in enumerate(carried):
                problem += variable <= held[source, p]
                coming[target, p] = coming[target, p] + variable
        held = coming
    for (member, p), there in held.items():
        problem += there <= 1
        if member in parcels[p].targets:
            problem += there == 1
    return pulp.LpStatus[problem.solve(pulp.HiGHS(msg=False, threads=1))] == "Optimal"


def tokens(where: str, seed: int, *, each: int = 2) -> list[Parcel]:
    """`each` tokens of every member, each with two receivers."""
    size, rng = GROUPS[where].shape[1], np.random.default_rng(seed)
    return [
        Parcel(origin, frozenset(rng.choice(size, 2, replace=False).tolist()))
        for origin in range(size)
        for _ in range(each)
    ]


def tables_of_tokens(where: str, parcels: list[Parcel]) -> tuple[np.ndarray, np.ndarray]:
    """What a router would say of the tokens: shares and reach, in parts of what a member sends."""
    node_G = np.unique(GROUPS[where][0] // 4, return_inverse=True)[1]
    size = len(node_G)
    share_GG, reach_GB = np.zeros((size, size)), np.zeros((size, int(node_G.max()) + 1))
    for origin, targets in parcels:
        share_GG[origin, list(targets)] += 1
        reach_GB[origin, list({int(node_G[target]) for target in targets})] += 1
    mean = share_GG.sum() / size
    return share_GG / mean, reach_GB / mean


ALIKE = [case for case in COPYING if case[1] != "unevenly in two ways"]
"""Groups that one table of reach can describe."""


@pytest.mark.parametrize(("name", "where"), ALIKE)
def test_every_token_comes_to_each_of_its_receivers_once(name: str, where: str) -> None:
    parcels, groups = tokens(where, 3), GROUPS[where]
    share_GG, reach_GB = tables_of_tokens(where, parcels)
    found = waves_of(exchange(name, "all_to_all", where, share_GG, reach_GB=reach_GB))
    piece = len(share_GG) / sum(len(parcel.targets) for parcel in parcels)
    for group in {0, len(groups) - 1}:
        assert is_spread(tables_of(found, groups, group), parcels, piece=piece, members=len(share_GG))


@pytest.mark.parametrize(("name", "where"), COPYING)
def test_without_reach_each_parcel_has_one_receiver(name: str, where: str) -> None:
    groups = GROUPS[where]
    parcels = [
        Parcel(i, frozenset({j})) for i, j in np.argwhere(matrix(groups.shape[1], 2) > 0).tolist()
    ]  # fmt: skip
    share_GG = np.zeros((groups.shape[1], groups.shape[1]))
    for origin, targets in parcels:
        share_GG[origin, list(targets)] = 1.0
    found = waves(name, "all_to_all", where, share_GG)
    for group in range(len(groups)):
        assert is_spread(tables_of(found, groups, group), parcels, piece=1.0, members=groups.shape[1])


@pytest.mark.parametrize(("name", "where"), ALIKE)
def test_a_combine_is_its_dispatch_the_other_way(name: str, where: str) -> None:
    share_GG, reach_GB = tables_of_tokens(where, tokens(where, 4))
    there = waves_of(exchange(name, "all_to_all", where, share_GG, reach_GB=reach_GB))
    back = waves_of(exchange(name, "all_to_all", where, share_GG.T.copy(), reach_GB=reach_GB, kind="combine"))
    for one, other in zip(there, reversed(back), strict=True):
        assert [(g, j, i, s) for g, i, j, s in places(one, GROUPS[where])] == places(other, GROUPS[where])


@pytest.mark.parametrize(("name", "where"), ALIKE)
def test_one_copy_is_all_that_crosses_to_a_node(name: str, where: str) -> None:
    parcels = tokens(where, 5)
    share_GG, reach_GB = tables_of_tokens(where, parcels)
    found = waves_of(exchange(name, "all_to_all", where, share_GG, reach_GB=reach_GB))
    node_G = np.unique(GROUPS[where][0] // 4, return_inverse=True)[1]
    crossing = sum(
        share for wave in found for group, i, j, share in places(wave, GROUPS[where])
        if group == 0 and node_G[i] != node_G[j]
    )  # fmt: skip
    assert crossing == pytest.approx(sum(reach_GB[i].sum() - reach_GB[i, node_G[i]] for i in range(len(node_G))))


# ---- gathers and reductions: pieces of buffers, followed through the waves; a sum is a copy that runs backwards


def unrolled(wave: Wave, groups_NG: np.ndarray, group: int) -> list[Table]:
    """The steps of a wave: of a ring as many as it says, of a tree one for each level, of what is no bundle one."""
    steps: list[Table] = []
    rows = places(wave, groups_NG)
    for bundle in np.unique(wave.bundle_F[wave.group_F == group]):
        mine = [rows[row][1:] for row in np.flatnonzero(wave.bundle_F == bundle)]
        if not {row[0] for row in mine} - {row[1] for row in mine}:
            levels = [[(i, j, share / wave.steps) for i, j, share in mine]] * int(wave.steps)
        else:
            levels = by_level(mine)
        assert len(levels) <= wave.steps
        steps += [[] for _ in levels[len(steps) :]]
        for step, level in zip(steps, levels, strict=False):
            step += level
    return steps


def by_level(edges: Table) -> list[Table]:
    """Edges of a forest in the order in which what enters at its roots, or at its leaves, can pass."""
    left, found = list(edges), []
    while left:
        waiting = {target for _, target, _ in left}
        ready = [edge for edge in left if edge[0] not in waiting]
        found.append(ready)
        left = [edge for edge in left if edge not in ready]
    return found


def backwards(steps: list[Table]) -> list[Table]:
    return [[(j, i, share) for i, j, share in step] for step in reversed(steps)]


def copies(operation: str, steps: list[Table]) -> list[list[Table]]:
    """The gathers or broadcasts that an operation is made of: a reduction is one backwards."""
    half = len(steps) // 2
    return {
        "reduce_scatter": [backwards(steps)],
        "all_reduce": [backwards(steps[:half]), steps[half:]],
    }.get(operation, [steps])


@pytest.mark.parametrize(
    ("operation", "name", "where"),
    [(o, n, w) for o in OPERATIONS[1:] for n, w in cases(o) if GROUPS[w].shape[1] <= (8 if n == "direct" else 6)],
)
def test_every_member_ends_with_every_contribution_once(operation: str, name: str, where: str) -> None:
    groups = GROUPS[where]
    size, everyone = groups.shape[1], frozenset(range(groups.shape[1]))
    for group in {0, len(groups) - 1}:
        found = waves(name, operation, where)
        steps = [step for wave in found for step in unrolled(wave, groups, group)]
        pieces = round(1 / min(share for step in steps for _, _, share in step))
        roots = roots_of_trees(found[-1], groups, group) if name == "tree" else range(size)
        origins = [0] if operation == "broadcast" else list(roots)
        parcels = [Parcel(origin, everyone) for origin in origins for _ in range(pieces // len(origins))]
        for part in copies(operation, steps):
            assert is_spread(part, parcels, piece=1 / pieces, members=size)


def roots_of_trees(wave: Wave, groups_NG: np.ndarray, group: int) -> list[int]:
    """Of each tree the member that has all of it before the wave."""
    rows, found = places(wave, groups_NG), []
    for bundle in np.unique(wave.bundle_F[wave.group_F == group]):
        edges = [rows[row] for row in np.flatnonzero(wave.bundle_F == bundle)]
        found += {edge[1] for edge in edges} - {edge[2] for edge in edges}
    return found


@pytest.mark.parametrize(("name", "where"), cases("broadcast"))
def test_a_broadcast_is_from_member_0_and_brings_everybody_all_once(name: str, where: str) -> None:
    groups = GROUPS[where]
    rows = [row for wave in waves(name, "broadcast", where) for row in places(wave, groups)]
    for group, member in np.ndindex(groups.shape):
        got = sum(row[3] for row in rows if row[0] == group and row[2] == member)
        assert got == pytest.approx(float(member > 0))


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
            if name in ("ring", "direct", "recursive"):
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
    if crosses.any() and "uneven" not in where:
        out = np.bincount(wave.source_F[crosses], weights=wave.share_F[crosses], minlength=16)
        assert out[groups[0]] == pytest.approx(np.full(groups.shape[1], out[groups[0, 0]]))


@pytest.mark.parametrize(("name", "where"), cases("all_reduce"))
def test_no_port_of_a_reduction_carries_more_than_twice_the_buffer(name: str, where: str) -> None:
    for operation in menu.load("collectives", name, "OPERATIONS"):
        if operation in ("all_gather", "reduce_scatter", "all_reduce"):
            rows = [row for wave in waves(name, operation, where) for row in places(wave, GROUPS[where])]
            for group, member in np.ndindex(GROUPS[where].shape):
                for side in (1, 2):
                    assert sum(row[3] for row in rows if row[0] == group and row[side] == member) <= 4


# ---- what algorithms are known for


def on_wires(name: str, where: str, share_GG: np.ndarray | None = None) -> list[Wave]:
    return waves(name, "all_to_all", where, share_GG)


def test_two_stages_cross_between_nodes_only_on_their_own_rail() -> None:
    for name, where in cases("all_to_all"):
        if name in ("two_stage", "two_dh", "rail_aligned"):
            inside, between = on_wires(name, where, matrix(GROUPS[where].shape[1], 3))
            assert (inside.source_F // 4 == inside.target_F // 4).all()
            assert (between.source_F // 4 != between.target_F // 4).all()
            if name == "rail_aligned":
                assert (between.source_F % 4 == between.target_F % 4).all()


def test_in_a_round_each_member_sends_to_one_and_gets_from_one() -> None:
    for name, where in cases("all_to_all"):
        if name == "pairwise_rounds" or (name == "scheduled" and where in ("one node", "a rank in each node")):
            for wave in on_wires(name, where, matrix(GROUPS[where].shape[1], 6)):
                for side in (wave.source_F, wave.target_F):
                    assert len(np.unique(side)) == len(side)


@pytest.mark.parametrize("where", ["one node", "three of a node", "a rank in each node", "four nodes, two each"])
def test_scheduled_rounds_last_as_long_as_the_busiest_port(where: str) -> None:
    groups = GROUPS[where]
    share = matrix(groups.shape[1], 8)
    node_G = groups[0] // 4
    counts = share * (1 - np.eye(len(share)))
    if where == "four nodes, two each":
        counts = counts * (node_G[:, None] != node_G)
    length = 0.0
    for wave in on_wires("scheduled", where, share):
        far = [s for g, i, j, s in places(wave, groups) if g == 0 and counts[i, j] > 0]
        length += max(far, default=0.0)
    assert length == pytest.approx(max(counts.sum(axis=0).max(), counts.sum(axis=1).max()), rel=1e-9)


@pytest.mark.parametrize(("where", "rounds"), [("one node", 3), ("a rank in each node", 3), ("two nodes, all", 4)])
def test_equal_shares_need_as_many_rounds_as_a_member_has_receivers_of_its_tier(where: str, rounds: int) -> None:
    assert len(on_wires("scheduled", where)) == rounds


def test_only_leaders_cross_between_nodes() -> None:
    for where in [where for name, where in cases("all_to_all") if name == "leader_gather"]:
        leaders = {min(row[row // 4 == node].tolist()) for row in GROUPS[where] for node in set((row // 4).tolist())}
        up, across, down = on_wires("leader_gather", where, matrix(GROUPS[where].shape[1], 9))
        assert set(across.source_F.tolist()) | set(across.target_F.tolist()) <= leaders
        assert set(up.target_F.tolist()) | set(down.source_F.tolist()) <= leaders
        assert across.copy_share > 0
        assert down.copy_share > 0


def test_messages_are_counted() -> None:
    """Per transfer: a ring has one in each step, a forwarder one for each pair of origin and receiver."""
    assert [wave.messages for wave in on_wires("linear", "two nodes, all")] == [1]
    assert [wave.messages for wave in on_wires("rail_aligned", "four nodes, two each")] == [4, 2]
    assert [wave.messages for wave in on_wires("two_stage", "four nodes, two each")] == [1, 1]
    assert [wave.messages for wave in waves("ring", "all_reduce", "four nodes, two each")] == [14]
    assert [wave.messages for wave in waves("hierarchical", "all_reduce", "four nodes, two each")] == [1, 6, 1]


def test_copies_are_counted() -> None:
    equal = {name: on_wires(name, "four nodes, two each") for name in ("two_stage", "two_dh", "leader_gather")}
    assert [wave.copy_share for wave in equal["two_dh"]] == pytest.approx([1, 1])
    assert [wave.copy_share for wave in equal["two_stage"]] == pytest.approx([1 / 2, 3 / 4])
    assert [wave.copy_share for wave in equal["leader_gather"]] == pytest.approx([0, 2 * 7 / 8, 2 * 7 / 8])


# ---- what the compiler asks for


@lru_cache
def short_mixtral(**changes: object) -> Scenario:
    """Two layers on two machines of eight."""
    given = {"cluster.nodes": 2, "workload.global_batch": 16} | {
        name.replace("__", "."): changes[name] for name in changes
    }
    loaded = catalogue.load("mixtral-8x7b-64xh100", changes=given)
    return replace(loaded, model=loaded.model.model_copy(update={"layers": loaded.model.layers[:2]}))


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("name", sorted({name for name, _ in COPYING}))
def test_the_compiler_says_what_there_is_for_each_node(name: str, skew: float) -> None:
    """Two experts of eight for each token: 11 of 14 have a choice among four; 2 choices are sent otherwise."""
    plan = Plan(dp=16, ep=8, stages=(2,), rank_order="tp-cp-dp-ep-pp", all_to_all=name)
    program = compile_plan(plan, short_mixtral(routing__skew=skew))
    found = [each for each in program.exchanges if each.kind in ("dispatch", "combine")]
    assert {each.kind for each in found} == {"dispatch", "combine"}
    for each in found:
        assert each.reach_GB is not None
        assert each.reach_GB.shape == (8, 2)
        assert (each.reach_GB.sum(axis=1) >= 0.5).all()
        assert (each.reach_GB.sum(axis=1) <= 1).all()
        if skew == 0:
            assert each.reach_GB == pytest.approx(np.full((8, 2), 11 / 14 / 2))


# ---- time


@pytest.mark.parametrize(("operation", "name", "where"), [(o, n, w) for o in OPERATIONS for n, w in cases(o)])
def test_no_wave_and_no_sum_of_waves_is_faster_than_its_ports(operation: str, name: str, where: str) -> None:
    """For every link: bytes over capacity of all waves together are at most the sum of the waves' busiest links."""
    share = matrix(GROUPS[where].shape[1], 11) if operation == "all_to_all" else None
    pattern = expand(exchange(name, operation, where, share), cluster())
    capacity_K = cluster().bandwidth_bytes_per_s_K
    total_K, longest_s = np.zeros(len(capacity_K)), 0.0
    for phase in range(len(pattern.copy_s_per_byte_P)):
        now = pattern.phase_F == phase
        row, hop = np.nonzero(pattern.paths_FH[now] >= 0)
        load_K = np.bincount(
            pattern.paths_FH[now][row, hop], weights=pattern.share_F[now][row], minlength=len(capacity_K)
        )
        total_K += load_K
        longest_s += float((load_K / capacity_K).max())
    assert (total_K / capacity_K).max() <= longest_s * (1 + 1e-12)


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "all_to_all" in menu.load("collectives", name, "OPERATIONS")]
)
def test_no_exchange_is_faster_than_its_busiest_wire(name: str, skew: float) -> None:
    scenario = short_mixtral(routing__skew=skew)
    plan = Plan(dp=16, ep=8, stages=(2,), rank_order="tp-cp-dp-ep-pp", all_to_all=name)
    program = compile_plan(plan, scenario)
    timeline = simulate(program, CostModel(gpu=scenario.cluster.gpu))
    away = np.flatnonzero(program.tasks.stream_T > 0)
    begin, end = (np.full(len(program.meetings), fill) for fill in (-np.inf, -np.inf))
    np.maximum.at(begin, program.tasks.unit_T[away], timeline.start_s_T[away])
    np.maximum.at(end, program.tasks.unit_T[away], timeline.end_s_T[away])
    least = np.array([wire_s(program, meeting) for meeting in range(len(program.meetings))])
    assert (end - begin >= least * (1 - 1e-9)).all()
    assert least.min() > 0
