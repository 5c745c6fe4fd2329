"""What looks wrong with the NVLinks of a machine: a row that is missing or short, a link with one end, a row twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moeplan.importers._node_machine import Finding, Machine, bus_key, repeated


def _missing(machine: Machine) -> Iterator[Finding]:
    """A GPU without NVLinks among GPUs that have them."""
    links = [machine.all_links(gpu) for gpu in range(len(machine.gpus))]
    having = sum(count > 0 for count in links)
    if not having:
        return
    for gpu, count in enumerate(links):
        if not count:
            yield Finding(
                severity="error",
                where=machine.name_of(gpu),
                what=f"has no NVLink, but {having} of its {len(links) - 1} peers have up to {max(links)}",
                why="NCCL takes this without a word, and every ring and tree then goes over PCIe or the network",
                remedy=f"look at `nvidia-smi nvlink -s -i {machine.gpus[gpu].dev}` and restart the fabric manager "
                "or reset the GPU; or add the row that is missing",
                line=machine.gpus[gpu].line,
            )


def _fewer(machine: Machine) -> Iterator[Finding]:
    """A GPU with fewer NVLinks than the best."""
    links = [machine.all_links(gpu) for gpu in range(len(machine.gpus))]
    # Where a peer is not in the file, its links are missing from nobody's row, so rows can be compared.
    for gpu, count in enumerate(links):
        if 0 < count < max(links):
            yield Finding(
                severity="warning",
                where=machine.name_of(gpu),
                what=f"has {count} NVLinks, its peers have up to {max(links)}",
                why=f"its peers wait for it: all exchanges go at {count}/{max(links)} of the speed",
                remedy=f"look at `nvidia-smi nvlink -s -i {machine.gpus[gpu].dev}` for links that are down",
                line=machine.gpus[gpu].line,
            )


def _one_way(machine: Machine) -> Iterator[Finding]:
    """A link from one GPU to another that has another count on the way back, or that leads to itself."""
    tables = [machine.direct_links(gpu) for gpu in range(len(machine.gpus))]
    for a, table in enumerate(tables):
        for b, count in table.items():
            back = tables[b].get(a, 0)
            if a == b or back < count:
                what = "has an NVLink to itself" if a == b else f"has {count} NVLinks to gpu{b}, which has {back} back"
                yield Finding(
                    severity="error",
                    where=machine.name_of(a),
                    what=what,
                    why="a wire has two ends; NCCL would send one way and never find the way back",
                    remedy=f"compare `nvidia-smi nvlink -s` of both and correct the row of gpu{b}",
                    line=machine.gpus[b].line,
                )


def _twice(machine: Machine) -> Iterator[Finding]:
    """Two rows of a GPU with one target."""
    for gpu, device in enumerate(machine.gpus):
        for number in repeated(bus_key(link.target) for link in device.nvlinks):
            yield Finding(
                severity="error",
                where=machine.name_of(gpu),
                what=f"has two nvlink rows with the target {device.nvlinks[number].target}",
                why="NCCL adds the two up, which makes the link faster than it is",
                remedy="keep the right one; NCCL itself writes one row for each target",
                line=device.nvlinks[number].line,
            )


def _out_of_sight(machine: Machine) -> Iterator[Finding]:
    """Links to GPUs that the file does not have."""
    for gpu, device in enumerate(machine.gpus):
        gone = [link.target for link in device.nvlinks if link.end == "gpu" and link.peer is None]
        if gone:
            yield Finding(
                severity="note",
                where=machine.name_of(gpu),
                what=f"has NVLinks to {len(gone)} GPUs that are not in the file, such as {gone[0]}",
                why="these links carry nothing; the file may be of a job that did not see all GPUs",
                remedy="dump the topology with all GPUs visible, or leave it",
                line=device.line,
            )


def _other_switches(machine: Machine) -> Iterator[Finding]:
    """A GPU whose rows name other switches than those of most."""
    names = [frozenset(bus_key(link.target) for link in gpu.nvlinks if link.end == "switch") for gpu in machine.gpus]
    by_host: dict[str, Counter[frozenset[str]]] = {}
    for gpu, found in zip(machine.gpus, names, strict=True):
        by_host.setdefault(machine.host_of(gpu), Counter())[found] += bool(found)
    for number, found in enumerate(names):
        usual = by_host[machine.host_of(machine.gpus[number])].most_common(1)[0][0]
        if found and usual and found != usual:
            yield Finding(
                severity="warning",
                where=machine.name_of(number),
                what=f"names {len(found)} NVSwitches, most of its peers name {len(usual)} others",
                why="NCCL counts all switches as one, so it does not see that this GPU may not reach its peers",
                remedy=f"look at `nvidia-smi nvlink -R -i {machine.gpus[number].dev}`, and at the fabric manager's log",
                line=machine.gpus[number].line,
            )


CHECKS = (_missing, _fewer, _one_way, _twice, _out_of_sight, _other_switches)
