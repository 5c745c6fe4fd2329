"""One rank's lane of a program, run: a thread for each stream, which waits for what its next task waits for.

The rules are the simulator's: a stream runs its tasks in order, each once what it waits for has ended, and an exchange
begins when all its ranks have come to it. So a program that ends in virtual time ends here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints, Pass, Program, Stream
from moeplan.errors import ExecutionError
from moeplan.executor.conditions import exchange, thread_delay_s
from moeplan.executor.exchange import Wire
from moeplan.executor.launch import describe
from moeplan.partition.stages import Pipeline

_COMPUTES = ("attention", "router", "dense", "shared", "experts", "merge", "head", "embedding")


class Task(NamedTuple):
    """A task of this rank and what it means: `role` names the handler, `backward` its direction, `part` which of the
    parts of a layer's tokens. `around` is the work that a tensor exchange comes before or after.
    """

    number: int
    stream: int
    passes: Pass
    layer: int
    microbatch: int
    chunk: int
    kind: str
    operation: str
    exchange: int
    backward: bool = False
    part: int = 0
    around: str = ""


class Message(NamedTuple):
    """What another stage sends here: which task of its lane, to which boundary between layers, forward or backward."""

    task: int
    source: int
    microbatch: int
    boundary: int
    backward: bool


def tasks_of(program: Program, plan: Plan, pipes: Pipeline, rank: int) -> list[Task]:
    """The tasks of one rank in the order of the program, which has a lane for every GPU."""
    held = pipes.virtual[program.lanes[rank].stage]
    plain = [_plain(program, task) for task in np.flatnonzero(program.tasks.lane_T == rank).tolist()]
    by_pass: dict[tuple[int, int, int], list[Task]] = {}
    for task in plain:
        by_pass.setdefault((task.passes, task.chunk, task.microbatch), []).append(task)
    found: dict[int, Task] = {}
    for (passes, chunk, _), members in by_pass.items():
        again = plan.recompute == "full" and passes in (Pass.BACKWARD, Pass.INPUT_GRADIENT)
        forward = next((each for key, each in by_pass.items() if key[:2] == (Pass.FORWARD, chunk)), []) if again else []
        for layer in {each.layer for each in members}:
            once = sum(each.layer == layer != -1 and each.stream != Stream.SHARD for each in forward)
            of_layer = [each for each in members if each.layer == layer]
            if layer == -1 and chunk >= 0:
                of_layer = _ends(of_layer, pipes.stages[held[chunk]].has_embedding)
            found |= {each.number: each for each in _meant(of_layer, once, plan.overlap_degree)}
    return [found[task.number] for task in plain]


def _plain(program: Program, number: int) -> Task:
    tasks = program.tasks
    stream, unit = int(tasks.stream_T[number]), int(tasks.unit_T[number])
    exchange = -1 if stream == Stream.COMPUTE else program.meetings[unit].exchange
    return Task(
        number=number, stream=stream, passes=Pass(int(tasks.pass_T[number])), layer=int(tasks.layer_T[number]),
        microbatch=int(tasks.microbatch_T[number]), chunk=int(tasks.chunk_T[number]), kind=program.kind(number),
        operation="" if exchange < 0 else program.exchanges[exchange].operation, exchange=exchange,
    )  # fmt: skip


def _ends(members: list[Task], has_embedding: bool) -> list[Task]:
    """Tells the embedding from the head: it comes first in a forward pass, and last in a backward pass."""
    heads = [each for each in members if each.kind == "head"]
    if not has_embedding or not heads or heads[0].passes == Pass.INPUT_GRADIENT:
        return members
    which = heads[0] if heads[0].passes == Pass.FORWARD else heads[-1]
    return [each._replace(kind="embedding") if each is which else each for each in members]


def _meant(members: list[Task], again: int, parts: int) -> Iterator[Task]:
    """The tasks of one pass in one layer; the first `again` of them, sharding apart, run the forward pass again."""
    seen: dict[tuple[str, str, bool], int] = {}
    number = 0
    for at, task in enumerate(members):
        backward = task.passes != Pass.FORWARD and number >= again
        number += task.stream != Stream.SHARD
        key = (task.kind, task.operation, backward)
        seen[key] = seen.get(key, -1) + 1
        around = ""
        if task.kind == "tensor":
            near = members[at + 1 :] if task.operation == "all_gather" else members[:at][::-1]
            around = next(each.kind for each in near if each.kind in _COMPUTES)
        yield task._replace(backward=backward, part=seen[key] % parts if task.layer >= 0 else 0, around=around)


def messages_to(program: Program, pipes: Pipeline, rank: int) -> list[Message]:
    """What other ranks send here, by sender in the order in which they send."""
    tasks, found = program.tasks, []
    for task in np.flatnonzero(tasks.stream_T == Stream.PIPELINE).tolist():
        source = int(tasks.lane_T[task])
        groups_NG = program.exchanges[program.meetings[int(tasks.unit_T[task])].exchange].groups_NG
        if source != rank and bool(((groups_NG[:, 0] == source) & (groups_NG[:, 1] == rank)).any()):
            stage = pipes.stages[pipes.virtual[program.lanes[source].stage][int(tasks.chunk_T[task])]]
            backward = int(tasks.pass_T[task]) != Pass.FORWARD
            boundary = stage.first_layer + (0 if backward else len(stage.layers))
            found.append(Message(task, source, int(tasks.microbatch_T[task]), boundary, backward))
    return sorted(found, key=lambda each: (each.source, each.task))


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """When a task ran, on the clock of its machine, what it took of the processor, and whom it sent how much."""

    start_s: float
    end_s: float
    processor_s: float
    sent_bytes: Mapping[int, int]


class Runner:
    """Runs a rank's tasks once for each step."""

    def __init__(
        self, program: Program, tasks: list[Task], messages: list[Message], *, handle: Callable[[Task], None],
        receive: Callable[[Message], None], wires: Mapping[int, list[Wire]], progress: Ints, device: torch.device,
        more_waits: Mapping[int, list[int]],
    ) -> None:  # fmt: skip
        self.program, self.tasks, self.messages = program, tasks, messages
        self.handle, self.receive, self.wires, self.progress = handle, receive, wires, progress
        self.clock = Clock(device)
        numbers = {task.number for task in tasks} | {message.task for message in messages}
        self.waits: dict[int, list[int]] = {task.number: [] for task in tasks}
        for before, after in zip(program.before_D.tolist(), program.after_D.tolist(), strict=True):
            if after in self.waits:
                assert before in numbers, f"{describe(program, after)} waits for a task of another rank"
                self.waits[after].append(before)
        for after, befores in more_waits.items():
            self.waits[after] += befores
        self.done: dict[int, threading.Event] = {number: threading.Event() for number in numbers}
        self.spans: dict[int, Span] = {}
        self.arrived_s: dict[int, float] = {}
        self.ended_delay_s = 0.0
        self.failure: BaseException | None = None
        self.where = ""

    def step(self) -> dict[int, Span]:
        """One step: when each task ran. Raises ExecutionError, with the task, for the first one that fails."""
        self.spans = {}
        for event in self.done.values():
            event.clear()
        work = [(self._stream, list(each)) for _, each in groupby(sorted(self.tasks, key=_by_stream), key=_by_stream)]
        mail = [(self._mail, list(each)) for _, each in groupby(self.messages, key=lambda each: each.source)]
        threads = [
            threading.Thread(target=self._guarded, args=each, daemon=True) for each in (*work[1:], *mail)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        if work:
            self._guarded(*work[0])
        for thread in threads:
            while thread.is_alive() and self.failure is None:
                thread.join(0.2)
        if self.failure is not None:
            raise ExecutionError(f"{self.where}: {self.failure}") from self.failure
        return self.clock.settled(self.spans)

    def _guarded(self, run: Callable[..., None], what: list[Task] | list[Message]) -> None:
        try:
            if threading.current_thread() is threading.main_thread():
                run(what)
            else:
                exchange()
                run(what)
                self.ended_delay_s += thread_delay_s()
        except BaseException as error:
            if self.failure is None:
                self.where = threading.current_thread().name if not self.where else self.where
                self.failure = error
            for event in self.done.values():
                event.set()

    def _stream(self, tasks: list[Task]) -> None:
        """The tasks of one stream, each once what it waits for is done."""
        self.clock.enter()
        for task in tasks:
            for before in self.waits[task.number]:
                self.done[before].wait()
            if self.failure is not None:
                return
            self.progress[task.stream] = task.number + 1
            self._run(task)
            self.progress[task.stream] = 0
            self.progress[-1] += 1
            self.done[task.number].set()

    def _run(self, task: Task) -> None:
        try:
            with torch.no_grad():
                begun = self.clock.begin(task.number, self.waits[task.number])
                self.handle(task)
                sent: dict[int, int] = {}
                for wire in self.wires.get(task.stream, ()):
                    sent |= wire.taken_bytes()
                self.spans[task.number] = self.clock.end(task.number, begun, sent)
        except BaseException:
            self.where = self.where or describe(self.program, task.number)
            raise

    def _mail(self, messages: list[Message]) -> None:
        """All that one rank sends, one after another, so that it never waits long for a place to put it."""
        self.clock.enter()
        for message in messages:
            self.receive(message)
            self.clock.mark(message.task)
            self.arrived_s[message.task] = time.monotonic()
            self.done[message.task].set()


def _by_stream(task: Task) -> int:
    return task.stream


class Clock:
    """One clock for all ranks of a machine: that of its kernel; on GPUs events, which are told on it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"
        self.events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        if self.is_cuda:
            self.origin = torch.cuda.Event(enable_timing=True)
            self.origin.record()
            torch.cuda.synchronize(device)
            self.origin_s = time.monotonic()

    def enter(self) -> None:
        """A thread begins: on a GPU its kernels go to a queue of their own."""
        if self.is_cuda:
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def begin(self, number: int, waits: list[int]) -> tuple[float, float]:
        """Wall and processor seconds now; on a GPU the queue waits for the tasks that come before."""
        if self.is_cuda:
            for before in waits:
                torch.cuda.current_stream().wait_event(self.events[before][1])
            self.mark(number)
        return time.monotonic(), time.thread_time()

    def end(self, number: int, begun: tuple[float, float], sent_bytes: Mapping[int, int]) -> Span:
        """The span of the task that began so."""
        if self.is_cuda:
            started = self.events[number][0]
            self.mark(number)
            self.events[number] = (started, self.events[number][1])
        return Span(
            start_s=begun[0], end_s=time.monotonic(), processor_s=time.thread_time() - begun[1], sent_bytes=sent_bytes
        )

    def mark(self, number: int) -> None:
        """On a GPU others may wait for what is queued so far."""
        if self.is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            self.events[number] = (now, now)

    def settled(self, spans: dict[int, Span]) -> dict[int, Span]:
        """The spans with the times of the device."""
        if not self.is_cuda:
            return spans
        torch.cuda.synchronize(self.device)
        return {
            number: Span(
                start_s=self.origin_s + self.origin.elapsed_time(self.events[number][0]) / 1e3,
                end_s=self.origin_s + self.origin.elapsed_time(self.events[number][1]) / 1e3,
                processor_s=span.processor_s, sent_bytes=span.sent_bytes,
            )
            for number, span in spans.items()
        }  # fmt: skip
