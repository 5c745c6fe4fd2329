"""What a program's exchanges move, from whom to whom.

Axes: R ranks (or nodes), N groups, G members of a group, P pairs of ranks, M meetings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeplan.domain.program import Exchange, Floats, Ints, Program, Stream

# bytes that each member sends to its neighbour on a ring of n, as a share of `size_bytes`
_RING = {
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}


def traffic(program: Program, *, gpus_per_node: int = 1) -> Floats:
    """Bytes of one step from each GPU (row) to each other, shape (R, R); or from node to node, itself included.

    sum over meetings of (how often a lane does it) x (bytes of its groups). An all-to-all counts what its matrix says,
    a send its size; the others count a ring's: size x (n - 1) / n from each member to the next, twice that for
    all_reduce. So the picture is of what must move, whatever algorithm moves it. What a GPU keeps is left out.
    """
    owner_R = np.arange(num_ranks(program)) // gpus_per_node
    size = int(owner_R.max(initial=-1)) + 1
    total = np.zeros(size * size)
    times_M = occurrences(program)
    for meeting, groups_NG in groups_of_meetings(program):
        exchange = program.exchanges[program.meetings[meeting].exchange]
        source_P, target_P, bytes_P = _pairs(exchange, groups_NG)
        cell = owner_R[source_P] * size + owner_R[target_P]
        np.add.at(total, cell, bytes_P * times_M[meeting])
    return total.reshape(size, size)


def meeting_bytes(program: Program) -> Floats:
    """Bytes that all the ranks of each meeting send, each time that they meet, shape (M,)."""
    found = np.zeros(len(program.meetings))
    for meeting, groups_NG in groups_of_meetings(program):
        exchange = program.exchanges[program.meetings[meeting].exchange]
        found[meeting] = _pairs(exchange, groups_NG[:1])[2].sum() * len(groups_NG)
    return found


def occurrences(program: Program) -> Ints:
    """How often each meeting takes place in a step, shape (M,): the tasks that its first lane has of it."""
    tasks = program.tasks
    first_M = np.array([meeting.lanes[0] for meeting in program.meetings], dtype=np.int64)
    talks = tasks.stream_T != Stream.COMPUTE
    unit = tasks.unit_T[talks]
    return np.bincount(unit[first_M[unit] == tasks.lane_T[talks]], minlength=len(first_M))


def groups_of_meetings(program: Program) -> Iterator[tuple[int, Ints]]:
    """Each meeting with those groups of its exchange that are made of just its lanes; a send's lane is the sender's.

    An exchange holds the groups of all the ranks that do it, its meetings share them out.
    """
    lane_R = lane_of_rank(program)
    for number, meeting in enumerate(program.meetings):
        exchange = program.exchanges[meeting.exchange]
        groups_NG = exchange.groups_NG
        lanes_NG = lane_R[groups_NG[:, :1] if exchange.operation == "send" else groups_NG]
        mine = np.isin(lanes_NG, meeting.lanes).all(axis=1)
        for lane in meeting.lanes:
            mine &= (lanes_NG == lane).any(axis=1)
        yield number, groups_NG[mine]


def lane_of_rank(program: Program) -> Ints:
    """The lane of each rank, -1 for a rank that is in none."""
    lane_R = np.full(num_ranks(program), -1, dtype=np.int64)
    for number, lane in enumerate(program.lanes):
        lane_R[lane.ranks_R] = number
    return lane_R


def num_ranks(program: Program) -> int:
    """One more than the highest rank."""
    return max((int(lane.ranks_R.max(initial=-1)) for lane in program.lanes), default=-1) + 1


def _pairs(exchange: Exchange, groups_NG: Ints) -> tuple[Ints, Ints, Floats]:
    """Sender, receiver and bytes of one occurrence, for pairs of different ranks."""
    num, members = groups_NG.shape
    if exchange.operation == "send":
        return groups_NG[:, 0], groups_NG[:, 1], np.full(num, exchange.size_bytes)
    if exchange.operation == "all_to_all":
        share_GG = np.full((members, members), 1 / members) if exchange.share_GG is None else exchange.share_GG
        row, column = np.nonzero((share_GG > 0) & ~np.eye(members, dtype=bool))
        return (
            groups_NG[:, row].ravel(),
            groups_NG[:, column].ravel(),
            np.tile(exchange.size_bytes * share_GG[row, column], num),
        )
    sent = exchange.size_bytes * _RING[exchange.operation](members)
    return groups_NG.ravel(), np.roll(groups_NG, -1, axis=1).ravel(), np.full(groups_NG.size, sent)
