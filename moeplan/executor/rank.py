"""What one rank of a program knows: its place, its layers, its tokens, whom it exchanges with, and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from moeplan import menu
from moeplan.compiler.tokens import NOBODY, Choices, Rows, choices_of, token_numbers_T
from moeplan.domain.mixers import Attention, LatentAttention
from moeplan.domain.model import Layer
from moeplan.domain.placement import EMPTY
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Exchange, Ints, Pass, Program, Stream
from moeplan.domain.scenario import Scenario
from moeplan.executor.copies import Copies
from moeplan.executor.exchange import Ring, Route, mine
from moeplan.executor.lane import Task, tasks_of
from moeplan.executor.layers import Geometry, initial_weight, model_parameters
from moeplan.executor.weights import DTYPES, Unit, place_of, unit_specs
from moeplan.partition.ranks import coordinate, groups, ranks_of_stage
from moeplan.partition.route import Tokens
from moeplan.partition.stages import Pipeline, pipeline


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankRows:
    """The rows of one layer as one rank meets them, part by part."""

    sent: tuple[Ints, ...]
    """Rows that its tokens send, in the order in which they go."""
    counts_GG: tuple[Ints, ...]
    """Rows from member to member of its group."""
    by_slot: tuple[Tensor, ...]
    """The rows that its experts get, as they come, in the order of slots."""
    slot_counts: tuple[tuple[int, ...], ...]
    owned: tuple[tuple[int, ...], ...]
    """How many of them come by each of the ranks that share the place's experts."""
    copies: Copies | None
    """Where one copy of a token goes to each node; then `sent` are rows that stand for all that is made of a copy."""


