"""Alpa's two programmes are exact, costs obey the laws of sharding, and its plan is legal, fits and is bounded."""

from __future__ import annotations

import itertools
from math import inf, isfinite
from typing import Any

import networkx as nx
import numpy as np
import pytest

import moeplan as mp
from moeplan.partition import footprint
from moeplan.partition.legal import problems
from moeplan.planners import _meshes, _sharded_layers, _sharding, _stages_dp
from moeplan.planners._operators import Batch, embedding_graph, head_graph, layer_graph
from moeplan.planners._sharded_layers import Sharded, Sharder, divided, split_of
from moeplan.planners._sharding import ShardingProblem, by_price, cheapest_sharding, eliminate, least_with, undominated
from moeplan.planners._sharding_ilp import solve_ilp
from moeplan.planners._stage_costs import ends_table, stage_costs
from moeplan.planners._stages_dp import MANY, Stage, StageProblem, cut_into_stages

SMALL = ("small-4-gpus", "small-8-gpus", "small-two-nodes")
ODD = ("deepseek-v3", "mixtral-8x7b", "nemotron-3-super", "glm-5", "deepseek-v4-flash", "nllb-54b", "pr-moe-350m")


# ---- shardings


def random_graph(rng: np.random.Generator, *, operators: int, shardings: int) -> ShardingProblem:
    """A connected graph with edges up to three back; every other one must do with less memory than is cheapest."""
    edges = {}
    for head in range(1, operators):
        for tail in {head - 1, *(head - rng.integers(1, min(head, 3) + 1, size=2))}:
            edges[int(tail), head] = rng.uniform(0, 1, (shardings, shardings))
    seconds = tuple(rng.uniform(0, 1, shardings) for _ in range(operators))
    size = tuple(rng.uniform(1, 2, shardings) - s for s in seconds)
    least, most = (sum(float(pick(each)) for each in size) for pick in (np.min, np.max))
    limit = inf if rng.random() < 0.5 else least + (most - least) * rng.uniform(-0.05, 0.7)
    return ShardingProblem(seconds_S=seconds, bytes_S=size, edges_SS=edges, memory_bytes=limit)


def every_choice(problem: ShardingProblem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(each)) for each in problem.seconds_S)))


def best_of_all(problem: ShardingProblem) -> float:
    fits = [c for c in every_choice(problem) if problem.size_bytes(c) <= problem.memory_bytes]
    return min((problem.seconds(choice) for choice in fits), default=inf)


@pytest.mark.parametrize("block", range(4))
def test_elimination_price_and_ilp_find_what_brute_force_finds_on_200_graphs(block: int) -> None:
    rng = np.random.default_rng(block)
    for number in range(50):
        problem = random_graph(rng, operators=int(rng.integers(1, 7)), shardings=int(rng.integers(1, 4)))
        wanted, found, ilp = best_of_all(problem), cheapest_sharding(problem), solve_ilp(problem)
        if found is None:
            assert not isfinite(wanted)
            assert ilp is None
            continue
        assert ilp is not None
        for answer in (found, ilp, solve_ilp(problem, solver="cbc") if number < 8 else ilp):
            assert answer is not None
            assert answer.seconds == pytest.approx(wanted, rel=1e-9)
            assert answer.seconds == problem.seconds(answer.choice)
            assert answer.size_bytes <= problem.memory_bytes
            assert answer.lower_bound_s <= wanted * (1 + 1e-12)


def test_the_bound_of_a_price_is_never_above_the_best_that_fits() -> None:
    rng = np.random.default_rng(9)
    for _ in range(60):
        problem = random_graph(rng, operators=5, shardings=3)
        found = by_price(problem) if isfinite(problem.memory_bytes) else None
        if found is not None:
            assert found[0].lower_bound_s <= best_of_all(problem) * (1 + 1e-12) <= found[0].seconds * (1 + 1e-9)


def test_the_least_with_each_sharding_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        problem, price = random_graph(rng, operators=5, shardings=3), float(rng.uniform(0, 1))
        values = {c: problem.seconds(c) + price * problem.size_bytes(c) for c in every_choice(problem)}
        for v, least_S in enumerate(least_with(problem, price_s_per_byte=price)):
            for i, least in enumerate(least_S):
                assert least == pytest.approx(min(s for c, s in values.items() if c[v] == i), rel=1e-9)


