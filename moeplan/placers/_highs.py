"""HiGHS with settings of ours, and without its greeting.

highspy 1.16 greets on standard output when a process makes its first solver, before it can be told not to. That would
stand before the one document that `--json` promises; so the first solver is made where nobody listens.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import highspy


def solver_of(**options: bool | int | float | str) -> Any:
    """A new solver, silent and of one thread, with these options; `Any` since highspy's class has no types."""
    ready()
    make: Any = highspy.Highs
    solver = make()
    for name, option in ({"output_flag": False, "threads": 1} | options).items():
        solver.setOptionValue(name, option)
    return solver


def ready() -> None:
    """Has HiGHS accept any number of threads, and greet nobody; needed before each solver that PuLP makes.

    One process has one scheduler, and a solver that asks for another number of threads than it was made with fails.
    """
    _hush()
    scheduler: Any = highspy.Highs
    scheduler.resetGlobalScheduler(True)


@cache
def _hush() -> None:
    """Makes the first solver of the process, its output thrown away."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # standard output is closed
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        make: Any = highspy.Highs
        make()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
