"""A calibration as a cost model's file: figures with their unit, source, residual and number of samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from moeplan.domain.measured import Table, Terms
from moeplan.errors import MoeplanError
from moeplan.validator.calibrate import Calibration
from moeplan.validator.fit import Residual


def check_target(path: Path) -> None:
    """What cannot be written is found before the ten minutes and not after them."""
    if path.suffix != ".yaml":
        raise MoeplanError(f"{path}: a cost model ends in .yaml; use {path.with_suffix('.yaml')}")
    if not path.parent.is_dir():
        raise MoeplanError(f"{path}: there is no folder {path.parent}; make it, or use another path")


def write(calibration: Calibration, path: Path) -> None:
    """The file at `path`, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text("\n".join(_lines(calibration)) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _lines(found: Calibration) -> Iterator[str]:
    notes, measured = {each.name: _note(each) for each in found.residuals}, found.measured
    yield f"about: {_text(f'{measured.device}, as measured by moeplan calibrate')}"
    yield f"extends: {found.base}"
    yield "sources:"
    cite = f"moeplan calibrate: {found.repetitions} steps of small plans, of which {found.dropped} were disturbed"
    yield (
        f"  calibrated: {{cite: {_text(cite)}, kind: measured, date: {_text(found.date)}, "
        f"environment: {_text(found.environment)}}}"
    )
    yield "calibration:"
    yield f"  compute_share_beside_exchange: {_figure(f'{100 * found.compute_share:.4g} %')}"
    yield f"  exchange_share_beside_compute: {_figure('100 %', 'what it loses is in the times of exchanges')}"
    yield "  measured:"
    yield f"    device: {_text(measured.device)}"
    yield f"    processors: {_figure(str(measured.processors))}"
    yield f"    reference: {_figure(_seconds(measured.reference_s), 'of the yardstick, when all this was measured')}"
    yield f"    process_memory: {_figure(f'{measured.process_memory_bytes / 1e6:.5g} MB')}"
    yield f"    jitter: {_figure(f'{measured.jitter:.4g}')}"
    for key, groups, prefix in (("products", measured.products, ""), ("tasks", measured.tasks, "task ")):
        yield f"    {key}:"
        for dtype, terms in groups.items():
            yield f"      {dtype}:"
            for name, each in terms.items():
                yield f"        {name}: {_terms(each, notes.get(f'{prefix}{name} {dtype}', ''))}"
    if measured.exchanges:
        yield "    exchanges:"
        for name, table in measured.exchanges.items():
            yield f"      {name}:"
            yield from _table(table, notes.get(name, ""))


def _terms(terms: Terms, note: str) -> str:
    parts = {"overhead": _seconds(max(terms.overhead_s, 1e-9))}
    if terms.peak_flops_per_s is not None:
        parts["peak"] = f"{terms.peak_flops_per_s / 1e9:.5g} GFLOP/s"
    if terms.bandwidth_bytes_per_s is not None:
        parts["bandwidth"] = f"{terms.bandwidth_bytes_per_s / 1e9:.5g} GB/s"
    first = next(iter(parts))
    figures = [f"{name}: {_figure(value, note if name == first else '')}" for name, value in parts.items()]
    return f"{{{', '.join(figures)}}}"


def _table(table: Table, note: str) -> Iterator[str]:
    for number, (size, seconds) in enumerate(table):
        yield f'        "{size:.0f} B": {_figure(_seconds(seconds), "" if number else note)}'


def _figure(value: str, note: str = "") -> str:
    tail = f", note: {_text(note)}" if note else ""
    return f"{{value: {value}, source: calibrated{tail}}}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.5g} us"


def _text(text: str) -> str:
    return json.dumps(text)


def _note(residual: Residual) -> str:
    held_out = "" if residual.held_out is None else f", {100 * residual.held_out:.1f} % on shapes held out"
    return f"off by {100 * residual.fitted:.1f} %{held_out}; {residual.count} samples"


def summary(found: Calibration) -> Mapping[str, object]:
    """What a program reads: residuals by class, and how the machine behaved."""
    return {
        "schema": "moeplan.calibration/v1", "device": found.measured.device, "environment": found.environment,
        "date": found.date, "repetitions": found.repetitions, "dropped_repetitions": found.dropped,
        "compute_share_beside_exchange": found.compute_share,
        "residuals": [
            {
                "name": each.name, "fitted": each.fitted, "held_out": each.held_out, "p90": each.p90,
                "samples": each.count,
            }
            for each in found.residuals
        ],
    }  # fmt: skip
