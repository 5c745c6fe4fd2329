"""Exchanges written out as transfers between GPUs, over the wires that they take. F transfers, H hops, P phases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan import menu
from moeplan.domain.cluster import Cluster
from moeplan.domain.measured import Table
from moeplan.domain.program import Exchange, Floats, Ints, Wave
from moeplan.domain.wiring import IntArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pattern:
    """The transfers of one byte of one or more exchanges that differ in size alone."""

    groups_NG: Ints
    phase_F: Ints
    group_F: Ints
    bundle_F: Ints
    source_F: Ints
    target_F: Ints
    share_F: Floats
    paths_FH: IntArray
    delay_s_F: Floats
    """The latency of the path and a message's overhead, as often as the wave has steps. A phase waits for its
    longest.
    """
    extra_bytes_F: Floats
    """What the narrowest link of the path could carry in the gaps between the messages."""
    copy_s_per_byte_P: Floats
    """Of each phase: seconds of copying in the GPUs' own memory for each byte of the exchange."""
    host: Table = ()
    """What the hosts of the members do, by the bytes that the busiest one sends."""

    @property
    def host_share(self) -> float:
        """Of the exchange's bytes, those that the busiest member sends."""
        return float(np.bincount(self.source_F, weights=self.share_F).max(initial=0.0))


def pattern_key(exchange: Exchange) -> tuple[object, ...]:
    """Exchanges with the same key move the same shares between the same ranks."""
    tables = (exchange.share_GG, exchange.reach_GB)
    return (
        exchange.operation,
        exchange.algorithm,
        exchange.groups_NG.shape,
        exchange.groups_NG.tobytes(),
        *(None if table is None else table.tobytes() for table in tables),
    )


def expand(exchange: Exchange, cluster: Cluster) -> Pattern:
    """The transfers of `exchange` in every group, with their paths."""
    return pattern_of(exchange, _waves(exchange, cluster), cluster)


def pattern_of(exchange: Exchange, waves: list[Wave], cluster: Cluster) -> Pattern:
    """The transfers of some waves, with their paths."""
    source = np.concatenate([wave.source_F for wave in waves])
    target = np.concatenate([wave.target_F for wave in waves])
    counts = [len(wave.source_F) for wave in waves]
    wave_F = np.repeat(np.arange(len(waves)), counts)
    phase_W = np.cumsum([not wave.follows or at == 0 for at, wave in enumerate(waves)]) - 1
    delay_F = cluster.path_latency_s(source, target) + cluster.path_overhead_s(source, target)
    measured = cluster.gpu.measured
    delay_F = delay_F * np.array([wave.steps for wave in waves])[wave_F]
    delay_F = delay_F + np.where(wave_F == 0, cluster.gpu.exchange_start_s, 0.0)
    gap_F = cluster.path_gap_s(source, target) * np.array([wave.messages for wave in waves])[wave_F]
    return Pattern(
        groups_NG=exchange.groups_NG,
        phase_F=phase_W[wave_F],
        group_F=np.concatenate([wave.group_F for wave in waves]),
        bundle_F=_numbered_on([wave.bundle_F for wave in waves]),
        source_F=source,
        target_F=target,
        share_F=np.concatenate([wave.share_F for wave in waves]),
        paths_FH=cluster.paths(source, target),
        delay_s_F=_one_after_another(delay_F, wave_F, phase_W),
        extra_bytes_F=gap_F * np.where(gap_F > 0, cluster.path_bandwidth_bytes_per_s(source, target), 0.0),
        copy_s_per_byte_P=np.bincount(phase_W, [wave.copy_share for wave in waves]) / cluster.gpu.copy_bytes_per_s,
        host=() if measured is None else measured.table(exchange.operation, exchange.groups_NG.shape[1]),
    )


def _one_after_another(delay_F: Floats, wave_F: Ints, phase_W: Ints) -> Floats:
    """The delays, in a wave that follows those of the waves before it in its phase added."""
    found_F = delay_F.copy()
    for wave in np.flatnonzero(np.diff(phase_W, prepend=-1) == 0).tolist():
        found_F[wave_F == wave] += found_F[wave_F == wave - 1].max(initial=0.0)
    return found_F


def _waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    groups = exchange.groups_NG
    if exchange.operation == "send":
        each = np.arange(len(groups))
        ones = np.ones(len(groups))
        return [Wave(source_F=groups[:, 0], target_F=groups[:, 1], share_F=ones, group_F=each, bundle_F=each)]
    waves = menu.load("collectives", exchange.algorithm, "waves")
    found: list[Wave] = waves(exchange, cluster)
    return [wave for wave in found if len(wave.source_F)] or found[:1]


def _numbered_on(bundles: list[Ints]) -> Ints:
    """The bundles of all waves, numbered 0, 1, ... without a gap between waves."""
    starts = np.cumsum([0] + [int(bundle.max(initial=-1)) + 1 for bundle in bundles[:-1]])
    return np.concatenate([bundle + start for bundle, start in zip(bundles, starts, strict=True)])
