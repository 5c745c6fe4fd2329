"""A finished search as a result: the plan, its figures and certificate, and why the others lost."""

from __future__ import annotations

from importlib.metadata import version

from moeplan.domain.result import Evaluated, PlanResult, RunnerUp
from moeplan.partition import footprint
from moeplan.planners._search import Search, Tried
from moeplan.units import show

_SHOWN = 8
_WORDS = {
    "dense_compute": "dense computation",
    "expert_compute": "expert computation",
    "exposed_all_to_all": "waiting for all-to-all",
}


def result_of(search: Search, *, planner: str) -> PlanResult:
    """What `search` found. It must have found something."""
    assert search.best is not None
    scenario, best = search.scenario, search.best
    memory = footprint.footprint(best.plan, scenario)
    return PlanResult(
        moeplan_version=version("moeplan"),
        planner=planner,
        scenario=scenario.document,
        plan=best.plan,
        step_s=best.step_s,
        mfu=best.mfu,
        tokens_per_s_per_gpu=best.tokens_per_s_per_gpu,
        peak_memory_bytes=max(stage.total for stage in memory),
        lower_bound_s=search.lower_bound_s,
        gap=max(0.0, best.step_s / search.lower_bound_s - 1),
        breakdown_s=best.causes_s,
        memory=memory,
        evaluated=evaluated(search),
        runners_up=tuple(runners_up(search)),
    )


def evaluated(search: Search) -> Evaluated:
    """The counts. What is left in the queue when the best plan is proven has been bounded out."""
    left = search.space.size - len(search.tried) - search.infeasible
    return Evaluated(
        legal=search.space.size,
        infeasible_by_memory=search.infeasible,
        bounded_out=left if search.proven else left - search.unresolved(),
        simulated=len(search.tried),
        unresolved=0 if search.proven else search.unresolved(),
    )


def runners_up(search: Search) -> list[RunnerUp]:
    """The simulated ones, then those that their closer bound ruled out, and the fastest that does not fit."""
    assert search.best is not None
    best = search.best
    found = [
        RunnerUp(plan=tried.plan, lower_bound_s=tried.bound_s, step_s=tried.step_s, reason=_why(tried, best))
        for tried in sorted(search.tried, key=lambda each: each.step_s)
        if tried is not best
    ]
    known = [tried.plan.model_copy(update={"placement": None}) for tried in search.tried]
    for bound_s, plan in sorted(search.bounded, key=lambda each: each[0]):
        if plan not in known:
            seconds = show(bound_s, "s")
            reason = f"cannot take less than {seconds}, {_percent(bound_s, best.step_s)}"
            if bound_s < best.step_s:
                reason = f"not simulated; might take as little as {seconds}"
            found.append(RunnerUp(plan=plan, lower_bound_s=bound_s, step_s=None, reason=reason))
    shown = found[:_SHOWN]
    if search.too_big is not None and search.too_big[0] < best.step_s:
        bound_s, plan = search.too_big
        reason = f"does not fit: {footprint.check_memory(plan, search.scenario)}"
        shown.append(RunnerUp(plan=plan, lower_bound_s=bound_s, step_s=None, reason=reason))
    return shown


def _why(tried: Tried, best: Tried) -> str:
    """How much slower, and which cause grew most."""
    if tried.step_s <= best.step_s * (1 + 1e-12):
        return "as fast as the plan"
    more = {cause: seconds - best.causes_s[cause] for cause, seconds in tried.causes_s.items()}
    cause = max(more, key=more.__getitem__)
    words = _WORDS.get(cause, cause.replace("_", " "))
    return f"{_percent(tried.step_s, best.step_s)}: {show(more[cause], 's')} more {words}"


def _percent(slow_s: float, fast_s: float) -> str:
    return f"{100 * (slow_s / fast_s - 1):.3g} % slower"
