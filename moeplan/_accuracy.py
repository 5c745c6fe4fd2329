"""The sub-command `moeplan accuracy`: published measurements, or one's own, beside what is predicted.

What it needs is imported when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan._flags import Json
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.accuracy import Assessment
    from moeplan.accuracy.scores import Row, Summary


def accuracy(
    results: Annotated[
        Path | None, typer.Option(help="Measured rows of your own, YAML or JSON; they never enter a fit.")
    ] = None,
    group_out: Annotated[
        str | None,
        typer.Option(help="Predict each row without the rows that are equal in these fields, as in hardware.gpu."),
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only records of this kind; may be given again.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Score predictions against measurements: error, bias, interval and tier of every row."""
    from moeplan._screen import print_json
    from moeplan._waiting import waiting
    from moeplan.accuracy import assess

    if plot is not None:
        _check_plot(plot)
    with waiting("predicting measurements") as progress:
        found = assess(results, kinds=kinds, group_out=group_out, progress=progress)
    if as_json:
        print_json(found.document())
    else:
        _print(found)
    if plot is not None:
        from moeplan.accuracy.scores import scored
        from moeplan.exporters._parity_picture import Point, draw_parity

        points = [Point(row.kind, row.measured, row.predicted, row.interval) for row in scored(found.rows)]
        draw_parity(points, plot)
        print(f"wrote {plot}", file=sys.stderr)
    if found.lacks_scorable:
        raise typer.Exit(1)


def _check_plot(path: Path) -> None:
    """What cannot be written is found before the work and not after it."""
    from moeplan.exporters import suffix_of
    from moeplan.exporters._figure import SUFFIXES

    suffix_of(path, SUFFIXES)
    if not path.parent.is_dir():
        raise MoeplanError(f"{path}: there is no folder {path.parent}; make it, or use another path")


def _print(found: Assessment) -> None:
    from moeplan._screen import Screen

    screen = Screen()
    heads = ("record", "quantity", "predicted", "measured", "error", "80 % interval", "tier")
    screen.table(heads, [_line(row) for row in found.rows], title="Rows", right="llrrrrl", whole=(0,))
    summary_heads = ("kind", "", "n", "median", "p90", "bias", "covered")
    lines = [
        (kind, completeness, *_errors(each))
        for kind, by_completeness in found.summary.items()
        for completeness, each in by_completeness.items()
    ]
    screen.table(summary_heads, lines, title="Errors of rows that count", right="llrrrrr")
    for name in ("source", "gpu", "model"):
        lines = [(kind, tag, *_errors(each)) for (kind, tag), each in found.by(name).items()]
        screen.table(
            ("kind", name, "n", "median", "p90", "bias", "covered"), lines, title=f"By {name}", right="llrrrrr"
        )
    ranks = [
        (each.model, each.gpu, each.scale, str(each.n), f"{each.tau:.2f}", each.best, str(each.best_place))
        for each in found.rankings
    ]
    if ranks:
        screen.table(
            ("model", "GPU", "GPUs", "layouts", "Kendall tau", "measured best", "foreseen at place"), ranks,
            title="Layouts of one model, GPU and scale", right="lllrrlr",
        )  # fmt: skip
    lost = [(each.id, each.kind, each.completeness, each.reason) for each in found.excluded]
    if lost:
        screen.table(("record", "kind", "", "reason"), lost, title="Not predicted", whole=(0,))
    screen.line()
    screen.line(
        f"{found.num_constants} constants are fitted to whole steps; each row is predicted without {found.left_out}"
    )


def _line(row: Row) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.id, row.quantity, f"{row.predicted:.4g}", f"{row.measured:.4g}", f"{100 * row.error:+.1f} %",
        f"{low:.4g} .. {high:.4g}", row.tier,
    )  # fmt: skip


def _errors(each: Summary) -> tuple[str, ...]:
    shares = (each.median_error, each.p90_error)
    return (str(each.n), *(f"{100 * share:.1f} %" for share in shares), f"{100 * each.bias:+.1f} %",
            f"{100 * each.coverage:.0f} %")  # fmt: skip
