"""The sharding problem as an ILP: what proves a choice where memory binds, and a second opinion of elimination.

Variables: s[v, i], 1 if operator v has sharding i; e[v, w, a, b], 1 if tail v is in class a and head w in class b,
where shardings with the same row (or column) of the edge's table are one class.
Reference: Zheng et al., "Alpa" (OSDI 2022), section 4.2, equations 1 and its linearisation.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np
import pulp

from moeplan.domain.program import Floats, Ints
from moeplan.errors import PlanError, unknown_name
from moeplan.placers._cbc import cbc_path, solve_programme
from moeplan.placers._highs import ready
from moeplan.planners._sharding import ROUNDING, Sharding, ShardingProblem, answer, eliminate, undominated

_TOLERANCE = 1e-6
"""So much is subtracted from a solver's bound."""


class _Edge(NamedTuple):
    """An edge between classes of shardings."""

    tail: int
    head: int
    tail_class_S: Ints
    head_class_S: Ints
    seconds_SS: Floats
    variables: list[list[pulp.LpVariable]]


class _Ilp(NamedTuple):
    problem: pulp.LpProblem
    chosen: list[list[pulp.LpVariable]]
    edges: list[_Edge]


def solve_ilp(problem: ShardingProblem, *, solver: str = "highs", time_limit_s: float | None = None) -> Sharding | None:
    """The best choice that fits, by "highs" or "cbc"; None if none fits.

    What the solver chose is valued here again. The bound is HiGHS's own less its tolerance, or if larger the least
    seconds without a limit of memory; CBC's word for its own is not taken. Raises PlanError if the solver is unknown or
    not there, found nothing though the smallest choice fits, or something that does not fit.
    """
    if sum(float(m.min()) for m in problem.bytes_S) > problem.memory_bytes:
        return None
    kept, whole = undominated(problem), problem
    problem, free_s = problem.only(kept), problem.seconds(eliminate(problem))
    scale_s = free_s or 1.0
    ilp = _built(problem, scale_s)
    bound = _run(ilp.problem, solver, time_limit_s)
    choice = tuple(int(np.argmax([_value(x) for x in row])) for row in ilp.chosen)
    if not all(any(_value(x) > 0.5 for x in row) for row in ilp.chosen):
        raise PlanError(f"{solver} found no sharding in {time_limit_s} s, though one fits; use a longer time limit")
    if problem.size_bytes(choice) > problem.memory_bytes * (1 + ROUNDING):
        raise PlanError(f"{solver} chose a sharding that does not fit its memory; use the other solver")
    chosen = tuple(int(at[i]) for at, i in zip(kept, choice, strict=True))
    return answer(whole, chosen, bound_s=max(free_s, bound * scale_s), proof=solver)


def _value(variable: pulp.LpVariable) -> float:
    return float(variable.value() or 0.0)


def _built(problem: ShardingProblem, scale_s: float) -> _Ilp:
    ilp = pulp.LpProblem("sharding", pulp.LpMinimize)
    chosen = [
        [ilp.add_variable(f"s_{v}_{i}", 0, 1, pulp.LpBinary) for i in range(len(s))]
        for v, s in enumerate(problem.seconds_S)
    ]
    edges = [_edge(ilp, v, w, table_SS / scale_s) for (v, w), table_SS in problem.edges_SS.items()]
    operators = [
        (x, float(s[i]) / scale_s) for row, s in zip(chosen, problem.seconds_S, strict=True) for i, x in enumerate(row)
    ]
    resharding = [
        (x, float(edge.seconds_SS[a, b]))
        for edge in edges
        for a, row in enumerate(edge.variables)
        for b, x in enumerate(row)
    ]
    ilp.setObjective(pulp.LpAffineExpression(operators + resharding))
    one_sharding_each(ilp, chosen)
    for edge in edges:
        edge_meets_tail(ilp, edge, chosen[edge.tail])
        edge_meets_head(ilp, edge, chosen[edge.head])
    if isfinite(problem.memory_bytes):
        fits_memory(ilp, chosen, problem)
    return _Ilp(ilp, chosen, edges)


def _edge(ilp: pulp.LpProblem, v: int, w: int, table_SS: Floats) -> _Edge:
    """Equal rows and equal columns of an edge's table are one each: the same polytope with fewer variables."""
    rows, tail_class = np.unique(table_SS, axis=0, return_inverse=True)
    table, head_class = np.unique(rows, axis=1, return_inverse=True)
    variables = [
        [ilp.add_variable(f"e_{v}_{w}_{a}_{b}", 0) for b in range(table.shape[1])] for a in range(table.shape[0])
    ]
    return _Edge(v, w, tail_class.ravel(), head_class.ravel(), table, variables)


def one_sharding_each(ilp: pulp.LpProblem, chosen: list[list[pulp.LpVariable]]) -> None:
    """sum over i of s[v, i] = 1, all operators v."""
    for v, row in enumerate(chosen):
        ilp.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression([(x, 1) for x in row]), 0, f"one_{v}", 1))


def edge_meets_tail(ilp: pulp.LpProblem, edge: _Edge, chosen: list[pulp.LpVariable]) -> None:
    """sum over b of e[v, w, a, b] = sum over i in class a of s[v, i], all classes a of the tail."""
    for a, row in enumerate(edge.variables):
        _equal(ilp, row, [x for i, x in enumerate(chosen) if edge.tail_class_S[i] == a])


def edge_meets_head(ilp: pulp.LpProblem, edge: _Edge, chosen: list[pulp.LpVariable]) -> None:
    """sum over a of e[v, w, a, b] = sum over i in class b of s[w, i], all classes b of the head."""
    for b, column in enumerate(zip(*edge.variables, strict=True)):
        _equal(ilp, list(column), [x for i, x in enumerate(chosen) if edge.head_class_S[i] == b])


def fits_memory(ilp: pulp.LpProblem, chosen: list[list[pulp.LpVariable]], problem: ShardingProblem) -> None:
    """sum over v, i of bytes[v, i] * s[v, i] <= memory, in shares of the memory."""
    terms = [
        (x, float(m[i]) / problem.memory_bytes)
        for row, m in zip(chosen, problem.bytes_S, strict=True)
        for i, x in enumerate(row)
    ]
    ilp.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), -1, "memory", 1))


def _equal(ilp: pulp.LpProblem, ones: list[pulp.LpVariable], others: list[pulp.LpVariable]) -> None:
    terms = [(x, 1) for x in ones] + [(x, -1) for x in others]
    ilp.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), 0, None, 0))


def _run(ilp: pulp.LpProblem, solver: str, time_limit_s: float | None) -> float:
    """Runs a solver, to the optimum if there is time, and returns a bound of the objective."""
    if solver == "cbc":
        if cbc_path() is None:
            raise PlanError("solver 'cbc' is not there; use 'highs'")
        solve_programme(ilp, gap=0.0, time_limit_s=time_limit_s)
        return 0.0
    if solver != "highs":
        raise PlanError(unknown_name("solver", solver, ("highs", "cbc")))
    exact = {"primal_feasibility_tolerance": ROUNDING, "mip_feasibility_tolerance": ROUNDING, "random_seed": 0}
    ready()
    ilp.solve(pulp.HiGHS(msg=False, gapRel=0, threads=1, timeLimit=time_limit_s, **exact))
    return float(ilp.solverModel.getInfo().mip_dual_bound) - _TOLERANCE
