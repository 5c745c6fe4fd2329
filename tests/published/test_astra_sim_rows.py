"""Collectives as ASTRA-sim prints them against ours, row by row; `astra_sim.yaml` says where each comes from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from moeplan import catalogue
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange
from moeplan.network.expand import expand
from moeplan.units import parse

DATA = YAML(typ="safe").load(Path(__file__).with_name("astra_sim.yaml"))


@cache
def switch(npus: int, bandwidth: str, latency: str) -> Cluster:
    """One machine in which every GPU hangs on one switch, by a link of this kind."""
    changes = {
        "cluster.nodes": 1, "cluster.gpus_per_node": npus, "cluster.nic.per_node": npus,
        "cluster.links.nvlink.bandwidth": bandwidth, "cluster.links.nvlink.latency": latency,
        "cluster.links.nvlink.efficiency": "100 %", "cluster.gpu.exchange_start": "0.001 ns",
    }  # fmt: skip
    return catalogue.load("mixtral-8x7b-64xh100", changes=changes).cluster


def predicted_s(row: dict[str, Any]) -> float:
    """Wave by wave: the latency and the busiest port, and at the end the message that a switch has stored."""
    run = DATA["runs"][row["run"]]
    cluster, size_bytes = switch(run["npus"], run["bandwidth"], run["latency"]), parse(row["size"], "B")
    exchange = Exchange(
        kind="", operation=row["operation"], algorithm=row["algorithm"], size_bytes=size_bytes,
        groups_NG=np.arange(run["npus"])[None],
    )  # fmt: skip
    pattern, total_s = expand(exchange, cluster), parse(row["stored"], "B") / parse(run["bandwidth"], "B/s")
    for phase in range(len(pattern.copy_s_per_byte_P)):
        now = pattern.phase_F == phase
        paths = pattern.paths_FH[now]
        row_number, hop = np.nonzero(paths >= 0)
        load_K = np.bincount(paths[row_number, hop], weights=pattern.share_F[now][row_number] * size_bytes)
        busiest_s = (load_K / cluster.bandwidth_bytes_per_s_K[: len(load_K)]).max()
        total_s += float(pattern.delay_s_F[now].max()) + float(busiest_s)
    return total_s


@pytest.mark.parametrize("row", DATA["rows"], ids=lambda row: f"{row['run']}: {row['algorithm']} {row['operation']}")
def test_a_collective_takes_what_astra_sim_prints_within_the_band_of_the_row(row: dict[str, Any]) -> None:
    printed_s, found_s = parse(row["printed"], "s"), predicted_s(row)
    error = found_s / printed_s - 1
    print(f"{row['run']}: {row['algorithm']} {row['operation']}: printed {row['printed']}, error {100 * error:+.2f} %")
    assert abs(error) <= parse(row["band"], "share"), row["why"]


def test_every_row_has_a_run_with_a_source_and_a_reason() -> None:
    for row in DATA["rows"]:
        assert DATA["runs"][row["run"]]["source"] in DATA["sources"]
        assert row["why"]
