"""One rank's process: takes the jobs of a folder, runs its lane of each, and leaves what it measured there.

`python -m moeplan.executor.worker --folder DIR` is what `launch.py` starts. Under an existing launch, such as

    torchrun --nproc-per-node 4 -m moeplan.executor.worker SCENARIO --plan plan.json --steps 10 --folder DIR

each process is a rank of the plan, `DIR` is a folder that all of them see, and rank 0 prints what came out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.domain.plan import Plan
from moeplan.domain.program import Stream
from moeplan.domain.scenario import Scenario
from moeplan.errors import ExecutionError, MoeplanError
from moeplan.executor.conditions import MEANS, Reading, compute, exchanging, forget_peak, prepare, resident_bytes
from moeplan.executor.delayed import Delays, connect
from moeplan.executor.exchange import Wire
from moeplan.executor.execute import check, joined, summary
from moeplan.executor.lane import Runner, Span, messages_to
from moeplan.executor.launch import DONE, JOB, PATIENCE_S, progress_table
from moeplan.executor.rank import Rank
from moeplan.executor.watched import Operation, Watch, watched
from moeplan.executor.works import Works
from moeplan.executor.yardstick import Yardstick

_OF_STREAM = {
    Stream.TENSOR: ("tensor",), Stream.EXPERT: ("expert",), Stream.SHARD: ("shard",), Stream.PIPELINE: ("up", "down"),
}  # fmt: skip
_WIRES = ("tensor", "expert", "shard", "up", "down")
_ROUNDS = 20
"""Of which the shortest tells how far the clock of another machine is off."""
_TRIES = 20


def main(words: Sequence[str] | None = None) -> None:
    """The entry point of a rank."""
    parser = argparse.ArgumentParser(prog="moeplan.executor.worker", description=__doc__)
    parser.add_argument("scenario", nargs="?")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(words)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    is_child = given.scenario is None
    given.folder.mkdir(parents=True, exist_ok=True)
    if is_child:
        threading.Thread(target=_end_with_parent, args=(given.folder,), daemon=True).start()
    try:
        jobs = json.loads((given.folder / "jobs.json").read_text()) if is_child else [_job(given, world_size)]
        _Process(given.folder, rank, world_size, jobs, is_child=is_child).run()
    except BaseException as error:
        _ending.acquire()
        note = {"rank": rank, "time_s": time.time(), "message": str(error) or type(error).__name__}
        if given.folder.exists():
            (given.folder / f"error-{rank}.json").write_text(json.dumps(note))
        if is_child and select.select([sys.stdin], [], [], 0)[0]:  # the others are only gone since the parent is
            _remove(given.folder)
        print(f"moeplan: rank {rank}: {note['message']}", file=sys.stderr, flush=True)
        if not isinstance(error, MoeplanError):
            sys.excepthook(type(error), error, error.__traceback__)
        os._exit(2 if isinstance(error, MoeplanError) else 1)
    sys.stdout.flush()
    os._exit(0)  # threads that wait for a rank that is gone must not hold the process


_ending = threading.Lock()
"""Held by the thread that ends the process."""


def _end_with_parent(folder: Path) -> None:
    """The parent never writes: what is read is its end. Each rank removes the folder, for another that is still at work
    may have put a file into it meanwhile.
    """
    os.read(sys.stdin.fileno(), 1)
    _ending.acquire()
    _remove(folder)
    os._exit(3)


def _remove(folder: Path) -> None:
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def _job(given: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """The job of a launch that is not ours. Raises MoeplanError for one that does not fit it."""
    scenario = catalogue.load(given.scenario)
    if given.plan is None:
        raise ExecutionError("execute: --plan: there is none; make it with `moeplan plan SCENARIO --json`")
    plan = catalogue.read_plan(given.plan)
    if plan.world_size != world_size:
        found = f"the plan has {plan.world_size} ranks, but the launch has WORLD_SIZE {world_size}"
        raise ExecutionError(f"execute: {found}; start as many processes as the plan has ranks")
    return {
        "scenario": dict(scenario.document), "plan": plan.model_dump(mode="json", by_alias=True), "steps": given.steps,
        "seed": 0, "device": given.device, "keeps_gradients": False, "watches": False,
    }  # fmt: skip


class _Process:
    """A rank of a launch: its connections, and the jobs that it runs over them."""

    def __init__(self, folder: Path, rank: int, world_size: int, jobs: list[dict[str, Any]], *, is_child: bool) -> None:
        self.folder, self.rank, self.world_size, self.jobs, self.is_child = folder, rank, world_size, jobs, is_child
        self.progress = progress_table(folder, world_size)[rank] if is_child else np.zeros(JOB + 2, np.int64)

    def run(self) -> None:
        """All jobs, one after another."""
        torch.set_num_threads(1)
        sys.setswitchinterval(1e-4)
        first = [(_scenario(job), Plan.model_validate(job["plan"])) for job in self.jobs]
        devices = [_device(job, plan) for job, (_, plan) in zip(self.jobs, first, strict=True)]
        if not self.is_child:
            check(first[0][1], first[0][0])
        delays = self.jobs[0].get("delays")
        self.delays = None if delays is None else Delays(delays, devices[0])
        is_processor = devices[0].type == "cpu"
        self.means = prepare() if is_processor else {}
        self._connect(devices[0])  # makes the threads of gloo
        if is_processor:
            compute()
        for number, (job, (scenario, plan), device) in enumerate(zip(self.jobs, first, devices, strict=True)):
            self._run_job(number, job, scenario, plan, device)
        with exchanging():
            dist.barrier()
        if not self.is_child and self.rank == 0:
            scenario, plan = first[0]
            program = compile_plan(plan, scenario, folded=False)
            found = joined(self.folder, 0, scenario=scenario, plan=plan, program=program, device=str(devices[0]))
            print(json.dumps(summary(found), indent=2))

    def _connect(self, device: torch.device) -> None:
        """The process group, and one for each wire; only their parent knows how long children may wait."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=600 if self.is_child else PATIENCE_S)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.delays is not None:
            connect(self.rank, self.world_size, self.delays)
        elif self.is_child:
            store = FileStore(str(self.folder / "rendezvous"), self.world_size)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        else:
            self._join(backend, timeout)
        groups = {name: dist.new_group(list(range(self.world_size)), timeout=timeout) for name in _WIRES}
        self.wires = {name: Wire(group) for name, group in groups.items()}
        self.wires |= {f"{name} in": Wire(groups[name]) for name in ("up", "down")}
        self.offset_s = _offset_s(self.rank, self.world_size)

    @staticmethod
    def _join(backend: str, timeout: timedelta) -> None:
        """Meets the others where the launch says."""
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            found = f"execute: ranks cannot meet at {where}: {str(error).splitlines()[0]}"
            raise ExecutionError(f"{found}; use another port (torchrun --standalone finds a free one)") from None

    def _run_job(
        self, number: int, job: Mapping[str, Any], scenario: Scenario, plan: Plan, device: torch.device
    ) -> None:
        program = compile_plan(plan, scenario, folded=False)
        gc.collect()  # what the job before has left in circles
        before_bytes = _memory_bytes(device)
        rank = Rank(program, plan, scenario, self.rank, device=device, seed=job["seed"])
        works = Works(rank, self.wires)
        handle: Callable[[Any], None] = works.handle
        receive: Callable[[Any], None] = works.receive
        if self.delays is not None:
            handle, receive = self.delays.before(handle), self.delays.before(receive)
        runner = Runner(
            program, rank.tasks, messages_to(program, rank.pipes, self.rank), handle=handle, receive=receive,
            wires={stream: [self.wires[name] for name in names] for stream, names in _OF_STREAM.items()},
            progress=self.progress, device=device, more_waits=rank.more_waits,
        )  # fmt: skip
        self.progress[DONE] += 1
        found, yardstick, watch = _Measured(), Yardstick(device), Watch(device) if job.get("watches") else None
        if watch is not None:
            runner.handle = watched(handle, watch)
        forget_peak()
        for step in range(job["steps"]):
            works.sharding.keeps_gradients = job["keeps_gradients"] and step == 0
            words_N, target_N = batch_of(scenario, step, job["seed"])
            works.begin(words_N.to(device), target_N.to(device))
            with exchanging():
                dist.barrier()
            self.progress[JOB] = number + 1
            if self.delays is not None:
                self.delays.begin()
            found.yardstick_s.append(yardstick.seconds())
            before = Reading.now(runner.ended_delay_s)
            spans = self._step(runner, watch)
            loss = works.dense.ends.loss if rank.tensor_ranks[0] == self.rank else 0.0
            found.arrivals.append(dict(runner.arrived_s))
            found.add(spans, loss, Reading.now(runner.ended_delay_s).since(before))
            self.progress[JOB] = 0
        found.yardstick_s.append(yardstick.seconds())
        tables = self._tables(works, watch) | {"memory_bytes": np.array([before_bytes, *_peak_bytes(device)])}
        found.write(self.folder / f"result-{number}-{self.rank}.npz", self.offset_s, tables)

    def _tables(self, works: Works, watch: Watch | None) -> dict[str, Any]:
        """Gradients, the means that were to be had, and what was watched."""
        tables = {f"gradient{at}": each.float().cpu().numpy() for at, each in enumerate(works.sharding.final or ())}
        tables["means"] = np.array([self.means.get(name, False) for name in MEANS])
        tables["operations"] = np.array(watch.found if watch else []).reshape(-1, len(Operation._fields))
        return tables

    @staticmethod
    def _step(runner: Runner, watch: Watch | None) -> dict[int, Span]:
        if watch is None:
            return runner.step()
        with watch:
            return runner.step()


