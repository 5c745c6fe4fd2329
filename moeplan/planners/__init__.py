"""MENU: a scenario becomes a plan with its certificate. Each file is one planner; `--planner NAME` chooses it.

A dish has

    plan(scenario, *, time_limit_s=None, gap=None, progress=None) -> PlanResult

`gap`: stop when the plan found is proven within that share of the best (0: proven best; None, without a time limit:
when proven best or after a fixed amount of work). A planner that makes one plan by its own rules, as published, cannot
promise that: it says `IS_EXACT = False` and returns its plan with the gap it has. `_published.py` has what such
planners share: the layout that they start from, trials of plans, and the certificate.
`progress(message, done, total)` is called now and then. Raises
InfeasibleError if no plan fits, with the constraint that binds and the smallest change that helps.

Law (tests/contracts/test_planners.py): the plan is legal and fits, its figures are what the simulator says of it, and
no plan of the space that anyone finds is faster than `lower_bound_s`. The space has every placement of experts, with
replicas or without; a planner whose space has none says `IN_BLOCKS = True`. Example, a planner that takes the first
legal plan:

    def plan(scenario, *, time_limit_s=None, gap=None, progress=None):
        space = enumerate_space(scenario)
        ...
"""
