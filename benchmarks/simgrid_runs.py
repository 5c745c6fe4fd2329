"""Runs flows on SimGrid, with the settings that make it nothing but max-min fair sharing of links.

SimGrid need not be importable here: the run is a child process of the first Python found that can import it. So this
file imports nothing outside the standard library. What is said of SimGrid below was seen in Debian's 3.32; the
names that 4.x gave to things are here too, but were not run.

    python benchmarks/simgrid_runs.py            which Python has SimGrid, and which version

Axes: K links, F flows, I the links of all flows, flow by flow; F1 where each flow's links begin, and their end.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SETTINGS = (
    "network/model:CM02",
    "network/bandwidth-factor:1",  # LV08, the default model, has 0.97
    "network/latency-factor:1",  # and 13.01
    "network/weight-S:0",  # else the bandwidth of a link enters the weight of a flow
    "network/TCP-gamma:0",  # else a window limits the rate of a flow with latency
    "network/crosstraffic:0",  # else 5 % of each flow loads the way back
)
WORK_PRECISION, TIME_PRECISION_S = 1e-9, 1e-12
"""By default a link may be overfull by 1e-5 of its capacity, and what ends within 1e-9 s ends together."""
FIELDS = {
    "capacity_bytes_per_s_K": "d", "latency_s_K": "d", "link_I": "q", "first_F1": "q",
    "size_bytes_F": "q", "start_s_F": "d", "source_F": "q", "target_F": "q",
}  # fmt: skip
"""The arrays of a job, in the order of its file, and the kind of their numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Flows and the links that they cross, in numbers.

    A flow goes from one host to another; flows between the same two hosts take the same links. SimGrid makes latency
    two things at once: a flow begins to move one latency of its path after its start, and its weight is 1 over that
    latency. If no link has latency, all flows weigh the same.
    """

    capacity_bytes_per_s_K: Sequence[float]
    latency_s_K: Sequence[float]
    link_I: Sequence[int]
    first_F1: Sequence[int]
    size_bytes_F: Sequence[int]
    start_s_F: Sequence[float]
    source_F: Sequence[int]
    target_F: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What SimGrid said, and what it took: `cpu_s` is that of the simulation alone, of all its threads."""

    finish_s_F: array[float]
    cpu_s: float
    platform_s: float
    peak_memory_bytes: int
    simgrid: str
    settings: list[str]


# ---- here


def run(job: Job, *, optim: str = "Full", limit_s: float | None = None) -> Run | None:
    """SimGrid's answer, or None if it took longer than `limit_s`; `optim` is its way to solve, Full or Lazy.

    Take Full where links have latency: there Lazy let flows be faster than their links. Of the 125 cases with weights
    in `tests/data/simgrid` it gets 38 wrong.
    """
    if optim not in ("Full", "Lazy"):
        raise ValueError(f"optim: SimGrid has no way to solve called {optim!r}; use 'Full' or 'Lazy'")
    python = interpreter()
    if python is None:
        raise RuntimeError("no Python here imports simgrid; on Debian, `apt-get install python3-simgrid` gives one")
    arrays = [array(code, getattr(job, name)) for name, code in FIELDS.items()]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "job"), Path(folder, "finish")
        asked.write_bytes(b"".join(numbers.tobytes() for numbers in arrays))
        lengths = ",".join(str(len(numbers)) for numbers in arrays)
        text = output([python, __file__, optim, lengths, str(asked), str(answer)], limit_s=limit_s)
        return None if text is None else Run(finish_s_F=array("d", answer.read_bytes()), **json.loads(text))


@cache
def interpreter() -> str | None:
    """The first Python that imports simgrid: this one, the first on the path, the system's; None if none does."""
    found = [sys.executable, shutil.which("python3"), "/usr/bin/python3"]
    return next((python for python in dict.fromkeys(found) if python and version(python)), None)


