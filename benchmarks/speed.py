"""How fast are bounds, simulator and command on this machine, and is that as fast as we claim?

    python benchmarks/speed.py [--quick] [--json]

Seconds are CPU seconds of all threads, unless a row says wall. Each measurement is a process of its own, so that
nothing is known from the one before; what takes under 5 s is the median of three. `--quick` leaves out the two whole
plans, which are stopped after 240 s each. Exits 1 if a target is missed, 2 if something fails. Linux or macOS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHORT_S = 5.0
LIMIT_S = 240.0
SAMPLED = 41
"""One branch of so many has its close bounds computed, and one plan of each of these: all would take minutes. A prime,
since the branches come in regular patterns."""
CALCULON = "Calculon, closed form: 229 plans/s on two such cores"
SIMUMAX = "SimuMax, closed form: 0.3 s for 60 layers, without a network"

Numbers = dict[str, float]
"""What a measurement found. `spent_s` decides whether it is done three times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    value: float | None
    """None: nothing came out in time."""
    unit: str
    target: float | None = None
    more_is_better: bool = False
    peer: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.target if self.more_is_better else self.value <= self.target


def main() -> int:
    """The exit status: 0 if every target is met, 1 if one is missed, 2 if something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the two whole plans, which take longest")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    asked = parser.parse_args()
    try:
        found = rows(quick=asked.quick)
    except RuntimeError as failure:
        print(f"speed: {failure}", file=sys.stderr)
        return 2
    print(as_json(found) if asked.json else as_table(found))
    return int(any(row.is_met is False for row in found))


def rows(*, quick: bool) -> list[Row]:
    """The whole table, one measurement after another."""
    found = [*rows_of_bounds(), *rows_of_step(), *rows_of_help()]
    if not quick:
        found += rows_of_plan("mixtral-8x7b-64xh100", target_s=15.0)
        found += rows_of_plan("deepseek-v3-2048xh800", target_s=60.0)
    return found


# ---- bounds


def rows_of_bounds() -> list[Row]:
    """Plans bounded in a second. A bound covers all plans that it cannot tell apart, so the rows computed count too."""
    looks = [
        ("bounds of passes, every branch", bound_branches, 20_000.0),
        ("bounds of steps, branch by branch", bound_closely, 20_000.0),
        ("closer bounds, plan by plan", bound_plans, None),
    ]
    return [row_of_bounds(what, median_of(look), target) for what, look, target in looks]


def row_of_bounds(what: str, found: Numbers, target: float | None) -> Row:
    """A rate and what it was measured on."""
    plans, computed = per_s(found, "plans"), per_s(found, "rows")
    work = f"{found['plans']:,.0f} plans in {found['rows']:,.0f} rows"
    note = f"{work}, {computed:,.0f} rows/s, {found['spent_s']:.3g} s"
    return Row(what=what, value=plans, unit="plans/s", target=target, more_is_better=True, peer=CALCULON, note=note)


def bound_branches() -> Numbers:
    """The planner's first look at the whole space."""
    from moeplan.planners._bounds import Bounds

    space = mixtral_space()
    start = time.process_time()
    bounds = Bounds(space.scenario)
    computed = sum(bounds.pipeline_s(branch).size for branch in space.branches)
    return {"spent_s": time.process_time() - start, "plans": space.size, "rows": computed}


def bound_closely() -> Numbers:
    """The planner's look into a branch: a bound for each plan but for arbitration, which cannot lower it."""
    from moeplan.planners._bounds import Bounds
    from moeplan.planners._step import StepBounds

    space = mixtral_space()
    sample = space.branches[::SAMPLED]
    start = time.process_time()
    steps = StepBounds(Bounds(space.scenario))
    computed = sum(steps.branch_s(branch).size for branch in sample)
    return {"spent_s": time.process_time() - start, "plans": sum(branch.size for branch in sample), "rows": computed}


