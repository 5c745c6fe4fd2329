"""The wires of a machine as a topology's YAML writes them, and the kinds of link that they use.

Latencies and efficiencies are assumed, with the values that the catalogue's hgx-h100-rail and p3.16xlarge state; a
crossing of a PCIe switch is two wires here and one there, so each has half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeplan.importers._node_machine import HOST_BRIDGE, Machine
from moeplan.importers._node_rates import (
    NO_NET_SPEED_BYTES_PER_S,
    UNBOUND_BYTES_PER_S,
    UNKNOWN_SOCKET_BYTES_PER_S,
    Product,
    gt_per_s,
    lanes_of,
    nvlink_bytes_per_s,
    pcie,
    socket_bytes_per_s,
)

Figure = dict[str, Any]
_SWITCHED = (
    "all-to-all of 8 GPUs reached 318 of the 371 GB/s that NCCL counts for an H100 and 203 of 240 for an A100 "
    "(AIConfigurator 0.12.0, nccl_perf tables)"
)


def figure(value: object, source: str, note: str = "") -> Figure:
    """A figure as a catalogue file writes it."""
    return {"value": value, "source": source} | ({"note": note} if note else {})


def rate(bytes_per_s: float) -> str:
    """`48 GB/s`, with all the figures that there are."""
    return f"{bytes_per_s / 1e9:.9g} GB/s"


def nic_bytes_per_s(machine: Machine, product: Product) -> float:
    """The speed of the fastest NIC; what a vendor's own machines have, where no speed is told."""
    told = [nic.speed_bytes_per_s for nic in machine.nics if nic.speed_bytes_per_s is not None]
    return max((speed or NO_NET_SPEED_BYTES_PER_S for speed in told), default=product.nic_gbit_per_s * 1e9 / 8)


