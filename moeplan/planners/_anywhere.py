"""What experts and exchanges of a layer cost at least, wherever experts stand: with replicas or without.

Every bound is one of the place, or of the node, that gets most: whatever the placement, that is no less than the mean.
Axes: S source, E expert, G place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, exp, floor

import numpy as np

from moeplan.compiler.works import work
from moeplan.cost.compute import SHORT, SHORTEST, TILE, arithmetic_s, reachable_flops_per_s, start_s
from moeplan.cost.cost_model import CostModel, beside_memory_s
from moeplan.domain.feed_forward import Experts
from moeplan.domain.placement import PlacementProblem
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Pass, Work
from moeplan.partition.reach import ANYWHERE
from moeplan.partition.route import Chosen, Load
from moeplan.placers._bounds import token_bounds

_ROUNDING = 1e-9

# ---- what is sent


def least_spread(load: Load) -> float:
    """What part of the traffic of even routing leaves blocks of neighbouring places at least, of all layers.

    Of an expert's tokens no more stay in their block than the block with most of them has. With equal sources and b
    blocks that is 1 / b, as under even routing.
    """
    least, places = 1.0, load.num_places
    for table_SE in load.tokens_SE_by_layer:
        total = table_SE.sum()
        for block in (size for size in range(1, places) if places % size == 0):
            staying = table_SE.reshape(places // block, block, -1).sum(axis=1).max(axis=0).sum()
            least = min(least, (1 - staying / total) / (1 - block / places) if total else 0.0)
    return max(least, 0.0)


def least_reach(load: Load, alike: Iterable[int], block_G: tuple[int, ...]) -> float:
    """What part of what a source sends there is at least for the block that gets most, each token once, of all layers.

    That block has 1 / b of all copies or more. Where a token's experts are drawn by the law of `partition.reach`, they
    keep each other away: of x copies for each token at most exp(-x) of the tokens have none there. Elsewhere a token
    has as many copies there as it has experts, at most. Reference: Borcea, Branden, Liggett, "Negative dependence and
    the geometry of polynomials", J. AMS 22, 2009, for laws of this kind.
    """
    blocks = max(block_G) + 1
    if np.ptp(np.bincount(block_G)):
        return 0.0
    return min(_least_reach(load.chosen[moe], load.tokens_SE_by_layer[moe], blocks) for moe in alike)


def _least_reach(chosen: Chosen, table_SE: Floats, blocks: int) -> float:
    """Sources may be unlike: of an expert, one sends `uneven` times what the mean one does at most."""
    routing, copies = chosen.routing, float(table_SE.sum()) / len(table_SE)
    mean_E = table_SE.mean(axis=0)
    uneven = float((table_SE.max(axis=0)[mean_E > 0] / mean_E[mean_E > 0]).max(initial=1.0))
    if copies == 0 or uneven >= blocks:
        return 0.0
    each = copies / blocks / routing.tokens_per_source
    is_drawn = routing.sets_LS is None and chosen.limit == ANYWHERE
    reached = (1 - exp(-uneven * each)) / uneven if is_drawn else each / routing.top_k
    from_outside = (1 - uneven / blocks) / (1 - 1 / blocks)
    return reached * routing.tokens_per_source / copies * from_outside


# ---- what is computed


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSeconds:
    """Of the smallest part of a layer's experts: at the place where they take longest, and at a place on average."""

    hottest: float
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LeastExperts:
    """Bounds of the experts of one layer in one pass; `plan` has the places, parts and slices of an expert.

    With `replicas` an expert may stand several times, else each stands once and all places have equally many.
    """

    experts: Experts
    passes: Pass
    plan: Plan
    cost_model: CostModel
    replicas: bool

    def seconds(self, tokens_E: Floats) -> ExpertSeconds:
        """`tokens_E` of all parts together; a replica's are rounded to whole tokens, and so are those of a part."""
        if self.cost_model.gpu.measured is not None:
            return self._measured(tokens_E)
        parts, copies = self.plan.overlap_degree, self.plan.ep if self.replicas else 1
        mean_E = np.maximum(tokens_E - 0.5 * copies, 0.0) / parts
        least_E = np.maximum(np.floor(mean_E) - copies, 0.0)
        padded = self._padded(least_E, copies)
        read = int(np.count_nonzero(tokens_E / copies - 0.5 >= parts)) // self.plan.ep
        mean_s = self._fluid_s(floor(float(mean_E.sum()) / self.plan.ep), padded=padded, read=read)
        hottest = max(mean_s, self._whole_tiles_s(tokens_E, copies), self._fullest_s(tokens_E))
        return ExpertSeconds(hottest=hottest, mean=mean_s)

    def _padded(self, least_E: Floats, copies: int) -> float:
        """Of a place on average: rows with those that fill up tiles.

        An expert with more than `SHORT` rows makes all tiles of its place high; experts with fewer, and what another
        can have in replicas with fewer, may stand where all tiles are low.
        """
        high_E = least_E - SHORT * (copies - 1)
        high_E = np.where(high_E > SHORT, high_E, 0.0)
        tiles = float(np.ceil(high_E / TILE).sum())
        low = float(np.ceil((least_E - high_E) / SHORTEST).sum())
        return (tiles * TILE + low * SHORTEST) / self.plan.ep

    def _whole_tiles_s(self, tokens_E: Floats, copies: int) -> float:
        """Of the place with most tiles in the smallest part, which is the first one on each place.

        Places are low, where no expert has more than `SHORT` rows, or high, where all tiles have `TILE` rows. Where a
        low place cannot have as many rows as places have on average, there are high ones. If all are, they have all
        tiles of all experts, each expert's last one begun; else the high ones have all rows but those that one low
        place can have, or more each. Of the places with that many tiles or more, one has as many rows as are left when
        all others are full of one tile less, or the mean.
        """
        places, parts = self.plan.ep, self.plan.overlap_degree
        lost = 0.0 if copies == 1 and parts == 1 and not (tokens_E % 1).any() else copies * (1 - 0.5 / parts)
        rows_E = np.maximum(tokens_E / parts - lost, 0.0)
        total, most_low = float(rows_E.sum()), SHORT * (tokens_E.size if copies > 1 else tokens_E.size // places)
        if total <= most_low * places:
            return 0.0
        tiles = float(np.ceil(rows_E * (1 - _ROUNDING) / TILE).sum()) / places
        if places > 1:
            tiles = min(tiles, (total - most_low) / (places - 1) / TILE)
        whole = ceil(tiles * (1 - _ROUNDING))
        return self._tiles_s(whole, rows=floor(min(total / places, total - (places - 1) * (whole - 1) * TILE)))

    def _measured(self, tokens_E: Floats) -> ExpertSeconds:
        """Of a place on average, where products were measured: they know no tiles, and each row costs the same."""
        copies = self.plan.ep if self.replicas else 1
        rows = floor(float(np.maximum(tokens_E - 0.5 * copies, 0.0).sum()) / self.plan.overlap_degree / self.plan.ep)
        seconds = self.cost_model.cost(self._work((rows,))).seconds
        return ExpertSeconds(hottest=seconds, mean=seconds)

    def _fullest_s(self, tokens_E: Floats) -> float:
        """Of the place with most tokens, as if they were all of one expert; 0 where replicas may even them out."""
        if self.replicas:
            return 0.0
        problem = PlacementProblem(tokens_SE=tokens_E, num_gpus=self.plan.ep, slots=tokens_E.size)
        held = -(-tokens_E.size // self.plan.ep)
        most = max(bound for bound, _ in token_bounds(problem)) - 0.5 * held
        rows = max(0, floor(most / self.plan.overlap_degree * (1 - _ROUNDING)) - held)
        if rows <= SHORT * held:
            return self._fluid_s(rows, padded=rows, read=1)
        return self.cost_model.cost(self._work((rows,))).seconds

    def _tiles_s(self, tiles: int, *, rows: int) -> float:
        """Of a place with so many tiles and at least so many rows, as if they were all of one expert."""
        gpu, total = self.cost_model.gpu, 0.0
        for full, kernel in zip(self._work((tiles * TILE,)).kernels, self._work((rows,)).kernels, strict=True):
            if kernel.kind == "grouped_gemm":
                seconds = beside_memory_s(arithmetic_s(full, gpu), self.cost_model.memory_s(kernel))
                seconds += start_s(kernel, gpu)
            else:
                seconds = self.cost_model.kernel_s(kernel)
            total += max(seconds, gpu.kernel_launch_s)
        return total

    def _fluid_s(self, rows: int, *, padded: float, read: int) -> float:
        """Of a place on average: its rows, with padding, as if neither tiles nor waves were whole; it reads `read`
        experts in every part.
        """
        gpu, held = self.cost_model.gpu, max(1, read)
        kernels = self._work(tuple((at + 1) * rows // held - at * rows // held for at in range(held))).kernels
        total = 0.0
        for kernel in kernels:
            if kernel.kind != "grouped_gemm":
                seconds = self.cost_model.kernel_s(kernel)
            else:
                wasted = max(1.0, padded / rows) if rows else 1.0
                fluid_s = kernel.flops * wasted / reachable_flops_per_s(kernel, gpu)
                seconds = beside_memory_s(fluid_s, self.cost_model.memory_s(kernel))
                seconds += start_s(kernel, gpu) if seconds else 0.0
            total += max(seconds, gpu.kernel_launch_s)
        return total

    def _work(self, rows: tuple[int, ...]) -> Work:
        operators = self.experts.expert_operators(tokens_per_expert=rows, etp=self.plan.etp)
        again = self.plan.recompute == "selective"
        return work("experts", operators, self.passes, precision=self.plan.precision, again=again)
