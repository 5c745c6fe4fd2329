"""CBC, as a program that can be stopped: a second opinion of what HiGHS finds, never a proof.

It overruns its own limits of time, and reports of wrong optima are open. So nothing is asked of it but values, and who
gets them values them anew.
Reference: coin-or/Cbc, issues 487 (limits of time), 599 and 668 (answers that are wrong).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pulp

_GRACE_S = 2.0
"""What CBC gets beyond its limit before it is stopped."""


def cbc_path() -> str | None:
    """Where CBC is: on the path, or beside PuLP, which has it up to 3.x; None where it is missing."""
    bundled = getattr(pulp.apis.PULP_CBC_CMD, "pulp_cbc_path", None)
    return shutil.which("cbc") or (bundled if bundled and Path(bundled).exists() else None)


def values_of(write: Callable[[str], object], *, gap: float, time_limit_s: float | None) -> dict[str, float] | None:
    """Values of variables by name, of the model that `write` puts into an MPS file; those left out are 0.

    None where CBC is missing, had to be stopped, or says that there is no solution.
    """
    program = cbc_path()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "model.mps"), Path(folder, "model.sol")
        write(str(task))
        limits = [] if time_limit_s is None else ["sec", str(time_limit_s)]
        try:
            subprocess.run(
                [program, str(task), *limits, "ratio", str(gap), "threads", "1", "branch", "solu", str(result)],
                timeout=None if time_limit_s is None else time_limit_s + _GRACE_S, capture_output=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        status, *lines = result.read_text(encoding="utf-8").splitlines() if result.exists() else [""]
    # A row is "number name value price"; where a value breaks a limit, "**" stands before it.
    is_found = status.startswith(("Optimal", "Stopped")) and bool(lines)
    return {line.split()[-3]: float(line.split()[-2]) for line in lines} if is_found else None


def solve_programme(programme: pulp.LpProblem, *, gap: float, time_limit_s: float | None) -> bool:
    """Sets the values of PuLP's variables; whether CBC found any."""
    found = values_of(
        lambda path: programme.writeMPS(path, rename=False), gap=gap, time_limit_s=time_limit_s
    )  # fmt: skip
    for variable in programme.variables():
        variable.varValue = None if found is None else found.get(variable.name, 0.0)
    return found is not None
