"""A network on one machine: it is there, ranks train over it as over any other, and then it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import moeplan as mp
from moeplan import catalogue
from moeplan.domain.plan import Plan
from moeplan.emulator import emulate as emulator
from moeplan.emulator import namespaces
from moeplan.emulator.emulate import Network, emulated
from moeplan.emulator.topology import goodput_share, write_topology
from moeplan.errors import ExecutionError

MOST_S = 30.0
TWO = Network(nodes=2, rate_bytes_per_s=125e6)


def lacks() -> str | None:
    """Why this machine can have no network."""
    try:
        emulator.check_machine()
        namespaces.add("moeplan-1-1-trial")
    except ExecutionError as error:
        return str(error)
    namespaces.remove("moeplan-1-1-trial")
    return None


REASON = lacks()
real = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---- the topology


def test_what_headers_leave_is_what_was_measured_over_token_buckets() -> None:
    """0.956 and 0.993 of 1 Gbit/s by one flow of reno, at MTUs of 1500 and 9000."""
    assert goodput_share(1500) == pytest.approx(0.956, abs=1e-3)
    assert goodput_share(9000) == pytest.approx(0.993, abs=1e-3)


def test_the_topology_is_the_network(tmp_path: Path) -> None:
    network = Network(nodes=3, rate_bytes_per_s=25e6, delay_s=2e-4, ranks_per_node=2, mtu=9000)
    cluster = mp.load("tiny-moe-2-ranks", {"cluster": str(write_topology(network, tmp_path / "net.yaml"))}).cluster
    assert (cluster.num_nodes, cluster.gpus_per_node) == (3, 2)
    assert cluster.path_bandwidth_bytes_per_s([0], [2])[0] == pytest.approx(25e6 * goodput_share(9000), rel=1e-4)
    assert 2e-4 < cluster.path_latency_s([0], [2])[0] < 3e-4
    assert cluster.path_latency_s([0], [1])[0] < 1e-4


# ---- what is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nodes": 1}, "--nodes 1 is no network; use 2 to 64"),
    ({"ranks_per_node": 0}, "--ranks-per-node 0 leaves nodes empty; use 1 or more"),
    ({"rate_bytes_per_s": 0.0}, "--rate is below 8 kbit/s"),
    ({"delay_s": -1.0}, "--delay is below 0"),
    ({"mtu": 100}, "--mtu 100 is not one of Ethernet; use 1280 to 9000"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_no_network_is_refused(changes: dict[str, Any], words: str) -> None:
    with (
        pytest.raises(ExecutionError, match=words),
        emulated(Network(**{"nodes": 2, "rate_bytes_per_s": 1e6} | changes)),
    ):
        pass


def test_a_machine_that_cannot_is_told_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator.sys, "platform", "linux")
    monkeypatch.setattr(emulator.shutil, "which", lambda tool: None if tool == "tc" else "/sbin/ip")
    with pytest.raises(ExecutionError, match="`tc` is not installed; install iproute2"), emulated(TWO):
        pass
    monkeypatch.setattr(emulator.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(emulator.os, "geteuid", lambda: 1000)
    with pytest.raises(ExecutionError, match="only root may make network namespaces; run it with sudo"), emulated(TWO):
        pass
    monkeypatch.setattr(emulator.sys, "platform", "darwin")
    with pytest.raises(ExecutionError, match="darwin has no network namespaces; use Linux"), emulated(TWO):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "1Gb/s", "--", "execute", "x"], "write 'Gbit' or 'GB'"),
        (["--rate", "1Gbit/s"], "no command is given"),
        (["--rate", "1Gbit/s", "--delay", "3", "--", "list"], "--delay: '3' is not a number and a unit"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(words: list[str], said: str) -> None:
    done = moeplan("emulate", "--nodes", "2", *words)
    assert done.returncode == 2
    assert said in done.stderr


def moeplan(*words: str) -> subprocess.CompletedProcess[str]:
    code = "from moeplan.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_the_topology_alone_needs_no_root(tmp_path: Path) -> None:
    done = moeplan("emulate", "--nodes", "2", "--rate", "10Gbit/s", "--topology", str(tmp_path / "net.yaml"))
    assert done.returncode == 0, done.stderr
    assert catalogue.load("tiny-moe-2-ranks", changes={"cluster": str(tmp_path / "net.yaml")}).cluster.num_nodes == 2


# ---- the network


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("moeplan-*")]


@real
def test_it_is_there_in_the_block_and_gone_behind_it(own_folder: Path) -> None:
    prefix = namespaces.prefix_of(os.getpid())

    def use() -> None:
        with emulated(TWO) as file:
            assert file.is_file()
            assert namespaces.made(prefix) == [f"{prefix}0", f"{prefix}1", f"{prefix}switch"]
            assert "rate 1Gbit" in namespaces.run("tc", "-n", f"{prefix}1", "class", "show", "dev", "eth0")
            with pytest.raises(ExecutionError, match="has a network already"), emulated(TWO):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert namespaces.made(prefix) == []
    assert left(own_folder) == []


@real
def test_a_delay_that_the_kernel_cannot_give_is_refused() -> None:
    name = namespaces.add(f"{namespaces.prefix_of(os.getpid())}trial")
    can = namespaces.can_delay(name)
    namespaces.remove(namespaces.prefix_of(os.getpid()))
    if can:
        pytest.skip("this kernel has netem")
    words = "--delay 200us: this kernel cannot delay packets, as it has no netem; leave --delay out"
    with pytest.raises(ExecutionError, match=words), emulated(Network(nodes=2, rate_bytes_per_s=1e6, delay_s=2e-4)):
        pass
    assert namespaces.made(namespaces.prefix_of(os.getpid())) == []


@real
def test_what_a_dead_run_has_left_is_removed_by_the_next() -> None:
    """Also where its number belongs to another process now, such as this one."""
    names = ["moeplan-99999999-5-0", f"moeplan-{os.getpid()}-1-0"]
    for name in names:
        namespaces.add(name)
    with emulated(TWO):
        pass
    assert not [name for name in names if (Path("/run/netns") / name).exists()]


def is_alive(process: int) -> bool:
    """One that has ended and that nobody has asked after is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HOLD = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job has not
