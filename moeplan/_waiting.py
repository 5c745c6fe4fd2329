"""What a person sees on standard error while something takes more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Timer

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moeplan.api import Progress as Tell

_PATIENCE_S = 1.0
_LINE_EVERY_S = 10.0


@contextmanager
def waiting(what: str) -> Iterator[Tell]:
    """Gives what a planner calls with `message, done, total`; nothing is shown of what is over within a second.

    On a terminal a bar that disappears in the end; elsewhere a line, and another every ten seconds.
    """
    console = Console(stderr=True, markup=False, highlight=False)
    with _bar(console, what) if console.is_terminal else _lines(what) as tell:
        yield tell


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Tell]:
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    task = progress.add_task(what, total=None)
    lock, over, seen = Lock(), False, False

    def appear() -> None:
        nonlocal seen
        with lock:
            if not over:
                progress.start()
                seen = True

    timer = Timer(_PATIENCE_S, appear)
    timer.daemon = True
    timer.start()
    try:
        yield lambda message, done, total: progress.update(
            task, description=f"{what}: {message}", completed=done, total=total
        )
    finally:
        timer.cancel()
        with lock:
            over = True
            if seen:
                progress.stop()


@contextmanager
def _lines(what: str) -> Iterator[Tell]:
    due = time.monotonic() + _PATIENCE_S

    def tell(message: str, done: float, total: float | None) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _LINE_EVERY_S
            share = f" ({100 * done / total:.1f} %)" if total else ""
            print(f"{what}: {message}{share}", file=sys.stderr, flush=True)

    yield tell
