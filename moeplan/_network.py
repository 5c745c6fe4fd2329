"""The sub-commands `moeplan network ...`: what is known of a network before there is a plan.

`cli` guards each of them in its own way and hangs them under `network`. What a command needs is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer

from moeplan._flags import Json, Nodes, Settings, changes_of
from moeplan.errors import MoeplanError
from moeplan.units import show

if TYPE_CHECKING:
    from moeplan._screen import Screen
    from moeplan.domain.cluster import Cluster
    from moeplan.domain.program import Floats, Ints
    from moeplan.network import ExchangeTime

_WIDEST = 16
"""GPUs up to which a square table fits a screen."""
_MARKS = {"error": "bold red", "warning": "yellow", "note": "dim"}
_Document = Mapping[str, Any]


def network_app(guarded: Callable[[], AbstractContextManager[None]]) -> typer.Typer:
    """The commands under `network`, each inside a guard that turns errors into a message and a status."""
    app = typer.Typer(
        help="Look at a network: what exchanges cost on it, what a topology file says and what looks wrong.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    for name, command in {"a2a": a2a, "doctor": doctor}.items():
        app.command(name)(guarded()(command))  # type: ignore[operator]
    return app


def a2a(
    cluster: Annotated[str, typer.Option(help="A topology's name or file, also NCCL's XML.")],
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="What each GPU sends, its own part included: 64MiB.")
    ] = None,
    traffic: Annotated[
        Path | None, typer.Option(help="Bytes from each GPU to each: .npz, .npy or .csv, a square matrix.")
    ] = None,
    algorithm: Annotated[str, typer.Option(help="A name of `moeplan list collectives`, or all.")] = "all",
    nodes: Nodes = None,
    ranks: Annotated[str | None, typer.Option(help="Which GPUs take part, as in 0-63 or 0,8,16. Default: all.")] = None,
    fidelity: Annotated[
        str, typer.Option(help="flow (exact) or batched (ends close together share an event).")
    ] = "flow",
    tolerance: Annotated[float | None, typer.Option(help="How close, as a share of the elapsed time. [0.01]")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the fastest: traffic and busy links, .png, .svg or .pdf.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Time an all-to-all under one algorithm or all: seconds, bounds, what holds it up, bytes by distance.

    The bound is that of the algorithm's own busiest links; the cut is what no algorithm can beat.
    """
    from moeplan import menu
    from moeplan.catalogue import cluster_from

    wanted = cluster_from(cluster, nodes=nodes, changes=changes_of(settings or []))
    members, size_bytes, matrix = _ranks(ranks, wanted), _size(size, traffic), _matrix(traffic)
    names = menu.names("collectives") if algorithm == "all" else [algorithm]
    found, refused = _timed(
        wanted, names, size_bytes=size_bytes, traffic_bytes_GG=matrix, ranks=members, fidelity=fidelity,
        tolerance=tolerance, one_by_one=algorithm == "all",
    )  # fmt: skip
    if plot is not None:
        from moeplan.exporters._exchange_picture import draw_exchange

        draw_exchange(found[0], wanted, plot)
    if as_json:
        from moeplan._screen import print_json

        print_json({"cluster": wanted.name, "gpus": wanted.num_gpus, "results": [_as_json(each) for each in found],
                    "refused": refused})  # fmt: skip
    else:
        _print_times(wanted, wanted.num_gpus if members is None else len(members), found, refused)


def _ranks(text: str | None, cluster: Cluster) -> Ints | None:
    import numpy as np

    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise MoeplanError(f"--ranks {text!r}: {piece!r} is not a number or a range; write 0-63 or 0,8,16")
        if int(last or first) >= cluster.num_gpus:
            remedy = f"{cluster.name} has GPUs 0 to {cluster.num_gpus - 1}; name some of these, or use more --nodes"
            raise MoeplanError(f"--ranks {text!r}: {remedy}")
        if int(last or first) < int(first):
            raise MoeplanError(f"--ranks {text!r}: {piece!r} goes downwards; write {last}-{first}")
        found += range(int(first), int(last or first) + 1)
    return np.array(found, np.int64)


def _size(text: str | None, traffic: Path | None) -> float | None:
    from moeplan.units import parse

    if (text is None) == (traffic is None):
        raise MoeplanError("give either --bytes, such as 64MiB, or --traffic with a matrix")
    try:
        size_bytes = None if text is None else parse(text, "B")
    except ValueError as error:
        raise MoeplanError(f"--bytes: {error}; write it as in 64MiB") from None
    if size_bytes is not None and size_bytes <= 0:
        raise MoeplanError(f"--bytes: {text!r} moves nothing; use more than 0, as in 64MiB")
    return size_bytes