def test_of_shardings_that_are_twins_one_is_left_and_the_best_is_still_found() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        problem = random_graph(rng, operators=5, shardings=2)
        twins = problem.only([np.array([1, 0, 1, 0, 1])[: 1 + int(rng.integers(1, 5))] for _ in problem.seconds_S])
        assert all(1 <= len(kept) <= 2 for kept in undominated(twins))
        found, ilp = cheapest_sharding(twins), solve_ilp(twins)
        assert (found.seconds if found else inf) == pytest.approx(best_of_all(twins), rel=1e-9)
        assert (ilp.seconds if ilp else inf) == pytest.approx(best_of_all(twins), rel=1e-9)


# ---- stages


def random_stages(rng: np.random.Generator) -> StageProblem:
    layers, gpus_U, ways = int(rng.integers(1, 6)), np.array([1, 2, 4]), int(rng.integers(1, 3))
    shape = (layers, layers + 1, len(gpus_U), ways)
    weight, seconds, most = rng.uniform(0.5, 2, layers), np.full(shape, inf), np.zeros(shape, np.int64)
    for i, j in itertools.combinations(range(layers + 1), 2):
        speed = gpus_U[:, None] ** rng.uniform(0.5, 1) * rng.uniform(0.8, 1.2, (len(gpus_U), ways))
        seconds[i, j] = weight[i:j].sum() / speed
        most[i, j] = MANY if layers % 2 else rng.integers(0, 4, (len(gpus_U), ways))
    return StageProblem(
        seconds_IJUC=seconds, most_IJUC=most, gpus_U=gpus_U, num_gpus=int(rng.choice([2, 4, 6])),
        num_microbatches=int(rng.integers(1, 20)),
    )  # fmt: skip


def every_cut(problem: StageProblem, end: int, gpus: int, behind: tuple[Stage, ...]) -> list[tuple[Stage, ...]]:
    """All cuts of the layers before `end` on exactly so many GPUs, with `behind` following."""
    if end == 0:
        return [behind] if gpus == 0 else []
    found = []
    for first, (u, size) in itertools.product(range(end), enumerate(problem.gpus_U.tolist())):
        for c, seconds in enumerate(problem.seconds_IJUC[first, end, u].tolist()):
            if size <= gpus and len(behind) < problem.most_IJUC[first, end, u, c]:
                stage = Stage(first, end, u, c, seconds)
                found += every_cut(problem, first, gpus - size, (stage, *behind))
    return found


def step_s(problem: StageProblem, stages: tuple[Stage, ...]) -> float:
    seconds = [stage.seconds for stage in stages]
    return sum(seconds) + (problem.num_microbatches - 1) * max(seconds)


def test_the_cut_into_stages_is_that_of_brute_force_on_100_chains() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        problem = random_stages(rng)
        cuts = every_cut(problem, len(problem.seconds_IJUC), problem.num_gpus, ())
        if not cuts:
            with pytest.raises(mp.InfeasibleError, match="fits their memory"):
                cut_into_stages(problem)
            continue
        found = cut_into_stages(problem)
        assert found.step_s == pytest.approx(min(step_s(problem, cut) for cut in cuts), rel=1e-12)
        assert found.stages in cuts
        assert found.step_s == pytest.approx(step_s(problem, found.stages), rel=1e-12)


def test_room_for_few_tails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    problem = next(each for each in iter(lambda: random_stages(rng), None) if len(each.seconds_IJUC) == 5)
    wide = cut_into_stages(problem)
    monkeypatch.setattr(_stages_dp, "_START_LABELS", 2)
    assert cut_into_stages(problem) == wide


# ---- operators


@pytest.mark.parametrize("name", ODD)
def test_the_graph_of_a_layer_runs_from_the_stream_to_the_stream(name: str) -> None:
    model, batch = mp.load("small-4-gpus", {"model": name}).model, Batch(sequences=4, sequence=256, context=256)
    for layer in dict.fromkeys(model.all_layers):
        graph = layer_graph(layer, batch)
        assert nx.is_directed_acyclic_graph(graph)
        assert [v for v, degree in graph.in_degree() if degree == 0] == ["in"]
        assert [v for v, degree in graph.out_degree() if degree == 0] == [graph.graph["ends"][1]]
        flops = sum(
            d["node"].operator.flops for _, d in graph.nodes(data=True) if d["node"].operator.kind != "elementwise"
        )
        counted = layer.forward_flops(tokens=batch.tokens, sequence=batch.sequence, context=batch.context)
        assert flops == pytest.approx(counted, rel=0.02)
    for graph in (embedding_graph(model, batch), head_graph(model, batch)):
        assert nx.is_weakly_connected(graph)


