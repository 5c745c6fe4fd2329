"""What looks wrong with the NICs of a machine and their way to the GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from moeplan.importers._node_machine import Finding, Machine, repeated
from moeplan.importers._node_rates import gt_per_s, lanes_of, pcie


def _none(machine: Machine) -> Iterator[Finding]:
    if machine.gpus and not machine.nics:
        yield Finding(
            severity="note",
            where="the whole file",
            what="there is no NIC in it",
            why="a cluster of it has one node",
            remedy="dump the topology in a job on two machines if there is a network, or add nic and fabric yourself",
        )


def _far(machine: Machine) -> Iterator[Finding]:
    """A NIC on another socket than every GPU of its host."""
    on_sockets = [machine.slots[gpu.slot].socket for gpu in machine.gpus]
    for number, nic in enumerate(machine.nics):
        host = machine.sockets[nic.socket].host
        gpus = [socket for socket in on_sockets if machine.sockets[socket].host == host]
        if gpus and nic.socket not in gpus:
            yield Finding(
                severity="warning",
                where=machine.nic_name(number),
                what=f"is on another socket than all {len(gpus)} GPUs of its host",
                why="everything it sends crosses the link between the sockets, which is slow and shared",
                remedy="move the card to a slot of the GPUs' socket, or give the GPUs to both sockets",
                line=nic.line,
            )


def _indirect(machine: Machine) -> Iterator[Finding]:
    """A GPU whose nearest NIC is behind the processor."""
    for number, nic in enumerate(machine.serving_nics()):
        if nic is not None and (far := machine.reach(number, nic)) in ("PHB", "NODE", "SYS"):
            yield Finding(
                severity="warning",
                where=machine.name_of(number),
                what=f"no switch joins it with its nearest NIC, {machine.nic_name(nic)}; the way is {far}",
                why="the bytes go through the processor, and NCCL by default does not use GPUDirect RDMA beyond PXB",
                remedy="put GPU and NIC below one PCIe switch; or set NCCL_NET_GDR_LEVEL=SYS, and measure",
                line=machine.gpus[number].line,
            )


def _shared(machine: Machine) -> Iterator[Finding]:
    """A NIC that serves several GPUs."""
    users: dict[int, list[int]] = {}
    for gpu, nic in enumerate(machine.serving_nics()):
        if nic is not None:
            users.setdefault(nic, []).append(gpu)
    for nic, gpus in sorted(users.items()):
        if len(gpus) > 1:
            names = ", ".join(f"gpu{gpu}" for gpu in gpus[:8]) + (", ..." if gpus[8:] else "")
            yield Finding(
                severity="note",
                where=machine.nic_name(nic),
                what=f"is the NIC of {len(gpus)} GPUs: {names}",
                why=f"each has 1/{len(gpus)} of its speed when all send",
                remedy="add cards if exchanges between machines bind; else leave it",
                line=machine.nics[nic].line,
            )


def _no_gdr(machine: Machine) -> Iterator[Finding]:
    """gdr=0: no direct access between NIC and GPU memory."""
    ends = [(machine.name_of(n), gpu.gdr, gpu.line) for n, gpu in enumerate(machine.gpus)]
    ends += [(machine.nic_name(n), nic.gdr, nic.line) for n, nic in enumerate(machine.nics)]
    for where, gdr, line in ends:
        if gdr is False and machine.nics:
            yield Finding(
                severity="warning",
                where=where,
                what="has gdr=0: no GPUDirect RDMA",
                why="every message between machines is copied through host memory",
                remedy="load nvidia-peermem, or use a kernel and driver with DMA-BUF; check ACS and the IOMMU",
                line=line,
            )


def _slot_too_slow(machine: Machine) -> Iterator[Finding]:
    """A card whose ports together are faster than its slot."""
    ports: dict[int, list[int]] = {}
    for number, nic in enumerate(machine.nics):
        if nic.slot is not None and nic.speed_bytes_per_s:
            ports.setdefault(nic.slot, []).append(number)
    for slot, numbers in ports.items():
        here = machine.slots[slot]
        speed = sum(machine.nics[number].speed_bytes_per_s or 0.0 for number in numbers)
        if not gt_per_s(here.speed) or lanes_of(here) is None or speed <= pcie(here).line_bytes_per_s:
            continue
        line_gbit = pcie(here).line_bytes_per_s * 8 / 1e9
        yield Finding(
            severity="warning",
            where=machine.nic_name(numbers[0]),
            what=f"{len(numbers)} port{'s' if numbers[1:] else ''} of {speed * 8 / 1e9:g} Gbit/s in all, in a slot of "
            f"{line_gbit:.0f} ({gt_per_s(here.speed):g} GT/s x{here.lanes})",
            why="the slot holds the card up",
            remedy="move the card to a slot with more lanes or a higher speed",
            line=machine.nics[numbers[0]].line,
        )


def _speeds(machine: Machine) -> Iterator[Finding]:
    """A port without a speed, or slower than its like."""
    best: dict[object, float] = {}
    for nic in machine.nics:
        like = _like(machine, nic.slot)
        best[like] = max(best.get(like, 0.0), nic.speed_bytes_per_s or 0.0)
    for number, nic in enumerate(machine.nics):
        speed, most = nic.speed_bytes_per_s, best[_like(machine, nic.slot)]
        if speed == 0:
            yield Finding(
                severity="warning",
                where=machine.nic_name(number),
                what="has no speed, or 0",
                why="NCCL then counts 10 Gbit/s, and so does the import; a port that is down has no speed",
                remedy="bring the port up (`ibstat`, `ethtool`), or write speed in Mbit/s",
                line=nic.line,
            )
        elif speed is not None and nic.slot is not None and speed < most:
            yield Finding(
                severity="warning",
                where=machine.nic_name(number),
                what=f"has {speed * 8 / 1e9:g} Gbit/s, the same card elsewhere {most * 8 / 1e9:g}",
                why="its rail is slower than the others, and collectives go at the pace of the slowest",
                remedy="look at cable, transceiver and switch port (`ibstat`, `mlxlink`)",
                line=nic.line,
            )


def _like(machine: Machine, slot: int | None) -> object:
    return None if slot is None else (machine.slots[slot].vendor, machine.slots[slot].device)


def _same_number(machine: Machine) -> Iterator[Finding]:
    """Two ports of a host with one number."""
    for number in repeated((machine.sockets[nic.socket].host, nic.dev) for nic in machine.nics):
        nic = machine.nics[number]
        yield Finding(
            severity="error",
            where=f"net dev={nic.dev}",
            what="two ports of a host have it",
            why="NCCL calls ports by this number; one of the two would never be used",
            remedy="keep one of them, or number them anew",
            line=nic.line,
        )


CHECKS = (_none, _far, _indirect, _shared, _no_gdr, _slot_too_slow, _speeds, _same_number)
