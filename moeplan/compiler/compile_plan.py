"""Plan to program: parts, their blocks, one fold into lanes, and the blocks laid out in the order of the schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moeplan import menu
from moeplan.compiler.blocks import Writer
from moeplan.compiler.lanes import Folding, fold
from moeplan.compiler.layout import Layout, Listing
from moeplan.compiler.parts import Parts
from moeplan.compiler.passes import PartBlocks
from moeplan.compiler.step import closing, opening
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints, Lane, Program, Rendezvous, Tasks
from moeplan.domain.scenario import Scenario
from moeplan.network.expand import Pattern, expand, pattern_key
from moeplan.partition.legal import check_plan
from moeplan.partition.ranks import coordinate, ranks_of_stage
from moeplan.partition.route import Load, Tokens, load_of
from moeplan.partition.stages import Pipeline, pipeline
from moeplan.schedules import Action, Order


def compile_plan(plan: Plan, scenario: Scenario, *, folded: bool = True) -> Program:
    """The program of one step. `folded=False`: one lane for every GPU, for checks on small clusters.

    Raises PlanError if the plan is not legal in the scenario. Memory is not looked at here.
    """
    check_plan(plan, scenario)
    return Compilation(plan=plan, scenario=scenario, folded=folded).program


@dataclass(eq=False)
class Compilation:
    """A legal plan's program, with what was made on the way to it."""

    plan: Plan
    scenario: Scenario
    folded: bool = True

    def on(self, cluster: Cluster) -> Compilation:
        """The plan's program where figures of the cluster are others, and its shape is the same.

        Only what hangs on them is made anew: nothing, if they are of the GPU alone, and it copies as fast and begins
        exchanges as soon.
        """
        here = self.scenario.cluster
        moves = [(gpu.copy_bytes_per_s, gpu.exchange_start_s) for gpu in (here.gpu, cluster.gpu)]
        if here.spec.model_copy(update={"gpu": cluster.gpu}) == cluster.spec and moves[0] == moves[1]:
            return self
        other = Compilation(plan=self.plan, scenario=replace(self.scenario, cluster=cluster), folded=self.folded)
        for name in _WITHOUT_WIRES:
            other.__dict__[name] = getattr(self, name)
        pairs = ((other.folding.lane_R, self.folding.lane_R), (other.meetings[1], self.meetings[1]))
        if all(np.array_equal(*pair) for pair in pairs):
            other.__dict__["tasks"] = self.tasks
        return other

    @cached_property
    def load(self) -> Load | None:
        return load_of(self.scenario, self.plan, rank_tokens=Tokens.of(self.plan, self.scenario.workload).rank)

    @cached_property
    def pipeline(self) -> Pipeline:
        return pipeline(self.scenario.model, self.plan, self.scenario.workload)

    @cached_property
    def parts(self) -> Parts:
        return Parts(
            model=self.scenario.model, plan=self.plan, workload=self.scenario.workload, load=self.load,
            gpus_per_node=self.scenario.cluster.gpus_per_node,
        )  # fmt: skip

    @cached_property
    def num_places(self) -> int:
        return 1 if self.load is None or self.load.is_even else self.plan.ep

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        return orders(self.plan, self.scenario)

    @cached_property
    def part_blocks(self) -> dict[tuple[int, int], PartBlocks]:
        """By pipeline rank and place."""
        return {
            (stage, place): PartBlocks(Writer(parts=self.parts, stage=stage, place=place), self.pipeline)
            for stage in range(self.plan.pp)
            for place in range(self.num_places)
        }

    @cached_property
    def listings(self) -> dict[tuple[int, int], Listing]:
        return {
            key: listing(blocks, self.orders[key[0]], training=self.scenario.workload.is_training)
            for key, blocks in self.part_blocks.items()
        }

    @cached_property
    def patterns(self) -> tuple[list[Pattern], Ints]:
        """Distinct patterns, and which of them each exchange follows."""
        _ = self.listings  # writing the blocks is what names the exchanges
        numbers: dict[tuple[object, ...], int] = {}
        which = [numbers.setdefault(pattern_key(exchange), len(numbers)) for exchange in self.parts.exchanges]
        first: list[int] = np.unique(which, return_index=True)[1].tolist() if which else []
        return [expand(self.parts.exchanges[index], self.scenario.cluster) for index in first], np.array(
            which, np.int64
        )

    @cached_property
    def part_R(self) -> tuple[Ints, Ints]:
        """Pipeline rank and place of every GPU."""
        stage = np.empty(self.plan.world_size, np.int64)
        place = np.zeros(self.plan.world_size, np.int64)
        for each in range(self.plan.pp):
            ranks = ranks_of_stage(self.plan, each)
            stage[ranks] = each
            if self.num_places > 1:
                place[ranks] = coordinate(self.plan, "ep")
        return stage, place

    @cached_property
    def folding(self) -> Folding:
        stage, place = self.part_R
        part = stage * self.num_places + place if self.folded else np.arange(self.plan.world_size)
        return fold(self.patterns[0], part_R=part, cluster=self.scenario.cluster)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        lane_R, stage = self.folding.lane_R, self.part_R[0]
        order = np.argsort(lane_R, kind="stable")
        bounds = np.cumsum(np.bincount(lane_R))[:-1]
        return tuple(Lane(stage=int(stage[ranks[0]]), ranks_R=ranks) for ranks in np.split(order, bounds))

    @cached_property
    def meetings(self) -> tuple[tuple[Rendezvous, ...], Ints]:
        """All meetings, and which of them `[exchange, lane]` is."""
        found: list[Rendezvous] = []
        table = np.full((len(self.parts.exchanges), len(self.lanes)), -1, np.int64)
        for exchange, pattern in enumerate(self.patterns[1]):
            for meeting in self.folding.meetings[pattern]:
                lanes = self._senders(exchange, meeting.lanes)
                table[exchange, list(lanes)] = len(found)
                found.append(Rendezvous(exchange=exchange, lanes=lanes, phases=meeting.phases))
        return tuple(found), table

    def _senders(self, exchange: int, lanes: tuple[int, ...]) -> tuple[int, ...]:
        """A send is the sender's task alone; everything else is a task of all."""
        if self.parts.exchanges[exchange].operation != "send":
            return lanes
        source = int(self.parts.exchanges[exchange].groups_NG[0, 0])
        stage = self.part_R[0][source]
        return tuple(lane for lane in lanes if self.lanes[lane].stage == stage)

    @cached_property
    def tasks(self) -> tuple[Tasks, Ints, Ints]:
        """All tasks, and the (before, after) of every dependency."""
        stage, place = self.part_R
        layout = Layout(plan=self.plan, pipeline=self.pipeline, lane_R=self.folding.lane_R)
        for number, lane in enumerate(self.lanes):
            first = int(lane.ranks_R[0])
            layout.add(number, lane, self.listings[int(stage[first]), int(place[first])])
        return layout.tasks(self.meetings[1])

    @cached_property
    def program(self) -> Program:
        """The program of one step."""
        tasks, before, after = self.tasks
        return Program(
            lanes=self.lanes,
            works=tuple(self.parts.works),
            exchanges=tuple(self.parts.exchanges),
            meetings=self.meetings[0],
            flows=self.folding.flows,
            tasks=tasks,
            before_D=before,
            after_D=after,
            arbitration=self.plan.arbitration,
            micro_op_bytes=MICRO_OP_BYTES,
            step_tokens=self.scenario.workload.step_tokens,
            model_flops=model_flops(self.scenario),
            num_gpus=self.plan.world_size,
        )


