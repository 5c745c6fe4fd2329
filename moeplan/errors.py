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
    close = get_close_matches(found, names, n=1)
    shown = ", ".join(name for name in names[:12] if name not in close)
    also = (
        f"({shown}{', ...' if len(names) > 12 else ''} also exist)" if close else f"use one of: {shown or 'none exist'}"
    )
    return f"unknown {kind} {found!r}; " + (f"did you mean {close[0]!r}? {also}" if close else also)
