"""PipeMoE: the degree of overlap in closed form, from a performance model whose constants are fitted to measurements.

The tokens of a layer are cut into r parts; exchanges and experts of different parts overlap. With seconds of a part
t(r) = fixed + whole / r of one exchange (c) and of the experts (e), a pass through the layer takes

    max(2 r t_c, 2 t_c + r t_e),

the exchanges one after another, or the first of them, all experts and the last of them. Both are convex in r. The
experts' side is least at r = sqrt(2 whole_c / fixed_e); if exchanges take longer there, the two sides meet at a smaller
r, the root of a quadratic equation, and that is best. The degree is a whole number next to it.

As published one model serves for all layers: dispatch and combine, forward and backward pass count with their mean. The
constants are fitted to what our wires and kernels take for 1 to 8 parts while nothing else runs, at the place that gets
most tokens. Left out, as published: launches that wait, kernels and exchanges that slow each other down, and all but
the degree, which is what the framework runs by default: data and expert parallelism, linear all-to-alls.
Reference: Shi et al., "PipeMoE: Accelerating mixture-of-experts through adaptive pipelining" (INFOCOM 2023), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.planners._bounds import Bounds
from moeplan.planners._published import Trials, certified, degrees_of, is_runnable, plainest
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Space, branch_of

IS_EXACT = False
_DEGREES = tuple(range(1, 65))
_MEASURED = (1, 2, 4, 8)
"""Degrees to which the constants are fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Seconds of one of r parts: `fixed_s + whole_s / r`."""

    fixed_s: float
    whole_s: float

    def seconds(self, degree: float) -> float:
        """Of one part."""
        return self.fixed_s + self.whole_s / degree


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The framework's layout with the degree that PipeMoE's model calls best, simulated.

    `gap` and `time_limit_s` change nothing: there is nothing to search. Raises InfeasibleError if nothing fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    Trials(search).step_s(_overlapped(search, plainest(search)))
    return certified(search, planner="pipemoe")


def _overlapped(search: Search, plain: Plan) -> Plan:
    """The plan with the best degree, if it fits with that."""
    degrees = degrees_of(search.scenario, plain, _DEGREES)
    if len(degrees) == 1:
        return plain
    exchange, experts = fitted(search.exact.bounds, plain)
    chosen = plain.model_copy(update={"overlap_degree": best_degree(exchange, experts, degrees)})
    return chosen if is_runnable(chosen, search.scenario) else plain


# ---- the model


def layer_s(exchange: Line, experts: Line, degree: float) -> float:
    """Seconds of a layer's pass in `degree` parts: max(2 r t_c, 2 t_c + r t_e)."""
    sent_s = exchange.seconds(degree)
    return max(2 * degree * sent_s, 2 * sent_s + degree * experts.seconds(degree))


def best_degree(exchange: Line, experts: Line, degrees: Sequence[int]) -> int:
    """The degree of those allowed, which rise, at which a layer takes least: one of the two next to the optimum."""
    at = optimum(exchange, experts)
    below = max((degree for degree in degrees if degree <= at), default=degrees[0])
    above = min((degree for degree in degrees if degree >= at), default=degrees[-1])
    return min((below, above), key=lambda degree: layer_s(exchange, experts, degree))


def optimum(exchange: Line, experts: Line) -> float:
    """The real number r at which `layer_s` is least; inf if more parts are always better."""
    turning = sqrt(2 * exchange.whole_s / experts.fixed_s) if experts.fixed_s > 0 else inf
    return min(turning, _meeting(exchange, experts))


def _meeting(exchange: Line, experts: Line) -> float:
    """The least r > 0 at which 2 r t_c = 2 t_c + r t_e, a root of a r^2 + b r - 2 whole_c = 0; inf if there is none."""
    a = 2 * exchange.fixed_s - experts.fixed_s
    b = 2 * exchange.whole_s - 2 * exchange.fixed_s - experts.whole_s
    square = b * b + 8 * a * exchange.whole_s
    if square < 0 or b + sqrt(square) <= 0:
        return inf
    return 4 * exchange.whole_s / (b + sqrt(square))


# ---- its constants


def fitted(bounds: Bounds, plan: Plan) -> tuple[Line, Line]:
    """An exchange and the experts of the mean layer with experts, each the mean of its passes."""
    branch = replace(branch_of(plan, 1, (plan.dp * plan.cp, plan.edp)), overlap_degree=_MEASURED)
    chains, (kinds, of_layer, _) = bounds.chains(branch), bounds.prices.kinds
    layers = [kind for kind in of_layer if kinds[kind].layer.is_moe]
    passes = (0, 1) if bounds.training else (0,)
    sent_U = np.mean([(chains.exchanges[k].dispatch + chains.exchanges[k].combine) / 2 for k in layers], axis=0)
    busy_U = np.mean([chains.costs[k][p]["experts"] for k in layers for p in passes], axis=0)
    return line_through(_MEASURED, sent_U), line_through(_MEASURED, busy_U)


def line_through(degrees: Sequence[int], seconds_U: Floats) -> Line:
    """The least-squares fit of fixed + whole / r to the seconds of a part at each degree, neither below 0."""
    whole_s, fixed_s = np.polyfit(1 / np.array(degrees, np.float64), seconds_U, 1)
    return Line(fixed_s=max(0.0, float(fixed_s)), whole_s=max(0.0, float(whole_s)))
