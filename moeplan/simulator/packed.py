"""A program as arrays: who waits for whom, and, for the compiled engine, all that it needs.

Axes: T tasks, D dependencies, L lanes, M meetings, S lanes of a meeting (slots), P phases of a meeting, E flow classes
of a phase (entries), C flow classes, K link classes; J is a list of lists, one after another. Rows of a table say where
their part of the next table begins; it ends where the next row's begins, so the tables have one row more.
"""

from __future__ import annotations

from itertools import chain
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeplan.cost.cost_model import Shares
from moeplan.domain.program import Floats, Ints, Phase, Program, Rendezvous, Stream

YIELDING = ("gradients", "parameters", "tensor_gradients")
"""Kinds of exchange that are cut into micro-ops and give way under `a2a_first`."""
EXPERT = ("dispatch", "combine")
"""Kinds for which they give way."""
ARBITRATIONS = ("fair", "fifo", "a2a_first")
DONE = 1e-12
"""A flow is complete when less than this part of it is left, or less than the clock can tell apart."""
INSTANT = 4
"""Times nearer than so many units in the last place are the same."""
FULL = 1 + 1e-12
"""Links are full at once if their levels differ by less."""
Bools = NDArray[np.bool_]
Ints32 = NDArray[np.int32]
Rows = Any
"""A structured array. Compiled code reads and sets a field of a row as `rows[number].field`."""


def with_stream_order(program: Program) -> tuple[Ints, Ints]:
    """The dependencies, and each task behind the one before it on its stream."""
    tasks = program.tasks
    stream = tasks.lane_T * len(Stream) + tasks.stream_T
    order = np.argsort(stream, kind="stable")
    same = np.diff(stream[order]) == 0
    before = np.concatenate([program.before_D, order[:-1][same]])
    after = np.concatenate([program.after_D, order[1:][same]])
    return before, after


def place_in_lane(program: Program) -> Ints:
    """How many tasks of its lane stand before each task."""
    order = np.argsort(program.tasks.lane_T, kind="stable")
    counts = np.bincount(program.tasks.lane_T)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def followers(before: Ints, after: Ints, size: int) -> tuple[Ints, Ints]:
    """Who waits for each task: those of task t stand from `first[t]` to `first[t + 1]`."""
    first = np.concatenate([[0], np.cumsum(np.bincount(before, minlength=size))])
    return first, after[np.argsort(before, kind="stable")]


def rivals(program: Program) -> Bools:
    """Whether two meetings cross a common class of links."""
    crosses_CK = program.flows.crossing_CK != 0
    uses = np.zeros((len(program.meetings), crosses_CK.shape[1]), np.bool_)
    for number, meeting in enumerate(program.meetings):
        classes = [c for phase in meeting.phases for c in phase.classes]
        uses[number] = crosses_CK[classes].any(axis=0)
    bits = np.packbits(uses, axis=1)  # not a product of matrices: its threads would spin for longer than all else takes
    shared = np.array([(bits & row).any(axis=1) for row in bits]).reshape(len(bits), len(bits))
    np.fill_diagonal(shared, val=False)
    return shared


# ---- for the compiled engine


class Heap(NamedTuple):
    """At most one coming event of each source; of those at one time, the one that was put first comes first."""

    rows: Rows
    counts: Ints
    """Events in the heap, and turns taken so far."""


def heap_of(size: int) -> Heap:
    """An empty heap for so many sources."""
    rows = np.zeros(size, _EVENT)
    rows["place"] = -1
    return Heap(rows, np.zeros(2, np.int64))


class Machine(NamedTuple):
    """A program and how far it has come. Few arrays: each costs time in every call, and when it is compiled."""

    tasks: Rows
    lanes: Rows
    meetings: Rows
    slots: Rows
    phases: Rows
    entries: Rows
    crossings: Rows
    links: Rows
    listed_J: Ints32
    """The followers of tasks, then the slots of entries, then the lanes of entries' classes."""
    near_MX: Bools
    """Which meetings share links with a meeting, then in which lanes its flows end."""
    heap: Heap
    """Of the tasks that lanes compute, then of the meetings."""
    memo: Rows
    known: Rows
    world: Rows


