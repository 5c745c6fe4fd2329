"""A linear or integer programme given as arrays, solved by HiGHS in process, or by CBC.

PuLP builds a model term by term, which takes longer than solving it where there are ten thousand terms; and it does not
tell the dual bound. A model here is made of blocks of variables and blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints
from moeplan.errors import PlanError
from moeplan.placers._cbc import values_of
from moeplan.placers._highs import solver_of

_COLUMN = "c"
"""What HiGHS calls a variable in a file, before its number."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Solution:
    """Values of all variables, if any were found, and a number that no whole solution is below."""

    values: Floats | None
    bound: float


@dataclass(kw_only=True, slots=True, eq=False)
class Model:
    """Variables of 0 or more, of which some are whole; rows between two limits; the costs' sum is minimised."""

    cost: list[Floats] = field(default_factory=list)
    high: list[Floats] = field(default_factory=list)
    whole: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    limits: list[tuple[Floats, Floats]] = field(default_factory=list)
    terms: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)
    num_variables: int = 0
    num_rows: int = 0

    def add(self, count: int, *, cost: npt.ArrayLike = 0.0, high: npt.ArrayLike = np.inf, whole: bool = False) -> Ints:
        """The numbers of so many new variables."""
        self.cost.append(np.broadcast_to(np.asarray(cost, np.float64), count))
        self.high.append(np.broadcast_to(np.asarray(high, np.float64), count))
        self.whole.append(np.full(count, whole))
        self.num_variables += count
        return np.arange(self.num_variables - count, self.num_variables, dtype=np.int64)

    def rows(self, count: int, *, low: npt.ArrayLike = -np.inf, high: npt.ArrayLike = np.inf) -> Ints:
        """The numbers of so many new rows."""
        self.limits.append(
            (np.broadcast_to(np.asarray(low, np.float64), count), np.broadcast_to(np.asarray(high, np.float64), count))
        )
        self.num_rows += count
        return np.arange(self.num_rows - count, self.num_rows, dtype=np.int64)

    def put(self, row: Ints, variable: Ints, factor: npt.ArrayLike) -> None:
        """Adds `factor * variable` to rows; the arguments are broadcast against each other."""
        row, variable, value = np.broadcast_arrays(row, variable, np.asarray(factor, np.float64))
        self.terms.append((row.ravel(), variable.ravel(), value.ravel()))

    def solve(self, *, gap: float = 0.0, time_limit_s: float = np.inf, nodes: int = 0) -> Solution:
        """The best solution found within `nodes` branchings (0: as many as it takes); a time limit may only cut.

        The bound is minus infinity where HiGHS has none. Raises PlanError where HiGHS refuses the model.
        """
        limits = {"time_limit": time_limit_s} | ({"mip_max_nodes": nodes} if nodes else {})
        solver = self.given_to(solver_of(random_seed=0, mip_rel_gap=gap, **limits))
        solver.run()
        info, found = solver.getInfo(), solver.getSolution()
        values = np.array(found.col_value) if found.value_valid else None
        is_whole = bool(np.concatenate(self.whole).any())
        return Solution(values=values, bound=float(info.mip_dual_bound if is_whole else info.objective_function_value))

    def solve_by_cbc(self, *, gap: float = 0.0, time_limit_s: float | None = None) -> Solution:
        """What CBC finds, without a bound; no values where it is missing, had to be stopped or found none."""
        found = values_of(self.given_to(solver_of()).writeModel, gap=gap, time_limit_s=time_limit_s)
        if found is None:
            return Solution(values=None, bound=-np.inf)
        values = np.zeros(self.num_variables)
        values[[int(name.removeprefix(_COLUMN)) for name in found]] = list(found.values())
        return Solution(values=values, bound=-np.inf)

    def given_to(self, solver: Any) -> Any:
        """The solver, with this model. Raises PlanError where HiGHS refuses it."""
        if solver.passModel(self.lp()) == highspy.HighsStatus.kError:
            raise PlanError("placement: HiGHS refuses the model; report the load that it was built from")
        return solver

    def lp(self) -> highspy.HighsLp:
        """The model by columns, as HiGHS takes it."""
        row, variable, value = (np.concatenate(part) for part in zip(*self.terms, strict=True))
        order = np.lexsort((row, variable))
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.num_variables, self.num_rows
        lp.col_cost_, lp.col_lower_ = np.concatenate(self.cost), np.zeros(self.num_variables)
        lp.col_upper_ = np.concatenate(self.high)
        lp.row_lower_ = np.concatenate([low for low, _ in self.limits])
        lp.row_upper_ = np.concatenate([high for _, high in self.limits])
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(variable, minlength=self.num_variables))])
        lp.a_matrix_.index_, lp.a_matrix_.value_ = row[order], value[order]
        whole = np.concatenate(self.whole)
        if whole.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[is_whole] for is_whole in whole.tolist()]
        return lp