@dataclass(slots=True)
class Wires:
    """The wires of a machine, drawn one after the other: from, to, link, count."""

    machine: Machine
    product: Product
    is_guess: bool
    """Whether the product is one."""
    links: dict[str, dict[str, Figure]] = field(default_factory=dict)
    drawn: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)

    def draw(self) -> Wires:
        """All wires: NVLink, from chip to chip, PCIe, sockets."""
        for gpu in range(len(self.machine.gpus)):
            self._nvlink(gpu)
            self._to_processor(gpu)
        names = _slot_names(self.machine)
        for slot, name in names.items():
            self._pcie(slot, name, names)
        for nic in range(len(self.machine.nics)):
            self._port(nic, names)
        self._sockets()
        return self

    def short(self) -> list[dict[str, Any]]:
        """The wiring, with one line for all GPUs where all hang on the NVSwitch alike."""
        wires = [(*ends, *wire) for ends, wire in self.drawn.items()]
        switched = [wire for wire in wires if wire[1] == "nvswitch"]
        if len(switched) == len(self.machine.gpus) > 1 and len({wire[2:] for wire in switched}) == 1:
            wires = [("gpu*", *switched[0][1:]), *(wire for wire in wires if wire[1] != "nvswitch")]
        return [
            {"from": start, "to": end, "link": link} | ({"count": count} if count > 1 else {})
            for start, end, link, count in wires
        ]

    def _wire(self, start: str, end: str, link: str, figures: Mapping[str, Figure], count: int = 1) -> None:
        """A wire of this kind; a kind of the same name with other figures gets a number."""
        name, number = link, 1
        while self.links.setdefault(name, dict(figures)) != figures:
            number += 1
            name = f"{link}_{number}"
        self.drawn[start, end] = name, count

    def _nvlink(self, gpu: int) -> None:
        bandwidth = self._nvlink_bandwidth(self.machine.gpus[gpu].sm)
        latency = figure("0.45 us", "assumed", "half of a step of NCCL's gathers among the GPUs of an H100 machine")
        hop = figure("2 us", "assumed", "one direct hop, a flag written and seen")
        efficiency = figure("85 %", "assumed", _SWITCHED)
        if count := self.machine.links_to(gpu, "switch"):
            figures = {"bandwidth": bandwidth, "latency": latency, "efficiency": efficiency}
            self._wire(f"gpu{gpu}", "nvswitch", "nvlink", figures, count)
        for other, count in sorted(self.machine.direct_links(gpu).items()):
            if gpu < other:
                figures = {"bandwidth": bandwidth, "latency": hop}
                self._wire(f"gpu{gpu}", f"gpu{other}", "nvlink_direct", figures, count)

    def _nvlink_bandwidth(self, told: int | None) -> Figure:
        sm = told or self.product.sm
        note = "per link and direction, NCCL's for " + (
            f"compute capability {sm // 10}.{sm % 10}" if sm else "most GPUs"
        )
        if told or (sm and not self.is_guess):
            return figure(rate(nvlink_bytes_per_s(sm)), "nccl", note)
        return figure(rate(nvlink_bytes_per_s(sm)), "assumed", f"{note}; set it together with cluster.gpu")

    def _to_processor(self, gpu: int) -> None:
        """A link from chip to chip, or NVLinks to the processor (POWER9)."""
        device = self.machine.gpus[gpu]
        nvlinks = self.machine.links_to(gpu, "cpu") * nvlink_bytes_per_s(device.sm or self.product.sm)
        if bandwidth := device.c2c_bytes_per_s or nvlinks:
            figures = {
                "bandwidth": figure(rate(bandwidth), "nccl", "per direction, all links of a GPU together"),
                "latency": figure("0.5 us", "assumed", "one hop from chip to chip"),
            }
            self._wire(f"gpu{gpu}", f"socket{self.machine.slots[device.slot].socket}", "c2c", figures)

    def _pcie(self, slot: int, name: str, names: Mapping[int, str]) -> None:
        """The wire from a slot to what it hangs on; none beside a faster one between the same two."""
        here = self.machine.slots[slot]
        parent = next((names[each] for each in self.machine.above(slot) if each in names), f"socket{here.socket}")
        if (name, parent) in self.drawn:
            return
        found = pcie(here, self.product.pcie_gt_per_s)
        source, told = "nccl", "per direction, as NCCL counts; the packets' overhead is already off"
        if not self.machine.has_speeds:
            source, told = "assumed", f"{told}; generation and lanes are the GPU's own, the table has none"
        elif gt_per_s(here.speed) is None or lanes_of(here) is None:
            told = f"{told}; the file does not tell speed and lanes, and this is what NCCL then takes"
        limit = self._limit(int(name[3:])) if name.startswith("nic") else None
        bandwidth, kind = found.bandwidth_bytes_per_s, found.name
        if limit is not None and limit < bandwidth:
            bandwidth, kind = limit, f"{kind}_{_gbit(limit)}"
            told = f"{told}; the port's {limit * 8 / 1e9:g} Gbit/s, less than the slot's"
        figures = {
            "bandwidth": figure(rate(bandwidth), source, told),
            "latency": figure("0.25 us", "assumed", "half of one crossing of a PCIe switch"),
        }
        self._wire(name, parent, kind, figures)

    def _limit(self, nic: int) -> float | None:
        """The speed of a NIC that is slower than the fastest: a cluster has one kind, so its own wire holds it up."""
        speed = self.machine.nics[nic].speed_bytes_per_s
        if speed is None or (speed or NO_NET_SPEED_BYTES_PER_S) >= nic_bytes_per_s(self.machine, self.product):
            return None
        return speed or NO_NET_SPEED_BYTES_PER_S

    def _port(self, nic: int, names: Mapping[int, str]) -> None:
        """The wire of a port on a card with several, or of one that is no PCI device."""
        device = self.machine.nics[nic]
        holder = f"socket{device.socket}" if device.slot is None else names[device.slot]
        if holder == f"nic{nic}":
            return
        limit = self._limit(nic)
        figures = {
            "bandwidth": figure(rate(limit or UNBOUND_BYTES_PER_S), "nccl", "inside a card or a processor"),
            "latency": figure("0.25 us", "assumed", "as a wire of PCIe"),
        }
        self._wire(f"nic{nic}", holder, f"port_{_gbit(limit)}" if limit else "port", figures)

    def _sockets(self) -> None:
        """A link between each two sockets of a host that have something on them."""
        used = sorted({int(end[6:]) for wire in self.drawn for end in wire if end.startswith("socket")})
        sockets = self.machine.sockets
        for number, a in enumerate(used):
            for b in used[number + 1 :]:
                if sockets[a].host == sockets[b].host:
                    self._wire(f"socket{a}", f"socket{b}", "socket_link", self._socket_figures(a, b))

    def _socket_figures(self, a: int, b: int) -> dict[str, Figure]:
        rates = [socket_bytes_per_s(self.machine.sockets[each]) for each in (a, b)]
        bandwidth = min(UNKNOWN_SOCKET_BYTES_PER_S if each is None else each for each in rates)
        known = figure(rate(bandwidth), "nccl", "per direction, by the processor")
        unknown = figure(rate(bandwidth), "assumed", "per direction; the processor is not known, so that of AMD's")
        latency = figure("0.5 us", "assumed", "one crossing between the sockets")
        return {"bandwidth": unknown if None in rates else known, "latency": latency}


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:g}gbit".replace(".", "_")


def _slot_names(machine: Machine) -> dict[int, str]:
    """The names of the slots that lead to a GPU or a NIC: gpu0, nic0, card0, plx0. A host bridge has none."""
    names = {gpu.slot: f"gpu{number}" for number, gpu in enumerate(machine.gpus)}
    ports: dict[int, list[int]] = {}
    for number, nic in enumerate(machine.nics):
        if nic.slot is not None and nic.slot not in names:
            ports.setdefault(nic.slot, []).append(number)
    inner = {above for slot in (*names, *ports) for above in machine.above(slot)} - names.keys() - ports.keys()
    cards = sorted(slot for slot, found in ports.items() if len(found) > 1)
    names |= {slot: f"nic{found[0]}" for slot, found in ports.items()}
    names |= {slot: f"card{number}" for number, slot in enumerate(cards)}
    switches = sorted(slot for slot in inner if not _is_host_bridge(machine, slot))
    names |= {slot: f"plx{number}" for number, slot in enumerate(switches)}
    return dict(sorted(names.items()))


def _is_host_bridge(machine: Machine, slot: int) -> bool:
    return machine.slots[slot].device_class.startswith(HOST_BRIDGE)


def all_figures(data: object, path: str = "") -> Sequence[tuple[str, Figure]]:
    """Every figure in a tree with its path."""
    if isinstance(data, dict) and "source" in data:
        return [(path, data)]
    inner = data.items() if isinstance(data, dict) else ()
    return [row for key, value in inner for row in all_figures(value, f"{path}.{key}" if path else str(key))]