def _dtype(**fields: str) -> np.dtype[np.void]:
    return np.dtype(list(fields.items()), align=True)


_EVENT = _dtype(time_s="f8", turn="i8", place="i4", source="i4")
"""`place`: where a source stands in the heap; -1: it has no event. `source`: who stands in this place of the heap."""
TASK = _dtype(
    start_s="f8", end_s="f8", lost_s="f8", seconds="f8", first="i8", next="i4", waits="i4", lane="i4", stream="i4",
    unit="i4", slot="i4", place="i4",
)  # fmt: skip
"""`next` on its stream; `unit` is the meeting, -1 for kernels; `place` in its lane."""
LANE = _dtype(
    left_s="f8", speed="f8", since_s="f8", task="i4", num_moving="i4", num_expert="i4", blocked="i4", is_busy="?",
    is_computing="?", is_dirty="?", dirty="i4", changed="i4",
)  # fmt: skip
"""`task` is computed now, -1: none; `is_computing` is what its flows know of it. Two columns are lists: `dirty`, lanes
on which kernels or exchanges began or ended in the present instant; `changed`, those of them on which kernels did."""
MEETING = _dtype(
    size_bytes="f8", since_s="f8", ready_s="f8", slot="i4", phase="i4", last_phase="i4", num_parts="i4",
    num_arrived="i4", num_running="i4", num_left="i4", num_moving="i4", parts="i4", part="i4", phase_now="i4",
    stream="i4", place="i4", yields="?", is_expert="?", is_flowing="?", is_found="?", has_ended="?", is_other="?",
    flowing="i4", queued="i4", found="i4",
)  # fmt: skip
"""The last three columns are lists: of meetings that have flows, in rising order; that wait to be let through; that
share links with one."""
SLOT = _dtype(
    lane="i4", last_phase="i4", num_open="i4", arrived="i4", running="i4", is_moving="?", is_touched="?", ended="i4"
)
"""One lane of a meeting: its task that has arrived, the one that runs, and how many of its flows are open. The last
column is a list: of the tasks that end now."""
PHASE = _dtype(latency_s="f8", copy_s_per_byte="f8", entry="i4")
ENTRY = _dtype(
    share="f8", extra_bytes="f8", left_bytes="f8", fair="f8", pace="f8", flows="i4", touched="i4", lane="i4",
    last_lane="i4", crossing="i4", last_crossing="i4", listed="i4", rate="f8", grows="?",
)  # fmt: skip
"""The last three columns are the list of entries whose rates are wanted, what they get, and who still gets more."""
CROSSING = _dtype(times="f8", link="i4")
LINK = _dtype(capacity="f8", left="f8", load="f8", is_used="?", is_full="?", used="i4")
MEMO = _dtype(code="i8", first="i8", length="i8")
KNOWN = _dtype(rate="f8", flows="i4")
WORLD = _dtype(
    now_s="f8", compute_share="f8", exchange_share="f8", arbitration="i4", decision="i4", num_flowing="i4",
    num_queued="i4", num_dirty="i4", num_found="i4", num_listed="i4", num_used="i4", num_ended="i4", num_known="i8",
    known_end="i8", is_due="?",
)  # fmt: skip
_MEMO = 2**14
_KNOWN = 2**20


def pack(program: Program, seconds_T: Floats, shares: Shares, first_T1: Ints, follower_J: Ints32) -> Machine:
    """The machine at the start of the step."""
    meetings, slots, slot_key = _meetings(program)
    flat = _Flat.of(program)
    entries, slot_J = _entries(program, flat, meetings, slots, slot_key)
    crossings = _crossings(program, flat, entries)
    entries["touched"] += len(follower_J)
    for end, places in (("lane", flat.first_C1[:-1]), ("last_lane", flat.first_C1[1:])):
        entries[end][:-1] = places[flat.class_E] + len(follower_J) + len(slot_J)
    links = np.zeros(len(program.flows.capacity_bytes_per_s_K), LINK)
    links["capacity"] = program.flows.capacity_bytes_per_s_K
    world = np.zeros(1, WORLD)
    world["compute_share"], world["exchange_share"] = shares.compute, shares.exchange
    world["arbitration"] = ARBITRATIONS.index(program.arbitration)
    return Machine(
        tasks=_tasks(program, seconds_T, first_T1, slot_key), lanes=_lanes(len(program.lanes)), meetings=meetings,
        slots=slots, phases=_phases(program, flat), entries=entries, crossings=crossings, links=links,
        listed_J=np.concatenate([follower_J, slot_J, flat.of_class_J], dtype=np.int32), near_MX=_near(program, flat),
        heap=heap_of(len(program.lanes) + len(program.meetings)), memo=np.zeros(_MEMO, MEMO),
        known=np.empty(_KNOWN, KNOWN), world=world,
    )  # fmt: skip


