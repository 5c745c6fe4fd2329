"""A program: a plan written out as tasks per lane and stream, with dependencies. Two interpreters run it.

Axes: T tasks, D dependencies, R ranks, N groups, G ranks of a group, C flow classes, K link classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.measured import Table, at

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Stream(IntEnum):
    """The queues of one GPU. Each runs its tasks one after another, in the order in which the program lists them."""

    COMPUTE = 0
    TENSOR = 1
    """Exchanges of tensor, context and expert-tensor parallelism."""
    EXPERT = 2
    """Dispatch and combine."""
    SHARD = 3
    """Gradients out, parameters in."""
    PIPELINE = 4
    """Sends to the next and the previous stage."""


class Pass(IntEnum):
    """Which pass of a micro-batch a task belongs to."""

    FORWARD = 0
    BACKWARD = 1
    INPUT_GRADIENT = 2
    WEIGHT_GRADIENT = 3
    STEP = 4
    """Once a step: gradients, optimizer, parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel on one GPU, as a cost model sees it. `rows x depth` times `depth x columns`, `batch` times, or no
    GEMM. Attention has queries of all heads in `rows`, and in `depth` the mean of a head's elements in keys and values.
    """

    name: str
    kind: str
    dtype: str
    flops: float
    size_bytes: float
    """Read from and written to the GPU's memory."""
    rows: float = 0.0
    columns: float = 0.0
    depth: float = 0.0
    batch: float = 1.0
    rows_per_expert: tuple[float, ...] = ()
    is_backward: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Kernels that one task runs one after another. `kind`: attention, dense, router, shared, experts, head, ..."""

    kind: str
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exchange:
    """What one communication task moves, for all the groups of ranks that do it at the same time.

    all_to_all: `size_bytes * share_GG[i, j]` goes from member i to member j of every group (no matrix: equal shares,
    1/G). all_gather, reduce_scatter, all_reduce: `size_bytes` is the whole, gathered or unreduced, buffer of one
    member. send: from member 0 to member 1.
    """

    kind: str
    """dispatch, combine, tensor, context, expert_tensor, scores, gradients, parameters,
    tensor_gradients or send."""
    operation: str
    algorithm: str
    groups_NG: Ints
    size_bytes: float
    share_GG: Floats | None = None
    reach_GB: Floats | None = None
    """What part of `size_bytes` member i has for at least one member of block b: what goes to several members of a
    block counts once. Block b is the group's members in its b-th node, nodes in rising order. None: as in `share_GG`,
    every parcel has one destination.
    """


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Phase:
    """Flow classes of an exchange that run together, once the phase before has ended and `delay_s` has passed."""

    latency_s: float
    classes: tuple[int, ...]
    copy_s_per_byte: float = 0.0
    """Each byte of the exchange is copied in the GPUs' own memory before it goes."""
    host_share: float = 0.0
    """Of the exchange's bytes, those that its busiest member sends in all phases; told to the first one."""
    host: Table = ()
    """What the host was measured to take, by these bytes."""

    def delay_s(self, size_bytes: float) -> float:
        """Latency, the copies of an exchange of `size_bytes`, and what its host does."""
        return self.latency_s + self.copy_s_per_byte * size_bytes + at(self.host, self.host_share * size_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wave:
    """Transfers that run together, F of them: what a dish of the `collectives` menu makes of an exchange of one byte.

    `steps` latencies pass before the bytes flow: a ring of n ranks pays n - 1 of them. `group_F` is the row of
    `groups_NG`. Transfers of one `bundle_F` go at one pace, that of the slowest: the hops of a ring, each of which
    passes on what came. Each transfer is `messages` messages. Before the wave the busiest rank copies `copy_share` of
    the exchange's bytes in its own memory, to lay them out for it. A wave that `follows` passes on the pieces of the
    wave before as they come: both run together, and only its latency comes after the other's.
    """

    source_F: Ints
    target_F: Ints
    share_F: Floats
    group_F: Ints
    bundle_F: Ints
    steps: float = 1.0
    messages: float = 1.0
    copy_share: float = 0.0
    follows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rendezvous:
    """One exchange between lanes that must all arrive before it starts. The same exchange in other lanes is another
    one.
    """

    exchange: int
    lanes: tuple[int, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Flows:
    """Flows that must get the same rate, as one class each, on links that must be loaded alike, as one class each.

    A flow is a bundle of transfers at one pace. Exact by colour refinement: the flows of class c cross any one link
    of class k `crossing_CK[c, k]` times. Each transfer of class c moves `share_C[c]` times the `size_bytes` of its
    exchange, and keeps its wires busy for `extra_bytes_C[c]` more: the gaps between messages.
    """

    share_C: Floats
    extra_bytes_C: Floats
    count_C: Ints
    crossing_CK: Floats
    capacity_bytes_per_s_K: Floats
    link_kind_K: tuple[str, ...]
    num_links_K: Ints
    lanes_C: tuple[tuple[int, ...], ...]
    """The lanes that send or receive in a flow of the class."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lane:
    """Ranks that provably behave alike."""

    stage: int
    ranks_R: Ints

    @property
    def multiplicity(self) -> int:
        """How many ranks the lane stands for."""
        return len(self.ranks_R)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tasks:
    """The task table. `unit_T` is a work (on the compute stream) or a rendezvous (on the others)."""

    lane_T: Ints
    stream_T: Ints
    unit_T: Ints
    pass_T: Ints
    layer_T: Ints
    """-1: none, as for the optimizer."""
    microbatch_T: Ints
    chunk_T: Ints

    def __len__(self) -> int:
        return len(self.lane_T)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """All that a step does: what runs where (tasks), in which order (streams, dependencies), and what each task is."""

    lanes: tuple[Lane, ...]
    works: tuple[Work, ...]
    exchanges: tuple[Exchange, ...]
    meetings: tuple[Rendezvous, ...]
    flows: Flows
    tasks: Tasks
    before_D: Ints
    """Task `before_D[i]` ends before `after_D[i]` starts. The order within a stream is not repeated here."""
    after_D: Ints
    arbitration: str
    micro_op_bytes: float
    step_tokens: int
    model_flops: float
    """Of the model's equations for one step, recomputation left out."""
    num_gpus: int

    def kind(self, task: int) -> str:
        """The kind of a task: that of its work, or of its exchange."""
        unit = int(self.tasks.unit_T[task])
        if self.tasks.stream_T[task] == Stream.COMPUTE:
            return self.works[unit].kind
        return self.exchanges[self.meetings[unit].exchange].kind