def bound_plans() -> Numbers:
    """The planner's look at one plan: its passes in the order of its schedule."""
    from moeplan.planners._bounds import Bounds
    from moeplan.planners._step import StepBounds

    space = mixtral_space()
    plans = [space.plan(branch, branch.size // 2) for branch in space.branches[::SAMPLED]]
    start = time.process_time()
    steps = StepBounds(Bounds(space.scenario))
    for plan in plans:
        steps.plan_s(plan)
    return {"spent_s": time.process_time() - start, "plans": len(plans), "rows": len(plans)}


def mixtral_space() -> Any:
    """Every plan of a scenario in which all is left to the planner."""
    import moeplan as mp
    from moeplan.planners._space import Space

    return Space(mp.load("mixtral-8x7b-64xh100"))


# ---- one step


def rows_of_step() -> list[Row]:
    """A step of DeepSeek-V3 at full depth, and how many of its tasks are simulated in a second."""
    found = median_of(run_step)
    size = f"{found['tasks']:,.0f} tasks, {found['lanes']:.0f} lanes"
    note = f"61 layers, 2,048 GPUs, pp16 ep64 dp128, 1F1B, 60 micro-batches: {size}"
    return [
        Row(what="DeepSeek-V3 step, compiled", value=found["compile_s"], unit="s"),
        Row(what="DeepSeek-V3 step, simulated", value=found["simulate_s"], unit="s"),
        Row(what="DeepSeek-V3 step, both", value=found["spent_s"], unit="s", target=1.0, peer=SIMUMAX, note=note),
        Row(what="events of the simulator", value=found["tasks"] / found["simulate_s"], unit="tasks/s"),
    ]


def run_step() -> Numbers:
    """Compiles and simulates the layout of the model's report, under 1F1B and half of its batch."""
    import moeplan as mp
    from moeplan.compiler.compile_plan import compile_plan
    from moeplan.cost.cost_model import CostModel
    from moeplan.simulator.simulate import simulate

    scenario = mp.load("deepseek-v3-2048xh800", {"workload.global_batch": 7680})
    choices = scenario.choices
    stages = (3, *(4,) * 13, 3, 3)
    assert sum(stages) == len(scenario.model.all_layers) == 61
    plan = mp.Plan(
        dp=128, pp=16, ep=64, stages=stages, schedule="one_f_one_b", capacity=choices.capacity,
        precision=choices.precision,
    )  # fmt: skip
    simulate(compile_plan(plan, scenario), CostModel(gpu=scenario.cluster.gpu))  # loads the compiled engine
    start = time.process_time()
    program = compile_plan(plan, scenario)
    compiled = time.process_time()
    simulate(program, CostModel(gpu=scenario.cluster.gpu))
    end = time.process_time()
    return {
        "spent_s": end - start, "compile_s": compiled - start, "simulate_s": end - compiled,
        "tasks": len(program.tasks), "lanes": len(program.lanes),
    }  # fmt: skip


# ---- the command


def rows_of_help() -> list[Row]:
    """What everyone waits for who only asks what there is."""
    found = median_of(show_help)
    return [
        Row(what="moeplan --help", value=found["cpu_s"], unit="s", target=0.5),
        Row(what="moeplan --help, wall", value=found["spent_s"], unit="s wall", target=0.5),
    ]


def show_help() -> Numbers:
    """The command's answer to `--help`."""
    return command("--help")[0]


def rows_of_plan(scenario: str, *, target_s: float) -> list[Row]:
    """A whole plan as users ask for it, with what it is worth: a fast planner that proves nothing were no feat."""
    print(f"planning {scenario}", file=sys.stderr)
    found, text = command("plan", scenario, "--json")
    what, memory = f"moeplan plan {scenario}", f"peak memory, {scenario}"
    if not text:
        late = Row(what=what, value=None, unit="s", target=target_s, note=f"stopped after {LIMIT_S:.0f} s")
        return [late, Row(what=memory, value=None, unit="GiB", target=1.0)]
    return [
        Row(what=what, value=found["cpu_s"], unit="s", target=target_s, note=certificate(json.loads(text))),
        Row(what=memory, value=found["memory_bytes"] / 2**30, unit="GiB", target=1.0),
    ]


def certificate(result: dict[str, Any]) -> str:
    """How much of the space a plan speaks for."""
    counts = result["evaluated"]
    return f"gap {100 * result['gap']:.2g} % over {counts['legal']:,} plans, {counts['simulated']:,} simulated"


def command(*words: str) -> tuple[Numbers, str]:
    """CPU, wall and memory of one run of the command, and what it printed; nothing if it was stopped at the limit.

    This process must stay small: Linux counts the memory of a parent at the time of the call as a child's own.
    """
    package = find_spec("moeplan")
    if package is None or package.origin is None:
        raise RuntimeError("moeplan is not installed here; run `python -m pip install .` first")
    paths = [str(Path(package.origin).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as out, ExitStack() as after:
        start = time.monotonic()
        arguments = [sys.executable, "-P", "-m", "moeplan", *words]
        process = subprocess.Popen(arguments, stdout=out, stdin=subprocess.DEVNULL, env=environment)
        clock = threading.Timer(LIMIT_S, process.kill)
        after.callback(clock.cancel)
        clock.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        spent_s = time.monotonic() - start
        if process.returncode and spent_s < LIMIT_S:
            raise RuntimeError(f"moeplan {' '.join(words)}: status {process.returncode}; its message stands above")
        out.seek(0)
        text = out.read() if process.returncode == 0 else ""
    kilo = 1 if sys.platform == "darwin" else 1024
    cpu_s = used.ru_utime + used.ru_stime
    return {"spent_s": spent_s, "cpu_s": cpu_s, "memory_bytes": float(used.ru_maxrss * kilo)}, text


# ---- measuring


def median_of(measure: Callable[[], Numbers]) -> Numbers:
    """The measurement with the median of `spent_s`, each in a process of its own; a long one is taken as it is."""
    print(f"measuring {measure.__name__.replace('_', ' ')}", file=sys.stderr)
    found = [in_fresh_process(measure)]
    while found[0]["spent_s"] < SHORT_S and len(found) < 3:
        found.append(in_fresh_process(measure))
    middle = statistics.median_low(each["spent_s"] for each in found)
    return next(each for each in found if each["spent_s"] == middle)


def in_fresh_process(measure: Callable[[], Numbers]) -> Numbers:
    """What `measure` returns where nothing was imported or remembered before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


def per_s(found: Numbers, what: str) -> float:
    """A rate."""
    return found[what] / found["spent_s"]


# ---- printing


def as_table(found: list[Row]) -> str:
    """Columns for people; what was measured stands below each line."""
    head = ("", "measured", "target", "met", "peer")
    cells = [head, *((row.what, amount(row), goal(row), verdict(row), row.peer) for row in found)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    sides = [f"{side}{width}" for side, width in zip("<>>><", widths, strict=True)]
    aligned = ["  ".join(map(format, line, sides)).rstrip() for line in cells]
    lines = aligned[:1]
    for row, line in zip(found, aligned[1:], strict=True):
        lines += [line, *([f"    {row.note}"] if row.note else [])]
    return "\n".join([machine(), "", *lines])


def amount(row: Row) -> str:
    """A value with its unit."""
    return "not done" if row.value is None else f"{number(row.value)} {row.unit}"


def number(value: float) -> str:
    """Three digits, or thousands."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goal(row: Row) -> str:
    """The target in words."""
    return "" if row.target is None else f"{'at least' if row.more_is_better else 'at most'} {number(row.target)}"


def verdict(row: Row) -> str:
    """yes, NO or nothing."""
    return {None: "", True: "yes", False: "NO"}[row.is_met]


def as_json(found: list[Row]) -> str:
    """The same, for programs."""
    lines = [asdict(row) | {"is_met": row.is_met} for row in found]
    return json.dumps({"schema": "moeplan.speed/v1", "machine": machine(), "rows": lines}, indent=2)


def machine() -> str:
    """On what, and with what."""
    return f"{os.cpu_count()} cores of {cpu_name()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def cpu_name() -> str:
    """As the system calls its processor."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    sys.exit(main())
