"""How well published measurements are foreseen: `python benchmarks/accuracy.py` writes accuracy.md and parity.png.

`--refit` first fits the constants that only whole steps can tell, and writes them where they are read: the terms of
`cost_models/overheads/megatron-core.yaml`, each GPU's sustained speed in its sheet, and `cost_models/intervals.yaml`.
Needs nothing but the package; some minutes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeplan import catalogue
from moeplan.accuracy import Assessment, assess
from moeplan.accuracy.fits import Constants, Observation, fit
from moeplan.accuracy.intervals import tail_of
from moeplan.accuracy.judged import Judged, judged_of
from moeplan.accuracy.overheads import FITTED, Overheads, overheads_of
from moeplan.accuracy.records import published, read
from moeplan.accuracy.scores import Row, Summary, quantile, scored, summaries
from moeplan.accuracy.steps import believed_s
from moeplan.domain.cluster import Gpu
from moeplan.exporters._parity_picture import Point, draw_parity

HERE = Path(__file__).parent
TARGETS = {
    ("training_e2e", "A"): (0.06, 0.15), ("training_e2e", "B"): (0.10, 0.25), ("microbench_comm", "A"): (0.10, 0.25),
    ("microbench_gemm", "A"): (0.08, 0.20), ("microbench_attn", "A"): (0.08, 0.20), ("memory", "A"): (None, 0.08),
    ("serving_e2e", "A"): (0.15, 0.40), ("serving_e2e", "B"): (0.15, 0.40),
}  # fmt: skip


# ---- fitting


def learned() -> list[Observation]:
    """The published steps that the constants are fitted to."""
    chosen = [each for each in read(published()) if each["kind"] == "training_e2e" and each["completeness"] == "A"]
    judged = [judged_of(each, group=()) for each in chosen if each["scorable"]]
    return [each.trained.observation for each in judged if isinstance(each, Judged) and each.trained is not None]


def write_constants(constants: Constants, observations: Sequence[Observation]) -> None:
    """The terms into the overhead set, each GPU's sustained speed into its sheet."""
    path = catalogue.root() / "cost_models" / "overheads" / "megatron-core.yaml"
    text = path.read_text(encoding="utf-8")
    for term in FITTED:
        value, key = constants.values[term], term.removesuffix("_s")
        shown = f"{1e3 * value:.3g} ms" if term.endswith("_s") else f"{value:.2f}"
        text = re.sub(rf"(\n  {key}: {{value: )[^,]+", rf"\g<1>{shown}", text)
    path.write_text(text, encoding="utf-8")
    for name in _SHEETS:
        gpu = catalogue.cluster_from("hgx-h100-rail", changes={"cluster.gpu": name}).gpu
        _write_sustained(catalogue.root() / "cost_models" / "gpus" / f"{name}.yaml", constants, gpu)


_SHEETS = (
    "a100-40gb-sxm", "a100-80gb-sxm", "h100-sxm", "h100-96gb", "h20", "h200-sxm", "h800", "b200", "b300", "gb200",
    "gb300",
)  # fmt: skip
"""GPUs of architectures that the steps tell of."""


def _write_sustained(path: Path, constants: Constants, gpu: Gpu) -> None:
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not re.match(r"  (sustained_|steps:)", line)
    ]
    bits = {16: "sustained_efficiency", 8: "sustained_fp8_efficiency", 4: "sustained_fp4_efficiency"}
    found = [
        f"  {name}: {{value: {100 / constants.slower(gpu, size):.1f} %, source: steps}}" for size, name in bits.items()
    ]
    source = (
        '  steps: {cite: "energy of a FLOP on the architecture, fitted to steps of published training runs by '
        'benchmarks/accuracy.py, with this peak and TDP", kind: measured, date: "2026-12", '
        'environment: "tests/published/published-results.json, completeness A"}'
    )
    lines.insert(lines.index("sources:") + 1, source)
    if "calibration:" not in lines:
        lines.append("calibration:")
    place = lines.index("calibration:") + 1
    path.write_text("\n".join([*lines[:place], *found, *lines[place:]]) + "\n", encoding="utf-8")


def write_intervals(found: Assessment, observations: Sequence[Observation]) -> None:
    """Percentiles of what rows were off without their group, by kind, tier and whether something was guessed."""
    fitted: dict[str, set[str]] = {}
    for each in observations:
        fitted.setdefault(each.case.scenario.cluster.gpu.name, set()).add(each.case.plan.precision.compute)
    by_kind: dict[str, dict[str, list[Row]]] = {}
    for row in scored(found.rows):
        for name in {row.tier + (", guessed" if row.guessed else ""), "any"}:
            by_kind.setdefault(row.kind, {}).setdefault(name, []).append(row)
    lines = [
        "about: How far predictions were off that knew nothing of their group, as ends of 80 % intervals",
        f"num_constants: {found.num_constants}",
        "fitted: # GPUs and number formats whose steps the constants were fitted to",
        *(f"  {gpu}: [{', '.join(sorted(kinds))}]" for gpu, kinds in sorted(fitted.items())),
        "spreads: # by kind of record and tier, with and without something guessed; written by benchmarks/accuracy.py",
    ]
    for kind, by_tier in sorted(by_kind.items()):
        lines.append(f"  {kind}:")
        lines += [
            f"    {name!r}: {_ends(rows)}" for name, rows in sorted(by_tier.items()) if len(rows) >= 8 or name == "any"
        ]
    text = "\n".join(lines) + "\n"
    (catalogue.root() / "cost_models" / "intervals.yaml").write_text(text, encoding="utf-8")


