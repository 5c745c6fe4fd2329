"""What looks wrong with the PCIe tree and the sockets of a machine.

NCCL writes what card and port can do (`max_link_speed`, `max_link_width`), not what they have trained to; a slow entry
is a wrong slot or a limited port, and not an idle GPU that saves power.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from moeplan.importers._node_machine import Finding, Machine, Slot, bus_key, repeated
from moeplan.importers._node_rates import gt_per_s, is_spelled_for_nccl, lanes_of, pcie, socket_bytes_per_s


def _slower(machine: Machine) -> Iterator[Finding]:
    """A device whose link has fewer lanes or a lower speed than the best of its like."""
    likes: dict[Hashable, list[int]] = {}
    for number, slot in enumerate(machine.slots):
        if gt_per_s(slot.speed) and lanes_of(slot):
            likes.setdefault(_like(machine, number), []).append(number)
    for members in likes.values():
        best = max(members, key=lambda number: pcie(machine.slots[number]).line_bytes_per_s)
        for number in members:
            here, there = pcie(machine.slots[number]), pcie(machine.slots[best])
            if here.line_bytes_per_s < there.line_bytes_per_s:
                slot = machine.slots[number]
                yield Finding(
                    severity="warning",
                    where=_name(machine, number),
                    what=f"its PCIe link is {_link(slot)}, that of {machine.slots[best].busid} is "
                    f"{_link(machine.slots[best])}",
                    why=f"it carries {here.bandwidth_bytes_per_s / 1e9:.3g} GB/s where its like carries "
                    f"{there.bandwidth_bytes_per_s / 1e9:.3g}, and its peers wait",
                    remedy="look at its slot, riser and bifurcation (`lspci -vv`, LnkCap and LnkSta), and reseat it",
                    line=slot.line,
                )


def _like(machine: Machine, number: int) -> Hashable:
    """What a device is compared with: GPUs with GPUs, else the same device at the same depth."""
    slot = machine.slots[number]
    if any(gpu.slot == number for gpu in machine.gpus):
        return "gpu"
    if any(nic.slot == number for nic in machine.nics):
        return "nic", slot.vendor, slot.device
    return slot.device_class, slot.vendor, slot.device, len(machine.above(number))


def _name(machine: Machine, number: int) -> str:
    gpu = next((n for n, gpu in enumerate(machine.gpus) if gpu.slot == number), None)
    nic = next((n for n, nic in enumerate(machine.nics) if nic.slot == number), None)
    busid = machine.slots[number].busid
    return machine.name_of(gpu) if gpu is not None else f"pci {busid}" if nic is None else machine.nic_name(nic)


def _link(slot: Slot) -> str:
    return f"{gt_per_s(slot.speed):g} GT/s x{slot.lanes}"


def _odd_values(machine: Machine) -> Iterator[Finding]:
    """A speed or width that tells nothing, or that NCCL cannot read."""
    if not machine.has_speeds:
        return
    for number, slot in enumerate(machine.slots):
        speed = slot.speed or ""
        if gt_per_s(speed) is None or lanes_of(slot) is None:
            yield Finding(
                severity="warning",
                where=_name(machine, number),
                what=f"link_speed {speed!r} and link_width {slot.lanes} do not say how fast it is",
                why="NCCL then counts 8 GT/s, and 16 lanes for a width of 0, which may be far from the truth",
                remedy="write both, as in link_speed='32.0 GT/s PCIe' link_width='16' (`lspci -vv`, LnkCap)",
                line=slot.line,
            )
        elif not is_spelled_for_nccl(speed):
            yield Finding(
                severity="note",
                where=_name(machine, number),
                what=f"NCCL cannot read link_speed {speed!r} and counts 8 GT/s; the import takes it as written",
                why="NCCL then plans for another machine than this one",
                remedy=f"write '{gt_per_s(speed):.1f} GT/s PCIe'",
                line=slot.line,
            )


def _same_bus(machine: Machine) -> Iterator[Finding]:
    """Two devices of a host with one bus id."""
    keys = [(machine.sockets[slot.socket].host, bus_key(slot.busid)) for slot in machine.slots]
    for number in repeated(keys):
        slot = machine.slots[number]
        yield Finding(
            severity="error",
            where=f"busid={slot.busid}",
            what="two devices of a host have it",
            why="a bus id is an address; NVLinks to it would lead to either",
            remedy="keep one of them; a file that was put together by hand often has a block twice",
            line=slot.line,
        )


def _without_gpu(machine: Machine) -> Iterator[Finding]:
    """A GPU by its PCI class that has no gpu element."""
    used = {gpu.slot for gpu in machine.gpus}
    for number, slot in enumerate(machine.slots):
        if machine.gpus and slot.device_class.startswith("0x03") and number not in used:
            yield Finding(
                severity="note",
                where=f"pci {slot.busid}",
                what="is a GPU by its class, but has no gpu element",
                why="it is not counted: a job that did not see it, or a display card",
                remedy="dump the topology with all GPUs visible, or leave it",
                line=slot.line,
            )


def _sockets(machine: Machine) -> Iterator[Finding]:
    """A socket without a number, or one of several that NCCL does not know."""
    for socket in machine.sockets if machine.origin == "nccl" else ():
        if socket.numa is None:
            yield Finding(
                severity="note",
                where="<cpu>",
                what="has no numaid, or -1",
                why="the platform does not tell where its devices are, so all distances here may be wrong",
                remedy="give the virtual machine its NUMA layout, or write the numaid yourself",
                line=socket.line,
            )
        several = sum(each.host == socket.host for each in machine.sockets) > 1
        if several and socket_bytes_per_s(socket) is None:
            yield Finding(
                severity="note",
                where=f"<cpu numaid={socket.numa}>",
                what=f"NCCL does not know the processor (arch {socket.arch!r}, vendor {socket.vendor!r})",
                why="it then counts 5000 GB/s between sockets; the import takes 16",
                remedy="write arch and vendor as /proc/cpuinfo has it, or set cluster.links.socket_link.bandwidth",
                line=socket.line,
            )


CHECKS = (_slower, _odd_values, _same_bus, _without_gpu, _sockets)
