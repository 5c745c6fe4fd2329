"""Processes, one for each rank, that end with their parent and with one another, whatever happens.

They meet through a file in a folder of their own and talk over the loopback device, or between the nodes of an emulated
network. Each writes into one shared table what it is doing, so that who stands still, and in which task, is known
without its help.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.program import Ints, Pass, Program, Stream
from moeplan.errors import ExecutionError

PATIENCE_S = 20.0
"""A task that takes longer is taken to hang."""
_START_S = 120.0
_POLL_S = 0.05
_GRACE_S = 0.5
_AWAKE_S = 1.0
"""Who looks every `_POLL_S` and finds that more has passed was not running."""
COLUMNS = len(Stream) + 2
"""Of the table: the task (plus 1) that each stream is at, the job (plus 1) that is running, how much has been done."""
JOB, DONE = len(Stream), len(Stream) + 1
NODES: ContextVar[tuple[str, ...]] = ContextVar("nodes", default=())
"""The network namespaces in which ranks run, as many in each, in their order; none: all on the loopback device."""
PORT = "eth0"
"""The device of such a node that leads to the others."""


def describe(program: Program, task: int) -> str:
    """A task in words."""
    tasks = program.tasks
    where = [f"{name} {int(values[task])}" for name, values in (
        ("layer", tasks.layer_T), ("micro-batch", tasks.microbatch_T), ("chunk", tasks.chunk_T),
    ) if values[task] >= 0]  # fmt: skip
    words = Pass(int(tasks.pass_T[task])).name.lower().replace("_", " ")
    return f"task {task} ({', '.join([program.kind(task), words, *where])})"


def progress_table(folder: Path, world_size: int) -> Ints:
    """The table of all ranks, shared through a file."""
    path = folder / "progress"
    if not path.exists():
        path.write_bytes(bytes(8 * COLUMNS * world_size))
    return np.memmap(path, np.int64, mode="r+", shape=(world_size, COLUMNS))


@dataclass(kw_only=True, eq=False)
class Ranks:
    """Processes that run, and what is known of them."""

    folder: Path
    numbers: Sequence[int]
    """The ranks that there are processes of."""
    processes: list[subprocess.Popen[bytes]]
    programs: Sequence[Program]
    progress: Ints
    patience_s: float

    def wait(self) -> None:
        """Until all have ended. Raises ExecutionError, with rank and task, once one has died, failed or hangs."""
        last, still_s, at_s = -1, 0.0, time.monotonic()
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes):
                time.sleep(_GRACE_S)
                raise ExecutionError(self._failure())
            if all(code == 0 for code in codes):
                return
            done = int(self.progress[:, DONE].sum())
            # What this process itself was stopped for says nothing of the ranks.
            still_s, at_s = still_s + min(time.monotonic() - at_s, _AWAKE_S), time.monotonic()
            if done != last:
                last, still_s = done, 0.0
            limit_s = self.patience_s if self.progress[:, JOB].any() else max(_START_S, self.patience_s)
            if still_s > limit_s:
                raise ExecutionError(self._standstill(limit_s))
            time.sleep(_POLL_S)

    def _failure(self) -> str:
        """What the rank says that failed first; one that died says nothing, and the others only lost it."""
        notes = [(json.loads(path.read_text())) for path in sorted(self.folder.glob("error-*.json"))]
        told = {int(note["rank"]) for note in notes}
        for rank, process in zip(self.numbers, self.processes, strict=True):
            code = process.poll()
            if code and rank not in told:
                why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                return f"execute: rank {rank} {why} in {self._place(rank)}{self._last_words(rank)}; run it again"
        first = min(notes, key=lambda note: float(note["time_s"]))
        return f"execute: rank {first['rank']}: {first['message']}"

    def _last_words(self, rank: int) -> str:
        path = self.folder / f"stderr-{rank}"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return f" ({lines[-1][:200]})" if lines else ""

    def _place(self, rank: int) -> str:
        """What a rank was doing."""
        row = self.progress[rank]
        at = [int(task) - 1 for task in row[: len(Stream)] if task]
        if not row[JOB]:
            return "its start"
        program = self.programs[int(row[JOB]) - 1]
        return " and ".join(describe(program, task) for task in at) or "between two tasks"

    def _standstill(self, limit_s: float) -> str:
        """Of ranks that all stand still the one that computes is the cause, else one that is in no exchange."""
        computing = [rank for rank in self.numbers if self.progress[rank, Stream.COMPUTE]]
        idle = [rank for rank in self.numbers if not self.progress[rank, : len(Stream)].any()]
        rank = [*computing, *idle, *self.numbers][0]
        remedy = "give it more time if its tasks are that long (patience), else run it again"
        return f"execute: rank {rank} stands still for {limit_s:g} s in {self._place(rank)}; {remedy}"

    def kill(self) -> None:
        """Ends all that is left, and waits for it."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def folder_of_a_run(jobs: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
    """A folder with the jobs in it, which is gone behind the block, also where a SIGTERM ends that."""
    with ends_on_signals():
        folder = Path(tempfile.mkdtemp(prefix="moeplan-"))
        try:
            (folder / "jobs.json").write_text(json.dumps(list(jobs)))
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_ranks(
    folder: Path, programs: Sequence[Program], world_size: int, *, patience_s: float = PATIENCE_S,
    ranks: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Runs the jobs in `folder` on so many new processes; leaves their results there, and no process.

    `ranks`: those alone, where the jobs are such that a rank needs no other. Raises ExecutionError with the rank and
    the task if one of them dies, raises or hangs.
    """
    progress, numbers = progress_table(folder, world_size), ranks or range(world_size)
    running = Ranks(
        folder=folder, numbers=numbers, processes=[], programs=programs, progress=progress, patience_s=patience_s
    )
    try:
        for rank in numbers:
            running.processes.append(_started(folder, rank, world_size))
        running.wait()
    finally:
        running.kill()


def _started(folder: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    root, nodes = str(Path(__file__).parents[2]), NODES.get()
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    env = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "GLOO_SOCKET_IFNAME": PORT if nodes else loopback, "NCCL_SOCKET_IFNAME": PORT if nodes else loopback,
    }  # fmt: skip
    inside = ["ip", "netns", "exec", nodes[rank * len(nodes) // world_size]] if nodes else []
    command = [*inside, sys.executable, "-m", "moeplan.executor.worker", "--folder", str(folder)]
    with (folder / f"stderr-{rank}").open("wb") as errors:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """A SIGTERM is an exception in the block, and then what it was before; but in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stopped:
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """A SIGTERM has come."""
