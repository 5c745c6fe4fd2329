"""What a person reads: plans, figures and tables on a terminal, and the same as plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moeplan.domain.plan import Plan
from moeplan.domain.result import Evaluated, Figures, PlanResult, RunnerUp, StageMemory
from moeplan.domain.scenario import Scenario
from moeplan.grid import Row, in_short
from moeplan.units import show

_BAR_CELLS = 30
_WIDE = 10_000
"""Columns where nobody looks: lines are not broken, so that other programs find what they look for."""


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """The reader went away; rich would end the process with status 1, and the command knows better."""
        raise BrokenPipeError


class Screen:
    """Standard output, on which tables have rules and colours only where a person looks at it."""

    def __init__(self) -> None:
        self.console = _Output(markup=False, highlight=False, emoji=False, soft_wrap=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console = _Output(markup=False, highlight=False, emoji=False, width=_WIDE)

    def line(self, text: str = "", *, style: str = "") -> None:
        """A line of text."""
        self.console.print(text, style=style if self.console.is_terminal else "", soft_wrap=True)

    def table(
        self,
        heads: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        title: str = "",
        right: str = "",
        whole: Container[int] = (),
    ) -> None:
        """A table; `right` has an r for each column whose cells stand to the right. A `whole` column is not folded."""
        if title:
            self.line()
            self.line(title, style="bold")
        pretty = self.console.is_terminal
        table = Table(
            box=box.SIMPLE_HEAD if pretty and any(heads) else None, header_style="dim" if pretty else "", pad_edge=False
        )
        table.show_header = any(heads)
        for place, head in enumerate(heads):
            side: Any = "right" if right[place : place + 1] == "r" else "left"
            table.add_column(head, justify=side, overflow="fold", no_wrap=place in whole)
        for row in rows:
            table.add_row(*(_one_line(cell) for cell in row))
        if pretty:
            self.console.print(table)
            return
        with self.console.capture() as text:
            self.console.print(table)
        for line in text.get().splitlines():
            self.line(line.rstrip())

    def bar(self, share: float) -> str:
        """A bar as long as a share of the whole."""
        block = "\u2588" if self.console.encoding.startswith("utf") else "#"
        return block * round(share * _BAR_CELLS)


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def print_json(document: object) -> None:
    """One JSON document on standard output."""
    text = json.dumps(document, indent=2, allow_nan=False)
    sys.stdout.write(_NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text))
    sys.stdout.write("\n")


_NUMBERS = re.compile(r"\[\n[-+.\deE,\s]*\]")
"""A list of numbers: one line, as a placement is thousands of them."""


def print_result(result: PlanResult, scenario: Scenario) -> None:
    """A plan in words, what it costs and why, how far from the best it can be, and what it beat."""
    screen = Screen()
    _head(screen, scenario)
    screen.table(("", ""), plan_in_words(result.plan, scenario), title="Plan")
    screen.table(("", ""), [*_speed(result), ("certificate", certificate(result))], title="Step")
    _why(screen, result)
    _evaluated(screen, result.evaluated)
    _runners_up(screen, result.runners_up[:5])


def print_figures(figures: Figures, plan: Plan, scenario: Scenario) -> None:
    """What one simulated step costs and why."""
    screen = Screen()
    _head(screen, scenario)
    screen.table(("", ""), plan_in_words(plan, scenario), title="Plan")
    screen.table(("", ""), _speed(figures), title="Step")
    _why(screen, figures)


def _head(screen: Screen, scenario: Scenario) -> None:
    screen.line(scenario.name, style="bold cyan")
    if about := scenario.document.get("about"):
        screen.line(_one_line(str(about)))


def plan_in_words(plan: Plan, scenario: Scenario) -> list[tuple[str, str]]:
    """What is decided, by what it is about."""
    count = plan.num_microbatches(scenario.workload.global_batch)
    gradients = "beside the passes" if plan.overlap_gradients else "after the passes"
    rows = [
        ("in short", in_short(plan)),
        ("layout", f"{plan.world_size:,} GPUs = pp {plan.pp} x dp {plan.dp} x cp {plan.cp} x tp {plan.tp}"),
        ("experts", f"ep {plan.ep} x etp {plan.etp}, each held {_times(plan.edp)}{_placed(plan)}")
        if scenario.model.moe_layers
        else None,
        ("rank order", f"{plan.rank_order}, the nearest first"),
        ("stages", f"{_runs(plan.stages)} layers"),
        ("schedule", f"{plan.schedule}, {_micro_batches(count)} of {plan.micro_batch} for each replica"),
        ("ZeRO", f"dense {plan.zero_dense}, experts {plan.zero_expert}; gradients {gradients}"),
        ("recompute", plan.recompute),
        ("all-to-all", f"{plan.all_to_all}, {_parts(plan.overlap_degree)}") if plan.ep > 1 else None,
        ("links", f"{plan.arbitration} between concurrent exchanges"),
        ("precision", f"products {plan.precision.compute}, weights {plan.precision.weights}"),
    ]
    training = scenario.workload.is_training
    return [row for row in rows if row is not None and (training or row[0] not in ("ZeRO", "recompute"))]


def _placed(plan: Plan) -> str:
    return "" if plan.placement is None else f", placed in {plan.placement.num_slots:,} slots"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count:,} times"


def _micro_batches(count: int) -> str:
    return f"{count:,} micro-batch" + ("" if count == 1 else "es")


def _parts(degree: int) -> str:
    return "not overlapped with experts" if degree == 1 else f"each layer's tokens in {degree} parts that overlap"


def _runs(stages: Sequence[int]) -> str:
    """`7 x 8 + 5`: equal neighbours as one."""
    runs = [(size, len(list(equal))) for size, equal in groupby(stages)]
    return " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)


def _speed(figures: Figures | PlanResult) -> list[tuple[str, str]]:
    return [
        ("step", step_in_words(figures)),
        ("throughput", f"{_count(figures.tokens_per_s_per_gpu)} tokens/s on each GPU"),
        ("MFU", f"{100 * figures.mfu:.1f} %"),
        ("peak memory", show(figures.peak_memory_bytes, "B")),
    ]


def step_in_words(figures: Figures | PlanResult) -> str:
    """`10.4 s (9.8 s .. 11.2 s, tier: interpolated)`: with the interval in which such a step really lies."""
    if figures.step_interval_s is None:
        return show(figures.step_s, "s")
    low, high = (show(end, "s") for end in figures.step_interval_s)
    return f"{show(figures.step_s, 's')} ({low} .. {high}, tier: {figures.tier})"


def _count(number: float) -> str:
    """Four figures, thousands apart."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def certificate(result: PlanResult) -> str:
    """`proven best of 12,345 legal plans`, or how far from the best the plan can be, and why no more is known."""
    legal = f"{result.evaluated.legal:,} legal plan" + ("s" if result.evaluated.legal != 1 else "")
    legal += ", wherever experts stand" if result.plan.placement is not None else ""
    if result.gap <= 1e-9:
        return f"proven best of {legal}"
    rest = f"; {result.evaluated.unresolved:,} were left open" if result.evaluated.unresolved else ""
    return f"within {at_most(result.gap)} of the best possible, of {legal}{rest}"


