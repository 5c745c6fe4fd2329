"""A machine as the tree of figures that a topology's file holds: GPU, links, wiring, NICs, network, with their sources.

What no topology file tells (latencies, overheads, the network between machines) is assumed, with the values that the
catalogue's hgx-h100-rail states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from moeplan.importers._node_machine import Machine
from moeplan.importers._node_rates import GUESS, NCCL, Product, product_of
from moeplan.importers._node_wires import Wires, all_figures, figure, nic_bytes_per_s

_ASSUMED = "a guess, until it is measured"
_ORIGINS = {"nccl": "NCCL", "nvidia-smi": "nvidia-smi topo -m"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A topology as its YAML file would hold it, what had to be assumed for it, and what a user has to say himself."""

    topology: dict[str, Any]
    assumptions: tuple[str, ...]
    unanswered: Mapping[str, str]
    """Field to a sentence: what the file does not tell and nobody may guess."""


def topology_of(machine: Machine, where: str) -> Imported:
    """The topology of a machine without errors: one node, the user says how many there are."""
    product, told = product_of(machine)
    parts = _parts(machine, product, told)
    name = "".join(char for char in PurePath(where).name if char.isprintable())[:80]
    cites = {"file": f"{name}, written by {_ORIGINS[machine.origin]}", "nccl": NCCL, "assumed": _ASSUMED}
    used = {each["source"] for _, each in all_figures(parts)}
    about = (
        f"A machine of {len(machine.gpus)} GPUs and {len(machine.nics)} NICs, as {_ORIGINS[machine.origin]} shows it"
    )
    question = f"no GPU sheet is known ({told}); give one, as in --set cluster.gpu=h100-sxm"
    return Imported(
        topology={"about": about, "sources": {key: {"cite": cites[key]} for key in cites if key in used}} | parts,
        assumptions=tuple(_assumptions(parts, product, told)),
        unanswered={} if product.sheet else {"gpu": question},
    )


def _parts(machine: Machine, product: Product, told: str) -> dict[str, Any]:
    wires = Wires(machine, product, is_guess=told.endswith(GUESS)).draw()
    parts: dict[str, Any] = {
        "nodes": figure(1, "assumed", "the file describes one; any number, set nodes"),
        "gpus_per_node": figure(len(machine.gpus), "file", f"{product.sheet}: {told}" if product.sheet else ""),
        "links": wires.links,
        "wiring": wires.short(),
    }
    if product.sheet:
        parts = {"gpu": product.sheet} | parts
    if machine.nics:
        parts |= {"nic": _nic(machine, product), "fabric": _fabric()}
    return parts


def _nic(machine: Machine, product: Product) -> dict[str, Any]:
    speeds = {nic.speed_bytes_per_s for nic in machine.nics}
    source, note = "file", "per direction"
    if not machine.has_speeds:
        source, note = "assumed", "per direction; the table has no speeds, so what the vendor's own machines have"
    elif speeds == {0.0}:
        source, note = "nccl", "per direction; the file has no speed, and this is what NCCL then counts"
    elif len(speeds) > 1:
        note = "per direction, the fastest; a slower one is held up by its own wire"
    return {
        "per_node": figure(len(machine.nics), "file"),
        "bandwidth": figure(f"{nic_bytes_per_s(machine, product) * 8 / 1e9:.9g} Gbit/s", source, note),
        "latency": figure("0.6 us", "assumed", "half of 1.2 us, the usual one-way time of a small write"),
        "efficiency": figure("96 %", "assumed", "headers of 4 KiB packets; bandwidth tests show 48 to 49 of 50 GB/s"),
        "message_overhead": figure("5 us", "assumed", "a host thread posts and polls"),
    }


def _fabric() -> dict[str, Any]:
    note = "each switch; that one switch joins all machines is assumed as well, set cluster.fabric"
    return {"kind": "single_switch", "latency": figure("200 ns", "assumed", note)}


def _assumptions(parts: Mapping[str, Any], product: Product, told: str) -> Iterator[str]:
    """What is not in the file, one sentence each."""
    if told.endswith(GUESS):
        yield f"gpu is {product.sheet}: {told}."
    if "fabric" in parts:
        yield "fabric is a single switch that never blocks: the file says nothing of what is between machines."
    for path, each in all_figures(parts):
        if each["source"] == "assumed":
            yield f"{path} is {each['value']}" + (f": {each['note']}." if "note" in each else ".")
