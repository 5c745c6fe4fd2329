"""A network of several nodes on this machine: namespaces, cables of a stated rate between them, and real TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeplan.emulator import namespaces
from moeplan.emulator.topology import write_topology
from moeplan.errors import ExecutionError
from moeplan.executor.launch import NODES, ends_on_signals

MOST_NODES = 64
"""Every one is a namespace, two queues, and at least one process."""
LEAST_MTU, MOST_MTU = 1280, 9000


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Nodes on one switch, each on a cable of `rate_bytes_per_s` in each direction."""

    nodes: int
    rate_bytes_per_s: float
    delay_s: float = 0.0
    """Of each message on its way through the switch, beside what the kernel takes."""
    ranks_per_node: int = 1
    mtu: int = 1500


@contextmanager
def emulated(network: Network) -> Iterator[Path]:
    """Ranks that are started in the block run in the nodes of a network, which is gone behind it, whatever happens.

    Yields the file of the matching topology. A child watches over this process, and removes all if that is killed.
    Raises ExecutionError, and leaves nothing, where this machine cannot do it.
    """
    check(network)
    check_machine()
    namespaces.remove_those_of_the_dead()
    prefix = namespaces.prefix_of(os.getpid())
    if namespaces.made(prefix):
        raise ExecutionError("emulate: this process has a network already; leave that first")
    with ends_on_signals():
        folder = Path(tempfile.mkdtemp(prefix="moeplan-"))
        watch = _watched(prefix, folder)
        try:
            file = write_topology(network, folder / "emulated.yaml")
            names = _built(network, prefix)
            token = NODES.set(tuple(names))
            try:
                yield file
            finally:
                NODES.reset(token)
        finally:
            _end(watch, prefix, folder)


def _watched(prefix: str, folder: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "moeplan.emulator.watch", prefix, str(folder)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def _end(watch: subprocess.Popen[bytes], prefix: str, folder: Path) -> None:
    """The watch does it; and this process where that has been killed."""
    assert watch.stdin is not None
    watch.stdin.close()
    watch.wait()
    namespaces.remove(prefix)
    shutil.rmtree(folder, ignore_errors=True)


def _built(network: Network, prefix: str) -> list[str]:
    """The names of the nodes' namespaces."""
    if network.delay_s and not namespaces.can_delay(namespaces.add(f"{prefix}trial")):
        given = f"emulate: --delay {network.delay_s * 1e6:g}us: this kernel cannot delay packets"
        raise ExecutionError(f"{given}, as it has no netem; leave --delay out, or use a kernel with sch_netem")
    return namespaces.build(
        prefix, nodes=network.nodes, rate_bytes_per_s=network.rate_bytes_per_s, delay_s=network.delay_s, mtu=network.mtu
    )


# ---- what cannot be emulated


def check(network: Network) -> None:
    """Raises ExecutionError for what is no network."""
    if not 2 <= network.nodes <= MOST_NODES:
        raise ExecutionError(f"emulate: --nodes {network.nodes} is no network; use 2 to {MOST_NODES}")
    if network.ranks_per_node < 1:
        raise ExecutionError(f"emulate: --ranks-per-node {network.ranks_per_node} leaves nodes empty; use 1 or more")
    if not network.rate_bytes_per_s >= 1e3:
        raise ExecutionError("emulate: --rate is below 8 kbit/s, at which nothing arrives; use one such as 1Gbit/s")
    if network.delay_s < 0:
        raise ExecutionError("emulate: --delay is below 0; use 0s or more")
    if not LEAST_MTU <= network.mtu <= MOST_MTU:
        raise ExecutionError(f"emulate: --mtu {network.mtu} is not one of Ethernet; use {LEAST_MTU} to {MOST_MTU}")


def check_machine() -> None:
    """Raises ExecutionError for a machine that cannot have one."""
    if not sys.platform.startswith("linux"):
        raise ExecutionError(f"emulate: {sys.platform} has no network namespaces; use Linux")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ExecutionError(f"emulate: `{tool}` is not installed; install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise ExecutionError("emulate: only root may make network namespaces; run it with sudo")
