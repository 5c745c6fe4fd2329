"""A cluster of one kind of machine from the topology XML that NCCL writes (`NCCL_TOPO_DUMP_FILE`) or is given.

The answer is the tree of figures that a topology's YAML holds, so that every field can be set and every figure has its
source. NCCL's own meaning is kept: all NVSwitches are one switch, bandwidths are those that NCCL counts with, a width
of 0 is 16 lanes, an unknown speed 8 GT/s, a port without speed 10 Gbit/s. Left out: GPUs split into partitions,
`pcilink`, and the extra traffic of GPU pairs below an Intel processor. Latencies, overheads and the network between
the machines are not in the file; they are assumed, and said to be.
Reference: NCCL 2.30.7, src/graph/xml.cc and topo.cc.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moeplan.importers._node_doctor import refuse_errors
from moeplan.importers._node_files import Source, refusal, shown, text_of
from moeplan.importers._node_machine import (
    MAX_GPUS,
    End,
    Finding,
    Machine,
    NodeGpu,
    NodeNic,
    NvLink,
    Slot,
    Socket,
    bus_key,
)
from moeplan.importers._node_topology import Imported, topology_of
from moeplan.importers._node_xml import Element, parse

MAX_LANES = 255
"""What Linux writes for a width that is not known (PCIE_LNK_WIDTH_UNKNOWN in include/linux/pci.h)."""
_CLASSES: tuple[tuple[str, End], ...] = (("0x068001", "cpu"), ("0x03", "gpu"))
_KNOWN = {
    "system": {"cpu"}, "cpu": {"pci", "nic"}, "pci": {"pci", "gpu", "nic", "pcilink"}, "gpu": {"nvlink", "c2c"},
    "nic": {"net"},
}  # fmt: skip


def read(source: Source) -> Imported:
    """The topology that a file of NCCL describes: a path, or its bytes.

    Raises CatalogueError with file, line, element, found, allowed and remedy; also for what `moeplan network doctor`
    calls an error, since such a file does not stand for a machine that can work.
    """
    found = examine(source)
    where = "topology" if isinstance(source, bytes) else str(source)
    refuse_errors(found, where)
    return topology_of(found, where)


def examine(source: Source) -> Machine:
    """What the file says, right or wrong. Raises CatalogueError for what cannot be read."""
    text, where = text_of(source)
    root = parse(text, where)
    if root.name != "system":
        found = f"found <{shown(root.name)[1:-1]}>"
        raise refusal(where, root.line, "root", f"{found}, allowed is <system>; give a topology, not a graph of NCCL")
    if (version := root.whole("version", least=0, most=99, default=1)) != 1:
        raise root.refuse("version", f"found {version}, allowed is 1; dump the topology with a newer NCCL")
    return _Reading().machine(root)


class _Reading:
    """One walk over the elements, which collects what they say."""

    def __init__(self) -> None:
        self.sockets: list[Socket] = []
        self.slots: list[Slot] = []
        self.gpus: list[NodeGpu] = []
        self.nics: list[NodeNic] = []
        self.noticed: list[Finding] = []

    def machine(self, root: Element) -> Machine:
        self._notice_unknown(root)
        for cpu in root.named("cpu"):
            self._cpu(cpu)
        hosts = list(dict.fromkeys(socket.host for socket in self.sockets))
        # GPUs and ports are numbered as the host numbers them, whatever their place in the tree.
        gpus = sorted(self.gpus, key=lambda gpu: (hosts.index(self._host(self.slots[gpu.slot].socket)), gpu.dev))
        nics = sorted(self.nics, key=lambda nic: (hosts.index(self._host(nic.socket)), nic.dev))
        return Machine(
            origin="nccl",
            sockets=tuple(self.sockets),
            slots=tuple(self.slots),
            gpus=self._joined(gpus),
            nics=tuple(nics),
            noticed=tuple(self.noticed),
        )

    def _host(self, socket: int) -> str:
        return self.sockets[socket].host

    def _cpu(self, cpu: Element) -> None:
        self._notice_unknown(cpu)
        numa = cpu.whole("numaid", least=-1, most=4095, default=-1)
        self.sockets.append(
            Socket(
                host=cpu.text("host_hash", ""),
                numa=None if numa < 0 else numa,
                arch=cpu.text("arch", ""),
                vendor=cpu.text("vendor", ""),
                family=cpu.maybe("familyid", least=0, most=2**31),
                model=cpu.maybe("modelid", least=0, most=2**31),
                line=cpu.line,
            )
        )
        for child in cpu.children:
            if child.name == "pci":
                self._pci(child, None)
            elif child.name == "nic":
                self._nic(child, None)

    def _pci(self, pci: Element, parent: int | None) -> None:
        self._notice_unknown(pci)
        here = len(self.slots)
        self.slots.append(
            Slot(
                busid=_busid(pci, "busid"),
                device_class=pci.text("class", "").lower(),
                socket=len(self.sockets) - 1,
                parent=parent,
                vendor=pci.text("vendor", ""),
                device=pci.text("device", ""),
                speed=pci.text("link_speed", ""),
                lanes=pci.whole("link_width", least=0, most=MAX_LANES, default=0),
                line=pci.line,
            )
        )
        for child in pci.children:
            if child.name == "pci":
                self._pci(child, here)
            elif child.name == "gpu":
                self._gpu(child, here)
            elif child.name == "nic":
                self._nic(child, here)

    def _gpu(self, gpu: Element, slot: int) -> None:
        self._notice_unknown(gpu)
        if len(self.gpus) >= MAX_GPUS:
            raise gpu.refuse("dev", f"more than {MAX_GPUS} GPUs, NCCL's limit; give the file of one machine")
        c2c = gpu.named("c2c")
        self.gpus.append(
            NodeGpu(
                dev=gpu.whole("dev", least=0, most=9999),
                slot=slot,
                sm=gpu.whole("sm", least=1, most=9999),
                rank=gpu.maybe("rank", least=-1, most=2**31),
                gdr=_flag(gpu, "gdr"),
                nvlinks=tuple(map(_nvlink, gpu.named("nvlink"))),
                c2c_bytes_per_s=sum(map(_c2c_bytes_per_s, c2c)),
                line=gpu.line,
            )
        )

    def _nic(self, nic: Element, slot: int | None) -> None:
        self._notice_unknown(nic)
        # NCCL itself leaves out a port without `dev`, and one that is only there for in-network reductions.
        for net in nic.named("net"):
            if "dev" in net.attributes and net.whole("net", least=0, most=1, default=1):
                self.nics.append(_net(net, slot, len(self.sockets) - 1))

    def _joined(self, gpus: Sequence[NodeGpu]) -> tuple[NodeGpu, ...]:
        """The GPUs with each NVLink's other end looked up."""
        at: dict[tuple[str, str], int] = {}
        for number, gpu in enumerate(gpus):
            slot = self.slots[gpu.slot]
            at.setdefault((self._host(slot.socket), bus_key(slot.busid)), number)

        def joined(gpu: NodeGpu) -> Iterator[NvLink]:
            host = self._host(self.slots[gpu.slot].socket)
            for link in gpu.nvlinks:
                peer = at.get((host, bus_key(link.target))) if link.end == "gpu" else None
                yield replace(link, peer=peer)

        return tuple(replace(gpu, nvlinks=tuple(joined(gpu))) for gpu in gpus)

    def _notice_unknown(self, element: Element) -> None:
        for child in element.children:
            if child.name not in _KNOWN[element.name]:
                self.noticed.append(_unknown_element(child, element.name))