_WITHOUT_WIRES = ("load", "pipeline", "parts", "num_places", "orders", "part_blocks", "listings", "part_R")
"""What of a compilation asks nothing of the cluster but its shape."""

MICRO_OP_BYTES = 30e6
"""Of gradient traffic under `a2a_first`: the best size of Li et al., "Lina" (USENIX ATC 2023), section 6."""


def orders(plan: Plan, scenario: Scenario) -> tuple[Order, ...]:
    """What each pipeline rank does, first to last; serving has forward passes alone."""
    microbatches = plan.num_microbatches(scenario.workload.global_batch)
    if not scenario.workload.is_training:
        return (tuple((Action("F", 0, microbatch),) for microbatch in range(microbatches)),) * plan.pp
    found: tuple[Order, ...] = menu.load("schedules", plan.schedule, "actions")(
        plan.pp, microbatches, num_chunks=plan.vpp
    )
    return found


def listing(blocks: PartBlocks, order: Order, *, training: bool) -> Listing:
    """The blocks of one part in the order of its slots, between what opens and what closes the step."""
    chunks = _chunk_order(blocks, order)
    slots = tuple(tuple((blocks.block(action.kind, action.chunk), action) for action in slot) for slot in order)
    if not training:
        return Listing(opening=None, slots=slots, closing=None)
    first, last = chunks
    return Listing(opening=opening(blocks, first), slots=slots, closing=closing(blocks, last))


def _chunk_order(blocks: PartBlocks, order: Order) -> tuple[list[int], list[int]]:
    """Chunks by first use and by last use; with two holders of each stage by virtual stage, down and up."""
    if blocks.pipeline.schedule.COPIES > 1:
        held = blocks.pipeline.virtual[blocks.writer.stage]
        rising = sorted(range(len(held)), key=held.__getitem__)
        return rising, rising[::-1]
    flat = [action.chunk for slot in order for action in slot]
    first = list(dict.fromkeys(flat))
    last = list(dict.fromkeys(flat[::-1]))[::-1]
    return first, last


def model_flops(scenario: Scenario) -> float:
    """FLOPs of the model's equations for one step: forward, and twice that for the backward pass of a training step."""
    workload = scenario.workload
    forward = scenario.model.forward_flops(
        tokens=workload.step_tokens, sequence=workload.query_length, context=workload.sequence
    )
    return float(forward * (3 if workload.is_training else 1))
