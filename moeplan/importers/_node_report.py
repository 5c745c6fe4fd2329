"""What a topology file says, as one document for a screen and for other programs: devices, links, findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeplan.importers import nccl_topology, nvidia_smi_topo
from moeplan.importers._node_doctor import findings
from moeplan.importers._node_files import Source, text_of
from moeplan.importers._node_machine import Machine, NodeGpu
from moeplan.importers._node_rates import (
    NO_NET_SPEED_BYTES_PER_S,
    UNKNOWN_SOCKET_BYTES_PER_S,
    Product,
    nvlink_bytes_per_s,
    pcie,
    product_of,
    socket_bytes_per_s,
)
from moeplan.importers._node_topology import topology_of

SCHEMA = "moeplan.network-doctor/v1"


def examined(source: Source) -> Machine:
    """The machine of a file in either format, told apart by how it starts. Raises CatalogueError."""
    text, _ = text_of(source)
    is_xml = text.lstrip().startswith("<")
    return nccl_topology.examine(source) if is_xml else nvidia_smi_topo.examine(source)


def report(source: Source) -> dict[str, Any]:
    """The document: sockets, PCIe tree, GPUs, NICs, how each pair of GPUs is joined, findings, what an import assumes.

    Bandwidths are what NCCL counts with, per direction. Raises CatalogueError for a file that cannot be read.
    """
    machine = examined(source)
    product, told = product_of(machine)
    found, serving = findings(machine), machine.serving_nics()
    is_whole = all(finding.severity != "error" for finding in found)
    return {
        "schema": SCHEMA,
        "file": "topology" if isinstance(source, bytes) else str(source),
        "format": {"nccl": "NCCL topology XML", "nvidia-smi": "nvidia-smi topo -m"}[machine.origin],
        "gpu": {"sheet": product.sheet or None, "because": told},
        "sockets": [_socket(machine, number) for number in range(len(machine.sockets))],
        "pcie": [_slot(machine, number, product) for number in range(len(machine.slots))],
        "gpus": [_gpu(machine, number, serving[number]) for number in range(len(machine.gpus))],
        "nics": [_nic(machine, number, serving) for number in range(len(machine.nics))],
        **_pairs(machine, product),
        "findings": [asdict(finding) for finding in found],
        "assumptions": list(topology_of(machine, "").assumptions) if is_whole else [],
    }


def _socket(machine: Machine, number: int) -> dict[str, Any]:
    socket = machine.sockets[number]
    between = socket_bytes_per_s(socket)
    several = sum(each.host == socket.host for each in machine.sockets) > 1
    return {
        "name": f"socket{number}",
        "host": socket.host,
        "numa": socket.numa,
        "arch": socket.arch,
        "vendor": socket.vendor,
        "to_other_sockets_bytes_per_s": (between or UNKNOWN_SOCKET_BYTES_PER_S) if several else None,
        "line": socket.line,
    }


def _slot(machine: Machine, number: int, product: Product) -> dict[str, Any]:
    slot, found = machine.slots[number], pcie(machine.slots[number], product.pcie_gt_per_s)
    holds = [f"gpu{n}" for n, gpu in enumerate(machine.gpus) if gpu.slot == number]
    holds += [f"nic{n}" for n, nic in enumerate(machine.nics) if nic.slot == number]
    return {
        "busid": slot.busid,
        "holds": holds,
        "class": slot.device_class,
        "socket": f"socket{slot.socket}",
        "depth": len(machine.above(number)),
        "link_speed": slot.speed,
        "link_width": slot.lanes,
        "bandwidth_bytes_per_s": found.bandwidth_bytes_per_s,
        "line": slot.line,
    }


def _gpu(machine: Machine, number: int, nic: int | None) -> dict[str, Any]:
    gpu, slot = machine.gpus[number], machine.slots[machine.gpus[number].slot]
    return {
        "name": f"gpu{number}",
        "dev": gpu.dev,
        "busid": slot.busid,
        "sm": gpu.sm,
        "device": slot.device or None,
        "socket": f"socket{slot.socket}",
        "gdr": gpu.gdr,
        "nvlinks": machine.all_links(number),
        "c2c_bytes_per_s": gpu.c2c_bytes_per_s or None,
        "nic": None if nic is None else f"nic{nic}",
        "nic_distance": None if nic is None else machine.reach(number, nic),
        "line": gpu.line,
    }


def _nic(machine: Machine, number: int, serving: Sequence[int | None]) -> dict[str, Any]:
    nic = machine.nics[number]
    speed = nic.speed_bytes_per_s
    return {
        "name": f"nic{number}",
        "device": nic.name,
        "busid": None if nic.slot is None else machine.slots[nic.slot].busid,
        "socket": f"socket{nic.socket}",
        "speed_bytes_per_s": NO_NET_SPEED_BYTES_PER_S if speed == 0 else speed,
        "gdr": nic.gdr,
        "serves": [f"gpu{gpu}" for gpu, nearest in enumerate(serving) if nearest == number],
        "line": nic.line,
    }


def _pairs(machine: Machine, product: Product) -> dict[str, Any]:
    """Two square tables over the GPUs: how each pair is joined, and the bandwidth of that way."""
    gpus = range(len(machine.gpus))
    switched = [machine.links_to(gpu, "switch") for gpu in gpus]
    direct = [machine.direct_links(gpu) for gpu in gpus]
    pairs = [
        [_pair(machine, a, b, direct[a].get(b) or min(switched[a], switched[b]), product) for b in gpus] for a in gpus
    ]
    return {
        "links": [[word for word, _ in row] for row in pairs],
        "bandwidth_bytes_per_s": [[rate for _, rate in row] for row in pairs],
    }


def _pair(machine: Machine, a: int, b: int, nvlinks: int, product: Product) -> tuple[str, float | None]:
    """`NV18` and what it carries; over PCIe the distance, and the narrowest wire on the way."""
    one, other = machine.gpus[a], machine.gpus[b]
    if a == b:
        return "X", None
    if nvlinks:
        return f"NV{nvlinks}", nvlinks * nvlink_bytes_per_s(one.sm or product.sm)
    if machine.host_of(one) != machine.host_of(other):
        return "none", None
    return machine.distance(one, other), min(_way(machine, one, other, product), _way(machine, other, one, product))


def _way(machine: Machine, one: NodeGpu, other: NodeGpu, product: Product) -> float:
    """The narrowest wire between a device and the place where its way meets that of another."""
    above = set(machine.above(other.slot))
    climbed = [one.slot]
    for slot in machine.above(one.slot):
        if slot in above:
            break
        climbed.append(slot)
    rates = [pcie(machine.slots[slot], product.pcie_gt_per_s).bandwidth_bytes_per_s for slot in climbed]
    socket = machine.slots[one.slot].socket
    if socket != machine.slots[other.slot].socket:
        rates.append(socket_bytes_per_s(machine.sockets[socket]) or UNKNOWN_SOCKET_BYTES_PER_S)
    return min(rates)
