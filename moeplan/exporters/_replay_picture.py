"""A picture of placement over time: how full the fullest GPU is in each step, a line for each policy.

Axes of arrays: T scored step, L layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeplan.domain.placement import Floats
from moeplan.exporters._figure import drawn


def draw_replay(ratio_TL_by_policy: Mapping[str, Floats], path: str | Path) -> None:
    """The mean over layers of the fullest GPU's tokens over the mean one's; the first scored step is step 1.

    Raises MoeplanError for another suffix, and a path that cannot be written.
    """
    with drawn(path, width_in=7.4, height_in=4.2) as figure:
        axes = figure.add_subplot()
        for policy, ratio_TL in ratio_TL_by_policy.items():
            axes.plot(range(1, len(ratio_TL) + 1), ratio_TL.mean(axis=1), marker=".", label=policy)
        axes.set_xlabel("step")
        axes.set_ylabel("fullest GPU over mean")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
