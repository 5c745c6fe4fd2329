"""What the links next to one GPU carry in a whole step, all exchanges together, beside all that it computes.

Bounds of single exchanges take the wires as if nothing else used them; here dispatches, combines, sends between
stages, gathers and scatters add up on the links that they share. Even routing only: all that share a link do the same.

Axes: U rows of a branch, D and E the ZeRO stages listed for dense weights and for experts, V virtual stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats
from moeplan.network.expand import Pattern
from moeplan.planners._bounds import Bounds
from moeplan.planners._groups import Grid, grid_of, ranks_of
from moeplan.planners._passes import Shape
from moeplan.planners._space import Branch

Loads = Mapping[int, float]
"""Seconds for each byte of an exchange, by link."""


def next_to(pattern: Pattern, cluster: Cluster, rank: int) -> Loads:
    """What an exchange puts on the links that its transfers from `rank` begin with, and those to it end with."""
    lengths_F = (pattern.paths_FH >= 0).sum(axis=1)
    near: set[int] = set()
    for hop in (0, 1):
        ends = ((pattern.source_F == rank, 0 * lengths_F + hop), (pattern.target_F == rank, lengths_F - 1 - hop))
        for own_F, at_F in ends:
            chosen = np.flatnonzero(own_F & (lengths_F > hop))
            near |= set(pattern.paths_FH[chosen, at_F[chosen]].tolist())
    bandwidth_K = cluster.bandwidth_bytes_per_s_K
    crossing = {link: (pattern.paths_FH == link).any(axis=1) for link in sorted(near)}
    return {link: float(pattern.share_F[of_F].sum() / bandwidth_K[link]) for link, of_F in crossing.items()}


class Ports:
    """The links next to position 0 of one pipeline rank under the plans of a branch."""

    def __init__(self, bounds: Bounds, branch: Branch, rank: int) -> None:
        self.bounds, self.branch, self.prices = bounds, branch, bounds.prices
        self.grid: Grid = grid_of(branch.layout)
        self.shape: Shape = bounds.shape(branch.layout)
        self.held = list(self.shape.virtual[rank])
        self.stage = rank
        self.gpu = ranks_of(self.grid, "tp", rank)[0]
        self.each = bounds.microbatches(branch) / branch.layout.copies
        """[U]: micro-batches that pass each virtual stage that the rank holds."""

    def in_passes_s(self) -> dict[int, Floats]:
        """[U] seconds of each link between the beginning of the rank's first pass and the end of its last."""
        found: dict[int, Floats] = {}
        self._experts(found)
        self._sends(found)
        return found

    def _experts(self, found: dict[int, Floats]) -> None:
        branch, sizes = self.branch, [len(values) for values in self.branch.lists[:4]]
        chains = self.bounds.chains(branch)
        parts = np.broadcast_to(np.array(branch.overlap_degree, np.float64), sizes)
        again = np.array([each == "full" for each in branch.recompute])[None, :, None, None]
        passes = self.each.reshape(sizes) * (2.0 + again if self.bounds.training else 1.0)
        members = ranks_of(self.grid, "ep", self.stage)
        for k, kind in enumerate(self.prices.kinds[0]):
            count = self.shape.counts_VK[self.held, k].sum()
            if not kind.layer.is_moe or not count or len(members) == 1:
                continue
            x = chains.exchanges[k]
            for way, part in (("dispatch", x.dispatch_bytes), ("combine", x.combine_bytes)):
                amount = count * passes * parts * part.reshape(sizes)
                for a, algorithm in enumerate(branch.all_to_all):
                    counts = self.prices.counts_copies(algorithm)
                    for at in [slice(m, m + 1) for m in range(sizes[0])] if counts else [slice(0, None)]:
                        for link, byte_s in self._all_to_all(algorithm, way, kind.moe, at.start).items():
                            here = found.setdefault(link, np.zeros(amount.size)).reshape(sizes)
                            here[at, :, a] += byte_s * amount[at, :, a]

    def _all_to_all(self, algorithm: str, way: str, moe: int, m: int) -> Loads:
        members, reach = ranks_of(self.grid, "ep", self.stage), None
        if self.prices.counts_copies(algorithm):
            grid = self.grid
            load = self.prices.load(grid.ep, grid.etp, grid.tp, grid.cp, self.branch.micro_batch[m])[1]
            assert load is not None
            reach = self.prices.reach(load, moe, members, algorithm)
        return self._loads("all_to_all", algorithm, members, reach, way)

    def _sends(self, found: dict[int, Floats]) -> None:
        """Of training, all but the first that comes in and the last that goes out: these may lie outside."""
        holder = {v: rank for rank, held in enumerate(self.shape.virtual) for v in held}
        amount = np.maximum(self.each - 1, 0.0) * self.bounds.send_bytes(self.branch)
        neighbours = [holder.get(other, self.stage) for v in self.held for other in (v - 1, v + 1)]
        for other in neighbours if self.bounds.training else ():
            there = ranks_of(self.grid, "tp", other)[0]
            for pair in ((self.gpu, there), (there, self.gpu)) if there != self.gpu else ():
                for link, byte_s in self._loads("send", "", pair).items():
                    found[link] = found.get(link, 0.0) + byte_s * amount

    def add_rings(self, found: dict[int, Floats], axis: str, amount: Floats) -> dict[int, Floats]:
        """[U, D, E]: also gathers or scatters of `amount` bytes in all along an axis."""
        members = ranks_of(self.grid, axis, self.stage)
        if self.grid.copies > 1:
            members += ranks_of(self.grid, axis, self.grid.pp - 1 - self.stage)
        loads = self._loads("all_gather", "ring", members) if len(members) > 1 else {}
        return {
            link: found.get(link, np.zeros((1, 1, 1))) + loads.get(link, 0.0) * amount
            for link in sorted({*found, *loads})
        }

    def _loads(
        self, operation: str, algorithm: str, members: tuple[int, ...], reach: Floats | None = None, kind: str = ""
    ) -> Loads:
        key = ("ports", operation, algorithm, members, self.gpu, kind, None if reach is None else reach.tobytes())
        if key not in self.prices.cache:
            pattern = self.prices.pattern(operation, algorithm, members, reach_GB=reach, kind=kind)
            self.prices.cache[key] = next_to(pattern, self.prices.scenario.cluster, self.gpu)
        return self.prices.cache[key]  # type: ignore[return-value]


def busiest_s(seconds: Mapping[int, Floats]) -> Floats:
    """Of the link that carries most."""
    found: Floats = np.zeros(1)
    for each in seconds.values():
        found = np.maximum(found, each)
    return found