def _near(program: Program, flat: _Flat) -> Bools:
    touches_ML = np.zeros((len(program.meetings), len(program.lanes)), np.bool_)
    touches_ML[flat.meeting_E[flat.owner_J], flat.lane_J] = True
    return np.concatenate([rivals(program), touches_ML], axis=1)


def _tasks(program: Program, seconds_T: Floats, first_T1: Ints, slot_key: Ints) -> Rows:
    given, size = program.tasks, len(program.tasks)
    tasks = np.zeros(size + 1, TASK)
    is_away = given.stream_T != Stream.COMPUTE
    unit = np.where(is_away, given.unit_T, -1)
    tasks["start_s"] = tasks["end_s"] = tasks["next"] = -1
    tasks["seconds"][:size], tasks["first"] = seconds_T, first_T1
    tasks["lane"][:size], tasks["stream"][:size], tasks["unit"][:size] = given.lane_T, given.stream_T, unit
    key = given.unit_T[is_away] * len(program.lanes) + given.lane_T[is_away]
    tasks["slot"][:size][is_away] = np.searchsorted(slot_key, key)
    return tasks


def _lanes(size: int) -> Rows:
    lanes = np.zeros(size, LANE)
    lanes["task"], lanes["speed"] = -1, 1.0
    return lanes


def _meetings(program: Program) -> tuple[Rows, Rows, Ints]:
    """Meetings, their slots, and meeting * lanes + lane of each slot, which rises."""
    given = program.meetings
    exchanges = [program.exchanges[meeting.exchange] for meeting in given]
    meetings = np.zeros(len(given) + 1, MEETING)
    meetings["slot"][1:] = np.cumsum([len(meeting.lanes) for meeting in given])
    meetings["phase"][1:] = np.cumsum([len(meeting.phases) for meeting in given])
    sizes = [exchange.size_bytes for exchange in exchanges]
    meetings["size_bytes"][:-1], meetings["last_phase"] = sizes, -1
    meetings["num_parts"][:-1] = [max(1, ceil(size / program.micro_op_bytes)) for size in sizes]
    meetings["yields"][:-1] = [exchange.kind in YIELDING for exchange in exchanges]
    meetings["is_expert"][:-1] = [exchange.kind in EXPERT for exchange in exchanges]
    lane_S = np.fromiter(chain.from_iterable(meeting.lanes for meeting in given), np.int64)
    slots = np.zeros(len(lane_S), SLOT)
    slots["lane"], slots["last_phase"], slots["arrived"], slots["running"] = lane_S, -1, -1, -1
    slot_key = np.repeat(np.arange(len(given)), np.diff(meetings["slot"])) * len(program.lanes) + lane_S
    assert (np.diff(slot_key) > 0).all(), "the lanes of a meeting rise"
    return meetings, slots, slot_key


