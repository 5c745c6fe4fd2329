"""The sub-command `moeplan explain`: why this plan, why not the runner-up, what would help most.

What it needs is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan._flags import Gap, Json, PlanFile, Planner, ScenarioName, Settings, TimeLimit, refuse_choices, scenario_of
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan._screen import Screen
    from moeplan.explaining import Explanation, MemoryLimit, Rival, Sensitivity, Shift

_SHOWN_KINDS = 3


def explain(
    scenario: ScenarioName = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    replan: Annotated[
        bool, typer.Option("--replan", help="Plan each change anew as well; also more memory, more nodes.")
    ] = False,
    planner: Planner = "ours",
    time_limit: TimeLimit = None,
    gap: Gap = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what would help: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Explain a plan: what decides the step, what would help most, why the runner-up lost, how firm the choice is."""
    from moeplan._waiting import waiting
    from moeplan.explaining import explain as run
    from moeplan.explaining import held_plan

    _check_plot(plot)
    origin = scenario or (None if plan_file is None else str(plan_file))
    problem = scenario_of(origin, settings, {})
    held = plan_file or (None if scenario is None else held_plan(scenario))
    if held is not None:
        refuse_choices(settings or [])
    with waiting(f"explaining {problem.name}") as progress:
        found = run(
            problem, held, replan=replan, planner=planner, time_limit_s=time_limit, gap=gap, progress=progress
        )  # fmt: skip
    if plot is not None:
        _draw(found, plot)
    if as_json:
        from moeplan._screen import print_json

        print_json(found.document())
    else:
        _print(found)


def _check_plot(path: Path | None) -> None:
    """What cannot be written is found before the work and not after it."""
    from moeplan.exporters import suffix_of
    from moeplan.exporters._figure import SUFFIXES

    if path is not None:
        suffix_of(path, SUFFIXES)
        if not path.parent.is_dir():
            raise MoeplanError(f"{path}: there is no folder {path.parent}; make it, or use another path")


def _draw(found: Explanation, path: Path) -> None:
    from moeplan.exporters._change_picture import Change, draw_changes
    from moeplan.units import show

    rows = [
        Change(f"{each.knob.name} {each.knob.change}", each.step_change, each.anew(found.step_s))
        for each in found.helps
    ]
    draw_changes(rows, path, title=f"{found.scenario.name}: what would change a step of {show(found.step_s, 's')}")


def _print(found: Explanation) -> None:
    from moeplan._screen import Screen, at_most
    from moeplan.grid import in_short
    from moeplan.units import show

    screen = Screen()
    screen.line(found.scenario.name, style="bold cyan")
    bound_s = found.lower_bound_s
    gap = found.step_s / bound_s - 1 if bound_s else None
    proof = "" if gap is None else ", proven best" if gap <= 1e-9 else f", within {at_most(gap)} of the best possible"
    screen.line(f"{in_short(found.plan)}: {show(found.step_s, 's')}{proof}")
    _print_path(screen, found)
    _print_helps(screen, found)
    _print_memory(screen, found.memory, found.step_s)
    _print_runner_up(screen, found)
    _print_stability(screen, found)


def _print_path(screen: Screen, found: Explanation) -> None:
    from moeplan.cost.critical import by_resource
    from moeplan.units import show

    rows = []
    for resource, seconds in by_resource(found.path).items():
        parts = [part for part in found.path if part.resource == resource]
        kinds = ", ".join(f"{part.kind} {show(part.seconds, 's')}" for part in parts[:_SHOWN_KINDS])
        more = f", {len(parts) - _SHOWN_KINDS} more" if len(parts) > _SHOWN_KINDS else ""
        share = seconds / found.step_s
        rows.append((resource, show(seconds, "s"), f"{100 * share:.1f} %", screen.bar(share), kinds + more))
    heads = ("held up by", "time", "of the step", "", "in tasks of kind")
    screen.table(heads, rows, title="What decides the step: its critical path", right="lrrll")
    screen.line(f"Bound by {found.bound_by}.")


def _print_helps(screen: Screen, found: Explanation) -> None:
    is_replanned = any(each.replanned is not None for each in found.helps)
    heads = ("change", "plan kept", *(("planned anew", "gap") if is_replanned else ()))
    rows = [_help_row(each, found.step_s, is_replanned) for each in found.helps]
    screen.table(heads, rows, title="What would help: change of the step", right="lrrr")


def _help_row(each: Sensitivity, step_s: float, is_replanned: bool) -> tuple[str, ...]:
    from moeplan._screen import at_most

    first = (f"{each.knob.name} {each.knob.change}", _percent(each.step_change))
    if not is_replanned or each.replanned is None:
        return first
    gap = each.replanned.gap
    proof = (each.replanned.error or "").partition("\n")[0] if gap is None else "best" if gap <= 1e-9 else at_most(gap)
    return *first, _percent(each.anew(step_s)), proof


