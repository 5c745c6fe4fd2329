"""The sub-command `moeplan emulate`: another sub-command, with its ranks on the nodes of an emulated network.

What it needs is imported when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeplan.errors import MoeplanError

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND...", help="What to run there, such as: execute tiny-moe-2-ranks --steps 5."),
]


def emulate(
    nodes: Annotated[int, typer.Option(help="Nodes, each a network namespace of this machine.")],
    rate: Annotated[str, typer.Option(help="Of each node's cable, in each direction: 1Gbit/s.")],
    words: Words = None,
    delay: Annotated[str, typer.Option(help="Of each message on its way, beside what the kernel takes: 200us.")] = "0s",
    ranks_per_node: Annotated[int, typer.Option(help="Processes in each node.")] = 1,
    mtu: Annotated[int, typer.Option(help="Bytes of the largest frame, without its header.")] = 1500,
    topology: Annotated[
        Path | None, typer.Option(help="Write the matching topology there; without a command, do only that.")
    ] = None,
) -> None:
    """Run a command on an emulated network of nodes on this machine, which is its cluster (Linux, root)."""
    from moeplan.emulator.emulate import Network, check, emulated
    from moeplan.emulator.topology import write_topology

    network = Network(
        nodes=nodes, rate_bytes_per_s=_parsed("--rate", rate, "B/s"), delay_s=_parsed("--delay", delay, "s"),
        ranks_per_node=ranks_per_node, mtu=mtu,
    )  # fmt: skip
    check(network)
    if topology is not None:
        write_topology(network, topology)
        print(f"wrote {topology}", file=sys.stderr)
    elif not words:
        raise MoeplanError("emulate: no command is given; write one after --, such as -- execute tiny-moe-2-ranks")
    if words:
        with emulated(network) as file:
            status = _run(words, file)
        if status:
            raise typer.Exit(status)


def _parsed(option: str, text: str, dimension: str) -> float:
    from moeplan.units import parse

    try:
        return parse(text, dimension)
    except ValueError as error:
        raise MoeplanError(f"emulate: {option}: {error}") from None


def _run(words: list[str], file: Path) -> int:
    """The status of a command of ours, whose cluster is the network if it has one."""
    from typer.main import get_command

    from moeplan.cli import app

    command = get_command(app).commands.get(words[0])  # type: ignore[attr-defined]
    has_cluster = command is not None and any(each.name == "settings" for each in command.params)
    more = ["--set", f"cluster={file}"] if has_cluster else []
    return app([*words, *more], prog_name="moeplan", standalone_mode=False) or 0