def _unknown_element(element: Element, parent: str) -> Finding:
    name = shown(element.name)[1:-1]
    return Finding(
        severity="note",
        where=f"<{name}>",
        what=f"NCCL knows no <{name}> in a <{parent}>",
        why="NCCL leaves it out, and so does the import",
        remedy="remove it, or correct its name",
        line=element.line,
    )


def _net(net: Element, slot: int | None, socket: int) -> NodeNic:
    mbit_per_s = net.whole("speed", least=-1, most=80_000_000, default=0)
    if 0 < mbit_per_s < 10:
        raise net.refuse("speed", f"found {mbit_per_s}, allowed are Mbit/s from 10 to 80000000; correct the attribute")
    return NodeNic(
        name=net.text("name", ""),
        dev=net.whole("dev", least=0, most=9999),
        socket=socket,
        slot=slot,
        speed_bytes_per_s=max(0, mbit_per_s) * 1e6 / 8,
        gdr=_flag(net, "gdr"),
        line=net.line,
    )


def _nvlink(link: Element) -> NvLink:
    target_class = link.text("tclass").lower()
    # As in NCCL, a class that is none of these is a switch.
    end: End = next((end for prefix, end in _CLASSES if target_class.startswith(prefix)), "switch")
    return NvLink(target=_busid(link, "target"), end=end, count=link.whole("count", least=1, most=72), line=link.line)


def _c2c_bytes_per_s(c2c: Element) -> float:
    """The file has MB/s of one link, and how many there are."""
    return c2c.whole("bw", least=1, most=10_000_000) * c2c.whole("count", least=1, most=64) * 1e6


def _flag(element: Element, key: str) -> bool | None:
    found = element.maybe(key, least=0, most=255)
    return None if found is None else bool(found)


def _busid(element: Element, key: str) -> str:
    """A bus id in small letters, such as 0000:1b:00.0; a switch out of sight is fffffff:ff:ff.0 or fffffff:ffff:ff."""
    found = element.text(key).lower()
    parts = found.replace(".", ":").split(":")
    if len(parts) not in (3, 4) or not all(part and set(part) <= set("0123456789abcdef") for part in parts):
        raise element.refuse(key, f"found {shown(found)}, allowed is a bus id such as 0000:1b:00.0; correct it")
    return found