def at_most(share: float) -> str:
    """A share as per cent with two figures, rounded up: a certificate must not promise more than is proven."""
    if share <= 0:
        return "0 %"
    step = 10.0 ** (math.floor(math.log10(100 * share)) - 1)
    return f"{math.ceil(100 * share / step - 1e-9) * step:.10g} %"


def _why(screen: Screen, figures: Figures | PlanResult) -> None:
    causes = sorted(figures.breakdown_s.items(), key=lambda cause: -cause[1])
    shares = [
        (name, seconds, seconds / figures.step_s if figures.step_s else 0.0) for name, seconds in causes if seconds
    ]
    rows = [
        (
            name.replace("_", " ").replace("all to all", "all-to-all"),
            show(seconds, "s"),
            f"{100 * share:.1f} %",
            screen.bar(share),
        )
        for name, seconds, share in shares
    ]
    screen.table(("busiest GPU", "time", "of the step", ""), rows, title="Where the step goes", right="lrrl")
    _memory(screen, figures.memory)


def _memory(screen: Screen, memory: Sequence[StageMemory]) -> None:
    """Parts that are nothing everywhere are left out."""
    parts = [name for name in StageMemory.model_fields if name not in ("stage", "total", "usable")]
    parts = [name for name in parts if any(getattr(stage, name) for stage in memory)]
    heads = ("stage", *parts, "total", "usable", "of usable")
    rows = [
        (
            str(stage.stage),
            *(show(getattr(stage, name), "B") for name in (*parts, "total", "usable")),
            f"{100 * stage.total / stage.usable:.1f} %" + (", does not fit" if stage.total > stage.usable else ""),
        )
        for stage in memory
    ]
    screen.table(heads, rows, title="Peak memory of a GPU", right="r" * len(heads))