def _matrix(path: Path | None) -> Floats | None:
    """The square matrix of a file; the only array of an .npz, or the one called traffic."""
    import numpy as np

    if path is None:
        return None
    try:
        if path.suffix == ".csv":
            table = np.loadtxt(path, delimiter=",", ndmin=2)
        else:
            table = np.load(path, allow_pickle=False)
            if not isinstance(table, np.ndarray):
                keys = list(table.keys())
                if len(keys) != 1 and "traffic" not in keys:
                    raise MoeplanError(f"--traffic {path}: holds {', '.join(keys)}; call the matrix traffic")
                table = table["traffic" if "traffic" in keys else keys[0]]
        return np.asarray(table, np.float64)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoeplanError(f"--traffic {path}: {reason}; give a square matrix of bytes as .npz, .npy or .csv") from None


def _timed(
    cluster: Cluster, names: Sequence[str], *, one_by_one: bool, **given: Any
) -> tuple[list[ExchangeTime], dict[str, str]]:
    """The algorithms that can be done, the fastest first, and why the others cannot."""
    from moeplan import menu
    from moeplan.errors import SimulationError
    from moeplan.network import all_to_all

    found, refused = [], {}
    for name in names:
        if one_by_one and "all_to_all" not in menu.load("collectives", name, "OPERATIONS"):
            continue
        try:
            found.append(all_to_all(cluster, algorithm=name, **given))
        except SimulationError as error:
            if not one_by_one or name == "linear":
                raise
            refused[name] = str(error)
    return sorted(found, key=lambda each: each.time_s), refused


def _as_json(found: ExchangeTime) -> dict[str, Any]:
    names = (
        "algorithm", "fidelity", "tolerance", "time_s", "bound_s", "cut_bound_s", "cut", "bottleneck",
        "bottleneck_busy_s", "tier_bytes",
    )  # fmt: skip
    phases = [
        {"delay_s": each.delay_s, "flow_s": each.flow_s, "bound_s": each.bound_s, "busiest_link": each.busiest_link}
        for each in found.phases
    ]
    return {name: getattr(found, name) for name in names} | {
        "messages": int(found.count_F.sum()), "phases": phases,
    }  # fmt: skip


def _print_times(cluster: Cluster, num_members: int, found: Sequence[ExchangeTime], refused: Mapping[str, str]) -> None:
    from moeplan._screen import Screen

    screen = Screen()
    some = "" if num_members == cluster.num_gpus else f"{num_members:,} of "
    screen.line(f"All-to-all on {cluster.name}, {some}{cluster.num_gpus:,} GPUs", style="bold cyan")
    best = found[0]
    bytes_that_count = f": the bytes {best.cut}" if best.cut_bound_s else ", since nothing has to move"
    screen.line(f"No algorithm can take less than {show(best.cut_bound_s, 's')}{bytes_that_count}.")
    tiers = [name for name in cluster.tier_names if any(each.tier_bytes[name] > 0 for each in found)]
    heads = ("algorithm", "time", "bound", "over cut", "waves", "messages", "busiest link", *tiers)
    rows = [
        (
            each.algorithm, show(each.time_s, "s"), show(each.bound_s, "s"),
            f"{each.time_s / each.cut_bound_s:.3g}x" if each.cut_bound_s else "-", str(len(each.phases)),
            str(int(each.count_F.sum())), each.bottleneck, *(show(each.tier_bytes[name], "B") for name in tiers),
        )
        for each in found
    ]  # fmt: skip
    screen.table(heads, rows, title="Algorithms, the fastest first", right="lrrrrrl" + "r" * len(tiers), whole=(0,))
    for reason in refused.values():
        screen.line(reason, style="dim")