class _Measured:
    """What a rank has measured, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[int, Span]] = []
        self.losses: list[float] = []
        self.readings: list[tuple[float, ...]] = []
        self.arrivals: list[dict[int, float]] = []
        """When what other stages sent was here, by their tasks."""
        self.yardstick_s: list[float] = []
        """Before each step, and behind the last."""

    def add(self, spans: dict[int, Span], loss: float, reading: tuple[float, ...]) -> None:
        """One step more."""
        self.steps.append(spans)
        self.losses.append(loss)
        self.readings.append(reading)

    def write(self, path: Path, offset_s: float, tables: Mapping[str, np.ndarray]) -> None:
        """As arrays by step and task, and the bytes of the last step by task and receiver."""
        tasks = sorted(self.steps[-1])
        times = {
            f"{name}_ST": np.array([[getattr(spans[task], name) for task in tasks] for spans in self.steps])
            for name in ("start_s", "end_s", "processor_s")
        }
        for name in ("start_s_ST", "end_s_ST"):
            times[name] -= offset_s
        mail = sorted(self.arrivals[-1])
        times["arrived_s_SM"] = np.array([[each[task] for task in mail] for each in self.arrivals]) - offset_s
        rows = [(task, to, size) for task in tasks for to, size in self.steps[-1][task].sent_bytes.items()]
        sent = np.array(rows, np.int64).reshape(-1, 3)
        part = path.with_suffix(".part.npz")
        numbers = {"tasks": np.array(tasks), "mail": np.array(mail, np.int64), "sent": sent}
        whole: dict[str, Any] = numbers | {"losses": np.array(self.losses)}
        whole |= {"readings_SQ": np.array(self.readings), "yardstick_s": np.array(self.yardstick_s)}
        np.savez(part, **(whole | times | dict(tables)))
        part.rename(path)


def _scenario(job: Mapping[str, Any]) -> Scenario:
    return catalogue.load(job["scenario"])


def _device(job: Mapping[str, Any], plan: Plan) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if job["device"] == "auto":
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(job["device"], local) if job["device"] == "cuda" else torch.device(job["device"])


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _peak_bytes(device: torch.device) -> tuple[int, int]:
    """The most that was allocated, and that was held for it; of a processor's memory only the latter is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return resident_bytes(peak=True), resident_bytes(peak=True)


