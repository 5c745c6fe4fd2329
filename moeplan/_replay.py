"""What `moeplan place --routing-trace` does: placement over time, each policy against an oracle.

What it needs is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.replaying import Replay


def check_flags(is_replay: bool, *, with_trace: Mapping[str, object], without: Mapping[str, object]) -> None:
    """Raises MoeplanError for a flag that was given and has no effect, with a routing trace or without one."""
    for flag, value in (without if is_replay else with_trace).items():
        if value is not None:
            remedy = "remove it, or the trace" if is_replay else "give a recorded trace, or remove it"
            where = "with" if is_replay else "without"
            raise MoeplanError(f"{flag}: has no effect {where} --routing-trace; {remedy}")


def run_replay(trace: Path, *, plot: Path | None, as_json: bool, **given: Any) -> None:
    """Replays the trace and prints the table or the document; draws the picture where one is asked for."""
    from moeplan._waiting import waiting
    from moeplan.replaying import replay

    if plot is not None:
        from moeplan.exporters import suffix_of
        from moeplan.exporters._figure import SUFFIXES

        suffix_of(plot, SUFFIXES)
    with waiting("replaying") as progress:
        found = replay(trace, progress=progress, **{key: value for key, value in given.items() if value is not None})
    if plot is not None:
        from moeplan.exporters._replay_picture import draw_replay

        draw_replay({each.policy: each.ratio_TL for each in found.policies}, plot)
    if as_json:
        from moeplan._screen import print_json

        print_json(found.document())
    else:
        _print(found)


def _print(found: Replay) -> None:
    from moeplan._screen import Screen
    from moeplan.units import show

    screen, timed = Screen(), found.unit == "s"
    screen.line(
        f"{found.slots} replicas on {found.num_gpus} GPUs by {found.placer}, split {found.split}: {found.num_steps} "
        f"steps of {len(found.numbers)} layers, the first not scored",
        style="bold cyan",
    )
    heads = ("policy", "over mean", "95th of 100", "placed anew", "moves", *(("moving", "total") if timed else ()))
    rows = []
    for each in (policy.record() for policy in found.policies):
        times = (show(each["migration_s"], "s"), show(each["total"], "s")) if timed else ()
        words = " ".join(f"{key}={value}" for key, value in each["options"].items())
        rows.append((
            f"{each['policy']} {words}".strip(), f"{each['mean_ratio']:.4f}", f"{each['p95_ratio']:.4f}",
            f"{each['replacements']:,}", f"{each['moves']:,}", *times, f"{100 * each['regret']:.2f} %",
        ))  # fmt: skip
    screen.table((*heads, "regret"), rows, right="l" + "r" * len(heads))
    screen.line()
    best = found.policies[0]
    screen.line(
        f"Best: {best.policy}. Regret is against an oracle that knows each step beforehand and moves experts for free"
        + (": at least " + show(best.oracle, "s") + "." if timed else "; moves are counted, not charged.")
    )
