"""Compiled functions: numba with the settings that hot loops need, and a clock that leaves out the compiling.

What is compiled is kept on disk, beside the source or in the user's cache; where neither can be written, it is compiled
anew in each process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

import numba
from numba.core.event import Event, Listener, register

njit: Any = numba.njit
"""Of any type, since some of the options used here are not among numba's declared ones."""
_Function = TypeVar("_Function", bound=Callable[..., Any])
_CALLED = {"simulator": ("network",)}
"""Whose compiled functions those of a folder call."""
_INNER = {"error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class _Compiling(Listener):
    """Seconds in which functions were compiled or loaded. One compiles those that it calls, so starts are counted."""

    def __init__(self) -> None:
        self.depth, self.since_s, self.total_s = 0, 0.0, 0.0

    def on_start(self, event: Event) -> None:
        """The outermost start counts."""
        if self.depth == 0:
            self.since_s = perf_counter()
        self.depth += 1

    def on_end(self, event: Event) -> None:
        """As does the outermost end."""
        self.depth -= 1
        if self.depth == 0:
            self.total_s += perf_counter() - self.since_s


_compiling = _Compiling()
register("numba:compiler_lock", _compiling)  # type: ignore[no-untyped-call]


def clock_s() -> float:
    """Seconds that pass, but for those in which functions are compiled: what a limit of time is measured by.

    Else the first call in a process, or the first after a change, would spend its limit on the compiler.
    """
    return perf_counter() - _compiling.total_s


def compiled(function: _Function) -> _Function:
    """The function as machine code. Division by zero gives infinity, as in numpy."""
    return _njit(function)


def compiled_in_place(function: _Function) -> _Function:
    """The same for an inner function, which only compiled ones call, and which makes no arrays.

    The arrays that it is given are not counted in and out at each call. Counting is atomic and costs 10 ns for each
    array, which was nine tenths of the time of small functions of many arrays.
    """
    return cast(_Function, njit(function, **_INNER))


def inlined(function: _Function) -> _Function:
    """The same, compiled into those that call it: a call takes an array as seven numbers, and a net has many."""
    return cast(_Function, njit(function, forceinline=True, **_INNER))


def _njit(function: _Function) -> _Function:
    try:
        made: Any = njit(function, cache=True, error_model="numpy")
    except RuntimeError:  # numba: "no locator available", that is, nowhere to write
        return cast(_Function, njit(function, error_model="numpy"))
    # numba looks at the function's own file only, but machine code has the functions of other files inside.
    with suppress(AttributeError):
        made._cache._cache_file._source_stamp = _stamp(function.__module__.split(".")[1])
    return cast(_Function, made)


@cache
def _stamp(folder: str) -> tuple[int, int]:
    """Changes when a file of the folder does, or one of those whose functions the folder's call."""
    folders = {folder, *_CALLED.get(folder, ())}
    files = [path.stat() for each in folders for path in (Path(__file__).parent / each).glob("*.py")]
    return max(file.st_mtime_ns for file in files), sum(file.st_size for file in files)
