"""One exchange alone on a cluster: how long it takes, how long it must take, and what holds it up.

Axes: F transfer (or one of each class of transfers), K link of the cluster, G member of the group, P phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeplan import menu
from moeplan.domain.cluster import Cluster
from moeplan.domain.measured import at
from moeplan.domain.program import Exchange, Floats, Ints, Wave
from moeplan.errors import SimulationError, unknown_name
from moeplan.network.bounds import cut_bound
from moeplan.network.expand import Pattern, expand, pattern_of
from moeplan.network.fluid import FlowSet, finish_times
from moeplan.network.ports import port_finish_times
from moeplan.network.uniform import Pairs, flows_of, is_regular, pairs_of

Fidelity = Literal["flow", "batched"]
BATCH = 0.01
"""Ends within this share of the elapsed time share an event in `batched` runs."""
MOST_TRANSFERS = 30_000_000
"""More are refused before they are listed: each takes about 100 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTime:
    """One wave: what passes before its bytes flow, how long they flow, how long at least, and over which link."""

    delay_s: float
    flow_s: float
    bound_s: float
    """Bytes over capacity of the busiest link."""
    busiest_link: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExchangeTime:
    """An exchange under one algorithm: seconds, bounds, every transfer's end and every link's load.

    `bound_s` holds for this algorithm under any sharing of the links, `cut_bound_s` for every algorithm: `cut` is what
    its bytes have to cross. Ends count from the start of the exchange. `count_F` transfers end as each row says.
    """

    algorithm: str
    operation: str
    fidelity: Fidelity
    tolerance: float
    time_s: float
    bound_s: float
    cut_bound_s: float
    cut: str
    bottleneck: str
    """The link that is busy longest over all phases."""
    bottleneck_busy_s: float
    tier_bytes: dict[str, float]
    """Bytes that all transfers together carry, by how far they go."""
    phases: tuple[PhaseTime, ...]
    source_F: Ints
    target_F: Ints
    phase_F: Ints
    count_F: Ints
    size_bytes_F: Floats
    finish_s_F: Floats
    load_bytes_K: Floats


def all_to_all(
    cluster: Cluster,
    *,
    size_bytes: float | None = None,
    traffic_bytes_GG: Floats | None = None,
    ranks: Ints | None = None,
    algorithm: str = "linear",
    fidelity: Fidelity = "flow",
    tolerance: float | None = None,
) -> ExchangeTime:
    """An all-to-all among `ranks` (all GPUs): `size_bytes` of each in equal parts, or what a matrix says from i to j.

    `fidelity`: "flow" is exact, "batched" lets ends within `tolerance` of the elapsed time share an event. Raises
    SimulationError for a matrix that does not fit, for an algorithm that is not on the menu or cannot be done here, and
    for more transfers than memory would hold.
    """
    members = np.arange(cluster.num_gpus) if ranks is None else np.asarray(ranks, np.int64)
    _check_ranks(members, cluster)
    if (size_bytes is None) == (traffic_bytes_GG is None):
        raise SimulationError("all_to_all: give either size_bytes or traffic_bytes_GG")
    if traffic_bytes_GG is None:
        assert size_bytes is not None
        _check_size(size_bytes)
        share_GG, size = None, float(size_bytes)
    else:
        share_GG, size = _shares(traffic_bytes_GG, len(members))
    exchange = Exchange(
        kind="dispatch", operation="all_to_all", algorithm=algorithm, groups_NG=members[None], size_bytes=size,
        share_GG=share_GG,
    )  # fmt: skip
    return time_of(exchange, cluster, fidelity=fidelity, tolerance=tolerance)