class Rank:
    """One GPU's part in a program."""

    def __init__(
        self, program: Program, plan: Plan, scenario: Scenario, number: int, *, device: torch.device, seed: int
    ) -> None:
        self.program, self.plan, self.scenario, self.number, self.device = program, plan, scenario, number, device
        self.stage, self.position = place_of(plan, number)
        self.pipes: Pipeline = pipeline(scenario.model, plan, scenario.workload)
        self.dtype = DTYPES[plan.precision.activations]
        self.travel = {"dispatch": DTYPES[plan.precision.dispatch], "combine": DTYPES[plan.precision.combine]}
        self.tokens, self.width = Tokens.of(plan, scenario.workload).rank, scenario.model.hidden_size
        self.tasks = tasks_of(program, plan, self.pipes, number)
        self.choices: Choices | None = choices_of(plan, scenario)
        parameters = model_parameters(scenario.model)

        @lru_cache(maxsize=8)
        def whole(name: str) -> Tensor:
            return initial_weight(parameters[name], name, seed)

        self.units = [Unit(spec, whole, plan, device) for spec in unit_specs(plan, scenario, number)]
        self._units = {(each.spec.chunk, each.spec.layer, each.spec.is_expert): each for each in self.units}
        self._rings: dict[int, Ring] = {}
        self._routes: dict[int, Route] = {}
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._rows: dict[int, RankRows] = {}

    # ---- layers and stages

    def _virtual(self, chunk: int) -> int:
        return self.pipes.virtual[self.stage][chunk]

    def first(self, chunk: int) -> int:
        """The first layer of a chunk: also the number of the boundary before it."""
        return self.pipes.stages[self._virtual(chunk)].first_layer

    def end(self, chunk: int) -> int:
        """The boundary behind the last layer of a chunk."""
        return self.first(chunk) + len(self.pipes.stages[self._virtual(chunk)].layers)

    def chunk_of(self, layer: int) -> int:
        """The chunk that holds a layer."""
        return next(chunk for chunk in range(self.plan.vpp) if self.first(chunk) <= layer < self.end(chunk))

    def neighbour(self, chunk: int, step: int) -> int:
        """The chunk of this rank that holds the next or previous virtual stage."""
        return self.pipes.virtual[self.stage].index(self._virtual(chunk) + step)

    def layer(self, task: Task) -> Layer:
        """The layer of a task."""
        return self.scenario.model.all_layers[task.layer]

    def mixer(self, task: Task) -> Attention | LatentAttention:
        """The attention of a task's layer; nothing else is run."""
        found = self.layer(task).mixer
        assert isinstance(found, Attention | LatentAttention)
        return found

    def moe(self, task: Task) -> int:
        """The layers with experts before that of a task."""
        return sum(each.is_moe for each in self.scenario.model.all_layers[: task.layer])

    @staticmethod
    def way(source: int, target: int) -> str:
        """The wire of a send: messages of two stages to each other never wait in one queue."""
        return "up" if source < target else "down"

    # ---- weights

    def unit(self, chunk: int, layer: int, *, expert: bool) -> Unit:
        """The weights of a layer, or of the ends that a chunk has."""
        return self._units[chunk, layer, expert]

    def sharded_unit(self, task: Task) -> Unit:
        """The unit that a task gathers or reduces."""
        return self._sharded[task.number]

    @cached_property
    def _sharded(self) -> dict[int, Unit]:
        """Dense weights come before those of experts; the ends of two chunks are told apart by their size."""
        found: dict[int, Unit] = {}
        seen: dict[tuple[object, ...], int] = {}
        for task in self.tasks:
            if task.stream == Stream.SHARD and task.operation != "all_to_all":
                fitting = [unit for unit in self.units if self._fits(unit, task)]
                key = (*task[2:8], len(fitting) if task.layer < 0 else 0, self._size(task) if task.layer < 0 else 0)
                seen[key] = seen.get(key, -1) + 1
                found[task.number] = fitting[seen[key]]
        return found

    def _fits(self, unit: Unit, task: Task) -> bool:
        spec, gathers = unit.spec, task.kind == "parameters"
        allowed = ((1, 2) if task.chunk < 0 else (3,)) if gathers else (
            (0,) if task.operation == "all_reduce" else (1,) if task.chunk < 0 else (2, 3)
        )  # fmt: skip
        precision = self.plan.precision.weights if gathers else self.plan.precision.gradients
        size = spec.columns * len(spec.experts) * DTYPE_BYTES[precision]
        return (
            spec.layer == task.layer and spec.zero in allowed and len(spec.replicas) > 1
            and task.chunk in (-1, spec.chunk) and (task.layer >= 0 or size == self._size(task))
        )  # fmt: skip

    def _size(self, task: Task) -> float:
        return self.program.exchanges[task.exchange].size_bytes

    @cached_property
    def closing(self) -> set[int]:
        """The last work of each layer in each pass."""
        last = {
            (task.passes, task.chunk, task.microbatch, task.layer): task.number
            for task in self.tasks
            if task.stream == Stream.COMPUTE and task.passes != Pass.STEP
        }
        return set(last.values())

    @cached_property
    def more_waits(self) -> dict[int, list[int]]:
        """What else a task waits for. Context-parallel ranks project keys and values, and take their gradients, in the
        task that exchanges them: so it needs weights as the mixer does, and gradients are reduced behind it.
        """
        found: dict[int, list[int]] = {}
        before: list[Task] = []
        for task in self.tasks:
            if task.kind == "context":
                found[task.number] = [each.number for each in before if each.kind == "parameters" and _meet(each, task)]
            elif task.kind in ("gradients", "optimizer") or task.passes == Pass.WEIGHT_GRADIENT:
                home = [each for each in before if each.kind == "context" and each.operation == "reduce_scatter"]
                found[task.number] = [each.number for each in home if _meet(each, task)]
            if task.kind in ("parameters", "context"):
                before.append(task)
        return {number: waits for number, waits in found.items() if waits}

    def repeated_experts(self, task: Task) -> Iterator[tuple[int, list[int]]]:
        """The experts of a layer that stand on several places, and these places."""
        assert self.plan.placement is not None
        expert_C = np.array(self.plan.placement.experts[self.moe(task)])
        per_place = len(expert_C) // self.plan.ep
        for expert in np.unique(expert_C[expert_C != EMPTY]).tolist():
            places = (np.flatnonzero(expert_C == expert) // per_place).tolist()
            if len(places) > 1:
                yield expert, places

    # ---- whom it exchanges with

    @cached_property
    def tensor_ranks(self) -> tuple[int, ...]:
        """The ranks that share its tokens' heads and words."""
        rows = ranks_of_stage(self.plan, self.stage)[groups(self.plan, ("tp",))]
        return tuple(rows[(rows == self.number).any(axis=1)][0].tolist())

    @property
    def place(self) -> int:
        """Its place in the expert-parallel group."""
        return int(coordinate(self.plan, "ep")[self.position])

    @property
    def owner(self) -> int:
        """Its number among the ranks that share the experts of its place."""
        return int(coordinate(self.plan, "etp")[self.position])

    def place_rank(self, task: Task, place: int) -> int:
        """The rank at a place of its group, of an exchange of expert-parallel groups."""
        return int(mine(self._exchange(task), self.number).groups_NG[0, place])

    def target(self, task: Task) -> int:
        """Whom a send goes to."""
        groups_NG = self._exchange(task).groups_NG
        return int(groups_NG[groups_NG[:, 0] == self.number][0, 1])

    def _exchange(self, task: Task) -> Exchange:
        return self.program.exchanges[task.exchange]

    def ring(self, task: Task) -> Ring:
        """The rings of a gather or a reduction."""
        if task.exchange not in self._rings:
            self._rings[task.exchange] = Ring.of(self._exchange(task), self.scenario.cluster, self.number)
        return self._rings[task.exchange]

    def route(self, task: Task) -> Route:
        """The hops of an all-to-all."""
        if task.exchange not in self._routes:
            self._routes[task.exchange] = Route.of(self._exchange(task), self.scenario.cluster, self.number)
        return self._routes[task.exchange]

    # ---- tokens

    def _tensor(self, values: Ints | Sequence[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.int64), device=self.device)

    @cached_property
    def geometry(self) -> Geometry:
        """Sequences and places of a micro-batch, of all its tensor ranks together."""
        size, tp = self.plan.micro_batch, self.plan.tp
        length = self.scenario.workload.query_length
        places = self._group(0).reshape(size, -1)[0] % length
        if self.plan.cp == 1:
            return Geometry(batch=size, place_S=self._tensor(places), tp=tp)
        row = groups(self.plan, ("cp",))
        members = row[(row == self.position).any(axis=1)][0].tolist()
        keys = [self._group(0, member).reshape(size, -1)[0] % length for member in members]
        return Geometry(batch=size, place_S=self._tensor(places), tp=tp, place_K=self._tensor(np.concatenate(keys)))

    def _group(self, microbatch: int, position: int | None = None) -> Ints:
        """The tokens of all tensor ranks of a position (this one's), in order."""
        row = groups(self.plan, ("tp",))
        members = row[(row == (self.position if position is None else position)).any(axis=1)][0].tolist()
        given = {"plan": self.plan, "scenario": self.scenario}
        return np.concatenate(
            [token_numbers_T(**given, position=each, microbatch=microbatch) for each in members]  # type: ignore[arg-type]
        )

    def _table(self, *key: object, make: object) -> Tensor:
        if key not in self._tables:
            self._tables[key] = self._tensor(make())  # type: ignore[operator]
        return self._tables[key]

    def group_T(self, microbatch: int) -> Tensor:
        """The numbers in the batch of the tokens of its tensor ranks."""
        return self._table("group", microbatch, make=lambda: self._group(microbatch))

    def _layer_rows(self, task: Task) -> tuple[Choices, Rows]:
        assert self.choices is not None
        return self.choices, self.choices.layers[self.moe(task)]

    def chosen_TK(self, task: Task) -> Tensor:
        """The experts of each of its tokens."""
        choices, moe = self._layer_rows(task)[0], self.moe(task)
        return self._table(
            "chosen", moe, task.microbatch, make=lambda: choices.experts_TK(moe, task.microbatch, self.position)[0]
        )

    def local_N(self, task: Task, rows: Ints) -> Tensor:
        """The numbers of its tokens in some of its rows; padding is one past the last."""
        (choices, table), moe = self._layer_rows(task), self.moe(task)
        key = ("local", moe, task.microbatch, id(rows))
        return self._table(*key, make=lambda: choices.local_T(moe, task.microbatch, self.position, table.token_N[rows]))

    def row_TK(self, task: Task) -> Tensor:
        """Which of the rows that come back is each choice of each token; one past the last where it was dropped.

        Where copies are sent, choices that went to other nodes have no row, and a column more for each such node the
        sum that comes from there.
        """
        return self._table("row", self.moe(task), task.microbatch, make=lambda: self._row_TK(task))

    def _row_TK(self, task: Task) -> Ints:
        (choices, table), moe = self._layer_rows(task), self.moe(task)
        rows, top_k = self.rows(task), choices.top_k[moe]
        sent = np.concatenate(rows.sent)
        column = table.choice_N[sent] if rows.copies is None else rows.copies.column_N(top_k)
        real = np.flatnonzero(table.token_N[sent] != NOBODY)
        local = choices.local_T(moe, task.microbatch, self.position, table.token_N[sent[real]])
        row_TK = np.full((self.tokens, top_k + (0 if rows.copies is None else len(rows.copies.others))), len(sent))
        row_TK[local, column[real]] = real
        return row_TK

    def away_N(self, task: Task) -> Tensor:
        """Which of its (tokens + 1) x choices are those of `Copies.away_N`; padding is of the token past the last."""
        rows, (choices, table), moe = self.rows(task), self._layer_rows(task), self.moe(task)
        assert rows.copies is not None
        away = rows.copies.away_N
        local = self.local_N(task, away)
        return self._table("away", moe, task.microbatch, make=lambda: local * choices.top_k[moe] + table.choice_N[away])

    def rows(self, task: Task) -> RankRows:
        """Its rows in the layer of a task."""
        moe = self.moe(task)
        if moe not in self._rows:
            self._rows[moe] = self._rank_rows(self._layer_rows(task)[1], self._copies(task))
        return self._rows[moe]

    def _copies(self, task: Task) -> Copies | None:
        """The copies of the layer of a task, for an algorithm that sends such."""
        if self.plan.ep == 1 or not getattr(menu.module("collectives", self.plan.all_to_all), "COUNTS_COPIES", False):
            return None
        table, moe = self._layer_rows(task)[1], self.moe(task)
        exchange = next(each for each in self.tasks if each.kind == "dispatch" and self.moe(each) == moe).exchange
        return Copies(
            self.program.exchanges[exchange], self.scenario.cluster, self.number, table,
            np.flatnonzero(table.owner_N == self.owner), self.device,
        )  # fmt: skip

    def _rank_rows(self, table: Rows, copies: Copies | None) -> RankRows:
        parts, owners = range(self.plan.overlap_degree), range(self.plan.etp)
        come = [[table.received(self.place, owner, part) for owner in owners] for part in parts]
        slots = [table.slots(np.concatenate(each)) for each in come]
        sent = [table.sent(self.place, self.owner, part) for part in parts] if copies is None else [copies.sent_N]
        return RankRows(
            sent=tuple(sent),
            copies=copies,
            counts_GG=tuple(table.counts_GG(self.owner, part) for part in parts),
            by_slot=tuple(self._tensor(np.argsort(each, kind="stable")) for each in slots),
            slot_counts=tuple(tuple(np.bincount(each, minlength=table.columns_per_place).tolist()) for each in slots),
            owned=tuple(tuple(len(rows) for rows in each) for each in come),
        )  # fmt: skip


def _meet(one: Task, other: Task) -> bool:
    """Whether two tasks may be about the same weights: of one layer, if they say, and one micro-batch, if they say."""
    is_once = Pass.STEP in (one.passes, other.passes)
    return (one.layer == other.layer or other.kind == "optimizer") and (
        is_once or (one.microbatch, one.chunk) == (other.microbatch, other.chunk)
    )