def test_alike_layers_share_one_graph() -> None:
    model, batch = mp.load("deepseek-v3-2048xh800").model, Batch(sequences=2, sequence=4096, context=4096)
    assert len({id(layer_graph(layer, batch)) for layer in model.all_layers}) == 2


def sharder_and_mesh(shape: tuple[int, int] = (2, 2)) -> tuple[Sharder, _meshes.Mesh, Batch]:
    scenario = mp.load("small-8-gpus", {f"choose.{degree}": [1, 2, 4, 8] for degree in ("tp", "ep", "etp", "cp")})
    return Sharder(scenario), _meshes.mesh_of(scenario.cluster, shape), Batch(sequences=8, sequence=128, context=128)


def sharded_layer(shape: tuple[int, int] = (2, 2)) -> Sharded:
    sharder, mesh, batch = sharder_and_mesh(shape)
    layer = sharder.scenario.model.all_layers[-1]
    return sharder.sharded(layer_graph(layer, batch), mesh, batch, recompute="none", microbatches=4)


def test_no_share_of_an_operator_does_less_than_its_part() -> None:
    sharder, mesh, batch = sharder_and_mesh()
    graph = layer_graph(sharder.scenario.model.all_layers[-1], batch)
    for _, data in graph.nodes(data=True):
        for pair in _sharded_layers.shardings(data["node"], mesh, batch, sharder.scenario.choices):
            split, operator = split_of(pair, mesh), data["node"].operator
            share = divided(operator, split)
            parts = split.tokens * split.columns * split.depth * split.experts
            assert share.flops * parts >= operator.flops
            assert parts <= mesh.num_gpus


def test_resharding_is_free_within_a_state_and_costs_the_same_there_and_back() -> None:
    _, mesh, _ = sharder_and_mesh((2, 4))
    states = np.arange(_meshes.STATES**2)
    alike = [s for s in states if _meshes.P not in divmod(int(s), _meshes.STATES)]
    assert (mesh.per_byte_s_OI[alike, alike] == 0).all()
    assert (mesh.latency_s_OI[alike, alike] == 0).all()
    np.testing.assert_allclose(mesh.per_byte_s_OI, mesh.per_byte_s_OI.T, rtol=1e-12)
    assert (mesh.per_byte_s_OI >= 0).all()


def test_dividing_in_more_ways_is_never_slower_and_every_kind_of_sharding_is_offered() -> None:
    sharded = sharded_layer()
    offered = {way.name for ways in sharded.ways for pair in ways for way in pair}
    assert offered >= {"data", "column", "row", "features", "expert", "select", "replicated"}
    free = sharded.problem(held=1.0)
    data_only = [
        [at for at, pair in enumerate(ways) if {way.name for way in pair} <= {"data"}] for ways in sharded.ways
    ]
    choice = tuple(at[0] for at in data_only)
    assert free.seconds(eliminate(free)) <= free.seconds(choice)


def test_no_operator_is_divided_more_than_the_scenario_allows() -> None:
    scenario = mp.load("small-8-gpus", {"choose.tp": 1, "choose.etp": 1, "choose.ep": [1, 2], "choose.cp": 1})
    sharder, mesh = Sharder(scenario), _meshes.mesh_of(scenario.cluster, (2, 2))
    batch = Batch(sequences=8, sequence=128, context=128)
    graph = layer_graph(scenario.model.all_layers[-1], batch)
    sharded = sharder.sharded(graph, mesh, batch, recompute="none", microbatches=4)
    splits = [split_of(pair, mesh) for ways in sharded.ways for pair in ways]
    assert {(split.columns, split.depth) for split in splits} == {(1, 1)}
    assert {split.experts for split in splits} == {1, 2}


def test_less_memory_is_never_faster_and_always_kept() -> None:
    sharded = sharded_layer()
    free = cheapest_sharding(sharded.problem(held=2.0))
    assert free is not None
    before = free.seconds
    for share in (0.95, 0.9, 0.8, 0.7):
        limit = free.size_bytes * share
        found = cheapest_sharding(sharded.problem(held=2.0, memory_bytes=limit))
        if found is not None:
            assert found.size_bytes <= limit
            assert found.seconds >= before * (1 - 1e-9)
            before = found.seconds


