"""A trace for Perfetto (ui.perfetto.dev): every task on its lane and stream, with arrows and counters."""

from __future__ import annotations

import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.program import Ints, Pass, Program, Stream
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters._files import label, shown, suffix_of, write_atomically
from moeplan.exporters._lanes import PASS_LETTERS, kinds_of_tasks, lane_name
from moeplan.exporters._trace import (
    Counter,
    arrows,
    counters,
    forward_arrows,
    in_order,
    kept_arrows,
    rounded_ns,
    sample,
    starts_alone,
)

SUFFIXES = (".json", ".json.gz")
_STREAM_NAMES = {
    Stream.COMPUTE: "compute",
    Stream.TENSOR: "tensor and context exchanges",
    Stream.EXPERT: "dispatch and combine",
    Stream.SHARD: "gradients and parameters",
    Stream.PIPELINE: "pipeline sends",
}
_log = logging.getLogger(__name__)


def export(timeline: Timeline, path: str | Path, *, max_events: int = 1_000_000) -> None:
    """A Chrome trace JSON (`.json` or `.json.gz`): a process is a lane, a thread a stream, a slice a task.

    Times are in microseconds, to the nanosecond; slices of a thread never overlap. Arrows follow the sends between
    stages and every other dependency between lanes. One that would point back in time, as where the clocks of measured
    ranks disagree, is left out. An arrow passes by tasks of one stream that start in the same nanosecond (all but the
    last have no length), as Perfetto cannot tell which is meant. Counters, of a process after the last lane: GPUs that
    compute, bytes on their way.

    Of more than `max_events` events whole micro-batches are kept, evenly spaced, and lanes in the same way if one
    micro-batch is too much; an instant event, `otherData.sampling` and a log warning say so. Counters take at most a
    tenth of the events, then at evenly spaced times. Raises MoeplanError for a `max_events` that holds nothing, a
    timeline whose streams overlap, another suffix, and a path that cannot be written.

    Reference: "Trace Event Format", Google, 2016, as the trace processor of Perfetto v52 reads it.
    """
    suffix = suffix_of(path, SUFFIXES)
    program = timeline.program
    start_T, end_T = rounded_ns(timeline)
    most = min(20_000, max_events // 20)
    totals = counters(program, start_T, end_T, most=most)
    room = max_events - 2 * most - 2 * (len(program.lanes) + 1) * (1 + len(Stream)) - 1
    if room < 1:
        raise MoeplanError(
            f"max_events: {max_events} events have no room for the names of {len(program.lanes)} lanes; allow more"
        )
    arrows_AP = arrows(program)
    chosen = sample(program, arrows_AP, room=room)
    if chosen.rule:
        _log.warning("%s: %s", shown(path), chosen.rule)
    kept = kept_arrows(arrows_AP, chosen.keeps_T & starts_alone(program, start_T, end_T))
    order = in_order(start_T, arrows_AP=kept)
    order = order[chosen.keeps_T[order]]
    events = _events(program, start_T, end_T, order=order, arrows_AP=kept, totals=totals, note=chosen.rule)
    text = _document(events, {"source": timeline.source, "sampling": chosen.rule or "all tasks"})
    write_atomically(path, _zipped(text) if suffix == ".json.gz" else text)


def _events(
    program: Program,
    start_T: Ints,
    end_T: Ints,
    *,
    order: Ints,
    arrows_AP: Ints,
    totals: tuple[Counter, ...],
    note: str,
) -> Iterator[str]:
    cluster = len(program.lanes)
    yield from _names(program, order)
    if note:
        yield _named("thread_name", cluster, 0, name="notes")
        pid, tid = _ids(cluster)
        yield _event({"ph": "i", "s": "t", "pid": pid, "tid": tid, "ts": 0, "name": note, "cat": "note"})
    yield from _slices(program, start_T, end_T, order=order, arrows_AP=arrows_AP)
    for total in totals:
        head = f'{{"ph":"C","pid":{_ids(cluster)[0]},"name":{json.dumps(total.name)},"ts":'
        key = json.dumps(total.unit)
        for time, value in zip(total.time_ns_P.tolist(), total.value_P.tolist(), strict=True):
            yield f'{head}{_us(time)},"args":{{{key}:{value:.0f}}}}}'


def _names(program: Program, order: Ints) -> Iterator[str]:
    """The names and places of lanes and streams that have a task; the lanes by stage, the whole cluster last."""
    tasks, cluster = program.tasks, len(program.lanes)
    seen = np.unique(tasks.lane_T[order] * len(Stream) + tasks.stream_T[order]).tolist()
    lanes = sorted({key // len(Stream) for key in seen}, key=lambda lane: (program.lanes[lane].stage, lane))
    digits = len(str(max((lane.stage for lane in program.lanes), default=0)))
    yield _named("process_name", cluster, 0, name=f"all {program.num_gpus} GPUs")
    yield _named("process_sort_index", cluster, 0, sort_index=cluster)
    for place, lane in enumerate(lanes):
        yield _named("process_name", lane, 0, name=lane_name(program.lanes[lane], digits=digits))
        yield _named("process_sort_index", lane, 0, sort_index=place)
    for key in seen:
        lane, stream = divmod(key, len(Stream))
        yield _named("thread_name", lane, stream, name=_STREAM_NAMES[Stream(stream)])
        yield _named("thread_sort_index", lane, stream, sort_index=stream)


def _slices(program: Program, start_T: Ints, end_T: Ints, *, order: Ints, arrows_AP: Ints) -> Iterator[str]:
    """A slice for each task, and behind it, at its start, the points of the arrows that it is on."""
    tasks = program.tasks
    kinds, kind_T = kinds_of_tasks(program)
    kind_names = [label(kind.name) for kind in kinds]
    points = _points(program, arrows_AP, order)
    columns = (tasks.lane_T, tasks.stream_T, kind_T, tasks.layer_T, tasks.pass_T, tasks.microbatch_T, tasks.chunk_T)
    rows = zip(*(column[order].tolist() for column in (start_T, end_T, *columns)), order.tolist(), strict=True)
    for start, end, lane, stream, kind, layer, which, batch, chunk, task in rows:
        head, args = _texts(kind_names[kind], layer, which, batch, chunk)
        pid, tid = _ids(lane, stream)
        place = f'"pid":{pid},"tid":{tid},"ts":{_us(start)}'
        yield f'{{"ph":"X",{place},"dur":{_us(end - start)},{head},"args":{{{args}"task":{task}}}}}'
        for letter, name, arrow in points.get(task, ()):
            bind = ',"bp":"e"' if letter != "s" else ""
            yield f'{{"ph":"{letter}",{place},"name":"{name}","cat":"{name}","id":{arrow}{bind}}}'


@lru_cache(maxsize=65536)
def _texts(kind: str, layer: int, which: int, batch: int, chunk: int) -> tuple[str, str]:
    """Name and category of a slice, and its arguments, as far as the task has them."""
    letter = PASS_LETTERS[Pass(which)]
    name = " ".join(filter(None, [kind, f"L{layer}" if layer >= 0 else "", letter, f"m{batch}" if batch >= 0 else ""]))
    args = {"layer": layer, "micro_batch": batch, "chunk": chunk}
    known = {"pass": Pass(which).name.lower()} | {key: value for key, value in args.items() if value >= 0}
    return f'"name":{json.dumps(name)},"cat":{json.dumps(kind)}', _event(known)[1:-1] + ","


def _points(program: Program, arrows_AP: Ints, order: Ints) -> dict[int, list[tuple[str, str, int]]]:
    """For each task the letters (s: from here, t: through here, f: to here), names and numbers of its arrows."""
    place_T = np.zeros(len(program.tasks), dtype=np.int64)
    place_T[order] = np.arange(len(order))
    found: defaultdict[int, list[tuple[str, str, int]]] = defaultdict(list)
    for arrow, row in enumerate(forward_arrows(arrows_AP, place_T).tolist(), start=1):
        stops = [task for task in row if task >= 0]
        name = "send" if (program.tasks.stream_T[stops] == Stream.PIPELINE).any() else "dependency"
        for letter, task in zip("s" + "t" * (len(stops) - 2) + "f", stops, strict=True):
            found[task].append((letter, name, arrow))
    return found


def _us(time_ns: int) -> str:
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


def _event(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _named(what: str, lane: int, stream: int, **args: Any) -> str:
    pid, tid = _ids(lane, stream)
    return _event({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args})


def _ids(lane: int, stream: int = 0) -> tuple[int, int]:
    """The numbers of a lane and of one of its streams, as process and thread; no two are equal and none is 0.

    Perfetto v52 takes number 0 for the idle process and thread of the machine, and a thread with the number of its
    process for the main one, which it shows first; the others it shows in the order of their numbers.
    """
    return lane + 1, 10 * (lane + 1) + stream


def _document(events: Iterator[str], other: dict[str, str]) -> Iterator[bytes]:
    yield b'{"displayTimeUnit":"ns","otherData":' + _event(other).encode() + b',"traceEvents":[\n'
    yield next(events).encode()
    while block := list(islice(events, 4096)):
        yield "".join(",\n" + event for event in block).encode()
    yield b"\n]}\n"


def _zipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """gzip without a date, so that the same trace is the same file."""
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()
