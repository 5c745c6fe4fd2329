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
    hush()
    make: Any = highspy.Highs
    solver = make()
    for name, option in ({"output_flag": False, "threads": 1} | options).items():
        solver.setOptionValue(name, option)
    return solver


@cache
def hush() -> None:
    """Makes the first solver of the process, its output thrown away; needed once before PuLP makes one."""
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
