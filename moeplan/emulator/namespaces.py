"""Network namespaces as nodes: made, found again, and removed. What `ip` and `tc` of iproute2 do, in a few words each.

The nodes of a run are called `moeplan-PID-START-NUMBER`, after the process that made them and when that was started: so
what a dead run has left is known by its name, also where its number has been given to another process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moeplan.errors import ExecutionError
from moeplan.executor.launch import PORT

_RUN = Path("/run/netns")
_NAME = re.compile(r"moeplan-(\d+)-(\d+)-")
_QUEUE_BYTES = 1_000_000
"""What a port of the switch holds before it drops: 8 ms at 1 Gbit/s; cheap switches have 1 to 4 MB for all ports."""
_MOST_PACKETS = 100_000
"""What netem holds: 1.2 s of full frames at 1 Gbit/s."""
_TCP = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": 0}
"""BBR, often the kernel's default, measures a rate, which token buckets make it misread; reno fills a limited link
evenly (0.956 of 1 Gbit/s both ways, where BBR had 0.936). And a link that was idle while ranks computed is as fast as
before, as on the networks that this stands for."""
_LATE_S = 0.5e-3
"""What the kernel's timers may be late without a loss of rate: what could have been sent meanwhile is made up for.
Without it 1 Gbit/s lost a tenth on a busy machine."""
_LEAST_BURST_BYTES = 3_200
"""Two frames."""
_QUANTUM_BYTES = 65_536
"""What htb lets one class send at a time, only to have one: there is one class. A segmented packet is up to 64 KiB."""


def run(*words: object) -> str:
    """What a command says. Raises ExecutionError with its own words if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[0] if said else f"status {done.returncode}"
        raise ExecutionError(f"emulate: `{' '.join(map(str, words))}` failed: {reason}; see whether it works by hand")
    return done.stdout


def prefix_of(process: int) -> str:
    """What the names of a process's namespaces begin with. Raises OSError for a process that is no more."""
    start = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return f"moeplan-{process}-{start}-"


def made(prefix: str) -> list[str]:
    """The namespaces that there are of a run."""
    return sorted(path.name for path in _RUN.glob(f"{prefix}*"))


def remove(prefix: str) -> None:
    """Ends what runs in a run's namespaces, and removes them; cables and queues go with them."""
    for name in made(prefix):
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in pids.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def remove_those_of_the_dead() -> None:
    """What runs have left that were killed together with their watch."""
    for path in list(_RUN.glob("moeplan-*")):
        if (match := _NAME.match(path.name)) and not _is_alive(match):
            remove(match.group())


def _is_alive(match: re.Match[str]) -> bool:
    try:
        return prefix_of(int(match[1])) == match.group()
    except OSError:
        return False


def build(prefix: str, *, nodes: int, rate_bytes_per_s: float, delay_s: float, mtu: int) -> list[str]:
    """Nodes on one switch, each on a cable of so many bytes per second in each direction; their names."""
    switch = add(f"{prefix}switch")
    run("ip", "-n", switch, "link", "add", "bridge", "mtu", mtu, "type", "bridge")
    run("ip", "-n", switch, "link", "set", "bridge", "up")
    names = [add(f"{prefix}{number}") for number in range(nodes)]
    for number, name in enumerate(names):
        port = f"port{number}"
        run("ip", "-n", name, "link", "add", PORT, "mtu", mtu, "type", "veth", "peer", "name", port, "mtu", mtu,
            "netns", switch)  # fmt: skip
        run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        run("ip", "-n", name, "address", "add", f"10.0.0.{number + 1}/24", "dev", PORT)
        run("ip", "-n", name, "link", "set", PORT, "up")
        _limit(name, PORT, rate_bytes_per_s)
        _limit(switch, port, rate_bytes_per_s)
        _end_of_queue(switch, port, delay_s)
    return names


def add(name: str) -> str:
    """A namespace with its loopback device."""
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "set", "lo", "up")
    for setting, value in _TCP.items():
        run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{setting}")
    return name


def _limit(name: str, device: str, rate_bytes_per_s: float) -> None:
    rate, burst = f"{round(8 * rate_bytes_per_s)}bit", max(round(_LATE_S * rate_bytes_per_s), _LEAST_BURST_BYTES)
    run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    run("tc", "-n", name, "class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb", "rate", rate,
        "burst", burst, "cburst", burst, "quantum", _QUANTUM_BYTES)  # fmt: skip


def _end_of_queue(name: str, device: str, delay_s: float) -> None:
    """What waits at a port of the switch: so much, or all that is on its way for `delay_s`."""
    delay = ("netem", "delay", f"{delay_s * 1e6:.0f}us", "limit", _MOST_PACKETS)
    what = delay if delay_s else ("bfifo", "limit", _QUEUE_BYTES)
    run("tc", "-n", name, "qdisc", "add", "dev", device, "parent", "1:1", "handle", "2:", *what)


def can_delay(name: str) -> bool:
    """Whether the kernel has netem, asked in a namespace of ours."""
    words = ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return _worked(words) and _worked(["tc", "-n", name, "qdisc", "delete", "dev", "lo", "root"])


def _worked(words: Sequence[str]) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0
