"""The exact methods one by one: no refutation is ever wrong, and what is claimed wrongly is dropped and told."""

from __future__ import annotations

import builtins
import itertools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import pytest

from moeplan.domain.placement import LayerPlacement, PlacementProblem
from moeplan.placers import _cbc, ilp
from moeplan.placers._branching import refuted
from moeplan.placers._cbc import cbc_path
from moeplan.placers._check import value
from moeplan.placers._configurations import ConfigurationLP, Fractions, Prices, refutes, stretched
from moeplan.placers._counts import any_counts, options
from moeplan.placers._direct import solved_by_cbc, solved_by_highs, written_out
from moeplan.placers._exact import Search
from moeplan.placers._linear import Model
from moeplan.placers._packing import long_walks, rounded_and_packed
from moeplan.placers._pairs import pairable
from moeplan.placers._pricing import best_sets

EVER = float("inf")


def problems(number: int, *, most_slots_per_gpu: int = 3) -> list[PlacementProblem]:
    """Layers of 3 to 5 experts on 2 or 3 GPUs, of which one in four slots may stay empty."""
    rng, found = np.random.default_rng(3), []
    while len(found) < number:
        tokens_E = rng.lognormal(sigma=rng.uniform(0.2, 1.5), size=int(rng.integers(3, 6)))
        gpus = int(rng.integers(2, 4))
        slots = int(rng.integers(tokens_E.size, tokens_E.size * gpus + 1))
        if -(-slots // gpus) <= most_slots_per_gpu:
            found.append(PlacementProblem(tokens_SE=tokens_E, num_gpus=gpus, slots=slots))
    return found


def best_value(problem: PlacementProblem) -> float:
    """The least value of all legal placements."""
    gpus = range(problem.num_gpus)
    sets = [chosen for size in range(1, problem.num_gpus + 1) for chosen in itertools.combinations(gpus, size)]
    best = EVER
    for choice in itertools.product(sets, repeat=problem.num_experts):
        if sum(map(len, choice)) == problem.slots:
            load, held = np.zeros(problem.num_gpus), np.zeros(problem.num_gpus)
            for tokens, chosen in zip(problem.tokens_E, choice, strict=True):
                load[list(chosen)] += tokens / len(chosen)
                held[list(chosen)] += 1
            if held.max() <= problem.slots_per_gpu:
                best = min(best, load.max())
    return float(best)


def test_the_best_set_is_the_best_of_all_sets_of_distinct_experts_that_fit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        number, most, limit = int(rng.integers(1, 10)), int(rng.integers(1, 5)), float(rng.uniform(0.3, 1.5))
        size_O = np.sort(rng.random(number))
        expert_O, value_O = rng.integers(0, 5, number), rng.normal(0.3, 0.4, number)
        worth_O, set_OC = best_sets(size_O, expert_O, value_O, limit, most, 0.2)
        every = [list(s) for size in range(1, most + 1) for s in itertools.combinations(range(number), size)]
        legal = [s for s in every if len(set(expert_O[s])) == len(s) and size_O[s].sum() <= limit]
        best = max((float(value_O[s].sum()) for s in legal), default=0.0)
        assert worth_O.max() == pytest.approx(best if best > 0.2 else 0.0)
        for option, worth in enumerate(worth_O):
            chosen = [item for item in set_OC[option].tolist() if item >= 0]
            assert worth == 0 or (sorted(chosen) in legal and max(chosen) == option)
            assert value_O[chosen].sum() == pytest.approx(worth)


def test_every_count_of_every_good_placement_is_an_option() -> None:
    problem = PlacementProblem(tokens_SE=[6.0, 3.0, 1.0], num_gpus=3, slots=6)
    found = options(problem, limit=3.0, within=any_counts(problem))
    assert found is not None
    pairs = set(zip(found.expert_O.tolist(), found.count_O.tolist(), strict=True))
    assert pairs == {(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)}
    assert options(problem, limit=1.0, within=any_counts(problem)) is None


def test_no_method_refutes_a_limit_that_a_placement_meets() -> None:
    for problem in problems(40):
        best = best_value(problem)
        lp, rng = ConfigurationLP(problem), np.random.default_rng(0)
        for limit in best * np.array([1.0, 1.001, 1.1]):
            solution = lp.solve(limit=limit, within=any_counts(problem), stop_s=EVER)
            assert isinstance(solution, Fractions)
            placed = rounded_and_packed(problem, solution, target=limit, rng=rng)
            assert value(problem, placed) >= best * (1 - 1e-12)
            assert not refuted(problem, lp, limit=limit, stop_s=EVER, attempt=lambda _: False)


def test_prices_refute_what_they_say_and_stretching_them_stays_below_the_best() -> None:
    refutations = 0
    for problem in problems(40):
        best, lp = best_value(problem), ConfigurationLP(problem)
        for limit in best * np.array([0.7, 0.9, 0.99]):
            solution = lp.solve(limit=limit, within=any_counts(problem), stop_s=EVER)
            if isinstance(solution, Prices):
                refutations += 1
                assert refutes(problem, solution, limit=limit)
                assert limit <= stretched(problem, solution, limit=limit, high=2 * best) <= best
    assert refutations > 40


def test_branching_refutes_all_that_lies_below_the_best_counts() -> None:
    """At 1 % below the best, counts are refuted or left open, which happens where only the packing is at fault."""
    proven = 0
    for problem in problems(30):
        lp = ConfigurationLP(problem)
        proven += refuted(problem, lp, limit=0.99 * best_value(problem), stop_s=EVER, attempt=lambda _: False)
    assert proven >= 20


def test_pairs_are_found_at_the_best_value_and_refuted_below() -> None:
    for problem in problems(40, most_slots_per_gpu=2):
        if problem.slots_per_gpu < 2:
            continue
        best = best_value(problem)
        found = pairable(problem, limit=best, time_limit_s=10)
        assert found.count_E is not None
        assert found.count_E.sum() == problem.slots
        assert not found.refuted
        below = pairable(problem, limit=0.7 * best, time_limit_s=10)
        assert below.refuted == (below.count_E is None)


def test_counts_that_pair_up_are_packed_within_the_limit() -> None:
    tokens_E = np.random.default_rng(1).lognormal(sigma=0.8, size=24)
    problem = PlacementProblem(tokens_SE=tokens_E, num_gpus=16, slots=32)
    placed = ilp.place(problem, rng=np.random.default_rng(0), time_limit_s=20, gap=1e-3)
    found = pairable(problem, limit=placed.value, time_limit_s=10)
    assert found.count_E is not None
    packed = long_walks(problem, found.count_E, target=placed.value, rng=np.random.default_rng(0))
    assert value(problem, packed) <= placed.value * (1 + 1e-9)
    assert placed.gap <= 1e-3


def test_a_skewed_layer_is_proven_where_walks_alone_are_not() -> None:
    share_E = 0.6 ** np.arange(32.0)
    problem = PlacementProblem(tokens_SE=np.minimum(share_E, 0.9), num_gpus=16, slots=47)
    placed = ilp.place(problem, rng=np.random.default_rng(0), time_limit_s=30, gap=0.01)
    again = ilp.place(problem, rng=np.random.default_rng(0), time_limit_s=30, gap=0.01)
    assert placed.gap <= 0.01
    assert placed.value == again.value
    assert placed.lower_bound == again.lower_bound


def searched(problem: PlacementProblem) -> Search:
    placement = LayerPlacement.even([0, 1], [0, 1])
    return Search(
        problem=problem, gap=0.0, stop_s=EVER, rng=np.random.default_rng(0),
        placement=placement, value=value(problem, placement), bound=1.0, proof="mean",
    )  # fmt: skip


def test_a_claim_above_a_legal_placement_is_dropped_and_told() -> None:
    search = searched(PlacementProblem(tokens_SE=[2.0, 1.0], num_gpus=2, slots=2))
    search.prove(2.5, "a solver that is wrong")
    assert search.bound == 1.0
    assert "2.5 was dropped" in search.proof
    search.prove(1.5, "another one")
    assert (search.bound, search.proof) == (1.5, "another one")


def test_an_answer_that_the_checker_refuses_is_dropped_and_told() -> None:
    search = searched(PlacementProblem(tokens_SE=[2.0, 1.0], num_gpus=2, slots=2))
    assert not search.offer(LayerPlacement.even([0, 1, 1], [0, 0, 1]))
    assert search.value == 2.0
    assert "dropped" in search.proof


def test_without_time_the_first_placement_comes_with_its_gap() -> None:
    tokens_E = np.random.default_rng(1).lognormal(sigma=1.2, size=40)
    problem = PlacementProblem(tokens_SE=tokens_E, num_gpus=16, slots=48)
    placed = ilp.place(problem, rng=np.random.default_rng(0), time_limit_s=0.0, gap=0.0)
    assert 0 < placed.lower_bound <= placed.value < EVER


def test_without_a_solver_the_walks_answer_and_the_proof_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without_highs(
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        if name == "highspy":
            raise ImportError("no highspy", name="highspy")
        return true_import(name, globals, locals, fromlist, level)

    for name in [name for name in sys.modules if name == "highspy" or name.startswith("moeplan.placers._")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_highs)
    problem = PlacementProblem(tokens_SE=[7.0, 5.0, 4.0, 3.0, 1.0], num_gpus=2, slots=6)
    placed = ilp.place(problem, rng=np.random.default_rng(0), time_limit_s=5, gap=0.0)
    assert "highspy is not installed" in placed.proof


def test_cbc_without_time_finds_nothing_and_harms_nothing() -> None:
    problem = PlacementProblem(tokens_SE=np.arange(1.0, 30.0), num_gpus=8, slots=40)
    answer = solved_by_cbc(problem, written_out(problem, high=200.0), gap=0.0, time_limit_s=0.0)
    assert answer.bound == 0.0


@pytest.mark.skipif(cbc_path() is None, reason="CBC is not installed")
@pytest.mark.parametrize(
    ("most", "whole", "wanted"), [(2.5, True, [0, 2]), (2.5, False, [0.5, 2]), (9.0, True, [1, 2]), (-1.0, True, None)]
)
def test_cbc_reads_a_model_of_arrays_and_says_nothing_where_nothing_fits(
    most: float, whole: bool, wanted: list[float] | None
) -> None:
    """x + 2 y is greatest, x up to 1 and y up to 2, x + y up to `most`."""
    model = Model()
    both = model.add(2, cost=[-1.0, -2.0], high=[1.0, 2.0], whole=whole)
    model.put(model.rows(1, high=most), both, 1.0)
    values = model.solve_by_cbc(time_limit_s=10).values
    assert (None if values is None else values.tolist()) == wanted


def test_without_cbc_there_is_no_second_opinion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cbc, "cbc_path", lambda: None)
    model = Model()
    model.put(model.rows(1, high=1.0), model.add(1, cost=-1.0), 1.0)
    assert model.solve_by_cbc().values is None


def test_few_moves_are_kept_to() -> None:
    now = LayerPlacement.even([0, 1, 2, 3], [0, 0, 1, 1])
    problem = PlacementProblem(tokens_SE=[4.0, 4.0, 1.0, 1.0], num_gpus=2, slots=4, now=now, max_moves=2)
    answer = solved_by_highs(problem, written_out(problem, high=8.0), gap=0.0, time_limit_s=10)
    assert answer.placement is not None
    assert value(problem, answer.placement) == 5.0
    assert answer.placement.moves_from(now) <= 2
    assert 4.99 < answer.bound <= 5.0


@pytest.mark.parametrize(
    "lines",
    [
        "from moeplan.placers._highs import solver_of; solver_of(); solver_of().writeModel('/dev/null')",
        "problem = PlacementProblem(tokens_SE=[4.0, 3.0, 2.0], num_gpus=2, slots=4)\n"
        "solved_by_highs(problem, written_out(problem, high=9.0), gap=0.0, time_limit_s=5)",
    ],
    ids=["arrays", "PuLP"],
)
def test_solvers_say_nothing_on_standard_output(lines: str) -> None:
    """Where a command prints one document, nothing else may stand."""
    imports = [
        "from moeplan.domain.placement import PlacementProblem",
        "from moeplan.placers._direct import solved_by_highs, written_out",
    ]
    script = "\n".join([*imports, lines])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == ""


def test_a_solver_is_made_where_standard_output_is_closed() -> None:
    script = "import os; os.close(1); from moeplan.placers._highs import solver_of; solver_of().run()"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode in (0, 120), (
        "120: Python cannot flush"
    )


def test_highs_solves_for_us_whatever_number_of_threads_somebody_else_asked_for() -> None:
    """Of one process all solvers share a scheduler, and fail where they ask for other threads than it has."""
    found = subprocess.run([sys.executable, "-c", OTHER_THREADS], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "True"


OTHER_THREADS = """
import numpy as np, pulp
from moeplan.domain.placement import PlacementProblem
from moeplan.placers._direct import solved_by_highs, written_out

theirs = pulp.LpProblem("theirs", pulp.LpMaximize)
x = theirs.add_variable("x", 0, 10, cat="Integer")
theirs += x
theirs.solve(pulp.HiGHS(msg=False, threads=2))
problem = PlacementProblem(tokens_SE=np.array([3.0, 2.0, 1.0]), num_gpus=2, slots=3)
answer = solved_by_highs(problem, written_out(problem, high=6.0), gap=0.0, time_limit_s=10)
print(answer.placement is not None)
"""
