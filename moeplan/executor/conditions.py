"""What a rank's process runs under: how it asks for memory and for its turn, and what others took from it meanwhile.

Buffers of exchanges and activations come and go: given back to the kernel they would be faulted in anew each time. A
turn on the processor is asked for by the group of the process's own session, since within a session alone niceness
counts. Threads that exchange come first: they need little, and one that waits for the next tick of the clock behind a
rank that computes keeps all ranks waiting for milliseconds. What cannot be had is left, and told.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
_LARGEST = 2**30
"""Blocks below are kept; glibc takes no threshold above half of its largest heap."""
_NICEST = -20
_PROC = Path("/proc")


MEANS = ("keeps_memory", "is_preferred", "exchanges_first")


def prepare() -> dict[str, bool]:
    """Has memory kept and the process preferred, where that may be done; what was. The calling thread, and those that
    it makes until it calls `compute`, come first.
    """
    return dict(zip(MEANS, (_keep_memory(), _prefer(), exchange()), strict=True))


def exchange() -> bool:
    """This thread is one that exchanges: whether it comes before those that compute."""
    _state.is_first = hasattr(os, "SCHED_RR") and _scheduled(os.SCHED_RR, 1)
    return _state.is_first


def compute() -> None:
    """This thread is one that computes."""
    if _state.is_first:
        _scheduled(os.SCHED_OTHER, 0)
        _state.is_first = False
        _state.may_be_first = True


@contextmanager
def exchanging() -> Iterator[None]:
    """A thread that computes has something to exchange: it comes first meanwhile, for gloo's own threads try again and
    again to get a lock that it holds, and would keep it from ever leaving that.
    """
    changes = _state.may_be_first and not _state.is_first
    if changes:
        exchange()
    try:
        yield
    finally:
        if changes:
            compute()


class _State(threading.local):
    """What a thread is."""

    is_first = False
    may_be_first = False


_state = _State()


def _scheduled(policy: int, priority: int) -> bool:
    try:
        os.sched_setscheduler(0, policy, os.sched_param(priority))
    except OSError:
        return False
    return True


def _keep_memory() -> bool:
    """Large blocks come from the heap, which is not given back."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(which, _LARGEST) for which in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return done == [1, 1]


def _prefer() -> bool:
    try:
        (_PROC / "self/autogroup").write_text(str(_NICEST))
    except OSError:
        return False
    return True


def resident_bytes(*, peak: bool = False) -> int:
    """Memory of this process, or the most that it was since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = (_PROC / "self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Gives back what is free, and has the peak start from the rest, where that can be done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds so far: of the clock, of this process's processors, of its threads' waiting for one; of all processors
    those of anybody, and those that the host of a virtual machine took.
    """

    wall_s: float
    process_s: float
    delay_s: float
    busy_s: float
    steal_s: float

    @staticmethod
    def now(ended_delay_s: float = 0.0) -> Reading:
        """`ended_delay_s`: what threads waited that are no more."""
        delay_s = ended_delay_s + thread_delay_s()
        return Reading(time.monotonic(), time.process_time(), delay_s, *_busy_and_steal_s())

    def since(self, before: Reading) -> tuple[float, ...]:
        """The differences, in the order of the fields."""
        return tuple(now - then for now, then in zip(astuple(self), astuple(before), strict=True))


def thread_delay_s() -> float:
    """Seconds for which this thread could have run and had no processor; 0 where the kernel does not tell."""
    try:
        words = (_PROC / f"self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(words[1]) / 1e9


TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
"""What the kernel tells of all processors is true to about this."""


def _busy_and_steal_s() -> tuple[float, float]:
    """Of all processors of the machine: user, nice and system; steal. 0 where the kernel does not tell."""
    try:
        with (_PROC / "stat").open() as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return 0.0, 0.0
    return sum(ticks[:3]) * TICK_S, ticks[7] * TICK_S
