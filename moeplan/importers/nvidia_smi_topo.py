"""A cluster of one kind of machine from the table that `nvidia-smi topo -m` prints.

The table has no speeds, so those of NVLink and PCIe follow from the GPU, and the GPU from the output of
`nvidia-smi -L` if that stands before the table, else from the number of NVLinks, which is a guess and said to be one.

NV# between GPUs is taken for a switch where the links of a GPU to all others together would be more than the 18 ports
that any GPU has (NVIDIA H100 and B200 datasheets); then # is the links of the smaller of the two to the switch. Else
each pair has # links of its own. The PCIe tree is rebuilt from the distances: PIX shares a switch, PXB a switch of
switches, PHB a host bridge, NODE a socket. Cells with NV# say nothing of PCIe; there the memory affinity tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moeplan.importers._node_doctor import refuse_errors
from moeplan.importers._node_files import Source, text_of
from moeplan.importers._node_machine import Finding, Machine, NodeGpu, NodeNic, NvLink, Slot, Socket
from moeplan.importers._node_matrix import Matrix, is_gpu, matrix_of
from moeplan.importers._node_topology import Imported, topology_of

MOST_PORTS = 18
_BRIDGE, _ROOT, _GPU, _NIC = "0x060400", "0x060000", "0x030000", "0x020000"
_Groups = list[list[str]]


def read(source: Source) -> Imported:
    """The topology that the table describes: a path, or its bytes.

    Raises CatalogueError with file, line, row, found, allowed and remedy; also for what `moeplan network doctor`
    calls an error.
    """
    found = examine(source)
    where = "topology" if isinstance(source, bytes) else str(source)
    refuse_errors(found, where)
    return topology_of(found, where)


def examine(source: Source) -> Machine:
    """What the table says, right or wrong. Raises CatalogueError for what cannot be read."""
    text, where = text_of(source)
    matrix = matrix_of(text, where)
    tree = _Tree(matrix)
    links = _nvlinks(matrix)
    gpus = [
        NodeGpu(dev=number, slot=tree.slot_of[name], nvlinks=tuple(links[name]), line=matrix.lines[name])
        for number, name in enumerate(matrix.gpus)
    ]
    nics = [
        NodeNic(
            name=matrix.legend.get(name, "" if name.startswith("NIC") else name),
            dev=number,
            socket=tree.slots[tree.slot_of[name]].socket,
            slot=tree.slot_of[name],
            line=matrix.lines[name],
        )
        for number, name in enumerate(matrix.nics)
    ]
    machine = Machine(
        origin="nvidia-smi",
        sockets=tuple(tree.sockets),
        slots=tuple(tree.slots),
        gpus=tuple(gpus),
        nics=tuple(nics),
        product=matrix.products[0] if matrix.products else "",
        noticed=(*matrix.noticed, *_one_sided(matrix), *_mixed(matrix)),
    )
    return _with_contradictions(machine, matrix)


def _count(matrix: Matrix, a: str, b: str) -> int:
    """NVLinks of a pair; of two cells that differ the smaller counts."""
    cells = matrix.cells[a, b], matrix.cells[b, a]
    return min(int(cell[2:]) if cell.startswith("NV") else 0 for cell in cells)


def _nvlinks(matrix: Matrix) -> dict[str, list[NvLink]]:
    gpus = matrix.gpus
    counts = {a: {b: count for b in gpus if a != b and (count := _count(matrix, a, b))} for a in gpus}
    if any(sum(others.values()) > MOST_PORTS for others in counts.values()):
        return {a: _to_switch(matrix, a, max(others.values(), default=0)) for a, others in counts.items()}
    return {
        a: [
            NvLink(target=b, end="gpu", count=count, peer=gpus.index(b), line=matrix.lines[a])
            for b, count in others.items()
        ]
        for a, others in counts.items()
    }


def _to_switch(matrix: Matrix, gpu: str, count: int) -> list[NvLink]:
    return [NvLink(target="switch", end="switch", count=count, line=matrix.lines[gpu])] if count else []


class _Tree:
    """Sockets and PCIe slots that have the distances of the table."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.has_far = "SYS" in matrix.cells.values()
        self.sockets: list[Socket] = []
        self.slots: list[Slot] = []
        self.slot_of: dict[str, int] = {}
        for members in self._groups(list(matrix.names), ("PIX", "PXB", "PHB", "NODE"), by_memory=True):
            self._socket(members)

    def _socket(self, members: Sequence[str]) -> None:
        numa = next((self.matrix.numa[name] for name in members if name in self.matrix.numa), "")
        self.sockets.append(Socket(host="", numa=int(numa) if numa.isdecimal() and len(numa) < 5 else None))
        for below in self._groups(members, ("PIX", "PXB", "PHB")):
            root = self._slot(f"root{len(self.slots)}", _ROOT, None)
            for near in self._groups(below, ("PIX", "PXB")):
                self._switches(near, root)

    def _switches(self, members: Sequence[str], root: int) -> None:
        groups = self._groups(members, ("PIX",))
        # A device alone hangs on the host bridge; several groups under one roof have a switch above theirs.
        top = self._slot(f"switch{len(self.slots)}", _BRIDGE, root) if len(members) > 1 else root
        for group in groups:
            parent = self._slot(f"switch{len(self.slots)}", _BRIDGE, top) if len(groups) > 1 else top
            for name in group:
                self.slot_of[name] = self._slot(name, _GPU if is_gpu(name) else _NIC, parent)

    def _slot(self, busid: str, device_class: str, parent: int | None) -> int:
        socket = len(self.sockets) - 1
        self.slots.append(Slot(busid=busid, device_class=device_class, socket=socket, parent=parent))
        return len(self.slots) - 1

    def _groups(self, names: Sequence[str], near: Sequence[str], *, by_memory: bool = False) -> _Groups:
        """Those that are joined by chains of cells that are `near`, in the order of the table."""
        left, found = list(names), list[list[str]]()
        while left:
            group, front = [], [left.pop(0)]
            while front:
                name = front.pop()
                group.append(name)
                joined = {other for other in left if self._is_near(name, other, near, by_memory=by_memory)}
                front += [other for other in left if other in joined]
                left = [other for other in left if other not in joined]
            found.append(sorted(group, key=names.index))
        return found

    def _is_near(self, a: str, b: str, near: Sequence[str], *, by_memory: bool) -> bool:
        cell = self.matrix.cells[a, b]
        if not by_memory or not cell.startswith("NV"):
            return cell in near
        numa = self.matrix.numa
        if a in numa and b in numa:
            return numa[a] == numa[b]
        # Nothing tells: one socket, unless the table knows of several.
        return not self.has_far