def time_of(
    exchange: Exchange, cluster: Cluster, *, fidelity: Fidelity = "flow", tolerance: float | None = None
) -> ExchangeTime:
    """Any exchange alone on the cluster. Raises SimulationError as `all_to_all` does."""
    batch = _tolerance(fidelity, tolerance)
    _check_algorithm(exchange, cluster)
    if _is_even(exchange, cluster):
        pattern, runs, count_F = _even_run(exchange, cluster, batch)
    else:
        _check_count(exchange)
        pattern = expand(exchange, cluster)
        runs = [_phase(pattern, phase, exchange, cluster, batch) for phase in range(len(pattern.copy_s_per_byte_P))]
        count_F = np.ones(len(pattern.source_F), np.int64)
    starts = np.cumsum([0.0] + [run.time.delay_s + run.time.flow_s for run in runs])
    ends = [start + run.time.delay_s + run.finish_s_F for start, run in zip(starts, runs, strict=False)]
    load_K = np.sum([run.load_bytes_K for run in runs], axis=0)
    load_s_K = np.divide(load_K, cluster.bandwidth_bytes_per_s_K, out=np.zeros_like(load_K), where=load_K > 0)
    order = np.argsort(pattern.phase_F, kind="stable")
    size_bytes_F = pattern.share_F[order] * exchange.size_bytes
    bound, busiest = cut_bound(exchange, cluster), int(np.argmax(load_s_K))
    return ExchangeTime(
        algorithm=exchange.algorithm, operation=exchange.operation, fidelity=fidelity, tolerance=batch,
        time_s=float(starts[-1]), bound_s=sum(run.time.delay_s + run.time.bound_s for run in runs),
        cut_bound_s=bound.seconds, cut=bound.cut, bottleneck=cluster.link_name(busiest),
        bottleneck_busy_s=float(load_s_K[busiest]),
        tier_bytes=_tiers(cluster, pattern.source_F[order], pattern.target_F[order], size_bytes_F * count_F[order]),
        phases=tuple(run.time for run in runs), source_F=pattern.source_F[order], target_F=pattern.target_F[order],
        phase_F=pattern.phase_F[order], count_F=count_F[order], size_bytes_F=size_bytes_F,
        finish_s_F=np.concatenate(ends), load_bytes_K=load_K,
    )  # fmt: skip


def _is_even(exchange: Exchange, cluster: Cluster) -> bool:
    """Whether a few pairs of GPUs can stand for all: equal parts from each to each, on a regular cluster."""
    return (
        exchange.algorithm == "linear"
        and exchange.share_GG is None
        and exchange.groups_NG.shape == (1, cluster.num_gpus)
        and cluster.num_gpus > 1
        and is_regular(cluster)
    )


def _even_run(exchange: Exchange, cluster: Cluster, tolerance: float) -> tuple[Pattern, list[_Run], Ints]:
    """One wave of classes of pairs."""
    pairs = pairs_of(cluster)
    size = exchange.groups_NG.shape[1]
    pattern = pattern_of(exchange, [_wave(pairs, size)], cluster)
    bytes_C = pattern.share_F * exchange.size_bytes + pattern.extra_bytes_F
    load_k = np.bincount(pairs.link_I, weights=(pairs.times_I * np.repeat(bytes_C, np.diff(pairs.first_C1))),
                         minlength=len(pairs.first_link))  # fmt: skip
    finish_s_C = finish_times(flows_of(pairs, cluster, bytes_C), tolerance=tolerance).finish_s_F
    load_K = load_k.astype(np.float64)[pairs.class_K]
    return (
        pattern,
        [_run(load_K, finish_s_C, float(pattern.delay_s_F.max()), exchange, cluster, tolerance)],
        pairs.count_C,
    )


