"""Tutel: a dictionary from the capacity of experts to (r, degree of overlap, all-to-all), filled by trials.

r is how experts are spread over the W GPUs of a stage. r = 0: every GPU gathers all experts and sends no token. r of 1
or more: an expert's GPUs form groups of r, which divide its width between them and get its tokens each; the others hold
copies. All keep an expert's states sharded over its copies (ZeRO 3, or the most that is allowed), so that r can change
from step to step. For each degree of 1, 2, 4, 8 and each of `linear` and `two_dh` a ternary search over r tries
settings, and the best of all trials is kept under floor(capacity / 128). A trial here is a simulated step.

A plan is one setting for all layers, so the dictionary is asked once, with the capacity of the layer whose busiest
expert gets most. Not carried over: that a setting changes while training goes on, Tutel's fast encoding and its layout
of the all-to-all, which are in the cost of our kernels or nowhere. All else is what the framework runs by default.
Reference: Hwang et al., "Tutel: Adaptive mixture-of-experts at scale" (MLSys 2023), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.partition.route import Tokens, load_of
from moeplan.planners._published import Trials, algorithms_of, certified, degrees_of, is_alike, is_runnable, plainest
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Space

IS_EXACT = False
_DEGREES = (1, 2, 4, 8)
_ALGORITHMS = ("linear", "two_dh")
_BUCKET = 128


class Setting(NamedTuple):
    """What the dictionary holds."""

    r: int
    overlap_degree: int
    all_to_all: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dictionary:
    """The best setting known for each bucket of capacities. `trial` gives the seconds of a setting."""

    rs: tuple[int, ...]
    degrees: tuple[int, ...]
    algorithms: tuple[str, ...]
    trial: Callable[[Setting], float]
    known: dict[int, Setting] = field(default_factory=dict)

    def best(self, capacity: float) -> Setting:
        """Looked up; found by trials where there is none yet."""
        key = int(capacity // _BUCKET)
        if key not in self.known:
            self.known[key] = self._tried()
        return self.known[key]

    def _tried(self) -> Setting:
        tried: dict[Setting, float] = {}

        def seconds(setting: Setting) -> float:
            if setting not in tried:
                tried[setting] = self.trial(setting)
            return tried[setting]

        for degree, algorithm in product(self.degrees, self.algorithms):
            ternary(self.rs, lambda r, d=degree, a=algorithm: seconds(Setting(r, d, a)))  # type: ignore[misc]
        return min(tried, key=tried.__getitem__)


def ternary(values: Sequence[int], seconds: Callable[[int], float]) -> int:
    """The value that takes least, if seconds fall and then rise: a third of the values is left out at a time."""
    low, high = 0, len(values) - 1
    while high - low > 2:
        third = (high - low) // 3
        if seconds(values[low + third]) <= seconds(values[high - third]):
            high -= third
        else:
            low += third
    return min(values[low : high + 1], key=seconds)


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The framework's layout with the setting that Tutel's dictionary holds for it after its trials.

    `gap` changes nothing; when the time is over the best setting tried so far is kept. Raises InfeasibleError if
    nothing fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    plain, trials = plainest(search, shards_experts=True), Trials(search)
    spread = spreads(search.space, plain)
    dictionary = Dictionary(
        rs=tuple(spread), degrees=degrees_of(scenario, plain, _DEGREES),
        algorithms=algorithms_of(scenario, plain, _ALGORITHMS), trial=lambda each: trials.step_s(_set(spread, each)),
    )  # fmt: skip
    dictionary.best(capacity_of(scenario, plain))
    return certified(search, planner="tutel")


def spreads(space: Space, plain: Plan) -> dict[int, Plan]:
    """The plan for each r of the space that fits: 0 without expert parallelism, else the expert-tensor degree."""
    found: dict[int, Plan] = {}
    for branch in space.branches:
        layout = branch.layout
        r = layout.etp if layout.ep == plain.ep else 0
        if is_alike(layout, plain) and r not in found and (layout.ep, layout.etp) in ((plain.ep, layout.etp), (1, 1)):
            degrees = {name: getattr(layout, name) for name in ("ep", "etp", "rank_order")}
            found[r] = plain.model_copy(update={**degrees, "zero_expert": max(branch.zero_expert)})
    return {r: found[r] for r in sorted(found) if is_runnable(found[r], space.scenario)}


def _set(spread: dict[int, Plan], setting: Setting) -> Plan:
    """The plan of a setting. Without an exchange there is nothing to overlap, and no algorithm."""
    chosen = spread[setting.r]
    if chosen.ep == 1:
        return chosen.model_copy(update={"overlap_degree": 1, "all_to_all": "linear"})
    return chosen.model_copy(update={"overlap_degree": setting.overlap_degree, "all_to_all": setting.all_to_all})


def capacity_of(scenario: Scenario, plan: Plan) -> float:
    """Tokens that the busiest expert of any layer gets from one GPU, to which Tutel pads all; 0 without experts."""
    load = load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)
    return 0.0 if load is None else max(float(table.max()) for table in load.tokens_SE_by_layer)