def _percent(share: float | None) -> str:
    if share is None or abs(share) < 1e-9:
        return "" if share is None else "none"
    return f"{100 * share:+.2f} %" if abs(share) >= 1e-4 else f"{100 * share:+.1g} %"


def _print_memory(screen: Screen, memory: MemoryLimit, step_s: float) -> None:
    from moeplan.grid import in_short
    from moeplan.units import show

    full, other = memory.fullest, memory.too_big
    parts = {name: getattr(full, name) for name in type(full).model_fields if name not in ("stage", "total", "usable")}
    most = max(parts, key=lambda name: float(parts[name]))
    screen.line()
    screen.line("Memory", style="bold")
    share = f"{100 * full.total / full.usable:.1f} % of what is usable"
    screen.line(f"The fullest GPU, of stage {full.stage}, holds {show(full.total, 'B')}, {share}; "
                f"most of it is {most}, {show(parts[most], 'B')}.")  # fmt: skip
    if other is not None and memory.too_big_bytes is not None:
        needs = f"needs {memory.too_big_bytes / full.usable:.2f} times the usable memory"
        screen.line(f"{in_short(other.plan)} {needs} and would take {show(other.step_s, 's')}, "
                    f"{_percent(other.step_s / step_s - 1)}.")  # fmt: skip
    verdicts = {
        True: "Memory binds: with more of it there is a faster plan.",
        False: "Memory does not bind: every plan that might be faster fits.",
        None: "Whether memory binds is not known: no faster plan that does not fit is known, but not all were tried.",
    }
    screen.line(verdicts[memory.binds])


def _print_runner_up(screen: Screen, found: Explanation) -> None:
    from moeplan.grid import in_short

    other = found.runner_up
    screen.line()
    screen.line("The runner-up", style="bold")
    if found.twins:
        words = "plan is" if found.twins == 1 else "plans are"
        screen.line(f"{found.twins} other {words} as fast for the same causes, and left out here.")
    screen.line(f"{in_short(other.plan)}: {found.why_it_lost}." if other else f"{found.why_it_lost.capitalize()}.")
    if other is not None:
        heads = ("cause", "plan", "runner-up", "difference")
        rows = _cause_rows(found.causes_s, other)
        screen.table(heads, rows, right="lrrr")


def _cause_rows(ours_s: Mapping[str, float], other: Rival) -> list[tuple[str, ...]]:
    from moeplan.explaining import in_words
    from moeplan.units import show

    pairs = [(cause, ours_s[cause], theirs) for cause, theirs in other.causes_s.items() if ours_s[cause] or theirs]
    pairs.sort(key=lambda each: -max(each[1:]))
    pairs.append(("step", sum(ours_s.values()), other.step_s))
    return [
        (in_words(cause), show(ours, "s"), show(theirs, "s"),
         show(theirs - ours, "s") if abs(theirs - ours) > 1e-9 * other.step_s else "")
        for cause, ours, theirs in pairs
    ]  # fmt: skip


def _print_stability(screen: Screen, found: Explanation) -> None:
    from moeplan._screen import at_most

    screen.line()
    screen.line("How firm the choice is", style="bold")
    beaten = [each for each in found.stability if each.is_beaten]
    names = {each.knob.name for each in found.stability}
    if found.runner_up is not None and found.runner_up.step_s < found.step_s * (1 - 1e-9):
        screen.line("The runner-up is faster as things are; this plan is not the choice.")
    elif not beaten:
        screen.line(f"Its best rivals stay behind with each of {len(names)} calibrated constants 10 % lower or higher.")
    if not beaten:
        closest = min(found.stability, key=lambda each: float("inf") if each.lead is None else each.lead, default=None)
        if closest is not None and closest.lead is not None:
            lead = "as fast" if closest.lead < 1e-9 else f"slower by {at_most(closest.lead)}"
            screen.line(f"Closest: with {closest.knob.name} {closest.knob.change} a rival is {lead}.")
        return
    held = len(found.stability) - len(beaten)
    screen.line(
        f"Of {len(found.stability)} changes of {len(names)} calibrated constants {held} leave it, these do not:"
    )
    rows = [_shift_row(each) for each in beaten]
    screen.table(("constant", "change", "plan", "best rival", "which is"), rows, right="lrrrl")


def _shift_row(each: Shift) -> tuple[str, ...]:
    from moeplan.grid import in_short
    from moeplan.units import show

    steps = ("does not fit" if each.step_s is None else show(each.step_s, "s"),
             "none fits" if each.rival_step_s is None else show(each.rival_step_s, "s"))  # fmt: skip
    return each.knob.name, each.knob.change, *steps, "" if each.rival is None else in_short(each.rival)
