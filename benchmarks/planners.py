"""Every planner of the menu on the same scenarios and simulator: whose plan is fastest, and is a bound broken?

    python benchmarks/planners.py                             the scenarios that take a minute
    python benchmarks/planners.py deepseek-v3-2048xh800 ...   these
    python benchmarks/planners.py --all                       every shipped scenario: hours

`over ours` is the plan's step over that of `ours`. A step below the lower bound of `ours` is printed as
BROKEN, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time

import moeplan as mp
from moeplan import menu
from moeplan.catalogue.files import names as names_of

FEW = ("tiny-moe-2-ranks", "small-4-gpus", "small-8-gpus", "small-two-nodes", "mixtral-8x7b-64xh100")
OURS = "ours"


def main() -> int:
    """Prints a row for each planner and scenario as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=FEW)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--time-limit", type=float, help="seconds for each plan")
    asked = parser.parse_args()
    names = names_of("scenarios") if asked.all else asked.scenarios
    whole = [compared(name, asked.time_limit) for name in names]
    return 0 if all(whole) else 1


def compared(scenario: str, time_limit_s: float | None) -> bool:
    """Whether no planner's step is below our bound."""
    ours = planned(scenario, OURS, time_limit_s, None)
    whole = True
    for planner in menu.names("planners"):
        if planner != OURS:
            found = planned(scenario, planner, time_limit_s, ours)
            whole &= ours is None or found is None or found.step_s >= ours.lower_bound_s * (1 - 1e-9)
    return whole


def planned(
    scenario: str, planner: str, time_limit_s: float | None, ours: mp.PlanResult | None
) -> mp.PlanResult | None:
    """The plan, after its row has been printed; None where there is none."""
    start = time.process_time()
    try:
        found = mp.plan(scenario, planner=planner, time_limit_s=time_limit_s)
    except mp.MoeplanError as error:
        print(f"{scenario:28} {planner:12} {'none':>11}  {str(error)[:90]}", flush=True)
        return None
    spent_s = time.process_time() - start
    over = "" if ours is None else f"{found.step_s / ours.step_s:8.4f}"
    state = "BROKEN" if ours is not None and found.step_s < ours.lower_bound_s * (1 - 1e-9) else ""
    bound = f"{found.lower_bound_s:11.5g} s {100 * found.gap:6.2f} %"
    print(f"{scenario:28} {planner:12} {found.step_s:9.5g} s {over:8} {bound} {spent_s:7.1f} CPU s {state}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
