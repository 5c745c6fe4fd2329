"""What looks wrong in a topology file, each finding with where, what, why it matters and a remedy.

A check is a function `check(machine) -> findings` on one of the lists here, and in the files beside this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from moeplan.errors import CatalogueError
from moeplan.importers import _node_nic_checks, _node_nvlink_checks, _node_pcie_checks
from moeplan.importers._node_machine import Finding, Machine, repeated
from moeplan.importers._node_rates import CAPABILITIES

_ORDER = {"error": 0, "warning": 1, "note": 2}


def findings(machine: Machine) -> tuple[Finding, ...]:
    """Everything that looks wrong, the worst first, then in the order of the file."""
    checks = (*_CHECKS, *_node_nvlink_checks.CHECKS, *_node_pcie_checks.CHECKS, *_node_nic_checks.CHECKS)
    found = [*machine.noticed, *(finding for check in checks for finding in check(machine))]
    return tuple(sorted(found, key=lambda each: (_ORDER[each.severity], each.line or 0)))


def refuse_errors(machine: Machine, where: str) -> None:
    """Raises CatalogueError for the first finding with which a file cannot stand for a machine."""
    errors = [finding for finding in findings(machine) if finding.severity == "error"]
    if errors:
        first = errors[0]
        place = where if first.line is None else f"{where}:{first.line}"
        more = f" ({len(errors) - 1} more: moeplan network doctor lists them)" if errors[1:] else ""
        raise CatalogueError(f"{place}: {first.where}: {first.what}; {first.remedy}{more}")


def _no_gpus(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding(
            severity="error",
            where="the whole file",
            what="there is no GPU in it",
            why="templates of cloud vendors leave the GPUs to NCCL, which adds them when it starts",
            remedy="give the file that NCCL writes itself: run a job with NCCL_TOPO_DUMP_FILE=topo.xml",
        )


def _hosts(machine: Machine) -> Iterator[Finding]:
    """Several hosts, which NCCL writes into one file where they share an NVLink network."""
    if len(machine.hosts) < 2:
        return
    joined = all(machine.links_to(gpu, "switch") for gpu in range(len(machine.gpus)))
    first = next(socket for socket in machine.sockets if socket.host != machine.sockets[0].host)
    how = "all on one NVLink network" if joined else "which no NVLink network joins"
    yield Finding(
        severity="note" if joined else "error",
        where="host_hash",
        what=f"{len(machine.hosts)} hosts in one file, {how}",
        why="the import takes the file for one machine"
        + ("" if joined else "; GPUs of different hosts would have no way to one another"),
        remedy="count machines so that each is one such group"
        if joined
        else "keep the cpu elements of one host, and give the number of hosts as nodes",
        line=first.line,
    )


def _same_number(machine: Machine) -> Iterator[Finding]:
    """Two GPUs or sockets of a host with one number, two GPUs with one rank or in one slot."""
    gpus = machine.gpus
    ranks = [gpu.rank if gpu.rank is not None and gpu.rank >= 0 else f"none {n}" for n, gpu in enumerate(gpus)]
    numas = [(each.host, n if each.numa is None else each.numa) for n, each in enumerate(machine.sockets)]
    for number in repeated((machine.host_of(gpu), gpu.dev) for gpu in gpus):
        yield _twice(f"dev={gpus[number].dev}", "two GPUs have it", gpus[number].line)
    for number in repeated(ranks):
        yield _twice(f"rank={gpus[number].rank}", "two GPUs have it", gpus[number].line)
    for number in repeated(gpu.slot for gpu in gpus):
        yield _twice(machine.name_of(number), "two gpu elements in one slot", gpus[number].line)
    if machine.origin == "nccl":
        for number in repeated(numas):
            socket = machine.sockets[number]
            yield _twice(f"<cpu numaid={socket.numa}>", "two cpu elements of a host have it", socket.line)


def _twice(where: str, what: str, line: int | None) -> Finding:
    return Finding(
        severity="error",
        where=where,
        what=what,
        why="nobody can tell which of the two is meant; ranks that share a GPU, and parts of one, are not imported",
        remedy="keep one of them, or dump the topology with one rank for each whole GPU",
        line=line,
    )


def _kinds(machine: Machine) -> Iterator[Finding]:
    """GPUs of several kinds, or of a kind that nobody knows."""
    kinds = Counter((gpu.sm, machine.slots[gpu.slot].device) for gpu in machine.gpus)
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        odd = next(n for n, gpu in enumerate(machine.gpus) if (gpu.sm, machine.slots[gpu.slot].device) != usual)
        yield Finding(
            severity="error",
            where=machine.name_of(odd),
            what=f"is of another kind than most ({_kind(machine, odd)}), {len(kinds)} kinds in all",
            why="a cluster here has one kind of GPU, and the slowest sets the pace",
            remedy="give the file of a job on the GPUs of one kind (CUDA_VISIBLE_DEVICES)",
            line=machine.gpus[odd].line,
        )
    for number in _unknown(machine):
        yield Finding(
            severity="warning",
            where=machine.name_of(number),
            what=f"sm={machine.gpus[number].sm} is no compute capability that is known",
            why="the speed of its NVLinks is then a guess from the nearest below",
            remedy="correct sm (90 for 9.0), or say cluster.links.nvlink.bandwidth yourself",
            line=machine.gpus[number].line,
        )


def _unknown(machine: Machine) -> Iterable[int]:
    return (n for n, gpu in enumerate(machine.gpus) if gpu.sm is not None and gpu.sm not in CAPABILITIES)


def _kind(machine: Machine, gpu: int) -> str:
    device = machine.slots[machine.gpus[gpu].slot].device
    return f"sm={machine.gpus[gpu].sm}" + (f", device={device}" if device else "")


_CHECKS = (_no_gpus, _hosts, _same_number, _kinds)
