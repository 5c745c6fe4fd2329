"""One machine as a topology file describes it: sockets, the PCIe tree, GPUs and NICs; who is how far from whom.

Distances have the words of `nvidia-smi topo -m`: PIX one PCIe switch between the two, PXB several, PHB the processor's
host bridge, NODE two host bridges of one socket, SYS the link between sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
Origin = Literal["nccl", "nvidia-smi"]
End = Literal["gpu", "switch", "cpu"]
FAR = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Distances, the nearest first."""
HOST_BRIDGE = "0x0600"
"""The PCI class of what joins PCIe to a processor; no wire stands for it."""
MAX_GPUS = 576
"""What NCCL itself has room for (NCCL_TOPO_MAX_NODES in NCCL 2.30.7, src/graph/topo.h)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that looks wrong. With an error the file cannot stand for a machine; the rest costs speed or trust."""

    severity: Severity
    where: str
    what: str
    why: str
    remedy: str
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Socket:
    """A NUMA domain of a host, which NCCL calls cpu."""

    host: str
    numa: int | None
    arch: str = ""
    vendor: str = ""
    family: int | None = None
    model: int | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A device of the PCIe tree and the wire from it to what it hangs on. None: the format does not say."""

    busid: str
    device_class: str
    socket: int
    parent: int | None = None
    """The slot above; without one it hangs on the socket."""
    vendor: str = ""
    device: str = ""
    speed: str | None = None
    lanes: int | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NvLink:
    """Parallel NVLinks of a GPU to another GPU, a switch or a processor; `target` is the bus id in the file."""

    target: str
    end: End
    count: int
    peer: int | None = None
    """The GPU at the other end, if the file has it."""
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGpu:
    """A GPU. What a format does not say is None."""

    dev: int
    slot: int
    sm: int | None = None
    rank: int | None = None
    gdr: bool | None = None
    nvlinks: tuple[NvLink, ...] = ()
    c2c_bytes_per_s: float = 0.0
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeNic:
    """A port of a network card. Without a slot it is no PCI device."""

    name: str
    dev: int
    socket: int
    slot: int | None = None
    speed_bytes_per_s: float | None = None
    """0: the file says that the speed is not known. None: the format has no speeds."""
    gdr: bool | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """All that a file says. GPU i and NIC k are the i-th and k-th of their tuples, and called so in a wiring."""

    origin: Origin
    sockets: tuple[Socket, ...]
    slots: tuple[Slot, ...]
    gpus: tuple[NodeGpu, ...]
    nics: tuple[NodeNic, ...]
    product: str = ""
    """What the driver calls the GPUs."""
    noticed: tuple[Finding, ...] = ()
    """What looked wrong while the file was read."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts, in the order of the file."""
        return tuple(dict.fromkeys(socket.host for socket in self.sockets))

    @property
    def has_speeds(self) -> bool:
        """Whether the format tells how fast the PCIe links are."""
        return self.origin == "nccl"

    def host_of(self, gpu: NodeGpu) -> str:
        """The host of a GPU."""
        return self.sockets[self.slots[gpu.slot].socket].host

    def name_of(self, gpu: int) -> str:
        """A GPU in a sentence: `gpu3 (0000:5d:00.0)`."""
        busid = self.slots[self.gpus[gpu].slot].busid
        return f"gpu{gpu} ({busid})" if self.origin == "nccl" else f"gpu{gpu}"

    def nic_name(self, nic: int) -> str:
        """A NIC in a sentence: `nic3 (mlx5_3)`."""
        return f"nic{nic} ({self.nics[nic].name})" if self.nics[nic].name else f"nic{nic}"

    def above(self, slot: int | None) -> list[int]:
        """The slots between a device and its socket, the nearest first."""
        found: list[int] = []
        while slot is not None and (slot := self.slots[slot].parent) is not None:
            found.append(slot)
        return found

    def distance(self, a: NodeGpu | NodeNic, b: NodeGpu | NodeNic) -> str:
        """How far two devices are apart over PCIe and sockets."""
        if self._socket(a) != self._socket(b):
            return "SYS"
        up_a, up_b = self.above(a.slot), self.above(b.slot)
        common = next((slot for slot in up_a if slot in up_b), None)
        if common is None:
            bridges = [self.slots[slot].device_class.startswith(HOST_BRIDGE) for slot in (*up_a, *up_b)]
            return "NODE" if any(bridges) else "PHB"
        if self.slots[common].device_class.startswith(HOST_BRIDGE):
            return "PHB"
        return "PIX" if up_a.index(common) == up_b.index(common) == 0 else "PXB"

    def _socket(self, device: NodeGpu | NodeNic) -> int:
        return device.socket if isinstance(device, NodeNic) else self.slots[device.slot].socket

    def reach(self, gpu: int, nic: int) -> str:
        """The distance of a GPU and a NIC; C2C where the GPU is joined to its processor by more than PCIe."""
        found = self.distance(self.gpus[gpu], self.nics[nic])
        return "C2C" if self.gpus[gpu].c2c_bytes_per_s and found in ("PHB", "NODE") else found

    def serving_nics(self) -> tuple[int | None, ...]:
        """The NIC that serves each GPU: among the nearest that with its own number, else number g modulo how many."""
        return tuple(map(self._nearest_nic, range(len(self.gpus))))

    def _nearest_nic(self, gpu: int) -> int | None:
        host = self.host_of(self.gpus[gpu])
        usable = [k for k, nic in enumerate(self.nics) if self.sockets[nic.socket].host == host]
        far = {nic: FAR.index(self.distance(self.gpus[gpu], self.nics[nic])) for nic in usable}
        least = min(far.values(), default=0)
        near = [nic for nic in usable if far[nic] == least]
        return None if not near else gpu if gpu in near else near[gpu % len(near)]

    def links_to(self, gpu: int, end: End) -> int:
        """How many NVLinks a GPU has to switches, to other GPUs or to processors."""
        return sum(link.count for link in self.gpus[gpu].nvlinks if link.end == end)

    def direct_links(self, gpu: int) -> dict[int, int]:
        """How many NVLinks a GPU has to each other GPU of the file."""
        found: dict[int, int] = {}
        for link in self.gpus[gpu].nvlinks:
            if link.peer is not None:
                found[link.peer] = found.get(link.peer, 0) + link.count
        return found

    def all_links(self, gpu: int) -> int:
        """How many NVLinks a GPU has."""
        return sum(link.count for link in self.gpus[gpu].nvlinks)


def bus_key(busid: str) -> str:
    """A bus id without what differs between programs: case, and zeros before the domain."""
    return busid.lower().lstrip("0")


def repeated(keys: Iterable[object]) -> list[int]:
    """The numbers of those that stood there before."""
    seen: set[object] = set()
    found = []
    for number, key in enumerate(keys):
        if key in seen:
            found.append(number)
        seen.add(key)
    return found
