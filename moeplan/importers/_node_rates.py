"""What NCCL takes a wire to carry, and which GPU sheet a device stands for: tables, with where they are from.

NCCL's figures are per direction and already have the protocol's overhead off: 48 GB/s for PCIe 5.0 x16, whose lanes
carry 63. All are of NCCL 2.30.7, src/graph/topo.h and topo.cc.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeplan.importers._node_machine import Machine, Slot, Socket

NCCL = "NCCL 2.30.7, src/graph/topo.h and topo.cc: what it counts for NVLink, PCIe, C2C and the link between processors"
_GB = 1e9
# compute capability from which on -> GB/s of one NVLink; 86 stands for itself alone
_NVLINK = ((100, 40.1), (90, 20.6), (80, 20.0), (70, 20.0), (60, 18.0), (0, 20.0))
_NVLINK_86 = 12.0
CAPABILITIES = frozenset(
    {35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 107, 110, 120, 121}
)
"""Compute capabilities of GPUs that exist (NVIDIA, CUDA C++ programming guide, compute capabilities; 107 as NCCL 2.30.7
prints it in its own documentation)."""
# GT/s -> (generation, units of 100 Mbit/s that a lane carries)
_PCIE = {2.5: (1, 15), 5.0: (2, 30), 8.0: (3, 60), 16.0: (4, 120), 32.0: (5, 240), 64.0: (6, 480)}
_FALLBACK_GT_PER_S, _FALLBACK_LANES, _MOST_LANES = 8.0, 16, 32
_KNOWN_TO_NCCL = (
    "2.5 GT/s", "5 GT/s", "8 GT/s", "16 GT/s", "32 GT/s", "2.5 GT/s PCIe", "5.0 GT/s PCIe", "8.0 GT/s PCIe",
    "16.0 GT/s PCIe", "32.0 GT/s PCIe", "64.0 GT/s PCIe",
)  # fmt: skip
NO_NET_SPEED_BYTES_PER_S = 10e9 / 8
"""What NCCL takes for a network port whose speed is 0, negative or absent."""
UNBOUND_BYTES_PER_S = 5000 * _GB
"""What NCCL takes for a wire that is none, as from a virtual NIC to its processor."""
_AMD, _ARM, _POWER, _ZHAOXIN = 16.0, 6.0, 32.0, 6.0
# Intel model of family 6 from which on -> GB/s between two sockets
_INTEL = ((0xCF, 40.0), (0x8F, 22.0), (0x55, 10.0), (0, 6.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pcie:
    """A PCIe link: generation, lanes, and what NCCL takes it to carry per direction."""

    generation: int
    lanes: int
    bandwidth_bytes_per_s: float
    line_bytes_per_s: float
    """What the lanes carry before the protocol's overhead."""

    @property
    def name(self) -> str:
        """`pcie_gen5_x16`."""
        return f"pcie_gen{self.generation}_x{self.lanes}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A GPU sheet, and what belongs to it that a topology may not say."""

    sheet: str
    sm: int
    pcie_gt_per_s: float
    nic_gbit_per_s: int
    """Of one card, as the vendor's own machines have it."""


_PRODUCTS = {
    each.sheet: each
    for each in (
        Product(sheet="v100-sxm2-16gb", sm=70, pcie_gt_per_s=8.0, nic_gbit_per_s=100),
        Product(sheet="v100-sxm2-32gb", sm=70, pcie_gt_per_s=8.0, nic_gbit_per_s=100),
        Product(sheet="v100-pcie", sm=70, pcie_gt_per_s=8.0, nic_gbit_per_s=100),
        Product(sheet="a100-40gb-sxm", sm=80, pcie_gt_per_s=16.0, nic_gbit_per_s=200),
        Product(sheet="a100-80gb-sxm", sm=80, pcie_gt_per_s=16.0, nic_gbit_per_s=200),
        Product(sheet="rtx-4090", sm=89, pcie_gt_per_s=16.0, nic_gbit_per_s=100),
        Product(sheet="h100-sxm", sm=90, pcie_gt_per_s=32.0, nic_gbit_per_s=400),
        Product(sheet="h800", sm=90, pcie_gt_per_s=32.0, nic_gbit_per_s=400),
        Product(sheet="h200-sxm", sm=90, pcie_gt_per_s=32.0, nic_gbit_per_s=400),
        Product(sheet="b200", sm=100, pcie_gt_per_s=32.0, nic_gbit_per_s=400),
        Product(sheet="gb200", sm=100, pcie_gt_per_s=32.0, nic_gbit_per_s=400),
        Product(sheet="b300", sm=103, pcie_gt_per_s=32.0, nic_gbit_per_s=800),
        Product(sheet="gb300", sm=103, pcie_gt_per_s=32.0, nic_gbit_per_s=800),
    )
}
_UNKNOWN = Product(sheet="", sm=0, pcie_gt_per_s=16.0, nic_gbit_per_s=100)
# PCI device of vendor 0x10de -> sheet; the PCI ID repository (pci-ids.ucw.cz)
_DEVICES = {
    "1db1": "v100-sxm2-16gb", "1db5": "v100-sxm2-32gb", "1db6": "v100-pcie",
    "20b0": "a100-40gb-sxm", "20b2": "a100-80gb-sxm", "2684": "rtx-4090", "2330": "h100-sxm", "2324": "h800",
    "2335": "h200-sxm", "2901": "b200", "2941": "gb200", "3182": "b300", "31c2": "gb300", "31c3": "gb300",
}  # fmt: skip
# what `nvidia-smi -L` prints, without NVIDIA and Tesla -> sheet
_NAMES = {
    "V100-SXM2-16GB": "v100-sxm2-16gb", "V100-SXM2-32GB": "v100-sxm2-32gb", "V100-PCIE-32GB": "v100-pcie",
    "A100-SXM4-40GB": "a100-40gb-sxm", "A100-SXM4-80GB": "a100-80gb-sxm", "GeForce RTX 4090": "rtx-4090",
    "H100 80GB HBM3": "h100-sxm", "H800": "h800", "H200": "h200-sxm", "B200": "b200", "GB200": "gb200",
    "B300 SXM6 AC": "b300", "GB300": "gb300",
}  # fmt: skip
# (compute capability, NVLinks, wired to its processor) -> sheet; a guess where the device is not told
_GUESSES = {
    (70, 6, False): "v100-sxm2-32gb", (80, 12, False): "a100-80gb-sxm", (90, 8, False): "h800",
    (90, 18, False): "h100-sxm", (100, 18, False): "b200", (100, 18, True): "gb200", (103, 18, False): "b300",
    (103, 18, True): "gb300",
}  # fmt: skip
GUESS = "a guess"
_BY_PORTS = {6: "v100-sxm2-32gb", 8: "h800", 12: "a100-80gb-sxm", 18: "h100-sxm"}