def doctor(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="NCCL's topology XML, or `nvidia-smi topo -m`.")],
    strict: Annotated[bool, typer.Option("--strict", help="End with status 1 if anything looks wrong.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a topology file says, and what looks wrong in it.

    The file is what NCCL writes with NCCL_TOPO_DUMP_FILE, or the output of `nvidia-smi topo -m`, if possible after
    that of `nvidia-smi -L`. Status 0 whatever is found (1 with --strict), 2 for a file that cannot be read.
    """
    from moeplan.importers._node_report import report

    document = report(file)
    if as_json:
        from moeplan._screen import print_json

        print_json(document)
    else:
        print_report(document)
    if strict and document["findings"]:
        raise typer.Exit(1)


def print_report(document: _Document) -> None:
    """The document of a topology file as tables, and then what looks wrong."""
    from moeplan._screen import Screen

    screen = Screen()
    gpus, nics = document["gpus"], document["nics"]
    screen.line(f"{document['file']}: {document['format']}, {len(gpus)} GPUs, {len(nics)} NICs", style="bold cyan")
    screen.line(f"GPU: {document['gpu']['sheet'] or 'on no sheet'}, because {document['gpu']['because']}")
    _sockets(screen, document)
    _tree(screen, document)
    _devices(screen, document)
    _squares(screen, document)
    _findings(screen, document["findings"])


def _sockets(screen: Screen, document: _Document) -> None:
    heads = ("socket", "NUMA", "host", "arch", "vendor", "to the others")
    keys = ("name", "numa", "host", "arch", "vendor", "to_other_sockets_bytes_per_s")
    screen.table(heads, [_row(each, keys) for each in document["sockets"]], title="Sockets", right="lrlllr")


def _tree(screen: Screen, document: _Document) -> None:
    """The PCIe tree; each socket's devices below it, as deep as they hang."""
    rows: list[tuple[str, ...]] = []
    for socket in document["sockets"]:
        rows.append((socket["name"], "", "", ""))
        for slot in document["pcie"]:
            if slot["socket"] == socket["name"]:
                name = "  " * (slot["depth"] + 1) + slot["busid"]
                link = (
                    f"{slot['link_speed'] or '?'} x{_or(slot['link_width'])}" if slot["link_speed"] is not None else "-"
                )
                rows.append((name, " ".join(slot["holds"]), link, _rate(slot["bandwidth_bytes_per_s"])))
    screen.table(("PCIe", "holds", "link", "bandwidth"), rows, title="PCIe tree", right="lllr", whole=(0,))


def _devices(screen: Screen, document: _Document) -> None:
    heads = ["GPU", "bus id", "sm", "NVLinks", "C2C", "its NIC", "over", "GDR"]
    keys = ["name", "busid", "sm", "nvlinks", "c2c_bytes_per_s", "nic", "nic_distance", "gdr"]
    screen.table(heads, [_row(gpu, keys) for gpu in document["gpus"]], title="GPUs", right="llrrrlll")
    heads = ["NIC", "device", "bus id", "socket", "speed", "GDR", "serves"]
    keys = ["name", "device", "busid", "socket", "speed_bytes_per_s", "gdr", "serves"]
    if document["nics"]:
        screen.table(heads, [_row(nic, keys) for nic in document["nics"]], title="NICs", right="llllrll")


def _row(thing: _Document, keys: Sequence[str]) -> list[str]:
    """The cells of a thing; a bandwidth as a person reads it, a list in words."""
    return [_rate(thing[key]) if key.endswith("_per_s") else _or(thing[key]) for key in keys]


def _squares(screen: Screen, document: _Document) -> None:
    """How each pair of GPUs is joined, and with what bandwidth."""
    names = [gpu["name"] for gpu in document["gpus"]]
    if not 1 < len(names) <= _WIDEST:
        if names[1:]:
            screen.line()
            screen.line(f"The tables of all pairs of {len(names)} GPUs are in --json.")
        return
    for title, key in (("Joined by", "links"), ("GB/s in each direction", "bandwidth_bytes_per_s")):
        rows = [(name, *map(_cell, row)) for name, row in zip(names, document[key], strict=True)]
        screen.table(("", *names), rows, title=title, right="l" + "r" * len(names))


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value / 1e9:.4g}"


def _findings(screen: Screen, findings: Sequence[_Document]) -> None:
    screen.line()
    if not findings:
        screen.line("Nothing looks wrong.", style="bold green")
        return
    counts = [(sum(each["severity"] == severity for each in findings), severity) for severity in _MARKS]
    said = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count)
    screen.line(f"What looks wrong: {said}", style="bold")
    for finding in findings:
        for text, style in _lines(finding):
            screen.line(text, style=style)


def _lines(finding: _Document) -> Iterator[tuple[str, str]]:
    line = "" if finding["line"] is None else f" (line {finding['line']})"
    yield f"{finding['severity']}: {finding['where']}{line}: {finding['what']}", _MARKS[finding["severity"]]
    yield f"    why: {finding['why']}", ""
    yield f"    do: {finding['remedy']}", ""


def _or(value: object) -> str:
    """The value, or `-` where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "-" if value is None or not text else text


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else show(bytes_per_s, "B/s")
