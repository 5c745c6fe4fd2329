"""A process group whose messages arrive when a model says: one rank of a plan runs alone, with nobody at the other end.

What is received is noise of the same size, copied to where it belongs. An exchange is over once its modelled time has
passed since this rank, and by the model all others, had come to it; a message of another stage comes when the model
says. On a GPU the queue waits and not the program, by a kernel that spins.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from moeplan.executor.lane import Message, Task

NOISE = 2**20
"""Numbers of it: more than a cache line of each, so that no row is like its neighbour."""


class Delays:
    """When the exchanges of one rank are over. By task: when the last other rank comes to it, after the begin of the
    step, and how long it then takes; of a message of another stage, when it is here, and 0.
    """

    def __init__(self, by_task: Mapping[str, tuple[float, float]], device: torch.device) -> None:
        self.by_task = {int(task): (come_s, takes_s) for task, (come_s, takes_s) in by_task.items()}
        self.device = device
        self.begun_s = 0.0
        self.here = threading.local()
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            self.cycles_per_s = self._cycles_per_s()
            self.come: dict[int, torch.cuda.Event] = {}

    def _cycles_per_s(self) -> float:
        """Of the kernel that spins."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10**6)
        start.record()
        torch.cuda._sleep(10**8)
        end.record()
        torch.cuda.synchronize(self.device)
        return 1e8 / (float(start.elapsed_time(end)) / 1e3)

    def begin(self) -> None:
        """A step begins; on a GPU a queue of its own tells when others come."""
        self.begun_s = time.monotonic()
        if self.device.type != "cuda":
            return
        with torch.cuda.stream(self.side):
            now_s = 0.0
            for task, (come_s, _) in sorted(self.by_task.items(), key=lambda each: each[1][0]):
                torch.cuda._sleep(round(max(come_s - now_s, 0.0) * self.cycles_per_s))
                now_s = max(now_s, come_s)
                self.come[task] = torch.cuda.Event()
                self.come[task].record()

    def before(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """`handle` of a task or a message, whose exchange, if it has one, is over when it should be."""

        def timed(one: Task | Message) -> None:
            number = one.number if isinstance(one, Task) else one.task
            self.here.task = number if number in self.by_task else None
            self.here.due_s = None
            handle(one)

        return timed

    def wait(self) -> None:
        """Until the exchange of the task at hand is over; its later messages have been waited for then."""
        task = getattr(self.here, "task", None)
        if task is None:
            return
        come_s, takes_s = self.by_task[task]
        if self.device.type == "cuda":
            self.here.task = None
            torch.cuda.current_stream().wait_event(self.come[task])
            torch.cuda._sleep(round(takes_s * self.cycles_per_s))
            return
        if self.here.due_s is None:
            self.here.due_s = max(time.monotonic(), self.begun_s + come_s) + takes_s
        time.sleep(max(0.0, self.here.due_s - time.monotonic()))


class _Arrived(dist.Work):
    """A message that is waited for."""

    def __init__(self, delays: Delays | None) -> None:
        super().__init__()
        self.delays = delays

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until it should be here."""
        if self.delays is not None:
            self.delays.wait()
        return True


class DelayGroup(dist.ProcessGroup):
    """All that `Wire` asks of a group."""

    delays: Delays | None = None
    """Of the process: torch makes the groups."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(rank))

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> dist.Work:
        """Leaves."""
        return _Arrived(self.delays)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> dist.Work:
        """Noise."""
        for each in tensors:
            if self.noise.device != each.device or self.noise.dtype != each.dtype:
                self.noise = self.noise.to(each)
            flat = each.view(-1)
            for start in range(0, len(flat), NOISE):
                part = flat[start : start + NOISE]
                part.copy_(self.noise[: len(part)])
        return _Arrived(self.delays)

    def barrier(self, *given: Any, **options: Any) -> dist.Work:
        """Nobody else comes."""
        return _Arrived(None)

    def getBackendName(self) -> str:
        """Its name."""
        return "delay"


def connect(rank: int, world_size: int, delays: Delays) -> None:
    """Makes this process a rank of a world in which it is alone."""
    DelayGroup.delays = delays
    dist.Backend.register_backend(
        "delay", lambda store, rank, size, timeout: DelayGroup(rank, size), devices=["cpu", "cuda"]
    )
    dist.init_process_group("delay", store=HashStore(), rank=rank, world_size=world_size)


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """The most that was allocated, and reserved, of the device's memory; of a process only what it holds is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held, held