def _one_sided(matrix: Matrix) -> Iterator[Finding]:
    for number, a in enumerate(matrix.names):
        for b in matrix.names[number + 1 :]:
            there, back = matrix.cells[a, b], matrix.cells[b, a]
            if there != back:
                yield Finding(
                    severity="error",
                    where=f"{a} and {b}",
                    what=f"{there} in one direction and {back} in the other",
                    why="a wire has two ends; a link that is up on one side only carries nothing",
                    remedy=f"compare `nvidia-smi nvlink -s` of both, and print the table again (row {b})",
                    line=matrix.lines[b],
                )


def _mixed(matrix: Matrix) -> Iterator[Finding]:
    products = sorted(set(matrix.products))
    if len(products) > 1:
        yield Finding(
            severity="error",
            where="nvidia-smi -L",
            what=f"GPUs of {len(products)} kinds: {', '.join(products[:4])}",
            why="a cluster here has one kind of GPU",
            remedy="give the table of the GPUs of one kind (CUDA_VISIBLE_DEVICES)",
        )


def _with_contradictions(machine: Machine, matrix: Matrix) -> Machine:
    """The machine with a finding where the table's distances are those of no tree."""
    devices = dict(zip(matrix.gpus, machine.gpus, strict=True)) | dict(zip(matrix.nics, machine.nics, strict=True))
    odd = [
        (a, b, cell, found)
        for number, a in enumerate(matrix.names)
        for b in matrix.names[number + 1 :]
        if not (cell := matrix.cells[a, b]).startswith("NV") and cell == matrix.cells[b, a]
        if (found := machine.distance(devices[a], devices[b])) != cell
    ]
    if not odd:
        return machine
    a, b, cell, found = odd[0]
    finding = Finding(
        severity="warning",
        where=f"{a} and {b}",
        what=f"{cell} in the table, but {found} by the rows of others"
        + (f"; {len(odd)} such pairs" if odd[1:] else ""),
        why="distances over a tree fit together; these do not, as in some virtual machines",
        remedy="print the table on the host, outside the virtual machine",
        line=matrix.lines[a],
    )
    return replace(machine, noticed=(*machine.noticed, finding))
