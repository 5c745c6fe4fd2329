"""Everything that moeplan raises on purpose.

    MoeplanError
    ├── CatalogueError      a file or a field of a scenario is wrong
    ├── PlanError           a plan is not legal, or does not belong to its scenario
    │   └── InfeasibleError no legal plan exists; says which constraint binds
    ├── SimulationError     a program cannot be run in virtual time
    └── ExecutionError      a program cannot be run on the devices at hand

A message has four words: where, found, allowed, remedy.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class MoeplanError(Exception):
    """The base of every error a user can cause."""


class CatalogueError(MoeplanError):
    """A file or a field of a scenario is wrong."""


class PlanError(MoeplanError):
    """A plan is not legal, or does not belong to its scenario."""


class InfeasibleError(PlanError):
    """No legal plan exists; the message names the constraint that binds and the smallest change that helps."""


class SimulationError(MoeplanError):
    """A program cannot be run in virtual time."""


class ExecutionError(MoeplanError):
    """A program cannot be run on the devices at hand."""


def unknown_name(kind: str, found: str, allowed: Iterable[str]) -> str:
    """The sentence for a name that is not on a menu: `unknown KIND 'found'; did you mean 'x'? (a, b also exist)`."""
    names = sorted(allowed)
    longer = [name for name in names if found and name.lower().startswith(found.lower())]
    close = (longer or get_close_matches(found, names, n=1))[:1]
    others = [name for name in names if name not in close]
    shown = ", ".join([*others[:12], *["..."][: len(others[12:])]])
    if not names:
        return f"unknown {kind} {found!r}; there is none, so remove it"
    if not close:
        return f"unknown {kind} {found!r}; use one of: {shown}"
    return f"unknown {kind} {found!r}; did you mean {close[0]!r}?" + (f" ({shown} also exist)" if others else "")