def _wave(pairs: Pairs, size: int) -> Wave:
    count = len(pairs.source_C)
    return Wave(
        source_F=pairs.source_C, target_F=pairs.target_C, share_F=np.full(count, 1.0 / size),
        group_F=np.zeros(count, np.int64), bundle_F=np.arange(count),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """One phase: its transfers' ends, counted from when its bytes begin to flow, and what each link carries."""

    time: PhaseTime
    finish_s_F: Floats
    load_bytes_K: Floats


def _phase(pattern: Pattern, phase: int, exchange: Exchange, cluster: Cluster, tolerance: float) -> _Run:
    now_F = pattern.phase_F == phase
    copy_s = float(pattern.copy_s_per_byte_P[phase]) * exchange.size_bytes
    host_s = at(pattern.host, pattern.host_share * exchange.size_bytes) if phase == 0 else 0.0
    delay_s = float(pattern.delay_s_F[now_F].max(initial=0.0)) + copy_s + host_s
    payload_F = pattern.share_F[now_F] * exchange.size_bytes
    bytes_F = np.where(payload_F > 0, payload_F + pattern.extra_bytes_F[now_F], 0.0)
    row, hop = np.nonzero(pattern.paths_FH[now_F] >= 0)
    link = pattern.paths_FH[now_F][row, hop].astype(np.int64)
    load_K: Floats = np.bincount(link, weights=bytes_F[row], minlength=cluster.num_links).astype(np.float64)
    bundles, bundle_F = np.unique(pattern.bundle_F[now_F], return_inverse=True)
    finish_s_F = None
    if tolerance > 0 and exchange.algorithm == "linear" and len(exchange.groups_NG) == 1:
        finish_s_F = _by_ports(pattern, bytes_F, exchange, cluster, tolerance)
    if finish_s_F is None:
        flows = _bundled(row, link, bundle_F, len(bundles), bytes_F, cluster)
        finish_s_F = finish_times(flows, tolerance=tolerance).finish_s_F[bundle_F]
    return _run(load_K, finish_s_F, delay_s, exchange, cluster, tolerance)


def _by_ports(
    pattern: Pattern, bytes_F: Floats, exchange: Exchange, cluster: Cluster, tolerance: float
) -> Floats | None:
    """The ends of a direct exchange where each GPU has its own port."""
    ranks = exchange.groups_NG[0]
    place_R = np.zeros(cluster.num_gpus, np.int64)
    place_R[ranks] = np.arange(len(ranks))
    i, j = place_R[pattern.source_F], place_R[pattern.target_F]
    bytes_GG = np.zeros((len(ranks), len(ranks)))
    bytes_GG[i, j] = bytes_F
    finish_GG = port_finish_times(cluster, ranks, bytes_GG, tolerance=tolerance)
    return None if finish_GG is None else finish_GG[i, j]


def _run(
    load_K: Floats, finish_s_F: Floats, delay_s: float, exchange: Exchange, cluster: Cluster, tolerance: float
) -> _Run:
    """A phase's figures. Raises SimulationError if its bytes were faster than the busiest link can carry them."""
    load_s_K = np.divide(load_K, cluster.bandwidth_bytes_per_s_K, out=np.zeros_like(load_K), where=load_K > 0)
    busiest = int(load_s_K.argmax())
    time = PhaseTime(
        delay_s=delay_s, flow_s=float(finish_s_F.max(initial=0.0)), bound_s=float(load_s_K[busiest]),
        busiest_link=cluster.link_name(busiest),
    )  # fmt: skip
    if time.flow_s < time.bound_s * (1 - 1e-9 - tolerance):
        raise SimulationError(
            f"conservation: {exchange.algorithm} moves its bytes in {time.flow_s:g} s, but {time.busiest_link} needs "
            f"{time.bound_s:g} s; this is a defect of moeplan, please report it"
        )
    return _Run(time=time, finish_s_F=finish_s_F, load_bytes_K=load_K)


def _bundled(row: Ints, link: Ints, bundle_F: Ints, count: int, bytes_F: Floats, cluster: Cluster) -> FlowSet:
    """Transfers that go at one pace are one flow, which crosses the links of all of them."""
    width = cluster.num_links
    key, times = np.unique(bundle_F[row].astype(np.int64) * width + link, return_counts=True)
    size_B = np.zeros(count)
    size_B[bundle_F] = bytes_F
    return FlowSet(
        capacity_bytes_per_s_K=np.where(cluster.bandwidth_bytes_per_s_K > 0, cluster.bandwidth_bytes_per_s_K, 1.0),
        link_I=(key % width).astype(np.int32), first_F1=np.searchsorted(key // width, np.arange(count + 1)),
        size_bytes_F=size_B, times_I=times.astype(np.float64) if times.max(initial=1) > 1 else None,
    )  # fmt: skip


def _tiers(cluster: Cluster, source_F: Ints, target_F: Ints, size_bytes_F: Floats) -> dict[str, float]:
    total = np.bincount(cluster.tier(source_F, target_F), weights=size_bytes_F, minlength=len(cluster.tier_names))
    return dict(zip(cluster.tier_names, total.tolist(), strict=True))


# ---- what a user can get wrong


def _check_ranks(ranks: Ints, cluster: Cluster) -> None:
    if ranks.ndim != 1 or len(np.unique(ranks)) != len(ranks) or len(ranks) == 0:
        raise SimulationError("ranks: give each GPU of the group once, at least one")
    if ranks.min() < 0 or ranks.max() >= cluster.num_gpus:
        raise SimulationError(f"ranks: {cluster.name} has GPUs 0 to {cluster.num_gpus - 1}")


def _check_size(size_bytes: float) -> None:
    if not 0 < size_bytes < np.inf:
        raise SimulationError(f"size_bytes: {size_bytes} is no number of bytes above 0, such as 67108864 for 64 MiB")


def _shares(traffic_bytes_GG: Floats, size: int) -> tuple[Floats, float]:
    """A matrix of bytes as parts of what a member sends on average."""
    table = np.asarray(traffic_bytes_GG, np.float64)
    if table.shape != (size, size):
        raise SimulationError(f"traffic: shape {table.shape} is not ({size}, {size}): a row and a column for each GPU")
    if not np.isfinite(table).all() or table.min() < 0:
        i, j = np.argwhere(~(np.isfinite(table) & (table >= 0)))[0].tolist()
        raise SimulationError(f"traffic: from {i} to {j} stands {table[i, j]}; bytes are finite and 0 or more")
    mean = float(table.sum()) / size
    if mean == 0:
        raise SimulationError("traffic: all zero, so nothing moves; give a matrix with bytes in it")
    return table / mean, mean


def _check_algorithm(exchange: Exchange, cluster: Cluster) -> None:
    names = menu.names("collectives")
    if exchange.algorithm not in names:
        able = [name for name in names if exchange.operation in menu.load("collectives", name, "OPERATIONS")]
        raise SimulationError(unknown_name(exchange.operation.replace("_", "-"), exchange.algorithm, able))
    operations = menu.load("collectives", exchange.algorithm, "OPERATIONS")
    if exchange.operation not in operations:
        raise SimulationError(f"{exchange.algorithm} does {', '.join(operations)}, not {exchange.operation}")
    if not menu.load("collectives", exchange.algorithm, "applies")(exchange.groups_NG, cluster):
        raise SimulationError(
            f"{exchange.algorithm} cannot be done by these GPUs, or is linear among them; use linear, or other ranks"
        )


def _check_count(exchange: Exchange) -> None:
    groups, size = exchange.groups_NG.shape
    if groups * size * size > MOST_TRANSFERS:
        raise SimulationError(
            f"{groups} groups of {size} GPUs are {groups * size * size} transfers, but at most {MOST_TRANSFERS} are "
            "listed; use fewer GPUs"
        )


def _tolerance(fidelity: str, tolerance: float | None) -> float:
    if fidelity not in ("flow", "batched"):
        raise SimulationError(unknown_name("fidelity", fidelity, ("flow", "batched")))
    if fidelity == "flow" and tolerance is not None:
        raise SimulationError(f"tolerance {tolerance} has no effect on fidelity flow, which is exact; use batched")
    return 0.0 if fidelity == "flow" else BATCH if tolerance is None else tolerance