def _evaluated(screen: Screen, counts: Evaluated) -> None:
    words = {
        "legal plans": counts.legal,
        "do not fit in memory": counts.infeasible_by_memory,
        "ruled out by their lower bound": counts.bounded_out,
        "simulated": counts.simulated,
        "left open": counts.unresolved,
    }
    screen.table(("", ""), [(name, f"{count:,}") for name, count in words.items()], title="Plans", right="lr")


def _runners_up(screen: Screen, others: Sequence[RunnerUp]) -> None:
    rows = [
        (in_short(other.plan), "" if other.step_s is None else show(other.step_s, "s"), other.reason)
        for other in others
    ]
    if rows:
        screen.table(("plan", "step", "why it lost"), rows, title="Runners-up", right="lrl")


def print_rows(base: Row, rows: Sequence[Row]) -> None:
    """A line for the base and for each changed scenario: plan, step, gap and change, or why there is none."""
    screen = Screen()
    keys = list(rows[0].changes) if rows else []
    heads = (*keys, "plan", "step", "gap", "change")
    lines = [_line(base, ["base"] + [""] * (len(keys) - 1), is_base=True)]
    lines += [_line(row, [_value(row.changes[key]) for key in keys]) for row in rows]
    screen.table(heads, lines, right="l" * (len(keys) + 1) + "rrr")


def _line(row: Row, first: list[str], *, is_base: bool = False) -> list[str]:
    if row.error is not None or row.plan is None:
        return [*first, (row.error or "").partition("\n")[0], "", "", ""]
    gap = "" if row.gap is None else "best" if row.gap <= 1e-9 else at_most(row.gap)
    change = "" if is_base or row.step_change is None else f"{100 * row.step_change:+.1f} %"
    return [*first, in_short(row.plan), show(row.step_s or 0.0, "s"), gap, change]


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def print_thing(thing: Mapping[str, Any]) -> None:
    """A thing of the catalogue: every field with its path, a figure with its source and note."""
    screen = Screen()
    screen.table(("", "", ""), _fields({key: value for key, value in thing.items() if key != "sources"}), whole=(0,))


def _fields(value: object, path: str = "") -> list[tuple[str, str, str]]:
    if isinstance(value, Mapping) and "value" in value:
        return [
            (path, _text(value["value"]), "; ".join(str(value[key]) for key in ("source", "note") if value.get(key)))
        ]
    if isinstance(value, Mapping) and value:
        return [row for key, inner in value.items() for row in _fields(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        return [row for number, inner in enumerate(value) for row in _fields(inner, f"{path}.{number}")]
    return [(path, _text(value), "")]


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