def nvlink_bytes_per_s(sm: int) -> float:
    """What one NVLink carries per direction."""
    if sm == 86:
        return _NVLINK_86 * _GB
    return next(rate for least, rate in _NVLINK if sm >= least) * _GB


def gt_per_s(speed: str | None) -> float | None:
    """The GT/s of a PCIe speed, or None for what is not one."""
    match = re.match(r"\s*(\d{1,3}(?:\.\d)?) GT/s", speed or "")
    found = float(match.group(1)) if match else 0.0
    return found if found in _PCIE else None


def lanes_of(slot: Slot) -> int | None:
    """The lanes of a slot, or None for a width that says nothing: none, 0, or Linux's 63 and 255 for unknown."""
    return slot.lanes if slot.lanes and slot.lanes <= _MOST_LANES else None


def is_spelled_for_nccl(speed: str) -> bool:
    """Whether NCCL knows this way to write a speed; for any other it counts 8 GT/s."""
    return speed.startswith(_KNOWN_TO_NCCL)


def pcie(slot: Slot, default_gt_per_s: float = _FALLBACK_GT_PER_S) -> Pcie:
    """The PCIe link of a slot. What is not told is 16 lanes of `default_gt_per_s`, of NCCL's 8 GT/s if not given."""
    speed = gt_per_s(slot.speed) or (default_gt_per_s if slot.speed is None else _FALLBACK_GT_PER_S)
    lanes = lanes_of(slot) or _FALLBACK_LANES
    generation, code = _PCIE[speed]
    # 8b/10b up to 5 GT/s, then 128b/130b (PCI Express base specification 3.0); 6.0 at 64 GT/s is a little below
    share = 0.8 if speed <= 5.0 else 128 / 130
    return Pcie(
        generation=generation,
        lanes=lanes,
        bandwidth_bytes_per_s=lanes * code / 80 * _GB,
        line_bytes_per_s=lanes * speed * share / 8 * _GB,
    )


def socket_bytes_per_s(socket: Socket) -> float | None:
    """What the link of a processor to another socket carries per direction; None for a processor NCCL does not know."""
    if socket.arch in ("ppc64", "arm64"):
        return (_POWER if socket.arch == "ppc64" else _ARM) * _GB
    by_vendor = {"AuthenticAMD": _AMD, "CentaurHauls": _ZHAOXIN, "  Shanghai  ": _ZHAOXIN}
    if socket.arch == "x86_64" and socket.vendor == "GenuineIntel":
        model = (socket.model or 0) if socket.family == 6 else 0
        return next(rate for least, rate in _INTEL if model >= least) * _GB
    found = by_vendor.get(socket.vendor) if socket.arch == "x86_64" else None
    return None if found is None else found * _GB


UNKNOWN_SOCKET_BYTES_PER_S = _AMD * _GB
"""Taken for a processor that NCCL does not know; NCCL itself then counts 5000 GB/s, as if there were one socket."""


def product_of(machine: Machine) -> tuple[Product, str]:
    """The product of a machine's GPUs, and how it is known in a sentence. It has no sheet where nothing tells."""
    if not machine.gpus:
        return _UNKNOWN, "there is no GPU"
    if machine.product:
        return _sheet(_NAMES.get(_trade_name(machine.product))), f"the driver calls it {machine.product}"
    slot = machine.slots[machine.gpus[0].slot]
    if slot.device and slot.vendor in ("", "0x10de"):
        device = slot.device.lower().removeprefix("0x")
        return _sheet(_DEVICES.get(device)), f"its PCI device is 0x{device} (pci-ids.ucw.cz)"
    links = max(map(machine.all_links, range(len(machine.gpus))))
    sm, has_c2c = machine.gpus[0].sm, bool(machine.gpus[0].c2c_bytes_per_s)
    told = f"it has {links} NVLinks" + (f" and compute capability {sm // 10}.{sm % 10}" if sm else "")
    sheet = _BY_PORTS.get(links) if sm is None else _GUESSES.get((sm, links, has_c2c))
    return _sheet(sheet), f"{told}, and nothing else tells" + (f"; {GUESS}" if sheet else "")


def _trade_name(name: str) -> str:
    return re.sub(r"^((NVIDIA|Tesla) )+", "", name).strip()


def _sheet(name: str | None) -> Product:
    return _UNKNOWN if name is None else _PRODUCTS[name]