def _ends(rows: Sequence[Row]) -> str:
    value_N = np.array([row.measured / row.predicted - 1 for row in rows])
    weight_N = np.array([row.weight for row in rows])
    tail = tail_of(len({(row.tags["gpu"], row.tags["model"]) for row in rows}))
    return "[" + ", ".join(f"{100 * quantile(value_N, weight_N, share):.1f} %" for share in (tail, 1 - tail)) + "]"


# ---- the page


def ablation(constants: Constants, observations: Sequence[Observation]) -> list[tuple[str, str, float, float, float]]:
    """Each term as if it were not there, the others as they are: median, 90th percentile and bias of the steps."""
    neutral = Overheads(host_dense_s=overheads_of().host_dense_s)
    without: dict[str, tuple[Overheads, dict[str, float]]] = {"nothing left out": (constants.overheads, {})}
    for term in FITTED:
        changed = replace(constants.overheads, **{term: getattr(neutral, term)})
        without[term.removesuffix("_s").replace("_", " ")] = (changed, {})
    energies = [name for name in constants.values if "energy" in name]
    without["the power limit"] = (constants.overheads, dict.fromkeys(energies, 0.0))
    without["all of them"] = (neutral, dict.fromkeys(energies, 0.0))
    rows = []
    for name, (overheads, values) in without.items():
        tried = Constants(values=dict(constants.values) | values)
        errors = [
            believed_s(each.step, each.case, overheads, gpu=tried.gpu(each.case.scenario.cluster.gpu)) / each.measured_s
            - 1
            for each in observations
        ]
        error_N, weight_N = np.array(errors), np.array([each.weight for each in observations])
        sizes = [quantile(np.abs(error_N), weight_N, share) for share in (0.5, 0.9)]
        rows.append((name, "", sizes[0], sizes[1], float(np.average(error_N, weights=weight_N))))
    return rows


def page(found: Assessment, constants: Constants, observations: Sequence[Observation]) -> str:
    """accuracy.md."""
    parts = [
        "# How well published measurements are foreseen",
        "Written by `python benchmarks/accuracy.py`; the data is `tests/published/published-results.json`. Each row is "
        "predicted by constants that were fitted without its GPU and model together; "
        f"{found.num_constants} constants are fitted to whole steps. "
        "Errors are shares of the measured value, weighted by `weight`, of rows that count.",
        "![predicted against measured](parity.png)",
        "## Errors and targets",
        _table(
            ("kind", "completeness", "n", "median", "p90", "bias", "covered", "target: median, p90"), _against(found)
        ),
    ]
    for name in ("source", "gpu", "model", "precision"):
        rows = [(kind, tag, *_words(each)) for (kind, tag), each in found.by(name).items()]
        parts += [f"## By {name}", _table(("kind", name, "n", "median", "p90", "bias", "covered"), rows)]
    tiers = summaries(found.rows, lambda row: (row.kind, row.tier))
    parts += ["## By tier", _table(("kind", "tier", "n", "median", "p90", "bias", "covered"),
              [(kind, tier, *_words(each)) for (kind, tier), each in tiers.items()])]  # fmt: skip
    ranks = [
        (each.model, each.gpu, each.scale, str(each.n), f"{each.tau:.2f}", each.best, str(each.best_place))
        for each in found.rankings
    ]
    parts += [
        "## Order of layouts",
        "Groups of at least four layouts of one model, GPU and scale, by time for a token.",
        _table(("model", "GPU", "GPUs", "layouts", "Kendall tau", "measured best", "foreseen at place"), ranks),
        "## What each constant does",
        "Steps of completeness A under constants fitted to all of them; then each left out, the others as they are.",
        _table(("without", "median", "p90", "bias"), [(a, _share(c), _share(d), _share(e, "+")) for a, _, c, d, e in
               ablation(constants, observations)]),
        "## Constants",
        _table(("constant", "value"), [(name, f"{value:.4g}") for name, value in constants.values.items()]),
        "## Not predicted",
        _table(("record", "kind", "completeness", "counts", "reason"),
               [(e.id, e.kind, e.completeness, "yes" if e.scorable else "no", e.reason) for e in found.excluded]),
    ]  # fmt: skip
    remarks = HERE / "accuracy-remarks.md"
    if remarks.is_file():
        parts.append(remarks.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _against(found: Assessment) -> list[tuple[str, ...]]:
    rows = []
    for kind, inner in found.summary.items():
        for completeness, each in inner.items():
            target = TARGETS.get((kind, completeness))
            words = "" if target is None else ", ".join("" if share is None else _share(share) for share in target)
            rows.append((kind, completeness, *_words(each), words))
    return rows


def _words(each: Summary) -> tuple[str, ...]:
    return (
        str(each.n),
        _share(each.median_error),
        _share(each.p90_error),
        _share(each.bias, "+"),
        f"{100 * each.coverage:.0f} %",
    )


def _share(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731 - one word
    observations = learned()
    say(f"{len(observations)} steps are simulated")
    constants = fit(observations)
    found = assess()
    if "--refit" in sys.argv:
        write_constants(constants, observations)
        write_intervals(found, observations)
    (HERE / "accuracy.md").write_text(page(found, constants, observations), encoding="utf-8")
    points = [Point(row.kind, row.measured, row.predicted, row.interval) for row in scored(found.rows)]
    draw_parity([point for point in points if math.isfinite(point.predicted)], HERE / "parity.png")
    for kind, inner in found.summary.items():
        for completeness, each in inner.items():
            say(f"{kind} {completeness} " + " ".join(_words(each)))


if __name__ == "__main__":
    main()
