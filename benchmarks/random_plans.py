"""Is any of 10,000 plans that are drawn at random faster than the certificate says? Experts stand at random, too.

    python benchmarks/random_plans.py                               10,000 plans of the small scenarios
    python benchmarks/random_plans.py mixtral-8x22b-128xh100 --plans 100 --gap 0.5     of a large one

The lower bound is that of `ours`, searched to `--gap`. Plans are drawn from the space that `ours` searches, and seven
of ten with more than one expert-parallel rank get a placement at random. `least` is the fastest of them over the bound.
A step below the bound is printed as BROKEN with its plan, and the exit status is 1.

`drawn` is what `tests/differential/test_random_plans.py` draws its plans by. Axes of arrays: E expert, C slot of an
expert-parallel group.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np

import moeplan as mp
from moeplan.domain.placement import EMPTY, Placement
from moeplan.partition.footprint import filled_share
from moeplan.partition.legal import problems
from moeplan.planners._space import Space

SMALL = ("small-4-gpus", "small-8-gpus", "small-two-nodes", "tiny-moe-2-ranks", "tiny-moe-4-ranks")
PLANS = 10_000
MOST_MICROBATCHES = 32
"""Of a plan: what has more takes long to simulate."""
_ROUNDING = 1e-9


def random_placement(rng: np.random.Generator, scenario: mp.Scenario, ep: int) -> Placement:
    """In each layer every expert once, more of them in slots that are left, some slots empty; shares at random."""
    counts = [layer.experts.num_experts for layer in scenario.model.all_layers if layer.experts]
    per_place = max(counts) // ep + int(rng.integers(0, 3))
    rows = [_random_row(rng, count, ep, per_place) for count in counts]
    shares = [_random_shares(rng, row) for row in rows] if rng.random() < 0.5 else None
    return Placement(experts=tuple(map(tuple, rows)), shares=shares and tuple(map(tuple, shares)))


def _random_row(rng: np.random.Generator, num_experts: int, ep: int, per_place: int) -> list[int]:
    """No expert twice on a place."""
    places: list[list[int]] = [[] for _ in range(ep)]
    for expert in rng.permutation(num_experts).tolist():
        free = [held for held in places if len(held) < per_place]
        free[int(rng.integers(len(free)))].append(expert)
    for held in places:
        others = [expert for expert in rng.permutation(num_experts).tolist() if expert not in held]
        held += others[: int(rng.integers(0, per_place - len(held) + 1))]
    return [expert for held in places for expert in held + [EMPTY] * (per_place - len(held))]


def _random_shares(rng: np.random.Generator, row: list[int]) -> list[float]:
    expert_C = np.array(row)
    weight_C = np.where(expert_C == EMPTY, 0.0, rng.uniform(0, 1, expert_C.size))
    sum_E = np.bincount(expert_C + 1, weights=weight_C)
    return (weight_C / np.where(sum_E > 0, sum_E, 1.0)[expert_C + 1]).tolist()


def drawn(scenario: mp.Scenario, count: int, seed: int) -> Iterator[mp.Plan]:
    """Plans of the space that fit, in blocks or placed at random."""
    rng, space, given = np.random.default_rng(seed), Space(scenario), 0
    while given < count:
        branch = space.branches[int(rng.integers(len(space.branches)))]
        plan = space.plan(branch, int(rng.integers(branch.size)))
        if plan.ep > 1 and rng.random() < 0.7:
            plan = plan.model_copy(update={"placement": random_placement(rng, scenario, plan.ep)})
        few = plan.num_microbatches(scenario.workload.global_batch) <= MOST_MICROBATCHES
        if few and next(problems(plan, scenario), None) is None and filled_share(plan, scenario) <= 1:
            given += 1
            yield plan


def is_whole(name: str, *, count: int, seed: int, gap: float) -> bool:
    """Whether no plan that is drawn is below the bound, after the scenario's row has been printed."""
    start = time.process_time()
    scenario = mp.load(name)
    bound_s = mp.plan(scenario, gap=gap).lower_bound_s
    least_s, broken = np.inf, 0
    for plan in drawn(scenario, count, seed):
        step_s = mp.simulate(scenario, plan).figures.step_s
        least_s = min(least_s, step_s)
        if step_s < bound_s * (1 - _ROUNDING):
            broken += 1
            print(f"BROKEN: {step_s:.9g} s is below {bound_s:.9g} s: {plan.model_dump_json(by_alias=True)}", flush=True)
    cpu_s = time.process_time() - start
    print(f"{name:28}{count:8,}{bound_s:12.5g} s{least_s / bound_s:10.4f}{broken:8}{cpu_s:9.0f}", flush=True)
    return broken == 0


def main() -> int:
    """The exit status: 0 if no bound is broken, 1 if one is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=SMALL)
    parser.add_argument("--plans", type=int, default=PLANS, help="of all scenarios together")
    parser.add_argument("--gap", type=float, default=0.0, help="to which the certificate is searched")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(f"{'scenario':28}{'plans':>8}{'bound':>14}{'least':>10}{'BROKEN':>8}{'CPU s':>9}")
    each = -(-asked.plans // len(asked.scenarios))
    whole = [is_whole(name, count=each, seed=asked.seed, gap=asked.gap) for name in asked.scenarios]
    return 0 if all(whole) else 1


if __name__ == "__main__":
    sys.exit(main())
