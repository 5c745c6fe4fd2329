"""A picture of one exchange: who sends how much to whom, and which links that keeps busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats
from moeplan.exporters._figure import drawn
from moeplan.network import ExchangeTime
from moeplan.units import show

_MOST_ROWS = 512
_BARS = 16


def draw_exchange(found: ExchangeTime, cluster: Cluster, path: str | Path) -> None:
    """Left, bytes by sender (row) and receiver (column) over all phases; right, the links that are busy longest.

    Above 512 GPUs a row is a node. Raises MoeplanError for another suffix, and a path that cannot be written.
    """
    with drawn(path, width_in=11.0, height_in=5.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
        _matrix(figure, left, found, cluster)
        _links(right, found, cluster)
        figure.suptitle(
            f"{found.operation.replace('_', '-')} by {found.algorithm} on {cluster.name}: {show(found.time_s, 's')}, "
            f"at least {show(found.cut_bound_s, 's')} by any algorithm",
            fontsize=10,
        )


def _matrix(figure: Any, axes: Any, found: ExchangeTime, cluster: Cluster) -> None:
    each = 1 if cluster.num_gpus <= _MOST_ROWS else cluster.gpus_per_node
    table = traffic_bytes(found, cluster.num_gpus, each)
    shown: Floats = np.where(table > 0, table, np.nan)
    image = axes.imshow(shown, cmap="viridis_r", interpolation="nearest")
    axes.set_xlabel("receiving " + ("GPU" if each == 1 else "node"))
    axes.set_ylabel("sending " + ("GPU" if each == 1 else "node"))
    bar = figure.colorbar(image, ax=axes, fraction=0.046, label="bytes of all phases")
    bar.ax.yaxis.set_major_formatter(lambda value, _: show(value, "B"))


def traffic_bytes(found: ExchangeTime, num_gpus: int, each: int) -> Floats:
    """Bytes by sender and receiver, `each` neighbouring GPUs together. Where few pairs stand for all, all are alike."""
    rows = -(-num_gpus // each)
    if found.count_F.max() > 1:
        members = np.bincount(np.arange(num_gpus) // each).astype(np.float64)
        table: Floats = (np.outer(members, members) - np.diag(members)) * float(found.size_bytes_F[0])
        return table
    key = found.source_F // each * rows + found.target_F // each
    summed: Floats = np.bincount(key, weights=found.size_bytes_F, minlength=rows * rows).astype(np.float64)
    return summed.reshape(rows, rows)


def _links(axes: Any, found: ExchangeTime, cluster: Cluster) -> None:
    busy_s = np.divide(
        found.load_bytes_K, cluster.bandwidth_bytes_per_s_K, out=np.zeros_like(found.load_bytes_K),
        where=found.load_bytes_K > 0,
    )  # fmt: skip
    worst = np.argsort(-busy_s, kind="stable")[:_BARS][::-1]
    worst = worst[busy_s[worst] > 0]
    axes.barh(np.arange(len(worst)), busy_s[worst] * 1e3, color="#3b6ea5")
    axes.axvline(found.time_s * 1e3, color="#b03a2e", linewidth=1, label="the exchange")
    axes.set_yticks(np.arange(len(worst)), [cluster.link_name(int(link)) for link in worst], fontsize=7)
    axes.set_xlabel("busy, ms")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
