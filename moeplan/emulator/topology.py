"""The topology file of an emulated network, so that what runs over it is planned and simulated on the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeplan.emulator.emulate import Network

_IP_HEADER, _TCP_HEADER, _TIMESTAMPS, _ETHERNET_HEADER = 20, 20, 12, 14
"""Bytes of a segment that are no payload: RFC 791, RFC 793, RFC 7323 section 3; IEEE 802.3 without what no virtual
cable carries and no token bucket counts (preamble, checksum, gap)."""
_SWITCH_US = 10.0
"""Of `emulated-nodes`, before the delay that is asked for."""


def goodput_share(mtu: int) -> float:
    """Payload of a full segment over what a token bucket counts of it: 0.956 at an MTU of 1500, 0.993 at 9000."""
    return (mtu - _IP_HEADER - _TCP_HEADER - _TIMESTAMPS) / (mtu + _ETHERNET_HEADER)


def write_topology(network: Network, path: Path) -> Path:
    """Writes the sheet: `emulated-nodes` with what is asked."""
    path.write_text(
        f"""\
about: {network.nodes} emulated nodes on one host, at {8 * network.rate_bytes_per_s / 1e6:.12g} Mbit/s
sources:
  asked: {{cite: "what moeplan emulate was asked for"}}
  tcp: {{cite: "RFC 791, RFC 793 and RFC 7323: headers of a full segment of {network.mtu} bytes"}}
extends: emulated-nodes
nodes: {{value: {network.nodes}, source: asked}}
gpus_per_node: {{value: {network.ranks_per_node}, source: asked}}
nic:
  bandwidth: {{value: {8 * network.rate_bytes_per_s / 1e6:.12g} Mbit/s, source: asked}}
  efficiency: {{value: {100 * goodput_share(network.mtu):.6g} %, source: tcp}}
fabric:
  latency: {{value: {1e6 * network.delay_s + _SWITCH_US:.12g} us, source: asked}}
""",
        encoding="utf-8",
    )
    return path
