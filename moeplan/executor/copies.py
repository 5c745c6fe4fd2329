"""An all-to-all that sends one copy of a token to each node, as `collectives/node_dedup.py` has it, and one sum back.

Tokens stand at home, where they were routed, and their experts at hosts. What a token has for experts of its own node
goes straight, row by row. What it has for another node goes there once, as a parcel, to a relay, which passes on a row
for each choice; on the way back the relay weighs these rows, adds them up, and one sum goes home. So relays need the
router's weights, and home their gradients: a number for each row, which travels with the parcels and is counted, though
the program knows nothing of it.

Axes: N rows, P parcels, G members, B nodes of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moeplan.collectives._places import places
from moeplan.compiler.tokens import NOBODY, Rows
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints
from moeplan.executor.exchange import Wire, mine


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parcels:
    """What one home has for one other node."""

    rows_N: Ints
    """Numbers of the rows that are made of them there."""
    parcel_N: Tensor
    """The parcel of each of them."""
    first_P: Ints
    """The number of a row of each parcel."""
    of_host_N: dict[int, Tensor]
    """Which of the rows are for experts of each member."""


@dataclass(kw_only=True, slots=True)
class Relayed:
    """What a relay keeps from the way there to the way back, by home: a number, and the rows, of each choice."""

    weight: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    gradient: dict[int, Tensor] = field(default_factory=dict)
    """Of the weights."""


class Copies:
    """The rows of one layer among the members of one group, as one of them meets them."""

    def __init__(
        self, exchange: Exchange, cluster: Cluster, rank: int, table: Rows, chosen_N: Ints, device: torch.device
    ) -> None:
        """`chosen_N`: the rows that travel. Where the exchange counts no copies every row is a parcel of its own."""
        one = mine(exchange, rank)
        self.ranks = tuple(one.groups_NG[0].tolist())
        self.me, self.device = self.ranks.index(rank), device
        where = places(one.groups_NG, cluster)
        self.node_G, self.relay_GB = where.node_NG[0], where.peer_NGB()[0]
        self.here = int(self.node_G[self.me])
        self.others = [node for node in range(where.num_nodes) if node != self.here]
        self.near = [member for member in range(len(self.ranks)) if self.node_G[member] == self.here]
        self.table, self.counts_copies = table, one.reach_GB is not None
        home_N, host_N, size = table.source_N[chosen_N], table.place_N[chosen_N], len(self.ranks)
        self.cells = {
            (home, host): chosen_N[(home_N == home) & (host_N == host)] for home in range(size) for host in range(size)
        }
        """The rows of each home for each host."""
        self.out = {node: self._parcels(self.me, node) for node in self.others}
        """By node."""
        self.into = {i: self._parcels(i, self.here) for i in range(len(self.ranks)) if i not in self.near}
        """By home."""
        self.mine = [home for home in self.into if self.relay_GB[home, self.here] == self.me]
        """Homes whose relay this is."""
        straight = [self.cells[self.me, host] for host in self.near]
        self.sizes = [*map(len, straight), *(len(each.first_P) for each in self.out.values())]
        self.sent_N: Ints = np.concatenate([*straight, *(each.first_P for each in self.out.values())])
        """A row for each thing that leaves home, its own experts' included: by near host, then by node."""
        self.away_N: Ints = np.concatenate([np.zeros(0, np.int64), *(each.rows_N for each in self.out.values())])
        """Rows that are made of parcels elsewhere, by node."""

    def column_N(self, top_k: int) -> Ints:
        """Of each of `sent_N` its choice, and behind the choices one for each node that a sum comes from."""
        near = sum(self.sizes[: len(self.near)])
        nodes = np.repeat(np.arange(len(self.others)), self.sizes[len(self.near) :])
        return np.concatenate([self.table.choice_N[self.sent_N[:near]], top_k + nodes])

    def _parcels(self, home: int, node: int) -> Parcels:
        hosts = np.flatnonzero(self.node_G == node).tolist()
        rows_N = np.concatenate([self.cells[home, host] for host in hosts])
        token_N = self.table.token_N[rows_N]
        alone_N = (token_N == NOBODY) | (not self.counts_copies)
        key_N = np.where(alone_N, -1 - np.arange(len(rows_N)), token_N)
        _, first, parcel_N = np.unique(key_N, return_index=True, return_inverse=True)
        return Parcels(
            rows_N=rows_N, first_P=rows_N[first],
            parcel_N=torch.as_tensor(parcel_N.reshape(-1), device=self.device),
            of_host_N={host: self._where(self.table.place_N[rows_N] == host) for host in hosts},
        )  # fmt: skip

    def _where(self, flags: np.ndarray) -> Tensor:
        return torch.as_tensor(np.flatnonzero(flags), device=self.device)

    def _relay(self, home: int) -> int:
        """Whom the parcels of a home in another node come by."""
        return int(self.relay_GB[home, self.here])

    def _homes_by(self, relay: int) -> list[int]:
        return [home for home in self.into if self._relay(home) == relay]

    # ---- to the experts

    def to_experts(self, wire: Wire, leaving: Tensor, relayed: Relayed, weight_N: Tensor | None = None) -> Tensor:
        """Rows for this member's experts, by home. `leaving` is in the order of `sent_N`.

        Forward with `weight_N`, in the order of `away_N`. Without it `leaving` are gradients of what came back: a row's
        is its weight times that of its sum, and the gradient of its weight is at the relay.
        """
        got = self._first_there(wire, leaving, relayed, weight_N)
        made = {home: self._unpacked(home, got[home], relayed, is_gradient=weight_N is None) for home in self.mine}
        got |= self._onward(wire, made, leaving)
        return torch.cat([got[home] for home in range(len(self.ranks))])

    def _first_there(self, wire: Wire, leaving: Tensor, relayed: Relayed, weight_N: Tensor | None) -> dict[int, Tensor]:
        """Rows of near homes, and parcels of those whose relay this is."""
        parts = leaving.split(self.sizes)
        sends, receives, got = [], [], {}
        for host, rows in zip(self.near, parts, strict=False):
            if host == self.me:
                got[host] = rows
            else:
                sends.append((self.ranks[host], rows))
                got[host] = self._empty(leaving, len(self.cells[host, self.me]))
                receives.append((self.ranks[host], got[host]))
        for node, parcels in zip(self.others, parts[len(self.near) :], strict=True):
            sends.append((self._relay_rank(node), parcels))
        for home in self.mine:
            got[home] = self._empty(leaving, len(self.into[home].first_P))
            receives.append((self.ranks[home], got[home]))
        if weight_N is not None:
            sizes = [len(each.rows_N) for each in self.out.values()]
            sends += [
                (self._relay_rank(node), each) for node, each in zip(self.others, weight_N.split(sizes), strict=True)
            ]
            relayed.weight = {home: weight_N.new_empty(len(self.into[home].rows_N)) for home in self.mine}
            receives += [(self.ranks[home], each) for home, each in relayed.weight.items()]
        wire.swap(sends, receives)
        return got

    def _relay_rank(self, node: int) -> int:
        return int(self.ranks[int(self.relay_GB[self.me, node])])

    @staticmethod
    def _empty(like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1])

    def _unpacked(self, home: int, parcels: Tensor, relayed: Relayed, *, is_gradient: bool) -> Tensor:
        rows = parcels[self.into[home].parcel_N]
        if not is_gradient:
            return rows
        relayed.gradient[home] = (relayed.rows.pop(home).float() * rows.float()).sum(dim=1)
        return rows * relayed.weight[home][:, None].to(rows.dtype)

    def _onward(self, wire: Wire, made: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """Rows of far homes for this member's experts."""
        got = {home: rows[self.into[home].of_host_N[self.me]] for home, rows in made.items()}
        sends, receives, buffers = [], [], {}
        for host in self._hosts_but_me():
            sends.append(
                (
                    self.ranks[host],
                    self._joined([made[home][self.into[home].of_host_N[host]] for home in self.mine], like),
                )
            )
            homes = self._homes_by(host)
            buffers[host] = self._empty(like, sum(len(self.cells[home, self.me]) for home in homes))
            receives.append((self.ranks[host], buffers[host]))
        wire.swap(sends, receives)
        for relay, buffer in buffers.items():
            homes = self._homes_by(relay)
            got |= dict(zip(homes, buffer.split([len(self.cells[home, self.me]) for home in homes]), strict=True))
        return got

    def _hosts_but_me(self) -> Iterator[int]:
        return (host for host in self.near if host != self.me)

    def _joined(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return torch.cat(parts) if parts else self._empty(like, 0)

    # ---- to the tokens

    def to_tokens(
        self, wire: Wire, rows: Tensor, relayed: Relayed, *, is_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What comes home, in the order of `sent_N`: rows of near experts, and a sum for each parcel.

        `rows` are by home. Forward a sum is weighted; of gradients it is not, and with it come those of the weights, in
        the order of `away_N`.
        """
        by_home = dict(enumerate(rows.split([len(self.cells[home, self.me]) for home in range(len(self.ranks))])))
        sums = {
            home: self._added_up(home, whole, relayed, is_gradient=is_gradient)
            for home, whole in self._to_relays(wire, by_home, rows).items()
        }
        return self._home(wire, by_home, sums, relayed, is_gradient=is_gradient)

    def _to_relays(self, wire: Wire, by_home: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """All rows of the homes whose relay this is, in the order of their parcels' rows."""
        sends, receives, buffers = [], [], {}
        for host in self._hosts_but_me():
            sends.append((self.ranks[host], self._joined([by_home[home] for home in self._homes_by(host)], like)))
            buffers[host] = self._empty(like, sum(len(self.cells[home, host]) for home in self.mine))
            receives.append((self.ranks[host], buffers[host]))
        wire.swap(sends, receives)
        whole = {home: self._empty(like, len(self.into[home].rows_N)) for home in self.mine}
        for host, buffer in buffers.items():
            parts = buffer.split([len(self.cells[home, host]) for home in self.mine]) if self.mine else ()
            for home, part in zip(self.mine, parts, strict=True):
                whole[home][self.into[home].of_host_N[host]] = part
        for home in self.mine:
            whole[home][self.into[home].of_host_N[self.me]] = by_home[home]
        return whole

    def _added_up(self, home: int, rows: Tensor, relayed: Relayed, *, is_gradient: bool) -> Tensor:
        parcels = self.into[home]
        if not is_gradient:
            relayed.rows[home] = rows
            rows = rows * relayed.weight[home][:, None].to(rows.dtype)
        return self._empty(rows, len(parcels.first_P)).zero_().index_add_(0, parcels.parcel_N, rows)

    def _home(
        self, wire: Wire, by_home: dict[int, Tensor], sums: dict[int, Tensor], relayed: Relayed, *, is_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        like = by_home[self.me]
        sends = [(self.ranks[home], by_home[home]) for home in self._hosts_but_me()]
        sends += [(self.ranks[home], each) for home, each in sums.items()]
        parts = [
            by_home[self.me] if host == self.me else self._empty(like, size)
            for host, size in zip(self.near, self.sizes, strict=False)
        ]
        parts += [self._empty(like, size) for size in self.sizes[len(self.near) :]]
        froms = [*(self.ranks[host] for host in self.near), *map(self._relay_rank, self.others)]
        receives = [each for each in zip(froms, parts, strict=True) if each[0] != self.ranks[self.me]]
        numbers = None
        if is_gradient:
            sends += [(self.ranks[home], relayed.gradient.pop(home)) for home in self.mine]
            numbers = torch.empty(len(self.away_N), device=self.device)
            sizes = [len(each.rows_N) for each in self.out.values()]
            receives += list(zip(map(self._relay_rank, self.others), numbers.split(sizes), strict=True))
        wire.swap(sends, receives)
        return torch.cat(parts), numbers