class _Flat(NamedTuple):
    """The classes of all phases that have something to move, and the lanes of each."""

    meeting_E: Ints
    phase_E: Ints
    """Counted over all meetings."""
    turn_E: Ints
    """Counted in the meeting."""
    class_E: Ints
    first_C1: Ints
    of_class_J: Ints
    owner_J: Ints
    lane_J: Ints

    @staticmethod
    def of(program: Program) -> _Flat:
        given, flows = program.meetings, program.flows
        phases = [phase for meeting in given for phase in meeting.phases]
        counts = [len(phase.classes) for phase in phases]
        phase_E = np.repeat(np.arange(len(phases)), counts)
        class_E = np.fromiter(chain.from_iterable(phase.classes for phase in phases), np.int64)
        num_phases = [len(meeting.phases) for meeting in given]
        meeting_P = np.repeat(np.arange(len(given)), num_phases)
        turn_P = np.arange(len(phases)) - np.repeat(np.cumsum([0, *num_phases])[:-1], num_phases)
        size_M = np.array([program.exchanges[meeting.exchange].size_bytes for meeting in given])
        moves = flows.share_C[class_E] * size_M[meeting_P[phase_E]] > 0
        phase_E, class_E = phase_E[moves], class_E[moves]
        first_C1 = np.cumsum([0, *map(len, flows.lanes_C)])
        of_class_J = np.fromiter(chain.from_iterable(flows.lanes_C), np.int64)
        count_E = np.diff(first_C1)[class_E]
        owner_J = np.repeat(np.arange(len(class_E)), count_E)
        place_J = np.arange(len(owner_J)) + np.repeat(first_C1[class_E] - np.cumsum(count_E) + count_E, count_E)
        return _Flat(
            meeting_P[phase_E], phase_E, turn_P[phase_E], class_E, first_C1, of_class_J, owner_J, of_class_J[place_J]
        )


def _phases(program: Program, flat: _Flat) -> Rows:
    given = [phase for meeting in program.meetings for phase in meeting.phases]
    phases = np.zeros(len(given) + 1, PHASE)
    owners = [meeting for meeting in program.meetings for _ in meeting.phases]
    phases["latency_s"][:-1] = [_latency_s(program, *each) for each in zip(owners, given, strict=True)]
    phases["copy_s_per_byte"][:-1] = [phase.copy_s_per_byte for phase in given]
    phases["entry"][1:] = np.cumsum(np.bincount(flat.phase_E, minlength=len(given)))
    return phases


def _latency_s(program: Program, meeting: Rendezvous, phase: Phase) -> float:
    """All of a phase's delay but the copies, of one of the micro-ops in which the exchange goes."""
    exchange = program.exchanges[meeting.exchange]
    is_cut = program.arbitration == "a2a_first" and exchange.kind in YIELDING
    size = exchange.size_bytes / (max(1, ceil(exchange.size_bytes / program.micro_op_bytes)) if is_cut else 1)
    return phase.delay_s(size) - phase.copy_s_per_byte * size if phase.host else phase.latency_s


def _entries(program: Program, flat: _Flat, meetings: Rows, slots: Rows, slot_key: Ints) -> tuple[Rows, Ints]:
    """Entries, and the slots of their lanes; tells meetings and slots of their last phases."""
    entries = np.zeros(len(flat.class_E) + 1, ENTRY)
    entries["flows"][:-1] = flat.class_E
    entries["share"][:-1] = program.flows.share_C[flat.class_E]
    entries["extra_bytes"][:-1] = program.flows.extra_bytes_C[flat.class_E]
    key_J = flat.meeting_E[flat.owner_J] * len(program.lanes) + flat.lane_J
    slot_J = np.searchsorted(slot_key, key_J)
    is_member = np.append(slot_key, -1)[slot_J] == key_J
    slot_J, owner_J = slot_J[is_member], flat.owner_J[is_member]
    entries["touched"][1:] = np.cumsum(np.bincount(owner_J, minlength=len(flat.class_E)))
    np.maximum.at(slots["last_phase"], slot_J, flat.turn_E[owner_J])
    np.maximum.at(meetings["last_phase"], flat.meeting_E, flat.turn_E)
    return entries, slot_J


def _crossings(program: Program, flat: _Flat, entries: Rows) -> Rows:
    crossing_CK = program.flows.crossing_CK
    class_J, link_J = np.nonzero(crossing_CK)
    ends_C1 = np.concatenate([[0], np.cumsum(np.bincount(class_J, minlength=len(crossing_CK)))])
    entries["crossing"][:-1], entries["last_crossing"][:-1] = ends_C1[flat.class_E], ends_C1[flat.class_E + 1]
    crossings = np.zeros(len(class_J), CROSSING)
    crossings["link"], crossings["times"] = link_J, crossing_CK[class_J, link_J]
    return crossings
