"""How many operations and tasks does the compiled engine run in a second, and how many does SimPy?

    python benchmarks/engine.py [--json]

Operations: a random graph of a million, each behind two of the 50 before it, on 64 serial resources, with 100
priorities; `moeplan.simulator.dag.run_dag` against SimPy's PriorityResource, which gets 10,000 of them, side by side.
Tasks: one training step, simulated by both engines of `moeplan.simulator.simulate`. CPU seconds of all threads, median
of three, each in a process of its own; compiling, and loading what is compiled, is left out and printed in a row of its
own. Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from speed import Numbers, Row, as_table, machine, median_of

OPERATIONS, FOR_SIMPY = 1_000_000, 10_000
RESOURCES, WINDOW, PRIORITIES = 64, 50, 100


def main() -> int:
    """The exit status: 0 if every target is met, 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    asked = parser.parse_args()
    found = [*rows_of_operations(), *rows_of_step("DeepSeek-V3", deepseek_step), *rows_of_step("Mixtral", mixtral_step)]
    lines = [asdict(row) | {"is_met": row.is_met} for row in found]
    document = {"schema": "moeplan.engine/v1", "machine": machine(), "rows": lines}
    print(json.dumps(document, indent=2) if asked.json else as_table(found))
    return int(any(row.is_met is False for row in found))


# ---- operations


def rows_of_operations() -> list[Row]:
    """Ours, SimPy's, and how much faster ours is in the same run."""
    ours, peer = median_of(compiled_operations), median_of(simpy_operations)
    mine, its = OPERATIONS / ours["spent_s"], FOR_SIMPY / peer["spent_s"]
    note = f"{ours['spent_s']:.3g} s, and once for loading {ours['load_s']:.3g} s"
    return [
        Row(what="operations, compiled", value=mine, unit="/s", target=5e6, more_is_better=True, note=note),
        Row(what="operations, SimPy PriorityResource", value=its, unit="/s", note=f"{FOR_SIMPY:,} of them"),
        Row(what="operations, ratio", value=mine / its, unit="times", target=25.0, more_is_better=True),
    ]


def graph(size: int) -> tuple[Any, ...]:
    """Seconds, resource and priority of each operation, and who stands behind whom."""
    rng = np.random.default_rng(1)
    after = np.repeat(np.arange(1, size), 2)
    before = np.maximum(after - rng.integers(1, WINDOW + 1, len(after)), 0)
    seconds = rng.random(size) + 0.01
    return seconds, rng.integers(0, RESOURCES, size), rng.integers(0, PRIORITIES, size), before, after


def compiled_operations() -> Numbers:
    """All operations, by `run_dag`, the median of three: the first also waits for the system to give it memory."""
    start = time.process_time()
    from moeplan.simulator.dag import run_dag

    run_dag(*graph(10))
    loaded = time.process_time()
    given, spent_s = graph(OPERATIONS), []
    for _ in range(3):
        begun = time.process_time()
        _, end_s = run_dag(*given)
        spent_s.append(time.process_time() - begun)
        assert (end_s > 0).all()
    return {"spent_s": statistics.median(spent_s), "load_s": loaded - start}


def simpy_operations() -> Numbers:
    """Some of them, each as a process that waits for those before it, then for its resource."""
    import simpy

    seconds, resource, priority, before, after = graph(FOR_SIMPY)
    env = simpy.Environment()
    queues = [simpy.PriorityResource(env) for _ in range(RESOURCES)]
    needs = np.split(before, np.cumsum(np.bincount(after, minlength=FOR_SIMPY))[:-1])
    processes: list[Any] = []

    def operation(number: int) -> Any:
        yield simpy.AllOf(env, [processes[need] for need in set(needs[number].tolist())])
        with queues[resource[number]].request(priority=int(priority[number])) as request:
            yield request
            yield env.timeout(float(seconds[number]))

    start = time.process_time()
    for number in range(FOR_SIMPY):
        processes += [env.process(operation(number))]
    env.run()
    return {"spent_s": time.process_time() - start}


# ---- a step


def rows_of_step(name: str, measure: Any) -> list[Row]:
    """Tasks in a second by each engine."""
    found = median_of(measure)
    size = f"{found['tasks']:,.0f} tasks, {found['lanes']:.0f} lanes, {found['classes']:,.0f} flow classes"
    note = f"{size}; {found['compiled_s']:.3g} s, and once for loading {found['load_s']:.3g} s"
    ratio = found["simpy_s"] / found["compiled_s"]
    return [
        Row(
            what=f"{name} step, compiled engine", value=found["tasks"] / found["compiled_s"], unit="tasks/s", note=note
        ),
        Row(what=f"{name} step, SimPy engine", value=found["tasks"] / found["simpy_s"], unit="tasks/s"),
        Row(what=f"{name} step, ratio", value=ratio, unit="times"),
    ]


def deepseek_step() -> Numbers:
    """61 layers on 2,048 GPUs, pp16 ep64 dp128, 1F1B, 60 micro-batches, even routing."""
    plan = {"dp": 128, "pp": 16, "ep": 64, "stages": (3, *(4,) * 13, 3, 3)}
    return both_engines("deepseek-v3-2048xh800", {"workload.global_batch": 7680}, plan)


def mixtral_step() -> Numbers:
    """32 layers on 64 GPUs, pp4 ep8 dp16, 1F1B, 64 micro-batches, uneven routing: each expert's GPU on its own."""
    plan = {"dp": 16, "pp": 4, "ep": 8, "stages": (8, 8, 8, 8)}
    return both_engines("mixtral-8x7b-64xh100", {"routing.skew": 0.8}, plan)


def both_engines(scenario: str, changes: dict[str, Any], plan: dict[str, Any]) -> Numbers:
    """CPU seconds of one simulation by each engine, and of the first, small one that loads the compiled engine."""
    import moeplan as mp
    from moeplan.compiler.compile_plan import compile_plan
    from moeplan.cost.cost_model import CostModel
    from moeplan.simulator.simulate import simulate

    small = mp.load("tiny-moe-2-ranks")
    first = compile_plan(mp.Plan(dp=2, ep=2, stages=(len(small.model.all_layers),)), small)
    load_s = spent_s(simulate, first, CostModel(gpu=small.cluster.gpu), "compiled")
    given = mp.load(scenario, changes)
    choices = given.choices
    program = compile_plan(mp.Plan(**plan, capacity=choices.capacity, precision=choices.precision), given)
    costs = CostModel(gpu=given.cluster.gpu)
    compiled_s, simpy_s = (spent_s(simulate, program, costs, engine) for engine in ("compiled", "simpy"))
    return {
        "spent_s": compiled_s + simpy_s, "compiled_s": compiled_s, "simpy_s": simpy_s, "load_s": load_s,
        "tasks": len(program.tasks), "lanes": len(program.lanes), "classes": len(program.flows.share_C),
    }  # fmt: skip


def spent_s(simulate: Any, program: Any, costs: Any, engine: str) -> float:
    """CPU seconds of one simulation."""
    start = time.process_time()
    simulate(program, costs, engine=engine)
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