def test_a_chain_of_tables_is_the_elimination_of_the_whole_stage() -> None:
    sharded = sharded_layer()
    table_QSS = ends_table(sharded, 0.0)
    chained = (table_QSS[1][:, :, None] + table_QSS[1][None]).min()
    size, (start, end) = len(sharded.names), sharded.ends
    assert start is not None
    assert end is not None
    joint = np.full((len(sharded.ways[end]), len(sharded.ways[start])), inf)
    np.fill_diagonal(joint, 0.0)
    both = ShardingProblem(
        seconds_S=sharded.seconds_S * 2, bytes_S=sharded.kept_bytes_S * 2,
        edges_SS=sharded.edges_SS
        | {(v + size, w + size): r for (v, w), r in sharded.edges_SS.items()}
        | {(end, start + size): joint},
    )  # fmt: skip
    assert chained == pytest.approx(both.seconds(eliminate(both)), rel=1e-9)


def test_the_ilp_agrees_on_the_graph_of_a_layer() -> None:
    problem = sharded_layer().problem(held=1.0)
    found = solve_ilp(problem)
    assert found is not None
    assert found.seconds == pytest.approx(problem.seconds(eliminate(problem)), rel=1e-6)


def test_stages_with_more_gpus_need_less_memory_and_longer_ones_more_time() -> None:
    scenario = mp.load("small-8-gpus")
    costs = stage_costs(scenario, Sharder(scenario), 4).problem
    least_IJU = costs.seconds_IJUC.min(axis=-1)
    layers = len(least_IJU)
    for i in range(layers):
        assert (np.diff(least_IJU[i, i + 1 :], axis=0) > 0).all()
    assert (np.diff(costs.most_IJUC[0, layers].max(axis=-1)) >= 0).all()


def test_powers_of_two_inside_a_node_and_whole_nodes_are_the_submeshes() -> None:
    cluster = mp.load("deepseek-v3-2048xh800").cluster
    assert _meshes.submeshes(cluster) == [1, 2, 4, *(8 << k for k in range(9))]
    assert _meshes.shapes(16, 8) == [(8, 2), (4, 4), (2, 8)]
    assert _meshes.shapes(1, 8) == [(1, 1)]


# ---- the plan


@pytest.mark.parametrize("name", SMALL)
def test_the_plan_is_legal_fits_and_is_bounded(name: str) -> None:
    result, scenario = mp.plan(name, planner="alpa"), mp.load(name)
    assert list(problems(result.plan, scenario)) == []
    assert footprint.check_memory(result.plan, scenario) is None
    assert result.plan.schedule == "one_f_one_b"
    assert 0 < result.lower_bound_s <= result.step_s
    assert result.step_s == mp.simulate(name, result.plan).figures.step_s
    best = mp.plan(name, gap=0.0)
    assert result.lower_bound_s <= best.step_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral-8x7b-prefill-8xh100", {}, "workload.phase 'prefill', but planner 'alpa' plans training"),
        ("small-4-gpus", {"choose.schedule": "gpipe"}, "choose.schedule gpipe, but planner 'alpa' runs one_f_one_b"),
        ("small-4-gpus", {"model": "deepseek-v3", "workload.sequence": 4096}, "fit"),
    ],
)
def test_what_alpa_cannot_plan_is_said_in_a_sentence(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(mp.PlanError, match=words):
        mp.plan(mp.load(name, changes), planner="alpa")


def test_a_time_limit_that_is_too_short_is_named() -> None:
    with pytest.raises(mp.InfeasibleError, match="time limit"):
        mp.plan("small-4-gpus", planner="alpa", time_limit_s=1e-6)


def test_nothing_that_fits_is_none_and_not_an_answer() -> None:
    problem = random_graph(np.random.default_rng(0), operators=3, shardings=2)
    tight = ShardingProblem(
        seconds_S=problem.seconds_S, bytes_S=problem.bytes_S, edges_SS=problem.edges_SS, memory_bytes=-1e9
    )
    assert cheapest_sharding(tight) is None
    assert solve_ilp(tight) is None
    assert _sharding.by_price(tight) is None


def test_an_unknown_solver_and_one_that_found_nothing_are_named() -> None:
    problem = sharded_layer().problem(held=1.0)
    with pytest.raises(mp.PlanError, match="unknown solver 'cbx'; did you mean 'cbc'"):
        solve_ilp(problem, solver="cbx")
    with pytest.raises(mp.PlanError, match="longer time limit"):
        solve_ilp(problem, time_limit_s=0.0)