def batch_of(scenario: Scenario, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of a step's whole batch and, for each, the next one; the same on every rank."""
    workload = scenario.workload
    shape = (workload.global_batch, workload.query_length + 1)
    words = torch.from_numpy(np.random.default_rng([seed, step]).integers(0, scenario.model.vocab_size, shape))
    return words[:, :-1].reshape(-1), words[:, 1:].reshape(-1)


def _offset_s(rank: int, world_size: int) -> float:
    """How far this machine's clock is ahead of that of rank 0: half of the shortest way there and back is taken off."""
    host = torch.tensor([hash_of_host()], dtype=torch.int64)
    if dist.get_backend() != "gloo" or world_size == 1:
        return 0.0
    hosts = [torch.empty_like(host) for _ in range(world_size)]
    dist.all_gather(hosts, host)
    offset_s = 0.0
    for other in [at for at in range(1, world_size) if int(hosts[at]) != int(hosts[0])]:
        if rank == other:
            offset_s = min(_asked() for _ in range(_ROUNDS))[1]
        elif rank == 0:
            for _ in range(_ROUNDS):
                _answer(other)
    return offset_s


def _asked() -> tuple[float, float]:
    sent_s = time.monotonic()
    there = torch.zeros(1, dtype=torch.float64)
    dist.send(there, 0)
    dist.recv(there, 0)
    took_s = time.monotonic() - sent_s
    return took_s, sent_s + took_s / 2 - float(there)


def _answer(other: int) -> None:
    now = torch.zeros(1, dtype=torch.float64)
    dist.recv(now, other)
    now[0] = time.monotonic()
    dist.send(now, other)


def hash_of_host() -> int:
    """A number for the machine that this runs on."""
    import zlib

    return zlib.crc32(os.uname().nodename.encode())


if __name__ == "__main__":
    main()