from moeplan.emulator.emulate import Network, emulated
with emulated(Network(nodes=2, rate_bytes_per_s=1e8)):
    import subprocess
    from moeplan.executor.launch import NODES
    inside = ["ip", "netns", "exec", NODES.get()[0], "sh", "-c", "echo up; exec sleep 300"]
    subprocess.Popen(inside, start_new_session=True)
    time.sleep(300)
"""


@real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_namespace_no_process_and_no_file(number: signal.Signals, own_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    prefix = namespaces.prefix_of(process.pid)
    inside = [int(pid) for pid in namespaces.run("ip", "netns", "pids", f"{prefix}0").split()]
    assert inside
    process.send_signal(number)
    process.communicate(timeout=MOST_S)
    until_s = time.monotonic() + MOST_S
    while (namespaces.made(prefix) or left(own_folder)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert namespaces.made(prefix) == []
    assert left(own_folder) == []
    assert not [pid for pid in inside if is_alive(pid)]


@real
def test_a_plan_trains_over_it_as_it_does_over_the_loopback_device() -> None:
    with emulated(TWO) as file:
        given = catalogue.load("tiny-moe-2-ranks", changes={"cluster": str(file), "workload.sequence": 16})
        plan = Plan(dp=2, ep=2, stages=(4,), precision=given.choices.precision)
        over_it = mp.execute(given, plan, steps=2, device="cpu")
    plain = catalogue.load("tiny-moe-2-ranks", changes={"workload.sequence": 16})
    beside = mp.execute(plain, plan, steps=2, device="cpu")
    assert over_it.losses == beside.losses
    assert sorted(over_it.sent_bytes.tolist()) == sorted(beside.sent_bytes.tolist())