@cache
def version(python: str) -> str:
    """Which SimGrid a Python has; nothing if it has none."""
    if not Path(python).is_file():
        return ""
    asked = subprocess.run([python, __file__], capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def output(command: list[str], *, limit_s: float | None) -> str | None:
    """What a command prints, or None if it had to be stopped; nothing that it started outlives this call."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        text, complaint = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise RuntimeError(f"SimGrid ended with status {process.returncode}: {' '.join(complaint.split())[-500:]}")
    return text


# ---- in the child


def load() -> Any:
    """The simgrid module. The wheel that pip builds has no run path, so its own shared library is loaded first."""
    try:
        return importlib.import_module("simgrid")
    except ImportError:
        for path in sorted(file for folder in sys.path for file in Path(folder).glob("libsimgrid.so.*")):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("simgrid")


def answer(optim: str, lengths: str, asked: str, finish: str) -> dict[str, Any]:
    """Runs the job in the file `asked`, writes when each flow ended to the file `finish`, and says what it took."""
    simgrid, job = load(), read(asked, [int(length) for length in lengths.split(",")])
    settings = [*SETTINGS, f"network/optim:{optim}", *precision(simgrid)]
    engine = simgrid.Engine(["moeplan", "--log=root.thresh:error", *(f"--cfg={setting}" for setting in settings)])
    begin_s = time.process_time()
    hosts = build(simgrid, engine, job)
    platform_s = time.process_time() - begin_s
    flows = plan(simgrid, engine, hosts, job)
    begin_s = time.process_time()
    engine.run()
    cpu_s = time.process_time() - begin_s
    Path(finish).write_bytes(array("d", (flow.finish_time for flow in flows)).tobytes())
    return {
        "cpu_s": cpu_s, "platform_s": platform_s, "peak_memory_bytes": peak_memory_bytes(),
        "simgrid": str(simgrid.simgrid_version), "settings": settings,
    }  # fmt: skip


def read(path: str, lengths: list[int]) -> Job:
    """The job in a file."""
    found = {}
    with Path(path).open("rb") as file:
        for (name, code), length in zip(FIELDS.items(), lengths, strict=True):
            found[name] = array(code)
            found[name].fromfile(file, length)
    return Job(**found)


def is_3(simgrid: Any) -> bool:
    """Whether things have the names of SimGrid 3."""
    return str(simgrid.simgrid_version).startswith("3.")


def precision(simgrid: Any) -> list[str]:
    """The settings whose names changed."""
    work, instant = (
        ("maxmin/precision", "surf/precision") if is_3(simgrid) else ("precision/work-amount", "precision/timing")
    )
    return [f"{work}:{WORK_PRECISION:g}", f"{instant}:{TIME_PRECISION_S:g}"]


def build(simgrid: Any, engine: Any, job: Job) -> list[Any]:
    """The hosts, with a route for each pair between which a flow goes."""
    old = is_3(simgrid)
    zone = simgrid.NetZone.create_full_zone("all") if old else engine.netzone_root.add_netzone_full("all")
    add_host, add_link = (zone.create_host, zone.create_link) if old else (zone.add_host, zone.add_link)
    hosts = [add_host(f"h{host}", 1e9) for host in range(1 + max(*job.source_F, *job.target_F))]
    links = [
        add_link(f"l{link}", capacity).set_latency(latency_s)
        for link, (capacity, latency_s) in enumerate(zip(job.capacity_bytes_per_s_K, job.latency_s_K, strict=True))
    ]
    for link in links:
        link.seal()
    for (source, target), path in routes(job).items():
        route = [simgrid.LinkInRoute(links[link]) for link in path]
        if old:
            zone.add_route(hosts[source].netpoint, hosts[target].netpoint, None, None, route, False)
        else:
            zone.add_route(hosts[source], hosts[target], route, False)
    zone.seal()
    return hosts


def routes(job: Job) -> dict[tuple[int, int], Sequence[int]]:
    """The links between two hosts, for the pairs that have a flow."""
    found: dict[tuple[int, int], Sequence[int]] = {}
    for flow, pair in enumerate(zip(job.source_F, job.target_F, strict=True)):
        path = job.link_I[job.first_F1[flow] : job.first_F1[flow + 1]]
        assert found.setdefault(pair, path) == path, f"two ways from host {pair[0]} to {pair[1]}"
    return found


def plan(simgrid: Any, engine: Any, hosts: list[Any], job: Job) -> list[Any]:
    """The flows, once the engine has run.

    Every actor is a thread, so that one for each flow, or waiting for each flow, would cost more than the network: one
    actor starts all flows. It then looks at long intervals whether all have ended, since they would end with it.
    """
    flows: list[Any] = [None] * len(job.size_bytes_F)
    sleep_for, send, look_s = simgrid.this_actor.sleep_for, simgrid.Comm.sendto_async, port_bound_s(job) / 4

    def start() -> None:
        for flow in sorted(range(len(flows)), key=job.start_s_F.__getitem__):
            wait_s = job.start_s_F[flow] - engine.clock
            if wait_s > 0:
                sleep_for(wait_s)
            flows[flow] = send(hosts[job.source_F[flow]], hosts[job.target_F[flow]], job.size_bytes_F[flow])
        left = flows
        while left := [flow for flow in left if flow.finish_time < 0]:
            sleep_for(look_s)

    if is_3(simgrid):
        simgrid.Actor.create("starter", hosts[0], start)
    else:
        hosts[0].add_actor("starter", start)
    return flows


def port_bound_s(job: Job) -> float:
    """Seconds before which the busiest link cannot have carried all its bytes."""
    load_s = [0.0] * len(job.capacity_bytes_per_s_K)
    for flow, size_bytes in enumerate(job.size_bytes_F):
        for link in job.link_I[job.first_F1[flow] : job.first_F1[flow + 1]]:
            load_s[link] += size_bytes / job.capacity_bytes_per_s_K[link]
    return max(load_s)


def peak_memory_bytes() -> int:
    """The most memory that this program has had; where the system does not tell, its parent's may count too."""
    listed = Path("/proc/self/status")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    kilo = 1 if sys.platform == "darwin" else 1024
    return own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


if __name__ == "__main__":
    print(json.dumps(answer(*sys.argv[1:])) if sys.argv[1:] else load().simgrid_version)
